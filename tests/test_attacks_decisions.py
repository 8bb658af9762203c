"""Decisions record by record: rates that may be headlines, PPV, advantage, and decisions that flip between seeds."""

import numpy as np
import pytest
from planted_study import ids_of, study
from scipy import stats

from attacks import statistics as st
from attacks.decisions import PRIORS, decision_facts, decision_rows


def pick(rows, **wanted):
    found = [row for row in rows if all(row.get(k) == v for k, v in wanted.items())]
    assert len(found) == 1, (wanted, len(found))
    return found[0]


def leaky(rng, n, shift=1.0, run="students/kd", seed=0):
    return {(run, seed, "loss"): (rng.normal(shift, 1, n), rng.normal(0, 1, n))}


def test_range_of_the_true_rate(check):
    """The table of statistics.md 2, in percent, and by simulation: the threshold that n non-members give."""
    table = {(1000, 0.001): (0.024, 0.556), (4000, 0.001): (0.041, 0.256), (10_000, 0.001): (0.055, 0.184)}
    table |= {(1000, 0.01): (0.55, 1.83), (10_000, 0.01): (0.82, 1.21)}
    for case, (low, high) in table.items():
        found = st.false_positive_range(*case)
        assert (100 * found.low, 100 * found.high) == pytest.approx((low, high), abs=0.006)
    rng = np.random.default_rng(0)
    true = [1 - st.threshold_at(rng.random(300), 0.05) for _ in range(2000)]
    found = st.false_positive_range(300, 0.05)
    inside = np.mean([found.low <= rate <= found.high for rate in true])
    check("share of true FPRs inside their 95 % range", abs(inside - 0.95), 0.015)


def test_rates_are_headlines_from_ten_false_positives():
    rng = np.random.default_rng(1)
    rows = decision_rows(study(leaky(rng, 250)))
    assert not [row for row in rows if row.get("fpr") == 0.001]  # not one false positive is allowed
    few = pick(rows, measure="tpr", fpr=0.01)
    assert few["verdict"] == "not a headline: rests on 2 false positives, 10 are needed"
    assert pick(rows, measure="tpr", fpr=0.05)["verdict"] == "headline"
    assert "zero observed false positives (true FPR below 0.012" in pick(rows, measure="tpr", fpr=0.0)["verdict"]
    assert not [row for row in rows if row["measure"] == "ppv" and row["fpr"] == 0]
    rate = pick(rows, measure="tpr", fpr=0.25)
    assert rate["ci_kind"] == "bca" and rate["ci_low"] < rate["value"] < rate["ci_high"] and rate["by_chance"] == 0.25


def test_the_verdict_counts_groups():
    """Of 250 non-members in 25 groups one in ten may be called: 25 records, but only 2 groups."""
    rng = np.random.default_rng(6)
    names = {i: f"{i[0]}{k // 10}" for role in ("private", "heldout") for k, i in enumerate(ids_of(role, 250))}
    rows = decision_rows(study(leaky(rng, 250), groups=names))
    rate = pick(rows, measure="tpr", fpr=0.1)
    assert rate["verdict"] == "not a headline: rests on 2 of 25 groups as false positives, 10 are needed"
    assert pick(rows, measure="ppv", fpr=0.1, prior=1)["verdict"] == rate["verdict"]
    assert "true FPR below 0.12 at 95 %" in pick(rows, measure="tpr", fpr=0.0)["verdict"]


def test_ppv_is_bayes():
    rng = np.random.default_rng(2)
    assert st.ppv(0.3, 0.1, 1) == pytest.approx(0.75) and st.ppv(0.5, 0.5, 1) == 0.5 and np.isnan(st.ppv(0, 0, 10))
    rows = decision_rows(study(leaky(rng, 400)))
    tpr = pick(rows, measure="tpr", fpr=0.05)
    shares = [pick(rows, measure="ppv", fpr=0.05, prior=r) for r in PRIORS]
    for r, row in zip(PRIORS, shares, strict=True):
        share = 1 / (1 + r)  # of members in the population: Bayes' rule
        bayes = share * tpr["value"] / (share * tpr["value"] + (1 - share) * 0.05)
        assert row["value"] == pytest.approx(bayes) and row["by_chance"] == pytest.approx(share)
        assert row["ci_low"] < row["value"] < row["ci_high"]
    assert [row["value"] for row in shares] == sorted((row["value"] for row in shares), reverse=True)


def test_advantage_beside_what_chance_gives(check):
    """A trivial ROC has none; the mean under the null is that of statistics.md 3."""
    constant = np.zeros(9)
    assert st.advantage(constant, constant) == 0
    assert st.advantage(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1
    assert st.advantage_by_chance(1000, 1000) == pytest.approx(0.627 * np.sqrt(2000 / 1e6), rel=1e-3)
    rng = np.random.default_rng(3)
    drawn = [st.advantage(rng.normal(size=500), rng.normal(size=700)) for _ in range(400)]
    check(
        "advantage without a leak, against its expectation",
        abs(np.mean(drawn) / st.advantage_by_chance(500, 700) - 1),
        0.08,
    )
    row = pick(decision_rows(study(leaky(rng, 100, shift=0))), measure="advantage")
    assert (
        row["value"] > 0 and row["by_chance"] == pytest.approx(st.advantage_by_chance(100, 100)) and "ci_low" not in row
    )


def test_flips_between_seeds():
    """By hand: 4 non-members at FPR 0.25 allow one, so that a member is called above the second largest."""
    y = np.array([0.0, 1.0, 2.0, 3.0])
    seeds = [np.array([5.0, 5.0, 0.0, 0.0]), np.array([5.0, 0.0, 2.5, 0.0]), np.array([5.0, 1.0, 9.0, 1.5])]
    rows = decision_rows(study({("students/kd", k, "loss"): (x, y) for k, x in enumerate(seeds)}))
    p = np.array([1, 1 / 3, 2 / 3, 0])
    flips = {m: pick(rows, measure=m, fpr=0.25) for m in ("flip_rate", "flagged_always", "flagged_never")}
    assert (
        flips["flip_rate"]["value"] == pytest.approx(np.mean(2 * p * (1 - p))) and flips["flip_rate"]["seed"] == "all"
    )
    assert flips["flagged_always"]["value"] == flips["flagged_never"]["value"] == 0.25


def test_one_seed_has_no_flips():
    rng = np.random.default_rng(4)
    made = study(leaky(rng, 60))
    facts = decision_facts(made, decision_rows(made))
    assert facts["flips"] == [] and facts["words"] == ["Flip rate between training seeds: not applicable, one seed."]
    assert [r["fpr"] for r in facts["rates"]] == [0.0, 0.05, 0.1, 0.25] and not facts["rates"][1]["headline"]
    assert set(facts["rates"][-1]["ppv"]) == {"1", "10", "100", "1000"} and facts["rates"][-1]["headline"]


def test_interval_over_records_of_a_mean_over_seeds(check):
    """Three seeds of one population of records: the interval is over records, drawn once for all seeds."""
    rng, hit, draws, truth = np.random.default_rng(5), 0, 120, stats.norm.cdf(1 / np.sqrt(2 * 1.25))
    for k in range(draws):
        hard = rng.normal(1, 1, 80), rng.normal(0, 1, 80)
        seeds = {("students/kd", s, "loss"): tuple(h + 0.5 * rng.normal(size=80) for h in hard) for s in range(3)}
        row = pick(decision_rows(study(seeds, bootstrap=80, seed=k)), measure="auc")
        hit += row["ci_low"] <= truth <= row["ci_high"]
    check("coverage of BCa over records, mean of three seeds", abs(hit / draws - 0.95), 0.06)
