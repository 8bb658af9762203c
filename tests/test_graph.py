"""The graph of runs and the manifests that let a start skip, resume or refuse."""

import pytest

from configs import base
from kd_jax import graph, manifest
from kd_jax.errors import ConfigError

CONFIG = {"teacher", "student"}, {"matched"}, {"sft": "sft", "kd": "kd", "cui": "kd"}


def standard(**changes) -> dict:
    runs = base.standard_runs().to_dict()
    for name, entry in changes.items():
        runs[name] = {**runs.get(name, {}), **entry}
    return runs


def test_every_run_comes_after_what_it_needs_and_the_first_verdict_first():
    order = [r.name for r in graph.parse(standard(), *CONFIG)]
    assert order[:4] == ["base_teacher", "base_student", "teacher", "null"]
    assert order.index("swap") < order.index("swap_students/kd") and set(order) == set(standard())


def test_seeds_of_a_dependency():
    runs = {r.name: r for r in graph.parse(standard(**{"students/kd": {"seeds": (0, 1, 2)}}), *CONFIG)}
    assert runs["teacher"].seed_for(2) == 0 and runs["students/kd"].seed_for(2) == 2


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"null": {"model": "tiny"}}, "runs.null: model 'tiny' is not one of"),
        ({"null": {"technique": "dpo"}}, "technique 'dpo' is not one of"),
        ({"students/kd": {"teacher": "professor"}}, "runs.students/kd.teacher names 'professor', which is not a run"),
        ({"students/kd": {"teacher": ""}}, "a distilled run has a teacher"),
        ({"null": {"teacher": "teacher"}}, "a distilled run has a teacher, and no other run"),
        ({"students/kd": {"objective": "best"}}, "objective 'best' is not one of"),
        ({"null": {"objective": "cui"}}, "objective 'cui' is of technique 'kd', the run of 'sft'"),
        ({"students/kd": {"train_roles": ("private",)}}, "setting disjoint, but trains on private"),
        ({"students/kd": {"recipe": "best"}}, "recipe 'best' is not one of"),
        ({"null": {"train_roles": ()}}, "train_roles is empty"),
        ({"null": {"epochs": 3}}, "unknown keys"),
        ({"null": {"train_roles": ("publik",)}}, "train_roles .*publik"),
        ({"base_student": {"train_roles": ("private",), "recipe": "matched"}}, "a base takes pretrain or nothing"),
        ({"base_student": {"init": "null"}}, "in a circle"),
    ],
)
def test_a_wrong_graph_is_refused_by_run_and_key(changes, message):
    with pytest.raises(ConfigError, match=message):
        graph.parse(standard(**changes), *CONFIG)


def test_finished_work_is_skipped_and_other_inputs_are_refused(tmp_path):
    inputs = {"recipe": {"lr": 1e-3, "betas": (0.9, 0.95)}, "data": "abc"}
    assert not manifest.begin(tmp_path, inputs, "run x")
    assert not manifest.begin(tmp_path, inputs, "run x"), "begun work with the same inputs resumes"
    with pytest.raises(manifest.StaleWork, match=r"recipe.lr: was 0.001, is 0.01"):
        manifest.begin(tmp_path, {**inputs, "recipe": {"lr": 1e-2, "betas": (0.9, 0.95)}}, "run x")
    manifest.write(tmp_path, inputs, {"step": 3})
    assert manifest.begin(tmp_path, inputs, "run x")
    with pytest.raises(manifest.StaleWork, match="data: was 'abc', is 'xyz'"):
        manifest.begin(tmp_path, {**inputs, "data": "xyz"}, "run x")


def test_work_that_died_while_ending_is_finished(tmp_path):
    manifest.begin(tmp_path, {"a": 1}, "scores")
    manifest.write(tmp_path, {"a": 1}, {})  # and killed before the note was dropped
    assert manifest.begin(tmp_path, {"a": 1}, "scores") and not (tmp_path / "begun").exists()
    manifest.begin(other := tmp_path / "other", {"a": 1}, "scores")
    manifest.end(other, {"a": 1}, {})
    assert not (other / "begun").exists() and manifest.finished(other, {"a": 1}, "scores")


def test_half_a_manifest_is_named(tmp_path):
    (tmp_path / "manifest.json").write_text('{"inputs": {')
    with pytest.raises(manifest.StaleWork, match="not readable JSON.*delete"):
        manifest.finished(tmp_path, {}, "run x")
