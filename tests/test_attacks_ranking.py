"""The ranking of techniques: what is separated, what is a tie, and how often equal techniques are called different."""

import itertools
import shutil

import numpy as np
import pandas as pd
import pytest
from planted_scores import QUICK, STRENGTHS, World, row, six, tables
from scipy import stats

from attacks import statistics as st
from attacks.audit import audit
from attacks.ranking import ONE_SEED

KD = QUICK | {"headline_model": "students/kd", "attacks": ["loss"], "blind": False}
PAIRS = list(itertools.combinations([f"students/{name}" for name in STRENGTHS], 2))


def strength(model: str) -> float:
    return STRENGTHS[model.removeprefix("students/")]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Six students, three seeds: (folder of scores, tables, summary)."""
    folder = tmp_path_factory.mktemp("six")
    six(folder / "scores")
    summary = audit(folder / "scores", folder / "out", KD)
    return folder / "scores", tables(folder / "out"), summary


# --- planted strengths -----------------------------------------------------------------------------------------------


def test_what_is_planted_is_found_and_ties_are_ties(planted):
    _, _, summary = planted
    (ranking,) = summary["ranking"]
    assert (ranking["setting"], ranking["attack"], ranking["seeds"]) == ("disjoint", "loss", 3)
    found = {(gap["more"], gap["less"]) for gap in ranking["separated"]}
    assert all(strength(more) > strength(less) for more, less in found)
    wide = {
        tuple(sorted(pair, key=strength, reverse=True))
        for pair in PAIRS
        if abs(np.subtract(*map(strength, pair))) > 0.2
    }
    assert wide <= found
    tied = {frozenset(pair) for pair in ranking["tied"]}
    assert {frozenset(pair) for pair in PAIRS if strength(pair[0]) == strength(pair[1])} <= tied
    assert len(tied) + len(found) == len(PAIRS)
    said = "\n".join(summary["verdicts"])
    assert "students/kd leaks more than students/minillm (by " in said
    ties = next(line for line in summary["verdicts"] if line.startswith("Not separated: "))
    assert "students/imitkd and students/seqkd" in ties and "students/distillm and students/kd" in ties
    values = [student["value"] for student in ranking["students"]]
    assert values == sorted(values, reverse=True)


def test_the_gap_is_that_of_the_tables_and_holm_is_over_the_pairs_alone(planted):
    _, found, summary = planted
    d = found["differences"].query("seed == 'all' and attack == 'loss'")
    d = d[d["model_a"].str.startswith("students/") & d["model_b"].str.startswith("students/")]
    assert len(d) == len(PAIRS)
    order = np.argsort(d["p_value"].to_numpy())
    holm, worst = np.empty(len(d)), 0.0  # by a loop, from its definition
    for k, i in enumerate(order):
        worst = max(worst, min(1, (len(d) - k) * d["p_value"].to_numpy()[i]))
        holm[i] = worst
    np.testing.assert_allclose(d["p_corrected"], holm)
    aucs = found["membership"].query("metric == 'auc' and task == 'all' and seed != 'all'")
    mean = aucs.groupby("model")["value"].mean()
    for gap in summary["ranking"][0]["separated"]:
        assert gap["difference"] == pytest.approx(mean[gap["more"]] - mean[gap["less"]]) and gap["difference"] > 0
        assert gap["ci_low"] < gap["difference"] < gap["ci_high"] and gap["ci_low"] > 0


def test_p_values_by_hand(planted):
    """Paired DeLong's variance of the seed mean, plus the model x seed residual of the AUCs over the seeds."""
    scores, found, _ = planted
    load = lambda run, k, role: pd.read_parquet(scores / run / f"seed{k}" / "plain" / f"{role}-00000.parquet")
    mean = lambda run, k, role: np.array(
        [np.mean(x, dtype=float) for x in load(run, k, role).sort_values("example_id")["logp"]]
    )
    scored = {
        (run, k): [mean(run, k, role) for role in ("private", "heldout")] for run in _students() for k in range(3)
    }
    psi = {key: (x[:, None] > y).astype(float) for key, (x, y) in scored.items()}
    auc = np.array([[psi[run, k].mean() for k in range(3)] for run in _students()])
    a, b = (_students().index(f"students/{name}") for name in ("kd", "gkd"))
    gap = np.mean([psi["students/kd", k] - psi["students/gkd", k] for k in range(3)], axis=0)
    within = gap.mean(axis=1).var(ddof=1) / gap.shape[0] + gap.mean(axis=0).var(ddof=1) / gap.shape[1]
    pooled = np.mean([np.var(auc[i] - auc[j], ddof=1) for i, j in itertools.combinations(range(6), 2)])
    between = max(pooled, np.var(auc[a] - auc[b], ddof=1)) / 3
    df = (within + between) ** 2 / between**2 * 10
    p = 2 * stats.t.sf(abs(gap.mean()) / np.sqrt(within + between), df)
    at = {"model_a": "students/gkd", "model_b": "students/kd", "attack": "loss", "seed": "all"}
    assert row(found["differences"], **at)["p_value"] == pytest.approx(p, rel=1e-6)


def _students() -> list[str]:
    return [f"students/{name}" for name in sorted(STRENGTHS)]


# --- when there is none ----------------------------------------------------------------------------------------------


def test_one_seed_ranks_nothing_even_where_it_looks_clear(planted, tmp_path):
    for run in ("null", *STRENGTHS):
        part = run if run == "null" else f"students/{run}"
        shutil.copytree(planted[0] / part / "seed0", tmp_path / "scores" / part / "seed0")
    summary = audit(tmp_path / "scores", tmp_path / "out", KD)
    assert ONE_SEED == "One seed ranks nothing." and ONE_SEED in summary["verdicts"]
    assert not any("leaks more" in line for line in summary["verdicts"])
    assert summary["ranking"][0]["separated"] is None
    shutil.copytree(planted[0] / "students/kd" / "seed1", tmp_path / "scores" / "students/kd" / "seed1")
    said = audit(tmp_path / "scores", tmp_path / "out", KD)["verdicts"]
    (line,) = [each for each in said if each.startswith(ONE_SEED)]
    assert "students/gkd" in line and "students/kd" not in line


def test_settings_are_ranked_apart_and_never_compared(tmp_path):
    world = World(tmp_path / "scores", {"private": 120, "heldout": 120})
    for name, setting, nats in (
        ("a", "disjoint", 0.0),
        ("b", "disjoint", 0.8),
        ("c", "shared", 0.0),
        ("d", "shared", 0.8),
    ):
        for k in range(3):
            world.write(f"students/{name}", {"private": nats}, seed=k, setting=setting, technique="kd")
    summary = audit(tmp_path / "scores", tmp_path / "out", KD | {"headline_model": "students/a"})
    d = tables(tmp_path / "out")["differences"]
    assert set(zip(d["model_a"], d["model_b"], strict=True)) == {
        ("students/a", "students/b"),
        ("students/c", "students/d"),
    }
    assert [(r["setting"], r["separated"][0]["more"]) for r in summary["ranking"]] == [
        ("disjoint", "students/b"),
        ("shared", "students/d"),
    ]


def test_students_with_different_seeds_are_not_ranked(tmp_path):
    world = World(tmp_path / "scores", {"private": 60, "heldout": 60})
    for name, seeds in (("kd", (0, 1)), ("gkd", (0, 2))):
        for k in seeds:
            world.write(f"students/{name}", {"private": 0.5}, seed=k)
    (ranking,) = audit(tmp_path / "scores", tmp_path / "out", KD)["ranking"]
    assert ranking["separated"] is None and "could be compared" in ranking["words"][0]


def test_other_recipes_rank_runs_and_not_techniques(tmp_path):
    world = World(tmp_path / "scores", {"private": 60, "heldout": 60})
    for name, recipe in (("kd", "matched"), ("gkd", "zhang2025")):
        for k in range(2):
            world.write(f"students/{name}", seed=k, recipe=recipe)
    (ranking,) = audit(tmp_path / "scores", tmp_path / "out", KD)["ranking"]
    assert ranking["words"][-1].endswith("this ranks runs, not techniques.")
    assert "No two techniques are separated" in ranking["words"][0]


# --- how often equals are called different ---------------------------------------------------------------------------


def test_pooled_spread_is_the_mean_spread_of_all_gaps():
    values = np.random.default_rng(0).normal(size=(5, 4))
    gaps = [np.var(values[i] - values[j], ddof=1) for i, j in itertools.combinations(range(5), 2)]
    spread = st.gap_spread(values)
    assert spread.variance == pytest.approx(np.mean(gaps)) and spread.df == 12
    shifted = st.gap_spread(values + np.arange(4))  # what all models share in a seed is not a difference
    assert shifted.variance == pytest.approx(spread.variance)


@pytest.mark.parametrize("seeds", [2, 3])
@pytest.mark.parametrize("seed_sd,example_sd", [(1.0, 0.05), (1.0, 0.5), (0.2, 1.0)])
def test_equal_techniques_are_seldom_called_different(check, seeds, seed_sd, example_sd):
    """Six equal techniques: the share of families in which Holm finds any difference."""
    rng, draws, false, naive = np.random.default_rng(1), 400, 0, 0
    for _ in range(draws):
        values = seed_sd * rng.normal(size=(6, seeds)) + example_sd * rng.normal(size=(6, 1)) / np.sqrt(2)
        pooled, p, alone = st.gap_spread(values), [], []
        for i, j in itertools.combinations(range(6), 2):
            for ps, spread in ((p, pooled), (alone, None)):
                mean = st.over_seeds(values[i] - values[j], example_sd**2, spread)
                ps.append(st.difference(mean.value, mean.se, df=mean.df).p)
        false += st.holm(p).min() < 0.05
        naive += st.holm(alone).min() < 0.05
    check("share of families of equal techniques in which one is called different", false / draws, 0.075)
    if seed_sd > example_sd:
        assert naive > 2 * false  # without the pooled spread


def test_two_techniques_with_two_seeds_are_seldom_called_different():
    """One gap of two seeds: it may vanish by luck, which must not pass for certainty."""
    rng, draws, false = np.random.default_rng(2), 3000, 0
    for seed_sd, example_sd in ((1.0, 0.3), (1.0, 0.05)):
        for _ in range(draws):
            values = seed_sd * rng.normal(size=(2, 2)) + example_sd * rng.normal(size=(2, 1)) / np.sqrt(2)
            mean = st.over_seeds(values[0] - values[1], example_sd**2, st.gap_spread(values))
            false += st.difference(mean.value, mean.se, df=mean.df).p < 0.05
    assert false / (2 * draws) < 0.06


def test_a_clear_difference_is_found():
    rng, found = np.random.default_rng(3), 0
    for _ in range(200):
        values = 0.01 * rng.normal(size=(6, 3)) + 0.01 * rng.normal(size=(6, 1)) / np.sqrt(2)
        values[0] += 0.08
        mean = st.over_seeds(values[0] - values[1], 0.01**2, st.gap_spread(values))
        found += 15 * st.difference(mean.value, mean.se, df=mean.df).p < 0.05
    assert found / 200 > 0.9
