"""Counterfactual memorization: what having a record in the training data does to how well a model knows it.

`mem(x) = mean M(x) of models with x - mean M(x) of models without` (arXiv:2112.12938), M the share of tokens that
greedy decoding gets right, or the mean log-probability.  Chains give it twice: of a teacher (`direct`) and, through the
teacher alone, of a student that never saw the record (`inherited`).  In the design `two_by_two` the student's data
varies too: with mu_ab the mean over students whose teacher had the record (a) and who had it themselves (b),

  direct = mu_01 - mu_00     inherited = mu_10 - mu_00     interaction = mu_11 - mu_10 - mu_01 + mu_00

counterfactual.csv: means over records, how two halves of the chains agree on the order of records, whether the order of
the student's follows the teacher's, and the repeats.  counterfactual.parquet: every record's effects with an interval
over models.

Legend: q cells that balance one another (pairs of chains, or quadruples), n records, B resamples.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from attacks.chains import MODELS, Chains
from attacks.shadow import head
from attacks.statistics import Interval, difference
from attacks.study import Study, Unresolved
from attacks.targets import over_pairs

COLUMNS = "model size technique setting design measure effect role value ci_low ci_high n chains seed"
MEASURES = ("accuracy", "LL")
POOL = "private+heldout"  # the role of what is in by a coin of its own
CELLS = 1 << 22  # of one block of resampled values
HALVINGS = 20
FEWEST = 8  # records, below which no order is correlated


class Effect(NamedTuple):
    """One effect of one model: name, and what it is made of.

    cells: [k, q, n], the models of each of k cells in every pair or quadruple.  weights: [k], of the cells' means.
    """

    model: str
    name: str
    cells: np.ndarray
    weights: np.ndarray

    @property
    def each(self) -> np.ndarray:
        """The effect in every pair or quadruple [q, n]."""
        return np.tensordot(self.weights, self.cells, 1)


def effects(chains: Chains, measure: str) -> list[Effect]:
    """All effects that the design allows. Raises Unresolved for `cheap`, whose two teachers are one comparison."""
    if chains.design == "cheap":
        raise Unresolved("one pair of teachers: what a record does cannot be told from what the two differ in")
    found = []
    for model, name in zip(MODELS, ("direct", "inherited"), strict=True):
        values = chains.statistic(model, measure)
        if model == "student" and chains.design == "two_by_two":
            cells = _cells(chains, values, 2 * chains.teacher_in + chains.student_in, 4)  # mu_00 mu_01 mu_10 mu_11
            for effect, weights in (
                ("direct", (-1, 1, 0, 0)),
                ("inherited", (-1, 0, 1, 0)),
                ("interaction", (1, -1, -1, 1)),
            ):
                found.append(Effect(model, effect, cells, np.array(weights, float)))
        else:
            found.append(Effect(model, name, _cells(chains, values, chains.teacher_in, 2), np.array([-1.0, 1.0])))
    return found


def _cells(chains: Chains, values: np.ndarray, cell: np.ndarray, k: int) -> np.ndarray:
    """Values [c, n] by cell and pair [k, q, n]; of several chains of one cell in a pair the mean."""
    codes = np.unique(chains.pairs, return_inverse=True)[1]
    sums, counts = np.zeros((2, k, codes.max() + 1, values.shape[1]))
    columns = np.arange(values.shape[1])
    for number, pair in enumerate(codes):
        at = cell[number].astype(np.int64), pair, columns
        sums[at] += values[number]
        counts[at] += 1
    if not counts.all():
        raise Unresolved("a pair of chains does not have every record once in each cell; the design is not balanced")
    return sums / counts


# --- per record ------------------------------------------------------------------------------------------------------


def resampled(effect: Effect, resamples: int, seed: int, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Interval [n], [n] of each record's effect: models are drawn anew within each cell, percentiles.

    Of q models, q drawn ones vary by (q - 1)/q of what q new ones would: deviations are widened by the root of it.
    """
    k, q, n = effect.cells.shape
    if q < 2:
        return np.full(n, np.nan), np.full(n, np.nan)
    rng, used = np.random.default_rng(seed), np.flatnonzero(effect.weights)
    drawn = rng.multinomial(q, np.full(q, 1 / q), (len(used), resamples)) / q
    wider, value = np.sqrt(q / (q - 1)), effect.each.mean(axis=0)
    low, high = np.empty(n), np.empty(n)
    for block in np.array_split(np.arange(n), max(1, -(-n * resamples // CELLS))):
        draws = sum(effect.weights[c] * drawn[i] @ effect.cells[c][:, block] for i, c in enumerate(used))
        ends = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
        low[block], high[block] = value[block] + wider * (ends - value[block])
    return low, high


def examples(study: Study, chains: Chains) -> pd.DataFrame:
    """counterfactual.parquet: one row per model, measure, effect and record, with its interval over models."""
    frames = [pd.DataFrame()]
    for measure in MEASURES:
        try:
            found = effects(chains, measure)
        except Unresolved:
            continue  # `rows` says why
        for effect in found:
            low, high = resampled(effect, study.settings["bootstrap"], study.settings["seed"])
            known = {"model": f"shadow/{effect.model}", "measure": measure, "effect": effect.name}
            columns = {"example_id": chains.ids, "role": chains.role, "task": chains.task}
            numbers = {"value": effect.each.mean(axis=0), "ci_low": low, "ci_high": high}
            frames.append(pd.DataFrame(columns | known | numbers | {"chains": len(chains)}))
    return pd.concat(frames[1:] or frames, ignore_index=True)


# --- means and orders ------------------------------------------------------------------------------------------------


def rows(study: Study, chains: Chains) -> list[dict]:
    """Rows of counterfactual.csv; those that cannot be computed have a `reason`."""
    found = []
    for measure in MEASURES:
        at = {"role": POOL, "chains": len(chains)}
        try:
            known = effects(chains, measure)
        except Unresolved as why:
            found += [head(chains, m) | at | {"measure": measure, "effect": "-", "reason": str(why)} for m in MODELS]
            continue
        for effect in known:
            here = head(chains, effect.model) | at | {"effect": effect.name, "n": len(chains.ids)}
            for name, number in _summary(study, chains, measure, effect):
                found.append(here | {"measure": name} | _told(number))
        of = {(effect.model, effect.name): effect.each for effect in known}
        rank = across(chains, of["teacher", "direct"], of["student", "inherited"], study.settings["seed"])
        here = head(chains, "student") | at | {"effect": "inherited", "n": len(chains.ids)}
        found.append(here | {"measure": f"spearman_teacher_student_{measure}"} | _told(rank))
    return found


def _summary(study: Study, chains: Chains, measure: str, effect: Effect) -> Iterator[tuple[str, Interval | str]]:
    yield measure, mean_effect(chains, effect.each)
    yield f"split_half_{measure}", across(chains, effect.each, effect.each, study.settings["seed"])
    if study.splits is not None and "repeats" in study.splits:
        at = study.splits.index.get_indexer([i.partition("#")[0] for i in chains.ids])
        repeats = np.where(at < 0, np.nan, study.splits["repeats"].to_numpy(float)[at])
        if len(np.unique(repeats[np.isfinite(repeats)])) > 1:
            yield f"spearman_repeats_{measure}", _rank(chains, effect.each.mean(axis=0), repeats)


def _told(number: Interval | str) -> dict:
    if isinstance(number, str):
        return {"reason": number}
    return dict(zip(("value", "ci_low", "ci_high"), number, strict=True))


def mean_effect(chains: Chains, each: np.ndarray) -> Interval | str:
    """Mean over records of an effect [q, n], with an interval over pairs of chains and groups of records."""
    known = np.isfinite(each).all(axis=0)
    if len(each) < 2 or known.sum() < 2:
        return "one pair of chains, or fewer than two records: nothing tells how sure the mean is"
    codes = np.unique(chains.group[known], return_inverse=True)[1]
    if codes.max() < 1:
        return "one group of records: nothing tells how sure the mean is"
    part = each[:, known].mean(axis=0)
    sums = np.bincount(codes, part - part.mean()) / len(part)
    within = float(sums @ sums) * len(sums) / (len(sums) - 1)
    mean = over_pairs(each[:, known].mean(axis=1), np.arange(len(each)), within, len(sums) - 1)
    return Interval(*difference(mean.value, mean.se, df=mean.df)[:3])


def across(chains: Chains, a: np.ndarray, b: np.ndarray, seed: int) -> Interval | str:
    """Rank correlation of the records' effects a [q, n] in one half of the chains and b [q, n] in the other.

    The mean of HALVINGS halvings; of an effect with itself how far its order can be relied on.  Never from the same
    chains: a student repeats what its own teacher knows by chance.  The interval is over records.
    """
    q = len(a)
    if q < 4:
        return "fewer than four pairs of chains: no two halves to compare"
    rng, found = np.random.default_rng(seed), []
    for _ in range(HALVINGS):
        order = rng.permutation(q)
        rank = _rank(chains, a[order[: q // 2]].mean(axis=0), b[order[q // 2 : 2 * (q // 2)]].mean(axis=0))
        if isinstance(rank, str):
            return rank
        found.append(rank.value)
    return _fisher(float(np.mean(found)), len(np.unique(chains.group)))


def _rank(chains: Chains, a: np.ndarray, b: np.ndarray) -> Interval | str:
    """Spearman's correlation with an interval over groups of records."""
    known = np.isfinite(a) & np.isfinite(b)
    groups = len(np.unique(chains.group[known]))
    if groups < FEWEST or np.ptp(a[known]) == 0 or np.ptp(b[known]) == 0:
        return "too few records, or all alike: they have no order"
    return _fisher(float(stats.spearmanr(a[known], b[known]).statistic), groups)


def _fisher(value: float, n: int) -> Interval:
    """Interval of a rank correlation of n independent records: `atanh r +- 1.96 sqrt((1 + r^2 / 2) / (n - 3))`."""
    if abs(value) >= 1:
        return Interval(value, value, value)
    half = stats.norm.isf(0.025) * np.sqrt((1 + value**2 / 2) / (n - 3))
    return Interval(value, float(np.tanh(np.arctanh(value) - half)), float(np.tanh(np.arctanh(value) + half)))
