"""Dataset inference: a planted set is found from weak scores, and two sets of non-members are not told apart."""

import numpy as np
import planted_study
from planted_scores import QUICK, World
from planted_study import ids_of
from scipy import stats

from attacks import dataset_inference
from attacks.audit import complete
from attacks.dataset_inference import COLUMNS, combined, controls, dataset_rows, p_value
from attacks.scoring import load_study


def scores(rng, n, gap):
    """Five scores with much in common, each shifted a little."""
    return rng.normal(size=(n, 1)) + rng.normal(size=(n, 5)) + gap * np.array([1, 0.5, 0, 0.2, 1])


def test_weak_scores_together_find_the_set():
    rng = np.random.default_rng(0)
    assert combined(scores(rng, 1000, 0.4), scores(rng, 1000, 0.0), rng) < 1e-3
    assert combined(scores(rng, 1000, 0.0), scores(rng, 1000, 0.0), rng) > 0.05
    constant = np.zeros((40, 5))
    assert p_value(constant, constant, rng) == 1


def test_p_values_are_uniform_without_a_leak():
    """Fresh data each time, and the control of the audit on one set of non-members."""
    rng = np.random.default_rng(1)
    fresh = [p_value(scores(rng, 120, 0.0), scores(rng, 120, 0.0), rng) for _ in range(400)]
    assert stats.kstest(fresh, "uniform").pvalue > 0.01
    assert np.mean(np.array(fresh) < 0.05) <= stats.binom.isf(1e-3, 400, 0.05) / 400
    assert (controls(scores(rng, 400, 0.0), rng, 60) < 0.05).mean() < 0.1


def test_the_control_tests_the_p_value_that_is_reported(monkeypatch):
    monkeypatch.setattr(dataset_inference, "combined", lambda suspect, known, rng: len(suspect) / len(known) / 4)
    assert list(dataset_inference.controls(np.zeros((40, 3)), np.random.default_rng(0), 5)) == [0.25] * 5


def test_windows_of_a_text_are_no_further_texts():
    """Sixty texts of twelve windows a class that nobody used: by windows a set is found, by texts it is not."""
    rng, found = np.random.default_rng(2), {True: [], False: []}
    names = {i: f"{i[0]}{k // 12}" for role in ("private", "heldout") for k, i in enumerate(ids_of(role, 720))}
    for seed in range(12):
        both = [(rng.normal(size=(60, 1, 4)) + 0.3 * rng.normal(size=(60, 12, 4))).reshape(720, 4) for _ in range(2)]
        columns = {("students/kd", 0, a): tuple(x[:, k] for x in both) for k, a in enumerate(QUICK["attacks"][:4])}
        for grouped in found:
            made = planted_study.study(columns, groups=names if grouped else None, seed=seed)
            members, nonmembers, number = dataset_inference._matrices(made, "students/kd", 0)
            assert members.shape == nonmembers.shape == (60 if grouped else 720, number)
            found[grouped].append(combined(members, nonmembers, np.random.default_rng(seed)))
    assert np.mean(np.array(found[False]) < 0.05) > 0.25 and np.mean(np.array(found[True]) < 0.05) < 0.2


def test_rows(tmp_path):
    world = World(tmp_path, {"private": 300, "heldout": 300}, seed=5)
    world.write("students/kd", {"private": 0.5})
    world.write("null")
    study = load_study(tmp_path, complete(QUICK, tmp_path))
    rows = dataset_rows(study)
    assert set(rows[0]) == set(COLUMNS.split()) and rows[0]["attacks"] == 4  # no references, nothing fitted
    found = {(row["model"], row["measure"], row["n"]): row["value"] for row in rows}
    assert found["students/kd", "p_value", 300] < 1e-4
    assert found["null", "p_value", 300] > 0.01
    assert found["null", "rejected_at_0.05", 300] < 0.15 and 0 <= found["null", "too_small_ks_p", 300] <= 1
    assert dataset_rows(study) == rows  # seeded
