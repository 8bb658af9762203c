"""The sections of the page below the card: tables of every leak, gate, difference and setting, beside their figures."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from attacks.report.blocks import blocks_section
from attacks.report.canaries import canary_texts, exposure_section
from attacks.report.chains import chain_section, counterfactual_section
from attacks.report.checks import gate_section, unavailable_section
from attacks.report.claims import claim_section
from attacks.report.decisions import dataset_section, decision_section, task_section
from attacks.report.disagreement import disagreement_section
from attacks.report.drawing import Picture
from attacks.report.epsilon import epsilon_section
from attacks.report.every_attack import attack_section
from attacks.report.inheritance import agreement_section, alpha_section, supervision_section
from attacks.report.inherited import inherited_section
from attacks.report.markup import (
    Html,
    counted,
    figure,
    finite,
    folded,
    is_rate,
    join,
    measured,
    metric_name,
    p_value,
    short_measured,
    signed,
    table,
    tag,
    text,
)
from attacks.report.mechanism import mechanism_section
from attacks.report.memorized import memorized_section
from attacks.report.prediction import prediction_section
from attacks.report.results import MAIN_PAIR, Results, in_order, kind, pooled
from attacks.report.techniques import ledger_section, technique_sections

CANARY_PAIR = "canary_in-canary_out"
GRID = "grid_dev_loss"
OVER = {"both": "seeds and examples"}
RUN_COLUMNS = {
    "technique": "Technique", "setting": "Setting", "train_roles": "Trained on", "teacher": "Teacher",
    "init": "Started from", "recipe": "Recipe", "n_params": "Parameters", "seeds": "Seeds", "step": "Step",
}  # fmt: skip


def all_sections(results: Results, pictures: dict[str, Picture], show_canaries: bool) -> dict[str, tuple[str, Html]]:
    """Anchor -> (title, content), in the order of the page; sections with nothing to say are left out."""
    found = {
        "attacks": ("Every attack on every model", attack_section(results, pictures)),
        **technique_sections(results, pictures),
        "leaks": ("Leak by model", _leaks(results)),
        "roc": ("Few false alarms", figure(pictures.get("roc"))),
        "agreement": ("Teacher and student", agreement_section(results, pictures)),
        "supervision": ("Mixed supervision", supervision_section(results, pictures)),
        "alpha": ("The weight of the teacher", alpha_section(results, pictures)),
        "tasks": ("By task", task_section(results, pictures)),
        "decisions": ("Decisions record by record", decision_section(results)),
        "differences": ("Differences", _differences(results)),
        "chains": ("Attacks by many models", chain_section(results, pictures)),
        "blocks": ("Where members show, block by block", blocks_section(results, pictures)),
        "epsilon": ("Privacy lower bounds", epsilon_section(results)),
        "claims": ("Memorization: three claims", claim_section(results)),
        "memorized": ("What is memorized", memorized_section(results, pictures)),
        "inherited": ("Inheritance of what is memorized", inherited_section(results, pictures)),
        "prediction": ("Prediction and filter", prediction_section(results, pictures)),
        "mechanism": ("How it is memorized", mechanism_section(results, pictures)),
        "disagreement": ("Membership against memorization", disagreement_section(results, pictures)),
        "counterfactual": ("Counterfactual memorization", counterfactual_section(results, pictures)),
        "exposure": ("Exposure of canaries", exposure_section(results, pictures)),
        "canaries": ("Canaries", _canaries(results, show_canaries)),
        "dataset": ("The whole set at once", dataset_section(results)),
        "gates": ("Gates", gate_section(results)),
        "utility": ("Utility", _utility(results)),
        "ledger": ("What the students were trained on", ledger_section(results)),
        "unavailable": ("What could not be computed", unavailable_section(results)),
        "runs": ("Runs", _runs(results)),
        "settings": ("Data, settings, versions", _settings(results.summary)),
    }
    return {anchor: (title, content) for anchor, (title, content) in found.items() if content}


def _heading(frame: pd.DataFrame, caption: str) -> tuple[str, bool]:
    """The caption with what all rows share: what the intervals are over, and the attack where there is only one (else
    each row must name its own, which the second value says)."""
    over = " or ".join(sorted({OVER.get(k, k) for k in frame["ci_kind"]} - {""})) or "not stated"
    attacks = (frame["attack"] + " (" + frame["access"] + ")").unique()
    said = f"Attack: {attacks[0]}. " if len(attacks) == 1 else ""
    return f"{said}{caption} Intervals: 95 %, over {over}.", not said


def _sorted(results: Results, frame: pd.DataFrame) -> pd.DataFrame:
    """By role pair, then model, attack, task and seed, in the order of the story."""
    rank = {
        "role_pair": {MAIN_PAIR: 0, "heldout-private": 1, "averaged": 2, CANARY_PAIR: 3},
        "model": {name: i for i, name in enumerate(results.models)},
        "attack": {name: i for i, name in enumerate(results.attack_ids)},
    }
    columns = [*rank, "task", "seed"]
    return frame.sort_values(columns, key=lambda c: c.map(rank[c.name]) if c.name in rank else c, kind="stable")


def _dev_loss(results: Results, model: str, seed: str) -> Html:
    """The utility of a model, of this seed where it was measured."""
    u = results.utility
    u = u[(u["model"] == model) & (u["measure"] == "dev_loss")]
    exact = u[u["seed"] == seed]
    u = exact if len(exact) else pooled(u)
    return measured(*u.iloc[0][["value", "ci_low", "ci_high"]]) if len(u) else text("–")


def _leak_tables(results: Results, frame: pd.DataFrame, caption: str) -> Html:
    """One table, or one per setting."""
    return join(*(_leak_table(results, part, said + caption) for said, part in results.apart(frame)))


def _leak_table(results: Results, frame: pd.DataFrame, caption: str) -> Html:
    """One row per model, attack, role pair and seed; one column per metric; reasons for empty cells as footnotes."""
    present = set(frame["metric"])
    rates = sorted((m for m in present if is_rate(m)), key=lambda m: -float(m.rsplit("_", 1)[1]))
    metrics = [m for m in ("auc", "balanced_accuracy") if m in present] + rates
    keys = ["role_pair", "model", "attack", "task", "seed"]
    caption, several = _heading(frame, caption)
    marks: dict[str, int] = {}
    rows = []
    for key, group in _sorted(results, frame).groupby(keys, sort=False):
        pair, model, attack, _, seed = key
        first, cells = group.iloc[0], {}
        by_metric = group.set_index("metric")[["value", "ci_low", "ci_high"]]
        for metric in metrics:
            numbers = tuple(by_metric.loc[metric]) if metric in by_metric.index else (np.nan,) * 3
            cells[metric_name(metric)] = measured(*numbers, percent=is_rate(metric))
            if not finite(numbers[0]) and (reason := results.reason({**dict(zip(keys, key)), "metric": metric})):
                mark = marks.setdefault(reason, len(marks) + 1)
                words = "not resolvable" if is_rate(metric) else "not computed"
                cells[metric_name(metric)] = join(tag("span", words, css="none"), tag("sup", mark))
        rows.append({
            "Model": model, "Setting": first["setting"] or "-",
            **({"Attack (access)": f"{attack} ({first['access']})"} if several else {}), "Roles": pair, **cells,
            "Members / non-members": counted(first["n_members"], first["n_nonmembers"]), "Seed": seed,
            "Dev loss": _dev_loss(results, model, seed),
        })  # fmt: skip
    notes = [tag("p", join(tag("sup", mark), " ", reason)) for reason, mark in marks.items()]
    return join(table(rows, caption, results.headline["model"]), *notes)


def _leaks(results: Results) -> Html:
    attack, m = results.headline["attack"], results.membership
    m = m[(m["task"] == "all") & (m["role_pair"] != CANARY_PAIR) & (m["attack"] == attack)]
    if m.empty:
        return Html("")
    caption = "The audited model is tinted."
    parts = [_leak_tables(results, pooled(m), caption)]
    if m["seed"].nunique() > 1:
        parts.append(folded("The same for every seed", _leak_tables(results, m[m["seed"] != "all"], caption)))
    if len(rest := _first_on_students(results)):
        said = "Many comparisons, not corrected for their number."
        parts.append(folded("The other attacks of the first pages on the students", _leak_tables(results, rest, said)))
    return join(*parts)


def _first_on_students(results: Results) -> pd.DataFrame:
    m = pooled(results.membership)
    others = [a for a in results.first_attacks if a != results.headline["attack"]]
    models = [x for x in results.models if kind(x) == "student" or x == results.headline["model"]]
    return m[
        (m["task"] == "all") & (m["role_pair"] != CANARY_PAIR) & m["attack"].isin(others) & m["model"].isin(models)
    ]


def _differences(results: Results) -> Html:
    attack, d = results.headline["attack"], pooled(results.differences)
    main = d[(d["task"] == "all") & (d["attack"] == attack) & (d["metric"] == "auc")]
    rest = d[d["attack"].isin(results.first_attacks)].drop(main.index)
    if d.empty:
        return tag("p", "No two models were compared.")
    note = (
        "Paired on the same records: what one model shows above the other. The p-value is two-sided, then corrected "
        "(Holm) for all comparisons of its family."
    )
    parts = [tag("p", note)]
    parts += [_difference_tables(results, main, "Difference of AUC.")] if len(main) else []
    parts += (
        [folded("Other attacks of the first pages", _difference_tables(results, rest, "All others: differences.csv."))]
        if len(rest)
        else []
    )
    return join(*parts)


def _difference_tables(results: Results, frame: pd.DataFrame, caption: str) -> Html:
    parts = results.apart(frame.assign(model=frame["model_a"]))
    return join(*(_difference_table(results, part, said + caption) for said, part in parts))


def _difference_table(results: Results, frame: pd.DataFrame, caption: str) -> Html:
    def reading(p: float) -> str:
        return "–" if not finite(p) else "they differ" if p < 0.05 else "no difference resolved"

    caption, several = _heading(frame, caption)
    rows = [{
        "Models": f"{r.model_a} − {r.model_b}", "Setting": r.setting or "-",
        **({"Attack (access)": f"{r.attack} ({r.access})"} if several else {}), "Roles": r.role_pair,
        "Metric": metric_name(r.metric),
        "Difference": measured(r.difference, r.ci_low, r.ci_high, percent=is_rate(r.metric)),
        "p": p_value(r.p_value), "p corrected": p_value(r.p_corrected), "Reading": reading(r.p_corrected),
        "Members / non-members": counted(r.n_members, r.n_nonmembers), "Seed": r.seed,
        "Dev loss of either": join(*(tag("span", _dev_loss(results, m, r.seed), css="line")
                                     for m in (r.model_a, r.model_b)), separator=" "),
    } for r in frame.itertuples()]  # fmt: skip
    return table(rows, caption)


def _utility(results: Results) -> Html:
    u = pooled(results.utility)
    if u.empty:
        return tag("p", "Utility was not measured: a low leak may only mean a model that learned nothing.", css="bad")
    of = u["measure"].str.partition("@")
    u = u.assign(measure=of[0], set=of[2])
    grid = u["measure"] == GRID
    losses, generated = u[u["set"] == ""], u[(u["set"] != "") & ~grid]
    caption = "Losses in nats per token, with 95 % intervals; lower is better."
    parts = [_utility_table(results, part, said + caption) for said, part in results.apart(losses)]
    if len(generated):
        caption = "Generated responses: ROUGE F1 from 0 to 100, higher is better; tokens per response. 95 % intervals."
        parts += [_utility_table(results, part, said + caption) for said, part in results.apart(generated)]
    rates = [_grid(results, part, said) for said, part in results.apart(u[grid])]
    return join(*parts, folded("Learning rates that were tried", join(*rates)) if rates else "")


def _utility_table(results: Results, frame: pd.DataFrame, caption: str) -> Html:
    """One row per model, set of prompts and seed; one column per measure."""
    measures, rows = list(frame["measure"].unique()), []
    for model in in_order(frame["model"]):
        for (name, seed), group in frame[frame["model"] == model].groupby(["set", "seed"], sort=False):
            by = group.set_index("measure")[["value", "ci_low", "ci_high"]]
            first, show = group.iloc[0], short_measured if name else measured
            rows.append({
                "Model": model, "Technique": first["technique"] or "-", "Setting": first["setting"] or "-",
                **({"Set": name} if name else {}),
                **{_measure_name(m): show(*by.loc[m]) if m in by.index else "–" for m in measures},
                "n": " / ".join(dict.fromkeys(f"{n:,.0f}" for n in group["n"])), "Seed": seed,
            })  # fmt: skip
    return table(rows, caption, results.headline["model"])


def _measure_name(measure: str) -> str:
    if measure.startswith("rouge_"):
        return "ROUGE-" + measure.removeprefix("rouge_").upper()
    return measure.replace("_", " ").capitalize()


def _grid(results: Results, frame: pd.DataFrame, said: str) -> Html:
    """Dev loss of every learning rate that was tried, the picked one in bold."""
    rates = sorted((name for name in frame["set"].unique()), key=lambda name: float(name.removeprefix("lr=")))
    rows = []
    for model in in_order(frame["model"]):
        own = frame[frame["model"] == model].set_index("set")
        facts = (results.runs.get(model, {}).get("training") or {}).values()
        picked = {f"lr={f['lr']:g}" for f in facts if f.get("lr") is not None}
        cells = {}
        for rate in rates:
            value = own["value"].get(rate, np.nan)
            words = (signed(value) or "diverged") if rate in own.index else "–"
            cells[f"Learning rate {rate.removeprefix('lr=')}"] = tag("b", words) if rate in picked else words
        rows.append({"Model": model, "Setting": results.settings.get(model, "-"), **cells, "Seed": own["seed"].iloc[0]})
    caption = "Dev loss (nats per token) of every learning rate that was tried; the one picked is in bold."
    return table(rows, said + caption, results.headline["model"])


def _canaries(results: Results, show: bool) -> Html:
    m = pooled(results.membership)
    m = m[(m["role_pair"] == CANARY_PAIR) & (m["task"] == "all") & m["attack"].isin(results.first_attacks)]
    caption = "Canaries that were put in against canaries that were left out."
    head = m[m["attack"] == results.headline["attack"]]
    parts = [_leak_tables(results, head, caption)] if len(head) else []
    if len(rest := m.drop(head.index)):
        parts.append(folded("The other attacks of the first pages", _leak_tables(results, rest, caption)))
    return join(*parts, canary_texts(results, show))


def _words(value) -> str:
    if value in (None, "", []):
        return "–"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _runs(results: Results) -> Html:
    rows = [{"Model": model} | {title: _words(results.runs[model].get(key)) for key, title in RUN_COLUMNS.items()}
            for model in in_order(results.runs)]  # fmt: skip
    return table(rows, audited=results.headline["model"]) if rows else Html("")


def _flat(tree: dict, prefix: str = "") -> Iterator[dict]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            # Not _words: a setting is printed as it was set, without separators.
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield {"Name": f"{prefix}{key}", "Value": shown}


def _settings(summary: dict) -> Html:
    titles = {"data": "Data", "run_settings": "Settings", "versions": "Versions"}
    told = [(title, summary[key]) for key, title in titles.items() if summary.get(key)]
    return join(*(join(tag("h3", title), tag("div", table(list(_flat(tree))), css="pairs")) for title, tree in told))
