"""Influence of one record on another: a product of matrices, a noise floor, ids alone."""

import numpy as np
import pytest

from attacks.influence import COLUMNS, above_noise, influences, matrix
from attacks.resampling import Resampler
from attacks.study import Study, Unresolved
from tests.planted_chains import in_memory


def study(seed=0) -> Study:
    return Study({"bootstrap": 10, "seed": seed}, {}, None, Resampler(10, 0))


def world(chains=40, n=60, seed=0, planted=None, own=0.0, group=None, design="full"):
    """planted: {(source, target): what the source in the training data adds to the target}."""
    values = np.random.default_rng(seed).normal(size=(chains, n))
    found = in_memory({m: values for m in ("teacher", "student")}, design, seed=seed, group=group)
    values = values + own * found.teacher_in
    for (source, target), gain in (planted or {}).items():
        values[:, target] += gain * found.teacher_in[:, source]
    for model in ("teacher", "student"):
        found.kept[model]["accuracy"] = (values if model == "teacher" else values * 0, np.zeros((chains, 0)))
    return found


def test_the_matrix_is_the_difference_of_means(check):
    rng = np.random.default_rng(0)
    values, inside = rng.normal(size=(14, 9)), rng.random((14, 9)) < 0.5
    expected = [[values[inside[:, s], t].mean() - values[~inside[:, s], t].mean() for t in range(9)] for s in range(9)]
    check("influence against differences of means", abs(matrix(values, inside) - expected).max(), 1e-12)
    np.testing.assert_allclose(matrix(values, inside, slice(2, 5)), matrix(values, inside)[2:5])
    inside[:, 1] = True
    with pytest.raises(Unresolved, match="all chains"):
        matrix(values, inside)


def test_planted_influences_are_found_by_their_ids():
    chains = world(planted={(3, 8): 4.0, (5, 21): 3.5}, own=2.0)
    found = influences(study(), chains)
    assert list(found.columns) == list(COLUMNS) and set(found["model"]) == {"shadow/teacher"}
    assert set(zip(found["source_id"], found["target_id"], strict=True)) == {("r00003", "r00008"), ("r00005", "r00021")}
    assert (found["influence"] > found["floor"]).all() and found["influence"].iloc[0] == pytest.approx(4, abs=0.7)


def test_what_a_record_does_to_itself_is_no_influence_where_coins_agree_by_chance():
    """Eight pairs: coins of some records agree in all chains, and each is much better known by what has seen it."""
    chains = world(chains=16, n=150, own=6.0)
    inside = chains.teacher_in
    assert ((inside.T.astype(int) @ inside + (~inside).T.astype(int) @ ~inside) == 16).sum() > 150
    raw = matrix(chains.statistic("teacher", "accuracy"), inside)
    np.fill_diagonal(raw, 0)
    assert (raw > 4).any() and len(influences(study(), chains)) == 0


def test_nothing_planted_passes_the_floor_as_rarely_as_it_should():
    assert sum(len(influences(study(seed), world(n=30, chains=12, seed=seed))) > 0 for seed in range(30)) <= 6


def test_records_of_one_group_share_their_coin_and_are_never_paired():
    group = np.array([f"g{i // 2:03d}" for i in range(60)])
    chains = world(planted={(4, 5): 6.0, (4, 30): 6.0}, group=group)
    found = influences(study(), chains)
    pairs = set(zip(found["source_id"], found["target_id"], strict=True))
    assert ("r00004", "r00005") not in pairs and ("r00004", "r00030") in pairs


def test_of_many_the_strongest_are_kept_in_order(monkeypatch):
    monkeypatch.setattr("attacks.influence.STRONGEST", 3)
    monkeypatch.setattr("attacks.influence.CELLS", 500)  # several blocks
    chains = world(chains=80, planted={(k, 30 + k): 4.0 + 0.6 * k for k in range(6)})
    values, inside = chains.statistic("teacher", "accuracy"), chains.teacher_in
    (source, target, value), floor = above_noise(values, inside, chains.pairs, chains.group, study())
    assert source.tolist() == [5, 4, 3] and target.tolist() == [35, 34, 33] and (np.diff(value) <= 0).all()
    assert floor < value.min()


def test_tables_without_the_column_or_without_tokens_have_none():
    chains = world(chains=4)
    chains.kept["teacher"]["accuracy"] = (np.full((4, 60), np.nan), np.zeros((4, 0)))
    del chains.kept["student"]["accuracy"]
    assert influences(study(), chains).empty


def test_one_pair_of_teachers_has_none():
    assert influences(study(), world(chains=8, design="cheap")).empty
