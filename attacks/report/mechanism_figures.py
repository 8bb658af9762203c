"""Pictures of why: entropy against log-probability, rank correlations of attack and memory, coefficients."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from attacks.report.drawing import (
    CHANCE,
    GREY,
    NAMES,
    PALE,
    TOP,
    WIDTH,
    Drawing,
    bare,
    brief,
    fit,
    limits,
    panel,
    row_name,
    seed_words,
    spread,
    titled,
)
from attacks.report.inherited import region_words
from attacks.report.named_measures import ending, main_cut, named, of_setting, setting_words, settings_in
from attacks.report.prediction import coefficients, feature_words
from attacks.report.results import Results, in_order, kind, pooled

# Colour, marker, size; drawn in this order, so that the few lie on the many.
GROUPS = {
    "none": ("#9aa5b0", "o", 8),
    "T only": ("#009e73", "v", 12),
    "B only": ("#e69f00", "<", 12),
    "T&B not S": ("#0072b2", "^", 14),
    "T&B&S": ("#56b4e9", "o", 14),
    "B&S not T": ("#cc79a7", ">", 14),
    "S only": ("#7b3fa0", "s", 14),
    "T&S not B": ("#d55e00", "D", 16),
}
MOST = 4  # students in one picture
LOG_P = (0, -2, -5, -20, -50, -200, -500)  # ticks
RANKS = (("spearman_matched", "#0072b2", "o", "share matched"), ("spearman_log_p", "#d55e00", "D", "log-probability"))


def draw_mechanism(results: Results) -> dict[str, Drawing | None]:
    """mechanism-<setting> (and -2 where there are many students), ranks, coefficients; of each setting its own."""
    found: dict[str, Drawing | None] = {}
    m = named(pooled(results.mechanism), "entropy", main_cut(results))
    for setting in settings_in(m[m["setting"].ne("")]):
        students = in_order(m.loc[m["setting"] == setting, "student"])
        for k in range(0, len(students), MOST):
            name = f"mechanism-{setting}" + (f"-{k // MOST + 1}" if k else "")
            found[name] = _scatter(results, students[k : k + MOST], setting)
    d = pooled(results.disagreement)
    for setting in settings_in(d):
        found[f"ranks{ending(d, setting)}"] = _ranks(results, of_setting(d, setting), setting)
    c = coefficients(results)
    for setting in settings_in(c):
        found[f"coefficients{ending(c, setting)}"] = _coefficients(results, c[c["setting"] == setting], setting)
    return found


# --- entropy against log-probability ---------------------------------------------------------------------------------


def _scatter(results: Results, students: list[str], setting: str) -> Drawing | None:
    """A line of panels for each student: teacher, baseline, student; points where there are some, and centroids."""
    cut = main_cut(results)
    m = pooled(results.mechanism)
    m = m[(m["role"] == "private") & m["student"].isin(students) & m["group"].isin(GROUPS)]
    means = named(m, "entropy", cut).merge(
        named(m, "log_p", cut), on=["student", "model", "group", "seed"], suffixes=("", "_p")
    )
    points = results.mechanism_points[results.mechanism_points["student"].isin(students)]
    if means.empty:
        return None
    drawn = [g for g in GROUPS if g in set(means["group"]) | set(points["group"])]
    body, head, foot = 1.45, 0.36, 0.46
    legend = 0.21 * -(-len(drawn) // 3)
    top = TOP - 0.24
    height = top + (body + head) * len(students) + foot + legend + 0.1
    said = f"cut {cut}; {setting_words(setting)}; {seed_words(means)}"
    n = f"{points['example_id'].nunique():,} texts drawn; " if len(points) else ""
    figure = titled(WIDTH, height, "Sure and right, or pushed?", said, f"{n}large: means, with 95 % intervals")
    wide = (WIDTH - 0.62 - 0.12) / 3
    x = limits([*means["ci_low"], *means["ci_high"], *means["value"], *points["entropy"], 0], least=0.05)
    y = 1.25 * min(limits([*means["ci_low_p"], *means["value_p"], *points["log_p"], -6])[0], -6), 0.6
    for line, student in enumerate(students):
        mine = means[means["student"] == student]
        models = sorted(set(mine["model"]), key=lambda m: (m == student, kind(m) != "teacher"))
        for column, model in enumerate(models[:3]):
            bottom = height - top - (body + head) * (line + 1) + 0.04
            axes = panel(figure, 0.62 + column * wide, bottom, wide - 0.12, body)
            of = points[(points["student"] == student) & (points["model"] == model)]
            _cloud(axes, of, mine[mine["model"] == model])
            axes.set_yscale("symlog", linthresh=5)  # most of what is memorized lies between -5 and 0
            axes.set(xlim=x, ylim=y)
            ticks = [t for t in LOG_P if t >= y[0]]
            axes.set_yticks(ticks, [f"{t:g}".replace("-", "−") for t in ticks])
            axes.minorticks_off()
            axes.tick_params(labelsize=8, labelleft=not column, labelbottom=line == len(students) - 1)
            axes.xaxis.set_major_locator(MaxNLocator(3))
            words = brief(model)
            bold = "bold" if model == results.headline["model"] else "normal"
            axes.set_title(words, size=fit(words, wide - 0.15, 9), loc="left", pad=3, weight=bold)
            if not column:
                axes.set_ylabel("log p (nats)", size=8.5)
    figure.text(
        0.55, (foot + legend - 0.34) / height, "mean entropy over the cut (nats per token)", size=8.8, ha="center"
    )
    handles = [Line2D([], [], ls="", marker=GROUPS[g][1], color=GROUPS[g][0], ms=5.5) for g in drawn]
    names, place = [region_words(g) for g in drawn], (0.12 / WIDTH, 0.05 / height)
    figure.legend(handles, names, loc="lower left", bbox_to_anchor=place, ncols=3, frameon=False, fontsize=8.6,
                  borderaxespad=0, handletextpad=0.2)  # fmt: skip
    caption = (
        "Upper left: sure and right. Upper right: unsure, yet the true tokens are likely. Lower right: unsure, and "
        "they are not. T, B, S: who gives the text away; none: nobody."
    )
    words = "; ".join(
        f"{r.student}, {r.model}, {r.group}: entropy {r.value:.2f}, log p {r.value_p:.1f}" for r in means.itertuples()
    )
    return figure, caption, f"Mean entropy and log-probability by group: {words}"


def _cloud(axes: Axes, points: pd.DataFrame, means: pd.DataFrame) -> None:
    for group, (colour, marker, size) in GROUPS.items():
        own = points[points["group"] == group]
        axes.scatter(own["entropy"], own["log_p"], s=size * 0.6, marker=marker, color=colour, alpha=0.45, lw=0)
    for r in means.itertuples():
        colour, marker, _ = GROUPS[r.group]
        axes.plot([r.ci_low, r.ci_high], [r.value_p] * 2, color="black", lw=0.9, zorder=4)
        axes.plot([r.value] * 2, [r.ci_low_p, r.ci_high_p], color="black", lw=0.9, zorder=4)
        axes.plot(r.value, r.value_p, marker, color=colour, ms=6.5, mec="black", mew=0.8, zorder=5)
    axes.grid(color=PALE, lw=0.5)
    axes.set_axisbelow(True)


# --- membership against memorization ---------------------------------------------------------------------------------


def _ranks(results: Results, frame: pd.DataFrame, setting: str) -> Drawing | None:
    """Rank correlations of the primary attack's score with what is memorized, a row for each model."""
    cut = main_cut(results)
    attack = results.headline["attack"]
    attack = attack if attack in set(frame["attack"]) else frame["attack"].iloc[0]
    own = frame[(frame["attack"] == attack) & frame["value"].notna()]
    rows = {name: named(own, name, cut).drop_duplicates("model").set_index("model") for name, *_ in RANKS}
    models = in_order(m for of in rows.values() for m in of.index)
    if not models:
        return None
    every = pd.concat(rows.values())
    body = 0.42 * len(models)
    height = TOP + 0.3 + body + 0.58
    figure = titled(
        WIDTH, height, "Does the attack find what is memorized?",
        f"attack: {attack}; cut {cut}; {setting_words(setting)}",
        f"{spread(every['n'])} members; {seed_words(every)}; whiskers: 95 % intervals",
    )  # fmt: skip
    axes = panel(figure, NAMES - 0.3, 0.58, 2.15, body)
    axes.set_ylim(len(models) - 0.5, -0.5)
    bare(axes)
    for k, (name, colour, marker, label) in enumerate(RANKS):
        of = rows[name].reindex(models)
        y = np.arange(len(models)) + (k - 0.5) * 0.34
        axes.hlines(y, of["ci_low"], of["ci_high"], color=colour, lw=1.6)
        axes.plot(of["value"], y, marker, color=colour, ms=5, label=label)
        for at, (_, r) in zip(y, of.iterrows(), strict=True):
            if np.isfinite(r["value"]):
                words = f"{r['value']:.2f} [{r['ci_low']:.2f}, {r['ci_high']:.2f}]".replace("-", "−")
                axes.text(1.03, at, words, transform=axes.get_yaxis_transform(), va="center", size=8.2, color=colour)
    for y, model in enumerate(models):
        axes.axhline(y + 0.5, color=PALE, lw=0.6, zorder=0)
        bold = "bold" if model == results.headline["model"] else "normal"
        row_name(axes, y, model, 9.5, width=NAMES - 0.3, weight=bold)
    low, high = limits([0, *every["ci_low"], *every["ci_high"], *every["value"]])
    axes.set_xlim(max(low, -1.03), min(high, 1.03))
    axes.axvline(0, zorder=1, **CHANCE)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel("Spearman's rank correlation with the score", size=9)
    figure.legend(*axes.get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(0.12 / WIDTH, 1 - 0.8 / height),
                  ncols=2, frameon=False, fontsize=8.8, borderaxespad=0, handletextpad=0.3)  # fmt: skip
    caption = (
        "Among members alone. At 0 (dashed) the score says nothing about what is memorized; at 1 both order alike."
    )
    words = "; ".join(
        f"{m} {label} {rows[name]['value'][m]:.2f}" for name, _, _, label in RANKS for m in rows[name].index
    )
    return figure, caption, f"Rank correlation of {attack} and memorization: {words}"


# --- coefficients ----------------------------------------------------------------------------------------------------


def _coefficients(results: Results, frame: pd.DataFrame, setting: str) -> Drawing | None:
    """Standardised coefficients of the classifier, a row for each student and feature."""
    students = in_order(frame["student"])
    order = list(dict.fromkeys(frame["feature"]))
    lines = [(s, f) for s in students for f in order if ((frame["student"] == s) & (frame["feature"] == f)).any()]
    body = 0.27 * len(lines) + 0.3 * len(students)
    height = TOP + body + 0.55
    said = f"features: {frame['features'].iloc[0]}; {setting_words(setting)}"
    sample = f"{spread(frame['n'])} memorized texts; {seed_words(frame)}; whiskers: 95 % intervals"
    figure = titled(WIDTH, height, "What predicts that a text is memorized", said, sample)
    axes = panel(figure, NAMES + 0.15, 0.55, 1.75, body)
    y = -0.1
    for student in students:
        y += 0.3
        row_name(axes, y, brief(student), 9.2, weight="bold", width=NAMES + 0.1)
        y += 0.27
        for _, feature in (line for line in lines if line[0] == student):
            r = frame[(frame["student"] == student) & (frame["feature"] == feature)].iloc[0]
            axes.axhline(y, color=PALE, lw=0.6, zorder=0)
            axes.plot([r["ci_low"], r["ci_high"]], [y, y], "|-", color="#0072b2", lw=1.6, ms=6, mew=1.4)
            axes.plot(r["value"], y, "o", color="#0072b2", ms=4.5)
            row_name(axes, y, feature_words(feature), 8.8, color=GREY, width=NAMES + 0.1)
            words = f"{r['value']:.2f} [{r['ci_low']:.2f}, {r['ci_high']:.2f}]".replace("-", "−")
            axes.text(1.03, y, words, transform=axes.get_yaxis_transform(), va="center", size=8.2)
            y += 0.27
        y -= 0.27
    axes.set_ylim(y + 0.27, -0.05)
    axes.set_xlim(*limits([0, *frame["ci_low"], *frame["ci_high"], *frame["value"]]))
    axes.axvline(0, zorder=1, **CHANCE)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    bare(axes)
    axes.set_xlabel("standardised coefficient (log-odds per SD)", size=9)
    caption = "Right of 0: more of it, more likely memorized. Features are standardised, so the sizes compare."
    words = "; ".join(f"{r.student} {r.feature} {r.value:.2f}" for r in frame.itertuples())
    return figure, caption, f"Coefficients: {words}"
