"""A decoder-only transformer made of switches: GPT-2, OPT, LLaMA, GPT-NeoX, OLMo-2 and Qwen3 are settings of it.

The model is a plain pytree of stacked layers, used under `jax.jit`, `jax.value_and_grad` and `jax.lax.scan`.
Families, names and files of other programs are the business of `kd_jax/hf.py`.

Legend: B batch, T time, N heads, K key/value heads, G heads per key/value head, H head size, D width, F mlp width,
        V vocabulary, E embedding width (= D except in OPT-350M), L layers, P rows of the position table.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kd_jax.head import Head
from kd_jax.lora import Adapted, with_dropout

Segment = list[tuple[jax.Array, jax.Array]]  # keys and values [B, K, S, H] of S slots, one pair per layer

ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a transformer and its feature switches; hashable, static under `jax.jit`."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    max_positions: int  # longest position that was trained on; excludes `position_offset`
    embed_dim: int  # E; where it differs from `width`, projections lead in and out (OPT-350M)
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    norm_eps: float = 1e-5
    norm_bias: bool = False
    norm_placement: Literal["pre", "post", "output"] = (
        "pre"  # of a sublayer's input, of the sum after it, of its output
    )
    final_norm: bool = True
    qk_norm: Literal["head", "full"] | None = None  # each head apart (Qwen3), or the whole projection (OLMo-2)
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = "silu"
    gated: bool = True
    positions: Literal["learned", "rope"] = "rope"
    position_offset: int = 0  # rows of the position table before position 0 (OPT: 2)
    rope_theta: float = 10_000.0
    rotary_dim: int = 0  # leading dimensions of a head that rotate
    parallel_residual: bool = False  # attention and MLP both read the block's input (GPT-NeoX)
    tie_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(f"rotary_dim ({self.rotary_dim}) must be even and at most head_dim ({self.head_dim})")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        if self.parallel_residual and self.norm_placement != "pre":
            raise ValueError("parallel_residual needs norm_placement='pre'")


class Init:
    """Draws the parameters of a new model, one key each; `layers` puts the stacked axis [L] in front."""

    def __init__(self, key: jax.Array, dtype: DTypeLike, layers: int | None = None):
        self.key, self.dtype, self.lead = key, dtype, () if layers is None else (layers,)

    def normal(self, *shape: int, scale: float = 1.0) -> nnx.Param:
        self.key, key = jax.random.split(self.key)
        return nnx.Param(0.02 * scale * jax.random.normal(key, (*self.lead, *shape), self.dtype))

    def zeros(self, size: int, wanted: bool) -> nnx.Param | None:
        return nnx.Param(jnp.zeros((*self.lead, size), self.dtype)) if wanted else None

    def ones(self, size: int) -> nnx.Param:
        return nnx.Param(jnp.ones((*self.lead, size), self.dtype))


class Table(nnx.Module):
    """Rows looked up by number: `weight` [rows, columns]."""

    def __init__(self, init: Init, rows: int, columns: int):
        self.weight = init.normal(rows, columns)


class Norm(nnx.Module):
    """`scale` [L, size], and `bias` or None."""

    def __init__(self, init: Init, size: int, bias: bool):
        self.scale = init.ones(size)
        self.bias = init.zeros(size, bias)


class Attention(nnx.Module):
    """`q` [L, D, N*H], `k` and `v` [L, D, K*H], `o` [L, N*H, D], biases, `q_norm` and `k_norm`; None where absent."""

    def __init__(self, cfg: ModelConfig, init: Init, out_scale: float):
        q_size, kv_size = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
        self.q = init.normal(cfg.width, q_size)
        self.k = init.normal(cfg.width, kv_size)
        self.v = init.normal(cfg.width, kv_size)
        self.o = init.normal(q_size, cfg.width, scale=out_scale)
        self.q_bias = init.zeros(q_size, cfg.qkv_bias)
        self.k_bias = init.zeros(kv_size, cfg.qkv_bias)
        self.v_bias = init.zeros(kv_size, cfg.qkv_bias)
        self.o_bias = init.zeros(cfg.width, cfg.out_bias)
        sizes = {None: None, "head": (cfg.head_dim, cfg.head_dim), "full": (q_size, kv_size)}[cfg.qk_norm]
        self.q_norm, self.k_norm = (init.ones(sizes[0]), init.ones(sizes[1])) if sizes else (None, None)


class Mlp(nnx.Module):
    """`up` and `gate` [L, D, F], `down` [L, F, D] and their biases; None where absent."""

    def __init__(self, cfg: ModelConfig, init: Init, out_scale: float):
        self.up = init.normal(cfg.width, cfg.mlp)
        self.gate = init.normal(cfg.width, cfg.mlp) if cfg.gated else None
        self.down = init.normal(cfg.mlp, cfg.width, scale=out_scale)
        self.up_bias = init.zeros(cfg.mlp, cfg.mlp_bias)
        self.gate_bias = init.zeros(cfg.mlp, cfg.mlp_bias and cfg.gated)
        self.down_bias = init.zeros(cfg.width, cfg.mlp_bias)


class Blocks(nnx.Module):
    """All layers, stacked in front of every array; `jax.lax.scan` hands out one at a time."""

    def __init__(self, cfg: ModelConfig, init: Init):
        out_scale = (2 * cfg.layers) ** -0.5  # keeps the variance of the residual sum at that of one sublayer
        self.norm1 = Norm(init, cfg.width, cfg.norm_bias)
        self.attn = Attention(cfg, init, out_scale)
        self.norm2 = Norm(init, cfg.width, cfg.norm_bias)
        self.mlp = Mlp(cfg, init, out_scale)


class Transformer(nnx.Module):
    """Parameters of a model and its forward pass up to the head.

    `Transformer(cfg, key, dtype)` draws a random one: normal with deviation 0.02 (what is added to the residual
    stream over sqrt(2L)), norms 1, biases 0. `jax.eval_shape` of it gives the shapes alone.
    Matmul weights are stored [in, out]. Attributes a config has no use for are None.
    """

    def __init__(self, cfg: ModelConfig, key: jax.Array, dtype: DTypeLike = jnp.float32):
        keys = jax.random.split(key)
        init, stacked = Init(keys[0], dtype), Init(keys[1], dtype, cfg.layers)
        projected = cfg.embed_dim != cfg.width
        self.cfg = cfg
        self.embed = Table(init, cfg.vocab_size, cfg.embed_dim)
        learned = cfg.positions == "learned"
        self.positions = Table(init, cfg.max_positions + cfg.position_offset, cfg.width) if learned else None
        self.project_in = Table(init, cfg.embed_dim, cfg.width) if projected else None
        self.blocks = Blocks(cfg, stacked)
        self.final_norm = Norm(init, cfg.width, cfg.norm_bias) if cfg.final_norm else None
        self.project_out = Table(init, cfg.width, cfg.embed_dim) if projected else None
        self.lm_head = Table(init, cfg.vocab_size, cfg.embed_dim) if not cfg.tie_embeddings else None

    def head(self) -> Head:
        """The output layer: weight [V, E], the embedding itself where the two are tied, and no bias."""
        return Head(self.embed.weight[...] if self.lm_head is None else self.lm_head.weight[...])

    def hidden(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array,
        positions: jax.Array,
        *,
        dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        dropout_key: jax.Array | None = None,
        tap: Callable[[jax.Array], Any] | None = None,
    ) -> jax.Array | tuple[jax.Array, Any]:
        """The states that enter the head, [B, T, E] in `dtype`, after the final norm and projection.

        tokens, segment_ids, positions: int32 [B, T]. A token sees itself and earlier tokens of its own segment;
        segment 0 is padding. Weights are cast to `dtype` on use; norms, softmax and rotation compute in float32.
        What stands on padding does not matter; elsewhere, a token or learned position beyond its table gives NaN.
        remat: keep nothing but each layer's input for the backward pass; otherwise the results of weight matmuls are
        kept too, and what is cheap (norms, activations, attention weights) is computed again.
        dropout_key: where given, adapters (`kd_jax/lora.py`) drop inputs; a model without them takes no notice.
        tap: where given, what it makes of the residual stream [B*T, D] that enters each layer and that leaves the last
        one comes back as well, stacked [L+1, ...]; all that it does not keep is gone with its layer.
        """
        tokens, positions = (jnp.where(segment_ids == 0, 0, array) for array in (tokens, positions))
        x, rotation = self.enter(tokens, positions, dtype)
        mask = attention_mask(segment_ids)

        def layer(x, block):
            return apply_block(
                self.cfg, block, x, rotation, tokens.shape, lambda q, k, v: (attend(q, k, v, mask), None)
            )

        # Attention weights are T/H times the size of what they mix: to keep them costs more time on a CPU, and more
        # memory anywhere, than to compute them twice.
        policies = jax.checkpoint_policies
        keep = policies.nothing_saveable if remat else policies.dots_with_no_batch_dims_saveable
        blocks = self.blocks if dropout_key is None else with_dropout(self.blocks, dropout_key)
        layer = jax.checkpoint(layer, policy=keep, prevent_cse=False)
        if tap is None:
            x, _ = jax.lax.scan(layer, x, blocks)
            return self.leave(x).reshape(*tokens.shape, -1)
        x, kept = jax.lax.scan(lambda x, block: (layer(x, block)[0], tap(x)), x, blocks)
        kept = jax.tree.map(lambda before, last: jnp.concatenate([before, last[None]]), kept, tap(x))
        return self.leave(x).reshape(*tokens.shape, -1), kept

    def prefill(
        self, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array, *, dtype: DTypeLike = jnp.float32
    ) -> tuple[jax.Array, Segment]:
        """`hidden`, and the keys and values of all tokens, as the first segment of the cache of `decode`."""
        tokens, positions = (jnp.where(segment_ids == 0, 0, array) for array in (tokens, positions))
        x, rotation = self.enter(tokens, positions, dtype)
        mask = attention_mask(segment_ids)

        def layer(x, block):
            return apply_block(
                self.cfg, block, x, rotation, tokens.shape, lambda q, k, v: (attend(q, k, v, mask), (k, v))
            )

        x, kept = jax.lax.scan(layer, x, self.blocks)
        k, v = (cache.transpose(0, 1, 3, 2, 4) for cache in kept)
        return self.leave(x).reshape(*tokens.shape, -1), [(k[i], v[i]) for i in range(self.cfg.layers)]

    def decode(
        self,
        layers: list[Blocks],
        tokens: jax.Array,
        positions: jax.Array,
        cache: list[Segment],
        seen: list[jax.Array],
        slot: jax.Array,
        *,
        dtype: DTypeLike = jnp.float32,
    ) -> tuple[jax.Array, Segment]:
        """One more token of every row: the states [B, E] that enter the head, and the last segment with that token.

        layers: `split_layers(blocks)`. tokens, positions: int32 [B]. cache: segments in any number, each of one (k, v)
        [B', K, S, H] per layer; rows i*B/B' to (i+1)*B/B' share row i of a segment. seen: bool [B, S] per segment, the
        slots that a row attends to; among them `slot` (int32 scalar) of the last segment, where this token goes.
        """
        x, rotation = self.enter(tokens[:, None], positions[:, None], dtype)
        grown = []
        for layer, block in enumerate(layers):
            *before, last = [segment[layer] for segment in cache]

            def attend(q, k, v, before=before, last=last):
                new = tuple(
                    jax.lax.dynamic_update_slice_in_dim(old, x.transpose(0, 2, 1, 3), slot, axis=2)
                    for old, x in zip(last, (k, v))
                )
                return decode_attention(q, [*before, new], seen), new

            x, kept = apply_block(self.cfg, block, x, rotation, (tokens.shape[0], 1), attend)
            grown.append(kept)
        return self.leave(x), grown

    def enter(self, tokens: jax.Array, positions: jax.Array, dtype: DTypeLike):
        """The residual stream [B*T, D] before the first layer, and the rotation of `positions` (or None)."""
        # Weights meet [B*T, D]: XLA's CPU matmul is about twice as fast on it as on [B, T, D].
        x = lookup(self.embed, tokens.reshape(-1), dtype)
        if self.project_in is not None:
            x = dense(x, self.project_in.weight)
        if self.positions is None:
            return x, rotation_of(positions, self.cfg)
        return x + lookup(self.positions, positions.reshape(-1) + self.cfg.position_offset, dtype), None

    def leave(self, x: jax.Array) -> jax.Array:
        """The states [B*T, E] that enter the head, from the residual stream after the last layer."""
        if self.final_norm is not None:
            x = apply_norm(self.cfg, self.final_norm, x)
        return x if self.project_out is None else dense(x, self.project_out.weight)


def lookup(table: Table, index: jax.Array, dtype: DTypeLike) -> jax.Array:
    return jnp.take(table.weight[...], index, axis=0, mode="fill").astype(dtype)


def dense(x: jax.Array, weight: nnx.Param | Adapted, bias: nnx.Param | None = None) -> jax.Array:
    x = few_rows(x)
    y = weight(x) if isinstance(weight, Adapted) else x @ weight.astype(x.dtype)
    return y if bias is None else y + bias.astype(x.dtype)[None]


def few_rows(x: jax.Array) -> jax.Array:
    """x [rows, D] for a matmul with a large weight.

    On a CPU, XLA hands a matmul to a library (YNNPACK) that packs the whole weight anew for every token, unless the
    left side is transposed: then Eigen reads it as it stands, 1.2 to 1.4 times as fast up to 16 rows.
    """
    if jax.default_backend() != "cpu" or x.shape[0] > 16:
        return x
    return jax.lax.optimization_barrier(x.T).T


def attention_mask(segment_ids: jax.Array) -> jax.Array:
    """[B, T, T] bool: which keys (last axis) a query sees. Padding sees padding, so that no softmax is empty."""
    time = segment_ids.shape[1]
    same_segment = segment_ids[:, :, None] == segment_ids[:, None, :]
    return same_segment & jnp.tri(time, dtype=bool)[None]


def rotation_of(positions: jax.Array, cfg: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine [B, T, 1, rotary_dim/2] of every position times every frequency (arXiv:2104.09864)."""
    frequency = cfg.rope_theta ** (-jnp.arange(0, cfg.rotary_dim, 2, dtype=jnp.float32) / cfg.rotary_dim)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency[None, None, None]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates dimension i of a head [B, T, N, H] with i + rotary_dim/2; dimensions past rotary_dim stay."""
    cos, sin = rotation
    half = cos.shape[-1]
    a, b = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)


def rms(x: jax.Array, scale: nnx.Param, eps: float) -> jax.Array:
    """RMSNorm over the last axis in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    return (y * scale).astype(x.dtype)


def apply_norm(cfg: ModelConfig, norm: Norm, x: jax.Array) -> jax.Array:
    if cfg.norm == "rmsnorm":
        return rms(x, norm.scale, cfg.norm_eps)
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + cfg.norm_eps)
    y = y * norm.scale.astype(jnp.float32)[None]
    if norm.bias is not None:
        y = y + norm.bias.astype(jnp.float32)[None]
    return y.astype(x.dtype)


def apply_block(cfg: ModelConfig, block: Blocks, x: jax.Array, rotation, shape: tuple[int, int], attend: Callable):
    """One layer on the residual stream x [B*T, D], `shape` (B, T): the new stream, and what `attend` keeps.

    `attend(q [B, T, N, H], k [B, T, K, H], v) -> (y [B, T, N, H], kept)` is the attention itself.
    """
    norm1 = functools.partial(apply_norm, cfg, block.norm1)
    norm2 = functools.partial(apply_norm, cfg, block.norm2)
    mlp = functools.partial(apply_mlp, cfg, block.mlp)
    reads_norm = cfg.parallel_residual or cfg.norm_placement == "pre"
    y, kept = apply_attention(cfg, block.attn, norm1(x) if reads_norm else x, rotation, shape, attend)
    if cfg.parallel_residual:
        return x + y + mlp(norm2(x)), kept
    if cfg.norm_placement == "pre":
        x = x + y
        return x + mlp(norm2(x)), kept
    if cfg.norm_placement == "post":
        x = norm1(x + y)
        return norm2(x + mlp(x)), kept
    x = x + norm1(y)
    return x + norm2(mlp(x)), kept


def apply_mlp(cfg: ModelConfig, mlp: Mlp, x: jax.Array) -> jax.Array:
    activation = ACTIVATIONS[cfg.activation]
    up = dense(x, mlp.up, mlp.up_bias)
    inner = activation(up) if mlp.gate is None else activation(dense(x, mlp.gate, mlp.gate_bias)) * up
    return dense(inner, mlp.down, mlp.down_bias)


def apply_attention(
    cfg: ModelConfig, attn: Attention, x: jax.Array, rotation, shape: tuple[int, int], attend: Callable
):
    """Self-attention [B*T, D] -> [B*T, D], and what `attend` keeps."""
    rows, time = shape
    q = dense(x, attn.q, attn.q_bias)
    k = dense(x, attn.k, attn.k_bias)
    v = dense(x, attn.v, attn.v_bias)
    if cfg.qk_norm == "full":
        q, k = rms(q, attn.q_norm, cfg.norm_eps), rms(k, attn.k_norm, cfg.norm_eps)
    q = q.reshape(rows, time, cfg.heads, cfg.head_dim)
    k = k.reshape(rows, time, cfg.kv_heads, cfg.head_dim)
    v = v.reshape(rows, time, cfg.kv_heads, cfg.head_dim)
    if cfg.qk_norm == "head":
        q, k = rms(q, attn.q_norm, cfg.norm_eps), rms(k, attn.k_norm, cfg.norm_eps)
    if rotation is not None:
        q, k = rotate(q, rotation), rotate(k, rotation)
    y, kept = attend(q, k, v)
    return dense(y.reshape(rows * time, -1), attn.o, attn.o_bias), kept


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """q [B, T, N, H]; k, v [B, T, K, H]; mask [B, T, T], causal -> [B, T, N, H]."""
    if jax.default_backend() == "cpu":
        return cpu_attention(q, k, v, mask)
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])


def split_layers(blocks: Blocks, layers: int) -> list[Blocks]:
    """The layers one by one: a scan over stacked weights would copy every one of them for every token of `decode`."""
    return [jax.tree.map(lambda w, i=i: w[i], blocks) for i in range(layers)]


def decode_attention(q: jax.Array, segments: list[tuple[jax.Array, jax.Array]], seen: list[jax.Array]) -> jax.Array:
    """One query per row over several segments: q [B, 1, N, H]; k, v [B', K, S, H]; seen [B, S] -> [B, 1, N, H]."""
    B, _, N, H = q.shape
    q = q.reshape(B, N, H) * H**-0.5
    scores = []
    for (k, _), mask in zip(segments, seen):
        shared, K = B // k.shape[0], k.shape[1]
        queries = q.reshape(-1, shared, K, N // K, H).swapaxes(1, 2).reshape(-1, K, shared * N // K, H)
        s = jnp.einsum("bkgh,bksh->bkgs", queries, k, preferred_element_type=jnp.float32)
        s = s.reshape(-1, K, shared, N // K, s.shape[-1]).swapaxes(1, 2).reshape(B, N, -1)
        scores.append(jnp.where(mask[:, None], s, -1e30))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(q.dtype)
    y, start = 0.0, 0
    for _, v in segments:
        shared, K, S = B // v.shape[0], v.shape[1], v.shape[2]
        w = weights[:, :, start : start + S].reshape(-1, shared, K, N // K, S).swapaxes(1, 2)
        out = jnp.einsum("bkgs,bksh->bkgh", w.reshape(-1, K, shared * N // K, S), v)
        y = y + out.reshape(-1, K, shared, N // K, H).swapaxes(1, 2).reshape(B, 1, N, H)
        start += S
    return y


def cpu_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """`jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])`, laid out for XLA on a CPU.

    q [B, T, N, H]; k, v [B, T, K, H]; mask [B, T, T], causal -> [B, T, N, H]. The heads go in front of time, keys are
    not repeated for the G query heads that share them, and a block of queries meets only the keys that are not after
    it: half the work of the full square, and twice as fast forward and backward (8 x 256 tokens).
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    G = N // K
    q = (q * H**-0.5).reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    size = max(64, -(-T // 8))  # at most 8 blocks, which bounds the size of the program
    out = []
    for start in range(0, T, size):
        stop = min(start + size, T)
        queries = q[:, :, :, start:stop].reshape(B, K, -1, H)  # four axes: XLA is slower with five
        scores = jnp.einsum("bkth,bksh->bkts", queries, k[:, :, :stop], preferred_element_type=jnp.float32)
        seen = jnp.tile(mask[:, None, start:stop, :stop], (1, 1, G, 1))
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1).astype(v.dtype)
        out.append(jnp.einsum("bkts,bksh->bkth", weights, v[:, :, :stop]).reshape(B, K, G, -1, H))
    return jnp.concatenate(out, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
