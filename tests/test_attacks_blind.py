"""Blind classifiers: they find a shift of each kind, and nothing where there is nothing."""

import time

import numpy as np
import pandas as pd
import pytest

from attacks.blind import CLASSIFIERS, TooFew, blind_aucs, blind_interval, features

VOCAB = 500


def texts(rng, n, length=30) -> pd.DataFrame:
    frequency = 1 / np.arange(1, VOCAB + 1)
    draw = lambda size: rng.choice(VOCAB, size=size, p=frequency / frequency.sum())
    responses = [draw(rng.integers(length // 2, length * 3 // 2)) for _ in range(n)]
    return pd.DataFrame(
        {
            "group": [str(i) for i in range(n)],
            "prompt_ids": [draw(8) for _ in range(n)],
            "response_ids": responses,
            "f_chars": [4 * len(r) for r in responses],
            "f_digits": rng.poisson(3, n),
        }
    )


def gate(text, member, seed=0):
    found = blind_aucs(text, member, np.arange(VOCAB), seed)
    return {name: blind_interval(auc, 1 - 0.05 / len(found)) for name, auc in found.items()}


@pytest.mark.parametrize(
    "kind,who",
    [
        ("word", ["naive_bayes", "forest", "greedy"]),
        ("phrase", ["greedy"]),
        ("digits", ["logistic"]),
        ("length", ["logistic"]),
    ],
)
def test_gate_fires_on_a_planted_shift(kind, who):
    rng = np.random.default_rng(1)
    text, member = texts(rng, 400), np.arange(400) < 200
    for i in np.flatnonzero(member & (rng.random(400) < 0.6)):
        response = text.at[i, "response_ids"]
        if kind == "word":
            text.at[i, "response_ids"] = np.append(response, [300, 300])
        if kind == "phrase":  # common words, rare only in this order
            text.at[i, "response_ids"] = np.append(response, [3, 1, 4])
        if kind == "digits":
            text.at[i, "f_digits"] += 3
        if kind == "length":
            text.at[i, "response_ids"] = np.append(response, response[:15])
    found = gate(text, member)
    assert all(found[name].low > 0.5 for name in who), found


def test_gate_is_quiet_on_random_splits():
    rng, fired = np.random.default_rng(2), 0
    for seed in range(10):
        member = rng.random(160) < 0.5
        fired += max(gate(texts(rng, 160), member, seed).values()).low > 0.5
    assert fired <= 1  # nominal: a quarter of a gate in 10


def test_groups_stay_in_one_fold():
    """Copies of a record share its label: classifiers that saw one would recognise the other."""
    rng = np.random.default_rng(3)
    text = pd.concat([texts(rng, 100)] * 3, ignore_index=True)  # groups repeat with their records
    member = np.tile(rng.random(100) < 0.5, 3)
    assert max(gate(text, member).values()).low < 0.5
    apart = text.assign(group=np.arange(300).astype(str))
    assert gate(apart, member)["naive_bayes"].low > 0.9


def test_features_count_ngrams_within_a_document():
    text = pd.DataFrame(
        {"prompt_ids": [[1], [1, 2], [9]], "response_ids": [[2, 3], [3, 1, 2], [1, 2, 3, 3]], "f_digits": [4, 5, 6]}
    )
    seen = features(text, np.array([0, 7, 1, 1, 0, 0, 0, 0, 0, 0]))
    # documents 1 2 3 | 1 2 3 1 2 | 9 1 2 3 3; n-grams of one document only are left out
    assert sorted(map(tuple, seen.tokens.toarray().T)) == [(1, 1, 2), (1, 2, 1), (1, 2, 1)]
    assert sorted(map(tuple, seen.ngrams.toarray().T)) == sorted(
        [
            (1, 1, 2),
            (1, 2, 1),
            (1, 2, 1),  # 3; 1; 2
            (1, 2, 1),
            (1, 1, 1),  # 1 2; 2 3
            (1, 1, 1),
        ]
    )  # 1 2 3
    smoothed = np.array([1, 8, 2, 2, 1, 1, 1, 1, 1, 1])
    np.testing.assert_allclose(seen.surface[0], [4, np.log(smoothed[[1, 2, 3]] / smoothed.sum()).mean(), 1, 2])


def test_seeded_and_fast():
    text, member = texts(np.random.default_rng(4), 2400, length=80), np.arange(2400) % 2 == 0
    start = time.perf_counter()
    first = blind_aucs(text, member, np.arange(VOCAB), 5)
    assert time.perf_counter() - start < 25
    again = blind_aucs(text, member, np.arange(VOCAB), 5)
    assert [auc.value for auc in first.values()] == [auc.value for auc in again.values()]
    assert set(first) == set(CLASSIFIERS)
    for auc in first.values():
        assert len(auc.members) == len(auc.nonmembers) == 1200


def test_too_few_records_or_groups():
    text = texts(np.random.default_rng(6), 40)
    with pytest.raises(TooFew, match="3 members and 37 non-members"):
        blind_aucs(text, np.arange(40) < 3, np.arange(VOCAB), 0)
    with pytest.raises(TooFew):
        blind_aucs(text.assign(group=np.where(np.arange(40) < 20, "a", "b")), np.arange(40) < 20, np.arange(VOCAB), 0)
