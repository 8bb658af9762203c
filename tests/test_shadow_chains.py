"""Many models by one program: the ways agree with one another and with the ordinary training loop."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from kd_jax import loop, sharding
from kd_jax.data import batches
from kd_jax.data.encode import PROMPT, RESPONSE, Encoded
from kd_jax.distill import feeds
from kd_jax.distill.objective import PRESETS
from kd_jax.errors import ConfigError
from kd_jax.shadow import chains
from kd_jax.train import Recipe
from kd_jax.transformer import ModelConfig, Transformer

VOCAB, ROW, STEPS = 64, 32, 5
RECIPE = Recipe(steps=STEPS, batch_rows=4, lr=1e-2, warmup_steps=1, chunk=8)
SPEC = chains.Training(RECIPE, PRESETS["cui"], STEPS, VOCAB, ROW, True)  # half labels, half the teacher, at T = 2


def model(seed, width=16) -> Transformer:
    sizes = dict(vocab_size=VOCAB, width=width, layers=2, heads=2, kv_heads=2, head_dim=width // 2, mlp=2 * width)
    cfg = ModelConfig(**sizes, max_positions=ROW, embed_dim=width)
    shapes = jax.eval_shape(functools.partial(Transformer, cfg), jax.random.key(0))
    rng = np.random.default_rng(seed)  # by NumPy: no program is compiled for it
    return jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes)


def records(seed, n=30) -> Encoded:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(6, 16, n)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    segment = np.full(offsets[-1], RESPONSE, np.int8)
    segment[np.concatenate([offsets[:-1], offsets[:-1] + 1])] = PROMPT
    ids, none = np.array([f"{seed}:{i}" for i in range(n)], object), np.zeros(n, np.int32)
    return Encoded(
        ids, ids, ids, rng.integers(0, VOCAB, offsets[-1]).astype(np.int32), offsets, segment, none, none, {}
    )


def mesh_of(devices: int):
    return sharding.make_mesh(devices, 1, 1, devices=jax.devices()[:devices])


def trained(way: str, devices: int = 1, count: int = 4, spec=SPEC):
    """Flat parameters of `count` models `[count, ...]`, and their losses `[count, steps]`."""
    mesh = mesh_of(devices)
    with jax.set_mesh(mesh):
        place = lambda m: jax.device_put(m, sharding.shardings(m, mesh))
        rows = [spec.rows(records(i), seed=i) for i in range(count)]
        models, teachers = ([place(model(first + i, w)) for i in range(count)] for first, w in ((0, 16), (10, 24)))
        keys = [jax.random.key(i) for i in range(count)]
        found, losses = chains.train(models, teachers, rows, keys, spec, way, mesh)
        return np.stack([flat(m) for m in found]), losses


def flat(m: Transformer) -> np.ndarray:
    return np.concatenate([np.asarray(x).reshape(-1) for x in jax.tree.leaves(jax.device_get(m))])


@pytest.fixture(scope="module", autouse=True)
def short_calls():
    """Calls of two steps, so that five take three, the last of them not full."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chains, "SEGMENT", 2)
        yield


@pytest.fixture(scope="module")
def one_by_one():
    return trained("loop")


def test_map_makes_the_very_same_models(one_by_one, check):
    params, losses = trained("map")
    check("shadow: map against loop, parameters", np.abs(params - one_by_one[0]).max(), 0)
    check("shadow: map against loop, losses", np.abs(losses - one_by_one[1]).max(), 0)
    assert losses.shape == (4, STEPS) and np.unique(losses[:, 0]).size == 4


def test_vmap_over_two_devices_makes_the_same_models(one_by_one, check):
    params, losses = trained("vmap", devices=2)
    relative = np.abs(params - one_by_one[0]).max() / np.abs(one_by_one[0]).max()
    check("shadow: vmap on 2 devices against loop, parameters (relative)", relative, 1e-5)
    check("shadow: vmap on 2 devices against loop, losses", np.abs(losses - one_by_one[1]).max(), 1e-5)


def test_a_chain_is_what_the_ordinary_loop_makes_of_the_same_batches(one_by_one, tmp_path, check):
    mesh = mesh_of(1)
    with jax.set_mesh(mesh):
        encoded = records(2)
        rows = batches.TrainingRows(encoded, row_length=ROW, packed=True, seed=2, epochs=9)
        iterator = batches.training_iterator(rows, batch_rows=4)
        shapes = feeds.Shapes(4, ROW, ROW, True)
        task = loop.Task(
            "plain", tmp_path, STEPS, feeds.DataFeed(encoded, iterator, shapes), lambda _: {"eval/dev_loss": 0.0}, {}
        )
        fit = dict(vocab=VOCAB, rng=jax.random.key(2), mesh=mesh)
        place = lambda m: jax.device_put(m, sharding.shardings(m, mesh))
        done = loop.fit(place(model(2)), place(model(12, 24)), RECIPE, PRESETS["cui"], task, **fit)
    check("shadow: a chain against the ordinary loop", np.abs(flat(done.model) - one_by_one[0][2]).max(), 1e-6)
    assert np.abs(flat(model(2)) - one_by_one[0][2]).max() > 1e-3, "it was trained at all"


def test_rows_are_as_many_epochs_as_the_steps_take():
    rows = SPEC.rows(records(0), seed=7)
    assert len(rows) >= STEPS * RECIPE.batch_rows > rows.epoch_rows[-2]
    np.testing.assert_array_equal(np.sort(rows.examples(np.arange(rows.epoch_rows[1]))[0]), np.arange(30))


@pytest.mark.parametrize(
    "objective, recipe, said",
    [
        ("gkd", {}, "policy 'mix'"),
        ("seqkd", {}, "what works are kd"),
        ("singh_rkld", {}, "lm_coef 1"),
        ("kd", {"select": "best_dev_loss"}, "keep the last parameters"),
        ("kd", {"cache": "top_k"}, "caches 'top_k'"),
    ],
)
def test_what_chains_cannot_repeat_is_refused(objective, recipe, said):
    with pytest.raises(ConfigError, match=said):
        chains.check(PRESETS[objective], dataclasses.replace(RECIPE, **recipe), "students/x")


def test_the_way_is_named_or_taken_from_the_table():
    assert chains.resolve("map") == "map"
    assert chains.resolve("auto") == chains.FASTEST["cpu"]
    with pytest.raises(ConfigError, match="auto, loop, map, vmap"):
        chains.resolve("pmap")
    assert [chains.group_size(way, mesh_of(2)) for way in chains.WAYS] == [1, chains.GROUP, 2 * chains.GROUP]
