"""The scoring loop: one jitted pass over records that writes per-token score tables as Parquet.

A table is `scores/<run>/seed<k>/<variant>/<role>-NNNNN.parquet`, one row per example, list columns per scored token.
Shards are written whole or not at all, so an interrupted pass continues with the first missing one. Files hold token
ids of private text: mode 0600.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from kd_jax import sharding
from kd_jax.data.batches import scoring_batches
from kd_jax.data.encode import EOS, RESPONSE, Encoded, ragged
from kd_jax.errors import ConfigError
from kd_jax.head import Stats, head_stats
from kd_jax.transformer import Transformer

FIELDS = ("logp", "log1m_p", "entropy", "logp_std", "rank", "ties", "top1_id", "top1_logp", "top2_gap")  # `basic`

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

    return jax.jit(step, out_shardings=NamedSharding(mesh, P(sharding.BATCH)))


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
    step = _compiled(spec, mesh)
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = -(-spec.batch_rows // split) * split
    scored: list[tuple[np.ndarray, np.ndarray]] = []  # examples of a batch, and how many tokens each has
    parts: list[dict[str, np.ndarray]] = []
    for (batch, examples, counts), fields in _ahead(
        step, model, scoring_batches(encoded, indices, row_length=spec.row_length, batch_rows=rows), mesh
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


def _ahead(step: Callable, model: Transformer, batches: Iterable[tuple], mesh: Mesh, depth: int = 2):
    """Yield (item, fields) for the items of `scoring_batches`, `depth` of them dispatched ahead of the host."""
    wanted = ("tokens", "targets", "segment_ids", "positions", "loss_mask")
    queue: deque = deque()
    for item in batches:
        queue.append((item, step(model, sharding.place_batch({k: item[0][k] for k in wanted}, mesh))))
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
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    integers = {
        "target_id": pa.int32(),
        "segment": pa.int8(),
        "rank": pa.int32(),
        "ties": pa.int32(),
        "top1_id": pa.int32(),
    }
    columns = {
        "example_id": pa.array([str(i) for i in encoded.example_id[indices]]),
        "role": pa.array([role] * len(indices)),
        "task": pa.array([str(t) for t in encoded.task[indices]]),
        "n_tokens": pa.array(counts, pa.int32()),
        "n_bytes": pa.array(encoded.n_bytes[indices], pa.int32()),
        "zlib_bytes": pa.array(encoded.zlib_bytes[indices], pa.int32()),
        "first_div": pa.array(first_divergence(counts, fields["top1_id"], fields["target_id"]), pa.int32()),
    }
    ordered = ["target_id", "segment", *FIELDS, *sorted(set(fields) - {"target_id", "segment", *FIELDS})]
    for name in ordered:
        values = pa.array(fields[name], integers.get(name, pa.float32()))
        columns[name] = pa.ListArray.from_arrays(offsets, values)
    return pa.table(columns)


def write_table(path: Path, rows: pa.Table, metadata: dict[str, str]) -> None:
    """Write Parquet (zstd) under a temporary name, then rename; mode 0600."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as handle:
        pq.write_table(rows.replace_schema_metadata(metadata), handle, compression="zstd")
    os.replace(temporary, path)


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
    for shard, start in enumerate(range(0, len(encoded), spec.shard_examples)):
        indices = np.arange(start, min(start + spec.shard_examples, len(encoded)))
        path = folder / f"{role}-{shard:05d}.parquet"
        if path.exists():
            bar.update(len(indices))
            continue
        counts, fields = score(model, encoded, indices, spec, mesh, bar=bar)
        write_table(path, table(encoded, indices, role, counts, fields), metadata)
