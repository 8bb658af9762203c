"""Many attacks at once: Holm, and the maximum against shuffled labels; p-values are uniform where nothing leaks."""

import numpy as np
import pytest
from planted_study import study
from scipy import stats

from attacks.corrections import attack_rows, corrected_facts
from attacks.differences import difference_rows
from attacks.rows import membership_rows
from attacks.summary import _worst

ATTACKS = ("loss", "zlib", "min_k", "min_k_plus_plus", "sum")


def noise(rng, m=40, n=50, attacks=ATTACKS, shift=None):
    """Scores of correlated attacks on records; shift: what members have more, by attack."""
    hard = [rng.normal(size=size) for size in (m, n)]
    each = {}
    for attack in attacks:
        x, y = (h + rng.normal(size=len(h)) for h in hard)
        each["students/kd", 0, attack] = (x + (shift or {}).get(attack, 0.0), y)
    return each


def test_rows_of_one_model():
    rng = np.random.default_rng(0)
    made = study(noise(rng, 200, 200, shift={"zlib": 1.0, "loss": 0.4}))
    rows = attack_rows(made)
    by = {row["attack"] if row["rule"] != "maximum" else "maximum": row for row in rows}
    assert len(rows) == 6 and by["loss"]["rule"] == "primary" and by["loss"]["p_corrected"] == by["loss"]["p_value"]
    others = [by[a] for a in ATTACKS if a != "loss"]
    p = sorted(row["p_value"] for row in others)
    smallest = min(others, key=lambda row: row["p_value"])
    assert smallest["attack"] == "zlib" and smallest["p_corrected"] == pytest.approx(4 * p[0])
    assert all(row["rule"] == "holm" and row["family"] == 4 for row in others)
    best = by["maximum"]
    assert best["attack"] == "zlib" and best["auc"] == by["zlib"]["auc"] and best["family"] == 5
    assert best["p_corrected"] == pytest.approx(1 / 1001) and 0.5 < best["null_median"] < 0.6
    facts = corrected_facts(made, rows)
    assert facts["permutations"] == 1000 and facts["strongest"][0]["attack"] == "zlib"
    assert "of 5 attacks zlib is the strongest" in facts["words"][0]


def test_maximum_is_corrected_for_where_nothing_leaks():
    """The greatest of five AUCs looks like a finding; its permutation p-value is uniform."""
    rng, p, uncorrected = np.random.default_rng(1), [], []
    for k in range(150):
        rows = attack_rows(study(noise(rng), seed=k))
        p.append(next(row["p_corrected"] for row in rows if row["rule"] == "maximum"))
        uncorrected.append(
            min(row["p_value"] for row in rows if row["rule"] != "maximum" and row["auc"] > 0.5)
            if any(row["auc"] > 0.5 for row in rows)
            else 1.0
        )
    assert stats.kstest(p, "uniform").pvalue > 0.001
    assert stats.binom.sf(np.sum(np.array(p) <= 0.05) - 1, 150, 0.05) > 0.001
    assert np.mean(np.array(uncorrected) < 0.05) > np.mean(np.array(p) <= 0.05)


def test_seeds_are_shuffled_alike():
    """Two seeds of the same records: the mean of both is tested under one shuffle, not as two independent findings."""
    rng = np.random.default_rng(2)
    first = noise(rng, attacks=("loss", "zlib"))
    twin = {(run, 1, attack): both for (run, _, attack), both in first.items()}
    rows = [row for row in attack_rows(study(first | twin)) if row["rule"] == "maximum"]
    one, two, whole = rows
    assert [row["seed"] for row in rows] == [0, 1, "all"] and one["auc"] == two["auc"] == pytest.approx(whole["auc"])
    assert one["p_corrected"] == two["p_corrected"] == whole["p_corrected"]


def test_a_seed_that_lacks_an_attack_leaves_it_out():
    rng = np.random.default_rng(3)
    scores = noise(rng, attacks=("loss", "zlib")) | {
        ("students/kd", 1, "loss"): (rng.normal(size=40), rng.normal(size=50))
    }
    rows = attack_rows(study(scores))
    assert {row["attack"] for row in rows if row["seed"] == "all"} == {"loss"}
    assert {row["attack"] for row in rows if row["seed"] == 0} == {"loss", "zlib"}


def test_the_teachers_own_leak_is_not_the_students():
    """teacher_shift reads no token of the student: its AUC is that of the teacher, on the student and on null alike."""
    rng = np.random.default_rng(4)
    scores, of_teacher = {}, (rng.normal(2, 1, 60), rng.normal(0, 1, 60))
    for run in ("students/kd", "null", "swap_students/kd"):
        scores[run, 0, "loss"] = rng.normal(0.8 * (run == "students/kd"), 1, 60), rng.normal(0, 1, 60)
        scores[run, 0, "teacher_shift"] = of_teacher[::-1] if "swap" in run else of_teacher
    told = {"swap_students/kd": {"swap_of": "students/kd"}, "null": {"train_roles": ["public"]}}
    made = study(scores, provenance=told)
    for row in attack_rows(made):
        assert (row["attack"], row["family"]) == ("loss", 1), row
    leaks = membership_rows(made)
    assert any(row["attack"] == "teacher_shift" and row.get("value", 0) > 0.9 for row in leaks)  # still shown
    assert _worst(made, leaks)["row"]["attack"] == "loss"
    compared = {(row["model_a"], row["model_b"], row["attack"]) for row in difference_rows(made)}
    assert ("students/kd", "null", "teacher_shift") in compared and ("students/kd", "null", "loss") in compared
    assert {of[2] for of in compared if of[1] == "swap_students/kd"} == {"loss"}
