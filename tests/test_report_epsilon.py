"""The section of lower bounds: plain words first, every bound with what it rests on, refusals with their reason."""

import dataclasses

import pandas as pd
import pytest
from test_report import fake_results
from test_report_techniques import Tables

from attacks.epsilon import COLUMNS
from attacks.report.epsilon import epsilon_section, source_words
from attacks.report.results import load

STUDENT, SHADOW = "students/kd", "shadow/student"


def row(model, epsilon, *, source="canaries:teacher_only", method="one_run", strategy="split", **more):
    numbers = {"delta": 1e-6, "significance": 0.05, "epsilon": epsilon, "largest": 3.28, "n_in": 98, "n_out": 102}
    told = {"technique": "kd", "setting": "disjoint", "attack": "loss", "trained_models": 1, "valid": "yes"}
    words = {"conditions": "checked: a coin each, 98 of 200 in (p 0.8); assumed: <named> before", "seed": "0"}
    return numbers | told | words | {"model": model, "source": source, "method": method, "strategy": strategy} | more


def rows():
    chains = {"source": "chains:full", "attack": "lira_online", "trained_models": 16, "least": 0.0, "greatest": 1.4}
    refused = {"valid": "no", "epsilon": None, "largest": None, "method": "", "strategy": "", "delta": None}
    return [
        row(STUDENT, 0.0),
        row(STUDENT, 0.0, source="canaries:teacher_only@repeats=4"),
        row(STUDENT, 0.4, method="gdp", valid="estimate"),
        row(STUDENT, 1.1, attack="min_k"),  # not named beforehand: only in the file
        row("teacher", 2.5, setting="-"),
        row(SHADOW, 0.71, **chains),
        row(SHADOW, 9.9, **(chains | {"attack": "rmia_offline"})),
        row(SHADOW, None, source="chains:full@one_a_run", valid="", largest=None, conditions=""),
        row(STUDENT, source="private-heldout", conditions="refused: no coin of its own", **refused),
    ]


def results_of(folder, found):
    fake_results(folder, tasks=())
    pd.DataFrame(found, columns=COLUMNS.split(), dtype=object).to_csv(folder / "epsilon.csv", index=False)
    return load(folder)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of(tmp_path_factory.mktemp("epsilon"), rows())


def lines(tables, words):
    """The rows of the one table whose caption has these words, its heading first."""
    (found,) = [rows for caption, rows in tables.tables.items() if words in caption]
    return found


def test_plain_words_come_first(results):
    html = epsilon_section(results)
    said = Tables(html).text
    assert said.index("students/kd: no evidence: bound 0; this design could have shown up to 3.28") < said.index(
        "claim"
    )
    assert "teacher: epsilon is at least 2.50 with 95 % confidence" in said
    assert "shadow/student: epsilon is at least 0.71" in said
    assert "for the unit named" in said and "nothing about a single record" in said
    assert "9.9" not in said and "1.1" not in said  # attacks that were not named beforehand
    assert "&lt;named&gt;" in html and "nan" not in said


def test_bounds_by_setting(results):
    tables = Tables(epsilon_section(results))
    head, *body = lines(tables, "Setting: disjoint. One run")
    cells = [dict(zip(head, line, strict=True)) for line in body]
    assert [line["Model"] for line in cells] == [SHADOW, STUDENT] or [line["Model"] for line in cells] == [
        STUDENT,
        SHADOW,
    ]
    by_model = {line["Model"]: line for line in cells}
    assert by_model[STUDENT]["ε at least"] == "0: no evidence" and by_model[STUDENT]["Could have shown"] == "3.28"
    assert by_model[SHADOW]["ε at least"] == "0.71 [0.00, 1.40]" and by_model[SHADOW]["Models"] == "16 (median, range)"
    assert by_model[STUDENT]["In / out"] == "98 / 102" and by_model[STUDENT]["Valid"] == "yes"
    head, *body = lines(tables, "Setting: disjoint. The same attacks")
    assert {"Gaussian DP", "one run"} == {line[head.index("Method")] for line in body} and len(body) == 4
    assert [line[0] for line in lines(tables, "Models of no setting. One run")[1:]] == ["teacher"]


def test_conditions_and_refusals(results):
    tables = Tables(epsilon_section(results))
    (line,) = lines(tables, "Checked: by the audit")[1:]
    assert "a coin each" in line[0] and "teacher" in line[1] and "Gaussian DP" in line[3]
    assert lines(tables, "Refused")[1:] == [["natural members", STUDENT, "no coin of its own"]]


def test_seeds_are_pooled(tmp_path):
    """Several seeds: their median, and one line."""
    found = [row(STUDENT, 0.0, seed=str(k)) for k in range(3)]
    found.append(row(STUDENT, 0.3, seed="all", trained_models=3, least=0.0, greatest=0.9))
    said = Tables(epsilon_section(results_of(tmp_path, found))).text
    assert said.count("students/kd:") == 1 and "at least 0.30" in said and "3 (median, range)" in said


def test_nothing_without_the_table(results):
    assert not epsilon_section(dataclasses.replace(results, epsilon=results.epsilon.iloc[:0]))


def test_source_words():
    assert source_words("canaries:teacher_only") == "canaries, teacher's data only"
    assert source_words("canaries:both@repeats=16") == "canaries, data of teacher and student, 16 times each"
    assert source_words("canaries:both@repeats=1").endswith("once each")
    assert source_words("chains:full@one_a_run") == "records of the shadow chains, one a run"
