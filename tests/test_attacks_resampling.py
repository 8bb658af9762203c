"""Bootstrap, jackknife, BCa and permutations: against scipy, naive loops, and by simulation."""

import numpy as np
import pytest
from scipy import stats

from attacks import resampling as rs
from attacks import statistics as st


def test_bca_is_scipys(check):
    rng = np.random.default_rng(0)
    x, y = rng.normal(0.8, 1, 40), rng.normal(0, 1, 60)
    area = lambda a, b, axis=-1: np.mean(a[..., :, None] > b[..., None, :], axis=(-2, -1))
    theirs = stats.bootstrap(
        (x, y), area, method="BCa", n_resamples=999, batch=100, rng=np.random.default_rng(1), vectorized=True
    )
    ours = rs.bca(st.auc(x, y), theirs.bootstrap_distribution, rs.jackknife_auc(st.auc_influence(x, y)))
    assert not ours.percentile
    limits = np.abs(np.array(ours.interval[1:]) - theirs.confidence_interval)
    check("BCa interval of an AUC against scipy's", limits.max(), 1e-12)
    skewed = rng.exponential(size=30) ** 2
    theirs = stats.bootstrap((skewed,), np.mean, method="BCa", n_resamples=999, rng=np.random.default_rng(2))
    left = (skewed.sum() - skewed) / 29
    ours = rs.bca(skewed.mean(), theirs.bootstrap_distribution, [left])
    assert ours.interval[1:] == pytest.approx(theirs.confidence_interval, abs=1e-12)


def test_bca_falls_back_on_percentiles_and_says_so():
    drawn = np.linspace(0, 1, 101)
    constant = rs.bca(0.5, drawn, [np.ones(5), np.ones(7)])
    assert constant == ((0.5, pytest.approx(0.025), pytest.approx(0.975)), True)
    assert rs.bca(0.3, np.full(50, 0.1), [np.arange(5.0)]) == ((0.3, 0.1, 0.1), True)  # no resample reaches it
    assert not rs.bca(0.5, drawn, [np.arange(5.0)]).percentile


@pytest.mark.parametrize("grouped", [False, True])
def test_jackknives_are_the_naive_ones(grouped):
    rng = np.random.default_rng(3)
    x, y = rng.integers(0, 25, 37) * 1.0, rng.integers(0, 22, 53) * 1.0
    groups = st.Groups(rng.integers(0, 12, 37), 12 + rng.integers(0, 15, 53)) if grouped else None
    codes = groups or (np.arange(37), np.arange(53))
    without = [[np.flatnonzero(c != g) for g in np.unique(c)] for c in codes]
    auc = rs.jackknife_auc(st.auc_influence(x, y).grouped(groups))
    np.testing.assert_allclose(auc[0], [st.auc(x[i], y) for i in without[0]])
    np.testing.assert_allclose(auc[1], [st.auc(x, y[j]) for j in without[1]])
    for fpr in (0.0, 0.02, 0.1, 0.3):
        tpr = rs.jackknife_tpr(x, y, fpr, groups)
        np.testing.assert_allclose(tpr[0], [st.tpr_step(x[i], y, fpr) for i in without[0]])
        np.testing.assert_allclose(tpr[1], [st.tpr_step(x, y[j], fpr) for j in without[1]])


@pytest.mark.parametrize("grouped", [False, True])
def test_resampled_rates_and_areas_are_the_naive_ones(grouped):
    rng = np.random.default_rng(4)
    x, y = rng.integers(0, 50, 130) / 3, rng.integers(0, 45, 210) / 3
    groups = st.Groups(rng.integers(0, 30, 130), rng.integers(0, 40, 210)) if grouped else (None, None)
    resampler = rs.Resampler(40, 0)
    ids = np.arange(340).astype(str)
    cx, cy = resampler.counts(ids[:130], groups[0]), resampler.counts(ids[130:], groups[1])
    if grouped:
        assert all(len(set(row[groups[0] == g])) == 1 for row in cx for g in np.unique(groups[0]))
        assert len(set(cx.sum(axis=1))) > 1
    whole = [(np.repeat(x, a.astype(int)), np.repeat(y, b.astype(int))) for a, b in zip(cx, cy, strict=True)]
    fprs = (0.0, 0.01, 0.05, 0.25, 0.9)
    np.testing.assert_allclose(
        rs.resampled_tpr(x, y, cx, cy, fprs), [[st.tpr_step(a, b, f) for f in fprs] for a, b in whole], atol=1e-6
    )
    np.testing.assert_allclose(rs.resampled_auc(x, y, cx, cy), [st.auc(a, b) for a, b in whole], atol=1e-6)


def test_permuted_aucs_are_the_naive_ones():
    rng = np.random.default_rng(5)
    x, y = rng.integers(0, 9, (3, 12)) * 1.0, rng.integers(0, 9, (3, 17)) * 1.0
    ids = np.arange(29).astype(str)
    labels = rs.Permuter(50, 0).labels(ids[:12], ids[12:])
    assert (labels.sum(axis=1) == 12).all() and len({row.tobytes() for row in labels}) == 50
    both = np.concatenate([x, y], axis=1)
    naive = [[st.auc(each[row], each[~row]) for each in both] for row in labels]
    np.testing.assert_array_equal(rs.permuted_aucs(both, labels), naive)
    np.testing.assert_array_equal(rs.Permuter(50, 0).labels(ids[:12], ids[12:]), labels)


def test_labels_of_a_group_are_shuffled_together():
    groups = st.Groups(np.array([0, 0, 0, 1, 2]), np.array([3, 3, 4, 5, 5, 5]))
    ids = np.arange(11).astype(str)
    labels = rs.Permuter(200, 1).labels(ids[:5], ids[5:], groups)
    codes = np.concatenate(groups)
    for g in range(6):
        assert (labels[:, codes == g] == labels[:, codes == g][:, :1]).all()
    assert (labels[:, [0, 3, 4, 5, 7, 8]].sum(axis=1) == 3).all()  # three groups of members


@pytest.mark.parametrize("n", [50, 200])
def test_intervals_cover(n, check):
    """Share of intervals that hold the truth: DeLong on the logit scale, BCa and percentile of TPR at FPR 0.25."""
    rng, draws, fpr, shift = np.random.default_rng(n), 400, 0.25, 1.0
    truth = stats.norm.cdf(shift / np.sqrt(2)), stats.norm.sf(stats.norm.isf(fpr) - shift)
    resampler, hits = rs.Resampler(400, 0), np.zeros(4)
    cx, cy = (resampler.counts(np.arange(n).astype(str) + side) for side in "mn")
    for _ in range(draws):
        x, y = rng.normal(shift, 1, n), rng.normal(0, 1, n)
        auc, tpr = st.auc_influence(x, y), st.tpr_step(x, y, fpr)
        drawn = rs.resampled_tpr(x, y, cx, cy, (fpr,))[:, 0]
        found = (
            (st.interval(auc), truth[0]),
            (rs.bca(auc.value, rs.resampled_auc(x, y, cx, cy), rs.jackknife_auc(auc)).interval, truth[0]),
            (rs.percentile_interval(tpr, drawn, n), truth[1]),
            (rs.bca(tpr, drawn, rs.jackknife_tpr(x, y, fpr)).interval, truth[1]),
        )
        hits += [low <= true <= high for (_, low, high), true in found]
    for name, hit in zip(("DeLong logit, AUC", "BCa, AUC", "percentile, TPR", "BCa, TPR"), hits, strict=True):
        check(f"coverage at n = {n}: {name}", abs(hit / draws - 0.95), 0.035)


def test_delong_covers_at_its_level(check):
    """The table of statistics.md 4.1, with as many draws at n = 50."""
    for n, area, seed in ((50, 0.5, 0), (50, 0.7, 1), (50, 0.95, 2), (200, 0.7, 3)):
        rng, draws, hit = np.random.default_rng(seed), 3000 if n == 50 else 1000, 0
        shift = np.sqrt(2) * stats.norm.ppf(area)
        for _ in range(draws):
            _, low, high = st.delong(rng.normal(shift, 1, n), rng.normal(0, 1, n))
            hit += low <= area <= high
        check(f"coverage of DeLong's logit interval, n = {n}, AUC {area}", abs(hit / draws - 0.95), 0.02)
