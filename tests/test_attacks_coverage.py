"""Coverage of a text by drawn windows: by hand, against a walk over tokens, and in a study."""

import numpy as np
import pytest

from attacks.coverage import coverage, coverage_rows
from attacks.tables import TableError
from tests.planted_memorization import Planted, chosen


def test_by_hand():
    ids = np.array(["a@0", "a@5", "a@10", "b@0", "b@20"])
    texts, shares = coverage(ids, np.array([10, 10, 10, 10, 10]), np.array([1, 0, 1, 0, 1], bool))
    assert texts.tolist() == ["a", "b"]
    assert shares.tolist() == [1.0, 0.5]  # b's tokens 10 to 19 stand in no window


def test_against_a_walk(check):
    rng = np.random.default_rng(0)
    ids = [f"text{t}@{start}" for t in range(20) for start in range(0, int(rng.integers(60, 200)), 7)]
    order = rng.permutation(len(ids))
    ids, drawn = np.array(ids)[order], rng.random(len(ids)) < 0.3
    texts, shares = coverage(ids, np.full(len(ids), 12), drawn)
    for text, share in zip(texts, shares, strict=True):
        inside = {True: set(), False: set()}
        for name, hit in zip(ids, drawn, strict=True):
            record, start = name.split("@")
            if record == text:
                inside[bool(hit)] |= set(range(int(start), int(start) + 12))
        expected = len(inside[True]) / len(inside[True] | inside[False])
        check("coverage: against a walk over tokens", abs(share - expected), 1e-12)


def test_other_ids_are_refused():
    with pytest.raises(TableError, match="a#1"):
        coverage(np.array(["a@0", "a#1"]), np.array([5, 5]), np.array([True, True]))


def test_rows_of_a_study(tmp_path):
    """A window of 20 tokens at 0.9 each is drawn with .12: covered at 0.1 and below, not at 0.5."""
    world = Planted(tmp_path, n=10)
    world.write("teacher")
    for role, p in (("private", 0.9), ("heldout", 0.3)):
        ids = np.array([f"{role}-{t:02d}@{start}" for t in range(10) for start in range(0, 100, 10)])
        sizes = np.full(len(ids), 20)
        size = sizes.sum()
        fields = {"segment": np.ones(size), "logp": np.full(size, np.log(p)), "target_id": np.zeros(size)}
        known = np.repeat(np.arange(len(ids)) % 10 < 5, 20)  # the first half of every text
        fields |= {"rank": np.where(known, 0, 50), "topk_lse_k40_t1": np.zeros(size)}
        world.save("teacher", 0, role, ids, np.full(len(ids), "all"), sizes, fields, variant="windows")
    rows = coverage_rows(world.study())
    at = {"model": "teacher", "task": "all", "seed": 0}
    row = chosen(rows, **at, measure="coverage@p=0.1;k=40,t=1;window=20", role="private")
    assert row["value"] == pytest.approx(60 / 110) and row["n"] == 10  # texts; tokens 0 to 59 of 110
    assert chosen(rows, **at, measure="coverage@p=0.5;k=40,t=1;window=20", role="private")["value"] == 0
    assert chosen(rows, **at, measure="coverage@p=0.0001;k=40,t=1;window=20", role="heldout")["value"] == 0
    assert chosen(rows, **at, measure="coverage@p=0.001;k=40,t=1;window=20", role="private-heldout")["ci_low"] > 0
    assert not [row for row in rows if "reason" in row]
