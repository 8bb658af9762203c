"""The teacher cache: losses and gradients as without it, however batches are packed; interruption, damage, inputs."""

import dataclasses
import functools
import os
import shutil
import stat
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import manifest, sharding, teacher_cache, train
from kd_jax.data import batches, encode, records, tokenizer
from kd_jax.errors import ConfigError
from kd_jax.head import Loss, TopK, head_loss
from kd_jax.manifest import StaleWork
from kd_jax.teacher_cache import CacheSpec
from kd_jax.transformer import ModelConfig, Transformer

VOCAB, LENGTH = 300, 48
SPEC = CacheSpec(row_length=64, batch_rows=4)
INPUTS = {"teacher": "aa", "tokenizer": "bb"}
ONE = lambda: sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])


@functools.cache
def encoded(seed: int = 0) -> encode.Encoded:
    """Thirty invented records of different lengths, one of them cut, one named three times."""
    rng = np.random.default_rng(seed)
    words = lambda n: " ".join("".join(rng.choice(list("abcdefgh"), 4)) for _ in range(n))
    sizes = [(rng.integers(1, 5), n) for n in [*rng.integers(1, 7, 29), 40]]
    rows = [dict(group=None, task="t", instruction=words(a), input="", response=words(b), source="x") for a, b in sizes]
    frame = records.make_frame(rows)
    tok = tokenizer.load({"train_size": VOCAB}, train_texts=frame.response)
    data = encode.encode(frame, tok, template="plain", bos="eos", max_length=LENGTH, max_prompt=16)
    return data.select([*data.record_id, data.record_id[3], data.record_id[3]])


@functools.cache
def model(width: int, seed: int) -> Transformer:
    sizes = dict(vocab_size=VOCAB + 4, width=width, layers=1, heads=4, kv_heads=4, head_dim=8, mlp=32)
    cfg = ModelConfig(**sizes, max_positions=LENGTH, embed_dim=width, rotary_dim=8)
    return jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, Transformer(cfg, jax.random.key(seed)))


def build(folder, spec=SPEC, mesh=None, inputs=INPUTS, data=None, vocab=VOCAB):
    mesh = mesh or ONE()
    with jax.set_mesh(mesh):
        teacher = jax.device_put(model(24, 1), sharding.shardings(model(24, 1), mesh))
        return teacher_cache.build(folder, teacher, data or encoded(), spec, mesh, inputs, vocab)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(teacher_cache, "SHARD_BYTES", 60 * 24 * 4)  # sixty tokens, so the data make several shards


def epochs(packed: bool):
    """Batches of four rows of two epochs."""
    rows = batches.TrainingRows(encoded(), row_length=64, packed=packed, seed=5, epochs=2)
    return [rows.batch(np.arange(first, first + 4)) for first in range(0, len(rows), 4)]


def loss(student, teacher, batch, dtype="float32"):
    """Distillation and cross entropy of a batch, as the training step has them, and both per token."""
    weights = {"kd": batch["loss_mask"] / 64.0, "ce": batch["loss_mask"] / 128.0}
    batch = {k: v for k, v in batch.items() if k != "example"}
    return train.token_losses(student, teacher, batch, weights, Loss(VOCAB, "fkl", chunk=64), dtype=jnp.dtype(dtype))


def worst(a, b) -> float:
    """Largest difference over two trees, relative to the largest number of each array."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.abs(x - y).max() / jnp.maximum(jnp.abs(x).max(), 1e-3)) for x, y in pairs)


# ------------------------------------------------------------------------------------------------- losses as without


def test_losses_and_gradients_are_those_of_the_teacher(tmp_path, small_shards, check):
    """Two epochs that are packed differently, and two that are not packed."""
    cache = build(tmp_path / "cache")
    assert len(cache.first_example) > 3
    step, seen = jax.jit(jax.value_and_grad(loss, has_aux=True)), 0
    for batch in epochs(True) + epochs(False):
        with_teacher = step(model(32, 0), model(24, 1), batch)
        cached = step(model(32, 0), model(24, 1), batch | cache.batch(batch))
        check("cached vs uncached teacher: loss and gradient", worst(with_teacher, cached), 2e-5)
        seen += int(batch["loss_mask"].sum())
    assert seen == 4 * cache.tokens == 4 * encoded().scored_lengths.sum()


def test_bfloat16_is_exact_for_a_run_that_computes_in_it(tmp_path, check):
    spec = dataclasses.replace(SPEC, dtype="bfloat16", compute_dtype="bfloat16")
    cache, batch = build(tmp_path / "cache", spec), epochs(True)[0]
    found = cache.batch(batch)
    assert found["teacher_hidden"].dtype == jnp.bfloat16
    step = jax.jit(functools.partial(loss, dtype="bfloat16"))
    with_teacher, cached = (step(model(32, 0), model(24, 1), batch | extra) for extra in ({}, found))
    check("cached vs uncached teacher in bfloat16: loss", worst(with_teacher[0], cached[0]), 1e-3)


def test_states_are_those_of_each_record_alone(tmp_path, small_shards, check):
    """Unpacked and unpadded, one record at a time; what is not scored is 0."""
    cache = build(tmp_path / "cache")
    data = encoded()
    hidden = jax.jit(model(24, 1).hidden)
    for example in (0, 7, 30, 31):
        own = slice(data.offsets[example], data.offsets[example + 1])
        n = own.stop - own.start
        pad = lambda x, n=n: np.pad(np.asarray(x, np.int32), (0, LENGTH - n))[None]
        h = hidden(pad(data.tokens[own]), pad(np.ones(n)), pad(np.arange(n)))
        mask = pad(np.append(data.segment[own][1:], encode.PROMPT)) > 0  # the prompt's is 0
        row = {"example": np.full((1, LENGTH), example), "positions": pad(np.arange(n)), "loss_mask": mask}
        got = cache.batch(row)["teacher_hidden"]
        assert got.shape == (1, LENGTH, 24) and not got[~mask].any() and mask.sum() == data.scored_lengths[example]
        check("cached states vs a record alone", np.abs(got[mask] - np.asarray(h)[mask]).max(), 2e-5)


def test_devices_change_nothing(tmp_path, check):
    one, eight = build(tmp_path / "one"), build(tmp_path / "eight", mesh=sharding.make_mesh(2, 2, 2))
    states = [np.load(cache.path("hidden", 0)) for cache in (one, eight)]
    check("cached states on 8 devices vs 1", np.abs(states[0] - states[1]).max(), 2e-5)


def test_leading_axes_and_a_smaller_mask_are_fine(tmp_path):
    cache, batch = build(tmp_path / "cache"), epochs(True)[0]
    want = cache.batch(batch)["teacher_hidden"]
    split = {k: v.reshape(2, 2, -1) for k, v in batch.items()}
    np.testing.assert_array_equal(cache.batch(split)["teacher_hidden"], want.reshape(2, 2, *want.shape[1:]))
    fewer = batch["loss_mask"] & (np.arange(64) % 2 == 0)
    got = cache.batch(batch | {"loss_mask": fewer})["teacher_hidden"]
    np.testing.assert_array_equal(got, np.where(fewer[..., None], want, 0))


# ------------------------------------------------------------------------------------------------------------ top k


def test_top_k_keeps_the_best_ids_and_a_loss_below_the_whole(tmp_path, check):
    batch = epochs(True)[0]
    mask = batch["loss_mask"]
    where = [batch[name] for name in ("tokens", "segment_ids", "positions")]
    h_s, h_t = (jax.jit(m.hidden)(*where)[mask] for m in (model(32, 0), model(24, 1)))
    student, teacher = model(32, 0).head(), model(24, 1).head()
    ones, spec = jnp.ones(len(h_s)), Loss(VOCAB, "fkl", chunk=512)
    loss = lambda h, head: float(head_loss(h_s, student, h, head, ones.astype(int), {"kd": ones}, spec)[0])
    z = np.asarray(h_t, float) @ np.asarray(teacher.weight, float)[:VOCAB].T
    logp = z - np.log(np.exp(z).sum(1, keepdims=True))
    values = []
    for k in (2, 16, VOCAB):
        found = build(tmp_path / str(k), dataclasses.replace(SPEC, kind="top_k", k=k)).batch(batch)
        assert found["teacher_ids"].dtype == np.int32 and found["teacher_logp"].shape == (4, 64, k)
        assert not found["teacher_ids"][~mask].any() and not found["teacher_logp"][~mask].any()
        ids, kept = found["teacher_ids"][mask], found["teacher_logp"][mask]
        best = np.sort(logp, axis=1)[:, : -k - 1 : -1]
        check("cached top-k log-probabilities vs float64", np.abs(kept - best).max(), 1e-5)
        check("cached top-k log-probabilities vs float64", np.abs(np.take_along_axis(logp, ids, 1) - best).max(), 1e-5)
        values.append(loss(None, TopK(jnp.asarray(ids), jnp.asarray(kept))))
    whole = loss(h_t, teacher)
    assert 0 < values[0] < values[1] < whole
    check("top-k cache of the whole vocabulary vs the teacher, relative", abs(values[2] / whole - 1), 1e-4)


def test_top_k_says_that_it_is_biased(tmp_path):
    exact = build(tmp_path / "exact")
    cut = build(tmp_path / "cut", dataclasses.replace(SPEC, kind="top_k", k=5, temperature=2.0))
    assert "biased" in repr(cut) and "biased" in manifest.read(tmp_path / "cut")["facts"]["kind"]
    assert "biased" not in repr(exact) and str(exact.tokens) in repr(exact)


# ------------------------------------------------------------------------------------- interruption, damage, inputs


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.npy"))}


@pytest.mark.parametrize("spec", [SPEC, dataclasses.replace(SPEC, kind="top_k", k=12)], ids=["exact", "top_k"])
def test_an_interrupted_build_continues_where_it_was(tmp_path, small_shards, monkeypatch, spec):
    build(tmp_path / "whole", spec)
    calls, save = [], np.save

    def interrupted(handle, array):
        calls.append(1)
        if len(calls) == 4:  # with two files a shard: in the middle of one
            handle.write(b"half a file")
            raise KeyboardInterrupt
        save(handle, array)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "save", interrupted)
        build(tmp_path / "cut", spec)
    assert manifest.read(tmp_path / "cut") is None and len(files(tmp_path / "cut")) == 3
    first = min((tmp_path / "cut").glob("*-00000.npy"))
    kept = first.stat().st_mtime_ns
    build(tmp_path / "cut", spec)
    assert files(tmp_path / "cut") == files(tmp_path / "whole") and first.stat().st_mtime_ns == kept
    assert all(stat.S_IMODE(os.stat(path).st_mode) == 0o600 for path in (tmp_path / "cut").glob("*.npy"))


def test_a_finished_cache_needs_no_teacher_pass(tmp_path, monkeypatch):
    batch, first = epochs(True)[1], build(tmp_path / "cache")
    monkeypatch.setattr(teacher_cache, "make_step", lambda *_: pytest.fail("the teacher ran again"))
    same = dataclasses.replace(SPEC, batch_rows=2, temperature=2.0)  # of how it is made, and of top_k alone
    again = build(tmp_path / "cache", same)
    np.testing.assert_array_equal(again.batch(batch)["teacher_hidden"], first.batch(batch)["teacher_hidden"])


@pytest.mark.parametrize("left", [0, 100, 2000])
def test_a_damaged_file_is_named_and_made_again(tmp_path, small_shards, left, caplog):
    cache = build(tmp_path / "cache")
    want, path = files(tmp_path / "cache"), cache.path("hidden", 2)
    os.truncate(path, left)
    build(tmp_path / "cache")
    assert "damaged: " in caplog.text and "hidden-00002.npy" in caplog.text
    assert files(tmp_path / "cache") == want


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(inputs=INPUTS | {"teacher": "cc"}), "teacher: was 'aa', is 'cc'"),
        (dict(spec=dataclasses.replace(SPEC, dtype="bfloat16")), "cache.dtype"),
        (dict(spec=dataclasses.replace(SPEC, compute_dtype="bfloat16")), "cache.compute_dtype"),
        (dict(vocab=VOCAB - 1), "vocab"),
    ],
)
def test_other_inputs_are_refused(tmp_path, change, named):
    build(tmp_path / "cache")
    with pytest.raises(StaleWork, match=named):
        build(tmp_path / "cache", **change)


def test_other_data_are_refused(tmp_path):
    build(tmp_path / "cache")
    with pytest.raises(StaleWork, match="encoded: was"):
        build(tmp_path / "cache", data=encoded(1))
    cache, batch = build(tmp_path / "cache"), epochs(True)[0]
    with pytest.raises(ValueError, match="made from other data"):
        cache.batch(batch | {"loss_mask": batch["segment_ids"] > 0})


def test_a_full_disk_is_noticed_before_any_work(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1000))
    monkeypatch.setattr(teacher_cache, "make_step", lambda *_: pytest.fail("work began"))
    with pytest.raises(ConfigError, match=r"needs 0\.00 GiB more, .*/cache has 0\.00 GiB free"):
        build(tmp_path / "cache")


@pytest.mark.parametrize(
    "change",
    [
        dict(kind="topk"),
        dict(dtype="float16"),
        dict(compute_dtype="half"),
        dict(k=5),
        dict(kind="top_k"),
        dict(kind="top_k", k=-1),
        dict(batch_rows=0),
        dict(temperature=0.0),
    ],
)
def test_settings_are_checked(change):
    with pytest.raises(ConfigError, match="cache"):
        CacheSpec(**change)


def test_more_ids_than_the_vocabulary(tmp_path):
    with pytest.raises(ConfigError, match="cache_k is 301, the vocabulary has 300"):
        build(tmp_path / "cache", dataclasses.replace(SPEC, kind="top_k", k=301))
    assert not (tmp_path / "cache").exists()


def test_examples_without_a_scored_token_have_no_shard(tmp_path, small_shards):
    data = encoded()
    segment = data.segment.copy()
    for example in (0, 5, 6, len(data) - 1):
        segment[data.offsets[example] : data.offsets[example + 1]] = encode.PROMPT
    silent = dataclasses.replace(data, segment=segment)
    cache = build(tmp_path / "cache", data=silent)
    assert (np.diff(cache.first_row) > 0).all() and cache.first_row[-1] == silent.scored_lengths.sum() == cache.tokens
    rows = np.concatenate([np.load(cache.path("hidden", i)) for i in range(len(cache.first_example))])
    batch = next(batches.scoring_batches(silent, np.arange(len(data)), row_length=64, batch_rows=64))[0]
    want = cache.batch(batch)["teacher_hidden"][batch["loss_mask"]]
    assert len(want) == len(rows) and np.abs(np.sort(want, axis=0) - np.sort(rows, axis=0)).max() == 0
