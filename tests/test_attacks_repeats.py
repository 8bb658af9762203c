"""More repeats, more memorized: planted, absent, of canaries; Armitage's statistic by its table form."""

import numpy as np
import pandas as pd
import pytest
from planted_extractions import extraction, ids_of, planted, row
from scipy import stats

from attacks import trends
from attacks.repeats import armitage
from attacks.trends import claim_words


def repeated(slope, seed=0, n=240, groups=None):
    """Share memorized `0.1 + slope log2(repeats)`, for the teacher alone; everyone else has 0.1."""
    rng = np.random.default_rng(seed)
    times = np.tile([1, 4, 16, 64], n // 4)
    frames, found = [], {}
    for role in ("private", "heldout"):
        frames.append(pd.DataFrame({"example_id": ids_of(role, n), "repeats": times, "coin": 0, "placement": ""}))
        for run in ("teacher", "base_student"):
            share = 0.1 + slope * np.log2(times) * (run == "teacher") * (role == "private")
            found[run, 0, role] = extraction(rng.random(n) < share, run=run, role=role, matched=rng.integers(0, 5, n))
    splits = pd.concat(frames).set_index("example_id")
    if groups:
        splits["group"] = [f"{i.split('-')[0]}-{int(i.split('-')[1]) // groups}" for i in splits.index]
    return planted(found, splits=splits)


def test_repeats():
    rows = trends.rows(*repeated(0.1))
    at = lambda run, measure: row(rows, claim="repeats", model_a=run, measure=measure, seed=0)
    rise = at("teacher", "extracted_by_repeats@k=10")
    assert rise["verdict"] == "yes" and rise["ci_low"] < 0.1 < rise["ci_high"] and rise["n"] == 240
    assert at("teacher", "spearman_matched_repeats@k=10")["ci_low"] > 0.1
    assert at("teacher", "extracted_by_repeats@k=10;heldout")["verdict"] == "not resolved"
    assert at("base_student", "extracted_by_repeats@k=10;untrained")["verdict"] == "not resolved"
    assert claim_words(rows)[1].startswith(
        "Memorization rises with repeats: verbatim, per doubling: yes for teacher (+"
    )
    assert claim_words(rows)[1].count("base_student") == 0
    flat = [trends.rows(*repeated(0.0, seed)) for seed in range(60)]
    found = [row(rows, measure="extracted_by_repeats@k=10", model_a="teacher") for rows in flat]
    assert np.mean([r["p_value"] < 0.05 for r in found]) <= 0.14
    grouped = trends.rows(*repeated(0.1, groups=8))
    assert 0 < row(grouped, measure="extracted_by_repeats@k=10", model_a="teacher")["p_value"] < 1e-3


def test_canaries_by_repeats():
    rng, n = np.random.default_rng(2), 120
    times = np.tile([1, 4, 16, 64], n // 4)
    frame = pd.DataFrame({"example_id": ids_of("canary", n), "repeats": times, "coin": np.arange(n) % 8 < 4})
    frame = frame.assign(coin=frame["coin"].astype(int), placement=np.repeat(["both", "student_only"], n // 2))
    known = (frame["coin"] == 1) & (frame["placement"] == "both") & (rng.random(n) < np.log2(times) / 7)
    found = {("teacher", 0, "canary"): extraction(known, role="canary", short=np.ones(n, bool))}
    rows = trends.rows(*planted(found, splits=frame.set_index("example_id")))
    assert "whole canaries, per doubling: yes for teacher (+" in claim_words(rows)[1]
    at = row(rows, claim="repeats", measure="extracted_by_repeats@k=10;canary")
    assert at["n"] == 32 and at["verdict"] == "yes", "coin 1 and placements that the teacher saw; whole short answers"


def test_exposure_by_repeats():
    rng, n = np.random.default_rng(6), 60
    times = np.tile([1, 4, 16], n // 3)
    ids = ids_of("canary", n)
    made = [
        {"model": run, "seed": 0, "example_id": i, "placement": "both", "repeats": int(t)}
        | {"exposure": (np.log2(t) if run == "teacher" else 0) + rng.normal()}
        for run in ("teacher", "base_student")
        for i, t in zip(ids, times, strict=True)
    ]
    frame = pd.DataFrame({"example_id": ids, "repeats": times, "coin": 1, "placement": "both"}).set_index("example_id")
    found = {(run, 0, "canary"): extraction(np.zeros(n, bool), role="canary") for run in ("teacher", "base_student")}
    rows = trends.rows(*planted(found, splits=frame), made)
    at = row(rows, measure="spearman_exposure_repeats")
    want = stats.spearmanr(times, [r["exposure"] for r in made[:n]])
    assert at["model_a"] == "teacher" and at["verdict"] == "yes" and at["n"] == n
    assert at["value"] == pytest.approx(want.statistic) and at["p_value"] == pytest.approx(want.pvalue)
    assert "exposure of canaries, rank correlation: yes for teacher (+0." in claim_words(rows)[1]


def test_armitage_is_the_textbook_statistic(check):
    # Armitage's chi-squared by its table form: counts of hits among totals at scores
    hits, total, scores = np.array([3, 6, 14]), np.array([40, 38, 41]), np.array([0.0, 2.0, 4.0])
    y = np.concatenate([np.arange(n) < k for k, n in zip(hits, total, strict=True)])
    x = np.repeat(scores, total)
    N, R = total.sum(), hits.sum()
    top = N * (N * (hits @ scores) - R * (total @ scores)) ** 2
    chi2 = top / (R * (N - R) * (N * (total @ scores**2) - (total @ scores) ** 2))
    check("Cochran-Armitage vs its table form", abs(armitage(y, x) - stats.chi2.sf(chi2, 1)), 1e-12)
    assert armitage(np.ones(5, bool), np.arange(5.0)) == 1
