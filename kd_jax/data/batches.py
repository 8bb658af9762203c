"""Packed batches: several examples in a row, none of which sees another; the order is seeded and resumable.

A batch is a dict of arrays [R, T] (R rows, T row_length), aligned to the PREDICTOR:
    tokens       int32, 0 on padding
    targets      int32, the token at t + 1 of the same example; 0 where there is none
    segment_ids  int32, 1, 2, ... for a row's examples; 0 on padding
    positions    int32, from 0 in every example
    loss_mask    bool, whether the target at t is scored: response or EOS (every predicted token of plain text)
    example      int32, index into the Encoded that it comes from; -1 on padding
"""

from collections.abc import Iterator

import grain
import numpy as np

from kd_jax.data.encode import EOS, RESPONSE, Encoded, ragged
from kd_jax.data.records import DataError

Batch = dict[str, np.ndarray]

# Rows that stay open to later items. Dolly fills its rows of 512 tokens to 98 %, and more open rows gain nothing.
_OPEN_ROWS = 64


def pack(
    lengths: np.ndarray, row_length: int, *, order: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Puts items into rows: each into the fullest open row that takes it (best fit, a bounded number of open rows).

    Args:
        lengths: [n], each at most `row_length`.
        row_length: a row's capacity.
        order: the order in which items are placed (default: as they come). The result depends on nothing else.

    Returns:
        row [n], start [n] (where in its row an item begins; a row has no gaps), and the number of rows.
    """
    order = np.arange(len(lengths)) if order is None else order
    row, start = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.int64)
    free, index = np.zeros(_OPEN_ROWS, np.int64), np.zeros(_OPEN_ROWS, np.int64)
    n_rows = 0
    for item, need in zip(order.tolist(), lengths[order].tolist(), strict=True):
        slot = np.where(free >= need, free, row_length + 1).argmin()
        if free[slot] < need:  # fits nowhere: close the fullest row, open a new one
            slot = free.argmin()
            free[slot], index[slot] = row_length, n_rows
            n_rows += 1
        row[item], start[item] = index[slot], row_length - free[slot]
        free[slot] -= need
    return row, start, n_rows


class TrainingRows:
    """Random access to the packed rows of all epochs; every epoch holds every example once, in an order of its own.

    Only the plan is kept (one int32 per example and epoch); a row is built when it is asked for.

    Attributes:
        epoch_rows: [epochs + 1], the row at which each epoch begins, and the number of all rows.
    """

    def __init__(self, encoded: Encoded, *, row_length: int, packed: bool, seed: int, epochs: int) -> None:
        _check_lengths(encoded, np.arange(len(encoded)), row_length)
        self._encoded, self._row_length = encoded, row_length
        self._scored = encoded.scored_lengths
        plans, sizes, n_rows = [], [], []
        for epoch in range(epochs):
            order = np.random.default_rng([seed, epoch]).permutation(len(encoded))
            if packed:
                row, start, count = pack(encoded.lengths, row_length, order=order)
                order = np.lexsort((start, row))
                size = np.bincount(row, minlength=count)
            else:
                size, count = np.ones(len(order), np.int64), len(order)
            plans.append(order.astype(np.int32))
            sizes.append(size)
            n_rows.append(count)
        self._examples = np.concatenate(plans)
        self._first = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
        self.epoch_rows = np.concatenate([[0], np.cumsum(n_rows)])

    def __len__(self) -> int:
        return len(self._first) - 1

    def largest_batch(self, batch_rows: int) -> int:
        """Examples of the fullest batch."""
        edges = self._first[np.minimum(np.arange(0, len(self) + batch_rows, batch_rows), len(self))]
        return int(np.diff(edges).max())

    def __getitem__(self, row: int) -> Batch:
        """Row `row` as a dict of [T] arrays; a row past the last one is empty (all padding)."""
        return {key: value[0] for key, value in self.batch(np.array([row])).items()}

    def batch(self, rows: np.ndarray) -> Batch:
        """These rows as a dict of [len(rows), T] arrays; rows past the last one are empty."""
        examples, sizes = self._of(rows)
        return _layout(self._encoded, examples, sizes, self._row_length)

    def examples(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The examples of these rows in their order, and the scored tokens of each: int64 [k]."""
        examples = self._of(rows)[0].astype(np.int64)
        return examples, self._scored[examples]

    def _of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Examples of these rows, and how many each row has."""
        inside = np.minimum(rows, len(self) - 1)
        sizes = np.where(rows < len(self), self._first[inside + 1] - self._first[inside], 0)
        return self._examples[ragged(self._first[inside], sizes)], sizes


def training_iterator(rows: TrainingRows, *, batch_rows: int, own: np.ndarray | None = None) -> grain.DatasetIterator:
    """Iterates over global batches of `batch_rows` rows and yields this process's part of each.

    `own` says which rows of a batch the devices of this process hold (`kd_jax.sharding.own_rows`); default: all. Beside
    them a batch has `examples` [k], the examples of the whole batch in its order (one may come twice), and `counts`
    [k], their scored tokens: the same on every process. The last batch is filled up with empty rows. `get_state` is a
    small JSON-able dict, the same in every process and for every number of processes; after `set_state` the next batch
    is exactly the one that would have come.
    """
    own = np.arange(batch_rows) if own is None else own
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(grain.MapDataset.source(_ProcessBatches(rows, batch_rows, own)).to_iter_dataset(options))


class _ProcessBatches:
    """Random access to one process's part of every global batch: the source of the grain pipeline."""

    def __init__(self, rows: TrainingRows, batch_rows: int, own: np.ndarray) -> None:
        self._rows, self._batch_rows, self._own = rows, batch_rows, own

    def __len__(self) -> int:
        return -(-len(self._rows) // self._batch_rows)

    def __getitem__(self, step: int) -> Batch:
        first = step * self._batch_rows
        examples, counts = self._rows.examples(np.arange(first, first + self._batch_rows))
        return self._rows.batch(first + self._own) | {"examples": examples, "counts": counts}


def one_batch(encoded: Encoded, *, row_length: int, packed: bool, multiple: int) -> tuple[Batch, np.ndarray]:
    """All of `encoded` in one batch of few rows, a multiple of `multiple`; the last rows may be empty.

    Returns the batch, and the examples in the order in which their scored tokens lie in it (row-major).
    """
    _check_lengths(encoded, np.arange(len(encoded)), row_length)
    if packed:
        row, start, n_rows = pack(encoded.lengths, row_length, order=np.argsort(-encoded.lengths, kind="stable"))
    else:
        row, start, n_rows = np.arange(len(encoded)), np.zeros(len(encoded), np.int64), len(encoded)
    order = np.lexsort((start, row))
    sizes = np.bincount(row, minlength=-(-n_rows // multiple) * multiple)
    return _layout(encoded, order, sizes, row_length), order


def scoring_batches(
    encoded: Encoded, indices: np.ndarray, *, row_length: int, batch_rows: int
) -> Iterator[tuple[Batch, np.ndarray, np.ndarray]]:
    """Yields every example of `indices` once, in packed batches of one fixed shape.

    Yields:
        (batch, examples [k], counts [k]): read in row-major order, the positions where batch["loss_mask"] is set are
        the scored tokens of these examples (indices into `encoded`), `counts` tokens each, one example after the other.
    """
    indices = np.asarray(indices)
    _check_lengths(encoded, indices, row_length)
    lengths = encoded.lengths[indices]
    # Longest first packs best; the order plays no part in a score.
    row, start, n_rows = pack(lengths, row_length, order=np.argsort(-lengths, kind="stable"))
    examples = indices[np.lexsort((start, row))]
    sizes = np.bincount(row, minlength=-(-n_rows // batch_rows) * batch_rows)
    ends = np.cumsum(sizes)
    scored = encoded.scored_lengths
    for first in range(0, n_rows, batch_rows):
        last = first + batch_rows - 1
        chosen = examples[ends[first] - sizes[first] : ends[last]]
        yield _layout(encoded, chosen, sizes[first : last + 1], row_length), chosen, scored[chosen]


def _layout(encoded: Encoded, examples: np.ndarray, per_row: np.ndarray, row_length: int) -> Batch:
    """Lays the examples out row by row, `per_row` of them in each, without gaps."""
    n_rows = len(per_row)
    lengths = encoded.lengths[examples]
    row = np.repeat(np.arange(n_rows), per_row)
    rank = ragged(np.zeros(n_rows, np.int64), per_row)  # which of its row an example is
    before = np.cumsum(lengths) - lengths  # tokens in front of it, over all rows
    row_before = before[np.minimum(np.cumsum(per_row) - per_row, len(examples) - 1)] if len(examples) else before
    place = ragged(row * row_length + before - row_before[row], lengths)
    source = ragged(encoded.offsets[examples], lengths)
    # Whether a token has a successor in its own example, and whether that is scored.
    has_next = np.ones(len(source), bool)
    has_next[before + lengths - 1] = False
    after = source[has_next] + 1

    def spread(values: np.ndarray, at: np.ndarray, dtype: type, fill: int = 0) -> np.ndarray:
        array = np.full(n_rows * row_length, fill, dtype)
        array[at] = values
        return array.reshape(n_rows, row_length)

    return {
        "tokens": spread(encoded.tokens[source], place, np.int32),
        "targets": spread(encoded.tokens[after], place[has_next], np.int32),
        "segment_ids": spread(np.repeat(rank + 1, lengths), place, np.int32),
        "positions": spread(ragged(np.zeros_like(lengths), lengths), place, np.int32),
        "loss_mask": spread(np.isin(encoded.segment[after], (RESPONSE, EOS)), place[has_next], np.bool_),
        "example": spread(np.repeat(examples, lengths), place, np.int32, fill=-1),
    }


def _check_lengths(encoded: Encoded, indices: np.ndarray, row_length: int) -> None:
    if not len(indices):
        raise DataError("there are no examples to batch")
    longest = indices[encoded.lengths[indices].argmax()]
    if (length := encoded.lengths[longest]) > row_length:
        raise DataError(f"example {encoded.example_id[longest]} has {length} tokens, a row only {row_length}")
