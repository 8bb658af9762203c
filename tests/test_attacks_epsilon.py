"""Rows of epsilon.csv: planted canaries and chains, what flips `valid`, and the words beside a number."""

import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from planted_chains import write_chains
from planted_scores import QUICK, World

from attacks import epsilon
from attacks.audit import complete
from attacks.chains import read_chains
from attacks.epsilon import (
    CHAIN_ATTACKS,
    COLUMNS,
    _one_a_run,
    _who_met,
    chain_rows,
    headlines,
    rows,
    sentence,
    units_of,
    verdict,
    words,
)
from attacks.lower_bounds import Rule, bounds, largest
from attacks.scoring import load_study
from attacks.shadow import bound_scores
from attacks.study import Unresolved

SETTINGS = QUICK | {"attacks": ["loss", "zlib"], "primary": "loss", "blind": False}


def canaries(folder, coin=None, seeds=(0,)):
    """Two placements by a coin, met by the teacher; a student and a null that leak nothing of their own."""
    world = World(folder, {"private": 30, "heldout": 30, "canary": 160}, seed=3)
    world.write_text()
    path = folder / "text" / "splits.parquet"
    splits = pd.read_parquet(path)
    number = np.arange(len(splits))
    splits["placement"] = np.array(["teacher_only", "both", "none", "student_only"])[number % 4]
    splits["repeats"] = np.where(number % 8 < 4, 1, 4)
    if coin is not None:
        splits["coin"] = coin(splits["example_id"].to_numpy())
    splits.to_parquet(path)
    put_in = splits[(splits.role == "canary") & (splits.coin == 1) & splits.placement.isin(["teacher_only", "both"])]
    for seed in seeds:
        told = {"train_roles": ["private"]}
        table = world.table("canary", 0.0, 0.05)
        at = np.isin(np.asarray(table["example_id"].to_pylist()), put_in.example_id)
        gain = np.repeat(np.where(at, 6.0, 0.0), world.roles["canary"]["lengths"])
        flat = np.minimum(table["logp"].combine_chunks().flatten().to_numpy() / np.where(gain > 0, 40, 1), -1e-4)
        lists = type(table["logp"].combine_chunks()).from_arrays(table["logp"].combine_chunks().offsets, flat)
        place = table.column_names.index("logp")
        world.save(table.set_column(place, "logp", lists), "teacher", "canary", seed, **told)
        world.write("teacher", seed=seed, roles=["private", "heldout"], **told)
        world.write("null", seed=seed, technique="sft", setting="disjoint", train_roles=["public"])
        taught = {"technique": "kd", "setting": "disjoint", "teacher": "teacher", "train_roles": ["public"]}
        world.write("students/kd", seed=seed, **taught)
    return load_study(folder, complete(SETTINGS, folder))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return canaries(tmp_path_factory.mktemp("scores"), seeds=(0, 1))


@pytest.fixture(scope="module")
def frame(study):
    return pd.DataFrame(rows(study))


def test_planted_canaries(study, frame):
    """The teacher's canaries show through, no other model's; the numbers are those of `bounds` on the coins."""
    assert set(frame) <= set(COLUMNS.split()) | {"measure", "reason"}
    main = frame[(frame.source == "canaries:teacher_only") & (frame.method == "one_run") & (frame.strategy == "split")]
    teacher = main[(main.model == "teacher") & (main.seed == 0)].iloc[0]
    scores = study.scores["teacher", 0, "loss", "canary"]
    drawn = study.splits.loc[scores.ids]
    mine = (drawn.placement == "teacher_only").to_numpy()
    inside, outside = (scores.values[mine & (drawn.coin == c).to_numpy()] for c in (1, 0))
    expected = bounds(inside, outside, strategy="split", seed=study.settings["seed"], methods=("one_run",))[0]
    assert (teacher.epsilon, teacher.largest) == (expected.epsilon, expected.largest)
    assert (teacher.n_in, teacher.n_out) == (len(inside), len(outside)) and teacher.epsilon > 0.5
    assert teacher.valid == "yes" and teacher.trained_models == 1
    others = main[(main.model != "teacher")]
    assert set(others.model) == {"null", "students/kd"} and (others.epsilon == 0).all() and (others.largest > 0.5).all()


def test_what_is_said_of_the_design(frame):
    said = frame[frame.seed == 0].drop_duplicates(["model", "source"]).set_index(["model", "source"])["conditions"]
    assert "in the model's own data" in said["teacher", "canaries:teacher_only"]
    assert "the chain of teacher and student" in said["students/kd", "canaries:teacher_only"]
    assert "both together are bounded" in said["students/kd", "canaries:both"]
    assert "a control" in said["null", "canaries:teacher_only"] and "own data" in said["null", "canaries:both"]
    assert "all its copies (1, 4)" in said["teacher", "canaries:both"]
    assert "all its copies (4)" in said["teacher", "canaries:both@repeats=4"]
    assert all("checked: a coin each" in words for words in said)
    assert (frame[frame.strategy == "bonferroni"].valid == "estimate").all()
    proven = frame[frame.method.notna() & (frame.strategy != "bonferroni")]
    verdicts = proven.groupby("method")["valid"].unique().map(list).to_dict()
    assert verdicts == {
        "one_run": ["yes"], "one_run_fdp": ["estimate"], "clopper_pearson": ["estimate"], "gdp": ["estimate"]
    }  # fmt: skip


def test_natural_members_are_refused(frame):
    natural = frame[frame.source == "private-heldout"]
    assert set(natural.model) == {"teacher", "students/kd"} and (natural.valid == "no").all()
    assert natural.epsilon.isna().all() and natural.conditions.str.contains("refused").all()


def test_seeds_give_their_median_at_half_the_significance(study, frame):
    main = frame[(frame.model == "teacher") & (frame.source == "canaries:teacher_only") & (frame.attack == "loss")]
    main = main[(main.method == "one_run") & (main.strategy == "bonferroni")].set_index("seed")
    whole = main.loc["all"]
    each = []
    for seed in (0, 1):
        scores = study.scores["teacher", seed, "loss", "canary"]
        drawn = study.splits.loc[scores.ids]
        sides = (scores.values[((drawn.placement == "teacher_only") & (drawn.coin == c)).to_numpy()] for c in (1, 0))
        each.append(bounds(*sides, significance=0.025, strategy="bonferroni", methods=("one_run",))[0].epsilon)
    assert whole.epsilon == pytest.approx(np.mean(each)) and whole.trained_models == 2
    assert (whole.least, whole.greatest) == (min(each), max(each)) and whole.epsilon < main.loc[0].epsilon + 1e-9
    assert (main["significance"] == 0.05).all() and "never the best" in whole.conditions


def test_a_biased_coin_is_no_design(tmp_path):
    """What was put in was not drawn by a fair coin: no number, for any method."""
    study = canaries(tmp_path, coin=lambda ids: (np.arange(len(ids)) % 10 > 0).astype(int))
    found = pd.DataFrame(rows(study)).query("attack == 'loss' and source == 'canaries:teacher_only'")
    assert (found.valid == "no").all() and found.epsilon.isna().all()
    assert found.conditions.str.contains("refused: inclusion was no fair coin").all()
    assert "no fair coin" in sentence(found.iloc[0].to_dict())


def test_words(frame):
    found = frame.to_dict("records")
    chosen = headlines(found, "loss")
    assert {(r["source"], r["attack"], r["method"], r["strategy"]) for r in chosen} == {
        ("canaries:teacher_only", "loss", "one_run", "split")
    }
    said = words(found, "loss")
    assert len(said) == 3  # one line a model: the median over seeds
    null = next(line for line in said if line.startswith("null"))
    assert "a control that met nothing: bound 0, as it must be; this design could have shown up to" in null
    teacher = next(line for line in said if line.startswith("teacher"))
    assert "epsilon is at least" in teacher and "unit: a canary with all its copies (1, 4)" in teacher


def test_without_a_design_there_is_a_reason(tmp_path):
    world = World(tmp_path, {"private": 30, "heldout": 30})
    world.write("teacher")
    (row,) = rows(load_study(tmp_path, complete(SETTINGS, tmp_path)))
    assert "no design" in row["reason"]


def test_without_the_library_there_is_a_reason(study, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_privacy", None)
    found = rows(study)
    assert found and all("jax_privacy" in row["reason"] for row in found)


# --- units and verdicts ----------------------------------------------------------------------------------------------


def test_a_group_is_one_unit():
    """Three records of one person count once, with their mean; a person put in and left out is refused."""
    groups, inside = np.array(list("aaabcd")), np.array([1, 1, 1, 0, 1, 0], bool)
    trial = units_of(inside, np.array([3.0, 4, 5, 0, 1, 2]), groups, ["more"])
    np.testing.assert_array_equal(trial.inside, [4, 1])
    np.testing.assert_array_equal(trial.outside, [0, 2])
    assert trial.words == ["checked: a coin each, 2 of 4 in (p 1), 6 records in 4 groups", "more"]
    inside[1] = False
    with pytest.raises(Unresolved, match="one group"):
        units_of(inside, np.zeros(6), groups, [])


def test_verdicts():
    assert verdict("one_run", 0.5, "dependent")[0] == "yes"
    assert verdict("one_run_fdp", 0.5, "dependent")[0] == "estimate"
    assert verdict("clopper_pearson", 0.5, "dependent")[0] == "estimate"
    assert verdict("clopper_pearson", 0.5, "")[0] == "yes" and verdict("gdp", 0.5, "")[0] == "estimate"
    assert verdict("one_run", 1e-4, "")[0] == "no"
    assert verdict("one_run", 0.5, "", "bonferroni")[0] == "estimate"  # the scores chose the thresholds


def test_a_teacher_that_was_not_scored_makes_no_control():
    told = {"teacher": "teacher", "train_roles": ["public"]}
    alone = SimpleNamespace(provenance=lambda run: told, runs=["students/kd"])
    assert _who_met(alone, "students/kd", "teacher_only").startswith("not known")
    assert "own data" in _who_met(alone, "students/kd", "both")


# --- chains ----------------------------------------------------------------------------------------------------------


def chains(count=4, records=200, design="full", leak=3.0):
    """Complementary pairs, two records a group; scores of each target, shifted by `leak` for what is in."""
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(records // 2), 2).astype(str)
    coin = np.repeat(rng.random((count // 2, records // 2)) < 0.5, 2, axis=1)
    inside = np.stack([coin, ~coin], axis=1).reshape(count, records)
    told = {
        "technique": "kd",
        "setting": "disjoint",
        "seed": 5,
        "sizes": dict.fromkeys(("teacher", "student"), "2 layers x 16"),
        "pairs": np.repeat(np.arange(count // 2), 2),
    }
    scores = rng.normal(size=(count, records)) + leak * inside
    return SimpleNamespace(design=design, group=group, teacher_in=inside, **told), scores


def test_chains():
    """Median and range over targets, of groups; a number for independent runs beside it, valid without references."""
    made, scores = chains()
    found = pd.DataFrame(chain_rows(made, {("shadow/student", "lira"): scores, ("shadow/student", "loss"): scores}, 0))
    main = found[(found.source == "chains:full") & (found.attack == "lira")].set_index(["method", "strategy"])
    row = main.loc["one_run", "bonferroni"]
    each = []
    for inside, values in zip(made.teacher_in, scores, strict=True):
        sides = (values.reshape(-1, 2).mean(1)[inside[::2] == c] for c in (True, False))
        each.append(bounds(*sides, significance=0.025, strategy="bonferroni", methods=("one_run",))[0].epsilon)
    assert row.epsilon == pytest.approx(np.median(each)) and row.trained_models == 4 and row.valid == "estimate"
    assert main.loc["one_run", "split"].valid == "yes"
    assert (row.least, row.greatest) == (min(each), max(each)) and row.n_in + row.n_out in (99, 100)
    assert "2 layers x 16" in row.conditions and "chain of teacher and student" in row.conditions
    assert set(main.index) == {("one_run", "split"), ("one_run_fdp", "split"), ("one_run", "bonferroni")}


def test_independent_runs():
    """One record from one chain of each pair: valid for scores that no other chain has a part in."""
    made, scores = chains(40, 100, leak=6.0)
    for attack, valid in (("lira", "estimate"), ("loss", "yes")):
        head = {"model": "m", "source": "chains:full", "attack": attack}
        split, row = _one_a_run(made.teacher_in[::2], scores[::2], made.group, head, [], 0)
        assert (split["method"], split["valid"], split["strategy"]) == ("clopper_pearson", valid, "split")
        assert split["trained_models"] == 20 and split["epsilon"] <= split["largest"]
        assert (row["method"], row["valid"], row["source"]) == ("clopper_pearson", "estimate", "chains:full@one_a_run")
        assert row["trained_models"] == row["n_in"] + row["n_out"] == 20
        most = largest("clopper_pearson", row["n_in"], row["n_out"], Rule(strategy="bonferroni"))
        assert row["epsilon"] == row["largest"] == most > 0


def test_cheap_chains_are_refused():
    made, scores = chains(design="cheap")
    found = list(chain_rows(made, {("shadow/student", "loss"): scores}, 0))
    assert [row["model"] for row in found] == ["shadow/teacher", "shadow/student"]
    assert all(row["valid"] == "no" and "epsilon" not in row for row in found)
    assert "very same coins" in found[0]["conditions"]


def test_rows_of_chain_tables(study, tmp_path):
    """From tables on disk: LiRA on the teacher shows much, on a student that inherits nothing 0."""
    write_chains(tmp_path, chains=4, records=80, direct=1.5, inherited=0.0)
    made = read_chains(tmp_path)
    found = pd.DataFrame(chain_rows(made, bound_scores(study, made), 0))
    main = found[(found.method == "one_run") & (found.strategy == "split") & (found.source == "chains:full")]
    assert set(main.attack) == set(CHAIN_ATTACKS)
    main = main.set_index(["model", "attack"])
    assert main.loc[("shadow/teacher", "lira_online"), "epsilon"] > 0.5
    assert (main.loc["shadow/student", "epsilon"] == 0).all() and (main.largest > 1).all()
    assert {row["attack"] for row in headlines(found.to_dict("records"), "loss")} == {"lira_online"}


def test_a_record_without_a_score_is_no_unit():
    made, scores = chains()
    scores[:, 4:6] = np.nan
    row = next(chain_rows(made, {("shadow/student", "loss"): scores}, 0))
    assert row["n_in"] + row["n_out"] in (98, 99) and row["epsilon"] > 0
    scores[0, 0] = np.nan  # of one chain alone: it may have diverged
    assert "not a number" in next(chain_rows(made, {("shadow/student", "loss"): scores}, 0))["reason"]


def test_unfair_chains_are_refused():
    made, scores = chains()
    made.teacher_in[2] = np.repeat(np.arange(100) % 8 > 0, 2)
    found = pd.DataFrame(chain_rows(made, {("shadow/teacher", "loss"): scores}, 0))
    assert (found[found.source == "chains:full"].valid == "no").all()


def test_chains_that_split_a_group_have_a_reason(study, monkeypatch):
    made, scores = chains()
    made.teacher_in[1, 0] = ~made.teacher_in[1, 0]
    monkeypatch.setattr(epsilon.shadow, "bound_scores", lambda *_: {("shadow/teacher", "loss"): scores})
    monkeypatch.setattr(epsilon, "canary_rows", lambda _: iter(()))
    assert any("shadow chains: records of one group" in row.get("reason", "") for row in rows(study, made))


def test_null_chains_show_nothing():
    """The median over targets stays 0 where scores do not know what was in."""
    made, scores = chains(leak=0.0)
    found = pd.DataFrame(chain_rows(made, {("shadow/student", "loss"): scores}, 0))
    found = found[found.source == "chains:full"]
    assert (found.epsilon == 0).all() and (found.largest > 1.5).all()


def test_columns_are_those_of_the_table():
    made, scores = chains()
    for row in chain_rows(made, {("shadow/student", "loss"): scores}, 0):
        assert set(row) <= set(COLUMNS.split()) | {"measure", "reason"}
    assert epsilon.DELTA == 1e-6
