"""Pictures of what is memorized: by model, by repeats, by the temperature of distillation."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

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
    bare,
    brief,
    describe,
    fit,
    panel,
    row_name,
    seed_words,
    spread,
    titled,
)
from attacks.report.named_measures import (
    ending,
    main_cut,
    named,
    of_setting,
    percent,
    setting_words,
    settings_in,
)
from attacks.report.results import Results, in_order, kind, pooled

MEMBERS, HELDOUT, CANARY = ("#0072b2", "o"), ("#7a7a7a", "s"), ("#d55e00", "D")
ACROSS = 3  # small panels side by side
MOST = 12  # small panels in one picture


def draw_memorized(results: Results) -> dict[str, Drawing | None]:
    """memorized, repeats and temperature; where there are two settings one for each: memorized-shared."""
    m, found = pooled(results.memorization), {}
    for setting in settings_in(m):
        own, end = of_setting(m, setting), ending(m, setting)
        found[f"memorized{end}"] = _extracted(results, own, setting)
        found[f"repeats{end}"] = _repeats(results, own, setting)
    swept = named(pooled(results.mechanism), "extracted_by_temperature")
    for setting in settings_in(swept):
        found[f"temperature{ending(m, setting)}"] = _temperature(results, swept[swept["setting"] == setting], setting)
    return found


def _triples(rows: pd.DataFrame) -> np.ndarray:
    """100 x (value, low, high) as columns [3, n]."""
    return 100 * rows[["value", "ci_low", "ci_high"]].to_numpy(float).T


def _whole(frame: pd.DataFrame, cut: str) -> pd.DataFrame:
    return named(frame[frame["task"] == "all"], "extracted", cut)


# --- by model --------------------------------------------------------------------------------------------------------


def _extracted(results: Results, frame: pd.DataFrame, setting: str) -> Drawing | None:
    """Share extracted of members and of held-out records, a row for each model."""
    cut = main_cut(results)
    rows = _whole(frame, cut)
    rows = rows[rows["role"].isin(["private", "heldout"]) & rows["value"].notna()]
    models = in_order(rows["model"])
    if not models:
        return None
    body = 0.46 * len(models)
    height = TOP + 0.3 + body + 0.62
    n = {role: spread(rows.loc[rows["role"] == role, "n"]) for role in ("private", "heldout")}
    said = f"greedy, cut {cut}; {setting_words(setting)}; whiskers: 95 % intervals"
    sample = f"{n['private']} members, {n['heldout']} held-out; {seed_words(rows)}"
    figure = titled(WIDTH, height, "Extracted word for word", said, sample)
    axes = panel(figure, NAMES, 0.62, 1.75, body)
    axes.set_ylim(len(models) - 0.5, -0.5)
    bare(axes)
    for role, offset, (colour, marker), label in (
        ("private", -0.17, MEMBERS, "members"),
        ("heldout", 0.17, HELDOUT, "held-out"),
    ):
        own = rows[rows["role"] == role].drop_duplicates("model").set_index("model").reindex(models)
        value, low, high = _triples(own)
        y = np.arange(len(models)) + offset
        axes.hlines(y, low, high, color=colour, lw=1.8)
        axes.plot(value, y, marker, color=colour, ms=5.5, label=label, mfc=colour if role == "private" else "white")
        for at, (_, row) in zip(y, own.iterrows(), strict=True):
            if np.isfinite(row["value"]):
                axes.text(
                    1.03, at, _numbers(row), transform=axes.get_yaxis_transform(), va="center", size=8.2, color=colour
                )
    for y, model in enumerate(models):
        axes.axhline(y + 0.5, color=PALE, lw=0.6, zorder=0)
        row_name(axes, y - 0.17, model, 9.8, weight="bold" if model == results.headline["model"] else "normal")
        row_name(axes, y + 0.2, describe(results, model), 8, color=GREY)
    low, high = axes.get_xlim()
    axes.set_xlim(min(0, low), max(high, 1))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel("share extracted (%)", size=9.5)
    _legend(figure, axes, height, 2)
    caption = (
        f"Filled: members. Hollow: held-out records{_but_swap(models)}; what a model gives away of these is "
        "predictable. Memory is what lies between the two."
    )
    words = "; ".join(f"{r.model} {r.role} {percent(r.value)} %" for r in rows.itertuples())
    return figure, caption, f"Share extracted at {cut}: {words}"


def _but_swap(models: list[str]) -> str:
    return ", on which only swap was trained" if "swap" in models else ", on which no model was trained"


def _numbers(row: pd.Series) -> str:
    ends = f" [{percent(row['ci_low'])}, {percent(row['ci_high'])}]" if np.isfinite(row["ci_low"]) else ""
    return f"{percent(row['value'])} %{ends}"


def _legend(figure: Figure, axes: Axes, height: float, columns: int) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(0.12 / WIDTH, 1 - 0.8 / height),
                  ncols=columns, frameon=False, fontsize=8.8, borderaxespad=0, handletextpad=0.3)  # fmt: skip


# --- by repeats ------------------------------------------------------------------------------------------------------


def _repeats(results: Results, frame: pd.DataFrame, setting: str) -> Drawing | None:
    """A small panel for each model: share extracted by how often a record was trained on, log x."""
    cut = main_cut(results)
    records = named(frame[frame["task"].str.fullmatch(r"repeats=\d+")], "extracted", cut)
    canaries = named(frame[frame["task"].str.fullmatch(r"placement=both,repeats=\d+")], "exact_response", cut)
    rows = pd.concat([records, canaries[canaries["role"] == "canary_in"]])
    rows = rows.assign(repeats=[float(task.rpartition("=")[2]) for task in rows["task"]])
    roles = {"private": (*MEMBERS, "members"), "heldout": (*HELDOUT, "held-out"),
             "canary_in": (*CANARY, "canaries (whole answer)")}  # fmt: skip
    rows = rows[rows["role"].isin(roles) & rows["value"].notna()]
    models = [m for m in in_order(rows["model"]) if rows.loc[rows["model"] == m, "repeats"].nunique() > 1][:MOST]
    if not models:
        return None
    seen = [role for role in roles if role in set(rows["role"])]
    said = f"greedy, cut {cut}; {setting_words(setting)}; {seed_words(rows)}"
    n = ", ".join(f"{spread(rows.loc[rows['role'] == r, 'n'])} {roles[r][2].split(' (')[0]}" for r in seen)
    figure, grid, height = _small(
        len(models), "More often seen, more often extracted?", said, f"a point: {n}; whiskers: 95 %"
    )
    ticks = sorted(rows["repeats"].unique())
    top = 100 * np.nanmax(rows[["value", "ci_high"]].to_numpy(float))
    for axes, model in zip(grid, models, strict=True):
        for k, role in enumerate(seen):
            own = rows[(rows["model"] == model) & (rows["role"] == role)].sort_values("repeats")
            value, low, high = _triples(own)
            x = own["repeats"].to_numpy() * 1.07 ** (k - (len(seen) - 1) / 2)
            colour, marker, label = roles[role]
            axes.vlines(x, low, high, color=colour, lw=1.3)
            style = {"mfc": "white" if role == "heldout" else colour, "ls": ":" if role == "heldout" else "-"}
            axes.plot(x, value, marker=marker, color=colour, ms=4.5, lw=1, label=label, **style)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{r:g}" for r in ticks])
        axes.minorticks_off()
        axes.set_xlim(ticks[0] / 1.5, ticks[-1] * 1.5)
        axes.set_ylim(-0.03 * top, max(1.06 * top, 1))
        _panel_title(axes, brief(model), model == results.headline["model"])
    _outer(grid, "times trained on (log)", "extracted (%)")
    _legend(figure, grid[0], height, 3)
    caption = (
        "Of the records, a model that was never trained on them (null and bases, where the setting is disjoint the "
        "students) should be flat."
    )
    if "canary_in" in seen:
        caption += (
            " These canaries lie in the private and the public data: null and all students met them, no base did."
        )
    if "heldout" in seen:
        caption += f" Hollow: held-out records{_but_swap(models)}; what they show is the text's doing."
    words = "; ".join(
        f"{r.model} {r.role} {r.repeats:g} times: {percent(r.value)} %" for r in rows.itertuples() if r.model in models
    )
    return figure, caption, f"Share extracted by repeats: {words}"


def _small(n: int, title: str, *lines: str) -> tuple[Figure, list[Axes], float]:
    """A figure of n small panels, ACROSS of them side by side."""
    across = min(n, ACROSS) if n != 4 else 2
    down = -(-n // across)
    body, foot = 1.15, 0.38
    height = TOP + 0.22 + down * (body + foot) + 0.22
    figure = titled(WIDTH, height, title, *lines)
    wide = (WIDTH - 0.62 - 0.12) / across
    grid = []
    for i in range(n):
        line, column = divmod(i, across)
        bottom = height - TOP - 0.22 - line * (body + foot) - body
        axes = panel(figure, 0.62 + column * wide, bottom, wide - 0.16, body)
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", color=PALE, lw=0.6)
        axes.set_axisbelow(True)
        axes.yaxis.set_major_locator(MaxNLocator(3))
        if column:
            axes.tick_params(labelleft=False)
        grid.append(axes)
    return figure, grid, height


def _outer(grid: list[Axes], x: str, y: str) -> None:
    """Labels once: y on the first panel of each line, x in the middle of the lowest."""
    lefts = sorted({round(axes.get_position().x0, 3) for axes in grid})
    lowest = min(axes.get_position().y0 for axes in grid)
    for axes in grid:
        place = axes.get_position()
        if round(place.x0, 3) == lefts[0]:
            axes.set_ylabel(y, size=8.5)
    figure = grid[0].figure
    figure.text(0.55, lowest - 0.42 / figure.get_size_inches()[1], x, ha="center", va="bottom", size=8.8)


def _panel_title(axes: Axes, words: str, audited: bool) -> None:
    axes.set_title(words, size=fit(words, 1.35, 9), loc="left", pad=3, weight="bold" if audited else "normal")


# --- by temperature --------------------------------------------------------------------------------------------------


def _temperature(results: Results, frame: pd.DataFrame, setting: str) -> Drawing | None:
    """Share extracted by students that differ in T alone; T = 1 is the control; teacher and baseline as lines."""
    rows = frame[frame["role"].isin(["private", "heldout"]) & frame["value"].notna()].drop_duplicates(
        ["student", "role"]
    )
    rows = rows.assign(T=rows["group"].str.removeprefix("T=").astype(float))
    if rows["T"].nunique() < 2:
        return None
    height, cut = TOP + 2.75, rows["cut"].iloc[0]
    own_n = {role: spread(rows.loc[rows["role"] == role, "n"]) for role in ("private", "heldout")}
    said = f"greedy, cut {cut}; {setting_words(setting)}; {seed_words(rows)}"
    sample = f"{own_n['private']} members, {own_n['heldout']} held-out; whiskers: 95 % intervals"
    figure = titled(WIDTH, height, "By the temperature of distillation", said, sample)
    axes = panel(figure, 0.85, 0.5, WIDTH - 1.9, height - TOP - 0.85)
    if (rows["T"] == 1).any():
        axes.axvspan(0.85, 1.15, color=PALE, alpha=0.6, lw=0, zorder=0)
        axes.text(
            1, 1.01, "control", transform=axes.get_xaxis_transform(), ha="center", va="bottom", size=8.5, color=GREY
        )
    dashes = ("-", (0, (4, 2)), (0, (1, 1.2)))
    for k, (technique, series) in enumerate(rows.groupby("technique", sort=True)):
        for role, (colour, marker), label in (("private", MEMBERS, "members"), ("heldout", HELDOUT, "held-out")):
            points = series[series["role"] == role].sort_values("T")
            joined = dashes[k % len(dashes)] if points["T"].is_unique else ""
            value, low, high = _triples(points)
            x = points["T"] + 0.03 * (1 if role == "heldout" else -1)
            axes.vlines(x, low, high, color=colour, lw=1.4)
            axes.plot(x, value, marker=marker, ls=joined, color=colour, ms=5.5, lw=1.2, label=f"{technique}, {label}",
                      mfc=colour if role == "private" else "white")  # fmt: skip
    beside = _whole(pooled(results.memorization), cut)
    beside = beside[(beside["role"] == "private") & beside["model"].isin(["teacher", "direct"])]
    for r in beside.drop_duplicates("model").itertuples():
        colour = STYLE.get(kind(r.model), NO_STYLE)[0]
        axes.axhline(100 * r.value, **(CHANCE | {"color": colour}), zorder=1)
        axes.text(1.02, 100 * r.value, f"{r.model}\n{percent(r.value)} %", transform=axes.get_yaxis_transform(),
                  va="center", size=8.5, color=colour)  # fmt: skip
    ticks = sorted(rows["T"].unique())
    axes.set_xticks(ticks, [f"T={t:g}" for t in ticks])
    axes.set_xlim(min(ticks) - 0.35, max(ticks) + 0.35)
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(decimals=0, symbol=" %"))
    axes.grid(axis="y", color=PALE, lw=0.6)
    axes.set_ylabel("extracted", size=9.5)
    _legend(figure, axes, height, 2)
    caption = (
        "At T = 1 the student is pulled towards the teacher's own probabilities: a fall that is claimed for "
        "distillation must be seen against this control. Lines: members under teacher and direct."
    )
    words = "; ".join(f"{r.student} T={r.T:g} {r.role} {percent(r.value)} %" for r in rows.itertuples())
    return figure, caption, f"Share extracted by temperature, {setting_words(setting)}: {words}"
