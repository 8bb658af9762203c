"""Teacher and student attacked alike on the same records: who is flagged by both, by one, by none (cui2026, 8.6).

agreement.csv has, for every student and its teacher, attack and threshold rule:

  flagged_both _teacher _student _none  records that the attack calls members on both models, on one alone, on none
  right_both ...        the same of right decisions, over all records; by class that is the table above
  tpr_*, tnr_*          share of members flagged (member-specific success), of non-members not flagged
  balanced_accuracy_*   of `teacher`, `student`, and their `difference`, student - teacher
  auc_*, d_prime_*      of the members that the attack on the teacher flags (vulnerable) or misses, against all
                        non-members.  The teacher's own differ by construction.

Thresholds come from the calibration records of each model: `balanced_accuracy` the best one there, `fpr_0.05` the
lowest one that calls at most 5 % of the non-members there members.  `reference` is the published code's rule, fitted on
the very records that it judges: kept to explain published numbers, too good for either model.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import special, stats
from sklearn.metrics import roc_curve

from attacks import membership
from attacks.rows import compare, estimate, same_examples
from attacks.statistics import (
    Difference,
    Groups,
    Influence,
    Interval,
    allowed_false_positives,
    auc_influence,
    correct,
    logit_interval,
)
from attacks.study import Pair, Study, Unresolved

COLUMNS = (
    "teacher student setting attack rule measure class count denominator value se ci_low ci_high p_value p_corrected "
    "seed"
)
RULES = ("balanced_accuracy", "fpr_0.05", "reference")
MODELS = ("teacher", "student")
CELLS = {"both": (True, True), "teacher": (True, False), "student": (False, True), "none": (False, False)}
VULNERABLE, NON_VULNERABLE, NON_MEMBER = "vulnerable", "non_vulnerable", "non_member"


class Decisions(NamedTuple):
    """Which members [m] and non-members [n] an attack calls members."""

    members: np.ndarray
    nonmembers: np.ndarray


class Couple(NamedTuple):
    """Teacher and student under one attack, on the same records."""

    teacher: Pair
    student: Pair


# --- who is compared with whom ---------------------------------------------------------------------------------------


def couples(study: Study) -> list[tuple[str, str]]:
    """Every student with its teacher, and each of these teachers with `null`: what agrees without a teacher."""
    taught = [(study.provenance(run).get("teacher"), run) for run in study.students]
    found = [(teacher, run) for teacher, run in taught if teacher in study.runs]
    controls = [run for run in study.nulls if run == "null"]
    return found + [(teacher, run) for teacher in dict.fromkeys(t for t, _ in found) for run in controls]


def chosen_attacks(study: Study, teacher: str, student: str) -> list[str]:
    """The attacks on both whose decisions are compared: those of the first pages and the primary one."""
    wanted = lambda attack: attack == study.settings["primary"] or membership.parse(attack)[0] in membership.FIRST
    return [attack for attack in study.attacks(student) if attack in study.attacks(teacher) and wanted(attack)]


def couple(study: Study, teacher: str, student: str, seed: int, attack: str) -> Couple:
    """Scores of a student's seed and its teacher's. Raises Unresolved where they cannot be set side by side."""
    other = study.match(teacher, seed)
    if other is None:
        raise Unresolved(f"{teacher} has no seed {seed}")
    found = Couple(*(study.pairs(r, s, attack, "private-heldout")[0] for r, s in ((teacher, other), (student, seed))))
    if not same_examples([found.teacher], [found.student]):
        raise Unresolved(f"{teacher} and {student} were scored on different examples")
    return found


# --- thresholds ------------------------------------------------------------------------------------------------------


def decide(study: Study, pair: Pair, rule: str) -> Decisions:
    """Decisions of an attack on one model. Raises Unresolved where the calibration records do not allow the rule."""
    if rule == "reference":
        threshold = authors_threshold(pair.members, pair.nonmembers, membership.parse(pair.attack)[0])
    elif rule == "balanced_accuracy":
        threshold = study.threshold(pair)
    else:
        calib = study.pairs(pair.run, pair.seed, pair.attack, "calib")[0]
        threshold = fpr_threshold(calib.nonmembers, float(rule.removeprefix("fpr_")))
    return Decisions(pair.members >= threshold, pair.nonmembers >= threshold)


def fpr_threshold(nonmembers: np.ndarray, fpr: float) -> float:
    """The lowest threshold at which at most `fpr` of these non-members are called members.

    Raises Unresolved where a single one would be too many.
    """
    allowed = allowed_false_positives(len(nonmembers), fpr)
    if not allowed:
        raise Unresolved(f"{len(nonmembers)} calibration non-members are too few for a threshold at FPR {fpr:g}")
    return float(np.nextafter(np.sort(nonmembers)[::-1][allowed], np.inf)) if allowed < len(nonmembers) else -np.inf


def authors_threshold(members: np.ndarray, nonmembers: np.ndarray, attack: str, seed: int = 42) -> float:
    """The threshold of cui2026's published code (GitHub richardcui18/mia-in-kd, src/visualization.py).

    The finite ROC threshold of greatest balanced accuracy on the evaluated records; where either class then holds less
    than a fifth of them, up to 31 random ROC thresholds until none does, else the last; for zlib .0015 is added.
    """
    scores = np.concatenate([members, nonmembers])
    fpr, tpr, thresholds = roc_curve(np.repeat([1, 0], [len(members), len(nonmembers)]), scores)
    finite = np.isfinite(thresholds)
    fpr, tpr, thresholds = fpr[finite], tpr[finite], thresholds[finite]
    threshold = thresholds[np.argmax(1 - (fpr + (1 - tpr)) / 2)]
    draw = np.random.RandomState(seed)  # the generator of that code: the draws are part of the rule
    draws = iter(range(31))
    while not 0.2 <= np.mean(scores >= threshold) <= 0.8 and next(draws, None) is not None:
        threshold = thresholds[draw.randint(0, len(thresholds))]
    return float(threshold) + (0.0015 if attack == "zlib" else 0.0)


# --- groups of records -----------------------------------------------------------------------------------------------


def vulnerable(study: Study) -> pd.DataFrame:
    """The group of every evaluated record by attack and seed of each teacher: what filters of training data read.

    Columns example_id, attack, seed, group (vulnerable: a member that the attack on the teacher flags at the
    calibration threshold of best balanced accuracy, non_vulnerable: one that it misses, non_member), model.
    """
    frames = [pd.DataFrame(columns=["example_id", "attack", "seed", "group", "model"])]
    for teacher in dict.fromkeys(teacher for teacher, _ in couples(study)):
        for attack in chosen_attacks(study, teacher, teacher):
            for seed in study.seeds(teacher):
                try:
                    pair = study.pairs(teacher, seed, attack, "private-heldout")[0]
                    flagged = decide(study, pair, RULES[0]).members
                except Unresolved:
                    continue
                ids = np.concatenate([pair.member_ids, pair.nonmember_ids])
                frame = pd.DataFrame({"example_id": ids, "attack": attack, "seed": seed})
                frames.append(frame.assign(group=group_names(flagged, len(pair.nonmembers)), model=teacher))
    return pd.concat(frames[1:] or frames, ignore_index=True)


def group_names(flagged: np.ndarray, nonmembers: int) -> np.ndarray:
    """The group of each member [m], by whether it is flagged on the teacher, then of so many non-members."""
    of_members = np.where(flagged, VULNERABLE, NON_VULNERABLE)
    return np.concatenate([of_members, np.repeat(NON_MEMBER, nonmembers)])


def d_prime(members: np.ndarray, nonmembers: np.ndarray) -> Influence:
    """`(mean_m - mean_n) / s`, `s^2` the mean of both variances. Raises Unresolved where nothing varies."""
    m, n = members.mean(), nonmembers.mean()
    variances = members.var(), nonmembers.var()
    s = np.sqrt(sum(variances) / 2)
    if s == 0:
        raise Unresolved("all scores are equal: there is no d'")
    value = (m - n) / s
    parts = [
        sign * (x - mean) / s - value / (4 * s**2) * ((x - mean) ** 2 - variance)
        for sign, x, mean, variance in ((1, members, m, variances[0]), (-1, nonmembers, n, variances[1]))
    ]
    return Influence(float(value), *parts)


# --- rows ------------------------------------------------------------------------------------------------------------


def rows(study: Study) -> list[dict]:
    """Rows of agreement.csv; one that could not be computed has a `reason`, and one row says why there is nothing.

    `p_corrected`: Holm over all attacks and students of one measure, rule and seed in a setting.
    """
    pairs = couples(study)
    if not pairs:
        return [{"measure": "agreement", "reason": "no student whose teacher was scored as well"}]
    found = [row for teacher, student in pairs for row in _couple_rows(study, teacher, student)]
    correct(found, lambda row: tuple(row.get(key) for key in ("setting", "rule", "measure", "class", "seed")))
    return found


def _couple_rows(study: Study, teacher: str, student: str) -> Iterator[dict]:
    head = {"teacher": teacher, "student": student, "setting": study.head(student)["setting"]}
    refused: dict[str, list[str]] = {}  # a reason -> the attacks and seeds that it concerns: one row each
    for attack in chosen_attacks(study, teacher, student):
        for rule in RULES:
            decided: dict[int, tuple[Couple, list[Decisions]]] = {}
            for seed in study.seeds(student):
                try:
                    both = couple(study, teacher, student, seed, attack)
                    decided[seed] = both, [decide(study, pair, rule) for pair in both]
                except Unresolved as why:
                    refused.setdefault(str(why), []).append(attack)
            at = head | {"attack": attack, "rule": rule}
            for seed, (both, decisions) in decided.items():
                yield from (at | {"seed": seed} | row for row in _cells(decisions, both.student.groups))
                yield from (at | {"seed": seed} | row for row in _rates([both], [decisions]))
                if rule == RULES[0]:
                    for row in _group_rows(both, decisions[0].members):
                        if isinstance(row, str):
                            refused.setdefault(row, []).append(attack)
                        else:
                            yield at | {"seed": seed} | row
            if 1 < len(decided) == len(study.seeds(student)):
                columns = [list(column) for column in zip(*decided.values(), strict=True)]
                yield from (at | {"seed": "all"} | row for row in _rates(*columns))
    for reason, attacks in refused.items():
        yield head | {"attack": " ".join(dict.fromkeys(attacks)), "measure": "agreement", "reason": reason}


def _cells(decisions: list[Decisions], groups: Groups | None) -> Iterator[dict]:
    """Both 2x2 tables of one seed: by decision, and by whether it was right."""
    teacher, student = decisions
    codes = groups or (None, None)
    both = None if groups is None else np.concatenate(groups)
    for name, (of_teacher, of_student) in CELLS.items():
        inside = [(t == of_teacher) & (s == of_student) for t, s in zip(teacher, student, strict=True)]
        for which, part, own in zip(("members", "nonmembers"), inside, codes, strict=True):
            yield {"measure": f"flagged_{name}", "class": which} | _share(part, own)
        right = np.concatenate([inside[0], (teacher[1] != of_teacher) & (student[1] != of_student)])
        yield {"measure": f"right_{name}", "class": "all"} | _share(right, both)


def _share(part: np.ndarray, groups: np.ndarray | None = None) -> dict:
    """Count and share of the records in it (bool [n]), with its interval over records or over groups (codes [n])."""
    count, n = int(part.sum()), len(part)
    found = exact_interval(count, n) if groups is None else _grouped_interval(part, groups)
    return {"count": count, "denominator": n, "value": count / n, "ci_low": found.low, "ci_high": found.high}


def _grouped_interval(part: np.ndarray, groups: np.ndarray) -> Interval:
    """A share of records with its interval over groups: on the logit scale; exact, of groups, where it is 0 or 1."""
    value, sums = float(part.mean()), np.bincount(np.unique(groups, return_inverse=True)[1], part - part.mean())
    number = len(sums)
    if value in (0, 1) or number < 2:
        return exact_interval(round(value * number), number)._replace(value=value)
    se = np.sqrt(number / (number - 1) * np.sum(sums**2)) / len(part)
    return logit_interval(value, se, number, number, df=number - 1)


def exact_interval(count: int, n: int) -> Interval:
    """A share with Clopper and Pearson's interval (scipy's `binomtest` has it too, a hundred times as slow)."""
    low = special.betaincinv(count, n - count + 1, 0.025) if count else 0.0
    high = special.betaincinv(count + 1, n - count, 0.975) if count < n else 1.0
    return Interval(count / n, float(low), float(high))


def _rates(both: list[Couple], decided: list[list[Decisions]]) -> Iterator[dict]:
    """TPR, TNR and balanced accuracy of teacher and student and their differences, of one seed or over several."""
    samples = [[each.student] for each in both]
    for measure, which in (("tpr", "members"), ("tnr", "nonmembers"), ("balanced_accuracy", "all")):
        found = [
            [_rate(decisions[side], which).grouped(each.student.groups) for each, decisions in zip(both, decided)]
            for side in (0, 1)
        ]
        exact = len(both) == 1 and which != "all" and found[0][0].groups is None
        for model, influences in zip(MODELS, found, strict=True):
            row = {"measure": f"{measure}_{model}", "class": which, "se": _se(influences)}
            right = influences[0].members if which == "members" else influences[0].nonmembers
            yield row | (_share(right > 0) if exact else _interval(estimate(influences, samples)))
        row = {"measure": f"{measure}_difference", "class": which}
        if exact:
            sides = [getattr(found[side][0], which) > 0 for side in (1, 0)]
            yield row | _difference(paired_shares(*sides))
        else:
            gap = compare(found[1], found[0], samples)
            yield row | _difference(gap._replace(low=max(gap.low, -1.0), high=min(gap.high, 1.0)))


def _rate(decisions: Decisions, which: str) -> Influence:
    """Share of right decisions among the members, the non-members, or the mean of both."""
    hits, rejections = decisions.members.astype(float), 1.0 - decisions.nonmembers
    if which == "members":
        return Influence(float(hits.mean()), hits, np.zeros(len(rejections)))
    if which == "nonmembers":
        return Influence(float(rejections.mean()), np.zeros(len(hits)), rejections)
    return Influence(float(hits.mean() + rejections.mean()) / 2, hits / 2, rejections / 2)


def _se(influences: list[Influence]) -> float | None:
    """`sqrt(sum p (1 - p) / n)` of the rates (attacks.md 8.6), over groups where there are any; one seed's alone."""
    (one,) = influences if len(influences) == 1 else (None,)
    if one is None:
        return None
    if one.groups is not None:
        return float(np.sqrt(one.variance()))
    return float(np.sqrt(sum(np.var(part) / len(part) for part in (one.members, one.nonmembers))))


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p-value that as many records are right for a alone as for b alone (fair coin on them)."""
    return min(1.0, 2 * float(special.bdtr(min(only_a, only_b), only_a + only_b, 0.5)))


def paired_shares(a: np.ndarray, b: np.ndarray) -> Difference:
    """Share of a less share of b, of the same n records (bool [n] each): exact McNemar's p, Agresti and Min's interval.

    The interval (2005, Statistics in Medicine 24:729) is Wald's with half a record more in each cell of the 2x2 table.
    """
    n, only_a, only_b = len(a), int(np.sum(a & ~b)), int(np.sum(b & ~a))
    centre = (only_a - only_b) / (n + 2)
    se = np.sqrt((only_a + only_b + 1) / (n + 2) - centre**2) / np.sqrt(n + 2)
    half, value = stats.norm.isf(0.025) * se, (only_a - only_b) / n
    return Difference(value, max(centre - half, -1), min(centre + half, 1), se, value / se, mcnemar(only_a, only_b))


def _group_rows(both: Couple, flagged: np.ndarray) -> Iterator[dict | str]:
    """AUC and d' of the vulnerable members and of the others against all non-members; a reason where there is none."""
    for group, inside in ((VULNERABLE, flagged), (NON_VULNERABLE, ~flagged)):
        if inside.sum() < 2:
            yield f"fewer than two {group} members"
            continue
        for name, statistic in (("auc", auc_influence), ("d_prime", d_prime)):
            for model, pair in zip(MODELS, both, strict=True):
                row = {"measure": f"{name}_{model}", "class": group, "count": int(inside.sum())}
                row["denominator"] = len(inside)
                groups = pair.groups and Groups.of(pair.groups.members[inside], pair.groups.nonmembers)
                try:
                    found = statistic(pair.members[inside], pair.nonmembers).grouped(groups)
                except Unresolved as why:
                    yield str(why)
                    continue
                yield row | {"se": float(np.sqrt(found.variance()))} | _interval(_of_one(found, name))


def _of_one(found: Influence, name: str) -> Interval:
    if name == "auc":
        return estimate([found], [[]])
    half = stats.t.isf(0.025, found.df) * np.sqrt(found.variance())
    return Interval(found.value, found.value - half, found.value + half)


def _interval(found: Interval) -> dict:
    return {"value": found.value, "ci_low": found.low, "ci_high": found.high}


def _difference(found: Difference) -> dict:
    return {"value": found.value, "ci_low": found.low, "ci_high": found.high, "se": found.se, "p_value": found.p}
