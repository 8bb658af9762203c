"""Lower bounds on epsilon: the reference's fixed values, formulas written out again, and how often they are wrong."""

import ast
from pathlib import Path

import dp_accounting
import numpy as np
import pytest
from jax_privacy.auditing import Bonferroni, CanaryScoreAuditor, Explicit
from scipy import optimize, special, stats

from attacks import lower_bounds
from attacks.lower_bounds import METHODS, Rule, bounds, gaussian_epsilon, hull_thresholds, largest, upper_limit
from attacks.study import Unresolved

DRAWS = 200


def by_method(inside, outside, **keys) -> dict[str, float]:
    return {bound.method: bound.epsilon for bound in bounds(inside, outside, **keys)}


@pytest.mark.parametrize(
    ("n", "fixed", "corrected", "one_run", "one_run_fdp"),
    [
        (50, 2.57, 2.30, 2.46, 5.25),
        (100, 3.28, 3.02, 3.17, 6.58),
        (500, 4.91, 4.64, 4.80, 9.37),
        (1000, 5.60, 5.34, 5.49, 10.50),
        (5000, 7.21, 6.95, 7.06, 13.04),
    ],
)
def test_perfect_separation(n, fixed, corrected, one_run, one_run_fdp):
    most = lambda method, strategy, size=n: largest(method, size, size, Rule(1e-6, 0.05, strategy))
    assert round(most("clopper_pearson", "explicit"), 2) == fixed
    assert round(most("clopper_pearson", "bonferroni"), 2) == corrected
    assert round(most("one_run", "bonferroni"), 2) == one_run
    assert round(most("one_run_fdp", "bonferroni"), 2) == one_run_fdp
    half = most("clopper_pearson", "explicit", n // 2)  # half of the scores are left for the bound
    assert most("clopper_pearson", "split") == pytest.approx(half)


def test_fixed_values(check):
    """Normal quantiles, the in-scores shifted by 0 and 1; and 500 of 500 against 0 of 500."""
    points = stats.norm.ppf((np.arange(10000) + 0.5) / 10000)
    none = by_method(points, points, strategy="bonferroni")
    assert not any(none.values())
    one = by_method(points + 1, points, strategy="bonferroni")
    check("one-run epsilon against the reference", abs(one["one_run"] / 1.13346 - 1), 1e-5)
    check("one-run f-DP epsilon against the reference", abs(one["one_run_fdp"] / 2.164749 - 1), 1e-5)
    perfect = (np.ones(500), np.zeros(500))
    for strategy, value in (("explicit", 4.5419), ("bonferroni", 4.3524)):
        found = by_method(
            *perfect, delta=0.0, significance=0.01, strategy=strategy, threshold=0.5, methods=METHODS[2:3]
        )
        check("Clopper-Pearson log ratio against the reference", abs(found["clopper_pearson"] - value), 5e-5)


# --- formulas, written out again ------------------------------------------------------------------------------------


def one_run_p(m, r, v, eps, delta):
    q = np.exp(eps) / (1 + np.exp(eps))
    at_least = lambda k: float(stats.binom.sf(k - 1, r, q))
    beta = at_least(v)
    alpha = max([0.0, *((at_least(v - i) - beta) / i for i in range(1, v + 1))])
    return min(1.0, beta + 2 * m * delta * alpha)


def fdp_excess(m, r, v, eps, delta, s):
    sigma = dp_accounting.get_sigma_gaussian(eps, delta)
    rate, wrong = s * v / m, s * (r - v) / m
    for i in range(v - 1, -1, -1):
        after = max(wrong, float(special.ndtr(special.ndtri(rate) - 1 / sigma)))
        rate = min(1.0, rate + i / (r - i) * (after - wrong))
        wrong = after
    return rate + wrong - r / m


@pytest.mark.parametrize(("caught", "alarms"), [(40, 3), (60, 20), (90, 0)])
def test_one_run_forms_against_their_formulas(caught, alarms, check):
    n, delta, s = 100, 1e-5, 0.05
    inside, outside = np.arange(n) < caught, np.arange(n) < alarms
    found = by_method(inside, outside, delta=delta, strategy="explicit", threshold=0.5)
    r = caught + alarms
    expected = optimize.brentq(lambda e: one_run_p(2 * n, r, caught, e, delta) - s, 1e-9, 30, xtol=1e-12)
    check("one-run epsilon against its formula", abs(found["one_run"] - expected), 2e-6)
    expected = optimize.brentq(lambda e: fdp_excess(2 * n, r, caught, e, delta, s), 0.01, 30, xtol=1e-12)
    check("one-run f-DP epsilon against its formula", abs(found["one_run_fdp"] - expected), 2e-6)
    tpr = stats.beta.ppf(s / 2, caught, n - caught + 1)
    fpr = stats.beta.ppf(1 - s / 2, alarms + 1, n - alarms)
    check("Clopper-Pearson epsilon", abs(found["clopper_pearson"] - np.log((tpr - delta) / fpr)), 1e-9)
    mu = stats.norm.isf(fpr) - stats.norm.ppf(1 - tpr)
    solve = lambda e: stats.norm.cdf(-e / mu + mu / 2) - np.exp(e) * stats.norm.cdf(-e / mu - mu / 2) - delta
    check("epsilon of mu-GDP", abs(found["gdp"] - optimize.brentq(solve, 1e-9, 80, xtol=1e-12)), 1e-6)


def test_the_hull_is_the_librarys():
    """Ties, unequal sizes: Bonferroni corrects for as many thresholds as jax_privacy does."""
    rng = np.random.default_rng(0)
    for n in (1, 5, 50, 300):
        inside, outside = np.round(rng.normal(1, 1, n), 1), np.round(rng.normal(0, 1, n + 3), 1)
        thresholds = hull_thresholds(inside, outside)
        level = 0.05 / len(thresholds)
        auditor = CanaryScoreAuditor(inside, outside)
        best = max(auditor.epsilon_clopper_pearson(level, threshold_strategy=Explicit(t)) for t in thresholds)
        assert auditor.epsilon_clopper_pearson(0.05, threshold_strategy=Bonferroni()) == pytest.approx(best)


def test_limits_of_a_rate():
    """Clopper and Pearson's upper limit misses the rate in at most the stated share of draws, near it for many."""
    rng = np.random.default_rng(1)
    for n, rate in ((20, 0.3), (400, 0.05)):
        counts = rng.binomial(n, rate, 20000)
        missed = np.mean(upper_limit(np.arange(n + 1), n, 0.05)[counts] < rate)
        assert missed <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 20000)
    assert upper_limit(np.array([7]), 7, 0.05) == 1.0


# --- how often they are wrong ---------------------------------------------------------------------------------------

OFTEN = stats.binom.isf(1e-3, DRAWS, 0.05)  # of DRAWS draws, more than this many would be more than 5 %


def draws(shift: float, n: int):
    rng = np.random.default_rng(3)
    for _ in range(DRAWS):
        coin = rng.random(2 * n) < 0.5
        scores = rng.normal(size=2 * n) + shift * coin
        yield scores[coin], scores[~coin]


@pytest.mark.parametrize(
    ("strategy", "shift"), [("explicit", 0.0), ("split", 0.0), ("bonferroni", 0.0), ("split", 2.0), ("bonferroni", 1.0)]
)
def test_two_gaussians_stay_below_their_epsilon(strategy, shift):
    """Bounds above the true epsilon in at most 5 % of the draws; without a shift, ours of GDP in none."""
    methods = METHODS if strategy == "explicit" else ("one_run", "clopper_pearson", "gdp")
    above, truth = dict.fromkeys(methods, 0), gaussian_epsilon(shift, 1e-5)
    for seed, both in enumerate(draws(shift, 60)):
        keys = {"delta": 1e-5, "strategy": strategy, "seed": seed, "threshold": 1.0, "methods": methods}
        for name, value in by_method(*both, **keys).items():
            above[name] += value > truth
    assert all(count <= OFTEN for count in above.values()), above
    assert shift or above["gdp"] == 0


@pytest.mark.parametrize("shift", [0.5, 2.0])
def test_one_run_fdp_stays_below_the_true_epsilon(shift):
    """Asked at the true epsilon alone, which is a hundred times as fast as to look for the bound."""
    truth, above = gaussian_epsilon(shift, 1e-5), 0
    for inside, outside in draws(shift, 60):
        caught, alarms = int(np.sum(inside >= 1)), int(np.sum(outside >= 1))
        above += fdp_excess(len(inside) + len(outside), caught + alarms, caught, truth, 1e-5, 0.05) > 0
    assert above <= OFTEN


def test_monotone_in_delta_and_significance():
    points = stats.norm.ppf((np.arange(100) + 0.5) / 100)
    at = lambda **keys: by_method(points + 1.5, points, strategy="bonferroni", **keys)
    by_delta = [at(delta=delta) for delta in (1e-8, 1e-5)]
    by_level = [at(significance=level) for level in (0.01, 0.2)]
    for name in METHODS:
        assert by_delta[0][name] >= by_delta[1][name] > 0 and by_level[0][name] < by_level[1][name], name
        assert by_delta[0][name] < largest(name, 100, 100, Rule(1e-8, strategy="bonferroni"))


def test_gaussian_dp(check):
    for mu, delta, value in ((1, 1e-6, 4.88655), (1, 1e-5, 4.37718), (0.5, 1e-5, 1.99309)):
        check("epsilon of mu-GDP against the reference", abs(gaussian_epsilon(mu, delta) - value), 1e-5)
    assert gaussian_epsilon(-3.0, 1e-5) == gaussian_epsilon(-np.inf, 1e-5) == 0


def test_the_defective_form_is_never_called():
    trees = [ast.parse(path.read_text()) for path in Path(lower_bounds.__file__).parent.rglob("*.py")]
    called = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert "epsilon_one_run" in called and "epsilon_from_gdp" not in called


def test_refusals(monkeypatch):
    with pytest.raises(Unresolved, match="1 in and 3 out"):
        bounds(np.ones(1), np.zeros(3))
    with pytest.raises(Unresolved, match="not a number"):
        bounds(np.array([1, np.nan]), np.zeros(3))
    with pytest.raises(ValueError, match="explicit without"):
        bounds(np.ones(3), np.zeros(3), strategy="explicit")
    monkeypatch.setitem(__import__("sys").modules, "jax_privacy", None)
    with pytest.raises(Unresolved, match="pip install"):
        bounds(np.ones(3), np.zeros(3), seed=1)


def test_the_same_seed_gives_the_same_bound():
    rng = np.random.default_rng(5)
    scores = rng.normal(1.5, 1, 80), rng.normal(0, 1, 80)
    assert bounds(*scores, seed=4) == bounds(*scores, seed=4)
    assert len({bounds(*scores, seed=k)[0].epsilon for k in range(8)}) > 1
