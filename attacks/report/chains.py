"""Shadow chains: attacks with many models beside the cheap ones, what is passed on, and what one record does."""

import pandas as pd

from attacks.report.drawing import Picture
from attacks.report.markup import (
    Html,
    counted,
    figure,
    finite,
    folded,
    join,
    measured,
    metric_name,
    p_value,
    short_measured,
    signed,
    table,
    tag,
)
from attacks.report.results import Results

TEACHER, STUDENT = "shadow/teacher", "shadow/student"
STRONG = ("lira", "rmia")
NAMED = ("lira_online", "rmia_offline")  # the forms that stand for their kind, with the statistic they were made for
CHAINS = (
    "Chains of teacher and student, trained on random halves of the private and the held-out records: every record was "
    "in by a fair coin for each chain, and the models that lacked it tell how it looks to a model that never met it. "
    "In and out refer to the teacher's data, for the student as well. Each chain is the target in turn; the others, "
    "but for the one that completes it, are the references. A row is the mean over all targets, never the best one; "
    "SD: from target to target. Models of the shadow size: what larger ones show is another question."
)
CROSSED = (
    "Students have random halves in their own data as well: one is compared with students that agree with it on the "
    "record, and asked about its teacher's data alone."
)
CHEAP = (
    "Two teachers, of which one had a random half of the private and the held-out records and the other the rest, "
    "taught all students. In and out refer to the teacher's data. Scores are calibrated by other students of the same "
    "two teachers: they are not LiRA or RMIA, and no bound on epsilon follows from them. A row is the mean over all "
    "targets; its interval holds for these two teachers. SD: from target to target."
)
GAPS = (
    "A gap above 0: the attack with many models ranks members better. p corrected: Holm over the cheaper attacks that "
    "the same one is set beside, by model and metric; not over the attacks with many models."
)
PASSED = (
    "What the teacher knows of its members and the student shows as well, by the same attack on the same records. "
    "Ratio: of the members found at FPR 1 %, student over teacher; 1 would be all of it, and nothing passed on not 0 "
    "but 1 % over the teacher's rate: chance finds 1 % of the members."
)
MEMORIZED = (
    "What one record does: how well models know it that had it in their data, less those that had not. Direct: in the "
    "model's own data. Inherited: in its teacher's data alone. Interaction: what both together do beyond their sum. "
    "Means over records, with intervals over chains and groups of records."
)
MEASURES = {
    "accuracy": "Share of tokens that greedy decoding gets right",
    "LL": "Mean log-probability (nats per token)",
}
ORDERS = {
    "split_half": "two halves of the chains",
    "spearman_teacher_student": "the teacher's effect and the student's, of different chains",
    "spearman_repeats": "effect and repeats of the record",
}


def chain_section(results: Results, pictures: dict[str, Picture]) -> Html:
    """Attacks of teacher and student beside each other, gaps to the cheap ones, and what is passed on."""
    s = results.shadow[results.shadow["value"].notna()]
    if s.empty:
        return Html("")
    design = s["design"].iloc[0]
    parts = [tag("p", CHEAP if design == "cheap" else CHAINS), tag("p", CROSSED) if design == "two_by_two" else ""]
    parts += [tag("p", f"Size: {size_words(s)}."), *(figure(pictures.get(k)) for k in ("chains", "chains-tpr"))]
    alone, gaps = s[s["against"] == ""], s[s["against"].isin(set(s["attack"]))]
    parts += [_attacks(alone[alone["model"] == model]) for model in (TEACHER, STUDENT)]
    passed = s[s["against"] == TEACHER]
    if len(passed):
        parts += [tag("h3", "Passed on from teacher to student"), tag("p", PASSED), _passed(alone, passed)]
    if len(gaps):
        named = gaps[gaps["attack"].isin(NAMED) & (gaps["statistic"] != "LL")]
        parts += [tag("h3", "Many models against one"), tag("p", GAPS), _gaps(named)]
        parts.append(folded("All forms and statistics", _gaps(gaps)))
    return join(*parts)


def size_words(frame: pd.DataFrame) -> str:
    """`teacher 2 layers x 64, 0.21 M parameters; student ...`."""
    sizes = frame.drop_duplicates("model").set_index("model")["size"]
    return "; ".join(f"{m.removeprefix('shadow/')} {sizes[m]}" for m in (TEACHER, STUDENT) if m in sizes)


def _heading(frame: pd.DataFrame) -> str:
    """What all rows of a table share: model, size, setting, design, targets, records."""
    r = frame.iloc[0]
    setting = "" if r["setting"] == "-" else f"Setting: {r['setting']}. "
    many = f"{r['targets']:,.0f} targets, {counted(r['n_members'], r['n_nonmembers'])} records in / out of each"
    return f"{setting}{r['model']} ({r['size']}), design {r['design']}, {many}, seed {r['seed']}. "


def attack_words(attack: str, statistic: str) -> str:
    """`lira_online` and its statistic: `lira_online, logit`; a cheap attack has none of its own."""
    return f"{attack}, {statistic}" if attack.startswith(STRONG) else attack


def _attacks(frame: pd.DataFrame) -> Html:
    """One row per attack, one column per metric."""
    if frame.empty:
        return Html("")
    metrics = [m for m in dict.fromkeys(frame["metric"]) if m != "auc_sd"]
    rows = []
    for (attack, statistic), own in frame.groupby(["attack", "statistic"], sort=False):
        cells = own.set_index("metric")
        rows.append({
            "Attack": attack_words(attack, statistic),
            **{metric_name(m): _cell(cells, m) for m in metrics},
            "SD of AUC": signed(cells["value"].get("auc_sd")) or "–",
            "References": f"{own['references'].iloc[0]:.0f}" if own["references"].iloc[0] > 0 else "–",
        })  # fmt: skip
    return table(rows, _heading(frame) + "Intervals: 95 %, over pairs of chains and records.")


def _cell(cells: pd.DataFrame, metric: str) -> Html | str:
    if metric not in cells.index:
        return "–"
    return measured(*cells.loc[metric, ["value", "ci_low", "ci_high"]], percent=metric.startswith("tpr"))


def _passed(alone: pd.DataFrame, passed: pd.DataFrame) -> Html:
    rows = []
    aucs = alone[alone["metric"] == "auc"]
    for (attack, statistic), own in passed.groupby(["attack", "statistic"], sort=False):
        both = aucs[(aucs["attack"] == attack) & (aucs["statistic"] == statistic)].set_index("model")
        cells = own.set_index("metric")
        gap = cells.loc["auc"] if "auc" in cells.index else None
        ratio = next((m for m in cells.index if m.startswith("tpr_ratio")), None)
        rows.append({
            "Attack": attack_words(attack, statistic),
            **{f"AUC, {m.removeprefix('shadow/')}": signed(both["value"].get(m)) or "–" for m in (TEACHER, STUDENT)},
            "Student − teacher": "–" if gap is None else measured(gap["value"], gap["ci_low"], gap["ci_high"]),
            "p corrected": "–" if gap is None else p_value(gap["p_corrected"]),
            "Ratio of TPR": "–" if ratio is None else short_measured(*cells.loc[ratio, ["value", "ci_low", "ci_high"]]),
        })  # fmt: skip
    return table(rows, f"{_heading(passed)}Teacher: {alone[alone['model'] == TEACHER]['size'].iloc[0]}.")


def _gaps(frame: pd.DataFrame) -> Html:
    """One table per model: each attack with many models, less each cheap one."""
    parts = []
    for model in (TEACHER, STUDENT):
        own = frame[frame["model"] == model]
        rows = [{
            "Attack": attack_words(r.attack, r.statistic), "Less": r.against, "Metric": metric_name(r.metric),
            "Gap": measured(r.value, r.ci_low, r.ci_high, percent=r.metric.startswith("tpr")),
            "p": p_value(r.p_value), "p corrected": p_value(r.p_corrected),
        } for r in own.itertuples()]  # fmt: skip
        parts.append(table(rows, _heading(own) + "Paired: the same records and targets.") if rows else "")
    return join(*parts)


# --- what one record does --------------------------------------------------------------------------------------------


def counterfactual_section(results: Results, pictures: dict[str, Picture]) -> Html:
    """Direct and inherited effects, and how far the order of the records can be relied on."""
    c = results.counterfactual[results.counterfactual["value"].notna()]
    if c.empty:
        return Html("")
    parts = [tag("p", MEMORIZED), tag("p", f"Size: {size_words(c)}."), figure(pictures.get("effects"))]
    means, orders = c[c["measure"].isin(MEASURES)], c[~c["measure"].isin(MEASURES)]
    parts.append(table([_effect(r) for r in means.itertuples()], _design(c) + "Mean over records."))
    words = "Rank correlations over records: how far the order of the effects is the same."
    return join(*parts, table([_order(r) for r in orders.itertuples()], _design(c) + words))


def _design(frame: pd.DataFrame) -> str:
    settings = sorted(set(frame["setting"]) - {"-"})
    setting = f"Setting: {', '.join(settings)}. " if settings else ""
    r = frame.iloc[0]
    return f"{setting}{size_words(frame)}; design {r['design']}, {r['chains']:,.0f} chains, seed {r['seed']}. "


def _effect(r) -> dict:
    return {
        "Model": r.model, "Effect": r.effect, "Measure": MEASURES[r.measure],
        "Mean effect": measured(r.value, r.ci_low, r.ci_high), "Records": f"{r.n:,.0f}" if finite(r.n) else "–",
    }  # fmt: skip


def _order(r) -> dict:
    name, _, measure = r.measure.rpartition("_")
    return {
        "Model": r.model, "Effect": r.effect, "Measure": MEASURES.get(measure, measure),
        "Between": ORDERS.get(name, name.replace("_", " ")),
        "Rank correlation": short_measured(r.value, r.ci_low, r.ci_high),
    }  # fmt: skip
