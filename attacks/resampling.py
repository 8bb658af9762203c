"""Bootstrap and permutation draws, TPR and AUC in them, and the intervals made of them.

Legend: m members, n non-members, B resamples, F false-positive rates.  Members and non-members are always drawn apart
(stratified); where records come in groups, whole groups are drawn.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy import stats

from attacks.statistics import Groups, Influence, Interval


@dataclass(frozen=True)
class Resampler:
    """Bootstrap draws that belong to the examples: the same ids get the same draws, whichever model is asked about.

    Paired comparisons are paired by this alone, and nothing depends on the order of calls.
    """

    resamples: int
    seed: int
    _cache: dict = field(default_factory=dict, repr=False)

    def counts(self, ids: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
        """How often each of the n examples is drawn, float32 [B, n] (transposed in memory: one example's draws adjoin).

        groups: codes [n]; whole groups are drawn, as many as there are.  Without them each row sums to n.
        """
        digest = zlib.crc32("\0".join(ids).encode())
        key = (digest, len(ids), groups is not None)
        if key not in self._cache:
            codes = np.arange(len(ids)) if groups is None else np.unique(groups, return_inverse=True)[1]
            n, rng = codes.max() + 1, np.random.default_rng([self.seed, digest])
            drawn = rng.integers(n, size=(self.resamples, n)) + n * np.arange(self.resamples)[:, None]
            counts = np.bincount(drawn.ravel(), minlength=self.resamples * n).reshape(self.resamples, n)
            self._cache[key] = np.ascontiguousarray(counts.T[codes], np.float32).T
        return self._cache[key]


# --- rates and areas in resamples ------------------------------------------------------------------------------------


def resampled_tpr(
    members: np.ndarray,
    nonmembers: np.ndarray,
    member_counts: np.ndarray,
    nonmember_counts: np.ndarray,
    fprs: Sequence[float],
) -> np.ndarray:
    """TPR at each FPR [B, F] in B stratified resamples, threshold estimated anew in each.

    The threshold varies too: an interval from the members alone covers far too little.
    counts [B, m] and [B, n]: how often each example was drawn (`Resampler.counts`).
    """
    m, n = (counts.sum(axis=1, dtype=np.float64) for counts in (member_counts, nonmember_counts))
    allowed = np.floor(n[:, None] * np.asarray(fprs) + 1e-9)  # as `allowed_false_positives`
    descending = np.argsort(-nonmembers)
    most = allowed.max()
    drawn_from_top = _cumulated(nonmember_counts, descending[: int(most + 10 * np.sqrt(most) + 20)])
    if (drawn_from_top[-1] <= allowed.max(axis=1)).any():
        drawn_from_top = _cumulated(nonmember_counts, descending)
    # The (allowed + 1)-th largest one drawn is the threshold.
    position = np.stack([(drawn_from_top <= allowed[:, f]).sum(axis=0) for f in range(len(fprs))], axis=1)
    above = len(members) - np.searchsorted(np.sort(members), nonmembers[descending][position], side="right")
    drawn_above = np.zeros((above.max() + 1, len(member_counts)), np.float32)
    if len(drawn_above) > 1:
        drawn_above[1:] = _cumulated(member_counts, np.argsort(-members)[: above.max()])
    hits = np.take_along_axis(drawn_above, above.T, axis=0).T
    return 1 - (m[:, None] - hits) / m[:, None]


def _cumulated(counts: np.ndarray, order: np.ndarray) -> np.ndarray:
    """How many of the first k examples in this order were drawn, float32 [k, B]; exact below 2**24."""
    return np.cumsum(counts.T[order], axis=0)


def resampled_auc(
    members: np.ndarray, nonmembers: np.ndarray, member_counts: np.ndarray, nonmember_counts: np.ndarray
) -> np.ndarray:
    """AUC [B] in B stratified resamples, ties 1/2."""
    drawn_below = np.zeros((len(nonmembers) + 1, len(member_counts)), np.float32)
    drawn_below[1:] = _cumulated(nonmember_counts, np.argsort(nonmembers))
    strictly, through = (np.searchsorted(np.sort(nonmembers), members, side) for side in ("left", "right"))
    wins = np.einsum("mb,mb->b", member_counts.T, (drawn_below[strictly] + drawn_below[through]) / 2, dtype=np.float64)
    return wins / (member_counts.sum(axis=1, dtype=np.float64) * nonmember_counts.sum(axis=1, dtype=np.float64))


# --- jackknives: the value without one record, or without one group ---------------------------------------------------


def jackknife_auc(auc: Influence) -> list[np.ndarray]:
    """AUC without each member (or group of members), and without each non-member: the U-statistic is linear in both."""
    left = []
    for part, codes in zip((auc.members, auc.nonmembers), auc.groups or (None, None), strict=True):
        sums, sizes = _per_group(part, codes)
        left.append((len(part) * part.mean() - sums) / (len(part) - sizes))
    return left


def jackknife_tpr(
    members: np.ndarray, nonmembers: np.ndarray, fpr: float, groups: Groups | None = None
) -> list[np.ndarray]:
    """TPR at one FPR without each member (or group of members), and without each non-member: allowance and threshold
    are those of the records that remain."""
    n, (of_members, of_nonmembers) = len(nonmembers), groups or (None, None)
    descending = np.argsort(-nonmembers, kind="stable")
    ordered = nonmembers[descending]
    hits, sizes = _per_group(members > ordered[int(np.floor(n * fpr + 1e-9))], of_members)
    without_members = (hits.sum() - hits) / (len(members) - sizes)

    code = (np.arange(n) if of_nonmembers is None else np.unique(of_nonmembers, return_inverse=True)[1])[descending]
    sizes = np.bincount(code)
    rank = np.floor((n - sizes) * fpr + 1e-9).astype(np.int64)  # of the threshold, among those that remain
    places = np.sort(code * n + np.arange(n))  # by group, then from the top
    first = np.cumsum(sizes) - sizes
    place = rank
    while True:  # one step down for each record above it that is left out
        left_out = np.searchsorted(places, np.arange(len(sizes)) * n + place, side="right") - first
        if np.array_equal(rank + left_out, place):
            break
        place = np.minimum(rank + left_out, n - 1)
    above = len(members) - np.searchsorted(np.sort(members), ordered[place], side="right")
    return [without_members, above / len(members)]


def _per_group(values: np.ndarray, codes: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Sums and sizes of groups; without codes every value is one."""
    if codes is None:
        return values.astype(np.float64), np.ones(len(values))
    codes = np.unique(codes, return_inverse=True)[1]
    return np.bincount(codes, values), np.bincount(codes)


# --- intervals -------------------------------------------------------------------------------------------------------


def percentile_interval(value: float, resampled: np.ndarray, m: int, level: float = 0.95) -> Interval:
    """Percentile interval of resampled rates [B]; when all agree, Clopper-Pearson over the m members instead."""
    if np.ptp(resampled) == 0:
        exact = stats.binomtest(int(round(value * m)), m).proportion_ci(level, "exact")
        return Interval(value, exact.low, exact.high)
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


class Bca(NamedTuple):
    """A bootstrap interval; percentile: it had to be the plain percentile interval (see `bca`)."""

    interval: Interval
    percentile: bool


def bca(value: float, resampled: np.ndarray, jackknife: Sequence[np.ndarray], level: float = 0.95) -> Bca:
    """Bias-corrected and accelerated interval of a stratified bootstrap (statistics.md 4.3; Efron 1987).

    resampled [B]: the statistic in the resamples.  jackknife: for every stratum s the statistic without each of its n_s
    records (or groups): `U_si = (n_s - 1) (mean t_(-i) - t_(-i))`,
    `a = sum U^3/n_s^3 / (6 (sum U^2/n_s^2)^1.5)`, `z0 = Phi^-1((#{t* < t} + #{t* = t}/2) / B)`.
    Where the jackknife is constant, or all resamples lie on one side, the percentile interval, flagged.
    """
    tail = (1 - level) / 2
    influences = [(len(t) - 1) * (t.mean() - t) / len(t) for t in jackknife]
    square, cube = (sum(float(np.sum(u**power)) for u in influences) for power in (2, 3))
    share = float(np.mean(resampled < value) + np.mean(resampled == value) / 2)
    flagged = square < 1e-24 or not 0 < share < 1
    at = np.array([tail, 1 - tail])
    if not flagged:
        moved = stats.norm.ppf(share) + stats.norm.ppf(at)
        at = stats.norm.cdf(stats.norm.ppf(share) + moved / (1 - cube / (6 * square**1.5) * moved))
    low, high = np.quantile(resampled, at)
    return Bca(Interval(value, float(low), float(high)), flagged)


# --- permutations ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Permuter:
    """Shuffled labels that belong to the examples, so that all attacks on them are shuffled alike."""

    permutations: int
    seed: int
    _cache: dict = field(default_factory=dict, repr=False)

    def labels(self, member_ids: np.ndarray, nonmember_ids: np.ndarray, groups: Groups | None = None) -> np.ndarray:
        """Labels bool [B, m + n], members first where nothing is shuffled; the members of a group keep one label."""
        digest = zlib.crc32("\0".join([*member_ids, "", *nonmember_ids]).encode())
        key = (digest, len(member_ids), len(nonmember_ids), groups is not None)
        if key not in self._cache:
            member = np.arange(len(member_ids) + len(nonmember_ids)) < len(member_ids)
            codes = np.arange(len(member)) if groups is None else 2 * np.concatenate(groups) + member
            _, first, unit = np.unique(codes, return_index=True, return_inverse=True)
            rng = np.random.default_rng([self.seed, digest])
            self._cache[key] = rng.permuted(np.tile(member[first], (self.permutations, 1)), axis=1)[:, unit]
        return self._cache[key]


def permuted_aucs(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """AUC [B, A] of the scores [A, m + n] of A attacks under labels bool [B, m + n], by their ranks."""
    ranks = stats.rankdata(scores, axis=1).T
    m = labels.sum(axis=1)[:, None]
    parts = np.array_split(labels, max(1, labels.size // 2**22))
    sums = np.concatenate([part.astype(np.float64) @ ranks for part in parts])  # of half-integers: exact
    return (sums - m * (m + 1) / 2) / (m * (len(ranks) - m))
