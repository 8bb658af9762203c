"""The fused head against a float64 oracle that holds all logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax import losses
from kd_jax.head import (
    Comparison,
    Head,
    Loss,
    Policy,
    Stats,
    TopK,
    default_chunk,
    head_loss,
    head_pair,
    head_stats,
    head_topk,
    logits,
)
from kd_jax.sharding import make_mesh

Z_S = np.array([[0.5, -1, 2, 0, -0.5]])
TERMS = ("ce", "kd", "policy")


def naive_kd(spec, p, q):
    """The divergence [N] of probabilities, written out (test_losses.py has another oracle, with other gradients)."""
    kl = lambda a, b: jnp.sum(a * jnp.log(a / b), axis=-1)
    b, a, const = spec.beta, spec.alpha, jax.lax.stop_gradient
    if spec.divergence == "akl":
        order = jnp.argsort(p, axis=-1)
        gap = jnp.take_along_axis(jnp.abs(p - q), order, axis=-1)
        in_head = jnp.cumsum(jnp.take_along_axis(p, order, axis=-1), axis=-1) > spec.mu
        w = const(jnp.sum(gap * in_head, axis=-1) / jnp.sum(gap, axis=-1))
        return w * kl(p, q) + (1 - w) * kl(q, p)
    return {
        "fkl": lambda: kl(p, q),
        "rkl": lambda: kl(q, p),
        "jsd": lambda: b * kl(p, b * p + (1 - b) * q) + (1 - b) * kl(q, b * p + (1 - b) * q),
        "sfkl": lambda: kl(p, a * p + (1 - a) * q),
        "srkl": lambda: kl(q, (1 - a) * p + a * q),
        "tvd": lambda: jnp.sum(jnp.abs(p - q), axis=-1) / 2,
    }[spec.divergence]()


def naive(spec, h_s, head_s, h_t, head_t, targets, weights, policy):
    """(loss, values) with all logits alive."""
    W, rows = head_s.weight[: spec.vocab], jnp.arange(len(h_s))
    z = (h_s @ W.T + (0 if head_s.bias is None else head_s.bias[: spec.vocab])) * head_s.logit_scale
    z = z if head_s.softcap is None else head_s.softcap * jnp.tanh(z / head_s.softcap)
    values, logq_y = {}, jax.nn.log_softmax(z)[rows, targets]
    if "ce" in weights:
        values["ce"] = -logq_y
    if "policy" in weights:
        ratio = jnp.exp(logq_y - policy.offset)
        clipped = jnp.clip(ratio, 1 - spec.clip, 1 + spec.clip)
        values["policy"] = jnp.maximum(-policy.advantage * ratio, -policy.advantage * clipped)
    if "kd" in weights:
        q = jax.nn.softmax(z / spec.student_T)
        if isinstance(head_t, TopK):
            p, q = jnp.exp(head_t.logp), jnp.take_along_axis(q, head_t.ids, axis=-1)
            p, q = (jnp.concatenate([x, 1 - x.sum(-1, keepdims=True)], axis=-1) for x in (p, q))
        else:
            p = jax.nn.softmax(h_t @ head_t.weight[: spec.vocab].T / spec.teacher_T)
        values["kd"] = naive_kd(spec, p, q)
    scale = dict.fromkeys(TERMS, 1.0) | {"kd": spec.student_T**2 if spec.t_squared else 1.0}
    return sum(scale[t] * jnp.sum(weights[t] * values[t]) for t in values), values


ARGUMENTS = ("h_s", "student", "h_t", "teacher", "targets", "weights", "policy")


def oracle(p, spec):
    """((loss, values), (dh, dhead)) in float64 by jax.grad of the naive loss."""
    wide = lambda x: np.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else np.asarray(x)
    with jax.enable_x64(True):
        h_s, head_s, *rest = jax.tree.map(lambda x: jnp.asarray(wide(x)), tuple(p.get(k) for k in ARGUMENTS))
        f = lambda h, head: naive(spec, h, head, *rest)
        return jax.tree.map(np.asarray, jax.value_and_grad(f, (0, 1), has_aux=True)(h_s, head_s))


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


def with_policy(p, mask, seed=1):
    """The same problem with all three terms; a third of the sampled tokens has a ratio beyond the clip."""
    rng = np.random.default_rng(seed)
    n = len(mask)
    z = np.asarray(logits(p["h_s"], p["student"], 37), np.float64)
    logq = (z - np.log(np.exp(z).sum(1, keepdims=True)))[np.arange(n), p["targets"]]
    policy = Policy(jnp.float32(rng.standard_normal(n)), jnp.float32(logq - rng.normal(0, 0.2, n)))
    return p | dict(policy=policy, weights=p["weights"] | {"policy": jnp.float32(mask * rng.random(n))})


def value_and_grads(p, spec):
    return _value_and_grads(spec, {k: p.get(k) for k in ARGUMENTS})


@functools.partial(jax.jit, static_argnums=0)
def _value_and_grads(spec, p):
    def f(h_s, student):
        return head_loss(h_s, student, p["h_t"], p["teacher"], p["targets"], p["weights"], spec, p["policy"])

    return jax.value_and_grad(f, (0, 1), has_aux=True)(p["h_s"], p["student"])


def agrees(p, mask, spec, check, name="head"):
    (loss, values), (dh, dhead) = jax.tree.map(lambda x: np.asarray(x, np.float64), value_and_grads(p, spec))
    (want, want_values), (want_dh, want_dhead) = oracle(p, spec)
    check(f"{name}: loss vs float64 (relative)", abs(loss - want) / abs(want), 1e-5)
    assert set(values) == set(p["weights"])
    for term, got in values.items():
        check(f"{name}: per-token values vs float64", np.abs(got[mask] - want_values[term][mask]).max(), 2e-5)
        assert np.all(got[~mask] == 0)
    for got, want in zip(jax.tree.leaves((dh, dhead)), jax.tree.leaves((want_dh, want_dhead))):
        check(f"{name}: gradient vs float64", np.abs(got - want).max(), 2e-5)
    assert np.all(dhead.weight[spec.vocab :] == 0), "ids above the effective vocabulary get no gradient"


@pytest.mark.parametrize("chunk", [1, 7, 16, 45, 64])
def test_loss_and_gradients_against_float64(chunk, check):
    agrees(*problem(), Loss(37, "fkl", chunk=chunk), check)


@pytest.mark.parametrize("spec", [Loss(37, "fkl", 2.0, 2.0), Loss(37, "fkl", 1.5, 3.0, t_squared=False)])
def test_temperatures_against_float64(spec, check):
    agrees(*problem(), dataclasses.replace(spec, chunk=16), check)


@pytest.mark.parametrize("kind", losses.DIVERGENCES)
def test_every_divergence_with_cross_entropy_and_policy(kind, check):
    """At two temperatures, other parameters than the defaults, and all three terms in one pass."""
    p, mask = problem(2)
    spec = Loss(37, kind, 1.5, 0.8, chunk=16, beta=0.3, alpha=0.2, mu=0.6, clip=0.15)
    agrees(with_policy(p, mask), mask, spec, check, f"head with {kind}")


@pytest.mark.parametrize("terms", [("ce",), ("policy",), ("kd", "policy")])
def test_any_subset_of_terms(terms, check):
    p, mask = problem(3)
    p = with_policy(p, mask)
    p |= dict(weights={t: p["weights"][t] for t in terms}, policy=p["policy"] if "policy" in terms else None)
    if "kd" not in terms:
        p |= dict(h_t=None, teacher=None)
    agrees(p, mask, Loss(37, "jsd" if "kd" in terms else None, chunk=16), check)


def test_terms_add_up_and_a_weight_of_0_is_no_term():
    p, mask = problem(4)
    p, spec = with_policy(p, mask), Loss(37, "srkl", chunk=16)
    without = lambda *terms: p | dict(weights={t: w * (t not in terms) for t, w in p["weights"].items()})
    both, kd, others = (value_and_grads(x, spec) for x in (p, without("ce", "policy"), without("kd")))
    for whole, a, b in zip(*map(jax.tree.leaves, ((x[0][0], x[1]) for x in (both, kd, others)))):
        np.testing.assert_allclose(whole, a + b, rtol=1e-4, atol=1e-6)
    alone = p | dict(weights={"kd": p["weights"]["kd"]}, policy=None)
    for a, b in zip(jax.tree.leaves(kd[1]), jax.tree.leaves(value_and_grads(alone, spec)[1])):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_a_banned_target_matters_to_cross_entropy_only():
    """CE gated off on a row whose target the student can never say: its infinite value stays out of the sum."""
    p, _ = problem(5)
    banned = jnp.where(jnp.arange(40) == 0, -jnp.inf, 0.0)  # id 0 is also the target of the rows that pad a chunk
    p |= dict(student=Head(p["student"].weight, banned), targets=p["targets"].at[:].set(0))
    p["weights"] |= dict(ce=p["weights"]["ce"] * 0)
    (loss, values), grads = value_and_grads(p, Loss(37, "fkl", chunk=16))
    assert np.isfinite(loss) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert np.isinf(values["ce"]).any() and np.isfinite(values["kd"]).all()


def test_bfloat16_hidden_states(check):
    """Matrix products in bfloat16, everything else in float32; the oracle gets the same rounded inputs."""
    p, mask = problem(9, bias=False, scale=0.5)
    half = lambda x: jnp.asarray(x, jnp.bfloat16)
    p = with_policy(p, mask) | dict(h_s=half(p["h_s"]), h_t=half(p["h_t"]))
    p["student"], p["teacher"] = (Head(half(p[name].weight)) for name in ("student", "teacher"))
    (loss, values), (dh, dhead) = jax.tree.map(
        lambda x: np.asarray(x, np.float64), value_and_grads(p, Loss(37, "srkl"))
    )
    (want, want_values), (want_dh, want_dhead) = oracle(p, Loss(37, "srkl"))
    check("head in bfloat16: loss vs float64 (relative)", abs(loss - want) / abs(want), 1e-5)
    check(
        "head in bfloat16: values vs float64", max(np.abs(values[t] - want_values[t])[mask].max() for t in TERMS), 2e-5
    )
    for a, b in ((dh, want_dh), (dhead.weight, want_dhead.weight)):
        check("head in bfloat16: gradient vs float64 (relative)", np.abs(a - b).max() / np.abs(b).max(), 1e-2)


@pytest.mark.parametrize("change", [dict(softcap=2.0), dict(logit_scale=0.25), dict(softcap=1.5, logit_scale=3.0)])
def test_head_function_chain_rule(change, check):
    p, mask = problem()
    p["student"] = dataclasses.replace(p["student"], **change)
    agrees(p, mask, Loss(37, "fkl", chunk=16), check)


# ------------------------------------------------------------------------------------------------------------ top k


def top_k_problem(k, seed=6, **settings):
    """A problem whose teacher is cut to k ids by `head_topk`."""
    p, mask = problem(seed, **settings)
    top = jax.jit(lambda h, head, on: head_topk(h, head, on, k, 37, 2.0))(
        p["h_t"], p["teacher"], jnp.ones(len(mask), bool)
    )
    return p | dict(h_t=None, teacher=TopK(*top)), p, mask


def test_most_probable_ids(check):
    p, mask = problem(7)
    ids, logp = head_topk(p["h_t"], p["teacher"], jnp.asarray(mask), 5, 37, 2.0)
    assert ids.dtype == jnp.int32 and np.all(np.asarray(ids)[~mask] == 0) and np.all(np.asarray(logp)[~mask] == 0)
    z = np.asarray(p["h_t"], np.float64) @ np.asarray(p["teacher"].weight, np.float64)[:37].T / 2
    z = (z - np.log(np.exp(z).sum(1, keepdims=True)))[mask]
    np.testing.assert_array_equal(ids[mask], np.argsort(-z, axis=1)[:, :5])
    check("top-k log-probabilities vs float64", np.abs(logp[mask] + np.sort(-z, axis=1)[:, :5]).max(), 2e-6)
    tied, _ = head_topk(jnp.float32([[1, 3, 3, 0, 3]]), Head(jnp.eye(5)), jnp.ones(1, bool), 4, 5)
    assert tied[0].tolist() == [1, 2, 4, 0], "of equal logits the lowest id first"
    for k in (0, 38):
        with pytest.raises(ValueError, match="k must lie in 1..37"):
            head_topk(p["h_t"], p["teacher"], jnp.asarray(mask), k, 37)


@pytest.mark.parametrize("kind", ["fkl", "jsd", "akl"])
def test_top_k_teacher_against_float64(kind, check):
    p, _, mask = top_k_problem(6)
    agrees(p, mask, Loss(37, kind, 1.5, 2.0, chunk=16), check, "head with a top-k teacher")


def test_top_k_of_the_whole_vocabulary_is_the_whole_teacher():
    p, whole, _ = top_k_problem(37, vocab=37)
    spec = Loss(37, "srkl", 2.0, 2.0, chunk=16)
    for a, b in zip(jax.tree.leaves(value_and_grads(p, spec)), jax.tree.leaves(value_and_grads(whole, spec))):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------------------------ rows, ids, devices


def test_softcap_golden():
    z = logits(jnp.float32(Z_S), Head(jnp.eye(5), softcap=2.0), 5)
    np.testing.assert_allclose(z[0], [0.4898373248, -0.9242343145, 1.5231883119, 0, -0.4898373248], atol=1e-6)


@pytest.mark.parametrize("k", [None, 6])
def test_skipped_rows_cannot_matter(k):
    p, mask = problem() if k is None else top_k_problem(k)[::2]
    p, spec = with_policy(p, mask), Loss(37, "akl", chunk=8)
    clean = value_and_grads(p, spec)
    spoil = lambda x: jnp.where(mask.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.asarray(np.nan, x.dtype))
    dirty = p | {name: jax.tree.map(spoil, p[name]) for name in ("h_s", "h_t", "policy")}
    dirty |= dict(targets=jnp.where(mask, p["targets"], 10**6))
    if k is not None:
        ids, logp = p["teacher"]
        dirty |= dict(teacher=TopK(jnp.where(mask[:, None], ids, 10**6), spoil(logp)))
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(value_and_grads(dirty, spec))):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["rkl", "akl"])
def test_ids_above_the_effective_vocabulary_cannot_matter(kind):
    p, _ = problem(8)
    spec = Loss(37, kind, chunk=16)
    fill = lambda head, x: dataclasses.replace(head, weight=head.weight.at[37:].set(x))
    want = value_and_grads(p, spec)
    got = value_and_grads(p | dict(student=fill(p["student"], 99.0), teacher=fill(p["teacher"], jnp.nan)), spec)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got)):
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


@pytest.mark.parametrize(
    "shape, kind, k", [((8, 1, 1), "jsd", 6), ((2, 2, 2), "fkl", None), ((1, 4, 2), "akl", 6), ((1, 1, 8), "akl", None)]
)
def test_sharded_equals_one_device(shape, kind, k, check):
    p, whole, mask = top_k_problem(k or 1, n=48, pad_s=3, pad_t=3)
    p = with_policy(p if k else whole, mask)
    spec = Loss(37, kind, 2.0, 2.0, chunk=4)
    want = value_and_grads(p, spec)
    stats = Stats(37, (1.0,), (3,), (0.9,), chunk=4)
    read = jax.jit(
        lambda h, head: (
            head_stats(h, head, p["targets"], jnp.asarray(mask), stats),
            head_topk(h, head, jnp.asarray(mask), 5, 37),
        )
    )
    mesh = make_mesh(*shape)
    with jax.set_mesh(mesh):
        rows, table = NamedSharding(mesh, P(("data", "fsdp"))), NamedSharding(mesh, P("tensor", "fsdp"))
        split = lambda head: dataclasses.replace(head, weight=jax.device_put(head.weight, table))
        placed = p | dict(h_s=jax.device_put(p["h_s"], rows), student=split(p["student"]))
        placed |= jax.device_put({name: p[name] for name in ("h_t", "policy", "weights")}, rows)
        placed |= dict(teacher=jax.device_put(p["teacher"], rows) if k else split(p["teacher"]))
        got = value_and_grads(placed, spec)
        got_stats, got_top = read(placed["h_s"], placed["student"]) if k is None else ({}, None)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got)):
        a, b = np.asarray(a), np.asarray(b)
        check("head on 8 devices vs 1 (relative)", np.abs(a - b).max() / np.abs(a).max(), 2e-6)
    if k is None:
        want_stats, want_top = read(p["h_s"], p["student"])
        for name in want_stats:
            check("scoring statistics on 8 devices vs 1", np.abs(want_stats[name] - got_stats[name]).max(), 5e-6)
        np.testing.assert_array_equal(want_top[0], got_top[0])
        check("top-k log-probabilities on 8 devices vs 1", np.abs(want_top[1] - got_top[1]).max(), 2e-6)


@pytest.mark.parametrize("kind", ["fkl", "srkl"])
def test_no_buffer_of_all_logits(kind):
    """4 matmuls with the gradient, 2 without; temporaries far below one [N, V] float32 array."""
    n, width, vocab = 4096, 16, 4096
    shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((n, width), (vocab, width)) * 2]
    y, w = jnp.zeros(n, jnp.int32), jnp.ones(n)
    spec = Loss(vocab, kind, chunk=64)
    policy = Policy(w, w)

    def f(h, W, h_t, W_t):
        weights = {"ce": w, "kd": w, "policy": w}
        return head_loss(h, Head(W), h_t, Head(W_t), y, weights, spec, policy)[0]

    lowered = jax.jit(jax.grad(f, (0, 1))).lower(*shapes)
    assert lowered.as_text().count("dot_general") == 4
    assert jax.jit(f).lower(*shapes).as_text().count("dot_general") == 2
    compiled = lowered.compile()
    assert compiled.memory_analysis().temp_size_in_bytes < n * vocab * 4 / 8
    # a frozen head (LoRA) costs neither its matmul nor its buffer: the compiler drops what nobody reads
    frozen = jax.jit(jax.grad(f)).lower(*shapes).compile()
    matmuls = lambda program: program.as_text().count(" dot(")
    assert matmuls(compiled) - matmuls(frozen) == 1


def test_vmap_over_students_equals_a_loop():
    p, _ = problem(bias=False)
    spec = Loss(37, "fkl", chunk=16)
    f = lambda h, W: head_loss(h, Head(W), p["h_t"], p["teacher"], p["targets"], p["weights"], spec)[0]
    h, W = jnp.stack([p["h_s"], -p["h_s"]]), jnp.stack([p["student"].weight, 2 * p["student"].weight])
    one = jax.jit(jax.value_and_grad(f, (0, 1)))
    got = jax.jit(jax.vmap(one))(h, W)
    for i in range(2):
        for a, b in zip(jax.tree.leaves(one(h[i], W[i])), jax.tree.leaves(got)):
            np.testing.assert_allclose(a, b[i], rtol=1e-5, atol=1e-6)


def test_settings_are_refused():
    with pytest.raises(ValueError, match="unknown divergence 'kl'"):
        Loss(10, "kl")
    with pytest.raises(ValueError, match="student_T must be positive"):
        Loss(10, "fkl", student_T=0.0)
    with pytest.raises(ValueError, match="clip must be positive"):
        Loss(10, "fkl", clip=0.0)
    p, _ = problem()
    w = p["weights"]["ce"]
    loss = lambda weights, *teacher, policy=None, spec=None: head_loss(
        *(p["h_s"], p["student"], *(teacher or (p["h_t"], p["teacher"])), p["targets"], weights),
        spec or Loss(37, "fkl"),
        policy,
    )
    for message, weights, teacher, rest in (
        ("at least one of", {}, (), {}),
        ("at least one of", {"kl": w}, (), {}),
        ("has no divergence", {"kd": w}, (), dict(spec=Loss(37))),
        ("hidden states and head", {"kd": w}, (None, None), {}),
        ("hidden states and head", {"kd": w}, (p["h_t"], TopK(w, w)), {}),
        ("exactly when a Policy", {"policy": w}, (), {}),
        ("exactly when a Policy", {"ce": w}, (), dict(policy=Policy(w, w))),
    ):
        with pytest.raises(ValueError, match=message):
            loss(weights, *teacher, **rest)


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


# ------------------------------------------------------------------------------------------------------------ pairs


def pair_oracle(p, tau: float) -> dict[str, np.ndarray]:
    """The comparison [N] in NumPy float64, from all logits of the 37 ids."""
    wide = lambda x: np.asarray(x, np.float64)

    def z(h, head):
        return wide(h) @ wide(head.weight)[:37].T + (0 if head.bias is None else wide(head.bias)[:37])

    def log_softmax(x):
        return x - x.max(1, keepdims=True) - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True))

    z_a, z_b, y = z(p["h_t"], p["teacher"]), z(p["h_s"], p["student"]), np.asarray(p["targets"])
    la, lb = log_softmax(z_a), log_softmax(z_b)
    g_ce = np.exp(lb) - np.eye(37)[y]
    g_kl = tau * (np.exp(log_softmax(z_b / tau)) - np.exp(log_softmax(z_a / tau)))
    return dict(
        kl_ab=(np.exp(la) * (la - lb)).sum(1),
        kl_ba=(np.exp(lb) * (lb - la)).sum(1),
        agree=z_a.argmax(1) == z_b.argmax(1),
        hit_b=z_b.argmax(1) == y,
        cos_ce_kl=(g_ce * g_kl).sum(1) / np.sqrt((g_ce**2).sum(1) * (g_kl**2).sum(1)),
    )


def compare_pair(p, mask, spec):
    return jax.jit(head_pair, static_argnums=6)(
        p["h_t"], p["teacher"], p["h_s"], p["student"], p["targets"], jnp.asarray(mask), spec
    )


@pytest.mark.parametrize("tau, chunk", [(1.0, 7), (2.0, 64), (0.5, 16)])
def test_pair_against_float64(tau, chunk, check):
    """Other widths, other paddings of the vocabulary (one poisoned), a bias on one side."""
    p, mask = problem(5)
    p["teacher"] = Head(p["teacher"].weight.at[37:].set(jnp.nan))
    p["targets"] = p["targets"].at[::3].set(jnp.argmax(logits(p["h_s"], p["student"], 37), axis=1)[::3])
    got, want = compare_pair(p, mask, Comparison(37, tau, chunk)), pair_oracle(p, tau)
    assert set(got) == set(want) and want["hit_b"][mask].any() and want["agree"].any() and not want["agree"].all()
    for name, values in want.items():
        assert got[name].dtype == (bool if values.dtype == bool else np.float32)
        check(f"pair of models vs float64: {name}", np.abs(got[name] * 1.0 - values)[mask].max(), 2e-5)
        assert not np.asarray(got[name])[~mask].any(), "0 outside the mask"


def test_pair_gradients_are_those_of_the_two_losses(check):
    """The cosine's two directions by jax.grad of cross entropy and of tau^2 KL, in the student's logits."""
    p, mask = problem(6)
    tau, y = 2.0, p["targets"]
    z_a, z_b = logits(p["h_t"], p["teacher"], 37), logits(p["h_s"], p["student"], 37)
    log = jax.nn.log_softmax
    ce = jax.grad(lambda z: -jnp.sum(log(z)[jnp.arange(45), y]))(z_b)
    kl = jax.grad(lambda z: tau**2 * jnp.sum(jnp.exp(log(z_a / tau)) * (log(z_a / tau) - log(z / tau))))(z_b)
    norm = lambda x: jnp.linalg.norm(x, axis=1)
    want = jnp.sum(ce * kl, axis=1) / (norm(ce) * norm(kl))
    got = compare_pair(p, mask, Comparison(37, tau, 16))["cos_ce_kl"]
    check("cosine of logit gradients vs autodiff", np.abs(got - want)[mask].max(), 1e-5)


def test_pair_limits():
    """Equal models; a student that is certain; a teacher that is the one-hot label pulls where the label does."""
    z = jnp.float32([[3, 1, 0, 0], [80, 0, 0, -1], [0.5, 0.1, 0, 0]])
    y, mask = jnp.array([1, 0, 2], jnp.int32), jnp.ones(3, bool)
    pair = lambda a, b: head_pair(a, Head(jnp.eye(4)), b, Head(jnp.eye(4)), y, mask, Comparison(4))
    same = pair(z, z)
    for name in ("kl_ab", "kl_ba", "cos_ce_kl"):
        assert np.all(np.asarray(same[name]) == 0), "nothing to learn from a teacher that is the student"
    assert same["agree"].all() and same["hit_b"].tolist() == [False, True, False]
    label = pair(200 * jax.nn.one_hot(y, 4), z)
    np.testing.assert_allclose(label["cos_ce_kl"], 1.0, atol=1e-6)
    # the student of row 1 is certain, its others in proportion 1 : 1 : 1/e; the teacher is certain of another id
    other = pair(200 * jax.nn.one_hot((y + 1) % 4, 4), z)["cos_ce_kl"][1]
    rest, tail = 2 + 1 / np.e, 1 / np.e
    np.testing.assert_allclose(other, -(rest + 1) / np.sqrt(2 * (rest**2 + 2 + tail**2)), rtol=1e-5)
    with pytest.raises(ValueError, match="temperature of a pair must be positive"):
        Comparison(4, 0.0)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_pair_on_eight_devices(shape, check):
    p, mask = problem(n=48, pad_s=3, pad_t=3)
    spec, mesh = Comparison(37, 2.0, 4), make_mesh(*shape)
    want = compare_pair(p, mask, spec)
    with jax.set_mesh(mesh):
        rows, table = NamedSharding(mesh, P(("data", "fsdp"))), NamedSharding(mesh, P("tensor", "fsdp"))
        split = lambda head: dataclasses.replace(head, weight=jax.device_put(head.weight, table))
        placed = {k: jax.device_put(p[k], rows) for k in ("h_s", "h_t", "targets")}
        got = compare_pair(placed | {k: split(p[k]) for k in ("student", "teacher")}, mask, spec)
    for name in want:
        check("pair of models on 8 devices vs 1", np.abs(want[name] * 1.0 - got[name]).max(), 5e-6)


def test_pair_holds_no_logits_of_all_tokens():
    n, width, vocab = 4096, 16, 4096
    shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((n, width), (vocab, width)) * 2]
    y, mask, spec = jnp.zeros(n, jnp.int32), jnp.ones(n, bool), Comparison(vocab, 2.0, 32)
    f = jax.jit(lambda h, W, h_t, W_t: head_pair(h_t, Head(W_t), h, Head(W), y, mask, spec))
    lowered = f.lower(*shapes)
    assert lowered.as_text().count("dot_general") == 2
    assert lowered.compile().memory_analysis().temp_size_in_bytes < n * vocab * 4 / 8
