"""Means over targets: their values, and intervals that hold what was planted, over pairs of chains and records."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from attacks import targets
from attacks.resampling import Resampler
from attacks.statistics import best_threshold, tpr_step
from attacks.targets import Measured, Targets, over_pairs
from tests.planted_chains import halves


def made(pairs=4, n=200, seed=0, gain=0.7, group=None, resamples=200):
    rng = np.random.default_rng(seed)
    codes = np.arange(n) if group is None else group
    inside, _, numbers = halves("full", 2 * pairs, codes, seed)
    names, counts = np.unique(codes, return_inverse=True)[1], None
    ids = np.array([f"r{i}" for i in range(n)])
    counts = Resampler(resamples, seed).counts(ids, None if group is None else names)
    hard = rng.normal(size=n)
    return Targets(inside, numbers, names, counts), hard + rng.normal(size=inside.shape) + gain * inside


def test_values_are_the_means_over_targets(check):
    chains, scores = made()
    found = chains.measure(scores)
    pairs = list(zip(scores, chains.inside, strict=True))
    auc = np.mean([roc_auc_score(inside, own) for own, inside in pairs])
    check("AUC over targets against scikit-learn", abs(chains.interval(found["auc"]).value - auc), 1e-12)
    rate = np.mean([tpr_step(own[inside], own[~inside], 0.01) for own, inside in pairs])
    assert isinstance(found["tpr_at_fpr_0.01"], str) == (min((~chains.inside).sum(axis=1)) < 100)
    if not isinstance(found["tpr_at_fpr_0.01"], str):
        assert chains.interval(found["tpr_at_fpr_0.01"]).value == pytest.approx(rate)
    assert "needs 1000 or more" in found["tpr_at_fpr_0.001"]


def test_a_target_with_one_class_has_a_reason():
    chains, scores = made(n=40)
    chains.inside[0] = True
    found = chains.measure(scores)
    assert set(found) == {"auc", "balanced_accuracy", "tpr_at_fpr_0.01", "tpr_at_fpr_0.001"}
    assert all("a target has 0 members or non-members" in reason for reason in found.values())


def test_a_share_of_few_steps_resolves_no_low_rate():
    chains, scores = made(n=600)
    found = chains.measure(np.round(50 * stats.norm.cdf(scores)) / 50, resolution=50)
    assert "multiples of 1/50" in found["tpr_at_fpr_0.01"]
    assert isinstance(chains.measure(scores)["tpr_at_fpr_0.01"], Measured)


def test_the_best_threshold_is_that_of_all_other_tables():
    rng = np.random.default_rng(0)
    for shift in (-3.0, 0.0, 0.5, 9.0):
        sides = np.round(rng.normal(shift, 1, 40), 1), np.round(rng.normal(0, 1, 30), 1)
        assert targets._best_threshold(*sides) == best_threshold(*sides)


def test_the_threshold_comes_from_other_pairs():
    chains, scores = made(pairs=2, gain=1.5)
    before = chains.measure(scores)["balanced_accuracy"].each
    shifted = scores.copy()
    shifted[2:] += 100  # the thresholds of the second pair are useless for the first
    assert (before > 0.55).all() and (chains.measure(shifted)["balanced_accuracy"].each == 0.5).all()
    alone = Targets(chains.inside[:2], chains.pairs[:2], chains.groups, chains.counts)
    assert "one pair" in alone.measure(scores[:2])["balanced_accuracy"]


def test_variance_over_records_is_that_of_resampled_groups(check):
    group = np.repeat(np.arange(150), 2)
    chains, scores = made(pairs=2, n=300, group=group, resamples=600)
    measured = chains.measure(scores)["auc"]
    draws = np.zeros(600)
    for own, inside in zip(scores, chains.inside, strict=True):
        wins = (own[inside][:, None] > own[~inside]).astype(float)
        members, nonmembers = chains.counts[:, inside], chains.counts[:, ~inside]
        won = np.einsum("bm,mn,bn->b", members, wins, nonmembers, optimize=True)
        draws += won / members.sum(axis=1) / nonmembers.sum(axis=1) / len(scores)
    check("variance over records against a bootstrap of groups", abs(measured.within() / np.var(draws) - 1), 0.2)


def test_records_that_stand_twice_make_no_interval_narrower():
    chains, scores = made(pairs=3, n=80)
    twice = Targets(
        chains.inside.repeat(2, axis=1), chains.pairs, np.arange(80).repeat(2), chains.counts.repeat(2, axis=1)
    )
    single, double = chains.measure(scores)["auc"], twice.measure(scores.repeat(2, axis=1))["auc"]
    assert double.each == pytest.approx(single.each) and double.within() == pytest.approx(single.within())


def test_intervals_hold_the_truth_over_redrawn_halves_and_records():
    """Nothing planted: AUC 0.5, and no difference; planted: the AUC of two normals that differ by the gain."""
    held = {"null": 0, "gap": 0, "planted": 0, "rate": 0}
    draws = 80
    for seed in range(draws):
        chains, scores = made(pairs=3, n=260, seed=seed, gain=0.0, resamples=50)
        other = np.random.default_rng([seed, 1]).normal(size=scores.shape)
        a, b = (chains.measure(each) for each in (scores, other))
        interval, gap = chains.interval(a["auc"]), chains.difference(a["auc"], b["auc"])
        held["null"] += interval.low <= 0.5 <= interval.high
        held["gap"] += gap.p > 0.05
        planted = chains.interval(chains.measure(scores + 0.8 * chains.inside)["auc"])
        held["planted"] += planted.low <= stats.norm.cdf(0.8 / 2) <= planted.high  # both have variance 2
        rates = [each["tpr_at_fpr_0.01"] for each in (a, b)]
        held["rate"] += chains.difference(*rates).p > 0.05
    least = stats.binom.ppf(0.001, draws, 0.95)
    assert all(count >= least for count in held.values()), (held, least)


def test_a_ratio_of_rates():
    chains, _ = made(pairs=3)
    rng = np.random.default_rng(0)
    top, below = (Measured(np.full(6, v), np.full(50, v) * rng.uniform(0.9, 1.1, 50), True) for v in (0.2, 0.4))
    ratio = chains.log_ratio(top, below)
    assert np.exp(ratio.value) == pytest.approx(0.5) and ratio.low < np.log(0.5) < ratio.high
    with pytest.raises(ZeroDivisionError):
        chains.log_ratio(top, Measured(np.zeros(6), np.zeros(50), True))


def test_one_pair_leaves_the_records_alone():
    mean = over_pairs(np.array([0.6, 0.7]), np.array([3, 3]), 0.01, 40)
    assert mean.value == pytest.approx(0.65) and mean.se == pytest.approx(0.1) and mean.df == 40
