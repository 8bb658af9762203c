"""Encoded examples and tiny models for tests that look into weights: no tokenizer, no files."""

import functools

import jax
import numpy as np

from kd_jax.data.encode import EOS, PROMPT, RESPONSE, Encoded
from kd_jax.transformer import ModelConfig, Transformer

VOCAB = 60  # ids; the models have a few rows more
PADDED = 64
SMALL = dict(vocab_size=PADDED, layers=3, head_dim=8, mlp=32, max_positions=64)
TIED = ModelConfig(  # as GPT-2
    **SMALL,
    width=16,
    heads=2,
    kv_heads=2,
    embed_dim=16,
    norm="layernorm",
    norm_bias=True,
    activation="gelu_tanh",
    gated=False,
    positions="learned",
    tie_embeddings=True,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
)
POST = ModelConfig(  # as OPT-350M: norms after the sum, projections in and out, none at the end
    **SMALL,
    width=16,
    heads=2,
    kv_heads=2,
    embed_dim=8,
    norm="layernorm",
    norm_bias=True,
    norm_placement="post",
    final_norm=False,
    activation="relu",
    gated=False,
    positions="learned",
    position_offset=2,
    tie_embeddings=True,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
)
UNTIED = ModelConfig(**SMALL, width=16, heads=2, kv_heads=1, embed_dim=16, rotary_dim=8)  # as LLaMA


def encoded(n: int = 12, lengths: tuple[int, int] = (6, 15), prompt: int = 3, seed: int = 0) -> Encoded:
    """n examples of random ids: `prompt` tokens that are not scored, a response, an EOS; lengths[0] <= tokens of each
    < lengths[1]."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(*lengths, n)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    segment = np.full(offsets[-1], RESPONSE, np.int8)
    segment[(offsets[:-1, None] + np.arange(prompt)).ravel()] = PROMPT
    segment[offsets[1:] - 1] = EOS
    ids = np.array([f"e{seed}-{i}" for i in range(n)], object)
    tokens = rng.integers(0, VOCAB, offsets[-1]).astype(np.int32)
    return Encoded(ids, ids, np.full(n, "t", object), tokens, offsets, segment, sizes, sizes, {})


@functools.cache
def model(cfg: ModelConfig, seed: int = 0, size: float = 0.3) -> Transformer:
    """Random weights of that size, far from uniform as a trained model is; biases and norms that are not 0 and 1."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(functools.partial(Transformer, cfg), jax.random.key(0))
    return jax.tree.map(lambda x: jax.numpy.asarray(size * rng.normal(size=x.shape), "float32"), shapes)
