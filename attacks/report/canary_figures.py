"""The picture of canary exposure: bits against repeats, a panel for each placement."""

import numpy as np
import pandas as pd
from scipy import stats

from attacks.report.canaries import PLACES, cells, placed
from attacks.report.drawing import (
    CHANCE,
    NO_STYLE,
    PALE,
    STYLE,
    TOP,
    WIDTH,
    Drawing,
    fit,
    limits,
    panel,
    tagged,
    titled,
)
from attacks.report.results import Results, kind


def draw_exposure(results: Results) -> Drawing | None:
    """Mean exposure of the canaries that went in, by how often, for the models of the card's picture."""
    e = placed(results.exposure[results.exposure["model"].isin(results.chain)], results)
    places = [p for p in PLACES if p in set(e["placement"])]
    if not places:
        return None
    models = [m for m in results.chain if m in set(e["model"])]
    repeats = sorted(e["repeats"].unique())
    names = [tagged(results, m) for m in models]
    legend = -(-(len(models) + 1) // 2)
    body, foot = 1.35, 0.5
    height = TOP + 0.25 + (body + foot) * len(places) + 0.2 * legend
    seeds = ", ".join(sorted(e["seed"].unique()))
    strangers = f"{e['n_references'].min():.0f} strangers" if e["n_references"].nunique() == 1 else "strangers"
    figure = titled(
        WIDTH, height, "Exposure of canaries",
        f"rank among {strangers}; {results.setting_words(models)}; seed {seeds}",
        "whiskers: 95 % intervals over canaries (none of one)",
    )  # fmt: skip
    means = {key: interval(own) for key, own in cells(e, results)}
    top = np.log2(e["n_references"].min())
    for i, place in enumerate(places):
        axes = panel(figure, 0.62, height - TOP - 0.1 - body - i * (body + foot), WIDTH - 0.82, body)
        axes.axhline(top, zorder=1, label="greatest that ranks can show", **CHANCE)
        for k, model in enumerate(models):
            colour, marker, dash = STYLE.get(kind(model), NO_STYLE)
            x = np.arange(len(repeats)) + (k - (len(models) - 1) / 2) * 0.1
            value, low, high = np.array([means.get((model, place, r), (np.nan,) * 3) for r in repeats], float).T
            axes.vlines(x, low, high, color=colour, lw=1.3)
            axes.plot(x, value, marker=marker, ls=dash, lw=1, color=colour, ms=5.5, label=tagged(results, model))
        values = [x for key, row in means.items() if key[1] == place for x in row]
        low, high = limits([0, top, *values])
        axes.set_ylim(low, high + 0.08 * (high - low))
        axes.set_xlim(-0.5, len(repeats) - 0.5)
        axes.set_xticks(range(len(repeats)), [f"{r:g}×" for r in repeats])
        axes.set_ylabel("exposure (bits)", size=9)
        axes.set_title(PLACES[place], size=9.5, loc="left", weight="bold")
        axes.grid(axis="y", color=PALE, lw=0.6)
    axes.set_xlabel("how often the canary was put in", size=9)
    figure.legend(*axes.get_legend_handles_labels(), loc="lower left", bbox_to_anchor=(0.12 / WIDTH, 0.05 / height),
                  ncols=2, frameon=False, fontsize=fit(max(names, key=len), 1.9, 8.6), borderaxespad=0)  # fmt: skip
    caption = (
        "0 bits: every stranger is as likely as the canary or likelier. A model that never met the canaries shows "
        "about 1.4 bits on average (fewer with few strangers), so look for a rise with repeats, and above null."
    )
    words = "; ".join(f"{m}, {PLACES.get(p, p)}, {r:g} times: {v:.2f} bits" for (m, p, r), (v, _, _) in means.items())
    return figure, caption, f"Exposure: {words}"


def interval(own: pd.DataFrame) -> tuple[float, float, float]:
    """Mean exposure over canaries (each the mean of its seeds) with its t interval; no interval of a single one."""
    each = own.groupby("example_id")["exposure"].mean()
    n, mean = len(each), float(each.mean())
    if n < 2:
        return mean, np.nan, np.nan
    half = float(stats.t.isf(0.025, n - 1) * each.std(ddof=1) / np.sqrt(n))
    return mean, mean - half, mean + half
