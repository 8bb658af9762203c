"""Shares, means and paired differences over one set of examples, with intervals over examples, groups and seeds.

An `Effect` is a value and what every example moves it by, to first order: differences, means over seeds and sums within
groups of examples are then arithmetic on these arrays.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from attacks.agreement import exact_interval, paired_shares
from attacks.statistics import Difference, Interval, SeedMean, difference, over_seeds
from attacks.study import Study, Unresolved


@dataclass(frozen=True)
class Effect:
    """An estimate, and to first order what every record moves it by.

    influence: [N]; 0 for records that play no part.  used: bool [N], those that do.
    """

    value: float
    influence: np.ndarray
    used: np.ndarray
    df: float

    def minus(self, other: "Effect") -> "Effect":
        gap, used = self.influence - other.influence, self.used | other.used
        return Effect(self.value - other.value, gap, used, min(self.df, other.df))

    def variance(self, clusters: np.ndarray | None = None) -> float:
        """Over clusters [N]: influences are summed within each; for the mean of independent records, `s^2 / n`."""
        sums = self.influence[self.used]
        if clusters is not None:
            sums = np.bincount(np.unique(clusters[self.used], return_inverse=True)[1], sums)
        return float(np.sum(sums**2) * len(sums) / (len(sums) - 1)) if len(sums) > 1 else np.inf

    @staticmethod
    def mean(parts: Sequence["Effect"]) -> "Effect":
        """The mean of several effects on the same records (those of several seeds)."""
        return Effect(
            float(np.mean([part.value for part in parts])),
            np.mean([part.influence for part in parts], axis=0),
            np.any([part.used for part in parts], axis=0),
            min(part.df for part in parts),
        )


def mean_of(values: np.ndarray, group: np.ndarray) -> Effect:
    """Mean of the values [N] of a group (bool [N]). Raises Unresolved where it has fewer than two records."""
    n = int(group.sum())
    if n < 2:
        raise Unresolved(f"{n} records in a group: at least two are needed")
    mean = values[group].mean()
    return Effect(float(mean), np.where(group, values - mean, 0.0) / n, group, n - 1)


def slope_of(values: np.ndarray, x: np.ndarray, group: np.ndarray) -> Effect:
    """Least-squares slope of the values [N] by x [N] in a group (bool [N]); its variance is White's, residuals over
    the root of one less their leverage (HC2).

    Raises Unresolved where x does not vary or fewer than three records are there.
    """
    n = int(group.sum())
    if n < 3 or np.ptp(x[group]) == 0:
        raise Unresolved(f"{n} records in a group, or all alike: no slope")
    apart = np.where(group, x - x[group].mean(), 0.0)
    slope = float(apart @ values / (apart @ apart))
    rest = np.where(group, values - values[group].mean() - slope * apart, 0.0)
    leverage = 1 / n + apart**2 / (apart @ apart)
    moved = apart * rest / (apart @ apart) / np.sqrt(np.maximum(1 - leverage, 1e-9))
    return Effect(slope, moved, group, n - 2)


def pool(effects: Sequence[Effect], clusters: np.ndarray | None = None) -> SeedMean:
    """Value, standard error and degrees of freedom of one seed's effect, or of the mean over seeds and examples.

    effects: one a seed, on the same records.  clusters: codes [N] of records that belong together.
    """
    mean = Effect.mean(effects)
    variance, df = mean.variance(clusters), mean.df
    if clusters is not None:
        df = min(df, max(len(np.unique(clusters[mean.used])) - 1, 1))
    if len(effects) == 1:
        return SeedMean(mean.value, float(np.sqrt(variance)), df)
    return over_seeds([e.value for e in effects], variance, within_df=df if variance > 0 else np.inf)


def combine(effects: Sequence[Effect], clusters: np.ndarray | None = None) -> Difference:
    """Interval and p-value (against 0) of what `pool` finds."""
    found = pool(effects, clusters)
    return difference(found.value, found.se, df=found.df)


def within(found: Difference, low: float, high: float, n: int) -> Difference:
    """The interval of a mean of n independent values that lie in [low, high].

    Where nothing varies it is as far from both ends as the share of values that may still be other ones (the exact
    bound of 0 of n): never of no width.
    """
    if found.se > 1e-12:
        return found._replace(low=max(found.low, low), high=min(found.high, high))
    unseen = exact_interval(0, n).high
    below, above = (unseen * (end - found.value) for end in (low, high))
    return found._replace(low=found.value + below, high=found.value + above)


def units(study: Study, ids: np.ndarray, among: np.ndarray) -> int:
    """How many of these examples (bool [n]) are independent: their groups."""
    clusters = study.clusters(ids)
    return int(among.sum()) if clusters is None else len(np.unique(clusters[among]))


def slope_of_share(
    study: Study, effects: list[Effect], ids: np.ndarray, among: np.ndarray, x: np.ndarray
) -> Difference:
    """Interval of a slope of shares by x; no least-squares slope of a share is steeper than 1.5 over the range of x."""
    steepest = 1.5 / np.ptp(x)
    return within(combine(effects, study.clusters(ids)), -steepest, steepest, units(study, ids, among))


# --- shares ----------------------------------------------------------------------------------------------------------


def wilson(count: int, n: int, level: float = 0.95) -> Interval:
    """A share of n independent records with Wilson's interval; exact (Clopper and Pearson) where it is 0 or 1.

    Raises Unresolved for a share of none.
    """
    if n < 1:
        raise Unresolved("a share of no records")
    if count in (0, n):
        return exact_interval(count, n)
    z = float(stats.norm.isf((1 - level) / 2))
    p, centre = count / n, (count + z**2 / 2) / (n + z**2)
    half = z / (n + z**2) * float(np.sqrt(n * p * (1 - p) + z**2 / 4))
    return Interval(p, centre - half, centre + half)


def share(study: Study, ids: np.ndarray, hits: np.ndarray, among: np.ndarray) -> Interval:
    """Share of `among` (bool [n]) that are hits (bool [n]); where records come in groups, groups are resampled.

    ids: str [n], which say what belongs together.  Raises Unresolved for a share of none.
    """
    hits = hits & among
    count, n = int(hits.sum()), int(among.sum())
    groups, clusters = units(study, ids, among), study.clusters(ids)
    if groups == n:
        return wilson(count, n)
    if count in (0, n):
        return exact_interval(groups * count // n, groups)
    drawn = study.resampler.counts(ids, clusters)
    below = drawn @ among.astype(np.float32)
    found = (drawn @ hits.astype(np.float32))[below > 0] / below[below > 0]
    return Interval(count / n, *np.quantile(found, [0.025, 0.975]).tolist())


def paired(study: Study, ids: np.ndarray, a: np.ndarray, b: np.ndarray, among: np.ndarray) -> Difference:
    """Share of a less share of b of the same records (bool [n] each): McNemar's exact test, or over groups."""
    if not among.any():
        raise Unresolved("a share of no records")
    groups = units(study, ids, among)
    if groups == among.sum():
        return paired_shares(a[among], b[among])
    return within(combine([mean_of(a.astype(float) - b, among)], study.clusters(ids)), -1, 1, groups)
