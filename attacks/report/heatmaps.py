"""Pictures of attack x model: AUC with its interval, one heat map for each block of models."""

import numpy as np
from matplotlib.colors import TwoSlopeNorm

from attacks.report.drawing import GREY, WIDTH, Drawing, brief, fit, panel, readable, row_name, sample_words, titled
from attacks.report.every_attack import STAR, Block, Grid, blocks
from attacks.report.results import Results

NAMES, ROW = 1.32, 0.36  # inches: the names of attacks, a row


def draw_heatmaps(results: Results) -> dict[str, Drawing | None]:
    """The attacks of the first pages on all models, by the names of their blocks; one scale of colours for all."""
    found = {block.name: (block, Grid(results, results.first_attacks, block.models)) for block in blocks(results)}
    if results.membership.empty:
        return {}
    values = np.concatenate([grid.rows["value"].to_numpy(float) for _, grid in found.values()])
    reach = max(0.1, np.nanmax(np.abs(values - 0.5))) if np.isfinite(values).any() else 0.1
    return {name: _heatmap(results, block, grid, reach) for name, (block, grid) in found.items()}


def _heatmap(results: Results, block: Block, grid: Grid, reach: float) -> Drawing | None:
    if grid.rows["value"].isna().all():
        return None
    attacks = [a for a in grid.attacks if a in set(grid.rows["attack"])]
    value, low, high, survives = (grid.of(c).loc[attacks] for c in ("value", "ci_low", "ci_high", "survives"))
    one_setting = len({results.settings.get(m, "-") for m in block.models} - {"-"}) < 2
    columns = [brief(m) if one_setting else m for m in block.models]
    down, across = value.shape
    body, foot = ROW * down, 0.2 + 0.058 * max(map(len, columns))
    cell = (WIDTH - NAMES - 0.1) / max(across, 4)
    height = 1.5 + body + foot
    said = f"AUC of each attack; {results.setting_words(block.models)}"
    figure = titled(WIDTH, height, "Attack by model", said, sample_words(grid.rows))
    axes = panel(figure, NAMES, foot, cell * across, body)
    norm = TwoSlopeNorm(0.5, 0.5 - reach, 0.5 + reach)
    image = axes.imshow(value.to_numpy(float), cmap="PuOr_r", norm=norm, aspect="auto")
    axes.set_facecolor("#f2f2f2")
    points = fit("00–00.0", cell, 7.8)
    for i, j in np.ndindex(down, across):
        v, a, b = (t.iat[i, j] for t in (value, low, high))
        if not np.isfinite(v):
            axes.text(j, i, "not run", ha="center", va="center", size=min(points, 7.2), color=GREY)
            continue
        style = {"ha": "center", "va": "center", "color": readable(image.cmap(norm(v)))}
        star = STAR if survives.iat[i, j] == 1 else ""
        axes.text(j, i - 0.17, f"{v:.2f}{star}", size=10, weight="bold" if a > 0.5 or b < 0.5 else "normal", **style)
        axes.text(j, i + 0.25, f"{_short(a)}–{_short(b)}", size=points, **style)
    axes.set_xticks(range(across), columns, rotation=42, ha="right", rotation_mode="anchor", size=9)
    axes.set_yticks([])
    primary = results.headline["attack"]
    for i, name in enumerate(value.index):
        head, _, reference = name.partition(":")
        words = f"{head}:\n{reference}" if reference else head
        row_name(axes, i, words, 8.6, width=NAMES, weight="bold" if name == primary else "normal", linespacing=0.95)
    axes.set_xticks(np.arange(1, across) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, down) - 0.5, minor=True)
    axes.grid(which="minor", color="white", lw=1.2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    scale = panel(figure, NAMES, height - 1.12, cell * across, 0.12)
    bar = figure.colorbar(image, cax=scale, orientation="horizontal")
    bar.set_ticks([0.5 - reach, 0.5, 0.5 + reach], labels=[f"{0.5 - reach:.2f}", "0.50 chance", f"{0.5 + reach:.2f}"])
    bar.ax.tick_params(labelsize=8.5, length=2)
    for tick, side in zip(bar.ax.get_xticklabels(), ("left", "center", "right"), strict=True):
        tick.set_horizontalalignment(side)
    bar.outline.set_visible(False)
    marked = f" {STAR}: p < 0.05 after Holm over the attacks on the same model." if len(results.attacks) else ""
    caption = (
        "AUC with its 95 % interval; the attack named beforehand is in bold. A bold number: its own interval excludes "
        f"0.5, as a few of so many do by chance.{marked} No value is flipped or cut at 0.5."
    )
    best = ", ".join(f"{m} {value[m].max():.3f} by {value[m].idxmax()}" for m in block.models if value[m].notna().any())
    return figure, caption, f"Heat map of AUC by attack and model. Greatest: {best}. The table has the same numbers."


def _short(x: float) -> str:
    return "?" if not np.isfinite(x) else f"{x:.2f}".removeprefix("0")
