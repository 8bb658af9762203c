"""Pictures of the shadow chains: attacks on teacher and student side by side, and the effects of one record."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from attacks.report.chains import MEASURES, NAMED, STRONG, STUDENT, TEACHER, attack_words
from attacks.report.drawing import (
    CHANCE,
    GREY,
    PALE,
    STYLE,
    TOP,
    WIDTH,
    Drawing,
    bare,
    fit,
    limits,
    panel,
    row_name,
    spread,
    titled,
)
from attacks.report.results import Results

LEFT, GAP = 1.42, 0.3  # inches: names of the rows, between the two panels
BODY = (WIDTH - LEFT - GAP - 0.15) / 2
UNITS = {"accuracy": "tokens right\n(share gained)", "LL": "log-probability\n(nats per token)"}
TPR = "tpr_at_fpr_0.01"
COLOURS = {TEACHER: STYLE["teacher"], STUDENT: STYLE["student"]}


def draw_chains(results: Results) -> dict[str, Drawing]:
    """`chains`, AUC, and `chains-tpr`, TPR at FPR 1 %: those that the table has."""
    drawn = {"chains": _draw(results, "auc"), "chains-tpr": _draw(results, TPR)}
    return {name: drawing for name, drawing in drawn.items() if drawing is not None}


def _draw(results: Results, metric: str) -> Drawing | None:
    """The attacks that stand for their kind and all cheap ones, teacher left, student right, on one scale."""
    s = results.shadow
    s = s[(s["metric"] == metric) & (s["against"] == "") & s["value"].notna()]
    s = s[s["attack"].isin(NAMED) & (s["statistic"] != "LL") | ~s["attack"].str.startswith(STRONG)]
    if s.empty:
        return None
    label, chance = ("AUC", 0.5) if metric == "auc" else ("TPR at FPR 1 %", 0.01)
    attacks = list(dict.fromkeys(zip(s["attack"], s["statistic"], strict=True)))
    top = 0.3 * len(attacks)
    height = TOP + 0.2 + top + 0.5
    said = f"design {s['design'].iloc[0]}; {_setting(s)}; mean over {spread(s['targets'])} targets; 95 % intervals"
    in_out = f"{spread(s['n_members'])} records in, {spread(s['n_nonmembers'])} out of each; seed {s['seed'].iloc[0]}"
    in_out += "; dashed: chance"
    figure = titled(WIDTH, height, f"Many models against one: {label}", said, in_out)
    low, high = limits(np.append(s[["value", "ci_low", "ci_high"]].to_numpy(), chance))
    for i, model in enumerate((TEACHER, STUDENT)):
        own = s[s["model"] == model].set_index(["attack", "statistic"])
        axes = panel(figure, LEFT + i * (BODY + GAP), 0.5, BODY, top)
        _rows(axes, own, attacks, COLOURS[model], names=i == 0)
        axes.set_xlim(max(low, -0.03), min(high, 1.03))
        axes.axvline(chance, zorder=1, **CHANCE)
        axes.set_xlabel(label, size=9)
        _over(axes, model, own["size"].iloc[0] if len(own) else "not attacked")
    numbers = "; ".join(f"{r.model} {attack_words(r.attack, r.statistic)} {r.value:.3f}" for r in s.itertuples())
    caption = (
        "LiRA and RMIA above the line, cheaper attacks below, on the same records and targets (calibrated_loss: less "
        "the mean of models without the record). Whether two of them differ: their paired gaps in the text."
    )
    return figure, caption, f"{label} with shadow chains: {numbers}"


def draw_effects(results: Results) -> Drawing | None:
    """Direct, inherited and interaction effects of teacher and student, one panel for each measure."""
    c = results.counterfactual
    c = c[c["measure"].isin(MEASURES) & c["value"].notna()]
    if c.empty:
        return None
    names = list(dict.fromkeys(zip(c["model"], c["effect"], strict=True)))
    top = 0.36 * len(names)
    height = TOP + top + 0.72
    sizes = "; ".join(f"{m.removeprefix('shadow/')} {size}" for m, size in _sizes(c))
    said = f"design {c['design'].iloc[0]}; {_setting(c)}; {spread(c['chains'])} chains; seed {c['seed'].iloc[0]}"
    figure = titled(WIDTH, height, "What one record does", f"{said}; {spread(c['n'])} records", sizes)
    for i, measure in enumerate(MEASURES):
        own = c[c["measure"] == measure].set_index(["model", "effect"])
        axes = panel(figure, LEFT + i * (BODY + GAP), 0.72, BODY, top)
        axes.axvline(0, zorder=1, **CHANCE)
        for y, (model, effect) in enumerate(names):
            if i == 0:
                row_name(axes, y - 0.14, model, 9.2, LEFT)
                row_name(axes, y + 0.2, effect, 8.2, LEFT, color=GREY)
            if (model, effect) in own.index:
                _point(axes, y, own.loc[(model, effect)], COLOURS[model])
        _frame(axes, len(names))
        axes.set_xlim(*limits(np.append(own[["value", "ci_low", "ci_high"]].to_numpy(), 0), least=0.005))
        axes.set_xlabel(UNITS[measure], size=9)
    numbers = "; ".join(f"{r.model} {r.effect} {MEASURES[r.measure].lower()} {r.value:.3f}" for r in c.itertuples())
    caption = (
        "Mean over records of what a record's presence does; whiskers: 95 % intervals over chains and groups. "
        "Direct: in the model's own data; inherited: in its teacher's; interaction: both, beyond their sum."
    )
    return figure, caption, f"Effects of one record: {numbers}"


def _rows(axes: Axes, own: pd.DataFrame, attacks: list[tuple[str, str]], style: tuple, *, names: bool) -> None:
    for y, key in enumerate(attacks):
        if names:
            row_name(axes, y, attack_words(*key), 9.2, LEFT)
        if key in own.index:
            _point(axes, y, own.loc[key], style)
    strong = sum(attack.startswith(STRONG) for attack, _ in attacks)
    if 0 < strong < len(attacks):
        axes.axhline(strong - 0.5, color=GREY, lw=0.6)
    _frame(axes, len(attacks))


def _point(axes: Axes, y: float, row: pd.Series, style: tuple) -> None:
    colour, marker, _ = style
    axes.plot([row["ci_low"], row["ci_high"]], [y, y], "|-", color=colour, lw=1.6, ms=7, mew=1.6, zorder=2)
    axes.plot(row["value"], y, marker, color=colour, ms=5.5, zorder=3)


def _frame(axes: Axes, rows: int) -> None:
    for y in range(rows):
        axes.axhline(y, color=PALE, lw=0.6, zorder=0)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.tick_params(axis="x", labelsize=8.5)
    bare(axes)


def _over(axes: Axes, model: str, size: str) -> None:
    """The model's name and size, above its panel."""
    at = {"transform": axes.transAxes, "va": "bottom"}
    lift = 0.19 / (axes.get_position().height * axes.figure.get_size_inches()[1])
    axes.text(0, 1.0, size, size=fit(size, BODY, 8.2), color=GREY, **at)
    axes.text(0, 1.0 + lift, model, size=9.5, weight="bold", **at)


def _sizes(frame: pd.DataFrame) -> list[tuple[str, str]]:
    return list(frame.drop_duplicates("model")[["model", "size"]].itertuples(index=False, name=None))


def _setting(frame: pd.DataFrame) -> str:
    return " and ".join(sorted(set(frame["setting"]) - {"-"})) + " setting"
