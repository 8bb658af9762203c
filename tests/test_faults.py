"""Faults: kills at every operation on files, damaged files, losses and data that go wrong.

A kill is an exception that nothing catches, raised at the n-th operation on files, for every n: before the operation
and after it. Orbax works in threads, where that would hang; its own operations are met by real processes that send
themselves SIGKILL. Long soaks with whole studies: `python -m benchmarks.faults`.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import grain
import jax
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import test_teacher_cache as cached
import test_train as tiny
from test_teacher_text import make as make_text
from tqdm import tqdm

from kd_jax import checkpoint, loop, manifest, sharding, storage, tables, teacher_cache
from kd_jax.checkpoint import Checkpoints
from kd_jax.score import write_shards
from kd_jax.transformer import Transformer

ROOT = Path(__file__).parent.parent
STEPS = 4


class Killed(BaseException):
    """This process ends here."""


@contextlib.contextmanager
def killed_at(number: int, monkeypatch):
    """Raise Killed at the `number`-th operation on files (from 1), before odd ones and after even ones; counts them."""
    count = [0]

    def watched(operation):
        def call(*arguments, **keywords):
            count[0] += 1
            mine = 2 * count[0] - 1  # number of the moment before; the one after has the next
            if mine == number:
                raise Killed
            found = operation(*arguments, **keywords)
            if mine + 1 == number:
                raise Killed
            return found

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", watched(os.replace))
        patch.setattr(storage, "rmtree", watched(storage.rmtree))
        patch.setattr(checkpoint, "save_params", watched(checkpoint.save_params))
        patch.setattr(Checkpoints, "save", watched(Checkpoints.save))
        yield count


def everything(folder: Path) -> dict[str, bytes]:
    return {n: (folder / n).read_bytes() for n in storage.files(folder)}


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path, place: int | None = None) -> None:
    """Change one bit of a file; in the middle, or in a byte that is named."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 0x10
    path.write_bytes(content)


def flip_values(path: Path) -> None:
    """Change one bit of a column's values: Parquet's own checksums, which unfinished work has, cover no more."""
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    flip(path, column.data_page_offset + column.total_compressed_size - 3)


# ------------------------------------------------------------------------------------------------------- tables


def score_like(folder: Path, made: list | None = None) -> None:
    """Work as the score stage does it: begun, shard after shard, ended."""
    inputs = {"model": "kd", "roles": ["private"]}
    if manifest.begin(folder, inputs, "scores"):
        return

    def make(indices):
        if made is not None:
            made.append(int(indices[0]))
        return pa.table({"example_id": [f"e{i}" for i in indices], "logp": np.sin(indices)})

    write_shards(make, 10, "private", folder, 4, {"run": "kd"}, tqdm(disable=True))
    manifest.end(folder, inputs, {"step": 3})


def test_tables_killed_at_every_operation_end_the_same(tmp_path, monkeypatch):
    score_like(tmp_path / "whole")
    expected, kills = everything(tmp_path / "whole"), 0
    assert len(expected) == 5
    for number in range(1, 100):
        folder = tmp_path / f"cut{number}"
        with killed_at(number, monkeypatch) as count:
            try:
                score_like(folder)
                break
            except Killed:
                kills += 1
        score_like(folder)
        assert everything(folder) == expected, f"killed at {number} of {2 * count[0]}"
    assert kills >= 16  # three shards, two manifests and their copies, one note dropped: before and after


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_a_damaged_shard_is_named_and_scored_again(tmp_path, damage, caplog):
    score_like(tmp_path := tmp_path / "scores")
    expected, made = everything(tmp_path), []
    manifest.check_below(tmp_path.parent)
    damage(tmp_path / "private-00001.parquet")
    with pytest.raises(manifest.Damaged, match="private-00001.parquet: the stage that wrote it"):
        manifest.check_below(tmp_path.parent)
    score_like(tmp_path, made)
    assert made == [4] and "damaged: " in caplog.text and "private-00001.parquet" in caplog.text
    assert everything(tmp_path) == expected


@pytest.mark.parametrize("damage", [cut, flip_values])
def test_a_damaged_shard_of_unfinished_work_is_scored_again(tmp_path, damage, monkeypatch):
    score_like(tmp_path / "whole")
    with killed_at(7, monkeypatch), pytest.raises(Killed):  # note, its copy, one shard; the second is not there yet
        score_like(tmp_path / "cut")
    damage(tmp_path / "cut" / "private-00000.parquet")
    made = []
    score_like(tmp_path / "cut", made)
    assert made == [0, 4, 8] and everything(tmp_path / "cut") == everything(tmp_path / "whole")


def test_work_whose_damaged_files_were_deleted_is_not_read_as_whole(tmp_path):
    score_like(tmp_path / "scores")
    (tmp_path / "scores" / "private-00001.parquet").unlink()
    assert manifest.intact(tmp_path / "scores") is None  # and here the program is killed
    with pytest.raises(manifest.Damaged, match="manifest.json: the stage that wrote it"):
        manifest.check_below(tmp_path)
    score_like(tmp_path / "scores")
    manifest.check_below(tmp_path)


def test_any_changed_byte_of_a_shard_of_unfinished_work_is_found(tmp_path):
    """Checksums of pages cover neither names nor metadata; and files of older versions have no seal."""
    path, rows = tmp_path / "x.parquet", pa.table({"example_id": ["a", "b"], "logp": [0.5, -1.0]})
    storage.write_parquet(path, rows, {"run": "kd"})
    good = path.read_bytes()
    assert storage.whole(path, sealed=True) and storage.whole(path)
    assert pq.read_table(path).equals(rows.replace_schema_metadata({"run": "kd"}), check_metadata=True)
    taken = []
    for place in range(len(good)):
        flip(path, place)
        assert not storage.whole(path, sealed=True), place
        taken.append(storage.whole(path))
        path.write_bytes(good)
    assert any(taken), "or the seal would not be needed"
    for size in range(0, len(good), 7):
        path.write_bytes(good[:size])
        assert not storage.whole(path, sealed=True)
    pq.write_table(rows, path)
    assert not storage.whole(path, sealed=True)


@pytest.mark.parametrize("damage", [cut, flip, flip_values])
def test_damaged_teacher_text_of_unfinished_work_is_made_again(tmp_path, damage, caplog):
    calls = []
    with pytest.raises(KeyboardInterrupt):
        make_text(tmp_path / "cut", [], fail_at=3)
    damage(tmp_path / "cut" / "text-00000.parquet")
    text = make_text(tmp_path / "cut", calls)
    assert calls == [16, 16, 12] and "damaged: " in caplog.text and "text-00000.parquet" in caplog.text
    assert text.fingerprint() == make_text(tmp_path / "whole", []).fingerprint()
    assert everything(tmp_path / "cut") == everything(tmp_path / "whole")


@pytest.mark.parametrize("damage", [cut, flip])
def test_a_damaged_file_of_an_unfinished_teacher_cache_is_made_again(tmp_path, damage, monkeypatch, caplog):
    monkeypatch.setattr(teacher_cache, "SHARD_BYTES", 60 * 24 * 4)
    cached.build(tmp_path / "whole")
    expected, save, made = everything(tmp_path / "whole"), teacher_cache._save, []
    with killed_at(9, monkeypatch), pytest.raises(Killed):  # note, its copy, two shards; the third is not there yet
        cached.build(tmp_path / "cut")
    damage(tmp_path / "cut" / "hidden-00000.npy")
    monkeypatch.setattr(teacher_cache, "_save", lambda path, array: made.append(path.name) or save(path, array))
    cached.build(tmp_path / "cut")
    assert made[:2] == ["hidden-00000.npy", "hidden-00002.npy"] and "hidden-00000.npy; made again" in caplog.text
    assert everything(tmp_path / "cut") == expected


def test_a_ledger_beside_its_scores_is_mended_and_a_damaged_one_not_copied(tmp_path):
    run, scores = tmp_path / "run", tmp_path / "scores" / "kd" / "seed0"
    storage.write_parquet(run / "ledger.parquet", pa.table({"times": [1, 2]}), {})
    manifest.write(run, {}, {})
    copy = lambda: tables._copy_ledger(run, manifest.read(run), scores)
    copy()
    good = (scores / "ledger.parquet").read_bytes()
    flip(scores / "ledger.parquet")
    with pytest.raises(manifest.Damaged, match="ledger.parquet"):
        manifest.check_below(tmp_path / "scores")
    copy()
    assert (scores / "ledger.parquet").read_bytes() == good
    flip(run / "ledger.parquet")
    manifest.check.cache_clear()
    with pytest.raises(manifest.Damaged, match="run/ledger.parquet"):
        copy()
    assert (scores / "ledger.parquet").read_bytes() == good


def test_a_manifest_is_right_or_known_to_be_damaged(tmp_path):
    """Cut at any length or with any byte changed: the copy is used; where that is damaged too, a person is asked."""
    score_like(tmp_path)
    path, copy = tmp_path / "manifest.json", tmp_path / manifest.COPY
    whole, expected = path.read_bytes(), manifest.read(tmp_path)
    assert copy.read_bytes() == whole
    changed = [whole[:n] for n in range(0, len(whole) - 1, 7)]
    changed += [whole[:n] + bytes([whole[n] ^ 1]) + whole[n + 1 :] for n in range(len(whole))]
    undetected = 0
    for content in changed:
        path.write_bytes(content)
        assert manifest.read(tmp_path) == expected
        copy.write_bytes(content)
        try:
            assert manifest.read(tmp_path) == expected  # a space that became another one
            undetected += 1
        except manifest.Damaged as error:
            assert str(tmp_path) in str(error) and "delete" in str(error)
        copy.write_bytes(whole)
    assert undetected < 0.1 * len(changed)


def test_files_of_unknown_origin_are_deleted(tmp_path, caplog):
    """What a run that was told to stop writes into a folder that had just been deleted."""
    storage.write_text(tmp_path / "work" / "checkpoints" / "3" / "x", "of another run")
    assert not manifest.begin(tmp_path / "work", {"a": 1}, "run kd")
    assert storage.files(tmp_path / "work") == ["begun/manifest.copy.json", "begun/manifest.json"]
    assert "deleted 1 files" in caplog.text
    storage.write_text(tmp_path / "work" / "x", "of this run")
    assert not manifest.begin(tmp_path / "work", {"a": 1}, "run kd") and (tmp_path / "work" / "x").exists()


def test_finished_work_without_its_manifest_is_still_checked(tmp_path):
    score_like(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(manifest.StaleWork, match="model: was 'kd', is 'gkd'"):
        manifest.begin(tmp_path, {"model": "gkd", "roles": ["private"]}, "scores")
    made = []
    score_like(tmp_path, made)
    assert made == []


# ----------------------------------------------------------------------------------------------------- training


def fit(folder: Path, **changes) -> loop.Trained:
    """Four steps with a checkpoint after every second one, a best one, and a trajectory of two."""

    def evaluate(model):
        return {"eval/dev_loss": float(np.abs(np.asarray(model.blocks.attn.q[...])).sum())}

    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    recipe = dataclasses.replace(tiny.RECIPE, checkpoints=2, evaluations=4, select="best_dev_loss")
    task = dataclasses.replace(tiny.task(folder, STEPS, "students/kd", evaluate), trajectory=2, **changes)
    with jax.set_mesh(mesh):
        student = Transformer(tiny.model_config(), jax.random.key(0))
        settings = dict(vocab=tiny.VOCAB, rng=jax.random.key(5), mesh=mesh)
        return loop.fit(student, None, recipe, tiny.PRESETS["sft"], task, **settings)


def left(folder: Path, trained: loop.Trained) -> dict:
    """What a run leaves that must not depend on how often it was cut off."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if "per_second" not in k} for row in rows]
    ledger = pd.concat(map(pd.read_parquet, sorted((folder / "ledger").glob("*.parquet"))))
    return {
        "model": checkpoint.fingerprint(trained.model),
        "step": trained.step,
        "dev": trained.dev,
        "metrics": kept,
        "ledger": ledger.to_csv(index=False),
        "checkpoints": checkpoint.steps(folder / "checkpoints"),
        "trajectory": sorted(p.name for p in (folder / "trajectory").iterdir()),
        "best": sorted(p.name for p in (folder / "best").iterdir()),
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict]:
    """A run that nothing disturbed, and what it left."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    return folder, left(folder, fit(folder))


def test_a_run_killed_at_every_operation_ends_the_same(whole, tmp_path, monkeypatch):
    (undisturbed, expected), kills = whole, 0
    assert expected["checkpoints"] == [4, 2] and expected["trajectory"] == ["step-2", "step-4"]
    for number in range(2, 200, 2):  # after each: before the next one the disk is the same
        folder = tmp_path / f"cut{number}"
        with killed_at(number, monkeypatch):
            try:
                fit(folder)
                break
            except Killed:
                kills += 1
        assert left(folder, fit(folder)) == expected, f"killed after operation {number // 2}"
        shutil.rmtree(folder)
    assert kills >= 10
    # What cannot be made again from a checkpoint is trained again: the best parameters, and those that are scored.
    for gone in (expected["best"][0], "trajectory"):
        shutil.copytree(undisturbed, folder := tmp_path / gone)
        damaged = folder / gone if gone == "trajectory" else folder / "best" / gone / "params" / "_METADATA"
        storage.rmtree(damaged)
        assert left(folder, fit(folder)) == expected


@pytest.mark.parametrize("name", ["00000002.parquet", "00000004.parquet"])
@pytest.mark.parametrize("damage", [flip_values, Path.unlink])
def test_a_damaged_part_of_the_ledger_is_named_and_the_run_trained_again(whole, tmp_path, caplog, name, damage):
    """Between the end of training and the summary; as flipped values they would be counted without a word."""
    undisturbed, expected = whole
    shutil.copytree(undisturbed, folder := tmp_path / "run")
    damage(folder / "ledger" / name)
    assert left(folder, fit(folder)) == expected
    assert f"{folder / 'ledger' / name} is damaged or missing" in caplog.text


@pytest.mark.parametrize("damage", [flip_values, Path.unlink])
def test_a_damaged_part_of_the_ledger_of_a_run_in_training_is_found(whole, tmp_path, caplog, damage):
    undisturbed, expected = whole
    shutil.copytree(undisturbed, folder := tmp_path / "run")
    storage.rmtree(folder / "checkpoints" / "4")
    assert left(folder, fit(folder)) == expected and not caplog.text  # what is as it was is used
    storage.rmtree(folder / "checkpoints" / "4")
    damage(folder / "ledger" / "00000002.parquet")
    assert left(folder, fit(folder)) == expected and "the run starts anew" in caplog.text


STATE = {"a": np.arange(6.0).reshape(2, 3), "b": np.ones(3)}


def save(folder: Path, steps=(1, 2, 3), keep=2) -> None:
    data = tiny.grain_batches()
    with Checkpoints(folder, keep=keep) as kept:
        for step in steps:
            next(data)
            kept.save(step, {name: jax.numpy.asarray(x) + step for name, x in STATE.items()}, {}, {"data": data})


def restored(folder: Path) -> tuple[int | None, float]:
    """The newest checkpoint's step, and a number that it holds."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {n: jax.ShapeDtypeStruct(x.shape, np.float32, sharding=here) for n, x in STATE.items()}
    with Checkpoints(folder) as kept:
        if kept.latest_step is None:
            return None, 0.0
        state, _ = kept.restore(abstract, {}, {"data": tiny.grain_batches()})
        return kept.latest_step, float(state["b"][0]) - 1


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, damage, caplog):
    """Every file of a checkpoint, one after the other."""
    save(tmp_path / "whole")
    names = [n for n in storage.files(tmp_path / "whole" / "3") if (tmp_path / "whole" / "3" / n).stat().st_size]
    assert len(names) > 8 and "digests.json" in names
    for number, name in enumerate(names):
        if name == checkpoint.DIGESTS and damage is Path.unlink:
            continue  # a start that died before they were written: the checkpoint is whole
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", folder)
        damage(folder / "3" / name)
        caplog.clear()
        assert restored(folder) == (2, 2.0), name
        assert f"damaged checkpoint {folder / '3'}" in caplog.text and "deleted" in caplog.text
    shutil.copytree(tmp_path / "whole", folder := tmp_path / "both")
    for step in ("2", "3"):
        damage(folder / step / "state" / "manifest.ocdbt")
    assert restored(folder) == (None, 0.0)


def test_a_checkpoint_without_checksums_is_used_or_refused_by_name(tmp_path):
    save(tmp_path)
    (tmp_path / "3" / checkpoint.DIGESTS).unlink()
    assert restored(tmp_path) == (3, 3.0)
    for path in (tmp_path / "3" / "state").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            cut(path)
    with pytest.raises(manifest.Damaged, match="3 cannot be read .*: delete it to go on from an earlier checkpoint"):
        restored(tmp_path)


def test_as_many_checkpoints_are_kept_as_are_asked_for(tmp_path):
    save(tmp_path / "one", keep=1)
    save(tmp_path / "three", steps=(1, 2, 3, 4), keep=3)
    assert checkpoint.steps(tmp_path / "one") == [3] and checkpoint.steps(tmp_path / "three") == [4, 3, 2]
    checkpoint.prune(tmp_path / "three", 1)
    assert checkpoint.steps(tmp_path / "three") == [4]
    checkpoint.prune(tmp_path / "three", 0)
    checkpoint.prune(tmp_path / "never", 0)
    assert checkpoint.steps(tmp_path / "three") == []


# ------------------------------------------------------------------------------------ losses and data that go wrong


def watched_loop(task, **changes) -> loop.Loop:
    return loop.Loop(task, None, None, None, None, None, None, None, None, uniform=4.0, **changes)


def test_a_diverging_loss_stops_with_step_ids_and_the_last_good_checkpoint(tmp_path):
    task = tiny.task(tmp_path, 100, "students/kd")
    step = lambda loss, norm=1.0: {"loss": np.float32(loss), "gradient_norm": np.float32(norm)}
    row = lambda loss: {"train/loss": loss}
    window = lambda number: [(number, np.array([2, 3]), None), (number + 1, np.array([4, 4, 5]), None)]
    steady = watched_loop(task)
    for number, loss in enumerate([5.0, 16.0, 16.0, 4.0, 16.0, 16.0, 14.9]):  # twice far above 3 x 5, never thrice
        steady._check(row(loss), window(number), [step(loss), step(loss)])
    climbing = watched_loop(task, sound=7)
    for number, loss in enumerate([2.0, 13.0, 13.0]):  # above 3 x the uniform loss of 4
        climbing._check(row(loss), window(number), [step(loss), step(loss)])
    message = r"loss 13 has been above 12, .* at step 4; records of its batch: record4, record5; last .* step 7 in "
    with pytest.raises(FloatingPointError, match=message):
        climbing._check(row(13.0), window(3), [step(12.5), step(13.5)])
    rewarded = watched_loop(task)
    for _ in range(5):
        rewarded._check({"train/loss": 100.0, "train/policy": 1.0}, window(1), [step(100.0), step(100.0)])
    with pytest.raises(
        FloatingPointError, match="not finite: loss 1, gradient norm inf, at step 9; .* record2, record3"
    ):
        watched_loop(task)._check(row(1.0), window(9), [step(1.0, np.inf), step(np.nan)])


def test_a_data_worker_that_dies_is_named(tmp_path):
    class Broken:
        def __len__(self):
            return 12

        def __getitem__(self, i):
            if i == 2:
                raise MemoryError("no room for a batch")
            return good[i]

    source = tiny.grain_batches()
    good = [next(source) for _ in range(4)]
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    data = iter(grain.MapDataset.source(Broken()).to_iter_dataset(options))
    feed = tiny.feeds.DataFeed(None, data, tiny.feeds.Shapes(8, 16, 16, True))
    with pytest.raises(MemoryError) as raised:
        fit(tmp_path, feed=feed, iterators={"data": data})
    assert "no room" in str(raised.value)
    assert raised.value.__notes__[-1].startswith("students/kd: no batch for step 3; last good checkpoint: step 2 in ")


# -------------------------------------------------------------------------------------------------- real processes

TRAIN = """
import os, signal, sys
sys.path.insert(0, "tests")
from pathlib import Path
import test_faults
number, count, rename = int(sys.argv[2]), 0, os.rename
def dying(*arguments, **keywords):
    global count
    count += 1
    if count == number:
        os.kill(os.getpid(), signal.SIGKILL)
    found = rename(*arguments, **keywords)
    if count == -number:
        os.kill(os.getpid(), signal.SIGKILL)
    return found
os.rename = dying
folder = Path(sys.argv[1])
print(test_faults.left(folder, test_faults.fit(folder)))
"""


@pytest.mark.parametrize("number", [4, -5])
def test_a_process_killed_while_a_checkpoint_gets_its_name_ends_the_same(whole, tmp_path, number):
    """SIGKILL before or after one of Orbax's own renamings."""
    folder, environment = tmp_path / "cut", os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", TRAIN, str(folder), str(number)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert left(folder, fit(folder)) == whole[1]
