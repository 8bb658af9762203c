"""RMIA: fixed values, a loop over records and population, references chosen by who was trained on what."""

import numpy as np
import pytest

from attacks import rmia
from attacks.statistics import auc
from attacks.study import Unresolved
from tests.planted_chains import in_memory


def made(n=30, z=17, r=7, seed=0):
    rng = np.random.default_rng(seed)
    inside = rng.random((r, n)) < 0.5
    inside[0], inside[1] = True, False
    return rng.random(n), rng.random((r, n)), inside, rng.random(z), rng.random((r, z))


@pytest.mark.parametrize(("gamma", "scores"), [(1.0, [1, 1 / 3]), (2.0, [1 / 3, 0])])
def test_fixed_values(gamma, scores, check):
    p, out, z, z_out = [0.8, 0.3], [[0.40, 0.35]], [0.5, 0.6, 0.2], [[0.5, 0.4, 0.3]]
    arrays = [np.array(each) for each in (p, out, [[False, False]], z, z_out)]
    check("RMIA fixed values", abs(rmia.rmia(*arrays, gamma=gamma) - scores).max(), 1e-12)


@pytest.mark.parametrize("form", ["offline", "online"])
@pytest.mark.parametrize("gamma", [1.0, 1.7])
def test_counting_equals_a_loop_over_records_and_population(form, gamma):
    p, references, inside, z, z_references = made()
    a = 0.4
    expected = np.zeros(len(p))
    pull = lambda mean: ((1 + a) * mean + (1 - a)) / 2 if form == "offline" else mean
    for i in range(len(p)):
        chosen = references[:, i] if form == "online" else references[~inside[:, i], i]
        ratio = p[i] / pull(chosen.mean())
        expected[i] = np.mean([ratio / (z[j] / pull(z_references[:, j].mean())) > gamma for j in range(len(z))])
    found = rmia.rmia(p, references, inside, z, z_references, form=form, gamma=gamma, a=a)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_scores_are_shares_and_rise_with_the_targets_signal():
    p, references, inside, z, z_references = made()
    low, high = (rmia.rmia(q, references, inside, z, z_references) for q in (p, p * 1.3))
    assert (low >= 0).all() and (high <= 1).all() and (high >= low).all() and (high > low).any()
    np.testing.assert_allclose(low * len(z), np.round(low * len(z)), atol=1e-9)


def test_order_changes_nothing():
    p, references, inside, z, z_references = made()
    rng = np.random.default_rng(1)
    rows, models, beyond = rng.permutation(len(p)), rng.permutation(len(references)), rng.permutation(len(z))
    found = rmia.rmia(
        p[rows], references[models][:, rows], inside[models][:, rows], z[beyond], z_references[models][:, beyond]
    )
    np.testing.assert_array_equal(found, rmia.rmia(p, references, inside, z, z_references)[rows])


def test_references_are_chosen_by_membership_not_by_size():
    """Offline, what is in is never read: neither its place nor its size."""
    p, references, inside, z, z_references = made()
    changed = np.where(inside, np.nan, references)
    np.testing.assert_array_equal(
        rmia.rmia(p, changed, inside, z, z_references), rmia.rmia(p, references, inside, z, z_references)
    )


def test_what_is_missing_is_an_error():
    p, references, inside, z, z_references = made()
    with pytest.raises(Unresolved, match="no records of role 'population'"):
        rmia.rmia(p, references, inside, z[:0], z_references[:, :0])
    inside[:, 3] = True
    with pytest.raises(Unresolved, match="1 records have no reference model"):
        rmia.rmia(p, references, inside, z, z_references)
    with pytest.raises(Unresolved, match="one pair of teachers"):
        rmia.chain_scores(in_memory({"student": np.zeros((6, 10))}, "cheap"), "student")


def test_a_record_without_tokens_abstains():
    p, references, inside, z, z_references = made()
    p[4] = z[2] = np.nan
    found = rmia.rmia(p, references, inside, z, z_references)
    assert np.isneginf(found[4]) and np.isfinite(np.delete(found, 4)).all()


def planted(gain: float, seed: int = 0, chains: int = 12, n: int = 200, z: int = 150):
    rng = np.random.default_rng(seed)
    hard, beyond = -3 + rng.normal(0, 0.8, n), -3 + rng.normal(0, 0.8, z)
    noise = lambda size: 0.2 * rng.normal(size=(chains, size))
    return in_memory(
        {"teacher": hard + noise(n)}, seed=seed, gain={"teacher": gain}, population={"teacher": beyond + noise(z)}
    )


def mean_auc(scores, inside):
    return np.mean([auc(own[i], own[~i]) for own, i in zip(scores, inside, strict=True)])


def test_a_planted_leak_is_found_and_a_tuned_pull_helps_where_probabilities_are_small():
    chains = planted(0.3)
    found = {
        "online": rmia.chain_scores(chains, "teacher", "online"),
        "offline": rmia.chain_scores(chains, "teacher"),
        "tuned": rmia.chain_scores(chains, "teacher", tuned=True),
        "loss": chains.statistic("teacher", "LL"),
    }
    areas = {name: mean_auc(scores, chains.teacher_in) for name, scores in found.items()}
    assert areas["online"] > 0.75 and areas["tuned"] > areas["offline"] > areas["loss"] > 0.5


def test_nothing_planted_nothing_found_tuned_or_not():
    found = []
    for seed in range(12):
        chains = planted(0.0, seed, chains=6, n=100, z=60)
        found.append(
            [mean_auc(rmia.chain_scores(chains, "teacher", tuned=t), chains.teacher_in) for t in (False, True)]
        )
    assert (abs(np.mean(found, axis=0) - 0.5) < 3.5 * np.std(found, axis=0, ddof=1) / np.sqrt(12)).all()
