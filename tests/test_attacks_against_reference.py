"""Attacks against a reference and against changed text: worked example, identities, abstention."""

import numpy as np
import pytest
from planted_regimes import make
from test_attacks_signals import random_tokens, worked_example

from attacks.membership import score


@pytest.mark.parametrize(
    "attack,value",
    [
        ("reference", 0.682624),
        ("ratio", -0.536934),
        ("ez_published", 1.118231),
        ("ez", 0.111748),
        ("wbc@w=1", 0.833333),
        ("wbc@w=2", 1),
        ("wbc@w=3", 1),
        ("wbc@w=40", 1),
        ("ht_ours@k=0.5", 0.326491),
    ],
)
def test_worked_example(attack, value, check):
    target, reference = worked_example()
    found = score(attack.replace("@", ":null@"), target, reference=reference)[0]
    check("worked example of the attacks, six decimals", abs(found - value), 1e-6)


def test_windows_against_a_loop():
    rng = np.random.default_rng(0)
    target, reference = random_tokens(rng, 60), None
    logp = target.token["logp"] - 0.2 + 0.5 * rng.normal(size=len(target.owner))
    reference = make({**target.token, "logp": logp}, target.lengths, zlib_bytes=target.example["zlib_bytes"])
    for widths, attack in (((1,), "wbc:null@w=1"), ((2, 3, 4, 6, 9, 13, 18, 25, 32, 40), "wbc:null")):
        expected = []
        for a, b in zip(target.offsets[:-1], target.offsets[1:], strict=True):
            gain = target.token["logp"][a:b] - logp[a:b]
            shares = [np.mean(np.convolve(gain, np.ones(min(w, b - a)), "valid") > 0) for w in widths]
            expected.append(np.mean(shares))
        np.testing.assert_allclose(score(attack, target, reference=reference), expected, atol=1e-12)


def test_one_token_windows_are_the_share_of_improved_tokens():
    target, reference = (random_tokens(np.random.default_rng(4)) for _ in range(2))
    improved = target.token["logp"] > (reference.token["logp"] - 0.1)
    reference.token["logp"] = reference.token["logp"] - 0.1
    expected = np.bincount(target.owner, improved) / target.lengths
    np.testing.assert_allclose(score("wbc:null@w=1", target, reference=reference), expected)


def test_error_zone_abstains_where_published_code_says_least_member_like():
    token = {"logp": [-1.0, -2, -3, -1, -2, -1], "target_id": [0, 1, 2, 3, 4, 5], "top1_id": [9, 9, 9, 3, 9, 5]}
    target = make(token, [3, 2, 1])
    reference = make(token | {"logp": [-2.0, -4, -4, -1, -3, -1]}, [3, 2, 1])
    scores = score("ez:null", target, reference=reference)
    assert scores[0] == pytest.approx(np.log((1 + 2 + 1 + 1e-6) / 1e-6)) and np.isneginf(scores[1:]).all()
    assert (score("ez_published:null", target, reference=reference) == 0).all()
    assert np.isfinite(score("ez_fallback:null", target, reference=reference)).all()


def test_prefixes():
    """ReCaLL with an empty prefix is 1; Con-ReCaLL without members' weight is ReCaLL; attacks.md 11's numbers."""
    plain, non, mem = (make({"logp": [value, value]}, [2]) for value in (-1.5, -1.2, -0.9))
    assert score("recall", plain, recall=non)[0] == pytest.approx(0.8)
    assert score("con_recall", plain, recall=non, recall_members=mem)[0] == pytest.approx(0.5)
    assert score("con_recall@gamma=0", plain, recall=non, recall_members=mem)[0] == pytest.approx(0.8)
    assert score("recall", plain, recall=plain)[0] == 1


def test_neighbours_belong_to_their_text():
    tokens = make({"logp": [-1.0, -2, -3]}, [1, 1, 1], ids=np.array(["a#0", "a#1", "b"]))
    near = make({"logp": [-2.0, -4, -5, -9]}, [1, 1, 1, 1], ids=np.array(["a#0~0", "a#0~1", "b~0", "c~0"]))
    scores = score("neighbourhood", tokens, neighbours=near)
    assert scores[0] == 2 and scores[2] == 2 and np.isnan(scores[1])  # no copies: an error of the tables, not a zero
