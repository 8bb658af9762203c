"""The sharding table: every array has a row, on the real LLaMA-2 shapes too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from kd_jax import hf, sharding
from kd_jax.transformer import Transformer

LLAMA2_7B = dict(
    model_type="llama",
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    vocab_size=32000,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    hidden_act="silu",
    tie_word_embeddings=False,
)


def abstract(config: dict):
    return jax.eval_shape(functools.partial(Transformer, hf.config_from_hf(config)), jax.random.key(0))


def test_llama2_7b_fits_its_mesh_by_arithmetic():
    """8 x 4 virtual chips cannot be made here; the specs are checked on an abstract mesh."""
    model = abstract(LLAMA2_7B)
    sizes = {n: int(np.prod(x.shape)) for n, x in zip(sharding.names(model), jax.tree.leaves(model))}
    assert sum(sizes.values()) == 6_738_415_616  # the published parameter count
    mesh = jax.sharding.AbstractMesh((1, 8, 4), sharding.AXES)
    local = 0
    for name, x in zip(sharding.names(model), jax.tree.leaves(model)):
        spec = sharding.spec_for(name, x.shape, mesh)
        parts = int(np.prod([mesh.shape[a] for a in spec if a is not None]))
        assert parts == (32 if x.ndim >= 2 and "norm" not in name else 1), (name, spec)
        local += sizes[name] // parts
    assert local < 1.01 * sum(sizes.values()) / 32


def test_optimizer_state_follows_the_parameters():
    model = abstract(LLAMA2_7B | dict(num_hidden_layers=2))
    state = jax.eval_shape(optax.adamw(1e-3).init, model)
    mesh = sharding.make_mesh(1, 4, 2)
    by_name = dict(zip(sharding.names(state), jax.tree.leaves(sharding.shardings(state, mesh))))
    assert by_name["0.mu.blocks.attn.q"].spec == P(None, "fsdp", "tensor")
    assert by_name["0.nu.embed.weight"].spec == P("tensor", "fsdp")
    assert by_name["0.count"].spec == P()


def test_an_array_without_a_row_is_refused():
    mesh = sharding.make_mesh(8, 1, 1)
    with pytest.raises(ValueError, match="no sharding rule for blocks.attn.lora_a"):
        sharding.spec_for("blocks.attn.lora_a", (2, 4, 4), mesh)
    assert sharding.spec_for("final_norm.scale", (4,), mesh) == P()


def test_axes_that_do_not_divide_are_dropped():
    mesh = sharding.make_mesh(1, 2, 4)
    assert sharding.spec_for("embed.weight", (50257, 768), mesh) == P(None, "fsdp")


def test_mesh_sizes():
    assert dict(sharding.make_mesh().shape) == dict(data=8, fsdp=1, tensor=1)
    assert dict(sharding.make_mesh(2, -1, 2).shape) == dict(data=2, fsdp=2, tensor=2)
    with pytest.raises(ValueError, match="needs 3 devices, there are 8"):
        sharding.make_mesh(3, 1, 1)
    with pytest.raises(ValueError, match="at most one -1"):
        sharding.make_mesh(-1, -1, 1)


def test_batches_are_placed_by_rows():
    mesh = sharding.make_mesh(2, 4, 1)
    placed = sharding.place_batch({"tokens": np.arange(64).reshape(1, 16, 4)}, mesh, leading=1)["tokens"]
    assert placed.sharding.spec == P(None, ("data", "fsdp")) and placed.addressable_shards[0].data.shape == (1, 2, 4)
    assert jnp.array_equal(placed, np.arange(64).reshape(1, 16, 4))
