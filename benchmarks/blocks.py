"""Noise on one block of weights at a time: one program with kept prefixes against a loop over perturbed models.

    python -m benchmarks blocks [--layers 12] [--width 128] [--examples 16] [--tokens 128] [--draws 1] [--repeats 5]

Three programs compute the same table (MoPe with both signs, noise on every block with an absolute and a relative
sigma) of a random model of GPT-2's form (without biases) with the same noise, and take turns on this machine:

* ours: `kd_jax.whitebox.blocks.noise`, which runs only the layers from the changed one on;
* copies: a perturbed copy of the model in memory for every draw and block, and a whole compiled pass of it;
* checkpoints: the same, every copy written as safetensors and loaded again, as published code does it.

Layer passes are counted while they run, times are medians over the repeats, ratios medians of the pairs; core seconds
stand beside wall time, since other work on the machine disturbs them less. The run fails if the results differ by more
than rounding, or, at 12 layers, if ours is not 1.5 times as fast as the copies by wall time.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import numpy as safetensors

from kd_jax import sharding
from kd_jax.data.encode import PROMPT, RESPONSE, Encoded
from kd_jax.head import Loss, head_loss
from kd_jax.score import run_step
from kd_jax.transformer import ModelConfig, Transformer
from kd_jax.whitebox import blocks
from kd_jax.whitebox.spec import Whitebox, block_names, block_rms, blocks_of, example_means

REQUIRED = 1.5  # times as fast as the copies, at 12 layers
ROUNDING = 1e-3  # of the largest rise in the column that has the smallest
VOCAB = 2048


def config(layers: int, width: int, tokens: int) -> ModelConfig:
    heads = max(1, width // 64)
    return ModelConfig(
        vocab_size=VOCAB,
        **dict(width=width, layers=layers, heads=heads, kv_heads=heads, head_dim=width // heads, mlp=4 * width),
        **dict(max_positions=tokens, embed_dim=width, norm="layernorm", norm_bias=True, activation="gelu_tanh"),
        **dict(gated=False, positions="learned", tie_embeddings=True),
    )


def texts(examples: int, tokens: int) -> Encoded:
    """Invented examples of one length, half of each a prompt."""
    rng = np.random.default_rng(0)
    ids = np.array([f"text{i:05d}" for i in range(examples)])
    segment = np.tile(np.repeat(np.array([PROMPT, RESPONSE], np.int8), [tokens // 2, tokens - tokens // 2]), examples)
    ends = tokens * np.arange(examples + 1)
    words = rng.integers(0, VOCAB, ends[-1]).astype(np.int32)
    nothing = np.zeros(examples, np.int32)
    return Encoded(ids, ids, np.full(examples, "-"), words, ends, segment, nothing, nothing, {})


# -------------------------------------------------------------------------------------------------- the plain loop


@jax.jit
def eps_of(model: Transformer, key: jax.Array) -> dict[str, jax.Array]:
    """The noise of one draw on every parameter, as ours draws it."""
    shapes = {name: w.shape for name, w in zip(sharding.names(model), jax.tree.leaves(model))}
    found = blocks.draw_noise(key, {n: shape for n, shape in shapes.items() if not n.startswith("blocks.")})
    stacked = {n: shape[1:] for n, shape in shapes.items() if n.startswith("blocks.")}
    each = jax.lax.map(lambda layer: blocks.draw_noise(key, stacked, layer), jnp.arange(model.cfg.layers))
    return found | each


@jax.jit
def perturbed(model: Transformer, eps: dict[str, jax.Array], scales: jax.Array) -> Transformer:
    """A copy of the model with noise of `scales [blocks]` times eps."""
    leaves = []
    for name, w in zip(sharding.names(model), jax.tree.leaves(model)):
        scale = scales[blocks_of(name, model.cfg.layers)]
        stacked = name.startswith("blocks.")
        leaves.append(w + (scale.reshape(-1, *(1,) * (w.ndim - 1)) if stacked else scale[0]) * eps[name])
    return jax.tree.unflatten(jax.tree.structure(model), leaves)


@jax.jit
def forward(model: Transformer, batch: dict) -> dict[str, jax.Array]:
    with jax.default_matmul_precision("highest"):
        h = model.hidden(batch["tokens"], batch["segment_ids"], batch["positions"])
        weights = {"ce": batch["loss_mask"].reshape(-1).astype(jnp.float32)}
        targets, flat = batch["targets"].reshape(-1), h.reshape(-1, h.shape[-1])
        values = head_loss(flat, model.head(), None, None, targets, weights, Loss(VOCAB))[1]["ce"]
    return {"nll": values.reshape(batch["tokens"].shape)}


def loop(model: Transformer, encoded: Encoded, spec: Whitebox, mesh: Mesh, through=lambda copy: copy) -> dict:
    """The columns of `blocks.noise`, a whole pass for every perturbed copy; `through` is what happens to a copy."""

    def nll(model):
        return example_means(*_tokens(run_step(forward, model, encoded, np.arange(len(encoded)), spec, mesh)))

    plain, each = nll(model), np.eye(len(block_names(model.cfg)), dtype=np.float32)
    absolute, relative = spec.sigma * each, spec.relative_sigma * np.asarray(block_rms(model))[:, None] * each
    total = dict.fromkeys(blocks.NOISE[1:], 0.0)
    for draw in range(spec.draws):
        eps = eps_of(model, jax.random.fold_in(jax.random.key(spec.seed), draw))
        rise = lambda scales, eps=eps: nll(through(perturbed(model, eps, scales))) - plain
        plus, minus = rise(absolute.sum(0)), rise(-absolute.sum(0))
        total["mope"] += plus / spec.draws
        total["mope_antithetic"] += (plus + minus) / 2 / spec.draws
        for name, rows in (("noise_absolute", absolute), ("noise_relative", relative)):
            total[name] += np.stack([rise(row) for row in rows], axis=1) / spec.draws
    return {"nll": plain} | total


def _tokens(scored: tuple[np.ndarray, dict]) -> tuple[np.ndarray, np.ndarray]:
    return scored[0], scored[1]["nll"]


def through_file(path: Path, copy: Transformer) -> Transformer:
    """`copy`, written and read again."""
    names = sharding.names(copy)
    safetensors.save_file({n: np.asarray(w) for n, w in zip(names, jax.tree.leaves(copy))}, path)
    read = safetensors.load_file(path)
    return jax.device_put(jax.tree.unflatten(jax.tree.structure(copy), [read[n] for n in names]))


# ------------------------------------------------------------------------------------------------- what it costs


def count_passes(run) -> int:
    """Layer passes that `run()` makes, counted by a callback in the running program (without noise)."""
    calls, apply_block = [], blocks.apply_block
    silence = lambda key, shapes, layer=None: {name: jnp.zeros(shape) for name, shape in shapes.items()}

    def counted(*args):
        jax.debug.callback(lambda: calls.append(1))
        return apply_block(*args)

    blocks._noise_step.cache_clear()
    with mock.patch.multiple(blocks, apply_block=counted, draw_noise=silence):
        run()
        jax.effects_barrier()
    blocks._noise_step.cache_clear()
    return len(calls)


def measure(layers: int, width: int, examples: int, tokens: int, draws: int, repeats: int) -> float:
    """Print passes and times; returns how many times as fast as the loop over copies ours is."""
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    model = jax.device_put(Transformer(config(layers, width, tokens), jax.random.key(0)))
    rows = min(examples, 16)  # the noise is drawn once a batch
    spec = Whitebox(VOCAB, tokens, batch_rows=rows, draws=draws, sigma=0.01, relative_sigma=0.05, forms=("noise",))
    encoded, each = texts(examples, tokens), layers + 2
    size = sum(w.size for w in jax.tree.leaves(model)) / 1e6
    print(f"{layers} layers x {width}, {VOCAB} ids, {size:.1f} M parameters; {examples} examples of {tokens} tokens,")
    print(
        f"half of them scored, {draws} draw(s), {each} blocks, two forms and MoPe; {jax.default_backend()}", flush=True
    )
    ours = lambda encoded=encoded, spec=spec: blocks.noise(model, encoded, np.arange(len(encoded)), spec, mesh)

    counted = count_passes(functools.partial(ours, texts(1, tokens), Whitebox(VOCAB, tokens, 1, draws=1))) - layers
    suffixes = (counted - 2 * layers) // 2 - layers  # without MoPe, of one form, without the embedding
    print(f"layer passes of a draw, counted: {counted} (a loop over copies: {layers * (2 + 2 * each)}); noise on each")
    print(f"of the {layers} layers, one form: {suffixes} instead of {layers**2}, {layers**2 / suffixes:.2f}x fewer")

    with tempfile.TemporaryDirectory() as folder:
        through = functools.partial(through_file, Path(folder) / "model.safetensors")
        ways = {
            "ours": ours,
            "copies": lambda: loop(model, encoded, spec, mesh),
            "checkpoints": lambda: loop(model, encoded, spec, mesh, through),
        }
        found = {name: way() for name, way in ways.items()}  # compiles
        worst = max(np.abs(found["ours"][k] - found[way][k]).max() for way in ways for k in blocks.NOISE)
        rise = min(np.abs(found["ours"][k]).max() for k in blocks.NOISE)
        print(f"largest deviation of the three: {worst:.1e} nats per token, of rises up to {rise:.1e}", flush=True)
        clocks = {"wall": time.perf_counter, "core": time.process_time}
        taken = {(name, clock): [] for name in ways for clock in clocks}
        for _ in range(repeats):
            for name, way in ways.items():
                begin = {clock: read() for clock, read in clocks.items()}
                way()
                for clock, read in clocks.items():
                    taken[name, clock].append(read() - begin[clock])
    ratio = {key: np.median(np.divide(times, taken["ours", key[1]])) for key, times in taken.items()}
    for name in ways:
        wall, core = taken[name, "wall"], taken[name, "core"]
        line = (
            f"{name:12} {np.median(wall):6.2f} s ({min(wall):.2f} to {max(wall):.2f}), {ratio[name, 'wall']:.2f}x ours"
        )
        print(f"{line}; {np.median(core):6.2f} core seconds, {ratio[name, 'core']:.2f}x ours", flush=True)
    if worst > ROUNDING * rise:
        raise SystemExit("the results differ by more than rounding")
    return float(ratio["copies", "wall"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks blocks", description=__doc__.split("\n")[0])
    for name, value in dict(layers=12, width=128, examples=16, tokens=128, draws=1, repeats=5).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    ratio = measure(**vars(given))
    if given.layers == 12 and ratio < REQUIRED:
        raise SystemExit(f"{ratio:.2f}x is less than the {REQUIRED}x that is required at 12 layers")


if __name__ == "__main__":
    main()
