"""Was this set of texts trained on?  Many weak scores, one p-value for the whole set (statistics.md 7).

On half of the suspect texts and of texts known to be unseen a linear classifier over all scores is fitted; on the other
halves its outputs are compared by a one-sided test.  A few thousand texts can be enough where no single one is told.
Where texts come in groups (one person's, windows of one text) a group is one text, with the mean of its scores: halves
that share a person, or a test that counts every window, would find a set that nobody used.
After Maini et al. 2024 (pratyushmaini/llm_dataset_inference), but clipping and scaling are fitted on the first half and
on both classes together: the public code's scaling per class makes classes differ that do not.
"""

import numpy as np
from scipy import stats

from attacks.membership import ATTACKS, parse
from attacks.study import Study, Unresolved

COLUMNS = "model technique setting role_pair measure n value attacks seed"
SIZES = (50, 100, 200, 500, 1000)  # texts of each class
HALVES = 7  # random halves behind one p-value
CONTROLS = 100  # repetitions with two sets of non-members
TAIL = 0.025


def p_value(suspect: np.ndarray, known: np.ndarray, rng: np.random.Generator) -> float:
    """One-sided p-value of one random half: suspect texts [m, k scores] above known non-members [n, k]."""
    (fit_s, test_s), (fit_k, test_k) = _halves(suspect, rng), _halves(known, rng)
    fit = np.concatenate([fit_s, fit_k])
    low, high = np.quantile(fit, (TAIL, 1 - TAIL), axis=0)
    centre, scale = np.clip(fit, low, high).mean(axis=0), np.clip(fit, low, high).std(axis=0)
    scaled = lambda part: (np.clip(part, low, high) - centre) / np.where(scale > 0, scale, 1)
    label = np.concatenate([np.full(len(fit_s), 1 / len(fit_s)), np.full(len(fit_k), -1 / len(fit_k))])
    design = scaled(fit)
    # Ridge: the scores are nearly copies of one another.  einsum: for so little, threads cost more than they save.
    product = np.einsum("ij,ik->jk", design, design) / len(fit)
    weights = np.linalg.solve(product + 0.01 * np.eye(design.shape[1]), np.einsum("ij,i->j", design, label))
    above, below = (np.einsum("ij,j->i", scaled(part), weights) for part in (test_s, test_k))
    if np.ptp(np.concatenate([above, below])) == 0:
        return 1.0
    return float(stats.ttest_ind(above, below, equal_var=False, alternative="greater").pvalue)


def combined(suspect: np.ndarray, known: np.ndarray, rng: np.random.Generator, halves: int = HALVES) -> float:
    """`min(1, 2 median p)` over random halves, which depend on one another."""
    return min(1.0, 2 * float(np.median([p_value(suspect, known, rng) for _ in range(halves)])))


def _halves(values: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    order = rng.permutation(len(values))
    return values[order[: len(values) // 2]], values[order[len(values) // 2 :]]


def controls(known: np.ndarray, rng: np.random.Generator, repetitions: int = CONTROLS) -> np.ndarray:
    """`combined` [repetitions] between two random sets of non-members: as small as 0.05 in one of 20, or fewer."""
    return np.array([combined(*_halves(known, rng), rng) for _ in range(repetitions)])


def dataset_rows(study: Study) -> list[dict]:
    """Rows of dataset.csv for every model (but swaps) and seed on private against held-out records.

    `measure`: `p_value` as a function of n, the texts (or groups) of each class; of the false-positive control, the
    same test with two sets of non-members (n of them together), `rejected_at_0.05` and `too_small_ks_p`, the p-value
    that these p-values are not smaller than uniform ones.  The test assumes that both sets are drawn alike: see the
    blind gate.
    """
    rows = []
    for run, seed in study.tables:
        if study.provenance(run).get("swap_of"):
            continue
        try:
            members, nonmembers, number = _matrices(study, run, seed)
        except Unresolved:
            continue
        head = study.head(run) | {"role_pair": "private-heldout", "attacks": number, "seed": seed}
        most = min(len(members), len(nonmembers))
        rng = np.random.default_rng([study.settings["seed"], seed])
        for n in sorted({*(size for size in SIZES if size < most), min(most, SIZES[-1])}):
            if n >= 2 * number:  # fewer texts than weights in either half show nothing
                p = combined(*(rng.permutation(part)[:n] for part in (members, nonmembers)), rng)
                rows.append(head | {"measure": "p_value", "n": n, "value": p})
        if most // 2 >= 2 * number:
            found = controls(rng.permutation(nonmembers)[: 2 * SIZES[-1]], rng)
            n = min(len(nonmembers), 2 * SIZES[-1])
            rows.append(head | {"measure": "rejected_at_0.05", "n": n, "value": float((found < 0.05).mean())})
            ks = float(stats.kstest(found, "uniform", alternative="greater").pvalue)
            rows.append(head | {"measure": "too_small_ks_p", "n": n, "value": ks})
    return rows


def _matrices(study: Study, run: str, seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Scores of members [m, k] and non-members [n, k] by every attack that takes one pass, or a variant, of the run.

    One row a record, or a group of records.
    """
    columns = []
    for attack in study.attacks(run):
        row = ATTACKS[parse(attack)[0]]
        if row.fitted or row.access.startswith("auditor") or row.reference or row.weights:
            continue  # white-box attacks see a part of the records
        try:
            (pair,) = study.pairs(run, seed, attack, "private-heldout")
        except Unresolved:
            continue
        sides = zip((pair.members, pair.nonmembers), pair.groups or (None, None), strict=True)
        columns.append([_by_group(*side) for side in sides])
    if len(columns) < 2:
        raise Unresolved("dataset inference needs two attacks at least")
    members, nonmembers = (np.stack([column[side] for column in columns], axis=1) for side in (0, 1))
    return members, nonmembers, len(columns)


def _by_group(values: np.ndarray, codes: np.ndarray | None) -> np.ndarray:
    if codes is None:
        return values
    codes = np.unique(codes, return_inverse=True)[1]
    return np.bincount(codes, values) / np.bincount(codes)
