"""Records that come in groups: variances, intervals, tests and draws count groups; without groups nothing changes."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from planted_scores import QUICK, World
from planted_study import ids_of, study
from scipy import stats

from attacks import resampling as rs
from attacks import statistics as st
from attacks.audit import audit
from attacks.rows import against_chance, auc_of, compare, estimate
from attacks.summary import group_facts


def test_groups_of_one_change_nothing():
    rng = np.random.default_rng(0)
    x, y = rng.normal(0.4, 1, 30), rng.normal(0, 1, 40)
    assert st.Groups.of(ids_of("a", 30), ids_of("b", 40)) is None
    plain = st.auc_influence(x, y)
    single = plain.grouped(st.Groups(np.arange(30), 30 + np.arange(40)))
    assert single.variance() == pytest.approx(plain.variance(), rel=1e-12) and single.sizes == (30, 40)
    names = dict(zip([*ids_of("private", 30), *ids_of("heldout", 40)], map(str, range(70)), strict=True))
    scores = {("students/kd", 0, "loss"): (x, y)}
    with_names, without = study(scores, groups=names), study(scores)
    (a,), (b,) = (s.pairs("students/kd", 0, "loss", "private-heldout") for s in (with_names, without))
    assert a.groups is None and st.interval(a.auc) == st.interval(b.auc)
    np.testing.assert_array_equal(with_names.rates(a, (0.25,)), without.rates(b, (0.25,)))


def test_variance_is_that_of_sums_over_groups(check):
    """Obuchowski's clustered variance, by its definition, with groups that have members and non-members too."""
    rng = np.random.default_rng(1)
    m, n = 60, 80
    groups = st.Groups(rng.integers(0, 20, m), rng.integers(10, 40, n))
    x, y = rng.normal(0.5, 1, m), rng.normal(0, 1, n)
    auc = st.auc_influence(x, y).grouped(groups)
    sums = np.zeros((2, 40))
    for part, codes, row in ((auc.members, groups.members, 0), (auc.nonmembers, groups.nonmembers, 1)):
        for value, code in zip(part, codes, strict=True):
            sums[row, code] += value - auc.value
    i10, i01 = (len(np.unique(codes)) for codes in groups)
    s10, s01 = i10 / ((i10 - 1) * m) * sums[0] @ sums[0], i01 / ((i01 - 1) * n) * sums[1] @ sums[1]
    s11 = 40 / 39 * sums[0] @ sums[1]
    expected = s10 / m + s01 / n + 2 * s11 / (m * n)
    check("clustered variance of an AUC against its definition", abs(auc.variance() / expected - 1), 1e-12)
    assert auc.swapped().variance() == pytest.approx(auc.variance())
    assert auc.minus(auc).variance() == 0 and st.paired_difference(auc, auc).p == 1


def test_one_group_is_no_sample():
    auc = st.auc_influence(np.arange(4.0), np.arange(6.0) - 1).grouped(st.Groups(np.zeros(4, int), 1 + np.arange(6)))
    found = st.interval(auc)
    assert auc.variance() == np.inf and (found.low, found.high) == (0, 1)


@pytest.mark.parametrize("copies", [3])
def test_intervals_of_duplicated_records_cover(copies, check):
    """Every record three times, as its group says: naive intervals are too short by sqrt(3), clustered ones hold."""
    rng, draws, n, fpr, shift = np.random.default_rng(2), 400, 40, 0.25, 1.0
    truth, rate = stats.norm.cdf(shift / np.sqrt(2)), stats.norm.sf(stats.norm.isf(fpr) - shift)
    codes = np.repeat(np.arange(n), copies)
    groups, resampler = st.Groups(codes, n + codes), rs.Resampler(300, 0)
    ids = np.arange(n * copies).astype(str)
    drawn = [[resampler.counts(ids, g) for g in both] for both in (groups, (None, None))]
    naive, clustered, boot, boot_naive = 0, 0, 0, 0
    for _ in range(draws):
        x, y = (np.repeat(rng.normal(mean, 1, n), copies) for mean in (shift, 0))
        auc = st.auc_influence(x, y)
        for name, interval in (("naive", st.interval(auc)), ("clustered", st.interval(auc.grouped(groups)))):
            hit = interval.low <= truth <= interval.high
            naive, clustered = naive + hit * (name == "naive"), clustered + hit * (name == "clustered")
        ends = [np.quantile(rs.resampled_tpr(x, y, *c, (fpr,))[:, 0], [0.025, 0.975]) for c in drawn]
        boot += ends[0][0] <= rate <= ends[0][1]
        boot_naive += ends[1][0] <= rate <= ends[1][1]
    check("coverage of clustered DeLong, records three times", abs(clustered / draws - 0.95), 0.03)
    check("coverage of the clustered bootstrap of TPR", abs(boot / draws - 0.95), 0.04)
    assert naive / draws < 0.85 and boot_naive / draws < 0.87


def test_chance_is_tested_by_groups():
    """Groups that share a difficulty: p-values are uniform by groups, and much too small by records."""
    rng, by_group, by_record = np.random.default_rng(3), [], []
    codes = np.repeat(np.arange(30), 4)
    names = {i: f"m{c}" for i, c in zip(ids_of("private", 120), codes, strict=True)}
    names |= {i: f"n{c}" for i, c in zip(ids_of("heldout", 120), codes, strict=True)}
    for _ in range(150):
        both = tuple(np.repeat(rng.normal(size=30), 4) + 0.3 * rng.normal(size=120) for _ in range(2))
        made = study({("students/kd", 0, "loss"): both}, groups=names)
        (pair,) = made.pairs("students/kd", 0, "loss", "private-heldout")
        assert pair.groups.sizes == (30, 30)
        by_group.append(against_chance([pair.auc], [[pair]]))
        bare = replace(pair, groups=None)
        by_record.append(against_chance([bare.auc], [[bare]]))
    assert stats.kstest(by_group, "uniform").pvalue > 0.001 and np.mean(np.array(by_group) < 0.05) < 0.11
    assert np.mean(np.array(by_record) < 0.05) > 0.2


def test_a_perfect_attack_is_a_finding_over_groups_and_over_seeds():
    """AUC 1 has no spread that could be estimated; p was 1 and the interval of a difference had no width."""
    names = {i: i[:-1] for role in ("private", "heldout") for i in ids_of(role, 60)}
    apart = (np.full(60, 2.0), np.zeros(60))
    scores = {("students/kd", seed, "loss"): apart for seed in (0, 1, 2)} | {("null", 0, "loss"): (np.zeros(60),) * 2}
    for groups, exact in ((names, 2 / math.comb(12, 6)), (None, 2 / math.comb(120, 60))):
        made = study(scores, groups=groups)
        sample = lambda run, seed, made=made: made.pairs(run, seed, "loss", "private-heldout")
        seeds = [sample("students/kd", seed) for seed in (0, 1, 2)]
        for block in (seeds[:1], seeds):
            p = against_chance([auc_of(each) for each in block], block)
            assert exact < p < 0.02, (groups is None, len(block), p)
            null = [auc_of(sample("null", 0))] * len(block)
            gap = compare([auc_of(each) for each in block], null, block)
            assert gap.value == 0.5 and gap.low < 0.4 and gap.high > 0.6 and exact < gap.p < 0.2
            assert compare(null, null, block)[:3] == (0, 0, 0) and compare(null, null, block).p == 1


def test_slices_keep_their_groups():
    names = {i: i[-1] for role in ("private", "heldout") for i in ids_of(role, 40)}
    task = np.array(["a", "b"] * 20)
    rng = np.random.default_rng(4)
    scores = {("students/kd", 0, "loss"): (rng.normal(size=40), rng.normal(size=40))}
    (pair,) = study(scores, groups=names, tasks=(task, task)).pairs("students/kd", 0, "loss", "private-heldout")
    assert pair.groups.sizes == (10, 10) and pair.only("a").groups.sizes == (5, 5)
    assert estimate([auc_of([pair.only("a")])], [[pair.only("a")]]).low < pair.only("a").auc.value


def test_windows_of_a_text_are_one_record():
    made = study({("students/kd", 0, "loss"): (np.arange(3.0), np.arange(3.0))})
    assert list(made.group_names(np.array(["x#0", "x#1", "y"]))) == ["x", "x", "y"]


def test_the_audit_says_that_it_counts_groups(tmp_path):
    world = World(tmp_path / "scores", {"private": 120, "heldout": 120})
    world.write("students/kd", {"private": 0.3})
    world.write_text()
    plain = audit(tmp_path / "scores", tmp_path / "plain", QUICK | {"attacks": ["loss"]})
    assert plain["groups"] == {"applicable": False, "words": []}
    path = tmp_path / "scores" / "text" / "splits.parquet"
    splits = pd.read_parquet(path)
    splits["group"] = [f"{role}{i // 4}" for i, role in enumerate(splits["role"])]
    splits.to_parquet(path)
    summary = audit(tmp_path / "scores", tmp_path / "out", QUICK | {"attacks": ["loss"]})
    assert summary["groups"]["groups"] == {"members": 30, "nonmembers": 30}
    assert "120 members in 30, 120 non-members in 30" in summary["groups"]["words"][0]
    assert summary["groups"]["words"][0] in summary["warnings"]
    assert summary["headline"]["value"] == plain["headline"]["value"]
    assert group_facts(study({("students/kd", 0, "loss"): (np.arange(3.0), np.arange(3.0))}))["applicable"] is False
