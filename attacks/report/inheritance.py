"""Teacher and student on the same records: who is flagged on both, what the flagged show, and the sweep over alpha."""

import numpy as np
import pandas as pd

from attacks.report.drawing import Picture
from attacks.report.markup import Html, figure, folded, join, measured, p_value, table, tag
from attacks.report.results import Results, in_order, pooled

RULES = {
    "balanced_accuracy": "threshold of best balanced accuracy on the calibration records",
    "fpr_0.05": "threshold that calls at most 5 % of the calibration non-members",
    "reference": "rule of the published code, fitted on the records it judges: too good, for comparison only",
}
RULE = "balanced_accuracy"
CELLS = {"both": "both", "teacher": "teacher only", "student": "student only", "none": "neither"}
AGREEMENT = (
    "The same attack on a teacher and on its student, on the same records. The matrices count who is called a member "
    "on both, on one, on neither. Member-specific success is the share of members called (TPR). Vulnerable are the "
    "members called on the teacher: does the student leak those, or others? What teacher and null, a student without "
    "that teacher, have in common, is in the records and was not inherited."
)
SUPERVISION = (
    "Do teacher and label pull the student the same way where the teacher is vulnerable? Read the matched difference: "
    "vulnerable members against non-members on which the teacher has the same likelihood. The plain difference is "
    "large by construction (†) where the groups were made from the same log-probabilities."
)
MEASURES = {
    "gradient_cosine": "Cosine of the gradients of label and teacher",
    "top1_agrees": "Student's and teacher's top token agree (share)",
    "kl": "KL(teacher ‖ student), nats per token",
    "student_confidence": "Student's greatest probability",
    "confidence_gain": "That probability, less that of its start",
    "student_entropy": "Student's entropy (nats)",
    "teacher_agrees": "Teacher's top token is the label (share)",
    "teacher_p": "Teacher's probability of the label",
    "teacher_nll": "Teacher's loss on the label (nats)",
}
SHOWN = ("gradient_cosine", "top1_agrees", "kl", "student_confidence", "confidence_gain")
MATCHED, CONTRAST = "vulnerable-matched_non_member", "vulnerable-non_vulnerable"
GROUPS = {"vulnerable": "Vulnerable", "non_vulnerable": "Non-vulnerable", "non_member": "Non-members"}
ALPHA = "Students that differ in alpha alone, the weight of the teacher in their loss (1 - alpha: that of the labels)."
ALPHA_MEASURES = {"auc": "AUC", "tpr_student": "Members called (TPR)"} | {m: MEASURES[m] for m in MEASURES}


def students_of(results: Results, frame: pd.DataFrame) -> list[str]:
    """Students in the order of the story, null first."""
    return in_order(frame["student"]) if len(frame) else []


def about(frame: pd.DataFrame, **wanted) -> pd.DataFrame:
    """The rows that have these values."""
    for column, value in wanted.items():
        frame = frame[frame[column] == value]
    return frame


def mean_row(rows: pd.DataFrame) -> tuple[float, float, float]:
    """(value, low, high): of one row its interval, of the rows of several seeds their mean, least and greatest."""
    if rows.empty:
        return (np.nan,) * 3
    if len(rows) == 1:
        return tuple(rows.iloc[0][["value", "ci_low", "ci_high"]])
    return rows["value"].mean(), rows["value"].min(), rows["value"].max()


def seeds_words(rows: pd.DataFrame) -> str:
    """What the numbers of `mean_row` are."""
    several = rows["seed"].nunique() > 1 or "all" in set(rows["seed"])
    return "mean over seeds, least to greatest of them" if several else "95 % interval over records"


# --- agreement -------------------------------------------------------------------------------------------------------


def agreement_section(results: Results, pictures: dict[str, Picture]) -> Html:
    """Pictures and table of the primary attack; other thresholds and attacks folded."""
    a = results.agreement
    if a.empty:
        return Html("")
    head = results.headline["attack"]
    others = [x for x in results.first_attacks if x != head and x in set(a["attack"])]
    shown = head if head in set(a["attack"]) else next(iter(others), "")
    parts = [tag("p", AGREEMENT)]
    parts += [figure(p) for name, p in pictures.items() if name.startswith(("agreement", "vulnerable"))]
    parts += [_success(results, about(a, attack=shown, rule=RULE))]
    parts += [
        folded(f"By another {words.partition(' ')[0]}: {words}", _success(results, about(a, attack=shown, rule=rule)))
        for rule, words in RULES.items()
        if rule != RULE and len(about(a, attack=shown, rule=rule))
    ]
    if rest := [x for x in others if x != shown]:
        tables = (_success(results, about(a, attack=x, rule=RULE)) for x in rest)
        parts.append(folded("The other attacks of the first pages", join(*tables)))
    return join(*parts)


def _success(results: Results, frame: pd.DataFrame) -> Html:
    """One table per setting of one attack and rule: a row for each student and its teacher."""
    return join(
        *(_success_table(results, own, said) for said, own in results.apart(frame.assign(model=frame["student"])))
    )


def _success_table(results: Results, frame: pd.DataFrame, said: str) -> Html:
    whole, rows = pooled(frame), []
    for student in students_of(results, frame):
        one = about(whole, student=student)
        by = {measure: own for measure, own in one.groupby("measure")}
        numbers = lambda name: mean_row(by[name]) if name in by else (np.nan,) * 3  # noqa: B023
        members = one[one["class"] == "members"]
        cells = {words: mean_row(about(members, measure=f"flagged_{cell}"))[0] for cell, words in CELLS.items()}
        gap = by.get("tpr_difference")
        kinds = {cls: about(one, measure="auc_student", **{"class": cls}) for cls in ("vulnerable", "non_vulnerable")}
        rows.append({
            "Student": student, "Teacher": one["teacher"].iloc[0],
            "TPR on the teacher": measured(*numbers("tpr_teacher")),
            "TPR on the student": measured(*numbers("tpr_student")),
            "Student − teacher": measured(*numbers("tpr_difference")),
            "p (Holm)": p_value(gap["p_corrected"].iloc[0]) if gap is not None and len(gap) == 1 else "–",
            "FPR on teacher / student": " / ".join(f"{1 - numbers(f'tnr_{m}')[0]:.3f}" for m in ("teacher", "student")),
            "Members called on both / teacher / student / neither":
                " / ".join(f"{100 * share:.0f}" for share in cells.values()) + " %",
            **{f"Student's AUC of the {words}": measured(*mean_row(kinds[cls])) if len(kinds[cls]) else "–"
               for cls, words in (("vulnerable", "vulnerable"), ("non_vulnerable", "others"))},
            "Seed": ", ".join(dict.fromkeys(by["tpr_student"]["seed"])) if "tpr_student" in by else "–",
        })  # fmt: skip
    attack, rule = frame["attack"].iloc[0], frame["rule"].iloc[0]
    seeds = frame["seed"].nunique() > 1
    grouped = (results.summary.get("groups") or {}).get("applicable")  # then nothing is counted record by record
    unit = "groups of records" if grouped else "records"
    test = f"t over seeds and {unit}" if seeds else f"t over {unit}" if grouped else "McNemar, exact"
    caption = (
        f"{said}Attack: {attack}; {RULES.get(rule, rule)}. 95 % intervals; p: {test}, after "
        "Holm over the attacks and students of the setting. "
        f"AUC of vulnerable members and of the others against all non-members: {seeds_words(frame)}."
    )
    return table(rows, caption, results.headline["model"])


# --- mixed supervision -----------------------------------------------------------------------------------------------


def supervision_section(results: Results, pictures: dict[str, Picture]) -> Html:
    """The picture, and a table by measure and student of the primary attack; the rest folded."""
    s = results.supervision
    if s.empty:
        return Html("")
    head = results.headline["attack"]
    attacks = [x for x in results.first_attacks if x in set(s["attack"])]
    shown = head if head in attacks else next(iter(attacks), "")
    own = about(s, attack=shown)
    parts = [tag("p", SUPERVISION)]
    parts += [tag("p", u["reason"].capitalize() + ".") for u in _without(results)]
    parts += [figure(p) for name, p in pictures.items() if name.startswith("supervision")]
    parts += [_measure_tables(results, own, [m for m in MEASURES if m in SHOWN])]
    rest = [m for m in MEASURES if m not in SHOWN]
    if own["measure"].isin(rest).any():
        parts.append(folded("Entropy and what is measured on the teacher", _measure_tables(results, own, rest)))
    if others := [x for x in attacks if x != shown]:
        tables = (_measure_tables(results, about(s, attack=x), list(SHOWN)) for x in others)
        parts.append(folded("Groups by the other attacks of the first pages", join(*tables)))
    if len(every := about(s, attack="-")):
        parts.append(folded("All members against all non-members", _members(results, every)))
    return join(*parts)


def _without(results: Results) -> list[dict]:
    return [u for u in results.summary.get("unresolved") or [] if u.get("metric") == "gradient_cosine"]


def _measure_tables(results: Results, frame: pd.DataFrame, measures: list[str]) -> Html:
    frame = pooled(frame[frame["measure"].isin(measures)])
    tables = results.apart(frame.assign(model=frame["student"]))
    return join(*(_measure_table(results, own, said, measures) for said, own in tables))


def _measure_table(results: Results, frame: pd.DataFrame, said: str, measures: list[str]) -> Html:
    rows = []
    for measure in measures:
        for student in students_of(results, about(frame, measure=measure)):
            by = {row.group: row for row in about(frame, measure=measure, student=student).itertuples()}
            matched, contrast = by.get(MATCHED), by.get(CONTRAST)
            rows.append({
                "Measure": MEASURES[measure], "Student": student,
                "Vulnerable − matched non-members": _effect(matched),
                "p (Holm)": p_value(matched.p_corrected) if matched else "–",
                "Vulnerable − non-vulnerable": _effect(contrast),
                **{words: _effect(by.get(group)) for group, words in GROUPS.items()},
                "n": " / ".join(f"{by[g].n:,.0f}" if g in by else "?" for g in GROUPS),
                "Seed": next(iter(by.values())).seed,
            })  # fmt: skip
    attack = frame["attack"].iloc[0]
    caption = (
        f"{said}Groups by {attack} on the teacher. Means over records of means over response tokens; 95 % intervals; p "
        "after Holm over the attacks and students of the setting, measure by measure. n: records that are in the group "
        "in any seed. † different by construction."
    )
    return table(rows, caption)


def _effect(row) -> Html | str:
    if row is None:
        return "–"
    return join(measured(row.value, row.ci_low, row.ci_high), " †" if row.by_construction == "yes" else "")


def _members(results: Results, frame: pd.DataFrame) -> Html:
    rows = []
    for measure in MEASURES:
        own = pooled(about(frame, measure=measure))
        for student in students_of(results, own):
            by = {row.group: row for row in about(own, student=student).itertuples()}
            gap = by.get("member-non_member")
            rows.append({
                "Measure": MEASURES[measure], "Student": student, "Members − non-members": _effect(gap),
                "p (Holm)": p_value(gap.p_corrected) if gap else "–",
                "Members": _effect(by.get("member")), "Non-members": _effect(by.get("non_member")),
                "Seed": next(iter(by.values())).seed,
            })  # fmt: skip
    return table(rows, "Whatever an attack says: the role alone. 95 % intervals; p after Holm over the students.")


# --- the weight of the teacher ---------------------------------------------------------------------------------------


def alpha_section(results: Results, pictures: dict[str, Picture]) -> Html:
    """Pictures and one table of what alpha does to leak and supervision; nothing without such a series."""
    a = pooled(results.alpha)
    a = a[a["attack"] == results.headline["attack"]]
    if a.empty:
        return Html("")
    rows = []
    several = a["series"].max() > 1  # of one technique, told apart by their number
    for keys, own in a.groupby(["setting", "technique", "series", "measure", "group"], sort=False):
        setting, technique, series, measure, group = keys
        points = {
            f"alpha {x:g}": measured(*mean_row(at)) for x, at in sorted(own.groupby("alpha"), key=lambda part: part[0])
        }
        rows.append({
            "Measure": ALPHA_MEASURES.get(measure, measure), "Group": GROUPS.get(group, group), "Setting": setting,
            "Technique": technique, **({"Series": f"{series:g}"} if several else {}), **points,
            "Seed": spread_seeds(own),
        })  # fmt: skip
    columns = dict.fromkeys(key for row in rows for key in row)
    rows = [{c: row.get(c, "–") for c in columns} for row in rows]
    drawn = [figure(p) for name, p in pictures.items() if name.startswith("alpha")]
    return join(tag("p", ALPHA), *drawn, folded("Table by alpha", table(rows, f"Attack: {a['attack'].iloc[0]}.")))


def spread_seeds(frame: pd.DataFrame) -> str:
    return ", ".join(dict.fromkeys(frame["seed"]))
