"""Studies in memory, from scores alone: for tests of what is done with scores, without files or attacks."""

import numpy as np
import pandas as pd

from attacks.resampling import Resampler
from attacks.study import Scores, Study
from attacks.tables import ScoreTable

SETTINGS = {"primary": "loss", "headline_model": "students/kd", "role_pair": "private-heldout", "seed": 0} | {
    "bootstrap": 200,
    "tasks": True,
}


def ids_of(role: str, n: int) -> np.ndarray:
    return np.array([f"{role}-{i:05d}" for i in range(n)])


def study(
    scores: dict[tuple[str, int, str], tuple[np.ndarray, np.ndarray]],
    *,
    tasks: tuple[np.ndarray, np.ndarray] | None = None,
    groups: dict[str, str] | None = None,
    provenance: dict[str, dict] | None = None,
    **settings,
) -> Study:
    """scores: (run, seed, attack) -> (members [m], non-members [n]).  groups: example id -> group."""
    tables, held = {}, {}
    for (run, seed, attack), both in scores.items():
        told = {"setting": "disjoint", "technique": "kd"} if run.startswith("students/") else {}
        files = {"private": [], "heldout": []}
        tables[run, seed] = ScoreTable(run, seed, "1", told | (provenance or {}).get(run, {}), files)
        for role, values, task in zip(files, both, tasks or (None, None), strict=True):
            named = np.array(["all"] * len(values)) if task is None else task
            held[run, seed, attack, role] = Scores(ids_of(role, len(values)), named, np.asarray(values, float))
    splits = None
    if groups is not None:
        splits = pd.DataFrame({"group": groups.values(), "coin": 0}, index=pd.Index(groups.keys(), name="example_id"))
    full = SETTINGS | settings
    plan = {run: list(dict.fromkeys(a for r, _, a in scores if r == run)) for run, _ in tables}
    return Study(full, tables, splits, Resampler(full["bootstrap"], full["seed"]), scores=held, plan=plan)
