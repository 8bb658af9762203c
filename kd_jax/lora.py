"""Low-rank adapters (LoRA, arXiv:2106.09685): a weight W [in, out] acts as W + alpha/rank A B, and only A and B train.

An adapted weight takes the place of the plain one in the model's tree, so that the forward pass, generation, scoring,
sharding and checkpoints meet adapters without knowing them. `merge` gives the plain model back.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from kd_jax.errors import ConfigError
from kd_jax.sharding import names

WHERE = {"q": "attn", "k": "attn", "v": "attn", "o": "attn", "up": "mlp", "gate": "mlp", "down": "mlp"}

Model = TypeVar("Model", bound=nnx.Module)  # a Transformer; its module imports this one


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which weights get an adapter, and what kind. Hashable, static under `jax.jit`."""

    rank: int = 0  # 0 = no adapters: all weights train
    alpha: float = 64.0  # the adapter's output is multiplied by alpha / rank
    dropout: float = 0.0  # share of the adapter's inputs that are dropped in training
    targets: tuple[str, ...] = ("q", "v")  # any of q k v o up gate down

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ConfigError(f"lora_rank must be 0 (no adapters) or positive, got {self.rank}")
        if self.alpha <= 0:
            raise ConfigError(f"lora_alpha must be positive, got {self.alpha}")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"lora_dropout must lie in [0, 1), got {self.dropout}")
        unknown = [target for target in self.targets if target not in WHERE]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise ConfigError(f"lora_targets must be some of {', '.join(WHERE)}, each once, got {self.targets}")


class Adapted(nnx.Module):
    """A stacked weight [L, in, out] with its adapter, `lora_a` [L, in, r] and `lora_b` [L, r, out].

    `key` [L] is there only in a training pass with dropout. `jax.lax.scan` hands out a layer of all four at a time.
    """

    def __init__(
        self,
        weight: nnx.Param,
        lora_a: nnx.Param,
        lora_b: nnx.Param,
        scaling: float,
        dropout: float,
        key: jax.Array | None = None,
    ):
        self.weight, self.lora_a, self.lora_b = weight, lora_a, lora_b
        self.scaling, self.dropout = scaling, dropout
        self.key = nnx.data(key)  # said out loud, since nnx takes a traced key for a static attribute

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., in] through the weight and the adapter of one layer, [..., out]."""
        kept = x
        if self.key is not None:
            keep = jax.random.bernoulli(self.key, 1.0 - self.dropout, x.shape)
            kept = jnp.where(keep, x / (1.0 - self.dropout), 0)
        low = kept @ self.lora_a.astype(x.dtype) * self.scaling
        return x @ self.weight.astype(x.dtype) + low @ self.lora_b.astype(x.dtype)


def attach(model: Model, spec: Lora, key: jax.Array) -> Model:
    """`model` with adapters, float32, that do not change its function yet: B is 0.

    A is uniform within 1/sqrt(in), as peft draws it (`peft/tuners/lora/layer.py`: Kaiming with a = sqrt(5)). A
    target's adapter does not depend on which others there are. The arrays of `model` are shared, not copied.
    Raises ConfigError where the model has no such weight (GPT-2 has no gate), ValueError where it has adapters.
    """
    if not spec.rank:
        return model
    model = jax.tree.map(lambda x: x, model)  # new modules around the same arrays
    for number, target in enumerate(WHERE):
        if target not in spec.targets:
            continue
        module = getattr(model.blocks, WHERE[target])
        weight = getattr(module, target)
        if weight is None:
            raise ConfigError(f"lora_targets: this model has no {target!r} weight; leave it out of {spec.targets}")
        if isinstance(weight, Adapted):
            raise ValueError(f"the model has an adapter on {target!r} already: merge it first")
        layers, size_in, size_out = weight.shape
        bound = size_in**-0.5
        a = jax.random.uniform(
            jax.random.fold_in(key, number), (layers, size_in, spec.rank), minval=-bound, maxval=bound
        )
        b = jnp.zeros((layers, spec.rank, size_out))
        adapted = Adapted(weight, nnx.Param(a), nnx.Param(b), spec.alpha / spec.rank, spec.dropout)
        setattr(module, target, adapted)
    return model


def split(model: Model) -> tuple[Model, Model]:
    """(trainable, frozen): two trees of the model's form, each with None where the other one has the array.

    The adapters are trainable; in a model without any, all is. `jax.grad`, optax, the sharding table and checkpoints
    take such a tree as it is, and see the arrays that are in it, under the names that they have in the model.
    """
    leaves, treedef = jax.tree.flatten(model)
    trains = [name.endswith((".lora_a", ".lora_b")) for name in names(model)]
    if not any(trains):
        trains = [True] * len(leaves)
    trainable = jax.tree.unflatten(treedef, [x if t else None for x, t in zip(leaves, trains)])
    frozen = jax.tree.unflatten(treedef, [None if t else x for x, t in zip(leaves, trains)])
    return trainable, frozen


def join(trainable: Model, frozen: Model) -> Model:
    """The model that `split` took apart."""
    return jax.tree.map(lambda t, f: f if t is None else t, trainable, frozen, is_leaf=lambda x: x is None)


def merge(model: Model) -> Model:
    """The plain model of the same function: W + alpha/rank A B, added in float32, in every adapted weight.

    Its tree is that of a model which never had adapters, so export, checkpoints and scores take it.
    """
    return jax.tree.map(lambda node: _merged(node) if _is_adapted(node) else node, model, is_leaf=_is_adapted)


def with_dropout(blocks: Model, key: jax.Array) -> Model:
    """`blocks` whose adapters drop inputs, with a key of its own for every adapter and layer."""
    nodes, treedef = jax.tree.flatten(blocks, is_leaf=_is_adapted)
    for i, node in enumerate(nodes):
        if _is_adapted(node) and node.dropout:
            keys = jax.random.split(jax.random.fold_in(key, i), node.weight.shape[0])
            nodes[i] = Adapted(node.weight, node.lora_a, node.lora_b, node.scaling, node.dropout, keys)
    return jax.tree.unflatten(treedef, nodes)


def _is_adapted(node) -> bool:
    return isinstance(node, Adapted)


def _merged(adapted: Adapted) -> nnx.Param:
    weight = adapted.weight[...]
    change = jnp.matmul(adapted.lora_a[...], adapted.lora_b[...], precision="highest") * adapted.scaling
    return nnx.Param((weight.astype(jnp.float32) + change).astype(weight.dtype))
