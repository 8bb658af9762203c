"""Statistics of a profile: B values of one model on the same examples, one for each of its blocks.

Legend: B blocks, S training seeds, m members, n non-members.
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats

from attacks.statistics import Influence, Interval, chance_variance
from attacks.study import Unresolved

DRAWS = 9999  # behind a p-value
RANKED = 2000  # behind an interval
MANY = 1000  # degrees of freedom, from which on t draws are normal ones


def covariance(parts: Sequence[Influence]) -> np.ndarray:
    """Covariance [B, B] of B statistics of the same examples; its diagonal is `Influence.variance`.

    Raises Unresolved where all records of a class are of one group.
    """
    groups = parts[0].groups
    sides = [np.stack([getattr(part, side) for part in parts]) for side in ("members", "nonmembers")]
    if groups is None:
        return sum(np.cov(side) / side.shape[1] for side in sides)
    if min(groups.sizes) < 2:
        raise Unresolved("all records of a class are of one group: there is no spread to estimate")
    count = max(codes.max() for codes in groups) + 1
    m, n = (
        np.stack([np.bincount(codes, row - row.mean(), count) / len(row) for row in side])
        for codes, side in zip(groups, sides, strict=True)
    )
    unbiased = [size / (size - 1) for size in (*groups.sizes, count)]
    return unbiased[0] * m @ m.T + unbiased[1] * n @ n.T + unbiased[2] * (m @ n.T + n @ m.T)


def equal_blocks(profiles: Sequence[Sequence[Influence]], rng: np.random.Generator) -> float:
    """p-value of "all B blocks have one value", from the profiles of S seeds on the same examples.

    The greatest distance of a block from the mean of all, in standard errors, against the same of t draws with the
    blocks' covariance over examples: neighbouring blocks are nearly copies of each other, so nothing is inverted.  With
    several seeds the spread of block x seed, pooled over blocks, is added (zhang2025, Z11: beyond seed noise).  With
    few records it errs on the side of no difference: t draws, and no block's variance below the mean one.
    Raises Unresolved as `covariance` does.
    """
    values = np.array([[part.value for part in profile] for profile in profiles])
    (seeds, blocks), units = values.shape, profiles[0][0].sizes
    centre = np.eye(blocks) - 1 / blocks
    within = centre @ _levelled(covariance(over_seeds(profiles))) @ centre
    between, seed_df = np.zeros_like(within), max((blocks - 1) * (seeds - 1), 1)
    if seeds > 1:
        rest = values - values.mean(axis=1, keepdims=True) - values.mean(axis=0) + values.mean()
        between = centre * (rest**2).sum() / seed_df / seeds
    if np.trace(within + between) < 1e-12:  # perfect separation, or constant scores, at every block
        within = chance_variance(*units) * centre
    parts = np.trace(within), np.trace(between)
    freedom = min(units) - 1, seed_df
    lost = sum(part**2 / free for part, free in zip(parts, freedom, strict=True))
    error = np.sqrt(np.maximum(np.diag(within + between), 1e-12))
    away = values.mean(axis=0) - values.mean()
    drawn = _normal(within + between, rng, DRAWS)
    if lost * MANY > sum(parts) ** 2:
        df = sum(parts) ** 2 / lost
        drawn /= np.sqrt(rng.chisquare(df, (DRAWS, 1)) / df)
    reached = np.max(np.abs(drawn) / error, axis=1) >= np.max(np.abs(away) / error) - 1e-9
    return float((1 + reached.sum()) / (DRAWS + 1))


def _levelled(found: np.ndarray) -> np.ndarray:
    """No variance below the mean one: blocks of one AUC have like variances, and that of a block which is near 1, or at
    1, by luck is estimated too small."""
    own = np.diag(found)
    seen = own > 1e-12
    scale = np.where(seen, np.sqrt(np.maximum(own.mean() / np.where(seen, own, 1), 1)), 0)
    return found * np.outer(scale, scale) + np.diag(np.where(seen, 0, own.mean()))


def over_seeds(profiles: Sequence[Sequence[Influence]]) -> list[Influence]:
    """The mean profile of several seeds on the same examples."""
    return [Influence.mean(same) for same in zip(*profiles, strict=True)]


def profile_spearman(own: Sequence[Influence], theirs: Sequence[Influence], rng: np.random.Generator) -> Interval:
    """Spearman's rank correlation of two models' profiles on the same examples; the interval is over examples.

    Models of other depth are compared at the same relative depth, between blocks by interpolation.
    Raises Unresolved where a profile is flat, and as `covariance` does.
    """
    a, b = (np.array([part.value for part in each]) for each in (own, theirs))
    depths = [np.linspace(0, 1, len(each)) for each in (a, b)]
    onto = np.stack([np.interp(*depths, unit) for unit in np.eye(len(b))])  # [theirs, own]
    if min(np.ptp(a), np.ptp(b @ onto)) < 1e-12:
        raise Unresolved("a profile that is the same at all blocks has no order")
    drawn = _normal(covariance([*own, *theirs]), rng, RANKED)
    draws = _spearman(a + drawn[:, : len(a)], (b + drawn[:, len(a) :]) @ onto)
    return Interval(float(_spearman(a[None], (b @ onto)[None])[0]), *np.quantile(draws, [0.025, 0.975]).tolist())


def _normal(spread: np.ndarray, rng: np.random.Generator, draws: int) -> np.ndarray:
    """Draws [draws, B] around 0 with this covariance, which may be singular."""
    variances, axes = np.linalg.eigh(spread)
    return rng.normal(size=(draws, len(spread))) @ (axes * np.sqrt(np.maximum(variances, 0))).T


def _spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Along the last axis; 0 where all of a draw is tied."""
    a, b = (stats.rankdata(x, axis=1) for x in (a, b))
    a, b = (x - x.mean(axis=1, keepdims=True) for x in (a, b))
    size = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return np.divide((a * b).sum(axis=1), size, out=np.zeros_like(size), where=size > 0)
