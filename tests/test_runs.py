"""Runs of a graph: learning-rate grid, selection, teacher text, caches, adapters, plain text, initial student."""

import json

import jax
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from ml_collections import ConfigDict

from configs import base, quickstart
from kd_jax import checkpoint, experiment, hf, manifest, runs, sharding, tables
from kd_jax.data.encode import EOS, RESPONSE
from kd_jax.errors import ConfigError
from kd_jax.study import load_run, open_study

PROSE = " ".join(
    f"The {a} {b} stood near the {c}." for a in ("old", "red") for b in ("mill", "barn") for c in "abcdefgh"
)


def config(workdir):
    """The smoke test's study, with one student for everything that this file looks at."""
    made = quickstart.get_config("tiny")
    made.data.canaries.per_cell = 0
    made.recipes.matched.update(steps=4, evaluations=2)
    (workdir / "prose.txt").write_text("\n\n".join([PROSE] * 20))
    made.data.lm.update(path=str(workdir / "prose.txt"), text_unit="paragraph")
    changes = {
        "grid": dict(lr_grid=(1e-5, 3e-3, 1e4)),
        "best": dict(select="best_dev_loss", steps=8, evaluations=8, lr=0.05, schedule="constant"),
        "rouge": dict(select="best_dev_rouge"),
        "exact": dict(made.recipes.matched.to_dict(), cache="exact"),
        "lora": dict(lora_rank=4, lora_dropout=0.1, lora_targets=("q", "v", "up"), lr=0.05),
        "adapters": dict(lora_rank=2, accumulation=2, cache="exact"),
        "init": dict(steps=3),
    }
    made.recipes.update(
        {
            name: base.recipe(**{"steps": 4, "evaluations": 2, "batch_rows": 16, **c, "name": name})
            for name, c in changes.items()
        }
    )
    made.objectives.update(
        {
            "seqkd": base.objective("seqkd", max_new_tokens=12),
            "seqkd_ce": base.objective("seqkd_ce", max_new_tokens=12),
            "singh": base.objective("singh_seqkd", max_new_tokens=6, beams=2),
            "kd_lm": base.objective("kd", lm_coef=1.0, lm_kd_ratio=0.5),
            "gkd": base.objective("gkd", lmbda=1.0, max_new_tokens=8),
            "minillm": base.objective("minillm", rollouts=20, passes=1, max_new_tokens=8),
            "imitkd": base.objective("imitkd", capacity=5),
        }
    )
    kept = base.standard_runs(shared=(), init="init")
    student = dict(kept["students/kd"].to_dict())
    one = lambda **keys: base.run(**(student | keys))
    first = {name: kept[name] for name in ("base_teacher", "base_student", "init_student", "teacher")}
    students = {
        "students/kd": one(recipe="grid", seeds=(0, 1)),
        "students/plain": one(),
        "students/exact": one(recipe="exact"),
        "students/best": one(recipe="best"),
        "students/rouge": one(recipe="rouge"),
        "students/lora": one(recipe="lora"),
        "students/lm": one(objective="kd_lm"),
        "students/seqkd": one(technique="seqkd"),
        "students/seqkd_ce": one(technique="seqkd", objective="seqkd_ce"),
        "students/beams": one(technique="seqkd", objective="singh"),
        "students/minillm": one(technique="minillm", recipe="adapters"),
        "students/gkd_shared": one(technique="gkd", setting="shared", train_roles=("private",)),
        "students/seqkd_shared": one(technique="seqkd", setting="shared", train_roles=("private",)),
    }
    made.runs = ConfigDict(first | students)
    made.probe.update(examples=50, rouge_examples=10)
    made.utility.update(seeds=(10, 20), examples=12, max_new_tokens=12, files={"prompts": str(workdir / "asked.jsonl")})
    (workdir / "asked.jsonl").write_text(
        "".join(json.dumps({"prompt": f"What is {i}?", "response": f"It is {i}."}) + "\n" for i in range(7))
    )
    return made


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs")
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        opened = open_study(config(workdir), workdir, mesh)
        runs.train_runs(opened)
        yield opened


def facts(study, name, seed=0) -> dict:
    return manifest.read(study.workdir / "runs" / name / f"seed{seed}")["facts"]


def parameters(study, name) -> dict:
    model = load_run(study, name, 0)
    return dict(zip(sharding.names(model), map(np.asarray, jax.tree.leaves(model))))


def test_the_learning_rate_is_picked_once_by_dev_loss(study):
    first, second = facts(study, "students/kd"), facts(study, "students/kd", 1)
    assert [point["lr"] for point in first["grid"]] == [1e-5, 3e-3, 1e4]
    losses = [point["dev_loss"] for point in first["grid"]]
    finite = [loss for loss in losses if loss is not None]
    assert first["lr"] == 3e-3 and min(finite) == losses[1] == first["dev"]["eval/dev_loss"]
    assert losses[2] is None or losses[2] > losses[1], "a rate that diverges is reported and not taken"
    assert second["lr"] == 3e-3 and len(second["grid"]) == 1 and second["lr_from"] == "students/kd seed 0"
    chosen = checkpoint.fingerprint(load_run(study, "students/kd", 0))
    assert chosen == first["params_fingerprint"]


def test_damaged_parameters_are_loaded_by_no_stage(study):
    params = study.workdir / "runs/students/best/seed0/params"
    largest = max((p for p in params.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    kept = largest.read_bytes()
    manifest.check.cache_clear()
    largest.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    try:
        with pytest.raises(manifest.Damaged, match=largest.name):
            load_run(study, "students/best", 0)
    finally:
        largest.write_bytes(kept)
    load_run(study, "students/best", 0)


def test_a_damaged_tokenizer_is_trained_again(study, caplog):
    path = study.workdir / "tokenizer" / "tokenizer.json"
    kept = path.read_bytes()
    path.write_bytes(kept[: len(kept) // 2])
    again = open_study(study.config, study.workdir, study.mesh)
    assert "tokenizer.json; made again" in caplog.text and path.read_bytes() == kept
    assert again.data.tokenizer.fingerprint == study.data.tokenizer.fingerprint


def test_selection_leaves_the_best_step(study):
    found = facts(study, "students/best")
    lines = (study.workdir / "runs/students/best/seed0/metrics.jsonl").read_text().splitlines()
    rows = {r["step"]: r["eval/dev_loss"] for r in map(json.loads, lines) if "eval/dev_loss" in r}
    del rows[0]
    assert len(rows) == 8 and found["selected_step"] == min(rows, key=rows.get)
    assert found["dev"]["eval/dev_loss"] == min(rows.values())
    evaluate = runs._evaluator(study)
    assert evaluate(load_run(study, "students/best", 0))["eval/dev_loss"] == pytest.approx(min(rows.values()), abs=1e-6)
    assert facts(study, "students/rouge")["select"] == "best_dev_rouge"
    assert 0 <= facts(study, "students/rouge")["dev"]["eval/rouge_l"] <= 100


def test_a_cached_teacher_trains_the_same_student(study, check):
    plain, cached = parameters(study, "students/plain"), parameters(study, "students/exact")
    check("student of a cached teacher vs uncached", max(np.abs(plain[k] - cached[k]).max() for k in plain), 1e-4)
    assert list((study.workdir / "cache/teacher/seed0").glob("*/manifest.json"))
    a, b = (facts(study, f"students/{n}")["dev"]["eval/dev_loss"] for n in ("plain", "exact"))
    check("dev loss of a cached teacher's student vs uncached", abs(a - b), 1e-5)


def test_adapters_are_merged_and_leave_the_rest_alone(study, tmp_path):
    start, trained = parameters(study, "init_student"), parameters(study, "students/lora")
    assert set(start) == set(trained), "no adapter is left"
    changed = {k for k in start if not np.array_equal(start[k], trained[k])}
    assert changed == {"blocks.attn.q", "blocks.attn.v", "blocks.mlp.up"}
    experiment.export(study, "students/lora", tmp_path / "exported")
    loaded = hf.load_pretrained(str(tmp_path / "exported"))
    assert checkpoint.fingerprint(loaded) == facts(study, "students/lora")["params_fingerprint"]


def test_students_are_trained_on_the_teachers_text(study):
    """Response ids are the teacher's samples, not the records' own responses; the text is made once for both forms."""
    folders = list((study.workdir / "generated/teacher/seed0").iterdir())
    assert len(folders) == 3, "public text is shared by seqkd and seqkd_ce; beams and the private prompts made the rest"
    run = study.runs["students/seqkd"]
    objective = runs.objective_of(study.config, run)
    text = runs._training_data(study, run, 0, objective, load_teacher=None)  # read back: no teacher is needed
    own = study.data.of_run(run.train_roles)
    assert list(text.example_id) == list(own.example_id)
    shards = pd.concat(
        [pq.read_table(p).to_pandas() for f in folders for p in f.glob("*.parquet") if matches(f, objective)]
    ).set_index("example_id")
    for i in range(0, len(text), 37):
        span = slice(text.offsets[i], text.offsets[i + 1])
        kept = shards.loc[text.example_id[i]]
        np.testing.assert_array_equal(text.tokens[span], kept.tokens)
        response = np.isin(text.segment[span], (RESPONSE, EOS))
        assert response.sum() == len(kept.tokens) - kept.prompt_length <= 12
        assert (text.segment[span][-1] == EOS) == kept.ended
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(*(split(e) for e in (text, own))))
    assert facts(study, "students/seqkd")["sources"].keys() == {"teacher"}
    assert facts(study, "students/beams")["sources"].keys() == {"teacher"}


def matches(folder, objective) -> bool:
    inputs = manifest.read(folder)["inputs"]
    return inputs["sampling"]["beams"] == objective.beams and inputs["roles"] == ["public"]


def split(encoded):
    return [encoded.tokens[a:b] for a, b in zip(encoded.offsets[:-1], encoded.offsets[1:])]


def test_plain_text_enters_the_loss_and_the_ledger(study):
    table = pd.read_parquet(study.workdir / "runs/students/lm/seed0/ledger.parquet")
    lm = table[table.source == "lm_corpus"]
    assert len(lm) and (lm.loss == "lm").all() and (lm.role == "").all() and lm.tokens.sum() > 0
    assert set(table.role) == {"", "public"} and set(table.source) == {"dataset", "lm_corpus"}
    rows = [json.loads(r) for r in (study.workdir / "runs/students/lm/seed0/metrics.jsonl").read_text().splitlines()]
    assert all("train/lm" in r for r in rows if "train/loss" in r)


def test_samples_of_both_settings_are_told_apart(study):
    """Shared students train on the members' prompts: the ledger has their role and that no response was their own."""
    table = lambda name: pd.read_parquet(study.workdir / f"runs/students/{name}/seed0/ledger.parquet")
    for name, source in (("gkd_shared", "student"), ("seqkd_shared", "teacher")):
        assert set(table(name).role) == {"private", "calib"} and set(table(name).source) == {source}
    rollouts = table("minillm")
    assert set(rollouts.role) == {"public"} and set(rollouts.source) == {"mixed"} and not rollouts.replayed.any()
    assert set(rollouts.loss) == {"policy+kd"}
    assert facts(study, "students/minillm")["branches"]["rollout_sets"] >= 1
    start, trained = parameters(study, "init_student"), parameters(study, "students/minillm")
    assert {k for k in start if not np.array_equal(start[k], trained[k])} <= {"blocks.attn.q", "blocks.attn.v"}


def test_the_ledger_of_a_run_counts_every_token(study):
    table = pd.read_parquet(study.workdir / "runs/students/plain/seed0/ledger.parquet")
    assert table.tokens.sum() == facts(study, "students/plain")["response_tokens"]
    assert (table.loss == "kd").all() and (table.mean_age == 0).all() and not table.replayed.any()
    assert table.first_step.min() == 1 and table.last_step.max() == 4


def test_students_start_from_the_public_sft(study):
    found = manifest.read(study.workdir / "runs/students/plain/seed0")["inputs"]["earlier"]["init"]
    assert found == facts(study, "init_student")["params_fingerprint"]
    assert facts(study, "init_student")["sources"].keys() == {"dataset"}


def test_scores_carry_training_objective_ledger_and_answers(study):
    only = study.runs["students/plain"]
    roles = {"dev": study.data.of_role("dev")}
    tables._score(study, only, 0, roles, "plain")
    tables._answer(study, only, 0)
    folder = study.workdir / "scores/students/plain/seed0"
    metadata = {k.decode(): v.decode() for k, v in pq.read_schema(folder / "plain/dev-00000.parquet").metadata.items()}
    provenance = json.loads(metadata["provenance"])
    assert provenance["training"]["lr"] == study.config.recipes.matched.lr and provenance["recipe"] == "matched"
    assert provenance["training"]["select"] == "last" and provenance["objective"]["divergence"] == "fkl"
    assert (folder / "ledger.parquet").exists()
    answers = pd.read_parquet(folder / "generated/dev.parquet")
    assert len(answers) == 24 and set(answers.seed) == {10, 20} and answers.rouge_l.between(0, 1).all()
    assert len(pd.read_parquet(folder / "generated/prompts.parquet")) == 14
    assert not set(answers.columns) & {"text", "prediction", "response"}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.data.lm.update(path=""), "objectives.kd_lm.lm_coef needs data.lm.path"),
        (lambda c: c.probe.update(rouge_examples=0), "select best_dev_rouge needs probe.rouge_examples"),
        (lambda c: c.objectives.kd_lm.update(lm_coef=-1.0), "lm_coef must not be negative"),
        (lambda c: c.runs["students/plain"].update(objective="none"), "objective 'none' is not one of"),
        (lambda c: c.recipes.exact.update(cache="all"), "cache 'all' is not one of"),
        (lambda c: c.objectives.seqkd.update(prefix=500), "prefix must be below data.max_length"),
        (lambda c: c.utility.update(roles=("devel",)), "utility.roles: no record has the role devel"),
        (lambda c: c.utility.update(files={"q": "nowhere.jsonl"}), "utility.files: nowhere.jsonl is not a file"),
        (lambda c: c.score.update(variants=("lowercased",)), "score.variants names 'lowercased'; known are"),
        (lambda c: c.score.update(pairs=("teacher:student",)), "score.pairs: 'teacher:student' is neither"),
        (lambda c: c.objectives.gkd.update(kd_ratio=0.0), "kd_ratio 0 leaves nothing to train on"),
        (lambda c: c.objectives.minillm.update(temperature=0.7), "hold for samples at temperature 1"),
        (lambda c: c.runs["students/kd"].update(technique="imitkd", objective="imitkd"), "capacity 5 of the replay"),
    ],
)
def test_wrong_settings_are_refused_before_any_training(change, message, tmp_path):
    wrong = config(tmp_path)
    change(wrong)
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh), pytest.raises(ConfigError, match=message):
        runs.train_runs(open_study(wrong, tmp_path, mesh))
    assert not (tmp_path / "runs").exists()
