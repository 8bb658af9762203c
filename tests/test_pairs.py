"""Pair tables: two tiny models against NumPy, what a table holds, which pairs a config asks for."""

import dataclasses
import json
import os
import stat

import jax
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from test_score import ONE, SPEC, VOCAB, encoded, model

from kd_jax import graph, metrics, pairs, sharding
from kd_jax.data import encode
from kd_jax.errors import ConfigError
from kd_jax.transformer import ModelConfig, Transformer


def wide_teacher() -> Transformer:
    """Another width and another padding of the vocabulary than the student's."""
    sizes = dict(width=48, layers=1, heads=4, kv_heads=4, head_dim=12, mlp=64, embed_dim=48, rotary_dim=12)
    cfg = ModelConfig(vocab_size=VOCAB + 8, max_positions=96, **sizes)
    matrices = lambda x: 15 * x if x.ndim == 2 and len(x) == VOCAB + 8 else 4 * x if x.ndim == 3 else x
    return jax.tree.map(matrices, Transformer(cfg, jax.random.key(1)))


def write(folder, temperature=2.0, mesh=None, shard_examples=16):
    mesh = mesh or ONE()
    plain = {"run": "students/kd", "seed": "1", "variant": "plain", "provenance": json.dumps({"technique": "kd"})}
    metadata = pairs.describe(plain, "teacher", 0, temperature)
    spec = dataclasses.replace(SPEC, shard_examples=shard_examples)
    with jax.set_mesh(mesh), metrics.progress(40, "test") as bar:
        models = [jax.device_put(m, sharding.shardings(m, mesh)) for m in (wide_teacher(), model())]
        pairs.score_pair_role(
            *(*models, encoded(), "private", folder, spec, mesh, metadata, bar), temperature=temperature
        )
    return pd.concat([pd.read_parquet(f) for f in sorted(folder.glob("*.parquet"))], ignore_index=True)


def logits(m, tokens):
    """[n, 300] in float64 from a plain forward pass of one record."""
    n = len(tokens)
    with jax.default_matmul_precision("highest"):
        h = m.hidden(tokens[None], np.ones((1, n), np.int32), np.arange(n, dtype=np.int32)[None])
    return np.asarray(h[0], np.float64) @ np.asarray(m.head().weight, np.float64)[:300].T


def log_softmax(z):
    return z - z.max(1, keepdims=True) - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True))


def test_tables_of_two_models_equal_numpy(tmp_path, check):
    """Every scored token of some records: each alone, unpacked, all logits in float64."""
    got, e = write(tmp_path).set_index("example_id"), encoded()
    for i in (7, 39):
        tokens, row = e.tokens[e.offsets[i] : e.offsets[i + 1]], got.loc[e.example_id[i]]
        scored = np.flatnonzero(np.isin(e.segment[e.offsets[i] : e.offsets[i + 1]], (encode.RESPONSE, encode.EOS)))
        y = tokens[scored]
        z = [logits(m, tokens)[scored - 1] for m in (wide_teacher(), model())]
        la, lb, ta, tb = (log_softmax(x / t) for t in (1.0, 2.0) for x in z)
        g_ce, g_kl = np.exp(lb) - np.eye(300)[y], 2 * (np.exp(tb) - np.exp(ta))
        want = dict(
            kl_ab=(np.exp(la) * (la - lb)).sum(1),
            kl_ba=(np.exp(lb) * (lb - la)).sum(1),
            cos_ce_kl=(g_ce * g_kl).sum(1) / np.sqrt((g_ce**2).sum(1) * (g_kl**2).sum(1)),
        )
        for name, values in want.items():
            check(f"pair tables vs float64: {name}", np.abs(row[name] - values).max(), 2e-5)
        assert row.agree.tolist() == (la.argmax(1) == lb.argmax(1)).tolist()
        assert row.hit_b.tolist() == (lb.argmax(1) == y).tolist()
        assert row.target_id.tolist() == y.tolist() and row.segment[-1] == encode.EOS


def test_a_table_says_what_it_is_and_resumes(tmp_path, check):
    whole = write(tmp_path)
    files = sorted(tmp_path.glob("*.parquet"))
    assert [f.name for f in files] == [f"private-{i:05d}.parquet" for i in range(3)]
    assert all(stat.S_IMODE(os.stat(f).st_mode) == 0o600 for f in files)
    told = {k.decode(): v.decode() for k, v in pq.read_schema(files[0]).metadata.items() if k != b"pandas"}
    assert json.loads(told.pop("provenance")) == {
        "technique": "kd",
        "pair": {"teacher": "teacher", "seed": 0, "temperature": 2.0},
    }
    named = {"run": "students/kd", "seed": "1", "variant": "pair:teacher", "temperature": "2"}
    assert told == named | {"run_a": "teacher", "run_b": "students/kd"}
    assert whole.example_id.tolist() == encoded().example_id.tolist()
    kept = files[0].stat().st_mtime_ns, files[2].read_bytes()
    files[2].unlink()
    write(tmp_path)
    assert files[0].stat().st_mtime_ns == kept[0] and files[2].read_bytes() == kept[1]
    other = write(tmp_path / "mesh", mesh=sharding.make_mesh(2, 2, 2))
    flat = lambda frame, name: np.concatenate(frame[name].tolist())
    for name in ("kl_ab", "kl_ba", "cos_ce_kl"):
        check("pair tables on 8 devices vs 1", np.abs(flat(whole, name) - flat(other, name)).max(), 2e-5)


def test_which_pairs_a_config_asks_for(tmp_path):
    entry = dict(model="m", technique="sft", init="base", train_roles=("public",), recipe="r")
    student = entry | dict(technique="kd", teacher="teacher")
    made = {"base": dict(model="m", technique="none"), "teacher": entry, "students/a": student, "students/b": student}
    runs = {r.name: r for r in graph.parse(json.loads(json.dumps(made)), {"m"}, {"r"}, {"kd": "kd", "sft": "sft"})}
    both = [("teacher", "students/a"), ("teacher", "students/b")]
    assert pairs.chosen(("students",), runs) == both
    assert pairs.chosen(("teacher:students/b", "students", "teacher:base"), runs) == [*both[::-1], ("teacher", "base")]
    assert pairs.chosen((), runs) == []
    for wrong in ("teacher", "teacher:students/c", "teacher:teacher"):
        with pytest.raises(ConfigError, match="score.pairs"):
            pairs.chosen((wrong,), runs)
    assert pairs.folder_of(tmp_path, "teacher", "students/a", 3) == tmp_path / "pairs/teacher__students.a/seed3"
