"""shadow.csv: attacks with shadow chains beside the cheap ones, on files with a planted leak and without one."""

import numpy as np
import pytest

from attacks import shadow
from attacks.chains import read_chains
from attacks.resampling import Resampler
from attacks.scoring import load_study
from attacks.study import Study
from tests.planted_chains import SIZES, in_memory, write_chains
from tests.planted_scores import World

SETTINGS = {"bootstrap": 100, "seed": 0}
STRONG = {*shadow.LIRA, *shadow.RMIA}


def study() -> Study:
    return Study(SETTINGS, {}, None, Resampler(100, 0))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Eight chains of 280 records, of which the student keeps a quarter of what the teacher has."""
    folder = tmp_path_factory.mktemp("planted")
    write_chains(folder, chains=8, records=280, population=120, direct=0.4, inherited=0.1, noise=0.4)
    world = World(folder, {"private": 140, "heldout": 140, "population": 120}, 0, 12)  # the same records
    world.write("base_student", noise=0.4, roles=("private", "heldout"))
    audit = {"bootstrap": 100, "seed": 0, "attacks": ["loss"], "references": []}
    own = load_study(folder, audit)
    chains = read_chains(folder)
    return own, chains, shadow.rows(own, chains)


def one(rows, **wanted):
    found = [r for r in rows if all(r.get(k) == v for k, v in wanted.items())]
    assert len(found) == 1, (wanted, len(found))
    return found[0]


def test_every_attack_has_its_rows_for_teacher_and_student(planted):
    _, _, rows = planted
    attacks = STRONG | {*shadow.CHEAP, shadow.REFERENCE, "calibrated_loss"}
    for model, words in SIZES.items():
        own = [row for row in rows if row["model"] == f"shadow/{model}" and row["against"] == ""]
        assert {row["attack"] for row in own} == attacks
        assert {row["metric"] for row in own} == {*shadow.METRICS, "auc_sd"}
        assert {(row["size"], row["design"], row["targets"]) for row in own} == {(words, "full", 8)}
        assert {row["statistic"] for row in own if row["attack"] == "lira_online"} == {"logit", "LL"}
    assert all(set(row) - {"reason"} <= set(shadow.COLUMNS.split()) for row in rows)
    # eight chains less the target's pair: three with and three without
    assert (
        one(rows, model="shadow/student", attack="lira_online", statistic="LL", against="", metric="auc")["references"]
        == 6
    )
    assert one(rows, model="shadow/student", attack="rmia_offline", against="", metric="auc")["references"] == 3
    assert one(rows, model="shadow/student", attack="zlib", against="", metric="auc")["references"] == 0


def test_what_was_planted_is_found_by_strong_attacks_and_less_of_it_by_the_loss(planted):
    own, chains, rows = planted
    value = lambda model, attack: one(
        rows, model=f"shadow/{model}", attack=attack, statistic="LL", against="", metric="auc"
    )
    for model in SIZES:
        assert value(model, "lira_offset")["ci_low"] > value(model, "loss")["ci_high"]
        assert value(model, shadow.REFERENCE)["ci_low"] > value(model, "loss")["value"]
        gap = one(rows, model=f"shadow/{model}", attack="lira_offset", statistic="LL", against="loss", metric="auc")
        assert gap["ci_low"] > 0 and gap["p_corrected"] < 0.01
        alone = value(model, "lira_offset")["value"] - value(model, "loss")["value"]
        assert gap["value"] == pytest.approx(alone)
    passed = one(rows, attack="lira_offset", statistic="LL", against="shadow/teacher", metric="auc")
    assert passed["model"] == "shadow/student" and passed["ci_high"] < 0
    ratio = one(rows, attack="lira_offset", statistic="LL", against="shadow/teacher", metric="tpr_ratio_at_fpr_0.01")
    both = [
        one(rows, model=f"shadow/{m}", attack="lira_offset", statistic="LL", against="", metric="tpr_at_fpr_0.01")
        for m in ("student", "teacher")
    ]
    assert ratio["value"] == pytest.approx(both[0]["value"] / both[1]["value"]) and ratio["ci_high"] < 1


def test_metrics_are_means_over_targets_never_the_best(planted):
    own, chains, rows = planted
    (scores,) = [s.values for s in shadow.scored(own, chains, "teacher") if (s.attack, s.statistic) == ("loss", "LL")]
    each = []
    for values, inside in zip(scores, chains.teacher_in, strict=True):
        each.append(np.mean(values[inside][:, None] > values[~inside]))
    at = {"model": "shadow/teacher", "attack": "loss", "against": ""}
    assert one(rows, **at, metric="auc")["value"] == pytest.approx(np.mean(each))
    assert one(rows, **at, metric="auc_sd")["value"] == pytest.approx(np.std(each, ddof=1))


def test_gaps_are_corrected_attack_by_attack(planted):
    _, _, rows = planted
    at = {"model": "shadow/student", "attack": "lira_online", "statistic": "logit", "metric": "auc"}
    family = [row for row in rows if at.items() <= row.items() and row["against"] not in ("", "shadow/teacher")]
    assert {row["against"] for row in family} == {*shadow.CHEAP, shadow.REFERENCE, "calibrated_loss"}
    smallest = min(family, key=lambda row: row["p_value"])
    assert smallest["p_corrected"] == pytest.approx(min(1, len(family) * smallest["p_value"]))
    assert all(row["p_corrected"] >= row["p_value"] for row in family)


def test_what_too_few_records_cannot_resolve_is_left_empty_with_a_reason(planted):
    own, _, rows = planted
    low = [row for row in rows if row["metric"] == "tpr_at_fpr_0.001"]
    assert low and all("needs 1000 or more" in row["reason"] and "value" not in row for row in low)
    assert any("3 reference models with and 3 without" in note for note in own.notes)
    assert any("RMIA's population has 120 records" in note for note in own.notes)


def test_words_set_lira_beside_the_loss_with_the_size_of_the_models(planted):
    words = shadow.facts(planted[2])["words"]
    assert len(words) == 2 and SIZES["student"] in words[1] and "8 targets, 6 references" in words[1]


def test_scores_for_lower_bounds_have_a_number_for_every_record(planted):
    own, chains, _ = planted
    found = shadow.bound_scores(own, chains)
    assert set(found) == {(f"shadow/{m}", a) for m in SIZES for a in ("lira_online", "rmia_offline", "loss")}
    assert all(values.shape == (8, 280) and np.isfinite(values).all() for values in found.values())


def test_without_a_base_there_is_no_reference_attack_and_with_other_records_a_reason(tmp_path):
    write_chains(tmp_path, chains=4, records=30, population=10)
    chains = read_chains(tmp_path)
    assert shadow.REFERENCE not in {row["attack"] for row in shadow.rows(study(), chains)}
    World(tmp_path, {"private": 8, "heldout": 15}, 0, 12).write("base_student")
    own = load_study(tmp_path, SETTINGS | {"attacks": ["loss"], "references": []})
    rows = shadow.rows(own, read_chains(tmp_path))
    assert {row["reason"] for row in rows if row["attack"] == shadow.REFERENCE and row["against"] == ""} == {
        "base_student was scored on other records of role 'private' than the chains"
    }


def test_one_pair_of_teachers_gives_calibrated_scores_that_no_bound_rests_on(tmp_path):
    write_chains(tmp_path, design="cheap", chains=6, records=120, direct=0.4, inherited=0.2, noise=0.3)
    own, chains = study(), read_chains(tmp_path)
    rows = shadow.rows(own, chains)
    assert {row["attack"] for row in rows} == {*shadow.CHEAP, "calibrated_loss@both"}
    teacher = one(rows, model="shadow/teacher", attack="loss", metric="auc")
    assert teacher["targets"] == 2 and one(rows, model="shadow/student", attack="loss", metric="auc")["targets"] == 6
    best = one(rows, model="shadow/student", attack="calibrated_loss@both", metric="auc", against="")
    assert best["ci_low"] > one(rows, model="shadow/student", attack="loss", metric="auc", against="")["ci_high"]
    assert {attack for _, attack in shadow.bound_scores(own, chains)} == {"loss"}
    assert any("not LiRA or RMIA" in note for note in own.notes) and shadow.facts(rows) == {"words": []}


def test_a_student_with_data_of_its_own_is_asked_about_the_teachers(tmp_path):
    """What the student has itself is no leak of the teacher's: only the teacher's records count as members."""
    rng = np.random.default_rng(0)
    for gain, found in ((0.0, False), (0.6, True)):
        chains = in_memory(
            {m: rng.normal(size=160) + 0.3 * rng.normal(size=(16, 160)) for m in ("teacher", "student")},
            "two_by_two",
            gain={"student": gain},
            own={"student": 2.0},
            population={m: rng.normal(size=(16, 100)) for m in ("teacher", "student")},
        )
        rows = shadow.rows(study(), chains)
        row = one(rows, model="shadow/student", attack="lira_offset", statistic="LL", metric="auc", against="")
        assert (row["ci_low"] > 0.5) == found and row["references"] == 6


def test_nothing_planted_nothing_found():
    missed, own = {}, Study(SETTINGS, {}, None, Resampler(20, 0))
    for seed in range(10):
        rng = np.random.default_rng(seed)
        hard, make = rng.normal(size=100), lambda h, r=rng: h + 0.3 * r.normal(size=(6, len(h)))
        chains = in_memory(
            {m: make(hard) for m in ("teacher", "student")},
            seed=seed,
            population={m: make(hard[:50]) for m in ("teacher", "student")},
        )
        for row in shadow.rows(own, chains):
            if row["metric"] == "auc" and row["against"] == "" and "reason" not in row:
                key = row["model"], row["attack"], row["statistic"]
                missed.setdefault(key, []).append(not row["ci_low"] <= 0.5 <= row["ci_high"])
    shares = {key: np.mean(values) for key, values in missed.items()}
    assert len(shares) > 20 and max(shares.values()) <= 0.3 and np.mean(list(shares.values())) < 0.12
