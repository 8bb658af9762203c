"""LiRA: fixed values, SciPy's densities, a toy whose optimum is known, and references that would carry the answer."""

import numpy as np
import pytest
from scipy import stats

from attacks import lira
from attacks.statistics import auc, tpr_step
from attacks.study import Unresolved
from tests.planted_chains import in_memory

IN, OUT, PHI = np.array([-1.0, -0.6, -0.8, -1.4]), np.array([-2.0, -2.6, -1.8, -2.2, -3.0]), np.array([-1.2])
REFERENCES = np.concatenate([IN, OUT])[:, None]
INSIDE = (np.arange(9) < 4)[:, None]


def mean_over_targets(statistic, scores, inside) -> float:
    return float(np.mean([statistic(own[i], own[~i]) for own, i in zip(scores, inside, strict=True)]))


@pytest.mark.parametrize(
    ("form", "value"),
    [
        ("online", 2.555657),
        ("offline_pdf", 2.770823),
        ("offline_cdf", 4.591440),
        ("offset", -1.2 + (0.9 + 2.2) / 2),
        ("offset_out", 1.0),
        ("in_only", -((-0.3 / 0.295804) ** 2) / 2 - np.log(0.295804 * np.sqrt(2 * np.pi))),
    ],
)
def test_fixed_values(form, value, check):
    check("LiRA fixed values", abs(lira.lira(PHI, REFERENCES, INSIDE, form, own=True)[0] - value), 2e-6)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("centre", ["median", "mean"])
def test_all_forms_equal_a_loop_over_records_with_scipy(own, centre, check):
    rng = np.random.default_rng(0)
    n, r = 30, 11
    phi, references, inside = rng.normal(size=n), rng.normal(size=(r, n)), rng.random((r, n)) < 0.5
    inside[0], inside[1] = True, False
    middle = getattr(np, centre)
    sides = [[(references[m[:, i], i]) for i in range(n)] for m in (inside, ~inside)]
    rest = [np.concatenate([values - middle(values) for values in side]) for side in sides]
    for i in range(n):
        (a, b), (s, t) = [middle(side[i]) for side in sides], [np.std(side[i]) for side in sides]
        s, t = (max(s, 1e-3 * np.std(rest[0])), max(t, 1e-3 * np.std(rest[1]))) if own else map(np.std, rest)
        expected = {
            "online": stats.norm.logpdf(phi[i], a, s) - stats.norm.logpdf(phi[i], b, t),
            "in_only": stats.norm.logpdf(phi[i], a, s),
            "offline_pdf": -stats.norm.logpdf(phi[i], b, t),
            "offline_cdf": -stats.norm.logsf(phi[i], b, t),
            "offset": phi[i] - (a + b) / 2,
            "offset_out": phi[i] - b,
        }
        for form, value in expected.items():
            found = lira.lira(phi, references, inside, form, own=own, centre=centre)[i]
            check("LiRA against SciPy", abs(found - value) / max(1, abs(value)), 1e-9)


def test_every_record_has_its_own_spread_from_32_models_a_side_on():
    rng = np.random.default_rng(1)
    phi, references = rng.normal(size=20), rng.normal(size=(65, 20))
    for models in (63, 64):
        inside = np.broadcast_to(np.arange(models)[:, None] % 2 == 0, (models, 20))
        found = lira.lira(phi, references[:models], inside)
        wanted = lira.lira(phi, references[:models], inside, own=models == 64)
        np.testing.assert_array_equal(found, wanted)
        assert not np.allclose(found, lira.lira(phi, references[:models], inside, own=models != 64))


def test_two_references_that_agree_are_no_certainty():
    rng = np.random.default_rng(2)
    references, inside = rng.normal(size=(8, 50)), np.broadcast_to(np.arange(8)[:, None] < 4, (8, 50))
    references[4:, 0] = 0.3
    phi = np.full(50, 0.31)
    assert lira.lira(phi, references, inside, "offline_pdf", own=True)[0] < 1e3
    assert lira.lira(phi, references, inside, "offline_pdf", own=True, compat="tfp")[0] > 1e50


def test_what_is_not_a_number_is_left_out_and_a_record_with_nothing_abstains():
    references = REFERENCES.repeat(3, axis=1)
    references[4, 0], references[4:, 1] = np.nan, np.nan
    inside = INSIDE.repeat(3, axis=1)
    found = lira.lira(PHI.repeat(3), references, inside, "offset_out")
    np.testing.assert_allclose(found, [-1.2 - np.median(OUT[1:]), -np.inf, 1.0], rtol=1e-12)
    alike = lira.lira(PHI.repeat(3), references, inside, "offset_out", compat="tfp")
    assert alike[1] == pytest.approx(-1.2 - np.mean([np.median(OUT[1:]), -2.2]))


def test_a_missing_reference_is_an_error_not_a_smaller_average():
    inside = INSIDE.repeat(2, axis=1)
    inside[:, 1] = True
    with pytest.raises(Unresolved, match="1 records have no reference model on one side"):
        lira.lira(PHI.repeat(2), REFERENCES.repeat(2, axis=1), inside, "offline_cdf")
    lira.lira(PHI.repeat(2), REFERENCES.repeat(2, axis=1), inside, "in_only")  # has no need of them


def test_one_reference_without_the_record_is_enough_to_rank():
    rng = np.random.default_rng(3)
    phi, out = rng.normal(size=40), rng.normal(size=(1, 40))
    for form in ("offline_cdf", "offset_out"):
        found = lira.lira(phi, out, np.zeros((1, 40), bool), form)
        assert (np.argsort(found) == np.argsort(phi - out[0])).all()
    both = np.concatenate([out, out + 1])
    online = lira.lira(phi, both, np.array([[False], [True]]).repeat(40, axis=1))
    assert (np.argsort(online) == np.argsort(phi - out[0])).all()


def test_online_does_not_depend_on_the_scale_of_the_statistic(check):
    rng = np.random.default_rng(4)
    phi, references, inside = rng.normal(size=25), rng.normal(size=(9, 25)), INSIDE.repeat(25, axis=1)
    for own in (True, False):
        plain = lira.lira(phi, references, inside, own=own)
        check(
            "LiRA under an affine map",
            abs(lira.lira(3 * phi - 7, 3 * references - 7, inside, own=own) - plain).max(),
            1e-9,
        )


def test_several_statistics_of_a_record_are_averaged(check):
    rng = np.random.default_rng(5)
    phi, references, inside = rng.normal(size=(3, 20)), rng.normal(size=(9, 3, 20)), INSIDE.repeat(20, axis=1)
    found = lira.lira(phi, references, inside, own=True)
    each = [lira.lira(phi[a], references[:, a], inside, own=True) for a in range(3)]
    check("LiRA over several statistics", abs(found - np.mean(each, axis=0)).max(), 1e-9)


def gaussians(chains: int, n: int, seed: int = 0):
    """Records of different difficulty, gain and spread, and the likelihood ratio with all of them known."""
    rng = np.random.default_rng(seed)
    centre, gain, spread = rng.normal(0, 3, n), rng.uniform(0, 2, n), rng.uniform(0.5, 1.5, n)
    found = in_memory({"teacher": centre + spread * rng.normal(size=(chains, n))}, seed=seed)
    values = found.statistic("teacher", "LL") + gain * found.teacher_in
    found.kept["teacher"]["LL"] = (values, np.zeros((chains, 0)))
    return found, values, stats.norm.logpdf(values, centre + gain, spread) - stats.norm.logpdf(values, centre, spread)


def test_online_finds_what_the_loss_does_not_and_nearly_all_that_can_be_found(check):
    chains, loss, optimum = gaussians(160, 250)
    scores = lira.chain_scores(chains, "teacher", "LL", ["online", "offset_out"])
    low = lambda values: mean_over_targets(lambda m, n: tpr_step(m, n, 0.02), values, chains.teacher_in)
    assert low(scores["online"]) > 3 * low(loss) and low(scores["online"]) > 1.5 * low(scores["offset_out"])
    check("LiRA's TPR at 2 % FPR behind Neyman and Pearson's", 1 - low(scores["online"]) / low(optimum), 0.08)
    area = lambda values: mean_over_targets(auc, values, chains.teacher_in)
    check("LiRA's AUC behind Neyman and Pearson's", area(optimum) - area(scores["online"]), 0.01)


def test_the_partner_left_among_the_references_would_tell_the_membership():
    kept, left = [], []
    for seed in range(40):
        chains = in_memory({"teacher": np.random.default_rng(seed).normal(size=(4, 300))}, seed=seed)
        values, inside = chains.statistic("teacher", "LL"), chains.teacher_in
        scores = lira.chain_scores(chains, "teacher", "LL", ["online"])["online"]
        kept.append(mean_over_targets(auc, scores, inside))
        others = [np.broadcast_to((np.arange(4) != t)[:, None], inside.shape) for t in range(4)]
        trap = [lira.lira(values[t], values, inside, usable=others[t]) for t in range(4)]
        left.append(mean_over_targets(auc, trap, inside))
    se = lambda found: np.std(found, ddof=1) / np.sqrt(len(found))
    assert abs(np.mean(kept) - 0.5) < 3.5 * se(kept)  # nothing was planted
    assert abs(np.mean(left) - 0.5) > 10 * se(left)


def test_order_of_records_and_chains_changes_nothing():
    rng = np.random.default_rng(6)
    phi, references, inside = rng.normal(size=25), rng.normal(size=(9, 25)), INSIDE.repeat(25, axis=1)
    rows, models = rng.permutation(25), rng.permutation(9)
    for form in lira.FORMS:
        found = lira.lira(phi[rows], references[models][:, rows], inside[models][:, rows], form)
        np.testing.assert_allclose(found, lira.lira(phi, references, inside, form)[rows], rtol=1e-12)


def test_one_pair_of_teachers_gives_no_lira():
    chains = in_memory({"student": np.zeros((6, 10))}, "cheap")
    with pytest.raises(Unresolved, match="one pair of teachers"):
        lira.chain_scores(chains, "student", "LL", ["online"])


def test_calibration_by_the_students_of_two_teachers_does_not_tell_the_teachers_apart():
    """What students of one teacher share, members or not, is no membership, at a low false-positive rate either."""
    rates, naive = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        taught = rng.normal(size=(2, 400))[np.arange(8) % 2]
        chains = in_memory({"student": taught + 0.2 * rng.normal(size=(8, 400))}, "cheap", seed=seed)
        values, inside = chains.statistic("student", "LL"), chains.teacher_in
        low = lambda found, inside=inside: mean_over_targets(lambda m, n: tpr_step(m, n, 0.05), found, inside)
        rates.append(low(lira.calibrated(chains, "student")))
        usable = [chains.comparable(t, "student") for t in range(8)]
        naive.append(low([lira.lira(v, values, inside, "offset_out", usable=u) for v, u in zip(values, usable)]))
    assert np.mean(rates) < 0.1 and np.mean(naive) > 0.3
