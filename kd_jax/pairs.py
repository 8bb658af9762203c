"""Pair tables: how a student's distribution differs from its teacher's, token by token, over the whole vocabulary.

A table is `scores/pairs/<a>__<b>/seed<k>/<role>-NNNNN.parquet` (a the teacher, b the student, k the student's seed;
slashes in a name become dots), one row per example, list columns per scored token. Both models are on the mesh at once;
no logits are kept. To a reader it is a variant of the student's score tables: its metadata are those of the student's
plain table with `variant="pair:<a>"`, `run_a, run_b, temperature`, and `pair` in the provenance.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable

import jax
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from kd_jax import score as scoring
from kd_jax.data.encode import Encoded
from kd_jax.errors import ConfigError
from kd_jax.graph import Run
from kd_jax.head import PAIR_FIELDS, Comparison, head_pair
from kd_jax.score import Scoring
from kd_jax.storage import Path
from kd_jax.transformer import Transformer


def chosen(wanted: tuple[str, ...], runs: dict[str, Run]) -> list[tuple[str, str]]:
    """Pairs (teacher, student) of `config.score.pairs`: `students` stands for every student with its own teacher,
    `a:b` for run a in the teacher's place and run b in the student's.

    Raises ConfigError naming the entry where its runs do not exist.
    """
    pairs = []
    for entry in wanted:
        if entry == "students":
            pairs += [(run.teacher, name) for name, run in runs.items() if name.startswith("students/") and run.teacher]
            continue
        a, _, b = entry.partition(":")
        if not {a, b} <= set(runs) or a == b:
            raise ConfigError(
                f"score.pairs: {entry!r} is neither 'students' nor two different runs as in 'teacher:students/kd'; "
                f"runs: {sorted(runs)}"
            )
        pairs.append((a, b))
    return list(dict.fromkeys(pairs))


def folder_of(scores: Path, a: str, b: str, seed: int) -> Path:
    """Where the tables of a pair lie below the folder of all score tables."""
    return scores / "pairs" / f"{a}__{b}".replace("/", ".") / f"seed{seed}"


def describe(metadata: dict[str, str], a: str, seed_a: int, temperature: float) -> dict[str, str]:
    """Metadata of a pair table, from those of the student's plain table; a and seed_a: the teacher."""
    pair = {"teacher": a, "seed": seed_a, "temperature": temperature}
    provenance = json.loads(metadata["provenance"]) | {"pair": pair}
    told = {"run_a": a, "run_b": metadata["run"], "variant": f"pair:{a}", "temperature": f"{temperature:g}"}
    return metadata | told | {"provenance": json.dumps(provenance)}


@functools.lru_cache(maxsize=8)
def make_pair_step(spec: Scoring, temperature: float, mesh: Mesh) -> Callable:
    """`step((model_a, model_b), batch) -> {field: [R, T]}` with the fields of `head_pair`; 0 outside `loss_mask`."""
    comparison = Comparison(spec.vocab, temperature, spec.chunk)

    def step(models: tuple[Transformer, Transformer], batch: dict) -> dict[str, jax.Array]:
        flat = lambda x: x.reshape((-1,) + x.shape[2:])
        inputs = (batch["tokens"], batch["segment_ids"], batch["positions"])
        with jax.default_matmul_precision(spec.precision):
            sides = [x for m in models for x in (flat(m.hidden(*inputs, dtype=np.float32)), m.head())]
            fields = head_pair(*sides, flat(batch["targets"]), flat(batch["loss_mask"]), comparison)
        return {k: v.reshape(batch["tokens"].shape) for k, v in fields.items()}

    return jax.jit(step, out_shardings=NamedSharding(mesh, P()))


def score_pair_role(
    model_a: Transformer,
    model_b: Transformer,
    encoded: Encoded,
    role: str,
    folder: Path,
    spec: Scoring,
    mesh: Mesh,
    metadata: dict[str, str],
    bar: tqdm,
    *,
    temperature: float = 1.0,
) -> None:
    """Compare teacher a and student b on all of `encoded` (one role) into `folder`; shards that exist are kept.

    metadata: of `describe`.  temperature: at which the student was distilled; that of the KL gradient in `cos_ce_kl`.
    """
    step = make_pair_step(spec, temperature, mesh)

    def make(indices: np.ndarray) -> pa.Table:
        counts, fields = scoring.run_step(step, (model_a, model_b), encoded, indices, spec, mesh, bar=bar)
        return table(encoded, indices, role, counts, fields)

    scoring.write_shards(make, len(encoded), role, folder, spec.shard_examples, metadata, bar)


def table(encoded: Encoded, indices: np.ndarray, role: str, counts: np.ndarray, fields: dict) -> pa.Table:
    """One row per example: ids and sizes, then list columns per scored token."""
    ordered = {name: fields[name] for name in ("target_id", "segment", *PAIR_FIELDS)}
    return pa.table(scoring.identity(encoded, indices, role, counts) | scoring.list_columns(counts, ordered))
