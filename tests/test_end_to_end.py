"""The program as a user starts it: once, again, cut off, and with wrong input."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kd_jax.distill.objective import TECHNIQUES

ROOT = Path(__file__).parent.parent


ENVIRONMENT = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}


def start(
    workdir: Path, *arguments: str, config: str = "configs/quickstart.py:tiny,all"
) -> subprocess.CompletedProcess:
    command = [sys.executable, "main.py", f"--config={config}", f"--workdir={workdir}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    workdir = tmp_path_factory.mktemp("study")
    return workdir, start(workdir)


def test_it_ends_with_the_sentence_and_the_report(study):
    workdir, done = study
    assert done.returncode == 0, done.stderr[-3000:]
    last = done.stdout.strip().splitlines()
    assert re.match(r"An attacker who holds only the student ranks .* do not extrapolate\.$", last[-2])
    assert last[-1] == f"Report: {workdir / 'report' / 'index.html'}"
    names = {p.name for p in (workdir / "report").iterdir()}
    assert names >= {"membership.csv", "differences.csv", "gates.csv", "utility.csv", "summary.json", "index.html"}


def test_every_run_left_what_the_readme_says(study):
    workdir, _ = study
    runs = ["teacher", "null", "direct", "swap", "swap_students/kd", *(f"students/{name}" for name in TECHNIQUES)]
    for run in runs:
        folder = workdir / "runs" / run / "seed0"
        assert json.loads((folder / "manifest.json").read_text())["facts"]["step"] > 0
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert rows[0]["eval/dev_loss"] > rows[-1]["eval/dev_loss"], f"{run} learned nothing"
        assert 0 <= rows[-1]["probe/loss_attack_auc"] <= 1 and list(folder.glob("events.out.tfevents*"))
    for run in [*runs, "base_teacher", "base_student"]:
        assert {p.name.split("-")[0] for p in (workdir / "scores" / run / "seed0" / "plain").glob("*.parquet")} == {
            "private", "heldout", "dev", "calib", "canary"
        }  # fmt: skip
    table = pd.read_csv(workdir / "report" / "membership.csv", keep_default_na=False, na_values=[""])
    plain = table[table.role_pair == "private-heldout"]
    assert {"null", "teacher", "students/kd", "swap"} <= set(plain.model) and (plain.n_members > 0).all()


def test_all_six_techniques_are_reported_with_their_use_and_their_sources(study):
    report = study[0] / "report"
    read = lambda name: pd.read_csv(report / name, keep_default_na=False, na_values=[""])
    students = {f"students/{name}" for name in TECHNIQUES}
    membership = read("membership.csv")
    for attack in ("loss", "zlib", "min_k", "min_k_plus_plus", "reference:null"):
        rows = membership[(membership.attack == attack) & (membership.metric == "auc") & (membership.task == "all")]
        assert students <= set(rows.model), attack
    rouge = read("utility.csv").query("measure == 'rouge_l@dev'")
    assert students | {"null", "teacher"} <= set(rouge.model) and rouge.value.between(0, 100).all()
    ledger = pd.read_parquet(report / "ledger.parquet")
    sources = ledger.groupby("model").source.agg(set)
    assert sources["students/kd"] == {"dataset"} and sources["students/seqkd"] == {"teacher"}
    assert sources["students/imitkd"] == {"student"} and sources["students/minillm"] == {"mixed"}
    assert "student" in sources["students/gkd"]
    assert set(ledger[ledger.model == "students/imitkd"].role) == {"public", "canary"}, "no private prompt"
    assert "One seed ranks nothing." in (report / "index.html").read_text()


def test_the_same_command_again_says_that_all_is_done(study):
    workdir, first = study
    again = start(workdir)
    assert again.returncode == 0 and again.stdout.startswith("All done before.")
    assert again.stdout.splitlines()[1:] == first.stdout.splitlines()[-2:]


def test_changed_inputs_are_refused_with_what_changed(study):
    refused = start(study[0], "--config.recipes.matched.lr=0.5", "--stages=train")
    assert refused.returncode == 1
    assert "recipe.lr: was 0.002, is 0.5" in refused.stderr and "Traceback" not in refused.stderr
    other = start(study[0], "--config.seed=1", "--stages=train")
    assert other.returncode == 1 and "splits.parquet holds other roles" in other.stderr


def test_a_run_killed_in_training_continues_to_the_same_parameters(study, tmp_path):
    workdir, _ = study
    arguments = ("--stages=train", "--only=teacher", "--config.recipes.matched.checkpoints=4")
    command = [
        sys.executable,
        "main.py",
        "--config=configs/quickstart.py:tiny,all",
        f"--workdir={tmp_path}",
        *arguments,
    ]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    checkpoints = tmp_path / "runs" / "teacher" / "seed0" / "checkpoints"
    while process.poll() is None and not (
        checkpoints.exists() and any(p.name.isdigit() for p in checkpoints.iterdir())
    ):
        pass
    process.kill()
    process.wait()
    assert start(tmp_path, *arguments).returncode == 0
    facts = [json.loads((d / "runs/teacher/seed0/manifest.json").read_text())["facts"] for d in (workdir, tmp_path)]
    assert facts[0]["params_fingerprint"] == facts[1]["params_fingerprint"]


def test_everything_is_its_owners_alone(study):
    workdir, _ = study
    assert not [p for p in workdir.rglob("*") if p.stat().st_mode & 0o077]


def test_a_run_is_exported_for_transformers(study, tmp_path):
    done = start(study[0], "--only=students/kd", f"--export={tmp_path / 'student'}")
    assert done.returncode == 0, done.stderr[-2000:]
    names = {p.name for p in (tmp_path / "student").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    again = start(study[0], "--only=students/kd", f"--export={tmp_path / 'student'}")
    assert again.returncode == 1 and "not empty" in again.stderr


def test_no_text_of_a_record_stands_in_report_or_logs(study):
    """Responses of private records are looked for in everything but score and text tables and canaries."""
    from configs import quickstart
    from kd_jax import prepare

    workdir, done = study
    frame = prepare.prepare(quickstart.get_config("tiny,all"), workdir).frame
    texts = frame[frame.task != "canary"].response.str.slice(0, 40).tolist()
    files = [p for p in workdir.rglob("*") if p.is_file() and p.suffix in {".html", ".json", ".jsonl", ".csv", ""}]
    everything = (
        done.stdout + done.stderr + "".join(p.read_text(errors="ignore") for p in files if "tokenizer" not in p.parts)
    )
    assert len(files) > 20 and not [t for t in texts if t in everything]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.recipes.matched.learning_rate=1"], "learning_rate"),
        (["--config.recipes.matched.lr=fast"], "fast"),
        (["--config.attack.primary=los"], "error: config.attack: unknown attack 'los'"),
        (["--stages=trian"], "error: unknown stages ['trian']"),
        (["--stages=filter"], "no run of the config has `exclude`"),
        (["--config.data.synthetic.records=0", "--config.data.path=nowhere.jsonl"], "error: nowhere.jsonl"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, message, tmp_path):
    refused = start(tmp_path, *arguments)
    assert refused.returncode != 0 and message in refused.stderr, refused.stderr[-2000:]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "change, only, message",
    [
        (lambda c: c.data.synthetic.update(records=60), "", "private has .* of at least 50"),
        (lambda c: c.objectives.kd.update(kd_ratio=1.5), "", "objectives.kd: kd_ratio must lie in"),
        (lambda c: c.objectives.kd.update(beta=-0.1), "", "objectives.kd: beta must lie in"),
        (lambda c: c.objectives.kd.update(lmbda=2.0), "", "objectives.kd: lmbda must lie in"),
        (lambda c: c.recipes.matched.update(batch_rows=6), "", "6 rows of a micro-batch do not divide over 8 devices"),
        (lambda c: None, "students/none", "--only=students/none: no such run"),
        (lambda c: c.models.student.update(path="nowhere/at/all"), "", "nowhere/at/all"),
        (lambda c: c.models.student.update(scratch=dict(model_type="mamba")), "", "mamba"),
        (lambda c: c.data.update(template="chat"), "", "data.template is 'chat'"),
        (lambda c: c.data.update(path="also.jsonl"), "", "exactly one of data.path"),
        (lambda c: c.objectives.kd.update(divergence="kl"), "", "objectives.kd: unknown divergence 'kl'"),
        (lambda c: c.attack.update(headline="students/best"), "", "attack.headline is 'students/best'"),
        (lambda c: c.score.update(precision="low"), "", "score.precision is 'low'"),
    ],
)
def test_a_wrong_config_is_refused_before_any_training(change, only, message, tmp_path):
    from configs import quickstart
    from kd_jax import sharding, study

    config = quickstart.get_config("tiny")
    change(config)
    with pytest.raises(ValueError, match=message):
        study.open_study(config, tmp_path, sharding.make_mesh(), only)
    assert not (tmp_path / "runs").exists()


def test_the_closing_numbers_are_those_of_the_tables(study):
    workdir, done = study
    table = pd.read_csv(workdir / "report" / "membership.csv", keep_default_na=False, na_values=[""])
    row = table[
        (table.model == "students/kd") & (table.attack == "loss") & (table.metric == "auc") & (table.task == "all")
    ]
    row = row[row.role_pair == "private-heldout"].iloc[0]
    scores = []
    for role in ("private", "heldout"):
        rows = pd.read_parquet(workdir / "scores" / "students" / "kd" / "seed0" / "plain" / f"{role}-00000.parquet")
        scores.append(
            np.array([logp[segment == 1].mean(dtype=np.float64) for logp, segment in zip(rows.logp, rows.segment)])
        )
    members, others = scores
    auc = (members[:, None] > others).mean() + 0.5 * (members[:, None] == others).mean()
    assert auc == pytest.approx(row.value, abs=1e-9) and f"{100 * auc:.1f} %" in done.stdout
