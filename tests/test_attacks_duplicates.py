"""Near-duplicates: 13-grams, short texts, and the AUC without them."""

import time
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from planted_scores import QUICK, World, row, tables

from attacks.audit import audit
from attacks.duplicates import close_short, edit_distances, near_duplicates, shared_grams


def grams_of(text, n):
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]


def naive_share(text, among, n=13):
    texts_with = Counter(gram for t in among for gram in set(grams_of(t, n)))
    template = {gram for gram, count in texts_with.items() if count >= max(len(among) / 10, 10)}
    grams = [gram for gram in grams_of(text, n) if gram not in template]
    return np.mean([g in texts_with for g in grams]) if grams else np.nan


def naive_distance(a, b):
    d = np.add.outer(np.arange(len(a) + 1), np.arange(len(b) + 1))
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            d[i, j] = min(d[i - 1, j] + 1, d[i, j - 1] + 1, d[i - 1, j - 1] + (a[i - 1] != b[j - 1]))
    return d[-1, -1]


def test_shared_grams_are_the_naive_ones():
    rng = np.random.default_rng(0)
    members = [rng.integers(0, 3, rng.integers(0, 60)) for _ in range(30)]
    others = [rng.integers(0, 3, rng.integers(0, 60)) for _ in range(30)]
    others[0] = np.concatenate([rng.integers(3, 9, 20), members[1][:40]])
    np.testing.assert_allclose(shared_grams(others, members, 5), [naive_share(t, members, 5) for t in others])
    assert np.isnan(shared_grams([np.arange(12)], members)).all()
    half = np.arange(100, 150)  # a text's end and the next one's beginning make no gram
    assert shared_grams([half], [half[:25], half[25:]])[0] == pytest.approx(26 / 38)


def test_the_template_of_the_prompts_is_nobodys_text():
    rng = np.random.default_rng(1)
    template = np.arange(1000, 1040)
    members, others = ([np.concatenate([template, rng.integers(0, 500, 20)]) for _ in range(40)] for _ in range(2))
    assert shared_grams(others, members).max() < 0.2  # by chance, where the template ends
    others[3] = members[5]
    assert np.flatnonzero(shared_grams(others, members) > 0.8).tolist() == [3]


def test_edit_distance():
    words = [("kitten", "sitting"), ("included", "isitincluded"), ("", "abc"), ("same", "same")]
    pad = lambda of, width: np.array([[ord(c) for c in w.ljust(width)] for w in of])
    a, b = ([pair[k] for pair in words] for k in (0, 1))
    lengths = [np.array([len(w) for w in of]) for of in (a, b)]
    assert list(edit_distances(pad(a, 8), pad(b, 12), *lengths)) == [3, 4, 3, 0]
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 4, (60, 9)), rng.integers(0, 4, (60, 11))
    lengths = rng.integers(0, 10, 60), rng.integers(0, 12, 60)
    naive = [naive_distance(x[:p], y[:q]) for x, y, p, q in zip(a, b, *lengths, strict=True)]
    assert list(edit_distances(a, b, *lengths)) == naive


def test_short_texts_are_compared_whole():
    rng = np.random.default_rng(2)
    members = [rng.integers(0, 6, rng.integers(1, 16)) for _ in range(80)]
    others = [rng.integers(0, 6, rng.integers(0, 16)) for _ in range(150)]
    near = lambda t: any(naive_distance(t, m) <= int(0.2 * max(len(t), len(m)) + 1e-9) for m in members)
    expected = [0 < len(t) < 13 and near(t) for t in others]
    assert list(close_short(others, members)) == expected and 10 < sum(expected) < 140
    assert not close_short([np.array([], int)], members).any() and not close_short(others, []).any()


def records(prompts, responses):
    return pd.DataFrame({"prompt_ids": list(prompts), "response_ids": list(responses)})


def test_records_and_responses_are_told_apart():
    rng = np.random.default_rng(3)
    text = lambda n: rng.integers(0, 10_000, n)
    member = records([text(20), text(20)], [text(40), np.array([1, 2])])
    copy, edited = member["response_ids"][0].copy(), member["response_ids"][0].copy()
    edited[39] = 5
    others = records(
        [text(20), member["prompt_ids"][0], text(20), text(20), member["prompt_ids"][1]],
        [copy, edited, text(40), np.array([1, 2]), np.array([1, 3])],
    )
    found = near_duplicates(member, others)
    assert list(found["responses"]) == [True, True, False, True, False]  # "1 3" is one edit of two tokens: not near
    assert list(found["records"]) == [False, True, False, False, True]


def test_a_text_that_is_all_template_is_compared_whole():
    """One answer of many members: its 13-grams are nobody's, so that no share is left; the same answer is a duplicate,
    a part of it is not."""
    rng = np.random.default_rng(5)
    answer, text = np.arange(500, 530), lambda n: rng.integers(1000, 9000, n)
    member = records([text(20) for _ in range(40)], [answer] * 20 + [text(30) for _ in range(20)])
    others = records([text(20) for _ in range(3)], [answer, answer[:20], text(30)])
    assert np.isnan(shared_grams([answer], list(member["response_ids"]))).all()
    found = near_duplicates(member, others)
    assert list(found["responses"]) == [True, False, False] and not found["records"].any()


def test_the_trained_half_of_the_calibration_records_are_members_too(tmp_path):
    world = World(tmp_path / "scores", {"private": 60, "heldout": 60, "calib": 40})
    world.write("teacher", train_roles=["private"])
    world.write("students/kd", {"private": 0.4}, teacher="teacher")
    world.write_text()
    folder = tmp_path / "scores" / "text"
    heldout, calib = (pd.read_parquet(folder / f"{r}.parquet") for r in ("heldout", "calib"))
    coin = pd.read_parquet(folder / "splits.parquet").set_index("example_id")["coin"].loc[calib["example_id"]]
    trained, other = calib[coin.to_numpy() == 1], calib[coin.to_numpy() == 0]
    for column in ("prompt_ids", "response_ids"):
        copied = [*trained[column][:3], *other[column][:2]]
        heldout.loc[:4, column] = pd.Series(copied, index=range(5))
    heldout.to_parquet(folder / "heldout.parquet")
    settings = QUICK | {"attacks": ["loss"], "headline_model": "students/kd"}
    assert audit(tmp_path / "scores", tmp_path / "out", settings)["near_duplicates"]["counts"]["records"] == 3
    (folder / "splits.parquet").unlink()  # then nobody knows which half it was
    assert audit(tmp_path / "scores", tmp_path / "out", settings)["near_duplicates"]["counts"]["records"] == 0


def test_gate_counts_and_leaves_them_out(tmp_path):
    world = World(tmp_path / "scores", {"private": 100, "heldout": 100})
    world.write("students/kd", {"private": 0.4})
    world.write_text()
    folder = tmp_path / "scores" / "text"
    private, heldout = (pd.read_parquet(folder / f"{r}.parquet") for r in ("private", "heldout"))
    for column in ("prompt_ids", "response_ids"):
        heldout.loc[:8, column] = pd.Series(private[column][:9].to_list(), index=range(9))
    heldout.to_parquet(folder / "heldout.parquet")
    summary = audit(tmp_path / "scores", tmp_path / "out", QUICK | {"attacks": ["loss"]})
    gates = tables(tmp_path / "out")["gates"].query("gate == 'near_duplicates'")
    assert row(gates, metric="count:records")["value"] == 9 and row(gates, metric="count:records")["n"] == 100
    whole, without = row(gates, metric="auc"), row(gates, metric="auc_without:records")
    assert (whole["n"], without["n"]) == (200, 191) and whole["value"] == summary["headline"]["value"] != without[
        "value"
    ]
    assert summary["near_duplicates"]["counts"]["records"] == 9
    assert any("9 of 100 non-members are nearly a member's record" in said for said in summary["verdicts"])
    (folder / "heldout.parquet").unlink()
    audit(tmp_path / "scores", tmp_path / "again", QUICK | {"attacks": ["loss"]})
    gates = tables(tmp_path / "again")["gates"].query("gate == 'near_duplicates'")
    assert list(gates["verdict"]) == ["not run"]


def test_twenty_thousand_records_in_seconds():
    rng = np.random.default_rng(4)
    short = lambda n: [rng.integers(0, 500, rng.integers(1, 12)) for _ in range(n)]
    texts = [list(rng.integers(0, 50_000, (8_000, 256))) + short(2_000) for _ in range(2)]
    start = time.process_time()
    shared_grams(*texts)
    close_short(*texts)
    assert time.process_time() - start < 15
