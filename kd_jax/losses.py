"""The mathematics of one vocabulary row: log-softmaxes in, divergence and its logit gradient out.

`p` is the teacher's next-token distribution, `q` the student's; both arrive as log-probabilities `[C, V]` at
their own temperatures. Every divergence returns

    value [C]      D(p, q) in nats
    grad  [C, V]   T_s * dD/dz_s, where z_s are the student's logits before the division by T_s

This is the only place where a loss formula is written; `kd_jax.head` calls it while a chunk's logits exist.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array


def forward_kl(logp: Array, logq: Array) -> tuple[Array, Array]:
    """`KL(p || q) = sum_v p_v (log p_v - log q_v)`, with gradient `q - p`.

    An id that is -inf on one side only (a banned token) contributes 0 and the other side is not renormalised.
    It is removed *before* the product, so that neither the value nor the gradient meets `0 * inf`.
    """
    both = jnp.isfinite(logp) & jnp.isfinite(logq)
    p = jnp.where(both, jnp.exp(logp), 0.0)
    gap = jnp.where(both, logp, 0.0) - jnp.where(both, logq, 0.0)
    value = jnp.sum(p * gap, axis=-1)
    grad = jnp.exp(logq) * jnp.sum(p, axis=-1, keepdims=True) - p
    return value, grad


def cross_entropy(logq: Array, target: Array) -> tuple[Array, Array]:
    """`-log q(target)` and its gradient `q - onehot(target)`; `logq [C, V]` is taken at temperature 1."""
    is_target = jnp.arange(logq.shape[-1]) == target[:, None]
    value = -jnp.sum(jnp.where(is_target, logq, 0.0), axis=-1)
    return value, jnp.exp(logq) - is_target


DIVERGENCES: dict[str, Callable[[Array, Array], tuple[Array, Array]]] = {"fkl": forward_kl}
