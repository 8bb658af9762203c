"""From tables on disk to scores: which attacks run on which model, what each gets, and why one does not run."""

import re

import numpy as np
import pandas as pd
import planted_whitebox
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from planted_scores import World, chain

from attacks.audit import complete
from attacks.membership import ATTACKS
from attacks.scoring import Shelf, load_study
from attacks.tables import TableError, read_scores

ROLES = ("private", "heldout", "canary")


def study_of(folder, **settings):
    return load_study(folder, complete({"bootstrap": 50, "tasks": False} | settings, folder))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A chain with every scoring variant of the student and two of its earlier checkpoints."""
    folder = tmp_path_factory.mktemp("chain")
    world = chain(folder, members=80, nonmembers=80, leak=0.9)
    told = {"technique": "kd", "setting": "disjoint", "teacher": "teacher"}
    for variant in ("recall", "recall_members", "lowercase"):
        world.write("students/kd", {"private": -0.4}, variant=variant, **told)
    for step, share in ((5, 0.5), (10, 1.0)):
        world.write("students/kd", {"private": 0.9 * share}, variant=f"step-{step}", **told)
    planted_whitebox.write(world, "students/kd", planted_whitebox.leak_in(2, 1), roles=ROLES, **told)
    for role in (*ROLES, "calib"):
        table = world.table(role, 0.0, 0.3)
        ids = [f"{i}~0" for i in table["example_id"].to_pylist()]
        world.save(table.set_column(0, "example_id", pa.array(ids)), "students/kd", role, variant="neighbours", **told)
    return study_of(folder)


def test_variants_are_found_by_metadata(whole):
    table = whole.tables["students/kd", 0]
    names = {"recall", "recall_members", "lowercase", "neighbours", "step-5", "step-10", "whitebox"}
    assert set(table.variants) == names and not whole.tables["students/gkd", 0].variants


def test_every_attack_runs_on_a_student_that_has_everything(whole):
    """Each gives finite scores on all evaluated roles; fitted ones none on the records that they are fitted on."""
    plan = whole.plan["students/kd"]
    assert {a.partition(":")[0] for a in plan} == {name for name, row in ATTACKS.items() if "pair" not in row.inputs}
    for attack in plan:
        for role in ROLES:
            key = ("students/kd", 0, attack, role)
            assert key in whole.scores, (key, whole.missing.get(key))
            assert not np.isnan(whole.scores[key].values).any(), key
        reason = whole.missing.get(("students/kd", 0, attack, "calib"), "")
        assert ("fitted on the calibration records" in reason) == ATTACKS[attack.partition(":")[0]].fitted


def test_what_a_table_does_not_allow_is_one_line_a_reason(whole):
    rows = {row["reason"]: row for row in whole.unavailable}
    recall = rows["no table of the scoring variant 'recall'"]
    assert recall["attacks"] == "recall, con_recall" and "students/gkd" in recall["models"]
    assert "students/kd" not in recall["models"].replace("swap_students/kd", "").split(", ")
    assert len(rows) <= 6 and all(set(row) == set(recall) for row in rows.values())
    # What has no teacher has no two-hop score, which needs no word; the null model takes the students'.
    assert "two_hop_slope" not in whole.plan["direct"] and not any("two_hop" in row["attacks"] for row in rows.values())
    assert "two_hop_slope" in whole.plan["null"]


def test_relations_come_from_provenance(whole):
    shelf = Shelf(whole, "private", None)
    beside = lambda run, given: shelf.beside((run, 0), "loss", given)
    assert beside("students/kd", "teacher") == ("teacher", 0)
    assert beside("students/kd", "base") == ("base_student", 0) == beside("students/kd", "start")
    assert beside("students/kd", "teacher_base") == ("base_teacher", 0)
    assert beside("swap_students/kd", "teacher") == ("swap", 0)
    assert beside("base_student", "base") is None and beside("teacher", "teacher") is None


def test_only_what_others_are_compared_with_stays_in_memory(whole):
    shelf = Shelf(whole, "private", None)
    for key in shelf.keys:
        shelf.tokens(key)
        shelf.put_back(key)
    kept = {run for (run, _), _, _ in shelf.held}
    assert kept == {"base_student", "base_teacher", "null", "teacher", "swap"}


def test_calibration_halves_change_sides_for_the_swap(whole):
    for run, member_coin in (("students/kd", 1), ("swap_students/kd", 0)):
        shelf = Shelf(whole, "private", None)
        halves = shelf._calib((run, 0))
        for name, coin in (("calib_members", member_coin), ("calib_nonmembers", 1 - member_coin)):
            assert set(whole.drawn_coins(halves[name].ids)) == {coin}


def test_a_planted_student_is_found_by_attacks_of_every_kind(whole):
    """Through files and all: recall hurts members, the student copies its teacher's shift, and so on."""
    for attack in ("loss", "recall", "wbc:base_student", "quantile", "trajectory_drop", "two_hop_product"):
        (pair,) = whole.pairs("students/kd", 0, attack, "private-heldout")
        assert pair.auc.value > 0.7, attack


def test_shots_missing_from_a_variant_of_the_calibration_records_are_left_out_of_its_scores(tmp_path):
    world = World(tmp_path, {"private": 30, "heldout": 30, "calib": 60})
    world.write("students/kd")
    world.write("students/kd", variant="recall")
    world.write_text()
    path = tmp_path / "students/kd/seed0/recall/calib-00000.parquet"
    pq.write_table(pq.read_table(path).slice(12), path)
    study = study_of(tmp_path, attacks=["loss", "recall"], references=[])
    assert len(study.scores["students/kd", 0, "recall", "calib"].ids) == 48
    assert len(study.scores["students/kd", 0, "loss", "calib"].ids) == 60
    # An evaluated role is never cut: that would drop records in silence.
    path = tmp_path / "students/kd/seed0/recall/private-00000.parquet"
    pq.write_table(pq.read_table(path).slice(12), path)
    study = study_of(tmp_path, attacks=["loss", "recall"], references=[])
    assert "not scored on the same examples" in study.missing["students/kd", 0, "recall", "private"]


def test_directories_of_variants_that_cannot_be_told_apart(tmp_path):
    world = World(tmp_path, {"private": 20})
    world.write("a")
    world.write("b", variant="recall")
    with pytest.raises(TableError, match="the variant recall of b/seed0, which has no plain table"):
        read_scores(tmp_path)
    world.write("b")
    assert len(read_scores(tmp_path)) == 2
    (tmp_path / "b/seed0/recall").rename(tmp_path / "b/seed0/again")
    world.write("b", variant="recall")
    with pytest.raises(TableError, match="second table of the variant recall"):
        read_scores(tmp_path)
    (tmp_path / "b/seed0/again/begun").touch()
    with pytest.raises(TableError, match="scoring is not finished"):
        read_scores(tmp_path)


def test_capped_terms_are_said(tmp_path):
    world = World(tmp_path, {"private": 20, "heldout": 20})
    world.write("students/kd")
    world.write_text()
    assert pd.read_parquet(tmp_path / "text/splits.parquet").shape[0] == 40
    (note,) = study_of(tmp_path, attacks=["dc_pdd"], references=[]).notes
    assert re.match(r"dc_pdd: \d+ % of a model's terms are at the cap of 0.01", note)  # one model, one number


def test_token_counts_of_another_tokenizer_cost_one_attack_and_no_audit(tmp_path):
    world = World(tmp_path, {"private": 20, "heldout": 20})
    world.write("students/kd")
    world.write_text()
    np.savez(tmp_path / "text/token_counts.npz", counts=np.arange(10))
    study = study_of(tmp_path, attacks=["loss", "dc_pdd"], references=[])
    assert "counts 10 ids, the tables have id" in study.missing["students/kd", 0, "dc_pdd", "private"]
    assert ("students/kd", 0, "loss", "private") in study.scores and not study.notes
