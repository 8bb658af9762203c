"""Is what an attack calls a member what the model memorized?  Membership score beside memorization, record by record.

disagreement.csv has, for teacher, baseline, every student and the models that saw neither role, for the primary attack
and for the other one with the greatest AUC (chosen on the same records, so a little flattered), over private records
whose suffix is whole at the main cut (after an `@`):

  spearman_matched spearman_log_p   rank correlation of the membership score with the matched share of the window, and
                                    with the log-probability per token of the window at temperature 1
  auc_memorized                     how well the score tells memorized members from other members
  memorized                         share of members that are memorized
  missed_at_fpr_<f>                 share of memorized members that the attack does not flag, its threshold that of <f>
                                    among heldout records
  unremembered_at_fpr_<f>           share of flagged members that are not memorized

The score and the window are made of the same log-probabilities: an attack on the loss agrees by construction to the
degree that the window is the whole response.  What models that were never trained on private records show is that
agreement, of predictable text.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd

from attacks import membership
from attacks.agreement import exact_interval
from attacks.cuts import Memorized
from attacks.effects import Effect, pool, share, units
from attacks.measures import blocks, told
from attacks.overlap import BASELINE, kept, matched_share, missing
from attacks.resampling import resampled_tpr
from attacks.statistics import (
    Interval,
    allowed_false_positives,
    auc_influence,
    difference,
    logit_interval,
    over_seeds,
    threshold_at,
)
from attacks.study import Pair, Study, Unresolved

COLUMNS = "model technique setting attack measure value ci_low ci_high n seed"
FPRS = (0.01, 0.05)
SHOWN = 20  # examples a model
CELLS = 2**22  # numbers in memory at once


class Members(NamedTuple):
    """One model, seed and attack: private records with a whole suffix, in the order of their ids.

    score, matched, log_p [n]; memorized bool [n].  pair: all members and non-members.  chosen: bool [m], which members.
    """

    ids: np.ndarray
    task: np.ndarray
    score: np.ndarray
    matched: np.ndarray
    log_p: np.ndarray
    memorized: np.ndarray
    pair: Pair
    chosen: np.ndarray


class Estimate(NamedTuple):
    """A value with its resamples [B], how many records it is of, and of how many independent groups."""

    value: float
    draws: np.ndarray
    n: int
    groups: int


def compared(study: Study) -> list[str]:
    """Students, their teachers and the baseline: the runs that can have memorized private records."""
    teachers = [study.provenance(run).get("teacher") for run in study.students]
    wanted = dict.fromkeys([*(t for t in teachers if t), "teacher", BASELINE, *study.students])
    return [run for run in wanted if run in study.runs]


def members(study: Study, memorized: Memorized, run: str, seed: int, attack: str) -> Members:
    """The members that an attack scored and the cut is long enough for. Raises Unresolved where there are none."""
    pair = study.pairs(run, seed, attack, "private-heldout")[0]
    found = memorized.of(run, seed, "private", memorized.main)
    at = np.searchsorted(found.ids, pair.member_ids)
    known = at < len(found.ids)
    known[known] = found.ids[at[known]] == pair.member_ids[known]
    chosen = known.copy()
    chosen[known] = found.full[at[known]]
    if chosen.sum() < 3:
        raise Unresolved(f"{chosen.sum()} members of {run}/seed{seed} have a whole suffix at {memorized.main}")
    rows = at[chosen]
    per_token = found.log_p["t=1"][rows] / np.maximum(found.window[rows], 1)
    values = found.ids[rows], found.task[rows], pair.members[chosen], matched_share(found)[rows], per_token
    return Members(*values, kept(found)[rows], pair, chosen)


def second_attack(study: Study, run: str) -> str | None:
    """Of the attacks on a run beside the primary one, that of the greatest AUC; None where there is no other.

    An attack that looks at the teacher itself says something of members whichever model is attacked: not these.
    """
    best: tuple[float, str] | None = None
    for attack in study.attacks(run):
        if attack == study.settings["primary"] or membership.ATTACKS[membership.parse(attack)[0]].reads_teacher:
            continue
        try:
            aucs = [study.pairs(run, seed, attack, "private-heldout")[0].auc.value for seed in study.seeds(run)]
        except Unresolved:
            continue
        if best is None or np.mean(aucs) > best[0]:
            best = float(np.mean(aucs)), attack
    return best and best[1]


# --- rank correlation ------------------------------------------------------------------------------------------------


def spearman(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation [B] of x and y [n] in resamples that draw example i counts[b, i] times.

    Ties have their mean rank.  0 where all of a resample is tied.
    """
    size = max(1, CELLS // max(len(x), 1))
    return np.concatenate([_spearman(x, y, counts[k : k + size]) for k in range(0, len(counts), size)])


def _spearman(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    counts = counts.astype(np.float64)
    total = counts.sum(axis=1, keepdims=True)
    a, b = (_midranks(v, counts) for v in (x, y))
    a, b = (ranks - (counts * ranks).sum(axis=1, keepdims=True) / total for ranks in (a, b))
    both, of_a, of_b = ((counts * u * v).sum(axis=1) for u, v in ((a, b), (a, a), (b, b)))
    return np.divide(both, np.sqrt(of_a * of_b), out=np.zeros_like(both), where=of_a * of_b > 0)


def _midranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean ranks [B, n] among the records drawn, from 1/2 on."""
    codes = np.unique(values, return_inverse=True)[1]
    order = np.argsort(codes, kind="stable")
    first = np.searchsorted(codes[order], np.arange(codes.max() + 1))
    drawn = np.add.reduceat(counts[:, order], first, axis=1)
    return (np.cumsum(drawn, axis=1) - drawn / 2)[:, codes]


def correlation(study: Study, ids: np.ndarray, x: np.ndarray, y: np.ndarray) -> Estimate:
    """Spearman's correlation with its bootstrap over records, whole groups at a time.

    Raises Unresolved where x or y is the same for all.
    """
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        raise Unresolved("the same value for all records: no rank correlation")
    draws = spearman(x, y, study.resampler.counts(ids, study.clusters(ids)))
    value = float(spearman(x, y, np.ones((1, len(x))))[0])
    return Estimate(value, draws, len(ids), units(study, ids, np.ones(len(ids), bool)))


def interval(found: list[Estimate], low: float, high: float) -> Interval:
    """Of one seed by percentiles of its resamples, of several over seeds and examples; within [low, high]."""
    if len(found) == 1:
        return Interval(found[0].value, *np.quantile(found[0].draws, [0.025, 0.975]).tolist())
    same = len({len(each.draws) for each in found}) == 1
    within = np.mean([e.draws for e in found], axis=0).var() if same else np.mean([e.draws.var() for e in found])
    mean = over_seeds([each.value for each in found], float(within))
    gap = difference(mean.value, mean.se, df=mean.df)
    return Interval(gap.value, max(gap.low, low), min(gap.high, high))


# --- what the attack misses ------------------------------------------------------------------------------------------


def separation(found: Members) -> Effect:
    """AUC of the score for memorized members against the others, by what every member moves it.

    Raises Unresolved where either has fewer than two.
    """
    inside = found.memorized
    if min(inside.sum(), (~inside).sum()) < 2:
        raise Unresolved(f"{inside.sum()} of {len(inside)} members are memorized: two of each kind are needed")
    auc = auc_influence(found.score[inside], found.score[~inside])
    moved = np.zeros(len(inside))
    moved[inside] = (auc.members - auc.members.mean()) / inside.sum()
    moved[~inside] = (auc.nonmembers - auc.nonmembers.mean()) / (~inside).sum()
    return Effect(auc.value, moved, np.ones(len(inside), bool), min(inside.sum(), (~inside).sum()) - 1)


def misses(study: Study, found: Members, fpr: float) -> dict[str, Estimate]:
    """Memorized members that the attack misses, and flagged ones that are not memorized, the threshold resampled too.

    What there is no record for is left out.  Raises Unresolved where the heldout records are too few for the FPR.
    """
    pair, inside = found.pair, found.memorized
    if not allowed_false_positives(len(pair.nonmembers), fpr):
        raise Unresolved(f"{len(pair.nonmembers)} heldout records are too few for a threshold at FPR {fpr:g}")
    drawn, drawn_nonmembers = study.drawn(pair)
    drawn = drawn[:, found.chosen].astype(np.float64)
    flagged = found.score > threshold_at(pair.nonmembers, fpr)
    hits, draws = {}, {}
    for name, kind in (("memorized", inside), ("other", ~inside)):
        hits[name] = int((flagged & kind).sum())
        rate = np.zeros(len(drawn))
        size = drawn[:, kind].sum(axis=1)
        some = size > 0
        if kind.any():
            counts = drawn[some][:, kind], drawn_nonmembers[some]
            rate[some] = resampled_tpr(found.score[kind], pair.nonmembers, *counts, (fpr,))[:, 0]
        draws[name] = rate * size, size
    estimates = {}
    if inside.any():
        (caught, size), n = draws["memorized"], int(inside.sum())
        missed = (size - caught)[size > 0] / size[size > 0]
        estimates[f"missed_at_fpr_{fpr:g}"] = Estimate(
            1 - hits["memorized"] / n, missed, n, units(study, found.ids, inside)
        )
    if flagged.any():
        caught, other = draws["memorized"][0], draws["other"][0]
        both = caught + other
        wrong, n = other[both > 0] / both[both > 0], int(flagged.sum())
        estimates[f"unremembered_at_fpr_{fpr:g}"] = Estimate(
            hits["other"] / n, wrong, n, units(study, found.ids, flagged)
        )
    return estimates


def _of_share(found: list[Estimate]) -> Interval:
    """As `interval`; where that has no width, since resamples and seeds agree, the exact one of a share of groups."""
    drawn = interval(found, 0.0, 1.0)
    if drawn.high - drawn.low > 1e-12:
        return drawn
    one = min(found, key=lambda each: each.groups)
    return exact_interval(round(one.value * one.groups), one.groups)


# --- rows ------------------------------------------------------------------------------------------------------------


def rows(study: Study, memorized: Memorized) -> list[dict]:
    """Rows of disagreement.csv; one that could not be computed has a `reason`."""
    if reason := missing(memorized):
        return [{"measure": "disagreement", "reason": reason}]
    found = []
    for run in dict.fromkeys([*compared(study), *study.nulls]):
        for attack in [study.settings["primary"], second_attack(study, run)]:
            if attack in study.attacks(run):
                found += _attack_rows(study, memorized, run, attack)
    return found


def _attack_rows(study: Study, memorized: Memorized, run: str, attack: str) -> Iterator[dict]:
    head = study.head(run) | {"attack": attack}
    loaded: dict[int, Members] = {}
    for seed in study.seeds(run):
        try:
            loaded[seed] = members(study, memorized, run, seed, attack)
        except Unresolved as why:
            yield head | {"measure": "disagreement", "seed": seed, "reason": str(why)}
    estimated = {seed: (found, _resampled(study, found)) for seed, found in loaded.items()}
    refused: set[tuple[str, str]] = set()  # one row for all seeds of a measure that fail alike
    for seed, block in blocks(estimated).items():
        for measure, numbers in _measures(study, block):
            why = measure, numbers.get("reason")
            if why in refused:
                continue
            refused |= {why} if why[1] else set()
            yield head | {"measure": f"{measure}@{memorized.main}", "seed": seed} | numbers


def _resampled(study: Study, found: Members) -> dict[str, Estimate | str]:
    """What of one seed needs resamples, once for its own rows and those over seeds; or why it is not there."""
    estimates: dict[str, Estimate | str] = {}
    for name, values in (("spearman_matched", found.matched), ("spearman_log_p", found.log_p)):
        try:
            estimates[name] = correlation(study, found.ids, found.score, values)
        except Unresolved as why:
            estimates[name] = str(why)
    for fpr in FPRS:
        try:
            estimates |= misses(study, found, fpr)
        except Unresolved as why:
            estimates[f"missed_at_fpr_{fpr:g}"] = str(why)
    return estimates


def _measures(study: Study, block: list[tuple[Members, dict[str, Estimate | str]]]) -> Iterator[tuple[str, dict]]:
    for name in block[0][1]:
        each = [estimates.get(name, "not of every seed") for _, estimates in block]
        if reasons := [found for found in each if isinstance(found, str)]:
            yield name, {"reason": reasons[0]}
            continue
        found = interval(each, -1.0, 1.0) if name.startswith("spearman") else _of_share(each)
        yield name, told(found) | {"n": min(one.n for one in each)}
    members = [found for found, _ in block]
    if len(block) == 1:
        ids, inside = members[0].ids, members[0].memorized
        yield "memorized", told(share(study, ids, inside, np.ones(len(ids), bool))) | {"n": len(ids)}
    try:
        yield "auc_memorized", _auc(study, members)
    except Unresolved as why:
        yield "auc_memorized", {"reason": str(why)}


def _auc(study: Study, block: list[Members]) -> dict:
    effects = [separation(found) for found in block]
    if any(not np.array_equal(found.ids, block[0].ids) for found in block):
        raise Unresolved("the seeds were scored on different examples")
    auc = pool(effects, study.clusters(block[0].ids))
    known = [int(found.memorized.sum()) for found in block]
    sizes = min(known), min(len(block[0].ids) - k for k in known)
    return told(logit_interval(auc.value, auc.se, *sizes, df=auc.df)) | {"n": len(block[0].ids)}


# --- examples --------------------------------------------------------------------------------------------------------


def examples(study: Study, memorized: Memorized) -> pd.DataFrame:
    """The SHOWN examples of every model on which the primary attack and memorization disagree most; ids, no text.

    Columns model, seed (the first one of the model), attack, example_id, role, task, membership_rank and
    memorization_rank: shares of the members that have a lower score, and a lower log-probability per token.
    """
    columns = "model seed attack example_id role task membership_rank memorization_rank".split()
    frames, attack = [], study.settings["primary"]
    for run in [] if missing(memorized) else compared(study):
        for seed in study.seeds(run)[:1]:
            try:
                found = members(study, memorized, run, seed, attack)
            except Unresolved:
                continue  # a row of the table says why
            once = np.ones((1, len(found.ids)))
            ranks = [_midranks(values, once)[0] / len(found.ids) for values in (found.score, found.log_p)]
            most = np.argsort(-np.abs(ranks[0] - ranks[1]), kind="stable")[:SHOWN]
            frames.append(
                pd.DataFrame(
                    {"model": run, "seed": seed, "attack": attack, "example_id": found.ids[most], "role": "private"}
                    | {"task": found.task[most], "membership_rank": ranks[0][most], "memorization_rank": ranks[1][most]}
                )
            )
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)
