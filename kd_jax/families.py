"""Architectures of Hugging Face transformers as tables: which key of `config.json` is which field of `ModelConfig`, and
which tensor of the files is which array of `Transformer`.

This is the only place that knows families. Reading and writing go through the same rows.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from kd_jax.transformer import ModelConfig


class CheckpointError(ValueError):
    """A folder or hub id that cannot be read or written as a model; the message says what is wrong and what to do."""


class Layout(NamedTuple):
    """How one tensor of a file holds one or more of our arrays (of one layer)."""

    unpack: Callable[[np.ndarray, ModelConfig], list[np.ndarray]]
    pack: Callable[[list[np.ndarray], ModelConfig], np.ndarray]


def _split_heads(x: np.ndarray, cfg: ModelConfig) -> list[np.ndarray]:
    x = x.T
    x = x.reshape(*x.shape[:-1], cfg.heads, 3, cfg.head_dim)
    return [x[..., i, :].reshape(*x.shape[:-3], -1) for i in range(3)]


def _join_heads(parts: list[np.ndarray], cfg: ModelConfig) -> np.ndarray:
    heads = [part.reshape(*part.shape[:-1], cfg.heads, 1, cfg.head_dim) for part in parts]
    return np.concatenate(heads, axis=-2).reshape(*parts[0].shape[:-1], -1).T


AS_IS = Layout(lambda x, cfg: [x], lambda parts, cfg: parts[0])
LINEAR = Layout(lambda x, cfg: [x.T], lambda parts, cfg: parts[0].T)  # torch stores [out, in]
FUSED = Layout(lambda x, cfg: np.split(x, 3, axis=-1), lambda parts, cfg: np.concatenate(parts, axis=-1))
FUSED_BY_HEAD = Layout(_split_heads, _join_heads)  # [heads, (q, k, v), head size, in]


class Row(NamedTuple):
    """A tensor's name, with `{}` for the layer, and the path or paths of our arrays."""

    name: str
    paths: tuple[str, ...]
    layout: Layout


def _row(name: str, path: str, layout: Layout = AS_IS) -> tuple[Row, ...]:
    return (Row(name, (path,), layout),)


def _linear(name: str, path: str, layout: Layout = LINEAR) -> tuple[Row, ...]:
    return _row(f"{name}.weight", path, layout) + _row(f"{name}.bias", f"{path}_bias")


def _fused(name: str, layout: Layout) -> tuple[Row, ...]:
    weights, biases = zip(*((f"blocks.attn.{x}", f"blocks.attn.{x}_bias") for x in "qkv"), strict=True)
    return (Row(f"{name}.weight", weights, layout), Row(f"{name}.bias", biases, layout))


def _norm(name: str, path: str) -> tuple[Row, ...]:
    return _row(f"{name}.weight", f"{path}.scale") + _row(f"{name}.bias", f"{path}.bias")


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of transformers. A row whose arrays a config does not have is not expected in its files."""

    architecture: str
    base: str  # prefix that some published files lack
    head: str
    keys: Mapping[str, str]  # ModelConfig field -> config.json key
    features: Mapping[str, Any]  # fields that no key sets, and what an absent key means
    rows: tuple[Row, ...]
    required: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # keys with only one supported value
    rotary_fraction: float | None = None  # of a head, where the config does not say; None: no rotation
    ignored: str = r"$."  # buffers that old versions of transformers saved


# Values that are spelt differently there. The first spelling of a value is the one written.
VALUES = {
    "activation": {
        "gelu": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
        "relu": "relu",
        "silu": "silu",
        "swish": "silu",
    },
    "norm_placement": {True: "pre", False: "post"},
}

# The largest size that is believed; products of them, which are the shapes of arrays, stay under 2^63.
LARGEST = dict.fromkeys(("vocab_size", "max_positions"), 1 << 24) | dict.fromkeys(
    ("width", "mlp", "embed_dim"), 1 << 20
)
LARGEST |= dict.fromkeys(("heads", "kv_heads", "head_dim"), 1 << 14) | {"layers": 1 << 12}

_KEYS = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "activation": "hidden_act",
    "tie_embeddings": "tie_word_embeddings",
}
_LLAMA_KEYS = _KEYS | {
    "kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "qkv_bias": "attention_bias",
    "out_bias": "attention_bias",
}
_LAYERNORM = {"norm": "layernorm", "norm_bias": True, "norm_eps": 1e-5, "gated": False}
_ALL_BIASES = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
_RMSNORM = {"norm": "rmsnorm", "activation": "silu", "gated": True, "positions": "rope"}

_QKVO = (
    _linear("model.layers.{}.self_attn.q_proj", "blocks.attn.q")
    + _linear("model.layers.{}.self_attn.k_proj", "blocks.attn.k")
    + _linear("model.layers.{}.self_attn.v_proj", "blocks.attn.v")
    + _linear("model.layers.{}.self_attn.o_proj", "blocks.attn.o")
)
_LLAMA_ROWS = (
    _row("model.embed_tokens.weight", "embed.weight")
    + _QKVO
    + _row("model.layers.{}.self_attn.q_norm.weight", "blocks.attn.q_norm")
    + _row("model.layers.{}.self_attn.k_norm.weight", "blocks.attn.k_norm")
    + _linear("model.layers.{}.mlp.up_proj", "blocks.mlp.up")
    + _linear("model.layers.{}.mlp.gate_proj", "blocks.mlp.gate")
    + _linear("model.layers.{}.mlp.down_proj", "blocks.mlp.down")
    + _norm("model.norm", "final_norm")
    + _row("lm_head.weight", "lm_head.weight")
)
_PRE_NORMS = _norm("model.layers.{}.input_layernorm", "blocks.norm1") + _norm(
    "model.layers.{}.post_attention_layernorm", "blocks.norm2"
)
_OUTPUT_NORMS = _norm("model.layers.{}.post_attention_layernorm", "blocks.norm1") + _norm(
    "model.layers.{}.post_feedforward_layernorm", "blocks.norm2"
)

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        base="transformer.",
        head="lm_head.weight",
        keys={
            "vocab_size": "vocab_size",
            "width": "n_embd",
            "layers": "n_layer",
            "heads": "n_head",
            "mlp": "n_inner",
            "max_positions": "n_positions",
            "norm_eps": "layer_norm_epsilon",
            "activation": "activation_function",
            "tie_embeddings": "tie_word_embeddings",
        },
        features=_LAYERNORM | _ALL_BIASES | {"positions": "learned", "activation": "gelu_tanh", "tie_embeddings": True},
        required={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        rows=_row("transformer.wte.weight", "embed.weight")
        + _row("transformer.wpe.weight", "positions.weight")
        + _norm("transformer.h.{}.ln_1", "blocks.norm1")
        + _fused("transformer.h.{}.attn.c_attn", FUSED)
        + _linear("transformer.h.{}.attn.c_proj", "blocks.attn.o", AS_IS)
        + _norm("transformer.h.{}.ln_2", "blocks.norm2")
        + _linear("transformer.h.{}.mlp.c_fc", "blocks.mlp.up", AS_IS)
        + _linear("transformer.h.{}.mlp.c_proj", "blocks.mlp.down", AS_IS)
        + _norm("transformer.ln_f", "final_norm")
        + _row("lm_head.weight", "lm_head.weight"),
        ignored=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",
    ),
    "opt": Family(
        architecture="OPTForCausalLM",
        base="model.",
        head="lm_head.weight",
        keys=_KEYS
        | {
            "mlp": "ffn_dim",
            "embed_dim": "word_embed_proj_dim",
            "activation": "activation_function",
            "norm_placement": "do_layer_norm_before",
            "final_norm": "do_layer_norm_before",  # OPT-350M has neither norms before nor one at the end
            "qkv_bias": "enable_bias",
            "out_bias": "enable_bias",
            "mlp_bias": "enable_bias",
        },
        features=_LAYERNORM
        | _ALL_BIASES
        | {"positions": "learned", "position_offset": 2, "activation": "relu", "tie_embeddings": True},
        required={"layer_norm_elementwise_affine": True, "_remove_final_layer_norm": False},
        rows=_row("model.decoder.embed_tokens.weight", "embed.weight")
        + _row("model.decoder.embed_positions.weight", "positions.weight")
        + _row("model.decoder.project_in.weight", "project_in.weight", LINEAR)
        + _row("model.decoder.project_out.weight", "project_out.weight", LINEAR)
        + tuple(
            row._replace(name=row.name.replace("model.", "model.decoder.").replace("o_proj", "out_proj"))
            for row in _QKVO
        )
        + _norm("model.decoder.layers.{}.self_attn_layer_norm", "blocks.norm1")
        + _linear("model.decoder.layers.{}.fc1", "blocks.mlp.up")
        + _linear("model.decoder.layers.{}.fc2", "blocks.mlp.down")
        + _norm("model.decoder.layers.{}.final_layer_norm", "blocks.norm2")
        + _norm("model.decoder.final_layer_norm", "final_norm")
        + _row("lm_head.weight", "lm_head.weight"),
    ),
    "llama": Family(
        architecture="LlamaForCausalLM",
        base="model.",
        head="lm_head.weight",
        keys=_LLAMA_KEYS | {"head_dim": "head_dim", "mlp_bias": "mlp_bias"},
        features=_RMSNORM | {"norm_eps": 1e-6},
        rotary_fraction=1.0,
        rows=_LLAMA_ROWS + _PRE_NORMS,
        ignored=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    ),
    "gpt_neox": Family(
        architecture="GPTNeoXForCausalLM",
        base="gpt_neox.",
        head="embed_out.weight",
        keys=_KEYS
        | {
            "norm_eps": "layer_norm_eps",
            "parallel_residual": "use_parallel_residual",
            "qkv_bias": "attention_bias",
            "out_bias": "attention_bias",
        },
        features=_LAYERNORM | _ALL_BIASES | {"positions": "rope", "activation": "gelu", "parallel_residual": True},
        rotary_fraction=0.25,
        rows=_row("gpt_neox.embed_in.weight", "embed.weight")
        + _norm("gpt_neox.layers.{}.input_layernorm", "blocks.norm1")
        + _fused("gpt_neox.layers.{}.attention.query_key_value", FUSED_BY_HEAD)
        + _linear("gpt_neox.layers.{}.attention.dense", "blocks.attn.o")
        + _norm("gpt_neox.layers.{}.post_attention_layernorm", "blocks.norm2")
        + _linear("gpt_neox.layers.{}.mlp.dense_h_to_4h", "blocks.mlp.up")
        + _linear("gpt_neox.layers.{}.mlp.dense_4h_to_h", "blocks.mlp.down")
        + _norm("gpt_neox.final_layer_norm", "final_norm")
        + _row("embed_out.weight", "lm_head.weight"),
        ignored=r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        base="model.",
        head="lm_head.weight",
        keys=_LLAMA_KEYS,
        features=_RMSNORM | {"norm_eps": 1e-5, "norm_placement": "output", "qk_norm": "full"},
        rotary_fraction=1.0,
        rows=_LLAMA_ROWS + _OUTPUT_NORMS,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        base="model.",
        head="lm_head.weight",
        keys=_LLAMA_KEYS | {"head_dim": "head_dim"},
        features=_RMSNORM | {"norm_eps": 1e-6, "head_dim": 128, "qk_norm": "head"},
        rotary_fraction=1.0,
        rows=_LLAMA_ROWS + _PRE_NORMS,
    ),
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The table of a `config.json`; raises CheckpointError, which lists what is supported, if there is none."""
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise CheckpointError(f"config.json: model_type {shown(name)} is not supported; supported: {known}")
    return FAMILIES[name]


def shown(value: object, most: int = 100) -> str:
    """`repr` of what a file says, cut where it is long: a message is to be read."""
    text = repr(value[:most] if isinstance(value, str) else value)
    return text if len(text) <= most else f"{text[:most]}..."


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """The features that a `config.json` asks for, in the form of transformers 4 (`rotary_pct`, `rope_theta`) or 5.

    Raises CheckpointError on an unknown architecture, a missing key, or a feature that the forward pass lacks.
    """
    family = family_of(config)
    for key, value in family.required.items():
        if config.get(key, value) != value:
            raise CheckpointError(f"config.json: {key}={shown(config[key])} is not supported, only {value!r}")
    fields = dict(family.features)
    for field, key in family.keys.items():
        value = config.get(key)
        if value is None:
            continue
        if field in VALUES:
            if not isinstance(value, str | bool) or value not in VALUES[field]:
                known = ", ".join(map(repr, VALUES[field]))
                raise CheckpointError(f"config.json: {key}={shown(value)} is not supported; supported: {known}")
            value = VALUES[field][value]
        elif field in LARGEST:
            value = _size(key, value, LARGEST[field])
        elif field == "norm_eps":
            value = _number(key, value)
        elif not isinstance(value, bool):
            raise CheckpointError(f"config.json: {key}={shown(value)}; it must be true or false")
        fields[field] = value
    if config["model_type"] == "gpt2" and "width" in fields:
        fields.setdefault("mlp", 4 * fields["width"])  # what n_inner = null means
    for field in ("vocab_size", "width", "layers", "heads", "mlp", "max_positions"):
        if field not in fields:
            raise CheckpointError(f"config.json has no {family.keys[field]!r}")
    fields.setdefault("embed_dim", fields["width"])
    fields.setdefault("kv_heads", fields["heads"])
    fields.setdefault("head_dim", max(1, fields["width"] // fields["heads"]))
    if family.rotary_fraction is not None:
        fields.update(_rope(config, fields["head_dim"], family.rotary_fraction))
    _refuse_sliding_window(config)
    try:
        return ModelConfig(**fields)
    except ValueError as error:
        raise CheckpointError(f"config.json: {error}") from error


def _size(key: str, value: object, largest: int) -> int:
    if type(value) is not int or not 1 <= value <= largest:
        raise CheckpointError(f"config.json: {key}={shown(value)}; it must be a whole number from 1 to {largest}")
    return value


def _number(key: str, value: object, most: float = 1e30) -> float:
    if type(value) not in (int, float) or not (0 < value <= most and math.isfinite(value)):
        raise CheckpointError(f"config.json: {key}={shown(value)}; it must be a number above 0, at most {most:g}")
    return float(value)


def _rope(config: Mapping[str, Any], head_dim: int, fraction: float) -> dict[str, Any]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise CheckpointError(f"config.json: rope_parameters={shown(rope)}; it must be an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"config.json: rope scaling of type {shown(kind)} is not supported, only 'default'")
    found, theta = {**config, **rope}, 10_000.0
    for key in ("rotary_emb_base", "rope_theta"):
        theta = _number(key, found[key]) if found.get(key) is not None else theta
    for key in ("rotary_pct", "partial_rotary_factor"):
        fraction = _number(key, found[key], most=1.0) if found.get(key) is not None else fraction
    return {"rope_theta": theta, "rotary_dim": int(head_dim * fraction)}


def _refuse_sliding_window(config: Mapping[str, Any]) -> None:
    kinds, first = config.get("layer_types"), config.get("max_window_layers")
    if kinds is not None:
        slides = not isinstance(kinds, list | tuple) or any(kind != "full_attention" for kind in kinds)
    elif slides := config.get("use_sliding_window") and config.get("sliding_window"):
        slides = type(first) is not int or config["num_hidden_layers"] > first
    if slides:
        raise CheckpointError("config.json: attention over a sliding window (layer_types) is not supported")


def config_to_hf(cfg: ModelConfig, family: str, dtype: str = "float32") -> dict[str, Any]:
    """The `config.json` of a model, with the keys of transformers 4 beside those of 5. Raises CheckpointError on a
    config that the family cannot express."""
    table = family_of({"model_type": family})
    config = {"model_type": family, "architectures": [table.architecture], "dtype": dtype, "torch_dtype": dtype}
    config |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | dict(table.required)
    for field, key in table.keys.items():
        value = getattr(cfg, field)
        spellings = [there for there, ours in VALUES[field].items() if ours == value] if field in VALUES else [value]
        config[key] = spellings[0] if spellings else None
    if table.rotary_fraction is not None:
        rope = {"rope_type": "default", "rope_theta": cfg.rope_theta}
        config["rotary_emb_base" if family == "gpt_neox" else "rope_theta"] = cfg.rope_theta
        if cfg.rotary_dim != int(cfg.head_dim * table.rotary_fraction):
            config["rotary_pct"] = rope["partial_rotary_factor"] = cfg.rotary_dim / cfg.head_dim
        config["rope_parameters"] = rope
    read_back = config_from_hf(config)
    if read_back != cfg:
        lost = [f.name for f in dataclasses.fields(cfg) if getattr(cfg, f.name) != getattr(read_back, f.name)]
        raise CheckpointError(f"family {family!r} cannot express this model's {', '.join(lost)}")
    return config
