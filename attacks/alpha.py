"""Students that differ in the weight of the teacher alone, in its order: is mixed supervision the cause (cui2026, C5)?

alpha is `objectives.<name>.kd_ratio`: the share of the divergence, 1 - alpha that of the cross entropy on the labels.
"""

import json

from attacks.study import Study

COLUMNS = "teacher setting technique series alpha student attack measure group value ci_low ci_high seed"
SAME = ("recipe", "init", "train_roles")  # of two students in a series, beside all of their objective but kd_ratio
FROM_MEMBERSHIP = {"role_pair": "private-heldout", "task": "all", "metric": "auc"}
FROM_AGREEMENT = {"rule": "balanced_accuracy", "measure": "tpr_student"}
FROM_SUPERVISION = ("gradient_cosine", "student_confidence", "confidence_gain")


def alpha(study: Study, run: str) -> float | None:
    """The weight of the teacher in a run's loss; None where its tables do not tell its objective."""
    objective = study.provenance(run).get("objective")
    # what is at its default is not listed, and of this key that is 1
    return None if objective is None else float(objective.get("kd_ratio", 1.0))


def series(study: Study) -> dict[tuple[str, str, str, int], list[str]]:
    """Students that differ in alpha alone, in its order; only where there are two values or more.

    By (teacher, setting, technique, number): several series of one technique differ in what else they were told (a
    temperature, the recipe, the start, the data), and are counted from 1.
    """
    found: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for run in study.students:
        if alpha(study, run) is not None:
            told, head = study.provenance(run), study.head(run)
            same = [{key: x for key, x in told["objective"].items() if key != "kd_ratio"}, *map(told.get, SAME)]
            key = (told.get("teacher") or "", head["setting"], head["technique"])
            found.setdefault(key, {}).setdefault(json.dumps(same, sort_keys=True), []).append(run)
    ordered = {}
    for key, apart in found.items():
        several = [runs for runs in apart.values() if len({alpha(study, run) for run in runs}) > 1]
        for number, runs in enumerate(several, 1):
            ordered[*key, number] = sorted(runs, key=lambda run: (alpha(study, run), run))
    return ordered


def curve(study: Study, membership: list[dict], agreement: list[dict], supervision: list[dict]) -> list[dict]:
    """AUC, member-specific success, gradient cosine and confidence against alpha, from the rows of the three tables.

    Sorted by series, attack, measure, group, seed, alpha; empty where no two students differ in alpha.
    """
    rows = []
    for (teacher, setting, technique, number), runs in series(study).items():
        for run in runs:
            head = {"teacher": teacher, "setting": setting, "technique": technique, "series": number}
            head |= {"alpha": alpha(study, run), "student": run}
            for row in membership:
                if row["model"] == run and FROM_MEMBERSHIP.items() <= row.items():
                    rows.append(head | _point(row, "auc", "members"))
            for row in (r for r in agreement if r.get("student") == run and r.get("teacher") == teacher):
                if FROM_AGREEMENT.items() <= row.items():
                    rows.append(head | _point(row, "tpr_student", "members"))
            for row in (r for r in supervision if r.get("student") == run and r.get("teacher") == teacher):
                if row["measure"] in FROM_SUPERVISION and "-" not in row.get("group", "-"):
                    rows.append(head | _point(row, row["measure"], row["group"]))
    keys = ("teacher", "setting", "technique", "series", "attack", "measure", "group", "seed", "alpha", "student")
    return sorted((row for row in rows if row["value"] is not None), key=lambda row: [str(row[k]) for k in keys])


def _point(row: dict, measure: str, group: str) -> dict:
    numbers = {key: row.get(key) for key in ("value", "ci_low", "ci_high")}
    return {"attack": row["attack"], "measure": measure, "group": group, "seed": row["seed"]} | numbers
