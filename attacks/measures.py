"""Rows of one measure for one model: every role, the gap of two roles, each seed and all seeds, with intervals.

A share of independent records has Wilson's interval, the exact one where nobody or everybody counts; where records come
in groups (windows of one text) groups are drawn.  Means have Student's, with influences summed within groups.  The gap
of two roles of one seed is made of their two intervals by adding the squares of their arms (Newcombe 1998, method 10;
Zou and Donner 2008), so that two shares of 0 still have a gap of some width.  Over seeds see `effects.combine`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from attacks.agreement import exact_interval
from attacks.effects import Effect, combine, mean_of, share
from attacks.statistics import Difference, Interval
from attacks.study import CANARIES, Study, Unresolved

GAPS = {"private-heldout": ("private", "heldout"), CANARIES: tuple(CANARIES.split("-"))}
SHARE = (0.0, 1.0)


class Sample(NamedTuple):
    """One measure of the examples of a role under one seed.

    ids, values: [n].  among: bool [n], the examples that it is taken over.  bounds: what a value can be; a share's
    values are 0 and 1.
    """

    ids: np.ndarray
    values: np.ndarray
    among: np.ndarray
    bounds: tuple[float, float] = SHARE

    @property
    def is_share(self) -> bool:
        return self.values.dtype == bool

    @property
    def n(self) -> int:
        return int(self.among.sum())

    def within(self, group: np.ndarray) -> "Sample":
        """The same of fewer examples."""
        return self._replace(among=self.among & group)


BySeed = dict[int, Sample]


def measure_rows(
    study: Study, run: str, measure: str, by_role: dict[str, BySeed], task: str = "all", gaps: bool = True
) -> Iterator[dict]:
    """Rows of memorization.csv.  A role without any example has a `reason` where the task is `all`, else no row."""
    at = study.head(run) | {"measure": measure, "task": task}
    found: dict[tuple[str, int | str], Interval] = {}
    for role, by_seed in by_role.items():
        for seed, samples in blocks(by_seed).items():
            row = at | {"role": role, "seed": seed}
            try:
                found[role, seed] = estimate(study, samples)
                yield row | told(found[role, seed]) | {"n": samples[0].n}
            except Unresolved as why:
                if task == "all":
                    yield row | {"reason": str(why)}
    for role, (members, others) in GAPS.items() if gaps else ():
        for seed in blocks(by_role.get(members, {})):
            both = found.get((members, seed)), found.get((others, seed))
            if None not in both:
                n = sum(blocks(by_role[each])[seed][0].n for each in (members, others))
                pairs = [blocks(by_role[each])[seed] for each in (members, others)]
                yield at | {"role": role, "seed": seed, "n": n} | told(gap(study, *pairs, *both))


def blocks(by_seed: BySeed) -> dict[int | str, list[Sample]]:
    """Each seed alone, and all together where there are several."""
    alone: dict[int | str, list[Sample]] = {seed: [sample] for seed, sample in by_seed.items()}
    return alone | ({"all": list(by_seed.values())} if len(by_seed) > 1 else {})


def estimate(study: Study, samples: list[Sample]) -> Interval:
    """The mean over examples, and over seeds. Raises Unresolved without an example, or where seeds have different ones.

    An interval that the values alone cannot give (one example, values without bounds that are all alike) is NaN.
    """
    first = samples[0]
    if not all(np.array_equal(first.ids, sample.ids) for sample in samples):
        raise Unresolved("the seeds were scored on different examples")
    if not all(sample.n for sample in samples):
        raise Unresolved(f"none of {len(first.ids)} examples has it")
    if len(samples) == 1 and first.is_share:
        return share(study, first.ids, first.values, first.among)
    values = [sample.values[sample.among].astype(float) for sample in samples]
    mean, (low, high) = float(np.mean([each.mean() for each in values])), first.bounds
    clusters = study.clusters(first.ids)
    if min(map(len, values)) > 1 and np.ptp(np.concatenate(values)) > 0:
        told = combine([_effect(sample) for sample in samples], clusters)
        return Interval(mean, max(told.low, low), min(told.high, high))
    if not np.isfinite([low, high]).all():
        return Interval(mean, np.nan, np.nan)
    # All alike: so far from both bounds as the share of examples that differ may still be.
    unseen = exact_interval(0, first.n if clusters is None else len(np.unique(clusters[first.among]))).high
    return Interval(mean, mean - (mean - low) * unseen, mean + (high - mean) * unseen)


def gap(study: Study, members: list[Sample], others: list[Sample], a: Interval, b: Interval) -> Interval:
    """Mean of the members less that of the others, whose own intervals are a and b; seed by seed of one model."""
    if len(members) > 1 and min(sample.n for sample in (*members, *others)) > 1:
        found = combine(
            [_apart(*pair) for pair in zip(members, others, strict=True)], _clusters(study, members, others)
        )
        if found.se > 1e-12:
            return Interval(found.value, found.low, found.high)
    value = a.value - b.value
    below, above = np.hypot(a.value - a.low, b.high - b.value), np.hypot(a.high - a.value, b.value - b.low)
    return Interval(value, value - below, value + above)


def _apart(members: Sample, others: Sample) -> Effect:
    """The difference of two means as an effect on the examples of both."""
    values = np.concatenate([members.values, others.values]).astype(float)
    m, among = len(members.ids), np.concatenate([members.among, others.among])
    first = np.arange(len(values)) < m
    values = np.where(among, values, 0.0)
    return mean_of(values, among & first).minus(mean_of(values, among & ~first))


def _clusters(study: Study, members: list[Sample], others: list[Sample]) -> np.ndarray | None:
    return study.clusters(np.concatenate([members[0].ids, others[0].ids]))


def _effect(sample: Sample) -> Effect:
    return mean_of(np.where(sample.among, sample.values, 0.0).astype(float), sample.among)


def told(found: Interval | Difference) -> dict:
    """Columns of an interval; an end that is not known is empty."""
    low, high = (float(end) if np.isfinite(end) else None for end in (found.low, found.high))
    return {"value": float(found.value), "ci_low": low, "ci_high": high}
