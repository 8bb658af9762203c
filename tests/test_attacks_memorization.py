"""Rows of memorization.csv on planted tables: what is known must be found, what is not must not, and nothing twice."""

import re

import numpy as np
import pandas as pd
import pytest

from attacks.cuts import Cut, Memorized
from attacks.memorization import COLUMNS, extraction_table, memorization_rows
from tests.planted_memorization import Planted, chosen

CUTS = [(0, 10), (0, 20)]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    world = Planted(tmp_path_factory.mktemp("scores"))
    world.write("base_student", luck=0.3, train_roles=[])
    world.write("teacher", luck=0.5, knows={"private": 64, "canary": 4}, train_roles=["private"])
    for seed in (0, 1):
        told = {"technique": "kd", "setting": "shared", "teacher": "teacher", "train_roles": ["private"]}
        world.write("students/kd", seed, luck=0.5, knows={"private": 64}, **told)
    study = world.study()
    memorized = Memorized(study, CUTS)
    return world, study, memorized, memorization_rows(study, memorized)


def test_members_that_are_known_are_extracted_and_heldout_ones_are_not(planted):
    world, _, memorized, rows = planted
    assert memorized.main == Cut(0, 20)
    made = world.roles["private"]
    full = made["lengths"] >= 20
    known = full & (made["repeats"] == 64)
    row = chosen(rows, model="teacher", measure="extracted@k=20", task="all", role="private")
    assert row["n"] == full.sum() and row["value"] == pytest.approx(known.sum() / full.sum())
    assert row["ci_low"] < row["value"] < row["ci_high"]
    control = chosen(rows, model="teacher", measure="extracted@k=20", task="all", role="heldout")
    assert control["value"] == 0 and 0 < control["ci_high"] < 0.08  # exact: an upper bound of about 3.7/n
    gap = chosen(rows, model="teacher", measure="extracted@k=20", task="all", role="private-heldout")
    assert gap["value"] == row["value"] and 0 < gap["ci_low"] < row["value"] < gap["ci_high"]
    for measure in ("matched@k=20", "accuracy@k=20", "strength@k=20", "log_p@k=20;t=1"):
        assert chosen(rows, model="teacher", measure=measure, task="all", role="private-heldout")["ci_low"] > 0
        nothing = chosen(rows, model="base_student", measure=measure, task="all", role="private-heldout")
        assert nothing["ci_low"] < 0.5 * abs(nothing["value"]) + 1e-9 or nothing["value"] < 0.5


def test_strata_by_repeats(planted):
    _, _, _, rows = planted
    at = {"model": "teacher", "measure": "extracted@k=20"}
    assert chosen(rows, **at, task="repeats=64", role="private")["value"] == 1
    assert chosen(rows, **at, task="repeats=1", role="private")["value"] == 0
    whole = chosen(rows, **at, task="all", role="heldout")
    assert chosen(rows, **at, task="repeats=64", role="heldout")["n"] == whole["n"]  # all of them: no member of 64
    assert chosen(rows, **at, task="repeats=64", role="private-heldout")["ci_low"] > 0.7
    parts = sum(chosen(rows, **at, task=f"repeats={r}", role="private")["n"] for r in (1, 4, 64))
    assert parts == chosen(rows, **at, task="all", role="private")["n"]
    tasks = sum(chosen(rows, **at, task=task, role="private")["n"] for task in ("open_qa", "summary"))
    assert tasks == parts


def test_short_responses_are_counted_and_not_averaged_in(planted):
    world, _, _, rows = planted
    made = world.roles["private"]
    at = {"model": "teacher", "task": "all", "role": "private"}
    short = chosen(rows, **at, measure="short@k=20")
    assert short["n"] == len(made["ids"]) and short["value"] == pytest.approx(np.mean(made["lengths"] < 20))
    every = chosen(rows, **at, measure="exact_response@k=20")
    assert every["n"] == len(made["ids"]) and every["value"] >= np.mean(made["repeats"] == 64)
    stratum = chosen(rows, model="teacher", role="private", task="length<20", measure="exact_response@k=20")
    assert stratum["n"] == np.sum(made["lengths"] < 20)
    assert not [row for row in rows if row.get("task") == "length<20" and row["measure"] == "extracted@k=20"]


def test_probabilistic_measures(planted):
    _, _, _, rows = planted
    at = {"model": "teacher", "task": "all", "role": "private"}
    drawable = chosen(rows, **at, measure="drawable@k=20;k=2,t=1")
    extracted = chosen(rows, **at, measure="extracted@k=20")
    assert drawable["value"] == extracted["value"]  # every miss has rank 3
    sampled = [chosen(rows, **at, measure=f"np_extractable@k=20;t=1;n={n};p=0.9")["value"] for n in (1, 100, 10000)]
    assert sampled == sorted(sampled) and sampled[1] >= extracted["value"] > sampled[0]  # e^-0.2 is less than 0.9
    assert chosen(rows, **at, measure="np_extractable@k=20;k=2,t=1;n=10000;p=0.5")["value"] == extracted["value"]
    kept = chosen(rows, **at, measure="log_p@k=20;k=2,t=1")
    assert kept["value"] == pytest.approx(-0.1, abs=1e-4) and kept["n"] < extracted["n"]
    assert not [r for r in rows if r["measure"] == "log_p@k=20;k=2,t=1" and r["role"] == "private-heldout"]
    assert not [r for r in rows if r["measure"].startswith("np_extractable@k=10")]  # at the main cut alone


def test_canaries_by_coin(planted):
    _, _, _, rows = planted
    at = {"model": "teacher", "measure": "exact_response@k=20"}
    inside = chosen(rows, **at, task="placement=both,repeats=64", role="canary_in")
    outside = chosen(rows, **at, task="placement=both,repeats=64", role="canary_out")
    assert (inside["value"], outside["value"]) == (1, 0)
    assert chosen(rows, **at, task="placement=both,repeats=1", role="canary_in")["value"] == 0
    matched = chosen(rows, model="teacher", measure="matched@k=20", task="placement=both,repeats=64", role="canary_in")
    assert matched["value"] == matched["ci_high"] == 15  # 14 tokens and EOS: no more could be right
    gap = chosen(rows, **at, task="placement=both", role="canary_in-canary_out")
    assert 0.3 < gap["ci_low"] < 0.667 < gap["ci_high"]
    assert not [row for row in rows if "placement=none" in row["task"]]


def test_placements_say_who_met_the_canaries(tmp_path):
    """A student of the teacher's own records met what was meant for the teacher; neither met what is public."""
    world = Planted(tmp_path, n=24)
    path = tmp_path / "text" / "splits.parquet"
    splits = pd.read_parquet(path)
    canaries = splits.role == "canary"
    splits.loc[canaries, "placement"] = np.resize(["teacher_only", "student_only", "none"], canaries.sum())
    splits.to_parquet(path)
    world.write("teacher", train_roles=["private"])
    told = {"technique": "kd", "teacher": "teacher"}
    world.write("students/kd", train_roles=["public"], setting="disjoint", **told)
    world.write("students/kd_shared", train_roles=["private"], setting="shared", **told)
    study = world.study()
    rows = memorization_rows(study, Memorized(study, [(0, 10)]))
    tasks = {(r["model"], r["task"]) for r in rows if re.fullmatch(r"placement=\w+", r["task"])}
    places = lambda model: {task for m, task in tasks if m == model}
    named = {"placement=teacher_only", "placement=student_only"}
    assert places("teacher") == places("students/kd") == named
    assert places("students/kd_shared") == {"placement=both", "placement=neither"}


def test_seeds_have_rows_of_their_own_and_one_together(planted):
    _, _, _, rows = planted
    at = {"model": "students/kd", "measure": "matched@k=20", "task": "all", "role": "private-heldout"}
    each = [chosen(rows, **at, seed=seed) for seed in (0, 1, "all")]
    assert each[2]["value"] == pytest.approx((each[0]["value"] + each[1]["value"]) / 2)
    assert each[2]["ci_low"] < each[2]["value"] < each[2]["ci_high"]
    nobody = chosen(rows, model="students/kd", measure="extracted@k=20", task="all", role="heldout", seed="all")
    assert nobody["value"] == 0 and 0 < nobody["ci_high"] < 0.08
    gap = chosen(
        rows, model="students/kd", measure="extracted@k=20", task="repeats=1", role="private-heldout", seed="all"
    )
    assert gap["ci_low"] < 0 < gap["ci_high"]  # nobody on either side, over two seeds: still of some width
    assert {row["setting"] for row in rows if row["model"] == "students/kd"} == {"shared"}


def test_rows_are_whole_and_not_twice(planted):
    _, _, _, rows = planted
    columns = {*COLUMNS.split(), "reason"}
    assert all(set(row) <= columns for row in rows) and not [row for row in rows if "reason" in row]
    keys = [tuple(row[key] for key in ("model", "measure", "task", "role", "seed")) for row in rows]
    assert len(keys) == len(set(keys))
    for row in rows:
        assert row["ci_low"] is None or row["ci_low"] <= row["value"] <= row["ci_high"], row
    assert len(rows) < 400 * 4


def test_extraction_table(planted):
    world, study, memorized, rows = planted
    frame = extraction_table(study, memorized)
    n = len(world.roles["private"]["ids"])
    assert len(frame) == 4 * 3 * 2 * n  # runs and seeds, roles, cuts
    mine = frame[(frame.model == "teacher") & (frame.role == "private") & (frame.suffix == 20) & (frame.length >= 20)]
    row = chosen(rows, model="teacher", measure="extracted@k=20", task="all", role="private")
    assert mine.extracted.mean() == pytest.approx(row["value"]) and mine.matched.le(mine.window).all()
    assert list(frame) == (
        "model seed role example_id task prefix suffix length window matched extracted near_tie log_p".split()
    )


def test_null_gaps_hold_zero_at_their_rate(tmp_path, check):
    """Two roles from one distribution: intervals of the gap leave out 0 about once in twenty."""
    missed = {"matched@k=10": 0, "accuracy@k=10": 0, "extracted@k=10": 0, "exact_response@k=10": 0}
    trials = 100
    for trial in range(trials):
        world = Planted(tmp_path / str(trial), n=60, lengths=(6, 20), seed=trial)
        world.roles.pop("canary")
        world.write("null", luck=0.85)
        study = world.study()
        rows = memorization_rows(study, Memorized(study, [(0, 10)]))
        for name in missed:
            gap = chosen(rows, measure=name, task="all", role="private-heldout")
            missed[name] += not gap["ci_low"] <= 0 <= gap["ci_high"]
    check("memorization: gaps of a null whose 95 % interval leaves out 0", max(missed.values()) / trials, 0.11)


def test_windows_of_one_text_count_as_one(tmp_path):
    """Intervals over texts: ten windows of a text that all agree are worth one."""
    world = Planted(tmp_path, n=120, lengths=(40, 41), text=True)
    world.roles.pop("canary")
    for role, made in world.roles.items():
        made["ids"] = np.array([f"{role}-{i // 10:04d}#{i % 10}" for i in range(120)])
        made["repeats"] = np.where(np.arange(120) // 10 % 3 == 0, 64, 1)
    world.write("teacher", luck=0.5, knows={"private": 64})
    study = world.study()
    rows = memorization_rows(study, Memorized(study, [(10, 20)]))
    row = chosen(rows, measure="extracted@a=10,k=20", task="all", role="private")
    assert row["n"] == 120 and row["value"] == pytest.approx(1 / 3)
    assert row["ci_high"] - row["ci_low"] > 0.35  # of 12 texts; of 120 records it would be .17
    control = chosen(rows, measure="extracted@a=10,k=20", task="all", role="heldout")
    assert control["value"] == 0 and control["ci_high"] == pytest.approx(1 - 0.025 ** (1 / 12))
    gap = chosen(rows, measure="matched@a=10,k=20", task="all", role="private-heldout")
    assert gap["ci_high"] - gap["ci_low"] > 8


def test_a_table_without_the_columns_gives_a_reason(tmp_path):
    world = Planted(tmp_path, n=20)
    world.write("teacher")
    made = world.roles["private"]
    sizes = made["lengths"]
    fields = {"logp": np.full(sizes.sum(), -1.0), "segment": np.ones(sizes.sum())}
    world.save("student", 0, "private", made["ids"], made["task"], sizes, fields)
    study = world.study()
    rows = memorization_rows(study, Memorized(study, CUTS))
    told = [row for row in rows if row["model"] == "student"]
    assert told and all("top1_id" in row["reason"] for row in told)
