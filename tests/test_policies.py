"""Where response tokens come from: draws, the adaptive threshold, the replay buffer, and the presets."""

import dataclasses

import numpy as np
import pytest

from kd_jax.distill import policies
from kd_jax.distill.objective import PRESETS, TECHNIQUES, Objective
from kd_jax.distill.policies import ReplayBuffer, Sequences
from kd_jax.errors import ConfigError

DISTILLM = PRESETS["distillm"]


@pytest.mark.parametrize(
    "u, step, stored, branch",
    [
        (0.05, 0, 0, "fresh"),
        (0.15, 50, 400, "fresh"),
        (0.15, 50, 1000, "replay"),
        (0.05, 50, 1000, "fresh"),
        (0.25, 50, 1000, "data"),
        (0.19, 99, 1000, "replay"),
    ],
)
def test_golden_branches_of_the_adaptive_policy(u, step, stored, branch):
    assert policies.choose(DISTILLM, u, step, 100, 0.2, stored) == branch
    assert policies.choose(DISTILLM, u, step, 100, 0.0, stored) == "data"


def test_replay_shares():
    at = lambda share, step: policies.choose(dataclasses.replace(DISTILLM, replay=share), 0.05, step, 100, 0.2, 1000)
    assert [at("decreasing", s) for s in (0, 74, 76)] == ["fresh", "fresh", "replay"]
    assert [at("increasing", s) for s in (0, 24, 26)] == ["replay", "replay", "fresh"]
    assert {at("constant", s) for s in (0, 50, 99)} == {"fresh"}  # below half of phi, at every step
    constant = dataclasses.replace(DISTILLM, replay="constant")
    assert policies.choose(constant, 0.15, 0, 100, 0.2, 1000) == "replay"


@pytest.mark.parametrize(
    "update, want", [("on_increase", [0, 0, 0, 0, 0.1, 0.2]), ("always", [0, 0, 0.1, 0.2, 0.3, 0.4])]
)
def test_golden_threshold(update, want):
    objective, phi, previous, trace = dataclasses.replace(DISTILLM, phi_update=update), 0.0, 3.0, []
    for loss in (2.5, 2.45, 2.62, 3.05, 3.2, 3.4):
        phi, previous = policies.next_threshold(objective, phi, previous, loss)
        trace.append(phi)
    np.testing.assert_allclose(trace, want, atol=1e-12)


def test_rates_of_the_mixed_policies():
    steps = 10_000
    draws = [policies.uniform(7, step) for step in range(steps)]
    for name, fresh in (("gkd", "fresh"), ("zhang_gkd", "replay")):
        objective = dataclasses.replace(PRESETS[name], lmbda=0.3)
        share = np.mean([policies.choose(objective, u, s, steps, 0.0, 0) == fresh for s, u in enumerate(draws)])
        assert abs(share - 0.3) < 4 * np.sqrt(0.3 * 0.7 / steps)
    assert draws[:5] == [policies.uniform(7, step) for step in range(5)] != [policies.uniform(8, s) for s in range(5)]
    for name in ("kd", "seqkd"):
        assert policies.choose(PRESETS[name], 0.0, 0, 10, 0.0, 0) == "data"


def rows(first: int, n: int, created: int) -> Sequences:
    new = Sequences.empty(n, 4)
    new.tokens[:, 0] = np.arange(first, first + n)
    new.length[:], new.created[:] = 1, created
    return new


def test_the_buffer_is_first_in_first_out_and_draws_without_replacement():
    buffer = ReplayBuffer(10, 4)
    for step in range(5):
        buffer.push(rows(3 * step, 3, step))
        assert len(buffer) == min(3 * (step + 1), 10)
    everything = buffer.draw(100, np.random.default_rng(0))
    assert sorted(everything.tokens[:, 0]) == list(range(5, 15))
    assert (everything.created == everything.tokens[:, 0] // 3).all()
    some = buffer.draw(4, np.random.default_rng(1)).tokens[:, 0]
    assert len(set(some)) == 4


def test_a_restored_buffer_draws_the_same_and_forgets_in_the_same_order():
    buffer = ReplayBuffer(10, 4)
    buffer.push(rows(0, 7, 0))
    other = ReplayBuffer(10, 4)
    other.restore({k: v.copy() for k, v in buffer.state().items()})
    for which in (buffer, other):
        which.push(rows(100, 6, 3))
    a, b = (which.draw(5, np.random.default_rng(2)) for which in (buffer, other))
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.created, b.created)


def test_every_technique_has_a_preset_of_its_name():
    assert {name for name in TECHNIQUES if PRESETS[name].technique == name} == set(TECHNIQUES)
    assert PRESETS["borkar_soft"].loss(10).t_squared and PRESETS["borkar_soft"].teacher_T == 2.0
    assert PRESETS["singh_seqkd"].sampling(64).beams > 1 and PRESETS["singh_seqkd"].kd_ratio == 0.0
    assert (PRESETS["cui"].kd_ratio, PRESETS["cui"].student_T) == (0.5, 2.0)
    assert PRESETS["zhang_gkd"].beta == 0.1, "0.9 weighs the student there, beta the teacher here"


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(policy="live"), "policy 'live' is not one of"),
        (dict(divergence="kl"), "unknown divergence 'kl'"),
        (dict(beta=1.2), r"beta must lie in \[0, 1\], got 1.2"),
        (dict(lmbda=-0.1), r"lmbda must lie in \[0, 1\]"),
        (dict(capacity=0), "capacity must be positive"),
        (dict(temperature=-1.0), "temperature"),
        (dict(top_p=0.0), "top_p"),
        (dict(beams=4), "beams"),
        (dict(policy="mixed_rollouts"), "policy gradient"),
        (dict(prefix=50), "prefix is for policy 'teacher'"),
        (dict(teacher_T=0.0), "teacher_T must be positive"),
        (dict(technique="dpo"), "technique 'dpo'"),
    ],
)
def test_objectives_are_checked(change, message):
    with pytest.raises(ConfigError, match=f"objectives.*{message}"):
        Objective(**(dict(technique="kd") | change))


def test_a_reader_is_told_what_is_not_usual():
    assert PRESETS["kd"].distinctive() == {"policy": "dataset", "divergence": "fkl"}
    assert PRESETS["cui"].distinctive() == {
        "policy": "dataset", "divergence": "fkl", "student_T": 2.0, "teacher_T": 2.0, "kd_ratio": 0.5
    }  # fmt: skip
