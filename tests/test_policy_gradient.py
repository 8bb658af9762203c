"""MiniLLM's arithmetic against hand-computed numbers, other ways to write it, and an exact gradient."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.distill import policy_gradient as pg
from kd_jax.head import Head, Loss, Policy, head_loss

MASK = np.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]], bool)
FOLLOWS = np.array([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], bool)
LOGP = np.array([[-1.0, -0.5, -2.0, -0.25, 0], [-0.75, -3.0, 0, 0, 0]], np.float32)
LOGQ = np.array([[-1.5, -0.4, -1.0, -1.25, 0], [-0.25, -1.5, 0, 0, 0]], np.float32)
LOGQ_NEW = np.array([[-1.4, -0.45, -1.3, -1.0, 0], [-0.30, -1.9, 0, 0, 0]], np.float32)


def golden_returns():
    r = pg.rewards(LOGP, LOGQ, MASK, 0.5, 100.0)
    return pg.returns(r, MASK, FOLLOWS, 0.95, "k", True)


def test_golden_rewards_returns_and_weights(check):
    r = pg.rewards(LOGP, LOGQ, MASK, 0.5, 100.0)
    off = lambda got, want: np.abs(np.asarray(got) - np.array(want)).max()
    name = "MiniLLM golden numbers"
    check(name, off(r, [[1, -0.2, -2, 2, 0], [-1, -3, 0, 0, 0]]), 1e-6)
    plain = pg.returns(r, MASK, FOLLOWS, 0.95, "k", False)
    check(name, off(plain, [[0.71975, -0.295, -0.1, 2, 0], [-3.85, -3, 0, 0, 0]]), 1e-6)
    check(name, off(golden_returns(), [[0.1799375, -0.0983333333, -0.05, 2, 0], [-1.925, -3, 0, 0, 0]]), 1e-6)
    w = np.exp(pg.log_importance(LOGP, LOGQ, MASK, 0.2))[MASK]
    want = [0.8851560841, 1.0194017811, 1.1447202395, 0.7442379060, 1.0854155479, 1.1839559309]
    check(name, off(w, want), 1e-6)
    ratio = np.exp(LOGQ_NEW - LOGQ)[MASK] * w
    want = [0.9782487621, 0.9696849696, 0.8480296110, 0.9556203874, 1.0324792070, 0.7936293941]
    check(name, off(ratio, want), 1e-6)
    paper = pg.returns((LOGP - LOGQ) * MASK, MASK, FOLLOWS, 1.0, "next", True)
    check(name, off(paper, [[-0.0333333333, 0, 1, 0, 0], [-1.5, 0, 0, 0, 0]]), 1e-6)


def test_clipping_of_rewards():
    assert np.asarray(pg.rewards(LOGP, LOGQ, MASK, 0.5, 1.5))[1, 1] == -1.5
    assert np.asarray(pg.rewards(LOGP, LOGQ, MASK, 0.5, 0.0))[1, 1] == -3


@pytest.mark.parametrize(
    "count, advantages, loss",
    [
        (10, [0.3720089092, 0.1514159315, 0.1897311002, 1.8148227379, -1.2966332026, -2.1488154028], 0.1086461560),
        (6, [0.4139253018, 0.2399770491, 0.2701904163, 1.5516539237, -0.9018798649, -1.5738668261], -0.0265466634),
    ],
    ids=["reference", "masked"],
)
def test_golden_whitening_and_policy_loss(count, advantages, loss, check):
    """The policy loss comes from the head: a vocabulary of two, whose first id is the token."""
    a = pg.whiten(golden_returns(), MASK, count)
    check("MiniLLM golden numbers", np.abs(np.asarray(a)[MASK] - advantages).max(), 1e-6)
    assert (np.asarray(a)[~MASK] == 0).all()
    log_w = pg.log_importance(LOGP, LOGQ, MASK, 0.2)
    q = np.exp(LOGQ_NEW[MASK].astype(np.float64))
    h = np.stack([np.log(q), np.log1p(-q)], axis=1).astype(np.float32)
    policy = Policy(jnp.asarray(np.asarray(a)[MASK]), jnp.asarray(np.asarray(LOGQ - log_w)[MASK]))
    weights = {"policy": jnp.full(6, 1 / 6)}
    head = Head(jnp.eye(2))
    got, _ = head_loss(jnp.asarray(h), head, None, None, jnp.zeros(6, jnp.int32), weights, Loss(2, clip=0.2), policy)
    check("MiniLLM golden numbers", abs(float(got) - loss), 1e-6)


def test_whitening_is_that_of_the_masked_values_and_ignores_more_padding(check):
    rng = np.random.default_rng(0)
    mask = rng.random((7, 30)) < 0.4
    x = rng.normal(3.0, 5.0, mask.shape).astype(np.float32)
    got = np.asarray(pg.whiten(x, mask, mask.sum()))
    check("masked whitening: mean and variance", abs(got[mask].mean()) + abs(got[mask].var() - 1), 1e-5)
    pad = lambda y: np.pad(y, ((0, 0), (0, 50)))
    padded = np.asarray(pg.whiten(pad(x), pad(mask), mask.sum()))[:, :30]
    check("whitening vs more padding", np.abs(padded - got).max(), 1e-6)
    assert np.abs(np.asarray(pg.whiten(x, mask, mask.size)) - got).max() > 0.1


def test_returns_by_scan_loop_and_matrix_agree(check):
    rng = np.random.default_rng(1)
    lengths = np.array([1, 4, 9, 12])
    mask = np.arange(12) < lengths[:, None]
    follows = np.arange(12) + 1 < lengths[:, None]
    r = np.where(mask, rng.normal(size=mask.shape), 0).astype(np.float32)
    for gamma in (0.0, 0.5, 0.95, 1.0):
        got = np.asarray(pg.returns(r, mask, follows, gamma, "k", False))
        for row, n in enumerate(lengths):
            j, k = np.meshgrid(np.arange(n), np.arange(n))
            matrix = np.where(j >= k, gamma ** np.maximum(j - k, 0.0), 0.0)
            check("returns vs matrix", np.abs(got[row, :n] - matrix @ r[row, :n].astype(np.float64)).max(), 1e-5)
    remaining = np.maximum(lengths[:, None] - np.arange(12), 1)
    np.testing.assert_allclose(np.asarray(pg.returns(r, mask, follows, 0.0, "k", True)), r / remaining, atol=1e-6)
    long = np.ones((1, 1024), bool)
    goes_on = np.arange(1024)[None] < 1023
    assert np.isfinite(pg.returns(np.ones((1, 1024), np.float32), long, goes_on, 0.95, "k", True)).all()


def test_two_responses_in_one_row_do_not_meet():
    mask = np.array([[0, 1, 1, 0, 1, 1, 1, 0]], bool)
    follows = np.array([[0, 1, 0, 0, 1, 1, 0, 0]], bool)
    r = np.where(mask, 1.0, 0.0).astype(np.float32)
    np.testing.assert_array_equal(pg.returns(r, mask, follows, 1.0, "k", False), [[0, 2, 1, 0, 3, 2, 1, 0]])
    np.testing.assert_array_equal(pg.returns(r, mask, follows, 1.0, "next", True), [[0, 1, 0, 0, 1, 1, 0, 0]])


def test_importance_weights():
    """Bounded, 1 without a teacher's share, and of mean 1 under the mixture that they correct for."""
    rng = np.random.default_rng(2)
    p, q = (rng.dirichlet(np.ones(6)) for _ in range(2))
    every = np.ones(6, bool)
    w = np.exp(np.asarray(pg.log_importance(np.log(p), np.log(q), every, 0.2)))
    assert (w > 0).all() and (w <= 1 / 0.8 + 1e-6).all()
    assert (w * (0.8 * q + 0.2 * p)).sum() == pytest.approx(1.0, abs=1e-6)
    assert (np.asarray(pg.log_importance(np.log(p), np.log(q), every, 0.0)) == 0).all()


def test_in_expectation_it_is_the_gradient_of_the_sequence_kl(check):
    """A toy model over 3 tokens and 3 positions, every sequence enumerated.

    With the mixture off, no length normalisation, no clipping and no whitening, the single-step term and the return
    from the next token on make the exact gradient of KL(q || p) of whole sequences.
    """
    rng = np.random.default_rng(3)
    V, T = 3, 3
    sequences = np.array(list(itertools.product(range(V), repeat=T)))
    contexts = [np.zeros(len(sequences), int)]  # an id for every prefix: the tables are indexed by it
    for t in range(T - 1):
        contexts.append(contexts[-1] * V + sequences[:, t] + 1)
    contexts = np.stack(contexts, 1)
    teacher = jax.nn.log_softmax(rng.normal(size=(contexts.max() + 1, V)))
    theta = jnp.asarray(rng.normal(size=teacher.shape), jnp.float32)

    def logq_of(theta):
        return jax.nn.log_softmax(theta)[contexts]  # [S, T, V]

    at = lambda table: np.take_along_axis(np.asarray(table), sequences[..., None], -1)[..., 0]
    logp = at(teacher[contexts])

    def sequence_kl(theta):
        logq = jnp.take_along_axis(logq_of(theta), sequences[..., None], -1)[..., 0].sum(1)
        return jnp.sum(jnp.exp(logq) * (logq - logp.sum(1)))

    exact = jax.grad(sequence_kl)(theta)
    probability = np.exp(at(logq_of(theta)).sum(1))
    mask = np.ones(sequences.shape, bool)
    follows = np.arange(T)[None] < np.full((len(sequences), 1), T - 1)
    r = pg.rewards(logp, at(logq_of(theta)), mask, 1.0, 0.0)
    advantage = pg.returns(r, mask, follows, 1.0, "next", False)

    def surrogate(theta):
        logq = logq_of(theta)
        chosen = jnp.take_along_axis(logq, sequences[..., None], -1)[..., 0]
        single = jnp.sum(jnp.exp(logq) * (logq - teacher[contexts]), -1)
        return jnp.sum(probability[:, None] * (single - advantage * chosen))

    check("policy gradient vs exact sequence KL", float(jnp.abs(jax.grad(surrogate)(theta) - exact).max()), 1e-5)
