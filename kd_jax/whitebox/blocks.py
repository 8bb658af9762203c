"""How the loss of an example changes when weights do: noise on all of them or on one block, and exchanged blocks.

What stands before a changed block is unchanged, so the input of every layer is kept from one plain pass and a change
of layer b runs the layers from b on alone: L(L+1)/2 of them for all L layers instead of L * L. All draws and blocks are
one program. The noise is made where it is used, one layer at a time, and no perturbed model is ever held or written.

MoPe: arXiv:2310.14369. Noise per block: arXiv:2508.07054. Letters: N tokens of a batch, D width, L layers.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from kd_jax.data.encode import Encoded
from kd_jax.errors import ConfigError
from kd_jax.head import Loss, head_loss
from kd_jax.score import run_step
from kd_jax.sharding import names
from kd_jax.transformer import Blocks, Transformer, apply_block, attend, attention_mask
from kd_jax.whitebox.spec import STACKED, Whitebox, block_rms, blocks_of, example_means

NOISE = ("nll", "mope", "mope_antithetic", "noise_absolute", "noise_relative")
SWAP = ("nll", "swap", "swap_back")
SIGNS = (1.0, -1.0)  # of the noise on all weights


def noise(
    model: Transformer, encoded: Encoded, indices: np.ndarray, spec: Whitebox, mesh: Mesh, *, bar: tqdm | None = None
) -> dict[str, np.ndarray]:
    """Rise of the mean NLL of the examples `indices` under Gaussian noise on the weights, in nats per scored token.

    Returns float64 arrays, the mean over `spec.draws` draws; eps_i is the same for all examples, blocks and columns:
      nll [n]                       of the model as it is
      mope [n]                      NLL(theta + sigma eps_i) - NLL(theta), noise on every parameter
      mope_antithetic [n]           the same over +eps_i and -eps_i, which removes the first-order term
      noise_absolute [n, blocks]    noise on the parameters of one block alone (`spec.block_names`)
      noise_relative [n, blocks]    the same; the sigma of a block is relative_sigma times the RMS of its weights
    The output table of a tied model is its embedding: noise on "embedding" moves both, its "head" is the rest.
    """
    settings = dict(seed=spec.seed, draws=spec.draws, sigma=spec.sigma, relative_sigma=spec.relative_sigma)
    step = _noise_step(spec.vocab, spec.precision, mesh)
    counts, fields = run_step(step, (model, settings), encoded, indices, spec, mesh, bar=bar)
    return {name: example_means(counts, fields[name]) for name in NOISE}


def swap(
    model: Transformer,
    base: Transformer,
    encoded: Encoded,
    indices: np.ndarray,
    spec: Whitebox,
    mesh: Mesh,
    *,
    bar: tqdm | None = None,
) -> dict[str, np.ndarray]:
    """Change of the mean NLL of the examples `indices` when one block is taken from another model of the same shape.

    Returns float64 arrays, in nats per scored token:
      nll [n]                  of `model`
      swap [n, blocks]         NLL(model with this block of base) - NLL(model): what the block carries
      swap_back [n, blocks]    NLL(base) - NLL(base with this block of model): what it carries by itself
    The two differ, since contributions of blocks do not add up. ConfigError where the shapes differ.
    """
    if model.cfg != base.cfg:
        raise ConfigError("swap: the two models have different shapes; a block fits only a model of the same shape")
    counts, fields = run_step(
        _swap_step(spec.vocab, spec.precision, mesh), (model, base), encoded, indices, spec, mesh, bar=bar
    )
    return {name: example_means(counts, fields[name]) for name in SWAP}


# ------------------------------------------------------------------------------------------------------------ passes


class Passes:
    """The pieces of a forward pass of one batch: layers on the residual stream [N, D], and the loss at its end."""

    def __init__(self, model: Transformer, batch: dict[str, jax.Array], vocab: int):
        self.cfg, self.batch, self.vocab = model.cfg, batch, vocab
        self.segments = batch["segment_ids"]
        self.mask = attention_mask(self.segments)
        self.rotation = self.enter(model)[1]

    def enter(self, model: Transformer):
        where = (jnp.where(self.segments == 0, 0, self.batch[name]) for name in ("tokens", "positions"))
        return model.enter(*where, jnp.float32)

    def layer(self, block: Blocks, x: jax.Array) -> jax.Array:
        see = lambda q, k, v: (attend(q, k, v, self.mask), None)
        return apply_block(self.cfg, block, x, self.rotation, self.segments.shape, see)[0]

    def inputs(self, model: Transformer) -> tuple[jax.Array, jax.Array]:
        """The stream that enters each layer, [L, N, D], and the one that leaves the last."""
        last, entering = jax.lax.scan(lambda x, block: (self.layer(block, x), x), self.enter(model)[0], model.blocks)
        return entering, last

    def rest(self, model: Transformer, x: jax.Array, start: jax.Array | int) -> jax.Array:
        """NLL [N] of a stream that enters layer `start` of the model; the layers before it are not run."""

        def body(i, x):
            at = lambda w: jax.lax.dynamic_index_in_dim(w, i, keepdims=False)
            return self.layer(jax.tree.map(at, model.blocks), x)

        return self.nll(model, jax.lax.fori_loop(start, self.cfg.layers, body, x))

    def nll(self, model: Transformer, x: jax.Array) -> jax.Array:
        """NLL [N] of the scored tokens, 0 at others, from the stream that leaves the last layer."""
        flat = {name: self.batch[name].reshape(-1) for name in ("targets", "loss_mask")}
        weights = {"ce": flat["loss_mask"].astype(jnp.float32)}
        return head_loss(model.leave(x), model.head(), None, None, flat["targets"], weights, Loss(self.vocab))[1]["ce"]

    def per_token(self, values: jax.Array) -> jax.Array:
        """[..., N] as [R, T, ...], the form of a score field."""
        return jnp.moveaxis(values, -1, 0).reshape(*self.segments.shape, *values.shape[:-1])


def _float32(model: Transformer) -> Transformer:
    return jax.tree.map(lambda w: w.astype(jnp.float32), model)


def _changed(model: Transformer, change: Callable[[str, jax.Array], jax.Array], wanted: tuple[int, ...]) -> Transformer:
    """`model` with `change(name, weight)` for the parameters outside its layers that belong to the blocks `wanted`."""
    named = zip(names(model), jax.tree.leaves(model))
    inside = lambda name: not name.startswith(STACKED) and blocks_of(name, model.cfg.layers)[0] in wanted
    leaves = [change(name, weight) if inside(name) else weight for name, weight in named]
    return jax.tree.unflatten(jax.tree.structure(model), leaves)


# ------------------------------------------------------------------------------------------------------------- noise


def draw_noise(
    key: jax.Array, shapes: dict[str, tuple[int, ...]], layer: jax.Array | int | None = None
) -> dict[str, jax.Array]:
    """Standard normal noise, float32, of leaves by name; `layer`: of one layer of stacked leaves, without that axis.

    key: of the draw. A tensor's noise depends on it, its name and its layer alone: not on the mesh, nor on what else is
    drawn.
    """
    hashes = np.array([zlib.crc32(name.encode()) for name in shapes], np.uint32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, hashes)
    if layer is not None:
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, layer)
    return {name: jax.random.normal(keys[i], shape) for i, (name, shape) in enumerate(shapes.items())}


def _layer_noise(key: jax.Array, block: Blocks, layer: jax.Array) -> Blocks:
    leaves, treedef = jax.tree.flatten(block)
    shapes = {STACKED + name: w.shape for name, w in zip(names(block), leaves)}
    return jax.tree.unflatten(treedef, list(draw_noise(key, shapes, layer).values()))


@functools.lru_cache(maxsize=8)
def _noise_step(vocab: int, precision: str, mesh: Mesh) -> Callable:
    """`step((model, settings), batch)`: the columns of `noise` per token, [R, T] or [R, T, blocks].

    Seed, draws and sigmas are no part of the program: a sweep over them compiles once.
    """

    def step(given: tuple[Transformer, dict], batch: dict) -> dict[str, jax.Array]:
        model, settings = _float32(given[0]), given[1]
        with jax.default_matmul_precision(precision):
            passes = Passes(model, batch, vocab)
            absolute = jnp.full(model.cfg.layers + 2, settings["sigma"], jnp.float32)
            sigmas = jnp.stack([absolute, settings["relative_sigma"] * block_rms(model)])
            entering, last = passes.inputs(model)
            plain = passes.nll(model, last)

            def add(i, total):
                key = jax.random.fold_in(jax.random.key(settings["seed"]), i)
                found = _one_draw(passes, model, entering, last, key, sigmas)
                return jax.tree.map(lambda t, nll: t + (nll - jnp.broadcast_to(plain, nll.shape)), total, found)

            zeros = (jnp.zeros((len(SIGNS), plain.size)), jnp.zeros((*sigmas.shape, plain.size)))
            total = jax.lax.fori_loop(0, settings["draws"], add, zeros)
        whole, alone = jax.tree.map(lambda t: t / settings["draws"], total)
        columns = (plain, whole[0], jnp.mean(whole, axis=0), alone[0], alone[1])
        return {name: passes.per_token(values) for name, values in zip(NOISE, columns)}

    return jax.jit(step, out_shardings=NamedSharding(mesh, P()))


def _one_draw(
    passes: Passes, model: Transformer, entering: jax.Array, last: jax.Array, key: jax.Array, sigmas: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """NLL of one draw: with noise on every parameter [signs, N], and on one block alone [forms, blocks, N].

    sigmas: [forms, blocks]; that of noise on everything is the first. A layer's noise is drawn once, for the streams
    in which all before it is noisy as well and for those in which it alone is.
    """
    head = model.cfg.layers + 1
    named = zip(names(model), jax.tree.leaves(model))
    drawn = draw_noise(key, {name: w.shape for name, w in named if not name.startswith(STACKED)})
    noisy = lambda scale, *blocks: _changed(model, lambda name, w: w + scale * drawn[name], blocks)
    signed = sigmas[0, 0] * jnp.array(SIGNS)

    def layer(whole, at):
        block, x, number, scales = at
        eps = _layer_noise(key, block, number)
        run = lambda scale, x: passes.layer(jax.tree.map(lambda w, e: w + scale * e, block, eps), x)
        whole = jax.lax.map(lambda s: run(*s), (signed, whole))
        alone = lambda scale: passes.rest(model, run(scale, x), number + 1)
        return whole, jax.lax.map(alone, scales)

    def first(scale):
        changed = noisy(scale, 0)
        return passes.rest(changed, passes.enter(changed)[0], 0)

    whole = jax.lax.map(lambda scale: passes.enter(noisy(scale, 0))[0], signed)
    each = (model.blocks, entering, jnp.arange(model.cfg.layers), sigmas[:, 1:-1].T)
    whole, layers = jax.lax.scan(layer, whole, each)
    whole = jax.lax.map(lambda s: passes.nll(noisy(s[0], 0, head), s[1]), (signed, whole))
    ends = jax.lax.map(first, sigmas[:, 0]), jax.lax.map(lambda s: passes.nll(noisy(s, head), last), sigmas[:, -1])
    return whole, jnp.concatenate([ends[0][:, None], layers.swapaxes(0, 1), ends[1][:, None]], axis=1)


# -------------------------------------------------------------------------------------------------------------- swap


@functools.lru_cache(maxsize=8)
def _swap_step(vocab: int, precision: str, mesh: Mesh) -> Callable:
    """`step((model, base), batch)`: the columns of `swap` per token, [R, T] or [R, T, blocks]."""

    def step(models: tuple[Transformer, Transformer], batch: dict) -> dict[str, jax.Array]:
        with jax.default_matmul_precision(precision):
            model, base = map(_float32, models)
            passes = Passes(model, batch, vocab)
            nll, swapped = _exchanged(passes, model, base)
            base_nll, back = _exchanged(passes, base, model)
        found = {"nll": nll, "swap": swapped - nll[None], "swap_back": base_nll[None] - back}
        return {name: passes.per_token(values) for name, values in found.items()}

    return jax.jit(step, out_shardings=NamedSharding(mesh, P()))


def _exchanged(passes: Passes, model: Transformer, other: Transformer) -> tuple[jax.Array, jax.Array]:
    """NLL of `model` [N], and of `model` with one block of `other` [blocks, N]."""
    taken = dict(zip(names(other), jax.tree.leaves(other)))
    with_other = lambda block: _changed(model, lambda name, _: taken[name], (block,))
    entering, last = passes.inputs(model)

    def layer(_, at):
        block, x, number = at
        return None, passes.rest(model, passes.layer(block, x), number + 1)

    _, layers = jax.lax.scan(layer, None, (other.blocks, entering, jnp.arange(model.cfg.layers)))
    embedding = with_other(0)
    first = passes.rest(embedding, passes.enter(embedding)[0], 0)
    head = passes.nll(with_other(model.cfg.layers + 1), last)
    return passes.nll(model, last), jnp.concatenate([first[None], layers, head[None]])
