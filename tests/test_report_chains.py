"""The sections of the shadow chains: strong attacks beside cheap ones, what is passed on, effects of one record."""

import dataclasses

import pandas as pd
import pytest
from test_report import fake_results
from test_report_techniques import Tables

from attacks import counterfactual, shadow
from attacks.report.chain_figures import draw_chains, draw_effects
from attacks.report.chains import STUDENT, TEACHER, chain_section, counterfactual_section
from attacks.report.results import load

SIZES = {TEACHER: "2 layers x 64, 0.21 M parameters", STUDENT: "2 layers x 32, 0.06 M parameters"}
ATTACKS = {"lira_online": ("logit", 0.2), "lira_offline_cdf": ("LL", 0.1), "rmia_offline": ("prob", 0.15)}
ATTACKS |= {"loss": ("LL", 0.05), "zlib": ("-", 0.02)}


def common(model, design):
    setting = "-" if model == TEACHER else "shared" if design == "two_by_two" else "disjoint"
    return {"model": model, "size": SIZES[model], "technique": "kd", "setting": setting, "design": design, "seed": 3}


def shadow_rows(design="full"):
    rows = []
    for model, more in ((TEACHER, 0.1), (STUDENT, 0.0)):
        for attack, (statistic, gain) in ATTACKS.items():
            at = common(model, design) | {"attack": attack, "statistic": statistic, "targets": 16, "n_members": 150}
            at |= {"n_nonmembers": 151, "references": 7 if attack.startswith(("lira", "rmia")) else 0}
            auc = 0.5 + gain + more
            rows.append(at | interval("auc", auc) | {"against": ""})
            rows.append(at | {"metric": "auc_sd", "value": 0.0123, "against": ""})
            if attack != "zlib":
                rows.append(at | interval("tpr_at_fpr_0.01", 0.01 + gain) | {"against": ""})
            if attack.startswith(("lira", "rmia")):
                tested = {"p_value": 0.004, "p_corrected": 0.008}
                rows.append(at | interval("auc", gain - 0.05) | tested | {"against": "loss"})
            if model == STUDENT:
                rows.append(at | interval("auc", -0.1) | {"against": TEACHER, "p_value": 1e-5, "p_corrected": 2e-5})
                rows.append(at | interval("tpr_ratio_at_fpr_0.01", 0.4321) | {"against": TEACHER})
    return rows


def interval(metric, value):
    return {"metric": metric, "value": value, "ci_low": value - 0.03, "ci_high": value + 0.03}


def effect_rows(design):
    effects = {(TEACHER, "direct"): 0.3, (STUDENT, "inherited"): 0.12}
    if design == "two_by_two":
        effects |= {(STUDENT, "direct"): 0.29, (STUDENT, "interaction"): -0.04}
    rows = []
    for (model, effect), value in effects.items():
        at = common(model, design) | {"effect": effect, "role": "private+heldout", "n": 301, "chains": 16}
        for measure, scale in (("accuracy", 0.1), ("LL", 1.0)):
            numbers = {"value": scale * value, "ci_low": scale * value - 0.01, "ci_high": scale * value + 0.01}
            rows += [at | numbers | {"measure": measure}, at | numbers | {"measure": f"split_half_{measure}"}]
    return rows


def results_of(folder, design):
    fake_results(folder, tasks=())
    for name, rows, module in (
        ("shadow", shadow_rows(design), shadow),
        ("counterfactual", effect_rows(design), counterfactual),
    ):
        pd.DataFrame(rows, columns=module.COLUMNS.split(), dtype=object).to_csv(folder / f"{name}.csv", index=False)
    return load(folder)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return results_of(tmp_path_factory.mktemp("full"), "full")


@pytest.fixture(scope="module")
def crossed(tmp_path_factory):
    return results_of(tmp_path_factory.mktemp("crossed"), "two_by_two")


def lines(tables, words):
    """The rows of the one table whose caption has these words, its heading first."""
    (found,) = [rows for caption, rows in tables.tables.items() if words in caption]
    return found


def test_attacks_of_both_models(full):
    tables = Tables(chain_section(full, {}))
    for model, auc in ((TEACHER, "0.800 [0.770, 0.830]"), (STUDENT, "0.700 [0.670, 0.730]")):
        head, *body = next(
            rows for words, rows in tables.tables.items() if words.removeprefix("Setting: disjoint. ").startswith(model)
        )
        cells = {line[0]: dict(zip(head, line, strict=True)) for line in body}
        assert cells["lira_online, logit"]["AUC"] == auc and cells["lira_online, logit"]["References"] == "7"
        assert cells["loss"]["SD of AUC"] == "0.012" and cells["loss"]["References"] == "–"
        assert cells["zlib"]["TPR at FPR 1 %"] == "–" and "21.0 %" in cells["lira_online, logit"]["TPR at FPR 1 %"]


def test_the_size_stands_in_every_table_and_figure(full, crossed):
    for results in (full, crossed):
        tables = Tables(chain_section(results, {}) + counterfactual_section(results, {})).tables
        assert tables and all("layers x" in caption and "design" in caption for caption in tables)
        for figure, caption, alt in [*draw_chains(results).values(), draw_effects(results)]:
            words = " ".join(text.get_text() for text in figure.findobj(lambda o: hasattr(o, "get_text")))
            assert all(size in words for size in SIZES.values()) and caption and alt


def test_gaps_and_what_is_passed_on(full):
    tables = Tables(chain_section(full, {}))
    head, *body = lines(tables, "Teacher: 2 layers x 64")
    line = dict(zip(head, next(b for b in body if b[0] == "lira_online, logit"), strict=True))
    assert (line["AUC, teacher"], line["AUC, student"]) == ("0.800", "0.700")
    assert line["Student − teacher"] == "−0.100 [−0.130, −0.070]" and line["Ratio of TPR"] == "0.43 [0.40, 0.46]"
    assert line["p corrected"] == "< 0.001"
    assert "nothing passed on not 0" in tables.text
    gaps = [rows for words, rows in tables.tables.items() if "Paired" in words]
    assert gaps and ["lira_online, logit", "loss", "AUC", "0.150 [0.120, 0.180]", "0.004", "0.008"] in gaps[0]


def test_cheap_chains_are_called_so(tmp_path, full):
    cheap, whole = (Tables(chain_section(results, {})).text for results in (results_of(tmp_path, "cheap"), full))
    assert "are not LiRA or RMIA" in cheap and "the others, but for" not in cheap  # no references outside the pair
    assert "are not LiRA or RMIA" not in whole and "agree with it on the record" not in whole


def test_students_with_data_of_their_own_are_called_so(crossed):
    assert "agree with it on the record" in Tables(chain_section(crossed, {})).text


def test_effects(crossed, full):
    tables = Tables(counterfactual_section(crossed, {}))
    body = lines(tables, "Mean over records")[1:]
    measured = [line[3] for line in body if line[:2] == [STUDENT, "interaction"]]
    assert measured == ["−0.004 [−0.014, 0.006]", "−0.040 [−0.050, −0.030]"]
    orders = lines(tables, "Rank correlations")[1:]
    assert len(orders) == 8 and all(line[3] == "two halves of the chains" for line in orders)
    names = {text.get_text() for text in draw_effects(crossed)[0].axes[0].texts}
    assert {"direct", "inherited", "interaction"} <= names
    assert "interaction" not in {text.get_text() for text in draw_effects(full)[0].axes[0].texts}


def test_figures_show_every_attack_on_one_scale(full):
    drawn = draw_chains(full)
    assert set(drawn) == {"chains", "chains-tpr"}
    left, right = drawn["chains"][0].axes
    assert left.get_xlim() == right.get_xlim() and left.get_xlim()[0] < 0.5
    names = [text.get_text() for text in left.texts]
    assert {"lira_online, logit", "rmia_offline, prob", "loss", "zlib"} <= set(names)
    assert "lira_offline_cdf, LL" not in names  # the forms that stand for their kind
    assert "shadow/student loss 0.550" in drawn["chains"][2]


def test_nothing_without_the_tables(full):
    none = dataclasses.replace(full, shadow=full.shadow.iloc[:0], counterfactual=full.counterfactual.iloc[:0])
    assert not chain_section(none, {}) and not counterfactual_section(none, {})
    assert draw_chains(none) == {} and draw_effects(none) is None
