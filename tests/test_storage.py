"""Storage: the same work directory on a disk and in a bucket, and nothing half-written in either.

The bucket is one in memory here, which has no folders and no appending. Where gcsfs and an emulator of Google Cloud
Storage are installed, one more test lets the libraries talk to that: gcsfs, tensorstore through orbax, tensorboardX.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from test_feeds import data
from test_teacher_text import make

from kd_jax import manifest, metrics, storage, teacher_cache
from kd_jax.data.encode import RESPONSE
from kd_jax.distill.feeds import Used
from kd_jax.distill.ledger import Ledger, summarize
from kd_jax.distill.objective import Objective
from kd_jax.distill.policies import DATASET
from kd_jax.errors import ConfigError


class Bucket(MemoryFileSystem):
    """What gs:// is in this process. A file that is opened for writing is seen at once, unlike a real object."""

    protocol = ("gs", "gcs")
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://"))

    def mkdir(self, path, **_):
        raise AssertionError(f"{path}: a bucket has no folders, and gcsfs would make a bucket")

    makedirs = mkdir

    def put_file(self, lpath, rpath, **_):
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def _open(self, path, mode="rb", **keywords):
        assert "a" not in mode, f"{path}: objects cannot grow"
        return super()._open(path, mode, **keywords)


@pytest.fixture(scope="module", autouse=True)
def _registered():
    for name in Bucket.protocol:
        fsspec.register_implementation(name, Bucket, clobber=True)


@pytest.fixture(params=["disk", "bucket"])
def place(request, tmp_path):
    """An empty work directory of each kind."""
    Bucket.store.clear()
    return storage.as_path(tmp_path if request.param == "disk" else "gs://bucket/study")


@pytest.fixture
def bucket():
    Bucket.store.clear()
    return storage.as_path("gs://bucket/study")


def names(folder) -> list[str]:
    """Files below a folder, of a disk or a bucket."""
    if storage.is_local(folder):
        return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name.removeprefix("/bucket/study/") for name in Bucket.store)


# -------------------------------------------------------------------------------------------------------- paths


def test_a_path_is_what_the_user_named(tmp_path):
    assert storage.as_path("runs/x") == Path("runs/x") and isinstance(storage.as_path("runs/x"), Path)
    assert storage.as_path(tmp_path) == tmp_path and storage.is_local(tmp_path)
    inside = storage.as_path("gs://bucket/a") / "b" / "c.json"
    assert str(inside) == "gs://bucket/a/b/c.json" and not storage.is_local(inside)
    assert storage.as_path(inside) == inside and str(inside.parent) == "gs://bucket/a/b"


@pytest.mark.parametrize("text", ["s3://bucket/x", "http://x/y", "gs://", "gs:///"])
def test_other_stores_are_refused(text):
    with pytest.raises(ConfigError, match="local folder or gs://bucket/folder"):
        storage.as_path(text)


def test_a_missing_gcsfs_is_named(monkeypatch):
    def missing(_):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ConfigError, match="gs://b/x needs the package gcsfs"):
        storage.as_path("gs://b/x")


def test_a_bucket_that_cannot_be_written_is_told_before_any_work(place, monkeypatch):
    storage.check(place)
    assert names(place) == []
    if storage.is_local(place):
        return

    def forbidden(*_, **__):
        raise OSError("Forbidden: no storage.objects.create")

    monkeypatch.setattr(Bucket, "pipe_file", forbidden)
    with pytest.raises(ConfigError, match="gs://bucket/study cannot be written .OSError: Forbidden.*gcloud auth"):
        storage.check(place)


def test_free_space_is_that_of_the_disk_that_will_hold_the_folder(tmp_path, bucket, monkeypatch):
    asked = []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage)
    assert storage.free_bytes(tmp_path / "not" / "there") == usage.free and asked == [tmp_path]
    assert storage.free_bytes(bucket) is None


# ------------------------------------------------------------------------------------------------------- files


def test_a_file_is_written_with_its_folders_and_replaced_whole(place):
    path = place / "a" / "b.txt"
    storage.write_text(path, "one: ä")
    storage.write_bytes(path, b"two")
    assert path.read_text() == "two" and path.exists() and names(place) == ["a/b.txt"]
    if storage.is_local(place):
        assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("before", [None, b"whole"])
def test_an_interrupted_write_leaves_what_was_there(place, before):
    path = place / "file.bin"
    if before:
        storage.write_bytes(path, before)
    with pytest.raises(KeyboardInterrupt), storage.create(path) as handle:
        handle.write(b"half of")
        handle.flush()
        raise KeyboardInterrupt
    assert (path.read_bytes() if path.exists() else None) == before
    storage.write_bytes(path, b"anew")
    assert path.read_bytes() == b"anew" and names(place) == ["file.bin"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(os.fstat(handle).st_size))
    monkeypatch.setattr(os, "replace", lambda old, new: done.append((Path(old).name, Path(new).name)))
    storage.write_bytes(tmp_path / "x", b"12345")
    assert done == [5, (done[1][0], "x")] and storage._is_temporary(done[1][0])


def test_two_programs_that_write_one_file_do_not_meet(tmp_path):
    path = tmp_path / "x"
    with storage.create(path) as first:
        first.write(b"first, ")
        first.flush()
        storage.write_bytes(path, b"second")
        first.write(b"whole")
    assert path.read_bytes() == b"first, whole" and names(tmp_path) == ["x"]


def test_a_folder_is_gone_at_once_and_what_is_left_of_it_later(tmp_path, monkeypatch):
    for name in (
        "work/kept",
        "work/gone/a",
        "work/gone/b/c",
        "report/.page.12-abcdef012345.tmp",
        "work/.half.0123456789ab.tmp",
        "work/.own.tmp",
    ):
        storage.write_bytes(tmp_path / name, b"x")
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            storage.rmtree(tmp_path / "work" / "gone")
    assert storage.files(tmp_path) == ["work/.own.tmp", "work/kept"] and not (tmp_path / "work" / "gone").exists()
    storage.rmtree(tmp_path / "work" / "gone")
    assert len([p for p in tmp_path.rglob("*") if p.is_file()]) == 6
    storage.sweep(tmp_path, but="report")
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {"kept", ".own.tmp", ".page.12-abcdef012345.tmp"}


def test_tables_come_back_with_what_they_say_of_themselves(place):
    path = place / "t.parquet"
    storage.write_parquet(path, pa.table({"x": [1, 2, 3]}), {"run": "kd"})
    table = pq.read_table(storage.readable(path))
    assert table["x"].to_pylist() == [1, 2, 3] and table.schema.metadata == {b"run": b"kd"}
    assert pd.read_parquet(storage.readable(path)).x.tolist() == [1, 2, 3]
    assert pq.ParquetFile(storage.readable(path)).metadata.row_group(0).column(0).compression == "ZSTD"


def test_a_log_is_readable_after_every_line(place):
    log = storage.Log(place / "log", ["kept"])
    for line in ("one", "two"):
        log.add(line)
        assert (place / "log").read_text().splitlines()[-1] == line
    log.close()
    assert (place / "log").read_text() == "kept\none\ntwo\n"


# ------------------------------------------------------------------------------------------------------ folders


def test_copies_and_deletions(place):
    for name in ("params/a", "params/d/b", "params.txt"):
        storage.write_text(place / name, name)
    storage.write_text(place / "best" / "a", "old")
    storage.copytree(place / "params", place / "best")
    storage.copy(place / "params.txt", place / "best" / "c")
    assert names(place) == ["best/a", "best/c", "best/d/b", "params.txt", "params/a", "params/d/b"]
    assert (place / "best" / "a").read_text() == "params/a" and (place / "best" / "c").read_text() == "params.txt"
    storage.rmtree(place / "params")
    storage.rmtree(place / "never")
    assert names(place) == ["best/a", "best/c", "best/d/b", "params.txt"]


def test_a_local_copy_of_a_bucket_goes_back_whole_or_not_at_all(place):
    for name in ("scores/kept", "scores/changed", "scores/d/gone"):
        storage.write_text(place / name, "before")
    with storage.local_copy(place / "scores") as here:
        assert isinstance(here, Path) and names(here) == ["changed", "d/gone", "kept"]
        assert (here == place / "scores") == storage.is_local(place)
    with storage.local_copy(place / "scores", write=True) as here:
        (here / "changed").write_text("after")
        (here / "d" / "gone").unlink()
        (here / "new").mkdir()
        (here / "new" / "file").write_text("after")
    assert names(place) == ["scores/changed", "scores/kept", "scores/new/file"]
    assert (place / "scores" / "changed").read_text() == "after" == (place / "scores" / "new" / "file").read_text()


def test_a_failed_program_uploads_nothing_and_leaves_no_copy(bucket):
    storage.write_text(bucket / "report" / "x", "before")
    with pytest.raises(ZeroDivisionError), storage.local_copy(bucket / "report", write=True) as here:
        (here / "x").write_text("half")
        raise ZeroDivisionError
    assert (bucket / "report" / "x").read_text() == "before" and not here.exists()
    with storage.local_copy(bucket / "nothing", write=True) as here:
        assert list(here.iterdir()) == []


# ------------------------------------------------------------------------------------- what is kept in work directories


def test_manifests_tell_finished_work_from_stale_and_begun_work(place):
    folder = place / "runs" / "kd"
    assert not manifest.begin(folder, {"lr": 1}, "run kd")
    assert not manifest.begin(folder, {"lr": 1}, "run kd")
    with pytest.raises(manifest.StaleWork, match="lr: was 1, is 2"):
        manifest.begin(folder, {"lr": 2}, "run kd")
    manifest.end(folder, {"lr": 1}, {"step": 3})
    assert manifest.begin(folder, {"lr": 1}, "run kd") and manifest.read(folder)["facts"] == {"step": 3}
    assert [n for n in names(place) if "begun" in n] == []
    storage.write_text(folder / "manifest.json", "{")
    assert manifest.begin(folder, {"lr": 1}, "run kd") and manifest.read(folder)["facts"] == {"step": 3}
    assert (folder / "manifest.json").read_bytes() == (folder / "manifest.copy.json").read_bytes()
    for name in ("manifest.json", "manifest.copy.json"):
        storage.write_text(folder / name, "{")
    with pytest.raises(manifest.Damaged, match="manifest.copy.json is damaged"):
        manifest.read(folder)


def test_a_ledger_drops_the_steps_that_are_taken_again(place):
    folder = place / "ledger"
    used = lambda example: Used(np.array([example]), np.full(1, DATASET), np.ones(1, int), np.array([7]))
    first = Ledger(folder, step=0)
    for step, example in ((1, 0), (2, 1)):
        first.add(step, used(example))
        first.write(step)
    again = Ledger(folder, step=1)
    assert [Path(n).name for n in names(place)] == ["00000001.parquet"]
    again.add(2, used(2))
    again.write(2)
    found = summarize(folder, Objective("kd"), False, np.array(["a", "b", "c"]), None)
    assert found.example_id.tolist() == ["a", "c"] and found.tokens.tolist() == [7, 7] and set(found.loss) == {"ce"}


def test_teacher_text_goes_on_where_it_was_cut_off(place):
    folder, calls = place / "generated", []
    with pytest.raises(KeyboardInterrupt):
        make(folder, calls, fail_at=3)
    made = len([n for n in names(place) if n.endswith(".parquet")])
    text = make(folder, calls)
    assert made == 2 and calls == [16, 16, 16, 16, 12]
    assert int((text.segment == RESPONSE).sum()) == 3 * len(data())
    assert make(folder, calls).fingerprint() == text.fingerprint() and len(calls) == 5


def test_metrics_of_a_resumed_run_go_on_at_its_step(place, monkeypatch):
    events = []

    class Events:
        def __init__(self, folder, purge_step):
            events.append((folder, purge_step))

        add_scalar, flush, close = (lambda self, *_: None), (lambda self: None), (lambda self: None)

    monkeypatch.setattr(metrics, "Events", Events)
    for start, steps in ((0, (0, 1, 2)), (1, (2, 3))):
        with metrics.Metrics(place / "run", step=start) as writer:
            for step in steps:
                writer.write(step, {"train/loss": start})
    rows = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["train/loss"]) for r in rows] == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert events == [(str(place / "run"), 0), (str(place / "run"), 2)]


def test_a_teacher_cache_in_a_bucket_is_refused(bucket):
    spec = teacher_cache.CacheSpec()
    with pytest.raises(ConfigError, match="local --workdir, or cache none"):
        teacher_cache.build(bucket / "cache", None, None, spec, None, {}, 10)
    assert names(bucket) == []


# ------------------------------------------------------------------------------------------------- the real libraries


def test_the_libraries_keep_a_run_in_an_emulated_bucket():
    """gcsfs, orbax with tensorstore, and tensorboardX against an emulator, in a process of its own."""
    for module in ("gcsfs", "gcp_storage_emulator"):
        pytest.importorskip(module)
    script = Path(__file__).with_name("emulated_bucket.py")
    environment = os.environ | {"PYTHONPATH": str(script.parent.parent)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "all kept"
