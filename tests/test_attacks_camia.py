"""Signals along the text, against plain loops."""

import numpy as np
from planted_regimes import make
from test_attacks_signals import by_example, random_tokens

from attacks.membership import score


def test_against_loops_over_examples():
    tokens = random_tokens(np.random.default_rng(2))
    expected = {name: [] for name in ("head", "confident", "above_mean", "above_running", "time", "diversity")}
    for e in by_example(tokens):
        lp, n = e["logp"], len(e["logp"])
        expected["head"].append(lp[:7].mean())
        expected["confident"].append((lp[:7] >= -1).mean())
        expected["above_mean"].append((lp > lp.mean()).mean())
        running = [lp[i] > lp[:i].mean() for i in range(1, n)]
        expected["above_running"].append(np.mean(running) if running else 0)
        reached = [i + 1 for i in range(n) if (lp[: i + 1] >= -1).sum() >= 0.3 * n - 1e-9]
        expected["time"].append(-reached[0] / n if reached else -1)
        expected["diversity"].append(lp.mean() / (len(np.unique(e["target_id"])) / n))
    for name, values in expected.items():
        given = {"head": "@n=7", "confident": "@n=7", "time": "@share=0.3"}.get(name, "")
        np.testing.assert_allclose(score(f"camia_{name}{given}", tokens), values, atol=1e-12)


def test_complexity_counts_phrases():
    """Levels 0 to 3 stand for lp below -4, -2, -1, and above: 3|33|332|..., parsed by hand."""
    level = {0: -9.0, 1: -3.0, 2: -1.5, 3: -0.5}
    rows = {"333333": 3, "3332": 3, "0123": 4, "010101": 4, "3": 1}  # 3|33|333; 3|33|2; four; 0|1|01|01
    rows["010101"] = 3  # the last phrase is one that is known: it does not count
    tokens = make({"logp": [level[int(c)] for row in rows for c in row]}, [len(row) for row in rows])
    np.testing.assert_allclose(score("camia_complexity", tokens), [-count / len(row) for row, count in rows.items()])
