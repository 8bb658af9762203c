"""Profiles of blocks: their covariance, the test that all are alike and how often it is wrong, rank correlations."""

import numpy as np
import pytest
from scipy import stats

from attacks import profiles
from attacks.profiles import covariance, equal_blocks, profile_spearman
from attacks.statistics import Groups, Influence, auc_influence
from attacks.study import Unresolved

M, N, BLOCKS = 150, 160, 6


def scores(rng, m=M, n=N, blocks=BLOCKS, shift=0.0, alike=0.9):
    """Scores [m + n, blocks] of which neighbours are nearly copies; shift [blocks]: what members have more."""
    steps = rng.normal(size=(m + n, blocks)) * np.sqrt(1 - alike)
    found = rng.normal(size=(m + n, 1)) * np.sqrt(alike) + np.cumsum(steps, axis=1) / np.sqrt(np.arange(1, blocks + 1))
    found[:m] += shift
    return found


def profile(found, m=M, groups=None) -> list[Influence]:
    return [auc_influence(each[:m], each[m:]).grouped(groups) for each in found.T]


def in_pairs(m: int, n: int) -> Groups:
    """Two records a group; the first groups have both members and non-members."""
    return Groups.of(np.arange(m) // 2, np.concatenate([np.arange(10) // 2, 1000 + np.arange(n - 10) // 2]))


@pytest.mark.parametrize("groups", [None, in_pairs(M, N)], ids=["records", "groups"])
def test_covariance_holds_the_variances_of_all_statistics_and_of_their_differences(groups, check):
    parts = profile(scores(np.random.default_rng(0)), groups=groups)
    found = covariance(parts)
    for i, a in enumerate(parts):
        check("covariance of blocks against variances, relative", abs(found[i, i] / a.variance() - 1), 1e-12)
        for j, b in enumerate(parts[:i]):
            gap = found[i, i] + found[j, j] - 2 * found[i, j]
            check("covariance of blocks against variances, relative", abs(gap / a.minus(b).variance() - 1), 1e-9)


def test_one_group_has_no_spread():
    groups = Groups(np.zeros(M, int), np.arange(1, N + 1))
    with pytest.raises(Unresolved, match="one group"):
        equal_blocks([profile(scores(np.random.default_rng(0)), groups=groups)], np.random.default_rng(0))


def rejected(p_values) -> bool:
    """Are there more small p-values than chance gives?"""
    p = np.array(p_values)
    return stats.binom.sf((p <= 0.05).sum() - 1, len(p), 0.05) < 1e-3


@pytest.mark.parametrize("kind", ["one level", "leak alike", "groups", "seeds"])
def test_p_values_are_uniform_where_blocks_are_equal(kind, monkeypatch):
    monkeypatch.setattr(profiles, "DRAWS", 299)
    rng, p = np.random.default_rng(1), []
    for k in range(300):
        if kind == "seeds":  # every block of every seed was trained to something of its own
            records = scores(rng, 200, 200)
            each = [profile(records + 0.0, 200) for _ in range(3)]
            moved = 0.03 * rng.normal(size=(3, BLOCKS))
            one = [
                [Influence(i.value + d, i.members, i.nonmembers) for i, d in zip(seed, shift, strict=True)]
                for seed, shift in zip(each, moved, strict=True)
            ]
        elif kind == "groups":
            twice = np.repeat(scores(rng, M // 2, N // 2), 2, axis=0)
            one = [profile(twice, groups=Groups(np.arange(M) // 2, M + np.arange(N) // 2))]
        else:
            one = [profile(scores(rng, shift=1.0 * (kind == "leak alike")))]
        p.append(equal_blocks(one, np.random.default_rng(k)))
    assert not rejected(p)
    if kind != "seeds":  # the spread over seeds is added to that over examples, which it holds already: wide
        assert stats.kstest(p, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_few_records_and_aucs_near_one_do_not_make_it_bold(shift, monkeypatch):
    monkeypatch.setattr(profiles, "DRAWS", 299)
    rng, p = np.random.default_rng(6), []
    for k in range(300):
        found = rng.normal(size=(40, BLOCKS))  # blocks that know nothing of each other
        found[:20] += shift
        p.append(equal_blocks([profile(found, 20)], np.random.default_rng(k)))
    assert not rejected(p)


def test_seeds_that_differ_more_than_blocks_are_no_finding():
    """Without the spread over seeds, luck in training would look like a difference of blocks."""
    rng, p, alone = np.random.default_rng(2), [], []
    for k in range(100):
        each = [profile(scores(rng, 300, 300, shift=0.4 * rng.normal(size=BLOCKS)), 300) for _ in range(3)]
        p.append(equal_blocks(each, np.random.default_rng(k)))
        alone.append(equal_blocks(each[:1], np.random.default_rng(k)))
    assert not rejected(p) and rejected(alone)


def test_one_block_apart_is_found_and_nothing_is_certain():
    apart = [profile(scores(np.random.default_rng(3), shift=1.5 * (np.arange(BLOCKS) == 2)))]
    assert equal_blocks(apart, np.random.default_rng(0)) == 1 / (profiles.DRAWS + 1)
    same = [profile(np.repeat(scores(np.random.default_rng(4))[:, :1], BLOCKS, axis=1))]
    assert equal_blocks(same, np.random.default_rng(0)) == 1
    perfect = [profile(np.repeat(np.arange(M + N)[:, None] < M, BLOCKS, axis=1).astype(float))]
    assert equal_blocks(perfect, np.random.default_rng(0)) == 1


def test_rank_correlation_is_that_of_scipy_and_reads_other_depths():
    rng = np.random.default_rng(5)
    rise = np.linspace(0, 1.5, BLOCKS)
    own, theirs = (profile(scores(rng, 400, 400, shift=rise), 400) for _ in range(2))
    found = profile_spearman(own, theirs, rng)
    expected = stats.spearmanr([i.value for i in own], [i.value for i in theirs]).statistic
    assert found.value == pytest.approx(expected) and found.low <= found.value <= found.high <= 1
    deep = profile(scores(rng, 400, 400, 2 * BLOCKS, shift=np.linspace(0, 1.5, 2 * BLOCKS)), 400)
    assert profile_spearman(own, deep, rng).value > 0.8 and profile_spearman(own, deep[::-1], rng).value < -0.8
    with pytest.raises(Unresolved, match="no order"):
        profile_spearman([own[0]] * BLOCKS, theirs, rng)
