"""One audit's scores: every attack on every run, and the members and non-members that they are compared on."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd

from attacks.resampling import Resampler, resampled_tpr
from attacks.statistics import Groups, Influence, auc_influence, best_threshold
from attacks.tables import ScoreTable, TableError

ATTACKED = ("private", "heldout", "calib", "canary")
MEASURED = ("dev", "heldout", "canary")  # roles whose loss is kept
PAIRS = {"private-heldout": ("private", "heldout"), "heldout-private": ("heldout", "private")}
CANARIES = "canary_in-canary_out"


class Unresolved(ValueError):
    """A value that cannot be computed; the message says why, and ends up in summary.json."""


class Scores(NamedTuple):
    """Scores of one attack on one role: ids, task, values [n]; -inf abstains, NaN is an error of the tables."""

    ids: np.ndarray
    task: np.ndarray
    values: np.ndarray


class Totals(NamedTuple):
    """A ratio's two sides for each example [n]: nats and scored tokens of one role, ROUGE and one, ..."""

    ids: np.ndarray
    above: np.ndarray
    below: np.ndarray


@dataclass(frozen=True)
class Pair:
    """Scores of members [m] and non-members [n] of one model, seed and attack, in the order of their ids."""

    run: str
    seed: int
    attack: str
    role_pair: str
    member_ids: np.ndarray
    nonmember_ids: np.ndarray
    members: np.ndarray
    nonmembers: np.ndarray
    member_task: np.ndarray
    nonmember_task: np.ndarray
    abstained: tuple[int, int]
    groups: Groups | None = None  # where records belong together

    @cached_property
    def auc(self) -> Influence:
        """AUC with the influence of every example: once, for all tables that ask."""
        return auc_influence(self.members, self.nonmembers).grouped(self.groups)

    def only(self, task: str) -> "Pair":
        """The records of one task. Raises Unresolved where a class has fewer than two."""
        if task == "all":
            return self
        m, n = self.member_task == task, self.nonmember_task == task
        _need_two(m.sum(), n.sum())
        return Pair(
            self.run,
            self.seed,
            self.attack,
            self.role_pair,
            self.member_ids[m],
            self.nonmember_ids[n],
            self.members[m],
            self.nonmembers[n],
            self.member_task[m],
            self.nonmember_task[n],
            self.abstained,
            self.groups and Groups.of(self.groups.members[m], self.groups.nonmembers[n]),
        )


@dataclass(frozen=True)
class Study:
    """Everything the result tables are made of.

    scores: by (run, seed, attack, role); missing: why one is not there, by the same key.
    losses: nats and tokens by (run, seed, role).
    made, draws, thresholds, grouped, drawn_rows: pairs, their resampled rates, their thresholds, and by ids their
    groups and rows of the splits, kept because several tables ask for the same.
    clamps, caps: by run and seed, (clamped, all) tokens of Min-K%++ and (capped, all) terms of DC-PDD.
    plan: the attacks on every run.  unavailable: those of the settings that its tables do not allow, one a reason.
    notes: what a reader must know of the scores, as sentences.
    """

    settings: dict
    tables: dict[tuple[str, int], ScoreTable]
    splits: pd.DataFrame | None
    resampler: Resampler
    scores: dict[tuple, Scores] = field(default_factory=dict)
    missing: dict[tuple, str] = field(default_factory=dict)
    losses: dict[tuple, Totals] = field(default_factory=dict)
    clamps: dict[tuple, tuple[int, int]] = field(default_factory=dict)
    caps: dict[tuple, tuple[int, int]] = field(default_factory=dict)
    plan: dict[str, list[str]] = field(default_factory=dict)
    unavailable: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    made: dict[tuple, Pair] = field(default_factory=dict, repr=False)
    draws: dict[tuple, np.ndarray] = field(default_factory=dict, repr=False)
    thresholds: dict[tuple, float] = field(default_factory=dict, repr=False)
    grouped: dict[tuple, Groups | None] = field(default_factory=dict, repr=False)
    drawn_rows: dict[tuple, pd.DataFrame] = field(default_factory=dict, repr=False)

    # --- runs --------------------------------------------------------------------------------------------------------

    @cached_property
    def runs(self) -> list[str]:
        return list(dict.fromkeys(run for run, _ in self.tables))

    @property
    def students(self) -> list[str]:
        return [run for run in self.runs if run == "student" or run.startswith("students/")]

    @property
    def nulls(self) -> list[str]:
        """Models that saw neither members nor non-members: what an attack shows on them is chance or split shift."""
        return [
            run
            for run in self.runs
            if run.startswith("base_")
            or (run == "null" and not {"private", "heldout"} & set(self.provenance(run).get("train_roles") or []))
        ]

    def seeds(self, run: str) -> list[int]:
        return [seed for name, seed in self.tables if name == run]

    def provenance(self, run: str) -> dict:
        return self.tables[run, self.seeds(run)[0]].provenance

    def match(self, run: str, seed: int) -> int | None:
        """The seed of `run` to set beside `seed` of another run: the same, or the only one there is."""
        seeds = self.seeds(run)
        return seed if seed in seeds else seeds[0] if len(seeds) == 1 else None

    def swap(self, run: str) -> str | None:
        """The counterfactual of a run: the one that was trained with private and held-out records exchanged."""
        return next((r for r in self.runs if self.provenance(r).get("swap_of") == run), None)

    def head(self, run: str) -> dict:
        """The columns that say what a model is."""
        told = self.provenance(run)
        return {"model": run, "technique": told.get("technique") or "-", "setting": told.get("setting") or "-"}

    def attacks(self, run: str) -> list[str]:
        """The attacks on a run that its tables allow: those with a reference once for each that was scored."""
        return self.plan[run]

    def note(self, sentence: str) -> None:
        """Keep a sentence for the report, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def trained_on(self, run: str) -> set[str]:
        """The roles that the run or its teacher was trained on."""
        told = self.provenance(run)
        chain = [told, *([self.provenance(told["teacher"])] if told.get("teacher") in self.runs else [])]
        return {role for link in chain for role in link.get("train_roles") or ()}

    # --- members and non-members -------------------------------------------------------------------------------------

    def role_pairs(self, run: str) -> list[str]:
        """`private-heldout` for all, `heldout-private` for swaps, `averaged` for what has a swap; canaries."""
        pairs = ["private-heldout"]
        pairs += ["heldout-private"] if self.provenance(run).get("swap_of") else []
        pairs += ["averaged"] if self.swap(run) else []
        return pairs + ([CANARIES] if any("canary" in self.tables[run, s].files for s in self.seeds(run)) else [])

    def pairs(self, run: str, seed: int, attack: str, role_pair: str) -> list[Pair]:
        """The pairs whose statistics are averaged: one, or for `averaged` the run's and its swap's (roles exchanged).

        Raises Unresolved with the reason where there is none.
        """
        if role_pair != "averaged":
            return [self._pair(run, seed, attack, role_pair)]
        swap = self.swap(run)
        swap_seed = self.match(swap, seed)
        if swap_seed is None:
            raise Unresolved(f"{swap} has no seed {seed}")
        if attack not in self.attacks(swap):
            raise Unresolved(f"{attack} was not run on {swap}")
        both = [
            self._pair(run, seed, attack, "private-heldout"),
            self._pair(swap, swap_seed, attack, "heldout-private"),
        ]
        if not (
            np.array_equal(both[0].member_ids, both[1].nonmember_ids)
            and np.array_equal(both[0].nonmember_ids, both[1].member_ids)
        ):
            raise Unresolved(f"{run} and {swap} were scored on different examples")
        return both

    def threshold(self, pair: Pair) -> float:
        """The threshold of greatest balanced accuracy on the calibration records of the same model and attack."""
        key = (pair.run, pair.seed, pair.attack, pair.role_pair == "heldout-private")
        if key not in self.thresholds:
            calib = self._pair(pair.run, pair.seed, pair.attack, "calib")
            halves = (calib.members, calib.nonmembers)
            self.thresholds[key] = best_threshold(*(halves[::-1] if key[-1] else halves))
        return self.thresholds[key]

    def rates(self, pair: Pair, fprs: tuple[float, ...]) -> np.ndarray:
        """TPR at each FPR in the resamples of a whole pair (not of one task) [B, len(fprs)]."""
        key = (pair.run, pair.seed, pair.attack, pair.role_pair)
        if key not in self.draws:
            self.draws[key] = resampled_tpr(pair.members, pair.nonmembers, *self.drawn(pair), fprs)
        return self.draws[key]

    def drawn(self, pair: Pair) -> list[np.ndarray]:
        """How often every member [B, m] and every non-member [B, n] is drawn, whole groups at a time."""
        both = (pair.member_ids, pair.nonmember_ids)
        return [self.resampler.counts(*each) for each in zip(both, pair.groups or (None, None), strict=True)]

    def group_names(self, ids: np.ndarray) -> np.ndarray:
        """The group of each record: as the splits say, else the record that its window (`id#k`) was cut from."""
        records = np.array([i.partition("#")[0] for i in ids], dtype=object)
        if self.splits is None or "group" not in self.splits:
            return records.astype(str)
        at = self.splits.index.get_indexer(records)
        return np.where(at < 0, records, self.splits["group"].to_numpy(object)[at]).astype(str)

    def clusters(self, ids: np.ndarray) -> np.ndarray | None:
        """Codes [n] of records that belong together; None where every record is its own."""
        found = self._groups(ids, ids[:0])
        return None if found is None else found.members

    def _groups(self, member_ids: np.ndarray, nonmember_ids: np.ndarray) -> Groups | None:
        key = (member_ids.tobytes(), nonmember_ids.tobytes())
        if key not in self.grouped:
            self.grouped[key] = Groups.of(self.group_names(member_ids), self.group_names(nonmember_ids))
        return self.grouped[key]

    def _pair(self, run: str, seed: int, attack: str, role_pair: str) -> Pair:
        key = (run, seed, attack, role_pair)
        if key not in self.made:
            pair = self._load_pair(key)
            self.made[key] = replace(pair, groups=self._groups(pair.member_ids, pair.nonmember_ids))
        return self.made[key]

    def _load_pair(self, key: tuple[str, int, str, str]) -> Pair:
        run, seed, attack, role_pair = key
        if role_pair in PAIRS:
            return _make_pair(key, *(self._scores(run, seed, attack, role) for role in PAIRS[role_pair]))
        whole = self._scores(run, seed, attack, "canary" if role_pair == CANARIES else "calib")
        drawn = self.split_rows(whole.ids)
        coins = drawn["coin"].to_numpy()
        if role_pair == CANARIES:
            placement = drawn["placement"].to_numpy(str)
            whole = whole._replace(task=np.char.add("placement=", placement))
            coins = np.where(np.isin(placement, self.carried(run)), coins, -1)
        return _make_pair(key, *(Scores(*(part[coins == coin] for part in whole)) for coin in (1, 0)))

    def carried(self, run: str) -> list[str]:
        """Placements whose canaries with coin 1 are in the training data of the run or of its teacher.

        A run whose chain carries none (a base, the swap) is a null: all placements but `none` are compared.
        """
        carried = {"private": ("teacher_only", "both"), "public": ("student_only", "both")}
        found = sorted({placement for role in self.trained_on(run) for placement in carried.get(role, ())})
        return found or ["both", "student_only", "teacher_only"]

    def _scores(self, run: str, seed: int, attack: str, role: str) -> Scores:
        key = (run, seed, attack, role)
        if key not in self.scores:
            raise Unresolved(self.missing.get(key, f"{run}/seed{seed} was not scored on role '{role}'"))
        return self.scores[key]

    def drawn_coins(self, ids: np.ndarray) -> np.ndarray:
        """The coin of each record [n]. Raises Unresolved where it is not known."""
        return self.split_rows(ids)["coin"].to_numpy()

    def split_rows(self, ids: np.ndarray) -> pd.DataFrame:
        """The rows of splits.parquet of these records. Raises Unresolved where there is none."""
        if self.splits is None:
            raise Unresolved("no text/splits.parquet beside the score tables: the coins are not known")
        key = (len(ids), ids.tobytes())
        if key not in self.drawn_rows:
            # Windows of a long text are named id#k; the coin is the record's.
            rows = self.splits.index.get_indexer([i.partition("#")[0] for i in ids])
            if (rows < 0).any():
                raise Unresolved("text/splits.parquet does not list all scored records: it belongs to another run")
            self.drawn_rows[key] = self.splits.iloc[rows]
        return self.drawn_rows[key]


def _make_pair(key: tuple, members: Scores, nonmembers: Scores) -> Pair:
    _need_two(len(members.ids), len(nonmembers.ids))
    both = np.intersect1d(members.ids, nonmembers.ids)
    if len(both):
        raise TableError(
            f"{key[0]}/seed{key[1]}: {len(both)} examples are members and non-members of {key[3]} "
            f"at once, the first is {both[0]}"
        )
    broken = [int(np.isnan(c.values).sum()) for c in (members, nonmembers)]
    if any(broken):
        raise Unresolved(
            f"{broken[0]} of {len(members.ids)} members and {broken[1]} of {len(nonmembers.ids)} "
            "non-members have a score that is not a number; the model may have diverged"
        )
    values = np.concatenate([members.values, nonmembers.values])
    silent = np.isneginf(values)
    values = np.where(silent, values[~silent].min() if (~silent).any() else 0.0, values)  # the least member-like
    m = len(members.ids)
    return Pair(
        *key,
        members.ids,
        nonmembers.ids,
        values[:m],
        values[m:],
        members.task,
        nonmembers.task,
        (int(silent[:m].sum()), int(silent[m:].sum())),
    )


def _need_two(m: int, n: int) -> None:
    if min(m, n) < 2:
        raise Unresolved(f"{m} members and {n} non-members: both classes need at least two")
