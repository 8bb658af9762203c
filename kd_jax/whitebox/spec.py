"""Settings of the attacks that need the weights, and which block each parameter belongs to.

The blocks of a model, in order: "embedding" (token and position tables, projection in), its layers "0" to "L-1", and
"head" (final norm, projection out, output table). A tied table belongs to "embedding" and is counted once.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.errors import ConfigError
from kd_jax.score import PRECISIONS
from kd_jax.sharding import names
from kd_jax.transformer import ModelConfig, Transformer

FORMS = ("noise", "swap", "lens", "gradient")

STACKED = "blocks."  # names of leaves that hold all layers, [L, ...]
IN_EMBEDDING = ("embed", "positions", "project_in")
IN_HEAD = ("final_norm", "project_out", "lm_head")


@dataclasses.dataclass(frozen=True)
class Whitebox:
    """Settings of a white-box table; all of them are part of its fingerprint."""

    vocab: int
    row_length: int  # tokens per packed row
    batch_rows: int = 8  # packed rows a pass
    draws: int = 10  # of noise, the same for all examples, blocks and forms
    sigma: float = 0.01  # of the noise on every weight
    relative_sigma: float = 0.05  # of the noise on a block, over the root mean square of its weights
    seed: int = 0  # of the noise
    precision: str = "highest"  # of matrix products
    forms: tuple[str, ...] = FORMS

    def __post_init__(self) -> None:
        unknown = [form for form in self.forms if form not in FORMS]
        checks = [
            (not unknown and self.forms, f"forms must be some of {', '.join(FORMS)}, got {self.forms}"),
            (self.draws >= 1 and self.batch_rows >= 1, "draws and batch_rows must be at least 1"),
            (min(self.sigma, self.relative_sigma) >= 0, "sigma and relative_sigma must not be negative"),
            (self.precision in PRECISIONS, f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}"),
        ]
        for good, message in checks:
            if not good:
                raise ConfigError(f"whitebox: {message}")


def block_names(cfg: ModelConfig) -> tuple[str, ...]:
    """The names of a model's L + 2 blocks, in order."""
    return ("embedding", *map(str, range(cfg.layers)), "head")


def blocks_of(name: str, layers: int) -> np.ndarray:
    """Places in `block_names` of the tensors of one leaf: [L] for a stacked leaf, one a layer; else [1].

    name: as `kd_jax.sharding.names` has it, e.g. "blocks.attn.q" or "embed.weight". ValueError where no block has it.
    """
    if name.startswith(STACKED):
        return np.arange(1, layers + 1)
    top = name.split(".")[0]
    if top not in IN_EMBEDDING + IN_HEAD:
        raise ValueError(f"no block has the parameter {name}: add it to kd_jax/whitebox/spec.py")
    return np.array([0 if top in IN_EMBEDDING else layers + 1])


def block_rms(model: Transformer) -> jax.Array:
    """Root mean square of the weights of every block, float32 [L + 2]; 0 for a block without weights."""
    blocks = model.cfg.layers + 2
    squares, sizes = jnp.zeros(blocks), np.zeros(blocks)
    for name, leaf in zip(names(model), jax.tree.leaves(model)):
        place = blocks_of(name, model.cfg.layers)
        tensors = leaf.astype(jnp.float32).reshape(len(place), -1)
        squares = squares.at[place].add(jnp.sum(tensors * tensors, axis=1))
        sizes[place] += tensors.shape[1]
    return jnp.sqrt(squares / np.maximum(sizes, 1))


def example_means(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Mean over the tokens of each example, float64 [n, ...]; NaN for an example without any.

    counts [n] and values [counts.sum(), ...] as `kd_jax.score.run_step` returns them: tokens grouped by example.
    """
    starts = np.cumsum(counts) - counts
    means = np.full((len(counts), *values.shape[1:]), np.nan)
    some = counts > 0
    sums = np.add.reduceat(values.astype(np.float64), starts[some], axis=0) if some.any() else means[some]
    means[some] = sums / counts[some].reshape(-1, *(1,) * (values.ndim - 1))
    return means
