"""Attacks: the worked example, identities, abstention, planted leaks and planted nulls."""

import numpy as np
import pytest
from planted_scores import World

from attacks import membership
from attacks.membership import ATTACKS, access, expand, parse, score
from attacks.statistics import auc, delong
from attacks.tables import Tokens, read_scores

FIELDS = {f for attack in ATTACKS.values() for f in attack.needs} | {"target_id"}
SINGLE = [name for name, attack in ATTACKS.items() if not attack.reference]


def make(token: dict, lengths, **example) -> Tokens:
    n = len(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(int)
    token = {"segment": np.ones(offsets[-1], np.int8)} | {k: np.asarray(v, float) for k, v in token.items()}
    return Tokens(
        np.array([f"e{i}" for i in range(n)]),
        np.array(["t"] * n),
        offsets,
        token,
        {k: np.asarray(v) for k, v in example.items()},
    )


def worked_example() -> tuple[Tokens, Tokens]:
    """Logits of attacks.md 11 -> fields, in float64."""
    t, v = np.arange(6)[:, None], np.arange(5)[None]
    y = np.array([2, 1, 4, 1, 0, 2])
    tables = []
    for z in ((4 * t + 7 * v + 3 * t * v) % 17 / 4, (5 * t + 2 * v + t * v) % 11 / 4):
        lp = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        p = np.exp(lp)
        entropy = -(p * lp).sum(axis=1)
        std = np.sqrt((p * (lp + entropy[:, None]) ** 2).sum(axis=1))
        tables.append(
            make(
                {"logp": lp[np.arange(6), y], "entropy": entropy, "logp_std": std, "target_id": y}, [6], zlib_bytes=[52]
            )
        )
    return tables[0], tables[1]


@pytest.mark.parametrize(
    "attack,value",
    [
        ("loss", -0.791515),
        ("zlib", -0.0152214),
        ("min_k", -1.586985),
        ("min_k@k=0.5", -1.190838),
        ("min_k@k=1", -0.791515),
        ("min_k_plus_plus", -0.504546),
        ("min_k_plus_plus@k=0.5", 0.114742),
        ("min_k_plus_plus@k=1", 0.405654),
        ("reference:null", 0.682624),
    ],
)
def test_worked_example(attack, value):
    target, reference = worked_example()
    assert score(attack, target, reference)[0] == pytest.approx(value, abs=1.5e-6)


def random_tokens(rng, n=60) -> Tokens:
    lengths = rng.integers(1, 30, n)
    total = lengths.sum()
    token = {"logp": -rng.gamma(2, 1, total), "entropy": rng.gamma(2, 1, total), "logp_std": 0.5 + rng.random(total)}
    return make(token, lengths, zlib_bytes=rng.integers(20, 90, n))


def test_against_a_loop_over_examples():
    tokens = random_tokens(np.random.default_rng(0))
    for k in (0.2, 0.29, 0.5):
        slow = []
        for a, b in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True):
            z = (tokens.token["logp"][a:b] + tokens.token["entropy"][a:b]) / tokens.token["logp_std"][a:b]
            slow.append(np.sort(z)[: max(1, int(k * (b - a) + 1e-9))].mean())
        np.testing.assert_allclose(score(f"min_k_plus_plus@k={k}", tokens), slow)


def test_identities():
    tokens = random_tokens(np.random.default_rng(1))
    np.testing.assert_allclose(score("min_k@k=1", tokens), score("loss", tokens), rtol=1e-12)
    assert (score("reference:null", tokens, tokens) == 0).all()
    shorter = score("min_k@k=0.1", tokens)
    assert (shorter <= score("min_k@k=0.6", tokens) + 1e-12).all()


def test_tokens_of_other_segments_count_only_when_asked():
    segment = np.array([0, 1, 1, 2, 1, 2])
    tokens = make({"logp": [-9, -1, -2, -6, -3, -5], "segment": segment}, [4, 2])
    np.testing.assert_allclose(score("loss", tokens), [-1.5, -3])
    np.testing.assert_allclose(score("loss@eos=1", tokens), [-3, -4])


def test_short_and_empty_responses():
    tokens = make(
        {"logp": [-1, -2, -3, -4, -5], "entropy": np.ones(5), "logp_std": np.ones(5)},
        [3, 0, 1, 1],
        zlib_bytes=[9, 8, 9, 9],
    )
    for attack in SINGLE:
        scores = score(attack, tokens)
        assert np.isneginf(scores[1]) and np.isfinite(scores[[0, 2, 3]]).all()
    assert score("min_k", tokens)[0] == -3  # at least one token, however short
    assert np.isneginf(score("reference:null", tokens, tokens)[1])


def test_not_a_number_is_an_error_of_that_example_alone():
    tokens = make(
        {"logp": [-1, np.nan, -3, -np.inf, -2], "entropy": np.ones(5), "logp_std": np.ones(5)},
        [2, 1, 1, 1],
        zlib_bytes=[9, 9, 9, 9],
    )
    for attack in SINGLE:
        np.testing.assert_array_equal(np.isnan(score(attack, tokens)), [True, False, True, False])


def test_clamped_spread_is_finite_and_counted():
    tokens = make({"logp": [-1e-7, -1], "entropy": [1e-7, 1], "logp_std": [0, 1]}, [2])
    assert np.isfinite(score("min_k_plus_plus", tokens)).all() and membership.clamped(tokens) == 1


def test_ids():
    assert parse("reference:students/kd@k=0.3,eos=1") == ("reference", "students/kd", {"k": 0.3, "eos": 1.0})
    assert expand(["loss", "reference@eos=1", "reference:swap"], ["null", "base_student"], "null") == [
        "loss",
        "reference:base_student@eos=1",
        "reference:swap",
    ]
    assert access("min_k_plus_plus") == "distribution" and access("zlib") == "logprobs"
    assert access("reference:base_student") == "logprobs+base-model"
    assert access("reference:null") == "logprobs+public-data"
    assert access("reference:direct") == "auditor"
    with pytest.raises(ValueError, match="unknown attack 'los'.*min_k_plus_plus"):
        parse("los")


def test_what_cannot_be_scored_says_so():
    tokens = make({"logp": [-1.0, -2.0]}, [2])
    with pytest.raises(membership.MissingField, match="entropy, logp_std"):
        score("min_k_plus_plus", tokens)
    with pytest.raises(membership.DifferentTokens):
        score("reference:null", tokens, make({"logp": [-1.0, -2.0]}, [1, 1]))
    left, right = (make({"logp": [-1.0, -2.0], "target_id": [1, i]}, [2]) for i in (2, 3))
    with pytest.raises(membership.DifferentTokens):
        score("reference:null", left, right)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """`loud` leaks a lot, `calibrated` so little that only its own base shows it, `silent` nothing."""
    world = World(tmp_path_factory.mktemp("planted"), {"private": 300, "heldout": 300}, seed=11)
    for run, leak in (("loud", 1.6), ("calibrated", 0.3), ("silent", 0.0), ("base_student", 0.0)):
        world.write(run, {"private": leak})
    return {t.run: {role: t.load(role, FIELDS) for role in ("private", "heldout")} for t in read_scores(world.folder)}


def scores_of(planted, run, attack):
    references = planted["base_student"]
    return [score(attack, planted[run][role], references[role]) for role in ("private", "heldout")]


@pytest.mark.parametrize("attack", [*SINGLE, "reference:base_student"])
def test_planted_leak_is_found_in_the_stated_direction(planted, attack):
    run = "calibrated" if ":" in attack else "loud"
    assert auc(*scores_of(planted, run, attack)) > 0.9


@pytest.mark.parametrize("attack", [*SINGLE, "reference:base_student"])
def test_without_a_leak_there_is_chance(planted, attack):
    found = delong(*scores_of(planted, "silent", attack), level=0.999)
    assert found.low < 0.5 < found.high


def test_swapped_labels_give_the_complement(planted):
    members, nonmembers = scores_of(planted, "loud", "loss")
    assert auc(nonmembers, members) == pytest.approx(1 - auc(members, nonmembers), abs=1e-12)
