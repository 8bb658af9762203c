"""Counterfactual memorization: planted effects within their intervals, identities, and nothing from nothing."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from attacks import counterfactual
from attacks.chains import read_chains
from attacks.counterfactual import POOL, across, effects, examples, mean_effect, resampled, rows
from attacks.resampling import Resampler
from attacks.study import Study, Unresolved
from tests.planted_chains import SIZES, in_memory, write_chains


def study(splits=None) -> Study:
    return Study({"bootstrap": 400, "seed": 0}, {}, splits, Resampler(10, 0))


def world(design="full", chains=16, n=60, seed=0, noise=0.3, gain=None, own=None, spread=0.0, group=None):
    """Records of different difficulty; every model adds noise of its own; gains differ from record to record."""
    rng = np.random.default_rng(seed)
    hard = rng.normal(size=n)
    values = {m: hard + noise * rng.normal(size=(chains, n)) for m in ("teacher", "student")}
    size = {m: g + spread * rng.normal(size=n) for m, g in (gain or {}).items()}
    return in_memory(values, design, seed=seed, gain=size, own=own, group=group)


def one(found, **wanted):
    chosen = [r for r in found if all(r.get(k) == v for k, v in wanted.items())]
    assert len(chosen) == 1, (wanted, len(chosen))
    return chosen[0]


def test_memorization_is_the_mean_with_less_the_mean_without(check):
    chains = world(gain={"teacher": 0.4, "student": 0.1}, spread=0.3)
    for effect in effects(chains, "accuracy"):
        values, inside = chains.statistic(effect.model, "accuracy"), chains.teacher_in
        naive = [values[inside[:, i], i].mean() - values[~inside[:, i], i].mean() for i in range(values.shape[1])]
        check("counterfactual memorization, record by record", abs(effect.each.mean(axis=0) - naive).max(), 1e-12)
    assert [(e.model, e.name) for e in effects(chains, "LL")] == [("teacher", "direct"), ("student", "inherited")]


def test_two_by_two_effects_are_those_of_the_four_cells(check):
    chains = world("two_by_two", gain={"student": 0.3}, own={"student": 0.7})
    values, t, s = chains.statistic("student", "LL"), chains.teacher_in, chains.student_in
    mu = {
        (a, b): np.array([values[(t[:, i] == a) & (s[:, i] == b), i].mean() for i in range(60)])
        for a in (False, True)
        for b in (False, True)
    }
    found = {e.name: e.each.mean(axis=0) for e in effects(chains, "LL") if e.model == "student"}
    expected = {
        "direct": mu[False, True] - mu[False, False],
        "inherited": mu[True, False] - mu[False, False],
        "interaction": mu[True, True] - mu[True, False] - mu[False, True] + mu[False, False],
    }
    for name, value in expected.items():
        check("effects of the four cells", abs(found[name] - value).max(), 1e-12)
    total = mu[True, True] - mu[False, False]
    check("direct + inherited + interaction", abs(sum(found.values()) - total).max(), 1e-12)


def test_planted_effects_lie_in_their_intervals_as_often_as_they_should():
    """Means over records, over redrawn halves, models and records; the interaction is planted as none."""
    truth, held, draws = {"direct": 0.7, "inherited": 0.3, "interaction": 0.0}, {}, 60
    for seed in range(draws):
        chains = world("two_by_two", 12, 40, seed, gain={"student": 0.3}, own={"student": 0.7}, spread=0.2)
        for effect in effects(chains, "LL")[1:]:
            interval = mean_effect(chains, effect.each)
            held.setdefault(effect.name, []).append(interval.low <= truth[effect.name] <= interval.high)
    least = stats.binom.ppf(0.001, draws, 0.95) / draws
    assert {name: np.mean(each) >= least for name, each in held.items()} == dict.fromkeys(truth, True)


def test_intervals_of_single_records_hold_what_was_planted_there():
    held = []
    for seed in range(8):
        chains = world("two_by_two", 32, 50, seed, gain={"student": 0.3}, own={"student": 0.7})
        for effect, truth in zip(effects(chains, "LL")[1:], (0.7, 0.3, 0.0), strict=True):
            low, high = resampled(effect, 300, seed)
            held.append(np.mean((low <= truth) & (truth <= high)))
    assert 0.91 < np.mean(held) < 0.98


def test_nothing_planted_gives_zero_and_no_order():
    chains = world(chains=16, n=150)
    found = rows(study(), chains)
    for row in found:
        assert row["ci_low"] <= 0 <= row["ci_high"], row["measure"]
    assert {row["role"] for row in found} == {POOL} and {row["chains"] for row in found} == {16}


def test_records_that_differ_are_ordered_alike_by_disjoint_halves(check):
    chains = world(chains=24, n=150, noise=0.2, gain={"teacher": 0.4, "student": 0.2}, spread=0.2)
    found = rows(study(), chains)
    size = lambda **wanted: one(found, **wanted)["value"]
    assert size(model="shadow/teacher", measure="LL") == pytest.approx(0.4, abs=0.06)
    assert size(model="shadow/student", measure="LL") == pytest.approx(0.2, abs=0.06)
    # six of twelve pairs a half: mem has an error of variance 2 sigma^2 / 6 beside the spread of what is planted
    expected = 0.2**2 / (0.2**2 + 2 * 0.2**2 / 6)
    check(
        "order of records in disjoint halves",
        abs(size(model="shadow/teacher", measure="split_half_LL") - expected),
        0.12,
    )
    assert {row["size"] for row in found} == set(SIZES.values())


def test_the_students_order_is_compared_with_teachers_of_other_chains():
    """A student that repeats its own teacher's chance differences has not inherited what the records do."""
    chains = world(chains=16, n=200)
    shared = chains.statistic("teacher", "LL")
    chains.kept["student"]["LL"] = (shared + 0.01, np.zeros((16, 0)))
    teacher, student = effects(chains, "LL")
    assert stats.spearmanr(teacher.each.mean(axis=0), student.each.mean(axis=0)).statistic > 0.99
    rank = across(chains, teacher.each, student.each, 0)
    assert rank.low < 0.1 and rank.high > -0.1


def test_more_repeats_more_memorization():
    chains = world(n=90)
    repeats = np.array([1, 4, 16])[np.arange(90) % 3]
    values = chains.statistic("teacher", "LL") + 0.2 * np.log2(repeats) * chains.teacher_in
    chains.kept["teacher"]["LL"] = (values, np.zeros((16, 0)))
    splits = pd.DataFrame({"repeats": repeats}, index=pd.Index(chains.ids, name="example_id"))
    found = rows(study(splits), chains)
    assert one(found, measure="spearman_repeats_LL", model="shadow/teacher")["ci_low"] > 0.6
    assert not [row for row in rows(study(splits.assign(repeats=1)), chains) if "repeats" in row["measure"]]


def test_every_record_has_its_row_in_the_frame():
    chains = world("two_by_two", 8, 30)
    frame = examples(study(), chains)
    assert len(frame) == 30 * 2 * 4 and set(frame["example_id"]) == set(chains.ids)
    assert (frame["ci_low"] <= frame["value"]).all() and (frame["value"] <= frame["ci_high"]).all()
    assert examples(study(), world("cheap")).empty


def test_groups_are_one_unit():
    group = np.array([f"g{i // 3}" for i in range(90)])
    chains = world(chains=8, n=90, gain={"teacher": 0.5}, group=group)
    values = chains.statistic("teacher", "LL")
    alike = values + (np.random.default_rng(1).normal(size=30)[np.arange(90) // 3] * chains.teacher_in)
    chains.kept["teacher"]["LL"] = (alike, np.zeros((8, 0)))
    apart = world(chains=8, n=90, gain={"teacher": 0.5})
    width = lambda c: np.ptp(mean_effect(c, effects(chains, "LL")[0].each)[1:])
    assert width(chains) > 1.4 * width(apart)


def test_a_measure_that_is_lacking_takes_no_other_along():
    chains = world(chains=4)
    for known in chains.kept.values():
        del known["accuracy"]
    assert set(counterfactual.examples(study(), chains)["measure"]) == {"LL"}
    assert any("top1_id" in row.get("reason", "") for row in rows(study(), chains))


def test_what_cannot_be_computed_says_why():
    found = rows(study(), world("cheap", 8))
    assert len(found) == 4 and all("one pair of teachers" in row["reason"] for row in found)
    few = rows(study(), world(chains=4))
    assert "fewer than four pairs" in one(few, model="shadow/teacher", measure="split_half_LL")["reason"]
    broken = world(chains=4)
    broken.teacher_in[0, 0] = broken.teacher_in[1, 0]
    with pytest.raises(Unresolved, match="once in each cell"):
        effects(broken, "LL")


def test_planted_files_are_read_to_the_end(tmp_path):
    write_chains(tmp_path, design="two_by_two", chains=8, records=60, direct=0.6, inherited=0.3, noise=0.1)
    found = counterfactual.rows(study(), read_chains(tmp_path))
    value = lambda effect: one(found, model="shadow/student", measure="LL", effect=effect)
    assert value("direct")["ci_low"] <= 0.6 <= value("direct")["ci_high"]
    assert value("inherited")["ci_low"] <= 0.3 <= value("inherited")["ci_high"]
    assert all(set(row) - {"reason"} <= set(counterfactual.COLUMNS.split()) for row in found)
