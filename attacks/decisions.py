"""Rows of decisions.csv: what somebody gets who decides record by record, by the primary attack.

An AUC ranks; these rows call records members.  Each says how it is to be read: how many false positives its threshold
rests on, what chance gives, what share of the called records are members at a stated prior.
"""

from collections.abc import Callable

import numpy as np

from attacks.resampling import Resampler, bca, jackknife_auc, jackknife_tpr, resampled_auc, resampled_tpr
from attacks.rows import Sample, by_seed, estimate, influence, same_examples, sizes
from attacks.statistics import (
    Interval,
    advantage,
    advantage_by_chance,
    allowed_false_positives,
    balanced_accuracy,
    false_positive_range,
    ppv,
    threshold_at,
    tpr_step,
)
from attacks.study import Pair, Study, Unresolved

FPRS = (0.0, 0.001, 0.01, 0.05, 0.1, 0.25)
PRIORS = (1, 10, 100, 1000)  # non-members for every member
NEEDED = 10  # allowed false positives, for a rate to be a headline
BCA_FACTOR = 5  # the tails of BCa need more resamples than percentiles do


def decision_rows(study: Study) -> list[dict]:
    """Rows of decisions.csv for every model: over all seeds where there are several, else of the only one.

    `auc`, `tpr`: with a stratified bootstrap over records, given the trained models (`ci_kind` bca, or percentile where
    BCa cannot be computed).  `fpr`: the allowance, and in which range the true rate behind its threshold lies.
    `ppv`: share of members among the called at a prior.  `advantage`: greatest TPR - FPR, beside what chance gives;
    `advantage_calibrated`: at a threshold chosen on other records.  `flip_rate`, `flagged_always`, `flagged_never`:
    members whose decision changes from training seed to training seed.
    """
    resampler = Resampler(BCA_FACTOR * study.settings["bootstrap"], study.settings["seed"])
    rows = []
    for run in study.runs:
        role_pair = "heldout-private" if study.provenance(run).get("swap_of") else "private-heldout"
        samples, reasons = by_seed(study, run, study.settings["primary"], role_pair)
        block = list(samples.values())
        if reasons or not all(same_examples(block[0], sample) for sample in block):
            continue  # membership.csv says why
        at = study.head(run) | {"attack": study.settings["primary"], "role_pair": role_pair}
        at |= {"seed": "all" if len(block) > 1 else study.seeds(run)[0]}
        at |= dict(zip(("n_members", "n_nonmembers"), sizes(block), strict=True))
        rows += [at | row for row in _model_rows(study, resampler, [pair for (pair,) in block])]
    return rows


def _model_rows(study: Study, resampler: Resampler, pairs: list[Pair]) -> list[dict]:
    first = pairs[0]
    both = zip((first.member_ids, first.nonmember_ids), first.groups or (None, None), strict=True)
    counts = [resampler.counts(*each) for each in both]
    auc = _bootstrap(
        [pair.auc.value for pair in pairs],
        np.mean([resampled_auc(pair.members, pair.nonmembers, *counts) for pair in pairs], axis=0),
        [jackknife_auc(pair.auc) for pair in pairs],
    )
    rows = [{"measure": "auc", "by_chance": 0.5} | auc]
    resolved = [f for f in FPRS if f == 0 or allowed_false_positives(len(first.nonmembers), f)]
    draws = np.mean([resampled_tpr(pair.members, pair.nonmembers, *counts, resolved) for pair in pairs], axis=0)
    for column, fpr in enumerate(resolved):
        rows += _rate_rows(pairs, fpr, draws[:, column])
    chance = advantage_by_chance(*first.auc.sizes)
    value = float(np.mean([advantage(pair.members, pair.nonmembers) for pair in pairs]))
    said = "greatest over all thresholds: above 0 by chance alone"
    rows.append({"measure": "advantage", "value": value, "by_chance": chance, "verdict": said})
    rows += _calibrated(study, pairs)
    return rows + (_flips(pairs, resolved, counts[0]) if len(pairs) > 1 else [])


def _bootstrap(values: list[float], draws: np.ndarray, jackknives: list[list[np.ndarray]]) -> dict:
    """Interval of a mean over seeds: records are drawn, and left out, once for all seeds."""
    jackknife = [np.mean(parts, axis=0) for parts in zip(*jackknives, strict=True)]
    found, percentile = bca(float(np.mean(values)), draws, jackknife)
    kind = "percentile" if percentile else "bca"
    return {"value": found.value, "ci_low": found.low, "ci_high": found.high, "ci_kind": kind}


def _rate_rows(pairs: list[Pair], fpr: float, draws: np.ndarray) -> list[dict]:
    first, n = pairs[0], pairs[0].auc.sizes[1]  # non-members, or their groups: what is independent
    allowed = allowed_false_positives(n, fpr)
    jackknives = [jackknife_tpr(pair.members, pair.nonmembers, fpr, pair.groups) for pair in pairs]
    tpr = _bootstrap([tpr_step(pair.members, pair.nonmembers, fpr) for pair in pairs], draws, jackknives)
    if fpr == 0:
        said = f"at zero observed false positives (true FPR below {3 / n:.2g} at 95 %): not a headline"
        return [{"measure": "tpr", "fpr": fpr, "by_chance": fpr, "verdict": said} | tpr]
    enough = allowed >= NEEDED
    what = "false positives" if first.groups is None else f"of {n} groups as false positives"
    said = "headline" if enough else f"not a headline: rests on {allowed} {what}, {NEEDED} are needed"
    behind = false_positive_range(n, fpr)
    rows = [{"measure": "tpr", "fpr": fpr, "by_chance": fpr, "verdict": said} | tpr]
    rows.append({"measure": "fpr", "fpr": fpr, "value": fpr, "ci_low": behind.low, "ci_high": behind.high})
    for prior in PRIORS:
        ends = [ppv(tpr[end], rate, prior) for end, rate in (("ci_low", behind.high), ("ci_high", behind.low))]
        found = {"value": ppv(tpr["value"], fpr, prior), "ci_low": ends[0], "ci_high": ends[1]}
        rows.append(
            {"measure": "ppv", "fpr": fpr, "prior": prior, "by_chance": 1 / (1 + prior), "verdict": said} | found
        )
    return rows


def _calibrated(study: Study, pairs: list[Pair]) -> list[dict]:
    accuracy: Callable[[Pair], object] = lambda p: balanced_accuracy(
        p.members, p.nonmembers, study.threshold(p)
    ).grouped(p.groups)
    block: list[Sample] = [[pair] for pair in pairs]
    try:
        found = estimate([influence(sample, accuracy) for sample in block], block)
    except Unresolved:
        return []
    numbers = {name: 2 * end - 1 for name, end in zip(("value", "ci_low", "ci_high"), found, strict=True)}
    kind = "both" if len(pairs) > 1 else "examples"
    return [{"measure": "advantage_calibrated", "by_chance": 0.0, "ci_kind": kind} | numbers]


def _flips(pairs: list[Pair], fprs: list[float], counts: np.ndarray) -> list[dict]:
    """Members called at each seed's own threshold: `flip = 2 p (1 - p)`, p the share of seeds that call a member."""
    rows = []
    for fpr in (f for f in fprs if f > 0):
        share = np.mean([pair.members > threshold_at(pair.nonmembers, fpr) for pair in pairs], axis=0)
        for measure, each in (
            ("flip_rate", 2 * share * (1 - share)),
            ("flagged_always", share == 1),
            ("flagged_never", share == 0),
        ):
            draws = (counts @ each.astype(np.float32)) / counts.sum(axis=1)
            found = Interval(float(each.mean()), *np.quantile(draws, [0.025, 0.975]).tolist())
            numbers = dict(zip(("value", "ci_low", "ci_high"), found, strict=True))
            rows.append({"measure": measure, "fpr": fpr, "ci_kind": "percentile"} | numbers)
    return rows


def decision_facts(study: Study, rows: list[dict]) -> dict:
    """For summary.json: the headline model's rates with the rule that makes them headlines, PPV, flips; in words."""
    mine = [row for row in rows if row["model"] == study.settings["headline_model"]]
    of = lambda measure: [row for row in mine if row["measure"] == measure]
    keys = ("value", "ci_low", "ci_high")
    rates = []
    for row in of("tpr"):
        at = {"fpr": row["fpr"], "headline": row["verdict"] == "headline", "verdict": row["verdict"]}
        found = {str(r["prior"]): {k: r[k] for k in keys} for r in of("ppv") if r["fpr"] == row["fpr"]}
        rates.append(at | {k: row[k] for k in keys} | {"ppv": found})
    flips = [{k: row[k] for k in ("measure", "fpr", *keys)} for m in FLIPS for row in of(m)]
    words = [] if flips else ["Flip rate between training seeds: not applicable, one seed."]
    return {"model": study.settings["headline_model"], "attack": study.settings["primary"], "rates": rates} | {
        "advantage": [{k: row.get(k) for k in ("measure", *keys, "by_chance")} for m in ADVANTAGES for row in of(m)],
        "flips": flips,
        "words": words,
    }


FLIPS = ("flip_rate", "flagged_always", "flagged_never")
ADVANTAGES = ("advantage", "advantage_calibrated")
