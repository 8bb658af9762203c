"""The plan of a config: what is compiled, counted, refused, and where each fact is from."""

import dataclasses
import functools
import importlib.util
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import base, gpt2_kd, llama2_kd, opt_kd, quickstart
from kd_jax import families, pairs, score, sharding, storage
from kd_jax.data.encode import Encoded
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
    found, mesh = sketch.sketch(config), sharding.make_mesh(**config.mesh)
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


def test_checkpoints_are_counted_as_they_are_written():
    found = sketch.sketch(small_config())
    run = found.runs["students/kd"]
    model = jax.eval_shape(functools.partial(Transformer, found.shapes["student"].cfg), jax.random.key(0))
    weights = sum(4 * math.prod(x.shape) for x in jax.tree.leaves(model))
    assert disk._checkpoint_bytes(found, run) == 7 * weights  # 2 x (weights, two moments), and the result


def test_a_third_checkpoint_exists_while_it_is_written():
    found = sketch.sketch(small_config())
    trained = [run for run in found.runs.values() if run.train_roles]
    without = sum(disk._checkpoint_bytes(found, run) for run in trained)
    state = max(3 * disk._sizes(found, run)[0] for run in trained)
    assert disk.needs(found)["checkpoints"] == without + state


def test_a_grid_is_searched_once_and_keeps_a_folder_for_every_rate():
    config = quickstart.get_config()
    config.recipes.matched.lr_grid = (1e-3, 2e-3, 3e-3)
    for run in config.runs.values():
        run.seeds = (0, 1)
    found = sketch.sketch(config)
    assert (found.fits(found.runs["teacher"]), disk._folders(found, found.runs["teacher"])) == (4, 5)
    assert (found.fits(found.runs["swap"]), disk._folders(found, found.runs["swap"])) == (2, 2)


def test_every_table_of_the_score_stage_is_counted():
    """By hand: 41 bytes a scored token, 75 of them a record, 64 bytes a row, 1.6 for Parquet; 5 runs with seeds."""
    config = small_config()
    config.data.canaries.per_cell = 2
    config.data.synthetic.records = 1000
    config.score.roles = ("private", "dev", "canary")
    config.runs["students/kd"].seeds = (0, 1)
    scored = 350 + 130 + 2 * 4 * 3
    one = scored * (64 + 75 * (4 + 1 + 9 * 4))
    bytes_of = lambda: disk.needs(sketch.sketch(config))
    tables = lambda: pytest.approx(bytes_of()["score tables"] / 1.6)
    assert tables() == 5 * one and bytes_of()["trajectory"] == 0
    config.score.variants = ("neighbours", "recall")
    assert tables() == 5 * (1 + 10 + 1) * one
    config.score.variants = ("lowercase",)
    assert tables() == 5 * (2 * one + scored * 75 * 41 / 2)
    config.score.variants, config.score.pairs = (), ("students", "teacher:base_student")
    assert tables() == 5 * one + (2 + 1) * scored * (64 + 75 * (4 + 1 + 3 * 4 + 2))
    config.score.pairs, config.score.trajectory = (), 3
    found = sketch.sketch(config)
    weights = {name: disk._sizes(found, found.runs[name])[0] for name in ("teacher", "students/kd")}
    assert bytes_of()["trajectory"] == 3 * (weights["teacher"] + 2 * weights["students/kd"])
    assert tables() == 5 * one + 3 * 3 * one
    config.score.pairs = ("teacher:nobody",)
    with pytest.raises(ConfigError, match="score.pairs"):
        bytes_of()


@pytest.mark.parametrize("kind", ["score", "pair"])
def test_files_are_no_larger_than_their_bound(kind, tmp_path, check):
    """Tables of random numbers, which do not compress, as many as a dictionary of Parquet's holds."""
    rng, n, each = np.random.default_rng(0), 3480, 75
    ids = np.array([f"{i:016x}" for i in rng.integers(2**60, size=n)], object)
    sizes = np.full(n, 300, np.int32)
    offsets = np.arange(n + 1) * (each + 1)
    encoded = Encoded(ids, ids, ids, np.zeros(offsets[-1], np.int32), offsets, np.ones(offsets[-1]), sizes, sizes, {})
    whole, names = n * each, score.FIELDS if kind == "score" else tuple(pairs.PAIR_FIELDS)
    random = {name: rng.normal(size=whole).astype(np.float32) for name in names}
    integer = {name: rng.integers(2**31, size=whole) for name in ("target_id", "rank", "ties", "top1_id")}
    truth = {name: rng.random(whole) < 0.5 for name in ("agree", "hit_b")}
    known = {k: v for k, v in (integer | truth).items() if k in random or k == "target_id"}
    fields = random | known | {"segment": np.ones(whole, np.int8)}
    make = score.table if kind == "score" else pairs.table
    rows = make(encoded, np.arange(n), "private", np.full(n, each), fields)
    storage.write_parquet(tmp_path / "t.parquet", rows, {})
    token = disk.score_token_bytes((), (), ()) if kind == "score" else disk.pair_token_bytes()
    bound = disk.PARQUET * n * (disk.ROW_BYTES + each * token)
    size = (tmp_path / "t.parquet").stat().st_size
    check("plan: bytes of a table of random numbers over their bound", size / bound, 1)


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


def sampling_figures(name: str) -> list[compiled.Figures]:
    """Steps of 1 s, weights made ready in 2 s, prompts read in 3 s, 4 s for the 8 tokens of a segment, for 8 rows."""
    seconds = {"train": (1, 1), "prepare": (2, 1), "prefill": (3, 1), "decode": (4, 8)}
    about = dict(label="", runs=(name,), arguments=0.0, resident=0.0, rows=8)
    return [compiled.Figures(kind, moved=1e9 * s, chunks=n, **about) for kind, (s, n) in seconds.items()]


@pytest.mark.parametrize(
    "technique,changes,each",
    [
        ("gkd", dict(lmbda=0.25), 0.25 * (2 + 3 + 16 * 4 / 8)),
        ("distillm", {}, 2 + 3 + 16 * 4 / 8),
        # 32 samples of one call serve 4 batches of 8, two times
        ("minillm", dict(rollouts=32, passes=2), 2 / 8 + (3 + 16 * 4 / 8) / 2),
    ],
)
def test_hours_hold_what_every_call_of_the_sampler_makes_ready(technique, changes, each):
    config = small_config()
    config.objectives[technique] = base.objective(technique, max_new_tokens=16, **changes)
    config.runs["students/kd"].technique = technique
    chip = chips.Chip("c", GIB, 1e9, 1e30, 1e9)
    (pace,) = hours.paces(sketch.sketch(config), sampling_figures("students/kd"), chip, 1)
    assert pace.hours * 3600 == pytest.approx(pace.steps * (1 + each))


def test_teacher_text_is_made_ready_for_every_shard():
    config = small_config()
    config.objectives.seqkd = base.objective("seqkd", max_new_tokens=16)
    config.runs["students/kd"].technique = "seqkd"
    chip, found = chips.Chip("c", GIB, 1e9, 1e30, 1e9), sketch.sketch(config)
    (pace,) = hours.paces(found, sampling_figures("students/kd"), chip, 1)
    examples = found.examples(found.runs["students/kd"].train_roles)
    text = math.ceil(examples / 1024) * 2 + math.ceil(examples / 8) * (3 + 16 * 4 / 8)
    assert pace.hours * 3600 == pytest.approx(pace.steps + text)


def test_hours_hold_the_scoring_of_runs_that_are_not_trained():
    config = small_config()
    config.score.variants = ("neighbours",)
    found, chip = sketch.sketch(config), chips.Chip("c", GIB, 1e9, 1e30, 1e9)
    figure = compiled.Figures("score", "s", ("base_student", "teacher"), 0.0, 0.0, moved=1e9, rows=8)
    (pace,) = hours.paces(found, [figure], chip, 1)
    batches = math.ceil(found.rows(found.scored_examples(), packed=True) / 8)
    assert (pace.run, pace.steps, pace.hours * 3600) == ("base_student", 0, pytest.approx(batches * 11))
    kept = plan.Plan("h100:8", {"data": 8, "fsdp": 1, "tensor": 1}, [figure], [], [], [])
    made = plan.timed(plan.from_json(json.loads(json.dumps(dataclasses.asdict(kept)))), found)
    assert [p.run for p in made.paces] == ["base_student"]
    (line,) = [line for line in plan.table(made, found).splitlines() if line.startswith("base_student ")]
    assert line.split()[1:5] == ["-"] * 4, "a run without training has no step"


# ------------------------------------------------------------------------------------------------------------ chips


@pytest.mark.parametrize(
    "kind,chip",
    [
        ("TPU v4", "TPU v4"), ("TPU v5 lite", "TPU v5e"), ("TPU v5e", "TPU v5e"), ("TPU v5", "TPU v5p"),
        ("TPU v5p", "TPU v5p"), ("TPU v6 lite", "TPU v6e"), ("TPU v6e", "TPU v6e"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"), ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"), ("NVIDIA H200", "H200 SXM"),
        ("NVIDIA GH200 480GB", None), ("NVIDIA H100 PCIe", None), ("TPU v4 lite", None), ("TPU7x", None), ("cpu", None),
    ],
)  # fmt: skip
def test_a_hosts_chip_is_known_by_its_whole_name(kind, chip, monkeypatch):
    here = types.SimpleNamespace(device_kind=kind, memory_stats=lambda: None)
    monkeypatch.setattr(jax, "local_devices", lambda: [here])
    found = chips.Topology("host").chip
    assert found is None if chip is None else found.name == chip and found.hbm > 10 * GIB


def test_a_hosts_memory_is_what_the_device_says(monkeypatch):
    stats = {"bytes_limit": 12 * 2**30, "bytes_in_use": 5}
    here = types.SimpleNamespace(device_kind="NVIDIA H200", memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "local_devices", lambda: [here])
    found = chips.Topology("host").chip
    assert found.hbm == 12 * GIB and found.peak == chips.CHIPS["h200"].peak and chips.CHIPS["h200"].hbm > 90e9


@pytest.mark.parametrize(
    "backend,topology,wanted",
    [
        ("tpu", "host", (1, 3, 6)), ("gpu", "host", (2, 2, 16)), ("cpu", "host", (1, 1, 1)),
        ("cpu", "v5e:2x2", (1, 3, 6)), ("cpu", "gpu:8", (2, 2, 16)), ("gpu", "h200:8", (2, 2, 16)),
    ],
)  # fmt: skip
def test_what_a_product_of_float32_costs_is_the_platforms(backend, topology, wanted, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    costs = lambda **about: compiled._products(types.SimpleNamespace(**about), chips.Topology(topology))
    assert tuple(costs(float32=True, precision=p) for p in ("default", "high", "highest")) == wanted
    assert costs(float32=False, precision="highest") == 1


def test_gpus_are_not_virtual_where_real_ones_are(monkeypatch):
    """On a host with accelerators, virtual devices are those of another process, however many real ones there are."""
    asked = []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(plan, "_elsewhere", lambda config, topology, *_: asked.append(topology.name))
    plan.make(small_config(data=8), chips.Topology("gpu:8"))
    assert asked == ["gpu:8"]


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
