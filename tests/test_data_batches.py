"""Packing and batches: a row by hand, nothing lost or mixed, resumable order, parts of processes."""

import itertools
import json

import numpy as np
import pytest

from kd_jax.data import batches, encode, synthetic, tokenizer
from kd_jax.data.encode import EOS, PROMPT, RESPONSE, SPECIAL
from kd_jax.data.records import DataError


def encoded_by_hand(*examples: tuple[list[int], list[int]]) -> encode.Encoded:
    tokens, segments = ([np.array(part[k]) for part in examples] for k in (0, 1))
    n = len(examples)
    ids = np.array([f"e{i}" for i in range(n)], object)
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in tokens])])
    flat = (np.concatenate(tokens).astype(np.int32), offsets, np.concatenate(segments).astype(np.int8))
    zeros = np.zeros(n, np.int32)
    return encode.Encoded(ids, ids, np.full(n, "t", object), *flat, zeros, zeros, {})


@pytest.fixture(scope="module")
def encoded() -> encode.Encoded:
    corpus = synthetic.generate(300, overlap=0.0, seed=0)
    tok = tokenizer.load({"train_size": 400}, train_texts=corpus.response)
    return encode.encode(corpus, tok, template="plain", bos="eos", max_length=128, max_prompt=96)


def occurrences(batch: batches.Batch) -> list[tuple[int, list[int], list[int], list[int]]]:
    """Every (example, tokens, targets, scored) of a batch, by walking over its rows."""
    found = []
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            here = batch["segment_ids"][row] == segment
            (example,) = set(batch["example"][row][here].tolist())
            assert batch["positions"][row][here].tolist() == list(range(here.sum()))
            assert np.diff(np.flatnonzero(here)).tolist() == [1] * (here.sum() - 1)
            found.append((example, *(batch[key][row][here].tolist() for key in ("tokens", "targets", "loss_mask"))))
    return found


def check_batch(batch: batches.Batch, encoded: encode.Encoded) -> list[int]:
    """Holds the whole contract of a batch; returns the examples in it."""
    padding = batch["segment_ids"] == 0
    assert (batch["example"][padding] == -1).all() and (batch["example"][~padding] >= 0).all()
    assert not batch["tokens"][padding].any() and not batch["loss_mask"][padding].any()
    for example, tokens, targets, scored in occurrences(batch):
        own = slice(encoded.offsets[example], encoded.offsets[example + 1])
        assert tokens == encoded.tokens[own].tolist()
        assert targets == [*tokens[1:], 0]
        assert scored == [s in (RESPONSE, EOS) for s in encoded.segment[own][1:].tolist()] + [False]
    return [found[0] for found in occurrences(batch)]


def test_a_batch_by_hand():
    # EOS, BOS and padding are all id 0 here: nothing may go by the id.
    records = encoded_by_hand(
        ([0, 11, 12, 13, 0], [SPECIAL, PROMPT, PROMPT, RESPONSE, EOS]),
        ([21, 22], [RESPONSE, RESPONSE]),
        ([31, 0, 33, 34], [PROMPT, RESPONSE, RESPONSE, RESPONSE]),
    )
    (only,) = list(batches.scoring_batches(records, np.arange(3), row_length=8, batch_rows=2))
    batch, examples, counts = only
    expected = {
        "tokens": [[0, 11, 12, 13, 0, 21, 22, 0], [31, 0, 33, 34, 0, 0, 0, 0]],
        "targets": [[11, 12, 13, 0, 0, 22, 0, 0], [0, 33, 34, 0, 0, 0, 0, 0]],
        "segment_ids": [[1, 1, 1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0, 0, 0]],
        "positions": [[0, 1, 2, 3, 4, 0, 1, 0], [0, 1, 2, 3, 0, 0, 0, 0]],
        "loss_mask": [[0, 0, 1, 1, 0, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]],
        "example": [[0, 0, 0, 0, 0, 1, 1, -1], [2, 2, 2, 2, -1, -1, -1, -1]],
    }
    assert {key: value.astype(int).tolist() for key, value in batch.items()} == expected
    assert examples.tolist() == [0, 1, 2] and counts.tolist() == [2, 1, 3]
    assert {key: value.dtype.name for key, value in batch.items()} == dict.fromkeys(expected, "int32") | {
        "loss_mask": "bool"
    }


def test_pack_by_hand():
    # 5 opens row 0; 4 does not fit into its 1, opens row 1; 1 fills row 0; 2 fills row 1; 6 opens row 2.
    row, start, n_rows = batches.pack(np.array([5, 4, 1, 2, 6]), 6)
    assert (row.tolist(), start.tolist(), n_rows) == ([0, 1, 0, 1, 2], [0, 0, 5, 4, 0], 3)
    row, start, n_rows = batches.pack(np.array([5, 4, 1, 2, 6]), 6, order=np.array([4, 3, 1, 0, 2]))
    assert (row.tolist(), start.tolist(), n_rows) == ([2, 1, 2, 1, 0], [0, 2, 5, 0, 0], 3)
    row, start, n_rows = batches.pack(np.array([4, 5, 1]), 6)
    assert (row.tolist(), start.tolist(), n_rows) == ([0, 1, 1], [0, 0, 5], 2)  # the fullest row that takes it


def test_pack_never_overfills_and_has_no_gaps():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 65, 5000)
    order = rng.permutation(5000)
    row, start, n_rows = batches.pack(lengths, 64, order=order)
    by_place = np.lexsort((start, row))
    for r in range(n_rows):
        own = by_place[row[by_place] == r]
        assert start[own].tolist() == [0, *np.cumsum(lengths[own])[:-1].tolist()]
        assert lengths[own].sum() <= 64
    assert lengths.sum() / (n_rows * 64) > 0.95


@pytest.mark.parametrize("packed", [True, False])
def test_every_epoch_holds_every_example_once(encoded, packed):
    rows = batches.TrainingRows(encoded, row_length=256, packed=packed, seed=3, epochs=3)
    order = []
    for first, last in itertools.pairwise(rows.epoch_rows):
        seen = check_batch(rows.batch(np.arange(first, last)), encoded)
        assert sorted(seen) == list(range(len(encoded)))
        order.append(seen)
    assert order[0] != order[1] != order[2]
    assert len(rows) == rows.epoch_rows[-1]
    assert len(rows) < 3 * len(encoded) * 2 / 3 if packed else len(rows) == 3 * len(encoded)


def test_a_row_is_the_batch_of_one(encoded):
    rows = batches.TrainingRows(encoded, row_length=160, packed=True, seed=0, epochs=1)
    both = rows.batch(np.array([4, 7]))
    for i, row in enumerate((4, 7)):
        for key, value in rows[row].items():
            np.testing.assert_array_equal(value, both[key][i])
    assert (rows[len(rows) + 5]["example"] == -1).all()  # past the end: padding


def test_parts_of_processes_join_to_the_global_batch_and_the_last_is_padded(encoded):
    rows = batches.TrainingRows(encoded, row_length=160, packed=True, seed=0, epochs=2)
    whole = list(batches.training_iterator(rows, batch_rows=12))
    assert len(whole) == -(-len(rows) // 12) and len(rows) % 12  # so that there is a partial batch
    seen = [example for batch in whole for example in check_batch(batch, encoded)]
    assert sorted(seen) == sorted([*range(len(encoded))] * 2)
    own = [np.array([0, 1, 6, 7]), np.array([2, 3]), np.array([4, 5, 8, 9, 10, 11])]  # as a mesh may deal them out
    parts = [list(batches.training_iterator(rows, batch_rows=12, own=rows_of)) for rows_of in own]
    for step, batch in enumerate(whole):
        assert batch["tokens"].shape == (12, 160)
        for key, value in batch.items():
            for rows_of, part in zip(own, parts):
                wanted = value if key in ("examples", "counts") else value[rows_of]
                np.testing.assert_array_equal(part[step][key], wanted)
        # what every process is told of the whole batch, counted from its arrays
        first = (batch["example"] >= 0) & (batch["positions"] == 0)
        np.testing.assert_array_equal(batch["examples"], batch["example"][first])
        owner = np.cumsum(first.reshape(-1)) - 1
        counts = np.bincount(owner[batch["loss_mask"].reshape(-1)], minlength=int(first.sum()))
        np.testing.assert_array_equal(batch["counts"], counts)


def test_a_resumed_iterator_gives_the_exact_next_batch(encoded):
    def iterator(**process):
        rows = batches.TrainingRows(encoded, row_length=160, packed=True, seed=11, epochs=2)
        return batches.training_iterator(rows, batch_rows=8, **process)

    whole = list(iterator())
    interrupted = iterator()
    for _ in range(5):
        next(interrupted)
    state = json.loads(json.dumps(interrupted.get_state()))
    resumed = iterator()
    resumed.set_state(state)
    rest = list(resumed)
    assert len(rest) == len(whole) - 5
    for left, right in zip(whole[5:], rest, strict=True):
        for key in left:
            np.testing.assert_array_equal(left[key], right[key])
    # The state of one process serves any number of them.
    second = iterator(own=np.arange(4, 8))
    second.set_state(state)
    np.testing.assert_array_equal(next(second)["tokens"], whole[5]["tokens"][4:])


def test_order_depends_on_the_seed_alone(encoded):
    def first(seed):
        return batches.TrainingRows(encoded, row_length=160, packed=True, seed=seed, epochs=1).batch(np.arange(4))

    np.testing.assert_array_equal(first(1)["tokens"], first(1)["tokens"])
    assert (first(1)["tokens"] != first(2)["tokens"]).any()


def test_scoring_covers_each_example_once_and_says_where(encoded):
    indices = np.arange(len(encoded))[::3]
    seen = []
    for batch, examples, counts in batches.scoring_batches(encoded, indices, row_length=160, batch_rows=7):
        assert batch["tokens"].shape == (7, 160)
        assert sorted(check_batch(batch, encoded)) == sorted(examples.tolist())
        np.testing.assert_array_equal(batch["example"][batch["loss_mask"]], np.repeat(examples, counts))
        targets = np.split(batch["targets"][batch["loss_mask"]], np.cumsum(counts)[:-1])
        for example, scored in zip(examples, targets, strict=True):
            own = slice(encoded.offsets[example], encoded.offsets[example + 1])
            response = encoded.tokens[own][np.isin(encoded.segment[own], (RESPONSE, EOS))]
            np.testing.assert_array_equal(scored, response)
        seen += examples.tolist()
    assert sorted(seen) == indices.tolist()


def test_too_long_and_empty(encoded):
    with pytest.raises(DataError, match=r"example [0-9a-f]{16} has \d+ tokens, a row only 20"):
        batches.TrainingRows(encoded, row_length=20, packed=True, seed=0, epochs=1)
    with pytest.raises(DataError, match="a row only 20"):
        next(batches.scoring_batches(encoded, np.arange(3), row_length=20, batch_rows=2))
    with pytest.raises(DataError, match="no examples"):
        next(batches.scoring_batches(encoded, np.array([], int), row_length=20, batch_rows=2))
