"""Logistic regression that tells memorized from other examples, and how well it does (borkar2026 2.8).

L2 with C = 1 on standardised features, three negatives a positive, threshold .5: what the paper does not say is ours.
Scores are log-odds; greater means more at risk.  n examples, F features, positives are the memorized examples; counts
[n] say how often each example stands in a resample.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.spatial import cKDTree
from scipy.special import expit

from attacks.features import Candidates
from attacks.resampling import resampled_auc
from attacks.study import Unresolved

TRIALS = 100
RATIO = 3  # negatives a positive
HELD_OUT = 0.3
FEWEST = 10  # memorized examples, below which nothing is fitted
RECALL = 0.95
C = 1.0  # inverse of the weight of the penalty
STEPS = 100  # of Newton's method; six are usual
FITS = 10  # draws of negatives whose classifiers are averaged, where a half or all are fitted


class TooFew(Unresolved):
    """Too few examples of a kind to fit anything."""


class Classifier(NamedTuple):
    """`(x - mean) / scale @ weights + intercept`, the log-odds; weights are the standardised coefficients [F]."""

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    intercept: float

    def score(self, x: np.ndarray) -> np.ndarray:
        """Log-odds [n] of features [n, F]."""
        return (x - self.mean) / self.scale @ self.weights + self.intercept


def fit(x: np.ndarray, y: np.ndarray, counts: np.ndarray | None = None) -> Classifier:
    """Fit features [n, F] to labels bool [n]; counts: how often each example stands there [n], once if not given.

    Newton's method on scikit-learn's objective (a test holds them together): thousands of small fits, a tenth of the
    time.
    """
    w = np.ones(len(y)) if counts is None else np.asarray(counts, np.float64)
    mean = np.average(x, axis=0, weights=w)
    scale = _scale(np.sqrt(np.average((x - mean) ** 2, axis=0, weights=w)))
    z = np.column_stack([(x - mean) / scale, np.ones(len(y))])
    penalty = np.append(np.full(x.shape[1], 1 / C), 0.0)  # none on the intercept
    signs, b = np.where(y, 1.0, -1.0), np.zeros(len(penalty))

    def objective(b: np.ndarray) -> float:
        return float(w @ np.logaddexp(0, -signs * (z @ b)) + penalty @ b**2 / 2)

    value = objective(b)
    for _ in range(STEPS):
        p = expit(z @ b)
        slope = z.T @ (w * (p - y)) + penalty * b
        step = np.linalg.solve((z.T * (w * p * (1 - p))) @ z + np.diag(penalty), slope)
        while (new := objective(b - step)) > value + 1e-12 * abs(value):
            step /= 2
        b, value = b - step, new
        if np.abs(step).max() < 1e-9:
            break
    return Classifier(mean, scale, b[:-1], float(b[-1]))


def _scale(spread: np.ndarray) -> np.ndarray:
    """What features are divided by; a feature that does not vary says nothing, and stays as it is."""
    return np.where(spread > 0, spread, 1.0)


class Trial(NamedTuple):
    """Indices of the examples that one classifier is fitted on, of those it is tried on, and of all held out ones."""

    train: np.ndarray
    test: np.ndarray
    held_out: np.ndarray


def need(found: Candidates, rows: np.ndarray | None = None, least: int = FEWEST) -> None:
    """Raises TooFew where there are fewer memorized examples or others (among `rows`, bool [n])."""
    y = found.memorized if rows is None else found.memorized[rows]
    if min(positives := int(y.sum()), others := int((~y).sum())) < least:
        raise TooFew(f"{positives} memorized examples, {others} others: at least {least} of both are needed to predict")


def trials(found: Candidates, seed: int, number: int = TRIALS, match: np.ndarray | None = None) -> Iterator[Trial]:
    """Splits into train and test, positives and others apart, whole groups; on each side fresh negatives, 1:3.

    match: [n, F], the others nearest to the positives in these are the negatives; drawn at random if not given.
    Raises TooFew, also where no split has both kinds on both sides.
    """
    need(found)
    groups = np.unique(found.groups, return_inverse=True)[1]
    positive = np.bincount(groups, found.memorized) > 0
    if positive.sum() < 2:
        raise TooFew("all memorized examples are of one group: none can be held out")
    made = 0
    for number_of in range(number):
        rng = np.random.default_rng([seed, number_of])
        held = np.zeros(len(positive), bool)
        for kind in (positive, ~positive):
            of_kind = rng.permutation(np.flatnonzero(kind))
            held[of_kind[: round(HELD_OUT * len(of_kind))]] = True
        sides = [np.flatnonzero(~held[groups]), np.flatnonzero(held[groups])]
        chosen = [_with_negatives(found.memorized, side, rng, match) for side in sides]
        if all(len(np.unique(found.memorized[side])) == 2 for side in chosen):
            made += 1
            yield Trial(*chosen, sides[1])
    if not made:
        raise TooFew("no split has memorized examples and others both to fit on and to hold out")


def _with_negatives(y: np.ndarray, side: np.ndarray, rng: np.random.Generator, match: np.ndarray | None) -> np.ndarray:
    """The positives of a side, and RATIO times as many negatives as far as there are. Indices."""
    positives, others = side[y[side]], side[~y[side]]
    wanted = min(RATIO * len(positives), len(others))
    if match is None or not wanted:
        return np.concatenate([positives, rng.choice(others, wanted, replace=False)])
    return np.concatenate([positives, others[_nearest(match[positives], match[others], wanted, rng)]])


def _nearest(x: np.ndarray, others: np.ndarray, wanted: int, rng: np.random.Generator) -> np.ndarray:
    """Of the others so many that lie nearest to some row of x, each once: the rows of x take turns in random order."""
    tree, taken, found = cKDTree(others), np.zeros(len(others), bool), []
    turns = np.resize(rng.permutation(len(x)), wanted)
    near = tree.query(x, min(len(others), 4 * RATIO))[1].reshape(len(x), -1)
    for row in turns:
        free = near[row][~taken[near[row]]]
        if not len(free):  # all near ones are taken: look at all
            order = tree.query(x[row], len(others))[1]
            free = order[~taken[order]]
        taken[free[0]] = True
        found.append(free[0])
    return np.array(found, int)


# --- scores that never saw the label ----------------------------------------------------------------------------------


def fitted_on(
    found: Candidates,
    names: tuple[str, ...],
    rows: np.ndarray,
    seed: int,
    counts: np.ndarray | None = None,
    fits: int = FITS,
) -> Classifier:
    """The mean of several classifiers on these rows (bool [n]), each with negatives of its own.

    Raises TooFew, also where the counts leave none of a kind.
    """
    need(found, rows, FEWEST // 2)
    x, y, weights, intercepts = found.matrix(names), found.memorized, [], []
    for number in range(fits):
        chosen = _with_negatives(y, np.flatnonzero(rows), np.random.default_rng([seed, number]), None)
        if counts is not None:
            chosen = chosen[counts[chosen] > 0]
            if len(np.unique(y[chosen])) < 2:
                raise TooFew("a resample has no memorized examples or no others")
        one = fit(x[chosen], y[chosen], None if counts is None else counts[chosen])
        weights.append(one.weights / one.scale)  # of the features as they are: these can be averaged
        intercepts.append(one.intercept - one.mean @ weights[-1])
    scale = _scale(x[rows].std(axis=0))
    mean, slopes = x[rows].mean(axis=0), np.mean(weights, axis=0)
    return Classifier(mean, scale, slopes * scale, float(np.mean(intercepts) + mean @ slopes))


def crossed(
    source: Candidates,
    target: Candidates,
    names: tuple[str, ...],
    seed: int,
    counts: np.ndarray | None = None,
    fits: int = FITS,
) -> np.ndarray:
    """Log-odds [n] of the target's examples from a classifier fitted on the source's other half.

    Neither an example's own label is seen, nor in the source the example itself. Raises TooFew.
    counts: of both, which then have the same examples; NaN for all in a resample that leaves a half none of a kind.
    """
    x, scores = target.matrix(names), np.empty(len(target.ids))
    for half in (False, True):
        try:
            classifier = fitted_on(source, names, source.half != half, seed, counts, fits)
        except TooFew:
            if counts is None:
                raise
            return np.full(len(target.ids), np.nan)
        scores[target.half == half] = classifier.score(x[target.half == half])
    return scores


# --- how good scores are ----------------------------------------------------------------------------------------------


def quality(scores: np.ndarray, y: np.ndarray, counts: np.ndarray | None = None) -> dict[str, float]:
    """AUC, and recall, precision and share flagged at log-odds 0, of scores [n]; positive where y (bool [n]).

    NaN where a resample has nothing to measure it on, or no scores.
    """
    if np.isnan(scores).any():
        return dict.fromkeys(("auc", "recall", "precision", "flagged"), np.nan)
    w, flagged = np.ones(len(y)) if counts is None else np.asarray(counts, np.float64), scores > 0
    mean = lambda hits, of: float(w[hits & of].sum() / w[of].sum()) if w[of].sum() else np.nan
    both = w[y].sum() and w[~y].sum()
    won = resampled_auc(scores[y], scores[~y], w[None, y], w[None, ~y])[0] if both else np.nan
    found = {"auc": float(won), "recall": mean(flagged, y), "precision": mean(y, flagged)}
    return found | {"flagged": mean(flagged, np.ones(len(y), bool))}


def at_prior(scores: np.ndarray, y: np.ndarray, counts: np.ndarray | None = None) -> dict[str, float]:
    """Average precision, and precision at the highest threshold whose recall is RECALL: of n examples as they come."""
    names = "average_precision", f"precision_at_recall_{RECALL:g}"
    order = np.argsort(-scores, kind="stable")
    w = np.ones(len(y)) if counts is None else np.asarray(counts, np.float64)[order]
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # of each run of ties
    hits, above = np.cumsum(w * y[order])[last], np.cumsum(w)[last]  # at or above each threshold, from the highest down
    if np.isnan(scores).any() or not hits[-1]:
        return dict.fromkeys(names, np.nan)
    precision = hits / np.maximum(above, 1)
    values = precision @ np.diff(hits, prepend=0) / hits[-1], precision[np.argmax(hits >= RECALL * hits[-1])]
    return dict(zip(names, map(float, values), strict=True))


def tried(
    found: Candidates, names: tuple[str, ...], trial: Trial, counts: np.ndarray | None = None
) -> dict[tuple[str, str], float]:
    """Fit a trial and try it: by protocol (`paper`, `natural_prior`) and measure; nothing where a class is missing."""
    x, y = found.matrix(names), found.memorized
    train, test, whole = (rows if counts is None else rows[counts[rows] > 0] for rows in trial)
    if any(len(np.unique(y[rows])) < 2 for rows in (train, test)):
        return {}
    of = (lambda rows: None) if counts is None else (lambda rows: counts[rows])
    classifier = fit(x[train], y[train], of(train))
    sample, prior = (quality(classifier.score(x[rows]), y[rows], of(rows)) for rows in (test, whole))
    prior |= at_prior(classifier.score(x[whole]), y[whole], of(whole))
    del sample["flagged"]  # of a sample with three others a positive it says nothing
    sample |= {f"coefficient:{name}": float(w) for name, w in zip(names, classifier.weights, strict=True)}
    both = {"paper": sample, "natural_prior": prior}
    return {(protocol, name): value for protocol, values in both.items() for name, value in values.items()}


def importance(found: Candidates, names: tuple[str, ...], trial: Trial, seed: int) -> dict[str, float]:
    """What the AUC of a trial loses when each feature is shuffled among the examples that it is tried on."""
    x, y = found.matrix(names), found.memorized[trial.test]
    classifier = fit(x[trial.train], found.memorized[trial.train])
    x, rng, lost = x[trial.test], np.random.default_rng(seed), {}
    scores = classifier.score(x)
    whole = quality(scores, y)["auc"]
    for name, slope, column in zip(names, classifier.weights / classifier.scale, x.T, strict=True):
        lost[name] = whole - quality(scores + slope * (rng.permutation(column) - column), y)["auc"]
    return lost
