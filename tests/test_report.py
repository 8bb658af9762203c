"""The report on invented result tables: what it must say, what it must never say, and the pieces it may lack."""

import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from attacks.report import build
from attacks.report.canaries import choose_canaries
from attacks.report.figures import Picture, draw_all
from attacks.report.html import page
from attacks.report.results import COLUMNS, load

TASKS = (
    "brainstorming classification closed_qa creative_writing general_qa information_extraction open_qa summarization"
).split()
ATTACKS = {
    "loss": "logprobs",
    "zlib": "logprobs",
    "min_k": "logprobs",
    "min_k_plus_plus": "distribution",
    "reference:null": "logprobs+public-data",
    "reference:base_student": "logprobs+base-model",
}
MODELS = {  # technique, setting, AUC of the loss attack, dev loss
    "base_teacher": ("-", "-", 0.499, 3.61),
    "base_student": ("-", "-", 0.507, 3.92),
    "null": ("sft", "-", 0.494, 3.05),
    "swap": ("sft", "-", 0.132, 2.71),
    "swap_students/kd": ("kd", "disjoint", 0.471, 2.97),
    "students/kd": ("kd", "disjoint", 0.561, 2.96),
    "students/kd_shared": ("kd", "shared", 0.702, 2.99),
    "direct": ("sft", "-", 0.848, 3.01),
    "teacher": ("sft", "-", 0.913, 2.69),
}
RATES = ("0.25", "0.05", "0.01", "0.001")
REASON = "FPR 0.001 needs at least 1,000 non-members; there are 500, which allow 0 false positives"
STUDENT, PAIR = "students/kd", "private-heldout"


def frame(name, rows):
    return pd.DataFrame(rows, columns=COLUMNS[name].split())


def leak_rows(models, seeds, tasks, resolved, rng):
    """Rows of membership.csv, and of `unresolved` in the summary for the rates that are not `resolved`."""
    rows, unresolved = [], []
    for (model, (technique, setting, centre, _)), (attack, access) in [(m, a) for m in models for a in ATTACKS.items()]:
        if attack.endswith(":" + model):
            continue
        auc = np.clip(centre + rng.normal(0, 0.008), 0.02, 0.98)
        pairs = [PAIR, "averaged"] if model == STUDENT and "swap" in dict(models) else [PAIR]
        for pair, seed in [(p, s) for p in pairs for s in seeds]:
            at = [model, technique, setting, access, attack, pair]
            kind = "both" if seed == "all" else "examples"
            end = [kind, 500, 500, seed]
            rows.append([*at, "all", "auc", auc, auc - 0.036, min(auc + 0.035, 1), *end])
            for rate in RATES:
                tpr = float(rate) ** (1 - 1.4 * (auc - 0.5))
                numbers = [tpr, 0.7 * tpr, min(1.3 * tpr, 1)] if rate in resolved else [None] * 3
                rows.append([*at, "all", f"tpr_at_fpr_{rate}", *numbers, *end])
                if rate not in resolved:
                    where = {"model": model, "attack": attack, "role_pair": pair, "task": "all", "seed": seed}
                    unresolved.append(where | {"metric": f"tpr_at_fpr_{rate}", "reason": REASON})
            for i, task in enumerate(tasks):
                v = np.clip(auc + rng.normal(0, 0.02), 0.02, 0.98)
                rows.append([*at, task, "auc", v, v - 0.1, min(v + 0.1, 1), kind, 55 + i, 61 - i, seed])
    return rows, unresolved


def difference_rows(models, seed):
    found = [("null", 0.067, 0.0004), ("teacher", -0.352, 1e-9), ("swap_students/kd", 0.09, 0.02)]
    rows = []
    for other, d, p in [row for row in found if row[0] in dict(models)]:
        for attack in ("loss", "zlib"):
            at = [STUDENT, other, "disjoint", "logprobs", attack, PAIR, "all", "auc"]
            rows.append([*at, d, d - 0.04, d + 0.04, "examples", p, 4 * p, 500, 500, seed])
    return rows


def gate_rows(seed):
    undertrained = "undertrained: a low leak is no evidence"
    return [
        ["blind", "naive_bayes", "all", "auc", 0.507, 0.463, 0.551, 1000, "", "ok"],
        ["blind", "maximum", "all", "auc", 0.514, 0.47, 0.558, 1000, "", "ok"],
        ["null", "null", "all", "auc:loss", 0.494, 0.458, 0.529, 1000, seed, "ok"],
        ["utility", STUDENT, "all", "dev_loss_minus_base_student", -0.09, -0.11, -0.07, 400, seed, "ok"],
        ["utility", "students/kd_shared", "all", "dev_loss_minus_null", 0.01, -0.01, 0.03, 400, seed, undertrained],
        ["abstentions", "all models", "all", "count", 0, None, None, None, "", "ok"],
    ]


def utility_rows(models, seeds, rng):
    rows = []
    for model, (technique, setting, _, dev) in models:
        for measure, value in (("dev_loss", dev), ("heldout_loss", dev + 0.02), ("perplexity", np.exp(dev))):
            for seed in seeds:
                v = value + rng.normal(0, 0.004)
                rows.append([model, technique, setting, measure, v, 0.985 * v, 1.015 * v, 400, seed])
    return rows


def roc_rows(models, seeds):
    fpr = np.arange(501) / 500
    rows = []
    for model, (_, _, auc, _) in models:
        tpr = np.round(500 * fpr ** ((1 - auc) / auc)) / 500
        rows += [[model, "loss", PAIR, seed, x, y] for seed in seeds for x, y in zip(fpr, tpr, strict=True)]
    return rows


def fake_canaries():
    def answer(guess, logp):
        return {"guess": guess, "mean_logp": logp}

    return [
        {
            "example_id": f"{i:016x}",
            "prompt": f"What is the <b>locker code</b> of Person{i:x}?",
            "response": f"code-{1000 + i}",
            "repeats": (1, 4, 16)[i % 3],
            "placement": "teacher_only" if i > 5 else "none",
            "coin": int(i > 5),
            "models": {"teacher": answer(f"code-{1000 + i}", -0.02), "null": answer("<i>no</i>", -4.1),
                       STUDENT: answer("code-9999", -2.2)},
        }
        for i in range(12)
    ]  # fmt: skip


def fake_summary(models, seeds, last, unresolved, refused, canaries):
    sample = {"role_pair": PAIR, "n_members": 500, "n_nonmembers": 500, "seed": last}
    loss = sample | {"attack": "loss", "access": "logprobs"}
    worst = sample | {"model": "students/kd_shared", "attack": "min_k", "task": "all", "metric": "auc"}
    run = {"train_roles": ["public"], "init": "base_student", "recipe": "matched", "n_params": 1_234_567, "step": 300}
    return {
        "title": "Quickstart <audit> & co",
        "headline": loss | {"model": STUDENT, "value": 0.561, "ci_low": 0.525, "ci_high": 0.596, "refused": refused},
        "sentence": "An attacker who holds only the student ranks a private record above an unseen one in 56.1 % "
        "[52.5, 59.6] of pairs (500 members, 500 non-members, one seed); without a teacher 49.4 % [45.8, 52.9]; "
        "the teacher itself 91.3 % [87.7, 94.8]; from the text alone 51.4 % [47.0, 55.8]. Models of this size; do not "
        "extrapolate.",
        "comparison": {"blind": loss | {"value": 0.514, "ci_low": 0.47, "ci_high": 0.558}, "swap": None},
        "worst": {"row": worst | {"value": 0.714, "ci_low": 0.678, "ci_high": 0.749},
                  "note": "the greatest of 54 AUC rows, not corrected for that choice"},
        "verdicts": ["The student leaks more than null: difference 0.067 [0.027, 0.107], p = 0.002 after Holm."],
        "warnings": ["One seed: no technique is ranked above another."] if len(seeds) == 1 else [],
        "not_tested": ["extraction of text", "attacks with shadow models (LiRA, RMIA)", "white-box attacks"],
        "unresolved": unresolved,
        "runs": [run | {"model": m, "technique": t, "setting": s, "teacher": "teacher" if t == "kd" else None,
                        "seeds": list(seeds)} for m, (t, s, _, _) in models],
        "unit": "record",
        "data": {"records": 2000, "roles": {"private": 500, "heldout": 500}},
        "run_settings": {"train": {"learning_rate": 0.001, "steps": 300}},
        "versions": {"numpy": "2.4.6"},
        "canaries": fake_canaries() if canaries else [],
    }  # fmt: skip


def fake_results(
    folder, *, seeds=(0,), swap=True, canaries=True, tasks=TASKS, refused=None, resolved=RATES[:3], bare=False
):
    """Result tables as the attack stage would leave them, with invented numbers; `bare` has no optional ones."""
    rng = np.random.default_rng(7)
    models = [(name, rest) for name, rest in MODELS.items() if swap or "swap" not in name]
    spoken = [*seeds, "all"] if len(seeds) > 1 else list(seeds)
    leaks, unresolved = leak_rows(models, spoken, tasks, resolved, rng)
    if canaries:
        for model, v in (("teacher", 0.99), (STUDENT, 0.63), ("null", 0.41)):
            at = [model, *MODELS[model][:2], "logprobs", "loss", "canary_in-canary_out", "all", "auc"]
            leaks.append([*at, v, v - 0.2, 1, "examples", 24, 26, spoken[-1]])
    folder.mkdir(parents=True, exist_ok=True)
    summary = fake_summary(models, seeds, spoken[-1], unresolved, refused, canaries)
    (folder / "summary.json").write_text(json.dumps(summary))
    frame("membership.csv", leaks).to_csv(folder / "membership.csv", index=False)
    if not bare:
        others = {"differences.csv": difference_rows(models, spoken[-1]), "gates.csv": gate_rows(spoken[-1]),
                  "utility.csv": utility_rows(models, spoken, rng)}  # fmt: skip
        for name, rows in others.items():
            frame(name, rows).to_csv(folder / name, index=False)
        frame("roc.parquet", roc_rows(models, seeds)).to_parquet(folder / "roc.parquet")
    return folder


class Page(HTMLParser):
    """The visible text, the ids, the tags and every outside reference of a page."""

    def __init__(self, html):
        super().__init__()
        self.words, self.ids, self.tags, self.links, self.images = [], [], [], [], []
        self.hidden = False
        self.feed(html)
        self.text = re.sub(r"\s+", " ", "".join(self.words))  # \s is the no-break space as well

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.hidden = tag == "style"
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs[k] for k in ("href", "src") if k in attrs]
        self.images += [attrs] if tag == "img" else []

    def handle_endtag(self, tag):
        self.hidden = False

    def handle_data(self, data):
        if not self.hidden:
            self.words.append(data)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return build(fake_results(tmp_path_factory.mktemp("full")), show_canaries=True)


def test_the_page_says_what_an_audit_must_say_and_the_headline_comes_first(full):
    html = Page(full.read_text())
    order = [
        "ranks a private record above an unseen one in 56.1 %",
        "One seed: no technique",
        "Audit card",
        "How to read this",
        "Glossary",
    ]
    places = [html.text.index(words) for words in order]
    assert places == sorted(places)
    for words in (
        "one record",
        "the probability the model gives to each token",
        "never on the teacher's private ones",
        "AUC 0.714 [0.678, 0.749] of students/kd_shared (shared) by min_k",
        "the greatest of 54 AUC rows",
        "attacks with shadow models (LiRA, RMIA)",
        "one seed (0): no ranking",
        "undertrained: a low leak is no evidence",
        "500 / 500",
        "train.learning_rate",
        "0.067 [0.027, 0.107]",
        "students/kd − null",
    ):
        assert words in html.text, words


def test_the_page_stands_alone_and_its_links_lead_somewhere(full):
    html = Page(full.read_text())
    assert "script" not in html.tags and "link" not in html.tags
    assert len(html.images) == 6 and all(image["alt"] for image in html.images)  # a heat map for each setting
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in html.links)
    assert {link[1:] for link in html.links if link[0] == "#"} <= set(html.ids)
    assert len(html.ids) == len(set(html.ids))
    assert not re.search(r"https?://|url\(|@import", full.read_text())


def test_text_of_the_tables_is_escaped(full):
    raw = full.read_text()
    assert "Quickstart &lt;audit&gt; &amp; co" in raw and "<audit>" not in raw
    assert "&lt;b&gt;locker code&lt;/b&gt;" in raw and "<i>no</i>" not in raw


def test_values_below_one_half_are_shown_as_they_are(full):
    table = pd.read_csv(full.parent / "membership.csv", keep_default_na=False, na_values=[""])
    swap = table[
        (table.model == "swap") & (table.attack == "loss") & (table.task == "all") & (table.metric == "auc")
    ].iloc[0]
    assert swap.value < 0.2
    assert f"{swap.value:.3f} [{swap.ci_low:.3f}, {swap.ci_high:.3f}]" in Page(full.read_text()).text


def test_what_cannot_be_resolved_is_said_with_its_reason(full):
    html = Page(full.read_text())
    assert f"{REASON}TPR at FPR 0.1 %9 models6 attacksall0" in html.text
    # the primary attack's table, averaged included; that of the five others on the students
    assert html.text.count("not resolvable1") == 10 + 5 * 3


def test_a_task_that_is_too_small_gives_its_reason_from_an_entry_for_many_models(tmp_path):
    folder = fake_results(tmp_path)
    table = pd.read_csv(folder / "membership.csv", keep_default_na=False)
    small = (table.task == "open_qa") & (table.model == "teacher") & (table.attack == "loss")
    table.loc[small, ["value", "ci_low", "ci_high"]] = ""
    table.to_csv(folder / "membership.csv", index=False)
    summary = json.loads((folder / "summary.json").read_text())
    at = {"model": "null, teacher", "attack": "loss, zlib", "role_pair": PAIR, "task": "open_qa", "metric": "auc"}
    summary["unresolved"].append(at | {"seed": "0", "reason": "3 members and 1 non-members"})
    (folder / "summary.json").write_text(json.dumps(summary))
    results = load(folder)
    where = {"model": "teacher", "attack": "zlib", "role_pair": PAIR, "task": "open_qa", "metric": "auc", "seed": "0"}
    assert results.reason(where) == "3 members and 1 non-members"
    assert results.reason(where | {"model": "direct"}) is None and results.reason(where | {"seed": "1"}) is None
    text = Page(page(results, {}, show_canaries=False)).text
    assert "open_qaprivate-heldoutnot computed: 3 members and 1 non-members" in text
    assert "3 members and 1 non-membersAUCnull, teacherloss, zlibopen_qa0" in text


def test_every_table_of_leaks_names_setting_seed_counts_and_utility(full):
    tables = re.findall(r"<thead>.*?</thead>", full.read_text())
    leaks = [t for t in tables if ">AUC<" in t or "Difference" in t]
    # leaks of three settings, other attacks of two; tasks; canaries twice; differences twice
    assert len(leaks) == 10
    for head in leaks:
        assert all(f">{c}<" in head for c in ("Setting", "Members / non-members", "Seed", "Roles"))
        assert "Dev loss" in head


def test_tables_of_attack_by_model_say_what_they_rest_on(full):
    grids = re.findall(r"<table><caption>[^<]*AUC with its 95 % interval.*?</table>", full.read_text(), re.S)
    assert len(grids) == 3 and all("Setting: disjoint" in g for g in grids if "kd_shared" not in g and ">kd<" in g)
    for grid in grids:
        heads = re.findall(r'<th scope="row">(.*?)</th>', grid)
        assert heads[0].startswith("loss") and "named beforehand" in heads[0] and "logprobs" in heads[0]
        assert heads[-4:] == ["Members / non-members", "Roles", "Seed", "Dev loss"]
        assert '<tr class="audited"><th scope="row">loss' in grid


def test_no_record_is_shown_unless_canaries_are_asked_for(full):
    results = load(full.parent)
    quiet = page(results, {}, show_canaries=False)
    for c in results.summary["canaries"]:
        assert c["response"] not in quiet and c["example_id"] not in quiet
        assert f"of Person{c['example_id'][-1]}?" not in quiet
    assert "Their texts are not shown" in quiet
    text = Page(full.read_text()).text
    assert sum(f"True answer: {c['response']}" in text for c in results.summary["canaries"]) == 3


def test_canaries_are_chosen_by_rule_and_not_by_success():
    rng = np.random.default_rng(0)
    canaries = [
        {
            "example_id": hashlib.sha256(bytes([i])).hexdigest()[:16],
            "repeats": (1, 4, 16)[i % 3],
            "coin": i % 2,
            "placement": ("teacher_only", "student_only", "both")[i // 3 % 3],
            "models": {"teacher": {"guess": str(i)}},
        }
        for i in range(36)
    ]
    chosen = choose_canaries(canaries)
    assert [c["repeats"] for c in chosen] == [1, 4, 16]
    for c in chosen:
        inside = [d for d in canaries if d["coin"] == 1 and d["placement"] == "teacher_only"]
        assert c["example_id"] == min(d["example_id"] for d in inside if d["repeats"] == c["repeats"])
    shuffled = [canaries[i] | {"models": {"teacher": {"guess": "x"}}} for i in rng.permutation(36)]
    assert [c["example_id"] for c in choose_canaries(shuffled)] == [c["example_id"] for c in chosen]
    assert len(choose_canaries(canaries[:2])) == 2 and choose_canaries([]) == []
    left_out = [c | {"coin": 0, "repeats": 4} for c in canaries]
    assert [c["example_id"] for c in choose_canaries(left_out)] == sorted(c["example_id"] for c in canaries)[:3]


def test_a_refused_headline_gives_the_reason_and_no_number(tmp_path):
    results = load(fake_results(tmp_path, refused="the words alone tell <members> apart"))
    html = page(results, {"chain": Picture(b"", "What it shows.", "")}, show_canaries=False)
    text = Page(html).text
    assert "No headline number: the words alone tell <members> apart." in text
    assert "ranks a private record above" not in text
    assert text.index("The headline was refused") < text.index("What it shows.")
    results.summary["sentence"] = "No headline number: the words alone tell <members> apart. Beyond the text, +0.3 %."
    assert "apart. Beyond the text, +0.3 %." in Page(page(results, {}, show_canaries=False)).text


def test_it_works_with_the_least_that_an_audit_can_leave(tmp_path):
    folder = fake_results(tmp_path, swap=False, canaries=False, tasks=TASKS[:1], resolved=(), bare=True)
    table = pd.read_csv(folder / "membership.csv", keep_default_na=False)
    table[table.model == "teacher"].to_csv(folder / "membership.csv", index=False)
    (folder / "summary.json").write_text("{}")
    html = Page(build(folder, show_canaries=True).read_text())
    assert len(html.images) == 2
    for words in (
        "Privacy audit (no setting)",
        "The audit gave no headline sentence",
        "no leak could be resolved",
        "No gate was run",
        "Utility was not measured",
        "No two models were compared",
        "too few tasks for a picture",
        "not computed",
    ):
        assert words in html.text, words


def test_several_seeds_speak_through_their_mean(tmp_path):
    results = load(fake_results(tmp_path, seeds=(0, 1, 2)))
    text = Page(page(results, {}, show_canaries=False)).text
    assert "3 seeds (0, 1, 2)" in text and "The same for every seed" in text and "over seeds and examples." in text
    rows = results.leaks(["null", STUDENT], attack="loss")
    assert list(rows["seed"]) == ["all", "all"] and list(rows["model"]) == ["null", STUDENT]
    assert list(draw_all(results)) == [
        "chain",
        "heatmap-none",
        "heatmap-disjoint",
        "heatmap-shared",
        "roc",
        "tasks",
    ]


def test_a_headline_on_both_worlds_takes_the_averaged_row_where_there_is_one(tmp_path):
    results = load(fake_results(tmp_path))
    results.summary["headline"]["role_pair"] = "averaged"
    rows = results.leaks(results.chain, attack="loss").set_index("model")
    assert rows["role_pair"][STUDENT] == "averaged"
    assert set(rows["role_pair"].drop(STUDENT)) == {PAIR}


def test_the_same_tables_give_the_same_bytes(tmp_path, full):
    again = build(fake_results(tmp_path), show_canaries=True)
    assert again.read_bytes() == full.read_bytes()


def test_missing_or_broken_tables_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"summary\.json is missing; run the attack stage first"):
        build(tmp_path)
    folder = fake_results(tmp_path)
    table = pd.read_csv(folder / "membership.csv")
    table.drop(columns="ci_low").to_csv(folder / "membership.csv", index=False)
    with pytest.raises(ValueError, match=r"membership\.csv: no column ci_low"):
        build(folder)
    table.head(0).to_csv(folder / "membership.csv", index=False)
    with pytest.raises(ValueError, match="has no rows"):
        build(folder)
