"""One number per attack from many shadow chains: each chain is a target in turn, and the mean over targets counts.

Two things vary: which halves the chains were trained on, and which records there are.  The first is seen in the spread
over pairs of chains (what completes one another is one draw), the second in resampled groups of records; both
variances are added, as for training seeds (attacks/statistics.py: over_seeds).

Legend: t targets, n records, g groups of records, B resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from attacks.resampling import resampled_tpr
from attacks.statistics import (
    Difference,
    Influence,
    Interval,
    SeedMean,
    allowed_false_positives,
    auc_influence,
    balanced_accuracy,
    difference,
    logit_interval,
    over_seeds,
    tpr_step,
)

FPRS = (0.01, 0.001)


class Measured(NamedTuple):
    """A metric of every target, and what the records move their mean by.

    each: [t].  moved: what each group of records moves the mean by, to first order [g]; or, where drawn, the mean in
    the resamples [B].
    """

    each: np.ndarray
    moved: np.ndarray
    drawn: bool = False

    def minus(self, other: "Measured") -> "Measured":
        """The difference of two metrics of the same targets and records, paired in both."""
        return Measured(self.each - other.each, self.moved - other.moved, self.drawn)

    def within(self) -> float:
        """Variance of the mean over targets that the records make."""
        if self.drawn:
            return float(self.moved.var(ddof=1))
        return float(self.moved @ self.moved) * len(self.moved) / (len(self.moved) - 1)


@dataclass(frozen=True)
class Targets:
    """Who is a member for which target.

    inside: bool [t, n].  pairs: [t].  groups: codes [n].  counts: how often each record is drawn [B, n].
    """

    inside: np.ndarray
    pairs: np.ndarray
    groups: np.ndarray
    counts: np.ndarray

    @cached_property
    def sizes(self) -> tuple[int, int]:
        """Members and non-members of the middle target."""
        members = int(np.median(self.inside.sum(axis=1)))
        return members, self.inside.shape[1] - members

    @cached_property
    def _groups_of(self) -> tuple[int, int]:
        """Groups with members, and with non-members, of the middle target."""
        whole = [[len(np.unique(self.groups[side])) for side in (inside, ~inside)] for inside in self.inside]
        return tuple(int(k) for k in np.median(whole, axis=0))

    # --- metrics -----------------------------------------------------------------------------------------------------

    def measure(self, scores: np.ndarray, resolution: int | None = None) -> dict[str, Measured | str]:
        """auc, balanced_accuracy and TPR at FPRS of the scores [t, n]; a reason instead of what cannot be resolved.

        Abstentions (-inf) rank last.  resolution: in how many steps the scores come, where they are shares.
        The threshold of balanced accuracy is the middle one of the best of all targets in other pairs.
        """
        members = self.inside.sum(axis=1)
        if (fewest := int(min(members.min(), (self.inside.shape[1] - members).min()))) < 2:
            reason = f"a target has {fewest} members or non-members: both classes need at least two"
            return dict.fromkeys(("auc", "balanced_accuracy", *(f"tpr_at_fpr_{fpr:g}" for fpr in FPRS)), reason)
        scores = np.where(np.isneginf(scores), _lowest(scores)[:, None], scores)
        sides = [(own[inside], own[~inside]) for own, inside in zip(scores, self.inside, strict=True)]
        found: dict[str, Measured | str] = {"auc": self._from_records([auc_influence(*side) for side in sides])}
        thresholds = np.array([_best_threshold(*side) for side in sides])
        others = [thresholds[self.pairs != pair] for pair in self.pairs]
        found["balanced_accuracy"] = "one pair of chains: no other that a threshold could come from"
        if all(len(other) for other in others):
            chosen = [balanced_accuracy(*side, float(np.median(o))) for side, o in zip(sides, others, strict=True)]
            found["balanced_accuracy"] = self._from_records(chosen)
        return found | self._rates(sides, resolution)

    def _from_records(self, influences: Sequence[Influence]) -> Measured:
        moved = np.zeros(self.groups.max() + 1)
        for influence, inside in zip(influences, self.inside, strict=True):
            for part, side in ((influence.members, inside), (influence.nonmembers, ~inside)):
                moved += np.bincount(self.groups[side], (part - part.mean()) / len(part), len(moved))
        return Measured(np.array([each.value for each in influences]), moved / len(influences))

    def _rates(self, sides: list[tuple], resolution: int | None) -> dict[str, Measured | str]:
        fewest = min(len(nonmembers) for _, nonmembers in sides)
        found: dict[str, Measured | str] = {}
        for fpr in FPRS:
            if not allowed_false_positives(fewest, fpr):
                found[fpr] = f"too few non-members: an FPR of {100 * fpr:g} % needs {np.ceil(1 / fpr):.0f} or more"
            elif resolution is not None and not allowed_false_positives(resolution, fpr):
                found[fpr] = (
                    f"too small a population: scores are multiples of 1/{resolution}, and an FPR of {100 * fpr:g} % "
                    f"needs {np.ceil(1 / fpr):.0f} records of role 'population'"
                )
        asked = [fpr for fpr in FPRS if fpr not in found]
        if asked:
            drawn = np.zeros((len(self.counts), len(asked)))
            for (members, nonmembers), inside in zip(sides, self.inside, strict=True):
                counts = [self.counts.T[side].T for side in (inside, ~inside)]
                drawn += resampled_tpr(members, nonmembers, *counts, asked)
            each = np.array([[tpr_step(*side, fpr) for fpr in asked] for side in sides])
            for i, fpr in enumerate(asked):
                found[fpr] = Measured(each[:, i], drawn[:, i] / len(sides), drawn=True)
        return {f"tpr_at_fpr_{fpr:g}": found[fpr] for fpr in FPRS}

    # --- estimates ---------------------------------------------------------------------------------------------------

    def mean(self, measured: Measured) -> SeedMean:
        """Mean over targets with its standard error over pairs of chains and groups of records."""
        return over_pairs(measured.each, self.pairs, measured.within(), self.groups.max())

    def interval(self, measured: Measured) -> Interval:
        """Of a metric in [0, 1], on the logit scale."""
        mean = self.mean(measured)
        return logit_interval(mean.value, mean.se, *self._groups_of, df=mean.df)

    def difference(self, a: Measured, b: Measured) -> Difference:
        """a - b, paired over targets and records."""
        mean = self.mean(a.minus(b))
        return difference(mean.value, mean.se, df=mean.df, sizes=self._groups_of)

    def log_ratio(self, a: Measured, b: Measured) -> Difference:
        """`log(mean a / mean b)` of two rates that are resampled, to first order in what the chains move it by.

        Raises ZeroDivisionError where either is 0.
        """
        tops = float(a.each.mean()), float(b.each.mean())
        if min(tops) <= 0:
            raise ZeroDivisionError
        some = (a.moved > 0) & (b.moved > 0)
        within = float(np.log(a.moved[some] / b.moved[some]).var(ddof=1)) if some.sum() > 1 else 0.0
        moved = a.each / tops[0] - b.each / tops[1]
        mean = over_pairs(moved, self.pairs, within, self.groups.max())
        return difference(float(np.log(tops[0] / tops[1])), mean.se, df=mean.df)


def over_pairs(each: np.ndarray, pairs: np.ndarray, within: float, within_df: float) -> SeedMean:
    """Mean of the targets' values [t]; independent are pairs of chains, and within one pair alone only the records."""
    codes = np.unique(pairs, return_inverse=True)[1]
    means = np.bincount(codes, each) / np.bincount(codes)
    if len(means) == 1:
        return SeedMean(float(means[0]), float(np.sqrt(within)), float(max(within_df, 1)))
    return over_seeds(means, within, within_df=float(max(within_df, 1)))


def _lowest(scores: np.ndarray) -> np.ndarray:
    """The least finite score of each target [t]; 0 where there is none."""
    lowest = np.where(np.isfinite(scores), scores, np.inf).min(axis=1)
    return np.where(np.isfinite(lowest), lowest, 0.0)


def _best_threshold(members: np.ndarray, nonmembers: np.ndarray) -> float:
    """As `statistics.best_threshold`, without its checks of the input: it is asked thousands of times."""
    levels = np.unique(np.concatenate([members, nonmembers]))[::-1]
    below = [np.searchsorted(np.sort(part), levels, side="left") / len(part) for part in (members, nonmembers)]
    gain = below[1] - below[0]
    best = int(np.argmax(gain))
    return float(levels[best]) if gain[best] > 0 else np.inf
