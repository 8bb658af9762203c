"""Recall at 100 errors: by hand, against a walk through the guesses, on the published shape and example."""

import numpy as np
import pytest

from attacks.cuts import Memorized
from attacks.extraction_benchmark import recall_curve, recall_rows
from tests.planted_memorization import Planted, chosen


def test_by_hand():
    texts = np.array([0, 1, 1, 2, 0, 3])
    confidence = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    curve = recall_curve(texts, confidence, np.array([1, 0, 1, 0, 1, 1], bool), n=10)
    assert curve.errors.tolist() == [0, 1, 1, 2, 2, 2]
    assert curve.recall.tolist() == [0.1, 0.1, 0.2, 0.2, 0.2, 0.3]  # the second right guess of text 0 adds nothing
    assert [curve.at(errors) for errors in (1, 2, 3)] == [0.1, 0.2, 0.3]
    assert recall_curve(np.array([5]), np.array([1.0]), np.array([False]), 10).at(1) == 0


def test_order_is_by_confidence_and_stable():
    curve = recall_curve(np.arange(4), np.array([0.1, 0.9, 0.5, 0.5]), np.array([1, 0, 1, 0], bool), 4)
    assert curve.errors.tolist() == [1, 1, 2, 2] and curve.recall.tolist() == [0, 0.25, 0.25, 0.5]


def test_more_texts_than_there_are():
    with pytest.raises(ValueError, match="only 2"):
        recall_curve(np.arange(3), np.zeros(3), np.ones(3, bool), 2)


def walked(guesses: list[tuple[int, bool]], n: int, allowed: int) -> float:
    solved, wrong, recall = set(), 0, 0.0
    for text, right in guesses:
        if right:
            solved.add(text)
            recall = len(solved) / n if wrong < allowed else recall
        wrong += not right
    return recall


def test_against_a_walk_on_the_published_shape(check):
    """1000 texts, suffixes of 50 tokens, ten guesses each: a guess is right where all its tokens are."""
    rng = np.random.default_rng(0)
    true = rng.integers(50257, size=(1000, 50)).astype(np.uint16)
    texts = np.tile(np.arange(1000), 10)
    guessed = true[texts].copy()
    sure = rng.random(len(texts))
    spoiled = rng.random(len(texts)) > sure * rng.random(1000)[texts]
    guessed[spoiled, rng.integers(50, size=spoiled.sum())] += 1
    right = (guessed == true[texts]).all(axis=1)
    curve = recall_curve(texts, sure, right, 1000)
    order = np.argsort(-sure, kind="stable")
    for allowed in (1, 10, 100, 1000):
        expected = walked([(texts[i], right[i]) for i in order], 1000, allowed)
        check("recall at 100 errors: against a walk", abs(curve.at(allowed) - expected), 1e-12)
    assert 0 < curve.at(10) < curve.at(100) < curve.recall[-1]


def test_published_example(check):
    """The benchmark's example submission, drawn again by its recipe, scores 0.5 (statistics.md 12)."""
    draw = np.random.RandomState(0)  # the recipe's generator
    true, hardness = draw.randint(0, 10, size=(1000, 10)), draw.uniform(size=1000)
    texts, sure, right = np.tile(np.arange(1000), 10), [], []
    for text in texts:
        confidence = draw.uniform(0, 1)
        solved = draw.uniform() * hardness[text] > 1 / (1 + np.exp(4 * (2 * confidence - 1)))
        guess = true[text] if solved else draw.randint(0, 10, size=10)
        sure.append(confidence)
        right.append(np.array_equal(guess, true[text]))
    check("recall at 100 errors: published example", abs(recall_curve(texts, sure, right, 1000).at(100) - 0.5), 5e-4)


def test_rows_of_a_study(tmp_path):
    world = Planted(tmp_path, n=300, lengths=(12, 20))
    world.write("teacher", luck=0.3, knows={"private": 64}, train_roles=["private"])
    world.write("base_student", luck=0.3)
    study = world.study()
    rows = recall_rows(study, Memorized(study, [(0, 10)]))
    row = chosen(rows, model="teacher", role="private")
    assert row["measure"] == "recall_at_100_errors@k=10" and row["value"] == pytest.approx(1 / 3) and row["n"] == 300
    assert 0.27 < row["ci_low"] < row["value"] < row["ci_high"] < 0.40  # the sure guesses are the right ones
    nothing = chosen(rows, model="base_student")
    assert nothing["value"] == 0 and 0 < nothing["ci_high"] < 0.02
