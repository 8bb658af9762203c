"""UpSet pictures of teacher, baseline and student: how many texts each region has, a panel for each student."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from attacks.report.drawing import GREY, PALE, TOP, WIDTH, Drawing, brief, fit, panel, titled
from attacks.report.inherited import SEVEN, is_coincidence, split
from attacks.report.named_measures import main_cut, percent, setting_words
from attacks.report.results import Results, in_order

LEFT = 1.02  # inches kept for the names of the sets
BODY, HEAD, DOTS = 1.0, 0.72, 0.72  # inches: the bars of a student, its three lines above, the matrix below
COLOURS = {"T&B&S": "#56b4e9", "T&B not S": "#56b4e9", "T&S not B": "#d55e00"}
MOST = 4  # students in one picture


def draw_regions(results: Results) -> dict[str, Drawing | None]:
    """regions-<setting>, of every student of the setting; regions-<setting>-2 where there are many."""
    i, cut = split(results.inheritance), main_cut(results)
    i = i[(i["cut"] == cut) & ~i["control"]]
    found: dict[str, Drawing | None] = {}
    for setting in sorted(set(i["setting"]), key=lambda s: (is_coincidence(s), s)):
        own = i[i["setting"] == setting]
        students = in_order(own.loc[(own["name"] == "region") & own["value"].notna(), "student"])
        for k in range(0, len(students), MOST):
            name = f"regions-{setting}" + (f"-{k // MOST + 1}" if k else "")
            found[name] = _upset(results, own, students[k : k + MOST], setting, cut)
    return found


def _upset(results: Results, frame: pd.DataFrame, students: list[str], setting: str, cut: str) -> Drawing:
    top = TOP - 0.22
    height = top + (HEAD + BODY) * len(students) + DOTS + 0.12
    apart = is_coincidence(setting)
    figure = titled(
        WIDTH, height, "Coincidence: who has the same texts" if apart else "Who memorizes the same texts",
        f"cut {cut}; {setting_words(setting)}; T teacher, B direct, S student",
        "bars: texts, whiskers: 95 % intervals; ▵ union, ▿ intersection of seeds"
        if (frame["seed"] == "union").any() else "bars: texts, whiskers: 95 % intervals",
    )  # fmt: skip
    words = []
    for k, student in enumerate(students):
        bottom = height - top - (HEAD + BODY) * (k + 1)
        axes = panel(figure, LEFT, bottom + 0.06, WIDTH - LEFT - 0.15, BODY - 0.06)
        own = frame[frame["student"] == student]
        seed = next(s for s in sorted(set(own["seed"])) if s not in ("union", "intersection", "all"))
        counts = _bars(axes, own[own["name"] == "region"], seed)
        bold = student == results.headline["model"]
        lines = _totals(own[own["seed"] == seed], apart)
        head = f"{brief(student)} (seed {seed})"
        at = (bottom + BODY + 0.62) / height
        figure.text(0.12 / WIDTH, at, head, size=9.8, weight="bold" if bold else "normal", va="top")
        figure.text(0.12 / WIDTH, at - 0.18 / height, lines, size=fit(lines, WIDTH - 0.2, 8.6), color=GREY, va="top")
        words.append(f"{student}: " + ", ".join(f"{region} {n:.0f}" for region, n in counts.items()))
    _matrix(figure, height)
    caption = (
        "Each bar: texts that exactly the models marked below have. "
        + ("Orange: teacher and student, not the baseline; here the student never saw these texts."
           if apart else "Orange: inherited. Blue: easy, both teacher and baseline have it.")
    )  # fmt: skip
    return figure, caption, f"{'Coincidence' if apart else 'Regions'} at {cut}: {'; '.join(words)}"


def _bars(axes: Axes, rows: pd.DataFrame, seed: str) -> dict[str, float]:
    """Counts of the seven regions under one seed, and of union and intersection as marks."""
    by = {
        s: rows[rows["seed"] == s].drop_duplicates("region").set_index("region")
        for s in (seed, "union", "intersection")
    }
    one = by[seed].reindex(list(SEVEN))
    counts, n = one["count"].to_numpy(float), one["denominator"].to_numpy(float)
    x = np.arange(len(SEVEN))
    axes.bar(x, counts, 0.62, color=[COLOURS.get(r, "#9aa5b0") for r in SEVEN], zorder=2)
    axes.vlines(x, n * one["ci_low"].to_numpy(float), n * one["ci_high"].to_numpy(float), color="black", lw=1, zorder=3)
    tops = np.fmax(counts, n * one["ci_high"].to_numpy(float))
    for name, marker in (("union", "^"), ("intersection", "v")):
        if len(by[name]):
            values = by[name]["count"].reindex(list(SEVEN)).to_numpy(float)
            axes.plot(x + 0.36, values, marker, ms=4, mfc="white", mec="black", mew=0.8, ls="", zorder=4)
            tops = np.fmax(tops, values)
    most = max(np.nanmax(tops), 1)
    for at, (count, top) in enumerate(zip(counts, tops, strict=True)):
        axes.text(at, top + 0.04 * most, f"{count:,.0f}", ha="center", va="bottom", size=8.8)
    axes.set_ylim(0, 1.22 * most)
    axes.set_xlim(-0.6, len(SEVEN) - 0.4)
    axes.set_xticks([])
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color=PALE, lw=0.6, zorder=0)
    return dict(zip(SEVEN, counts, strict=True))


def _totals(rows: pd.DataFrame, apart: bool) -> str:
    """The sizes of the three sets, and the region T and S without B by both denominators."""
    whole = rows[rows["name"] == "memorized"].set_index("region")
    said = ", ".join(f"{s} {whole['count'][s]:,.0f}" for s in "TBS" if s in whole.index)
    of = f" of {whole['denominator'].iloc[0]:,.0f} texts" if len(whole) else ""
    shares = []
    for name, words in (("inheritance_rate", "T not B"), ("inherited_share", "S")):
        r = rows[rows["name"] == name]
        if len(r) and np.isfinite(r["denominator"].iloc[0]):
            value = f" ({percent(r['value'].iloc[0])} %)" if np.isfinite(r["value"].iloc[0]) else ""
            shares.append(f"{r['count'].iloc[0]:,.0f} of {r['denominator'].iloc[0]:,.0f} in {words}{value}")
    both = f"\n{'T & S not B' if apart else 'inherited'}: {', '.join(shares)}" if shares else ""
    return f"{said}{of}{both}"


def _matrix(figure: Figure, height: float) -> None:
    axes = panel(figure, LEFT, 0.12, WIDTH - LEFT - 0.15, DOTS)
    axes.set_xlim(-0.6, len(SEVEN) - 0.4)
    axes.set_ylim(2.5, -0.5)
    axes.axis("off")
    for y, name in enumerate(("teacher (T)", "direct (B)", "student (S)")):
        axes.text(-0.75, y, name, ha="right", va="center", size=8.8)
        if y == 1:
            axes.axhspan(0.5, 1.5, color="#f5f7f9", zorder=0)
    for x, inside in enumerate(SEVEN.values()):
        axes.plot([x] * 3, range(3), "o", color=PALE, ms=7, zorder=1)
        held = [y for y, held in enumerate(inside) if held]
        axes.plot([x] * len(held), held, "o-", color="#1b2026", ms=7, lw=1.6, zorder=2)
