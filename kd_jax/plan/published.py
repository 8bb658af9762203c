"""Shapes of published models, for where the hub does not answer: the keys of their public `config.json`.

`tokenizer` is the number of tokens of the model's tokenizer, which is below the model's rows where those are padded.
"""

from __future__ import annotations

_GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "tokenizer": 50257}
_OPT = {
    "model_type": "opt",
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "tokenizer": 50265,
}
_LLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "tokenizer": 32000,
}


def _gpt2(width: int, layers: int, heads: int) -> dict:
    return _GPT2 | {"n_embd": width, "n_layer": layers, "n_head": heads}


def _opt(width: int, layers: int, heads: int, embedding: int = 0, norm_before: bool = True) -> dict:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "ffn_dim": 4 * width}
    return _OPT | sizes | {"word_embed_proj_dim": embedding or width, "do_layer_norm_before": norm_before}


def _llama(width: int, layers: int, heads: int, kv_heads: int, mlp: int, positions: int, eps: float = 1e-5) -> dict:
    return _LLAMA | {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "max_position_embeddings": positions,
        "rms_norm_eps": eps,
    }


PUBLISHED: dict[str, dict] = {
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "facebook/opt-125m": _opt(768, 12, 12),
    "facebook/opt-350m": _opt(1024, 24, 16, embedding=512, norm_before=False),
    "facebook/opt-1.3b": _opt(2048, 24, 32),
    "facebook/opt-2.7b": _opt(2560, 32, 32),
    "meta-llama/Llama-2-7b-hf": _llama(4096, 32, 32, 32, 11008, 4096),
    "TinyLlama/TinyLlama_v1.1": _llama(2048, 22, 32, 4, 5632, 2048),
    "openlm-research/open_llama_7b": _llama(4096, 32, 32, 32, 11008, 2048, 1e-6),
    "openlm-research/open_llama_3b": _llama(3200, 26, 32, 32, 8640, 2048, 1e-6),
}
