"""Rows of gates.csv and utility.csv: what must hold before an attack's number means anything.

blind        does the text alone separate members from non-members?  Then there is no headline.
null         do models that never saw the members stay at chance?  Otherwise the split leaks.
utility      is a student better than the base it started from?  If not, a low leak is no evidence.
abstentions  records that an attack could say nothing about; clamped: tokens whose z-score had no spread.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from attacks.blind import TooFew, blind_aucs, blind_interval
from attacks.rows import auc_of, by_seed, compare, estimate, same_examples
from attacks.statistics import Influence, Interval, chance_p, difference, holm, over_seeds
from attacks.study import CANARIES, Losses, Pair, Study, Unresolved
from attacks.tables import read_text

NOT_RUN = "not run"
UNDERTRAINED = "undertrained: a low leak is no evidence"
SEPARATED = "the text alone separates the classes: no headline"
SPLIT_LEAKS = "not at chance (after Holm): the split leaks, read the difference to it"
MEASURES = {"dev_loss": "dev", "heldout_loss": "heldout"}


def _gate(gate: str, model: str, metric: str, verdict: str, found=None, **columns) -> dict:
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
            return [_gate(self.gate, "maximum", "auc", NOT_RUN)]
        n = len(self.pair.members) + len(self.pair.nonmembers)
        each = [
            _gate(self.gate, name, "auc", SEPARATED if found.low > 0.5 else "ok", found, n=n)
            for name, found in self.intervals.items()
        ]
        return [*each, _gate(self.gate, "maximum", "auc", SEPARATED if self.separates else "ok", self.interval, n=n)]

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
                    _gate(
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
    folder = Path(scores_dir) / "text"
    needed = [*(f"{role}.parquet" for role in roles), "token_counts.npz"]
    if absent := [f"text/{name}" for name in needed if not (folder / name).exists()]:
        raise Unresolved(f"not beside the score tables: {', '.join(absent)}")
    text, counts = pd.concat([read_text(scores_dir, role) for role in roles]), np.load(folder / needed[-1])["counts"]
    ids = np.concatenate([pair.member_ids, pair.nonmember_ids])
    if absent := int((~np.isin(ids, text.index)).sum()):
        raise Unresolved(f"the text tables lack {absent} of the {len(ids)} evaluated records")
    member = np.arange(len(ids)) < len(pair.member_ids)
    return blind_aucs(text.loc[ids], member, counts, study.settings["seed"])


# --- null ------------------------------------------------------------------------------------------------------------


def null_rows(study: Study) -> list[dict]:
    """Every attack on every null model against 0.5; none may miss it after Holm over all of them."""
    rows, p_values = [], []
    for run in study.nulls:
        for attack in study.attacks(run):
            for seed, sample in by_seed(study, run, attack, "private-heldout")[0].items():
                pair = sample[0]
                p_values.append(chance_p(pair.members, pair.nonmembers))
                rows.append(
                    _gate(
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
    return rows or [_gate("null", "null", "auc", NOT_RUN)]


# --- utility ---------------------------------------------------------------------------------------------------------


def _ratio(losses: Losses) -> float:
    return float(losses.nats.sum() / losses.tokens.sum())


def _drawn(study: Study, losses: Losses) -> np.ndarray:
    counts = study.resampler.counts(losses.ids)
    return (counts @ losses.nats) / (counts @ losses.tokens)


def _interval(values: list[float], draws: list[np.ndarray]) -> Interval:
    """Of one seed by percentiles of its bootstrap [B], of several over seeds and examples."""
    if len(values) == 1:
        return Interval(values[0], *np.quantile(draws[0], [0.025, 0.975]).tolist())
    mean = over_seeds(values, float(np.mean(draws, axis=0).var()))
    return Interval(*difference(mean.value, mean.se, df=mean.df)[:3])


def _seed_blocks(study: Study, run: str, role: str) -> dict[int | str, list[tuple[int, Losses]]]:
    found = {
        seed: [(seed, study.losses[run, seed, role])] for seed in study.seeds(run) if (run, seed, role) in study.losses
    }
    return found | ({"all": [block[0] for block in found.values()]} if len(found) > 1 else {})


def utility_rows(study: Study) -> list[dict]:
    """Token-mean loss in nats on dev and held-out records, and perplexity on dev, of every run."""
    rows = []
    for run in study.runs:
        for measure, role in MEASURES.items():
            for seed, block in _seed_blocks(study, run, role).items():
                losses = [each for _, each in block]
                n = len(losses[0].ids)
                found = _interval([_ratio(x) for x in losses], [_drawn(study, x) for x in losses])
                named = {measure: found}
                if measure == "dev_loss":
                    named["perplexity"] = Interval(*np.exp(found).tolist())
                rows += [
                    study.head(run)
                    | {"measure": name, "value": it.value, "ci_low": it.low, "ci_high": it.high, "n": n, "seed": seed}
                    for name, it in named.items()
                ]
    return rows


def base_of(study: Study, run: str) -> str:
    """The pre-trained checkpoint a run started from."""
    told = study.provenance(run).get("init") or ""
    return told if told.startswith("base_") else "base_teacher" if run in ("teacher", "swap") else "base_student"


def utility_gate(study: Study) -> list[dict]:
    """Dev loss of every trained run less that of its base (the gate), and of every student less that of the null."""
    rows = []
    for run in (r for r in study.runs if not r.startswith("base_") and r != "reference"):
        base = base_of(study, run)
        rows += _loss_gaps(study, run, base, lambda gap: "ok" if gap.high < 0 else UNDERTRAINED) or [
            _gate("utility", run, f"dev_loss_minus_{base}", NOT_RUN)
        ]
        if run in study.students:
            rows += _loss_gaps(
                study, run, "null", lambda gap: "ok: better than null" if gap.high < 0 else "ok: no better than null"
            )
    return rows


def _loss_gaps(study: Study, run: str, other: str, verdict) -> list[dict]:
    rows = []
    for seed, block in _seed_blocks(study, run, "dev").items():
        values, draws = [], []
        for each, losses in block:
            rival = study.losses.get((other, study.match(other, each), "dev")) if other in study.runs else None
            if rival is None or not np.array_equal(losses.ids, rival.ids):
                continue
            values.append(_ratio(losses) - _ratio(rival))
            draws.append(_drawn(study, losses) - _drawn(study, rival))
        if len(values) == len(block):
            gap = _interval(values, draws)
            rows.append(
                _gate("utility", run, f"dev_loss_minus_{other}", verdict(gap), gap, seed=seed, n=len(block[0][1].ids))
            )
    return rows


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
                            _gate(
                                "abstentions",
                                run,
                                f"{attack}:{name}",
                                "counted as least member-like",
                                value=count,
                                n=n,
                                seed=seed,
                            )
                        )
    rows = rows or [_gate("abstentions", "all models", "count", "ok", value=0)]
    clamps = [
        _gate("clamped", run, "min_k_plus_plus:tokens", "ok: spread clamped", value=few, n=total, seed=seed)
        for (run, seed), (few, total) in study.clamps.items()
        if few
    ]
    return rows + (clamps or [_gate("clamped", "all models", "min_k_plus_plus:tokens", "ok", value=0)])
