"""The choice of the next token: settings, filters on logits, and a draw from one uniform per token.

Letters: R rows, V vocabulary, S slots of a row's history.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kd_jax.errors import ConfigError

Array = jax.Array

BLOCK = 256  # tokens whose masses are summed before the search for the drawn one
ROUNDING = 2e-6  # of a probability or, relative to its size, of a logit: choices closer than this are counted


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the same at every position. Raises ConfigError for values that make no sense."""

    temperature: float = 1.0  # 0: the most likely token
    top_k: int = 0  # only the k most likely tokens (those that tie with the last stay); 0: all
    top_p: float = 1.0  # only the smallest set of most likely tokens that holds this mass (ties stay)
    max_new_tokens: int = 256
    mix_alpha: float = 0.0  # share of the teacher: (1-a) student + a teacher, each after its own filters
    no_repeat_ngram: int = 0  # no n-gram of prompt and output together comes twice; 0: no ban
    min_new_tokens: int = 0  # EOS is not chosen before there are as many
    beams: int = 1  # beam search of this width; a text's score is its log-probability over its new tokens

    def __post_init__(self) -> None:
        mixed = 0 < self.mix_alpha
        wrong = [
            (self.temperature < 0, f"temperature must not be negative, got {self.temperature}"),
            (self.top_k < 0, f"top_k must not be negative (0 keeps all tokens), got {self.top_k}"),
            (not 0 < self.top_p <= 1, f"top_p must lie in (0, 1], got {self.top_p}"),
            (self.max_new_tokens < 1, f"max_new_tokens must be positive, got {self.max_new_tokens}"),
            (not 0 <= self.mix_alpha <= 1, f"mix_alpha must lie in [0, 1], got {self.mix_alpha}"),
            (self.no_repeat_ngram < 0, f"no_repeat_ngram must not be negative, got {self.no_repeat_ngram}"),
            (
                not 0 <= self.min_new_tokens <= self.max_new_tokens,
                f"min_new_tokens must lie in [0, max_new_tokens {self.max_new_tokens}], got {self.min_new_tokens}",
            ),
            (self.beams < 1, f"beams must be positive, got {self.beams}"),
            (self.beams > 1 and self.temperature > 0, f"beams {self.beams} needs temperature 0: beams do not draw"),
            (self.beams > 1 and mixed, f"beams {self.beams} needs mix_alpha 0, got {self.mix_alpha}"),
            (mixed and not self.temperature, f"mix_alpha {self.mix_alpha} needs a temperature above 0 to draw with"),
        ]
        for is_wrong, message in wrong:
            if is_wrong:
                raise ConfigError(f"sampling: {message}")


def choose(z: list[Array], uniform: Array | None, spec: Sampling) -> tuple[Array, Array]:
    """The next token int32 [R], and whether the choice was closer than rounding, bool [R].

    z: logits [R, V] float32 of the model, or of student and teacher, -inf where a token is banned. uniform: [R] in
    [0, 1), None at temperature 0.
    """
    if spec.temperature == 0:
        return most_likely(z[0])
    p, near = zip(*(filtered(x / spec.temperature, spec) for x in z))
    # Probabilities are mixed, not logits: the mixture has the support of both sides (arXiv:2306.08543, eq. 5).
    token, close = draw(p[0] if len(p) == 1 else (1 - spec.mix_alpha) * p[0] + spec.mix_alpha * p[1], uniform)
    return token, sum(near, close)


def most_likely(z: Array) -> tuple[Array, Array]:
    """The first of the largest logits `[R, V]`, int32 [R], and whether another is closer to it than rounding."""
    top = jnp.max(z, axis=-1, keepdims=True)
    ids = jnp.arange(z.shape[1], dtype=jnp.int32)[None]
    token = jnp.min(jnp.where(z == top, ids, z.shape[1] - 1), axis=-1)  # six times as fast as argmax on a CPU
    return token, jnp.sum(z >= top - margin(top), axis=-1) > 1


def margin(z: Array) -> Array:
    """What rounding may move a logit of this size by."""
    return ROUNDING * jnp.maximum(1.0, jnp.abs(z))


def filtered(z: Array, spec: Sampling) -> tuple[Array, Array]:
    """Probabilities [R, V] of logits after top-k, then top-p; and whether rounding may change who is in them."""
    near = jnp.zeros(z.shape[0], bool)
    if 0 < spec.top_k < z.shape[1]:
        least = jax.lax.top_k(z, spec.top_k)[0][:, -1:]
        near |= jnp.any((z < least) & (z >= least - margin(least)), axis=-1)
        z = jnp.where(z >= least, z, -jnp.inf)
    p = jax.nn.softmax(z, axis=-1)
    if spec.top_p < 1:
        least = nucleus_edge(p, spec.top_p)
        kept = jnp.where(p >= least, p, 0.0)
        mass, above = (jnp.sum(x, axis=-1) for x in (kept, jnp.where(p > least, p, 0.0)))
        near |= jnp.minimum(jnp.abs(mass - spec.top_p), jnp.abs(above - spec.top_p)) < ROUNDING
        p = kept / mass[:, None]
    return p, near


def nucleus_edge(p: Array, mass: float) -> Array:
    """The largest value [R, 1] such that the probabilities `p [R, V]` at or above it sum to at least `mass`.

    Bisection on the bits, which order positive floats as integers: no sort, and ties stay together.
    """
    bits = jax.lax.bitcast_convert_type(p, jnp.int32)

    def halve(i, edge):
        higher = edge | (1 << (30 - i))
        enough = jnp.sum(jnp.where(bits >= higher, p, 0.0), axis=-1, keepdims=True) >= mass
        return jnp.where(enough, higher, edge)

    edge = jax.lax.fori_loop(0, 31, halve, jnp.zeros((p.shape[0], 1), jnp.int32))
    return jax.lax.bitcast_convert_type(edge, jnp.float32)


def draw(p: Array, uniform: Array) -> tuple[Array, Array]:
    """Inverse CDF of the masses `p [R, V]` (of any positive sum) at `uniform [R]` in [0, 1).

    Returns ids int32 [R], and whether the uniform was closer to an edge of its token than rounding. Masses are summed
    in blocks first: one pass over `p` and two short cumulative sums are all it takes.
    """
    blocks = -(-p.shape[1] // BLOCK)
    p = jnp.pad(p, ((0, 0), (0, blocks * BLOCK - p.shape[1]))).reshape(-1, blocks, BLOCK)
    ends = jnp.cumsum(jnp.sum(p, axis=-1), axis=-1)
    total = ends[:, -1:]
    target = uniform[:, None] * total
    block = jnp.sum(ends <= target, axis=-1, keepdims=True)
    before = jnp.where(block > 0, jnp.take_along_axis(ends, block - 1, axis=1), 0.0)
    inner = jnp.take_along_axis(p, block[:, :, None], axis=1)[:, 0]
    cumulated = before + jnp.cumsum(inner, axis=-1)
    last = BLOCK - 1 - jnp.argmax(inner[:, ::-1] > 0, axis=-1)  # rounding must not lead past the block's last mass
    within = jnp.minimum(jnp.sum(cumulated <= target, axis=-1), last)[:, None]
    end = jnp.take_along_axis(cumulated, within, axis=1)
    start = end - jnp.take_along_axis(inner, within, axis=1)
    near = jnp.minimum(jnp.abs(target - start), jnp.abs(end - target)) < ROUNDING * total
    return (block * BLOCK + within)[:, 0].astype(jnp.int32), near[:, 0]


def repeats(history: Array, count: Array, n: int, vocab: int) -> Array:
    """bool [R, V]: tokens that would complete an n-gram for the second time.

    history: int32 [R, S], of which the first `count` [R] tokens count.
    """
    rows, slots = history.shape
    if slots < n:
        return jnp.zeros((rows, vocab), bool)
    starts = jnp.arange(slots - n + 1)[None]
    same = starts <= count[:, None] - n
    for i in range(n - 1):
        latest = jnp.take_along_axis(history, jnp.maximum(count[:, None] - n + 1 + i, 0), axis=1)
        same &= history[:, i : slots - n + 1 + i] == latest
    tokens = jnp.where(same, history[:, n - 1 :], vocab)
    return jnp.zeros((rows, vocab), bool).at[jnp.arange(rows)[:, None], tokens].set(True, mode="drop")
