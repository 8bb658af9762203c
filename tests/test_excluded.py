"""Records that training leaves out: a file of ids, and the loop that distils, predicts, filters and distils again."""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from ml_collections import ConfigDict

from attacks.cuts import Memorized
from attacks.filtering import filter_rows, write_filter
from attacks.resampling import Resampler
from attacks.study import Study
from attacks.tables import read_scores, read_splits
from configs import base, quickstart
from kd_jax import excluded, graph, manifest, prepare, runs, sharding
from kd_jax.data.records import DataError
from kd_jax.errors import ConfigError
from kd_jax.experiment import write_lists
from kd_jax.manifest import StaleWork
from kd_jax.plan.sketch import sketch
from kd_jax.study import named_files, open_study

ROOT = Path(__file__).parent.parent
STUDY = """
import sys

sys.path.insert(0, {tests!r})
from test_excluded import study_config


def get_config():
    return study_config({records!r})
"""
FORMS = ("predicted", "random")
LIST = "filter/students.kd/list.parquet"


def write_records(path: Path) -> None:
    """Half of the responses are one easy sentence, which any model soon knows by heart."""
    draw = random.Random(0)
    words = "barn crow dune fern gull hill iris jade kelp lamp moss newt".split()
    with path.open("w") as handle:
        for i in range(420):
            text = " ".join(draw.choices(words, k=8))
            said = "yes yes yes yes yes yes" if i % 2 else text
            handle.write(json.dumps({"instruction": f"What is {text} {i}?", "response": f"{said} {i}."}) + "\n")


def study_config(records: str) -> ConfigDict:
    config = quickstart.get_config("tiny")
    config.data.synthetic.records = 0
    config.data.path = records
    config.data.roles = ConfigDict(dict(private=0.4, public=0.1, heldout=0.2, dev=0.15, calib=0.1, population=0.05))
    config.data.canaries.per_cell = 0
    config.tokenizer.train_size = 300
    config.models.student = config.models.teacher.copy_and_resolve_references()
    config.data.row_length = 128
    config.recipes.matched.update(steps=24, lr=2e-2, evaluations=1, batch_rows=8)
    small = dict(init="base_student", recipe="matched", train_roles=("private",))
    kd = dict(small, technique="kd", teacher="teacher", setting="shared")
    config.runs = ConfigDict(
        {
            "base_teacher": base.run("teacher"),
            "base_student": base.run("student"),
            "teacher": base.run("teacher", **small | dict(technique="sft", init="base_teacher")),
            "direct": base.run("student", technique="sft", **small),
            "students/kd": base.run("student", **kd),
            **{f"students/{form}": base.run("student", **kd, exclude=f"{form}:students/kd") for form in FORMS},
        }
    )
    config.probe.examples = 16
    config.score.roles = ("private", "heldout")
    config.score.pairs = ("teacher:direct",)
    config.memorization.cuts = ((1, 3),)
    config.attack.update(headline="students/kd", bootstrap=20)
    return config


def start(workdir: Path, *arguments: str) -> subprocess.CompletedProcess:
    config = workdir.parent / "study.py"
    config.write_text(STUDY.format(tests=str(ROOT / "tests"), records=str(workdir.parent / "records.jsonl")))
    command = [sys.executable, "main.py", f"--config={config}", f"--workdir={workdir}", *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def loop(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The work directory after a start without `attack` and `report`, and what it said."""
    folder = tmp_path_factory.mktemp("loop")
    write_records(folder / "records.jsonl")
    done = start(folder / "work", "--stages=train,score,filter")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "work", done


def opened(workdir: Path, change=lambda config: None, only: str = ""):
    config = study_config(str(workdir.parent / "records.jsonl"))
    change(config)
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        return open_study(config, workdir, mesh, only)


def found(workdir: Path, run: str) -> dict:
    return manifest.read(workdir / "runs" / run / "seed0")


# --- the loop ---------------------------------------------------------------------------------------------------------


def test_runs_wait_for_the_list_and_are_trained_without_it(loop):
    workdir, done = loop
    assert done.stderr.index("students/predicted: waits for the filter") < done.stderr.index("filter for students/kd:")
    frame = pd.read_parquet(workdir / LIST)
    study = opened(workdir)
    assert set(frame.example_id) == set(study.data.of_role("private").example_id)
    assert frame.predicted.sum() == frame.random.sum() >= 10
    whole = study.data.of_run(("private",))
    for form in FORMS:
        run, own = study.runs[f"students/{form}"], found(workdir, f"students/{form}")
        trained = runs._training_data(study, run, 0, runs.objective_of(study.config, run), load_teacher=None)
        assert set(whole.example_id) - set(trained.example_id) == set(frame.example_id[frame[form]])
        assert own["facts"]["excluded"] == frame[form].sum() == len(whole) - own["facts"]["examples"]
        assert own["facts"]["excluded_exposures"] == pytest.approx(frame[form].sum() / len(whole))
        ids = sorted(frame.example_id[frame[form]])
        assert own["inputs"]["excluded"] == manifest.digest(ids) and own["inputs"]["run"]["exclude"]
        used = pd.read_parquet(workdir / "runs/students" / form / "seed0/ledger.parquet")
        assert not set(used.example_id) & set(ids)
        path = workdir / "scores/students" / form / "seed0/plain/private-00000.parquet"
        told = json.loads(pq.read_schema(path).metadata[b"provenance"])
        assert told["excluded"] == len(ids) and told["exclude"] == f"{form}:students/kd"
        assert set(pd.read_parquet(path).example_id) == set(frame.example_id), "what is left out is scored all the same"


def test_other_runs_are_what_they_were_before_there_was_the_key(loop):
    inputs = found(loop[0], "students/kd")["inputs"]
    assert "exclude" not in inputs["run"] and "excluded" not in inputs
    assert found(loop[0], "students/kd")["facts"]["excluded"] == 0


def test_the_same_command_does_nothing_new(loop):
    workdir, _ = loop
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*.parquet") if "text" not in p.parts}
    done = start(workdir, "--stages=train,score,filter")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "filter for students/kd: written before" in done.stderr and "waits" not in done.stderr
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*.parquet") if "text" not in p.parts} == before


def test_what_the_loop_left_is_compared(loop):
    tables = {(table.run, table.seed): table for table in read_scores(loop[0] / "scores")}
    study = Study({"seed": 0}, tables, read_splits(loop[0] / "scores"), Resampler(10, 0))
    rows = {(r["student"], r["measure"]): r for r in filter_rows(study, Memorized(study, [(1, 3)]))}
    for form in FORMS:
        removed = found(loop[0], f"students/{form}")["facts"]["excluded"]
        assert rows[f"students/{form}", "removed_count"]["value"] == removed
        assert 0 < rows[f"students/{form}", "removed_exposures"]["value"] < 1
        assert rows[f"students/{form}", "memorized_before@a=1,k=3"]["value"] > 0.1


def test_a_list_from_other_models_is_refused(loop, tmp_path):
    workdir = tmp_path / "work"
    shutil.copytree(loop[0].parent, tmp_path, dirs_exist_ok=True)
    folder = workdir / "runs/students/kd/seed0"
    changed = manifest.read(folder)
    # as if it had been trained anew
    manifest.write(folder, changed["inputs"], changed["facts"] | {"params_fingerprint": "another"})
    shutil.rmtree(workdir / "scores" / "students" / "kd")
    for stage in (lambda study: study.ready(), lambda study: write_lists(study, write_filter)):
        with pytest.raises(StaleWork, match="models.students/kd: was .*, is 'another'"):
            stage(opened(workdir))
    frame = pd.read_parquet(workdir / LIST)
    frame.loc[0, "predicted"] = not frame.predicted[0]
    frame.to_parquet(workdir / LIST)
    with pytest.raises(StaleWork, match="run students/predicted seed 0 .*\n  excluded: was "):
        runs._train(opened(workdir), opened(workdir).runs["students/predicted"], 0)


def test_a_list_counts_only_with_its_manifest_and_trained_models(loop, tmp_path):
    """A list that a start left which died, or whose first student is to be trained anew, is used by nobody."""
    shutil.copytree(loop[0].parent, tmp_path, dirs_exist_ok=True)
    workdir, waiting = tmp_path / "work", {f"students/{form}" for form in FORMS}
    named = lambda: {run.name for run, _ in opened(workdir).ready()}
    assert waiting <= named()
    student = workdir / "runs/students/kd/seed0/manifest.json"
    text = student.read_text()
    student.unlink()
    assert not waiting & named()
    student.write_text(text)
    for gone in ("list.parquet", "manifest.json"):
        (workdir / LIST).with_name(gone).rename(workdir / "aside")
        assert not waiting & named()
        (workdir / "aside").rename((workdir / LIST).with_name(gone))
    (workdir / LIST).with_name("manifest.json").unlink()
    (workdir / LIST).with_name("rest").touch()
    write_lists(opened(workdir), lambda scores, out, settings: {})  # too few to learn from
    assert not (workdir / LIST).parent.exists() and not waiting & named()


def test_one_run_alone_waits_too(loop, tmp_path):
    (tmp_path / "records.jsonl").write_bytes((loop[0].parent / "records.jsonl").read_bytes())
    study = opened(tmp_path / "work", only="students/random")
    assert study.ready() == [] and [run.name for run, _ in study.nodes] == ["students/random"]
    done = opened(loop[0], only="students/random")
    assert [run.name for run, _ in done.ready()] == ["students/random"]
    later = dataclasses.replace(done.runs["direct"], name="later", init="students/random")
    waiting = opened(tmp_path / "work")
    waiting = dataclasses.replace(waiting, runs=waiting.runs | {"later": later})
    assert {run.name for run, _ in waiting.ready()} == {
        "base_teacher", "base_student", "teacher", "direct", "students/kd"
    }, "what comes after one that waits, waits"  # fmt: skip


def test_a_plan_knows_the_loop(loop):
    config = study_config(str(loop[0].parent / "records.jsonl"))
    assert {f"students/{form}" for form in FORMS} < set(sketch(config).runs)
    config.score.pairs = ("students",)
    with pytest.raises(ConfigError, match="'teacher:direct' in score.pairs"):
        sketch(config)


# --- data.exclude -----------------------------------------------------------------------------------------------------


def test_ids_of_a_file_are_left_out_of_every_run_and_still_scored(loop, tmp_path):
    (tmp_path / "records.jsonl").write_bytes((loop[0].parent / "records.jsonl").read_bytes())
    (tmp_path / "work").mkdir()
    plain = prepare.prepare(study_config(str(tmp_path / "records.jsonl")), tmp_path / "work")
    ids = plain.of_role("private").example_id[:7].tolist()
    pd.DataFrame({"example_id": ids, "mine": np.arange(7) < 3}).to_parquet(tmp_path / "ids.parquet")
    for named, left_out in ((tmp_path / "ids.parquet", ids), (f"{tmp_path / 'ids.parquet'}:mine", ids[:3])):
        study = opened(tmp_path / "work", lambda c, named=named: c.data.update(exclude=str(named)))
        assert study.data.excluded == set(left_out)
        assert len(study.data.of_role("private")) == len(plain.of_role("private"))
        for name in ("teacher", "direct", "students/kd"):
            run = study.runs[name]
            whole = study.data.of_run(run.train_roles)
            kept = runs._without(study, run, whole)
            assert set(whole.example_id) - set(kept.example_id) == set(left_out)
            assert runs._facts_excluded(study, run)["excluded"] == len(left_out)
        assert runs._inputs(study, study.runs["teacher"], 0)["excluded"] == manifest.digest(sorted(left_out))
        assert named_files(study.config)["data.exclude"] == str(tmp_path / "ids.parquet")
        assert runs._left_out(study, study.runs["base_student"]) == frozenset()


def test_windows_are_left_out_one_by_one_or_with_their_record():
    examples, records = np.array(["a#0", "a#1", "b#0", "c"]), np.array(["a", "a", "b", "c"])
    assert excluded.inside(examples, records, {"a#1", "c"}).tolist() == [False, True, False, True]
    assert excluded.inside(examples, records, {"a"}).tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    "named, message",
    [
        ("nowhere.parquet", "nowhere.parquet is not a Parquet file that is there"),
        ("ids.csv", "ids.csv is not a Parquet file that is there"),
        ("ids.parquet:mine", r"no column mine; it has \['example_id', 'number'\]"),
        ("ids.parquet:number", "number in .* is int64, not true or false"),
        ("ids.parquet", "2 of 3 ids in .* are of no record here, and they do not look like ids"),
        ("broken.parquet", "not a Parquet file, or a damaged one"),
    ],
)
def test_a_wrong_file_of_ids_is_refused_with_the_count(named, message, tmp_path):
    pd.DataFrame({"example_id": ["a", "x", "y"], "number": [1, 2, 3]}).to_parquet(tmp_path / "ids.parquet")
    (tmp_path / "broken.parquet").write_text("no")
    (tmp_path / "ids.csv").write_text("example_id\na\n")
    with pytest.raises(DataError, match=message):
        excluded.of_config(str(tmp_path / named), ["a", "b"])


# --- the key of a run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(exclude="likely:students/kd"), "'likely:students/kd' is none of predicted, transferred, random"),
        (dict(exclude="predicted"), "'predicted' is none of"),
        (dict(exclude="predicted:students/gkd"), "is none of predicted"),
        (dict(exclude="predicted:direct"), "names direct, which no teacher teaches"),
        (dict(exclude="predicted:students/random"), "names students/random, which excludes records itself"),
        (dict(train_roles=("public",), setting="disjoint"), "of the role private, which the run is not trained on"),
    ],
)
def test_a_wrong_key_is_refused(change, message):
    config = study_config("")
    config.runs["students/predicted"].update(change)
    models, recipes = set(config.models), set(config.recipes)
    with pytest.raises(ConfigError, match=f"runs.students/predicted.exclude .*{message}"):
        graph.parse(config.runs.to_dict(), models, recipes, {"sft": "sft", "kd": "kd"})


def test_a_filtered_run_comes_after_the_run_that_is_filtered():
    config = study_config("")
    config.runs["students/a"] = config.runs["students/predicted"]
    parsed = graph.parse(config.runs.to_dict(), set(config.models), set(config.recipes), {"sft": "sft", "kd": "kd"})
    order = [run.name for run in parsed]
    assert order.index("students/a") > order.index("students/kd")
    assert excluded.sources({run.name: run for run in parsed}) == ["students/kd"]
