"""The Hugging Face border: the same logits as transformers both ways, and an error that names whatever is wrong."""

import dataclasses
import json
import os
import shutil
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import huggingface_hub.errors as hub_errors
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from make_fixtures import CASES, FIXTURES, random_model

from kd_jax import experiment
from kd_jax.data import tokenizer
from kd_jax.hf import FAMILIES, CheckpointError, config_from_hf, load_pretrained, save_pretrained
from kd_jax.transformer import ModelConfig, Transformer

TOLERANCE = 1e-4


def family_of(case: str) -> str:
    return json.loads((FIXTURES / case / "config.json").read_text())["model_type"]


@jax.jit
def logits(model: Transformer, tokens: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    head = model.head()
    return model.hidden(tokens, jnp.ones_like(tokens), positions) @ head.weight.T


def deviation(model: Transformer, case: str) -> float:
    """Largest distance from the logits that PyTorch computed in float64."""
    stored = np.load(FIXTURES / case / "logits.npz")
    assert np.abs(stored["logits"]).max() > 0.5
    return np.abs(logits(model, stored["tokens"]) - stored["logits"]).max()


@pytest.fixture
def copy(tmp_path):
    """Copies a fixture, with changes to its config and tensors, into a folder that a test may break."""

    def make(case: str, *, config=None, tensors=None, rename=None) -> Path:
        folder = tmp_path / case
        shutil.copytree(FIXTURES / case, folder)
        if config is not None:
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | config))
        if tensors is not None or rename is not None:
            path = folder / "model.safetensors"
            found = safetensors.numpy.load_file(path) | (tensors or {})
            found = {(rename or {}).get(name, name): tensor for name, tensor in found.items()}
            safetensors.numpy.save_file({name: t for name, t in found.items() if name and t is not None}, path)
        return folder

    return make


@pytest.mark.parametrize("case", CASES)
def test_import_agrees_with_stored_logits(case, check):
    check(f"logits of transformers, {case}", deviation(load_pretrained(FIXTURES / case), case), TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_export_writes_the_tensors_that_transformers_wrote(case, tmp_path):
    save_pretrained(load_pretrained(FIXTURES / case), tmp_path / "out", family=family_of(case))
    theirs = safetensors.numpy.load_file(FIXTURES / case / "model.safetensors")
    ours = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    original = json.loads((FIXTURES / case / "config.json").read_text())
    assert config["architectures"] == original["architectures"] and config["dtype"] == "float32"
    assert config_from_hf(config) == config_from_hf(original)


@pytest.mark.parametrize("case", CASES)
def test_parity_with_pytorch_both_ways(case, tmp_path, check):
    torch = pytest.importorskip("torch", reason="PyTorch is not here; the stored float64 logits are tested instead")
    transformers = pytest.importorskip("transformers")
    tokens = np.random.default_rng(7).integers(0, 40, (3, 16))
    theirs = random_model(case)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="12KB")
    ours = load_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    check(f"logits of PyTorch, import, {case}", np.abs(logits(ours, tokens) - expected).max(), TOLERANCE)
    save_pretrained(ours, tmp_path / "ours", family=family_of(case), shard_bytes=12_000)
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists()
    back, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        found = back(torch.tensor(tokens)).logits.numpy()
    check(f"logits of PyTorch, export, {case}", np.abs(found - expected).max(), TOLERANCE)


# The settings of published folders, as transformers 4 wrote them: equal to what the model cards say.
OLD = {
    "gpt2": (
        {"model_type": "gpt2", "activation_function": "gelu_new", "n_embd": 768, "n_head": 12, "n_layer": 12}
        | {"n_positions": 1024, "n_ctx": 1024, "layer_norm_epsilon": 1e-05, "vocab_size": 50257},
        {"width": 768, "mlp": 3072, "activation": "gelu_tanh", "positions": "learned", "tie_embeddings": True},
    ),
    "opt-350m": (
        {"model_type": "opt", "activation_function": "relu", "do_layer_norm_before": False, "ffn_dim": 4096}
        | {"hidden_size": 1024, "max_position_embeddings": 2048, "num_attention_heads": 16, "num_hidden_layers": 24}
        | {"torch_dtype": "float16", "vocab_size": 50272, "word_embed_proj_dim": 512},
        {"embed_dim": 512, "norm_placement": "post", "final_norm": False, "position_offset": 2, "qkv_bias": True},
    ),
    "pythia-410m": (
        {"model_type": "gpt_neox", "hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096}
        | {"layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "num_attention_heads": 16}
        | {"num_hidden_layers": 24, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False}
        | {"torch_dtype": "float16", "use_parallel_residual": True, "vocab_size": 50304},
        {"head_dim": 64, "rotary_dim": 16, "parallel_residual": True, "activation": "gelu", "qkv_bias": True},
    ),
    "llama-2-70b": (
        {"model_type": "llama", "hidden_act": "silu", "hidden_size": 8192, "intermediate_size": 28672}
        | {"max_position_embeddings": 4096, "num_attention_heads": 64, "num_hidden_layers": 80}
        | {"num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None}
        | {"tie_word_embeddings": False, "torch_dtype": "float16", "vocab_size": 32000},
        {"kv_heads": 8, "head_dim": 128, "rotary_dim": 128, "rope_theta": 10_000.0, "qkv_bias": False},
    ),
    "olmo-2-1b": (
        {"model_type": "olmo2", "attention_bias": False, "hidden_act": "silu", "hidden_size": 2048}
        | {"intermediate_size": 8192, "max_position_embeddings": 4096, "num_attention_heads": 16}
        | {"num_hidden_layers": 16, "num_key_value_heads": 16, "rms_norm_eps": 1e-06, "rope_theta": 500000}
        | {"rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float32", "vocab_size": 100352},
        {"norm_placement": "output", "qk_norm": "full", "rope_theta": 500_000.0, "norm_eps": 1e-6},
    ),
    "qwen3-0.6b": (
        {"model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024}
        | {"intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28}
        | {"num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06}
        | {"rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True}
        | {"torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936},
        {"head_dim": 128, "width": 1024, "qk_norm": "head", "rope_theta": 1e6, "tie_embeddings": True},
    ),
}


@pytest.mark.parametrize("name", OLD)
def test_published_configs_of_transformers_4(name):
    config, expected = OLD[name]
    found = dataclasses.asdict(config_from_hf(config))
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    "case, old",
    [
        ("gpt_neox", {"rotary_pct": 0.25, "rotary_emb_base": 10000}),
        ("gpt_neox_sequential", {"rotary_pct": 0.5, "rotary_emb_base": 500.0}),
        ("llama_grouped", {"rope_theta": 500000.0, "rope_scaling": None}),
    ],
)
def test_old_and_new_spelling_mean_the_same(case, old, copy, check):
    folder = copy(case)
    config = json.loads((folder / "config.json").read_text())
    new = config_from_hf(config)
    del config["rope_parameters"], config["dtype"]
    (folder / "config.json").write_text(json.dumps(config | old | {"torch_dtype": "bfloat16"}))
    assert config_from_hf(json.loads((folder / "config.json").read_text())) == new
    check(f"logits of transformers, {case}", deviation(load_pretrained(folder), case), TOLERANCE)
    assert load_pretrained(folder, dtype=None).embed.weight.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "case, change, message",
    [
        ("llama", {"model_type": "mistral"}, "'mistral' is not supported; supported: gpt2, opt, llama"),
        ("llama", {"model_type": None}, "None is not supported; supported: gpt2"),
        ("llama", {"hidden_act": "xielu"}, "hidden_act='xielu'"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope scaling of type 'llama3'"),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "type 'linear'"),
        ("llama", {"hidden_size": None}, "no 'hidden_size'"),
        ("llama", {"num_key_value_heads": 2}, r"config.json: heads \(3\) must be a multiple of kv_heads \(2\)"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        (
            "qwen3",
            {"layer_types": None, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
            "sliding window",
        ),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine=False"),
    ],
)
def test_unsupported_configs_are_named(case, change, message, copy):
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(copy(case, config=change))


def test_a_family_that_cannot_express_a_model_refuses_it(tmp_path):
    with pytest.raises(CheckpointError, match="'llama' cannot express.* qk_norm"):
        save_pretrained(load_pretrained(FIXTURES / "qwen3"), tmp_path / "out", family="llama")
    with pytest.raises(CheckpointError, match="'gemma' is not supported"):
        save_pretrained(load_pretrained(FIXTURES / "qwen3"), tmp_path / "out", family="gemma")
    assert not any(tmp_path.iterdir())


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({Q: None}, f"missing {Q}"),
        ({"model.layers.1.self_attn.q_proj.bias": np.zeros(24)}, "left over model.layers.1.self_attn.q_proj.bias"),
        ({"model.layers.2.input_layernorm.weight": np.zeros(24)}, "left over model.layers.2.input_layernorm"),
        ({Q: np.zeros((24, 23), np.float32)}, rf"{Q}' has shape \(24, 23\), config.json asks for \(24, 24\)"),
        ({"lm_head.weight": np.zeros((41, 24), np.float32)}, r"lm_head.weight' has shape \(41, 24\)"),
        ({"norm.weight": np.zeros(24)}, "norm.weight' is in this checkpoint twice"),
        ({Q: np.zeros((24, 24), np.int8)}, f"{Q}' is I8"),
    ],
)
def test_wrong_tensors_are_named(tensors, message, copy):
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(copy("llama", tensors=tensors))


def test_fused_tensors_are_checked_too(copy):
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    with pytest.raises(CheckpointError, match=rf"{name}' has shape \(24, 72\).* \(72, 24\)"):
        load_pretrained(copy("gpt_neox", tensors={name: np.zeros((24, 72), np.float32)}))


@pytest.mark.parametrize("case, prefix", [("gpt2", "transformer."), ("opt", "model."), ("llama", "model.")])
def test_files_without_the_usual_prefix(case, prefix, copy, check):
    names = safetensors.numpy.load_file(FIXTURES / case / "model.safetensors")
    folder = copy(case, rename={name: name.removeprefix(prefix) for name in names})
    check(f"logits of transformers, {case}", deviation(load_pretrained(folder), case), TOLERANCE)


@pytest.mark.parametrize(
    "case, buffers",
    [
        ("gpt2", ["transformer.h.0.attn.bias", "h.1.attn.masked_bias"]),
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq"]),
        ("gpt_neox", ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.1.attention.rotary_emb.inv_freq"]),
    ],
)
def test_buffers_of_old_versions_are_ignored(case, buffers, copy, check):
    folder = copy(case, tensors={name: np.ones((1, 4), np.uint8) for name in buffers})
    check(f"logits of transformers, {case}", deviation(load_pretrained(folder), case), TOLERANCE)


@pytest.mark.parametrize("keep_embedding", [True, False])
def test_a_tied_head_may_be_stored_again_or_instead(keep_embedding, copy, check):
    embedding = "model.decoder.embed_tokens.weight"
    weight = safetensors.numpy.load_file(FIXTURES / "opt" / "model.safetensors")[embedding]
    changes = {"lm_head.weight": weight, embedding: weight if keep_embedding else None}
    model = load_pretrained(copy("opt", tensors=changes))
    check("logits of transformers, opt", deviation(model, "opt"), TOLERANCE)


def test_pickles_are_refused_with_advice(copy):
    folder = copy("llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin but no safetensors.*save_pretrained"):
        load_pretrained(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="neither model.safetensors nor"):
        load_pretrained(folder)


def test_broken_files_are_named(copy):
    folder = copy("llama")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match="model.safetensors: not a readable safetensors file"):
        load_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(CheckpointError, match=r"config.json: not valid JSON .*line 1"):
        load_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json: no such file"):
        load_pretrained(folder)


def test_shards_must_be_there_and_name_each_tensor_once(tmp_path, check):
    model = load_pretrained(FIXTURES / "llama")
    save_pretrained(model, tmp_path / "out", family="llama", shard_bytes=10_000)
    shards = sorted((tmp_path / "out").glob("model-*-of-*.safetensors"))
    assert len(shards) > 2 and shards[-1].name == f"model-{len(shards):05d}-of-{len(shards):05d}.safetensors"
    check("logits of transformers, llama", deviation(load_pretrained(tmp_path / "out"), "llama"), TOLERANCE)
    again = safetensors.numpy.load_file(shards[1]) | safetensors.numpy.load_file(shards[0])
    safetensors.numpy.save_file(again, shards[1])
    with pytest.raises(CheckpointError, match="is in this checkpoint twice"):
        load_pretrained(tmp_path / "out")
    shards[0].unlink()
    with pytest.raises(CheckpointError, match=shards[0].name):
        load_pretrained(tmp_path / "out")


def test_half_precision_files_and_parameters(tmp_path):
    model = load_pretrained(FIXTURES / "llama", dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(jnp.bfloat16)}
    save_pretrained(model, tmp_path / "out", family="llama")
    stored = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")[Q]
    exact = safetensors.numpy.load_file(FIXTURES / "llama" / "model.safetensors")[Q]
    np.testing.assert_array_equal(stored, exact.astype(ml_dtypes.bfloat16))
    assert load_pretrained(tmp_path / "out", dtype=None).embed.weight.dtype == jnp.bfloat16
    assert load_pretrained(tmp_path / "out").embed.weight.dtype == jnp.float32


def test_tensors_stream_through_place_one_at_a_time(tmp_path):
    cfg = ModelConfig(300, 64, 12, 4, 4, 16, 256, 32, 64, rotary_dim=16)
    model = jax.jit(lambda key: Transformer(cfg, key))(jax.random.key(0))
    save_pretrained(model, tmp_path / "out", family="llama")
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(tmp_path / "out"), model)
    shapes, sizes = {}, []

    def place(path: str, array: np.ndarray):
        shapes[path] = array.shape
        sizes.append(array.nbytes)
        return np.zeros(())  # JAX lets go of what it copied only at its next call: not what is measured here

    tracemalloc.start()
    load_pretrained(tmp_path / "out", place=place)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert shapes["blocks.attn.q"] == (12, 64, 64) and shapes["lm_head.weight"] == (300, 64)
    assert len(shapes) == len(sizes) == len(jax.tree.leaves(model))
    # The largest stacked array, a layer on its way into it, and what the interpreter itself takes.
    assert max(sizes) < peak < 1.1 * max(sizes) + 300_000 < sum(sizes) / 2


def test_export_appears_whole_or_not_at_all(tmp_path):
    model = load_pretrained(FIXTURES / "gpt2")
    with pytest.raises(FileNotFoundError):
        save_pretrained(model, tmp_path / "out", family="gpt2", tokenizer_files=[tmp_path / "absent.json"])
    assert not any(tmp_path.iterdir())
    tokens = tmp_path / "tokenizer.json"
    tokens.write_text("{}")
    save_pretrained(model, tmp_path / "out", family="gpt2", tokenizer_files=[tokens], token_ids={"eos_token_id": 3})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 3
    with pytest.raises(CheckpointError, match="not empty"):
        save_pretrained(model, tmp_path / "out", family="gpt2")


def test_an_export_cut_off_at_the_tokenizer_can_be_repeated(tmp_path, monkeypatch):
    """Weights alone would look finished, and the same command would refuse them as not empty."""
    words = tokenizer.load({"train_size": 300}, train_texts=["the same words again and again"] * 9)
    model, run = SimpleNamespace(path=str(FIXTURES / "gpt2"), revision=None), SimpleNamespace(model="m", seeds=(0,))
    study = SimpleNamespace(
        runs={"teacher": run}, config=SimpleNamespace(models={"m": model}), data=SimpleNamespace(tokenizer=words)
    )
    monkeypatch.setattr(experiment, "load_run", lambda *_: load_pretrained(FIXTURES / "gpt2"))
    out, real = tmp_path / "out", Path.write_text

    def stop(path, *arguments, **keywords):
        if path.name == "tokenizer_config.json":
            raise KeyboardInterrupt
        return real(path, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", stop)
        with pytest.raises(KeyboardInterrupt):
            experiment.export(study, "teacher", out)
    assert not any(tmp_path.iterdir()), "no folder"
    on_disk, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: on_disk.append(os.fstat(file).st_ino) or sync(file))
    monkeypatch.setattr(os, "replace", lambda *paths: on_disk.append("renamed") or replace(*paths))
    experiment.export(study, "teacher", out)
    names = {path.name for path in out.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert on_disk[-1] == "renamed" and {path.stat().st_ino for path in out.iterdir()} <= set(on_disk)
    again = tokenizer.load({"path": str(out)})
    assert (again.fingerprint, again.eos_id) == (words.fingerprint, words.eos_id)


def hub_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)  # their constructors want a whole HTTP response
    Exception.__init__(error, "from the hub")
    return error


@pytest.mark.parametrize(
    "kind, message",
    [
        (hub_errors.GatedRepoError, "is gated: accept its licence at https://huggingface.co/firm/model.*hf auth login"),
        (hub_errors.RepositoryNotFoundError, "no folder here, and no model on the hub"),
        (hub_errors.RevisionNotFoundError, r"firm/model \(revision main\): .* not this revision"),
        (hub_errors.HFValidationError, "neither a folder nor the id"),
        (hub_errors.LocalEntryNotFoundError, "hub does not answer; run `hf download firm/model`"),
        (hub_errors.HfHubHTTPError, "hub does not answer"),
        (ConnectionError, "hub does not answer"),
    ],
)
def test_hub_errors_say_what_to_do(kind, message, monkeypatch):
    def fail(*args, **kwargs):
        raise hub_error(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained("firm/model")


def test_hub_ids_take_a_revision_and_never_download_pickles(monkeypatch, copy, check):
    folder = copy("opt")
    asked = {}

    def download(repo_id, *, revision, allow_patterns):
        asked.update(repo_id=repo_id, revision=revision, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = load_pretrained("facebook/opt-125m", revision="refs/pr/9")
    check("logits of transformers, opt", deviation(model, "opt"), TOLERANCE)
    assert (asked["repo_id"], asked["revision"]) == ("facebook/opt-125m", "refs/pr/9")
    assert all(pattern.endswith(("json", "safetensors")) for pattern in asked["patterns"])
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"publishes no safetensors.*revision='refs/pr/<number>'"):
        load_pretrained("facebook/opt-125m")
    with pytest.raises(CheckpointError, match="only makes sense with a hub id"):
        load_pretrained(folder, revision="main")


def test_every_family_has_a_fixture():
    assert {family_of(case) for case in CASES} == set(FAMILIES)
