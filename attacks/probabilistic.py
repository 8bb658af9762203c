"""(n, p)-discoverable extraction in closed form from the log-probability of a suffix (arXiv:2410.19482).

Of n independent samples at least one is the suffix with probability `1 - (1 - p_z)^n`; the suffix is (n, p)-extractable
where that is at least p.  Nothing is sampled: `log p_z` is a sum over one pass, under whichever decoding scheme.
Everything stays in logarithms, so that a suffix of probability e^-800 needs a finite logarithm of samples.
"""

import numpy as np


def hit_probability(log_p: np.ndarray, n: float) -> np.ndarray:
    """Probability that one of n samples is the suffix, `1 - (1 - p_z)^n`, for log p_z [..] <= 0."""
    return -np.expm1(n * _log_complement(log_p))


def log_needed_n(log_p: np.ndarray, p: float) -> np.ndarray:
    """Natural log of the samples needed to meet the suffix with probability p; inf where it is never drawn.

    `log n = log(-log(1 - p)) - log(-log(1 - p_z))`, and `-log(1 - p_z) -> p_z` for small p_z.  -inf for p_z = 1.
    Raises ValueError unless 0 < p < 1.
    """
    _check(p)
    log_p = np.minimum(np.asarray(log_p, np.float64), 0)
    small = log_p < -30  # 1 - p_z rounds to 1, or nearly so
    with np.errstate(divide="ignore"):
        rate = np.where(small, log_p, np.log(-_log_complement(np.where(small, -1.0, log_p))))
    return np.log(-np.log1p(-p)) - rate


def needed_n(log_p: np.ndarray, p: float) -> np.ndarray:
    """Samples needed to meet the suffix with probability p, a real number; inf where it is never drawn."""
    with np.errstate(over="ignore"):
        return np.exp(log_needed_n(log_p, p))


def threshold_p(n: float, p: float) -> float:
    """The least p_z that is met in n samples with probability p, `1 - (1 - p)^(1/n)`. Raises ValueError as above."""
    _check(p)
    return float(-np.expm1(np.log1p(-p) / n))


def extractable(log_p: np.ndarray, n: float, p: float) -> np.ndarray:
    """Which suffixes are (n, p)-discoverable, bool [..]; never one whose log p_z is NaN or -inf."""
    return np.asarray(log_p) >= np.log(threshold_p(n, p))


def _log_complement(log_p: np.ndarray) -> np.ndarray:
    """`log(1 - e^x)` for x <= 0, to full precision at both ends."""
    x = np.minimum(np.asarray(log_p, np.float64), 0)  # float32 sums of a certain text may lie just above 0
    with np.errstate(divide="ignore"):
        return np.where(x > -np.log(2), np.log(-np.expm1(x)), np.log1p(-np.exp(x)))


def _check(p: float) -> None:
    if not 0 < p < 1:
        raise ValueError(f"a probability between 0 and 1 is needed, not {p}")
