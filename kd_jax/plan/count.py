"""Counts of a traced program, before any compiler: floating point operations of its matrix products, large arrays.

A loop's body counts as often as it runs; loops whose number of turns depends on data run `unknown` times. Recomputed
products count again: this is what a chip executes. `model_flops` is what a model needs, the basis of an MFU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import jax
import numpy as np

from kd_jax.transformer import ModelConfig


def flops(jaxpr, unknown: int = 1) -> float:
    """2 x multiply-adds of all matrix products of a (closed) jaxpr, over all devices."""
    return sum(times * _products(eqn) for eqn, times in _equations(jaxpr, unknown, 1.0))


def arrays(jaxpr, shards: int, rows: tuple[int, ...]) -> list[tuple[float, str, str]]:
    """Arrays that a program makes: (bytes per chip, shape, operation), largest first.

    Which of them exist at the same time, and which are split how, only the compiler knows: an axis of one of the sizes
    `rows` (that of the batch's rows, or of its tokens) counts as split over `shards`.
    """
    found: dict[tuple[str, str], float] = {}
    for eqn, _ in _equations(jaxpr, 1, 1.0):
        for var in eqn.outvars:
            shape, dtype = getattr(var.aval, "shape", ()), getattr(var.aval, "dtype", None)
            if dtype is None or jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
                continue
            split = shards if set(shape) & set(rows) else 1
            size = math.prod(shape) * np.dtype(dtype).itemsize / split
            found[f"{np.dtype(dtype).name}[{','.join(map(str, shape))}]", eqn.primitive.name] = size
    return sorted(((size, *what) for what, size in found.items()), reverse=True)


def _products(eqn) -> float:
    if eqn.primitive.name != "dot_general":
        return 0.0
    (contracted, _), _ = eqn.params["dimension_numbers"]
    depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * depth


def _equations(jaxpr, unknown: int, times: float) -> Iterator[tuple[object, float]]:
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn, times
        factor = times
        if eqn.primitive.name == "scan":
            factor *= eqn.params["length"]
        elif eqn.primitive.name == "while":
            factor *= unknown
        elif eqn.primitive.name == "shard_map":  # written for one device
            mesh, manual = eqn.params["mesh"], eqn.params["newly_manual_axes"]
            factor *= math.prod(mesh.shape[axis] for axis in manual)
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                    yield from _equations(inner, unknown, factor)


# ---------------------------------------------------------------------------------------------------------- models


def parameters(cfg: ModelConfig) -> tuple[int, int]:
    """Weights that a token is multiplied with in the layers, and in the head."""
    attention = cfg.width * cfg.head_dim * (2 * cfg.heads + 2 * cfg.kv_heads)
    mlp = cfg.width * cfg.mlp * (3 if cfg.gated else 2)
    projections = 2 * cfg.width * cfg.embed_dim if cfg.embed_dim != cfg.width else 0
    return cfg.layers * (attention + mlp) + projections, cfg.vocab_size * cfg.embed_dim


def forward_flops(cfg: ModelConfig, tokens: float, scored: float, time: int, vocab: int) -> float:
    """Of one forward pass over `tokens` in rows of `time`, with the head on `scored` of them.

    2 per weight and token; attention 4 x time x width of the heads (the whole square: kernels here do not skip it).
    """
    layers, _ = parameters(cfg)
    attention = 4.0 * cfg.layers * cfg.heads * cfg.head_dim * time
    return tokens * (2.0 * layers + attention) + 2.0 * scored * vocab * cfg.embed_dim


def model_flops(
    student: ModelConfig,
    teacher: ModelConfig | None,
    *,
    tokens: float,
    scored: float,
    time: int,
    vocab: int,
    trained: float = 1.0,
) -> float:
    """Of one training step: the student forward and back (3 forward passes), the teacher forward; no recomputation.

    trained: share of the gradients by weights that are computed; 0 with adapters, whose own products are left out.
    """
    passes = 2.0 + trained
    found = passes * forward_flops(student, tokens, 0, time, vocab) + 3 * 2.0 * scored * vocab * student.embed_dim
    return found + (forward_flops(teacher, tokens, scored, time, vocab) if teacher else 0.0)
