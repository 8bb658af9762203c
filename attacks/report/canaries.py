"""Canaries: invented records with a known secret. Their exposure, and three of them word for word."""

import pandas as pd

from attacks.report.drawing import Picture
from attacks.report.markup import NBSP, Html, figure, folded, join, model_tables, p_value, signed, table, tag
from attacks.report.results import Results, in_order, kind

CANARY_RULE = (
    "Chosen without a look at the models: canaries that were put into the private data alone come first; of each "
    "number of repeats the one whose id, a hash of its content, sorts first; then by id, up to three."
)
EXPOSURE = (
    "Exposure: how far up the model ranks an inserted secret among those of its kind that nobody inserted, in bits. "
    "A model that never met it shows about 1.4 on average; log2 of the number of strangers is the greatest that ranks "
    "can show. Extrapolated: from a skew-normal fitted to the strangers, which may exceed that; not to be believed "
    "where the fit's p-value is small. The teacher's data are also those of direct and of a student of the shared "
    "setting; null has those of a student of the disjoint setting."
)
PLACES = {
    "teacher_only": "in the teacher's data only",
    "student_only": "in the student's data only",
    "both": "in the data of both",
    "neither": "in the data of neither",
}
SHARED = {"teacher_only": "both", "student_only": "neither"}  # where the student's data are its teacher's


def exposure_section(results: Results, pictures: dict[str, Picture]) -> Html:
    """Mean exposure by repeats and placement; nothing where no canary was scored."""
    if results.exposure.empty:
        return Html("")
    rows: dict[str, list[dict]] = {}
    for key, own in cells(results.exposure, results):
        rows.setdefault(key[0], []).append(_exposure_row(results, key, own))
    whole = model_tables(results, rows, "Mean over canaries, of each over its seeds, ± its standard error.")
    return join(
        tag("p", EXPOSURE), figure(pictures.get("exposure")),
        folded("Table of exposure", whole),
    )  # fmt: skip


def cells(frame: pd.DataFrame, results: Results) -> list[tuple[tuple[str, str, int], pd.DataFrame]]:
    """((model, placement, repeats), its canaries), in the order of the story."""
    order = {m: i for i, m in enumerate(in_order(results.models))}
    places = {p: i for i, p in enumerate(PLACES)}
    groups = list(placed(frame, results).groupby(["model", "placement", "repeats"], sort=False))
    return sorted(groups, key=lambda g: (order.get(g[0][0], 0), places.get(g[0][1], len(places)), g[0][2]))


def placed(frame: pd.DataFrame, results: Results) -> pd.DataFrame:
    """Rows of exposure whose placement says who met the canary, in either setting."""
    shared = [m for m in set(frame["model"]) if kind(m) == "student" and results.settings.get(m) == "shared"]
    renamed = frame["placement"].replace(SHARED)
    return frame.assign(placement=frame["placement"].where(~frame["model"].isin(shared), renamed))


def _exposure_row(results: Results, key: tuple[str, str, int], own: pd.DataFrame) -> dict:
    model, placement, repeats = key
    fits, each = own["fit_p"].dropna(), own.groupby("example_id")[["exposure", "extrapolated"]].mean()
    return {
        "Model": model, "Setting": results.settings.get(model, "-"),
        "Placement": PLACES.get(placement, placement), "Repeats": f"{repeats:g}",
        "Exposure (bits)": _mean(each["exposure"]), "Extrapolated (bits)": _mean(each["extrapolated"].dropna()),
        "p of the fit": p_value(fits.min()) if len(fits) else "–",
        "Canaries": f"{len(each)}", "Strangers": f"{own['n_references'].min():.0f}",
        "Seed": ", ".join(sorted(own["seed"].unique())),
    }  # fmt: skip


def _mean(values: pd.Series) -> str:
    if values.empty:
        return "–"
    error = f"{NBSP}±{NBSP}{signed(values.std(ddof=1) / len(values) ** 0.5, 2)}" if len(values) > 1 else ""
    return signed(values.mean(), 2) + error


# --- word for word ---------------------------------------------------------------------------------------------------


def canary_texts(results: Results, show: bool) -> Html:
    """Three canaries and what the models make of them, where they are asked for."""
    canaries = results.summary.get("canaries") or []
    if not canaries:
        return Html("")
    if not show:
        return tag("p", "Their texts are not shown (show_canaries is off).")
    head = [tag("h3", "Three canaries, word for word"), tag("p", f"Invented records. {CANARY_RULE}")]
    return join(*head, *(_canary(results, c) for c in choose_canaries(canaries)))


def choose_canaries(canaries: list[dict]) -> list[dict]:
    """At most three canaries by CANARY_RULE, in the order of their repeats. Looks at no model's answer."""
    inside = [c for c in canaries if c.get("coin") == 1 and c.get("placement") == "teacher_only"]
    chosen: dict[str, dict] = {}
    for pool in (inside, canaries):
        pool = sorted(pool, key=lambda c: c["example_id"])
        first_of = {c["repeats"]: c for c in reversed(pool)}
        chosen |= {c["example_id"]: c for c in [*(first_of[r] for r in sorted(first_of)), *pool]} | chosen
    return sorted(list(chosen.values())[:3], key=lambda c: (c["repeats"], c["example_id"]))


def _canary(results: Results, canary: dict) -> Html:
    """One canary, and what teacher, student and null make of it."""
    truth, answers = canary["response"].strip(), canary.get("models") or {}
    rows = [{
        "Model": model, "Setting": results.settings.get(model, "-"),
        "Most probable token at each position of the true answer": answers[model]["guess"],
        "Exact": "yes" if answers[model]["guess"].strip() == truth else "no",
        "Mean log-probability of the true answer (nats per token)": signed(answers[model].get("mean_logp")) or "–",
    } for model in ("teacher", results.headline["model"], "null") if model in answers]  # fmt: skip
    times = f"{canary['repeats']} repeat{'s' if canary['repeats'] != 1 else ''}"
    place = canary["placement"]
    if results.settings.get(results.headline["model"]) == "shared":
        place = SHARED.get(place, place)
    inside = canary.get("coin") == 1 and place != "none"
    where = f"{times}, {PLACES.get(place, place) if inside else 'in no data'}"
    said = join(tag("b", "Prompt:"), f" {canary['prompt']}\n", tag("b", "True answer:"), f" {truth}")
    return join(tag("h3", where), tag("p", said, css="plain"), table(rows) if rows else "")
