"""The sections of the report that stand on tables of their own: from planted score tables to HTML and pictures."""

import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from planted_scores import QUICK, chain
from test_report_techniques import Tables

from attacks.audit import audit
from attacks.report import build
from attacks.report.canaries import PLACES, placed
from attacks.report.canary_figures import interval
from attacks.report.checks import _missing, named
from attacks.report.drawing import readable
from attacks.report.every_attack import MOST, _pieces
from attacks.report.figures import draw_all
from attacks.report.html import page
from attacks.report.inheritance import agreement_section
from attacks.report.markup import p_value
from attacks.report.results import COLUMNS, load

ATTACKS = ["loss", "zlib", "perplexity", "reference"]
SETTINGS = QUICK | {"headline_model": "students/kd", "attacks": ATTACKS, "blind": False, "tasks": True, "bootstrap": 60}
STUDENTS = ["null", "students/kd", "students/gkd"]
SECTIONS = ("attacks", "agreement", "supervision", "alpha", "tasks", "decisions", "exposure", "dataset")


def add_alpha(out):
    """alpha.csv of two students, as alpha.curve writes it."""
    rows = []
    for alpha, run, auc in ((0.2, "students/gkd", 0.62), (1.0, "students/kd", 0.71)):
        at = {"teacher": "teacher", "setting": "disjoint", "technique": "kd", "series": 1}
        at |= {"alpha": alpha, "student": run}
        for measure, group, value in (("auc", "members", auc), ("gradient_cosine", "vulnerable", 0.3 + alpha / 10)):
            numbers = {"value": value, "ci_low": value - 0.02, "ci_high": value + 0.02, "seed": 0}
            rows.append(at | {"attack": "loss", "measure": measure, "group": group} | numbers)
    pd.DataFrame(rows).to_csv(out / "alpha.csv", index=False)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Bases, teacher, controls, two students; calibration records, canaries: (folder, results, tables, the page)."""
    folder = tmp_path_factory.mktemp("tables")
    chain(folder / "scores", members=150, nonmembers=130, student_seeds=(0, 1))
    audit(folder / "scores", folder / "out", SETTINGS)
    add_alpha(folder / "out")
    html = build(folder / "out").read_text()
    results = load(folder / "out")
    return folder / "out", results, Tables(html), html


def section(html, anchor):
    """One section of the page as tables."""
    return Tables(re.search(rf'<h2 id="{anchor}">.*?(?=<h2 )', html, re.S)[0])


def shown(row, *names):
    v, a, b = (f"{row[k]:.3f}".replace("-", "−") for k in names or ("value", "ci_low", "ci_high"))
    return f"{v} [{a}, {b}]"


def test_every_table_has_its_section_and_none_is_there_without_its_table(planted, tmp_path):
    out, _, _, html = planted
    assert all(f'<h2 id="{name}">' in html for name in SECTIONS)
    bare = shutil.copytree(out, tmp_path / "bare")
    for name in [n for n in COLUMNS if n not in ("membership.csv", "utility.csv", "differences.csv", "roc.parquet")]:
        (bare / name).unlink(missing_ok=True)
    html = page(load(bare), {}, show_canaries=False)
    assert [name for name in SECTIONS if f'<h2 id="{name}">' in html] == ["attacks", "tasks"]
    assert "No gate was run" in html and "The strongest attack" not in html


def test_the_strongest_attack_stands_beside_what_shuffled_labels_give(planted):
    out, results, _, html = planted
    rows = section(html, "attacks").text
    table = pd.read_csv(out / "attacks.csv", keep_default_na=False, dtype={"seed": str})
    best = table.query(
        "model == 'students/kd' and role_pair == 'private-heldout' and seed == 'all' and rule == 'maximum'"
    )
    (best,) = best.itertuples()
    p = "< 0.001" if best.p_corrected < 0.001 else f"{best.p_corrected:.3f}"
    found = f"{best.attack}{{}}{best.auc:.3f}{float(best.null_median):.3f}{p}{best.family} attacks".replace("\xa0", " ")
    assert re.search(re.escape(found).replace(r"\{\}", r"[a-z+-]+"), rows)


def test_stars_are_what_survives_holm_and_secondary_attacks_are_folded(planted):
    out, results, _, html = planted
    whole = re.search(r'<h2 id="attacks">.*?(?=<h2 )', html, re.S)[0]
    first, folded = whole.split("<details>")[0], whole[whole.index("<details>") :]
    assert "perplexity" not in first.split("</table>")[-2] and "perplexity" in folded
    tested = pd.read_csv(out / "attacks.csv", keep_default_na=False, dtype={"seed": str}).query("rule != 'maximum'")
    cells = {}
    for head, body in re.findall(r"<caption>[^<]*AUC with.*?<thead>(.*?)</thead><tbody>(.*?)</tbody>", first, re.S):
        names = re.findall(r'scope="col">(.*?)</th>', head)[1:]
        for line in re.findall(r"<tr.*?</tr>", body, re.S):
            attack = re.search(r'scope="row">([^<]*)', line)[1]
            cells |= {(attack, n): c for n, c in zip(names, re.findall(r"<td.*?><span>(.*?)</td>", line), strict=True)}
    seen = 0
    for r in tested.itertuples():
        name = {"students/kd": "kd", "students/gkd": "gkd"}.get(r.model, r.model)
        spoken = results.leaks([r.model], attack=r.attack)
        if r.attack == "perplexity" or r.role_pair != "private-heldout" or str(r.seed) != spoken["seed"].iloc[0]:
            continue
        if (r.attack, name) in cells:
            assert cells[r.attack, name].startswith("*") == (r.p_corrected < 0.05), (r.attack, name)
            seen += 1
    assert seen > 20 and any(c.startswith("*") for c in cells.values())


def test_agreement_shows_success_of_teacher_and_student_and_the_vulnerable(planted):
    out, results, _, html = planted
    rows = section(html, "agreement").find("Attack: loss; threshold of best")
    assert list(rows) == STUDENTS
    table = pd.read_csv(out / "agreement.csv", dtype={"seed": str}, keep_default_na=False, na_values=[""])
    own = table.query("student == 'students/kd' and attack == 'loss' and rule == 'balanced_accuracy'")
    for measure, column in (
        ("tpr_teacher", "TPR on the teacher"),
        ("tpr_student", "TPR on the student"),
        ("tpr_difference", "Student − teacher"),
    ):
        one = own.query(f"measure == '{measure}' and seed == 'all'").iloc[0]
        assert rows["students/kd"][column] == shown(one)
    each = own.query("measure == 'auc_student' and `class` == 'vulnerable'")["value"]
    assert len(each) == 2  # one row a seed: their mean, the least and the greatest
    expected = f"{each.mean():.3f} [{each.min():.3f}, {each.max():.3f}]"
    assert rows["students/kd"]["Student's AUC of the vulnerable"] == expected
    shares = own.query("measure.str.startswith('flagged_') and `class` == 'members'", engine="python")
    mean = shares.groupby("measure")["value"].mean()
    words = " / ".join(f"{100 * mean[f'flagged_{cell}']:.0f}" for cell in ("both", "teacher", "student", "none"))
    assert rows["students/kd"]["Members called on both / teacher / student / neither"] == f"{words} %"
    text = section(html, "agreement").text
    assert "fitted on the records it judges" in text and "Attack: zlib;" in text


def test_the_paired_test_is_named_and_corrected(planted):
    """Of groups of records a t test over groups; McNemar's counts records."""
    _, results, _, _ = planted
    told = lambda **changes: agreement_section(dataclasses.replace(results, **changes), {})
    grouped = {"summary": results.summary | {"groups": {"applicable": True}}}
    one = {"agreement": results.agreement[results.agreement["seed"] == "0"]}
    assert "p: t over seeds and records, after Holm over the attacks and students" in told()
    assert "p: McNemar, exact, after Holm" in told(**one)
    assert "p: t over seeds and groups of records, after Holm" in told(**grouped)
    assert "p: t over groups of records, after Holm" in told(**grouped, **one)
    gaps = results.agreement.query("measure == 'tpr_difference' and attack == 'loss' and seed == 'all'")
    gap = gaps.query("student == 'students/kd' and rule == 'balanced_accuracy'").iloc[0]
    assert Tables(told()).find("Attack: loss; threshold of best")["students/kd"]["p (Holm)"] == p_value(
        gap["p_corrected"]
    )


def test_supervision_leads_with_the_matched_difference(planted):
    out, _, _, html = planted
    tables = section(html, "supervision")
    (rows,) = [t for c, t in tables.tables.items() if "Groups by loss" in c and "Student's greatest" in t[1][0]]
    assert rows[0][:3] == ["Measure", "Student", "Vulnerable − matched non-members"]
    table = pd.read_csv(out / "supervision.csv", dtype={"seed": str}, keep_default_na=False, na_values=[""])
    table = table[(table["attack"] == "loss") & (table["measure"] == "student_confidence") & (table["seed"] == "all")]
    one = table.query("student == 'students/kd' and group == 'vulnerable-matched_non_member'").iloc[0]
    (row,) = [r for r in rows if r[1] == "students/kd" and r[0] == "Student's greatest probability"]
    assert row[2] == shown(one)
    assert rows[0][3] == "p (Holm)" and row[3] == p_value(one["p_corrected"]) and "not corrected" not in tables.text
    assert "†" in tables.text and "No pair tables" in tables.text


def test_decisions_name_headlines_and_worth(planted):
    _, results, _, html = planted
    rows = section(html, "decisions").find("PPV between the ends")
    d = results.decisions[results.decisions["model"] == "students/kd"]
    for r in d[d["measure"] == "tpr"].itertuples():
        row = rows[f"{100 * r.fpr:g} %"]
        assert row["Members called (TPR)"].startswith(f"{100 * r.value:.1f} %")
        assert row["Headline?"] == ("ok" if r.verdict == "headline" else r.verdict)
        for w in d[(d["measure"] == "ppv") & (d["fpr"] == r.fpr)].itertuples():
            assert row[f"PPV at 1 : {w.prior:,.0f}"].startswith(f"{100 * w.value:.1f} %")
    flips = section(html, "decisions").find("Members whose call depends")
    assert "students/kd" in flips and "Flip rate" in flips["students/kd"]


def test_words_of_decisions_and_tasks_are_on_the_page(planted, tmp_path):
    out, _, tables, html = planted
    said = json.loads((out / "summary.json").read_text())
    assert said["tasks"]["words"] in section(html, "tasks").text
    said["decisions"]["words"] = ["Flip rate between training seeds: not applicable, one seed."]
    copy = shutil.copytree(out, tmp_path / "out")
    (copy / "summary.json").write_text(json.dumps(said))
    assert "not applicable, one seed." in section(page(load(copy), {}, show_canaries=False), "decisions").text
    strongest = [w for w in said["corrected"]["words"]]
    top = tables.text[: tables.text.index("Audit card")]
    assert [w in top for w in strongest] == [w.startswith("students/kd:") for w in strongest]


def test_exposure_is_the_mean_over_canaries_with_a_t_interval(planted):
    _, results, _, html = planted
    own = results.exposure[(results.exposure["model"] == "teacher")]
    mean, low, high = interval(own)
    each = own.groupby("example_id")["exposure"].mean().to_numpy()
    known = {10: 2.262, 20: 2.093, 30: 2.045}  # Student's t at 97.5 %, n - 1 degrees of freedom
    n = max(k for k in known if k <= len(each))
    some = own[own["example_id"].isin(sorted(own["example_id"].unique())[:n])]
    few = some.groupby("example_id")["exposure"].mean().to_numpy()
    assert mean == pytest.approx(each.mean()) and low < mean < high
    half = (interval(some)[2] - interval(some)[1]) / 2
    assert half == pytest.approx(known[n] * few.std(ddof=1) / np.sqrt(n), rel=1e-3)
    single = interval(own.head(1))
    assert np.isfinite(single[0]) and np.isnan(single[1:]).all()
    assert "in the teacher's data only" in section(html, "exposure").text


def test_dataset_test_has_its_control_beside_it(planted):
    _, results, _, html = planted
    rows = section(html, "dataset").find("Roles private-heldout")
    assert set(rows) == set(results.dataset["model"])
    own = results.dataset[(results.dataset["model"] == "students/kd") & (results.dataset["measure"] == "p_value")]
    values = own[own["n"] == own["n"].min()]["value"]
    cell = rows["students/kd"][f"p at {own['n'].min():,.0f} texts"]
    assert cell.startswith("< 0.001" if values.median() < 0.001 else f"{values.median():.3f}")
    assert "Control: rejected at 0.05" in rows["teacher"]


def test_gates_count_the_null_models_and_near_duplicates(planted):
    _, results, _, html = planted
    rows = section(html, "gates").find("against an AUC of 0.5")
    null = results.gates[(results.gates["gate"] == "null") & (results.gates["model"] == "null")]
    assert rows["null"]["Attacks and seeds"] == str(len(null))
    best = null.loc[null["value"].idxmax()]
    assert rows["null"]["Greatest AUC"].startswith(f"{best['value']:.3f} [{best['ci_low']:.3f}")
    assert "non-members are nearly a member's record" in section(html, "gates").text


def test_pictures_show_what_the_tables_say(planted):
    _, results, _, html = planted
    pictures = draw_all(results)
    new = ["agreement", "vulnerable", "supervision", "alpha", "exposure"]
    assert set(new) < set(pictures) and html.count("<figure>") == len(pictures)
    one = results.agreement.query("student == 'students/kd' and attack == 'loss' and rule == 'balanced_accuracy'")
    rates = one[(one["measure"] == "tpr_student") & (one["seed"] == "all")]["value"].iloc[0]
    assert f"students/kd on the student {rates:.3f}" in pictures["vulnerable"].alt
    assert "alpha 0.2: AUC 0.620; alpha 1: AUC 0.710" in pictures["alpha"].alt
    assert all(m in pictures["agreement"].alt for m in STUDENTS)
    leak = results.leaks(["teacher"], attack="loss")["value"].iloc[0]
    assert leak > 0.6 and "teacher" in pictures["heatmap"].alt + pictures["heatmap-2"].alt
    assert all(len(p.png) < 300_000 for p in pictures.values())


def test_blocks_hold_every_model_once_and_null_beside_all_students():
    students = [f"students/{i}" for i in range(15)]
    controls = [f"base_{i}" for i in range(9)]
    pieces = _pieces([*controls, "null", *students])
    assert max(map(len, pieces)) <= MOST
    found = [m for piece in pieces for m in piece if m != "null"]
    assert sorted(found) == sorted([*students, *controls])
    assert all(piece[0] == "null" for piece in pieces if piece[-1].startswith("students/"))
    assert _pieces(["null", "teacher"]) == [["null", "teacher"]]
    assert _pieces(controls) == [controls[:5], controls[5:]]


def test_reasons_are_joined_with_what_they_concern():
    at = {"role_pair": "private-heldout", "metric": "auc", "seed": "0, 1"}
    rows = _missing([
        at | {"model": "a, b", "attack": "loss, zlib", "task": "x", "reason": "too few"},
        at | {"model": "c, d", "attack": "loss", "task": "y", "reason": "too few"},
        at | {"model": "a", "attack": "gap", "task": "all", "reason": "broken", "metric": "tpr_at_fpr_0.01"},
    ])  # fmt: skip
    assert [r["Reason"] for r in rows] == ["too few", "broken"]
    assert rows[0]["Models"] == "4 models" and rows[0]["Attacks"] == "loss, zlib" and rows[0]["Tasks"] == "x, y"
    assert rows[0]["Seeds"] == "0, 1" and rows[1]["Metric"].startswith("TPR at FPR 1")
    assert named(["a", "b", "c"], "models") == "a, b, c"


def test_letters_on_a_colour_have_the_greater_contrast():
    assert readable((1, 1, 1)) == "black" and readable((0, 0, 0)) == "white"
    assert readable((0.2, 0.0, 0.4)) == "white" and readable((0.99, 0.72, 0.39)) == "black"


def test_who_met_a_canary_is_told_by_the_setting():
    settings = {"teacher": "-", "students/kd": "disjoint", "students/kd_shared": "shared", "swap_students/x": "shared"}
    plain = ["teacher_only", "student_only", "both"]
    frame = pd.DataFrame([(m, p) for m in settings for p in plain], columns=["model", "placement"])
    found = placed(frame, SimpleNamespace(settings=settings)).groupby("model")["placement"].agg(list)
    assert found["students/kd_shared"] == ["both", "neither", "both"] and set(PLACES) == {*plain, "neither"}
    assert found["students/kd"] == found["teacher"] == found["swap_students/x"] == plain
    assert placed(frame.iloc[:0], SimpleNamespace(settings={})).empty
