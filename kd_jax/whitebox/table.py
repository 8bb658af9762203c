"""White-box tables: what needs a run's weights, per example.  `scores/<run>/seed<k>/whitebox/<role>-NNNNN.parquet`

Which runs are looked into (`config.whitebox.runs`, the `null`, and the bases that students are compared with), on which
examples (the same for all runs), and the table that holds what `blocks`, `lens` and `gradients` find.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping

import numpy as np
import pyarrow as pa
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from kd_jax import score as scoring
from kd_jax.data.encode import Encoded
from kd_jax.data.records import uniform
from kd_jax.errors import ConfigError
from kd_jax.graph import Run
from kd_jax.storage import Path
from kd_jax.transformer import Transformer
from kd_jax.whitebox.blocks import noise, swap
from kd_jax.whitebox.gradients import gradients
from kd_jax.whitebox.lens import lens
from kd_jax.whitebox.spec import Whitebox, block_names

SHARD = 256  # examples of a file: a start after an interruption repeats at most so many


def check(config: ConfigDict, runs: Mapping[str, Run], roles: Collection[str]) -> None:
    """Raises ConfigError where `config.whitebox` names a run that is not there or a role without records.

    roles: those that some record has. Forms and numbers are checked by `Whitebox`.
    """
    w = config.whitebox
    checks = [
        (set(w.runs) <= set(runs), f"runs names {_first(w.runs, runs)!r}, which is not a run; runs: {sorted(runs)}"),
        (not w.runs or bool(w.roles), "roles is empty: name private and heldout"),
        (not w.runs or set(w.roles) <= set(roles), f"roles: no record has the role {_first(w.roles, roles)!r}"),
        (w.examples >= 0, f"examples must be positive, or 0 for all, got {w.examples}"),
    ]
    for good, message in checks:
        if not good:
            raise ConfigError(f"whitebox.{message}")


def _first(wanted: Collection[str], known: Collection[str]) -> str:
    return next((name for name in wanted if name not in known), "")


def chosen(config: ConfigDict, runs: Mapping[str, Run]) -> set[str]:
    """The runs that get white-box tables: those named, their bases, and `null`, whose profile stands beside theirs."""
    named = set(config.whitebox.runs)
    if named and "null" in runs:
        named.add("null")
    return named | {base_of(runs, name, runs[name].seeds[0])[0] for name in named}


def base_of(runs: Mapping[str, Run], name: str, seed: int) -> tuple[str, int]:
    """Run and seed in which the chain of `init` begins: the model before any training here; of a base itself."""
    while init := runs[name].init:
        name, seed = init, runs[init].seed_for(seed)
    return name, seed


def examples(encoded: Encoded, count: int, seed: int) -> Encoded:
    """The `count` examples (0: all) whose ids have the smallest seeded hash, in the order of `encoded`."""
    if not 0 < count < len(encoded):
        return encoded
    rank = uniform(seed, "whitebox", encoded.example_id)
    return encoded.take(np.sort(np.argsort(rank, kind="stable")[:count]))


def describe(metadata: dict[str, str], spec: Whitebox, model: Transformer, base: str) -> dict[str, str]:
    """Metadata of a white-box table, from those of the run's plain table; base: the run compared with, or ""."""
    facts = dict(draws=spec.draws, sigma=spec.sigma, relative_sigma=spec.relative_sigma, noise_seed=spec.seed)
    facts |= dict(base=base or None, forms=list(spec.forms))
    told = {"blocks": json.dumps(list(block_names(model.cfg))), "whitebox": json.dumps(facts)}
    return metadata | {"variant": "whitebox"} | told


def whitebox_role(
    model: Transformer,
    base: Transformer | None,
    encoded: Encoded,
    role: str,
    folder: Path,
    spec: Whitebox,
    mesh: Mesh,
    metadata: dict[str, str],
    bar: tqdm,
) -> None:
    """Look into `model` with all of `encoded` (one role) and write the tables; shards that exist are kept.

    base: the model to swap blocks with, of the same shape; without one the form `swap` is left out.
    metadata: of `describe`.
    """

    def make(indices: np.ndarray) -> pa.Table:
        columns = whitebox_table(model, base, encoded, indices, role, spec, mesh)
        bar.update(len(indices))
        return columns

    scoring.write_shards(make, len(encoded), role, folder, SHARD, metadata, bar)


def whitebox_table(
    model: Transformer,
    base: Transformer | None,
    encoded: Encoded,
    indices: np.ndarray,
    role: str,
    spec: Whitebox,
    mesh: Mesh,
) -> pa.Table:
    """One row per example: identity, `nll`, and the columns of every form.

    Lists have one value per block, `lens` one per number of layers read.
    """
    place = (encoded, indices, spec, mesh)
    makers = {
        "noise": lambda: noise(model, *place),
        "swap": lambda: swap(model, base, *place) if base is not None else {},
        "lens": lambda: lens(model, *place),
        "gradient": lambda: gradients(model, *place),
    }
    found: dict[str, np.ndarray] = {}
    for form in makers:
        if form in spec.forms:
            found = makers[form]() | found  # each form has its own pass of the plain model: one `nll` stands for all
    ordered = {"nll": found.pop("nll"), **found}
    counts = encoded.scored_lengths[indices]
    return pa.table(scoring.identity(encoded, indices, role, counts) | {k: _column(v) for k, v in ordered.items()})


def _column(values: np.ndarray) -> pa.Array:
    """[n] as numbers, [n, k] as lists of k, all float32."""
    flat = pa.array(values.astype(np.float32).ravel(), pa.float32())
    if values.ndim == 1:
        return flat
    return pa.ListArray.from_arrays(pa.array(np.arange(len(values) + 1) * values.shape[1], pa.int32()), flat)
