"""What the figures are drawn with: sizes, colours, panels placed in inches, and rows of points with intervals.

Figures are only 5.2 inches wide, so that their text is still readable on a phone.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from attacks.report.results import Results, kind

WIDTH, DPI = 5.2, 220
NAMES, TOP = 1.8, 0.98  # inches kept at the left for the names of rows, and at the top for the titles
RC = {"font.family": "DejaVu Sans", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
GREY, PALE = "#5f6b76", "#d9dee3"
# Okabe-Ito colours, told apart by shape and line style as well.
STYLE = {
    "null": ("#7a7a7a", "s", (0, (4, 2))),
    "swap": ("#e69f00", "D", (0, (1, 1.2))),
    "swap_student": ("#cc79a7", "v", (0, (3, 1, 1, 1))),
    "student": ("#0072b2", "o", "-"),
    "direct": ("#d55e00", "^", (0, (6, 1.5))),
    "teacher": ("#009e73", "P", (0, (5, 1, 1, 1, 1, 1))),
    "blind": ("#222222", "X", "-"),
}
NO_STYLE = (GREY, "o", "-")
CHANCE = {"color": "black", "lw": 1, "ls": (0, (4, 3))}

Drawing = tuple[Figure, str, str]  # with its caption and its text for who cannot see it


@dataclass(frozen=True)
class Picture:
    """One figure: its PNG, the caption that stands under it, and a text for who cannot see it."""

    png: bytes
    caption: str
    alt: str


def describe(results: Results, model: str) -> str:
    """A run in five words, for somebody who has not read the glossary."""
    words = {
        "base_student": "before any training here",
        "base_teacher": "before any training here",
        "null": "student without a teacher",
        "reference": "for comparison",
        "swap": "trained on the non-members",
        "swap_student": "student of the swap teacher",
        "direct": "fine-tuned on private data",
        "teacher": "trained on private data",
        "blind": "no model, only the words",
    }
    technique = results.runs.get(model, {}).get("technique") or "student"
    setting = results.settings.get(model, "-")
    return words.get(kind(model), technique + (f", {setting}" if setting != "-" else ""))


def tagged(results: Results, model: str) -> str:
    """The run's name with its setting, where it has one."""
    setting = results.settings.get(model, "-")
    return model if setting == "-" else f"{model} ({setting})"


def brief(model: str) -> str:
    """`students/kd` -> `kd`, `swap_students/kd` -> `swap of kd`: where all models are of one setting."""
    place, _, name = model.partition("/")
    return {"students": name, "swap_students": f"swap of {name}"}.get(place, model)


def spread(values) -> str:
    """`500`, or `484 to 500` where rows differ."""
    v = [int(x) for x in values if np.isfinite(x)]
    if not v:
        return "unknown"
    return f"{min(v):,}" if min(v) == max(v) else f"{min(v):,} to {max(v):,}"


def sample_words(rows: pd.DataFrame) -> str:
    """Members, non-members and seeds of these rows, in words."""
    return f"{spread(rows['n_members'])} members, {spread(rows['n_nonmembers'])} non-members, {seed_words(rows)}"


def seed_words(rows: pd.DataFrame) -> str:
    """`seed 0`, `mean of all seeds`, or both where some models were trained once and others more often."""
    single = ", ".join(sorted(set(rows["seed"]) - {"all"}))
    if "all" not in set(rows["seed"]):
        return f"seed {single}"
    return f"mean of all seeds (or seed {single})" if single else "mean of all seeds"


def fit(words: str, inches: float, points: float) -> float:
    """The font size, at most `points`, at which the longest line of `words` fits (DejaVu Sans: 0.6 em a letter)."""
    return min(points, 72 * inches / (0.6 * max(len(line) for line in words.split("\n"))))


def titled(width: float, height: float, title: str, *lines: str) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    below = "\n".join(lines)
    figure.text(0.12 / width, 1 - 0.10 / height, title, size=12.5, weight="bold", va="top")
    figure.text(0.12 / width, 1 - 0.36 / height, below, size=fit(below, WIDTH - 0.2, 9.2), color=GREY, va="top")
    return figure


def panel(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes placed in inches: no layout engine, so the same tables give the same picture."""
    w, h = figure.get_size_inches()
    return figure.add_axes((left / w, bottom / h, width / w, height / h))


def row_name(axes: Axes, y: float, words: str, points: float, width: float = NAMES, x: float = -0.03, **style) -> None:
    """The name of a row, left of the axes, where `width` inches are kept for it; x: its end, of the axes' width."""
    size = fit(words, width - 0.15, points)
    axes.text(x, y, words, transform=axes.get_yaxis_transform(), ha="right", va="center", size=size, **style)


def bare(axes: Axes) -> None:
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def readable(colour: tuple) -> str:
    """Black or white, whichever has more contrast on this colour (RGB from 0 to 1; WCAG 2 relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return "white" if np.dot(linear, (0.2126, 0.7152, 0.0722)) < 0.179 else "black"


def limits(values, least: float = 0.02) -> tuple[float, float]:
    v = np.asarray(values, dtype=float)
    v = v[np.isfinite(v)]
    pad = max(0.08 * np.ptp(v), least) if len(v) else 0
    return (v.min() - pad, v.max() + pad) if len(v) else (0, 1)


def forest(axes: Axes, rows: pd.DataFrame, labels: list[tuple[str, str]], audited: str) -> None:
    """Points with intervals, one row each, names at the left and numbers at the right, outside the axes."""
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(*limits(rows[["value", "ci_low", "ci_high"]].to_numpy()))
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    bare(axes)
    for y, (row, (name, detail)) in enumerate(zip(rows.itertuples(), labels, strict=True)):
        colour, marker, _ = STYLE.get(kind(row.model), NO_STYLE)
        axes.axhline(y, color=PALE, lw=0.6, zorder=0)
        axes.plot([row.ci_low, row.ci_high], [y, y], "|-", color=colour, lw=1.8, ms=9, mew=1.8, zorder=2)
        axes.plot(row.value, y, marker, color=colour, ms=5.5, zorder=3)
        row_name(axes, y - (0.17 if detail else 0), name, 10, weight="bold" if row.model == audited else "normal")
        if detail:
            row_name(axes, y + 0.22, detail, 8.2, color=GREY)
        axes.text(1.03, y, number(row), transform=axes.get_yaxis_transform(), va="center", size=8.8)


def number(row) -> str:
    if not np.isfinite(row.value):
        return "not computed"
    known = np.isfinite(row.ci_low) and np.isfinite(row.ci_high)
    return f"{row.value:.3f} " + (f"[{row.ci_low:.3f}, {row.ci_high:.3f}]" if known else "[no interval]")
