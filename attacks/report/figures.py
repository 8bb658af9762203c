"""PNG figures of the report. They are only 5.2 inches wide, so that their text is still readable on a phone."""

from dataclasses import dataclass
from io import BytesIO

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from attacks.report.results import MAIN_PAIR, Results, kind

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


def draw_all(results: Results) -> dict[str, Picture]:
    """Every figure that the tables allow, by name: chain, students, roc, heatmap, tasks."""
    students = [m for m in results.models if kind(m) in ("null", "student")]
    pictures = {}
    with rc_context(RC):
        drawn = {
            "chain": _chain(results, results.chain, "Who can be recognised?", blind=True),
            "students": _chain(results, students, "All students beside the null") if len(students) > 2 else None,
            "roc": _roc(results),
            "heatmap": _heatmap(results),
            "tasks": _tasks(results),
        }
        for name, parts in drawn.items():
            if parts is not None:
                figure, caption, alt = parts
                file = BytesIO()
                FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
                pictures[name] = Picture(file.getvalue(), caption, alt)
    return pictures


def describe(results: Results, model: str) -> str:
    """A run in five words, for somebody who has not read the glossary."""
    words = {
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


def _fit(words: str, inches: float, points: float) -> float:
    """The font size, at most `points`, at which the longest line of `words` fits (DejaVu Sans: 0.6 em a letter)."""
    return min(points, 72 * inches / (0.6 * max(len(line) for line in words.split("\n"))))


def _titled(width: float, height: float, title: str, *lines: str) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    below = "\n".join(lines)
    figure.text(0.12 / width, 1 - 0.10 / height, title, size=12.5, weight="bold", va="top")
    figure.text(0.12 / width, 1 - 0.36 / height, below, size=_fit(below, WIDTH - 0.2, 9.2), color=GREY, va="top")
    return figure


def _panel(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes placed in inches: no layout engine, so the same tables give the same picture."""
    w, h = figure.get_size_inches()
    return figure.add_axes((left / w, bottom / h, width / w, height / h))


def _name(axes: Axes, y: float, words: str, points: float, **style) -> None:
    """The name of a row, left of the axes."""
    size = _fit(words, NAMES - 0.15, points)
    axes.text(-0.03, y, words, transform=axes.get_yaxis_transform(), ha="right", va="center", size=size, **style)


def _bare(axes: Axes) -> None:
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def _limits(values, least: float = 0.02) -> tuple[float, float]:
    v = np.asarray(values, dtype=float)
    v = v[np.isfinite(v)]
    pad = max(0.08 * np.ptp(v), least) if len(v) else 0
    return (v.min() - pad, v.max() + pad) if len(v) else (0, 1)


def _forest(axes: Axes, rows: pd.DataFrame, labels: list[tuple[str, str]], audited: str) -> None:
    """Points with intervals, one row each, names at the left and numbers at the right, outside the axes."""
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(*_limits(rows[["value", "ci_low", "ci_high"]].to_numpy()))
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    _bare(axes)
    for y, (row, (name, detail)) in enumerate(zip(rows.itertuples(), labels, strict=True)):
        colour, marker, _ = STYLE.get(kind(row.model), NO_STYLE)
        axes.axhline(y, color=PALE, lw=0.6, zorder=0)
        axes.plot([row.ci_low, row.ci_high], [y, y], "|-", color=colour, lw=1.8, ms=9, mew=1.8, zorder=2)
        axes.plot(row.value, y, marker, color=colour, ms=5.5, zorder=3)
        _name(axes, y - (0.17 if detail else 0), name, 10, weight="bold" if row.model == audited else "normal")
        if detail:
            _name(axes, y + 0.22, detail, 8.2, color=GREY)
        axes.text(1.03, y, _number(row), transform=axes.get_yaxis_transform(), va="center", size=8.8)


def _number(row) -> str:
    if not np.isfinite(row.value):
        return "not computed"
    known = np.isfinite(row.ci_low) and np.isfinite(row.ci_high)
    return f"{row.value:.3f} " + (f"[{row.ci_low:.3f}, {row.ci_high:.3f}]" if known else "[no interval]")


def _chain(results: Results, models: list[str], title: str, blind: bool = False) -> Drawing | None:
    """AUC of the headline's attack for these models, and below it their dev loss."""
    attack, audited = results.headline["attack"], results.headline["model"]
    rows = results.leaks(models, attack=attack)
    if rows.empty:
        return None
    sample = sample_words(rows)
    use = results.utility_rows(list(rows["model"]))
    # The role pair is said where it is not the usual one.
    pairs = ("" if pair == MAIN_PAIR else f" ({pair})" for pair in rows["role_pair"])
    labels = [(m + pair, describe(results, m)) for m, pair in zip(rows["model"], pairs, strict=True)]
    text_alone = (results.summary.get("comparison") or {}).get("blind") or {}
    if blind and text_alone.get("value") is not None:
        numbers = {k: text_alone.get(k, np.nan) for k in ("value", "ci_low", "ci_high")}
        rows = pd.concat([rows, pd.DataFrame([{"model": "blind", **numbers}])], ignore_index=True)
        labels.append(("text alone", describe(results, "blind")))
    top, low = 0.45 * len(rows), 0.27 * len(use)
    height = TOP + top + 0.55 + (low + 0.62 if len(use) else 0)
    settings = f"attack: {attack}; {results.setting_words(models)}; whiskers: 95 % intervals"
    figure = _titled(WIDTH, height, title, settings, sample)
    axes = _panel(figure, NAMES, height - TOP - top, 1.85, top)
    _forest(axes, rows, labels, audited)
    left, right = axes.get_xlim()
    axes.set_xlim(max(min(left, 0.48), -0.01), min(max(right, 0.52), 1.01))
    axes.axvline(0.5, zorder=1, **CHANCE)
    axes.text(0.5, -0.55, "chance", ha="center", va="bottom", size=8.5)
    axes.set_xlabel("AUC: share of pairs ranked right")
    if len(use):
        axes = _panel(figure, NAMES, 0.5, 1.85, low)
        _forest(axes, use, [(m, "") for m in use["model"]], audited)
        axes.set_xlabel("dev loss (nats per token), lower is more useful")
    below = ", and below how useful each model is on unseen records." if len(use) else "; usefulness was not measured."
    numbers = "; ".join(f"{name} {_number(r)}" for (name, _), r in zip(labels, rows.itertuples(), strict=True))
    return figure, f"How well the attack tells members from non-members{below}", f"AUC by model: {numbers}"


def _roc(results: Results) -> Drawing | None:
    attack, pair = results.headline["attack"], results.headline["role_pair"]
    r = results.roc
    r = r[(r["attack"] == attack) & r["model"].isin(results.chain)]
    pair = pair if (r["role_pair"] == pair).any() else MAIN_PAIR
    r = r[r["role_pair"] == pair]
    models = [x for x in results.chain if x in set(r["model"])]
    rows = results.leaks(models, attack=attack)
    if rows["value"].isna().all():
        return None
    m, n = rows["n_members"].max(), rows["n_nonmembers"].max()
    names = {x: tagged(results, x) for x in models}
    longest = max(names.values(), key=len)
    columns = 2 if len(longest) <= 32 else 1
    height = 5.5 + 0.2 * -(-(len(names) + 1) // columns)
    settings = f"attack: {attack}; {results.setting_words(models)}"
    figure = _titled(WIDTH, height, "ROC curves on logarithmic axes", settings, sample_words(rows))
    axes = _panel(figure, 0.85, height - TOP - 3.9, 4.0, 3.9)
    axes.plot([0.1 / n, 1], [0.1 / n, 1], label="chance", **CHANCE)
    for model, name in names.items():
        colour, _, dash = STYLE.get(kind(model), NO_STYLE)
        width, above = (2.2, 4) if model == results.headline["model"] else (1.5, 3)
        seeds = [points for _, points in r[r["model"] == model].groupby("seed")]
        for i, points in enumerate(seeds):
            points = points.sort_values(["fpr", "tpr"])
            axes.step(points["fpr"], points["tpr"], where="post", color=colour, ls=dash, lw=width, zorder=above,
                      alpha=1 if len(seeds) == 1 else 0.65, label=None if i else name)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(0.8 / n, 1.05), ylim=(0.8 / m, 1.15))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(10))
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:g} %"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(which="major", color=PALE, lw=0.6)
    axes.axvspan(0.8 / n, min(10 / n, 1.05), color=PALE, alpha=0.45, lw=0, zorder=0)
    axes.text(0.87 / n, 1.02, "under 10 false\nalarms: noisy", size=8.2, color=GREY, va="top")
    axes.set_xlabel("False-positive rate: share of non-members flagged")
    axes.set_ylabel("True-positive rate: share of members flagged")
    figure.legend(*axes.get_legend_handles_labels(), loc="lower left", bbox_to_anchor=(0.12 / WIDTH, 0.06 / height),
                  ncols=columns, frameon=False, fontsize=_fit(longest, 3.9 / columns, 8.8), handlelength=3,
                  borderaxespad=0)  # fmt: skip
    caption = (
        f"Roles {pair}. Left edge: no false alarm; the next step is one. A curve above the dashed line finds members "
        "better than a coin. One line per seed; intervals stand in the table “Leak by model”."
    )
    return figure, caption, f"ROC curves of {', '.join(names)}, and the chance line; numbers stand in “Leak by model”."


def _heatmap(results: Results) -> Drawing | None:
    cells = {a: results.leaks(results.models, attack=a).set_index("model") for a in results.attacks}
    rows = pd.concat(cells.values())
    if rows["value"].isna().all():
        return None
    numbers = ("value", "ci_low", "ci_high")
    value, low, high = (pd.DataFrame({a: c[k] for a, c in cells.items()}).reindex(results.models) for k in numbers)
    if value.shape[1] > value.shape[0]:
        value, low, high = value.T, low.T, high.T
    down, across = value.shape
    columns = [tagged(results, c) for c in value.columns]
    cell = (WIDTH - NAMES - 0.2) / max(across, 4) if across <= 6 else 0.55
    body, foot = 0.48 * down, 0.3 + 0.052 * max(map(len, columns))
    width, height = max(NAMES + cell * across + 0.2, WIDTH), 1.5 + body + foot
    settings = f"AUC; {results.setting_words(results.models)}"
    figure = _titled(width, height, "Every attack against every model", settings, sample_words(rows))
    axes = _panel(figure, NAMES, foot, cell * across, body)
    reach = max(0.1, np.nanmax(np.abs(rows["value"] - 0.5)))
    norm = TwoSlopeNorm(0.5, 0.5 - reach, 0.5 + reach)
    image = axes.imshow(value.to_numpy(float), cmap="PuOr_r", norm=norm, aspect="auto")
    axes.set_facecolor("#f2f2f2")
    for i, j in np.ndindex(down, across):
        v, a, b = (t.iat[i, j] for t in (value, low, high))
        if not np.isfinite(v):
            axes.text(j, i, "not run", ha="center", va="center", size=7.5, color=GREY)
            continue
        dark = np.dot(image.cmap(norm(v))[:3], (0.299, 0.587, 0.114)) < 0.45
        style = {"ha": "center", "va": "center", "color": "white" if dark else "black"}
        axes.text(j, i - 0.16, f"{v:.2f}", size=10.5, weight="bold" if a > 0.5 or b < 0.5 else "normal", **style)
        axes.text(j, i + 0.24, f"{_short(a)}–{_short(b)}", size=7.6, **style)
    axes.set_xticks(range(across), columns, rotation=42, ha="right", rotation_mode="anchor", size=9)
    axes.set_yticks([])
    for i, name in enumerate(value.index):
        _name(axes, i, tagged(results, name).replace(" ", "\n"), 9)
    axes.set_xticks(np.arange(1, across) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, down) - 0.5, minor=True)
    axes.grid(which="minor", color="white", lw=1.2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    scale = _panel(figure, NAMES, height - 1.12, cell * across, 0.12)
    bar = figure.colorbar(image, cax=scale, orientation="horizontal")
    bar.set_ticks([0.5 - reach, 0.5, 0.5 + reach], labels=[f"{0.5 - reach:.2f}", "0.50 chance", f"{0.5 + reach:.2f}"])
    bar.ax.tick_params(labelsize=8.5, length=2)
    bar.outline.set_visible(False)
    caption = (
        "AUC with its 95 % interval. Bold: the interval excludes 0.5. These are many comparisons and the intervals are "
        "not corrected for that; a few exclude 0.5 by chance. No value is flipped or cut at 0.5."
    )
    return figure, caption, "Heat map of AUC by attack and model; the table of all attacks has the same numbers."


def _short(x: float) -> str:
    return "?" if not np.isfinite(x) else f"{x:.2f}".removeprefix("0")


def _tasks(results: Results) -> Drawing | None:
    attack = results.headline["attack"]
    models = [m for m in results.chain if m in ("null", results.headline["model"], "teacher")]
    tasks = sorted(set(results.membership["task"]) - {"all"})
    tables = {t: results.leaks(models, attack=attack, task=t) for t in tasks}
    tables = {t: rows for t, rows in tables.items() if rows["value"].notna().any()}
    if len(tables) < 2:
        return None
    rows = pd.concat(tables.values())
    thick = 0.2
    group = thick * (len(models) + 1)
    body = group * len(tables)
    height = TOP + 0.32 + body + 0.55
    settings = f"AUC of attack: {attack}; {results.setting_words(models)}"
    figure = _titled(WIDTH, height, "Leak by task", settings, f"{seed_words(rows)}; whiskers: 95 % intervals")
    axes = _panel(figure, NAMES, 0.55, WIDTH - NAMES - 0.15, body)
    for t, (task, slices) in enumerate(tables.items()):
        for row in slices.itertuples():
            y = t * group + (models.index(row.model) - (len(models) - 1) / 2) * thick
            axes.barh(y, row.value - 0.5, 0.86 * thick, left=0.5, color=STYLE.get(kind(row.model), NO_STYLE)[0])
            axes.plot([row.ci_low, row.ci_high], [y, y], color="black", lw=1)
        _name(axes, t * group - 0.08, task, 9.5)
        sizes = f"{spread(slices['n_members'])} / {spread(slices['n_nonmembers'])}"
        _name(axes, t * group + 0.12, sizes, 8, color=GREY)
        if t:
            axes.axhline((t - 0.5) * group, color=PALE, lw=0.6)
    axes.set_ylim(body - group / 2, -group / 2)
    axes.set_xlim(*_limits([0.5, *rows["ci_low"], *rows["ci_high"], *rows["value"]]))
    axes.axvline(0.5, **CHANCE)
    axes.text(0.5, -group / 2 - 0.03, "chance", ha="center", va="bottom", size=8.5)
    axes.set_xlabel("AUC (0.5 is chance)")
    _bare(axes)
    names = [tagged(results, m) for m in models]
    patches = [Patch(color=STYLE.get(kind(m), NO_STYLE)[0]) for m in models]
    place = (0.12 / WIDTH, 1 - 0.86 / height)
    figure.legend(patches, names, loc="upper left", bbox_to_anchor=place, ncols=len(names), frameon=False,
                  fontsize=_fit("".join(names), WIDTH - 1.7, 9), borderaxespad=0, borderpad=0)  # fmt: skip
    caption = (
        "Bars start at chance and may point to the left. Slices are small: read the whiskers, not the tips. Under each "
        "task: members / non-members."
    )
    return figure, caption, f"AUC by task for {', '.join(names)}; the table by task has the same numbers."
