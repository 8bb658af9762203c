"""At which block of a model members show: curves over blocks, and tests that they differ."""

import pandas as pd

from attacks.blocks import SAID
from attacks.report.drawing import Picture
from attacks.report.markup import (
    Html,
    counted,
    figure,
    finite,
    folded,
    join,
    listed,
    model_tables,
    p_value,
    short_measured,
    signed,
    tag,
    text,
)
from attacks.report.results import Results, in_order, pooled

ALL, NULL = "all", "null"
FORMS = {  # in pairs that stand side by side
    "noise_absolute": "Noise of one size",
    "noise_relative": "Noise relative to the weights",
    "swap": "Block exchanged for its base's",
    "swap_back": "Block put into the base",
    "lens": "Log-prob read after the block",
    "lens_shift": "The same, less the base's",
    "gradient": "Gradient of the block's weights",
}
NOTE = (
    "The score of a record is what changes when one block alone is noised, exchanged for that of the checkpoint the "
    "model started from, or read out (logit lens), or how large the gradient of its weights is; the AUC of members "
    "against non-members by that score is the block's risk. Noise on a block says how sharply the loss depends on it, "
    "not that it holds the members: on a planted model, one block of which was trained on members, all blocks were "
    "sharp, and only “block put into the base” singled that one out. Noise of one size also measures how large a "
    "block's weights are, and every form how much the block matters for any text: read a curve beside the noise of "
    "relative size and beside null, the same student without a teacher."
)
CAPTION = (
    "The block that shows most, and the p-value that all blocks have one AUC, or one difference to null (Holm over all "
    "curves). The greatest of many AUCs is above the others by chance: without a small p it says nothing. “Above "
    "null”: blocks whose difference to null survives Holm over the blocks. Rank correlations are of two models' curves."
)


def blocks_section(results: Results, pictures: dict[str, Picture]) -> Html:
    """Curves, what is said of each, the whole model at once, every block; nothing without blocks.csv."""
    b = pooled(results.blocks)
    if b.empty:
        return Html("")
    words = (results.summary.get("blocks") or {}).get("words") or []
    told = (f"{results.headline['model']}, {SAID[form]}" for form in ("swap_back", "noise_absolute", "noise_relative"))
    own = [w for start in told for w in words if w.startswith(start)]
    parts = [tag("p", NOTE), listed(own) if own else Html("")]
    parts += [figure(picture) for name, picture in pictures.items() if name.startswith("blocks")]
    parts += [model_tables(results, _curve_rows(results, b), CAPTION)]
    parts += [model_tables(results, _whole_rows(b), "All weights at once. AUC with its 95 % interval.")]
    parts += [folded("Every block", model_tables(results, _every_row(b), "AUC with its 95 % interval."))]
    return join(*parts)


def block_name(block: str) -> str:
    """`embedding`, `head`, or the number of the layer, counted from 1."""
    return str(int(block) + 1) if block.isdigit() else block


def form_words(form: str, rows: pd.DataFrame) -> str:
    """The form with the size of its noise: `Noise of one size, σ = 0.01`, `Noise of 5 % of the weights' RMS`."""
    sizes = sorted(set(rows["sigma"].dropna()))
    if form == "noise_absolute" and sizes:
        return f"{FORMS[form]}, σ = {' or '.join(f'{s:g}' for s in sizes)}"
    if form == "noise_relative" and sizes:
        return f"Noise of {' or '.join(f'{100 * s:g}' for s in sizes)} % of the weights' RMS"
    return FORMS[form]


def curve(frame: pd.DataFrame, model: str, form: str, metric: str = "auc") -> pd.DataFrame:
    """The rows of one curve, in the order of the blocks."""
    own = frame[(frame["model"] == model) & (frame["form"] == form) & (frame["metric"] == metric)]
    return own[own["block"] != ALL]


def _of_profile(frame: pd.DataFrame, model: str, form: str, metric: str) -> pd.Series | None:
    own = frame[(frame["model"] == model) & (frame["form"] == form) & (frame["block"] == ALL)]
    own = own[own["metric"] == metric]
    return own.iloc[0] if len(own) else None


def _curve_rows(results: Results, frame: pd.DataFrame) -> dict[str, list[dict]]:
    """By model, a row for each form."""
    rows: dict[str, list[dict]] = {}
    for model in (m for m in in_order(frame["model"]) if not m.startswith("base_")):
        for form in FORMS:
            own = curve(frame, model, form).dropna(subset="value")
            if own.empty:
                continue
            top = own.loc[own["value"].idxmax()]
            less = curve(frame, model, form, "auc_less_null")
            less = less[less["block"] == top["block"]]
            of = {name: _of_profile(frame, model, form, name)
                  for name in ("auc_range", "auc_range_less_null", "share_above_null")}  # fmt: skip
            ranks = frame[(frame["model"] == model) & (frame["form"] == form)]
            ranks = ranks[ranks["metric"].str.startswith("spearman:") & ranks["value"].notna()]
            rows.setdefault(model, []).append({
                "Model": model, "Form": form_words(form, own), "Shows most": block_name(top["block"]),
                "Its AUC": short_measured(*top[["value", "ci_low", "ci_high"]]),
                "Less null": short_measured(*less.iloc[0][["value", "ci_low", "ci_high"]]) if len(less) else text("–"),
                "Above null": _share(of["share_above_null"], len(own)),
                "p: blocks equal": _p(of["auc_range"]), "p: differences equal": _p(of["auc_range_less_null"]),
                "Rank correlation": join(*(
                    tag("span", join(f"{r.metric.partition(':')[2]} ", short_measured(r.value, r.ci_low, r.ci_high)),
                        css="line") for r in ranks.itertuples()), separator=" ") if len(ranks) else text("–"),
                "Members / non-members": counted(top["n_members"], top["n_nonmembers"]), "Seed": top["seed"],
            })  # fmt: skip
    return rows


def _p(row: pd.Series | None) -> str:
    return p_value(row["p_corrected"]) if row is not None else "–"


def _share(row: pd.Series | None, blocks: int) -> str:
    return f"{round(row['value'] * blocks)} of {blocks}" if row is not None and finite(row["value"]) else "–"


def _whole_rows(frame: pd.DataFrame) -> dict[str, list[dict]]:
    """By model one row, a column for each attack on the whole model."""
    whole = frame[(frame["block"] == ALL) & (frame["metric"] == "auc")]
    rows = {}
    for model in in_order(whole["model"]):
        own = whole[whole["model"] == model].drop_duplicates("attack").set_index("attack")
        cells = {attack: short_measured(*own.loc[attack, ["value", "ci_low", "ci_high"]]) if attack in own.index else
                 text("–") for attack in whole["attack"].unique()}  # fmt: skip
        first = own.iloc[0]
        n = counted(first["n_members"], first["n_nonmembers"])
        rows[model] = [{"Model": model, **cells, "Members / non-members": n, "Seed": first["seed"]}]
    return rows


def _every_row(frame: pd.DataFrame) -> dict[str, list[dict]]:
    """By model a row for each block, a column for each form."""
    rows: dict[str, list[dict]] = {}
    present = [form for form in FORMS if form in set(frame["form"])]
    for model in in_order(frame["model"]):
        curves = {form: curve(frame, model, form).drop_duplicates("block").set_index("block") for form in present}
        names = max((list(own.index) for own in curves.values()), key=len)
        rows[model] = [
            {"Model": model, "Block": block_name(name)}
            | {FORMS[form]: short_measured(*own.loc[name, ["value", "ci_low", "ci_high"]]) if name in own.index else
               text("–") for form, own in curves.items()}
            for name in names
        ]  # fmt: skip
    return {model: own for model, own in rows.items() if own}


def curve_words(own: pd.DataFrame) -> str:
    """`embedding 0.51, 1 0.55, head 0.50`, for who cannot see the picture."""
    return ", ".join(f"{block_name(r.block)} {signed(r.value, 2)}" for r in own.itertuples())
