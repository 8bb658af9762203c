"""Blocks on the page: curves, tables and what they say, from planted white-box tables to pictures."""

import json
from dataclasses import replace
from io import BytesIO

import matplotlib.image
import numpy as np
import pandas as pd
import planted_whitebox as planted
import pytest
from matplotlib.figure import Figure
from planted_scores import QUICK, World
from test_report_techniques import Tables

from attacks import blocks
from attacks.audit import audit, complete
from attacks.report.block_figures import _blocks_below, draw_blocks
from attacks.report.blocks import block_name, blocks_section
from attacks.report.figures import draw_all
from attacks.report.results import load
from attacks.scoring import load_study

LAYERS, RECORDS = 3, 60


def page_of(folder, students: dict[str, str], forms=planted.FORMS, layers=LAYERS):
    """Results and the study's rows; students: technique -> setting. The teacher is twice as deep."""
    world = World(folder / "scores", {"private": RECORDS, "heldout": RECORDS}, seed=5)
    flat = planted.leak_in(layers, None)
    for run in ("base_student", "null"):
        world.write(run)
        planted.write(world, run, flat, forms=forms, base=None if run == "base_student" else "base_student")
    world.write("teacher", {"private": 1.0}, train_roles=["private"])
    planted.write(world, "teacher", planted.leak_in(2 * layers, 2), forms=forms)
    for technique, setting in students.items():
        run = f"students/{technique}"
        world.write(run, {"private": 0.4}, technique=technique, setting=setting, teacher="teacher")
        planted.write(world, run, planted.leak_in(layers, 1, 1.5), forms=forms, base="base_student")
    world.write_text()
    settings = QUICK | {"headline_model": "students/kd", "blind": False, "attacks": ["loss", "mope"], "bootstrap": 20}
    audit(folder / "scores", folder / "out", settings)
    study = load_study(folder / "scores", complete(settings, folder / "scores"))
    rows = blocks.rows(study)
    frame = pd.DataFrame(rows, columns=blocks.COLUMNS.split(), dtype=object)
    frame.to_csv(folder / "out" / "blocks.csv", index=False)
    summary = json.loads((folder / "out" / "summary.json").read_text())
    summary |= {"blocks": blocks.facts(study, rows)}
    (folder / "out" / "summary.json").write_text(json.dumps(summary))
    return load(folder / "out")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return page_of(tmp_path_factory.mktemp("blocks"), {"kd": "disjoint"})


def test_tables_say_what_the_csv_says(made):
    tables = Tables(f"<body>{blocks_section(made, {})}</body>")
    b = made.blocks
    (caption,) = [c for c in tables.tables if "The block that shows most" in c]
    head, *rows = tables.tables[caption]
    rows = {(row[0], row[1]): dict(zip(head, row, strict=True)) for row in rows}
    top = b[(b["model"] == "students/kd") & (b["form"] == "swap") & (b["metric"] == "auc") & (b["block"] == "0")].iloc[
        0
    ]
    row = rows["students/kd", "Block exchanged for its base's"]
    assert row["Shows most"] == "1" and row["Above null"] == f"1 of {LAYERS + 2}"
    assert row["Its AUC"] == f"{top.value:.2f} [{top.ci_low:.2f}, {top.ci_high:.2f}]"
    assert row["Members / non-members"].replace("\xa0", " ") == f"{RECORDS} / {RECORDS}"
    assert "null" in row["Rank correlation"] and "teacher" in row["Rank correlation"]
    assert ("students/kd", "Noise of 5 % of the weights' RMS") in rows and (
        "null",
        "Noise of one size, σ = 0.01",
    ) in rows
    assert not any(model == "base_student" for model, _ in rows)
    (whole,) = [rows for c, rows in tables.tables.items() if "All weights at once" in c]
    assert {"mope", "mope_antithetic", "gradient_norm", "gradient_global", "emergence"} <= set(whole[0])
    (every,) = [rows for c, rows in tables.tables.items() if c.startswith("AUC with its 95")]
    assert [row[1] for row in every[1:] if row[0] == "students/kd"] == ["embedding", "1", "2", "3", "head"]
    assert "not that it holds the members" in tables.text
    assert tables.text.index("students/kd, block put into the base:") < tables.text.index("students/kd, noise of one")
    assert "block 1 of 3 shows most" in tables.text and "p: blocks equal" in tables.text


def test_without_the_table_there_is_no_section_and_no_picture(made):
    bare = replace(made, blocks=made.blocks.iloc[:0])
    assert blocks_section(bare, {}) == "" and draw_blocks(bare) == {"blocks": None}


def test_pictures_are_drawn_and_described(made):
    picture = draw_all(made)["blocks"]
    image = matplotlib.image.imread(BytesIO(picture.png))
    assert image.shape[1] == 1144 and image[..., :3].std() > 0.05
    assert "students/kd, swap: embedding 0." in picture.alt and "teacher, noise_relative" in picture.alt
    assert "not members held there" in picture.caption
    assert "null shows as well" in picture.caption and "base_student" not in picture.alt


def test_settings_have_pictures_of_their_own_and_few_forms_are_enough(tmp_path):
    results = page_of(tmp_path, {"kd": "disjoint", "gkd": "disjoint", "seqkd": "shared"}, forms=("swap",), layers=2)
    pictures = {name: parts for name, parts in draw_blocks(results).items() if parts is not None}
    assert set(pictures) == {"blocks-disjoint", "blocks-shared"}
    figure, _, alt = pictures["blocks-disjoint"]
    assert "students/gkd" in alt and "students/seqkd" not in alt and len(figure.axes) == 1
    (axes,) = figure.axes
    assert [t.get_text() for t in axes.get_xticklabels()] == ["emb", "head", "1", "2"]
    section = blocks_section(results, {})
    assert section.count("The block that shows most") == len(results.apart(results.blocks)) > 1


@pytest.mark.parametrize("layers", [1, 2, 3, 6, 12, 24, 48, 96])
def test_names_of_blocks_do_not_overlap(layers):
    axes = Figure(figsize=(2.2, 1.3)).add_subplot()
    _blocks_below(axes, pd.DataFrame({"block": planted.names(layers)}))
    places = np.sort(axes.get_xticks())
    assert np.diff(places).min() > 0.1 and len(places) <= 8 and places[0] == 0 and places[-1] == 1
    assert block_name("0") == "1" and block_name("head") == "head"
