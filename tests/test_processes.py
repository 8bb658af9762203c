"""The same study on 1 process with 4 devices, on 2 with 2 and on 4 with 1: real processes, collectives on loopback."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from kd_jax import processes
from kd_jax.errors import ConfigError

ROOT = Path(__file__).parent.parent
# A teacher, and students that train on data, on teacher text and on rollouts of their own.
STUDY = """
from configs import quickstart

RUNS = ("base_teacher", "base_student", "init_student", "teacher", "students/kd", "students/seqkd", "students/minillm")


def get_config():
    config = quickstart.get_config("tiny,all")
    for name in set(config.runs) - set(RUNS):
        del config.runs[name]
    config.data.synthetic.records = 450
    config.checkpoints.finished = 2
    config.recipes.matched.update(steps=4, checkpoints=2, evaluations=2, accumulation=2)
    for name in ("seqkd", "minillm"):
        config.objectives[name].max_new_tokens = 4
    config.objectives.minillm.rollouts = 16
    config.probe.examples = 16
    config.utility.update(seeds=(10,), examples=4, max_new_tokens=4)
    config.score.roles = ("private", "heldout")
    return config
"""
KD_ALONE = STUDY.replace(', "students/seqkd", "students/minillm"', "")
# Where it is about starts and ends alone: few programs to compile.
LITTLE = """
from configs import quickstart


def get_config():
    config = quickstart.get_config("tiny")
    for name in set(config.runs) - {"base_teacher", "base_student", "teacher", "students/kd"}:
        del config.runs[name]
    config.data.synthetic.records = 450
    config.recipes.matched.update(steps=4, checkpoints=2, evaluations=2)
    config.probe.examples = 16
    config.score.roles = ("private", "heldout")
    return config
"""
# Every axis is split at least once, and each crosses processes somewhere.
MESHES = {1: (2, 2, 1), 2: (1, 2, 2), 4: (2, 1, 2)}  # processes -> data, fsdp, tensor
RUNS = ("init_student", "teacher", "students/kd", "students/seqkd", "students/minillm")


def begin(
    workdir: Path, count: int, mesh: tuple, study: str, *, stages="train,score", own: dict | None = None
) -> list[subprocess.Popen]:
    """Start `count` processes; they write logs beside the work directory. own: further flags by process."""
    config = workdir.parent / "study.py"
    config.write_text(study)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={int(np.prod(mesh)) // count}",
    }
    command = [sys.executable, "main.py", f"--config={config}", f"--workdir={workdir}"]
    command += [f"--stages={stages}"] if stages else []
    command += [f"--config.mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), mesh)]
    joined = [f"--coordinator=127.0.0.1:{port}", f"--processes={count}"] if count > 1 else []
    return [
        subprocess.Popen(
            [*command, *joined, *([f"--process={i}"] if joined else []), *(own or {}).get(i, [])],
            cwd=ROOT, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT,
        )
        for i, log in enumerate(logs(workdir, count))
    ]  # fmt: skip


def logs(workdir: Path, count: int) -> list[Path]:
    return [workdir.parent / f"{workdir.name}-{i}.log" for i in range(count)]


def said(workdir: Path, count: int) -> str:
    return "\n".join(log.read_text()[-2000:] for log in logs(workdir, count))


def wait_for(ready, started: list[subprocess.Popen]) -> None:
    for _ in range(3000):
        if ready():
            return
        assert all(process.poll() is None for process in started), "ended before its time"
        time.sleep(0.1)
    raise AssertionError("waited for five minutes")


def launch(workdir: Path, count: int, mesh: tuple[int, int, int], study: str = STUDY) -> None:
    """Train and score with `count` processes that hold four devices together; fails with what they said."""
    started = begin(workdir, count, mesh, study)
    try:
        codes = [process.wait(timeout=900) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0] * count, said(workdir, count)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("processes") / "one"
    launch(workdir, 1, MESHES[1])
    return workdir


@pytest.fixture(scope="module", params=[2, 4])
def several(request, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("processes") / "several"
    launch(workdir, request.param, MESHES[request.param], STUDY if request.param == 2 else KD_ALONE)
    return workdir


def parameters(workdir: Path, run: str) -> dict[str, np.ndarray]:
    folder, here = str(workdir / "runs" / run / "seed0" / "params"), SingleDeviceSharding(jax.devices()[0])
    found = ocp.metadata(folder).metadata
    wanted = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for name, x in found.items()}
    return {name: np.asarray(x) for name, x in ocp.load(folder, wanted).items()}


def distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """Relative 2-norm. Single elements differ more: Adam makes a step as long as any other of a gradient near 0."""
    assert a.keys() == b.keys()
    return float(np.sqrt(sum(((a[k] - b[k]) ** 2).sum() for k in a) / sum((a[k] ** 2).sum() for k in a)))


def metrics(workdir: Path, run: str) -> list[dict]:
    lines = (workdir / "runs" / run / "seed0" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def trained(workdir: Path) -> list[str]:
    """Runs that the study in `workdir` has."""
    return [run for run in RUNS if (workdir / "runs" / run).exists()]


def test_processes_and_meshes_change_nothing_but_rounding(one, several, check):
    worst = {"losses": 0.0, "gradient norms": 0.0, "parameters": 0.0}
    for run in trained(several):
        left, right = metrics(one, run), metrics(several, run)
        assert [row["step"] for row in left] == [row["step"] for row in right] and len(left) >= 4
        for a, b in zip(left, right):
            assert set(a) == set(b)
            for key in set(a) & {"train/loss", "train/ce", "train/kd", "train/policy", "eval/dev_loss"}:
                worst["losses"] = max(worst["losses"], abs(a[key] - b[key]))
            if "train/gradient_norm" in a:
                gap = abs(a["train/gradient_norm"] / b["train/gradient_norm"] - 1)
                worst["gradient norms"] = max(worst["gradient norms"], gap)
        worst["parameters"] = max(worst["parameters"], distance(parameters(one, run), parameters(several, run)))
    check("processes: losses", worst["losses"], 2e-5)
    check("processes: gradient norms, relative", worst["gradient norms"], 1e-4)
    check("processes: parameters, relative norm", worst["parameters"], 5e-5)


def test_roles_ids_counts_and_scores(one, several, check):
    pd.testing.assert_frame_equal(pd.read_parquet(one / "splits.parquet"), pd.read_parquet(several / "splits.parquet"))
    tables = sorted(path.relative_to(several) for path in several.glob("scores/**/plain/*.parquet"))
    assert len(tables) == 2 * (2 + len(trained(several)))
    assert {*tables} <= {path.relative_to(one) for path in one.glob("scores/**/plain/*.parquet")}
    worst = 0.0
    for table in tables:
        a, b = (pd.read_parquet(root / table) for root in (one, several))
        exact = ["example_id", "role", "task", "n_tokens", "n_bytes", "zlib_bytes"]
        pd.testing.assert_frame_equal(a[exact], b[exact])
        np.testing.assert_array_equal(np.concatenate(a.target_id), np.concatenate(b.target_id))
        for name in ("logp", "entropy", "logp_std"):
            worst = max(worst, float(np.abs(np.concatenate(a[name]) - np.concatenate(b[name])).max()))
    check("processes: score tables", worst, 5e-5)


def test_ledgers_teacher_text_and_answers(one, several):
    for run in trained(several):
        ledgers = [pd.read_parquet(root / "runs" / run / "seed0" / "ledger.parquet") for root in (one, several)]
        pd.testing.assert_frame_equal(*ledgers)
    if "students/seqkd" in trained(several):
        texts = [
            pd.concat(map(pd.read_parquet, sorted(root.glob("generated/**/*.parquet")))) for root in (one, several)
        ]
        assert len(texts[0]) > 50 and texts[0].example_id.tolist() == texts[1].example_id.tolist()
        same = [np.array_equal(a, b) for a, b in zip(texts[0].tokens, texts[1].tokens)]
        assert np.all(np.array(same) | (texts[0].near_ties.to_numpy() > 0)), "another text where no draw was a near tie"
    answers = [pd.read_parquet(root / "scores/students/kd/seed0/generated/dev.parquet") for root in (one, several)]
    pd.testing.assert_frame_equal(answers[0][["example_id", "seed"]], answers[1][["example_id", "seed"]])


def test_a_checkpoint_of_one_mesh_goes_on_on_another(one, tmp_path, check):
    workdir = tmp_path / "resumed"
    shutil.copytree(one, workdir)
    shutil.rmtree(workdir / "scores")
    run = "students/kd"  # its teacher stays: another one, if only by a bit, would be refused
    folder = workdir / "runs" / run / "seed0"
    assert sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit()) == [2, 4]
    shutil.rmtree(folder / "checkpoints" / "4")
    shutil.rmtree(folder / "params")
    (folder / "manifest.copy.json").unlink()  # as it is while a run is trained: a note, and no manifest
    (folder / "begun").mkdir()
    (folder / "manifest.json").rename(folder / "begun" / "manifest.json")
    launch(workdir, 2, (1, 4, 1), KD_ALONE)
    assert [row["step"] for row in metrics(workdir, run)] == [row["step"] for row in metrics(one, run)]
    worst = distance(parameters(one, run), parameters(workdir, run))
    check("processes: resumed on another mesh, parameters, relative norm", worst, 1e-5)


def test_joining_needs_all_three_numbers(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    processes.initialize()  # alone: nothing happens
    for count, index in ((0, 0), (2, 2), (2, -1)):
        with pytest.raises(ConfigError, match="--processes above 0 and --process from 0"):
            processes.initialize("127.0.0.1:1", count, index)


def test_with_one_process_nothing_is_waited_for(tmp_path):
    done = []
    processes.once(lambda: done.append(1), "alone")
    assert done == [1] and processes.first() and processes.turn(3) and processes.agree({"a": [1]}) == {"a": [1]}
    processes.check_shared(tmp_path / "new")
    assert processes.leave()
    np.testing.assert_array_equal(processes.to_host(np.arange(3)), [0, 1, 2])


def test_a_pod_runs_all_stages_and_stops_together_when_it_is_taken_away(tmp_path):
    """Two processes: SIGTERM to one of them in training, then the same command to the closing line."""
    workdir = tmp_path / "pod"
    started = begin(workdir, 2, (2, 1, 1), LITTLE, stages="")
    wait_for(lambda: (workdir / "runs" / "teacher" / "seed0" / "metrics.jsonl").exists(), started)
    started[1].send_signal(signal.SIGTERM)
    assert [process.wait(timeout=600) for process in started] == [processes.TRY_AGAIN] * 2, said(workdir, 2)
    assert "preempted: the same command continues" in said(workdir, 2)
    assert not (workdir / "report").exists()
    started = begin(workdir, 2, (2, 1, 1), LITTLE, stages="")
    assert [process.wait(timeout=600) for process in started] == [0, 0], said(workdir, 2)
    assert "Report: " in said(workdir, 2) and (workdir / "report" / "index.html").exists()


def test_one_process_saves_on_sigterm_and_goes_on(tmp_path):
    workdir = tmp_path / "alone"
    (started,) = begin(workdir, 1, (1, 1, 1), LITTLE.replace("steps=4", "steps=400"), stages="train")
    lines = workdir / "runs" / "teacher" / "seed0" / "metrics.jsonl"
    wait_for(lambda: lines.exists() and len(lines.read_text().splitlines()) > 3, [started])
    started.send_signal(signal.SIGTERM)
    assert started.wait(timeout=100) == processes.TRY_AGAIN, said(workdir, 1)
    last = json.loads(lines.read_text().splitlines()[-1])["step"]
    kept = [int(p.name) for p in (lines.parent / "checkpoints").iterdir() if p.name.isdigit()]
    assert kept == [last] and last < 400


# A program that SIGTERM or Ctrl-C meets in `{body}`; what it asks for again comes after 0.1 s.
MET = """
import atexit, contextlib, gc, os, signal, time
from kd_jax import processes
processes.AGAIN = 0.1
atexit.register(lambda: (time.sleep(0.3), print("ended", flush=True)))
processes.watch()

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background programs ignore it

def term(*_):
    gc.callbacks.clear()
    os.kill(os.getpid(), signal.SIGTERM)
    return "met"

class Last:
    __del__ = __str__ = term

@contextlib.contextmanager
def closing():
    try:
        yield
    finally:
        time.sleep(0.5)
        print("closed", flush=True)

try:
    {body}
    time.sleep(20)
    print("forgotten", flush=True)
except processes.Preempted:
    processes.fail("preempted", processes.TRY_AGAIN)
except ZeroDivisionError:
    processes.fail(Last())
except KeyboardInterrupt:
    processes.fail("interrupted")
"""


@pytest.mark.parametrize(
    ("body", "code", "out", "error"),
    [
        ("Last()", 75, "", "Exception ignored in"),
        ("gc.callbacks.append(term); gc.collect()", 75, "", "Exception ignored in"),
        ("with closing(): term()", 75, "closed", ""),
        ("with processes.patience(): term(); time.sleep(0.3); print(processes.preempted())", 75, "True", ""),
        ("with contextlib.suppress(KeyError), processes.patience(): term(); {}[0]", 75, "", ""),
        ("with processes.patience(): os.kill(os.getpid(), signal.SIGINT); time.sleep(20)", 1, "", "interrupted"),
        ("1 / 0", 1, "", "met"),
    ],
    ids=["finalizer", "collector", "closing", "patience", "error in patience", "ctrl-c", "error"],
)
def test_a_signal_takes_effect_wherever_it_lands(body, code, out, error):
    """It is neither forgotten, nor raised twice over what is being closed, nor raised in the closing lines."""
    done = subprocess.run(
        [sys.executable, "-c", MET.format(body=body)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code, done.stderr
    assert done.stdout.split("\n")[:-1] == [line for line in (out, "ended") if line]
    assert error in done.stderr and done.stderr.endswith("preempted\n" if code == 75 else f"{error}\n")


def test_processes_that_differ_are_refused(tmp_path):
    workdir = tmp_path / "differ"
    started = begin(workdir, 2, (2, 1, 1), LITTLE, own={1: ["--config.recipes.matched.lr=1e-3"]})
    assert [process.wait(timeout=300) for process in started] == [1, 1]
    assert "the processes differ in config" in said(workdir, 2)


def test_an_error_of_what_a_signal_interrupted_is_told_from_others():
    with pytest.raises(ValueError, match="not closed") as found:
        try:
            raise processes.Preempted
        finally:
            int("not closed")
    assert processes.interrupted(found.value) and processes.interrupted(processes.Preempted())
    assert not processes.interrupted(ValueError("of its own")) and not processes.interrupted(None)
