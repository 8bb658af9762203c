"""The whole audit on planted score tables: numbers, gates, refusals, and reasons for what is missing."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from planted_scores import FEW, QUICK, World, chain, leak, reasons, row, tables
from sklearn.metrics import roc_auc_score

from attacks import audit as audit_module
from attacks.audit import COLUMNS, OPTIONAL, audit
from attacks.gates import SEPARATED, SPLIT_LEAKS
from attacks.report import build
from attacks.utility import UNDERTRAINED

KD = {"headline_model": "students/kd"}
METRICS = ("auc", "balanced_accuracy", *(f"tpr_at_fpr_{f:g}" for f in (0.25, 0.05, 0.01, 0.001)))


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """One chain with one seed: (folder of scores, folder of results, tables, summary)."""
    folder = tmp_path_factory.mktemp("chain")
    chain(folder / "scores", members=260, nonmembers=240)
    summary = audit(folder / "scores", folder / "out", {"title": "planted", "attacks": FEW, **KD})
    return folder / "scores", folder / "out", tables(folder / "out"), summary


def copy(experiment, tmp_path: Path) -> Path:
    return Path(shutil.copytree(experiment[0], tmp_path / "scores"))


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_columns_and_files(experiment):
    _, out, found, summary = experiment
    for name, columns in COLUMNS.items():
        assert list(found[name].columns) == columns.split() and len(found[name])
    roc = pd.read_parquet(out / "roc.parquet")
    assert list(roc.columns) == ["model", "attack", "role_pair", "seed", "fpr", "tpr"]
    known = (
        "title headline sentence comparison worst verdicts ranking warnings not_tested unavailable unresolved "
        "runs unit data run_settings versions canaries ledger corrected tasks decisions groups near_duplicates exposure"
    )
    assert set(known.split()) <= set(summary)
    for name in ("attacks", "tasks", "decisions"):
        assert list(found[name].columns) == OPTIONAL[name].split() and len(found[name])
    assert summary == json.loads((out / "summary.json").read_text())
    assert "260," in (out / "membership.csv").read_text() and "260.0" not in (out / "membership.csv").read_text()


def test_auc_is_that_of_the_tables(experiment):
    scores, _, found, _ = experiment
    means, labels = [], []
    for role, label in (("private", 1), ("heldout", 0)):
        frame = pd.read_parquet(scores / "students/kd/seed0/plain" / f"{role}-00000.parquet")
        base = pd.read_parquet(scores / "base_student/seed0/plain" / f"{role}-00000.parquet")
        assert list(frame["example_id"]) == list(base["example_id"])
        means += [np.mean(a - b.astype(float)) for a, b in zip(frame["logp"], base["logp"], strict=True)]
        labels += [label] * len(frame)
    value = leak(found, "students/kd", "reference:base_student")
    assert value["value"] == pytest.approx(roc_auc_score(labels, means), abs=1e-12)
    assert value["ci_low"] < value["value"] < value["ci_high"] and value["ci_kind"] == "examples"
    assert (value["access"], value["n_members"], value["n_nonmembers"]) == ("logprobs+base-model", 260, 240)


def test_every_model_attack_and_pair_has_its_rows(experiment):
    _, _, found, _ = experiment
    whole = found["membership"].query("task == 'all' and role_pair == 'private-heldout'")
    assert whole.groupby(["model", "attack"]).size().eq(6).all()
    assert "reference:null" not in set(whole.query("model == 'null'")["attack"])
    assert set(whole.query("model == 'direct'")["attack"]) == {
        "loss",
        "zlib",
        "min_k",
        "min_k_plus_plus",
        "reference:base_student",
        "reference:base_teacher",
        "reference:null",
    }
    assert set(found["membership"]["task"]) >= {"all", "open_qa", "summary", "placement=teacher_only"}
    assert (found["membership"].query("metric != 'auc'")["task"] == "all").all()


def test_swap_is_the_mirror_and_the_average_is_the_mean(experiment):
    _, _, found, _ = experiment
    for attack in ("loss", "reference:null"):
        plain = leak(found, "students/kd", attack)
        swap = leak(found, "swap_students/kd", attack, "heldout-private")
        mean = leak(found, "students/kd", attack, "averaged")
        assert mean["value"] == pytest.approx((plain["value"] + swap["value"]) / 2)
        assert mean["ci_high"] - mean["ci_low"] < plain["ci_high"] - plain["ci_low"]
    assert leak(found, "swap")["value"] < 0.5 < leak(found, "swap", role_pair="heldout-private")["value"]
    assert leak(found, "teacher", role_pair="averaged")["value"] > 0.6
    rates = found["membership"].query("model == 'students/kd' and attack == 'loss' and metric == 'tpr_at_fpr_0.25'")
    by_pair = rates.set_index("role_pair")["value"]
    swap_rate = leak(found, "swap_students/kd", "loss", "heldout-private", "tpr_at_fpr_0.25")["value"]
    assert by_pair["averaged"] == pytest.approx((by_pair["private-heldout"] + swap_rate) / 2)


def test_differences_are_paired_and_corrected(experiment):
    _, _, found, _ = experiment
    d = found["differences"]
    pairs = set(zip(d["model_a"], d["model_b"], strict=True))
    assert {("students/kd", other) for other in ("null", "swap_students/kd", "teacher")} <= pairs
    assert ("students/gkd", "students/kd") in pairs
    one = row(d, model_a="students/kd", model_b="null", attack="loss", role_pair="private-heldout")
    assert one["difference"] == pytest.approx(leak(found, "students/kd")["value"] - leak(found, "null")["value"])
    unpaired = leak(found, "students/kd")["ci_high"] - leak(found, "students/kd")["ci_low"]
    assert one["ci_high"] - one["ci_low"] < unpaired / 2
    assert (d["p_corrected"] >= d["p_value"]).all() and (d["p_corrected"] > d["p_value"]).any()
    teacher = d[(d["model_b"] == "teacher") & (d["role_pair"] == "averaged")]
    assert len(teacher) and (teacher["difference"] < 0).all()


def test_too_few_non_members_is_said(experiment):
    _, _, found, summary = experiment
    assert np.isnan(leak(found, "students/kd", metric="tpr_at_fpr_0.001")["value"])
    assert leak(found, "students/kd", metric="tpr_at_fpr_0.01")["value"] >= 0
    at = {"role_pair": "private-heldout", "metric": "tpr_at_fpr_0.001"}
    (why,) = reasons(summary, model="students/kd", attack="loss", **at)
    assert why == "too few non-members: an FPR of 0.1 % needs 1000 or more, there are 240"
    assert any("0.1 %" in line for line in summary["not_tested"])
    assert any("no shadow chains of more than two teachers" in line for line in summary["not_tested"])
    empty = found["membership"]["value"].isna().sum() + found["differences"]["difference"].isna().sum()
    assert empty == sum(u["metric"] in METRICS for u in summary["unresolved"])


def test_equal_reasons_of_many_models_are_one_entry():
    rows = [
        {"model": run, "role": "canary", "task": "all", "measure": "extracted@k=10", "seed": seed, "reason": "short"}
        for run in ("teacher", "direct")
        for seed in (0, 1)
    ]
    rows += [{"model_a": "teacher", "model_b": "direct", "measure": "extracted", "seed": 0, "reason": "no seed"}]
    rows += [{"student": "students/kd", "model": "teacher", "measure": "entropy", "role": "heldout", "reason": "short"}]
    rows += [{"measure": "prediction", "reason": "no student"}, {"model": "null", "measure": "extracted", "value": 1}]
    folded, *single = audit_module._reasons(rows)
    assert folded == {
        "model": "teacher, direct", "seed": "0, 1", "attack": "all", "role_pair": "canary", "task": "all",
        "metric": "extracted@k=10", "reason": "short",
    }  # fmt: skip
    assert [each["model"] for each in single] == ["teacher", "students/kd", "all models"]
    assert [each["role_pair"] for each in single] == ["all", "heldout", "all"] and single[1]["seed"] == "all"


def test_headline_and_sentence(experiment):
    _, _, found, summary = experiment
    headline, kd = summary["headline"], leak(found, "students/kd")
    assert headline["refused"] is None and headline["value"] == kd["value"] and headline["model"] == "students/kd"
    said = summary["sentence"]
    assert f"in {100 * kd['value']:.1f} % [{100 * kd['ci_low']:.1f}, {100 * kd['ci_high']:.1f}]" in said
    assert "260 members, 240 non-members, one seed" in said and said.endswith("do not extrapolate.")
    for name, model in (("null", "null"), ("teacher", "teacher"), ("direct", "direct"), ("swap", "swap_students/kd")):
        assert summary["comparison"][name]["value"] == leak(found, model)["value"]
    assert 0.35 < summary["comparison"]["blind"]["value"] < 0.65
    students = found["membership"].query("model in ('students/kd', 'students/gkd') and metric == 'auc'")
    students = students.query("role_pair != 'canary_in-canary_out'")
    assert summary["worst"]["row"]["ci_low"] == students["ci_low"].max() and summary["worst"]["rows"] == len(students)


def test_one_seed_gives_no_ranking(experiment):
    summary = experiment[3]
    assert "One seed ranks nothing." in summary["verdicts"]
    assert [r["separated"] for r in summary["ranking"]] == [None]
    assert not any("leaks more than" in v for v in summary["verdicts"])
    assert any(w.startswith("One seed for") and "students/kd" in w for w in summary["warnings"])


def test_gates_are_calm_where_nothing_is_wrong(experiment):
    _, _, found, _ = experiment
    gates = found["gates"]
    known = {"blind", "blind:canary_in-canary_out", "near_duplicates", "null", "utility", "abstentions", "clamped"}
    assert set(gates["gate"]) >= known
    assert (gates["verdict"].str.startswith("ok")).all()
    assert set(gates.query("gate == 'null'")["model"]) == {"null", "base_student", "base_teacher"}
    dev = found["utility"].query("measure == 'dev_loss'").set_index("model")
    gap = row(gates, gate="utility", model="students/kd", metric="dev_loss_minus_base_student")
    assert gap["value"] == pytest.approx(dev.loc["students/kd", "value"] - dev.loc["base_student", "value"])
    assert gap["ci_high"] - gap["ci_low"] < dev.loc["students/kd", "ci_high"] - dev.loc["students/kd", "ci_low"]
    perplexity = found["utility"].query("measure == 'perplexity'").set_index("model")["value"]
    np.testing.assert_allclose(perplexity, np.exp(dev["value"]))


def test_dev_loss_is_the_mean_over_tokens(experiment):
    scores, _, found, _ = experiment
    frame = pd.read_parquet(scores / "teacher/seed0/plain/dev-00000.parquet")
    value = -np.concatenate(frame["logp"].to_list()).astype(float).mean()
    assert row(found["utility"], model="teacher", measure="dev_loss")["value"] == pytest.approx(value)


def test_same_tables_same_files_in_any_row_order(experiment, tmp_path):
    scores = copy(experiment, tmp_path)
    audit(scores, tmp_path / "one", QUICK | KD | {"attacks": FEW, "blind": False})
    for run in ("students/kd", "null"):
        for path in (scores / run / "seed0" / "plain").glob("*.parquet"):
            rows = pq.read_table(path)
            pq.write_table(rows.take(np.random.default_rng(0).permutation(len(rows))), path)
    audit(scores, tmp_path / "two", QUICK | KD | {"attacks": FEW, "blind": False})
    for name in COLUMNS:
        assert (tmp_path / "one" / f"{name}.csv").read_bytes() == (tmp_path / "two" / f"{name}.csv").read_bytes()


# --- written whole or not at all -------------------------------------------------------------------------------------


def at_call(number: int, operation, error: BaseException):
    """`operation`, which fails at its `number`-th call, counted from 1."""
    calls = iter(range(1, number))

    def call(*arguments, **keywords):
        if next(calls, None) is None:
            raise error
        return operation(*arguments, **keywords)

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def reported(experiment, tmp_path_factory):
    """A folder with the results of another audit and their page, and the settings of the audit that is to follow."""
    folder = Path(shutil.copytree(experiment[1], tmp_path_factory.mktemp("reported") / "out"))
    build(folder)
    return folder, QUICK | KD | {"title": "second", "attacks": ["loss"], "blind": False}


@pytest.mark.parametrize("number", [1, 2, 5, 8])
def test_an_audit_without_space_leaves_the_one_before(experiment, reported, tmp_path, monkeypatch, number):
    scores, (first, settings) = experiment[0], reported
    before = contents(out := Path(shutil.copytree(first, tmp_path / "out")))
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        patch.setattr(os, "fsync", at_call(number, os.fsync, full))
        with pytest.raises(OSError, match="No space left") as raised:
            audit(scores, out, settings)
    assert Path(raised.value.filename).parent == out and contents(out) == before, "and no half file"


@pytest.mark.parametrize("number", [1, 4])
def test_no_report_is_built_from_tables_of_two_audits(experiment, reported, tmp_path, monkeypatch, number):
    """Stopped before the first table takes its place, or between two."""
    scores, (first, settings) = experiment[0], reported
    shutil.copytree(first, out := tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", at_call(number, os.replace, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            audit(scores, out, settings)
    with pytest.raises(FileNotFoundError, match=r"out/summary\.json is missing; run the attack stage first"):
        build(out)
    assert not list(out.glob(".*"))
    audit(scores, out, settings)
    audit(scores, tmp_path / "new", settings)
    tables = contents(tmp_path / "new")
    assert {name: contents(out).get(name) for name in tables} == tables
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "new").iterdir()} == {0o600}


# --- several seeds ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    chain(folder / "scores", members=150, nonmembers=150, student_seeds=(0, 1, 2))
    summary = audit(folder / "scores", folder / "out", QUICK | KD | {"attacks": FEW})
    return tables(folder / "out"), summary


def test_seeds_are_pooled_and_ranked(seeded):
    found, summary = seeded
    each = [leak(found, "students/kd", seed=s)["value"] for s in "012"]
    pooled = leak(found, "students/kd", seed="all")
    assert pooled["value"] == pytest.approx(np.mean(each)) and pooled["ci_kind"] == "both"
    assert leak(found, "students/kd", role_pair="averaged", seed="all")["ci_kind"] == "both"
    assert summary["headline"]["seed"] == "all" and "3 seeds" in summary["sentence"]
    assert "students/kd leaks more than students/gkd" in " ".join(summary["verdicts"])
    gap = row(
        found["differences"],
        model_a="students/gkd",
        model_b="students/kd",
        attack="loss",
        seed="all",
        role_pair="private-heldout",
    )
    assert gap["ci_high"] < 0 and gap["ci_kind"] == "both"
    assert set(found["membership"].query("model == 'teacher'")["seed"]) == {"0"}
    assert {"0", "1", "2", "all"} == set(found["utility"].query("model == 'students/kd'")["seed"])


def test_what_needs_seeds_or_tasks_says_so(experiment, seeded):
    """One seed: no flips; tasks switched off: no table of an earlier audit; several seeds: flips of every student."""
    _, out, found, summary = experiment
    assert summary["decisions"]["words"] == ["Flip rate between training seeds: not applicable, one seed."]
    assert summary["tasks"]["applicable"] and summary["tasks"]["words"] in summary["verdicts"]
    whole, pooled = seeded
    assert "tasks" not in whole and "not applicable" in pooled["tasks"]["words"]
    assert {row["measure"] for row in pooled["decisions"]["flips"]} == {"flip_rate", "flagged_always", "flagged_never"}
    assert any("attacks" in said and "is the strongest" in said for said in pooled["corrected"]["words"])
    assert (found["attacks"].query("attack == 'loss' and rule != 'maximum'")["rule"] == "primary").all()


def test_spread_over_seeds_widens_the_interval(tmp_path):
    world = World(tmp_path / "scores", {"private": 150, "heldout": 150})
    for k, nats in enumerate((0.0, 0.6, 1.2)):
        world.write("student", {"private": nats}, seed=k)
    audit(tmp_path / "scores", tmp_path / "out", QUICK)
    found = tables(tmp_path / "out")
    width = lambda r: r["ci_high"] - r["ci_low"]
    assert width(leak(found, "student", seed="all")) > 1.5 * width(leak(found, "student", seed="1"))


# --- gates that fire, and refusals ------------------------------------------------------------------------------------


def test_blind_gate_refuses_the_headline(experiment, tmp_path):
    scores = copy(experiment, tmp_path)
    path = scores / "text" / "private.parquet"
    text = pd.read_parquet(path)
    text["response_ids"] = [np.append(r, [5, 6, 5]) for r in text["response_ids"]]
    text.to_parquet(path)
    summary = audit(scores, tmp_path / "out", QUICK | KD | {"attacks": ["loss"]})
    assert "text alone tells members from non-members" in summary["headline"]["refused"]
    assert summary["sentence"].startswith("No headline number") and "Beyond the text" in summary["sentence"]
    gates = tables(tmp_path / "out")["gates"]
    best = row(gates, gate="blind", model="maximum")
    assert best["verdict"] == SEPARATED and best["ci_low"] > 0.5
    excess = row(gates, gate="blind", model="students/kd", metric="auc_minus_blind")
    assert excess["value"] == pytest.approx(summary["headline"]["value"] - best["value"]) and excess["ci_high"] < 0


@pytest.mark.parametrize("lost", ["private.parquet", "token_counts.npz"])
def test_no_headline_without_text_tables(experiment, tmp_path, lost):
    scores = copy(experiment, tmp_path)
    (scores / "text" / lost).unlink()
    splits = scores / "text" / "splits.parquet"  # there were public records: their counts are lost
    frame = pd.read_parquet(splits)
    pd.concat([frame, frame.iloc[:1].assign(example_id="public-0", role="public")]).to_parquet(splits, index=False)
    summary = audit(scores, tmp_path / "out", QUICK | KD | {"attacks": ["loss"]})
    assert f"not beside the score tables: text/{lost}" in summary["headline"]["refused"]
    found = tables(tmp_path / "out")
    assert row(found["gates"], gate="blind", model="maximum")["verdict"] == "not run"
    assert leak(found, "students/kd")["value"] > 0.5  # the tables are still written


def test_text_of_another_split_is_not_used(experiment, tmp_path):
    scores = copy(experiment, tmp_path)
    path = scores / "text" / "heldout.parquet"
    pd.read_parquet(path).iloc[7:].to_parquet(path)
    summary = audit(scores, tmp_path / "out", QUICK | {"attacks": ["loss"]})
    assert "the text tables lack 7 of the 500 evaluated records" in summary["headline"]["refused"]


def test_null_gate_fires_when_the_split_leaks(tmp_path):
    world = World(tmp_path / "scores", {"private": 200, "heldout": 200})
    for run in ("base_student", "null", "students/kd"):
        world.write(run, {"private": 0.8}, train_roles=["public"])  # easier text, not memory
    summary = audit(tmp_path / "scores", tmp_path / "out", QUICK)
    gates = tables(tmp_path / "out")["gates"].query("gate == 'null'").set_index(["model", "metric"])["verdict"]
    assert gates["null", "auc:loss"] == SPLIT_LEAKS
    assert any(v.startswith("Null gate: base_student, null") for v in summary["verdicts"])


def test_a_null_that_saw_the_members_is_no_null(tmp_path):
    world = World(tmp_path / "scores", {"private": 50, "heldout": 50})
    world.write("null", {"private": 2.0}, train_roles=["private"])
    world.write("students/kd")
    audit(tmp_path / "scores", tmp_path / "out", QUICK)
    assert list(tables(tmp_path / "out")["gates"].query("gate == 'null'")["verdict"]) == ["not run"]


def test_undertrained_student_is_marked(tmp_path):
    world = World(tmp_path / "scores", {"private": 100, "heldout": 100, "dev": 100})
    world.write("base_student")
    world.write("null", gain=0.4)
    world.write("students/kd", gain=0.3)
    world.write("students/minillm", gain=-0.01)
    world.write_text()
    summary = audit(tmp_path / "scores", tmp_path / "out", QUICK | {"headline_model": "students/minillm"})
    gates = tables(tmp_path / "out")["gates"].query("gate == 'utility'").set_index(["model", "metric"])["verdict"]
    assert gates["students/minillm", "dev_loss_minus_base_student"] == UNDERTRAINED
    assert gates["students/kd", "dev_loss_minus_base_student"] == "ok"
    assert gates["students/kd", "dev_loss_minus_null"] == "ok: no better than null"
    assert f"students/minillm: {UNDERTRAINED}." in summary["verdicts"] and UNDERTRAINED in summary["sentence"]


def test_reading_of_no_leak_and_of_an_auc_far_below_half(tmp_path):
    world = World(tmp_path / "scores", {"private": 100, "heldout": 100})
    world.write("students/kd")
    world.write("students/gkd", {"private": -1.5})
    said = " ".join(audit(tmp_path / "scores", tmp_path / "out", QUICK)["verdicts"])
    assert "students/kd: no evidence of a leak" in said and "does not make it private" in said
    assert "students/gkd: loss lies below 0.5" in said
    assert leak(tables(tmp_path / "out"), "students/gkd")["value"] < 0.3


# --- settings and command line -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings,words",
    [
        ({"primry": "loss"}, "unknown audit settings primry"),
        ({"attacks": ["los"]}, "unknown attack 'los'"),
        ({"headline_model": "students/x"}, "no score table of the headline model students/x"),
        ({"role_pair": "dev-heldout"}, "role_pair 'dev-heldout'"),
        ({"primary": "wbc"}, "attack.primary wbc needs a reference: wbc:base_student"),
    ],
)
def test_settings_that_do_not_exist(experiment, tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        audit(experiment[0], tmp_path, settings)


def test_references_that_were_not_scored_are_named(experiment, tmp_path):
    settings = {"references": ["null", "base_x"], "blind": False, "attacks": ["reference"]}
    summary = audit(experiment[0], tmp_path, QUICK | settings)
    assert any("not used: base_x" in w for w in summary["warnings"])
    assert {a for a in tables(tmp_path)["membership"]["attack"] if ":" in a} == {"reference:null"}
    assert summary["headline"]["refused"] == "the blind gate was not run: it was switched off in the settings"


def test_headline_of_the_counterfactual_with_another_attack(experiment, tmp_path):
    settings = QUICK | KD | {"role_pair": "averaged", "primary": "min_k@k=0.4", "attacks": ["loss", "min_k@k=0.4"]}
    summary = audit(experiment[0], tmp_path, settings)
    found = tables(tmp_path)
    assert summary["headline"]["value"] == leak(found, "students/kd", "min_k@k=0.4", "averaged")["value"]
    assert set(found["membership"]["attack"]) == {"loss", "min_k@k=0.4"}


def test_command_line(experiment, tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps(QUICK | {"attacks": ["loss"]}))
    root = Path(audit_module.__file__).parents[1]
    command = [
        sys.executable,
        "-m",
        "attacks",
        str(experiment[0]),
        f"--out={tmp_path / 'out'}",
        f"--settings={tmp_path / 'settings.json'}",
        "--headline-model=students/kd",
    ]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "An attacker who holds only the student" in done.stdout and (tmp_path / "out" / "summary.json").exists()
    failed = subprocess.run([*command[:3], str(tmp_path / "none"), "--out=x"], cwd=root, capture_output=True, text=True)
    assert failed.returncode == 2 and "no score tables" in failed.stderr and "Traceback" not in failed.stderr
