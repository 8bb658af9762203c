"""Per-example gradient norms: how much a single record would still move the weights.

A member's loss has been brought down by training, so its gradient is small: a smaller norm is more member-like
(arXiv:2402.17012; the published codes disagree in sign, a planted leak in the tests settles it).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from kd_jax import sharding
from kd_jax.data.batches import one_batch
from kd_jax.data.encode import Encoded
from kd_jax.head import Loss, head_loss
from kd_jax.transformer import Transformer
from kd_jax.whitebox.spec import Whitebox, blocks_of

MEMORY = 1 << 30  # bytes of gradients that a device holds at once
MOST_ROWS = 16  # examples a device works on at once; more are no faster
INPUTS = ("tokens", "targets", "segment_ids", "positions", "loss_mask")
NAMES = ("nll", "gradient_1", "gradient_2", "gradient_inf", "gradient_global", "gradient_block")


def gradients(
    model: Transformer, encoded: Encoded, indices: np.ndarray, spec: Whitebox, mesh: Mesh, *, bar: tqdm | None = None
) -> dict[str, np.ndarray]:
    """Norms of the gradient of each example's mean NLL over its scored tokens, without dropout.

    Returns float32 arrays over the examples `indices` of `encoded`, in their order:
      `nll [n]`          the loss itself
      `gradient_1, gradient_2, gradient_inf [n]`   mean over parameter tensors of the p-norm of the tensor's gradient;
                         every layer's tensor counts by itself, q, k and v apart, biases and norms too
      `gradient_global [n]`   2-norm of the gradient by all parameters
      `gradient_block [n, blocks]`   2-norm of the gradient by the parameters of a block, in the order of `block_names`;
                         the squares add up to that of `gradient_global`. Tied embeddings are one tensor, in "embedding"
    """
    step, rows = _compiled(spec.vocab, spec.precision, mesh), micro_batch(model, mesh)
    parts, order = [], []
    for places, length in buckets(encoded.lengths[indices], spec.row_length, rows):
        batch, _ = one_batch(encoded.take(indices[places]), row_length=length, packed=False, multiple=rows)
        found = step(model, sharding.place_batch({k: batch[k] for k in INPUTS}, mesh, whole=True))
        parts.append({name: np.asarray(values)[: len(places)] for name, values in found.items()})
        order.append(places)
        if bar is not None:
            bar.update(len(places))
    back = np.argsort(np.concatenate(order))
    return {name: np.concatenate([part[name] for part in parts])[back] for name in NAMES}


def micro_batch(model: Transformer, mesh: Mesh) -> int:
    """Examples whose gradients are held at once: a multiple of the devices that rows are split over."""
    size = sum(x.size * 4 for x in jax.tree.leaves(model))
    return mesh.shape["data"] * mesh.shape["fsdp"] * max(1, min(MOST_ROWS, MEMORY // size))


def buckets(lengths: np.ndarray, longest: int, rows: int) -> Iterator[tuple[np.ndarray, int]]:
    """(places, length): at most `rows` examples at a time, all of which fit into `length` tokens.

    Lengths are the longest, its half and its quarter: three programs, so that one long example does not pad all.
    """
    sizes = np.array([-(-longest // part) for part in (4, 2, 1)])
    bucket = np.searchsorted(sizes, lengths)
    for b, size in enumerate(sizes):
        places = np.flatnonzero(bucket == b)
        for start in range(0, len(places), rows):
            yield places[start : start + rows], int(size)


@functools.lru_cache(maxsize=8)
def _compiled(vocab: int, precision: str, mesh: Mesh) -> Callable:
    """`step(model, batch [R, T]) -> {name: [R] or [R, blocks]}`."""
    loss_spec = Loss(vocab)

    def loss(model: Transformer, example: dict) -> jax.Array:
        row = {name: x[None] for name, x in example.items()}
        h = model.hidden(row["tokens"], row["segment_ids"], row["positions"], dtype=jnp.float32)[0]
        weight = example["loss_mask"] / jnp.maximum(jnp.sum(example["loss_mask"]), 1)
        return head_loss(h, model.head(), None, None, example["targets"], {"ce": weight}, loss_spec)[0]

    def one(model: Transformer, example: dict) -> dict[str, jax.Array]:
        nll, gradient = jax.value_and_grad(loss)(model, example)
        return {"nll": nll} | norms(gradient)

    def step(model: Transformer, batch: dict) -> dict[str, jax.Array]:
        # An example lies on one device as a whole, so that the head must not split its tokens over the mesh.
        with jax.default_matmul_precision(precision), jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
            return jax.vmap(functools.partial(one, model))(batch)

    return jax.jit(step, out_shardings=NamedSharding(mesh, P()))


def norms(gradient: Transformer) -> dict[str, jax.Array]:
    """The norms of one gradient, a tree of the model's form, under the names of `gradients`."""
    layers = gradient.cfg.layers
    block, squares, norm1, norm_inf = [], [], [], []
    for name, leaf in zip(sharding.names(gradient), jax.tree.leaves(gradient)):
        place = blocks_of(name, layers)
        tensors = leaf.reshape(len(place), -1)  # one row per parameter tensor
        block.append(place)
        squares.append(jnp.sum(tensors * tensors, axis=1))
        norm1.append(jnp.sum(jnp.abs(tensors), axis=1))
        norm_inf.append(jnp.max(jnp.abs(tensors), axis=1))
    squares = jnp.concatenate(squares)
    of_blocks = jnp.zeros(layers + 2).at[np.concatenate(block)].add(squares)
    return {
        "gradient_1": jnp.mean(jnp.concatenate(norm1)),
        "gradient_2": jnp.mean(jnp.sqrt(squares)),
        "gradient_inf": jnp.mean(jnp.concatenate(norm_inf)),
        "gradient_global": jnp.sqrt(jnp.sum(squares)),
        "gradient_block": jnp.sqrt(of_blocks),
    }
