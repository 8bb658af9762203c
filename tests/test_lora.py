"""Adapters: the same function as W + s A B, gradients for A and B alone, and the plain model back."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from kd_jax import checkpoint, hf, lora, optim, sharding
from kd_jax.errors import ConfigError
from kd_jax.generate import Sampling, generate
from kd_jax.lora import Adapted, Lora
from kd_jax.transformer import ModelConfig, Transformer

LLAMA = ModelConfig(
    vocab_size=48,
    width=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp=40,
    max_positions=24,
    embed_dim=32,
    rotary_dim=8,
)
GPT2 = dataclasses.replace(
    LLAMA,
    norm="layernorm",
    norm_bias=True,
    activation="gelu_tanh",
    gated=False,
    positions="learned",
    rotary_dim=0,
    tie_embeddings=True,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
)
EVERY = tuple(lora.WHERE)
SPEC = Lora(rank=4, alpha=10.0, dropout=0.3, targets=EVERY)
SCALING = 2.5  # alpha / rank
FEW = dataclasses.replace(SPEC, targets=("v", "down"))  # threefry takes XLA long to compile

hidden = jax.jit(Transformer.hidden, static_argnames=("dtype", "remat"))


def random(abstract: Transformer, known: dict[str, np.ndarray]) -> Transformer:
    """A model of these shapes: the known weights (an adapted one goes by its plain name), everything else random."""
    rng, arrays = np.random.default_rng(0), []
    for name, x in zip(sharding.names(abstract), jax.tree.leaves(abstract)):
        noise = name.endswith("scale") + 0.1 * rng.normal(size=x.shape)
        array = known.get(name, known.get(name.removesuffix(".weight"), noise))
        arrays.append(jnp.asarray(array, jnp.float32))
    return jax.tree.unflatten(jax.tree.structure(abstract), arrays)


@functools.cache
def plain(cfg: ModelConfig = LLAMA) -> Transformer:
    return random(jax.eval_shape(functools.partial(Transformer, cfg), jax.random.key(0)), {})


@functools.cache
def trained(cfg: ModelConfig = LLAMA, spec: Lora = SPEC) -> Transformer:
    """A model whose adapters do something: A and B random."""
    abstract = jax.eval_shape(lambda model: lora.attach(model, spec, jax.random.key(1)), plain(cfg))
    return random(abstract, leaves(plain(cfg)))


@functools.cache
def batch(rows: int = 2, length: int = 10) -> tuple[jax.Array, jax.Array, jax.Array]:
    tokens = jax.random.randint(jax.random.key(3), (rows, length), 0, LLAMA.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    return tokens, jnp.ones((rows, length), jnp.int32), positions


def loss(model: Transformer, **options) -> jax.Array:
    """Mean nats of the next token."""
    h = Transformer.hidden(model, *batch(), **options)
    logits = h[:, :-1] @ model.head().weight.T
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch()[0][:, 1:]))


def adapter_loss(trainable: Transformer, frozen: Transformer, **options) -> jax.Array:
    return loss(lora.join(trainable, frozen), **options)


def leaves(tree) -> dict[str, np.ndarray]:
    return {name: np.asarray(x) for name, x in zip(sharding.names(tree), jax.tree.leaves(tree))}


# ---------------------------------------------------------------------------------------------------------- function


def test_new_adapters_do_not_change_the_function():
    model = lora.attach(plain(), Lora(rank=4, targets=EVERY), jax.random.key(1))
    assert jnp.array_equal(hidden(model, *batch()), hidden(plain(), *batch()))
    assert isinstance(model.blocks.attn.q, Adapted) and not isinstance(plain().blocks.attn.q, Adapted)


@pytest.mark.parametrize("cfg", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_adapters_act_as_the_weight_plus_their_scaled_product(cfg, check):
    targets = EVERY if cfg.gated else tuple(t for t in EVERY if t != "gate")
    model = trained(cfg, dataclasses.replace(SPEC, targets=targets))
    arrays = leaves(model)
    by_hand = leaves(plain(cfg))
    for target in targets:
        name = f"blocks.{lora.WHERE[target]}.{target}"
        a, b = (arrays[f"{name}.{x}"].astype(np.float64) for x in ("lora_a", "lora_b"))
        by_hand[name] = np.float32(by_hand[name] + SCALING * np.einsum("lir,lro->lio", a, b))
    moved = jax.tree.unflatten(jax.tree.structure(plain(cfg)), [by_hand[n] for n in sharding.names(plain(cfg))])
    want = hidden(moved, *batch())
    assert np.abs(want - hidden(plain(cfg), *batch())).max() > 0.1
    check("LoRA: hidden against W + s A B", np.abs(hidden(model, *batch()) - want).max(), 5e-6)
    merged = jax.jit(lora.merge)(model)
    check("LoRA: merged weights", max(np.abs(x - by_hand[n]).max() for n, x in leaves(merged).items()), 1e-7)


def test_first_values_are_those_of_peft():
    wide = dataclasses.replace(LLAMA, layers=2, width=300, embed_dim=300)
    model = jax.eval_shape(functools.partial(Transformer, wide, dtype=jnp.bfloat16), jax.random.key(0))
    attach = functools.partial(lora.attach, spec=Lora(rank=16, targets=("q", "down")), key=jax.random.key(1))
    adapted = attach(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), model))
    for weight, size in ((adapted.blocks.attn.q, 300), (adapted.blocks.mlp.down, wide.mlp)):
        a = np.asarray(weight.lora_a[...], np.float64)
        assert a.shape == (2, size, 16) and weight.lora_a.dtype == jnp.float32
        assert 0.97 * size**-0.5 < np.abs(a).max() <= size**-0.5  # kaiming_uniform_(a=sqrt(5)) of [r, in]
        assert abs(a.std() * np.sqrt(3 * size) - 1) < 5 / np.sqrt(a.size)
        assert abs(a.mean()) < 5 * a.std() / np.sqrt(a.size)
        assert not weight.lora_b[...].any() and weight.lora_b.dtype == jnp.float32
    alone = lora.attach(plain(), Lora(rank=4, targets=("v",)), jax.random.key(1)).blocks.attn.v.lora_a
    among = lora.attach(plain(), Lora(rank=4, targets=("v", "k")), jax.random.key(1)).blocks.attn
    assert jnp.array_equal(alone[...], among.v.lora_a[...]) and not jnp.array_equal(alone[...], among.k.lora_a[...])


def test_bfloat16_stays_bfloat16():
    h = jax.eval_shape(
        lambda m: Transformer.hidden(m, *batch(), dtype=jnp.bfloat16, dropout_key=jax.random.key(0)), trained(spec=FEW)
    )
    assert h.dtype == jnp.bfloat16


# ----------------------------------------------------------------------------------------------------------- dropout


def test_dropout_keeps_the_mean_and_no_two_masks_are_equal(check):
    """W = 0 and A = B = the identity show the mask itself."""
    layers, size, rate = 3, 64, 0.3
    eye, none = jnp.broadcast_to(jnp.eye(size), (layers, size, size)), jnp.zeros((layers, size, size))
    blocks = [Adapted(none, eye, eye, 1.0, rate) for _ in range(2)]
    keyed = lora.with_dropout(blocks, jax.random.key(0))
    layer = lambda i: jax.tree.map(lambda x: x[i], keyed)
    masks = [np.asarray(adapted(jnp.ones((200, size)))) for i in range(layers) for adapted in layer(i)]
    assert all(set(np.unique(m)) == {0.0, np.float32(1 / (1 - rate))} for m in masks)
    n = masks[0].size
    sigma = np.sqrt(rate / (1 - rate) / n)
    check("LoRA: mean of a dropout mask, in its standard error", max(abs(m.mean() - 1) / sigma for m in masks), 4.5)
    for i, m in enumerate(masks):
        for other in masks[:i]:
            assert abs(np.corrcoef(m.ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(n)


def test_dropout_acts_only_with_a_key_and_only_on_adapters():
    model, key = trained(spec=FEW), jax.random.key(5)
    clean, dropped = hidden(model, *batch()), hidden(model, *batch(), dropout_key=key)
    assert jnp.array_equal(dropped, hidden(model, *batch(), dropout_key=key))
    assert np.abs(dropped - clean).max() > 1e-2
    assert np.abs(dropped - hidden(model, *batch(), dropout_key=jax.random.key(6))).max() > 1e-2
    without = trained(spec=dataclasses.replace(FEW, dropout=0.0))
    program = lambda model, **key: str(jax.make_jaxpr(lambda m: Transformer.hidden(m, *batch(), **key))(model))
    assert program(without, dropout_key=key) == program(without)
    assert program(plain(), dropout_key=key) == program(plain())
    assert "random" not in program(model) and "random" in program(model, dropout_key=key)


def test_the_backward_pass_sees_the_masks_of_the_forward_pass(check):
    """Forward mode computes nothing twice, so it does not know which masks the backward pass draws again."""
    trainable, frozen = lora.split(trained(spec=FEW))
    f = functools.partial(adapter_loss, frozen=frozen, dropout_key=jax.random.key(5))
    direction = jax.tree.map(lambda x: np.cos(np.arange(x.size, dtype=np.float32)).reshape(x.shape), trainable)
    want, slope = jax.jit(lambda t: jax.jvp(f, (t,), (direction,)))(trainable)
    for remat in (False, True):
        value, grads = jax.jit(jax.value_and_grad(functools.partial(f, remat=remat)))(trainable)
        check("LoRA: value with dropout, forward against reverse mode", abs(value - want), 1e-6)
        reverse = sum(np.vdot(g, d) for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction)))
        check("LoRA: slope with dropout, forward against reverse mode", abs(reverse - slope) / abs(slope), 2e-4)


# ------------------------------------------------------------------------------------------------- gradients, training


def test_gradients_are_the_chain_rule_of_the_merged_weights(check):
    model = trained()
    trainable, frozen = lora.split(model)
    grads = jax.jit(jax.grad(adapter_loss))(trainable, frozen)
    assert len(jax.tree.leaves(grads)) == 2 * len(EVERY)
    by_weight = leaves(jax.jit(lambda m: jax.grad(loss)(lora.merge(m)))(model))
    got, arrays = leaves(grads), leaves(model)
    for target in EVERY:
        name = f"blocks.{lora.WHERE[target]}.{target}"
        a, b = arrays[f"{name}.lora_a"], arrays[f"{name}.lora_b"]
        want_a = SCALING * np.einsum("lio,lro->lir", by_weight[name], b)
        want_b = SCALING * np.einsum("lir,lio->lro", a, by_weight[name])
        for x, want in ((got[f"{name}.lora_a"], want_a), (got[f"{name}.lora_b"], want_b)):
            check("LoRA: gradients against the chain rule", np.abs(x - want).max() / np.abs(want).max(), 1e-4)


def test_split_and_join_are_inverse():
    model = trained()
    trainable, frozen = lora.split(model)
    assert all(".lora_" in name for name in sharding.names(trainable))
    assert sorted(sharding.names(trainable) + sharding.names(frozen)) == sorted(sharding.names(model))
    joined = lora.join(trainable, frozen)
    assert jax.tree.structure(joined) == jax.tree.structure(model)
    assert all(a is b for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(model)))
    everything, nothing = lora.split(plain())
    assert not jax.tree.leaves(nothing) and jax.tree.structure(everything) == jax.tree.structure(plain())
    assert jax.tree.structure(lora.join(everything, nothing)) == jax.tree.structure(plain())


def train(trainable, frozen, steps: int, mesh=None):
    """A few steps of the project's optimizer; returns the adapters and the losses."""
    tx = optim.optimizer(b1=0.9, b2=0.999, eps=1e-8, weight_decay=1e-2, clip=1.0)
    place = {} if mesh is None else {"out_shardings": sharding.shardings(jax.eval_shape(tx.init, trainable), mesh)}
    state = jax.jit(tx.init, **place)(trainable)

    @jax.jit
    def step(trainable, state, key):
        value, grads = jax.value_and_grad(adapter_loss)(trainable, frozen, dropout_key=key)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, jax.tree.map(lambda u: 1e-2 * u, updates)), state, value

    losses = []
    for i in range(steps):
        trainable, state, value = step(trainable, state, jax.random.fold_in(jax.random.key(9), i))
        losses.append(float(value))
    return trainable, state, np.array(losses)


def test_training_reduces_the_loss_and_leaves_the_frozen_weights_alone():
    spec = Lora(rank=4, alpha=16.0, dropout=0.1)  # q and v, the default
    before = leaves(plain())
    trainable, frozen = lora.split(lora.attach(plain(), spec, jax.random.key(1)))
    trainable, state, losses = train(trainable, frozen, 30)
    assert losses[-3:].mean() < losses[:3].mean() - 0.3
    model = lora.join(trainable, frozen)
    after = leaves(lora.merge(model))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"blocks.attn.q", "blocks.attn.v"}
    raw = leaves(model)
    for name in before:
        stored = f"{name}.weight" if name in changed else name
        assert np.array_equal(before[name], raw[stored]), name
    moments = [x for x in jax.tree.leaves(state) if x.ndim]
    assert sum(x.size for x in moments) == 2 * sum(x.size for x in jax.tree.leaves(trainable))


# ----------------------------------------------------------------------------------------------- rest of the project


def test_a_merged_model_is_a_plain_one(tmp_path):
    model = trained()
    merged = jax.jit(lora.merge)(model)
    assert jax.tree.structure(merged) == jax.tree.structure(plain())
    assert sharding.names(merged) == sharding.names(plain())
    assert isinstance(model.blocks.attn.q, Adapted), "merge leaves its argument alone"
    hf.save_pretrained(merged, tmp_path / "export", family="llama")
    loaded = hf.load_pretrained(tmp_path / "export")
    np.testing.assert_allclose(hidden(loaded, *batch()), hidden(model, *batch()), atol=1e-5)
    assert jax.tree.structure(lora.merge(plain())) == jax.tree.structure(plain())
    halved = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    assert {x.dtype for x in jax.tree.leaves(jax.eval_shape(lora.merge, halved))} == {jnp.dtype("bfloat16")}
    with pytest.raises(hf.CheckpointError, match="blocks.attn.k.lora_a"):
        hf.save_pretrained(model, tmp_path / "adapted", family="llama")


def test_generation_sees_the_adapters():
    prompts, lengths = np.arange(8, dtype=np.int32), np.array([5, 3], np.int32)
    keys, mesh = np.arange(2, dtype=np.uint32), sharding.make_mesh()
    sample = functools.partial(
        generate,
        prompts=prompts,
        lengths=lengths,
        example_keys=keys,
        spec=Sampling(temperature=0.0, max_new_tokens=8),
        vocab=LLAMA.vocab_size,
        eos_id=-1,
        seed=0,
        mesh=mesh,
    )
    adapted, merged, base = (sample(m) for m in (trained(), lora.merge(trained()), plain()))
    assert not merged.near_ties.any() and np.array_equal(adapted.tokens, merged.tokens)
    assert not np.array_equal(adapted.tokens, base.tokens)


def test_adapters_are_stored_under_their_names(tmp_path):
    trainable, _ = lora.split(trained())
    checkpoint.save_params(tmp_path / "adapters", trainable)
    abstract, _ = lora.split(jax.eval_shape(lambda m: lora.attach(m, SPEC, jax.random.key(0)), plain()))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract)
    loaded = checkpoint.load_params(tmp_path / "adapters", abstract)
    assert checkpoint.fingerprint(loaded) == checkpoint.fingerprint(trainable)


def test_adapters_shard_on_every_axis():
    mesh = sharding.make_mesh(2, 2, 2)
    model = trained()
    specs = {n: s.spec for n, s in zip(sharding.names(model), jax.tree.leaves(sharding.shardings(model, mesh)))}
    for target, where in lora.WHERE.items():
        name = f"blocks.{where}.{target}"
        weight = sharding.spec_for(name, (2, 32, 32), mesh)
        assert specs[f"{name}.weight"] == weight == P(None, *weight[1:])
        assert specs[f"{name}.lora_a"] == P(None, weight[1], None)
        assert specs[f"{name}.lora_b"] == P(None, None, weight[2])


def test_training_on_eight_devices_equals_training_on_one(check):
    parts = lora.split(lora.attach(plain(), FEW, jax.random.key(1)))
    mesh = sharding.make_mesh(2, 2, 2)
    placed = [jax.device_put(part, sharding.shardings(part, mesh)) for part in parts]
    one, _, want = train(*parts, 4)
    many, state, got = train(*placed, 4, mesh)
    check("LoRA: losses on 8 devices against 1", np.abs(got - want).max(), 2e-5)
    for name, x in leaves(one).items():
        np.testing.assert_allclose(leaves(many)[name], x, atol=2e-4, err_msg=name)
    moments = {n: x.sharding.spec for n, x in zip(sharding.names(state), jax.tree.leaves(state))}
    assert moments["1.0.mu.blocks.attn.v.lora_b"] == P(None, None, "tensor")
    merged = lora.merge(lora.join(many, placed[1]))
    for x, wanted in zip(jax.tree.leaves(merged), jax.tree.leaves(sharding.shardings(merged, mesh))):
        assert x.sharding.is_equivalent_to(wanted, x.ndim)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(rank=-1), "lora_rank"),
        (dict(rank=4, alpha=0.0), "lora_alpha"),
        (dict(rank=4, dropout=1.0), "lora_dropout"),
        (dict(rank=4, targets=("q", "w")), "lora_targets must be some of q, k, v, o, up, gate, down"),
        (dict(rank=4, targets=("q", "q")), "each once"),
        (dict(rank=4, targets=()), "lora_targets"),
    ],
)
def test_settings_that_cannot_be_used_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        Lora(**settings)


def test_models_that_cannot_take_an_adapter_are_refused():
    assert lora.attach(plain(), Lora(), jax.random.key(0)) is plain()
    with pytest.raises(ConfigError, match="has no 'gate' weight"):
        lora.attach(plain(GPT2), Lora(rank=2, targets=("gate",)), jax.random.key(0))
    with pytest.raises(ValueError, match="merge it first"):
        lora.attach(trained(), SPEC, jax.random.key(0))
