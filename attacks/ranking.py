"""Which technique leaks more: only from several seeds, within one setting, and ties are said to be ties."""

from attacks.differences import students_of
from attacks.study import Study

LEVEL = 0.05
ONE_SEED = "One seed ranks nothing."


def rankings(study: Study, membership: list[dict], differences: list[dict]) -> list[dict]:
    """One ranking per setting with two students or more, by the primary attack.

    Each has `setting, attack, role_pair, students` (by name, value, ci_low, ci_high; the greatest AUC first), `seeds`,
    `separated` (more, less, difference, ci_low, ci_high, p: after Holm over all pairs), `tied` (pairs), and `words`,
    its sentences.  Where nothing can be ranked, `separated` and `tied` are None and the words say why.
    """
    settings = dict.fromkeys(study.head(run)["setting"] for run in study.students)
    groups = {setting: students_of(study, setting) for setting in settings}
    return [_ranking(study, s, runs, membership, differences) for s, runs in groups.items() if len(runs) > 1]


def _ranking(study: Study, setting: str, runs: list[str], membership: list[dict], differences: list[dict]) -> dict:
    attack = study.settings["primary"]
    role_pair = study.settings["role_pair"]
    if role_pair == "averaged" and not all(study.swap(run) for run in runs):
        role_pair = "private-heldout"
    found = {"setting": setting, "attack": attack, "role_pair": role_pair, "students": [], "seeds": None}
    found |= {"separated": None, "tied": None}
    single = [run for run in runs if len(study.seeds(run)) == 1]
    if single:
        which = "" if len(single) == len(runs) else f" Trained once: {', '.join(single)}."
        return found | {"words": [ONE_SEED + which]}
    at = {"attack": attack, "role_pair": role_pair, "task": "all", "metric": "auc", "seed": "all"}
    leaks = [row for row in membership if row["model"] in runs and at.items() <= row.items() and "reason" not in row]
    gaps = [
        row
        for row in differences
        if at.items() <= row.items() and {row["model_a"], row["model_b"]} <= set(runs) and "reason" not in row
    ]
    if len(gaps) < len(runs) * (len(runs) - 1) // 2:
        return found | {"words": ["No ranking: not all pairs of students could be compared (see what is unresolved)."]}
    students = sorted(leaks, key=lambda row: (-row["value"], row["model"]))
    found["students"] = [{k: row[k] for k in ("model", "value", "ci_low", "ci_high")} for row in students]
    found["seeds"] = min(len(study.seeds(run)) for run in runs)
    found["separated"] = sorted(
        (_ordered(row) for row in gaps if row["p_corrected"] < LEVEL), key=lambda gap: (gap["p"], gap["more"])
    )
    found["tied"] = [[row["model_a"], row["model_b"]] for row in gaps if row["p_corrected"] >= LEVEL]
    return found | {"words": _words(study, found, len(gaps))}


def _ordered(row: dict) -> dict:
    """A difference row with the model that leaks more in front."""
    a, b, sign = row["model_a"], row["model_b"], 1
    ends = row["ci_low"], row["ci_high"]
    if row["difference"] < 0:
        a, b, sign, ends = b, a, -1, ends[::-1]
    low, high = (sign * end for end in ends)
    return {"more": a, "less": b, "difference": sign * row["difference"], "ci_low": low, "ci_high": high} | {
        "p": row["p_corrected"]
    }


def _words(study: Study, found: dict, pairs: int) -> list[str]:
    number = f"{pairs} pair{'s' if pairs > 1 else ''}"
    where = f"{found['setting']} setting, {found['attack']}, {found['role_pair']}, {found['seeds']} seeds"
    how = f"paired over seeds and examples, {number}, p < {LEVEL:g} after Holm"
    said = []
    for more in [each["model"] for each in found["students"]]:
        less = [
            f"{gap['less']} (by {gap['difference']:.3f} [{gap['ci_low']:.3f}, {gap['ci_high']:.3f}])"
            for gap in found["separated"]
            if gap["more"] == more
        ]
        said += [f"{more} leaks more than {_listed(less)}."] if less else []
    if found["tied"]:
        said.append(f"Not separated: {'; '.join(' and '.join(pair) for pair in found['tied'])}.")
    if not found["separated"]:
        said = ["No two techniques are separated: what they differ by, seeds and examples explain."]
    recipes = {study.provenance(each["model"]).get("recipe") for each in found["students"]}
    if recipes != {"matched"}:
        said.append("The students were not all trained by the matched recipe: this ranks runs, not techniques.")
    return [f"Ranking ({where}; {how}): {said[0]}", *said[1:]]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]
