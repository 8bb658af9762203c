"""Students that differ in the weight of the teacher alone, in its order: is mixed supervision the cause (cui2026, C5)?

alpha is `objectives.<name>.kd_ratio`: the share of the divergence, 1 - alpha that of the cross entropy on the labels.
"""

from attacks.study import Study

COLUMNS = "teacher setting technique alpha student attack measure group value ci_low ci_high seed"
FROM_MEMBERSHIP = {"role_pair": "private-heldout", "task": "all", "metric": "auc"}
FROM_AGREEMENT = {"rule": "balanced_accuracy", "measure": "tpr_student"}
FROM_SUPERVISION = ("gradient_cosine", "student_confidence", "confidence_gain")


def alpha(study: Study, run: str) -> float | None:
    """The weight of the teacher in a run's loss; None where its tables do not tell its objective."""
    objective = study.provenance(run).get("objective")
    # what is at its default is not listed, and of this key that is 1
    return None if objective is None else float(objective.get("kd_ratio", 1.0))


def series(study: Study) -> dict[tuple[str, str, str], list[str]]:
    """Students by (teacher, setting, technique), in the order of alpha; only where there are two values or more."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for run in study.students:
        if alpha(study, run) is not None:
            told, head = study.provenance(run), study.head(run)
            found.setdefault((told.get("teacher") or "", head["setting"], head["technique"]), []).append(run)
    ordered = {key: sorted(runs, key=lambda run: (alpha(study, run), run)) for key, runs in found.items()}
    return {key: runs for key, runs in ordered.items() if len({alpha(study, run) for run in runs}) > 1}


def curve(study: Study, membership: list[dict], agreement: list[dict], supervision: list[dict]) -> list[dict]:
    """AUC, member-specific success, gradient cosine and confidence against alpha, from the rows of the three tables.

    Sorted by series, attack, measure, group, seed, alpha; empty where no two students differ in alpha.
    """
    rows = []
    for (teacher, setting, technique), runs in series(study).items():
        for run in runs:
            head = {"teacher": teacher, "setting": setting, "technique": technique}
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
    keys = ("teacher", "setting", "technique", "attack", "measure", "group", "seed", "alpha", "student")
    return sorted((row for row in rows if row["value"] is not None), key=lambda row: [str(row[k]) for k in keys])


def _point(row: dict, measure: str, group: str) -> dict:
    numbers = {key: row.get(key) for key in ("value", "ci_low", "ci_high")}
    return {"attack": row["attack"], "measure": measure, "group": group, "seed": row["seed"]} | numbers
