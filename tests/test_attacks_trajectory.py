"""Trajectories of the loss: hand numbers, a planted memoriser, and checkpoints as variants of a run's tables."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from planted_scores import PROVENANCE, QUICK, World

from attacks import audit, trajectory
from attacks.scoring import load_study
from attacks.signals import CannotScore
from attacks.statistics import auc
from attacks.tables import Tokens

NAMES = ("trajectory_slope", "trajectory_area", "trajectory_drop", "trajectory_half")


def at(nll) -> Tokens:
    """Examples of one token each."""
    n = len(nll)
    token = {"logp": -np.asarray(nll, np.float64)}
    return Tokens(np.array([f"e{i}" for i in range(n)]), np.full(n, "t"), np.arange(n + 1), token, {})


def test_by_hand():
    """NLL 4 at the start, then 3 at step 10, 1 at step 40 of 40; the second record rises, the third is constant."""
    start, steps = at([4, 1, 2]), [(40, at([1, 2, 2])), (10, at([3, 1, 2]))]  # any order
    score = lambda name, **keys: getattr(trajectory, name)(at([0, 0, 0]), steps, start, **keys)
    np.testing.assert_allclose(score("trajectory_drop"), [3, -1, 0])
    # half of 3 nats is reached between 10 (1 fallen) and 40 (3 fallen): a quarter of the way
    np.testing.assert_allclose(score("trajectory_half"), [-(0.25 + 0.25 * 0.75), -np.inf, -np.inf])
    area = 0.25 * 3.5 + 0.75 * 2
    np.testing.assert_allclose(score("trajectory_area"), [4 - area, -0.75 * 0.5, 0])
    np.testing.assert_allclose(score("trajectory_area", relative=0), [-area, -(0.25 + 0.75 * 1.5), -2])
    slope = np.polyfit([0, 0.25, 1], [4, 3, 1], 1)[0]
    np.testing.assert_allclose(score("trajectory_slope")[0], -slope)
    for wrong in ([(10, start)], [], [(10, start), (10, start)]):
        with pytest.raises(CannotScore, match="two different checkpoints"):
            trajectory.trajectory_drop(start, wrong, start)


@pytest.mark.parametrize("name", NAMES)
def test_planted_memoriser(name):
    """Members fall by 1.2 nats, most of it early; the others by 0.6, evenly. Without members chance."""
    for leak in (True, False):
        scores, n = memoriser(name, leak)
        found = auc(scores[:n], scores[n:])
        assert found > 0.9 if leak else abs(found - 0.5) < 0.08


def memoriser(name: str, leak: bool, n: int = 300) -> tuple[np.ndarray, int]:
    rng = np.random.default_rng(0)
    member, hard = (np.arange(2 * n) < n) & leak, rng.gamma(4, 1, 2 * n)
    depth = np.where(member, 1.2, 0.6) * np.exp(0.1 * rng.normal(size=2 * n))
    curve = lambda t: at(hard - depth * t ** np.where(member, 0.4, 1.0) + 0.05 * rng.normal(size=2 * n))
    return getattr(trajectory, name)(curve(1.0), [(k, curve(k / 4)) for k in (1, 2, 3, 4)], at(hard)), n


def test_checkpoints_are_variants_of_a_run(tmp_path):
    world = World(tmp_path, {"private": 80, "heldout": 80, "dev": 20})
    world.write("base_student", train_roles=[], init=None)
    world.write("direct", {"private": 1.0}, train_roles=["private"])
    for step, nats in ((4, 0.6), (8, 0.9)):
        for role in world.roles:
            told = {"run": "direct", "seed": "0", "step": str(step), "variant": f"step-{step}"}
            path = tmp_path / "direct/seed0" / f"step-{step}" / f"{role}-00000.parquet"
            path.parent.mkdir(exist_ok=True)
            table = world.table(role, nats * (role == "private"), 0.1)
            pq.write_table(table.replace_schema_metadata(told | {"provenance": json.dumps(PROVENANCE)}), path)
    study = load_study(tmp_path, audit.complete(QUICK | {"attacks": ["loss", *NAMES]}, tmp_path))
    assert set(NAMES) <= set(study.attacks("direct")) and not set(NAMES) & set(study.attacks("base_student"))
    for name in NAMES[:3]:
        assert study.pairs("direct", 0, name, "private-heldout")[0].auc.value > 0.9, name
