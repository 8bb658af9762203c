"""Rows of gates.csv: what must hold before an attack's number means anything.

blind        does the text alone separate members from non-members?  Then there is no headline.
null         do models that never saw the members stay at chance?  Otherwise the split leaks.
abstentions  records that an attack could say nothing about; clamped: tokens whose z-score had no spread.
utility      is a student better than its base?  If not, a low leak is no evidence (attacks/utility.py).
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from attacks.blind import TooFew, blind_aucs, blind_interval
from attacks.membership import ATTACKS, parse
from attacks.rows import against_chance, auc_of, by_seed, compare, estimate, same_examples
from attacks.statistics import Difference, Influence, Interval, holm
from attacks.study import CANARIES, Pair, Study, Unresolved
from attacks.tables import read_counts, read_text

NOT_RUN = "not run"
SEPARATED = "the text alone separates the classes: no headline"
SPLIT_LEAKS = "not at chance (after Holm): the split leaks, read the difference to it"


def gate_row(
    gate: str, model: str, metric: str, verdict: str, found: Interval | Difference | None = None, **columns
) -> dict:
    """One row of gates.csv; found: its value with the interval."""
    numbers = {} if found is None else {"value": found.value, "ci_low": found.low, "ci_high": found.high}
    return {"gate": gate, "model": model, "task": "all", "metric": metric, "verdict": verdict, **numbers, **columns}


# --- blind -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blind:
    """The blind gate of one role pair: the AUC of every classifier on the evaluated records, or why it was not run."""

    gate: str
    pair: Pair | None = None
    aucs: dict[str, Influence] = field(default_factory=dict)
    reason: str | None = None

    @property
    def intervals(self) -> dict[str, Interval]:
        """By classifier; the level is split over them, since the greatest is what counts."""
        return {name: blind_interval(auc, 1 - 0.05 / len(self.aucs)) for name, auc in self.aucs.items()}

    @property
    def best(self) -> str:
        return max(self.aucs, key=lambda name: self.aucs[name].value)

    @property
    def interval(self) -> Interval:
        return self.intervals[self.best]

    @property
    def separates(self) -> bool:
        """Does the text alone tell the classes apart?  Below 0.5 on unseen records a classifier tells nothing."""
        return self.reason is None and self.interval.low > 0.5

    def rows(self) -> list[dict]:
        """One row per classifier, and one for the greatest of them, which is the gate."""
        if self.reason is not None:
            return [gate_row(self.gate, "maximum", "auc", NOT_RUN)]
        n = len(self.pair.members) + len(self.pair.nonmembers)
        each = [
            gate_row(self.gate, name, "auc", SEPARATED if found.low > 0.5 else "ok", found, n=n)
            for name, found in self.intervals.items()
        ]
        return [*each, gate_row(self.gate, "maximum", "auc", SEPARATED if self.separates else "ok", self.interval, n=n)]

    def excess_rows(self, study: Study) -> list[dict]:
        """Primary attack on each student, less the best blind classifier, paired."""
        rows = []
        for run in study.students if self.reason is None else []:
            samples, _ = by_seed(study, run, study.settings["primary"], self.pair.role_pair)
            blocks = {seed: [s] for seed, s in samples.items() if same_examples(s, [self.pair])}
            if len(blocks) > 1:
                blocks["all"] = [block[0] for block in blocks.values()]
            for seed, block in blocks.items():
                best = self.aucs[self.best]  # its variance counts twice, see blind_interval
                gap = compare([auc_of(s) for s in block], [best] * len(block), block, extra_variance=best.variance())
                verdict = "ok: above what the text shows" if gap.low > 0 else "ok: not above what the text shows"
                rows.append(
                    gate_row(
                        self.gate,
                        run,
                        "auc_minus_blind",
                        verdict,
                        gap,
                        seed=seed,
                        n=len(self.pair.members) + len(self.pair.nonmembers),
                    )
                )
        return rows


def run_blind(study: Study, scores_dir: str | Path, role_pair: str) -> Blind:
    """Train the blind classifiers on the members and non-members of one role pair."""
    gate = "blind" if role_pair != CANARIES else f"blind:{CANARIES}"
    try:
        pair = _evaluated(study, role_pair)
        if not study.settings["blind"]:
            raise Unresolved("it was switched off in the settings")
        return Blind(gate, pair, _blind_aucs(study, scores_dir, pair))
    except (Unresolved, TooFew) as why:
        return Blind(gate, reason=str(why))


def _evaluated(study: Study, role_pair: str) -> Pair:
    for run in [study.settings["headline_model"], *study.runs]:
        for attack in study.attacks(run):
            samples, reasons = by_seed(study, run, attack, role_pair)
            if samples:
                return next(iter(samples.values()))[0]
    raise Unresolved(next(iter(reasons.values())))


def _blind_aucs(study: Study, scores_dir: str | Path, pair: Pair) -> dict[str, Influence]:
    roles = ["canary"] if pair.role_pair == CANARIES else pair.role_pair.split("-")
    folder, needed = Path(scores_dir) / "text", [f"{role}.parquet" for role in roles]
    counts = read_counts(scores_dir)
    if counts is None and study.splits is not None and (study.splits["role"] == "public").any():
        needed.append("token_counts.npz")
    if absent := [f"text/{name}" for name in needed if not (folder / name).exists()]:
        raise Unresolved(f"not beside the score tables: {', '.join(absent)}")
    text, ids = pd.concat([read_text(scores_dir, role) for role in roles]), [*pair.member_ids, *pair.nonmember_ids]
    if absent := int((~np.isin(ids, text.index)).sum()):
        raise Unresolved(f"the text tables lack {absent} of the {len(ids)} evaluated records")
    if counts is None:
        study.note("Blind gate: without public records, no classifier sees how frequent a text's tokens are elsewhere.")
    member = np.arange(len(ids)) < len(pair.member_ids)
    found = blind_aucs(text.loc[ids], member, counts, study.settings["seed"])
    return {name: auc.grouped(pair.groups) for name, auc in found.items()}


# --- null ------------------------------------------------------------------------------------------------------------


def null_rows(study: Study) -> list[dict]:
    """Every attack on every null model against 0.5; none may miss it after Holm over all of them."""
    rows, p_values = [], []
    for run in study.nulls:
        for attack in study.attacks(run):
            if ATTACKS[parse(attack)[0]].reads_teacher:
                continue
            for seed, sample in by_seed(study, run, attack, "private-heldout")[0].items():
                pair = sample[0]
                p_values.append(against_chance([pair.auc], [sample]))
                rows.append(
                    gate_row(
                        "null",
                        run,
                        f"auc:{attack}",
                        "ok",
                        estimate([auc_of(sample)], [sample]),
                        n=len(pair.members) + len(pair.nonmembers),
                        seed=seed,
                    )
                )
    for row, p in zip(rows, holm(p_values), strict=True):
        if p < 0.05:
            row["verdict"] = SPLIT_LEAKS
    return rows or [gate_row("null", "null", "auc", NOT_RUN)]


# --- counts ----------------------------------------------------------------------------------------------------------


def count_rows(study: Study) -> list[dict]:
    """Abstentions per attack and class, and clamped tokens per run, where there are any; else one row that says so."""
    rows = []
    for run in study.runs:
        for attack in study.attacks(run):
            for seed, (pair,) in by_seed(study, run, attack, "private-heldout")[0].items():
                sizes = (len(pair.members), len(pair.nonmembers))
                for name, count, n in zip(("members", "nonmembers"), pair.abstained, sizes, strict=True):
                    if count:
                        rows.append(
                            gate_row(
                                "abstentions",
                                run,
                                f"{attack}:{name}",
                                "counted as least member-like",
                                value=count,
                                n=n,
                                seed=seed,
                            )
                        )
    rows = rows or [gate_row("abstentions", "all models", "count", "ok", value=0)]
    clamps = [
        gate_row("clamped", run, "min_k_plus_plus:tokens", "ok: spread clamped", value=few, n=total, seed=seed)
        for (run, seed), (few, total) in study.clamps.items()
        if few
    ]
    return rows + (clamps or [gate_row("clamped", "all models", "min_k_plus_plus:tokens", "ok", value=0)])
