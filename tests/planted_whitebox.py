"""Invented white-box tables: what weights say of records, with a leak planted in the blocks one likes."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from planted_scores import PROVENANCE, World

FORMS = ("noise_absolute", "noise_relative", "swap", "swap_back", "lens", "gradient_block")
WHOLE = ("mope", "mope_antithetic", "gradient_1", "gradient_2", "gradient_inf", "gradient_global", "emergence")
LESS = {"gradient_block", "gradient_1", "gradient_2", "gradient_inf", "gradient_global", "emergence"}  # of a member
SETTINGS = {"draws": 4, "sigma": 0.01, "relative_sigma": 0.05, "noise_seed": 0, "base": None, "forms": ["noise"]}


def names(layers: int) -> list[str]:
    return ["embedding", *map(str, range(layers)), "head"]


def leak_in(layers: int, block: int | None, size: float = 1.0) -> np.ndarray:
    """What members show more at each of the L + 2 blocks, in standard deviations: at one block alone, or at none."""
    return size * (np.arange(layers + 2) == (-1 if block is None else block))


def columns(rng, n: int, blocks: int, shift: np.ndarray, forms=FORMS, whole: float | None = None) -> dict:
    """Columns of n records of one role. shift [blocks]: see `leak_in`; whole: that of the whole model."""
    hard = rng.normal(size=(n, 1))  # what makes all blocks' scores of a record alike
    found = {"nll": 3 + 0.3 * hard[:, 0]}
    for name in forms:
        sign = -1 if name in LESS else 1
        values = 0.7 * hard + 0.7 * rng.normal(size=(n, blocks)) + sign * shift
        found[name] = 5 + values[:, : blocks - (name == "lens")]
    for name in WHOLE:
        sign = -1 if name in LESS else 1
        found[name] = 5 + hard[:, 0] + rng.normal(size=n) + sign * (shift.max() if whole is None else whole)
    return found


def write(
    world: World,
    run: str,
    shift: np.ndarray,
    *,
    seed: int = 0,
    examples: int | None = None,
    forms=FORMS,
    whole: float | None = None,
    members: str = "private",
    base: str | None = None,
    roles=("private", "heldout"),
    **provenance,
) -> None:
    """White-box tables of the first `examples` records of both roles; `members` show `shift` more at each block."""
    for role in roles:
        made = world.roles[role]
        ids, task, lengths = (made[key][:examples] for key in ("ids", "tasks", "lengths"))
        more = shift if role == members else np.zeros_like(shift)
        found = columns(world.rng, len(ids), len(shift), more, forms, whole if role == members else 0.0)
        save(world, table(ids, role, task, lengths, found), run, role, len(shift) - 2, seed, base=base, **provenance)


def table(ids, role: str, task, lengths, found: dict) -> pa.Table:
    told = {"example_id": ids, "role": [role] * len(ids), "task": task, "n_tokens": pa.array(lengths, pa.int32())}
    lists = {name: pa.array(list(map(list, v)) if v.ndim > 1 else v) for name, v in found.items()}
    kinds = {name: pa.list_(pa.float32()) if v.ndim > 1 else pa.float32() for name, v in found.items()}
    return pa.table(told | {name: lists[name].cast(kinds[name]) for name in found})


def save(world: World, made: pa.Table, run, role, layers, seed=0, shard=0, base=None, **provenance) -> None:
    told = {"run": run, "seed": str(seed), "step": "10", "variant": "whitebox"}
    told |= {"provenance": json.dumps(PROVENANCE | provenance), "blocks": json.dumps(names(layers))}
    told["whitebox"] = json.dumps(SETTINGS | {"base": base})
    path = world.folder / run / f"seed{seed}" / "whitebox" / f"{role}-{shard:05d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(made.replace_schema_metadata(told), path)
