"""Membership score beside memorization: identity, independence, hand-made misses, weighted ranks against scipy."""

import numpy as np
import pytest
from planted_extractions import extraction, ids_of, planted, row
from scipy import stats

from attacks import disagreement
from attacks.disagreement import correlation, spearman
from attacks.resampling import Resampler
from attacks.statistics import delong


def one(memorized, log_p, scores, nonmembers, seeds=(0,), second=None, groups=None, matched=None):
    """A student whose attack gives its members these scores."""
    found, held = {}, {}
    for seed in seeds:
        found["students/kd", seed, "private"] = extraction(memorized, run="students/kd", log_p=log_p, matched=matched)
        for attack, values in (("loss", scores), ("zlib", second)):
            if values is not None:
                held["students/kd", seed, attack, "private"] = values
                held["students/kd", seed, attack, "heldout"] = nonmembers
    return planted(found, scores=held, groups=groups)


def test_resampled_ranks_equal_scipy(check):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 8, 40).astype(float), rng.normal(size=40)  # ties in x
    y += 0.3 * x
    counts = Resampler(20, 0).counts(ids_of("private", 40))
    want = [stats.spearmanr(*(np.repeat(v, c.astype(int)) for v in (x, y))).statistic for c in counts]
    check("Spearman in resamples vs scipy", np.abs(spearman(x, y, counts) - want).max(), 1e-9)
    check(
        "chunks of resamples",
        np.abs(spearman(x, y, counts) - [spearman(x, y, c[None])[0] for c in counts]).max(),
        1e-12,
    )
    assert spearman(np.ones(5), np.arange(5.0), np.ones((1, 5)))[0] == 0


def test_the_same_thing_agrees_fully():
    rng = np.random.default_rng(1)
    log_p = -rng.gamma(3, 2.0, 200)
    study, shelf = one(log_p > -4, log_p, log_p, rng.normal(-20, 1, 200))
    rows = disagreement.rows(study, shelf)
    at = lambda measure: row(rows, measure=f"{measure}@k=10", attack="loss", seed=0)
    for key in ("value", "ci_low", "ci_high"):
        assert at("spearman_log_p")[key] == pytest.approx(1)
    assert at("auc_memorized")["value"] == 1 and at("auc_memorized")["ci_low"] < 1
    assert at("missed_at_fpr_0.05")["value"] == 0 and at("missed_at_fpr_0.05")["ci_high"] > 0
    assert at("memorized")["value"] == pytest.approx(np.mean(log_p > -4))
    inverse = disagreement.rows(*one(log_p > -4, log_p, -log_p, rng.normal(size=200)))
    assert row(inverse, measure="spearman_log_p@k=10", seed=0)["value"] == pytest.approx(-1)


def test_independent_things_are_covered_at_the_nominal_rate():
    """The interval holds 0 in about 95 of 100 studies; with windows of a text, when whole texts are drawn."""
    rng, held, grouped, n = np.random.default_rng(2), 0, 0, 80
    for k in range(300):
        study = planted({("teacher", 0, "private"): np.ones(2, bool)})[0]
        names = ids_of(f"s{k}", n)
        found = correlation(study, names, rng.normal(size=n), np.round(rng.normal(size=n), 1))
        held += np.quantile(found.draws, 0.025) < 0 < np.quantile(found.draws, 0.975)
        texts = {name: f"t{i // 4}" for i, name in enumerate(names)}
        study = planted({("teacher", 0, "private"): np.ones(2, bool)}, groups=texts)[0]
        x, y = (np.repeat(rng.normal(size=n // 4), 4) + 0.3 * rng.normal(size=n) for _ in "xy")
        found = correlation(study, names, x, y)
        grouped += np.quantile(found.draws, 0.025) < 0 < np.quantile(found.draws, 0.975)
    assert 0.915 <= held / 300 <= 0.98 and 0.88 <= grouped / 300 <= 0.98


def test_misses_by_hand():
    # threshold at FPR 5 % of 20 heldout records 0..19: one may lie above, so above 18
    scores = np.array([30.0, 5, 18, 25, 40, 1, 2, 3])
    memorized = np.array([1, 1, 1, 0, 0, 0, 0, 0], bool)
    study, shelf = one(memorized, np.arange(8.0) - 20, scores, np.arange(20.0))
    rows = disagreement.rows(study, shelf)
    at = lambda measure: row(rows, measure=f"{measure}@k=10", seed=0)
    assert at("missed_at_fpr_0.05")["value"] == pytest.approx(2 / 3) and at("missed_at_fpr_0.05")["n"] == 3
    assert at("unremembered_at_fpr_0.05")["value"] == pytest.approx(2 / 3)  # of 30, 25, 40
    assert "too few for a threshold at FPR 0.01" in at("missed_at_fpr_0.01")["reason"]
    assert at("memorized")["value"] == 3 / 8
    want = delong(scores[memorized], scores[~memorized])
    assert at("auc_memorized")["value"] == pytest.approx(want.value) and at("auc_memorized")["ci_low"] < want.value


def test_misses_of_groups_have_the_interval_of_groups():
    """Twelve memorized members, all missed, are four records of three windows: 4 of 4, not 12 of 12."""
    memorized, scores = np.arange(40) < 12, np.where(np.arange(40) < 12, -9.0, 1.0)
    groups = {name: f"text-{i // 3}" for i, name in enumerate(ids_of("private", 40))}
    found = [
        row(
            disagreement.rows(*one(memorized, np.arange(40.0), scores, np.arange(40.0), groups=each)),
            measure="missed_at_fpr_0.05@k=10",
            seed=0,
        )
        for each in (None, groups)
    ]
    assert [r["value"] for r in found] == [1, 1] and [r["n"] for r in found] == [12, 12]
    assert [r["ci_low"] for r in found] == pytest.approx([0.025 ** (1 / 12), 0.025 ** (1 / 4)])


def test_misses_cover_the_truth():
    """The threshold is resampled too: 3 of 10 memorized members lie above the true threshold of 5 %."""
    rng, covered, n = np.random.default_rng(3), 0, 200
    shift = stats.norm.isf(0.05) - stats.norm.isf(0.3)
    for _ in range(100):
        study, shelf = one(np.arange(n) < n // 2, np.zeros(n), rng.normal(shift, 1, n), rng.normal(size=n))
        found = row(disagreement.rows(study, shelf), measure="missed_at_fpr_0.05@k=10", seed=0)
        covered += found["ci_low"] <= 0.7 <= found["ci_high"]
    assert 0.88 <= covered / 100 <= 1.0


def test_nothing_memorized_and_several_seeds():
    rng = np.random.default_rng(4)
    values = -rng.gamma(3, 2.0, 60)
    study, shelf = one(np.zeros(60, bool), values, values + rng.normal(size=60), rng.normal(size=60))
    rows = disagreement.rows(study, shelf)
    assert "0 of 60 members are memorized" in row(rows, measure="auc_memorized@k=10", attack="loss")["reason"]
    assert "same value" in row(rows, measure="spearman_matched@k=10", attack="loss")["reason"]
    assert not [r for r in rows if r["measure"].startswith("missed_at_fpr_0.05") and "value" in r]
    study, shelf = one(values > -4, values, values + rng.normal(size=60), rng.normal(size=60), seeds=(0, 1, 2))
    rows = disagreement.rows(study, shelf)
    for measure in ("spearman_log_p", "auc_memorized", "missed_at_fpr_0.05"):
        each = [r for r in rows if r["measure"] == f"{measure}@k=10" and r["attack"] == "loss"]
        assert [r["seed"] for r in each] == [0, 1, 2, "all"] and each[3]["value"] == pytest.approx(each[0]["value"])
        assert each[3]["ci_low"] <= each[3]["value"] <= each[3]["ci_high"] and each[3]["ci_low"] < each[3]["ci_high"]


def test_the_second_attack_is_the_strongest_other_one():
    rng = np.random.default_rng(5)
    values = -rng.gamma(3, 2.0, 100)
    study, shelf = one(values > -4, values, values, rng.normal(-9, 1, 100), second=rng.normal(size=100))
    assert disagreement.second_attack(study, "students/kd") == "zlib"
    assert {r["attack"] for r in disagreement.rows(study, shelf)} == {"loss", "zlib"}
    study, _ = one(values > -4, values, values, rng.normal(size=100))
    assert disagreement.second_attack(study, "students/kd") is None


def test_examples_that_disagree_most():
    log_p = np.arange(100.0) - 200
    scores = np.arange(100.0)
    scores[[3, 96]] = [500, -500]
    study, shelf = one(log_p > -120, log_p, scores, np.arange(100.0), seeds=(0, 1))
    frame = disagreement.examples(study, shelf)
    assert len(frame) == 20 and set(frame["seed"]) == {0}
    assert set(frame["example_id"][:2]) == {"private-00003", "private-00096"}
    top = frame.set_index("example_id").loc["private-00003"]
    assert top["membership_rank"] == pytest.approx(0.995) and top["memorization_rank"] == pytest.approx(0.035)
    expected = "model seed attack example_id role task membership_rank memorization_rank".split()
    assert list(frame.columns) == expected


def test_short_members_are_left_out():
    log_p = np.arange(30.0) - 40
    found = extraction(np.arange(30) < 9, run="students/kd", log_p=log_p, short=np.arange(30) >= 20)
    held = {("students/kd", 0, "loss", role): np.arange(30.0) for role in ("private", "heldout")}
    rows = disagreement.rows(*planted({("students/kd", 0, "private"): found}, scores=held))
    assert row(rows, measure="memorized@k=10")["n"] == 20 and row(rows, measure="memorized@k=10")["value"] == 9 / 20
