"""The comparison of techniques on the page, from planted score tables to HTML and pictures."""

import re
import shutil
from html.parser import HTMLParser
from io import BytesIO

import matplotlib.image
import numpy as np
import pytest
from planted_scores import QUICK, STRENGTHS, World, six

from attacks.audit import audit
from attacks.report import build
from attacks.report.figures import draw_all
from attacks.report.html import page
from attacks.report.results import load
from attacks.report.technique_figures import draw_use
from attacks.report.techniques import used_measure

SETTINGS = QUICK | {"headline_model": "students/kd", "attacks": ["loss", "min_k", "reference"], "blind": False}
STUDENTS = [f"students/{name}" for name in ("kd", "seqkd", "imitkd", "gkd", "minillm", "distillm")]


class Tables(HTMLParser):
    """The tables of a page as lists of rows of cell texts, by caption; and all the text."""

    def __init__(self, html):
        super().__init__()
        self.tables, self.text, self.cell, self.caption = {}, "", None, None
        self.feed(html)
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag, attrs):
        if tag == "caption":
            self.caption = ""
        elif tag == "tr" and self.caption:
            self.tables.setdefault(self.caption, []).append([])
        elif tag in ("td", "th"):
            self.cell = ""
        elif tag == "span" and self.cell:
            self.cell += " "

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            if self.caption:
                self.tables[self.caption][-1].append(re.sub(r"\s+", " ", self.cell).strip())
            self.cell = None
        elif tag == "table":
            self.caption = None

    def handle_data(self, data):
        self.text += data
        if self.cell is not None:
            self.cell += data
        elif self.caption is not None:
            self.caption += data

    def find(self, words):
        (found,) = [rows for caption, rows in self.tables.items() if words in caption]
        head, *body = found
        return {row[0]: dict(zip(head, row, strict=True)) for row in body}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Six students with three seeds and a swap of one: (folder, results, the page)."""
    folder = tmp_path_factory.mktemp("page")
    world = six(folder / "scores", records=120)
    for k in range(3):
        told = {"technique": "kd", "setting": "disjoint", "swap_of": "students/kd"}
        world.write("swap_students/kd", {"heldout": 0.5}, seed=k, **told)
    audit(folder / "scores", folder / "out", SETTINGS)
    html = build(folder / "out").read_text()
    return folder, load(folder / "out"), html


def test_all_students_of_a_setting_stand_side_by_side(planted):
    _, results, html = planted
    rows = Tables(html).find("Below the students")
    assert list(rows) == [*STUDENTS, "null", "swap_students/kd", "direct"]
    leaks = results.leaks(STUDENTS, attack="loss").set_index("model")
    for model in STUDENTS:
        value, low, high = leaks.loc[model, ["value", "ci_low", "ci_high"]]
        assert rows[model]["AUC of loss"] == f"{value:.3f} [{low:.3f}, {high:.3f}]"
        assert {"Dev loss", "ROUGE-L, dev", "ROUGE-L, self_instruct", "Utility", "Seed"} <= set(rows[model])
        assert rows[model]["Seed"] == "all" and rows[model]["Utility"].startswith("ok")
    assert rows["students/kd"]["Its swap"] != "–" and rows["students/gkd"]["Its swap"] == "–"
    assert float(rows["students/minillm"]["ROUGE-L, dev"].split()[0]) == pytest.approx(28, abs=4)


def test_how_they_were_trained(planted):
    rows = Tables(planted[2]).find("How each student was trained")
    assert list(rows) == STUDENTS
    gkd = rows["students/gkd"]
    assert gkd["Objective"] == "student, jsd" and gkd["Response tokens"] == "16,000"
    assert "The same in all their objectivesce 0.5" in Tables(planted[2]).text
    assert gkd["Learning rate"] == "0.0005 (of 3 tried)" and gkd["Checkpoint"] == "last step"
    assert gkd["Where they came from"] == "data set 50.0 % student's own text 50.0 %" and gkd["Final phi"] == "–"
    assert rows["students/distillm"]["Final phi"] == "0" and gkd["Step used"] == "90 of 90"


def test_learning_rates_and_ledger(planted):
    tables = Tables(planted[2])
    rates = tables.find("every learning rate")["students/gkd"]
    tried = [rates[f"Learning rate {lr}"] for lr in ("0.0001", "0.0005", "0.002")]
    assert tried == ["2.300", "2.100", "diverged"]
    assert "<b>2.100</b>" in planted[2] and "<b>2.300</b>" not in planted[2]
    ledger = tables.find("Every use of every example")
    assert ledger["students/minillm"]["Responses"] == "student and teacher mixed 100.0 %"
    assert ledger["students/minillm"]["Private prompts with another's response"] == "12"
    assert ledger["students/kd"]["Private prompts with their own response"] == "12"
    assert ledger["students/imitkd"]["Mean age (steps)"] == "6.0 (at most 11)"


def test_the_ranking_stands_once_and_names_ties(planted):
    text = Tables(planted[2]).text
    assert text.count("Ranking (disjoint setting, loss") == 1 and text.count("Not separated: ") == 1
    assert "leaks more than students/minillm" in text


def test_one_seed_says_so_on_top_and_ranks_nothing(tmp_path):
    six(tmp_path / "scores", records=80, seeds=(0,))
    audit(tmp_path / "scores", tmp_path / "out", SETTINGS)
    text = Tables(build(tmp_path / "out").read_text()).text
    assert text.index("One seed ranks nothing.") < text.index("Audit card")
    assert "leaks more than" not in text and "one seed (0): no ranking" in text


def test_pictures_of_techniques(planted):
    _, results, html = planted
    pictures = draw_all(results)
    of_techniques = ["techniques-disjoint", "usefulness-disjoint"]
    kinds = ("chain", "heatmap", "techniques", "usefulness", "roc")
    of_attacks = [name for name in pictures if name.partition("-")[0] in kinds]
    assert of_attacks == ["chain", "heatmap", "heatmap-2", *of_techniques, "roc"]
    for name in of_techniques:
        image = matplotlib.image.imread(BytesIO(pictures[name].png))
        assert image.shape[1] == pytest.approx(5.2 * 220, abs=2) and np.ptp(image[..., :3]) > 0.5
        assert all(technique in pictures[name].alt for technique in STRENGTHS)
    leaks = results.leaks(["null", *STUDENTS], attack="loss")
    assert all(f"{r.model} {r.value:.3f}" in pictures["techniques-disjoint"].alt for r in leaks.itertuples())
    assert "ROUGE-L (0 to 100) on dev" in pictures["usefulness-disjoint"].alt
    assert html.count("<figure>") == len(pictures) and 'href="#techniques-disjoint"' in html


def test_without_rouge_of_every_student_the_picture_takes_the_dev_loss(planted, tmp_path):
    folder = shutil.copytree(planted[0] / "out", tmp_path / "out")
    results = load(folder)
    assert used_measure(results, STUDENTS) == "rouge_l@dev"
    lacking = (results.utility["model"] == "students/gkd") & results.utility["measure"].str.startswith("rouge_l@")
    kept = results.utility[~lacking]
    object.__setattr__(results, "utility", kept)
    assert used_measure(results, STUDENTS) == "dev_loss"
    assert "dev loss (nats per token)" in draw_use(results, "disjoint")[2]
    object.__setattr__(results, "utility", kept[kept["measure"] == "perplexity"])
    assert draw_use(results, "disjoint") is None
    assert "Techniques side by side" in page(results, {}, show_canaries=False)


def test_settings_never_share_a_table_or_a_picture(tmp_path):
    world = World(tmp_path / "scores", {"private": 60, "heldout": 60, "dev": 30})
    world.write("null")
    for name, setting in (("a", "disjoint"), ("b", "disjoint"), ("c", "shared"), ("d", "shared")):
        world.write(f"students/{name}", {"private": 0.4}, setting=setting, technique="kd")
        world.write_generated(f"students/{name}", "dev", 0.3)
        world.write_ledger(f"students/{name}", {"dataset": 1.0})
    audit(tmp_path / "scores", tmp_path / "out", SETTINGS | {"headline_model": "students/a", "references": []})
    html = build(tmp_path / "out").read_text()
    results = load(tmp_path / "out")
    assert results.techniques == {"disjoint": ["students/a", "students/b"], "shared": ["students/c", "students/d"]}
    for caption, rows in Tables(html).tables.items():
        settings = {
            s for row in rows for s, ab in (("d", "ab"), ("s", "cd")) if row[0][-1] in ab and "students/" in row[0]
        }
        assert len(settings) < 2, caption
    alts = re.findall(r'alt="([^"]*)"', html)
    # the card, two of each setting, ROC, three heat maps; what is memorized and found of it, of each setting
    assert len(alts) == 13
    for alt in alts:
        assert not re.search("students/[ab]", alt) or not re.search("students/[cd]", alt), alt


def test_a_single_student_has_no_comparison(tmp_path):
    world = World(tmp_path / "scores", {"private": 40, "heldout": 40, "dev": 30})
    world.write("null")
    world.write("students/kd", {"private": 0.4}, technique="kd", setting="disjoint")
    audit(tmp_path / "scores", tmp_path / "out", SETTINGS | {"references": []})
    html = build(tmp_path / "out").read_text()
    assert "Techniques side by side" not in html and "ranks nothing" not in html and "ROUGE-L, dev" not in html
    assert "What the students were trained on" not in html and "Learning rates that were tried" not in html
