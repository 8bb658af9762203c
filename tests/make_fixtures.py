"""Writes tests/fixtures: a small random checkpoint of every family as transformers saves it, and its float64 logits.

    python tests/make_fixtures.py

It needs PyTorch, which is tested with Python 3.11 only; other versions read what it wrote. The tests that have PyTorch
also run against it directly.
"""

import shutil
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).parent / "fixtures"
SHARED = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 16,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GATED = SHARED | {"intermediate_size": 40}

# name -> (config class of transformers, its arguments)
CASES = {
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 40, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 16}
        | {"bos_token_id": None, "eos_token_id": None},
    ),
    "opt": ("OPTConfig", SHARED | {"ffn_dim": 40, "word_embed_proj_dim": 24}),
    "opt_350m": ("OPTConfig", SHARED | {"ffn_dim": 40, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "llama": ("LlamaConfig", GATED),
    "llama_grouped": (
        "LlamaConfig",
        GATED
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}
        | {"head_dim": 8, "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ),
    "gpt_neox": ("GPTNeoXConfig", GATED),
    "gpt_neox_sequential": (
        "GPTNeoXConfig",
        GATED
        | {"use_parallel_residual": False, "attention_bias": False}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
    ),
    "olmo2": ("Olmo2Config", GATED | {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}),
    "qwen3": (
        "Qwen3Config",
        GATED | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "tie_word_embeddings": True},
    ),
}


def random_model(name: str):
    """A PyTorch model of the case, every parameter random (transformers leaves norms at 1 and biases at 0)."""
    import torch
    import transformers

    config_class, arguments = CASES[name]
    torch.manual_seed(sorted(CASES).index(name))
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**arguments)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def main() -> None:
    import torch

    tokens = np.random.default_rng(0).integers(0, 40, (2, 14))
    for name in CASES:
        folder = FIXTURES / name
        shutil.rmtree(folder, ignore_errors=True)
        model = random_model(name)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        with torch.no_grad():
            logits = model.double()(torch.tensor(tokens)).logits.numpy()
        np.savez_compressed(folder / "logits.npz", tokens=tokens, logits=logits)


if __name__ == "__main__":
    main()
