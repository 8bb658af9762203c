"""Noise on weights and exchanged blocks, against a plain loop over perturbed copies."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import planted_examples
import pytest
from planted_examples import POST, TIED, UNTIED, VOCAB

from kd_jax import sharding
from kd_jax.data.encode import PROMPT, Encoded
from kd_jax.errors import ConfigError
from kd_jax.transformer import Transformer
from kd_jax.whitebox import blocks
from kd_jax.whitebox.spec import Whitebox, block_names, block_rms, blocks_of, example_means

SPEC = Whitebox(VOCAB, row_length=24, batch_rows=2, draws=2, sigma=0.05, relative_sigma=0.2, seed=3, forms=("noise",))


def one_device():
    return sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])


random_model = functools.partial(planted_examples.model, size=0.2)
texts = functools.partial(planted_examples.encoded, prompt=2)


def run(f, *models, encoded=None, indices=None, spec=SPEC, mesh=None):
    encoded, mesh = encoded or texts(6), mesh or one_device()
    with jax.set_mesh(mesh):
        placed = [jax.device_put(model, sharding.shardings(model, mesh)) for model in models]
        return f(*placed, encoded, np.arange(len(encoded)) if indices is None else indices, spec, mesh)


# ------------------------------------------------------------------------------------------------- the plain loop


@jax.jit
def states(model, tokens):
    with jax.default_matmul_precision("highest"):
        where = jnp.ones_like(tokens), jnp.arange(tokens.size, dtype=tokens.dtype).reshape(tokens.shape)
        return model.hidden(tokens, *where), model.head().weight


def naive_nll(model: Transformer, encoded: Encoded) -> np.ndarray:
    """Mean NLL of each example alone: the whole softmax, float64."""
    means = []
    for i in range(len(encoded)):
        part = slice(encoded.offsets[i], encoded.offsets[i + 1])
        tokens, scored = encoded.tokens[part], np.flatnonzero(encoded.segment[part] != PROMPT)
        padded = np.zeros((1, SPEC.row_length), np.int32)  # one shape; no token sees a later one
        padded[0, : len(tokens)] = tokens
        h, weight = (np.asarray(x, np.float64) for x in states(model, padded))
        z = h[0, scored - 1] @ weight[:VOCAB].T
        means.append(np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(len(scored)), tokens[scored]]))
    return np.array(means)


def named(model) -> dict[str, np.ndarray]:
    return dict(zip(sharding.names(model), map(np.asarray, jax.tree.leaves(model))))


def rebuilt(model, leaves: dict) -> Transformer:
    return jax.tree.unflatten(jax.tree.structure(model), [leaves[name] for name in sharding.names(model)])


def eps(name: str, shape: tuple[int, ...], draw: int) -> np.ndarray:
    """The noise of a leaf, as the README of a table would say it: seed, draw, CRC-32 of the name, layer."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SPEC.seed), draw), zlib.crc32(name.encode()))
    if not name.startswith("blocks."):
        return np.asarray(jax.random.normal(key, shape))
    return np.stack([jax.random.normal(jax.random.fold_in(key, layer), shape[1:]) for layer in range(shape[0])])


def owner(name: str) -> str:
    return "head" if name.split(".")[0] in ("final_norm", "project_out", "lm_head") else "embedding"


def only(leaves: dict, changed: dict, block: str) -> dict:
    """`leaves` with the parameters of one block taken from `changed`."""
    out = {}
    for name, weight in leaves.items():
        out[name] = weight.copy()
        if name.startswith("blocks.") and block.isdigit():
            out[name][int(block)] = changed[name][int(block)]
        elif not name.startswith("blocks.") and owner(name) == block:
            out[name] = changed[name]
    return out


def naive_rms(leaves: dict, block: str) -> float:
    zeros = {name: np.zeros_like(weight) for name, weight in leaves.items()}
    ones = {name: np.ones_like(weight) for name, weight in leaves.items()}
    size = sum(float(weight.sum()) for weight in only(zeros, ones, block).values())
    square = sum(float((weight.astype(np.float64) ** 2).sum()) for weight in only(zeros, leaves, block).values())
    return np.sqrt(square / size)


def naive_noise(model, encoded) -> dict[str, np.ndarray]:
    leaves, plain, found = named(model), naive_nll(model, encoded), {name: [] for name in blocks.NOISE[1:]}
    for draw in range(SPEC.draws):
        drawn = {name: eps(name, weight.shape, draw) for name, weight in leaves.items()}
        moved = lambda scale, drawn=drawn: {name: weight + scale * drawn[name] for name, weight in leaves.items()}
        rise = lambda changed: naive_nll(rebuilt(model, changed), encoded) - plain
        plus, minus = rise(moved(SPEC.sigma)), rise(moved(-SPEC.sigma))
        found["mope"].append(plus)
        found["mope_antithetic"].append((plus + minus) / 2)
        each = block_names(model.cfg)
        absolute = [rise(only(leaves, moved(SPEC.sigma), block)) for block in each]
        found["noise_absolute"].append(np.stack(absolute, axis=1))
        scales = [SPEC.relative_sigma * naive_rms(leaves, block) for block in each]
        relative = [rise(only(leaves, moved(scale), block)) for block, scale in zip(each, scales)]
        found["noise_relative"].append(np.stack(relative, axis=1))
    return {"nll": plain} | {name: np.mean(values, axis=0) for name, values in found.items()}


def test_noise_equals_a_loop_over_perturbed_copies(check):
    model, encoded = random_model(TIED), texts(6)
    before = named(model)
    found, naive = run(blocks.noise, model), naive_noise(model, encoded)
    assert set(found) == set(naive)
    for name, expected in naive.items():
        assert found[name].shape == expected.shape
        check(f"{name} vs perturbed copies", np.abs(found[name] - expected).max(), 2e-5)
    assert np.abs(naive["noise_absolute"]).max(0).min() > 1e-3, "every block matters"
    after = named(model)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    indices = np.array([4, 0, 3])
    part = run(blocks.noise, model, indices=indices)
    for name in blocks.NOISE:
        check("noise: part of the examples, other order", np.abs(part[name] - found[name][indices]).max(), 2e-6)


def test_noise_on_eight_devices_and_in_other_batches_is_the_same(check):
    """Against the plain loop on one device; more and longer rows, which change the padding."""
    model, encoded = random_model(UNTIED), texts(6)
    spec = dataclasses.replace(SPEC, batch_rows=8, row_length=32)
    spread = run(blocks.noise, model, spec=spec, mesh=sharding.make_mesh(4, 1, 2))
    for name, expected in naive_noise(model, encoded).items():
        check(f"{name} on 8 devices vs perturbed copies", np.abs(spread[name] - expected).max(), 2e-5)


def test_noise_of_size_zero_changes_nothing_and_draws_are_averaged(check):
    model = random_model(TIED)
    none = run(blocks.noise, model, spec=dataclasses.replace(SPEC, sigma=0.0, relative_sigma=0.0))
    assert all(np.all(none[name] == 0) for name in blocks.NOISE[1:])
    one, two = (run(blocks.noise, model, spec=dataclasses.replace(SPEC, draws=n)) for n in (1, 2))
    assert np.abs(one["noise_absolute"] - two["noise_absolute"]).max() > 1e-4
    other = run(blocks.noise, model, spec=dataclasses.replace(SPEC, seed=4))
    assert np.all(other["mope"] != two["mope"])


# ------------------------------------------------------------------------------------------------------------ swap


@pytest.mark.parametrize("family", [UNTIED, POST], ids=["untied", "post"])
def test_swap_equals_a_loop_over_exchanged_copies(family, check):
    model, base, encoded = random_model(family), random_model(family, seed=1), texts(6)
    found = run(blocks.swap, model, base)
    mine, other = named(model), named(base)
    at_home, away = naive_nll(model, encoded), naive_nll(base, encoded)
    check("swap: nll", np.abs(found["nll"] - at_home).max(), 2e-5)
    for place, block in enumerate(block_names(model.cfg)):
        taken = naive_nll(rebuilt(model, only(mine, other, block)), encoded) - at_home
        given = away - naive_nll(rebuilt(model, only(other, mine, block)), encoded)
        check("swap vs exchanged copies", np.abs(found["swap"][:, place] - taken).max(), 2e-5)
        check("swap_back vs exchanged copies", np.abs(found["swap_back"][:, place] - given).max(), 2e-5)


def test_a_model_exchanged_with_itself_stays_the_same():
    found = run(blocks.swap, random_model(UNTIED), random_model(UNTIED))
    assert np.all(found["swap"] == 0) and np.all(found["swap_back"] == 0)


def test_models_of_other_shapes_are_refused():
    with pytest.raises(ConfigError, match="same shape"):
        run(blocks.swap, random_model(TIED), random_model(UNTIED))


# --------------------------------------------------------------------------------------------------- a planted block


@jax.jit
def trained(model, tokens, trains):
    """Adam on the mean NLL of rows of tokens, on the parameters where `trains` is 1."""
    where = jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)

    def loss(model):
        z = model.hidden(tokens, *where) @ model.head().weight.T
        return -jnp.take_along_axis(jax.nn.log_softmax(z[:, 1:-1]), tokens[:, 2:, None], axis=-1).mean()

    tx = optax.adam(1e-2)

    def step(state, _):
        model, moments = state
        updates, moments = tx.update(jax.grad(loss)(model), moments)
        return (jax.tree.map(lambda w, u, t: w + u * t, model, updates, trains), moments), None

    return jax.lax.scan(step, (model, tx.init(model)), length=60)[0][0]


def test_the_one_block_that_was_trained_on_members_stands_out():
    """All weights are trained on public texts, then layer 1 alone on members: where do the attacks see it?"""
    members, others, public, more = (texts(16, seed=s, lengths=(10, 11)) for s in range(4))
    start = random_model(TIED)
    everything = jax.tree.map(jnp.ones_like, start)
    one = {n: np.zeros_like(w) for n, w in named(start).items()}
    one = jax.tree.map(jnp.asarray, rebuilt(start, only(one, named(everything), "1")))
    rows = lambda e: e.tokens.reshape(16, 10)
    base = trained(start, rows(public), everything)
    model = trained(base, rows(more), jax.tree.map(lambda x: 0.1 * x, everything))
    for _ in range(2):
        model = trained(model, rows(members), one)

    def profile(f, form, *models):
        scores = [run(f, *models, encoded=e)[form] for e in (members, others)]
        return [(a[:, None] > b[None]).mean() for a, b in zip(scores[0].T, scores[1].T)]

    found = {form: profile(blocks.swap, form, model, base) for form in ("swap", "swap_back")}
    found |= {form: profile(blocks.noise, form, model) for form in ("noise_absolute", "noise_relative")}
    print("".join(f"\n{form:15} AUC of {block_names(model.cfg)}: {np.round(v, 3)}" for form, v in found.items()))
    rest = lambda form: max(auc for place, auc in enumerate(found[form]) if place != 2)
    assert found["swap"][2] > max(0.99, rest("swap"))
    assert found["swap_back"][2] > 0.85 and rest("swap_back") < 0.7  # no other block ever saw a member
    for form in ("noise_absolute", "noise_relative"):  # noise does not say where they were learnt
        assert found[form][2] > 0.9 and rest(form) > 0.9


def test_blocks_cover_every_parameter_once_and_their_size_is_that_of_their_weights(check):
    for family in (UNTIED, POST):
        model = random_model(family)
        leaves, each = named(model), block_names(model.cfg)
        assert each == ("embedding", "0", "1", "2", "head")
        sizes = np.array([naive_rms(leaves, block) for block in each])
        check("block RMS vs NumPy", np.abs(np.asarray(jax.jit(block_rms)(model)) / sizes - 1).max(), 1e-6)
    assert blocks_of("embed.weight", 3) == 0 and blocks_of("lm_head.weight", 3) == 4
    with pytest.raises(ValueError, match="no block has the parameter adapter"):
        blocks_of("adapter.weight", 3)


def test_means_over_examples():
    values = np.array([[1.0, 2], [3, 4], [5, 6]], np.float32)
    np.testing.assert_array_equal(example_means(np.array([2, 0, 1]), values), [[2, 3], [np.nan, np.nan], [5, 6]])


@pytest.mark.parametrize(
    "change", [{"forms": ("nois",)}, {"forms": ()}, {"draws": 0}, {"sigma": -1.0}, {"precision": "low"}]
)
def test_settings_that_cannot_be_are_refused(change):
    with pytest.raises(ConfigError, match="whitebox: "):
        dataclasses.replace(SPEC, **change)
