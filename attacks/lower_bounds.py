"""Lower bounds on epsilon: how small a claim of (epsilon, delta)-DP the success of an attack rules out.

A bound counts only with the design behind it: which records were put in by a coin, how many, what fixed the threshold,
how many models were trained.  attacks/epsilon.py checks what can be checked and prints it beside the number.

one_run          guesses of who was put in, from one training run (arXiv:2305.08846)
one_run_fdp      the same through trade-off functions (arXiv:2410.22235), which are taken to be Gaussian
clopper_pearson  log((TPR - delta) / FPR) at the ends of their intervals: one record a run, many independent runs
gdp              the Gaussian trade-off that both error rates refute

The first three are those of jax_privacy, whose package imports JAX and is therefore loaded only when a bound is asked
for.  Its own GDP fit is not used: in 2.0.0 it takes mere uncertainty for evidence (99 % of null draws are positive).
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from scipy import special
from scipy.optimize import isotonic_regression

from attacks.study import Unresolved

METHODS = ("one_run", "one_run_fdp", "clopper_pearson", "gdp")
STRATEGIES = ("split", "bonferroni", "explicit")
DELTA, SIGNIFICANCE = 1e-6, 0.05
FEWEST = 2  # scores a side: a half of them chooses the threshold


class Bound(NamedTuple):
    """A lower bound on epsilon, and the one that perfect separation would have shown with the same design."""

    method: str
    strategy: str
    epsilon: float
    largest: float


class Rule(NamedTuple):
    """How a bound is computed: at which delta, at what chance to exceed the true epsilon, and with which threshold."""

    delta: float = DELTA
    significance: float = SIGNIFICANCE
    strategy: str = "split"
    seed: int = 0
    threshold: float | None = None


def bounds(
    in_scores: np.ndarray,
    out_scores: np.ndarray,
    *,
    delta: float = DELTA,
    significance: float = SIGNIFICANCE,
    strategy: str = "split",
    seed: int = 0,
    threshold: float | None = None,
    methods: tuple[str, ...] = METHODS,
) -> list[Bound]:
    """One bound per method from scores of what was put in [m] and of what was left out [n], higher = put in.

    strategy: `split` chooses the threshold on a seeded half of the scores and takes the bound from the other half;
    `bonferroni` corrects for all thresholds of the ROC's hull; `explicit` takes `threshold`, fixed on other records
    (score >= threshold: put in).  significance: the total chance that a bound exceeds the true epsilon.

    Raises Unresolved with fewer than FEWEST scores a side, on a NaN, and where jax_privacy is not installed.
    """
    rule = Rule(delta, significance, strategy, seed, threshold)
    sizes = len(in_scores), len(out_scores)
    return [
        Bound(name, strategy, lower_bound(name, in_scores, out_scores, rule), largest(name, *sizes, rule))
        for name in methods
    ]


def largest(method: str, n_in: int, n_out: int, rule: Rule) -> float:
    """The bound of perfect separation with so many in and out: all that a design could have shown."""
    return _largest(method, n_in, n_out, rule._replace(seed=0, threshold=0.5))


@cache
def _largest(method: str, n_in: int, n_out: int, rule: Rule) -> float:
    return lower_bound(method, np.ones(n_in), np.zeros(n_out), rule)


def lower_bound(method: str, in_scores: np.ndarray, out_scores: np.ndarray, rule: Rule) -> float:
    """One bound by one method; arguments and errors as in `bounds`."""
    inside, outside = (np.asarray(scores, float) for scores in (in_scores, out_scores))
    if rule.strategy not in STRATEGIES or (rule.strategy == "explicit" and rule.threshold is None):
        raise ValueError(
            f"strategy {rule.strategy} is none of {', '.join(STRATEGIES)}, or explicit without a threshold"
        )
    if min(len(inside), len(outside)) < FEWEST:
        raise Unresolved(f"{len(inside)} in and {len(outside)} out: a bound needs {FEWEST} of each")
    if np.isnan(inside).any() or np.isnan(outside).any():
        raise Unresolved("a score is not a number; the model may have diverged")
    if method == "gdp":
        return gaussian_epsilon(_greatest_mu(inside, outside, rule), rule.delta)
    auditing = _auditing()
    strategy = {
        "split": auditing.Split(seed=rule.seed),
        "bonferroni": auditing.Bonferroni(),
        "explicit": auditing.Explicit(rule.threshold),
    }[rule.strategy]
    auditor = auditing.CanaryScoreAuditor(inside, outside)
    find = {
        "one_run": auditor.epsilon_one_run,
        "one_run_fdp": auditor.epsilon_one_run_fdp,
        "clopper_pearson": auditor.epsilon_clopper_pearson,
    }[method]
    return float(find(rule.significance, rule.delta, threshold_strategy=strategy))


def _auditing():
    """jax_privacy's auditing, which is NumPy and SciPy, but stands in a package that imports JAX."""
    try:
        from jax_privacy import auditing
    except ImportError:
        raise Unresolved("privacy lower bounds need jax_privacy 2.0 (pip install 'jax_privacy>=2.0,<2.1')") from None
    return auditing


# --- Gaussian DP -----------------------------------------------------------------------------------------------------


def _greatest_mu(inside: np.ndarray, outside: np.ndarray, rule: Rule) -> float:
    """The largest mu whose Gaussian trade-off the error rates refute; <= 0 where none is.

    mu keeps its sign: two upper limits that add up to more than 1 are no evidence of anything.
    """
    if rule.strategy == "explicit":
        thresholds = np.array([rule.threshold])
    elif rule.strategy == "bonferroni":
        thresholds = hull_thresholds(inside, outside)
    else:
        rng = np.random.default_rng(rule.seed)
        (a, inside), (b, outside) = (np.array_split(rng.permutation(scores), 2) for scores in (inside, outside))
        tried = hull_thresholds(a, b)
        thresholds = tried[[np.argmax(_mu(a, b, tried, rule))]]
    return float(_mu(inside, outside, thresholds, rule).max())


def _mu(inside: np.ndarray, outside: np.ndarray, thresholds: np.ndarray, rule: Rule) -> np.ndarray:
    """`Phi^-1(1 - FPR) - Phi^-1(FNR)` at V thresholds, of upper limits of both rates at `significance / 2V` each.

    -inf where a limit leaves nothing to tell apart at delta.
    """
    level = rule.significance / (2 * len(thresholds))
    missed = np.searchsorted(np.sort(inside), thresholds, side="left")
    alarms = len(outside) - np.searchsorted(np.sort(outside), thresholds, side="left")
    fnr, fpr = upper_limit(missed, len(inside), level), upper_limit(alarms, len(outside), level)
    mu = special.ndtri(1 - fpr) - special.ndtri(fnr)
    return np.where(np.maximum(fnr, fpr) < 1 - rule.delta, mu, -np.inf)


def upper_limit(count: np.ndarray, n: int, significance: float) -> np.ndarray:
    """Clopper and Pearson's one-sided upper limit of a rate with `count` of n; 1 where all are counted."""
    return np.where(count < n, special.betaincinv(count + 1, np.maximum(n - count, 1), 1 - significance), 1.0)


def hull_thresholds(inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """Thresholds of the vertices of the ROC's upper convex hull, the last of them inf.

    The slopes of the hull are the isotonic regression of "was put in" on the score.
    """
    scores, place = np.unique(np.concatenate([inside, outside]), return_inverse=True)
    total = np.bincount(place, minlength=len(scores))
    put_in = np.bincount(place[: len(inside)], minlength=len(scores))
    slope = isotonic_regression(put_in / total, weights=total, increasing=True).x
    return np.append(scores[np.diff(slope, prepend=-1) > 1e-12], np.inf)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of mu-GDP, 0 for mu <= 0: it solves delta = Phi(-eps/mu + mu/2) - e^eps Phi(-eps/mu - mu/2)."""
    if mu <= 0:
        return 0.0
    import dp_accounting  # comes with jax_privacy

    return float(dp_accounting.get_epsilon_gaussian(1 / mu, delta))
