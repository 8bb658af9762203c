"""The paper-size configs as they are, on small random folders of the same architectures: load, train, score, report."""

import json

import jax
import pandas as pd
import pytest
from ml_collections import ConfigDict

import attacks.audit
import attacks.report
from configs import gpt2_kd, llama2_kd, opt_kd
from kd_jax import experiment, hf, sharding, tables
from kd_jax.data import synthetic, tokenizer
from kd_jax.runs import train_runs
from kd_jax.study import open_study
from kd_jax.transformer import Transformer

GPT2 = dict(model_type="gpt2", n_embd=32, n_layer=2, n_head=2, n_positions=512)
OPT = dict(
    model_type="opt", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64, word_embed_proj_dim=32,
    do_layer_norm_before=True, max_position_embeddings=512, activation_function="relu",
)  # fmt: skip
LLAMA = dict(
    model_type="llama", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
    intermediate_size=64, max_position_embeddings=512, rms_norm_eps=1e-5, hidden_act="silu", tie_word_embeddings=False,
)  # fmt: skip
SMALL_LLAMA = LLAMA | {"num_key_value_heads": 2, "hidden_size": 16}
# The last one: LoRA, plain text, rollouts and student samples by a paper's own recipes.
CASES = {
    "gpt2": (gpt2_kd.get_config, "medium", GPT2, GPT2 | {"n_embd": 16}, ("kd",)),
    "opt": (opt_kd.get_config, "350m", OPT, OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}, ("kd",)),
    "llama2": (llama2_kd.get_config, "", LLAMA, SMALL_LLAMA, ("kd",)),
    "zhang2025": (llama2_kd.get_config, "openllama,zhang2025", LLAMA, SMALL_LLAMA, ("kd", "gkd", "minillm")),
}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "records.jsonl"
    rows = synthetic.generate(360, overlap=1.0, seed=0).itertuples()
    keys = ("instruction", "context", "response", "category")
    path.write_text("\n".join(json.dumps(dict(zip(keys, (r.instruction, r.input, r.response, r.task)))) for r in rows))
    return path


def folder(path, config: dict, family: str):
    """A checkpoint folder with a tokenizer, its vocabulary padded as published models pad theirs."""
    texts = synthetic.generate(200, overlap=1.0, seed=1).response
    tok = tokenizer.load(
        {"train_size": 380, "bos": "<|endoftext|>"} if family != "gpt2" else {"train_size": 380}, train_texts=texts
    )
    padded = -(-tok.vocab_size // 64) * 64
    model = Transformer(hf.config_from_hf(config | {"vocab_size": padded}), jax.random.key(len(str(path))))
    hf.save_pretrained(model, path, family=family)
    tok.save(path)
    return path


@pytest.mark.parametrize("case", CASES)
def test_a_paper_config_runs_to_its_report(case, records, tmp_path):
    get_config, variant, teacher, student, techniques = CASES[case]
    config = get_config(variant)
    family = teacher["model_type"]
    config.models.teacher.path = str(folder(tmp_path / "teacher", teacher, family))
    config.models.student.path = str(folder(tmp_path / "student", student, family))
    config.data.path, config.data.max_prompt, config.data.max_length = str(records), 200, 256
    for recipe in config.recipes.values():
        recipe.update(epochs=1, evaluations=1, checkpoints=1, steps=min(recipe.steps, 6))
        recipe.warmup_steps = min(recipe.warmup_steps, 2)
    (tmp_path / "prose.txt").write_text("\n".join(f"The {n}th mill stood by the river." for n in range(300)))
    config.data.lm.update(path=str(tmp_path / "prose.txt"), text_unit="line")
    for objective in config.objectives.values():
        objective.update(rollouts=32, max_new_tokens=16)
    runs = ("base_teacher", "base_student", "teacher", "null", *(f"students/{name}" for name in techniques))
    config.runs = ConfigDict({name: config.runs[name] for name in runs})
    config.probe.examples, config.attack.bootstrap = 20, 50
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        study = open_study(config, tmp_path / "work", mesh)
        assert study.vocab < hf.read_config(config.models.teacher.path).vocab_size, "padding rows are cut off"
        train_runs(study)
        tables.score_runs(study)
    attacks.audit.audit(tmp_path / "work/scores", tmp_path / "work/report", experiment.audit_settings(study))
    page = attacks.report.build(tmp_path / "work/report").read_text()
    assert config.title in page
    table = pd.read_csv(tmp_path / "work/report/membership.csv", keep_default_na=False, na_values=[""])
    auc = table[(table.metric == "auc") & (table.task == "all") & (table.attack == "loss")].set_index("model").value
    assert set(auc.index) == set(runs) and auc.between(0, 1).all()
    utility = pd.read_csv(tmp_path / "work/report/utility.csv", keep_default_na=False, na_values=[""])
    loss = utility[utility.measure == "dev_loss"].set_index("model").value
    assert loss["teacher"] < loss["base_teacher"], "one epoch at the paper's learning rate moves the loss down"
