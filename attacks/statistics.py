"""AUC, DeLong, TPR at a fixed FPR, balanced accuracy, seeds.  Higher scores mean more member-like, always.

Legend: m members, n non-members, S training seeds.  df: degrees of freedom (inf: normal).

AUC and balanced accuracy are both handled as an `Influence`: a value with one number per example, so that an interval,
a paired difference and an average are each one line on the same object.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy import special, stats
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


class Groups(NamedTuple):
    """Which records belong together (one person's, windows of one text): codes [m] and [n] that share one range."""

    members: np.ndarray
    nonmembers: np.ndarray

    @staticmethod
    def of(members: np.ndarray, nonmembers: np.ndarray) -> "Groups | None":
        """Codes of group names [m] and [n]; None where no two records share one, so that nothing changes."""
        names, codes = np.unique(np.concatenate([members, nonmembers]), return_inverse=True)
        if len(names) == len(codes):
            return None
        return Groups(codes[: len(members)], codes[len(members) :])

    @property
    def sizes(self) -> tuple[int, int]:
        """How many groups have members, and how many non-members."""
        return len(np.unique(self.members)), len(np.unique(self.nonmembers))


@dataclass(frozen=True)
class Influence:
    """A statistic of two independent samples, to first order in them.

    value: the point estimate.  members [m], nonmembers [n]: per example, up to a constant, what it moves the value by.
    groups: where records come in groups, groups are what is independent; None: every record is.
    """

    value: float
    members: np.ndarray
    nonmembers: np.ndarray
    groups: Groups | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        """What is independent: members and non-members, or their groups."""
        return (len(self.members), len(self.nonmembers)) if self.groups is None else self.groups.sizes

    def variance(self) -> float:
        """`s^2(members)/m + s^2(nonmembers)/n`; for AUC this is DeLong's variance.

        With groups the influences are summed within each before they are squared (Obuchowski 1997, Biometrics 53:567);
        one group alone has no variance that could be estimated: inf.
        """
        if self.groups is None:
            return float(sum(np.var(part, ddof=1) / len(part) for part in (self.members, self.nonmembers)))
        return sum(self._parts())

    @property
    def df(self) -> float:
        """Satterthwaite's degrees of freedom of a variance over groups; without groups inf, the normal limit."""
        if self.groups is None:
            return np.inf
        m, n, _ = self._parts()
        free = [max(size - 1, 1) for size in self.groups.sizes]
        return 1.0 if not 0 < m + n < np.inf else max((m + n) ** 2 / (m**2 / free[0] + n**2 / free[1]), 1.0)

    def _parts(self) -> tuple[float, float, float]:
        """Variance over groups: of the members, of the non-members, and of groups that have both."""
        count = max(codes.max() for codes in self.groups) + 1
        m, n = (
            np.bincount(codes, part - part.mean(), count) / len(part)
            for codes, part in zip(self.groups, (self.members, self.nonmembers), strict=True)
        )
        if min(self.groups.sizes) < 2:
            return np.inf, np.inf, 0.0
        unbiased = [size / (size - 1) for size in (*self.groups.sizes, count)]
        return tuple(float(u * sums) for u, sums in zip(unbiased, (m @ m, n @ n, 2 * m @ n), strict=True))

    def swapped(self) -> "Influence":
        """The same value with the two samples in the other order (members of one model, non-members of another)."""
        groups = None if self.groups is None else Groups(self.groups.nonmembers, self.groups.members)
        return Influence(self.value, self.nonmembers, self.members, groups)

    def grouped(self, groups: Groups | None) -> "Influence":
        """The same statistic of records that come in groups."""
        return replace(self, groups=groups)

    def minus(self, other: "Influence") -> "Influence":
        """The difference to another statistic of the same examples: variances and covariance follow by themselves."""
        members, nonmembers = self.members - other.members, self.nonmembers - other.nonmembers
        return Influence(self.value - other.value, members, nonmembers, self.groups)

    @staticmethod
    def mean(parts: Sequence["Influence"]) -> "Influence":
        """The mean of several statistics of the same examples."""
        value = float(np.mean([part.value for part in parts]))
        members, nonmembers = ([getattr(p, name) for p in parts] for name in ("members", "nonmembers"))
        return Influence(value, np.mean(members, axis=0), np.mean(nonmembers, axis=0), parts[0].groups)


# --- AUC -------------------------------------------------------------------------------------------------------------


def auc_influence(members: np.ndarray, nonmembers: np.ndarray) -> Influence:
    """AUC with DeLong's components: `V10_i` the share of non-members below member i (ties 1/2), `V01_j` likewise."""
    m, n = len(members), len(nonmembers)
    won = _below(members, nonmembers)  # half-integers: their sum is exact in any order of rows
    return Influence(float(won.sum() / (m * n)), won / n, 1 - _below(nonmembers, members) / m)


def _below(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How many of the others lie below each value, ties 1/2."""
    ordered = np.sort(others)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")) / 2


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
        se, df = np.sqrt(chance_variance(m, n)), max(m + n - 2, 1)
    centre, half = np.log(value / (1 - value)), stats.t.isf(alpha / 2, df) * se / (value * (1 - value))
    return Interval(value, float(1 / (1 + np.exp(half - centre))), float(1 / (1 + np.exp(-half - centre))))


def interval(influence: Influence, level: float = 0.95) -> Interval:
    """Logit interval of an AUC or a balanced accuracy from the spread of its influences."""
    return logit_interval(influence.value, np.sqrt(influence.variance()), *influence.sizes, level, influence.df)


def delong(members: np.ndarray, nonmembers: np.ndarray, level: float = 0.95) -> Interval:
    """AUC with DeLong's interval on the logit scale."""
    return interval(auc_influence(members, nonmembers), level)


def chance_variance(m: int, n: int) -> float:
    """Variance of the AUC of a random ranking of m members and n non-members without ties."""
    return (m + n + 1) / (12 * m * n)


def difference(
    value: float, se: float, level: float = 0.95, df: float = np.inf, sizes: tuple[int, int] | None = None
) -> Difference:
    """Interval and two-sided p-value of a difference.  No spread at all and a value of 0 (identical rankings): p = 1.

    sizes: of a difference of two AUCs or rates, the independent members and non-members behind it.  Where another value
    than 0 has no spread (perfect separation) that of two random rankings of the fewer of both stands in,
    `(2k + 1) / 6k^2` with 2k - 2 degrees of freedom: wider than the exact bound of a share that is 0 of k.
    Without sizes only the p-value is bounded, by the sign test of df + 1 values that agree.
    """
    if se < 1e-12 and abs(value) < 1e-12:
        return Difference(value, value, value, 0.0, 0.0, 1.0)
    if se < 1e-12 and sizes is None:
        return Difference(value, value, value, 0.0, float(np.sign(value)) * np.inf, min(1.0, 2 * 0.5 ** (df + 1)))
    if se < 1e-12:
        se, df = np.sqrt(2 * chance_variance(min(sizes), min(sizes))), max(2 * min(sizes) - 2, 1)
    half = stats.t.isf((1 - level) / 2, df) * se
    return Difference(value, value - half, value + half, se, value / se, float(2 * stats.t.sf(abs(value / se), df)))


def paired_difference(a: Influence, b: Influence, level: float = 0.95) -> Difference:
    """a - b for two statistics of the same examples in the same order (DeLong's paired comparison for AUC)."""
    gap = a.minus(b)
    return difference(gap.value, float(np.sqrt(gap.variance())), level, gap.df, gap.sizes)


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
    return _chance_p(auc(members, nonmembers), members, nonmembers)


def _chance_p(value: float, members: np.ndarray, nonmembers: np.ndarray) -> float:
    m, n = len(members), len(nonmembers)
    tied = np.unique(np.concatenate([members, nonmembers]), return_counts=True)[1].astype(np.float64)
    variance = (m + n + 1 - np.sum(tied**3 - tied) / ((m + n) * (m + n - 1))) / (12 * m * n)
    return float(2 * special.ndtr(-abs(value - 0.5) / np.sqrt(variance))) if len(tied) > 1 else 1.0


# --- many tests at once ----------------------------------------------------------------------------------------------


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's step-down correction, in the order of the input."""
    p = np.asarray(p_values, float)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(stepped, 1)
    return corrected


def correct(rows: Sequence[dict], family: Callable[[dict], Hashable] = lambda row: None) -> None:
    """Give rows with a `p_value` a `p_corrected`: Holm's, over the rows of the same `family`. Rows without are left."""
    families: dict[Hashable, list[dict]] = {}
    for row in rows:
        if row.get("p_value") is not None and np.isfinite(row["p_value"]):
            families.setdefault(family(row), []).append(row)
    for own in families.values():
        for row, p in zip(own, holm([row["p_value"] for row in own]), strict=True):
            row["p_corrected"] = float(p)


# --- ROC, TPR at a fixed FPR, balanced accuracy ----------------------------------------------------------------------


def roc(members: np.ndarray, nonmembers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All ROC points (fpr, tpr, threshold); a record is called a member where its score is >= the threshold."""
    labels = np.repeat([1, 0], [len(members), len(nonmembers)])
    return roc_curve(labels, np.concatenate([members, nonmembers]), drop_intermediate=False)


def allowed_false_positives(n: int, fpr: float) -> int:
    """`floor(n * fpr)`, forgiving of rounding: 0 at fpr > 0 means that n non-members cannot resolve this FPR."""
    return int(np.floor(n * fpr + 1e-9))


def threshold_at(nonmembers: np.ndarray, fpr: float) -> float:
    """The (K + 1)-th largest score of a non-member, K of them allowed; what lies above it is called a member."""
    allowed = allowed_false_positives(len(nonmembers), fpr)
    return float(np.sort(nonmembers)[::-1][allowed]) if allowed < len(nonmembers) else -np.inf


def false_positive_range(n: int, fpr: float, level: float = 0.95) -> Interval:
    """Where the true FPR behind the threshold lies, which n non-members estimated: `Beta(K + 1, n - K)`."""
    allowed = allowed_false_positives(n, fpr)
    return Interval(fpr, *map(float, stats.beta.interval(level, allowed + 1, n - allowed)))


def tpr_step(members: np.ndarray, nonmembers: np.ndarray, fpr: float) -> float:
    """The largest TPR over thresholds whose FPR is <= fpr: a step function, ties move together, no interpolation."""
    return float(np.mean(members > threshold_at(nonmembers, fpr)))


def tpr_at_fpr(members: np.ndarray, nonmembers: np.ndarray, fpr: float) -> float | None:
    """`tpr_step`, or None where not a single false positive is allowed: too few non-members."""
    if fpr > 0 and allowed_false_positives(len(nonmembers), fpr) == 0:
        return None
    return tpr_step(members, nonmembers, fpr)


def ppv(tpr: float, fpr: float, nonmembers_per_member: float) -> float:
    """Share of members among the records called so, `TPR / (TPR + r FPR)`; NaN where none is called."""
    called = tpr + nonmembers_per_member * fpr
    return tpr / called if called > 0 else float("nan")


def advantage(members: np.ndarray, nonmembers: np.ndarray) -> float:
    """`max(TPR - FPR)` over all thresholds: of the records that it is reported on, and so above 0 by chance."""
    fpr, tpr, _ = roc(members, nonmembers)
    return float(np.max(tpr - fpr))


def advantage_by_chance(m: int, n: int) -> float:
    """The mean of `advantage` without a leak, that of a Brownian bridge's maximum: `sqrt(pi/8 (m+n)/(mn))`."""
    return float(np.sqrt(np.pi / 8 * (m + n) / (m * n)))


def best_threshold(members: np.ndarray, nonmembers: np.ndarray) -> float:
    """The threshold of greatest balanced accuracy (score >= threshold: member).  Only for calibration records."""
    fpr, tpr, thresholds = roc(members, nonmembers)
    return float(thresholds[np.argmax(tpr - fpr)])


def balanced_accuracy(members: np.ndarray, nonmembers: np.ndarray, threshold: float) -> Influence:
    """`(TPR + TNR) / 2` at a threshold chosen on other records."""
    hits, rejections = (members >= threshold) / 2, (nonmembers < threshold) / 2
    return Influence(float(hits.mean() + rejections.mean()), hits, rejections)


# --- seeds ----------------------------------------------------------------------------------------------------------


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


def over_seeds(
    values: Sequence[float], within: float, pooled: Spread | None = None, within_df: float = np.inf
) -> SeedMean:
    """Mean of the values of S >= 2 seeds; within: the variance of that mean over examples, with its freedom.

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
    if total == 0:
        return SeedMean(float(np.mean(values)), 0.0, spread.df)  # nothing varies: the seeds are all that is counted
    if np.isfinite(within_df):
        df = total**2 / (between**2 / spread.df + within**2 / within_df) if total < np.inf else 1.0
    if pooled is not None and pooled.df == 1:
        df = 1.0  # two models, two seeds: one gap of two may vanish by luck, so examples lend it no freedom
    return SeedMean(float(np.mean(values)), float(np.sqrt(total)), df)
