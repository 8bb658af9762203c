"""The training step: what it must not depend on, and exact resume."""

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kd_jax import checkpoint, loop, lora, optim, sharding, train
from kd_jax.distill import feeds
from kd_jax.distill.objective import PRESETS
from kd_jax.transformer import ModelConfig, Transformer

VOCAB = 64


def model_config(width=32, **changes) -> ModelConfig:
    sizes = dict(vocab_size=VOCAB, width=width, layers=2, heads=4, kv_heads=4, head_dim=width // 4, mlp=2 * width)
    return ModelConfig(**sizes, max_positions=16, embed_dim=width, rotary_dim=width // 4, **changes)


def batch(rows=8, length=16, seed=0) -> dict[str, np.ndarray]:
    """Two records a row, the second one shorter, prompts of three tokens."""
    rng = np.random.default_rng(seed)
    positions = np.concatenate([np.arange(10), np.arange(length - 10)])
    segments = np.repeat([1, 2], [10, length - 10])
    mask = (positions >= 3) & (np.arange(length) != 9) & (np.arange(length) != length - 1)
    example = np.arange(rows)[:, None] * 2 + (segments - 1)
    return dict(
        example=example.astype(np.int32),
        tokens=rng.integers(0, VOCAB, (rows, length)).astype(np.int32),
        targets=rng.integers(0, VOCAB, (rows, length)).astype(np.int32),
        segment_ids=np.tile(segments, (rows, 1)).astype(np.int32),
        positions=np.tile(positions, (rows, 1)).astype(np.int32),
        loss_mask=np.tile(mask, (rows, 1)) & (rng.random((rows, 1)) < 0.8),
    )


RECIPE = train.Recipe(lr=1e-2, batch_rows=8, chunk=8)
OBJECTIVE = PRESETS["cui"]  # kd_ratio 0.5, T = 2


def micro_batches(data, accumulation=1) -> dict[str, np.ndarray]:
    return feeds.split_rows(data | {"ce_mask": data["loss_mask"]}, len(data["tokens"]) // accumulation)


def one_step(recipe, data, mesh=None, teacher=True):
    """Metrics and updated parameters (flat, on the host) of one step from fixed models."""
    mesh = mesh or sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        tx = optim.optimizer(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01, clip=1.0)
        place = lambda m: jax.device_put(m, sharding.shardings(m, mesh))
        student, taught_by = place(Transformer(model_config(), jax.random.key(0))), None
        if teacher:
            taught_by = place(Transformer(model_config(width=48), jax.random.key(1)))
        student, frozen = lora.split(student)
        state = loop.init_state(student, tx, jax.random.key(2), mesh)
        step = jax.jit(train.make_train_step(tx, recipe, OBJECTIVE, VOCAB, teacher))
        placed = sharding.place_batch(micro_batches(data, recipe.accumulation), mesh, leading=1)
        state, metrics = step(state, frozen, taught_by, placed, None, recipe.lr)
        return jax.device_get(metrics), dict(
            zip(sharding.names(state.model), jax.device_get(jax.tree.leaves(state.model)))
        )


@functools.cache
def reference():
    """The step that all invariances are held against: one device, one micro-batch."""
    return one_step(RECIPE, batch())


def worst(a: dict, b: dict) -> float:
    return max(float(np.abs(a[k] - b[k]).max()) for k in a)


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_micro_batch_split_changes_nothing(accumulation, check):
    """Token counts differ between micro-batches; the denominator is the step's."""
    data = batch()
    want, want_model = reference()
    got, got_model = one_step(dataclasses.replace(RECIPE, accumulation=accumulation), data)
    assert got["tokens"] == want["tokens"] == data["loss_mask"].sum()
    check("loss vs micro-batch split", abs(got["loss"] - want["loss"]), 1e-6)
    check("gradient norm vs micro-batch split", abs(got["gradient_norm"] - want["gradient_norm"]), 1e-5)
    check("parameters after a step vs micro-batch split", worst(want_model, got_model), 1e-4)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_mesh_changes_nothing(shape, check):
    data = batch()
    want, want_model = reference()
    got, got_model = one_step(RECIPE, data, sharding.make_mesh(*shape))
    check("loss on 8 devices vs 1", abs(got["loss"] - want["loss"]), 1e-6)
    check("gradient norm on 8 devices vs 1", abs(got["gradient_norm"] - want["gradient_norm"]), 1e-5)
    check("parameters after a step on 8 devices vs 1", worst(want_model, got_model), 1e-4)


def test_what_is_masked_out_changes_nothing():
    """Targets at masked positions, and whole padding rows, leave loss and update bit for bit the same."""
    data = batch()
    want, want_model = reference()
    data["targets"] = np.where(data["loss_mask"], data["targets"], (data["targets"] + 1) % VOCAB).astype(np.int32)
    got, got_model = one_step(RECIPE, data)
    assert got["loss"] == want["loss"] and worst(want_model, got_model) == 0.0


def test_an_all_masked_batch_is_finite_and_has_no_loss():
    data = batch()
    data["loss_mask"][:] = False
    metrics, model = one_step(RECIPE, data)
    assert metrics["loss"] == 0 and metrics["gradient_norm"] == 0
    assert all(np.isfinite(x).all() for x in model.values())


def test_row_order_changes_nothing(check):
    data = batch()
    order = np.random.default_rng(3).permutation(8)
    want, _ = reference()
    got, _ = one_step(RECIPE, {k: v[order] for k, v in data.items()})
    check("loss vs row order", abs(got["loss"] - want["loss"]), 1e-6)


def test_the_loss_is_its_formula(check):
    """kd_ratio T^2 KL + (1 - kd_ratio) CE over response tokens, from float64 logits of both models."""
    data = batch()
    got, _ = reference()
    student, teacher = (
        Transformer(model_config(), jax.random.key(0)),
        Transformer(model_config(width=48), jax.random.key(1)),
    )
    where = [jnp.asarray(data[k]) for k in ("tokens", "segment_ids", "positions")]
    logits = [
        np.asarray(m.hidden(*where), np.float64) @ np.asarray(m.head().weight, np.float64).T for m in (student, teacher)
    ]
    log_softmax = lambda z: (
        z - z.max(-1, keepdims=True) - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True))
    )
    mask = data["loss_mask"]
    ce = -np.take_along_axis(log_softmax(logits[0]), data["targets"][..., None], -1)[..., 0][mask].mean()
    logq, logp = log_softmax(logits[0] / 2), log_softmax(logits[1] / 2)
    kd = (np.exp(logp) * (logp - logq)).sum(-1)[mask].mean()
    check("training loss vs its formula in float64", abs(got["loss"] - (0.5 * ce + 0.5 * 4 * kd)), 1e-5)
    check("training loss vs its formula in float64", abs(got["ce"] - ce), 1e-5)
    check("training loss vs its formula in float64", abs(got["kd"] - kd), 1e-5)


def test_bfloat16_compute_stays_near_float32_and_keeps_float32_masters():
    want, _ = reference()
    got, model = one_step(dataclasses.replace(RECIPE, compute_dtype="bfloat16", remat=True), batch())
    assert abs(got["loss"] - want["loss"]) < 2e-2
    assert {x.dtype for x in model.values()} == {np.dtype("float32")}


def test_a_step_teaches(check):
    """Distilling from a teacher on fixed tokens moves the divergence towards 0."""
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        tx = optim.optimizer(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip=0.0)
        teacher = jax.tree.map(lambda x: 5 * x, Transformer(model_config(), jax.random.key(1)))
        student, frozen = lora.split(Transformer(model_config(), jax.random.key(0)))
        state = loop.init_state(student, tx, jax.random.key(2), mesh)
        step = jax.jit(train.make_train_step(tx, RECIPE, PRESETS["kd"], VOCAB, True))
        data = sharding.place_batch(micro_batches(batch()), mesh, leading=1)
        kd = []
        for _ in range(60):
            state, metrics = step(state, frozen, teacher, data, None, 1e-2)
            kd.append(float(metrics["kd"]))
    assert kd[-1] < 0.05 * kd[0]


# ------------------------------------------------------------------------------------------------------------ loop


def grain_batches():
    import grain

    class Source:
        def __len__(self):
            return 12

        def __getitem__(self, i):
            data = batch(seed=i)
            counts = [data["loss_mask"][data["example"] == example].sum() for example in range(16)]
            return data | {"examples": np.arange(16), "counts": np.array(counts)}

    return iter(grain.MapDataset.source(Source()).to_iter_dataset())


def task(folder, steps, label="test", evaluate=lambda model: {"eval/dev_loss": 0.0}) -> loop.Task:
    data = grain_batches()
    records = types.SimpleNamespace(record_id=np.array([f"record{i}" for i in range(16)]))
    feed = feeds.DataFeed(records, data, feeds.Shapes(8, 16, 16, True))
    return loop.Task(label, folder, steps, feed, evaluate, {"data": data})


def fit(folder, steps):
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        recipe = dataclasses.replace(RECIPE, checkpoints=4, evaluations=1)
        student, teacher = (
            Transformer(model_config(), jax.random.key(0)),
            Transformer(model_config(48), jax.random.key(1)),
        )
        settings = dict(vocab=VOCAB, rng=jax.random.key(5), mesh=mesh)
        return loop.fit(student, teacher, recipe, OBJECTIVE, task(folder, steps), **settings).model


def test_an_interrupted_run_resumes_bit_exactly(tmp_path, monkeypatch):
    whole = fit(tmp_path / "whole", 12)
    placed, place = [], sharding.place_batch

    def interrupted(*arguments, **keywords):
        placed.append(1)
        if len(placed) > 8:
            raise KeyboardInterrupt
        return place(*arguments, **keywords)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sharding, "place_batch", interrupted)
        fit(tmp_path / "cut", 12)  # checkpoints at 3, 6, 9: it lost steps 7 and 8
    resumed = fit(tmp_path / "cut", 12)
    for name, a, b in zip(sharding.names(whole), jax.tree.leaves(whole), jax.tree.leaves(resumed)):
        np.testing.assert_array_equal(a, b, err_msg=name)
    rows = [
        [json.loads(line) for line in (tmp_path / d / "metrics.jsonl").read_text().splitlines()]
        for d in ("whole", "cut")
    ]
    keep = lambda row: {k: v for k, v in row.items() if "per_second" not in k}
    assert [keep(r) for r in rows[0]] == [keep(r) for r in rows[1]]


def test_a_diverging_run_stops_with_the_step_and_the_checkpoint(tmp_path):
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        broken = jax.tree.map(lambda x: x * jnp.nan, Transformer(model_config(), jax.random.key(0)))
        with pytest.raises(FloatingPointError, match="students/kd: not finite: .* step 1; records.* record0, .*: none"):
            settings = dict(vocab=VOCAB, rng=jax.random.key(5), mesh=mesh)
            loop.fit(broken, None, RECIPE, PRESETS["sft"], task(tmp_path, 12, "students/kd"), **settings)


def test_a_checkpoint_restores_on_another_mesh(tmp_path):
    model = Transformer(model_config(), jax.random.key(0))
    checkpoint.save_params(tmp_path / "params", model)
    mesh = sharding.make_mesh(1, 4, 2)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), model, sharding.shardings(model, mesh)
    )
    loaded = checkpoint.load_params(tmp_path / "params", abstract)
    assert loaded.blocks.attn.q[...].sharding.spec == P(None, "fsdp", "tensor")
    assert checkpoint.fingerprint(loaded) == checkpoint.fingerprint(model)
    changed = jax.tree.map(lambda x: x.at[(0,) * x.ndim].add(1e-6), model)
    assert checkpoint.fingerprint(changed) != checkpoint.fingerprint(model)


# ------------------------------------------------------------------------------------------------------- optimizer


def test_schedules():
    cosine = optim.schedule("cosine", lr=1.0, lr_min=0.1, warmup_steps=10, steps=110)
    assert [float(cosine(s)) for s in (0, 5, 10)] == [0.0, 0.5, 1.0]
    np.testing.assert_allclose([cosine(60), cosine(110)], [0.55, 0.1], atol=1e-6)
    linear = optim.schedule("linear", lr=1.0, lr_min=0.0, warmup_steps=0, steps=10)
    np.testing.assert_allclose([linear(0), linear(5), linear(10)], [1, 0.5, 0])
    assert float(optim.schedule("constant", lr=0.3, lr_min=0, warmup_steps=0, steps=10)(9)) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="warmup_steps 10 must be below the 10 steps"):
        optim.schedule("cosine", lr=1.0, lr_min=0.0, warmup_steps=10, steps=10)
    with pytest.raises(ValueError, match="unknown schedule"):
        optim.schedule("step", lr=1.0, lr_min=0.0, warmup_steps=0, steps=10)


def test_no_decay_on_biases_and_norms():
    cfg = model_config(norm="layernorm", norm_bias=True, qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm="head")
    model = Transformer(cfg, jax.random.key(0))
    flags = dict(zip(sharding.names(model), jax.tree.leaves(optim.decayed(model))))
    assert {n.split(".")[-1] for n, decay in flags.items() if decay} == {
        "weight",
        "q",
        "k",
        "v",
        "o",
        "up",
        "gate",
        "down",
    }


@pytest.mark.parametrize(
    "change",
    [
        dict(select="best"),
        dict(lr_grid=(1e-3, 0.0)),
        dict(lora_rank=4, lora_targets=("query",)),
        dict(compute_dtype="fp16"),
        dict(batch_rows=6, accumulation=4),
        dict(schedule="exponential"),
        dict(epochs=0),
    ],
)
def test_recipes_are_checked(change):
    with pytest.raises(ValueError, match="recipes.matched"):
        train.Recipe(**change)


def test_the_optimizer_state_is_split_like_the_parameters():
    mesh = sharding.make_mesh(1, 4, 2)
    with jax.set_mesh(mesh):
        tx = optim.optimizer(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip=0.0)
        model = Transformer(model_config(), jax.random.key(0))
        model = jax.device_put(model, sharding.shardings(model, mesh))
        state = loop.init_state(lora.split(model)[0], tx, jax.random.key(2), mesh)
    kept = {n: x for n, x in zip(sharding.names(state.opt_state), jax.tree.leaves(state.opt_state)) if x.ndim >= 2}
    assert sum(n.endswith("blocks.mlp.up") for n in kept) == 2  # both moments
    for name, x in kept.items():
        if name.endswith(("blocks.attn.q", "blocks.mlp.up", "blocks.mlp.down")):
            assert x.addressable_shards[0].data.size * 8 == x.size, name
