"""Curves over the blocks of a model: one panel for each form, a line for each technique, null and teacher beside."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from attacks.report.blocks import FORMS, curve, curve_words, form_words
from attacks.report.drawing import (
    CHANCE,
    NO_STYLE,
    PALE,
    STYLE,
    TOP,
    WIDTH,
    Drawing,
    brief,
    fit,
    limits,
    panel,
    sample_words,
    titled,
)
from attacks.report.results import Results, kind, pooled
from attacks.report.technique_figures import MARKS

BESIDE = ("null", "direct", "teacher")
LEFT, GAP, BODY, HEAD, FOOT = 0.5, 0.12, 1.3, 0.3, 0.3  # inches: of a panel and what stands around it
CROWD = 2  # students, above which only the audited one and null have a band
MANY = 16  # blocks, from which on markers are small


def draw_blocks(results: Results) -> dict[str, Drawing | None]:
    """blocks; where students are of several settings one each, blocks-<setting>."""
    b = pooled(results.blocks)
    b = b[b["value"].notna()]
    models = [m for m in results.models if m in set(b["model"])]
    students = [m for m in models if kind(m) == "student"]
    settings = list(dict.fromkeys(results.settings.get(m, "-") for m in students)) or ["-"]
    beside = [m for m in models if kind(m) in BESIDE]
    found = {}
    for setting in settings:
        own = [m for m in students if results.settings.get(m, "-") == setting]
        name = "blocks" if len(settings) == 1 else f"blocks-{setting}"
        found[name] = _curves(results, b, own, [m for m in beside if results.settings.get(m, "-") in ("-", setting)])
    return found


def _curves(results: Results, frame: pd.DataFrame, students: list[str], beside: list[str]) -> Drawing | None:
    models = [*(m for m in beside if m == "null"), *students, *(m for m in beside if m != "null")]
    forms = [form for form in FORMS if any(len(curve(frame, m, form)) for m in models)]
    if not forms:
        return None
    lines, columns = -(-len(forms) // 2), 3
    room = 0.2 * -(-len(models) // columns) + 0.1
    if len(forms) % 2:  # the last panel's neighbour has room for the names
        room, columns = 0.1, 1 if len(models) <= 5 else 2
    top = TOP - 0.24
    height = top + (HEAD + BODY + FOOT) * lines + room
    drawn = frame[frame["model"].isin(models) & frame["form"].isin(forms) & (frame["metric"] == "auc")]
    banded = [m for m in models if len(students) <= CROWD or m in ("null", results.headline["model"])]
    bands = "bands" if banded == models else f"bands of {' and '.join(map(brief, banded))}, whiskers at the greatest"
    said = f"AUC by block; {results.setting_words(models)}; {bands}: 95 % intervals"
    figure = titled(WIDTH, height, "Where members show, block by block", said, sample_words(drawn))
    wide = (WIDTH - LEFT - GAP - 0.12) / 2
    ticks = max((curve(frame, m, f) for m in students or models for f in forms), key=len)
    for k, form in enumerate(forms):
        low, high = _ends([curve(frame, m, f) for m in models for f in forms[k - k % 2 : k - k % 2 + 2]])
        bottom = height - top - (HEAD + BODY + FOOT) * (k // 2 + 1) + FOOT
        axes = panel(figure, LEFT + (wide + GAP) * (k % 2), bottom, wide, BODY)
        for model in models:
            _line(axes, curve(frame, model, form), _style(model, students), model in banded)
        axes.axhline(0.5, zorder=1, **CHANCE)
        axes.set(ylim=(low, high), xlim=(-0.05, 1.05))
        _blocks_below(axes, ticks)
        axes.tick_params(labelsize=8, labelleft=not k % 2)
        words = form_words(form, drawn[drawn["form"] == form])
        axes.set_title(words, size=fit(words, wide, 8.2), loc="left", pad=4)
    place = (LEFT + wide + 2 * GAP, FOOT + room) if len(forms) % 2 else (0.12, 0.05)
    names = [brief(m) for m in models]
    size = fit(max(names, key=len), (wide if len(forms) % 2 else WIDTH - 0.3) / columns - 0.45, 8.8)
    figure.legend(*_handles(models, students), loc="lower left", bbox_to_anchor=(place[0] / WIDTH, place[1] / height),
                  ncols=columns, frameon=False, fontsize=size, borderaxespad=0, handlelength=2.6)  # fmt: skip
    caption = (
        "From the embedding (emb) through the layers to the head; numbers are the layers of the students, models of "
        "other depth are drawn to the same length. Higher: the block tells members from non-members better; dashed: "
        "chance. A bump that null shows as well is the block's own, not the leak's; a bump under noise is a loss that "
        "depends sharply on the block, not members held there."
    )
    told = "; ".join(f"{m}, {form}: {curve_words(own)}" for m in models for form in forms
                     if len(own := curve(frame, m, form)))  # fmt: skip
    return figure, caption, f"AUC by block. {told}"


def _style(model: str, students: list[str]) -> tuple[str, str, object]:
    """Colour, marker, dash. Beside several students the teacher is black: green is one of theirs."""
    colour, marker, dash = STYLE.get(kind(model), NO_STYLE)
    if len(students) < 2:
        return colour, marker, dash
    if model in students:
        return *MARKS[students.index(model) % len(MARKS)], "-"
    return ("#000000" if kind(model) == "teacher" else colour), marker, dash


def _handles(models: list[str], students: list[str]) -> tuple[list[Line2D], list[str]]:
    styles = [_style(model, students) for model in models]
    return [Line2D([], [], color=c, marker=m, ls=d, lw=1.4, ms=4) for c, m, d in styles], [brief(m) for m in models]


def _depth(own: pd.DataFrame) -> np.ndarray:
    """Where the blocks stand, the embedding at 0 and the head at 1: models of other depth share the axis."""
    layers = own["block"].str.isdigit().sum()
    place = [0.0 if b == "embedding" else 1.0 if b == "head" else (int(b) + 1) / (layers + 1) for b in own["block"]]
    return np.array(place)


def _line(axes: Axes, own: pd.DataFrame, style: tuple[str, str, object], banded: bool) -> None:
    if own.empty:
        return
    (colour, marker, dash), x = style, _depth(own)
    if banded:
        axes.fill_between(x, own["ci_low"], own["ci_high"], color=colour, alpha=0.16, lw=0)
    else:
        at = int(np.argmax(own["value"]))
        axes.plot([x[at]] * 2, own[["ci_low", "ci_high"]].iloc[at], color=colour, lw=1, zorder=3)
    axes.plot(x, own["value"], marker=marker, color=colour, ls=dash, lw=1.3, ms=3.5 if len(x) < MANY else 2.2, zorder=4)


def _blocks_below(axes: Axes, own: pd.DataFrame) -> None:
    """Names of the blocks: emb, head, and as many numbers between them as have room."""
    layers = int(own["block"].str.isdigit().sum())
    step = next((s for s in (1, 2, 3, 4, 5, 6, 8, 12) if layers <= 5 * s), 20)
    places = {0.0: "emb", 1.0: "head"} | {k / (layers + 1): str(k) for k in range(step, layers + 1, step)}
    places = {x: name for x, name in places.items() if name in ("emb", "head") or 0.11 < x < 0.87}
    axes.set_xticks(list(places), list(places.values()))
    axes.grid(axis="x", color=PALE, lw=0.5)
    axes.set_axisbelow(True)


def _ends(curves: list[pd.DataFrame]) -> tuple[float, float]:
    """Of all values, and of their intervals where these are not much wider."""
    values = np.concatenate([own["value"].to_numpy(float) for own in curves])
    ends = np.concatenate([own[["ci_low", "ci_high"]].to_numpy(float).ravel() for own in curves])
    low, high = limits([0.5, *values, *np.clip(ends, np.nanmin(values) - 0.08, np.nanmax(values) + 0.08)])
    return max(low, -0.01), min(high, 1.01)
