"""The seven regions: published counts, both denominators, seeds, groups, exact tests, and coincidence kept apart."""

import numpy as np
import pytest
from planted_extractions import extraction, planted, row
from scipy import stats

from attacks import inheritance
from attacks.inheritance import REGIONS, sets, totals

# borkar2026, figure 4: Pythia 12B -> 1.4B on FineWeb
PUBLISHED = {"T&B&S": 676, "T&B not S": 696, "T&S not B": 18, "B&S not T": 9} | {
    "S only": 3,
    "B only": 317,
    "T only": 1937,
}


def published(n: int) -> list[np.ndarray]:
    """Three sets over n examples with the published counts."""
    counts = PUBLISHED | {"none": n - sum(PUBLISHED.values())}
    return [np.concatenate([np.full(counts[name], REGIONS[name][i]) for name in REGIONS]) for i in range(3)]


def test_published_figures(check):
    n = 10_000  # the shares among memorized examples do not depend on it
    T, B, S = published(n)
    assert {name: int(each.sum()) for name, each in sets(T, B, S).items() if name != "none"} == PUBLISHED
    assert {k: int(v.sum()) for k, v in totals({"T": T, "B": B, "S": S}).items()} == {
        "T": 3327,
        "B": 1698,
        "S": 706,
        "T&B": 1372,
        "T not B": 1955,
    }
    study, shelf = planted(
        {("teacher", 0, "private"): T, ("direct", 0, "private"): B, ("students/kd", 0, "private"): S}
    )
    rows = inheritance.rows(study, shelf)
    at = lambda measure: row(rows, measure=f"{measure}@k=10", student="students/kd", seed=0)
    # published percentages and intervals, to their printed digits
    for measure, value, low, high in (
        ("easy_share", 95.75, 94.0, 97.0),
        ("inheritance_rate", 0.92, 0.58, 1.45),
        ("inherited_share", 2.55, 1.6, 4.0),
    ):
        found = at(measure)
        check(f"published {measure}, per cent", abs(100 * found["value"] - value), 0.01)
        ends = abs(100 * found["ci_low"] - low), abs(100 * found["ci_high"] - high)
        check(f"interval of published {measure}, per cent", max(ends), 0.06)
    assert (at("inheritance_rate")["count"], at("inheritance_rate")["denominator"]) == (18, 1955)
    assert (at("inherited_share")["count"], at("inherited_share")["denominator"]) == (18, 706)
    assert at("retention")["value"] == pytest.approx(676 / 1372) and at("coverage")["value"] == pytest.approx(
        1372 / 1698
    )
    assert at("student_only_share")["count"] == 3
    regions = [r for r in rows if r["measure"] == "region@k=10"]
    assert len(regions) == 8 and sum(r["count"] for r in regions) == n and {r["denominator"] for r in regions} == {n}


def test_every_example_is_in_one_region():
    rng = np.random.default_rng(0)
    three = rng.random((3, 500)) < 0.4
    assert np.array_equal(np.sum(list(sets(*three).values()), axis=0), np.ones(500))
    found = sets(*three)
    assert np.array_equal(found["T&S not B"], three[0] & three[2] & ~three[1])
    assert np.array_equal(found["S only"], three[2] & ~three[0] & ~three[1])


def seeds_of(T, B, S) -> dict:
    """By run a list over seeds of lists of memorized examples, of 40."""
    made = {}
    for run, each in (("teacher", T), ("direct", B), ("students/kd", S)):
        for seed, chosen in enumerate(each):
            made[run, seed, "private"] = np.isin(np.arange(40), chosen)
            made[run, seed, "heldout"] = np.zeros(40, bool)
    return made


def test_union_intersection_noise_and_recurrence():
    T = [range(0, 20), range(0, 22)]
    B = [range(0, 10), range(5, 16)]
    S = [[0, 1, 12], [1, 2, 12, 30]]
    study, shelf = planted(seeds_of(T, B, S))
    rows = [r for r in inheritance.rows(study, shelf) if r.get("student") == "students/kd"]
    at = lambda measure, seed, region: row(rows, measure=f"{measure}@k=10", seed=seed, region=region)
    count = lambda *key: (at(*key)["count"], at(*key)["denominator"])
    assert count("region", 0, "T&S not B") == (1, 40) and count("region", 1, "T&S not B") == (2, 40)
    assert count("inheritance_rate", "union", "T&S not B") == (0, 22 - 16)  # B's union is 0..15
    # intersections: T 0..19, B 5..9, S {1, 12}
    assert count("inheritance_rate", "intersection", "T&S not B") == (2, 15)
    assert count("memorized", "intersection", "S") == (2, 40)
    # baseline of seed 1 has 10..15 of the ten that seed 0's teacher has and its baseline has not
    assert count("seed_noise_rate", 0, "T&B2 not B") == (6, 10)
    noise = at("inherited_less_noise", 0, "T not B")
    # of ten, 12 is inherited and noise, 10, 11, 13, 14, 15 noise alone
    assert noise["value"] == pytest.approx(-0.5) and noise["p_value"] == pytest.approx(stats.binomtest(0, 5).pvalue)
    assert noise["p_corrected"] >= noise["p_value"]
    assert count("recurrence", "all", "S in 1 of 2") == (3, 40) and count("recurrence", "all", "S in 2 of 2") == (2, 40)
    assert count("forgotten_core", "all", "B always, S never") == (5, 5)
    control = row(rows, measure="heldout_memorized@k=10", seed="union", region="T")
    assert control["count"] == 0 and control["ci_high"] == pytest.approx(1 - 0.025 ** (1 / 40))


def test_a_model_with_one_seed_has_no_noise_and_does_not_recur():
    """Teacher and baseline were trained once: of their seeds nothing is said, of the student's it is."""
    rows = inheritance.rows(*planted(seeds_of([range(20)], [range(10)], [[0, 1, 12], [1, 12, 30]])))
    names = {(r["measure"], r["region"]) for r in rows if "region" in r}
    assert ("recurrence@k=10", "S in 2 of 2") in names
    absent = ("seed_noise_rate", "inherited_less_noise", "forgotten_core")
    assert not [
        n for n in names if n[0].startswith(absent) or n[1].startswith(("T in 1", "T in 2", "B in 1", "B in 2"))
    ]
    over = {r["region"] for r in rows if r["measure"] == "memorized@k=10" and r["seed"] == "union"}
    assert over == {"S", "T&B", "T not B"}


def test_transfer_by_hand():
    matched = np.array([9, 8, 6, 5, 2, 0])
    teacher = extraction(np.zeros(6, bool), matched=matched)
    student = extraction(np.zeros(6, bool), run="students/kd", matched=np.array([4, 6, 0, 9, 9, 9]))
    control = extraction(np.zeros(6, bool), run="base_student", matched=np.zeros(6, int))
    found = {("teacher", 0, "private"): teacher, ("students/kd", 0, "private"): student}
    rows = inheritance.rows(*planted(found | {("base_student", 0, "private"): control}))
    name = {"students/kd": "transfer@k=10", "base_student": "coincidence_transfer@k=10"}  # a base has not seen it
    at = lambda run, r: row(rows, measure=name[run], student=run, region=f"t>{r}")
    assert at("students/kd", 0.7)["value"] == pytest.approx(0.5)  # of 0.4 and 0.6
    assert (at("students/kd", 0.5)["count"], at("students/kd", 0.5)["denominator"]) == (3, 6)
    assert at("students/kd", 0.9)["count"] == 0 and "value" not in at("students/kd", 0.9)
    assert at("base_student", 0.5)["value"] == 0 and at("base_student", 0.5)["ci_high"] > 0.5
    assert [r for r in rows if "reason" in r][0]["reason"].startswith("no run 'direct'")


def test_disjoint_is_never_called_inheritance():
    memorized = seeds_of([range(20)], [range(10)], [[0, 1, 12]])
    rows = inheritance.rows(*planted(memorized, setting="disjoint"))
    assert {r["setting"] for r in rows} == {"disjoint"}
    overlap = [r for r in rows if r.get("region") in ("teacher & direct", "teacher in direct", "direct in teacher")]
    transfer = [r for r in rows if r.get("student") == "direct"]
    trained = [*overlap, *transfer]  # both were trained on the text, whoever stands beside them
    assert len(overlap) == 3 and {r["measure"] for r in transfer} == {"transfer@k=10"}
    assert not any(r["measure"].startswith("coincidence_") for r in trained)
    assert all(r["measure"].startswith("coincidence_") for r in rows if r not in trained)
    assert row(rows, measure="coincidence_heldout_memorized@k=10", region="S", seed=0)["count"] == 0


def test_short_examples_are_not_averaged_in():
    short = np.arange(40) >= 30
    study, shelf = planted(seeds_of([range(40)], [range(10)], [range(5)]), short=short)
    rows = [r for r in inheritance.rows(study, shelf) if r.get("student") == "students/kd"]
    assert row(rows, measure="memorized@k=10", region="T", seed=0)["denominator"] == 30
    assert row(rows, measure="memorized@k=10", region="T", seed=0)["count"] == 30


def test_why_there_is_nothing():
    study, shelf = planted({("teacher", 0, "private"): np.ones(5, bool)})
    reason = "no student whose teacher was scored as well"
    assert inheritance.rows(study, shelf) == [{"measure": "inheritance", "reason": reason}]
    other = extraction(np.ones(6, bool), run="students/kd")
    five = np.ones(5, bool)
    rows = inheritance.rows(
        *planted(
            {("teacher", 0, "private"): five, ("direct", 0, "private"): five, ("students/kd", 0, "private"): other}
        )
    )
    assert any("different examples" in r.get("reason", "") for r in rows)
