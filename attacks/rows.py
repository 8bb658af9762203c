"""Rows of membership.csv and roc.parquet, and the estimates over seeds and examples that all tables share.

A row whose value cannot be computed has `value` None and the `reason`; `audit` moves the reason into summary.json.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd

from attacks import membership
from attacks.resampling import percentile_interval
from attacks.statistics import (
    Difference,
    Influence,
    Interval,
    SeedMean,
    Spread,
    balanced_accuracy,
    chance_p,
    chance_variance,
    difference,
    interval,
    logit_interval,
    over_seeds,
    roc,
    tpr_at_fpr,
)
from attacks.study import CANARIES, Pair, Study, Unresolved

FPRS = (0.25, 0.05, 0.01, 0.001)
Sample = list[Pair]  # what one value of one seed is the mean over: one pair, or two for `averaged`


# --- estimates over one or several seeds -----------------------------------------------------------------------------


def influence(sample: Sample, statistic: Callable[[Pair], Influence]) -> Influence:
    """The statistic of a sample; the second pair of `averaged` has members and non-members exchanged."""
    first, *second = [statistic(pair) for pair in sample]
    return Influence.mean([first, *(each.swapped() for each in second)])


def auc_of(sample: Sample) -> Influence:
    return influence(sample, lambda pair: pair.auc)


def _seed_mean(influences: list[Influence], samples: list[Sample], pooled: Spread | None = None) -> SeedMean:
    if all(same_examples(samples[0], sample) for sample in samples):
        mean = Influence.mean(influences)
        within, df = mean.variance(), mean.df
    else:  # every seed has a split of its own
        within = sum(each.variance() for each in influences) / len(influences) ** 2
        df = min(each.df for each in influences)
    return over_seeds([each.value for each in influences], within, pooled, df)


def estimate(influences: list[Influence], samples: list[Sample]) -> Interval:
    """Interval over examples for one seed; over seeds and examples for several."""
    if len(samples) == 1:
        return interval(influences[0])
    mean = _seed_mean(influences, samples)
    return logit_interval(mean.value, mean.se, *influences[0].sizes, df=mean.df)


def against_chance(influences: list[Influence], samples: list[Sample]) -> float:
    """Two-sided p-value of an AUC of 0.5; over seeds and examples for several seeds.

    One pair of independent records takes the exact variance without a leak (Mann-Whitney), all else the estimated one;
    where that is 0 (perfect separation), the one without a leak as well.
    """
    (first, *others), (pair, *swap) = influences, samples[0]
    if first.groups is None and not swap and not others:
        return chance_p(pair.members, pair.nonmembers)
    mean = _seed_mean(influences, samples) if others else SeedMean(first.value, np.sqrt(first.variance()), first.df)
    if mean.se < 1e-12:
        mean = mean._replace(se=np.sqrt(chance_variance(*first.sizes)), df=max(sum(first.sizes) - 2, 1))
    return difference(mean.value - 0.5, mean.se, df=mean.df).p


def compare(
    a: list[Influence],
    b: list[Influence],
    samples: list[Sample],
    extra_variance: float = 0.0,
    pooled: Spread | None = None,
) -> Difference:
    """a - b, seed by seed on the same examples; both lists in the order of `samples`; pooled: see `over_seeds`."""
    gaps = [x.minus(y) for x, y in zip(a, b, strict=True)]
    if len(samples) == 1:
        mean = SeedMean(gaps[0].value, np.sqrt(gaps[0].variance()), gaps[0].df)
    else:
        mean = _seed_mean(gaps, samples, pooled)
    return difference(mean.value, float(np.sqrt(mean.se**2 + extra_variance)), df=mean.df, sizes=gaps[0].sizes)


def same_examples(a: Sample, b: Sample) -> bool:
    """Are two samples scores of the same members and non-members?"""
    return np.array_equal(a[0].member_ids, b[0].member_ids) and np.array_equal(a[0].nonmember_ids, b[0].nonmember_ids)


def _rates(study: Study, samples: list[Sample]) -> list[Interval | str]:
    """TPR at each of FPRS, or the reason why there is none."""
    draws = np.stack([np.mean([study.rates(p, FPRS) for p in sample], axis=0) for sample in samples], axis=1)
    fewest = min(len(pair.nonmembers) for sample in samples for pair in sample)
    m, n = auc_of(samples[0]).sizes
    rates: list[Interval | str] = []
    for column, fpr in enumerate(FPRS):
        each = [[tpr_at_fpr(p.members, p.nonmembers, fpr) for p in sample] for sample in samples]
        if any(None in values for values in each):
            rates.append(
                f"too few non-members: an FPR of {100 * fpr:g} % needs {np.ceil(1 / fpr):.0f} or more, "
                f"there are {fewest}"
            )
        elif len(samples) == 1:
            rates.append(percentile_interval(float(np.mean(each)), draws[:, 0, column], m))
        else:
            mean = over_seeds(np.mean(each, axis=1), draws[:, :, column].mean(axis=1).var())
            rates.append(logit_interval(mean.value, mean.se, m, n, df=mean.df))
    return rates


def sizes(samples: list[Sample]) -> tuple[int, int]:
    """Members and non-members of the first sample."""
    pair = samples[0][0]
    return len(pair.members), len(pair.nonmembers)


# --- membership.csv --------------------------------------------------------------------------------------------------


def membership_rows(study: Study) -> list[dict]:
    """Every model x role pair x attack: all metrics on the whole, AUC per task; per seed, and over several seeds."""
    rows = []
    for run in study.runs:
        for role_pair in study.role_pairs(run):
            for attack in study.attacks(run):
                rows += _attack_rows(study, run, role_pair, attack)
    return rows


def by_seed(study: Study, run: str, attack: str, role_pair: str) -> tuple[dict[int, Sample], dict[int, str]]:
    """The samples of a run's seeds, and the reasons of those that have none."""
    samples, reasons = {}, {}
    for seed in study.seeds(run):
        try:
            samples[seed] = study.pairs(run, seed, attack, role_pair)
        except Unresolved as why:
            reasons[seed] = str(why)
    return samples, reasons


def _attack_rows(study: Study, run: str, role_pair: str, attack: str) -> list[dict]:
    samples, reasons = by_seed(study, run, attack, role_pair)
    head = study.head(run) | {"access": membership.access(attack), "attack": attack, "role_pair": role_pair}
    blocks: dict[int | str, list[Sample] | str] = {seed: [sample] for seed, sample in samples.items()} | reasons
    if len(blocks) > 1:
        blocks["all"] = list(samples.values()) if not reasons else "; ".join(dict.fromkeys(reasons.values()))
    rows, slices = [], {}
    for seed, block in blocks.items():
        at = head | {"task": "all", "seed": seed}
        if isinstance(block, str):
            rows += [at | {"metric": metric, "reason": block} for metric in _metrics(study, role_pair)]
            continue
        rows += _whole_rows(study, at, block)
        if study.settings["tasks"]:
            rows += [_task_row(at | {"task": task}, block, slices) for task in _tasks(block[0])]
    return rows


def _tasks(sample: Sample) -> list[str]:
    tasks = {str(t) for pair in sample for t in (*np.unique(pair.member_task), *np.unique(pair.nonmember_task))}
    return sorted(tasks - {"all"})


def _metrics(study: Study, role_pair: str) -> list[str]:
    calibrated = role_pair != CANARIES and any("calib" in table.files for table in study.tables.values())
    return ["auc", *(f"tpr_at_fpr_{f:g}" for f in FPRS), *(["balanced_accuracy"] if calibrated else [])]


def _whole_rows(study: Study, at: dict, block: list[Sample]) -> list[dict]:
    found: dict[str, Interval | str] = {"auc": estimate([auc_of(sample) for sample in block], block)}
    found |= {f"tpr_at_fpr_{f:g}": rate for f, rate in zip(FPRS, _rates(study, block), strict=True)}
    metrics = _metrics(study, at["role_pair"])
    if "balanced_accuracy" in metrics:
        try:
            accuracies = [
                influence(
                    sample,
                    lambda p: balanced_accuracy(p.members, p.nonmembers, study.threshold(p)).grouped(p.groups),
                )
                for sample in block
            ]
            found["balanced_accuracy"] = estimate(accuracies, block)
        except Unresolved as why:
            found["balanced_accuracy"] = str(why)
    return [_row(at | {"metric": metric}, found[metric], block) for metric in metrics]


def _task_row(at: dict, block: list[Sample], slices: dict[tuple[int, str], Sample]) -> dict:
    """slices: what was cut before, by seed and task; the row of all seeds has the same as those of each."""
    try:
        part = []
        for sample in block:
            key = (sample[0].seed, at["task"])
            if key not in slices:
                slices[key] = [pair.only(at["task"]) for pair in sample]
            part.append(slices[key])
    except Unresolved as why:
        return at | {"metric": "auc", "reason": str(why)}
    return _row(at | {"metric": "auc"}, estimate([auc_of(sample) for sample in part], part), part)


def _row(at: dict, found: Interval | str, block: list[Sample]) -> dict:
    counts = dict(zip(("n_members", "n_nonmembers"), sizes(block), strict=True))
    if isinstance(found, str):
        return at | counts | {"reason": found}
    return (
        at
        | counts
        | {
            "value": found.value,
            "ci_low": found.low,
            "ci_high": found.high,
            "ci_kind": "both" if len(block) > 1 else "examples",
        }
    )


# --- roc.parquet -----------------------------------------------------------------------------------------------------


def roc_points(study: Study) -> pd.DataFrame:
    """All ROC points of every model, attack, seed and role pair (`averaged` has no curve of its own)."""
    frames = []
    for run in study.runs:
        for role_pair in (p for p in study.role_pairs(run) if p != "averaged"):
            for attack in study.attacks(run):
                for seed, (pair,) in by_seed(study, run, attack, role_pair)[0].items():
                    fpr, tpr, _ = roc(pair.members, pair.nonmembers)
                    frames.append(
                        pd.DataFrame(
                            {
                                "model": run,
                                "attack": attack,
                                "role_pair": role_pair,
                                "seed": str(seed),
                                "fpr": fpr,
                                "tpr": tpr,
                            }
                        )
                    )
    columns = ["model", "attack", "role_pair", "seed", "fpr", "tpr"]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)
