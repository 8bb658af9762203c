"""The head: one primitive over (hidden states, head weights) that never holds `[batch, time, vocab]`.

The vocabulary is the cost of distillation: a full `[B*T, V]` float array per model is what other tools run out of
memory on. Here rows are gathered by their mask, worked through in chunks of `C` with the whole vocabulary, and
everything that is wanted of a chunk (losses, gradients, statistics) is computed while its logits exist. The number of
chunks that run depends on the data, so a masked row costs nothing and its content can never matter.

* `head_loss`   CE and a teacher-student divergence, differentiable in the student (4 matmuls, gradient made in the
                forward pass: nothing of size `[N, V]` survives it)
* `head_stats`  the per-token statistics that attacks read (1 matmul)

Under a mesh both run per device on its own rows (`jax.shard_map` over `data` and `fsdp`); the `tensor` axis stays with
the compiler, which splits the vocabulary.  Letters: N rows, C chunk, E head width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

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
    divergence: str | None = None  # a key of losses.DIVERGENCES, or None for cross entropy alone
    student_T: float = 1.0
    teacher_T: float = 1.0
    t_squared: bool = True  # multiply the divergence by student_T ** 2
    chunk: int = 0  # rows per chunk; 0 = `default_chunk`

    def __post_init__(self) -> None:
        if self.divergence is not None and self.divergence not in losses.DIVERGENCES:
            raise ConfigError(f"unknown divergence {self.divergence!r}; known: {sorted(losses.DIVERGENCES)}")
        for name in ("student_T", "teacher_T"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")


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


def head_loss(
    h_student: Array,
    student: Head,
    h_teacher: Array | None,
    teacher: Head | None,
    targets: Array,
    weights: dict[str, Array],
    spec: Loss,
) -> tuple[Array, dict[str, Array]]:
    """Weighted sum of per-token losses, and the per-token losses themselves.

    Args:
      h_student: `[N, E_s]` hidden states at the predicting positions; differentiated, as are the student's weights.
      student, teacher: heads; nothing flows to the teacher. `h_teacher` and `teacher` are None without a divergence.
      targets: `[N]` int32 ids to be predicted.
      weights: `ce` and, with a divergence, `kd`: `[N]` float32, each = mask x coefficient / (tokens of the optimiser
        step). A row whose weights are all 0 is skipped: it is not computed, and its content cannot matter.
      spec: static settings.

    Returns:
      `loss` float32 scalar `= sum_i ce_i w_ce,i + kd_i w_kd,i`, and `{"ce", "kd"}: [N]` unweighted values in nats
      (`kd` without the T^2 factor), 0 in skipped rows. Gradients flow through `loss` only.
    """
    return _head_loss(spec, h_student, student, h_teacher, teacher, targets, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head_loss(spec: Loss, h_s, student, h_t, teacher, targets, weights):
    return _loss_pass(spec, False, h_s, student, h_t, teacher, targets, weights)[0]


def _head_loss_fwd(spec: Loss, h_s, student, h_t, teacher, targets, weights):
    return _loss_pass(spec, True, h_s, student, h_t, teacher, targets, weights)


def _head_loss_bwd(spec: Loss, grads, cotangent):
    dh, dhead = jax.tree.map(lambda g: (g * cotangent[0]).astype(g.dtype), grads)
    return dh, dhead, None, None, None, None


_head_loss.defvjp(_head_loss_fwd, _head_loss_bwd)


def _loss_pass(spec: Loss, with_grad: bool, h_s, student: Head, h_t, teacher, targets, weights):
    """One pass over the chunks; returns ((loss, per_token), (dh, dhead) or None)."""
    terms = ("ce",) if spec.divergence is None else ("ce", "kd")
    if set(weights) != set(terms):
        raise ValueError(f"weights must be given for exactly {terms}, got {sorted(weights)}")
    rows_args = (h_s, targets, weights) + (() if h_t is None else (h_t,))
    out_is_row = (
        (False, {t: True for t in terms}),
        (True, jax.tree.map(lambda _: False, student)) if with_grad else None,
    )

    def local(h_s, targets, weights, *rest):
        h_t, (student, teacher) = (rest[0], rest[1:]) if h_teacher_given else (None, rest)
        loss, per_token, dh, dhead = _loss_chunks(spec, with_grad, h_s, student, h_t, teacher, targets, weights)
        grads = (dh, jax.tree.map(_psum, dhead)) if with_grad else None
        return (_psum(loss), per_token), grads

    h_teacher_given = h_t is not None
    return _per_device(local, rows_args, (student, teacher), out_is_row)


def _loss_chunks(spec: Loss, with_grad: bool, h_s, student: Head, h_t, teacher, targets, weights):
    n, vocab = h_s.shape[0], spec.vocab
    chunk = min(spec.chunk or default_chunk(vocab), max(n, 1))
    scale = spec.student_T**2 if spec.t_squared else 1.0

    def body(rows, carry):
        loss, per_token, dh, dhead = carry
        hs = _take(h_s, rows)
        z = logits(hs, student, vocab)
        w = {t: _take(weights[t], rows) for t in weights}
        logq = jax.nn.log_softmax(z)
        ce, g_ce = losses.cross_entropy(logq, _take(targets, rows))
        values, g = {"ce": ce}, w["ce"][:, None] * g_ce
        loss = loss + jnp.sum(w["ce"] * ce)
        if spec.divergence is not None:
            logp = jax.nn.log_softmax(logits(_take(h_t, rows), teacher, vocab) / spec.teacher_T)
            logq_t = logq if spec.student_T == 1.0 else jax.nn.log_softmax(z / spec.student_T)
            values["kd"], g_kd = losses.DIVERGENCES[spec.divergence](logp, logq_t)
            loss = loss + scale * jnp.sum(w["kd"] * values["kd"])
            g = g + (scale / spec.student_T) * w["kd"][:, None] * g_kd
        per_token = {t: _put(per_token[t], rows, values[t]) for t in values}
        if with_grad:
            dh, dhead = _chunk_gradients(g, z, hs, rows, student, dh, dhead)
        return loss, per_token, dh, dhead

    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    carry = (
        zeros(()),
        {t: zeros((n,)) for t in weights},
        jnp.zeros_like(h_s) if with_grad else None,
        jax.tree.map(lambda x: zeros(x.shape), student) if with_grad else None,
    )
    active = functools.reduce(jnp.logical_or, [w != 0 for w in weights.values()])
    loss, per_token, dh, dhead = _over_chunks(active, chunk, carry, body)
    if with_grad:  # accumulated in float32, handed back in the parameters' own dtype
        dhead = jax.tree.map(lambda g, x: g.astype(x.dtype), dhead, student)
    return loss, per_token, dh, dhead


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


def _nucleus_mass(q: Array, mass: float) -> Array:
    """Mass of the smallest set of most probable ids that reaches `mass`; `q [C, V]`.

    Without a sort: the cut probability is the largest t with `sum(q[q >= t]) >= mass`, found by bisection on the bit
    pattern of float32 (non-negative floats order like their bits), exact in 31 steps. Of ids tied at the cut only as
    many as are needed belong to the set.
    """
    bits = jax.lax.bitcast_convert_type(q, jnp.int32)

    def step(_, interval):
        low, high = interval  # invariant: mass is reached at `low`, not at `high`
        mid = low + (high - low) // 2
        reached = jnp.sum(jnp.where(bits >= mid[:, None], q, 0.0), axis=-1) >= mass
        return jnp.where(reached, mid, low), jnp.where(reached, high, mid)

    top = jnp.full(q.shape[:1], 0x7F800000, jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, step, (jnp.zeros_like(top), top))
    cut = jax.lax.bitcast_convert_type(low, jnp.float32)
    above = jnp.sum(jnp.where(bits > low[:, None], q, 0.0), axis=-1)
    needed = jnp.where(cut > 0, jnp.ceil((mass - above) / jnp.where(cut > 0, cut, 1.0)), 0.0)
    return above + jnp.maximum(needed, 1.0) * cut
