"""A full disk: one message that names the file, what was there as it was, and no half file that a start could read."""

import contextlib
import dataclasses
import errno
import os
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pytest
import safetensors
import test_train as tiny
from planted_examples import UNTIED
from test_faults import everything, fit, left, restored, save, score_like
from test_report import fake_results

import attacks.files
from attacks import report
from kd_jax import checkpoint, hf, manifest, metrics, storage
from kd_jax.checkpoint import Checkpoints
from kd_jax.transformer import Transformer


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_after(number: int):
    """In place of os.fsync: the disk is full after `number` files."""
    left = iter(range(number))
    return lambda file: next(left, None) is None and no_space()


def writers(folder: Path) -> dict:
    """Every way in which the program writes."""
    rows = pa.table({"x": np.random.default_rng(0).random(200_000)})
    tables = [("roc.parquet", None), ("membership.csv", bytes(100_000)), ("summary.json", bytes(2_000_000))]

    def log():
        with contextlib.closing(storage.Log(folder / "log")) as kept:
            for _ in range(40):
                kept.add("x" * 100_000)

    def events():
        with metrics.Metrics(folder / "run") as writer:
            for step in range(2000):
                writer.write(step, {f"train/{'long' * 100}": 1.0})

    return {
        "bytes": lambda: storage.write_bytes(folder / "bytes", bytes(2_000_000)),
        "parquet": lambda: storage.write_parquet(folder / "rows.parquet", rows, {}),
        "log": log,
        "events": events,
        "manifest": lambda: manifest.write(folder / "work", {}, {"x": "x" * 2_000_000}),
        "checkpoint": lambda: save_large(folder / "checkpoints"),
        "audit": lambda: attacks.files.write(folder / "report", tables),
        "export": lambda: export_large(folder / "export"),
    }


def save_large(folder: Path) -> None:
    large = jax.random.normal(jax.random.key(0), (512, 1024))
    with Checkpoints(folder) as kept:
        kept.save(9, {"a": large, "b": large + 1}, {}, {"data": tiny.grain_batches()})


def export_large(folder: Path) -> None:
    model = Transformer(dataclasses.replace(UNTIED, vocab_size=50_000), jax.random.key(0))
    hf.save_pretrained(model, folder, family="llama")


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A file system of 3 MB, 1 MB of it free, with a finished piece of work and two checkpoints."""
    folder = tmp_path_factory.mktemp("small")
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m,mode=700", "none", str(folder)], capture_output=True, text=True
    )
    if not mounted or mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip() if mounted else 'no mount program'}")
    try:
        score_like(folder / "scores")
        save(folder / "checkpoints", steps=(1, 2))
        fake_results(folder / "report", bare=True)
        (folder / "filler").write_bytes(bytes(storage.free_bytes(folder) - 1_000_000))
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("name", ["bytes", "parquet", "log", "events", "manifest", "checkpoint", "audit", "export"])
def test_a_disk_that_is_really_full(small_disk, name):
    before = {n: c for n, c in everything(small_disk).items() if n.startswith(("scores", "checkpoints", "report"))}
    with pytest.raises((OSError, ValueError, safetensors.SafetensorError)) as raised:
        writers(small_disk)[name]()
    message = storage.full(raised.value, small_disk)
    assert message and "MB free" in message and str(small_disk) in message and "make room" in message
    after = everything(small_disk)
    assert {n: after.get(n) for n in before} == before, "what was there is as it was"
    assert restored(small_disk / "checkpoints") == (2, 2.0)
    score_like(small_disk / "scores", made := [])
    assert made == [] and not [*small_disk.rglob("*.tmp"), *small_disk.rglob("*.partial")], "no half file"
    for gone in ("log", "run", "work", "bytes"):
        storage.rmtree(small_disk / gone)


def test_a_writer_without_space_leaves_what_was_there(tmp_path, monkeypatch):
    score_like(tmp_path)
    before = everything(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(OSError) as raised:
            storage.write_bytes(tmp_path / "private-00000.parquet", b"half")
    assert raised.value.filename == str(tmp_path / "private-00000.parquet") and everything(tmp_path) == before
    assert f"{tmp_path / 'private-00000.parquet'} could not be written" in storage.full(raised.value, tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("written", [1, 3])
def test_a_report_without_space_leaves_the_one_before(tmp_path, monkeypatch, written):
    page = report.build(fake_results(tmp_path, bare=True))
    fake_results(tmp_path, bare=True, swap=False)
    before = everything(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_after(written))
        with pytest.raises(OSError) as raised:
            report.build(tmp_path)
    assert Path(raised.value.filename).parent == tmp_path and "make room" in storage.full(raised.value, tmp_path)
    assert everything(tmp_path) == before and not list(tmp_path.rglob("*.tmp"))
    assert report.build(tmp_path) == page and page.read_bytes() != before["index.html"]


def test_a_checkpoint_without_space_leaves_the_one_before(tmp_path, monkeypatch):
    """As Orbax and TensorStore say it: in words, from a thread."""
    said = 'RESOURCE_EXHAUSTED: Failed writing: "/disk/9/d/x": No space left on device'

    def refuse(*_, **__):
        raise ValueError(said)

    real = Checkpoints.save
    with monkeypatch.context() as patch:
        save = lambda self, step, *rest: (refuse if step == 4 else real)(self, step, *rest)
        patch.setattr(Checkpoints, "save", save)
        with pytest.raises(ValueError) as raised:
            fit(tmp_path / "full")
    assert "/disk/9/d/x could not be written" in storage.full(raised.value, tmp_path)
    assert checkpoint.steps(tmp_path / "full" / "checkpoints") == [2]
    assert left(tmp_path / "full", fit(tmp_path / "full")) == left(tmp_path / "whole", fit(tmp_path / "whole"))


def test_other_errors_are_not_taken_for_a_full_disk():
    assert storage.full(OSError(errno.EACCES, "no"), "x") is None and storage.full(KeyError("x"), "x") is None
    try:
        try:
            no_space()
        except OSError as error:
            raise RuntimeError("a library's own") from error
    except RuntimeError as error:
        assert "the disk is full" in storage.full(error, "gs://bucket/x")
