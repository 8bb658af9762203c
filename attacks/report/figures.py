"""PNG figures of the report, one function each; the pictures of the techniques are in technique_figures.py."""

from io import BytesIO

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

from attacks.report.block_figures import draw_blocks
from attacks.report.canary_figures import draw_exposure
from attacks.report.chain_figures import draw_chains, draw_effects
from attacks.report.drawing import (
    CHANCE,
    GREY,
    NAMES,
    NO_STYLE,
    PALE,
    RC,
    STYLE,
    TOP,
    WIDTH,
    Drawing,
    Picture,
    bare,
    describe,
    fit,
    forest,
    limits,
    number,
    panel,
    row_name,
    sample_words,
    seed_words,
    spread,
    tagged,
    titled,
)
from attacks.report.heatmaps import draw_heatmaps
from attacks.report.inheritance_figures import draw_inheritance
from attacks.report.mechanism_figures import draw_mechanism
from attacks.report.memorized_figures import draw_memorized
from attacks.report.region_figures import draw_regions
from attacks.report.results import MAIN_PAIR, Results, kind
from attacks.report.technique_figures import draw_leaks, draw_use


def draw_all(results: Results) -> dict[str, Picture]:
    """Every figure that the tables allow, by name, in the order of the page.

    chain, heatmap, roc, agreement, vulnerable, supervision, alpha, tasks, memorized, repeats, temperature,
    ranks, coefficients, blocks, chains, chains-tpr, effects, exposure; of each setting regions-<setting>,
    mechanism-<setting>, and where it has several students techniques-<setting> and usefulness-<setting>.  Where there
    are two settings, one for each: heatmap-<setting>; where there are many models or series, several: heatmap-2.
    """
    pictures = {}
    with rc_context(RC):
        drawn = {
            "chain": _chain(results, results.chain, "Who can be recognised?", blind=True),
            **draw_heatmaps(results),
            **{f"techniques-{setting}": draw_leaks(results, setting) for setting in results.techniques},
            **{f"usefulness-{setting}": draw_use(results, setting) for setting in results.techniques},
            "roc": _roc(results),
            **draw_inheritance(results),
            "tasks": _tasks(results),
            **draw_memorized(results),
            **draw_regions(results),
            **draw_mechanism(results),
            **draw_blocks(results),
            **draw_chains(results),
            "effects": draw_effects(results),
            "exposure": draw_exposure(results),
        }
        for name, parts in drawn.items():
            if parts is not None:
                figure, caption, alt = parts
                pictures[name] = Picture(_png(figure), caption, alt)
    return pictures


def _png(figure: Figure) -> bytes:
    """The drawing as a PNG of 256 colours: a quarter of the bytes, and the page must fit into a mail."""
    canvas, file = FigureCanvasAgg(figure), BytesIO()
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    image = image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


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
    figure = titled(WIDTH, height, title, settings, sample)
    axes = panel(figure, NAMES, height - TOP - top, 1.85, top)
    forest(axes, rows, labels, audited)
    left, right = axes.get_xlim()
    axes.set_xlim(max(min(left, 0.48), -0.01), min(max(right, 0.52), 1.01))
    axes.axvline(0.5, zorder=1, **CHANCE)
    axes.text(0.5, -0.55, "chance", ha="center", va="bottom", size=8.5)
    axes.set_xlabel("AUC: share of pairs ranked right")
    if len(use):
        axes = panel(figure, NAMES, 0.5, 1.85, low)
        forest(axes, use, [(m, "") for m in use["model"]], audited)
        axes.set_xlabel("dev loss (nats per token), lower is more useful")
    below = ", and below how useful each model is on unseen records." if len(use) else "; usefulness was not measured."
    numbers = "; ".join(f"{name} {number(r)}" for (name, _), r in zip(labels, rows.itertuples(), strict=True))
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
    figure = titled(WIDTH, height, "ROC curves on logarithmic axes", settings, sample_words(rows))
    axes = panel(figure, 0.85, height - TOP - 3.9, 4.0, 3.9)
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
                  ncols=columns, frameon=False, fontsize=fit(longest, 3.9 / columns, 8.8), handlelength=3,
                  borderaxespad=0)  # fmt: skip
    caption = (
        f"Roles {pair}. Left edge: no false alarm; the next step is one. A curve above the dashed line finds members "
        "better than a coin. One line per seed; intervals stand in the table “Leak by model”."
    )
    return figure, caption, f"ROC curves of {', '.join(names)}, and the chance line; numbers stand in “Leak by model”."


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
    figure = titled(WIDTH, height, "Leak by task", settings, f"{seed_words(rows)}; whiskers: 95 % intervals")
    axes = panel(figure, NAMES, 0.55, WIDTH - NAMES - 0.15, body)
    for t, (task, slices) in enumerate(tables.items()):
        for row in slices.itertuples():
            y = t * group + (models.index(row.model) - (len(models) - 1) / 2) * thick
            axes.barh(y, row.value - 0.5, 0.86 * thick, left=0.5, color=STYLE.get(kind(row.model), NO_STYLE)[0])
            axes.plot([row.ci_low, row.ci_high], [y, y], color="black", lw=1)
        row_name(axes, t * group - 0.08, task, 9.5)
        sizes = f"{spread(slices['n_members'])} / {spread(slices['n_nonmembers'])}"
        row_name(axes, t * group + 0.12, sizes, 8, color=GREY)
        if t:
            axes.axhline((t - 0.5) * group, color=PALE, lw=0.6)
    axes.set_ylim(body - group / 2, -group / 2)
    axes.set_xlim(*limits([0.5, *rows["ci_low"], *rows["ci_high"], *rows["value"]]))
    axes.axvline(0.5, **CHANCE)
    axes.text(0.5, -group / 2 - 0.03, "chance", ha="center", va="bottom", size=8.5)
    axes.set_xlabel("AUC (0.5 is chance)")
    bare(axes)
    names = [tagged(results, m) for m in models]
    patches = [Patch(color=STYLE.get(kind(m), NO_STYLE)[0]) for m in models]
    place = (0.12 / WIDTH, 1 - 0.86 / height)
    figure.legend(patches, names, loc="upper left", bbox_to_anchor=place, ncols=len(names), frameon=False,
                  fontsize=fit("".join(names), WIDTH - 1.7, 9), borderaxespad=0, borderpad=0)  # fmt: skip
    caption = (
        "Bars start at chance and may point to the left. Slices are small: read the whiskers, not the tips. Under each "
        "task: members / non-members."
    )
    return figure, caption, f"AUC by task for {', '.join(names)}; the table by task has the same numbers."
