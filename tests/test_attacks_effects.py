"""Shares, means, slopes and paired differences: scipy's and textbook values, coverage with and without groups."""

import numpy as np
import pytest
from planted_extractions import ids_of, planted
from scipy import stats

from attacks.effects import combine, mean_of, paired, share, slope_of, units, wilson, within
from attacks.statistics import difference, over_seeds
from attacks.study import Unresolved


def study_of(n: int, size: int = 1):
    """A study and its n ids; of texts with `size` windows each."""
    ids = ids_of("private", n)
    names = {name: f"text-{i // size}" for i, name in enumerate(ids)}
    return planted({("teacher", 0, "private"): np.ones(n, bool)}, groups=names)[0], ids


def test_wilson_and_exact_ends(check):
    for count, n in ((18, 1955), (3, 10), (676, 706)):
        want = stats.binomtest(count, n).proportion_ci(0.95, "wilson")
        found = wilson(count, n)
        check("Wilson vs scipy", max(abs(found.low - want.low), abs(found.high - want.high)), 1e-12)
    for count, n in ((0, 40), (40, 40)):
        want = stats.binomtest(count, n).proportion_ci(0.95, "exact")
        assert (wilson(count, n).low, wilson(count, n).high) == pytest.approx((want.low, want.high))
    with pytest.raises(Unresolved, match="a share of no records"):
        wilson(0, 0)


def test_windows_of_a_text_are_drawn_together():
    rng = np.random.default_rng(2)
    texts = np.repeat(rng.random(50) < 0.4, 8)
    (grouped, ids), (apart, _), everyone = study_of(400, 8), study_of(400), np.ones(400, bool)
    wide, narrow = share(grouped, ids, texts, everyone), share(apart, ids, texts, everyone)
    ratio = (wide.high - wide.low) / (narrow.high - narrow.low)
    assert wide.value == narrow.value and 2.3 < ratio < 3.4  # sqrt(8) with windows of a text all alike
    none = share(grouped, ids, np.zeros(400, bool), everyone)
    assert none.high == pytest.approx(1 - 0.025 ** (1 / 50)), "fifty texts, not four hundred windows"


def test_shares_and_paired_differences_of_groups_cover():
    """Windows of one text share their difficulty: 40 texts of 5 windows, truth 0.3 and a difference of 0.1."""
    rng, (study, ids), held, apart = np.random.default_rng(0), study_of(200, 5), 0, 0
    for _ in range(300):
        ease = np.repeat(rng.beta(1, 1, 40), 5)
        a = rng.random(200) < np.where(ease < 0.5, 0.6 * ease * 2 / 1, 0.0)  # mean 0.6 * 0.5 over half of the texts
        b = a & (rng.random(200) < 0.5)
        truth = 0.15
        found = share(study, ids, a, np.ones(200, bool))
        held += found.low <= truth <= found.high
        gap = paired(study, ids, a, b, np.ones(200, bool))
        apart += gap.low <= truth / 2 <= gap.high
    assert 0.88 <= held / 300 <= 0.98 and 0.90 <= apart / 300 <= 0.98


def test_slopes_equal_least_squares_and_cover(check):
    rng = np.random.default_rng(1)
    x, group = np.tile([0.0, 2.0, 4.0, 6.0], 30), np.arange(120) < 100
    y = (rng.random(120) < 0.2 + 0.1 * x).astype(float)
    found = slope_of(y, x, group)
    fit = stats.linregress(x[group], y[group])
    check("slope vs scipy's linregress", abs(found.value - fit.slope), 1e-12)
    # White's variance by its matrix form, HC2
    design = np.stack([np.ones(100), x[group]], axis=1)
    rest = y[group] - design @ np.linalg.lstsq(design, y[group], rcond=None)[0]
    bread = np.linalg.inv(design.T @ design)
    leverage = np.diag(design @ bread @ design.T)
    white = (bread @ (design.T * (rest**2 / (1 - leverage))) @ design @ bread)[1, 1] * 100 / 99
    check("variance of a slope vs White's", abs(found.variance() - white), 1e-12)
    held = 0
    for _ in range(1000):
        y = (rng.random(120) < 0.2 + 0.1 * x).astype(float)
        gap = combine([slope_of(y, x, np.ones(120, bool))])
        held += gap.low < 0.1 < gap.high
    assert 0.925 <= held / 1000 <= 0.975
    with pytest.raises(Unresolved, match="no slope"):
        slope_of(y, np.ones(120), group)


def test_seeds_and_examples_are_added(check):
    rng, everyone = np.random.default_rng(2), np.ones(50, bool)
    seeds = [rng.normal(k, 1, 50) for k in (0.0, 0.1, 0.3)]
    found = combine([mean_of(v, everyone) for v in seeds])
    within_examples = np.mean(seeds, axis=0).var(ddof=1) / 50
    mean = over_seeds([v.mean() for v in seeds], within_examples, within_df=49)
    want = difference(mean.value, mean.se, df=mean.df)
    check("mean over seeds and examples", max(abs(found.low - want.low), abs(found.high - want.high)), 1e-12)


def test_no_interval_is_of_no_width():
    study, ids = study_of(60, 3)
    same, everyone = np.zeros(60, bool), np.ones(60, bool)
    gap = paired(study, ids, same, same, everyone)
    bound = 1 - 0.025 ** (1 / 20)  # twenty texts
    assert (gap.low, gap.value, gap.high) == (pytest.approx(-bound), 0, pytest.approx(bound)) and gap.p == 1
    sure = within(combine([mean_of(np.ones(60), everyone)]), 0, 1, 60)
    assert sure.high == 1 and sure.low == pytest.approx(0.025 ** (1 / 60))
    assert units(study, ids, everyone) == 20 and units(study, ids, np.arange(60) < 4) == 2
