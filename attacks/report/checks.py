"""What must hold before a number means anything (gates), and what could not be computed, each with its reason."""

import pandas as pd

from attacks.report.markup import (
    Html,
    finite,
    folded,
    join,
    measured,
    metric_name,
    model_tables,
    table,
    tag,
    text,
    verdict,
)
from attacks.report.results import Results, in_order, pooled

NOTE = (
    "Checks that must hold before an attack's number means anything. Blind: can the words alone tell the two halves "
    "apart? (Its intervals are wider than 95 %, since the best of several classifiers counts.) Null: do models that "
    "never saw private data stay at chance? Near-duplicates: is a non-member nearly a member's text, and what does the "
    "primary attack show without such? Utility: did the student learn at all? Abstentions: how many records an attack "
    "could say nothing about. Everything, seed by seed: gates.csv."
)
DUPLICATES = "near_duplicates"
COUNTED = ("abstentions", "clamped")
FEW = 3  # names that are listed one by one


def gate_section(results: Results) -> Html:
    """Blind, near-duplicates and utility row by row; the null gate and the counts by model, their rows folded."""
    g = pooled(results.gates)
    if g.empty:
        return tag("p", "No gate was run: nothing shows that the split itself does not leak.", css="bad")
    null, counts, near = g[g["gate"] == "null"], g[g["gate"].isin(COUNTED)], g[g["gate"] == DUPLICATES]
    rest = g.drop([*null.index, *counts.index, *near.index])
    parts = [tag("p", NOTE), _table(results, rest)]
    if len(near):
        parts += [tag("h3", "Near-duplicates"), _near_duplicates(results, near)]
    if len(null):
        parts += [tag("h3", "Null models"), _null(results, null), folded("Every attack", _table(results, null))]
    if len(counts):
        parts += [tag("h3", "Abstentions and clamped values"), _counts(counts)]
    return join(*parts)


def _table(results: Results, frame: pd.DataFrame) -> Html:
    rows = [{
        "Gate": r.gate, "Model": r.model or "–", "Setting": results.settings.get(r.model, "-"),
        "Task": r.task or "all", "Metric": metric_name(r.metric), "Value": _value(r),
        "n": f"{r.n:,.0f}" if finite(r.n) else "–",
        "Seed": r.seed or "–", "Verdict": verdict(r.verdict),
    } for r in frame.itertuples()]  # fmt: skip
    return table(rows)


def _value(r) -> Html:
    is_count = finite(r.value) and not finite(r.ci_low) and float(r.value).is_integer()
    return text(f"{r.value:,.0f}") if is_count else measured(r.value, r.ci_low, r.ci_high)


def _near_duplicates(results: Results, near: pd.DataFrame) -> Html:
    """How many there are; then the AUC of each model with all non-members and without them."""
    counted = near[near["metric"].str.startswith("count")]
    words = [
        f"{r.value:,.0f} of {r.n:,.0f} non-members are nearly a member's {r.metric.partition(':')[2].rstrip('s')}"
        for r in counted.itertuples()
        if finite(r.value)
    ]
    if not words:
        return tag("p", "Not run: the texts do not stand beside the score tables.")
    said = f"{'; '.join(words)} (more than 0.8 of its 13-grams of tokens, or all but a fifth of a short text)."
    aucs = near[near["metric"].str.startswith("auc")]
    without = [m for m in aucs["metric"].unique() if m != "auc"]
    rows = {}
    for model in in_order(aucs["model"]):
        own = aucs[aucs["model"] == model].drop_duplicates("metric").set_index("metric")
        cells = {m: measured(*own.loc[m, ["value", "ci_low", "ci_high"]]) for m in own.index}
        rows[model] = {
            "Model": model, "Setting": results.settings.get(model, "-"), "All non-members": cells.get("auc", "–"),
            **{f"Without near-duplicate {m.partition(':')[2]}": cells.get(m, "–") for m in without},
            "Seed": own["seed"].iloc[0],
        }  # fmt: skip
    caption = f"AUC of {results.headline['attack']} with the same members."
    return join(tag("p", said), model_tables(results, rows, caption))


def _null(results: Results, null: pd.DataFrame) -> Html:
    rows = []
    for model in in_order(null["model"]):
        own = null[(null["model"] == model) & null["value"].notna()]
        if own.empty:
            rows.append({"Model": model, "Attacks and seeds": "not run", "Not at chance": "–", "Greatest AUC": "–",
                         "Least AUC": "–"})  # fmt: skip
            continue
        most, least = own.loc[own["value"].idxmax()], own.loc[own["value"].idxmin()]
        wrong = own[~own["verdict"].str.startswith("ok")]
        rows.append({
            "Model": model, "Attacks and seeds": f"{len(own)}",
            "Not at chance": verdict(f"ok: none of {len(own)}" if wrong.empty else
                                     f"{len(wrong)} of {len(own)}: {wrong['verdict'].iloc[0]}"),
            "Greatest AUC": _extreme(most), "Least AUC": _extreme(least),
        })  # fmt: skip
    return table(rows, "Every attack on every seed against an AUC of 0.5, Holm over all of them.")


def _extreme(row: pd.Series) -> Html:
    where = f"{row['metric'].removeprefix('auc:')}, seed {row['seed']}"
    return join(measured(row["value"], row["ci_low"], row["ci_high"]), tag("span", where, css="note"))


def _counts(counts: pd.DataFrame) -> Html:
    """One row for each attack and class: over how many models, and the greatest share."""
    if not (counts["value"] > 0).any():
        return tag("p", "None: every attack had something to say about every record, and no spread was clamped.")
    rows = []
    for (gate, metric), own in counts[counts["value"] > 0].groupby(["gate", "metric"], sort=False):
        worst = own.loc[own["value"].idxmax()]
        rows.append({
            "What": f"{gate}: {metric.replace(':', ', ')}", "Models": named(list(own["model"].unique()), "models"),
            "At most": f"{worst['value']:,.0f} of {worst['n']:,.0f}", "Verdict": verdict(worst["verdict"]),
        })  # fmt: skip
    return table(rows)


# --- what could not be computed --------------------------------------------------------------------------------------


def unavailable_section(results: Results) -> Html:
    """Attacks that the tables do not allow, and values that could not be computed, joined by their reason."""
    absent = [{"Attacks": u["attacks"], "Models": u["models"], "Reason": u["reason"]}
              for u in results.summary.get("unavailable") or []]  # fmt: skip
    parts = [table(absent, "Attacks that were not run, since the score tables do not allow them.")] if absent else []
    missing = _missing(results.summary.get("unresolved") or [])
    if missing:
        parts.append(folded("Values that could not be computed, and why", table(missing)))
    return join(*parts)


def _missing(unresolved: list[dict]) -> list[dict]:
    """One row per reason, with what it concerns; the reason that concerns most values first."""
    whole: dict[str, dict[str, dict[str, None]]] = {}
    sizes: dict[str, int] = {}
    for entry in unresolved:
        scope = whole.setdefault(entry["reason"], {key: {} for key in ("model", "attack", "task", "metric", "seed")})
        lists = {key: [name for name in str(entry.get(key, "")).split(", ") if name] for key in scope}
        for key, names in lists.items():
            scope[key] |= dict.fromkeys(names)
        sizes[entry["reason"]] = sizes.get(entry["reason"], 0) + max(map(len, lists.values()))
    rows = []
    for reason in sorted(whole, key=lambda r: -sizes[r]):
        scope = {key: list(names) for key, names in whole[reason].items()}
        rows.append({
            "Reason": reason, "Metric": ", ".join(metric_name(m) for m in scope["metric"]),
            "Models": named(scope["model"], "models"), "Attacks": named(scope["attack"], "attacks"),
            "Tasks": named(scope["task"], "tasks"), "Seeds": ", ".join(scope["seed"]),
        })  # fmt: skip
    return rows


def named(names: list[str], noun: str) -> str:
    """The names, or how many where there are many."""
    return ", ".join(names) if len(names) <= FEW else f"{len(names)} {noun}"
