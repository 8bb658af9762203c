"""Rows of tasks.csv: does the leak differ between tasks, and do two techniques differ by more on one task than another?

slice          AUC of one task, against 0.5; Holm over the tasks of the model.
heterogeneity  is the AUC the same in all tasks?  Cochran's Q over tasks, which share no record; Holm over the models.
interaction    is the paired difference of two students the same in all tasks?  Holm over the pairs of the setting.

All by the primary attack.  Tasks with fewer than SMALLEST members or non-members (or groups of them) are left out.
"""

from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy import stats

from attacks.differences import students_of
from attacks.rows import Sample, against_chance, auc_of, by_seed, estimate, same_examples, sizes
from attacks.statistics import Influence, correct
from attacks.study import Study

SMALLEST = 10
LEVEL = 0.05


class Q(NamedTuple):
    """Cochran's test of K independent estimates: the statistic, K - 1, its p-value, the spread beyond their errors."""

    statistic: float
    df: int
    p: float
    spread: float


def cochran(values: np.ndarray, variances: np.ndarray) -> Q:
    """`Q = sum w_k (v_k - v)^2`, `w_k` the inverse variances, `v` the mean weighted by them; chi-square under equality.

    spread: DerSimonian and Laird's standard deviation of the true values, 0 where errors explain all differences.
    """
    weights = 1 / variances
    statistic = float(weights @ (values - weights @ values / weights.sum()) ** 2)
    df = len(values) - 1
    beyond = max(statistic - df, 0.0) / (weights.sum() - weights @ weights / weights.sum())
    return Q(statistic, df, float(stats.chi2.sf(statistic, df)), float(np.sqrt(beyond)))


def same_auc(blocks: list[list[Influence]]) -> Q:
    """Is the AUC of K tasks the same?  blocks: for each task, its AUC with influences by seed.

    On the logit scale, with a floor under the variance that is less than any smooth score has: on the plain scale a
    task near 1 has both too small an error and too great a weight, and equal tasks of AUC 0.97 are declared different
    one time in three (tests/test_attacks_tasks.py).
    """
    values, variances, by_seed = [], [], []
    for block in blocks:
        mean, (m, n) = Influence.mean(block), block[0].sizes
        bounded = lambda value: (value * m * n + 0.5) / (m * n + 1)  # noqa: B023
        value = bounded(mean.value)
        values.append(_logit(value))
        floor = value * (1 - value) / (3 * min(m, n))
        variances.append(max(mean.variance(), floor) / (value * (1 - value)) ** 2)
        by_seed.append([_logit(bounded(each.value)) for each in block])
    return cochran(np.array(values), np.array(variances) + _over_seeds(np.array(by_seed)))


def same_difference(blocks: list[list[Influence]]) -> Q:
    """Is a paired difference of AUCs the same in K tasks?  blocks: for each task, the differences by seed."""
    means = [Influence.mean(block) for block in blocks]
    variances = np.array([max(each.variance(), 1e-4 / min(each.sizes)) for each in means])
    by_seed = np.array([[each.value for each in block] for block in blocks])
    return cochran(np.array([each.value for each in means]), variances + _over_seeds(by_seed))


def _logit(value: float) -> float:
    return float(np.log(value / (1 - value)))


def _over_seeds(table: np.ndarray) -> float:
    """What training again adds to the variance of a task's mean: task x seed, what is left of [K, S], over S."""
    tasks, seeds = table.shape
    if seeds < 2:
        return 0.0
    rest = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
    return float((rest**2).sum() / ((tasks - 1) * (seeds - 1)) / seeds)


# --- rows ------------------------------------------------------------------------------------------------------------


def task_rows(study: Study) -> list[dict]:
    """Rows of tasks.csv, over all seeds where there are several; none where fewer than two tasks are large enough."""
    blocks = {run: _block(study, run) for run in study.runs}
    tasks = {run: _large(block) for run, block in blocks.items()}
    models = [_model_rows(study, run, blocks[run], tasks[run]) for run in study.runs if len(tasks[run]) > 1]
    correct([row for rows in models for row in rows if row["test"] == "heterogeneity"])
    rows = [row for rows in models for row in rows]
    for setting in dict.fromkeys(study.head(run)["setting"] for run in study.students):
        of_setting = []
        for a, b in combinations(students_of(study, setting), 2):
            common = [task for task in tasks[a] if task in tasks[b]]
            paired = len(blocks[a]) == len(blocks[b]) and all(map(same_examples, blocks[a], blocks[b]))
            if paired and len(common) > 1:
                of_setting.append(_interaction(study, a, b, blocks, common))
        correct(of_setting)
        rows += of_setting
    return rows


def _pair_of(study: Study, run: str) -> str:
    return "heldout-private" if study.provenance(run).get("swap_of") else "private-heldout"


def _block(study: Study, run: str) -> list[Sample]:
    """The samples of all seeds, if all have one and on the same records; else none, and the model has no rows."""
    samples, reasons = by_seed(study, run, study.settings["primary"], _pair_of(study, run))
    block = list(samples.values())
    return block if not reasons and all(same_examples(block[0], sample) for sample in block) else []


def _large(block: list[Sample]) -> list[str]:
    """Tasks with enough records, or groups of them, in both classes."""
    if not block:
        return []
    (pair,) = block[0]
    found = []
    for task in sorted(set(pair.member_task) & set(pair.nonmember_task) - {"all"}):
        counts = (pair.member_task == task).sum(), (pair.nonmember_task == task).sum()
        if min(counts) >= SMALLEST and min(auc_of([pair.only(task)]).sizes) >= SMALLEST:
            found.append(str(task))
    return found


def _slices(block: list[Sample], task: str) -> list[Sample]:
    return [[pair.only(task) for pair in sample] for sample in block]


def _head(study: Study, test: str, run: str, block: list[Sample]) -> dict:
    seed = "all" if len(block) > 1 else study.seeds(run)[0]
    at = {"test": test, "model": run, "setting": study.head(run)["setting"], "attack": study.settings["primary"]}
    return at | {"role_pair": _pair_of(study, run), "seed": seed, "task": "all"}


def _counts(block: list[Sample]) -> dict:
    return dict(zip(("n_members", "n_nonmembers"), sizes(block), strict=True))


def _model_rows(study: Study, run: str, block: list[Sample], tasks: list[str]) -> list[dict]:
    rows, found = [], []
    for task in tasks:
        part = _slices(block, task)
        influences = [auc_of(sample) for sample in part]
        auc, found = estimate(influences, part), [*found, influences]
        numbers = {"value": auc.value, "ci_low": auc.low, "ci_high": auc.high}
        numbers["p_value"] = against_chance(influences, part)
        rows.append(_head(study, "slice", run, block) | {"task": task} | numbers | _counts(part))
    correct(rows)
    return [*rows, _head(study, "heterogeneity", run, block) | _numbers(same_auc(found)) | _counts(block)]


def _interaction(study: Study, a: str, b: str, blocks: dict[str, list[Sample]], tasks: list[str]) -> dict:
    gaps = []
    for task in tasks:
        both = zip(_slices(blocks[a], task), _slices(blocks[b], task), strict=True)
        gaps.append([auc_of(x).minus(auc_of(y)) for x, y in both])
    at = _head(study, "interaction", a, blocks[a]) | {"model_b": b}
    return at | _numbers(same_difference(gaps)) | _counts(blocks[a])


def _numbers(q: Q) -> dict:
    return {"value": q.spread, "statistic": q.statistic, "df": q.df, "p_value": q.p}


# --- words -----------------------------------------------------------------------------------------------------------


def task_facts(study: Study, rows: list[dict]) -> dict:
    """For summary.json: who leaks by task, which pairs differ by task, and one sentence; or why there is nothing."""
    if not rows:
        why = "there are not two tasks with enough records of both classes"
        return {"applicable": False, "words": f"Membership by task: not applicable: {why}."}
    apart = [r for r in rows if r["test"] == "heterogeneity" and r["p_corrected"] < LEVEL]
    crossed = [r for r in rows if r["test"] == "interaction" and r["p_corrected"] < LEVEL]
    tested = sum(r["test"] == "heterogeneity" for r in rows)
    pairs = sum(r["test"] == "interaction" for r in rows)
    words = f"Membership by task ({study.settings['primary']}, Holm): "
    differs = ", ".join(f"{r['model']} (p = {r['p_corrected']:.2g})" for r in apart)
    words += f"AUC differs between tasks for {differs}" if apart else "no model's AUC is shown to differ between tasks"
    words += f" (of {tested} models); "
    if not pairs:
        words += "two techniques of one setting to compare by task: not applicable."
    elif crossed:
        which = "; ".join(f"{r['model']} and {r['model_b']}" for r in crossed)
        words += f"the difference of {which} depends on the task."
    else:
        words += f"no difference of two students is shown to depend on the task ({pairs} pairs)."
    keys = ("model", "model_b", "statistic", "df", "p_corrected", "value")
    pick = lambda chosen: [{key: row[key] for key in keys if key in row} for row in chosen]
    return {"applicable": True, "smallest": SMALLEST, "differ": pick(apart), "interact": pick(crossed), "words": words}
