"""Membership against memorization: does an attack call those members that the model gives away?"""

import pandas as pd

from attacks.report.drawing import Picture, spread
from attacks.report.markup import Html, figure, finite, folded, join, short_measured, table, tag, text
from attacks.report.named_measures import (
    count_of,
    heading,
    main_cut,
    of_setting,
    parse,
    rows_by,
    settings_in,
    share,
)
from attacks.report.results import Results, in_order, pooled

NOTE = (
    "Among members only: does the attack's score rise with what is memorized? Score and window are made of the same "
    "probabilities, so an attack on the loss agrees by construction to the degree that the window is the whole text. "
    "An attack that misses memorized members understates the leak; most of those it flags are usually not memorized. "
    "The second attack is the one of greatest AUC on the same records."
)
RANKS = {
    "spearman_matched": "Rank correlation with the share matched",
    "spearman_log_p": "Rank correlation with the log-probability",
}
MISSES = {
    "missed_at_fpr_": "Memorized, but missed at FPR",
    "unremembered_at_fpr_": "Not memorized, of those flagged at FPR",
}
EXAMPLES = (
    "Ranks among the members, from 0 (least) to 1 (most). A high membership and a low memorization rank: flagged and "
    "not memorized; the other way round: memorized and missed. Ids only: hashes of the content."
)


def disagreement_section(results: Results, pictures: dict[str, Picture]) -> Html:
    """Picture and table of each setting; the examples folded. Nothing without disagreement.csv."""
    d = pooled(results.disagreement)
    if d.empty:
        return Html("")
    parts, settings = [tag("p", NOTE)], settings_in(d)
    for setting in settings:
        own = of_setting(d, setting)
        parts += [figure(pictures.get("ranks" + (f"-{setting}" if len(settings) > 1 else "")))]
        parts += [_table(results, own, setting)]
        if others := _misses(results, own, setting):
            parts += [folded("At other false-positive rates", others)]
        if len(rows := _examples(results, list(own["model"]))):
            words = "The examples that disagree most (ids)"
            parts += [folded(words, table(rows, heading(setting) + EXAMPLES))]
    return join(*parts)


def _table(results: Results, frame: pd.DataFrame, setting: str) -> Html:
    """A row for each model and attack: rank correlations, AUC, what is missed and flagged in vain at the least FPR."""
    rates = _rates(frame)
    columns = dict.fromkeys(RANKS, _number) | {"auc_memorized": _number, "memorized": _share}
    columns |= {name + rates[0]: _share for name in MISSES} if rates else {}
    return table(_rows(frame, columns), f"{heading(setting)}{_caption(results)}", results.headline["model"])


def _misses(results: Results, frame: pd.DataFrame, setting: str) -> Html:
    """What is missed and flagged in vain at the other rates."""
    columns = {name + rate: _share for rate in _rates(frame)[1:] for name in MISSES}
    rows = _rows(frame, columns) if columns else []
    return table(rows, f"{heading(setting)}{_caption(results)}", results.headline["model"])


def _caption(results: Results) -> str:
    return f"Cut: {main_cut(results)}; members with a whole cut. 95 % intervals."


def _rates(frame: pd.DataFrame) -> list[str]:
    """The false-positive rates that thresholds were set at, the least first."""
    names = {parse(m).name for m in frame["measure"]}
    found = {name.removeprefix(miss) for name in names for miss in MISSES if name.startswith(miss)}
    return sorted(found, key=float)


def _rows(frame: pd.DataFrame, columns: dict) -> list[dict]:
    parts = [parse(m).name for m in frame["measure"]]
    by = rows_by(frame.assign(name=parts), "model", "attack", "name")
    kept = [name for name in columns if any(found == name for _, _, found in by)]
    rows = []
    for model in in_order(frame["model"]):
        for attack in dict.fromkeys(a for m, a, _ in by if m == model):
            own = {name: by.get((model, attack, name)) for name in kept}
            known = [row for row in own.values() if row is not None]
            rows.append({
                "Model": model, "Attack": attack, **{_words(name): columns[name](row) for name, row in own.items()},
                "n": spread(row.n for row in known if parse(row.measure).name in (*RANKS, "memorized")),
                "Seed": ", ".join(dict.fromkeys(row.seed for row in known)),
            })  # fmt: skip
    return rows


def _words(name: str) -> str:
    for start, words in MISSES.items():
        if name.startswith(start):
            return f"{words} {100 * float(name.removeprefix(start)):g} %"
    return RANKS.get(name, {"auc_memorized": "AUC for memorized members", "memorized": "Memorized"}.get(name, name))


def _number(row) -> Html:
    return text("–") if row is None or not finite(row.value) else short_measured(row.value, row.ci_low, row.ci_high)


def _share(row) -> Html:
    if row is None or not finite(row.value):
        return text("–")
    return share(row.value, row.ci_low, row.ci_high, count_of(row.value, row.n, row.seed))


def _examples(results: Results, models: list[str]) -> list[dict]:
    e = results.disagreement_examples
    e = e[e["model"].isin(models)]
    return [{
        "Model": r.model, "Example": r.example_id, "Task": r.task, "Role": r.role, "Attack": r.attack,
        "Membership rank": f"{r.membership_rank:.2f}", "Memorization rank": f"{r.memorization_rank:.2f}",
        "Seed": r.seed,
    } for model in in_order(e["model"]) for r in e[e["model"] == model].itertuples()]  # fmt: skip
