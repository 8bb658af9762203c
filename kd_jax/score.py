"""The scoring loop: one jitted pass over records that writes per-token score tables as Parquet.

A table is `scores/<run>/seed<k>/<variant>/<role>-NNNNN.parquet`, one row per example, list columns per scored token.
Shards are written whole or not at all, so an interrupted pass continues with the first missing one. Files hold token
ids of private text: mode 0600.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterable

import jax
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from kd_jax import processes, sharding
from kd_jax.data.batches import scoring_batches
from kd_jax.data.encode import EOS, RESPONSE, Encoded, ragged
from kd_jax.errors import ConfigError
from kd_jax.head import Stats, head_stats
from kd_jax.storage import Path, whole, write_parquet
from kd_jax.transformer import Transformer

FIELDS = ("logp", "log1m_p", "entropy", "logp_std", "rank", "ties", "top1_id", "top1_logp", "top2_gap")  # `basic`

TYPES = dict.fromkeys(("target_id", "rank", "ties", "top1_id"), pa.int32()) | {
    "segment": pa.int8(),
    "agree": pa.bool_(),
    "hit_b": pa.bool_(),
}  # of list columns; all others are float32

PRECISIONS = ("highest", "high", "default")


@dataclasses.dataclass(frozen=True)
class Scoring:
    """Settings of a scoring pass; all of them are part of a table's fingerprint."""

    vocab: int
    row_length: int  # tokens per packed row
    batch_rows: int = 8
    shard_examples: int = 4096
    precision: str = "highest"  # of matrix products; attacks that subtract two tables refuse mixed precision
    temperatures: tuple[float, ...] = ()
    top_k: tuple[int, ...] = ()
    top_p: tuple[float, ...] = ()
    chunk: int = 0

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(f"score.precision is {self.precision!r}; known are {', '.join(PRECISIONS)}")
        if self.batch_rows < 1:
            raise ConfigError(f"score.batch_rows must be positive, got {self.batch_rows}")

    @property
    def stats(self) -> Stats:
        return Stats(self.vocab, self.temperatures, self.top_k, self.top_p, self.chunk)


def make_score_step(spec: Scoring, mesh: Mesh) -> Callable:
    """`step(model, batch) -> {field: [R, T]}`, float32 throughout; 0 where `loss_mask` is False."""

    def step(model: Transformer, batch: dict) -> dict[str, jax.Array]:
        with jax.default_matmul_precision(spec.precision):
            h = model.hidden(batch["tokens"], batch["segment_ids"], batch["positions"], dtype=np.float32)
            flat = lambda x: x.reshape((-1,) + x.shape[2:])
            fields = head_stats(flat(h), model.head(), flat(batch["targets"]), flat(batch["loss_mask"]), spec.stats)
        return {k: v.reshape(batch["tokens"].shape) for k, v in fields.items()}

    return jax.jit(step, out_shardings=NamedSharding(mesh, P()))  # every process gets all of it: it is small


@functools.lru_cache(maxsize=8)
def _compiled(spec: Scoring, mesh: Mesh) -> Callable:
    return make_score_step(spec, mesh)


def score(
    model: Transformer, encoded: Encoded, indices: np.ndarray, spec: Scoring, mesh: Mesh, *, bar: tqdm | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Score the examples `indices` of `encoded`.

    Returns `(counts [n], fields)`: scored tokens per example in the order of `indices`, and flat `[counts.sum()]`
    arrays of every field plus `target_id` and `segment`, grouped by example in that order.
    """
    return run_step(_compiled(spec, mesh), model, encoded, indices, spec, mesh, bar=bar)


def run_step(
    step: Callable, models, encoded: Encoded, indices: np.ndarray, spec: Scoring, mesh: Mesh, *, bar: tqdm | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """`score` with another step than that of one model: `step(models, batch) -> {field: [R, T]}`."""
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = -(-spec.batch_rows // split) * split
    scored: list[tuple[np.ndarray, np.ndarray]] = []  # examples of a batch, and how many tokens each has
    parts: list[dict[str, np.ndarray]] = []
    for (batch, examples, counts), fields in _ahead(
        step, models, scoring_batches(encoded, indices, row_length=spec.row_length, batch_rows=rows), mesh
    ):
        mask = batch["loss_mask"]
        parts.append({k: np.asarray(v)[mask] for k, v in fields.items()} | {"target_id": batch["targets"][mask]})
        scored.append((examples, counts))
        if bar is not None:
            bar.update(len(examples))
    examples, counts = (np.concatenate(column) for column in zip(*scored))
    place = np.full(len(encoded), -1, np.int64)
    place[indices] = np.arange(len(indices))
    order = np.argsort(np.repeat(place[examples], counts), kind="stable")  # an example's tokens stay in their order
    fields = {k: np.concatenate([p[k] for p in parts])[order] for k in parts[0]}
    return counts[np.argsort(place[examples])], fields | {"segment": _scored_segments(encoded, indices)}


def _ahead(step: Callable, models, batches: Iterable[tuple], mesh: Mesh, depth: int = 2):
    """Yield (item, fields) for the items of `scoring_batches`, `depth` of them dispatched ahead of the host."""
    wanted = ("tokens", "targets", "segment_ids", "positions", "loss_mask")
    queue: deque = deque()
    for item in batches:
        queue.append((item, step(models, sharding.place_batch({k: item[0][k] for k in wanted}, mesh, whole=True))))
        if len(queue) > depth:
            yield queue.popleft()
    yield from queue


def _scored_segments(encoded: Encoded, indices: np.ndarray) -> np.ndarray:
    """Segments of the scored targets of the examples, flat, in the order of `indices`."""
    flat = ragged(encoded.offsets[indices] + 1, encoded.lengths[indices] - 1)  # the first token has no predictor
    segment = encoded.segment[flat]
    return segment[np.isin(segment, (RESPONSE, EOS))]


# ---------------------------------------------------------------------------------------------------------- tables


def first_divergence(counts: np.ndarray, top1_id: np.ndarray, target_id: np.ndarray) -> np.ndarray:
    """Leading scored tokens that greedy decoding gets right, per example `[n]` (its length where all are right)."""
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
    within = np.arange(len(top1_id)) - np.repeat(starts, counts)
    miss = np.where(top1_id != target_id, within, np.repeat(counts, counts))
    first = counts.astype(np.int64).copy()
    some = counts > 0
    if some.any():
        first[some] = np.minimum.reduceat(miss, starts[some])
    return first


def table(
    encoded: Encoded, indices: np.ndarray, role: str, counts: np.ndarray, fields: dict[str, np.ndarray]
) -> pa.Table:
    """One row per example: ids and sizes, then list columns per scored token."""
    columns = identity(encoded, indices, role, counts) | {
        "n_bytes": pa.array(encoded.n_bytes[indices], pa.int32()),
        "zlib_bytes": pa.array(encoded.zlib_bytes[indices], pa.int32()),
        "first_div": pa.array(first_divergence(counts, fields["top1_id"], fields["target_id"]), pa.int32()),
    }
    ordered = ["target_id", "segment", *FIELDS, *sorted(set(fields) - {"target_id", "segment", *FIELDS})]
    return pa.table(columns | list_columns(counts, {name: fields[name] for name in ordered}))


def identity(encoded: Encoded, indices: np.ndarray, role: str, counts: np.ndarray) -> dict[str, pa.Array]:
    """The columns by which every table knows its examples."""
    return {
        "example_id": pa.array([str(i) for i in encoded.example_id[indices]]),
        "role": pa.array([role] * len(indices)),
        "task": pa.array([str(t) for t in encoded.task[indices]]),
        "n_tokens": pa.array(counts, pa.int32()),
    }


def list_columns(counts: np.ndarray, fields: dict[str, np.ndarray]) -> dict[str, pa.ListArray]:
    """Flat arrays as one list of `counts[i]` values per example."""
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    typed = {name: pa.array(values, TYPES.get(name, pa.float32())) for name, values in fields.items()}
    return {name: pa.ListArray.from_arrays(offsets, values) for name, values in typed.items()}


def score_role(
    model: Transformer,
    encoded: Encoded,
    role: str,
    folder: Path,
    spec: Scoring,
    mesh: Mesh,
    metadata: dict[str, str],
    bar: tqdm,
) -> None:
    """Score all of `encoded` (one role) into `folder`; shards that exist are kept."""

    def make(indices: np.ndarray) -> pa.Table:
        return table(encoded, indices, role, *score(model, encoded, indices, spec, mesh, bar=bar))

    write_shards(make, len(encoded), role, folder, spec.shard_examples, metadata, bar)


def write_shards(
    make: Callable[[np.ndarray], pa.Table], n: int, role: str, folder: Path, size: int, metadata: dict, bar: tqdm
) -> None:
    """Write `make(indices)` for every `size` of n examples as a shard of its own; whole ones that exist are kept.

    All processes make every table; they take turns in writing.
    """
    starts = range(0, n, size)
    paths = [folder / f"{role}-{shard:05d}.parquet" for shard in range(len(starts))]
    done = processes.agree([whole(path, sealed=True) for path in paths] if processes.first() else None)
    for shard, (start, path) in enumerate(zip(starts, paths)):
        indices = np.arange(start, min(start + size, n))
        if done[shard]:
            bar.update(len(indices))
            continue
        rows = make(indices)
        if processes.turn(shard):
            write_parquet(path, rows, metadata)
    processes.barrier(f"scores of role {role} in {folder}")
