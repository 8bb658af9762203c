"""Signals of one model: the worked example of the reference, identities, loops over examples."""

import numpy as np
import pytest
from planted_regimes import make

from attacks import signals
from attacks.membership import score
from attacks.tables import Tokens

Y = np.array([2, 1, 4, 1, 0, 2])


def worked_example() -> tuple[Tokens, Tokens]:
    """Six targets of five ids: target and reference logits -> the fields of a pass, in float64 (attacks.md 11)."""
    t, v = np.arange(6)[:, None], np.arange(5)[None]
    tables = []
    for z in ((4 * t + 7 * v + 3 * t * v) % 17 / 4, (5 * t + 2 * v + t * v) % 11 / 4):
        lp = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        p = np.exp(lp)
        entropy = -(p * lp).sum(axis=1)
        fields = {
            "logp": lp[np.arange(6), Y],
            "entropy": entropy,
            "logp_std": np.sqrt((p * (lp + entropy[:, None]) ** 2).sum(axis=1)),
            "target_id": Y,
            "top1_id": lp.argmax(axis=1),
            "top1_logp": lp.max(axis=1),
        }
        tables.append(make(fields, [6], zlib_bytes=[52], n_bytes=[60]))
    return tables[0], tables[1]


@pytest.mark.parametrize(
    "attack,value",
    [
        ("loss", -0.791515),
        ("perplexity", -2.206736),
        ("sum", -4.749088),
        ("zlib", -0.0152214),
        ("min_k", -1.586985),
        ("min_k@k=0.5", -1.190838),
        ("min_k@k=1", -0.791515),
        ("min_k_plus_plus", -0.504546),
        ("min_k_plus_plus@k=0.5", 0.114742),
        ("min_k_plus_plus@k=1", 0.405654),
        ("gap_k@k=0.5,w=1", -0.671672),
        ("gap_k@k=0.5,w=2", -0.823559),
        ("surp@k=0.5,e=1.2", -1.075701),
        ("dc_pdd@a=1", 0.821212),
        ("dc_pdd", 0.01),
        ("gap", 4 / 6),
    ],
)
def test_worked_example(attack, value, check):
    counts = {"counts": np.array([50, 20, 20, 9, 1])} if attack.startswith("dc_pdd") else {}
    found = score(attack, worked_example()[0], **counts)[0]
    check("worked example of the attacks, six decimals", abs(found - value), 1e-6)


def random_tokens(rng, n=60) -> Tokens:
    lengths = rng.integers(1, 30, n)
    total = lengths.sum()
    token = {"logp": -rng.gamma(2, 1, total), "entropy": rng.gamma(2, 1, total), "logp_std": 0.5 + rng.random(total)}
    token |= {"top1_logp": np.maximum(token["logp"], -0.7), "target_id": rng.integers(9, size=total)}
    return make(token, lengths, zlib_bytes=rng.integers(20, 90, n))


def by_example(tokens: Tokens):
    for a, b in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True):
        yield {name: values[a:b] for name, values in tokens.token.items()}


def test_against_loops_over_examples():
    tokens = random_tokens(np.random.default_rng(0))
    for k in (0.2, 0.29, 0.5):
        plain, gaps, surprising = [], [], []
        for e in by_example(tokens):
            lowest = lambda values, k=k: np.sort(values)[: max(1, int(k * len(values) + 1e-9))]
            plain.append(lowest((e["logp"] + e["entropy"]) / e["logp_std"]).mean())
            gap, w = (e["logp"] - e["top1_logp"]) / e["logp_std"], min(3, len(e["logp"]))
            gaps.append(lowest(np.convolve(gap, np.ones(w) / w, "valid")).mean())
            chosen = (e["logp"] <= lowest(e["logp"]).max()) & (e["entropy"] < 2)
            surprising.append(e["logp"][chosen].mean() if chosen.any() else -np.inf)
        np.testing.assert_allclose(score(f"min_k_plus_plus@k={k}", tokens), plain)
        np.testing.assert_allclose(score(f"gap_k@k={k}", tokens), gaps)
        np.testing.assert_allclose(score(f"surp@k={k}", tokens), surprising)


def test_blocks_hold_every_token_once():
    tokens = random_tokens(np.random.default_rng(5))
    for cells in (1, 70, 10_000):
        seen = np.concatenate([index[inside] for _, index, inside in signals.blocks(tokens, cells)])
        np.testing.assert_array_equal(np.sort(seen), np.arange(len(tokens.owner)))
    first = [np.unique(e["target_id"], return_index=True)[1] for e in by_example(tokens)]
    expected = np.concatenate([a + np.sort(f) for a, f in zip(tokens.offsets[:-1], first, strict=True)])
    np.testing.assert_array_equal(np.flatnonzero(signals.first_occurrence(tokens)), expected)


def test_identities():
    tokens = random_tokens(np.random.default_rng(1))
    np.testing.assert_allclose(score("min_k@k=1", tokens), score("loss", tokens), rtol=1e-12)
    order = np.argsort(score("loss", tokens))
    assert (np.diff(score("perplexity", tokens)[order]) >= 0).all()
    assert (score("min_k@k=0.1", tokens) <= score("min_k@k=0.6", tokens) + 1e-12).all()
    # A constant added to all logits changes nothing: logp and entropy are already free of it.
    assert score("gap_k@w=1", make({"logp": [-0.1], "top1_logp": [-0.1], "logp_std": [1]}, [1]))[0] == 0


def test_a_text_known_by_heart_keeps_ratios_finite():
    known = make({"logp": [0.0, 0.0]}, [2])
    other = make({"logp": [-1.0, -2.0]}, [2])
    assert score("ratio:null", known, reference=other)[0] == 0
    assert score("ratio:null", known, reference=known)[0] == pytest.approx(0, abs=1)
    assert score("recall", known, recall=other)[0] > 1e9 and score("recall", known, recall=known)[0] == 1


def test_clamped_spread_is_finite_and_counted():
    tokens = make({"logp": [-1e-7, -1], "entropy": [1e-7, 1], "logp_std": [0, 1]}, [2])
    assert np.isfinite(score("min_k_plus_plus", tokens)).all() and signals.clamped(tokens) == 1
