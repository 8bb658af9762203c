"""Membership by task: equal tasks are not told apart more often than the level, unequal ones are."""

import numpy as np
import pytest
from planted_study import study
from scipy import stats

from attacks import statistics as st
from attacks.tasks import cochran, same_auc, same_difference, task_facts, task_rows

SIZES = (15, 30, 60, 100, 150)


def test_cochran_by_hand():
    found = cochran(np.array([1.0, 2.0, 4.0]), np.array([1.0, 1.0, 2.0]))
    mean = (1 + 2 + 2) / 2.5  # weights 1, 1, 1/2
    q = (1 - mean) ** 2 + (2 - mean) ** 2 + (4 - mean) ** 2 / 2
    assert found.statistic == pytest.approx(q) and found.df == 2 and found.p == pytest.approx(np.exp(-q / 2))
    assert found.spread == pytest.approx(np.sqrt((q - 2) / (2.5 - 2.25 / 2.5)))
    assert cochran(np.ones(4), np.ones(4)) == (0, 3, 1, 0)


@pytest.mark.parametrize("area", [0.5, 0.7, 0.97])
def test_equal_tasks_are_told_apart_at_the_level(area, check):
    rng, shift, draws = np.random.default_rng(4), np.sqrt(2) * stats.norm.ppf(area), 300
    p = []
    for _ in range(draws):
        blocks = [[st.auc_influence(rng.normal(shift, 1, n), rng.normal(0, 1, n))] for n in SIZES]
        p.append(same_auc(blocks).p)
    check(f"equal tasks declared different beyond 5 %, AUC {area}", np.mean(np.array(p) < 0.05) - 0.05, 0.035)


def test_equal_differences_are_told_apart_at_the_level(check):
    rng, p = np.random.default_rng(5), []
    for _ in range(300):
        blocks = []
        for n in SIZES:
            hard = rng.normal(size=n), rng.normal(size=n)
            a, b = (
                st.auc_influence(hard[0] + s + 0.5 * rng.normal(size=n), hard[1] + 0.5 * rng.normal(size=n))
                for s in (1, 0.5)
            )
            blocks.append([a.minus(b)])
        p.append(same_difference(blocks).p)
    check("equal differences declared different beyond 5 %", np.mean(np.array(p) < 0.05) - 0.05, 0.035)


def test_seeds_that_move_tasks_apart_widen_the_test():
    rng, n = np.random.default_rng(6), 200
    blocks = [[], []]
    for shifts in ((0.2, 1.2), (1.2, 0.2), (0.1, 1.0)):
        for block, shift in zip(blocks, shifts, strict=True):
            block.append(st.auc_influence(rng.normal(shift, 1, n), rng.normal(0, 1, n)))
    assert same_auc([blocks[0][:1], blocks[1][:1]]).p < 1e-6 and same_auc(blocks).p > 0.05


def planted(rng, shifts, seeds=(0,), n=150):
    """Scores of two students on two tasks; shifts: model -> what members have more, by task."""
    task = np.repeat(["qa", "summary", "rare"], [n, n, 5])
    scores, hard = {}, (rng.normal(size=len(task)), rng.normal(size=len(task)))
    for run, by_task in shifts.items():
        added = np.array([by_task.get(t, 0.0) for t in task])
        for seed in seeds:
            x, y = (h + 0.4 * rng.normal(size=len(task)) for h in hard)
            scores[run, seed, "loss"] = (x + added, y)
    return study(scores, tasks=(task, task))


def test_planted_interaction_is_found():
    rng = np.random.default_rng(7)
    shifts = {"students/kd": {"qa": 1.5}, "students/gkd": {"summary": 1.5}, "null": {}}
    made = planted(rng, shifts, seeds=(0, 1))
    rows = task_rows(made)
    assert {row["task"] for row in rows if row["test"] == "slice"} == {"qa", "summary"}  # five records are too few
    het = {row["model"]: row for row in rows if row["test"] == "heterogeneity"}
    assert het["students/kd"]["p_corrected"] < 0.001 < 0.05 < het["null"]["p_corrected"]
    assert het["students/kd"]["df"] == 1 and het["students/kd"]["seed"] == "all"
    (crossed,) = [row for row in rows if row["test"] == "interaction"]
    assert {crossed["model"], crossed["model_b"]} == {"students/kd", "students/gkd"} and crossed["p_corrected"] < 1e-6
    slices = {row["task"]: row for row in rows if row["test"] == "slice" and row["model"] == "students/kd"}
    assert slices["qa"]["p_corrected"] < 1e-6 and slices["qa"]["p_corrected"] == pytest.approx(
        2 * slices["qa"]["p_value"]
    )
    facts = task_facts(made, rows)
    assert (
        facts["applicable"]
        and "AUC differs between tasks for" in facts["words"]
        and "depends on the task" in facts["words"]
    )
    assert {row["model"] for row in facts["differ"]} == {"students/kd", "students/gkd"}


def test_same_techniques_on_all_tasks():
    rng = np.random.default_rng(8)
    made = planted(rng, {"students/kd": {"qa": 0.8, "summary": 0.8}, "students/gkd": {"qa": 0.4, "summary": 0.4}})
    words = task_facts(made, task_rows(made))["words"]
    assert "no model's AUC is shown to differ" in words and "no difference of two students is shown" in words


def test_one_task_is_not_applicable():
    made = study({("students/kd", 0, "loss"): (np.arange(30.0), np.arange(30.0))})
    assert task_rows(made) == [] and "not applicable" in task_facts(made, [])["words"]
