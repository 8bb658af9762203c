"""Greedy generation, tokens per second: our sampler against `generate` of transformers, same weights, same prompts.

    python -m benchmarks generation [--rows 16] [--new 128] [--repeats 5] [--size gpt2]

Random weights of GPT-2's shape are written to a temporary folder and loaded by both programs (transformers with its KV
cache and left padding, PyTorch with as many threads as there are cores). Both run once to warm up, then take turns;
figures are medians over the repeats with their range, and the ratio is the median of the ratios of the pairs. The run
fails if the two disagree on a token where the choice was not a near tie.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from kd_jax import hf, sharding
from kd_jax.generate import Samples, Sampling, generate
from kd_jax.transformer import ModelConfig, Transformer

SIZES = {"gpt2": (768, 12, 12), "gpt2-medium": (1024, 24, 16), "gpt2-tiny": (128, 4, 4)}  # width, layers, heads


def config(size: str) -> ModelConfig:
    width, layers, heads = SIZES[size]
    return ModelConfig(
        vocab_size=50257,
        **dict(width=width, layers=layers, heads=heads, kv_heads=heads, head_dim=width // heads, mlp=4 * width),
        **dict(max_positions=1024, embed_dim=width, norm="layernorm", norm_bias=True, activation="gelu_tanh"),
        **dict(gated=False, positions="learned", tie_embeddings=True, qkv_bias=True, out_bias=True, mlp_bias=True),
    )


def ours(folder: Path, prompts: list[np.ndarray], new: int):
    """A function that generates, on the host, `new` tokens for every prompt."""
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    model = jax.device_put(hf.load_pretrained(folder), jax.devices()[0])
    lengths = np.array([len(p) for p in prompts])
    spec = Sampling(temperature=0.0, max_new_tokens=new)

    def run() -> Samples:
        keys = np.arange(len(prompts), dtype=np.uint32)
        return generate(
            *(model, np.concatenate(prompts), lengths, keys, spec),
            **dict(vocab=model.cfg.vocab_size, eos_id=-1, seed=0, mesh=mesh),
        )

    return run


def theirs(folder: Path, prompts: list[np.ndarray], new: int):
    """The same with PyTorch: tokens `[n, new]`."""
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    slots = max(map(len, prompts))
    tokens = torch.tensor(np.stack([np.pad(p, (slots - len(p), 0)) for p in prompts]))
    mask = torch.tensor(np.stack([np.arange(slots) >= slots - len(p) for p in prompts])).long()

    def run() -> np.ndarray:
        with torch.inference_mode():
            out = model.generate(
                tokens, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        return out[:, slots:].numpy()

    return run


def agree(mine: Samples, other: np.ndarray) -> int:
    """Rows of which every token is the same; raises where they part without a near tie."""
    differ = (mine.tokens != other).any(axis=1)
    if (differ & (mine.near_ties == 0)).any():
        raise SystemExit(f"rows {np.flatnonzero(differ & (mine.near_ties == 0))} differ without a near tie")
    return int((~differ).sum())


def seconds(run) -> tuple[float, object]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64, help="longest prompt; the shortest has half of it")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--size", choices=SIZES, default="gpt2")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    cfg = config(args.size)
    lengths = np.linspace(args.prompt // 2, args.prompt, args.rows).astype(int)
    prompts = [rng.integers(0, cfg.vocab_size, n).astype(np.int32) for n in lengths]
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(Transformer(cfg, jax.random.key(0)), folder, family="gpt2")
        programs = {
            "kd_jax": ours(Path(folder), prompts, args.new),
            "transformers": theirs(Path(folder), prompts, args.new),
        }
        first = {name: seconds(run) for name, run in programs.items()}
        times = {name: [] for name in programs}
        for _ in range(args.repeats):
            for name, run in programs.items():
                times[name].append(seconds(run)[0])
    same = agree(first["kd_jax"][1], first["transformers"][1])
    tokens = args.rows * args.new
    parameters = sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: Transformer(cfg, jax.random.key(0)))))
    print(
        f"{args.size} shape, {parameters / 1e6:.0f} M parameters, float32, {os.cpu_count()} cores; {args.rows} prompts "
        f"of {lengths[0]} to {lengths[-1]} tokens, {args.new} new tokens each; {same} of {args.rows} rows the same"
    )
    for name, taken in times.items():
        speed = tokens / np.array(taken)
        print(
            f"{name:<13} {np.median(speed):8.0f} tokens/s  ({speed.min():.0f} to {speed.max():.0f} in "
            f"{args.repeats} repeats; first call {first[name][0]:.1f} s)"
        )
    ratio = np.array(times["transformers"]) / np.array(times["kd_jax"])
    print(f"{'ratio':<13} {np.median(ratio):8.2f}            ({ratio.min():.2f} to {ratio.max():.2f})")


if __name__ == "__main__":
    main()
