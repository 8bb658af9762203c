"""The scoring loop: what a score must not depend on, what a table holds, and how it resumes."""

import dataclasses
import functools
import json
import os
import stat

import jax
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from kd_jax import metrics, score, sharding
from kd_jax.data import encode, records, tokenizer
from kd_jax.transformer import ModelConfig, Transformer

ONE = lambda: sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])


@functools.cache
def encoded() -> encode.Encoded:
    """Forty invented records of different lengths."""
    rng = np.random.default_rng(0)
    words = lambda n: " ".join("".join(rng.choice(list("abcdefgh"), 4)) for _ in range(n))
    frame = records.make_frame(
        [
            dict(
                group=None,
                task="t",
                instruction=words(rng.integers(1, 8)),
                input="",
                response=words(n),
                source=f"x:{n}",
            )
            for n in rng.integers(1, 14, 40)
        ]
    )
    tok = tokenizer.load({"train_size": 300}, train_texts=frame.response)
    return encode.encode(frame, tok, template="plain", bos="none", max_length=96, max_prompt=32)


VOCAB = 320  # rows of the model; the tokenizer's own vocabulary is smaller


@functools.cache
def model() -> Transformer:
    cfg = ModelConfig(
        vocab_size=VOCAB,
        width=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        mlp=64,
        max_positions=96,
        embed_dim=32,
        rotary_dim=8,
    )
    matrices = lambda x: 15 * x if x.ndim == 2 and len(x) == VOCAB else 4 * x if x.ndim == 3 else x
    return jax.tree.map(matrices, Transformer(cfg, jax.random.key(0)))  # far from uniform, as a trained model is


SPEC = score.Scoring(vocab=300, row_length=96, batch_rows=4, temperatures=(1.0,), top_k=(5,), top_p=(0.9,), chunk=16)


def run(spec=SPEC, mesh=None, indices=None):
    mesh = mesh or ONE()
    with jax.set_mesh(mesh):
        placed = jax.device_put(model(), sharding.shardings(model(), mesh))
        return score.score(placed, encoded(), np.arange(40) if indices is None else indices, spec, mesh)


def deviation(a, b) -> float:
    """Worst difference of real fields; integer fields must agree but at near ties, of which there are none here."""
    for name in ("rank", "ties", "top1_id", "target_id", "segment"):
        np.testing.assert_array_equal(a[name], b[name])
    nucleus = [n for n in a if n.startswith("nucleus")]
    for name in nucleus:  # a step function: it may differ only where the smaller set reaches 0.9 to rounding
        differs = np.abs(a[name] - b[name]) > 1e-5
        assert differs.mean() < 0.02 and np.all(np.abs(np.minimum(a[name], b[name])[differs] - 0.9) < 1e-5)
    real = [n for n in a if a[n].dtype == np.float32 and n not in nucleus]
    assert len(real) == 9
    return max(float(np.abs(a[n] - b[n]).max()) for n in real)


def test_every_scored_token_by_a_plain_forward_pass(check):
    """Each record alone, unpacked, unpadded, logits in float64."""
    counts, fields = run()
    e, ends = encoded(), np.cumsum(counts)
    for i in (0, 7, 39):
        tokens = e.tokens[e.offsets[i] : e.offsets[i + 1]]
        n = len(tokens)
        with jax.default_matmul_precision("highest"):
            h = model().hidden(tokens[None], np.ones((1, n), np.int32), np.arange(n, dtype=np.int32)[None])
        z = np.asarray(h[0], np.float64) @ np.asarray(model().head().weight, np.float64)[:300].T
        logp = z - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True)) - z.max(1, keepdims=True)
        scored = np.flatnonzero(np.isin(e.segment[e.offsets[i] : e.offsets[i + 1]], (encode.RESPONSE, encode.EOS)))
        assert counts[i] == len(scored) == len(tokens) - (e.segment[e.offsets[i] : e.offsets[i + 1]] == 0).sum()
        mine = slice(ends[i] - counts[i], ends[i])
        np.testing.assert_array_equal(fields["target_id"][mine], tokens[scored])
        check(
            "score vs a record alone in float64",
            np.abs(fields["logp"][mine] - logp[scored - 1, tokens[scored]]).max(),
            1e-5,
        )
        np.testing.assert_array_equal(
            fields["rank"][mine], (logp[scored - 1] > logp[scored - 1, tokens[scored]][:, None]).sum(1)
        )


@pytest.mark.parametrize("change", [dict(batch_rows=1), dict(batch_rows=16), dict(row_length=200), dict(chunk=512)])
def test_batch_size_and_padding_change_nothing(change, check):
    (counts, want), (got_counts, got) = run(), run(dataclasses.replace(SPEC, **change))
    np.testing.assert_array_equal(counts, got_counts)
    check("score vs batch size and padding", deviation(want, got), 1e-5)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_device_count_changes_nothing(shape, check):
    (_, want), (_, got) = run(), run(mesh=sharding.make_mesh(*shape))
    check("score on 8 devices vs 1", deviation(want, got), 1e-5)


def test_batch_mates_and_order_change_nothing(check):
    (counts, want), some = run(), np.array([31, 2, 17])
    got_counts, got = run(indices=some)
    np.testing.assert_array_equal(got_counts, counts[some])
    ends = np.cumsum(counts)
    same = {k: np.concatenate([v[ends[i] - counts[i] : ends[i]] for i in some]) for k, v in want.items()}
    check("score vs batch-mates", deviation(same, got), 1e-5)


def test_first_divergence():
    """Leading hits per example; whole and empty examples included."""
    top1 = np.array([1, 2, 9, 4, 5, 6, 9])
    target = np.array([1, 2, 3, 4, 5, 6, 7])
    assert score.first_divergence(np.array([4, 2, 0, 1]), top1, target).tolist() == [2, 2, 0, 0]


def write(folder, shard_examples=16, metadata=None):
    spec, mesh = dataclasses.replace(SPEC, shard_examples=shard_examples), ONE()
    with jax.set_mesh(mesh), metrics.progress(40, "test") as bar:
        score.score_role(model(), encoded(), "private", folder, spec, mesh, metadata or {"run": "teacher"}, bar)


def test_tables_open_as_they_are_and_resume_by_shard(tmp_path):
    write(tmp_path)
    files = sorted(tmp_path.glob("*.parquet"))
    assert [f.name for f in files] == [f"private-{i:05d}.parquet" for i in range(3)]
    assert all(stat.S_IMODE(os.stat(f).st_mode) == 0o600 for f in files)
    whole = pd.concat([pd.read_parquet(f) for f in files], ignore_index=True)
    assert whole.example_id.tolist() == encoded().example_id.tolist()
    assert (whole.logp.map(len) == whole.n_tokens).all() and (whole.segment.map(lambda s: s[-1]) == encode.EOS).all()
    assert pq.read_schema(files[0]).metadata[b"run"] == b"teacher"
    kept = files[0].stat().st_mtime_ns, files[2].read_bytes()
    files[2].unlink()
    (tmp_path / ".private-00002.parquet.tmp").write_bytes(b"half a file")
    write(tmp_path)
    assert files[0].stat().st_mtime_ns == kept[0], "finished shards are kept"
    assert files[2].read_bytes() == kept[1], "a missing shard is made again, the same"


def test_metadata_is_json_that_names_the_run(tmp_path):
    write(tmp_path, 64, {"run": "students/kd", "provenance": json.dumps({"technique": "kd"})})
    metadata = pq.read_schema(tmp_path / "private-00000.parquet").metadata
    assert json.loads(metadata[b"provenance"])["technique"] == "kd"
