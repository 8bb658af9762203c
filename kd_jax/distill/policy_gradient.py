"""MiniLLM's policy gradient (arXiv:2306.08543; microsoft/LMOps:minillm), as functions of per-token arrays.

Arrays are [..., T] with time last: `mask` marks response tokens, `follows` says whether the next position holds the
next response token of the same sample (False at a response's last token). Everything outside `mask` comes out 0.
`r_k = log p(y_k) - log q(y_k)`, where q is the student that sampled and p the teacher.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def rewards(logp: Array, logq: Array, mask: Array, scale: float, clip: float) -> Array:
    """`(log p - log q) / scale`, clipped to `+-clip` (0: not clipped)."""
    r = jnp.where(mask, logp - logq, 0.0) / scale
    return jnp.clip(r, -clip, clip) if clip else r


def log_importance(logp: Array, logq: Array, mask: Array, alpha: float) -> Array:
    """`log w` of a token drawn from the mixture: `w = q / ((1 - alpha) q + alpha p)`, in `(0, 1/(1-alpha)]`."""
    if alpha == 0.0:
        return jnp.zeros_like(logq)
    return jnp.where(mask, -jnp.logaddexp(jnp.log1p(-alpha), jnp.log(alpha) + logp - logq), 0.0)


def _from_the_end(values: Array, follows: Array, gamma: float) -> Array:
    """`R_k = v_k + gamma R_{k+1}` within a response."""

    def back(later, now):
        value, goes_on = now
        total = value + gamma * jnp.where(goes_on, later, 0.0)
        return total, total

    first = lambda x: jnp.moveaxis(x, -1, 0)
    _, out = jax.lax.scan(
        back, jnp.zeros(values.shape[:-1], values.dtype), (first(values), first(follows)), reverse=True
    )
    return jnp.moveaxis(out, 0, -1)


def returns(r: Array, mask: Array, follows: Array, gamma: float, return_from: str, length_norm: bool) -> Array:
    """Discounted return of every response token, over the number of tokens that it sums where `length_norm`.

    `return_from` "k": `sum_{j>=k} gamma^(j-k) r_j`, over `n-k+1` tokens (the code's). "next": the same from token k+1
    on, over `n-k` tokens, 0 where none remains (the paper's: the single-step term covers r_k).
    """
    total = _from_the_end(r, follows, gamma)
    remaining = _from_the_end(mask.astype(r.dtype), follows, 1.0)
    if return_from == "next":
        after = lambda x: jnp.where(follows, jnp.roll(x, -1, axis=-1), 0.0)
        total, remaining = after(total), after(remaining)
    if length_norm:
        total = total / jnp.maximum(remaining, 1.0)
    return jnp.where(mask, total, 0.0)


def whiten(values: Array, mask: Array, count: Array) -> Array:
    """`(x - mean) / sqrt(var + 1e-8)` on the masked positions, population variance over `count` positions.

    `count` is the number of masked positions, or more: the rest counts as zeros (the reference code's padding).
    """
    x = jnp.where(mask, values, 0.0)
    n = jnp.sum(mask)
    mean = jnp.sum(x) / jnp.maximum(count, 1)
    var = (jnp.sum(jnp.where(mask, (x - mean) ** 2, 0.0)) + (count - n) * mean**2) / jnp.maximum(count, 1)
    return jnp.where(mask, (x - mean) * jax.lax.rsqrt(var + 1e-8), 0.0)
