"""The three claims: planted ones hold, equal models are not told apart, and tests keep their level."""

import numpy as np
import pytest
from planted_extractions import extraction, planted, row
from scipy import stats
from test_attacks_mechanism import told

from attacks import trends
from attacks.trends import claim_words, falling, shuffled, verdict

N = 300


def chain(shares, seeds=(0,), seed=0, **settings):
    """Teacher, baseline and student that memorize these shares of the private records; heldout: none."""
    rng, found = np.random.default_rng(seed), {}
    for run, share in zip(("teacher", "direct", "students/kd"), shares, strict=True):
        for k in seeds:
            for role in ("private", "heldout"):
                p = share if role == "private" else 0.0
                matched = rng.integers(0, 6, N)
                found[run, k, role] = extraction(rng.random(N) < p, run=run, seed=k, role=role, matched=matched)
    return planted(found, **settings)


def of_all(rows, seeds):
    """The rows over all seeds, or of the only one."""
    return [r for r in rows if r.get("seed") == ("all" if len(seeds) > 1 else seeds[0])]


def test_a_planted_chain_and_an_equal_one():
    for seeds in ((0,), (0, 1, 2)):
        rows = of_all(trends.rows(*chain((0.6, 0.3, 0.3), seeds)), seeds)
        at = lambda a, b, measure, rows=rows: row(rows, claim="chain", model_a=a, model_b=b, measure=f"{measure}@k=10")
        for measure in ("extracted", "matched", "extracted_gap", "matched_gap"):
            assert at("teacher", "direct", measure)["verdict"] == "yes"
            assert at("direct", "students/kd", measure)["verdict"] == "not resolved"
        gap = at("teacher", "direct", "extracted")
        assert 0.1 < gap["ci_low"] < gap["value"] < gap["ci_high"] < 0.5 and gap["n"] == N
        words = claim_words(rows)[0]
        assert words.startswith(
            "Memorization falls from teacher to baseline to student (shared setting): verbatim: yes for teacher"
        )
        assert "not resolved for direct over students/kd" in words and "teacher over students/kd" not in words
        assert f"(300 texts, {'seed 0' if len(seeds) == 1 else 'all seeds together'})" in words
    reverse = trends.rows(*chain((0.2, 0.5, 0.5)))
    assert row(reverse, claim="chain", model_b="direct", measure="extracted@k=10", seed=0)["verdict"] == "no"


def test_the_gap_takes_out_what_a_model_predicts_anyway():
    """The larger model gets three more tokens right of every text, members or not: no memorization."""
    rng, found = np.random.default_rng(1), {}
    for run, more in (("teacher", 4), ("direct", 1), ("students/kd", 1)):
        for role in ("private", "heldout"):
            matched = more + rng.integers(0, 4, N)
            found[run, 0, role] = extraction(np.zeros(N, bool), run=run, role=role, matched=matched)
    rows = trends.rows(*planted(found))
    at = lambda measure: row(rows, claim="chain", model_b="direct", measure=f"{measure}@k=10", seed=0)
    assert at("matched")["verdict"] == "yes" and at("matched_gap")["verdict"] == "not resolved"
    assert at("extracted")["p_value"] == 1


def test_equal_models_are_rarely_told_apart():
    """Over all rows of the claim, after Holm: the family's level."""
    wrong = 0
    for seed in range(120):
        rows = trends.rows(*chain((0.3, 0.3, 0.3), seed=seed))
        wrong += any(r.get("verdict") in ("yes", "no") for r in rows if r["claim"] == "chain")
    assert wrong / 120 <= 0.09


def sweep(shares, seed=0, n=200, seeds=(0,)):
    """Nested sets: who is memorized at a higher T is mostly memorized at a lower one."""
    rng = np.random.default_rng(seed)
    ease = rng.random(n)
    found = {("teacher", 0, "private"): np.ones(n, bool)}
    for T, share in shares.items():
        for k in seeds:
            found[f"students/t{T}", k, "private"] = (0.7 * ease + 0.3 * rng.random(n)) < share
            found[f"students/t{T}", k, "heldout"] = rng.random(n) < 0.02
    return planted(found, provenance={f"students/t{T}": told(float(T)) for T in shares})


def test_temperature():
    for seeds in ((0,), (0, 1, 2)):
        rows = trends.rows(*sweep({1: 0.6, 2: 0.45, 4: 0.2}, seeds=seeds))
        chosen = of_all(rows, seeds)
        at = lambda measure, rows=chosen: row(rows, claim="temperature", measure=measure)
        fall = at("extracted_by_temperature@k=10")
        assert fall["verdict"] == "yes" and fall["model_a"] == "students/t1" and fall["model_b"] == "students/t4"
        assert at("extracted_T=1-T=2@k=10")["verdict"] == "yes" and at("extracted_T=2-T=4@k=10")["value"] > 0
        assert at("extracted_by_temperature@k=10;heldout")["verdict"] == "not resolved"
        beyond, control = at("extracted_by_temperature_gap@k=10"), at("extracted_by_temperature@k=10;heldout")
        assert beyond["verdict"] == "yes" and beyond["value"] == pytest.approx(fall["value"] - control["value"])
        assert beyond["ci_low"] < beyond["value"] < beyond["ci_high"] and beyond["n"] == 200
        assert claim_words(rows)[2].startswith(
            "Memorization falls with the temperature of distillation (shared setting): verbatim, per unit of T: yes"
        )
    null = [trends.rows(*sweep(dict.fromkeys((1, 2, 4), 0.4), seed)) for seed in range(60)]
    ps = np.array([row(rows, claim="temperature", measure="extracted_by_temperature@k=10")["p_value"] for rows in null])
    assert np.mean(ps < 0.05) <= 0.14 and ps.max() > 0.3


def test_what_falls_of_any_text_is_no_fall_of_memory():
    """Members and others alike: easy text is extracted less at a higher temperature too."""
    ease, found = np.random.default_rng(5).random((2, 200)), {("teacher", 0, "private"): np.ones(200, bool)}
    for T, share in ((1, 0.6), (2, 0.45), (4, 0.2)):
        for role, easy in zip(("private", "heldout"), ease, strict=True):
            found[f"students/t{T}", 0, role] = easy < share
    rows = trends.rows(*planted(found, provenance={f"students/t{T}": told(float(T)) for T in (1, 2, 4)}))
    at = lambda name: row(rows, claim="temperature", measure=f"{name}@k=10")["verdict"]
    assert at("extracted_by_temperature") == "yes" and at("extracted_by_temperature_gap") == "not resolved"


def test_a_row_without_an_interval_has_a_sentence():
    one = {"claim": "chain", "setting": "shared", "model_a": "teacher", "model_b": "direct", "verdict": "not resolved"}
    numbers = {"measure": "extracted@k=10", "value": 0.1, "ci_low": None, "ci_high": None, "p_corrected": 1, "seed": 0}
    assert "(+10.00 points [no interval], p = 1) (2 texts, seed 0)" in claim_words([one | numbers | {"n": 2}])[0]


def test_shuffling_within_examples(check):
    T = np.array([1.0, 2.0, 3.0])
    rng = np.random.default_rng(0)
    hits = rng.random((200, 3)) < np.array([0.5, 0.4, 0.3])
    slope = falling(hits, T, np.ones(200, bool))
    check("slope vs polyfit of the shares", abs(slope.value + np.polyfit(T, hits.mean(axis=0), 1)[0]), 1e-12)
    # normal limit of the permutation: within each example the sum of centred T over its hits
    apart = T - 2
    counts = hits.sum(axis=1)
    variance = np.sum(np.isin(counts, (1, 2))) * (2 / 3)
    want = 2 * stats.norm.sf(abs((hits @ apart).sum()) / np.sqrt(variance))
    p = shuffled(hits, T, np.arange(200), 0)
    assert p == pytest.approx(want, abs=0.01) and p < 0.02
    alike = np.repeat(hits[:25], 8, axis=0)
    assert shuffled(alike, T, np.arange(200) // 8, 0) > 5 * shuffled(alike, T, np.arange(200), 0)
    assert shuffled(np.ones((9, 3), bool), T, np.arange(9), 0) == 1


def test_what_cannot_be_tested_is_said():
    rows = trends.rows(*planted({("teacher", 0, "private"): np.ones(9, bool)}))
    assert [r["claim"] for r in rows] == ["chain", "repeats", "temperature"] and all("reason" in r for r in rows)
    said = claim_words(rows)
    assert len(said) == 3 and all("not tested" in sentence for sentence in said)
    assert (
        verdict({"p_corrected": 0.04, "value": -1}) == "no"
        and verdict({"p_corrected": 0.06, "value": 1}) == "not resolved"
    )


def test_settings_never_share_a_sentence():
    rng, found, provenance = np.random.default_rng(3), {}, {}
    for run in ("teacher", "direct", "students/a", "students/b"):
        found[run, 0, "private"] = rng.random(100) < 0.5
    provenance = {"students/b": {"setting": "disjoint"}}
    rows = trends.rows(*planted(found, provenance=provenance))
    words = [sentence for sentence in claim_words(rows) if "baseline" in sentence]
    assert len(words) == 2 and not any("students/a" in w and "students/b" in w for w in words)
    assert {r["setting"] for r in rows if r["claim"] == "chain"} == {"shared", "disjoint"}
