"""Entropy beside log-probability by who memorizes, KL of members and others, students that differ in T alone."""

from types import SimpleNamespace

import numpy as np
import pytest
from planted_extractions import extraction, ids_of, planted, row
from scipy import stats

from attacks import mechanism
from attacks.mechanism import points, temperatures
from attacks.tables import Tokens

RUNS = ("teacher", "direct", "students/kd")


def regimes(seeds=(0,), n=120, seed=0):
    """A third T&B&S, a third T&B not S, a third none; the baseline is forced, the student stays flat."""
    rng, third = np.random.default_rng(seed), n // 3
    kind = np.repeat([0, 1, 2], third)
    entropy = {"teacher": (0.2, 0.3, 2.0), "direct": (0.2, 1.1, 2.0), "students/kd": (0.2, 1.3, 2.0)}
    log_p = {"teacher": (-1, -1, -40), "direct": (-1, -6, -40), "students/kd": (-1, -60, -40)}
    found = {}
    for run in RUNS:
        for k in seeds:
            for role in ("private", "heldout"):
                memorized = (kind < (1 if run == "students/kd" else 2)) & (role == "private")
                noise = rng.normal(size=(2, n)) * 0.05
                values = {
                    "entropy": np.array(entropy[run])[kind] + noise[0],
                    "log_p": np.array(log_p[run])[kind] + noise[1],
                }
                found[run, k, role] = extraction(memorized, run=run, seed=k, role=role, **values)
    return found


def test_three_regimes(check):
    for seeds in ((0,), (0, 1, 2)):
        study, shelf = planted(regimes(seeds))
        seed = "all" if len(seeds) > 1 else 0
        rows = [r for r in mechanism.rows(study, shelf) if r["seed"] == seed]
        at = lambda model, measure, group, role="private", rows=rows: row(
            rows, model=model, measure=f"{measure}@k=10", group=group, role=role
        )
        forced = at("direct", "entropy_less_teacher", "T&B not S")
        flat = at("students/kd", "log_p_less_teacher", "T&B not S")
        check("planted entropy of the forced baseline", abs(forced["value"] - 0.8), 0.05)
        check("planted log-probability of the flat student", abs(flat["value"] + 59), 0.05)
        assert forced["ci_low"] > 0.7 and flat["ci_high"] < -58 and forced["n"] == 40
        assert at("students/kd", "entropy", "all")["n"] == 120
        assert at("teacher", "log_p", "T&B&S")["value"] == pytest.approx(-1, abs=0.05)
        control = at("students/kd", "entropy", "none", "heldout")
        assert control["n"] == 120 and not [r for r in rows if r["role"] == "heldout" and r["group"] == "T&B&S"]
        assert {r["technique"] for r in rows if r["model"] == "teacher"} == {"-"}
        assert {r["setting"] for r in rows} == {"shared"} and {r["student"] for r in rows} == {"students/kd"}


def test_interval_of_one_mean_equals_the_textbook(check):
    found = regimes()
    study, shelf = planted(found)
    values = found["teacher", 0, "private"].entropy[40:80]
    want = stats.t.interval(0.95, 39, values.mean(), stats.sem(values))
    at = row(mechanism.rows(study, shelf), model="teacher", measure="entropy@k=10", group="T&B not S", role="private")
    check("interval of a mean vs scipy's t", max(abs(at["ci_low"] - want[0]), abs(at["ci_high"] - want[1])), 1e-9)
    names = {name: f"text-{i // 4}" for i, name in enumerate(ids_of("private", 120))}
    grouped, shelf = planted(found, groups=names)
    wide = row(mechanism.rows(grouped, shelf), model="teacher", measure="entropy@k=10", group="all", role="private")
    narrow = row(mechanism.rows(study, shelf), model="teacher", measure="entropy@k=10", group="all", role="private")
    assert wide["ci_high"] - wide["ci_low"] > 1.7 * (narrow["ci_high"] - narrow["ci_low"]), "four alike are one"


def test_no_difference_is_covered():
    held, rng = 0, np.random.default_rng(3)
    for _ in range(200):
        found = {}
        for run in RUNS:
            values = rng.gamma(2, 0.5, 60), -rng.gamma(3, 5.0, 60)
            found[run, 0, "private"] = extraction(np.zeros(60, bool), run=run, entropy=values[0], log_p=values[1])
        rows = mechanism.rows(*planted(found))
        at = row(rows, model="students/kd", measure="log_p_less_teacher@k=10", group="none")
        held += at["ci_low"] < 0 < at["ci_high"]
    assert 0.90 <= held / 200 <= 0.99


class Paired(SimpleNamespace):
    """A pair table: files and columns by role."""

    def load(self, role, fields):
        return self.roles[role]


def pair_tokens(role: str, per_example: list[list[float]]) -> Tokens:
    flat = np.concatenate([np.asarray(each, float) for each in per_example])
    offsets = np.concatenate([[0], np.cumsum([len(each) for each in per_example])])
    token = {"kl_ab": flat, "kl_ba": 2 * flat, "segment": np.ones(len(flat), np.int8)}
    ids = ids_of(role, len(per_example))
    return Tokens(ids, np.full(len(ids), "all"), offsets, token, {})


def test_divergence_of_members_and_others():
    study, shelf = planted(regimes())
    roles = {
        "private": pair_tokens("private", [[1.0, 3.0], [4.0], [], [6.0, 6.0, 6.0]]),
        "heldout": pair_tokens("heldout", [[1.0], [2.0, 2.0], [3.0]]),
    }
    study.tables["students/kd", 0].variants["pair:teacher"] = Paired(files=dict.fromkeys(roles), roles=roles)
    rows = mechanism.rows(study, shelf)
    at = lambda measure, role: row(rows, measure=measure, role=role)
    members, others = np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.0])  # the empty record is not a 0
    assert at("kl_teacher_student", "private")["value"] == 4 and at("kl_teacher_student", "private")["n"] == 3
    assert at("kl_student_teacher", "heldout")["value"] == 4
    gap = at("kl_teacher_student", "private-heldout")
    assert gap["value"] == 2 and gap["ci_low"] < 0 < gap["ci_high"] and gap["n"] == 6
    se = np.sqrt(members.var(ddof=1) / 3 + others.var(ddof=1) / 3)
    # influences are pooled: 6/5 of the plain variances where the textbook has 3/2; the lesser side's degrees of freedom
    assert (gap["ci_high"] - 2) / stats.t.isf(0.025, 2) == pytest.approx(se * np.sqrt(6 / 5 / (3 / 2)), rel=1e-6)


def test_an_end_that_is_not_known_is_empty():
    """A mean whose examples are all of one text has no interval."""
    names = dict.fromkeys(ids_of("private", 120), "one")
    rows = mechanism.rows(*planted(regimes(), groups=names))
    at = row(rows, model="teacher", measure="entropy@k=10", group="all", role="private")
    assert np.isfinite(at["value"]) and at["ci_low"] is None and at["ci_high"] is None


def told(T=1.0, teacher_T=None, **others):
    objective = {"policy": "dataset", "divergence": "fkl"} | others
    objective |= {} if T == 1 else {"student_T": T}
    objective |= {} if (teacher_T or T) == 1 else {"teacher_T": teacher_T or T}
    return {"objective": objective}


def test_series_of_temperatures():
    runs = {"students/kd": told(), "students/t2": told(2.0), "students/t4": told(4.0)}
    runs |= {"students/alone": told(3.0, teacher_T=1.0), "students/alpha": told(2.0, kd_ratio=0.5)}
    runs |= {"students/other": told(2.0) | {"setting": "disjoint"}, "students/foreign": {"objective": None}}
    one = np.ones(4, bool)
    memorized = {(run, 0, "private"): one for run in runs} | {("teacher", 0, "private"): one}
    study, _ = planted(memorized, provenance=runs)
    series = [
        {1.0: "students/kd", 2.0: "students/t2", 4.0: "students/t4"},
        {1.0: "students/kd", 3.0: "students/alone"},
    ]
    assert temperatures(study) == series and not study.notes
    runs |= {"students/without": told(2.0) | {"exclude": "random:students/kd"}, "students/twice": told(4.0)}
    memorized |= {(run, 0, "private"): one for run in runs}
    study, _ = planted(memorized, provenance=runs)
    assert temperatures(study) == series, "one that records were left out for is no part of it, nor a second of one T"
    assert study.notes == [
        "students/twice is trained as students/t4 is, at the same temperature: left out of the series over T."
    ]


def test_shares_by_temperature():
    counts = {1.0: 12, 2.0: 6, 4.0: 1}
    memorized = {("teacher", 0, "private"): np.ones(40, bool)}
    for T, count in counts.items():
        for role in ("private", "heldout"):
            memorized[f"students/t{T:g}", 0, role] = (np.arange(40) < count) & (role == "private")
    study, shelf = planted(memorized, provenance={f"students/t{T:g}": told(T) for T in counts})
    rows = mechanism.rows(study, shelf)
    for T, count in counts.items():
        at = lambda role, t=T: row(rows, group=f"T={t:g}", measure="extracted_by_temperature@k=10", role=role)
        want = stats.binomtest(count, 40).proportion_ci(0.95, "wilson")
        assert at("private")["value"] == count / 40 and at("private")["ci_low"] == pytest.approx(want.low)
        assert at("heldout")["value"] == 0 and at("heldout")["ci_high"] > 0.08 and at("private")["n"] == 40


def test_points_are_few_and_of_every_group(monkeypatch):
    frame = points(*planted(regimes(seeds=(0, 1))))
    assert len(frame) == 3 * 120 and set(frame["seed"]) == {0}
    monkeypatch.setattr(mechanism, "MOST_POINTS", 600)
    n = 3000
    kind = np.arange(n)
    found = {
        (run, 0, "private"): extraction(kind < most, run=run) for run, most in zip(RUNS, (80, 40, 10), strict=True)
    }
    frame = points(*planted(found))
    sizes = frame.groupby(["model", "group"]).size()["teacher"]
    assert len(frame) <= 3 * (200 + 4 * 50) and set(sizes.index) == {"T&B&S", "T&B not S", "T only", "none"}
    assert sizes["T&B&S"] == 10 and sizes["T only"] == 40, "small groups are whole"
    empty = points(*planted({("teacher", 0, "private"): np.ones(3, bool)}))
    assert (
        list(empty.columns) == ["student", "model", "seed", "example_id", "group", "entropy", "log_p"] and empty.empty
    )
