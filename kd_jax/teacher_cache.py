"""The teacher's side of the loss on fixed data: computed once, written to disk, and read in every later epoch.

What is kept are the teacher's last hidden states, one row per scored token. Together with the head's weights they give
its whole distribution, so the loss is that of an uncached run to rounding (`kind="exact"`). `kind="top_k"` keeps k ids
and log-probabilities instead: smaller, and biased, because all other ids are one outcome to the loss.

    folder/hidden-00000.npy ...              [tokens, E] float32, or bfloat16 as the same bits in uint16
    folder/ids-00000.npy, logp-00000.npy     [tokens, k] int32 and float32, for top_k
    folder/manifest.json                     written last

Files are written whole or not at all, so an interrupted build continues with the first missing one. Each ends in the
sha256 of what is before, which NumPy does not read: damaged ones are made again. They hold what a teacher makes of
private text: mode 0600.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import pathlib
from collections.abc import Callable
from typing import BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax import manifest, processes, sharding, storage
from kd_jax.data.batches import Batch, scoring_batches
from kd_jax.data.encode import EOS, RESPONSE, Encoded
from kd_jax.errors import ConfigError
from kd_jax.head import head_topk
from kd_jax.manifest import StaleWork
from kd_jax.metrics import progress
from kd_jax.storage import Path
from kd_jax.transformer import Transformer

log = logging.getLogger(__name__)

KINDS = ("exact", "top_k")
DTYPES = ("float32", "bfloat16")
SHARD_BYTES = 128 << 20  # of one file: what an interruption costs at most, and what a build holds in memory
BIASED = "biased: the ids outside the k most probable ones are one outcome to the loss, with the mass that is left"


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """What is kept of the teacher, and how it is computed."""

    kind: str = "exact"  # exact | top_k
    dtype: str = "float32"  # of kept hidden states: float32 | bfloat16; log-probabilities are always float32
    k: int = 0  # ids per token of top_k
    row_length: int = 512  # tokens of a packed row of the build
    batch_rows: int = 8  # rows of a batch of the build
    compute_dtype: str = "float32"  # of the teacher's forward pass: the recipe's, for the losses of its uncached run
    temperature: float = 1.0  # of top_k's log-probabilities: the recipe's teacher_T

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"cache is {self.kind!r}; known are {', '.join(KINDS)}")
        for key, value in (("cache_dtype", self.dtype), ("compute_dtype", self.compute_dtype)):
            if value not in DTYPES:
                raise ConfigError(f"{key} is {value!r}, a teacher cache takes {', '.join(DTYPES)}")
        if (self.k > 0) != (self.kind == "top_k") or self.k < 0:
            raise ConfigError(f"cache_k must be positive for cache top_k and 0 for exact, got {self.k} for {self.kind}")
        if self.row_length < 1 or self.batch_rows < 1 or self.temperature <= 0:
            raise ConfigError("row length, rows and temperature of a teacher cache must be positive")

    @property
    def identity(self) -> dict[str, str | int | float]:
        """The settings that decide what is kept; rows and batches of the build change nothing but rounding."""
        own = ("dtype",) if self.kind == "exact" else ("k", "temperature")
        return {name: getattr(self, name) for name in ("kind", "compute_dtype", *own)}

    def columns(self, width: int) -> dict[str, tuple[np.dtype, int]]:
        """What a token has: name -> (dtype, numbers), for hidden states of `width` numbers."""
        if self.kind == "exact":
            return {"hidden": (np.dtype(self.dtype), width)}
        return {"ids": (np.dtype(np.int32), self.k), "logp": (np.dtype(np.float32), self.k)}


def build(
    folder: Path, teacher: Transformer, encoded: Encoded, spec: CacheSpec, mesh: Mesh, inputs: dict, vocab: int
) -> Cache:
    """Write what is missing of the cache of `encoded` in `folder`, and open it.

    Args:
        teacher: placed on `mesh`.
        encoded: the data; `Cache.batch` takes batches that were made from it, packed in any way.
        inputs: what decides the result besides `spec` and `encoded`: fingerprints of teacher, tokenizer and so on.
        vocab: the effective vocabulary.

    Raises:
        StaleWork: the folder holds a cache from other inputs, or a damaged file; names it.
        ConfigError: `folder` is in a bucket, more bytes are needed than the disk has free, or k exceeds the vocabulary;
            before any work.
    """
    if spec.k > vocab:
        raise ConfigError(f"cache_k is {spec.k}, the vocabulary has {vocab} tokens")
    if not storage.is_local(folder):
        raise ConfigError(f"{folder}: a cache is mapped into memory: use a local --workdir, or cache none")
    cache = Cache(folder, encoded, spec, teacher.cfg.embed_dim)
    inputs = inputs | {"cache": spec.identity, "vocab": vocab, "encoded": encoded.fingerprint()}
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    finished = manifest.begin(folder, inputs, "the teacher cache")
    if missing := processes.agree(cache.missing(checked=finished) if processes.first() else None):
        _check_space(cache, missing)
        _write_shards(cache, missing, teacher, mesh, vocab)
    cache.open()
    if not finished:
        facts = {"tokens": cache.tokens, "bytes": cache.tokens * cache.token_bytes, "kind": repr(cache)}
        manifest.end(folder, inputs, facts)
    return cache


class Cache:
    """Random access to the teacher's side of every scored token; made by `build`.

    A token's row is its rank among the scored tokens of `encoded`, in the order of the examples. A shard holds the rows
    of whole examples, `SHARD_BYTES` or a little more.

    Attributes:
        tokens: scored tokens.
        token_bytes: bytes that each has.
    """

    def __init__(self, folder: Path, encoded: Encoded, spec: CacheSpec, width: int) -> None:
        self.folder, self.encoded, self.spec = folder, encoded, spec
        self.columns = spec.columns(width)
        self.token_bytes = sum(dtype.itemsize * size for dtype, size in self.columns.values())
        # A scored token's row is found at its predictor, which is where batches have it.
        scored = np.zeros(len(encoded.tokens), bool)
        scored[:-1] = np.isin(encoded.segment[1:], (RESPONSE, EOS))
        scored[encoded.offsets[1:] - 1] = False  # what comes next is another example's
        self.tokens = int(scored.sum())
        self._row = np.where(scored, np.cumsum(scored) - 1, -1)
        counts = encoded.scored_lengths
        starts = np.cumsum(counts) - counts
        shard = starts // max(1, SHARD_BYTES // self.token_bytes)
        shard = np.maximum.accumulate(np.where(counts > 0, shard, 0))  # no shard without a token
        self.first_example = np.flatnonzero(np.diff(shard, prepend=-1))  # of every shard
        self.first_row = np.append(starts[self.first_example], self.tokens)
        self._maps: dict[str, list[np.ndarray]] = {}

    def __repr__(self) -> str:
        what = self.spec.dtype if self.spec.kind == "exact" else f"k={self.spec.k}, {BIASED}"
        return f"Cache({self.spec.kind}, {what}; {self.tokens} tokens, {self.tokens * self.token_bytes} bytes)"

    def path(self, column: str, shard: int) -> Path:
        return self.folder / f"{column}-{shard:05d}.npy"

    def missing(self, *, checked: bool) -> list[int]:
        """Shards that lack a file or, where no manifest was `checked` for that, have a damaged one."""
        shards, good = range(len(self.first_example)), pathlib.Path.exists if checked else _whole
        return [shard for shard in shards if not all(good(self.path(c, shard)) for c in self.columns)]

    def open(self) -> None:
        """Map all files. Raises StaleWork if one is damaged."""
        sizes = np.diff(self.first_row)
        self._maps = {
            name: [_map(self.path(name, shard), (int(n), width), dtype) for shard, n in enumerate(sizes)]
            for name, (dtype, width) in self.columns.items()
        }

    def rows(self, batch: Batch) -> np.ndarray:
        """The rows of a batch's scored tokens, where its loss_mask is set: int64 [scored], in row-major order."""
        mask = batch["loss_mask"]
        rows = self._row[self.encoded.offsets[batch["example"][mask]] + batch["positions"][mask]]
        if (rows < 0).any():
            raise ValueError(f"{(rows < 0).sum()} tokens are not in {self.folder}: the batch is made from other data")
        return rows

    def batch(self, batch: Batch) -> dict[str, np.ndarray]:
        """The teacher's side of a batch that was made from the cached data.

        Args:
            batch: arrays [..., T] as `kd_jax.data.batches` makes them; `loss_mask`, `example`, `positions` are read.

        Returns:
            `teacher_hidden` [..., T, E] in the dtype that is kept, or `teacher_ids` int32 and `teacher_logp` float32
            [..., T, k]; 0 where `loss_mask` is False.
        """
        mask, rows = batch["loss_mask"], self.rows(batch)
        cells = np.flatnonzero(mask)
        shard = np.searchsorted(self.first_row, rows, side="right") - 1
        out = {}
        for name, (dtype, width) in self.columns.items():
            values = np.zeros((mask.size, width), dtype)
            for number in np.unique(shard):
                own = shard == number
                values[cells[own]] = self._maps[name][number][rows[own] - self.first_row[number]]
            out[f"teacher_{name}"] = values.reshape(*mask.shape, width)
        return out


# ----------------------------------------------------------------------------------------------------------- files


def _map(path: Path, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):  # what NumPy raises for a file that ends early, by where it ends
        array = None
    if array is None or array.shape != shape or array.dtype.itemsize != dtype.itemsize:
        raise StaleWork(f"{path} is damaged or cut short: delete it and start again, it is written anew")
    return array.view(dtype)


def _save(path: Path, array: np.ndarray) -> None:
    with storage.create(path) as handle:
        sealed = _Sealed(handle)
        np.save(sealed, array.view(np.uint16) if array.dtype == jnp.bfloat16 else array)  # NumPy's files know no bf16
        handle.write(sealed.summary.digest())


class _Sealed:
    """A handle to write with, and the sha256 of what was written."""

    def __init__(self, handle: BinaryIO) -> None:
        self._handle, self.summary = handle, hashlib.sha256()

    def write(self, part: bytes) -> int:
        self.summary.update(part)
        return self._handle.write(part)


def _whole(path: Path) -> bool:
    """Is there a file as it was written? One that is damaged is named in the log."""
    if not path.exists():
        return False
    content = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)
    end = len(content) - hashlib.sha256().digest_size
    if end < 0 or hashlib.sha256(content[:end]).digest() != content[end:].tobytes():
        log.warning("damaged: %s; made again", path)
        return False
    return True


def _check_space(cache: Cache, shards: list[int]) -> None:
    needed = int(np.diff(cache.first_row)[shards].sum()) * cache.token_bytes
    free = storage.free_bytes(cache.folder)
    if needed > free:
        raise ConfigError(
            f"the teacher cache needs {needed / 2**30:.2f} GiB more, {cache.folder} has {free / 2**30:.2f} GiB free: "
            "use another --workdir, cache_dtype bfloat16, cache top_k, or cache none"
        )


# ----------------------------------------------------------------------------------------------------------- build


def make_step(spec: CacheSpec, vocab: int, mesh: Mesh) -> Callable:
    """`step(teacher, batch) -> {column: [R, T, numbers]}`, what is kept of every scored token."""

    def step(teacher: Transformer, batch: dict) -> dict[str, jax.Array]:
        where = (batch["tokens"], batch["segment_ids"], batch["positions"])
        h = teacher.hidden(*where, dtype=jnp.dtype(spec.compute_dtype))
        if spec.kind == "exact":
            return {"hidden": h.astype(spec.dtype)}
        flat, mask = h.reshape(-1, h.shape[-1]), batch["loss_mask"].reshape(-1)
        ids, logp = head_topk(flat, teacher.head(), mask, spec.k, vocab, spec.temperature)
        shape = (*h.shape[:2], spec.k)
        return {"ids": ids.reshape(shape), "logp": logp.reshape(shape)}

    return jax.jit(step, out_shardings=NamedSharding(mesh, P()))


def _write_shards(cache: Cache, shards: list[int], teacher: Transformer, mesh: Mesh, vocab: int) -> None:
    spec = cache.spec
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    layout = dict(row_length=spec.row_length, batch_rows=-(-spec.batch_rows // split) * split)
    step = make_step(spec, vocab, mesh)
    ends = np.append(cache.first_example[1:], len(cache.encoded))
    wanted = ("tokens", "segment_ids", "positions", "loss_mask")
    tokens = np.diff(cache.first_row)
    with progress(int(tokens[shards].sum()), "teacher cache", unit="token") as bar:
        for shard in shards:
            arrays = {name: np.empty((tokens[shard], n), dtype) for name, (dtype, n) in cache.columns.items()}
            indices = np.arange(cache.first_example[shard], ends[shard])
            for batch, _, counts in scoring_batches(cache.encoded, indices, **layout):
                found = step(teacher, sharding.place_batch({k: batch[k] for k in wanted}, mesh, whole=True))
                rows = cache.rows(batch) - cache.first_row[shard]
                for name, array in arrays.items():
                    array[rows] = np.asarray(found[name])[batch["loss_mask"]]
                bar.update(int(counts.sum()))
            if processes.turn(shard):
                for name, array in arrays.items():
                    _save(cache.path(name, shard), array)
    processes.barrier(f"teacher cache in {cache.folder}")
