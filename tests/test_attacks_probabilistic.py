"""(n, p)-discoverable extraction: fixed values (memorization.md 12, statistics.md 12), limits, identities."""

import numpy as np
import pytest

from attacks.probabilistic import extractable, hit_probability, log_needed_n, needed_n, threshold_p


def test_fixed_values(check):
    worked = {-4.749088: 264.747, -4.519400: 210.179, -4.089112: 136.280, -6.388305: 1368.536, -4.012278: 126.115}
    for log_p, n in worked.items():
        check("(n, p): samples needed in the worked example", abs(needed_n(log_p, 0.9) - n), 2e-3)
    for p_z, n in {0.8: 1.4307, 0.01: 229.105}.items():
        check("(n, p): inverse", abs(needed_n(np.log(p_z), 0.9) - n) / n, 4e-5)
    for n, p in {2: 0.96, 5: 0.99968, 10: 0.9999999}.items():
        check("(n, p): probability of a hit", abs(hit_probability(np.log(0.8), n) - p), 5e-9)
    for logs, p in {-0.35: 0.7047, -1.7: 0.1827, -0.5: 0.6065, -2.0: 0.1353}.items():
        check("(n, p): one sample is the suffix itself", abs(hit_probability(logs, 1) - p), 5e-5)


def test_threshold_is_the_inverse(check):
    for n in (1, 7, 1e4, 1e9):
        for p in (0.05, 0.5, 0.9, 0.999):
            p_z = threshold_p(n, p)
            check("(n, p): threshold against samples needed", abs(needed_n(np.log(p_z), p) / n - 1), 1e-9)
            check("(n, p): threshold against probability", abs(hit_probability(np.log(p_z), n) - p), 1e-9)
            assert extractable(np.log(p_z) + 1e-12, n, p) and not extractable(np.log(p_z) - 1e-6, n, p)
    assert threshold_p(1, 0.5) == pytest.approx(0.5)


def test_tiny_and_certain_suffixes(check):
    with np.errstate(all="raise"):
        found = log_needed_n(np.array([-5000.0, -800.0, -31.0, -29.0, 0.0]), 0.9)
    check("(n, p): tiny p_z", np.abs(found[:4] - (np.log(np.log(10)) - np.array([-5000, -800, -31, -29]))).max(), 1e-12)
    assert found[4] == -np.inf and needed_n(0.0, 0.9) == 0
    assert needed_n(-np.inf, 0.5) == np.inf and needed_n(-5000.0, 0.5) == np.inf
    assert hit_probability(np.array([-np.inf, 0.0, 1e-9]), 10**6).tolist() == [0, 1, 1]
    assert hit_probability(-40.0, 1e15) == pytest.approx(1e15 * np.exp(-40.0), rel=1e-2)


def test_what_cannot_be_drawn_is_never_extractable():
    assert extractable(np.array([-np.inf, np.nan, -1.0]), 10**12, 0.5).tolist() == [False, False, True]


def test_more_samples_extract_more_and_a_greater_demand_less():
    log_p = -np.random.default_rng(0).gamma(2, 5, 500)
    shares = np.array([[extractable(log_p, n, p).mean() for n in (1, 10, 1000, 10**5)] for p in (0.1, 0.5, 0.99)])
    assert (np.diff(shares, axis=1) >= 0).all() and (np.diff(shares, axis=0) <= 0).all()
    assert shares[0, 0] < 0.5 < shares[0, -1]


@pytest.mark.parametrize("p", [0, 1, -0.1, 2])
def test_probabilities_outside_of_0_and_1_are_refused(p):
    with pytest.raises(ValueError, match="between 0 and 1"):
        threshold_p(10, p)
