"""blocks.csv: a planted block stands out in every form, a model without a leak is flat, and rows are what they say."""

import numpy as np
import pandas as pd
import planted_whitebox as planted
import pyarrow.parquet as pq
import pytest
from planted_scores import World
from test_attacks_scoring import study_of

from attacks import blocks
from attacks.blocks import COLUMNS, CURVES, WHOLE, facts, place
from attacks.statistics import auc, best_threshold, delong, paired_delong
from attacks.study import Pair
from attacks.tables import TableError

LAYERS, EXAMPLES, PLANTED = 4, 150, 3
STUDENT = "students/kd"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A student with three seeds that leaks in one block, null and bases that do not, a deeper teacher, a swap."""
    world = World(tmp_path_factory.mktemp("blocks"), {"private": 200, "heldout": 180}, seed=3)
    world.write("base_student", train_roles=[], init=None)
    world.write("null")
    world.write("teacher", {"private": 1.0}, train_roles=["private"], init=None)
    world.write("swap", {"heldout": 1.0}, train_roles=["heldout"], init=None, swap_of="teacher")
    flat = planted.leak_in(LAYERS, None)
    for run in ("base_student", "null"):
        planted.write(world, run, flat, examples=EXAMPLES, base=None if run == "base_student" else "base_student")
    planted.write(world, "teacher", planted.leak_in(LAYERS + 2, 4, 1.5), examples=EXAMPLES)
    planted.write(world, "swap", planted.leak_in(LAYERS + 2, 4, 1.5), examples=EXAMPLES, members="heldout")
    for seed in range(3):
        world.write(STUDENT, {"private": 0.4}, seed=seed, technique="kd", setting="disjoint", teacher="teacher")
        shift = planted.leak_in(LAYERS, PLANTED, 1.2)
        planted.write(world, STUDENT, shift, seed=seed, examples=EXAMPLES, base="base_student")
    study = study_of(world.folder, attacks=["loss"])
    return world, study, pd.DataFrame(blocks.rows(study))


def pick(frame, **wanted):
    for key, value in wanted.items():
        frame = frame[frame[key] == value]
    return frame


def column(world, run, name, seed=0, k=None):
    """Members' and non-members' values straight from the files."""
    found = []
    for role in ("private", "heldout"):
        table = pq.read_table(world.folder / run / f"seed{seed}" / "whitebox" / f"{role}-00000.parquet")
        table = table.sort_by("example_id")
        values = np.array(table[name].to_pylist(), float)
        found.append(values if k is None else values[:, k])
    return found


@pytest.mark.parametrize("form", [*CURVES, "lens_shift"])
def test_the_planted_block_stands_out_and_null_is_flat(made, form):
    curve = pick(made[2], model=STUDENT, form=form, metric="auc", seed="all").query("block != 'all'").set_index("block")
    named = planted.names(LAYERS)[: len(curve)]
    top = curve.loc[named[PLANTED]]
    assert list(curve.index) == named and (curve.drop(named[PLANTED])["ci_high"] < top["ci_low"]).all()
    test = pick(made[2], model=STUDENT, form=form, metric="auc_range", seed="all").iloc[0]
    assert test["p_corrected"] < 0.01 and test["value"] == pytest.approx(np.ptp(curve["value"]))
    share = pick(made[2], model=STUDENT, form=form, metric="share_above_null", seed="all")["value"].item()
    assert share == pytest.approx(1 / len(named))
    assert (
        pick(made[2], model=STUDENT, form=form, metric="auc_range_less_null", seed="all")["p_corrected"].item() < 0.01
    )
    assert (pick(made[2], model="null", form=form, metric="auc_range")["p_corrected"] > 0.05).all()


def test_values_are_those_of_the_files(made):
    world, _, frame = made
    for form, (attack, name, sign) in CURVES.items():
        for k in (0, PLANTED):
            at = {"form": form, "block": planted.names(LAYERS)[k], "seed": 1}
            of_both = [sign * side for side in column(world, STUDENT, name, 1, k)]
            row = pick(frame, model=STUDENT, metric="auc", **at).iloc[0]
            np.testing.assert_allclose(row[["value", "ci_low", "ci_high"]].astype(float), delong(*of_both), rtol=1e-12)
            assert (row["attack"], row["n_members"], row["n_nonmembers"]) == (attack, EXAMPLES, EXAMPLES)
            gap = pick(frame, model=STUDENT, metric="auc_less_null", **at).iloc[0]
            null = [sign * side for side in column(world, "null", name, 0, k)]
            expected = paired_delong(*of_both, *null)
            np.testing.assert_allclose(gap[["value", "ci_low", "ci_high"]].astype(float), expected[:3], rtol=1e-9)
    sigmas = frame.groupby("form")["sigma"].first()
    assert sigmas["noise_absolute"] == 0.01 and sigmas["noise_relative"] == 0.05 and np.isnan(sigmas["swap"])
    assert set(frame) <= {*COLUMNS.split(), "measure", "reason"}


def test_the_whole_model_has_rows_of_its_own(made):
    world, _, frame = made
    for (form, attack), (name, sign) in WHOLE.items():
        row = pick(frame, model="teacher", form=form, attack=attack, block="all", metric="auc").iloc[0]
        assert row["value"] == pytest.approx(auc(*(sign * side for side in column(world, "teacher", name))))


def test_lens_shift_is_the_lens_less_that_of_the_base(made):
    world, _, frame = made
    student, base = (column(world, run, "lens", 2 * (run == STUDENT), PLANTED) for run in (STUDENT, "base_student"))
    row = pick(frame, model=STUDENT, form="lens_shift", block="2", metric="auc", seed=2).iloc[0]
    assert row["attack"] == "reference:base_student"
    assert row["value"] == pytest.approx(auc(*(a - b for a, b in zip(student, base, strict=True))))
    assert not len(pick(frame, model="teacher", form="lens_shift"))


def test_seeds_are_pooled(made):
    rows = pick(made[2], model=STUDENT, form="swap", block="2", metric="auc").set_index("seed")
    assert list(rows.index) == [0, 1, 2, "all"]
    assert rows["value"]["all"] == pytest.approx(rows["value"][[0, 1, 2]].mean())


def test_members_of_a_swap_are_the_held_out_records(made):
    top = pick(made[2], model="swap", form="noise_relative", block="3", metric="auc").iloc[0]
    assert top["ci_low"] > 0.7


def test_other_depths_are_compared_by_rank_only(made):
    of = pick(made[2], model="teacher", form="swap")
    assert not of["metric"].isin(["auc_less_null", "share_above_null", "auc_range_less_null"]).any()
    assert pick(of, metric="spearman:null")["value"].abs().max() <= 1
    assert len(pick(made[2], model=STUDENT, form="swap", metric="spearman:teacher")) == 4


def test_balanced_accuracy_takes_its_threshold_from_the_other_half():
    rng = np.random.default_rng(0)
    values, same = [], []
    for _ in range(60):
        members, nonmembers = rng.normal(size=40), rng.normal(size=30)
        ids = [np.array([f"{side}{i:03d}" for i in range(n)]) for side, n in (("a", 40), ("b", 30))]
        tasks = [np.array(["t"] * 40), np.array(["t"] * 30)]
        pair = Pair("r", 0, "a", "private-heldout", *ids, members, nonmembers, *tasks, (0, 0))
        values.append(blocks._crossed_accuracy(pair).value)
        naive = []
        for half in (0, 1):
            here, there = slice(half, None, 2), slice(1 - half, None, 2)
            at = best_threshold(members[there], nonmembers[there])
            naive.append((np.sum(members[here] >= at) / 40, np.sum(nonmembers[here] < at) / 30))
        assert values[-1] == pytest.approx(np.sum(naive) / 2)
        at = best_threshold(members, nonmembers)
        same.append(((members >= at).mean() + (nonmembers < at).mean()) / 2)
    assert abs(np.mean(values) - 0.5) < 4 * np.std(values) / np.sqrt(60) < np.mean(same) - 0.5


def test_words(made):
    told = facts(made[1], made[2].to_dict("records"))
    (said,) = [words for words in told["words"] if words.startswith(f"{STUDENT}, noise relative")]
    assert "block 3 of 4 shows most" in said and "above null at the same block; blocks differ (p = " in said
    assert "not what it holds" in said and not any("not what" in w for w in told["words"] if "block put" in w)
    assert "how large" in told["note"] and "not that it holds the members" in told["note"]
    assert not any(words.startswith(("null", "base_")) for words in told["words"])
    assert place("head", planted.names(2)) == "the head" and place("0", planted.names(2)) == "block 1 of 2"


def test_a_form_or_a_role_that_was_not_scored(tmp_path):
    world = World(tmp_path, {"private": 30, "heldout": 30}, seed=4)
    for run in ("null", STUDENT):
        world.write(run)
    assert (
        blocks.rows(study_of(tmp_path, attacks=["loss"]))
        == []
        == facts(study_of(tmp_path, attacks=["loss"]), [])["words"]
    )
    planted.write(world, STUDENT, planted.leak_in(2, 1), forms=("swap",))
    planted.write(world, "null", planted.leak_in(2, 1), roles=("private",))
    found = blocks.rows(study_of(tmp_path, attacks=["loss"]))
    (missing,) = [row for row in found if "reason" in row]
    assert missing["model"] == "null" and "not looked into on role heldout" in missing["reason"] and missing["measure"]
    curves = {row["form"] for row in found if row.get("block") == "1"}
    assert curves == {"swap"} and all(row["metric"] != "auc_less_null" for row in found)
    (words,) = facts(study_of(tmp_path, attacks=["loss"]), found)["words"]
    assert "no null model to set beside it" in words


def test_a_form_that_diverged_takes_no_other_along(tmp_path):
    world = World(tmp_path, {"private": 30, "heldout": 30}, seed=4)
    world.write(STUDENT)
    planted.write(world, STUDENT, planted.leak_in(2, 1), forms=("noise_absolute", "swap"))
    path = tmp_path / STUDENT / "seed0/whitebox/private-00000.parquet"
    table = pq.read_table(path)
    made = {name: np.array(table[name].to_pylist()) for name in table.column_names[4:]}
    made["noise_absolute"][0, 2] = np.nan
    ids = table["example_id"].to_pylist()
    planted.save(world, planted.table(ids, "private", ["t"] * 30, [9] * 30, made), STUDENT, "private", 2)
    found = blocks.rows(study_of(tmp_path, attacks=["loss"]))
    (missing,) = [row for row in found if "reason" in row]
    assert missing["form"] == "noise_absolute" and missing["reason"].startswith("block 1: 1 of 30 members")
    assert {row["form"] for row in found if row.get("block") == "1"} == {"swap"}


def test_roles_of_different_models_are_an_error(tmp_path):
    world = World(tmp_path, {"private": 30, "heldout": 30}, seed=4)
    world.write("null")
    planted.write(world, "null", planted.leak_in(2, 1), roles=("private",))
    planted.write(world, "null", planted.leak_in(3, 1), roles=("heldout",))
    with pytest.raises(TableError, match="null/seed0.*differ in blocks or columns"):
        blocks.rows(study_of(tmp_path, attacks=["loss"]))


def test_an_example_without_tokens_abstains_and_a_nan_is_an_error(tmp_path):
    world = World(tmp_path, {"private": 30, "heldout": 30}, seed=4)
    world.write("null")
    planted.write(world, "null", planted.leak_in(2, 1), forms=("swap",))
    path = tmp_path / "null/seed0/whitebox/private-00000.parquet"
    table = pq.read_table(path)
    swaps = np.array(table["swap"].to_pylist())
    swaps[0] = np.nan
    made = {name: np.array(table[name].to_pylist()) for name in table.column_names[4:]} | {"swap": swaps}
    for tokens, told in ((0, False), (5, True)):
        lengths = [tokens, *[9] * 29]
        ids = table["example_id"].to_pylist()
        planted.save(world, planted.table(ids, "private", ["t"] * 30, lengths, made), "null", "private", 2)
        found = blocks.rows(study_of(tmp_path, attacks=["loss"]))
        assert any("1 of 30 members" in row.get("reason", "") for row in found) == told
