"""The logit lens: what every layer would predict, read by the model's own final norm and head.

The state after l layers goes through what follows the last one (final norm, projection, output weights), so that the
last row is the model's own prediction and row 0 that of the embedding alone. Token positions, masks and packing are
those of the score tables. Per token and layer one number leaves the layer scan: neither states nor logits are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from kd_jax.data.encode import Encoded
from kd_jax.head import Stats, head_stats
from kd_jax.score import run_step
from kd_jax.transformer import Transformer
from kd_jax.whitebox.spec import Whitebox, example_means

NAMES = ("lens", "emergence")


def lens(
    model: Transformer, encoded: Encoded, indices: np.ndarray, spec: Whitebox, mesh: Mesh, *, bar: tqdm | None = None
) -> dict[str, np.ndarray]:
    """Log-probability of the target after every layer, and the layer from which it stays the first guess.

    Returns float64 arrays over the examples `indices` of `encoded`, in their order:
      `nll [n]`         mean NLL of the scored tokens, the last column of `lens` with its sign turned
      `lens [n, L+1]`   mean over the scored tokens of log p(target) read after l = 0..L layers; the last column is the
                        model's own mean log-probability
      `emergence [n]`   mean over the scored tokens of d / (L+1), where d is the least l such that the target is the
                        most probable id (of equal ones the lowest) after l layers and after all that follow; d = L+1
                        where the model itself does not predict it. In [0, 1]; smaller = emerges earlier
    """
    counts, fields = run_step(_compiled(spec.vocab, spec.precision, mesh), model, encoded, indices, spec, mesh, bar=bar)
    found = {name: example_means(counts, values) for name, values in fields.items() if name in NAMES}
    return found | {"nll": -found["lens"][:, -1]}


@functools.lru_cache(maxsize=8)
def _compiled(vocab: int, precision: str, mesh: Mesh) -> Callable:
    """`step(model, batch) -> {lens: [R, T, L+1], emergence: [R, T]}`; 0 where `loss_mask` is False."""
    stats = Stats(vocab)

    def step(model: Transformer, batch: dict) -> dict[str, jax.Array]:
        shape = batch["tokens"].shape
        targets, mask = batch["targets"].reshape(-1), batch["loss_mask"].reshape(-1)
        head = model.head()

        def tap(x):
            found = head_stats(model.leave(x), head, targets, mask, stats)
            return found["logp"], found["top1_id"] == targets

        with jax.default_matmul_precision(precision):
            inputs = (batch["tokens"], batch["segment_ids"], batch["positions"])
            _, (logp, first) = model.hidden(*inputs, dtype=jnp.float32, tap=tap)
        depth = _emergence(first) / len(first)
        return {"lens": logp.T.reshape(*shape, -1), "emergence": jnp.where(mask, depth, 0.0).reshape(shape)}

    return jax.jit(step, out_shardings=NamedSharding(mesh, P()))


def _emergence(first: jax.Array) -> jax.Array:
    """The least row from which on all rows of bool `[L+1, N]` are True, int32 `[N]`; L+1 where the last one is not."""
    stays = jnp.cumprod(first[::-1].astype(jnp.int32), axis=0)  # from the last row backwards
    return len(first) - jnp.sum(stays, axis=0)
