"""Two pictures of the techniques of one setting: how much each leaks, and its leak against its usefulness."""

import numpy as np
import pandas as pd

from attacks.report.drawing import (
    CHANCE,
    GREY,
    NAMES,
    NO_STYLE,
    PALE,
    STYLE,
    TOP,
    WIDTH,
    Drawing,
    brief,
    fit,
    forest,
    limits,
    number,
    panel,
    sample_words,
    seed_words,
    titled,
)
from attacks.report.results import MAIN_PAIR, Results, kind
from attacks.report.techniques import beside, objective_words, used_measure

# Okabe-Ito colours and shapes; a seventh student starts again.
MARKS = (
    ("#0072b2", "o"),
    ("#e69f00", "s"),
    ("#009e73", "^"),
    ("#cc79a7", "D"),
    ("#56b4e9", "v"),
    ("#d55e00", "P"),
)


def draw_leaks(results: Results, setting: str) -> Drawing | None:
    """AUC of the headline's attack for every student of one setting, between null and direct."""
    students, controls = results.techniques[setting], beside(results, setting)
    models = [*(m for m in controls if kind(m) != "direct"), *students, *(m for m in controls if kind(m) == "direct")]
    attack = results.headline["attack"]
    rows = results.leaks(models, attack=attack)
    if rows["value"].isna().all():
        return None
    body = 0.43 * len(rows)
    height = TOP + body + 0.55
    null = rows[rows["model"] == "null"]
    said = f"attack: {attack}; {setting} setting; whiskers: 95 % intervals"
    figure = titled(WIDTH, height, "Leak by technique", said, sample_words(rows))
    axes = panel(figure, NAMES, 0.55, 1.85, body)
    forest(axes, rows, [_label(results, r.model, r.role_pair) for r in rows.itertuples()], results.headline["model"])
    left, right = axes.get_xlim()
    axes.set_xlim(max(min(left, 0.48), -0.01), min(max(right, 0.52), 1.01))
    for r in null.itertuples():
        axes.axvspan(r.ci_low, r.ci_high, color=PALE, alpha=0.5, lw=0, zorder=0)
    axes.axvline(0.5, zorder=1, **CHANCE)
    axes.text(0.5, -0.55, "chance", ha="center", va="bottom", size=8.5)
    axes.set_xlabel("AUC: share of pairs ranked right")
    caption = (
        "In the order of the techniques, not of their leak; grey: the interval of null. Whether two of them differ is "
        "a question for paired differences, not for overlapping whiskers: read the ranking in the text."
    )
    numbers = "; ".join(f"{r.model} {number(r)}" for r in rows.itertuples())
    return figure, caption, f"AUC by technique in the {setting} setting: {numbers}"


def draw_use(results: Results, setting: str) -> Drawing | None:
    """Leak against usefulness: AUC by ROUGE-L where all students have it, else by dev loss."""
    students = results.techniques[setting]
    measure = used_measure(results, students)
    if measure is None:
        return None
    models = [*students, *(m for m in beside(results, setting) if m in ("null", "direct"))]
    leaks = results.leaks(models, attack=results.headline["attack"]).dropna(subset="value").set_index("model")
    use = results.utility_rows(models, measure).dropna(subset="value").set_index("model")
    models = [m for m in models if m in leaks.index and m in use.index]
    if len(models) < 2:
        return None
    rouge = measure.startswith("rouge")
    words = f"ROUGE-L (0 to 100) on {measure.partition('@')[2]}" if rouge else "dev loss (nats per token)"
    legend = -(-len(models) // 2)
    height = TOP + 3.0 + 0.62 + 0.2 * legend
    said = f"attack: {results.headline['attack']}; {setting} setting; whiskers: 95 % intervals"
    figure = titled(WIDTH, height, "Leak against usefulness", said, seed_words(leaks.loc[models]))
    axes = panel(figure, 0.75, height - TOP - 3.0, WIDTH - 1.0, 3.0)
    for model in models:
        colour, marker = _mark(model, students)
        x, y = use.loc[model], leaks.loc[model]
        for ends in (([x.ci_low, x.ci_high], [y.value] * 2), ([x.value] * 2, [y.ci_low, y.ci_high])):
            axes.plot(*ends, "-", color=colour, lw=1, alpha=0.7, zorder=2)
        axes.plot(x.value, y.value, marker, color=colour, ms=8, mec="white", mew=0.8, zorder=3, label=brief(model))
    axes.set_xlim(*_ends(use.loc[models]))
    low, high = _ends(pd.concat([leaks.loc[models], pd.DataFrame([{"value": 0.5}])]))
    axes.set_ylim(max(low, -0.01), min(high, 1.01))
    axes.axhline(0.5, zorder=1, **CHANCE)
    axes.text(0.99, 0.5, "chance", transform=axes.get_yaxis_transform(), ha="right", va="bottom", size=8.5)
    if not rouge:
        axes.invert_xaxis()  # more useful is to the right in either case
    axes.grid(color=PALE, lw=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"{words}: more useful →", size=9.5)
    axes.set_ylabel("AUC: leaks more →", size=9.5)
    names = [brief(m) for m in models]
    size = fit(max(names, key=len), 1.9, 9)
    figure.legend(*axes.get_legend_handles_labels(), loc="lower left", bbox_to_anchor=(0.75 / WIDTH, 0.05 / height),
                  ncols=2, frameon=False, fontsize=size, borderaxespad=0, handlelength=1.2)  # fmt: skip
    caption = (
        "Best is at the lower right: useful and silent. A model at the left leaks little because it learned little."
    )
    numbers = "; ".join(f"{m} AUC {leaks.value[m]:.3f} at {use.value[m]:.3g}" for m in models)
    return figure, caption, f"AUC against {words}, {setting} setting: {numbers}"


def _label(results: Results, model: str, role_pair: str) -> tuple[str, str]:
    words = {
        "null": "no teacher",
        "direct": "fine-tuned on private data",
        "swap_student": "student of the swap teacher",
        "student": objective_words(results, model, short=True),
    }
    pair = "" if role_pair == MAIN_PAIR else f" ({role_pair})"
    return brief(model) + pair, words.get(kind(model), "")


def _mark(model: str, students: list[str]) -> tuple[str, str]:
    if model in students:
        return MARKS[students.index(model) % len(MARKS)]
    return {"null": ("#7a7a7a", "X"), "direct": ("#000000", "*")}.get(
        model, (GREY, STYLE.get(kind(model), NO_STYLE)[1])
    )


def _ends(rows: pd.DataFrame) -> tuple[float, float]:
    values = rows.reindex(columns=["value", "ci_low", "ci_high"]).to_numpy(float)
    return limits(values, least=0.05 * np.nanmax(np.abs(values)) if np.isnan(values[:, 1:]).all() else 0.01)
