"""The fused head against a float64 oracle that holds all logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax.head import Head, Loss, Stats, default_chunk, head_loss, head_stats, logits
from kd_jax.sharding import make_mesh

# distillation.md 2.6: five ids, values and gradients computed in float64 elsewhere
Z_S = np.array([[0.5, -1, 2, 0, -0.5]])
Z_T = np.array([[1, 0, 1.5, -1, 0.5]])
GOLDEN = {1.0: 0.2119394594, 2.0: 0.0672249098}
GOLDEN_GRAD = [-0.1163480780, -0.0644736202, 0.2323203585, 0.0548003688, -0.1062990290]


def oracle(h_s, head_s, h_t, head_t, targets, w, spec):
    """Loss, per-token values and gradients in NumPy float64 with all logits alive."""
    f8 = lambda x: np.asarray(x, np.float64)
    W, b = f8(head_s.weight)[: spec.vocab], 0.0 if head_s.bias is None else f8(head_s.bias)[: spec.vocab]
    raw = (f8(h_s) @ W.T + b) * head_s.logit_scale
    z = raw if head_s.softcap is None else head_s.softcap * np.tanh(raw / head_s.softcap)
    softmax = lambda z: np.exp(z - z.max(1, keepdims=True)) / np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True)
    rows, q = np.arange(len(z)), softmax(z)
    onehot = np.eye(spec.vocab)[targets]
    ce = -np.log(q[rows, targets])
    dz = f8(w["ce"])[:, None] * (q - onehot)
    loss, values = (f8(w["ce"]) * ce).sum(), {"ce": ce}
    if spec.divergence:
        zt = f8(h_t) @ f8(head_t.weight)[: spec.vocab].T
        p, qt = softmax(zt / spec.teacher_T), softmax(z / spec.student_T)
        c = spec.student_T**2 if spec.t_squared else 1.0
        values["kd"] = (p * (np.log(p) - np.log(qt))).sum(1)
        loss += c * (f8(w["kd"]) * values["kd"]).sum()
        dz += c / spec.student_T * f8(w["kd"])[:, None] * (qt - p)
    if head_s.softcap is not None:
        dz = dz * (1 - (z / head_s.softcap) ** 2)
    dz = dz * head_s.logit_scale
    return loss, values, dz @ W, dz.T @ f8(h_s), dz.sum(0)


def problem(seed=0, n=45, width=12, teacher_width=20, vocab=37, pad_s=3, pad_t=8, scale=1.0, bias=True):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)
    student = Head(normal(vocab + pad_s, width), normal(vocab + pad_s) if bias else None)
    mask = rng.random(n) < 0.4
    return dict(
        h_s=normal(n, width),
        student=student,
        h_t=normal(n, teacher_width),
        teacher=Head(normal(vocab + pad_t, teacher_width)),
        targets=jnp.asarray(rng.integers(0, vocab, n), jnp.int32),
        weights={"ce": jnp.asarray(mask * 0.3, jnp.float32), "kd": jnp.asarray(mask * 0.7, jnp.float32)},
    ), mask


def value_and_grads(p, spec):
    def f(h_s, student):
        return head_loss(h_s, student, p["h_t"], p["teacher"], p["targets"], p["weights"], spec)

    return jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(p["h_s"], p["student"])


@pytest.mark.parametrize("T", [1.0, 2.0])
def test_forward_kl_golden_values(T, check):
    eye = jnp.eye(5)
    spec = Loss(5, "fkl", T, T, t_squared=False)
    weights = {"ce": jnp.zeros(1), "kd": jnp.ones(1)}
    f = lambda z: head_loss(z, Head(eye), jnp.float32(Z_T), Head(eye), jnp.zeros(1, jnp.int32), weights, spec)[0]
    value, grad = jax.value_and_grad(f)(jnp.float32(Z_S))
    check("forward KL golden value", abs(value - GOLDEN[T]), 1e-6)
    if T == 1.0:
        check("forward KL golden gradient", np.abs(grad[0] - np.array(GOLDEN_GRAD)).max(), 1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 16, 45, 64])
@pytest.mark.parametrize(
    "spec", [Loss(37, "fkl"), Loss(37, "fkl", 2.0, 2.0), Loss(37, "fkl", 1.5, 3.0, t_squared=False)]
)
def test_loss_and_gradients_against_float64(chunk, spec, check):
    p, mask = problem()
    spec = dataclasses.replace(spec, chunk=chunk)
    (loss, values), (dh, dhead) = value_and_grads(p, spec)
    want, want_values, want_dh, want_dw, want_db = oracle(
        p["h_s"], p["student"], p["h_t"], p["teacher"], p["targets"], p["weights"], spec
    )
    check("head loss vs float64 (relative)", abs(loss - want) / want, 1e-5)
    for term in ("ce", "kd"):
        check("head per-token values vs float64", np.abs(values[term][mask] - want_values[term][mask]).max(), 2e-5)
        assert np.all(np.asarray(values[term])[~mask] == 0)
    check("head gradient vs float64", np.abs(dh - want_dh).max(), 2e-5)
    check("head gradient vs float64", np.abs(dhead.weight[:37] - want_dw).max(), 2e-5)
    check("head gradient vs float64", np.abs(dhead.bias[:37] - want_db).max(), 2e-5)
    assert np.all(np.asarray(dhead.weight)[37:] == 0), "ids above the effective vocabulary get no gradient"


@pytest.mark.parametrize("change", [dict(softcap=2.0), dict(logit_scale=0.25), dict(softcap=1.5, logit_scale=3.0)])
def test_head_function_chain_rule(change, check):
    p, _ = problem()
    p["student"] = dataclasses.replace(p["student"], **change)
    spec = Loss(37, "fkl", chunk=16)
    (loss, _), (dh, dhead) = value_and_grads(p, spec)
    want, _, want_dh, want_dw, _ = oracle(
        p["h_s"], p["student"], p["h_t"], p["teacher"], p["targets"], p["weights"], spec
    )
    check("head loss vs float64 (relative)", abs(loss - want) / want, 1e-5)
    check("head gradient vs float64", np.abs(dh - want_dh).max(), 2e-5)
    check("head gradient vs float64", np.abs(dhead.weight[:37] - want_dw).max(), 2e-5)


def test_softcap_golden():
    z = logits(jnp.float32(Z_S), Head(jnp.eye(5), softcap=2.0), 5)
    np.testing.assert_allclose(z[0], [0.4898373248, -0.9242343145, 1.5231883119, 0, -0.4898373248], atol=1e-6)


def test_cross_entropy_alone_needs_no_teacher():
    p, mask = problem()
    spec, weights = Loss(37, chunk=16), {"ce": p["weights"]["ce"]}
    loss, values = head_loss(p["h_s"], p["student"], None, None, p["targets"], weights, spec)
    want, want_values, *_ = oracle(p["h_s"], p["student"], None, None, p["targets"], weights, spec)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_allclose(values["ce"][mask], want_values["ce"][mask], rtol=1e-4)


def test_skipped_rows_cannot_matter():
    p, mask = problem()
    spec = Loss(37, "fkl", chunk=8)
    clean = value_and_grads(p, spec)
    poison = jnp.where(jnp.asarray(mask)[:, None], 0.0, jnp.nan)
    dirty = dict(p, h_s=p["h_s"] + poison, h_t=p["h_t"] + poison, targets=jnp.where(mask, p["targets"], 10**6))
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(value_and_grads(dirty, spec))):
        np.testing.assert_array_equal(a, b)


def test_nothing_masked_in_is_zero():
    p, _ = problem()
    p["weights"] = jax.tree.map(jnp.zeros_like, p["weights"])
    for leaf in jax.tree.leaves(value_and_grads(p, Loss(37, "fkl", chunk=8))):
        assert np.all(np.asarray(leaf) == 0)


def test_identical_models_and_extreme_logits_stay_finite():
    p, _ = problem(scale=30.0, teacher_width=12, pad_t=3, bias=False)
    p |= dict(h_t=p["h_s"], teacher=p["student"])
    (_, values), grads = value_and_grads(
        dict(p, weights=p["weights"] | {"ce": p["weights"]["ce"] * 0}), Loss(37, "fkl")
    )
    assert np.abs(values["kd"]).max() < 1e-4
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert max(np.abs(g).max() for g in jax.tree.leaves(grads)) < 1e-3
    banned = dict(p, student=Head(p["student"].weight, jnp.where(jnp.arange(40) == 5, -jnp.inf, 0.0)))
    banned["targets"] = jnp.where(p["targets"] == 5, 6, p["targets"])
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(value_and_grads(banned, Loss(37, "fkl"))))


def test_t_squared_multiplies_exactly():
    p, _ = problem()
    p["weights"]["ce"] *= 0
    with_, without = (value_and_grads(p, Loss(37, "fkl", 2.0, 2.0, t_squared=t)) for t in (True, False))
    for a, b in zip(jax.tree.leaves((with_[0][0], with_[1])), jax.tree.leaves((without[0][0], without[1]))):
        np.testing.assert_allclose(a, 4 * np.asarray(b), rtol=1e-6)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 4, 2), (1, 1, 8)])
def test_sharded_equals_one_device(shape, check):
    p, mask = problem(n=48, vocab=40, pad_s=0, pad_t=0)
    spec = Loss(40, "fkl", 2.0, 2.0, chunk=4)
    want = value_and_grads(p, spec)
    stats = lambda h, head: head_stats(
        h, head, p["targets"], jnp.asarray(mask), Stats(40, (1.0,), (3,), (0.9,), chunk=4)
    )
    want_stats = jax.jit(stats)(p["h_s"], p["student"])
    mesh = make_mesh(*shape)
    with jax.set_mesh(mesh):
        rows, table = NamedSharding(mesh, P(("data", "fsdp"))), NamedSharding(mesh, P("tensor", "fsdp"))
        placed = dict(
            p,
            h_s=jax.device_put(p["h_s"], rows),
            h_t=jax.device_put(p["h_t"], rows),
            student=dataclasses.replace(p["student"], weight=jax.device_put(p["student"].weight, table)),
        )
        got = value_and_grads(placed, spec)
        got_stats = jax.jit(stats)(placed["h_s"], placed["student"])
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got)):
        a, b = np.asarray(a), np.asarray(b)
        check("head on 8 devices vs 1 (relative)", np.abs(a - b).max() / np.abs(a).max(), 1e-6)
    for k in want_stats:
        check("scoring statistics on 8 devices vs 1", np.abs(want_stats[k] - got_stats[k]).max(), 5e-6)


def test_no_buffer_of_all_logits():
    """4 matmuls with the gradient, 2 without; temporaries far below one [N, V] float32 array."""
    n, width, vocab = 4096, 16, 4096
    shapes = (jax.ShapeDtypeStruct((n, width), "float32"), jax.ShapeDtypeStruct((vocab, width), "float32"))
    y, w = jnp.zeros(n, jnp.int32), jnp.ones(n)
    spec = Loss(vocab, "fkl", chunk=64)
    f = lambda h, W: head_loss(h, Head(W), h, Head(W), y, {"ce": w, "kd": w}, spec)[0]
    lowered = jax.jit(jax.grad(f, (0, 1))).lower(*shapes)
    assert lowered.as_text().count("dot_general") == 4
    assert jax.jit(f).lower(*shapes).as_text().count("dot_general") == 2
    assert lowered.compile().memory_analysis().temp_size_in_bytes < n * vocab * 4 / 8


def test_vmap_over_students_equals_a_loop():
    p, _ = problem(bias=False)
    spec = Loss(37, "fkl", chunk=16)
    f = lambda h, W: head_loss(h, Head(W), p["h_t"], p["teacher"], p["targets"], p["weights"], spec)[0]
    h, W = jnp.stack([p["h_s"], -p["h_s"]]), jnp.stack([p["student"].weight, 2 * p["student"].weight])
    got = jax.vmap(jax.value_and_grad(f, (0, 1)))(h, W)
    for i in range(2):
        for a, b in zip(jax.tree.leaves(jax.value_and_grad(f, (0, 1))(h[i], W[i])), jax.tree.leaves(got)):
            np.testing.assert_allclose(a, b[i], rtol=1e-5, atol=1e-6)


def test_settings_are_refused():
    with pytest.raises(ValueError, match="unknown divergence 'kl'"):
        Loss(10, "kl")
    with pytest.raises(ValueError, match="student_T must be positive"):
        Loss(10, "fkl", student_T=0.0)
    p, _ = problem()
    with pytest.raises(ValueError, match="exactly"):
        head_loss(p["h_s"], p["student"], None, None, p["targets"], p["weights"], Loss(37))


def test_default_chunk():
    assert default_chunk(4096, "cpu") == 512 and default_chunk(50257, "cpu") == 64
    assert default_chunk(32000, "gpu") == 2048 and default_chunk(256, "gpu") == 4096


# ------------------------------------------------------------------------------------------------------ statistics


def test_worked_example(check):
    """attacks.md 11: five ids, six targets."""
    t, v = np.arange(6)[:, None], np.arange(5)[None]
    z = ((4 * t + 7 * v + 3 * t * v) % 17) / 4
    want = dict(
        logp=[-0.564417, -0.503158, -1.586985, -1.421112, -0.208330, -0.465086],
        log1m_p=[-0.840931, -0.927904, -0.228836, -0.276340, -1.670991, -0.989080],
        entropy=[1.115640, 1.097429, 1.192567, 1.549376, 0.717544, 1.103724],
        logp_std=[0.807485, 0.851400, 0.781727, 0.339767, 1.080523, 0.900679],
        top1_logp=[-0.564417, -0.503158, -0.586985, -1.171112, -0.208330, -0.465086],
        top2_gap=[0.75, 1.00, 1.00, 0.25, 2.25, 1.25],
        rank=[0, 0, 1, 1, 0, 0],
        top1_id=[2, 1, 3, 0, 0, 2],
        ties=[0] * 6,
    )
    y = jnp.array([2, 1, 4, 1, 0, 2], jnp.int32)
    got = head_stats(jnp.float32(z), Head(jnp.eye(5)), y, jnp.ones(6, bool), Stats(5, chunk=4))
    for name, values in want.items():
        check("scoring statistics, worked example", np.abs(np.asarray(got[name]) - values).max(), 1.1e-6)


@pytest.mark.parametrize("vocab", [17, 50257])
def test_statistics_against_float64(vocab, check):
    """Random, peaked (one logit 30), uniform rows and a target that rounds to probability 1; padded ids at +99."""
    rng = np.random.default_rng(1)
    z = rng.standard_normal((6, vocab)) * 3
    z[1, 3] = 30.0
    z[2] = 0.0
    z[3, 5] = 40.0
    y = np.array([1, 3, 0, 5, 2, 4])
    z32 = z.astype(np.float32).astype(np.float64)
    lse = np.log(np.exp(z32 - z32.max(1, keepdims=True)).sum(1)) + z32.max(1)
    lp = z32 - lse[:, None]
    p = np.exp(lp)
    H = -(p * lp).sum(1)
    others = np.array([np.log(np.exp(np.delete(z32[i], y[i]) - lse[i]).sum()) for i in range(6)])
    rows = np.arange(6)
    grid = {}
    for T in (0.7, 1.0):
        lt = np.log(np.exp(lp / T - (lp / T).max(1, keepdims=True)).sum(1)) + (lp / T).max(1)
        grid[f"lse_t{T:g}"] = lt
        top = -np.sort(-lp, axis=1)[:, :4] / T
        grid[f"topk_lse_k4_t{T:g}"] = np.log(np.exp(top - top[:, :1]).sum(1)) + top[:, 0]
        q = np.exp(lp / T - lt[:, None])
        grid[f"cum_above_p0.9_t{T:g}"] = np.array([q[i][z32[i] > z32[i, y[i]]].sum() for i in range(6)])
        ordered = -np.sort(-q, axis=1)
        mass = np.cumsum(ordered, axis=1)
        grid[f"nucleus_p0.9_t{T:g}"] = mass[rows, (mass < 0.9 - 1e-7).sum(1)]
    want = dict(
        logp=lp[rows, y], log1m_p=others, entropy=H, logp_std=np.sqrt((p * (lp + H[:, None]) ** 2).sum(1)), **grid
    )
    padded = np.concatenate([z, np.full((6, 7), 99.0)], axis=1)
    # hidden states are unit vectors, so the head's columns are the logits themselves
    head, hidden = Head(jnp.float32(padded.T)), jnp.eye(6, dtype=jnp.float32)
    got = head_stats(hidden, head, jnp.asarray(y, jnp.int32), jnp.ones(6, bool), Stats(vocab, (0.7, 1.0), (4,), (0.9,)))
    for name, values in want.items():
        tolerance = 1e-5
        check(
            f"scoring statistics vs float64: {name.split('_t')[0]}",
            np.abs(np.asarray(got[name]) - values).max(),
            tolerance,
        )
    assert np.isfinite(np.asarray(got["log1m_p"])).all(), "log(1 - p) stays finite where p rounds to 1"
    assert np.asarray(got["logp_std"])[2] < 1e-4, "a uniform row has no spread"


def test_ties_are_counted_and_the_lowest_id_wins():
    z = jnp.float32([[1, 3, 3, 0], [3, 1, 3, 3]])
    got = head_stats(z, Head(jnp.eye(4)), jnp.array([2, 1], jnp.int32), jnp.ones(2, bool), Stats(4))
    assert got["top1_id"].tolist() == [1, 0]
    assert got["rank"].tolist() == [0, 3] and got["ties"].tolist() == [1, 0]
    assert got["top2_gap"].tolist() == [0.0, 0.0]


def test_score_equals_the_training_loss_on_the_same_token(check):
    p, mask = problem()
    _, values = head_loss(
        p["h_s"], p["student"], p["h_t"], p["teacher"], p["targets"], p["weights"], Loss(37, "fkl", chunk=8)
    )
    got = head_stats(p["h_s"], p["student"], p["targets"], jnp.asarray(mask), Stats(37, chunk=8))
    check("score vs training loss, same token", np.abs(got["logp"] + values["ce"]).max(), 1e-6)
