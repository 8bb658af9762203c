"""Statistics against fixed values, naive loops, scikit-learn and simulations."""

import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from attacks import resampling as rs
from attacks import statistics as st

X, Y = np.array([0.9, 0.8, 0.6, 0.4]), np.array([0.7, 0.5, 0.3, 0.2, 0.6])
X2, Y2 = np.array([0.95, 0.5, 0.7, 0.3]), np.array([0.6, 0.4, 0.45, 0.1, 0.2])


def counts(rng, resamples, n):
    return np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(resamples)])


def test_auc_and_delong_fixed_values():
    assert st.auc(np.array([9.0, 5.0]), np.array([9.0, 5.0])) == 0.5
    influence = st.auc_influence(X, Y)
    np.testing.assert_allclose(influence.members, [1, 1, 0.7, 0.4])
    np.testing.assert_allclose(influence.nonmembers, [0.5, 0.75, 1, 1, 0.625])
    assert influence.value == pytest.approx(0.775) and influence.variance() == pytest.approx(0.030625)
    assert st.delong(X, Y) == pytest.approx((0.775, 0.3251, 0.9610), abs=5e-5)
    second = st.auc_influence(X2, Y2)
    assert second.value == pytest.approx(0.8) and second.variance() == pytest.approx(0.02875)
    twice = influence.variance() + second.variance() - influence.minus(second).variance()
    assert twice / 2 == pytest.approx(0.019375)
    gap = st.paired_delong(X, Y, X2, Y2)
    assert (gap.value, gap.se, gap.z, gap.p) == pytest.approx((-0.025, 0.143614, -0.174078, 0.861804), abs=1e-6)


def test_tpr_is_a_step_function():
    assert [st.tpr_step(X, Y, f) for f in (0, 0.1, 0.2, 0.3, 0.4)] == [0.5, 0.5, 0.5, 0.5, 0.75]
    assert st.tpr_at_fpr(X, Y, 0.1) is None and st.tpr_at_fpr(X, Y, 0) == 0.5 and st.tpr_at_fpr(X, Y, 0.2) == 0.5
    cases = {(1000, 0.001): 1, (999, 0.001): 0, (100, 0.29): 29, (20, 0.05): 1}
    assert {case: st.allowed_false_positives(*case) for case in cases} == cases


def test_tpr_keeps_its_allowance_and_grows_with_it():
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.integers(0, 30, 60) * 1.0, rng.integers(0, 25, 83) * 1.0  # many ties
        fpr, tpr, _ = st.roc(x, y)
        grid = (0.0, 0.02, 0.05, 0.1, 0.3, 0.7)
        steps = [st.tpr_step(x, y, f) for f in grid]
        assert steps == sorted(steps)
        assert steps == [max(tpr[fpr <= f + 1e-12]) for f in grid]


def test_auc_agrees_with_sklearn_and_is_invariant():
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 40, 200) / 4, rng.integers(0, 35, 150) / 4
    labels = np.repeat([1, 0], [200, 150])
    assert st.auc(x, y) == pytest.approx(roc_auc_score(labels, np.concatenate([x, y])), abs=1e-12)
    assert st.auc(y, x) == pytest.approx(1 - st.auc(x, y), abs=1e-12)  # never flipped
    assert st.auc(rng.permutation(x), rng.permutation(y)) == st.auc(x, y)
    assert st.auc(np.exp(x), np.exp(y)) == st.auc(x, y)
    same = st.paired_delong(x, y, np.exp(x), np.exp(y))
    assert same.value == 0 and same.p == 1


def test_intervals_are_never_of_no_width():
    bound = 0.025 ** (1 / 20)
    assert st.delong(np.arange(20) + 100.0, np.arange(30.0)) == pytest.approx((1, bound, 1))
    assert st.delong(np.arange(30.0), np.arange(20) + 100.0) == pytest.approx((0, 0, 1 - bound))
    constant = st.delong(np.zeros(20), np.zeros(30))
    assert constant.value == 0.5 and constant.low < 0.35 and constant.high > 0.65
    assert st.chance_p(np.zeros(20), np.zeros(30)) == 1
    none = rs.percentile_interval(0.0, np.zeros(100), 50)
    assert none.low == 0 and none.high == pytest.approx(1 - 0.025 ** (1 / 50))


def test_delong_variance_against_stratified_bootstrap(check):
    rng = np.random.default_rng(2)
    x, y = rng.normal(0.7, 1, 300), rng.normal(0, 1, 400)
    resampler, ids = rs.Resampler(20_000, 0), np.arange(700).astype(str)
    drawn = rs.resampled_auc(x, y, resampler.counts(ids[:300]), resampler.counts(ids[300:]))
    variance = st.auc_influence(x, y).variance()
    check("DeLong's variance against a stratified bootstrap", abs(drawn.var(ddof=1) / variance - 1), 0.05)


@pytest.mark.parametrize("area", [0.5, 0.95])
def test_logit_interval_covers(area):
    rng, shift, draws = np.random.default_rng(3), np.sqrt(2) * stats.norm.ppf(area), 600
    hit = 0
    for _ in range(draws):
        _, low, high = st.delong(rng.normal(shift, 1, 50), rng.normal(0, 1, 50))
        hit += low <= area <= high
    assert stats.binom.sf(hit - 1, draws, 0.95) > 0.001 and stats.binom.cdf(hit, draws, 0.95) > 0.001


def test_chance_p_is_uniform_without_a_leak():
    rng = np.random.default_rng(4)
    p = [st.chance_p(rng.integers(0, 20, 80) * 1.0, rng.integers(0, 20, 90) * 1.0) for _ in range(400)]
    assert stats.kstest(p, "uniform").pvalue > 0.001


def test_resampled_tpr_is_the_naive_bootstrap():
    rng = np.random.default_rng(5)
    x, y = rng.integers(0, 50, 130) / 3, rng.integers(0, 45, 210) / 3
    cx, cy = counts(rng, 40, 130), counts(rng, 40, 210)
    fprs = (0.25, 0.05, 0.01)
    fast = rs.resampled_tpr(x, y, cx, cy, fprs)
    slow = [[st.tpr_step(np.repeat(x, a), np.repeat(y, b), f) for f in fprs] for a, b in zip(cx, cy, strict=True)]
    np.testing.assert_allclose(fast, slow)


def test_resampled_tpr_has_the_exact_distribution():
    """The (K+1)-th largest of n drawn positions is floor(n Beta(K+1, n-K)); the hits above it are binomial."""
    rng = np.random.default_rng(6)
    x, y = rng.normal(1, 1, 500), rng.normal(0, 1, 400)
    resampler = rs.Resampler(4000, 0)
    ids = np.arange(900).astype(str)
    fast = rs.resampled_tpr(x, y, resampler.counts(ids[:500]), resampler.counts(ids[500:]), (0.05,))[:, 0]
    above = np.sort(y)[::-1][(400 * rng.beta(21, 380, 20000)).astype(int)]
    exact = rng.binomial(500, np.mean(x[None] > above[:, None], axis=1)) / 500
    assert stats.ks_2samp(fast, exact).statistic < 0.04


def test_tpr_interval_covers():
    rng, truth, hit, draws = np.random.default_rng(7), stats.norm.sf(stats.norm.isf(0.05) - 1), 0, 200
    resampler = rs.Resampler(300, 0)
    cx, cy = (resampler.counts(np.arange(300).astype(str) + side) for side in "mn")
    for _ in range(draws):
        x, y = rng.normal(1, 1, 300), rng.normal(0, 1, 300)
        drawn = rs.resampled_tpr(x, y, cx, cy, (0.05,))[:, 0]
        _, low, high = rs.percentile_interval(st.tpr_step(x, y, 0.05), drawn, 300)
        hit += low <= truth <= high
    assert hit / draws > 0.9


def test_thousand_resamples_are_fast():
    rng = np.random.default_rng(8)
    x, y, resampler = rng.normal(size=1500), rng.normal(size=1500), rs.Resampler(1000, 0)
    cx, cy = (resampler.counts(np.arange(1500).astype(str) + side) for side in "mn")
    start = time.perf_counter()
    rs.resampled_tpr(x, y, cx, cy, (0.25, 0.05, 0.01, 0.001))
    assert time.perf_counter() - start < 1


def test_resampler_draws_belong_to_the_ids():
    ids = np.array(["a", "b", "c", "d"])
    one, two = rs.Resampler(50, 3), rs.Resampler(50, 3)
    two.counts(np.array(["x", "y"]))
    np.testing.assert_array_equal(one.counts(ids), two.counts(ids))
    assert (one.counts(ids).sum(axis=1) == 4).all()
    assert not np.array_equal(one.counts(ids), one.counts(np.array(["a", "b", "c", "e"])))


def test_a_difference_without_spread_is_not_without_doubt():
    """A perfect ranking beside constant scores: p is small, never 0 or 1, and the interval has a width."""
    perfect, constant = (np.ones(20), np.zeros(30)), (np.zeros(20), np.zeros(30))
    gap = st.paired_delong(*perfect, *constant)
    k = 20  # the fewer of both; two random rankings of k and k
    half = stats.t.isf(0.025, 2 * k - 2) * np.sqrt(2 * (2 * k + 1) / (12 * k * k))
    assert gap == pytest.approx((0.5, 0.5 - half, 0.5 + half, *gap[3:]), rel=1e-9) and 0 < gap.p < 0.01
    for k in (2, 3, 5, 10, 50, 1000):  # wider than the exact bound of 0 of k
        half = st.difference(1.0, 0.0, sizes=(k, 10_000)).value - st.difference(1.0, 0.0, sizes=(k, 10_000)).low
        assert half > 1 - 0.025 ** (1 / k)
    assert st.difference(0.3, 0.0, df=9).p == 2 * 0.5**10 and st.difference(-0.3, 0.0, df=0).p == 1  # the sign test
    assert st.difference(0.0, 0.0, sizes=(20, 30)) == (0, 0, 0, 0, 0, 1)


def test_three_seeds_do_not_make_a_finding():
    """Mean of three seeds that differ by chance: the interval misses 0 at its nominal rate, whatever the shares."""
    rng, draws = np.random.default_rng(10), 4000
    for seed_sd, example_sd in ((1.0, 0.0), (1.0, 0.5), (0.1, 1.0)):
        missed = 0
        for _ in range(draws):
            mean = st.over_seeds(rng.normal(0, seed_sd, 3) + rng.normal(0, example_sd), example_sd**2)
            missed += st.difference(mean.value, mean.se, df=mean.df).p < 0.05
        assert 0.01 < missed / draws < 0.07
    alike = st.over_seeds([0.7, 0.7], 0.04)
    assert alike == (0.7, pytest.approx(0.2), np.inf)
    assert st.over_seeds([1.0, 1.0, 1.0], 0.0) == (1, 0, 2)  # nothing varies: not the certainty of a normal limit


def test_mean_of_a_model_and_its_swap():
    """Averaged AUC: its variance by a naive bootstrap that draws every example once for both models."""
    rng = np.random.default_rng(9)
    hard = rng.normal(size=600)
    a, b = hard + 0.3 * rng.normal(size=600), hard + 0.3 * rng.normal(size=600)
    a[:250] += 0.8  # a was trained on the first 250, b on the others
    b[250:] += 0.8
    mean = st.Influence.mean([st.auc_influence(a[:250], a[250:]), st.auc_influence(b[250:], b[:250]).swapped()])
    assert mean.value == (st.auc(a[:250], a[250:]) + st.auc(b[250:], b[:250])) / 2
    naive = []
    for _ in range(2000):
        i, j = rng.integers(250, size=250), 250 + rng.integers(350, size=350)
        naive.append((st.auc(a[i], a[j]) + st.auc(b[j], b[i])) / 2)
    assert np.std(naive) == pytest.approx(np.sqrt(mean.variance()), rel=0.1)
    assert np.sqrt(mean.variance()) < 0.5 * np.sqrt(st.auc_influence(a[:250], a[250:]).variance())


def test_balanced_accuracy_and_holm():
    influence = st.balanced_accuracy(X, Y, 0.6)
    assert influence.value == pytest.approx((3 / 4 + 3 / 5) / 2)
    assert st.best_threshold(np.array([3.0, 4.0, 5.0]), np.array([0.0, 1.0, 3.0])) in (3.0, 4.0)
    tpr, tnr = 0.75, 0.6  # population form of the standard error, attacks.md 8.6
    se = 0.5 * np.sqrt(tpr * (1 - tpr) / 3 + tnr * (1 - tnr) / 4)
    assert np.sqrt(influence.variance()) == pytest.approx(se)
    np.testing.assert_allclose(st.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert len(st.holm([])) == 0


def test_correct_is_holm_within_each_family_and_leaves_rows_without_p():
    rows = [{"f": 1, "p_value": 0.01}, {"f": 2, "p_value": 0.04}, {"f": 1, "p_value": 0.03}, {"f": 1}]
    st.correct(rows, lambda row: row["f"])
    assert [row.get("p_corrected") for row in rows] == [0.02, 0.04, 0.03, None]


def test_published_scores():
    folder = Path(__file__).parents[2] / "shared" / "data" / "mia_scores"
    if not folder.exists():
        pytest.skip("needs ../shared/data/mia_scores")
    frame = pd.read_csv(folder / "llama2_7b_echr_undefended.csv.gz")
    member = frame["member"].to_numpy() == 1
    expected = json.loads((folder / "expected.json").read_text())["values"]["llama2_7b_echr_undefended"]
    for attack, values in expected.items():
        scores = -frame[attack].to_numpy()
        x, y = scores[member], scores[~member]
        assert st.auc(x, y) == pytest.approx(values["auc"], abs=1e-12)
        for fpr in (0.001, 0.01, 0.1):
            assert st.tpr_at_fpr(x, y, fpr) == pytest.approx(values[f"tpr_at_fpr_{fpr}"], abs=1e-12)
        best = st.balanced_accuracy(x, y, st.best_threshold(x, y)).value
        assert best == pytest.approx(values["max_balanced_accuracy"], abs=1e-12)
