"""The pages of the memorization audit: sections with their numbers, none without its table, no two settings mixed."""

import dataclasses
import re
import shutil

import pandas as pd
import pytest
from invented_memorization import CUT, MODELS, OTHER, REGIONS, WORDS, add_memorization
from test_report import fake_results
from test_report_techniques import Tables

from attacks.report import figures
from attacks.report.claims import claim_section
from attacks.report.disagreement import disagreement_section
from attacks.report.drawing import Picture
from attacks.report.html import page
from attacks.report.inherited import inherited_section
from attacks.report.mechanism import mechanism_section
from attacks.report.mechanism_figures import draw_mechanism
from attacks.report.memorized import NAMES, _coverage_words, memorized_section
from attacks.report.memorized_figures import draw_memorized
from attacks.report.named_measures import Measure, count_of, cut_words, main_cut, parse, percent
from attacks.report.prediction import prediction_section
from attacks.report.region_figures import draw_regions
from attacks.report.results import COLUMNS, load

SECTIONS = {
    "claims": ("claims.csv",),
    "memorized": ("memorization.csv",),
    "inherited": ("inheritance.csv",),
    "prediction": ("prediction.csv",),
    "mechanism": ("mechanism.csv", "mechanism_points.parquet"),
    "disagreement": ("disagreement.csv", "disagreement_examples.parquet"),
}
DRAWN_FROM = {
    "claims": (claim_section,),
    "memorized": (memorized_section, {}),
    "inherited": (inherited_section, {}),
    "prediction": (prediction_section, {}),
    "mechanism": (mechanism_section, {}),
    "disagreement": (disagreement_section, {}),
}
DISJOINT, SHARED = "students/kd", "students/kd_shared"


@pytest.fixture(scope="module")
def invented(tmp_path_factory):
    """One student in either setting, one seed: (folder, results, the page, its drawings by name)."""
    folder = add_memorization(fake_results(tmp_path_factory.mktemp("memorization"), tasks=()))
    results = load(folder)
    drawn = draw_memorized(results) | draw_regions(results) | draw_mechanism(results)
    pictures = {name: Picture(b"", *parts[1:]) for name, parts in drawn.items() if parts is not None}
    return folder, results, page(results, pictures, show_canaries=False), pictures


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """The same with two seeds."""
    folder = add_memorization(fake_results(tmp_path_factory.mktemp("seeds"), tasks=(), seeds=(0, 1)), seeds=("0", "1"))
    results = load(folder)
    return results, page(results, {}, show_canaries=False)


def section(html, anchor):
    return re.search(rf'<h2 id="{anchor}">.*?(?=<h2 )', html, re.S)[0]


def tables(html, anchor):
    return Tables(section(html, anchor))


def of(folder, name, **wanted):
    frame = pd.read_csv(folder / name, dtype=str, keep_default_na=False)
    for column, value in wanted.items():
        frame = frame[frame[column] == value]
    return frame.astype({c: float for c in ("value", "ci_low", "ci_high", "n", "count") if c in frame}, errors="ignore")


def shown(value, low, high, unit="%"):
    return f"{percent(value)} {unit} [{percent(low)}, {percent(high)}]"


def test_names_of_measures_and_cuts():
    full = "np_extractable@a=50,k=50;k=40,t=1;n=1000;p=0.9"
    assert parse(full) == Measure("np_extractable", "a=50,k=50", "k=40,t=1;n=1000;p=0.9")
    assert parse("coverage@p=0.001;t=1") == Measure("coverage", "", "p=0.001;t=1") and parse("short") == (
        "short",
        "",
        "",
    )
    assert cut_words("k=32") == "first 32 tokens of the response"
    assert cut_words("a=50,k=20") == "20 tokens after 50 given ones"
    assert [percent(x) for x in (0, 0.0007, 0.0123, -0.2)] == ["0", "0.07", "1.2", "−20.0"]
    assert count_of(0.034, 500, "0") == "17 of 500" and count_of(0.034, 500, "all") == "of 500"


def test_every_section_stands_with_its_table_and_not_without(invented, tmp_path):
    folder, results, html, _ = invented
    places = [html.index(f'<h2 id="{name}">') for name in SECTIONS]
    assert places == sorted(places)  # the claims come first
    for name, (section_of, *args) in DRAWN_FROM.items():
        field = SECTIONS[name][0].removesuffix(".csv")
        lacking = dataclasses.replace(results, **{field: getattr(results, field).iloc[:0]})
        assert section_of(results, *args) and not section_of(lacking, *args), name
    bare = shutil.copytree(folder, tmp_path / "bare")
    for file in (file for files in SECTIONS.values() for file in files):
        (bare / file).unlink()
    empty = load(bare)
    there = page(empty, {}, show_canaries=False)
    assert not any(f'<h2 id="{name}">' in there for name in SECTIONS)
    assert not (draw_memorized(empty) | draw_regions(empty) | draw_mechanism(empty))


def test_a_table_without_its_columns_is_refused(invented, tmp_path):
    bare = shutil.copytree(invented[0], tmp_path / "bare")
    of(bare, "claims.csv").drop(columns="verdict").to_csv(bare / "claims.csv", index=False)
    with pytest.raises(ValueError, match=r"claims.csv: no column verdict"):
        load(bare)


def test_members_stand_beside_held_out_records_with_intervals_counts_and_seed(invented):
    folder, results, html, _ = invented
    assert main_cut(results) == CUT
    found = tables(html, "memorized")
    for setting, student in (("shared", SHARED), ("disjoint", DISJOINT)):
        rows = found.find(f"Setting: {setting}. Cut: {CUT} (20 tokens after 32 given ones)")
        assert list(rows) == ["base_student", "null", student, "direct", "teacher"]
        for model, row in rows.items():
            for role, head in (("private", "members"), ("heldout", "held-out")):
                (r,) = of(
                    folder, "memorization.csv", model=model, role=role, task="all", measure=f"extracted@{CUT}"
                ).itertuples()
                assert (
                    row[f"Extracted: {head}"]
                    == f"{shown(r.value, r.ci_low, r.ci_high)} {r.value * r.n:.0f} of {r.n:.0f}"
                )
            gap = MODELS[model][2] - MODELS[model][3]
            assert row["Extracted: gap"].startswith(f"{'+' if gap > 0 else ''}{percent(gap)} points [")
            assert row["Seed"] == "0" and row["Too short: members"].endswith("30 of 500")
            assert {"Tokens matched: members", "Exact response: members", "Exact response: gap"} <= set(row)


def test_greedy_stands_beside_probabilistic_and_near_verbatim(invented):
    ways = tables(invented[2], "memorized").find(f"Setting: shared. Cut: {CUT}. Members with")
    heads = [
        "Model",
        "Greedy, exact",
        "(100, 0.5), k=40, T=1",
        "(10,000, 0.5), k=40, T=1",
        "Edit distance ≤ 10 %",
        "Seed",
    ]
    assert list(ways["teacher"]) == heads
    assert ways["teacher"]["Greedy, exact"].startswith("12.8 % [")
    assert re.search(r"64 of 500 held-out 0\.80 % \[.*\], 4 of 480$", ways["teacher"]["Greedy, exact"])
    assert _coverage_words("p=0.1;k=40,t=1;window=50") == "p ≥ 0.1, k=40, T=1, windows of 50 tokens"
    assert "with knowledge of the first miss" in NAMES["recall_at_100_errors"]
    covered = tables(invented[2], "memorized").find("Setting: shared. Share of the tokens of a text")
    assert re.search(r"25\.6 % \[.*\] of 500 held-out", covered["teacher"]["p ≥ 0.001, k=40, T=1"])


def test_claims_are_sentences_with_verdicts_and_what_does_not_come_out_is_said(invented):
    _, results, html, _ = invented
    text = tables(html, "claims").text
    assert "not resolved" in text and "not tested" in text  # there is no row of the temperature
    for setting, student in (("shared", SHARED), ("disjoint", DISJOINT)):
        chain = tables(html, "claims").find(f"Setting: {setting}. Claim: memorization falls")
        assert list(chain) == ["teacher − direct", f"direct − {student}"]
        assert chain["teacher − direct"]["Verdict"] == "yes" and chain["teacher − direct"]["p corrected"] == "0.001"
        assert re.match(r"\+3\.5 points \[", chain["teacher − direct"]["Value"])
    found = re.findall(r"Claim: memorization rises.*?</table>", section(html, "claims"), re.S)
    assert len(found) == 4 and sum("−1.2" in t and 'class="bad">no<' in t for t in found) == 2
    assert section(html, "claims").count("Controls: what is not memory") == 2
    told = dataclasses.replace(results, summary=results.summary | {"claims": WORDS})
    assert all(f"<li>{words}</li>" in claim_section(told) for words in WORDS)


def test_all_seven_regions_stand_with_both_denominators(invented):
    folder, _, html, pictures = invented
    found = tables(html, "inherited")
    row = next(tail for caption, tail in found.tables.items() if caption.startswith(f"Setting: shared. Cut: {CUT} ("))
    row = dict(zip(*row[:2], strict=True))
    for region, count in REGIONS.items():
        assert row[region.replace("&", " & ")].startswith(f"{count} {percent(count / 500)} % [")
    assert row["none"].startswith("420 84.0 %") and row["Texts"] == "500" and row["Teacher"] == "teacher"
    assert [row[f"All of {s}"].split()[0] for s in "TBS"] == ["64", "47", "20"]
    ratios = next(
        rows for caption, rows in found.tables.items() if caption.startswith(f"Setting: shared. Cut: {CUT}. Shares")
    )
    ratios = dict(zip(ratios[0], ratios[1], strict=True))
    assert ratios["Inherited: T & S not B, of T not B"].endswith("5 of 32")
    assert ratios["Inherited: T & S not B, of S"].endswith("5 of 20")
    words = ", ".join(f"{region} {count}" for region, count in REGIONS.items())
    assert pictures["regions-shared"].alt == f"Regions at {CUT}: {SHARED}: {words}"


def test_the_disjoint_setting_is_called_a_coincidence(invented):
    _, _, html, pictures = invented
    whole = section(html, "inherited")
    first, second = whole.split("Disjoint setting: coincidence, not inheritance")
    assert DISJOINT + "<" not in first and SHARED not in second
    assert "Inherited:" in first and "Inherited:" not in second and "In common: T &amp; S not B" in second
    assert all("Coincidence, not inheritance" in c for c in re.findall(r"<caption>([^<]*Counts;[^<]*)<", second))
    assert (
        pictures["regions-disjoint"].alt.startswith("Coincidence")
        and "inherited" not in pictures["regions-disjoint"].alt
    )


def test_prediction_protocols_and_the_loop_with_its_random_filter(invented):
    found = tables(invented[2], "prediction")
    head, *rows = next(
        t for c, t in found.tables.items() if c.startswith("Setting: shared. 95 % intervals, over texts")
    )
    single = [row for row in rows if len(row) < len(head)]
    assert len(single) == 2 and single[0][3] == "AUC" and single[1][1:3] == ["natural prior", "zlib bytes"]
    rows = rows[: -len(single)]
    by = {(row[1], row[2]): dict(zip(head, row, strict=True)) for row in rows}
    assert (
        by["paper (1:3)", "paper's four"]["AUC"] == "0.97 [0.93, 1.00]"
        and by["other half", "teacher only"]["n"] == "60"
    )
    assert by["other student students/other", "paper's four"]["AUC"].startswith("0.88 [")
    assert by["matched negatives zlib bytes, teacher perplexity", "paper's four"]["AUC"].startswith("0.85 [")
    assert by["paper (1:3)", "paper's four"]["Precision"] == "0.80 [0.70, 0.90]", "over texts, not over trials"
    assert {row[2] for row in rows} == {"paper's four", "teacher only"}
    captions = [c for c in found.tables if c.startswith("Setting: shared. Middle 95 % of the trials")]
    assert len(captions) == 1, "and beside it the weights"
    narrow = found.tables[captions[0]]
    assert dict(zip(*narrow[:2], strict=True))["AUC"] == "0.97 [0.97, 0.97]"
    assert f"{SHARED} memorizes 12.0 %" in found.text
    loop = found.find(f"Setting: shared. Cut: {CUT} (20 tokens")
    predicted, random = (loop[f"{SHARED}_{form}"] for form in ("predicted", "random"))
    heads = "Left out, of the scored texts", "Left out, of the training data with repeats"
    assert [predicted[h] for h in heads] == [random[h] for h in heads] == ["8.4 % 42 of 500", "31.0 %"]
    assert predicted["Memorized before"].endswith("20 of 500") and predicted["Memorized after"].endswith("4 of 500")
    assert predicted["After less before"] == "−3.2 points [−5.2, −1.2]"
    assert random["After less before"] == "−0.30 points [−2.3, 1.7]"
    assert "narrow" in found.text and "zlib_bytes -2.10" in invented[3]["coefficients-shared"].alt


def test_mechanism_and_temperature(invented):
    _, _, html, pictures = invented
    found = tables(html, "mechanism")
    kl = found.find("Setting: shared. Nats per token")[SHARED]
    assert (kl["Members"], kl["Held-out"], kl["Gap"]) == (
        "0.31 [0.28, 0.34]",
        "0.42 [0.39, 0.45]",
        "−0.11 [−0.14, −0.08]",
    )
    sweep = found.find("Setting: shared. 95 % intervals.")
    assert list(sweep) == ["1 (control)", "2", "4"] and sweep["2"]["Extracted: members"].startswith("4.0 % [")
    assert "T=1 private 8.0 %" in pictures["temperature-shared"].alt and "temperature-disjoint" not in pictures
    assert f"{SHARED}, teacher, T&S not B: entropy 0.60, log p -3.0" in pictures["mechanism-shared"].alt


def test_membership_against_memorization_names_ids_only_where_they_are_folded(invented):
    folder, _, html, pictures = invented
    whole = section(html, "disagreement")
    head, *rows = next(t for c, t in Tables(whole).tables.items() if c.startswith("Setting: shared. Cut"))
    row = dict(zip(head, next(r for r in rows if r[:2] == [SHARED, "loss"]), strict=True))
    assert row["Rank correlation with the log-probability"] == "0.60 [0.56, 0.64]"
    assert row["Memorized, but missed at FPR 1 %"].startswith("80.0 %") and row["n"] == "500" and row["Seed"] == "0"
    ids = pd.read_parquet(folder / "disagreement_examples.parquet")["example_id"]
    outside = re.sub(r"<details>.*?</details>", "", html, flags=re.S)
    assert all(i in whole and i not in outside for i in ids)
    assert f"{SHARED} share matched 0.40" in pictures["ranks-shared"].alt


def test_no_two_settings_in_a_table_or_a_picture(invented):
    _, _, html, pictures = invented
    for name in SECTIONS:
        for caption, rows in tables(html, name).tables.items():
            cells = " ".join(cell for row in rows for cell in row)
            mixed = re.search(rf"{DISJOINT}(_predicted|_random)?( |$)", cells) and SHARED in cells
            assert not mixed, (name, caption)
    for name, picture in pictures.items():
        assert not (re.search(rf"{DISJOINT}[ ,:]", picture.alt) and SHARED in picture.alt), name
        assert "shared" not in picture.alt if "disjoint" in name else DISJOINT + " " not in picture.alt, name


def test_null_is_not_said_to_be_flat_on_canaries_that_are_public_too(invented):
    said = invented[3]["repeats-shared"].caption
    assert said.startswith("Of the records,") and "null and all students met them" in said


def test_pictures_come_out_of_the_report_by_their_names(invented, monkeypatch):
    monkeypatch.setattr(figures, "_png", lambda figure: b"")
    names = {"memorized", "repeats", "ranks", "coefficients", "regions", "mechanism"}
    drawn = figures.draw_all(invented[1])
    assert {f"{n}-{s}" for n in names for s in ("shared", "disjoint")} | {"temperature-shared"} <= set(drawn)


def test_with_several_seeds_union_intersection_and_every_seed_are_told(twice):
    results, html = twice
    rows = next(t for c, t in tables(html, "inherited").tables.items() if c.startswith(f"Setting: shared. Cut: {CUT} "))
    assert [row[1] for row in rows[1:]] == ["0", "1", "union", "intersection"]
    assert [row[2].split()[0] for row in rows[1:]] == ["12", "13", "15", "11"]
    first = tables(html, "memorized").find(f"Setting: shared. Cut: {CUT} (")["teacher"]
    assert (
        first["Seed"] == "all"
        and first["Extracted: members"].endswith("of 500")
        and " 64 of" not in first["Extracted: members"]
    )
    every = next(
        t for c, t in tables(html, "memorized").tables.items() if c.startswith("Setting: shared. Extracted at")
    )
    assert [row[1] for row in every[1:] if row[0] == "teacher"] == ["0", "1"]


def test_other_cuts_are_folded_with_their_own_counts(invented):
    whole = section(invented[2], "inherited").split("Disjoint setting")[0]
    folded = "".join(re.findall(r"<details>.*?</details>", whole, re.S))
    assert OTHER in folded and OTHER not in re.sub(r"<details>.*?</details>", "", whole, flags=re.S)


def test_without_non_members_what_is_memorized_is_reported_alone(invented, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "_png", lambda figure: b"")
    alone = shutil.copytree(invented[0], tmp_path / "alone")
    for file in alone.iterdir():
        if file.name not in ("summary.json", "memorization.csv", "membership.csv"):
            file.unlink()
    of(alone, "membership.csv").iloc[:0].to_csv(alone / "membership.csv", index=False)
    results = load(alone)
    html = page(results, figures.draw_all(results), show_canaries=False)
    assert results.models == list(MODELS) and "What is memorized" in html
    assert "Every attack on every model" not in html and "Attacker's access" not in html
    (alone / "memorization.csv").unlink()
    with pytest.raises(ValueError, match="nothing can be reported"):
        load(alone)


def test_columns_of_the_report_are_columns_of_the_audit():
    from attacks.audit import OPTIONAL

    for name in ("memorization", "claims", "inheritance", "prediction", "mechanism", "disagreement"):
        assert set(COLUMNS[f"{name}.csv"].split()) <= set(OPTIONAL[name].split()), name
