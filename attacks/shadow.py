"""Rows of shadow.csv: attacks with shadow chains beside the cheap ones, on the same records and the same targets.

Every chain is the target in turn, attacked with all others but its pair; what stands in a row is the mean over targets,
never the best one.  A member is what was in the teacher's data, for the student as well.

`against`: empty for an attack by itself; the id of a cheap attack for the gap to it; `shadow/teacher` for the gap from
teacher to student, whose ratio at a false-positive rate (`tpr_ratio_at_fpr_...`) is the leakage passed on.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from attacks import lira, rmia
from attacks.chains import MODELS, Chains
from attacks.lira import ENOUGH
from attacks.statistics import correct
from attacks.study import Study, Unresolved
from attacks.targets import FPRS, Measured, Targets

COLUMNS = (
    "model size technique setting design attack statistic against metric value ci_low ci_high p_value p_corrected "
    "targets references n_members n_nonmembers seed"
)
METRICS = ("auc", "balanced_accuracy", *(f"tpr_at_fpr_{fpr:g}" for fpr in FPRS))
COMPARED = ("auc", "tpr_at_fpr_0.01")  # metrics of which gaps are reported
RATIO = "tpr_at_fpr_0.01"
LIRA = {"lira_online": "online", "lira_offline_cdf": "offline_cdf", "lira_offline_pdf": "offline_pdf"}
LIRA |= {"lira_offset": "offset"}
RMIA = {"rmia_online": ("online", False), "rmia_offline": ("offline", False), "rmia_offline@a=tuned": ("offline", True)}
CHEAP = ("loss", "zlib", "min_k", "min_k_plus_plus")
REFERENCE = "reference:base_student"
FOR_BOUNDS = (("lira_online", "logit"), ("rmia_offline", rmia.SIGNAL), ("loss", "LL"))


class Scored(NamedTuple):
    """Scores [t, n] of one attack on all targets, or the reason why there are none.

    references: models that a record is compared with, the fewest.  steps: in how many the scores come, where they are
    shares.
    """

    attack: str
    statistic: str
    values: np.ndarray | str
    references: int = 0
    strong: bool = False
    steps: int | None = None


# --- scores ----------------------------------------------------------------------------------------------------------


def scored(study: Study, chains: Chains, model: str) -> list[Scored]:
    """All attacks on the `teacher` or the `student` of every chain, strong ones first; once for all tables."""
    key = ("scored", model)
    if key not in chains.kept:
        chains.kept[key] = [*_strong(chains, model), *_cheap(study, chains, model)]
    return chains.kept[key]


def bound_scores(study: Study, chains: Chains) -> dict[tuple[str, str], np.ndarray]:
    """Scores [c, n] for lower bounds on epsilon, by model (`shadow/teacher`) and attack; of `cheap` the loss alone."""
    return {
        (f"shadow/{model}", each.attack): _finite(each.values)
        for model in MODELS
        for each in scored(study, chains, model)
        if (each.attack, each.statistic) in FOR_BOUNDS and not isinstance(each.values, str)
    }


def _finite(values: np.ndarray) -> np.ndarray:
    silent = np.isneginf(values)
    return np.where(silent, np.where(silent, np.inf, values).min(axis=1, keepdims=True), values)


def _strong(chains: Chains, model: str) -> Iterator[Scored]:
    if chains.design == "cheap":
        return
    out = lira.references(chains, model, "out")
    both = out + lira.references(chains, model, "in")
    for statistic in ("logit", "LL"):
        forms = _try(lambda s=statistic: lira.chain_scores(chains, model, s, LIRA.values()))
        for attack, form in LIRA.items():
            values = forms if isinstance(forms, str) else forms[form]
            yield Scored(attack, statistic, values, both if "in" in lira.FORMS[form] else out, strong=True)
    steps = chains.population(model, "LL").shape[1]
    for attack, (form, tuned) in RMIA.items():
        values = _try(lambda f=form, t=tuned: rmia.chain_scores(chains, model, f, tuned=t))
        yield Scored(attack, rmia.SIGNAL, values, both if form == "online" else out, strong=True, steps=steps)


def _cheap(study: Study, chains: Chains, model: str) -> Iterator[Scored]:
    silent = lambda values: np.where(np.isnan(values), -np.inf, values)
    for attack in CHEAP:
        yield Scored(
            attack, "LL" if attack == "loss" else "-", _try(lambda a=attack: silent(chains.statistic(model, a)))
        )
    if "base_student" in study.runs:
        yield Scored(REFERENCE, "LL", _try(lambda: silent(chains.statistic(model, "LL") - _base(study, chains))))
    out = lira.references(chains, model, "out")
    if chains.design != "cheap":
        yield Scored("calibrated_loss", "LL", _try(lambda: lira.calibrated(chains, model)), out)
    elif model == "student":  # two teachers are no reference for one another
        both = out + lira.references(chains, model, "in")
        yield Scored("calibrated_loss@both", "LL", _try(lambda: lira.calibrated(chains, model)), both)


def _try(make: Callable):
    """What is made, or the reason why it cannot be."""
    try:
        return make()
    except Unresolved as why:
        return str(why)


def _base(study: Study, chains: Chains) -> np.ndarray:
    """Mean log-probability of every record under the student's base [n]. Raises Unresolved where it is not there."""
    found = np.full(len(chains.ids), np.nan)
    for role in np.unique(chains.role):
        of = study.scores.get(("base_student", study.seeds("base_student")[0], "loss", str(role)))
        if of is None:
            raise Unresolved(f"base_student was not scored on role '{role}'")
        rows = np.flatnonzero(chains.role == role)
        at = np.searchsorted(of.ids, chains.ids[rows])
        at = np.minimum(at, len(of.ids) - 1)
        if (of.ids[at] != chains.ids[rows]).any():
            raise Unresolved(f"base_student was scored on other records of role '{role}' than the chains")
        found[rows] = of.values[at]
    return found


# --- rows ------------------------------------------------------------------------------------------------------------


def rows(study: Study, chains: Chains) -> list[dict]:
    """Rows of shadow.csv for teacher and student; those that cannot be computed have a `reason`."""
    found, measured = [], {}
    for model in MODELS:
        targets = _targets(study, chains, model)
        attacks = scored(study, chains, model)
        mine = measured[model] = {}
        for each in attacks:
            values = each.values
            if not isinstance(values, str):
                values = targets.measure(values[: len(targets.pairs)], each.steps)
            mine[each.attack, each.statistic] = values
            found += _alone(_head(chains, model, targets, each), targets, values)
        found += _gaps(chains, model, targets, attacks, mine)
    if chains.design != "cheap":
        found += _passed_on(chains, _targets(study, chains, "student"), scored(study, chains, "student"), measured)
    _note(study, chains)
    return found


def _targets(study: Study, chains: Chains, model: str) -> Targets:
    """All chains; of the teachers of `cheap` the two that there are."""
    first = chains.pairs == chains.pairs[0] if chains.design == "cheap" and model == "teacher" else slice(None)
    names, codes = np.unique(chains.group, return_inverse=True)
    counts = study.resampler.counts(chains.ids, None if len(names) == len(codes) else codes)
    return Targets(chains.teacher_in[first], chains.pairs[first], codes, counts)


def head(chains: Chains, model: str) -> dict:
    """The columns that say what the chains' teachers or students are."""
    told = {"technique": "sft", "setting": "-"} if model == "teacher" else {}
    told = {"technique": chains.technique, "setting": chains.setting} | told
    return {
        "model": f"shadow/{model}",
        "size": chains.sizes[model],
        **told,
        "design": chains.design,
        "seed": chains.seed,
    }


def _head(chains: Chains, model: str, targets: Targets, each: Scored) -> dict:
    at = head(chains, model) | {"attack": each.attack, "statistic": each.statistic, "references": each.references}
    members, nonmembers = targets.sizes
    return at | {"targets": len(targets.pairs), "n_members": members, "n_nonmembers": nonmembers}


def _alone(at: dict, targets: Targets, values: dict[str, Measured | str] | str) -> Iterator[dict]:
    for metric in METRICS:
        one = values if isinstance(values, str) else values[metric]
        row = at | {"against": "", "metric": metric}
        if isinstance(one, str):
            yield row | {"reason": one}
            continue
        value, low, high = targets.interval(one)
        yield row | {"value": value, "ci_low": low, "ci_high": high}
        if metric == "auc":
            yield row | {"metric": "auc_sd", "value": float(one.each.std(ddof=1))}


def _gaps(chains: Chains, model: str, targets: Targets, attacks: list[Scored], mine: dict) -> list[dict]:
    """Every strong attack less every cheap one; a family of the correction is one strong attack and metric."""
    found = []
    for each in (each for each in attacks if each.strong):
        for other in (other for other in attacks if not other.strong):
            at = _head(chains, model, targets, each) | {"against": other.attack}
            found += _compared(at, targets, mine[each.attack, each.statistic], mine[other.attack, other.statistic])
    correct(found, lambda row: (row["attack"], row["statistic"], row["metric"]))
    return found


def _passed_on(chains: Chains, targets: Targets, attacks: list[Scored], measured: dict) -> list[dict]:
    """Student less teacher under the same attack, and the ratio of their TPR; a family is one metric."""
    found, ratios = [], []
    for each in attacks:
        student, teacher = (measured[model][each.attack, each.statistic] for model in ("student", "teacher"))
        at = _head(chains, "student", targets, each) | {"against": "shadow/teacher"}
        found += _compared(at, targets, student, teacher)
        ratios.append(at | {"metric": RATIO.replace("tpr", "tpr_ratio")} | _ratio(targets, student, teacher))
    correct(found, lambda row: row["metric"])
    return found + ratios


def _compared(at: dict, targets: Targets, a: dict | str, b: dict | str) -> Iterator[dict]:
    for metric in COMPARED:
        both = [each if isinstance(each, str) else each[metric] for each in (a, b)]
        if why := next((each for each in both if isinstance(each, str)), None):
            yield at | {"metric": metric, "reason": why}
            continue
        gap = targets.difference(*both)
        yield at | {"metric": metric, "value": gap.value, "ci_low": gap.low, "ci_high": gap.high, "p_value": gap.p}


def _ratio(targets: Targets, student: dict | str, teacher: dict | str) -> dict:
    both = [each if isinstance(each, str) else each[RATIO] for each in (student, teacher)]
    if why := next((each for each in both if isinstance(each, str)), None):
        return {"reason": why}
    try:
        ratio = targets.log_ratio(*both)
    except ZeroDivisionError:
        return {"reason": "no member is found on one of the two at this false-positive rate"}
    return {"value": np.exp(ratio.value), "ci_low": np.exp(ratio.low), "ci_high": np.exp(ratio.high)}


def _note(study: Study, chains: Chains) -> None:
    """What a reader must know of the design, as sentences."""
    if chains.design == "cheap":
        study.note(
            "shadow: one pair of teachers and many students. Scores are calibrated by them and called so, not LiRA or "
            "RMIA; intervals hold for these two teachers, and nothing of them bounds epsilon."
        )
        return
    sides = [lira.references(chains, "student", side) for side in ("in", "out")]
    if min(sides) < ENOUGH:
        study.note(
            f"shadow: {sides[0]} reference models with and {sides[1]} without each record; below {ENOUGH} a side LiRA "
            "uses one spread for all records."
        )
    if (population := chains.population("student", "LL").shape[1]) < 1000:
        study.note(f"shadow: RMIA's population has {population} records; below 1000 it resolves no FPR of 0.1 %.")


def facts(found: list[dict]) -> dict:
    """For summary.json: the attack named beforehand (online LiRA on logits) beside the loss, in words."""
    words = []
    for model in (f"shadow/{model}" for model in MODELS):
        at = {
            (row["attack"], row["statistic"], row["against"]): row
            for row in found
            if row["model"] == model and row["metric"] == "auc" and "reason" not in row
        }
        rows = [
            at.get(key) for key in (("lira_online", "logit", ""), ("loss", "LL", ""), ("lira_online", "logit", "loss"))
        ]
        if None in rows:
            continue
        each = [f"{row['value']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]" for row in rows]
        words.append(
            f"{model} ({rows[0]['size']}; {rows[0]['targets']} targets, {rows[0]['references']} references): AUC of "
            f"online LiRA {each[0]}, of the loss {each[1]}, gap {each[2]}, p = {rows[2]['p_corrected']:.3g} after Holm."
        )
    return {"words": words}
