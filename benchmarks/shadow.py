"""Shadow models per minute: one after another, under `lax.map`, under `vmap`, and in processes of their own.

    python -m benchmarks shadow [--models 6] [--steps 16] [--repeats 3] [--width 96]

Students of a `shadow` size (`configs/shadow.py`), distilled from teachers of that size on invented token ids: the same
starts, records and order for all ways. Each way compiles once, then they take turns; figures are medians over the
repeats with their range. A process of its own starts Python, compiles, and trains one model of the same steps. The run
fails if the models of the ways differ by more than float sums explain, or if another way than the one that
`shadow.way=auto` takes here was faster by more than NOISE.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from kd_jax import sharding
from kd_jax.data.encode import PROMPT, RESPONSE, Encoded
from kd_jax.distill.objective import PRESETS
from kd_jax.shadow import chains
from kd_jax.train import Recipe
from kd_jax.transformer import ModelConfig, Transformer

VOCAB, ROW = 2048, 256
NOISE = 1.15  # two ways whose medians are closer than this are equally fast
SAME = 1e-4  # largest deviation of a parameter, over the largest parameter: Adam enlarges the last bits of a gradient


def model_config(width: int, layers: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCAB,
        **dict(width=width, layers=layers, heads=4, kv_heads=4, head_dim=width // 4, mlp=4 * width),
        **dict(max_positions=ROW, embed_dim=width, norm="layernorm", norm_bias=True, activation="gelu_tanh"),
        **dict(gated=False, positions="learned", tie_embeddings=True, qkv_bias=True, out_bias=True, mlp_bias=True),
    )


def invented(n: int, seed: int) -> Encoded:
    """Records of 40 to 120 tokens, the last half of each a response."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(40, 120, n)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    segment = np.where(within < np.repeat(lengths // 2, lengths), PROMPT, RESPONSE).astype(np.int8)
    ids, none = np.array([f"r{i}" for i in range(n)], object), np.zeros(n, np.int32)
    tokens = rng.integers(0, VOCAB, offsets[-1]).astype(np.int32)
    return Encoded(ids, ids, ids, tokens, offsets, segment, none, none, {})


def make(models: int, steps: int, width: int, mesh, batch_rows: int = 8):
    """What `chains.train` takes, for each of `models`."""
    recipe = Recipe(steps=steps, batch_rows=batch_rows, lr=1e-3, warmup_steps=2)
    spec = chains.Training(recipe, PRESETS["kd"], steps, VOCAB, ROW, True)
    draw = lambda layers, i: Transformer(model_config(width, layers), jax.random.key(i))
    place = lambda m: jax.device_put(m, sharding.shardings(m, mesh))
    rows = [spec.rows(invented(400, i), i) for i in range(models)]
    keys = [jax.random.key(i) for i in range(models)]
    return (
        [place(draw(2, i)) for i in range(models)],
        [place(draw(2, 100 + i)) for i in range(models)],
        rows,
        keys,
        spec,
    )


def run(way: str, inputs, mesh) -> tuple[list[Transformer], float]:
    """The trained models, and the seconds it took."""
    start = time.perf_counter()
    trained, _ = chains.train(*inputs, way, mesh)
    jax.block_until_ready(trained)
    return trained, time.perf_counter() - start


def worst(a: list[Transformer], b: list[Transformer]) -> float:
    """Largest deviation of a parameter, over the largest parameter."""
    pairs = list(zip(jax.tree.leaves(jax.device_get(a)), jax.tree.leaves(jax.device_get(b)), strict=True))
    return float(max(np.abs(x - y).max() for x, y in pairs) / max(np.abs(x).max() for x, _ in pairs))


def alone(args) -> float:
    """Seconds of a process that trains one model."""
    start = time.perf_counter()
    command = ["-m", "benchmarks", "shadow", "--one", "--steps", str(args.steps), "--width", str(args.width)]
    subprocess.run([sys.executable, *command], check=True, cwd=Path(__file__).parent.parent)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=6)
    parser.add_argument("--steps", type=int, default=16, help="optimiser steps of each model")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        if args.one:
            run("loop", make(1, args.steps, args.width, mesh), mesh)
            return
        inputs = make(args.models, args.steps, args.width, mesh)
        first = {way: run(way, inputs, mesh) for way in chains.WAYS}
        times = {way: [] for way in chains.WAYS}
        for _ in range(args.repeats):
            for way in chains.WAYS:
                times[way].append(run(way, inputs, mesh)[1])
    apart = [alone(args) for _ in range(2)]
    backend, auto = jax.default_backend(), chains.resolve("auto")
    student, teacher = (chains.words(models[0].cfg) for models in inputs[:2])
    print(
        f"{args.models} students, {student}, taught by as many of {teacher}; {args.steps} steps of 8 rows x "
        f"{ROW} tokens, vocabulary {VOCAB}; {jax.device_count()} x {backend}, {os.cpu_count()} cores"
    )
    medians = {way: float(np.median(taken)) for way, taken in times.items()}
    for way, taken in times.items():
        speed = 60 * args.models / np.array(taken)
        print(
            f"{way:<10} {60 * args.models / medians[way]:8.1f} models/minute  ({speed.min():.1f} to {speed.max():.1f} "
            f"in {args.repeats} repeats; first call, compiling, {first[way][1]:.1f} s)"
        )
    print(f"{'processes':<10} {60 / np.median(apart):8.1f} models/minute, each compiling for itself, one after another")
    deviations = {way: worst(first["loop"][0], first[way][0]) for way in ("map", "vmap")}
    print("largest parameter deviation from loop: " + ", ".join(f"{way} {d:.2g}" for way, d in deviations.items()))
    fastest = min(medians, key=medians.get)
    print(f"fastest: {fastest}; auto takes {auto} on {backend} (a tie within {NOISE - 1:.0%} counts as the fastest)")
    if max(deviations.values()) > SAME:
        raise SystemExit(f"the ways do not give the same models: {deviations}, allowed {SAME:g}")
    if medians[auto] > NOISE * medians[fastest]:
        raise SystemExit(f"auto takes {auto}, but {fastest} is {medians[auto] / medians[fastest]:.2f} times as fast")


if __name__ == "__main__":
    main()
