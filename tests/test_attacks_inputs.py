"""Score tables that cannot be used, or not for everything: what the audit says instead of a number."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from planted_scores import QUICK, World, leak, reasons, row, tables

from attacks.audit import audit
from attacks.tables import TableError


@pytest.mark.parametrize(
    "told,words",
    [
        ({"dtype": "bfloat16"}, "different precisions"),
        ({"matmul_precision": "default"}, "different precisions"),
        ({"tokenizer_fingerprint": "other"}, "different tokenizers"),
    ],
)
def test_references_of_another_kind_are_not_subtracted(tmp_path, told, words):
    """Token by token; a mean over texts may be compared across tokenizers, and is then flagged."""
    world = World(tmp_path / "scores", {"private": 40, "heldout": 40})
    world.write("base_student", **told)
    world.write("students/kd")
    summary = audit(tmp_path / "scores", tmp_path / "out", QUICK | {"attacks": ["loss", "reference", "wbc"]})
    found, crossed = tables(tmp_path / "out"), "tokenizer_fingerprint" in told
    for attack in ("wbc:base_student", *([] if crossed else ["reference:base_student"])):
        (why,) = reasons(summary, model="students/kd", attack=attack, metric="auc")
        assert words in why and "not subtracted" in why
        assert np.isnan(leak(found, "students/kd", attack)["value"])
    assert np.isfinite(leak(found, "students/kd")["value"])
    assert np.isfinite(leak(found, "students/kd", "reference:base_student")["value"]) == crossed
    assert any("cross_tokenizer: students/kd and base_student" in w for w in summary["warnings"]) == crossed


def edited(world: World, run: str, role: str, column: str, change) -> None:
    """Rewrite one list column of a table that `write` left."""
    path = world.folder / run / "seed0" / "plain" / f"{role}-00000.parquet"
    rows = pq.read_table(path)
    lists = [change(i, values) for i, values in enumerate(rows[column].to_pylist())]
    typed = pa.array(lists, rows[column].type)
    pq.write_table(rows.set_column(rows.column_names.index(column), column, typed), path)


def test_scores_that_are_not_numbers_are_counted(tmp_path):
    world = World(tmp_path / "scores", {"private": 40, "heldout": 40})
    world.write("students/kd")
    edited(world, "students/kd", "private", "logp", lambda i, v: [float("nan"), *v[1:]] if i < 3 else v)
    summary = audit(tmp_path / "scores", tmp_path / "out", QUICK)
    (why,) = reasons(summary, attack="loss", metric="auc", role_pair="private-heldout")
    assert "3 of 40 members and 0 of 40 non-members have a score that is not a number" in why
    assert summary["headline"]["value"] is None


def test_empty_responses_are_least_member_like_and_counted(tmp_path):
    world = World(tmp_path / "scores", {"private": 40, "heldout": 40})
    world.write("students/kd", {"private": 3.0})
    before = audit(tmp_path / "scores", tmp_path / "out", QUICK)["headline"]["value"]
    edited(world, "students/kd", "private", "segment", lambda i, v: [2] * len(v) if i < 5 else v)
    after = audit(tmp_path / "scores", tmp_path / "out", QUICK)["headline"]["value"]
    # 5 of 40 members now tie with the lowest score, which one non-member (if any) has.
    assert before == 1 and after == pytest.approx(35 / 40, abs=5 / 40 / 40)
    gates = tables(tmp_path / "out")["gates"].query("gate == 'abstentions'")
    counted = row(gates, model="students/kd", metric="loss:members")
    assert (counted["value"], counted["n"]) == (5, 40) and "loss:nonmembers" not in set(gates["metric"])


def test_a_missing_field_stops_its_attack_only(tmp_path):
    world = World(tmp_path / "scores", {"private": 40, "heldout": 40})
    for role in ("private", "heldout"):
        world.save(world.table(role, 0, 0.3).drop_columns(["logp_std"]), "students/kd", role)
    summary = audit(tmp_path / "scores", tmp_path / "out", QUICK)
    (why,) = summary["unavailable"]
    assert why["reason"] == "min_k_plus_plus needs logp_std, which the score table does not have"
    assert (why["models"], why["attacks"]) == ("all models", "min_k_plus_plus")
    assert np.isfinite(leak(tables(tmp_path / "out"), "students/kd")["value"])


@pytest.mark.parametrize("n,words", [(0, "was not scored on role 'heldout'"), (1, "40 members and 1 non-members")])
def test_splits_of_one_class(tmp_path, n, words):
    world = World(tmp_path / "scores", {"private": 40, **({"heldout": n} if n else {})})
    world.write("students/kd")
    summary = audit(tmp_path / "scores", tmp_path / "out", QUICK)
    (why,) = reasons(summary, attack="loss", metric="auc")
    assert words in why and summary["headline"]["value"] is None and summary["headline"]["refused"]


def test_ids_in_both_classes_are_an_error(tmp_path):
    world = World(tmp_path / "scores", {"private": 40, "heldout": 40})
    world.roles["heldout"]["ids"][:2] = world.roles["private"]["ids"][:2]
    world.write("students/kd")
    with pytest.raises(TableError, match="2 examples are members and non-members"):
        audit(tmp_path / "scores", tmp_path / "out", QUICK)


def test_canaries_and_calibration_need_their_coins(tmp_path):
    world = World(tmp_path / "scores", {"private": 40, "heldout": 40, "calib": 40, "canary": 40})
    world.write("students/kd")
    for splits, words in ((False, "the coins are not known"), (True, "does not list all scored records")):
        if splits:
            world.write_text(roles=["private", "heldout"])
        summary = audit(tmp_path / "scores", tmp_path / "out", QUICK)
        (why,) = reasons(summary, attack="loss", role_pair="canary_in-canary_out", metric="auc")
        assert words in why
        (why,) = reasons(summary, attack="loss", role_pair="private-heldout", metric="balanced_accuracy")
        assert words in why
        assert np.isfinite(leak(tables(tmp_path / "out"), "students/kd")["value"])


def test_foreign_checkpoints_without_metadata(tmp_path):
    world = World(tmp_path / "scores", {"private": 60, "heldout": 60})
    world.write("student", {"private": 0.5})
    world.write("teacher", {"private": 1.0})
    world.write("reference")
    world.write_text()
    for path in tmp_path.glob("scores/*/seed0/plain/*.parquet"):
        pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
    summary = audit(tmp_path / "scores", tmp_path / "out", QUICK)
    found = tables(tmp_path / "out")
    assert summary["headline"]["model"] == "student" and summary["headline"]["refused"] is None
    assert leak(found, "student", "reference:reference")["value"] > 0.8
    assert len([w for w in summary["warnings"] if "no metadata" in w]) == 3
    assert "without a teacher not measured" in summary["sentence"]
    assert {u["attack"] for u in summary["unresolved"]} >= {"loss"}


def test_not_numbers_in_a_reference_are_errors_of_what_uses_it(tmp_path):
    world = World(tmp_path / "scores", {"private": 40, "heldout": 40})
    world.write("students/kd")
    world.write("base_student")
    edited(world, "base_student", "heldout", "logp", lambda i, v: [*v[:-1], float("nan")] if i < 2 else v)
    summary = audit(tmp_path / "scores", tmp_path / "out", QUICK)
    (why,) = reasons(summary, model="students/kd", attack="reference:base_student", metric="auc")
    assert "0 of 40 members and 2 of 40 non-members have a score that is not a number" in why
    assert np.isfinite(leak(tables(tmp_path / "out"), "students/kd")["value"])


def test_responses_of_three_tokens_are_scored_by_every_attack(tmp_path):
    """Or counted as abstentions: the error zone needs two wrong tokens."""
    world = World(tmp_path / "scores", {"private": 40, "heldout": 40, "calib": 60}, mean_length=3)
    world.write("base_student")
    for variant in ("plain", "recall", "recall_members", "lowercase"):
        world.write("students/kd", variant=variant)
    world.write_text()
    settings = {"bootstrap": 50, "tasks": False, "headline_model": "students/kd"}
    summary = audit(tmp_path / "scores", tmp_path / "out", settings)
    found = tables(tmp_path / "out")
    aucs = found["membership"].query("model == 'students/kd' and metric == 'auc'")
    assert len(aucs) > 25 and np.isfinite(aucs["value"]).all()
    counted = found["gates"].query("gate == 'abstentions' and model == 'students/kd'")
    assert {"ez:base_student:members", "ez:base_student:nonmembers"} <= set(counted["metric"])
    assert 3 < len(summary["unavailable"]) < 12  # one line a reason


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda t: t.drop_columns(["task"]), "no column task"),
        (lambda t: pa.concat_tables([t, t.slice(3, 2)]), "2 duplicate example ids"),
        (lambda t: t.set_column(0, "example_id", pa.array(["same"] * len(t))), "39 duplicate example ids"),
    ],
)
def test_tables_that_cannot_be_read_stop_the_audit(tmp_path, change, words):
    world = World(tmp_path / "scores", {"private": 40, "heldout": 40})
    world.write("students/kd", roles=["heldout"])
    world.save(change(world.table("private", 0, 0.3)), "students/kd", "private")
    with pytest.raises(TableError, match=words):
        audit(tmp_path / "scores", tmp_path / "out", QUICK)
