"""What the ranking means for those who are ranked: leak by task, decisions record by record, one for the whole set."""

import pandas as pd

from attacks.report.drawing import Picture
from attacks.report.markup import (
    NBSP,
    Html,
    counted,
    figure,
    finite,
    folded,
    join,
    listed,
    measured,
    model_tables,
    p_value,
    table,
    tag,
    text,
    verdict,
)
from attacks.report.results import MAIN_PAIR, Results, in_order, pooled

DECISIONS = (
    "An AUC ranks; whoever acts on it calls single records members. Below: the share of members called at thresholds "
    "that call few non-members, and what such a call is worth (PPV: the share of members among the called) where for "
    "every member there are 1, 10, 100 or 1,000 non-members to be called in error. A rate is a headline only where its "
    "threshold rests on ten false positives or more."
)
FLIPS = {
    "flip_rate": "Flip rate",
    "flagged_always": "Called with every seed",
    "flagged_never": "Called with none",
}
HETEROGENEITY = (
    "Is a model's AUC the same in all tasks? Cochran's Q; spread: how far the tasks' AUCs lie apart beyond their "
    "errors, on the logit scale. Holm over the models."
)
DATASET = (
    "Were these texts, as a set, trained on? All scores of one model together, fitted on half of the texts and tested "
    "on the other; one-sided p, for sets of so many texts of either kind. With several seeds: median, least to "
    "greatest. Control: the share of p < 0.05 of the same test between two halves of the non-members, which should be "
    "5 % or less. Where texts come in groups, a group counts as one text."
)
INTERACTION = (
    "Is the difference between two students the same in all tasks? Cochran's Q of the paired differences of AUC; Holm "
    "over the pairs of the setting."
)


# --- by task ---------------------------------------------------------------------------------------------------------


def task_section(results: Results, pictures: dict[str, Picture]) -> Html:
    """The picture, the tests of heterogeneity and interaction, and a table of all slices."""
    words = (results.summary.get("tasks") or {}).get("words")
    parts = [tag("p", words)] if words else []
    slices = _slices(results)
    whole = folded("Table by task", slices) if "tasks" in pictures else slices
    if "tasks" in pictures:
        parts.append(figure(pictures["tasks"]))
    elif slices:
        parts.append(tag("p", "There are too few tasks for a picture."))
    else:
        parts = parts or [tag("p", "There are no results by task.")]
    t = pooled(results.tasks)
    for test, caption in (("heterogeneity", HETEROGENEITY), ("interaction", INTERACTION)):
        tables = [_q_table(results, own, said + caption) for said, own in results.apart(t[t["test"] == test])]
        if tables:
            parts.append(join(*tables) if test == "heterogeneity" else folded("Pairs of students", join(*tables)))
    return join(*parts, whole)


def _slices(results: Results) -> Html:
    """One row per task of the models of the chain: AUC, and where it was tested its p-value after Holm."""
    attack, m = results.headline["attack"], pooled(results.membership)
    m = m[(m["task"] != "all") & (m["attack"] == attack) & m["model"].isin(results.chain) & (m["metric"] == "auc")]
    m = m[~m["task"].str.startswith("placement=")]
    t = results.tasks[results.tasks["test"] == "slice"]
    keys = ["model", "role_pair", "seed", "task"]
    tested = t.drop_duplicates(keys).set_index(keys)["p_corrected"]
    use = results.utility_rows(results.chain).set_index("model")
    order = {model: i for i, model in enumerate(results.models)}
    rows = []
    for r in sorted(m.itertuples(), key=lambda r: (r.role_pair != MAIN_PAIR, r.role_pair, order[r.model], r.task)):
        why = None if finite(r.value) else results.reason({**r._asdict()})
        rows.append({
            "Model": r.model, "Setting": r.setting or "-", "Task": r.task, "Roles": r.role_pair,
            "AUC": join(measured(r.value, r.ci_low, r.ci_high), f": {why}" if why else ""),
            **({"p after Holm": p_value(tested.get((r.model, r.role_pair, r.seed, r.task)))} if len(t) else {}),
            "Members / non-members": counted(r.n_members, r.n_nonmembers), "Seed": r.seed,
            "Dev loss (all tasks)": measured(*use.loc[r.model, ["value", "ci_low", "ci_high"]])
                                    if r.model in use.index else "–",
        })  # fmt: skip
    corrected = "Holm over the tasks of a model" if len(t) else "Not corrected for their number"
    caption = f"Attack: {attack}. {corrected}. Other models and attacks: membership.csv, tasks.csv."
    return table(rows, caption, results.headline["model"])


def _q_table(results: Results, frame: pd.DataFrame, caption: str) -> Html:
    rows = [{
        "Model": r.model, **({"Against": r.model_b} if r.model_b else {}), "Setting": r.setting or "-",
        "Roles": r.role_pair,
        "Q": f"{r.statistic:.1f} (df {r.df:.0f})", "p": p_value(r.p_value), "p after Holm": p_value(r.p_corrected),
        "Spread": f"{r.value:.2f}" if finite(r.value) else "–",
        "Reading": "differs between tasks" if r.p_corrected < 0.05 else "no difference resolved",
        "Members / non-members": counted(r.n_members, r.n_nonmembers), "Seed": r.seed,
    } for model in in_order(frame["model"]) for r in frame[frame["model"] == model].itertuples()]  # fmt: skip
    return table(rows, caption, results.headline["model"])


# --- record by record ------------------------------------------------------------------------------------------------


def decision_section(results: Results) -> Html:
    """The headline model's rates, PPV and flips; rates and flips of all models folded."""
    d = results.decisions
    if d.empty:
        return Html("")
    audited = results.headline["model"]
    own = d[d["model"] == audited]
    others = in_order(set(d["model"]))
    return join(
        tag("p", DECISIONS),
        listed((results.summary.get("decisions") or {}).get("words") or []),
        _rates(results, own),
        _flips(results, own),
        folded("The headline rates of all models", _all_rates(results, d, others)) if len(others) > 1 else "",
        folded("Flip rates of all models", _flips(results, d)) if (d["measure"] == "flip_rate").any() else "",
        _advantage(own),
    )


def _rates(results: Results, own: pd.DataFrame) -> Html:
    """One row per false-positive rate of the audited model."""
    ppv = own[own["measure"] == "ppv"]
    priors = sorted(ppv["prior"].unique())
    behind = own[own["measure"] == "fpr"].set_index("fpr")
    rows = []
    for r in own[own["measure"] == "tpr"].itertuples():
        worth = ppv[ppv["fpr"] == r.fpr].set_index("prior")
        rows.append({
            "Non-members called at most": _percent(r.fpr),
            "Members called (TPR)": measured(r.value, r.ci_low, r.ci_high, percent=True),
            "By chance": _percent(r.by_chance),
            "True rate behind the threshold": _range(behind.loc[r.fpr]) if r.fpr in behind.index else "–",
            **{f"PPV at 1 : {prior:,.0f}": measured(*worth.loc[prior, ["value", "ci_low", "ci_high"]], percent=True)
               if prior in worth.index else "–" for prior in priors},
            "Headline?": verdict("ok") if r.verdict == "headline" else tag("span", r.verdict, css="none"),
        })  # fmt: skip
    first = own.iloc[0]
    setting = results.settings.get(first["model"], "-")
    caption = (
        f"{first['model']}{'' if setting == '-' else f' ({setting} setting)'} by {first['attack']}; roles "
        f"{first['role_pair']}; {counted(first['n_members'], first['n_nonmembers'])} members / non-members; seed "
        f"{first['seed']}. 95 % intervals: BCa bootstrap over records for the TPR; PPV between the ends of both rates. "
        "Headline: ten false positives or more."
    )
    return table(rows, caption)


def _percent(x: float) -> str:
    return f"{100 * x:g}{NBSP}%" if finite(x) else "–"


def _range(row: pd.Series) -> str:
    return f"{100 * row['ci_low']:.2g} to {100 * row['ci_high']:.2g}{NBSP}%"


def _all_rates(results: Results, d: pd.DataFrame, models: list[str]) -> Html:
    """TPR of every model where it is a headline, one column per rate."""
    tpr = d[(d["measure"] == "tpr") & (d["verdict"] == "headline")]
    rates = sorted(tpr["fpr"].unique())
    rows = {}
    for model in models:
        own = tpr[tpr["model"] == model].set_index("fpr")
        if own.empty:
            continue
        first = own.iloc[0]
        rows[model] = {
            "Model": model, "Setting": results.settings.get(model, "-"), "Roles": first["role_pair"],
            **{f"TPR at FPR {_percent(rate)}": measured(*own.loc[rate, ["value", "ci_low", "ci_high"]], percent=True)
               if rate in own.index else "–" for rate in rates},
            "Members / non-members": counted(first["n_members"], first["n_nonmembers"]), "Seed": first["seed"],
        }  # fmt: skip
    if not rows:
        return tag("p", "No rate rests on enough records.")
    return model_tables(results, rows, "Of a swap the held-out records are the members.")


def _flips(results: Results, d: pd.DataFrame) -> Html:
    """Decisions about members that change from training seed to training seed; nothing with one seed."""
    d = d[d["measure"].isin(FLIPS)]
    rows: dict[str, list[dict]] = {}
    for model in in_order(d["model"]):
        for fpr, own in d[d["model"] == model].groupby("fpr"):
            by = own.set_index("measure")
            rows.setdefault(model, []).append({
                "Model": model, "Setting": results.settings.get(model, "-"), "Roles": own["role_pair"].iloc[0],
                "Non-members called at most": _percent(fpr),
                **{title: measured(*by.loc[m, ["value", "ci_low", "ci_high"]], percent=True) if m in by.index else "–"
                   for m, title in FLIPS.items()},
            })  # fmt: skip
    caption = (
        "Members whose call depends on the training seed. Flip rate: chance that two calls of one member, by two seeds "
        "drawn with replacement, differ; 95 % intervals over members."
    )
    return model_tables(results, rows, caption)


def _advantage(own: pd.DataFrame) -> Html:
    lines = []
    for measure, words in (
        ("advantage", "Greatest TPR − FPR over all thresholds (chosen on these records)"),
        ("advantage_calibrated", "TPR − FPR at a threshold chosen on other records"),
    ):
        for r in own[own["measure"] == measure].itertuples():
            number = measured(r.value, r.ci_low, r.ci_high) if finite(r.ci_low) else text(f"{r.value:.3f}")
            lines.append(join(f"{words}: ", number, f"; by chance {r.by_chance:.3f}."))
    return listed(lines) if lines else Html("")


# --- the whole set ---------------------------------------------------------------------------------------------------


def dataset_section(results: Results) -> Html:
    """p-value by the number of texts for every model, beside the false-positive control."""
    d = results.dataset
    if d.empty:
        return Html("")
    sizes = sorted(d.loc[d["measure"] == "p_value", "n"].unique())
    rows = {}
    for model in in_order(d["model"]):
        own = d[d["model"] == model]
        p = {n: own[(own["measure"] == "p_value") & (own["n"] == n)]["value"] for n in sizes}
        control = own[own["measure"] == "rejected_at_0.05"]["value"]
        rows[model] = {
            "Model": model, "Setting": results.settings.get(model, "-"),
            **{f"p at {n:,.0f} texts": _spread(p[n]) for n in sizes},
            "Control: rejected at 0.05": _percent(round(control.mean(), 4)) if len(control) else "–",
            "Attacks": " / ".join(dict.fromkeys(f"{k:.0f}" for k in own["attacks"])),
            "Seed": ", ".join(sorted(own["seed"].unique())),
        }  # fmt: skip
    return join(tag("p", DATASET), model_tables(results, rows, "Roles private-heldout."))


def _spread(values: pd.Series) -> str:
    if values.empty:
        return "–"
    middle, low, high = (p_value(p) for p in (values.median(), values.min(), values.max()))
    return middle if low == high else f"{middle} ({low} to {high})"
