"""The plan of a config: what is compiled, counted, refused, and where each fact is from."""

import functools
import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import base, gpt2_kd, llama2_kd, opt_kd, quickstart
from kd_jax import families
from kd_jax.errors import ConfigError
from kd_jax.plan import chips, compiled, count, disk, hours, plan, programs, sketch
from kd_jax.plan.published import PUBLISHED
from kd_jax.transformer import Transformer

GIB = 2.0**30
SMALL = dict(
    model_type="llama", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, vocab_size=256,
    intermediate_size=160, max_position_embeddings=128, num_hidden_layers=1, tie_word_embeddings=False,
)  # fmt: skip
ALL_PAPER_CONFIGS = [
    *((gpt2_kd, v) for v in ("large", "medium", "base", "large,zhang2025", "medium,zhang2025", "base,zhang2025")),
    *((opt_kd, v) for v in ("1.3b", "350m", "125m", "1.3b,zhang2025", "350m,zhang2025", "125m,zhang2025")),
    *((llama2_kd, v) for v in ("", "openllama", "openllama,zhang2025")),
]


def small_config(**mesh) -> ConfigDict:
    """The quickstart's graph, cut to two rows of 64 tokens."""
    config = quickstart.get_config()
    config.tokenizer.train_size = 320
    config.data.update(max_length=64, row_length=64, max_prompt=32)
    config.models.teacher.scratch = dict(model_type="gpt2", n_embd=32, n_layer=2, n_head=2)
    config.models.student.scratch = dict(model_type="gpt2", n_embd=16, n_layer=2, n_head=2)
    config.mesh.update(**mesh)
    for recipe in config.recipes.values():
        recipe.update(batch_rows=8, lr_grid=())
    config.score.batch_rows = 8
    keep = ("base_teacher", "base_student", "teacher", "students/kd")
    config.runs = ConfigDict({name: config.runs[name] for name in keep})
    return config


def cfg(**changes):
    return families.config_from_hf(SMALL | changes)


def batch(rows, time):
    ints = {k: jnp.ones((rows, time), jnp.int32) for k in ("tokens", "segment_ids")}
    return ints | {"positions": jnp.broadcast_to(jnp.arange(time), (rows, time))}


# ----------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("layers", [1, 3])
def test_products_of_a_forward_pass_are_those_of_its_formula(layers, check, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")  # the CPU's attention skips what is masked
    shape = cfg(num_hidden_layers=layers)
    model = jax.eval_shape(functools.partial(Transformer, shape), jax.random.key(0))
    jaxpr = jax.make_jaxpr(lambda m, b: m.hidden(b["tokens"], b["segment_ids"], b["positions"]))(model, batch(2, 48))
    wanted = count.forward_flops(shape, tokens=96, scored=0, time=48, vocab=256)
    check("plan: FLOPs of a forward pass, formula against program", abs(count.flops(jaxpr) / wanted - 1), 1e-12)


def test_products_are_what_xla_counts_where_no_loop_hides_them(check, monkeypatch):
    """A scan of length 1 runs its body once, which is how XLA counts every scan."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    shape = cfg(hidden_size=256, intermediate_size=1024, num_attention_heads=4, num_key_value_heads=4)

    model = jax.eval_shape(functools.partial(Transformer, shape), jax.random.key(0))
    one = lambda m, b: m.hidden(b["tokens"], b["segment_ids"], b["positions"])
    found = jax.jit(one).lower(model, batch(2, 64)).cost_analysis()["flops"]
    ours = count.flops(jax.make_jaxpr(one)(model, batch(2, 64)))
    # XLA adds norms, softmax and activations to the products: about 1 % at this width
    check("plan: FLOPs of one layer, XLA's count over ours - 1", found / ours - 1, 0.02)
    assert found >= ours


def test_a_training_step_is_three_forward_passes_and_what_is_recomputed(check, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    shape, tokens = cfg(num_hidden_layers=3), 96
    model = jax.eval_shape(functools.partial(Transformer, shape), jax.random.key(0))

    def loss(m, b):
        return m.hidden(b["tokens"], b["segment_ids"], b["positions"], remat=True).sum()

    executed = count.flops(jax.make_jaxpr(jax.grad(loss))(model, batch(2, 48)))
    needed = count.model_flops(shape, None, tokens=tokens, scored=0, time=48, vocab=256)
    once = count.forward_flops(shape, tokens, 0, 48, 256)
    # remat runs the forward pass once more, but for the last product of a layer, whose result nothing in it needs
    last = 3 * 2.0 * shape.mlp * shape.width * tokens
    deviation = abs(executed / (needed + once - last) - 1)
    check("plan: FLOPs of a step with remat, formula against program", deviation, 1e-12)


def test_parameters_of_published_shapes_are_those_on_their_model_cards():
    billions = {
        "gpt2": 0.124, "gpt2-medium": 0.355, "gpt2-large": 0.774, "gpt2-xl": 1.558, "facebook/opt-125m": 0.125,
        "facebook/opt-350m": 0.331, "facebook/opt-1.3b": 1.316, "facebook/opt-2.7b": 2.652,
        "meta-llama/Llama-2-7b-hf": 6.738, "TinyLlama/TinyLlama_v1.1": 1.100, "openlm-research/open_llama_7b": 6.738,
        "openlm-research/open_llama_3b": 3.427,
    }  # fmt: skip
    assert set(billions) == set(PUBLISHED)
    for name, wanted in billions.items():
        keys = {k: v for k, v in PUBLISHED[name].items() if k != "tokenizer"}
        model = jax.eval_shape(functools.partial(Transformer, families.config_from_hf(keys)), jax.random.key(0))
        found = sum(math.prod(x.shape) for x in jax.tree.leaves(model)) / 1e9
        assert round(found, 3) == pytest.approx(wanted, abs=0.0011), name


# ------------------------------------------------------------------------------------------------------------ plans


def test_a_plan_on_the_host_prints_every_program(capsys, tmp_path, check):
    config = small_config(data=1, fsdp=4, tensor=2)
    plan.run(config, str(tmp_path))
    text = capsys.readouterr().out
    for word in ("train teacher", "train students/kd", "score base_student", "all-gather", "Files, at most", "scratch"):
        assert word in text, word
    assert not list(tmp_path.iterdir()), "a plan writes nothing"


def test_arguments_per_chip_are_the_compilers(check):
    config = small_config(data=1, fsdp=4, tensor=2)
    found, mesh = sketch.sketch(config), sketch.make_mesh(config, jax.devices())
    program = programs.all_programs(found, mesh, "cpu")[1][0]
    assert program.runs == ("students/kd",)
    (figures,) = compiled.compile_chain([program], mesh, chips.Topology("host"))
    ours = programs.chip_bytes(program.arguments)
    check("plan: argument bytes per chip, ours against the compiler's", abs(ours - figures.arguments), 64)
    assert figures.temporaries > 0 and figures.flop > 0 and figures.moved > 0


def test_gpus_are_estimated_on_virtual_devices(capsys, tmp_path):
    plan.run(small_config(data=2, fsdp=4), str(tmp_path), ["gpu:8"])
    text = capsys.readouterr().out
    assert "ESTIMATE" in text and "hours" in text and "H100" in text


def test_more_virtual_devices_than_there_are_are_planned_elsewhere():
    config = small_config(data=1, fsdp=16)
    for recipe in config.recipes.values():
        recipe.batch_rows = 16
    config.runs = ConfigDict({name: config.runs[name] for name in ("base_teacher", "teacher")})
    made = plan.make(config, chips.Topology("h200:16"))
    assert made.mesh == {"data": 1, "fsdp": 16, "tensor": 1} and made.verdict == "passes" and made.hours > 0


def test_what_does_not_fit_is_refused_with_its_reason_and_a_remedy(monkeypatch, capsys, tmp_path):
    """A chip of 5 MB: the state of AdamW fits when it is split over 8 devices, not when every device has all."""
    tiny = chips.Chip("tiny", 5e6, 1e9, 1e12, 1e9)
    monkeypatch.setitem(chips.CHIPS, "h100", tiny)
    config = small_config(data=8)
    config.models.teacher.scratch.update(n_embd=128)
    config.runs = ConfigDict({name: config.runs[name] for name in ("base_teacher", "teacher")})
    with pytest.raises(ConfigError, match="train teacher needs") as refused:
        plan.run(config, str(tmp_path), ["gpu:8"])
    message = str(refused.value)
    assert "too much" in message and "bytes" in message and "state." in message
    assert "--config.mesh.data=1 --config.mesh.fsdp=8" in message
    assert "REFUSED" in capsys.readouterr().out, "the table is printed first"
    config.mesh.update(data=1, fsdp=8)
    assert plan.make(config, chips.Topology("gpu:8"), kinds=("train",)).verdict == "passes"


def test_sampling_is_planned_as_a_chain():
    config = small_config(data=1, fsdp=8)
    config.objectives.seqkd = base.objective("seqkd", max_new_tokens=16)
    config.runs["students/kd"].update(technique="seqkd")
    made = plan.make(config, chips.Topology("host"), kinds=("prepare",))
    assert [f.kind for f in made.figures] == ["prepare", "prefill", "decode"]
    assert all(f.peak > 0 and not f.fault for f in made.figures)


def test_rows_that_do_not_divide_are_refused_with_what_would_do():
    config = llama2_kd.get_config()
    config.recipes.kd.batch_rows = 12
    with pytest.raises(ConfigError, match="recipes.kd: 12 rows.*mesh.tensor to 2"):
        mesh = jax.sharding.AbstractMesh((1, 8, 1), ("data", "fsdp", "tensor"))
        sketch.check_rows(sketch.sketch(config), mesh)


@pytest.mark.parametrize("module,variant", ALL_PAPER_CONFIGS)
def test_every_paper_config_is_sketched_without_hub_or_data(module, variant):
    config = module.get_config(*([variant] if variant else []))
    if variant.endswith("zhang2025"):
        config.data.lm.path = "text.jsonl"
    found = sketch.sketch(config)
    assert found.records == 15_011
    assert all("published" in shape.source for shape in found.shapes.values())
    steps = found.steps(found.runs["students/kd"])
    recipe = found.recipe(found.runs["students/kd"])
    assert steps == math.ceil(recipe.epochs * math.ceil(15_011 * 0.25) / recipe.batch_rows)
    assert sum(disk.needs(found).values()) > 1e9


def test_an_unknown_model_or_topology_is_refused_in_words(monkeypatch):
    config = llama2_kd.get_config()
    config.models.teacher.path = "nobody/has-this"
    with pytest.raises(ConfigError, match="models.teacher: nobody/has-this"):
        sketch.sketch(config)
    with pytest.raises(ConfigError, match="v5p:AxBxC"):
        chips.Topology("v5p:4x4")


def test_a_folder_needs_no_more_than_its_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    config = small_config()
    config.models.teacher.path = str(tmp_path)
    found = sketch.sketch(config)
    assert found.shapes["teacher"].cfg == cfg() and str(tmp_path) in found.shapes["teacher"].source


# ---------------------------------------------------------------------------------------------------------- storage


def test_bytes_of_caches_and_tables():
    tokens = 1_000_000 * 256
    assert tokens * disk.cache_token_bytes("exact", "bfloat16", 0, 5120) == 2_621_440_000_000  # 2.6 TB
    assert tokens * disk.cache_token_bytes("top_k", "float32", 64, 5120) == tokens * 64 * 8
    full = tokens * disk.score_token_bytes((0.5, 2.0), (10, 40), (0.9,))
    assert 19e9 < full < 22e9  # about 20 GB
    assert disk.score_token_bytes((), (), ()) == 4 + 1 + 9 * 4


def test_files_that_do_not_fit_the_disk_are_refused():
    with pytest.raises(ConfigError, match="writes up to 3000.0 GB, most of it teacher caches.*cache_dtype"):
        disk.check({"teacher caches": 2.9e12, "score tables": 0.1e12}, int(1e12), "runs/x")
    disk.check({"teacher caches": 2.9e12}, None, "gs://bucket/x")
    assert disk.free("gs://bucket/x") is None and disk.free("/nowhere/at/all") > 0


def test_checkpoints_are_counted_as_they_are_written():
    found = sketch.sketch(small_config())
    run = found.runs["students/kd"]
    model = jax.eval_shape(functools.partial(Transformer, found.shapes["student"].cfg), jax.random.key(0))
    weights = sum(4 * math.prod(x.shape) for x in jax.tree.leaves(model))
    assert disk._checkpoint_bytes(found, run) == 7 * weights  # 2 x (weights, two moments), and the result


# ------------------------------------------------------------------------------------------------------------ hours


def test_hours_follow_from_the_slower_of_roofline_and_stated_share():
    found = sketch.sketch(small_config())
    chip = chips.Chip("c", GIB, 1e9, 1e12, 1e9)
    figure = compiled.Figures("train", "t", ("students/kd",), 0.0, 0.0, flop=1e9, moved=5e6, tokens=512, rows=8)
    (pace,) = hours.paces(found, [figure], chip, 4)
    assert pace.bound == "memory" and pace.step_seconds == pytest.approx(5e-3)
    assert pace.hours == pytest.approx(pace.steps * 5e-3 / 3600)
    slow = ConfigDict(dict(mfu=1e-6))
    config = small_config()
    config.plan = slow
    (pace,) = hours.paces(sketch.sketch(config), [figure], chip, 4)
    run = found.runs["students/kd"]
    assert pace.bound == "mfu" and pace.step_seconds == pytest.approx(hours.step_flops(found, run) / (4 * 1e12 * 1e-6))


# -------------------------------------------------------------------------------------------------------------- TPU


def test_an_out_of_memory_message_is_read_and_other_faults_are_not():
    hbm = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (16.38G) exceeds "
    )
    assert compiled.out_of_memory(hbm + "available HBM (15.75G).") == 16.38 * GIB
    older = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Used 20.1G of 15.75G hbm."
    assert compiled.out_of_memory(older) == 20.1 * GIB
    assert compiled.out_of_memory("INTERNAL: Mosaic failed to compile") is None


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu: pip install -r requirements-tpu.txt")
def test_a_tpu_plan_is_the_tpus_own(capsys, tmp_path):
    config = small_config(data=1, fsdp=2, tensor=2)
    plan.run(config, str(tmp_path), ["v5e:2x2"])
    text = capsys.readouterr().out
    assert "v5e:2x2: 4 devices (TPU v5e, 15.75 GiB for programs)" in text and "hours" in text
    assert np.isfinite([float(line.split()[-1]) for line in text.splitlines() if line.startswith("students/kd ")]).all()
