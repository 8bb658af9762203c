"""The logit lens: every row by NumPy, the last row the model's own, and when a target counts as emerged."""

import dataclasses
import functools
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from planted_examples import POST, TIED, VOCAB, encoded, model

from kd_jax import score, sharding
from kd_jax.transformer import Transformer, apply_block, attend, attention_mask
from kd_jax.whitebox.lens import _compiled, _emergence, lens
from kd_jax.whitebox.spec import Whitebox, example_means

SPEC = Whitebox(VOCAB, row_length=32, batch_rows=2)
ONE = lambda: sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])


def found(cfg, indices=None, spec=SPEC, mesh=None) -> dict[str, np.ndarray]:
    mesh, e = mesh or ONE(), encoded()
    with jax.set_mesh(mesh):
        placed = jax.device_put(model(cfg), sharding.shardings(model(cfg), mesh))
        return lens(placed, e, np.arange(len(e)) if indices is None else indices, spec, mesh)


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@functools.partial(jax.jit, static_argnums=0)
def states(cfg, m, tokens):
    """[L+1, T, E]: what the head reads of one text after 0, 1, ... layers, layer by layer."""
    time = tokens.shape[1]
    mask = attention_mask(jnp.ones((1, time), jnp.int32))
    x, rotation = m.enter(tokens, jnp.arange(time)[None], jnp.float32)
    kept = [m.leave(x)]
    for i in range(cfg.layers):
        block = jax.tree.map(lambda w, i=i: w[i], m.blocks)
        x, _ = apply_block(cfg, block, x, rotation, (1, time), lambda q, k, v: (attend(q, k, v, mask), None))
        kept.append(m.leave(x))
    return jnp.stack(kept)


def by_hand(cfg, i: int) -> tuple[np.ndarray, np.ndarray]:
    """[L+1, tokens] of one example alone: log-probabilities of its targets, and whether they are the first guess."""
    e = encoded()
    own = slice(e.offsets[i], e.offsets[i + 1])
    tokens = np.zeros((1, 16), np.int32)  # padded at the end, where nothing looks
    tokens[0, : e.lengths[i]] = e.tokens[own]
    with jax.default_matmul_precision("highest"):
        h = np.asarray(states(cfg, model(cfg), tokens), np.float64)
    z = h @ np.asarray(model(cfg).embed.weight[...], np.float64)[:VOCAB].T
    scored = np.flatnonzero(e.segment[own] > 0)
    target = e.tokens[own][scored]
    return log_softmax(z)[:, scored - 1, target], z[:, scored - 1].argmax(-1) == target


@pytest.mark.parametrize("cfg", [TIED, POST], ids=["tied", "post-norm with projections"])
def test_every_row_layer_by_layer_and_alone(cfg, check):
    rows = found(cfg)
    assert rows["lens"].shape == (12, cfg.layers + 1) and rows["emergence"].shape == (12,)
    for i in (0, 5, 11):
        logp, first = by_hand(cfg, i)
        check("lens: row vs layer by layer in float64", np.abs(rows["lens"][i] - logp.mean(1)).max(), 2e-5)
        depth = [next((d for d in range(len(first)) if first[d:, t].all()), len(first)) for t in range(first.shape[1])]
        np.testing.assert_allclose(rows["emergence"][i], np.mean(depth) / (cfg.layers + 1), rtol=1e-6)


def test_the_last_row_is_that_of_the_score_table(check):
    rows, e = found(TIED), encoded()
    with jax.set_mesh(ONE()):
        counts, fields = score.score(model(TIED), e, np.arange(12), score.Scoring(VOCAB, 32, 2), ONE())
    own = example_means(counts, fields["logp"])
    check("lens: last row vs score table", np.abs(rows["lens"][:, -1] - own).max(), 1e-6)
    np.testing.assert_array_equal(rows["nll"], -rows["lens"][:, -1])


@pytest.mark.parametrize("cfg", [TIED, POST], ids=["tied", "post-norm with projections"])
def test_row_0_needs_the_embedding_alone(cfg, check):
    rows, e, m = found(cfg), encoded(), model(cfg)
    get = lambda x: np.asarray(x[...], np.float64)
    embedding = get(m.embed.weight)
    x = embedding @ get(m.project_in.weight) if cfg is POST else embedding
    own = slice(0, e.lengths[0])
    x = x[e.tokens[own]] + get(m.positions.weight)[np.arange(e.lengths[0]) + cfg.position_offset]
    if cfg is TIED:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + cfg.norm_eps)
        h = x * get(m.final_norm.scale) + get(m.final_norm.bias)
    else:
        h = x @ get(m.project_out.weight)
    scored = np.flatnonzero(e.segment[own] > 0)
    logp = log_softmax(h @ embedding[:VOCAB].T)[scored - 1, e.tokens[own][scored]]
    check("lens: row 0 vs the embedding by NumPy", abs(rows["lens"][0, 0] - logp.mean()), 2e-5)


def test_emergence_counts_from_the_last_miss():
    first = np.array(  # one column a token, one row after l = 0..3 layers
        [
            [1, 0, 1, 0, 1, 0],
            [1, 0, 0, 1, 1, 0],
            [1, 1, 1, 0, 1, 0],
            [1, 1, 1, 1, 0, 0],
        ],
        bool,
    )
    assert _emergence(jnp.array(first)).tolist() == [0, 2, 2, 3, 4, 4]


def test_order_padding_batch_mates_and_devices_change_nothing(check):
    want, some = found(TIED), np.array([9, 2, 5])
    cases = [
        (some, found(TIED, some)),
        (slice(None), found(TIED, spec=Whitebox(VOCAB, row_length=40, batch_rows=3), mesh=sharding.make_mesh(4, 2, 1))),
    ]
    for rows, got in cases:
        for name in want:
            check("lens vs order, padding and devices", np.abs(want[name][rows] - got[name]).max(), 1e-5)


def test_the_tap_holds_neither_states_nor_logits_of_all_layers():
    """No array of the program has as many entries as layers x tokens x width, or as tokens x vocabulary."""
    rows, time = 16, 256
    wide = dataclasses.replace(TIED, vocab_size=2000, max_positions=time)
    batch = {
        k: jax.ShapeDtypeStruct((rows, time), jnp.int32) for k in ("tokens", "targets", "segment_ids", "positions")
    }
    batch["loss_mask"] = jax.ShapeDtypeStruct((rows, time), bool)
    abstract = jax.eval_shape(functools.partial(Transformer, wide), jax.random.key(0))
    step = _compiled(2000, "highest", ONE())
    tokens = rows * time
    shapes = [v.aval.shape for v in _values(jax.make_jaxpr(step)(abstract, batch).jaxpr)]
    assert max(map(math.prod, shapes)) < tokens * 2000
    stacked = [shape for shape in shapes if shape[:2] == (wide.layers, tokens)]
    assert stacked and all(len(shape) == 2 for shape in stacked), "of all layers one number a token is kept"


def _values(jaxpr):
    """The results of all operations of a program, inner programs included."""
    for eqn in jaxpr.eqns:
        yield from (v for v in eqn.outvars if hasattr(v.aval, "shape"))
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from _values(inner)
