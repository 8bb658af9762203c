"""One audit's scores: every attack on every run, and the members and non-members that they are compared on."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from attacks import membership
from attacks.statistics import Influence, Resampler, auc_influence, best_threshold, resampled_tpr
from attacks.tables import SEGMENTS, ScoreTable, TableError, Tokens, read_scores, read_splits

ATTACKED = ("private", "heldout", "calib", "canary")
MEASURED = ("dev", "heldout")  # roles whose loss is reported
PAIRS = {"private-heldout": ("private", "heldout"), "heldout-private": ("heldout", "private")}
COMPARABLE = {"tokenizer_fingerprint": "tokenizers", "dtype": "precisions", "matmul_precision": "precisions"}
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

    @cached_property
    def auc(self) -> Influence:
        """AUC with the influence of every example: once, for all tables that ask."""
        return auc_influence(self.members, self.nonmembers)

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
        )


@dataclass(frozen=True)
class Study:
    """Everything the result tables are made of.

    scores: by (run, seed, attack, role); missing: why one is not there, by the same key.
    losses: nats and tokens by (run, seed, role).
    made, draws: pairs and their resampled rates, kept because several tables ask for the same.
    clamps: by run and seed, (clamped, all) response tokens of the attacked roles.
    """

    settings: dict
    tables: dict[tuple[str, int], ScoreTable]
    splits: pd.DataFrame | None
    resampler: Resampler
    scores: dict[tuple, Scores] = field(default_factory=dict)
    missing: dict[tuple, str] = field(default_factory=dict)
    losses: dict[tuple, Totals] = field(default_factory=dict)
    clamps: dict[tuple, tuple[int, int]] = field(default_factory=dict)
    made: dict[tuple, Pair] = field(default_factory=dict, repr=False)
    draws: dict[tuple, np.ndarray] = field(default_factory=dict, repr=False)

    # --- runs --------------------------------------------------------------------------------------------------------

    @property
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
        """The attacks on a run: those with a reference once for each reference that was scored."""
        scored = [reference for reference in self.settings["references"] if reference in self.runs]
        return membership.expand(self.settings["attacks"], scored, run)

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
            raise Unresolved(f"{attack} compares {swap} with itself")
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
        calib = self._pair(pair.run, pair.seed, pair.attack, "calib")
        halves = (calib.members, calib.nonmembers)
        return best_threshold(*(halves[::-1] if pair.role_pair == "heldout-private" else halves))

    def rates(self, pair: Pair, fprs: tuple[float, ...]) -> np.ndarray:
        """TPR at each FPR in the resamples of a whole pair (not of one task) [B, len(fprs)]."""
        key = (pair.run, pair.seed, pair.attack, pair.role_pair)
        if key not in self.draws:
            counts = [self.resampler.counts(ids) for ids in (pair.member_ids, pair.nonmember_ids)]
            self.draws[key] = resampled_tpr(pair.members, pair.nonmembers, *counts, fprs)
        return self.draws[key]

    def _pair(self, run: str, seed: int, attack: str, role_pair: str) -> Pair:
        key = (run, seed, attack, role_pair)
        if key not in self.made:
            self.made[key] = self._load_pair(key)
        return self.made[key]

    def _load_pair(self, key: tuple[str, int, str, str]) -> Pair:
        run, seed, attack, role_pair = key
        if role_pair in PAIRS:
            return _make_pair(key, *(self._scores(run, seed, attack, role) for role in PAIRS[role_pair]))
        whole = self._scores(run, seed, attack, "canary" if role_pair == CANARIES else "calib")
        drawn = self._drawn(whole.ids)
        coins = drawn["coin"].to_numpy()
        if role_pair == CANARIES:
            placement = drawn["placement"].to_numpy(str)
            whole = whole._replace(task=np.char.add("placement=", placement))
            coins = np.where(np.isin(placement, self._carried(run)), coins, -1)
        return _make_pair(key, *(Scores(*(part[coins == coin] for part in whole)) for coin in (1, 0)))

    def _carried(self, run: str) -> list[str]:
        """Placements whose canaries with coin 1 are in the training data of the run or of its teacher.

        A run whose chain carries none (a base, the swap) is a null: all placements but `none` are compared.
        """
        told = self.provenance(run)
        chain = [told, *([self.provenance(told["teacher"])] if told.get("teacher") in self.runs else [])]
        roles = {role for link in chain for role in link.get("train_roles") or ()}
        carried = {"private": ("teacher_only", "both"), "public": ("student_only", "both")}
        found = sorted({placement for role in roles for placement in carried.get(role, ())})
        return found or ["both", "student_only", "teacher_only"]

    def _scores(self, run: str, seed: int, attack: str, role: str) -> Scores:
        key = (run, seed, attack, role)
        if key not in self.scores:
            raise Unresolved(self.missing.get(key, f"{run}/seed{seed} was not scored on role '{role}'"))
        return self.scores[key]

    def _drawn(self, ids: np.ndarray) -> pd.DataFrame:
        if self.splits is None:
            raise Unresolved("no text/splits.parquet beside the score tables: the coins are not known")
        # Windows of a long text are named id#k; the coin is the record's.
        rows = self.splits.index.get_indexer([i.partition("#")[0] for i in ids])
        if (rows < 0).any():
            raise Unresolved("text/splits.parquet does not list all scored records: it belongs to another run")
        return self.splits.iloc[rows]


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


# --- scoring ---------------------------------------------------------------------------------------------------------


def load_study(scores_dir: str | Path, settings: dict) -> Study:
    """Read all score tables and run all attacks. Raises TableError on tables that cannot be audited."""
    tables = {(t.run, t.seed): t for t in read_scores(scores_dir)}
    study = Study(settings, tables, read_splits(scores_dir), Resampler(settings["bootstrap"], settings["seed"]))
    for role in dict.fromkeys((*ATTACKED, *MEASURED)):
        for key, tokens, references in _role_tokens(study, role):
            _add(study, key, role, tokens, references)
    return study


def _role_tokens(study: Study, role: str) -> Iterator[tuple[tuple, Tokens, dict]]:
    """Tokens of every run that has this role; only those of the references stay in memory."""
    used = {membership.parse(a)[:2] for run in study.runs for a in study.attacks(run)}
    fields = {"target_id", "logp", "logp_std", *(f for name, _ in used for f in membership.ATTACKS[name].needs)}
    having = {key: table for key, table in study.tables.items() if role in table.files}
    references = {key: table.load(role, fields) for key, table in having.items() if key[0] in {r for _, r in used}}
    for key, table in having.items():
        yield key, references.get(key) or table.load(role, fields), references


def _add(study: Study, key: tuple[str, int], role: str, tokens: Tokens, references: dict) -> None:
    response = tokens.select([SEGMENTS["response"]])
    if role in MEASURED:
        nats = -np.bincount(response.owner, response.token["logp"], len(response.ids))
        study.losses[(*key, role)] = Totals(response.ids, nats, response.lengths)
    if role not in ATTACKED:
        return
    if "logp_std" in tokens.token:
        before = study.clamps.get(key, (0, 0))
        study.clamps[key] = (before[0] + membership.clamped(tokens), before[1] + len(response.owner))
    for attack in study.attacks(key[0]):
        try:
            reference = _reference(study, key, attack, role, references)
            values = membership.score(attack, tokens, reference)
            study.scores[(*key, attack, role)] = Scores(tokens.ids, tokens.task, values)
        except (Unresolved, membership.MissingField, membership.DifferentTokens) as why:
            study.missing[(*key, attack, role)] = str(why)


def _reference(study: Study, key: tuple[str, int], attack: str, role: str, references: dict) -> Tokens | None:
    _, run, _ = membership.parse(attack)
    if not run:
        return None
    seed = study.match(run, key[1]) if study.seeds(run) else None
    if (run, seed) not in references:
        raise Unresolved(f"the reference {run} has no score table of role '{role}' to set beside seed {key[1]}")
    told = [study.tables[k].provenance for k in (key, (run, seed))]
    for name, words in COMPARABLE.items():
        if told[0].get(name) != told[1].get(name):
            raise Unresolved(
                f"{key[0]} and {run} have different {words} ({name} {told[0].get(name)} and "
                f"{told[1].get(name)}): not subtracted; score both alike"
            )
    return references[run, seed]
