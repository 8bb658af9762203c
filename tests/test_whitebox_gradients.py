"""Per-example gradient norms: against a loop over examples, jax_privacy, NumPy, and a planted leak for their sign."""

import functools

import jax
import jax.numpy as jnp
import jax_privacy
import numpy as np
import optax
import pytest
from planted_examples import POST, TIED, UNTIED, VOCAB, encoded, model
from sklearn.metrics import roc_auc_score

from kd_jax import sharding
from kd_jax.data.batches import one_batch
from kd_jax.transformer import Transformer
from kd_jax.whitebox import gradients as module
from kd_jax.whitebox.gradients import buckets, gradients, norms
from kd_jax.whitebox.spec import Whitebox, block_names

SPEC = Whitebox(VOCAB, row_length=16)  # examples of 9 to 14 tokens: one bucket, one program
ONE = lambda: sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
EXAMPLES = functools.partial(encoded, lengths=(9, 15))


def found(cfg, indices=None, spec=SPEC, mesh=None) -> dict[str, np.ndarray]:
    mesh, e = mesh or ONE(), EXAMPLES()
    with jax.set_mesh(mesh):
        placed = jax.device_put(model(cfg), sharding.shardings(model(cfg), mesh))
        return gradients(placed, e, np.arange(len(e)) if indices is None else indices, spec, mesh)


def naive(model: Transformer, batch: dict) -> jax.Array:
    """Mean NLL of the scored tokens of rows [R, T] by a softmax over all logits."""
    with jax.default_matmul_precision("highest"):
        h = model.hidden(batch["tokens"], batch["segment_ids"], batch["positions"])
        logp = jax.nn.log_softmax(h @ model.head().weight[:VOCAB].T)
    nll = -jnp.take_along_axis(logp, batch["targets"][..., None], axis=-1)[..., 0]
    return jnp.sum(nll * batch["loss_mask"]) / jnp.sum(batch["loss_mask"])


def batch(e, length: int = 16) -> dict:
    rows, _ = one_batch(e, row_length=length, packed=False, multiple=1)
    return {name: rows[name] for name in module.INPUTS}


def tensors(gradient) -> dict[str, list[np.ndarray]]:
    """Gradients of the parameter tensors by block, each layer's by themselves, float64."""
    by_block: dict[str, list[np.ndarray]] = {name: [] for name in block_names(gradient.cfg)}
    for name, leaf in zip(sharding.names(gradient), jax.tree.leaves(gradient)):
        leaf = np.asarray(leaf, np.float64)
        if name.startswith("blocks."):
            for layer, own in enumerate(leaf):
                by_block[str(layer)].append(own)
        else:
            by_block["embedding" if name.split(".")[0] in ("embed", "positions", "project_in") else "head"].append(leaf)
    return by_block


def test_equal_to_a_loop_over_examples_and_norms_by_numpy(check):
    e, got = EXAMPLES(), found(POST)
    one = jax.jit(jax.value_and_grad(naive))
    for i in (0, 4, 11):
        nll, gradient = one(model(POST), batch(e.take(np.array([i]))))
        by_block = tensors(gradient)
        each = [g.ravel() for own in by_block.values() for g in own]
        want = {f"gradient_{p:g}": np.mean([np.linalg.norm(g, p) for g in each]) for p in (1, 2, np.inf)}
        want["gradient_global"] = np.linalg.norm(np.concatenate(each))
        want["gradient_block"] = [np.sqrt(sum((g**2).sum() for g in own)) for own in by_block.values()]
        for name, value in (want | {"nll": nll}).items():
            scale = np.maximum(np.abs(value), 1e-3)  # a block without parameters has 0
            check(
                "gradient norms vs a loop over examples, relative", (np.abs(got[name][i] - value) / scale).max(), 5e-5
            )
    assert len(by_block["head"]) == 1, "no norm at the end, and a tied table: the projection out is all of the head"


@pytest.mark.filterwarnings("ignore:optax.global_norm")  # jax_privacy's own call
def test_global_norms_are_those_of_jax_privacy(check):
    each = jax_privacy.clipped_grad(naive, l2_clip_norm=float("inf"), return_grad_norms=True, microbatch_size=4)
    _, aux = jax.jit(each)(model(TIED), batch(EXAMPLES()))
    want = np.asarray(aux.grad_norms)
    check("gradient norms vs jax_privacy, relative", np.abs(found(TIED)["gradient_global"] / want - 1).max(), 5e-5)


def test_order_padding_micro_batches_and_devices_change_nothing(check, monkeypatch):
    want, some = found(TIED), np.array([9, 2, 5])
    cases = [(some, found(TIED, indices=some)), (slice(None), found(TIED, mesh=sharding.make_mesh(2, 4, 1)))]
    monkeypatch.setattr(module, "MEMORY", 3 * sum(x.size * 4 for x in jax.tree.leaves(model(TIED))))
    assert module.micro_batch(model(TIED), ONE()) == 3
    cases.append((slice(None), found(TIED, spec=Whitebox(VOCAB, row_length=28))))
    for rows, got in cases:
        for name in want:
            check(
                "gradient norms vs order, padding, micro-batches and devices, relative",
                (np.abs(got[name] - want[name][rows]) / want[name][rows]).max(),
                5e-5,
            )


def test_buckets_hold_every_example_once_and_waste_little():
    lengths = np.array([100, 3, 33, 25, 26, 51, 50, 3])
    made = list(buckets(lengths, 101, rows=2))
    assert [(places.tolist(), size) for places, size in made] == [
        ([1, 3], 26),
        ([4, 7], 26),
        ([2, 5], 51),
        ([6], 51),
        ([0], 101),
    ]


def test_members_have_smaller_gradients(check):
    """The direction, on a planted leak: a model trained on half of the examples, which are random ids."""
    members, others = encoded(24, (9, 15), seed=1), encoded(24, (9, 15), seed=2)
    rows, tx = batch(members), optax.adam(5e-3)

    @jax.jit
    def trained(model):
        def step(carry, _):
            model, state = carry
            updates, state = tx.update(jax.grad(naive)(model, rows), state)
            return (optax.apply_updates(model, updates), state), None

        return jax.lax.scan(step, (model, tx.init(model)), length=120)[0][0]

    with jax.set_mesh(ONE()):
        learnt = trained(model(TIED))
        values = [gradients(learnt, e, np.arange(24), SPEC, ONE()) for e in (members, others)]
    labels = np.repeat([1, 0], 24)
    assert values[0]["nll"].mean() < values[1]["nll"].mean()
    for name in ("gradient_1", "gradient_2", "gradient_inf", "gradient_global"):
        auc = roc_auc_score(labels, -np.concatenate([v[name] for v in values]))
        check(f"members have smaller {name}: 1 - AUC", 1 - auc, 0.05)


def test_norms_of_a_gradient_that_is_all_ones():
    """Every tensor by itself: the mean of sizes, of their roots, of ones."""
    ones = jax.tree.map(lambda x: np.ones(x.shape, np.float32), model(UNTIED))
    sizes = [g.size for own in tensors(ones).values() for g in own]
    got = {name: np.asarray(value) for name, value in jax.jit(norms)(ones).items()}
    np.testing.assert_allclose(got["gradient_1"], np.mean(sizes), rtol=1e-6)
    np.testing.assert_allclose(got["gradient_2"], np.mean(np.sqrt(sizes)), rtol=1e-6)
    assert got["gradient_inf"] == 1 and len(got["gradient_block"]) == 5
    np.testing.assert_allclose(got["gradient_global"], np.sqrt(sum(sizes)), rtol=1e-6)
    np.testing.assert_allclose(got["gradient_block"][-1] ** 2, 64 * 16 + 16, rtol=1e-6)  # output table, final norm
