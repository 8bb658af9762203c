"""Studies in memory with extractions by hand: what is memorized is given, nothing is read from files."""

import numpy as np
import pandas as pd

from attacks.cuts import Cut, Extraction
from attacks.resampling import Resampler
from attacks.study import Scores, Study, Unresolved
from attacks.tables import ScoreTable

CUT = Cut(0, 10)
SETTINGS = {"primary": "loss", "seed": 0, "bootstrap": 200}


def ids_of(role: str, n: int) -> np.ndarray:
    return np.array([f"{role}-{i:05d}" for i in range(n)])


def extraction(memorized, *, run="teacher", seed=0, role="private", matched=None, log_p=None, entropy=None, short=None):
    """memorized: bool [n], or role of all of the window.  matched: tokens of those that are not, else 3.  short: bool
    [n], responses of 5 tokens with no EOS, of which `memorized` says whether all are right.
    """
    hit = np.asarray(memorized, bool)
    n = len(hit)
    length = np.where(np.zeros(n, bool) if short is None else short, 5, 12)
    window = np.minimum(length, CUT.suffix)
    right = np.where(hit, window, np.minimum(np.full(n, 3) if matched is None else matched, window - 1))
    nats = -10.0 + 9 * right / 10 if log_p is None else np.asarray(log_p, float)
    uncertain = np.where(hit, 0.5, 2.0) if entropy is None else np.asarray(entropy, float)
    strength = np.where(hit, 1.0, 0.0)
    gap = np.ones(n)
    task = np.array(["open_qa", "summary"])[np.arange(n) % 2]
    return Extraction(
        run,
        seed,
        role,
        CUT,
        ids_of(role, n),
        task,
        length,
        window,
        right,
        right,
        strength,
        {"t=1": nats},
        uncertain,
        gap,
    )


class Shelf:
    """Stands for `Memorized`: extractions by (run, seed, role) at one cut."""

    cuts, main = (CUT,), CUT

    def __init__(self, found: dict[tuple[str, int, str], Extraction]):
        self.found = found

    def roles(self, run, seed):
        return [role for r, s, role in self.found if (r, s) == (run, seed)]

    def of(self, run, seed, role, cut):
        if (run, seed, role) not in self.found:
            raise Unresolved(f"{run}/seed{seed} was not scored on role '{role}'")
        return self.found[run, seed, role]


def planted(
    memorized: dict[tuple[str, int, str], np.ndarray],
    *,
    setting="shared",
    provenance: dict[str, dict] | None = None,
    groups: dict[str, str] | None = None,
    splits: pd.DataFrame | None = None,
    scores: dict[tuple[str, int, str, str], np.ndarray] | None = None,
    **fields,
) -> tuple[Study, Shelf]:
    """memorized: (run, seed, role) -> bool [n], or an Extraction.  groups: id -> group.  scores: by (run, seed, attack,
    role).  fields: passed to `extraction`.
    """
    found = {
        key: value
        if isinstance(value, Extraction)
        else extraction(value, run=key[0], seed=key[1], role=key[2], **fields)
        for key, value in memorized.items()
    }
    tables = {}
    for run, seed, _ in found:
        told = {"train_roles": ["private"]} if run in ("teacher", "direct") else {"train_roles": []}
        if run.startswith("students/"):
            told = {"teacher": "teacher", "technique": "kd", "setting": setting, "train_roles": ["private"]}
        files = {role: [] for r, s, role in found if (r, s) == (run, seed)}
        tables[run, seed] = ScoreTable(run, seed, "1", told | (provenance or {}).get(run, {}), files)
    if groups is not None:
        splits = pd.DataFrame({"group": groups.values()}, index=pd.Index(groups.keys(), name="example_id"))
    plan: dict[str, list[str]] = {run: [] for run, _ in tables}
    held = {}
    for (run, seed, attack, role), values in (scores or {}).items():
        plan[run] += [attack] if attack not in plan[run] else []
        task = np.array(["all"] * len(values))
        held[run, seed, attack, role] = Scores(ids_of(role, len(values)), task, np.asarray(values, float))
    study = Study(SETTINGS, tables, splits, Resampler(SETTINGS["bootstrap"], 0), scores=held, plan=plan)
    return study, Shelf(found)


def row(rows: list[dict], **wanted) -> dict:
    found = [r for r in rows if all(r.get(k) == v for k, v in wanted.items())]
    assert len(found) == 1, (wanted, len(found))
    return found[0]
