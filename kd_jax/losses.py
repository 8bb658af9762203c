"""The mathematics of one vocabulary row: log-probabilities in, loss and its logit gradient out.

`p` is the teacher's next-token distribution, `q` the student's; both arrive as log-probabilities `[C, V]` at their own
temperatures. A loss returns

    value [C]      in nats
    grad  [C, V]   T_s * dD/dz_s, where z_s are the student's logits before the division by T_s

Every divergence is `D = sum_v d_v`, and its gradient is `q_v (h_v - sum_u q_u h_u)` with `h_v = dD/dq_v`. So a
divergence is two elementwise terms, `d` and `q h` (never `h` alone: `p/q` overflows where `q` underflows).

This is the only place where a loss formula is written; `kd_jax.head` calls it while a chunk's logits exist.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
INFINITY_BITS = 0x7F800000  # of float32
UNSEEN = float(np.log(np.finfo(np.float32).eps))  # least log mass that `1 - sum p` resolves in float32

# ----------------------------------------------------------------------------------------------------- divergences
# Each takes p, q, log p, log q [C, V] (all 0 at an id that does not count) and its parameter; returns d and q h.


def _forward_kl(p, q, lp, lq, _):
    """`KL(p || q)`; the gradient is `q - p`."""
    return p * (lp - lq), -p


def _reverse_kl(p, q, lp, lq, _):
    """`KL(q || p)`; `h = log q - log p + 1`, where the 1 matters in rows from which ids are dropped."""
    d = q * (lq - lp)
    return d, d + q


def _jensen_shannon(p, q, lp, lq, beta):
    """`beta KL(p || m) + (1 - beta) KL(q || m)`, `m = beta p + (1 - beta) q`: beta is the weight of the TEACHER, in the
    mixture and in front of `KL(p || m)` (as in the GKD paper). Unscaled: it shrinks like beta (1 - beta) at the ends.
    """
    lm = _log_mixture(beta, lp, lq)
    student = (1 - beta) * q * (lq - lm)
    return beta * p * (lp - lm) + student, student


def _skew_forward_kl(p, q, lp, lq, alpha):
    """`KL(p || alpha p + (1 - alpha) q)` (DistiLLM)."""
    lm = _log_mixture(alpha, lp, lq)
    return p * (lp - lm), (alpha - 1) * q * jnp.exp(lp - lm)


def _skew_reverse_kl(p, q, lp, lq, alpha):
    """`KL(q || (1 - alpha) p + alpha q)` (DistiLLM); the gradient flows through the mixture too."""
    lm = _log_mixture(1 - alpha, lp, lq)
    d = q * (lq - lm)
    return d, d + q - alpha * q * jnp.exp(lq - lm)


def _total_variation(p, q, lp, lq, _):
    """`0.5 sum |p - q|`; the gradient at `p_v = q_v` counts as 0."""
    gap = q - p
    return 0.5 * jnp.abs(gap), 0.5 * q * jnp.sign(gap)


def _adaptive_kl(p, q, lp, lq, mu):
    """`w KL(p || q) + (1 - w) KL(q || p)` (arXiv 2404.02657), no gradient through `w [C]`.

    The tail is the least probable ids of the teacher whose mass together is at most `mu`, the head the others;
    `w` is the head's share of `sum |p - q|`. Where `p = q` that is 0/0 and `w` counts as 0.5.
    """
    cut = largest(lambda t: jnp.sum(jnp.where(p <= t[:, None], p, 0.0), axis=-1) <= mu, p.shape[0])
    gap = jnp.abs(p - q)
    total = jnp.sum(gap, axis=-1)
    head = jnp.sum(jnp.where(p > cut[:, None], gap, 0.0), axis=-1)
    w = jnp.where(total > 0, head / jnp.where(total > 0, total, 1.0), 0.5)[:, None]
    forward, reverse = p * (lp - lq), q * (lq - lp)
    return w * forward + (1 - w) * reverse, (1 - w) * (reverse + q) - w * p


def _log_mixture(share: float, lp: Array, lq: Array) -> Array:
    """`log(share p + (1 - share) q)`, safe where both probabilities underflow."""
    with np.errstate(divide="ignore"):
        return jnp.logaddexp(lp + np.float32(np.log(share)), lq + np.float32(np.log1p(-share)))


def largest(holds: Callable[[Array], Array], rows: int) -> Array:
    """The largest float32 threshold `t [rows]` >= 0 for which `holds(t) -> bool [rows]` is true.

    `holds` must be true at 0 and turn false once, as the threshold grows. Non-negative floats order like their bits, so
    bisecting the bit pattern is exact in 31 passes: a cut by probability without a sort, also where the ids lie on
    several devices. Ids of equal probability fall on the same side of it.
    """
    as_float = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.float32)

    def halve(_, interval):
        low, high = interval
        mid = low + (high - low) // 2
        true = holds(as_float(mid))
        return jnp.where(true, mid, low), jnp.where(true, high, mid)

    top = jnp.full((rows,), INFINITY_BITS, jnp.int32)
    return as_float(jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(top), top))[0])


# name -> (terms, the setting that is its parameter)
DIVERGENCES: dict[str, tuple[Callable, str | None]] = {
    "fkl": (_forward_kl, None),
    "rkl": (_reverse_kl, None),
    "jsd": (_jensen_shannon, "beta"),
    "sfkl": (_skew_forward_kl, "alpha"),
    "srkl": (_skew_reverse_kl, "alpha"),
    "tvd": (_total_variation, None),
    "akl": (_adaptive_kl, "mu"),
}
# Parameters at which a divergence is another one. For jsd this is a definition: its own formula tends to 0 there.
ENDS = {
    ("jsd", 0.0): "fkl",
    ("jsd", 1.0): "rkl",
    ("sfkl", 0.0): "fkl",
    ("srkl", 0.0): "rkl",
    ("akl", 0.0): "fkl",
    ("akl", 1.0): "rkl",
}


def divergence(kind: str, logp: Array, logq: Array, parameter: float = 0.0) -> tuple[Array, Array]:
    """Value `[C]` and gradient `[C, V]` of a divergence of DIVERGENCES, at its static parameter in [0, 1].

    An id that is -inf on one side only (a banned token) contributes 0 and the other side is not renormalised. It is
    removed *before* the product, so that neither the value nor the gradient meets `0 * inf`.
    """
    terms, _ = DIVERGENCES[ENDS.get((kind, float(parameter)), kind)]
    both = jnp.isfinite(logp) & jnp.isfinite(logq)
    p, q = jnp.where(both, jnp.exp(logp), 0.0), jnp.where(both, jnp.exp(logq), 0.0)
    d, qh = terms(p, q, jnp.where(both, logp, 0.0), jnp.where(both, logq, 0.0), parameter)
    return jnp.sum(d, axis=-1), qh - jnp.exp(logq) * jnp.sum(qh, axis=-1, keepdims=True)


def top_k_divergence(kind: str, ids: Array, logp: Array, logq: Array, parameter: float = 0.0) -> tuple[Array, Array]:
    """The same over k + 1 outcomes: the teacher's `ids [C, k]` with their `logp [C, k]`, and "everything else".

    Both sides keep the mass of the rest, so this is a divergence, and never above the full one (but akl, whose head and
    tail are then sets of outcomes). `logq [C, V]` is the student's whole row: its rest is summed exactly, and the
    gradient reaches every id, in the rest in proportion to `q`.
    """
    row = jnp.arange(ids.shape[0])[:, None]
    rest = jnp.ones(logq.shape, bool).at[row, ids].set(False)
    mass = jnp.minimum(jnp.sum(jnp.exp(logp), axis=-1, keepdims=True), 1.0)
    logp_rest = jnp.maximum(jnp.log1p(-mass), UNSEEN)
    logq_rest = jax.nn.logsumexp(jnp.where(rest, logq, -jnp.inf), axis=-1, keepdims=True)
    value, g = divergence(
        kind,
        jnp.concatenate([logp, logp_rest], axis=-1),
        jnp.concatenate([jnp.take_along_axis(logq, ids, axis=-1), logq_rest], axis=-1),
        parameter,
    )
    share = jnp.where(rest & jnp.isfinite(logq), jnp.exp(logq - logq_rest), 0.0)
    return value, (share * g[:, -1:]).at[row, ids].set(g[:, :-1])


# ------------------------------------------------------------------------------------------------- the target alone


def cross_entropy(logq: Array, target: Array) -> tuple[Array, Array]:
    """`-log q(target)` and its gradient `q - onehot(target)`; `logq [C, V]` is taken at temperature 1."""
    is_target = jnp.arange(logq.shape[-1]) == target[:, None]
    value = -jnp.sum(jnp.where(is_target, logq, 0.0), axis=-1)
    return value, jnp.exp(logq) - is_target


def clipped_policy(ce: Array, advantage: Array, offset: Array, clip: float) -> tuple[Array, Array]:
    """PPO's loss of one sampled token `max(-A r, -A clip(r, 1 - clip, 1 + clip))`, `r = exp(log q(y) - offset)`.

    Args, all `[C]`: `ce = -log q(y)`; `offset = log q_roll(y) - log w`, with which the importance weight multiplies the
    ratio *before* the clip (MiniLLM). For mixed rollouts that is the log-probability of y under the mixture it was
    drawn from. Returns the value and its derivative by `ce`, which is 0 where the clip is active.
    """
    ratio = jnp.exp(-ce - offset)
    free, clipped = -advantage * ratio, -advantage * jnp.clip(ratio, 1 - clip, 1 + clip)
    return jnp.maximum(free, clipped), jnp.where(free >= clipped, advantage * ratio, 0.0)
