"""RMIA: does a record stand out from what no model was trained on, each measured against reference models?

`r(x) = p_T(x) / pbar(x)` with p the geometric mean of the tokens' probabilities; the score is the share of population
records z with `r(x) / r(z) > gamma`.  References are chosen by who was trained on what, never by the size of their
signals.  Source: arXiv:2312.03262; attacks.md 6.3.

Legend: c chains, r references, n records, z records of the population.
"""

from collections.abc import Callable

import numpy as np

from attacks.chains import Chains
from attacks.statistics import auc
from attacks.study import Unresolved

GAMMA = 1.0
A = 0.3  # of the offline form, as published for models of text and pictures alike
GRID = np.linspace(0, 1, 11)  # of `a` where it is tuned
SIGNAL = "prob"


def rmia(
    p: np.ndarray,
    references: np.ndarray,
    inside: np.ndarray,
    z: np.ndarray,
    z_references: np.ndarray,
    *,
    usable: np.ndarray | None = None,
    form: str = "offline",
    gamma: float = GAMMA,
    a: float = A,
) -> np.ndarray:
    """Scores [n] in [0, 1] of one target model, multiples of 1/z; NaN signals of the target abstain (-inf).

    p [n], z [z]: the target's signals.  references [r, n], z_references [r, z]: those of the others, which all lack z.
    inside: bool [r, n], which were trained with the record.  usable: bool [r, n], which may be a reference of it.
    form: offline, `pbar = (1 + a)/2 mean_out + (1 - a)/2`; online, the mean over in and out.
    Raises Unresolved where a record has no reference on a side that the form needs, or where there is no population.
    """
    usable = np.ones(inside.shape, bool) if usable is None else usable
    known = np.isfinite(z)
    if not known.any():
        raise Unresolved("no records of role 'population': RMIA compares with what no model was trained on")
    chosen = [~inside & usable] if form == "offline" else [~inside & usable, inside & usable]
    if lonely := max(int((~side.any(axis=0)).sum()) for side in chosen):
        raise Unresolved(f"{lonely} records have no reference model on one side: more pairs of chains are needed")
    mask = np.logical_or.reduce(chosen)
    mean = np.where(mask, references, 0.0).sum(axis=0) / mask.sum(axis=0)
    z_mean = z_references[usable.any(axis=1)].mean(axis=0)
    if form == "offline":
        mean, z_mean = ((1 + a) / 2 * each + (1 - a) / 2 for each in (mean, z_mean))
    elif form != "online":
        raise ValueError(f"unknown form {form!r}; known are offline, online")
    ratio, z_ratio = p / mean, np.sort((z / z_mean)[known])
    above = np.searchsorted(gamma * z_ratio, ratio, side="left")  # gamma r(z) < r(x), for all z at once
    return np.where(np.isnan(ratio), -np.inf, above / len(z_ratio))


def chain_scores(chains: Chains, model: str, form: str = "offline", *, tuned: bool = False) -> np.ndarray:
    """Scores [c, n] of all chains as targets, each against all others but its pair.

    tuned: `a` is the value of GRID with the greatest AUC when one reference, the first chain of the next pair, is
    attacked without the target's pair.  Raises Unresolved as `rmia`, and for the design `cheap`.
    """
    if chains.design == "cheap":
        raise Unresolved("one pair of teachers: its students give calibrated scores, no RMIA")
    values, beyond = chains.statistic(model, SIGNAL), chains.population(model, SIGNAL)

    def attacked(target: int, usable: np.ndarray, a: float) -> np.ndarray:
        both = values[target], values, chains.teacher_in, beyond[target], beyond
        return rmia(*both, usable=usable, form=form, a=a)

    found = np.empty(values.shape)
    for target in range(len(chains)):
        usable = chains.comparable(target, model)
        a = _tune(chains, model, target, attacked) if tuned else A
        found[target] = attacked(target, usable, a)
    return found


def _tune(chains: Chains, model: str, target: int, attacked: Callable[[int, np.ndarray, float], np.ndarray]) -> float:
    numbers = np.unique(chains.pairs)
    following = numbers[(np.searchsorted(numbers, chains.pairs[target]) + 1) % len(numbers)]
    chosen = int(np.argmax(chains.pairs == following))
    usable = chains.comparable(chosen, model) & (chains.pairs != chains.pairs[target])[:, None]
    member = chains.teacher_in[chosen]
    aucs = []
    for a in GRID:
        scores = attacked(chosen, usable, a)
        aucs.append(auc(scores[member], scores[~member]))
    return float(GRID[int(np.argmax(aucs))])
