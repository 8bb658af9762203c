"""The head: one primitive over (hidden states, head weights) that never holds `[batch, time, vocab]`.

The vocabulary is the cost of distillation: a full `[B*T, V]` float array per model is what other tools run out of
memory on. Here rows are gathered by their mask, worked through in chunks of `C` with the whole vocabulary, and
everything that is wanted of a chunk (losses, gradients, statistics) is computed while its logits exist. The number of
chunks that run depends on the data, so a masked row costs nothing and its content can never matter.

* `head_loss`   CE, a teacher-student divergence and a policy loss, differentiable in the student (4 matmuls, gradient
                made in the forward pass: nothing of size `[N, V]` survives it)
* `head_topk`   the k most probable ids of a teacher (1 matmul)
* `head_stats`  the per-token statistics that attacks read (1 matmul)
* `head_pair`   how two models' distributions differ, token by token (2 matmuls)

Under a mesh all run per device on its own rows (`jax.shard_map` over `data` and `fsdp`); the `tensor` axis stays with
the compiler, which splits the vocabulary.  Letters: N rows, C chunk, E head width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from kd_jax import losses
from kd_jax.errors import ConfigError

Array = jax.Array
ROW_AXES = ("data", "fsdp")  # mesh axes over which rows are split


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["weight", "bias"], meta_fields=["logit_scale", "softcap"]
)
@dataclasses.dataclass(frozen=True)
class Head:
    """Output layer: `z = h W^T + bias`, then `z *= logit_scale`, then `z = softcap * tanh(z / softcap)`."""

    weight: Array  # [V, E]
    bias: Array | None = None  # [V]
    logit_scale: float = 1.0
    softcap: float | None = None


@dataclasses.dataclass(frozen=True)
class Loss:
    """What a row's loss is made of. All settings explicit; none is inherited from another."""

    vocab: int  # effective vocabulary: ids at or above it leave both softmaxes
    divergence: str | None = None  # a key of losses.DIVERGENCES, or None for losses of the target alone
    student_T: float = 1.0
    teacher_T: float = 1.0
    t_squared: bool = True  # multiply the divergence by student_T ** 2
    chunk: int = 0  # rows per chunk; 0 = `default_chunk`
    beta: float = 0.5  # jsd: the teacher's share of the mixture; 0 is fkl, 1 is rkl
    alpha: float = 0.1  # sfkl, srkl: share of the mixture that its left side has
    mu: float = 0.5  # akl: teacher mass of the tail
    clip: float = 0.2  # policy: the ratio counts within 1 - clip .. 1 + clip

    def __post_init__(self) -> None:
        if self.divergence is not None and self.divergence not in losses.DIVERGENCES:
            raise ConfigError(f"unknown divergence {self.divergence!r}; known: {sorted(losses.DIVERGENCES)}")
        for name in ("student_T", "teacher_T", "clip"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("beta", "alpha", "mu"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie in [0, 1], got {getattr(self, name)}")

    @property
    def parameter(self) -> float:
        """The setting that belongs to the divergence; 0 where it has none."""
        name = losses.DIVERGENCES[self.divergence][1]
        return getattr(self, name) if name else 0.0


class TopK(NamedTuple):
    """A teacher of which only k ids per row are known; the loss counts all others as one outcome, on both sides.

    Biased (never above the loss with the whole teacher), so whoever trains with it says so.
    """

    ids: Array  # [N, k] int32, distinct in a row
    logp: Array  # [N, k] float32 log-probabilities, already at the teacher's temperature


class Policy(NamedTuple):
    """Constants of a sampled token's PPO loss (`losses.clipped_policy`)."""

    advantage: Array  # [N] float32
    offset: Array  # [N] float32: log q(y) at rollout time minus the log importance weight


def default_chunk(vocab: int, backend: str | None = None) -> int:
    """Rows per chunk: on a CPU a float32 slab should stay near its cache, on accelerators it should fill the matmul."""
    slab = (8 << 20) if (backend or jax.default_backend()) == "cpu" else (256 << 20)
    rows = max(64, min(4096, slab // (4 * vocab)))
    return 1 << (rows.bit_length() - 1)


def logits(h: Array, head: Head, vocab: int) -> Array:
    """Float32 logits `[C, vocab]` of hidden states `[C, E]`; the matmul runs in the dtype of `h`."""
    z = jax.lax.dot_general(
        h, head.weight[:vocab].astype(h.dtype), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    if head.bias is not None:
        z = z + head.bias[:vocab].astype(jnp.float32)
    if head.logit_scale != 1.0:
        z = z * head.logit_scale
    if head.softcap is not None:
        z = head.softcap * jnp.tanh(z / head.softcap)
    return z


# ---------------------------------------------------------------------------------------------- chunks and devices


def _over_chunks(active: Array, chunk: int, carry, body: Callable):
    """Run `body(rows [C], carry)` over the indices of the active rows; padding indices are `N` (out of range)."""
    n = active.shape[0]
    slots = -(-n // chunk) * chunk
    rows = jnp.nonzero(active, size=slots, fill_value=n)[0]
    chunks = -(-jnp.sum(active) // chunk)
    return jax.lax.fori_loop(
        0, chunks, lambda i, c: body(jax.lax.dynamic_slice(rows, (i * chunk,), (chunk,)), c), carry
    )


def _take(x: Array, rows: Array, fill=0) -> Array:
    return x.at[rows].get(mode="fill", fill_value=fill)


def _put(x: Array, rows: Array, values: Array) -> Array:
    return x.at[rows].set(values.astype(x.dtype), mode="drop")


def _per_device(f: Callable, row_args: tuple, shared_args: tuple, out_is_row):
    """Call `f(*row_args, *shared_args)`, on a mesh per device with its own rows; f sums its other outputs itself."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(a for a in ROW_AXES if not mesh.empty and a in mesh.axis_names)
    if not axes or int(np.prod([mesh.shape[a] for a in axes])) == 1:
        return f(*row_args, *shared_args)
    specs = (P(axes),) * len(row_args) + (P(),) * len(shared_args)
    outs = jax.tree.map(lambda row: P(axes) if row else P(), out_is_row)
    return jax.shard_map(f, in_specs=specs, out_specs=outs, axis_names=set(axes), check_vma=False)(
        *row_args, *shared_args
    )


def _psum(x: Array) -> Array:
    mesh = jax.sharding.get_abstract_mesh()
    axes = (
        ()
        if mesh.empty
        else tuple(
            a
            for a, kind in zip(mesh.axis_names, mesh.axis_types)
            if kind == jax.sharding.AxisType.Manual and a in ROW_AXES
        )
    )
    return jax.lax.psum(x, axes) if axes else x


# ------------------------------------------------------------------------------------------------------------ loss


TERMS = ("ce", "kd", "policy")


def head_loss(
    h_student: Array,
    student: Head,
    h_teacher: Array | None,
    teacher: Head | TopK | None,
    targets: Array,
    weights: dict[str, Array],
    spec: Loss,
    policy: Policy | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Weighted sum of per-token losses, and the per-token losses themselves.

    Args:
      h_student: `[N, E_s]` hidden states at the predicting positions; differentiated, as are the student's weights.
      student: head of the student.
      h_teacher, teacher: hidden states `[N, E_t]` and head of the teacher, or None and a `TopK`; nothing flows to
        them. Both None without `kd`.
      targets: `[N]` int32 ids to be predicted.
      weights: which terms there are: any of `ce`, `kd` (the divergence), `policy`, each `[N]` float32 = mask x
        coefficient / (tokens of the optimiser step). A row whose weights are all 0 is skipped: it is not computed, and
        its content cannot matter.
      spec: static settings.
      policy: advantages and offsets, with the term `policy` only. Its ratio is that of log q(target) at temperature 1.

    Returns:
      `loss` float32 scalar, the sum over rows and terms of weight x value (x T^2 for `kd` with `t_squared`), and the
      unweighted values `{term: [N]}` in nats (`kd` without the T^2 factor), 0 in skipped rows. Gradients flow through
      `loss` only.

    Raises:
      ValueError: terms that are unknown, or that lack what they are computed from.
    """
    if not weights or not set(weights) <= set(TERMS):
        raise ValueError(f"weights must name at least one of {TERMS} and nothing else, got {sorted(weights)}")
    if "kd" in weights and spec.divergence is None:
        raise ValueError("weights has 'kd' but the loss has no divergence")
    if "kd" in weights and (h_teacher is None) != isinstance(teacher, TopK):
        raise ValueError("weights has 'kd': give the teacher's hidden states and head, or None and a TopK")
    if ("policy" in weights) != (policy is not None):
        raise ValueError("weights has 'policy' exactly when a Policy is given")
    of_teacher, teacher_head = (teacher, None) if isinstance(teacher, TopK) else (h_teacher, teacher)
    rows = dict(targets=targets, weights=weights)
    rows |= dict(teacher=of_teacher if "kd" in weights else None, policy=policy)
    return _head_loss(spec, h_student, student, rows, teacher_head)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head_loss(spec: Loss, h, student: Head, rows: dict, teacher: Head | None):
    return _loss_pass(spec, False, h, student, rows, teacher)[0]


def _head_loss_fwd(spec: Loss, h, student, rows, teacher):
    return _loss_pass(spec, True, h, student, rows, teacher)


def _head_loss_bwd(spec: Loss, grads, cotangent):
    dh, dhead = jax.tree.map(lambda g: (g * cotangent[0]).astype(g.dtype), grads)
    return dh, dhead, None, None


_head_loss.defvjp(_head_loss_fwd, _head_loss_bwd)


def _loss_pass(spec: Loss, with_grad: bool, h, student: Head, rows: dict, teacher: Head | None):
    """One pass over the chunks; returns ((loss, per_token), (dh, dhead) or None)."""

    def local(rows, student, teacher):
        loss, per_token, dh, dhead = _loss_chunks(spec, with_grad, rows, student, teacher)
        grads = (dh, jax.tree.map(_psum, dhead)) if with_grad else None
        return (_psum(loss), per_token), grads

    out_is_row = (
        (False, {t: True for t in rows["weights"]}),
        (True, jax.tree.map(lambda _: False, student)) if with_grad else None,
    )
    return _per_device(local, (rows | {"h": h},), (student, teacher), out_is_row)


def _loss_chunks(spec: Loss, with_grad: bool, rows: dict, student: Head, teacher: Head | None):
    n = rows["h"].shape[0]
    chunk = min(spec.chunk or default_chunk(spec.vocab), max(n, 1))

    def body(index, carry):
        loss, per_token, dh, dhead = carry
        row = jax.tree.map(lambda x: _take(x, index), rows)
        z = logits(row["h"], student, spec.vocab)
        values, weighted, g = _row_losses(spec, z, row, teacher)
        per_token = {t: _put(per_token[t], index, values[t]) for t in values}
        if with_grad:
            dh, dhead = _chunk_gradients(g, z, row["h"], index, student, dh, dhead)
        return loss + weighted, per_token, dh, dhead

    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    carry = (
        zeros(()),
        {t: zeros((n,)) for t in rows["weights"]},
        jnp.zeros_like(rows["h"]) if with_grad else None,
        jax.tree.map(lambda x: zeros(x.shape), student) if with_grad else None,
    )
    active = functools.reduce(jnp.logical_or, [w != 0 for w in rows["weights"].values()])
    loss, per_token, dh, dhead = _over_chunks(active, chunk, carry, body)
    if with_grad:  # accumulated in float32, handed back in the parameters' own dtype
        dhead = jax.tree.map(lambda g, x: g.astype(x.dtype), dhead, student)
    return loss, per_token, dh, dhead


def _row_losses(spec: Loss, z: Array, row: dict, teacher: Head | None) -> tuple[dict, Array, Array]:
    """Values `{term: [C]}`, their weighted sum, and its gradient by the student's logits `z [C, V]`."""
    w, values, g = row["weights"], {}, 0.0
    logq = jax.nn.log_softmax(z)
    if "ce" in w or "policy" in w:
        ce, g_ce = losses.cross_entropy(logq, row["targets"])
        slope = 0.0  # the policy's loss is a function of the cross entropy: both share one gradient row
        if "ce" in w:
            values["ce"], slope = ce, w["ce"]
        if "policy" in w:
            values["policy"], by_ce = losses.clipped_policy(ce, *row["policy"], spec.clip)
            slope = slope + w["policy"] * by_ce
        g = slope[:, None] * g_ce
    factor = dict.fromkeys(w, 1.0) | {"kd": spec.student_T**2 if spec.t_squared else 1.0}
    if "kd" in w:
        logq_t = logq if spec.student_T == 1.0 else jax.nn.log_softmax(z / spec.student_T)
        if isinstance(row["teacher"], TopK):
            values["kd"], g_kd = losses.top_k_divergence(spec.divergence, *row["teacher"], logq_t, spec.parameter)
        else:
            logp = jax.nn.log_softmax(logits(row["teacher"], teacher, spec.vocab) / spec.teacher_T)
            values["kd"], g_kd = losses.divergence(spec.divergence, logp, logq_t, spec.parameter)
        g = g + (factor["kd"] / spec.student_T) * w["kd"][:, None] * g_kd
    # a weight of 0 wins over a value of inf (the cross entropy of a banned target that only `kd` looks at)
    weighted = sum(factor[t] * jnp.sum(jnp.where(w[t] != 0, w[t] * values[t], 0.0)) for t in values)
    return values, weighted, g


def _chunk_gradients(g, z, hs, rows, head: Head, dh, dhead: Head):
    """Chain rule from the logits' gradient `g [C, V]` to hidden states and weights, added to dh and dhead."""
    if head.softcap is not None:
        g = g * (1.0 - (z / head.softcap) ** 2)
    if head.logit_scale != 1.0:
        g = g * head.logit_scale
    vocab = g.shape[1]
    gc = g.astype(hs.dtype)
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    dh = _put(dh, rows, dot(gc, head.weight[:vocab].astype(hs.dtype), (((1,), (0,)), ((), ()))))
    dw = dot(gc, hs, (((0,), (0,)), ((), ())))
    whole = vocab == head.weight.shape[0]
    weight = dhead.weight + dw if whole else dhead.weight.at[:vocab].add(dw)
    bias = None if head.bias is None else dhead.bias.at[:vocab].add(jnp.sum(g, axis=0))
    return dh, dataclasses.replace(dhead, weight=weight, bias=bias)


# ------------------------------------------------------------------------------------------------------ statistics


def head_topk(h: Array, head: Head, mask: Array, k: int, vocab: int, temperature: float = 1.0) -> tuple[Array, Array]:
    """The k most probable ids `[N, k]` int32 of each row and their log-probabilities `[N, k]` at the temperature.

    Best first, of equal logits the lowest id first; both 0 where `mask [N]` is False. `TopK(*head_topk(...))` is a
    teacher for `head_loss`.
    """
    if not 1 <= k <= vocab:
        raise ConfigError(f"k must lie in 1..{vocab} (the effective vocabulary), got {k}")

    def local(h, mask, head):
        def body(rows, out):
            logp = jax.nn.log_softmax(logits(_take(h, rows), head, vocab) / temperature)
            best, ids = jax.lax.top_k(logp, k)
            return _put(out[0], rows, ids), _put(out[1], rows, best)

        n = h.shape[0]
        empty = (jnp.zeros((n, k), jnp.int32), jnp.zeros((n, k), jnp.float32))
        return _over_chunks(mask, min(default_chunk(vocab), max(n, 1)), empty, body)

    return _per_device(local, (h, mask), (head,), (True, True))


@dataclasses.dataclass(frozen=True)
class Stats:
    """Which statistics of the next-token distribution are kept per scored token (see `head_stats`)."""

    vocab: int
    temperatures: tuple[float, ...] = ()  # lse_t<T>
    top_k: tuple[int, ...] = ()  # topk_lse_k<K>_t<T>, for every temperature
    top_p: tuple[float, ...] = ()  # cum_above_p<P>_t<T>, nucleus_p<P>_t<T>, for every temperature
    chunk: int = 0


def head_stats(h: Array, head: Head, targets: Array, mask: Array, spec: Stats) -> dict[str, Array]:
    """Per-token statistics `[N]` of the distribution that predicts `targets [N]`; 0 where `mask [N]` is False.

    All from float32 logits. Fields (natural logarithms, defined in the README's table):
    `logp, log1m_p, entropy, logp_std, rank, ties, top1_id, top1_logp, top2_gap`, and on the temperature grid
    `lse_t<T>`, `topk_lse_k<K>_t<T>`, `cum_above_p<P>_t<T>`, `nucleus_p<P>_t<T>`.
    """
    names = jax.eval_shape(
        functools.partial(_row_stats, spec=spec), _abstract((1, spec.vocab)), _abstract((1,), "int32")
    )
    fields = {k: v.dtype for k, v in names.items()}

    def local(h, targets, mask, head):
        def body(rows, out):
            row = _row_stats(logits(_take(h, rows), head, spec.vocab), _take(targets, rows), spec=spec)
            return {k: _put(out[k], rows, row[k]) for k in out}

        n = h.shape[0]
        chunk = min(spec.chunk or default_chunk(spec.vocab), max(n, 1))
        return _over_chunks(mask, chunk, {k: jnp.zeros((n,), d) for k, d in fields.items()}, body)

    return _per_device(local, (h, targets, mask), (head,), {k: True for k in fields})


def _abstract(shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def _row_stats(z: Array, target: Array, *, spec: Stats) -> dict[str, Array]:
    """The statistics of `z [C, V]` float32 logits; the reductions share what they can (one exp of the row)."""
    ids = jnp.arange(z.shape[-1])
    lse = jax.nn.logsumexp(z, axis=-1)
    is_y = ids == target[:, None]
    zy = jnp.sum(jnp.where(is_y, z, 0.0), axis=-1)
    lp = z - lse[:, None]
    p = jnp.exp(lp)
    mean = jnp.sum(jnp.where(p > 0, p * lp, 0.0), axis=-1)
    # centred form: E[(log p)^2] - mean^2 cancels
    var = jnp.sum(jnp.where(p > 0, p * (lp - mean[:, None]) ** 2, 0.0), axis=-1)
    top1 = jnp.argmax(z, axis=-1)
    zmax = jnp.max(z, axis=-1)
    second = jnp.max(jnp.where(ids == top1[:, None], -jnp.inf, z), axis=-1)
    logp = zy - lse
    # log(1 - p): from p itself while p is small, from the other logits once p rounds towards 1
    others = jax.nn.logsumexp(jnp.where(is_y, -jnp.inf, z), axis=-1) - lse
    out = dict(
        logp=logp,
        log1m_p=jnp.where(logp < np.log(0.5), jnp.log1p(-jnp.exp(logp)), others),
        entropy=-mean,
        logp_std=jnp.sqrt(var),
        rank=jnp.sum(z > zy[:, None], axis=-1, dtype=jnp.int32),
        ties=jnp.sum(z == zy[:, None], axis=-1, dtype=jnp.int32) - 1,
        top1_id=top1.astype(jnp.int32),
        top1_logp=zmax - lse,
        top2_gap=zmax - second,
    )
    ranked = jax.lax.top_k(lp, max(spec.top_k))[0] if spec.top_k else None
    for t in spec.temperatures:
        lse_t = jax.nn.logsumexp(lp / t, axis=-1)
        out[f"lse_t{t:g}"] = lse_t
        for k in spec.top_k:
            out[f"topk_lse_k{k}_t{t:g}"] = jax.nn.logsumexp(ranked[:, :k] / t, axis=-1)
        if spec.top_p:
            q = jnp.exp(lp / t - lse_t[:, None])
            above = jnp.sum(jnp.where(z > zy[:, None], q, 0.0), axis=-1)
            for mass in spec.top_p:
                out[f"cum_above_p{mass:g}_t{t:g}"] = above
                out[f"nucleus_p{mass:g}_t{t:g}"] = _nucleus_mass(q, mass)
    return out


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Settings of `head_pair`."""

    vocab: int
    temperature: float = 1.0  # of both distributions in the KL gradient; the divergences are at temperature 1
    chunk: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(f"the temperature of a pair must be positive, got {self.temperature}")


ROUNDING = 16 * float(np.finfo(np.float32).eps)  # relative, of one probability
PAIR_FIELDS = {"kl_ab": "float32", "kl_ba": "float32", "agree": "bool", "hit_b": "bool", "cos_ce_kl": "float32"}


def head_pair(
    h_a: Array, head_a: Head, h_b: Array, head_b: Head, targets: Array, mask: Array, spec: Comparison
) -> dict[str, Array]:
    """Per-token comparison `[N]` of a teacher a and a student b on the same tokens; 0 where `mask [N]` is False.

    Both heads share a tokenizer (`spec.vocab` ids), not a width. All from float32 logits, whole vocabulary:
      `kl_ab, kl_ba`  KL(p_a || p_b) and KL(p_b || p_a), nats
      `agree`         the most probable id is the same (of equal logits the lowest id counts)
      `hit_b`         the most probable id of b is the target
      `cos_ce_kl`     cosine of the gradients by b's logits of the cross entropy, `p_b - onehot(target)`, and of
                      `tau^2 KL(p_a^tau || p_b^tau)`, `tau (p_b^tau - p_a^tau)`; 0 where either vanishes (cui2026 3.3)
    """

    def local(h_a, h_b, targets, mask, head_a, head_b):
        def body(rows, out):
            z_a, z_b = (logits(_take(h, rows), head, spec.vocab) for h, head in ((h_a, head_a), (h_b, head_b)))
            row = _row_pair(z_a, z_b, _take(targets, rows), spec.temperature)
            return {k: _put(out[k], rows, row[k]) for k in out}

        n = h_a.shape[0]
        empty = {k: jnp.zeros((n,), dtype) for k, dtype in PAIR_FIELDS.items()}
        return _over_chunks(mask, min(spec.chunk or default_chunk(spec.vocab), max(n, 1)), empty, body)

    out_is_row = {k: True for k in PAIR_FIELDS}
    return _per_device(local, (h_a, h_b, targets, mask), (head_a, head_b), out_is_row)


def _row_pair(z_a: Array, z_b: Array, target: Array, temperature: float) -> dict[str, Array]:
    logp_a, logp_b = jax.nn.log_softmax(z_a), jax.nn.log_softmax(z_b)
    ids, top_a, top_b = jnp.arange(z_b.shape[-1]), jnp.argmax(z_a, axis=-1), jnp.argmax(z_b, axis=-1)
    p_a, p_b = jax.nn.softmax(z_a / temperature), jax.nn.softmax(z_b / temperature)
    # of equal models the difference is rounding, whose direction would mean nothing
    gap = jnp.where(jnp.abs(p_b - p_a) > ROUNDING * p_a, p_b - p_a, 0.0)
    # Both gradients sum to 0. Where a probability rounds towards 1, its entry follows from the others.
    g_ce = _balanced(jnp.exp(logp_b), ids == target[:, None])
    g_kl = _balanced(gap, ids == top_b[:, None])
    return dict(
        kl_ab=losses.divergence("fkl", logp_a, logp_b)[0],
        kl_ba=losses.divergence("rkl", logp_a, logp_b)[0],
        agree=top_a == top_b,
        hit_b=top_b == target,
        cos_ce_kl=_cosine(g_ce, g_kl),
    )


def _balanced(g: Array, at: Array) -> Array:
    """`g [C, V]` with the entry `at` of each row replaced by minus the sum of the others."""
    others = jnp.where(at, 0.0, g)
    return jnp.where(at, -jnp.sum(others, axis=-1, keepdims=True), others)


def _cosine(a: Array, b: Array) -> Array:
    """Cosine `[C]` of rows `[C, V]`; scaled first, since squares of small gradients underflow."""
    size = lambda x: jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    a, b = (x / jnp.where(size(x) > 0, size(x), 1.0) for x in (a, b))
    norm = jnp.sqrt(jnp.sum(a * a, axis=-1) * jnp.sum(b * b, axis=-1))
    return jnp.clip(jnp.sum(a * b, axis=-1) / jnp.where(norm > 0, norm, 1.0), -1.0, 1.0)


def _nucleus_mass(q: Array, mass: float) -> Array:
    """Mass of the smallest set of most probable ids that reaches `mass`; `q [C, V]`.

    The cut probability is the largest t with `sum(q[q >= t]) >= mass`. Of ids tied at the cut only as many as are
    needed belong to the set.
    """
    cut = losses.largest(lambda t: jnp.sum(jnp.where(q >= t[:, None], q, 0.0), axis=-1) >= mass, q.shape[0])
    above = jnp.sum(jnp.where(q > cut[:, None], q, 0.0), axis=-1)
    needed = jnp.where(cut > 0, jnp.ceil((mass - above) / jnp.where(cut > 0, cut, 1.0)), 0.0)
    return above + jnp.maximum(needed, 1.0) * cut
