"""The sampler: prompts in, tokens out, by a jitted prefill and a jitted decode loop with a KV cache.

A token is drawn by inverse CDF from one uniform keyed by (seed, example, position), so a sample depends neither on its
batch-mates nor on order, padding or the number of devices; positions where the draw was closer to an edge than rounding
are counted. Prompts are sorted by length and run in a few fixed shapes, each compiled once.

The cache is a list of segments. The first holds the prompts, left-aligned; tokens that are generated go to segments of
their own, which are added as they are needed, so that no step reads many slots that are empty. Masks and positions are
explicit: holes between segments do not matter.

Letters: R rows, P prompt slots, M new tokens, V vocabulary, W beams, B = R*W.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from kd_jax import sharding
from kd_jax.errors import ConfigError
from kd_jax.head import Head, logits
from kd_jax.sampling import Sampling, choose, margin, repeats
from kd_jax.transformer import Blocks, Segment, Transformer, few_rows, split_layers

__all__ = ["Samples", "Sampling", "generate"]

Array = jax.Array
SEGMENT = 64  # slots of the first segment for new tokens; later ones double what there is
NEVER = -1e9  # the score of a beam that does not exist


@dataclasses.dataclass(frozen=True)
class Samples:
    """What was generated, on the host, in the order of the prompts."""

    tokens: np.ndarray  # int32 [n, max_new_tokens], 0 after the end
    lengths: np.ndarray  # int32 [n], generated tokens, EOS included when produced
    ended: np.ndarray  # bool [n], EOS was produced
    near_ties: np.ndarray  # int32 [n], positions where the choice was closer than rounding


def generate(
    model: Transformer,
    prompts: np.ndarray,
    lengths: np.ndarray,
    example_keys: np.ndarray,
    spec: Sampling,
    *,
    vocab: int,
    eos_id: int,
    seed: int,
    mesh: Mesh,
    teacher: Transformer | None = None,
    limits: np.ndarray | None = None,
    batch_rows: int = 0,
    dtype: DTypeLike = jnp.float32,
) -> Samples:
    """Continue every prompt until EOS, or until it has as many new tokens as its limit.

    Args:
      model: the student; with `spec.mix_alpha` > 0 `teacher` takes part in every token.
      prompts, lengths: int32 tokens of all prompts one after the other, and how many each has `[n]`.
      example_keys: uint32 `[n]`, what a row's random numbers depend on besides `seed` and position.
      vocab: effective vocabulary; ids at or above it are never produced. eos_id: -1 never ends a row early.
      limits: int32 `[n]`, new tokens of each row, at most `spec.max_new_tokens` (None: that many for all).
      batch_rows: rows that run together; 0 chooses. It changes speed and memory, not the samples.
      dtype: of activations and cache; layers are cast once per call, and held a second time while it runs.

    All processes give the same arguments and get the same samples.
    Raises ConfigError before anything is compiled: empty prompts, prompts that leave no room for their new tokens in
    the context of a model, a mixture without a teacher.
    """
    lengths = np.asarray(lengths, np.int32)
    n = len(lengths)
    limits = np.full(n, spec.max_new_tokens, np.int32) if limits is None else np.asarray(limits, np.int32)
    if spec.mix_alpha > 0 and teacher is None:
        raise ConfigError(f"generation: mix_alpha {spec.mix_alpha} needs a teacher")
    models = {0.0: [model], 1.0: [teacher]}.get(spec.mix_alpha, [model, teacher])
    spec = spec if len(models) == 2 else dataclasses.replace(spec, mix_alpha=0.0)
    _check(models, prompts, lengths, example_keys, limits, spec, vocab)
    fixed = dict(spec=spec, vocab=vocab, dtype=np.dtype(dtype), mesh=mesh)
    out = Samples(
        np.zeros((n, spec.max_new_tokens), np.int32), np.zeros(n, np.int32), np.zeros(n, bool), np.zeros(n, np.int32)
    )
    ready = _ready(models, vocab=vocab, dtype=np.dtype(dtype), mesh=mesh) if n else None
    starts = np.cumsum(lengths) - lengths
    for rows in _batches(lengths, batch_rows, spec, mesh):
        used = rows[: len(rows) - np.sum(rows < 0)]
        column = lambda values, fill, rows=rows: np.where(rows >= 0, values[rows], fill)
        length = column(lengths, 1).astype(np.int32)
        tokens = np.zeros((len(rows), _bucket(length.max())), np.int32)
        inside = np.arange(tokens.shape[1])[None] < length[:, None]
        tokens[inside] = prompts[np.repeat(column(starts, 0), length) + np.nonzero(inside)[1]]
        keys = column(np.asarray(example_keys, np.uint32), 0).astype(np.uint32)
        uniform = _uniforms(np.uint32(seed % 2**32), keys, new=spec.max_new_tokens) if spec.temperature else None
        batch = Batch(tokens, length, column(limits, 0).astype(np.int32), np.int32(eos_id), uniform)
        prompt, loop, more = _start(models, ready, batch, **fixed)
        for slots in _segments(spec.max_new_tokens):
            if not more:
                break
            loop, more = _decode(ready, prompt, batch, loop, slots=slots, **fixed)
        for field, found in zip(
            dataclasses.fields(out), jax.device_get(_result(loop.state, np.int32(eos_id), mesh=mesh))
        ):
            getattr(out, field.name)[used] = found[: len(used)]
    return out


def _check(models, prompts, lengths, example_keys, limits, spec: Sampling, vocab: int) -> None:
    if len(example_keys) != len(lengths) or len(limits) != len(lengths) or lengths.sum() != len(prompts):
        raise ValueError(
            f"{len(lengths)} lengths (sum {lengths.sum()}), {len(prompts)} prompt tokens, {len(example_keys)} keys and "
            f"{len(limits)} limits do not belong together"
        )
    if (lengths < 1).any():
        raise ConfigError(
            f"generation: {(lengths < 1).sum()} of {len(lengths)} prompts are empty; a prompt needs at least one token "
            "(give the family a BOS token, or drop them)"
        )
    if (limits > spec.max_new_tokens).any() or (limits < 0).any():
        raise ConfigError(f"generation: limits must lie in [0, max_new_tokens {spec.max_new_tokens}]")
    for cfg in (m.cfg for m in models):
        over = lengths + limits > cfg.max_positions
        if over.any():
            raise ConfigError(
                f"generation: {over.sum()} of {len(lengths)} prompts and their new tokens exceed the context of "
                f"{cfg.max_positions} positions (longest prompt {lengths.max()}, most new tokens {limits.max()}); "
                "shorten the prompts (data.max_prompt_length) or lower max_new_tokens"
            )
        if vocab > cfg.vocab_size:
            raise ConfigError(f"generation: vocab {vocab} exceeds a model's vocabulary of {cfg.vocab_size}")


# ------------------------------------------------------------------------------------------------- fixed shapes


def _bucket(length: int) -> int:
    """Prompt slots for a longest prompt: 16, 32, 48, 64, 96, 128, ...: few shapes, at most half of them empty."""
    power = 1 << max(4, int(length - 1).bit_length())
    return power * 3 // 4 if power > 32 and length <= power * 3 // 4 else power


def _batches(lengths: np.ndarray, most: int, spec: Sampling, mesh: Mesh) -> Iterator[np.ndarray]:
    """Rows of similar length together, longest first; -1 fills up to a power of two that the devices divide."""
    most = most or max(1, (64 if jax.default_backend() == "cpu" else 256) // spec.beams)
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    order = np.argsort(-lengths, kind="stable")
    for start in range(0, len(order), most):
        rows = order[start : start + most]
        size = min(most, 1 << max(3, (len(rows) - 1).bit_length()))
        yield np.concatenate([rows, np.full(-(-size // split) * split - len(rows), -1)])


def _segments(new: int) -> Iterator[int]:
    """Slots of the segments for new tokens; the last token of all is never fed back."""
    done = 0
    while done < new - 1:
        slots = min(max(SEGMENT, done), new - 1 - done)
        yield slots
        done += slots


# ----------------------------------------------------------------------------------------------------- one batch


class Batch(NamedTuple):
    """What a batch is asked for."""

    tokens: Array  # int32 [R, P]
    lengths: Array  # int32 [R]
    limits: Array  # int32 [R]
    eos_id: Array  # int32 scalar
    uniform: Array | None  # float32 [R, M], where tokens are drawn


class Ready(NamedTuple):
    """A model made ready for many steps: its layers apart and in the computing dtype."""

    model: Transformer  # without layers and head
    layers: list[Blocks]
    head: Head  # its weight transposed: a CPU multiplies [E, V] 1.4 times as fast as [V, E]


class State(NamedTuple):
    """What sampling knows after `step` tokens."""

    step: Array
    last: Array  # int32 [R], the token chosen last
    out: Array  # int32 [R, M]
    lengths: Array  # int32 [R]
    ended: Array  # bool [R]
    near: Array  # int32 [R]


class BeamState(NamedTuple):
    """What beam search knows after `step` tokens: W texts that go on, and the W best that are finished."""

    step: Array
    last: Array  # int32 [B]
    out: Array  # int32 [R, W, M]
    score: Array  # float32 [R, W], log-probability, descending
    done: Array  # int32 [R, W, M]
    done_score: Array  # float32 [R, W], log-probability over length, descending
    done_length: Array  # int32 [R, W], 0 where there is none yet
    open: Array  # bool [R], a running text may still beat a finished one
    near: Array  # int32 [R]


class Loop(NamedTuple):
    """What a step changes: per model the segments of new tokens, and the state."""

    segments: list[list[Segment]]
    state: State | BeamState


@functools.partial(jax.jit, static_argnames=("vocab", "dtype", "mesh"))
def _ready(models: list[Transformer], *, vocab: int, dtype, mesh: Mesh) -> list[Ready]:
    """Matmul weights in the dtype, gathered over `fsdp` once, not once per token; the `tensor` axis stays."""

    def whole(name: str, x: Array) -> Array:
        x = x.astype(dtype) if name.startswith("blocks.") and x.ndim == 3 else x
        if mesh.shape["fsdp"] == 1:
            return x
        kept = [axis if axis == "tensor" else None for axis in sharding.spec_for(name, x.shape, mesh)]
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*kept)))

    out = []
    for model in models:
        leaves, tree = jax.tree.flatten(model)
        rest = jax.tree.unflatten(tree, [whole(n, x) for n, x in zip(sharding.names(model), leaves)])
        layers, head = split_layers(rest.blocks, rest.cfg.layers), rest.head()
        rest.blocks = rest.lm_head = None  # what would only be held twice
        out.append(Ready(rest, layers, dataclasses.replace(head, weight=head.weight[:vocab].astype(dtype).T)))
    return out


def _logits(h: Array, ready: Ready, vocab: int) -> Array:
    return logits(few_rows(h), dataclasses.replace(ready.head, weight=ready.head.weight.T), vocab)


@functools.partial(jax.jit, static_argnames="new")
def _uniforms(seed: Array, keys: Array, *, new: int) -> Array:
    """[R, M] in [0, 1), each from its (seed, key, position) alone."""
    row = jax.vmap(jax.random.fold_in, (None, 0))
    token = jax.vmap(row, (0, None))(row(jax.random.key(seed), keys), jnp.arange(new, dtype=jnp.uint32))
    return jax.vmap(jax.vmap(jax.random.uniform))(token)


STATIC = ("spec", "vocab", "dtype", "mesh")


@functools.partial(jax.jit, static_argnames=STATIC)
def _start(models, ready, batch: Batch, *, spec: Sampling, vocab: int, dtype, mesh: Mesh):
    """Prefill and the first token: (prompt segments, loop, whether any row goes on)."""
    rows, slots = batch.tokens.shape
    new, width = spec.max_new_tokens, spec.beams
    positions = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32)[None], batch.tokens.shape)
    inside = (positions < batch.lengths[:, None]).astype(jnp.int32)
    prompt, z = [], []
    with jax.default_matmul_precision("highest"):
        for model, r in zip(models, ready):
            h, segment = model.prefill(batch.tokens, inside, positions, dtype=dtype)
            h = jnp.take_along_axis(h, (batch.lengths - 1)[:, None, None], axis=1)[:, 0]
            z.append(_logits(h, r, vocab))
            prompt.append(_placed(segment, mesh))
    none = jnp.zeros(rows, jnp.int32)
    if width == 1:
        state = State(jnp.int32(0), none, jnp.zeros((rows, new), jnp.int32), none, none > 0, none)
        state = _sample(state, z, batch, spec)
    else:
        score = jnp.full((rows, width), NEVER).at[:, 0].set(0.0)  # one beam only, or all would choose the same
        empty = jnp.zeros((rows, width, new), jnp.int32)
        state = BeamState(
            jnp.int32(0),
            jnp.zeros(rows * width, jnp.int32),
            *(empty, score, empty, jnp.full((rows, width), NEVER), empty[:, :, 0], none == 0, none),
        )
        state, _ = _beam(state, jnp.repeat(z[0], width, axis=0), batch, spec)
    return prompt, Loop([[] for _ in models], state), _going(state, batch).any()


@functools.partial(jax.jit, static_argnames=(*STATIC, "slots"), donate_argnames="loop")
def _decode(ready, prompt, batch: Batch, loop: Loop, *, slots, spec, vocab, dtype, mesh):
    """A new segment of `slots` and the steps that fill it: (loop, whether any row goes on)."""
    rows = batch.tokens.shape[0] * spec.beams
    closed = sum(segment[0][0].shape[2] for segment in loop.segments[0])
    fresh = lambda cfg: jnp.zeros((rows, cfg.kv_heads, slots, cfg.head_dim), dtype)
    segments = [
        [*old, _placed([(fresh(r.model.cfg), fresh(r.model.cfg)) for _ in r.layers], mesh)]
        for old, r in zip(loop.segments, ready)
    ]
    lengths = jnp.repeat(batch.lengths, spec.beams)
    in_prompt = jnp.arange(batch.tokens.shape[1])[None] < lengths[:, None]
    edges = np.cumsum([0, *(segment[0][0].shape[2] for segment in segments[0])])

    def step(loop: Loop) -> Loop:
        state, fed = loop.state, loop.state.step - 1
        seen = [in_prompt] + [jnp.arange(a, b)[None] <= fed for a, b in zip(edges, edges[1:])]
        z, grown = [], []
        with jax.default_matmul_precision("highest"):
            for r, first, later in zip(ready, prompt, loop.segments):
                h, last = r.model.decode(
                    r.layers, state.last, lengths + fed, [first, *later], seen, fed - closed, dtype=dtype
                )
                z.append(_logits(h, r, vocab))
                grown.append([*later[:-1], last])
        if spec.beams == 1:
            return Loop(grown, _sample(state, z, batch, spec))
        state, parents = _beam(state, z[0], batch, spec)
        return Loop(jax.tree.map(lambda x: x[parents], grown), state)

    def on(loop: Loop) -> Array:
        return _going(loop.state, batch).any() & (loop.state.step <= closed + slots)

    loop = jax.lax.while_loop(on, step, Loop(segments, loop.state))
    return loop, _going(loop.state, batch).any()


def _placed(segment: Segment, mesh: Mesh) -> Segment:
    """Rows over `data` and `fsdp`, key/value heads over `tensor` where they divide."""
    tensor = "tensor" if segment[0][0].shape[1] % mesh.shape["tensor"] == 0 else None
    return jax.lax.with_sharding_constraint(segment, NamedSharding(mesh, P(sharding.BATCH, tensor)))


def _going(state: State | BeamState, batch: Batch) -> Array:
    """bool [R]: rows that want another token."""
    unfinished = state.open if isinstance(state, BeamState) else ~state.ended
    return unfinished & (state.step < batch.limits)


@functools.partial(jax.jit, static_argnames="mesh")
def _result(state: State | BeamState, eos_id: Array, *, mesh: Mesh) -> tuple[Array, ...]:
    """Tokens, lengths, ended and near ties of all rows, on every process."""
    if isinstance(state, State):
        found = state.out, state.lengths, state.ended, state.near
    else:
        tokens, lengths = state.done[:, 0], state.done_length[:, 0]
        last = jnp.take_along_axis(tokens, jnp.maximum(lengths - 1, 0)[:, None], axis=1)[:, 0]
        found = tokens, lengths, (last == eos_id) & (lengths > 0), state.near
    return jax.lax.with_sharding_constraint(found, NamedSharding(mesh, P()))


def _banned(z: Array, batch: Batch, out: Array, step: Array, spec: Sampling) -> Array:
    """Logits without EOS where it is too early, and without tokens that repeat an n-gram of prompt and `out [B, M]`."""
    if spec.min_new_tokens:
        early = (jnp.arange(z.shape[1]) == batch.eos_id) & (step < spec.min_new_tokens)
        z = jnp.where(early[None], -jnp.inf, z)
    if spec.no_repeat_ngram == 0:
        return z
    prompts, lengths = (jnp.repeat(x, len(z) // len(x), axis=0) for x in (batch.tokens, batch.lengths))
    slot = jnp.arange(prompts.shape[1] + out.shape[1])[None] - lengths[:, None]  # of `out`, where not negative
    history = jnp.where(
        slot < 0,
        jnp.pad(prompts, ((0, 0), (0, out.shape[1]))),
        jnp.take_along_axis(out, jnp.clip(slot, 0, out.shape[1] - 1), axis=1),
    )
    return jnp.where(repeats(history, lengths + step, spec.no_repeat_ngram, z.shape[1]), -jnp.inf, z)


def _sample(state: State, z: list[Array], batch: Batch, spec: Sampling) -> State:
    """One more token of every row that is not done, from the logits `[R, V]` of each model."""
    alive = _going(state, batch)
    z = [_banned(x, batch, state.out, state.step, spec) for x in z]
    uniform = None if batch.uniform is None else batch.uniform.at[:, state.step].get(mode="clip")
    token, near = choose(z, uniform, spec)
    token = jnp.where(alive, token, 0)
    return State(
        state.step + 1,
        token,
        jax.lax.dynamic_update_slice(state.out, token[:, None], (0, state.step)),
        state.lengths + alive,
        state.ended | (alive & (token == batch.eos_id)),
        state.near + (alive & near),
    )


def _beam(state: BeamState, z: Array, batch: Batch, spec: Sampling) -> tuple[BeamState, Array]:
    """One more token of every beam from logits `[B, V]`; also the beam [B] that each new beam continues.

    As in transformers with its defaults: 2W candidates, of which the first W may finish and the best W others go on; a
    row is over once its best running text, at its present length, scores below its W finished ones.
    """
    rows, width, _ = state.out.shape
    vocab = z.shape[1]
    alive = _going(state, batch)
    logp = _banned(jax.nn.log_softmax(z, axis=-1), batch, state.out.reshape(rows * width, -1), state.step, spec)
    ranked = (logp.reshape(rows, width, vocab) + state.score[:, :, None]).reshape(rows, -1)
    score, index = jax.lax.top_k(ranked, 2 * width)
    parent, token = index // vocab, (index % vocab).astype(jnp.int32)
    texts = jnp.take_along_axis(state.out, parent[:, :, None], axis=1)
    texts = jax.lax.dynamic_update_slice(texts, token[:, :, None], (0, 0, state.step))
    length = state.step + 1
    over = (token == batch.eos_id) | (length >= batch.limits)[:, None]

    # finished: the W best of the old ones and those among the first W candidates that end here
    ends = over & (jnp.arange(2 * width) < width)[None] & alive[:, None]
    all_scores = jnp.concatenate([state.done_score, jnp.where(ends, score / length, NEVER)], axis=1)
    done_score, best = jax.lax.top_k(all_scores, width)
    done = jnp.take_along_axis(jnp.concatenate([state.done, texts], axis=1), best[:, :, None], axis=1)
    all_lengths = jnp.concatenate([state.done_length, jnp.where(ends, length, 0)], axis=1)
    done_length = jnp.take_along_axis(all_lengths, best, axis=1)

    # running: the W best that do not end
    score, best = jax.lax.top_k(jnp.where(over, NEVER, score), width + 1)
    next_best, score, best = score[:, width], score[:, :width], best[:, :width]
    parent, token = jnp.take_along_axis(parent, best, axis=1), jnp.take_along_axis(token, best, axis=1)
    near = score[:, -1] - next_best < margin(next_best)
    full = jnp.all(done_length > 0, axis=1)
    state = BeamState(
        length,
        token.reshape(-1),
        jnp.take_along_axis(texts, best[:, :, None], axis=1),
        score,
        done,
        done_score,
        done_length,
        state.open & (~full | (score[:, 0] / length > done_score[:, -1])),
        state.near + (alive & near & (next_best > NEVER / 2)),
    )
    return state, (jnp.arange(rows)[:, None] * width + parent).reshape(-1)
