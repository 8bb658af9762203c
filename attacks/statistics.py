"""AUC, DeLong, TPR at a fixed FPR, balanced accuracy, resampling.  Higher scores mean more member-like, always.

Legend: m members, n non-members, B resamples, S training seeds.  df: degrees of freedom (inf: normal).

AUC and balanced accuracy are both handled as an `Influence`: a value with one number per example, so that an interval,
a paired difference and an average are each one line on the same object.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy import stats
from sklearn.metrics import roc_curve


class Interval(NamedTuple):
    """A point estimate and its confidence interval."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """A paired difference a - b with its interval and the two-sided p-value of no difference."""

    value: float
    low: float
    high: float
    se: float
    z: float
    p: float


@dataclass(frozen=True)
class Influence:
    """A statistic of two independent samples, to first order in them.

    value: the point estimate.  members [m], nonmembers [n]: per example, up to a constant, what it moves the value by.
    """

    value: float
    members: np.ndarray
    nonmembers: np.ndarray

    def variance(self) -> float:
        """`s^2(members)/m + s^2(nonmembers)/n`; for AUC this is DeLong's variance."""
        return float(sum(np.var(part, ddof=1) / len(part) for part in (self.members, self.nonmembers)))

    def swapped(self) -> "Influence":
        """The same value with the two samples in the other order (members of one model, non-members of another)."""
        return Influence(self.value, self.nonmembers, self.members)

    def minus(self, other: "Influence") -> "Influence":
        """The difference to another statistic of the same examples: variances and covariance follow by themselves."""
        return Influence(self.value - other.value, self.members - other.members, self.nonmembers - other.nonmembers)

    @staticmethod
    def mean(parts: Sequence["Influence"]) -> "Influence":
        """The mean of several statistics of the same examples."""
        value = float(np.mean([part.value for part in parts]))
        members, nonmembers = ([getattr(p, name) for p in parts] for name in ("members", "nonmembers"))
        return Influence(value, np.mean(members, axis=0), np.mean(nonmembers, axis=0))


# --- AUC -------------------------------------------------------------------------------------------------------------


def auc_influence(members: np.ndarray, nonmembers: np.ndarray) -> Influence:
    """AUC with DeLong's components: `V10_i` the share of non-members below member i (ties 1/2), `V01_j` likewise."""
    m, n = len(members), len(nonmembers)
    ranks = stats.rankdata(np.concatenate([members, nonmembers]))
    v10 = (ranks[:m] - stats.rankdata(members)) / n
    v01 = 1 - (ranks[m:] - stats.rankdata(nonmembers)) / m
    value = (ranks[:m].sum() - m * (m + 1) / 2) / (m * n)  # sums of half-integers: exact in any order of rows
    return Influence(float(value), v10, v01)


def auc(members: np.ndarray, nonmembers: np.ndarray) -> float:
    """Mann-Whitney AUC, ties 1/2.  Never flipped: below 0.5 is printed as it is."""
    return auc_influence(members, nonmembers).value


def logit_interval(value: float, se: float, m: int, n: int, level: float = 0.95, df: float = np.inf) -> Interval:
    """Interval of a value in [0, 1] on the logit scale, where it keeps its coverage near 1.

    Without any spread: perfect separation takes the exact bound from min(m, n) disjoint pairs, constant scores the
    width of a random ranking; never an interval of no width.
    """
    alpha = 1 - level
    if not 0 < value < 1:
        bound = (alpha / 2) ** (1 / min(m, n))
        return Interval(value, bound, 1.0) if value >= 1 else Interval(value, 0.0, 1 - bound)
    if se < 1e-12:
        se = np.sqrt((m + n + 1) / (12 * m * n))
    centre, half = np.log(value / (1 - value)), stats.t.isf(alpha / 2, df) * se / (value * (1 - value))
    return Interval(value, float(1 / (1 + np.exp(half - centre))), float(1 / (1 + np.exp(-half - centre))))


def interval(influence: Influence, level: float = 0.95) -> Interval:
    """Logit interval of an AUC or a balanced accuracy from the spread of its influences."""
    return logit_interval(
        influence.value, np.sqrt(influence.variance()), len(influence.members), len(influence.nonmembers), level
    )


def delong(members: np.ndarray, nonmembers: np.ndarray, level: float = 0.95) -> Interval:
    """AUC with DeLong's interval on the logit scale."""
    return interval(auc_influence(members, nonmembers), level)


def difference(value: float, se: float, level: float = 0.95, df: float = np.inf) -> Difference:
    """Interval and two-sided p-value of a difference.  No spread at all (identical rankings): p = 1."""
    if se < 1e-12:
        return Difference(value, value, value, 0.0, 0.0, 1.0)
    half = stats.t.isf((1 - level) / 2, df) * se
    return Difference(value, value - half, value + half, se, value / se, float(2 * stats.t.sf(abs(value / se), df)))


def paired_difference(a: Influence, b: Influence, level: float = 0.95) -> Difference:
    """a - b for two statistics of the same examples in the same order (DeLong's paired comparison for AUC)."""
    gap = a.minus(b)
    return difference(gap.value, float(np.sqrt(gap.variance())), level)


def paired_delong(
    a_members: np.ndarray,
    a_nonmembers: np.ndarray,
    b_members: np.ndarray,
    b_nonmembers: np.ndarray,
    level: float = 0.95,
) -> Difference:
    """AUC(a) - AUC(b) for two scores of the same members [m] and the same non-members [n]."""
    return paired_difference(auc_influence(a_members, a_nonmembers), auc_influence(b_members, b_nonmembers), level)


def chance_p(members: np.ndarray, nonmembers: np.ndarray) -> float:
    """Two-sided p-value of AUC = 0.5 (Mann-Whitney, normal, tie-corrected); constant scores give 1."""
    if np.ptp(np.concatenate([members, nonmembers])) == 0:
        return 1.0
    return float(stats.mannwhitneyu(members, nonmembers, use_continuity=False, method="asymptotic").pvalue)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's step-down correction, in the order of the input."""
    p = np.asarray(p_values, float)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(stepped, 1)
    return corrected


# --- ROC, TPR at a fixed FPR, balanced accuracy ----------------------------------------------------------------------


def roc(members: np.ndarray, nonmembers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All ROC points (fpr, tpr, threshold); a record is called a member where its score is >= the threshold."""
    labels = np.repeat([1, 0], [len(members), len(nonmembers)])
    return roc_curve(labels, np.concatenate([members, nonmembers]), drop_intermediate=False)


def allowed_false_positives(n: int, fpr: float) -> int:
    """`floor(n * fpr)`, forgiving of rounding: 0 at fpr > 0 means that n non-members cannot resolve this FPR."""
    return int(np.floor(n * fpr + 1e-9))


def tpr_step(members: np.ndarray, nonmembers: np.ndarray, fpr: float) -> float:
    """The largest TPR over thresholds whose FPR is <= fpr: a step function, ties move together, no interpolation."""
    allowed = allowed_false_positives(len(nonmembers), fpr)
    if allowed >= len(nonmembers):
        return 1.0
    return float(np.mean(members > np.sort(nonmembers)[::-1][allowed]))


def tpr_at_fpr(members: np.ndarray, nonmembers: np.ndarray, fpr: float) -> float | None:
    """`tpr_step`, or None where not a single false positive is allowed: too few non-members."""
    if fpr > 0 and allowed_false_positives(len(nonmembers), fpr) == 0:
        return None
    return tpr_step(members, nonmembers, fpr)


def resampled_tpr(
    members: np.ndarray,
    nonmembers: np.ndarray,
    member_counts: np.ndarray,
    nonmember_counts: np.ndarray,
    fprs: Sequence[float],
) -> np.ndarray:
    """TPR at each FPR [B, len(fprs)] in B stratified resamples, threshold estimated anew in each.

    The threshold varies too: an interval from the members alone covers far too little.
    counts [B, m] and [B, n]: how often each example was drawn (`Resampler.counts`).
    """
    m, n = len(members), len(nonmembers)
    descending, up = np.argsort(-nonmembers), np.argsort(members)
    drawn_from_top = np.cumsum(nonmember_counts[:, descending], axis=1, dtype=np.int32)
    drawn_below = np.cumsum(member_counts[:, up], axis=1, dtype=np.int32)
    drawn_below = np.pad(drawn_below, ((0, 0), (1, 0)))
    values = np.empty((len(member_counts), len(fprs)))
    for column, fpr in enumerate(fprs):
        allowed = allowed_false_positives(n, fpr)
        position = np.argmax(drawn_from_top > allowed, axis=1)  # of the (allowed + 1)-th largest one drawn
        not_above = np.searchsorted(members[up], nonmembers[descending][position], side="right")
        values[:, column] = 1 - np.take_along_axis(drawn_below, not_above[:, None], axis=1)[:, 0] / m
    return values


def percentile_interval(value: float, resampled: np.ndarray, m: int, level: float = 0.95) -> Interval:
    """Percentile interval of resampled rates [B]; when all agree, Clopper-Pearson over the m members instead."""
    if np.ptp(resampled) == 0:
        exact = stats.binomtest(int(round(value * m)), m).proportion_ci(level, "exact")
        return Interval(value, exact.low, exact.high)
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def best_threshold(members: np.ndarray, nonmembers: np.ndarray) -> float:
    """The threshold of greatest balanced accuracy (score >= threshold: member).  Only for calibration records."""
    fpr, tpr, thresholds = roc(members, nonmembers)
    return float(thresholds[np.argmax(tpr - fpr)])


def balanced_accuracy(members: np.ndarray, nonmembers: np.ndarray, threshold: float) -> Influence:
    """`(TPR + TNR) / 2` at a threshold chosen on other records."""
    hits, rejections = (members >= threshold) / 2, (nonmembers < threshold) / 2
    return Influence(float(hits.mean() + rejections.mean()), hits, rejections)


# --- seeds and resampling --------------------------------------------------------------------------------------------


class SeedMean(NamedTuple):
    """A mean over training seeds, its standard error over seeds and examples together, degrees of freedom."""

    value: float
    se: float
    df: float


class Spread(NamedTuple):
    """How much one value differs from seed to seed: its variance, and the degrees of freedom of that estimate."""

    variance: float
    df: int


def gap_spread(values: np.ndarray) -> Spread:
    """Spread over seeds of the gap between two models, pooled over all K >= 2 models of a table [K, S], S >= 2 seeds.

    Twice the residual of model x seed (what is left after the mean of each model and of each seed), which is the mean
    over all pairs of the variance of their gaps; K - 1 times as many degrees of freedom as one pair has alone.
    """
    rest = values - values.mean(axis=1, keepdims=True) - values.mean(axis=0, keepdims=True) + values.mean()
    df = (values.shape[0] - 1) * (values.shape[1] - 1)
    return Spread(float(2 * (rest**2).sum() / df), df)


def over_seeds(values: Sequence[float], within: float, pooled: Spread | None = None) -> SeedMean:
    """Mean of the values of S >= 2 seeds; within: the variance of that mean over examples.

    Both variances are added, with Satterthwaite's degrees of freedom: S - 1 where the seeds differ most, which is what
    keeps three lucky seeds from looking like a finding (resampling three seeds would be wrong one time in four).

    pooled: for one of many comparisons, the spread over seeds that all of them share.  The greater of it and the own
    one counts, with its degrees of freedom: of fifteen pairs with three seeds each some have nearly equal gaps by
    luck, and with their own spread alone equal models are declared different in up to one family in four
    (tests/test_attacks_ranking.py).
    """
    spread = Spread(float(np.var(values, ddof=1)), len(values) - 1)
    if pooled is not None:
        spread = Spread(max(spread.variance, pooled.variance), pooled.df)
    between = spread.variance / len(values)
    total = between + within
    df = total**2 / between**2 * spread.df if between > 1e-12 * total else np.inf
    if pooled is not None and pooled.df == 1:
        df = 1.0  # two models, two seeds: one gap of two may vanish by luck, so examples lend it no freedom
    return SeedMean(float(np.mean(values)), float(np.sqrt(total)), df)


@dataclass(frozen=True)
class Resampler:
    """Bootstrap draws that belong to the examples: the same ids get the same draws, whichever model is asked about.

    Paired comparisons are paired by this alone, and nothing depends on the order of calls.
    """

    resamples: int
    seed: int
    _cache: dict = field(default_factory=dict, repr=False)

    def counts(self, ids: np.ndarray) -> np.ndarray:
        """How often each of the n examples is drawn, float32 [B, n]; each row sums to n."""
        digest = zlib.crc32("\0".join(ids).encode())
        key = (digest, len(ids))
        if key not in self._cache:
            n, rng = len(ids), np.random.default_rng([self.seed, digest])
            drawn = rng.integers(n, size=(self.resamples, n)) + n * np.arange(self.resamples)[:, None]
            counts = np.bincount(drawn.ravel(), minlength=self.resamples * n)
            self._cache[key] = counts.reshape(self.resamples, n).astype(np.float32)
        return self._cache[key]
