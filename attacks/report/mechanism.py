"""Why a text is memorized: entropy beside the probability of the true tokens, and how far student and teacher are."""

import pandas as pd

from attacks.inheritance import REGIONS
from attacks.report.drawing import Picture
from attacks.report.inherited import region_words
from attacks.report.markup import Html, figure, finite, folded, join, short_measured, table, tag, text
from attacks.report.named_measures import ROLES, heading, main_cut, named, parse, settings_in, share, triple
from attacks.report.results import Results, in_order, pooled

NOTE = (
    "Two ways to memorize. Natural: the model is sure (low entropy) and right (log-probability near 0). Forced: it is "
    "unsure, and still gives the true tokens a high probability, as one-hot labels make it. A student that stays flat "
    "where it cannot follow its teacher is unsure and gives them a low one. Groups: T teacher, B direct, S student "
    "have the text. This is correlation."
)
MEASURES = {"entropy": "Entropy (nats per token)", "log_p": "Log-probability of the cut (nats)"}
LESS = "_less_teacher"
DIVERGENCES = {
    "kl_teacher_student": "KL(teacher ‖ student)",
    "kl_student_teacher": "KL(student ‖ teacher)",
}
GROUPS = ("all", *REGIONS)
KL_NOTE = (
    "Is the student closer to its teacher on the records that the teacher was trained on? Nats per response token; a "
    "gap that holds 0 shows nothing."
)


def mechanism_section(results: Results, pictures: dict[str, Picture]) -> Html:
    """Pictures, means by group, KL on members and non-members, the sweep over T; nothing without mechanism.csv."""
    m = pooled(results.mechanism)
    if m.empty:
        return Html("")
    parts, cut = [tag("p", NOTE)], main_cut(results)
    for setting in settings_in(m):
        own = m[m["setting"].isin([setting]) | m["student"].isin(m.loc[m["setting"] == setting, "student"])]
        parts += [figure(p) for name, p in pictures.items() if name.startswith(f"mechanism-{setting}")]
        groups = {
            role: _group_table(results, own[own["role"] == role], setting, cut) for role in ("private", "heldout")
        }
        parts += [folded("Means by group", groups["private"])] if groups["private"] else []
        if groups["heldout"]:
            parts += [folded("The same groups of held-out records: predictable text", groups["heldout"])]
        parts += [_divergences(results, own, setting), _sweep(results, own, setting)]
    return join(*parts)


def _group_table(results: Results, frame: pd.DataFrame, setting: str, cut: str) -> Html:
    """A row for each student, group and model."""
    of = {key: named(frame, key, cut) for name in MEASURES for key in (name, name + LESS)}
    base = of["entropy"]
    rows = []
    for student in in_order(base["student"]):
        for group in (g for g in GROUPS if (base.loc[base["student"] == student, "group"] == g).any()):
            mine = base[(base["student"] == student) & (base["group"] == group)]
            for model in reversed(in_order(mine["model"])):
                here = {key: _at(rows_of, student, group, model) for key, rows_of in of.items()}
                rows.append({
                    "Student": student, "Group": region_words(group), "Model": model,
                    **{words: _number(here[name]) for name, words in MEASURES.items()},
                    **{f"{words.split(' (')[0]} less the teacher's": _number(here[name + LESS])
                       for name, words in MEASURES.items()},
                    "n": _n(here["entropy"]), "Seed": ", ".join(dict.fromkeys(here["entropy"]["seed"])),
                })  # fmt: skip
    caption = f"{heading(setting)}Cut: {cut}. Means over the texts of a group, 95 % intervals."
    return table(rows, caption, results.headline["model"])


def _at(frame: pd.DataFrame, student: str, group: str, model: str) -> pd.DataFrame:
    return frame[(frame["student"] == student) & (frame["group"] == group) & (frame["model"] == model)]


def _number(rows: pd.DataFrame) -> Html:
    return short_measured(*triple(rows)) if len(rows) else text("–")


def _n(rows: pd.DataFrame) -> str:
    return " / ".join(dict.fromkeys(f"{n:,.0f}" for n in rows["n"] if finite(n))) or "–"


def _divergences(results: Results, frame: pd.DataFrame, setting: str) -> Html:
    rows = []
    for measure, words in DIVERGENCES.items():
        own = frame[frame["measure"] == measure]
        for student in in_order(own["student"]):
            by = {role: own[(own["student"] == student) & (own["role"] == role)] for role in ROLES}
            rows.append({
                "Student": student, "Divergence": words,
                **{name.capitalize(): _number(by[role]) for role, name in ROLES.items()},
                "n": " / ".join(_n(by[role]) for role in ("private", "heldout")),
                "Seed": ", ".join(dict.fromkeys(own.loc[own["student"] == student, "seed"])),
            })  # fmt: skip
    if not rows:
        return Html("")
    caption = f"{heading(setting)}Nats per token, means over records, 95 % intervals."
    return join(
        tag("h3", "Distance to the teacher"), tag("p", KL_NOTE), table(rows, caption, results.headline["model"])
    )


def _sweep(results: Results, frame: pd.DataFrame, setting: str) -> Html:
    """Share extracted by students that differ in the temperature alone."""
    own = named(frame, "extracted_by_temperature")
    own = own.assign(T=own["group"].str.removeprefix("T=").astype(float)).sort_values("T", kind="stable")
    rows = []
    for (student, group), mine in own.groupby(["student", "group"], sort=False):
        by = {role: mine[mine["role"] == role] for role in ("private", "heldout")}
        rows.append({
            "T": group.removeprefix("T=") + (" (control)" if group == "T=1" else ""), "Student": student,
            "Technique": mine["technique"].iloc[0],
            **{f"Extracted: {ROLES[role]}": share(*triple(r)) if len(r) else text("–") for role, r in by.items()},
            "n": " / ".join(_n(r) for r in by.values()), "Cut": parse(mine["measure"].iloc[0]).cut,
            "Seed": ", ".join(dict.fromkeys(mine["seed"])),
        })  # fmt: skip
    return (
        join(tag("h3", "By the temperature of distillation"), table(rows, heading(setting) + "95 % intervals."))
        if rows
        else Html("")
    )
