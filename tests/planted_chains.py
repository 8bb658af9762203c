"""A folder of shadow chains with invented tables: what a record does to a teacher and to its student is known."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from attacks.chains import MODELS, Chains, chain_folder
from tests.planted_scores import PROVENANCE, World

SIZES = {"teacher": "2 layers x 64, 0.21 M parameters", "student": "2 layers x 32, 0.06 M parameters"}
CYCLES = {"full": 2, "cheap": 2, "two_by_two": 4}


def halves(design: str, chains: int, group: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(teacher_in, student_in, pairs): one fair coin a group, complementary pairs, quadruples for two_by_two."""
    rng, (names, codes) = np.random.default_rng(seed), np.unique(group, return_inverse=True)
    coin = lambda: rng.random(len(names))[codes] < 0.5
    none, teachers, students, cycle = np.zeros(len(codes), bool), [], [], CYCLES[design]
    fixed = coin()
    for _ in range(chains // cycle):
        a, b = fixed if design == "cheap" else coin(), coin()
        teachers += [a, ~a] * (cycle // 2)
        students += [b, b, ~b, ~b] if design == "two_by_two" else [none, none]
    return np.array(teachers), np.array(students), np.arange(chains) // cycle


def write_chains(
    folder: Path,
    *,
    design: str = "full",
    chains: int = 8,
    records: int = 60,
    population: int = 40,
    direct: float = 0.8,
    inherited: float = 0.3,
    noise: float = 0.1,
    group_size: int = 1,
    seed: int = 0,
    **provenance,
) -> tuple[np.ndarray, np.ndarray]:
    """Write SCORES/shadow under `folder`; returns teacher_in and student_in, bool [chains, records], by example id.

    records: of the pool, half of each role.  direct: nats a token that a record in a model's own training data gains
    there (`direct` on the teacher; in two_by_two on the student for its own half).  inherited: nats that a record of
    the teacher's data gains on the student.  noise: of every model, per token.  group_size: records that belong
    together.  provenance: of every table.
    """
    world = World(folder, {"private": records // 2, "heldout": records // 2, "population": population}, seed, 12)
    ids = np.concatenate([world.roles[role]["ids"] for role in ("private", "heldout")])
    role = np.repeat(["private", "heldout"], records // 2)
    task = np.concatenate([world.roles[name]["tasks"] for name in ("private", "heldout")])
    order = np.argsort(ids)
    ids, role, task = ids[order], role[order], task[order]
    group = np.array([f"group-{i // group_size:05d}" for i in range(records)])
    teacher_in, student_in, pairs = halves(design, chains, group, seed)
    told = dict(design=design, chains=chains, seed=seed, hash=f"hash{seed}", pairs=pairs.tolist())
    told |= dict(technique="kd", setting="shared" if design == "two_by_two" else "disjoint")
    told |= {f"{model}_size": words for model, words in SIZES.items()}
    frame = pd.DataFrame({"example_id": ids, "role": role, "task": task, "group": group})
    frame["teacher_in"], frame["student_in"] = teacher_in.T.tolist(), student_in.T.tolist()
    path = Path(folder) / "shadow" / "design.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in told.items()}
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(metadata), path)
    for number in range(chains):
        own = {"chain": str(number), "design_hash": told["hash"], "provenance": json.dumps(PROVENANCE | provenance)}
        gains = {
            "teacher": direct * teacher_in[number],
            "student": inherited * teacher_in[number] + direct * student_in[number],
        }
        for model in MODELS:
            if design == "cheap" and model == "teacher" and number >= 2:  # two teachers teach all
                source, into = (chain_folder(path.parent, k) / model for k in (number % 2, number))
                shutil.copytree(source, into)
            else:
                _write(world, path.parent, model, number, dict(zip(ids, gains[model], strict=True)), noise, own)
        (chain_folder(path.parent, number) / "manifest.json").write_text("{}")
    return teacher_in, student_in


def _write(world: World, folder: Path, model: str, number: int, gains: dict, noise: float, own: dict) -> None:
    for role, made in world.roles.items():
        nats = np.repeat([gains.get(i, 0.0) for i in made["ids"]], made["lengths"])
        told = {"run": f"shadow/{model}", "seed": "0", "step": "10", "variant": "plain"} | own
        path = chain_folder(folder, number) / model / f"{role}-00000.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(world.table(role, nats, noise).replace_schema_metadata(told), path)


def in_memory(
    values: dict[str, np.ndarray],
    design: str = "full",
    *,
    seed: int = 0,
    population: dict[str, np.ndarray] | None = None,
    group: np.ndarray | None = None,
    statistics: tuple[str, ...] = ("LL", "logit", "accuracy"),
    gain: dict[str, float] | None = None,
    own: dict[str, float] | None = None,
) -> Chains:
    """Chains without files.  values: by model, any statistic without a leak [c, n].

    gain, own: by model, what a record in the teacher's, in the student's data adds.
    """
    chains, n = next(iter(values.values())).shape
    ids = np.array([f"r{i:05d}" for i in range(n)])
    group = ids if group is None else group
    teacher_in, student_in, pairs = halves(design, chains, group, seed)
    kept = {}
    for model, each in values.items():
        each = each + (gain or {}).get(model, 0.0) * teacher_in + (own or {}).get(model, 0.0) * student_in
        beyond = (population or {}).get(model, np.zeros((chains, 0)))
        kept[model] = {name: (each, beyond) for name in statistics}
        kept[model]["prob"] = (np.exp(each), np.exp(beyond))
        kept[model] |= {name: (each, beyond) for name in ("loss", "zlib", "min_k", "min_k_plus_plus")}
    role, task = np.where(np.arange(n) % 2, "private", "heldout"), np.full(n, "t")
    told = ("kd", "shared" if design == "two_by_two" else "disjoint", SIZES, seed, f"hash{seed}", Path())
    return Chains(design, ids, role, task, group, teacher_in, student_in, pairs, *told, kept)
