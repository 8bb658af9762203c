"""The table of attacks: ids, dispatch, abstention, planted leaks and planted nulls for every one of them."""

import re
from pathlib import Path

import numpy as np
import pytest
from planted_regimes import REGIMES, make
from scipy import stats

from attacks import membership
from attacks.membership import ATTACKS, FIRST, INPUTS, access, expand, parse, score
from attacks.signals import CannotScore
from attacks.statistics import auc, delong

SINGLE = [name for name, attack in ATTACKS.items() if not attack.inputs]
REDRAWS, SIZE = 120, 50


def attacked(name: str, seed: int, n: int, leak: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scores of n members and n non-members under the attack's regime; what abstains is least member-like."""
    tokens, inputs = REGIMES[name](np.random.default_rng(seed), n, leak)
    scores = score(name, tokens, **{given: inputs[given] for given in ATTACKS[name].inputs})
    assert not np.isnan(scores).any()
    scores = np.where(np.isneginf(scores), scores[np.isfinite(scores)].min(), scores)
    return scores[:n], scores[n:]


def test_every_attack_has_a_planted_regime_and_is_documented():
    assert set(REGIMES) == set(ATTACKS) and set(FIRST) <= set(ATTACKS)
    for attack in ATTACKS.values():
        assert "`" in attack.function.__doc__ or len(attack.function.__doc__) > 40 and set(attack.inputs) <= set(INPUTS)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_planted_leak_is_found_in_the_stated_direction(name, check):
    members, nonmembers = attacked(name, 1, 150, leak=True)
    found = auc(members, nonmembers)
    check("planted members, AUC short of 1, least of all attacks", 1 - found, 0.1)
    assert auc(nonmembers, members) == pytest.approx(1 - found, abs=1e-12)


@pytest.mark.parametrize("name", ATTACKS)
def test_without_a_leak_intervals_miss_chance_as_often_as_they_may(name):
    members, nonmembers = attacked(name, 2, REDRAWS * SIZE, leak=False)
    redrawn = zip(members.reshape(REDRAWS, SIZE), nonmembers.reshape(REDRAWS, SIZE), strict=True)
    missed = sum(not low <= 0.5 <= high for _, low, high in (delong(m, n) for m, n in redrawn))
    assert missed <= stats.binom.isf(1e-4, REDRAWS, 0.05)


def five(logp, lengths):
    """Tokens with all columns that single-model attacks read."""
    total = len(logp)
    return make(
        {
            "logp": logp,
            "entropy": np.ones(total),
            "logp_std": np.ones(total),
            "top1_logp": np.full(total, -0.1),
            "top1_id": np.zeros(total, int),
            "target_id": np.arange(total),
        },
        lengths,
        zlib_bytes=[9] * len(lengths),
        n_bytes=[9] * len(lengths),
    )


@pytest.mark.parametrize("name", SINGLE)
def test_short_and_empty_responses(name):
    tokens = five([-1.0, -2, -3, -4, -5], [3, 0, 1, 1, 0])
    scores = score(name, tokens)
    assert np.isneginf(scores[[1, 4]]).all() and np.isfinite(scores[[0, 2, 3]]).all()


@pytest.mark.parametrize("name", [name for name in ATTACKS if ATTACKS[name].reference])
def test_a_reference_equal_to_the_target_is_neutral(name):
    tokens, _ = REGIMES["ez_published"](np.random.default_rng(0), 20, True)
    scores = score(f"{name}:null", tokens, reference=tokens)
    np.testing.assert_array_equal(scores, np.full(40, -1.0 if name == "ratio" else 0.0))
    empty = make({k: v[:0] for k, v in tokens.token.items()}, [0, 0], zlib_bytes=[8, 8], n_bytes=[0, 0])
    assert np.isneginf(score(f"{name}:null", empty, reference=empty)).all()


@pytest.mark.parametrize("name", ATTACKS)
def test_the_order_of_rows_changes_nothing(name):
    """Nor does what else is in the table; only neighbours and calibration records are found by id, not by place."""
    tokens, inputs = REGIMES[name](np.random.default_rng(3), 40, True)
    inputs = {given: inputs[given] for given in ATTACKS[name].inputs}
    whole = score(name, tokens, **inputs)
    rows = np.arange(80)[:55] if "neighbours" in inputs else np.random.default_rng(4).permutation(80)[:55]
    part = {}
    for given, value in inputs.items():
        if given == "steps":
            value = [(step, each.take(rows)) for step, each in value]
        elif given not in ("counts", "neighbours", "calib_members", "calib_nonmembers"):
            value = value.take(rows)
        part[given] = value
    np.testing.assert_allclose(score(name, tokens.take(rows), **part), whole[rows], rtol=1e-9)


@pytest.mark.parametrize("name", SINGLE)
def test_not_a_number_is_an_error_of_that_example_alone(name):
    if "logp" not in ATTACKS[name].needs:
        return
    tokens = five([-1, np.nan, -3, -np.inf, -2], [2, 1, 1, 1])
    np.testing.assert_array_equal(np.isnan(score(name, tokens)), [True, False, True, False])


def test_ties_and_constant_scores_are_chance():
    assert auc(np.array([9, 5]), np.array([9, 5])) == 0.5
    tokens = five([-1.0] * 8, [2, 2, 2, 2])
    assert len(np.unique(score("min_k", tokens))) == 1


def test_tokens_of_other_segments_count_only_when_asked():
    segment = np.array([0, 1, 1, 2, 1, 2])
    tokens = make({"logp": [-9, -1, -2, -6, -3, -5], "segment": segment}, [4, 2])
    np.testing.assert_allclose(score("loss", tokens), [-1.5, -3])
    np.testing.assert_allclose(score("loss@eos=1", tokens), [-3, -4])
    assert tokens.select([1]) is tokens.select([1])  # selected once for all attacks


def test_ids():
    assert parse("reference:students/kd@eos=1") == ("reference", "students/kd", {"eos": 1.0})
    assert expand(["loss", "reference@eos=1", "reference:swap"], ["null", "base_student"], "null") == [
        "loss",
        "reference:base_student@eos=1",
        "reference:swap",
    ]
    assert parse("calibrated_min_k:null@k=0.3")[2] == {"k": 0.3}
    assert access("min_k_plus_plus") == "distribution" and access("zlib") == "logprobs"
    assert access("reference:base_student") == "logprobs+base-model"
    assert access("wbc:null") == "logprobs+public-data" and access("recall") == "logprobs+nonmembers"
    assert access("reference:direct") == "auditor" and access("two_hop_slope") == "auditor"
    for wrong, words in (
        ("los", "unknown attack 'los'.*min_k_plus_plus"),
        ("loss:null", "takes no reference"),
        ("min_k@q=1", "has no parameter 'q'"),
        ("calibrated_min_k:null@q=1", "has no parameter 'q'"),
        ("reference:null@reference=1", "has no parameter 'reference'"),
        ("min_k@k=low", "k must be a number"),
    ):
        with pytest.raises(ValueError, match=words):
            parse(wrong)


def test_the_documented_columns_open_what_needs_them():
    """docs/score_tables.md names for every optional column all attacks that read it."""
    text = (Path(__file__).parents[1] / "docs" / "score_tables.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]*\| ([^|]*)\|$", text, re.M)
    told = {column: set(" ".join(re.findall("`([^`]*)`", opens)).split()) for column, opens in rows}
    columns = {column for attack in ATTACKS.values() for column in attack.needs} - {"logp"}
    assert columns <= set(told)
    for column in columns:
        assert told[column] == {name for name, attack in ATTACKS.items() if column in attack.needs}, column
    variants = text.partition("## Variants")[2].partition("##")[0]
    assert all(f"`{name}`" in variants for name in (*membership.VARIANTS, "step-<n>"))


def test_what_cannot_be_scored_says_so():
    tokens = make({"logp": [-1.0, -2.0]}, [2])
    with pytest.raises(membership.MissingField, match="entropy, logp_std"):
        score("min_k_plus_plus", tokens)
    two = make({"logp": [-1.0, -2.0]}, [1, 1])
    with pytest.raises(membership.DifferentTokens):
        score("reference:null", tokens, reference=two)
    left, right = (make({"logp": [-1.0, -2.0], "target_id": [1, i]}, [2]) for i in (2, 3))
    with pytest.raises(membership.DifferentTokens):
        score("reference:null", left, reference=right)
    # Means over texts may be compared across tokenizers; a token-wise attack has no such tables to compare.
    assert score("reference:other", left, reference=make({"logp": [-1.0]}, [1]), cross_tokenizer=True) == -0.5
    with pytest.raises(CannotScore, match="at least 20"):
        few = five([-1.0] * 4, [2, 2])
        score("quantile", few, calib_nonmembers=few)
