"""Influence of one record on another: what having x in the training data does to how well a model knows x'.

`infl(x -> x') = mean M(x') of models with x - mean M(x') of models without` (arXiv:2112.12938).  With few chains the
coins of x and x' agree by chance, and x' would pass for influenced by x where it is its own presence that counts: M(x')
is taken less its mean among models that agree on x' itself.  Pairs are kept above the greatest value that shuffled
chains show.

Legend: c chains, n records, q pairs of chains.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from attacks.chains import Chains
from attacks.study import Study, Unresolved

COLUMNS = ("model", "effect", "measure", "source_id", "target_id", "influence", "floor")
SHUFFLES = 19  # of which the greatest value is passed by chance in one table of twenty
STRONGEST = 1000  # pairs kept, at most
CELLS = 1 << 22  # of one block of the matrix


def influences(study: Study, chains: Chains, measure: str = "accuracy") -> pd.DataFrame:
    """The strongest pairs of records, by ids: influence of source on target, beside the noise floor that it passes.

    `direct` on the teacher, `inherited` on the student; in two_by_two `direct` on the student, too.  Records of one
    group are never paired: they share their coin.  Empty for the design `cheap`, and where the tables lack a column
    that the measure needs.
    """
    frames = [pd.DataFrame(columns=list(COLUMNS))]
    for model, effect, inside in _kinds(chains):
        try:
            values, known = _own_removed(chains.statistic(model, measure), inside)
        except Unresolved:
            continue  # the counterfactual rows of this measure say why
        if not known.any():
            continue
        strongest, floor = above_noise(values[:, known], inside[:, known], chains.pairs, chains.group[known], study)
        source, target, influence = strongest
        ids = chains.ids[known]
        columns = {"source_id": ids[source], "target_id": ids[target], "influence": influence, "floor": floor}
        frames.append(pd.DataFrame({"model": f"shadow/{model}", "effect": effect, "measure": measure} | columns))
    return pd.concat([frame for frame in frames if len(frame)] or frames[:1], ignore_index=True)


def _kinds(chains: Chains) -> Iterator[tuple[str, str, np.ndarray]]:
    if chains.design == "cheap":
        return
    yield "teacher", "direct", chains.teacher_in
    yield "student", "inherited", chains.teacher_in
    if chains.design == "two_by_two":
        yield "student", "direct", chains.student_in


def _own_removed(values: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values [c, n] less the mean of the models on the same side of the record itself, and which records have both."""
    rest = values.copy()
    known = np.isfinite(values).all(axis=0) & inside.any(axis=0) & ~inside.all(axis=0)
    for side in (inside, ~inside):
        mean = np.where(side, np.nan_to_num(values), 0).sum(axis=0) / np.maximum(side.sum(axis=0), 1)
        rest = np.where(side, rest - mean, rest)
    return rest, known


def matrix(values: np.ndarray, inside: np.ndarray, sources: slice = slice(None)) -> np.ndarray:
    """`infl` of these sources on all records [s, n]: one product of contrasts [s, c] and values [c, n]."""
    chosen = inside[:, sources].T
    here, there = chosen.sum(axis=1, keepdims=True), (~chosen).sum(axis=1, keepdims=True)
    if not (here.all() and there.all()):
        raise Unresolved("a record is in all chains, or in none: it has no influence that could be seen")
    return (chosen / here - ~chosen / there) @ values


def above_noise(
    values: np.ndarray, inside: np.ndarray, pairs: np.ndarray, groups: np.ndarray, study: Study
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], float]:
    """The strongest influences above the noise floor, ((source, target, influence), floor), greatest first.

    The floor is the greatest value in SHUFFLES of the chains: whole pairs change places, and the two sides within.
    """
    codes = np.unique(groups, return_inverse=True)[1]
    rng = np.random.default_rng([study.settings["seed"], 7])
    greatest = [_greatest(values[_shuffle(pairs, rng)], inside, codes, 1)[2] for _ in range(SHUFFLES)]
    floor = float(max((each.max(initial=0.0) for each in greatest), default=0.0))
    found = _greatest(values, inside, codes, STRONGEST)
    keep = found[2] > floor
    return tuple(part[keep] for part in found), floor


def _shuffle(pairs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An order of the chains [c] in which whole pairs, and the chains within each, have changed places."""
    blocks = [np.flatnonzero(pairs == pair) for pair in np.unique(pairs)]
    return np.concatenate([rng.permutation(blocks[i]) for i in rng.permutation(len(blocks))])


def _greatest(values: np.ndarray, inside: np.ndarray, codes: np.ndarray, most: int) -> tuple[np.ndarray, ...]:
    """Source, target and value of the greatest influences between records of different groups."""
    n, found = len(codes), []
    for rows in np.array_split(np.arange(n), max(1, -(-n * n // CELLS))):
        block = matrix(values, inside, slice(rows[0], rows[-1] + 1))
        block[codes[rows][:, None] == codes] = -np.inf
        count = min(most, block.size)
        at = np.argpartition(block.ravel(), -count)[-count:] if count > 1 else np.array([block.argmax()])
        found.append((rows[0] + at // n, at % n, block.ravel()[at]))
    source, target, value = (np.concatenate(part) for part in zip(*found, strict=True))
    order = np.argsort(-value, kind="stable")[:most]
    return source[order], target[order], value[order]
