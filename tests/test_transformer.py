"""The forward pass: what a token may see, what its gradient reaches, and that other ways to compute it agree."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.transformer import ModelConfig, Transformer, attention_mask, cpu_attention

LLAMA = ModelConfig(
    vocab_size=50,
    width=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp=48,
    max_positions=24,
    embed_dim=32,
    rotary_dim=8,
)
GPT2 = dataclasses.replace(
    LLAMA,
    kv_heads=4,
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
CONFIGS = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "opt_350m": dataclasses.replace(
        GPT2, embed_dim=16, norm_placement="post", final_norm=False, position_offset=2, activation="relu"
    ),
    "gpt_neox": dataclasses.replace(
        GPT2, positions="rope", rotary_dim=2, parallel_residual=True, activation="gelu", tie_embeddings=False
    ),
    "olmo2": dataclasses.replace(LLAMA, norm_placement="output", qk_norm="full"),
    "qwen3": dataclasses.replace(LLAMA, head_dim=12, rotary_dim=12, qk_norm="head", tie_embeddings=True),
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request) -> Transformer:
    """A model of each kind with every parameter random, so that a forgotten bias or scale shows."""
    plain = jax.jit(lambda key: Transformer(CONFIGS[request.param], key))(jax.random.key(0))
    leaves, treedef = jax.tree.flatten(plain)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, noisy)


def rows(*records: list[int], length: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One row: the records one after the other as segments 1, 2, ..., then padding."""
    tokens, segments, positions = np.zeros((3, 1, length), np.int32)
    start = 0
    for number, record in enumerate(records, 1):
        place = slice(start, start + len(record))
        tokens[0, place], segments[0, place], positions[0, place] = record, number, np.arange(len(record))
        start += len(record)
    return jnp.asarray(tokens), jnp.asarray(segments), jnp.asarray(positions)


A, B = [3, 14, 15, 9, 26, 5], [27, 18, 28, 18]
hidden = jax.jit(Transformer.hidden, static_argnames=("dtype", "remat"))


def test_packed_records_equal_separate_rows(model):
    packed = hidden(model, *rows(A, B, length=12))
    np.testing.assert_allclose(packed[:, :6], hidden(model, *rows(A, length=12))[:, :6], atol=2e-6)
    np.testing.assert_allclose(packed[:, 6:10], hidden(model, *rows(B, length=12))[:, :4], atol=2e-6)


def test_padding_and_batch_mates_do_not_matter(model):
    tokens, segments, positions = rows(A, length=12)
    alone = hidden(model, tokens, segments, positions)
    other_tokens, other_positions = (jnp.where(segments == 0, 99, array) for array in (tokens, positions))
    np.testing.assert_array_equal(hidden(model, other_tokens, segments, other_positions)[:, :6], alone[:, :6])
    pair = [jnp.concatenate(both) for both in zip(rows(B, A, length=12), (tokens, segments, positions), strict=True)]
    np.testing.assert_allclose(hidden(model, *pair)[1:, :6], alone[:, :6], atol=2e-6)


def test_a_row_of_padding_alone_is_finite(model):
    assert np.isfinite(hidden(model, *rows(length=12))).all()


def test_no_token_sees_a_later_one(model):
    changed = [*A[:4], 40, 41]
    before, after = (hidden(model, *rows(record, length=12))[:, :6] for record in (A, changed))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.abs(before[:, 4:] - after[:, 4:]).min(axis=(0, 2)).max() > 0


def loss(model: Transformer, remat: bool = False) -> jax.Array:
    # A weighted sum, since a plain one is constant after a LayerNorm.
    states = model.hidden(*rows(A, B, length=12), remat=remat)
    logits = states @ model.head().weight.T
    return jnp.mean(jnp.sin(jnp.arange(logits.size)).reshape(logits.shape) * logits**2)


def test_gradients_reach_every_parameter(model):
    with jax.numpy_rank_promotion("raise"):
        value, gradient = jax.jit(jax.value_and_grad(loss))(model)
    assert np.isfinite(value)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        name = jax.tree_util.keystr(path)
        # A constant added to all keys moves all scores of a query alike, which softmax ignores, unless keys rotate.
        if "k_bias" in name and model.cfg.positions == "learned":
            continue
        per_layer = leaf.reshape(model.cfg.layers, -1) if ".blocks" in name else leaf.reshape(1, -1)
        assert (np.abs(per_layer).max(axis=1) > 1e-6).all(), name


@pytest.mark.parametrize("model", ["llama", "opt_350m"], indirect=True)
def test_remat_changes_nothing(model):
    value, gradient = jax.jit(jax.value_and_grad(loss))(model)
    again, gradient_again = jax.jit(jax.value_and_grad(lambda model: loss(model, remat=True)))(model)
    np.testing.assert_allclose(value, again, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), gradient, gradient_again)


def test_bfloat16_stays_close(model):
    exact = hidden(model, *rows(A, B, length=12))
    rough = hidden(model, *rows(A, B, length=12), dtype=jnp.bfloat16)
    assert rough.dtype == jnp.bfloat16 and exact.dtype == jnp.float32
    assert np.abs(rough.astype(np.float32) - exact).mean() < 0.03 * np.abs(exact).mean() + 0.02


@pytest.mark.parametrize("time, kv_heads", [(1, 2), (64, 4), (150, 4), (150, 2), (150, 1), (530, 4)])
def test_cpu_attention_equals_that_of_jax(time, kv_heads):
    keys = jax.random.split(jax.random.key(time), 4)
    q, g = jax.random.normal(keys[0], (2, 2, time, 4, 8))
    k, v = jax.random.normal(keys[1], (2, 2, time, kv_heads, 8))
    segments = jnp.sort(jax.random.randint(keys[2], (2, time), 0, 4), axis=1)[:, ::-1]
    mask = attention_mask(segments)

    @functools.partial(jax.jit, static_argnums=0)
    def with_gradient(attention, q, k, v, g):
        out, pull = jax.vjp(attention, q, k, v)
        return (out, *pull(g))

    expected = with_gradient(lambda *qkv: jax.nn.dot_product_attention(*qkv, mask=mask[:, None]), q, k, v, g)
    for mine, theirs in zip(with_gradient(lambda *qkv: cpu_attention(*qkv, mask), q, k, v, g), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)


@pytest.mark.parametrize("model", ["llama", "gpt2"], indirect=True)
def test_accelerators_take_another_attention_to_the_same_states(model, monkeypatch):
    expected = hidden(model, *rows(A, B, length=12))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    found = jax.jit(lambda model: model.hidden(*rows(A, B, length=12)))(model)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_ids_and_positions_beyond_their_tables_show_as_nan():
    model = jax.jit(lambda key: Transformer(GPT2, key))(jax.random.key(0))
    tokens, segments, positions = rows(A, length=12)
    assert np.isnan(hidden(model, tokens.at[0, 5].set(50), segments, positions)[0, 5]).all()
    assert np.isnan(hidden(model, tokens, segments, positions.at[0, 5].set(24))[0, 5]).all()
    assert np.isfinite(hidden(model, tokens, segments, positions)).all()


def test_llama_2_7b_has_its_published_size():
    llama_7b = dataclasses.replace(
        LLAMA,
        vocab_size=32_000,
        width=4096,
        layers=32,
        heads=32,
        kv_heads=32,
        head_dim=128,
        mlp=11_008,
        max_positions=4096,
        embed_dim=4096,
        rotary_dim=128,
    )
    abstract = jax.eval_shape(lambda key: Transformer(llama_7b, key), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == 6_738_415_616
    assert abstract.blocks.attn.q.shape == (32, 4096, 4096) and abstract.blocks.mlp.down.shape == (32, 11_008, 4096)
    states = jax.eval_shape(lambda model: model.hidden(*rows(A, length=8), remat=True), abstract)
    assert states.shape == (1, 8, 4096)


def test_random_initialisation():
    cfg = dataclasses.replace(GPT2, layers=8, width=64, embed_dim=64)
    model = jax.jit(lambda key: Transformer(cfg, key))(jax.random.key(0))
    attn = model.blocks.attn
    assert np.std(attn.q[...]) == pytest.approx(0.02, rel=0.05)
    assert np.std(attn.o[...]) == pytest.approx(0.02 / 4, rel=0.05)  # sqrt(2 * 8 layers) = 4
    assert not np.allclose(attn.q[0], attn.q[1]) and not np.allclose(attn.q[...], attn.v[...])
    assert (model.blocks.norm1.scale[...] == 1).all() and (attn.q_bias[...] == 0).all()
    assert model.lm_head is None and model.head().weight is model.embed.weight[...]
    half = jax.eval_shape(lambda key: Transformer(LLAMA, key, jnp.bfloat16), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kv_heads": 3}, "multiple of kv_heads"),
        ({"rotary_dim": 10}, "rotary_dim"),
        ({"activation": "tanh"}, "'tanh' is not one of"),
        ({"parallel_residual": True, "norm_placement": "post"}, "parallel_residual"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LLAMA, **change)
