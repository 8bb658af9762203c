"""Models side by side on the same examples: Jaccard and containment by hand, exact tests between techniques."""

import numpy as np
import pytest
from planted_extractions import CUT, extraction, planted, row
from scipy import stats
from test_attacks_inheritance import seeds_of

from attacks import inheritance
from attacks.overlap import beside, kept, matched_share
from attacks.statistics import holm
from attacks.study import Unresolved


def test_overlap_of_seeds_and_models():
    study, shelf = planted(seeds_of([range(20)], [range(10)], [[0, 1, 12, 13]]))
    rows = inheritance.rows(study, shelf)
    both = row(rows, measure="jaccard@k=10", region="direct & students/kd")
    assert (both["count"], both["denominator"]) == (2, 12)
    inside = row(rows, measure="containment@k=10", region="direct in teacher")
    assert inside["value"] == 1 and inside["ci_low"] == pytest.approx(0.025 ** (1 / 10))
    study, shelf = planted(seeds_of([range(20)] * 2, [range(10)] * 2, [[0, 1], [1, 2, 3]]))
    rows = inheritance.rows(study, shelf)
    seeds = row(rows, measure="jaccard@k=10", region="students/kd/seed0 & students/kd/seed1")
    assert (seeds["count"], seeds["denominator"], seeds["seed"]) == (1, 4, "all")


def test_techniques_differ_by_discordant_examples():
    rng = np.random.default_rng(1)
    T, B = rng.random(400) < 0.5, rng.random(400) < 0.2
    soft = T & (rng.random(400) < 0.2)
    hard = soft | (T & ~B & (rng.random(400) < 0.3))
    memorized = {("teacher", 0, "private"): T, ("direct", 0, "private"): B}
    memorized |= {("students/kd", 0, "private"): soft, ("students/seqkd", 0, "private"): hard}
    rows = inheritance.rows(*planted(memorized))
    alone = T & ~B
    for measure, among in (("memorized", np.ones(400, bool)), ("inheritance", alone)):
        found = row(rows, measure=f"{measure}_difference@k=10", region="students/kd - students/seqkd")
        a, b = int((soft & ~hard & among).sum()), int((hard & ~soft & among).sum())
        assert found["value"] == pytest.approx((a - b) / among.sum()) and found["ci_high"] < 0
        assert found["p_value"] == pytest.approx(stats.binomtest(a, a + b).pvalue)
    ps = [r["p_value"] for r in rows if r["measure"] == "memorized_difference@k=10"]
    assert [r["p_corrected"] for r in rows if r["measure"] == "memorized_difference@k=10"] == list(holm(ps))


def test_models_are_only_compared_on_the_same_examples():
    five = {(run, 0, "private"): np.ones(5, bool) for run in ("teacher", "direct")}
    other = {("students/kd", 0, "private"): extraction(np.ones(6, bool), run="students/kd")}
    study, shelf = planted(five | other | {("students/kd", 1, "private"): np.ones(5, bool)})
    with pytest.raises(Unresolved, match="teacher and students/kd were scored on different examples"):
        beside(study, shelf, ("teacher", "students/kd"), 0, "private", CUT)
    both = beside(study, shelf, ("teacher", "students/kd"), 1, "private", CUT)
    assert [each.seed for each in both] == [0, 1], "the teacher's only seed stands beside any"
    with pytest.raises(Unresolved, match="students/kd has no seed 7"):
        beside(study, shelf, ("students/kd", "teacher"), 7, "private", CUT)


def test_short_examples_are_never_memorized_and_shares_are_of_the_window():
    found = extraction([1, 1, 0, 0], short=np.array([0, 1, 1, 0], bool), matched=np.array([9, 9, 2, 4]))
    assert kept(found).tolist() == [True, False, False, False]
    assert matched_share(found).tolist() == [1, 1, 0.4, 0.4]
