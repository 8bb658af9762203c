"""Pictures of teacher and student together: who is flagged on both, the vulnerable, mixed supervision, the sweep."""

from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from attacks.report.drawing import (
    CHANCE,
    GREY,
    PALE,
    STYLE,
    TOP,
    WIDTH,
    Drawing,
    bare,
    brief,
    fit,
    limits,
    panel,
    readable,
    row_name,
    seed_words,
    titled,
)
from attacks.report.inheritance import (
    ALPHA_MEASURES,
    CELLS,
    CONTRAST,
    GROUPS,
    MATCHED,
    MEASURES,
    RULE,
    SHOWN,
    about,
    mean_row,
    students_of,
)
from attacks.report.results import Results, pooled

SPREAD = "least to greatest of the seeds"
NAMES = 1.15  # inches kept for the names of students
BLUE, ORANGE, GREEN = STYLE["student"][0], STYLE["direct"][0], STYLE["teacher"][0]
GROUP_STYLE = {"vulnerable": (ORANGE, "D"), "non_vulnerable": (BLUE, "o"), "non_member": ("#7a7a7a", "s")}


def draw_inheritance(results: Results) -> dict[str, Drawing | None]:
    """agreement, vulnerable, supervision (of each setting where there are two), and alpha of each series."""
    head = results.headline["attack"]
    agreement, supervision = about(results.agreement, attack=head, rule=RULE), about(results.supervision, attack=head)
    found: dict[str, Drawing | None] = {}
    for name, draw, frame in (
        ("agreement", _matrices, agreement),
        ("vulnerable", _vulnerable, agreement),
        ("supervision", _supervision, supervision),
    ):
        parts = results.apart(frame.assign(model=frame["student"])) if len(frame) else []
        for _, own in parts:
            ending = (
                "" if len(parts) == 1 else "-" + (results.settings.get(own["model"].iloc[0], "-").strip("-") or "none")
            )
            found[name + ending] = draw(results, own)
    series = pooled(about(results.alpha, attack=head))
    for i, (keys, own) in enumerate(series.groupby(["teacher", "setting", "technique", "series"], sort=False)):
        found["alpha" if not i else f"alpha-{i + 1}"] = _alpha(results, own, keys)
    return found


# --- agreement -------------------------------------------------------------------------------------------------------


def _matrices(results: Results, frame: pd.DataFrame) -> Drawing | None:
    """For each student two 2 x 2 tables of shares: of the members and of the non-members."""
    cells = frame[frame["measure"].isin([f"flagged_{cell}" for cell in CELLS])]
    students = students_of(results, cells)
    if not students:
        return None
    side, gap, block, labels = 1.66, 0.16, 0.98, 0.36
    body = block * len(students)
    height = TOP + 0.36 + body + 0.1
    teacher = cells["teacher"].iloc[0]
    figure = titled(
        WIDTH, height, f"Flagged on {teacher}, on the student, on both",
        f"attack: {results.headline['attack']}; {results.setting_words(students)}",
        f"below each share: {SPREAD if cells['seed'].nunique() > 1 else '95 % interval'}",
    )  # fmt: skip
    words = []
    for i, student in enumerate(students):
        own = about(cells, student=student)
        bottom = height - TOP - 0.36 - block * (i + 1) + 0.12
        for j, (which, title) in enumerate((("members", "members"), ("nonmembers", "non-members"))):
            left = NAMES + labels + j * (side + gap)
            axes = panel(figure, left, bottom, side, block - 0.2)
            table = about(own, **{"class": which})
            shares = {cell: mean_row(about(table, measure=f"flagged_{cell}")) for cell in CELLS}
            _matrix(axes, shares)
            if not i:
                axes.set_title(title, size=9.5, weight="bold", pad=16)
                axes.tick_params(labeltop=True, labelbottom=False, pad=1)
                axes.set_xticks([0, 1], ["teacher: yes", "teacher: no"], size=8)
            if not j:
                axes.set_yticks([0, 1], ["yes", "no"], size=8)
                if not i:
                    axes.text(-0.05, 1.1, "student", transform=axes.transAxes, ha="right", size=8)
                row_name(axes, 0.5, brief(student), 9.5, width=NAMES, x=-(labels + 0.04) / side,
                         weight="bold" if student == results.headline["model"] else "normal")  # fmt: skip
            numbers = ", ".join(f"{w} {100 * shares[c][0]:.0f} %" for c, w in CELLS.items())
            words.append(f"{student}, {title}: {numbers}")
    caption = (
        "Left of each matrix: flagged on the student, yes or no. Where both matrices of a student look alike, what "
        "teacher and student share lies in the records, not in membership."
    )
    return figure, caption, f"Agreement of teacher and student: {'; '.join(words)}"


def _matrix(axes: Axes, shares: dict[str, tuple[float, float, float]]) -> None:
    grid = [["both", "student"], ["teacher", "none"]]
    values = np.array([[shares[cell][0] for cell in line] for line in grid])
    image = axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.axhline(0.5, color="white", lw=1.5)
    axes.axvline(0.5, color="white", lw=1.5)
    for (i, j), value in np.ndenumerate(values):
        _, low, high = shares[grid[i][j]]
        style = {"ha": "center", "va": "center", "color": readable(image.cmap(value))}
        axes.text(j, i - 0.14, f"{100 * value:.0f} %", size=10, **style)
        axes.text(j, i + 0.27, f"{100 * low:.0f}–{100 * high:.0f}", size=7.8, **style)


def _vulnerable(results: Results, frame: pd.DataFrame) -> Drawing | None:
    """TPR on teacher and student; the student's AUC of the members that are flagged on the teacher, and of others."""
    whole = pooled(frame)
    rates, aucs = about(whole, measure="tpr_student"), about(whole, measure="auc_student")
    students = students_of(results, rates)
    if not students:
        return None
    body, wide = 0.44 * len(students), (WIDTH - NAMES - 0.35) / 2
    height = TOP + body + 1.2
    figure = titled(
        WIDTH, height, "Whose members are found?",
        f"attack: {results.headline['attack']}; {results.setting_words(students)}; {seed_words(rates)}",
        f"whiskers: left, 95 % intervals; right, {SPREAD if aucs['seed'].nunique() > 1 else '95 % intervals'}",
    )  # fmt: skip
    left = panel(figure, NAMES, 1.2, wide, body)
    right = panel(figure, NAMES + wide + 0.25, 1.2, wide, body)
    panels = (
        (left, (("tpr_teacher", "members", GREEN, "P", "on the teacher"),
                ("tpr_student", "members", BLUE, "o", "on the student"),
                ("tnr_student", "nonmembers", "#7a7a7a", "X", "non-members, student"))),
        (right, (("auc_student", "vulnerable", *GROUP_STYLE["vulnerable"], "vulnerable"),
                 ("auc_student", "non_vulnerable", *GROUP_STYLE["non_vulnerable"], "the other members"))),
    )  # fmt: skip
    words = []
    for axes, series in panels:
        drawn = []
        for k, (measure, which, colour, marker, label) in enumerate(series):
            found = [mean_row(about(whole, measure=measure, student=s, **{"class": which})) for s in students]
            if measure.startswith("tnr"):
                found = [(1 - v, 1 - b, 1 - a) for v, a, b in found]
            _points(axes, found, (k - (len(series) - 1) / 2) * 0.24, colour, marker, label)
            drawn += found
            words += [f"{s} {label} {v:.3f}" for s, (v, _, _) in zip(students, found, strict=True)]
        _frame(axes, len(students), [x for row in drawn for x in row])
    for y, student in enumerate(students):
        row_name(
            left,
            y,
            brief(student),
            9.5,
            width=NAMES,
            weight="bold" if student == results.headline["model"] else "normal",
        )
    right.axvline(0.5, zorder=1, **CHANCE)
    left.set_xlabel("share called members", size=9.5)
    right.set_xlabel("AUC on the student", size=9.5)
    for axes, x in ((left, 0.1), (right, NAMES + wide + 0.25)):
        figure.legend(*axes.get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(x / WIDTH, 0.66 / height),
                      frameon=False, fontsize=8.5, borderaxespad=0, handletextpad=0.3, labelspacing=0.25)  # fmt: skip
    caption = (
        "Left: members that the attack calls, on the teacher and on the student, at each model's own threshold; "
        "crosses are the non-members called with them, which is what chance would give. Right: the student's AUC of "
        "the members called on the teacher and of the others, against all non-members (dashed: chance). Null never "
        "met this teacher: what it shows to the right of 0.5 was not inherited."
    )
    return figure, caption, f"Member-specific success and AUC of vulnerable members: {'; '.join(words)}"


def _points(axes: Axes, found: list[tuple], offset: float, colour: str, marker: str, label: str, **style) -> None:
    y = np.arange(len(found)) + offset
    value, low, high = np.array(found, float).reshape(-1, 3).T
    axes.hlines(y, low, high, color=colour, lw=1.4, zorder=2)
    axes.plot(value, y, marker, ms=5.5, label=label, zorder=3, **{"color": colour, "mec": colour} | style)


def _frame(axes: Axes, rows: int, values: list[float]) -> None:
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xlim(*limits(values))
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.tick_params(labelsize=8.5)
    bare(axes)
    for y in range(rows):
        axes.axhline(y, color=PALE, lw=0.6, zorder=0)


# --- mixed supervision -----------------------------------------------------------------------------------------------


def _supervision(results: Results, frame: pd.DataFrame) -> Drawing | None:
    """A panel for each measure: what vulnerable members have above matched non-members, and above other members."""
    whole = pooled(frame[frame["group"].isin([MATCHED, CONTRAST])])
    measures = [m for m in SHOWN if (about(whole, group=MATCHED)["measure"] == m).any()]
    students = students_of(results, about(whole, group=MATCHED))
    if not measures:
        return None
    wide, body, foot = (WIDTH - NAMES - 0.35) / 2, 0.27 * len(students), 0.78
    lines = -(-len(measures) // 2)
    height = TOP + 0.1 + lines * (body + foot) + 0.3
    figure = titled(
        WIDTH, height, "Do teacher and label agree where it is vulnerable?",
        f"groups by {results.headline['attack']} on the teacher; {results.setting_words(students)}",
        f"differences; whiskers: 95 % intervals; {seed_words(whole)}",
    )  # fmt: skip
    words = []
    for k, measure in enumerate(measures):
        line, column = divmod(k, 2)
        bottom = height - TOP - 0.1 - body - line * (body + foot)
        axes = panel(figure, NAMES + column * (wide + 0.25), bottom, wide, body)
        own, drawn = about(whole, measure=measure), []
        for group, offset, colour, marker, label in (
            (MATCHED, -0.14, BLUE, "o", "vulnerable − matched non-members"),
            (CONTRAST, 0.16, GREY, "s", "vulnerable − other members"),
        ):
            found = [mean_row(about(own, student=s, group=group)) for s in students]
            _points(axes, found, offset, colour, marker, label, mfc=colour if group == MATCHED else "white")
            drawn += found
            if group == MATCHED:
                words += [f"{MEASURES[measure]}, {s}: {v:.3g}" for s, (v, _, _) in zip(students, found, strict=True)]
        _frame(axes, len(students), [0])
        axes.set_xlim(*limits([0, *(x for row in drawn for x in row)], least=1e-6))
        axes.axvline(0, zorder=1, **CHANCE)
        axes.set_xlabel(fill(MEASURES[measure], 27), size=8.8)
        for y, student in enumerate(students):
            if not column:
                row_name(axes, y, brief(student), 9, width=NAMES)
            if student not in set(own["student"]):
                place = axes.get_yaxis_transform()
                axes.text(
                    0.97, y - 0.05, "not measured", transform=place, size=7.8, color=GREY, ha="right", va="bottom"
                )
    figure.legend(*axes.get_legend_handles_labels(), loc="lower left", bbox_to_anchor=(0.12 / WIDTH, 0.06 / height),
                  ncols=2, frameon=False, fontsize=8.5, borderaxespad=0, handletextpad=0.2)  # fmt: skip
    caption = (
        "Filled: against non-members on which the teacher has the same likelihood, which is the comparison to read. "
        "Hollow: against the members that the attack misses on the teacher; some of that is how the groups were made."
    )
    return figure, caption, f"Vulnerable less matched non-members: {'; '.join(words)}"


# --- the weight of the teacher ---------------------------------------------------------------------------------------


def _alpha(results: Results, frame: pd.DataFrame, keys: tuple[str, str, str, float]) -> Drawing | None:
    """A panel for each measure against alpha, a line for each group of records."""
    measures = [m for m in ALPHA_MEASURES if (frame["measure"] == m).any()]
    if not measures:
        return None
    wide, body, foot = 1.95, 1.35, 0.5
    lines = -(-len(measures) // 2)
    height = TOP + 0.55 + lines * (body + foot + 0.25)
    teacher, setting, technique, _ = keys
    figure = titled(
        WIDTH, height, "What the weight of the teacher does",
        f"attack: {results.headline['attack']}; {technique}, {setting} setting, taught by {teacher}",
        f"{seed_words(frame)}; whiskers: 95 % intervals",
    )  # fmt: skip
    handles = {}
    for k, measure in enumerate(measures):
        line, column = divmod(k, 2)
        bottom = height - TOP - 0.1 - body - line * (body + foot + 0.25)
        axes = panel(figure, 0.55 + column * (wide + 0.6), bottom, wide, body)
        for group, own in about(frame, measure=measure).groupby("group", sort=False):
            own = own.sort_values("alpha")
            colour, marker = GROUP_STYLE.get(group, ("#222222", "P"))
            axes.vlines(own["alpha"], own["ci_low"], own["ci_high"], color=colour, lw=1.3)
            (handle,) = axes.plot(own["alpha"], own["value"], marker=marker, color=colour, ms=5, lw=1.2)
            handles.setdefault(GROUPS.get(group, "All members").lower().capitalize(), handle)
        if measure == "auc":
            axes.axhline(0.5, zorder=0, **CHANCE)
        axes.set_title(fill(ALPHA_MEASURES[measure], 34), size=fit("x" * 34, wide + 0.45, 8.6), loc="left")
        if k >= len(measures) - 2:  # the lowest of its column
            axes.set_xlabel("alpha, the teacher's weight", size=8.5)
        axes.tick_params(labelsize=8)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.grid(color=PALE, lw=0.6)
    _legend(figure, handles, height)
    words = "; ".join(
        f"alpha {r.alpha:g}: AUC {r.value:.3f}" for r in about(frame, measure="auc").sort_values("alpha").itertuples()
    )
    return figure, "Students that differ in alpha alone. Dashed: chance.", f"Leak and supervision by alpha. {words}"


def _legend(figure: Figure, handles: dict, height: float) -> None:
    figure.legend(handles.values(), handles, loc="lower left", bbox_to_anchor=(0.12 / WIDTH, 0.05 / height),
                  ncols=2, frameon=False, fontsize=8.6, borderaxespad=0)  # fmt: skip
