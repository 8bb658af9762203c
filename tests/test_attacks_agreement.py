"""Teacher beside student: hand-made 2x2 tables, exact tests, the published threshold rule, planted vulnerable sets."""

import numpy as np
import pytest
from planted_couples import row, study
from scipy import stats

from attacks import agreement
from attacks.agreement import authors_threshold, d_prime, exact_interval, fpr_threshold, mcnemar, paired_shares
from attacks.statistics import Groups
from attacks.study import Unresolved

RULE = {"attack": "loss", "rule": "balanced_accuracy", "seed": 0}
CALIB = [2.0] * 20 + [0.0] * 20  # the threshold of best balanced accuracy is 2


def hand(seeds=(0,), groups=None, student=(3, 1, 3, 1, 3, 1, 1, 1, 3, 1)):
    """Ten members, five non-members; a score of 3 is flagged, one of 1 is not.

    Flagged on the teacher: members 0-5, non-member 0.  On the student: members 0, 2, 4, 8, non-members 0, 1.
    """
    teacher = {"private": [3] * 6 + [1] * 4, "heldout": [3, 1, 1, 1, 1], "calib": CALIB}
    pupil = {"private": list(student), "heldout": [3, 3, 1, 1, 1], "calib": CALIB}
    runs = {("teacher", 0): {"loss": teacher}} | {("students/kd", k): {"loss": pupil} for k in seeds}
    return study(runs, groups)


def test_hand_made_tables():
    rows = agreement.rows(hand())
    at = lambda measure, which: row(rows, measure=measure, **{"class": which}, **RULE)
    counts = lambda table, which: [at(f"{table}_{c}", which)["count"] for c in ("both", "teacher", "student", "none")]
    assert counts("flagged", "members") == [3, 3, 1, 3] and counts("flagged", "nonmembers") == [1, 0, 1, 3]
    # right: members as flagged; non-members both 3, teacher alone 1, student alone 0, none 1
    assert counts("right", "all") == [3 + 3, 3 + 1, 1 + 0, 3 + 1]
    assert at("flagged_both", "members")["denominator"] == 10 and at("right_both", "all")["denominator"] == 15
    tpr, tnr = (0.6, 0.4), (0.8, 0.6)
    for i, model in enumerate(("teacher", "student")):
        assert at(f"tpr_{model}", "members")["value"] == tpr[i] and at(f"tnr_{model}", "nonmembers")["value"] == tnr[i]
        both = at(f"balanced_accuracy_{model}", "all")
        se = 0.5 * np.sqrt(tpr[i] * (1 - tpr[i]) / 10 + tnr[i] * (1 - tnr[i]) / 5)
        assert both["value"] == pytest.approx((tpr[i] + tnr[i]) / 2) and both["se"] == pytest.approx(se)
        assert at(f"tpr_{model}", "members")["se"] == pytest.approx(np.sqrt(tpr[i] * (1 - tpr[i]) / 10))
    gap = at("tpr_difference", "members")
    assert gap["value"] == pytest.approx(-0.2) and gap["ci_low"] < -0.2 < gap["ci_high"]
    assert gap["p_value"] == pytest.approx(stats.binomtest(1, 4).pvalue)  # discordant members: 1 and 3
    assert at("balanced_accuracy_difference", "all")["value"] == pytest.approx(-0.2)
    assert not [r for r in rows if "reason" in r and "null" in str(r)] and len({r["student"] for r in rows}) == 1


def test_groups_of_members_and_their_separation():
    rows = agreement.rows(hand())
    at = lambda measure, group: row(rows, measure=measure, **{"class": group}, **RULE)
    # student: vulnerable members 3 of 6 flagged, others 1 of 4, non-members 2 of 5; two values, so AUC counts ties
    for group, share in (("vulnerable", 3 / 6), ("non_vulnerable", 1 / 4)):
        auc = share * 3 / 5 + 0.5 * (share * 2 / 5 + (1 - share) * 3 / 5)
        assert at("auc_student", group)["value"] == pytest.approx(auc)
        s = np.sqrt((share * (1 - share) + 0.24) / 2)
        assert at("d_prime_student", group)["value"] == pytest.approx((share - 0.4) / s)
    assert (at("auc_student", "vulnerable")["count"], at("auc_student", "vulnerable")["denominator"]) == (6, 10)
    frame = agreement.vulnerable(hand()).set_index("example_id")
    assert (frame["group"] == "vulnerable").sum() == 6 and frame.loc["private-0005", "group"] == "vulnerable"
    assert frame.loc["private-0006", "group"] == "non_vulnerable" and frame.loc["heldout-0000", "group"] == "non_member"
    assert set(frame.columns) == {"attack", "seed", "group", "model"} and set(frame["model"]) == {"teacher"}


def test_several_seeds_and_groups_of_records():
    rows = agreement.rows(hand(seeds=(0, 1)))
    every = [r for r in rows if r["rule"] == "balanced_accuracy" and r["seed"] == "all"]
    assert {r["measure"].rpartition("_")[0] for r in every} == {"tpr", "tnr", "balanced_accuracy"}
    assert row(every, measure="tpr_difference")["value"] == pytest.approx(-0.2)
    naive = row(agreement.rows(hand()), measure="tpr_student", **RULE)
    # every record twice: the exact interval would be too narrow, the one over groups is not
    doubled = {f"private-{i:04d}": f"p{i // 2}" for i in range(10)}
    kept = row(
        agreement.rows(hand(groups=doubled, student=(3, 3, 3, 3, 1, 1, 1, 1, 1, 1))), measure="tpr_student", **RULE
    )
    assert kept["value"] == naive["value"] and kept["se"] > 1.3 * naive["se"]


def test_shares_of_grouped_records_count_groups():
    """Every record three times: the interval is that of a third of them, as wide as without the copies, or wider."""
    copies = lambda values: [v for v in values for _ in range(3)]
    teacher, pupil = [3] * 10 + [1] * 8, ([3] * 5 + [1] * 5) + ([3] * 2 + [1] * 6)
    once = {"teacher": teacher, "students/kd": pupil}
    runs = {
        (run, 0): {"loss": {"private": copies(v), "heldout": copies([1] * 9 + [3]), "calib": CALIB}}
        for run, v in once.items()
    }
    groups = {f"{role}-{i:04d}": f"{role[0]}{i // 3}" for role in ("private", "heldout") for i in range(60)}
    at = lambda rows, measure, of: row(rows, measure=measure, **{"class": of}, **RULE)
    by_group, by_record = agreement.rows(study(runs, groups)), agreement.rows(study(runs))
    for measure, of in (("flagged_both", "members"), ("flagged_none", "nonmembers"), ("right_both", "all")):
        wide, naive = at(by_group, measure, of), at(by_record, measure, of)
        assert (wide["value"], wide["count"]) == (naive["value"], naive["count"])
        assert wide["ci_high"] - wide["ci_low"] > 1.3 * (naive["ci_high"] - naive["ci_low"]), measure
    never = at(by_group, "flagged_student", "nonmembers")
    assert (never["ci_low"], never["ci_high"]) == (0, pytest.approx(1 - 0.025 ** (1 / 10)))  # 0 of ten groups


def test_share_over_groups_covers():
    """Groups that share a rate: the interval over groups holds its level, the one over records does not."""
    rng, codes, held = np.random.default_rng(2), np.repeat(np.arange(40), 6), np.zeros(2)
    for _ in range(600):
        hits = rng.random(240) < np.repeat(rng.beta(1.2, 2.8, 40), 6)
        found = [agreement._share(hits, codes), agreement._share(hits)]
        held += [each["ci_low"] <= 0.3 <= each["ci_high"] for each in found]
    assert 0.925 <= held[0] / 600 <= 0.985 and held[1] / 600 < 0.9


def test_exact_statistics_equal_scipy(check):
    for count, n in ((0, 7), (3, 7), (7, 7), (40, 200)):
        exact = stats.binomtest(count, n).proportion_ci(0.95, "exact")
        found = exact_interval(count, n)
        check("Clopper-Pearson vs scipy", max(abs(found.low - exact.low), abs(found.high - exact.high)), 1e-9)
    for a, b in ((0, 0), (0, 5), (3, 3), (12, 4), (40, 61)):
        want = stats.binomtest(a, a + b).pvalue if a + b else 1.0
        check("McNemar vs scipy's binomtest", abs(mcnemar(a, b) - want), 1e-12)


def test_paired_difference_covers():
    """Agresti and Min's interval under a planted difference of shares of 0.1 on correlated decisions."""
    rng, n, covered = np.random.default_rng(0), 60, 0
    for _ in range(1500):
        shared = rng.random(n)
        a, b = shared < 0.5, np.where(rng.random(n) < 0.7, shared, rng.random(n)) < 0.4
        found = paired_shares(a, b)
        covered += found.low <= 0.1 <= found.high
    assert 0.93 <= covered / 1500 <= 0.98


def test_thresholds_by_hand():
    # 20 calibration non-members 1..20: at FPR 0.05 one may be flagged, which is 20
    t = fpr_threshold(np.arange(1.0, 21), 0.05)
    assert 19 < t <= 20 and (np.arange(1.0, 21) >= t).sum() == 1
    assert (np.ones(40) >= fpr_threshold(np.ones(40), 0.05)).sum() == 0, "ties move together"
    with pytest.raises(Unresolved, match="19 calibration non-members are too few"):
        fpr_threshold(np.arange(19.0), 0.05)
    # best balanced accuracy on the evaluated records: at 5 three of eight are flagged, all of them members
    members, nonmembers = np.array([5.0, 6, 7, 2]), np.array([1.0, 2, 3, 4.5])
    assert authors_threshold(members, nonmembers, "loss") == 5.0
    assert authors_threshold(members, nonmembers, "zlib") == 5.0015
    # the best threshold flags one of ten: redrawn until both classes hold a fifth, by the seeded legacy generator
    members, nonmembers = np.array([9.0, 1, 3, 5, 7]), np.array([2.0, 4, 6, 8, 1.5])
    thresholds = np.array([9.0, 8, 7, 6, 5, 4, 3, 1.5, 1])  # 2 lies on a straight piece of the curve
    draw = np.random.RandomState(42)
    drawn = thresholds[[draw.randint(0, 9) for _ in range(31)]]
    drawn = next(t for t in drawn if 2 <= (np.r_[members, nonmembers] >= t).sum() <= 8)
    assert authors_threshold(members, nonmembers, "loss") == drawn
    # nothing can satisfy it where all scores are equal: the last draw is kept
    assert authors_threshold(np.ones(5), np.ones(5), "loss") == 1.0


def test_d_prime_and_its_interval(check):
    """Influence equals the jackknife; the interval covers the planted value."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(0.8, 1, 400), rng.normal(0, 1.5, 500)
    found = d_prime(x, y)
    s = lambda a, b: (a.mean() - b.mean()) / np.sqrt((a.var() + b.var()) / 2)
    jack = [399 * (found.value - s(np.delete(x, i), y)) for i in range(60)]
    check("influence of d' vs jackknife", np.abs(jack - found.members[:60]).max(), 0.05)
    truth = 0.8 / np.sqrt((1 + 2.25) / 2)
    hits = 0
    for _ in range(600):
        each = d_prime(rng.normal(0.8, 1, 60), rng.normal(0, 1.5, 80))
        hits += abs(each.value - truth) < 1.96 * np.sqrt(each.variance())
    assert 0.92 <= hits / 600 <= 0.975
    with pytest.raises(Unresolved, match="no d'"):
        d_prime(np.ones(3), np.ones(3))
    assert found.grouped(Groups.of(np.arange(400) // 2, 500 + np.arange(500))).variance() > 0


def test_why_there_is_nothing():
    alone = study({("teacher", 0): {"loss": {"private": [1, 2], "heldout": [1, 2], "calib": CALIB}}})
    assert agreement.rows(alone) == [{"measure": "agreement", "reason": "no student whose teacher was scored as well"}]
    assert agreement.vulnerable(alone).empty
    two = {"private": [1, 2, 3], "heldout": [1, 2, 3]}
    rows = agreement.rows(study({(run, 0): {"loss": two} for run in ("teacher", "students/kd")}))
    assert [r["reason"] for r in rows if "reason" in r] == ["teacher/seed0 was not scored on role 'calib'"]
    assert {r["rule"] for r in rows if "reason" not in r} == {"reference"}
