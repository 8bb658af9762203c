"""Roles by seeded hash, the coins, and canaries."""

import numpy as np
import pandas as pd
import pytest

from kd_jax.data import records, roles, synthetic, tokenizer
from kd_jax.data.records import DataError


def frame_of(n: int, group_size: int = 1) -> pd.DataFrame:
    rows = [
        {
            "group": f"g{i // group_size}" if group_size > 1 else None,
            "task": "t",
            "instruction": f"i{i}",
            "input": "",
            "response": f"r{i}",
            "source": f"x:{i}",
        }
        for i in range(n)
    ]
    return records.make_frame(rows)


def test_shares_and_coin():
    splits = roles.assign(frame_of(20_000), seed=5)
    assert tuple(splits.columns) == roles.SPLIT_COLUMNS
    share = splits.role.value_counts(normalize=True)
    for role, expected in roles.SHARES.items():
        # Four standard errors of a binomial share.
        assert share[role] == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / 20_000))
    assert splits.coin[splits.role == "calib"].mean() == pytest.approx(0.5, abs=0.05)
    assert set(splits.repeats) == {1} and set(splits.placement) == {""}


def test_roles_follow_the_group_alone():
    frame = frame_of(2000, group_size=4)
    splits = roles.assign(frame, seed=1)
    assert (splits.groupby("group").role.nunique() == 1).all()
    assert (splits.groupby("group").coin.nunique() == 1).all()

    by_id = splits.set_index("example_id").role
    shuffled = roles.assign(frame.sample(frac=1, random_state=0), seed=1).set_index("example_id").role
    assert (shuffled.sort_index() == by_id.sort_index()).all()
    fewer = roles.assign(frame.iloc[::3], seed=1).set_index("example_id").role
    assert (fewer == by_id[fewer.index]).all()
    assert (roles.assign(frame, seed=2).role != splits.role).mean() > 0.5
    reordered = roles.assign(frame, dict(reversed(roles.SHARES.items())), seed=1)
    assert (reordered.role == splits.role).all()


def test_a_role_without_a_share_gets_nothing():
    splits = roles.assign(frame_of(500), {"private": 0.5, "heldout": 0.5, "population": 0.0})
    assert set(splits.role) == {"private", "heldout"}


@pytest.mark.parametrize("shares", [{"private": 0.5}, {"private": 0.5, "members": 0.5}, {"private": 1.5, "dev": -0.5}])
def test_bad_shares(shares):
    with pytest.raises(DataError, match=r"data\.roles"):
        roles.assign(frame_of(3), shares)


def test_check_names_every_small_role():
    splits = roles.assign(frame_of(100), {"private": 0.5, "calib": 0.5})
    roles.check(splits, {"private": 20, "calib": 20})
    with pytest.raises(DataError, match=r"heldout has 0 of at least 1.*calib \(coin 0\) has \d+ of at least 50"):
        roles.check(splits, {"private": 20, "heldout": 0, "calib": 100})


def test_canaries():
    frame, splits = roles.make_canaries(40, seed=7)
    assert len(frame) == len(splits) == 40 * 3 * 4 and frame.attrs["duplicates"] == 0
    assert list(frame.example_id) == list(splits.example_id)
    cells = splits.groupby(["placement", "repeats"]).size()
    assert cells["none", 0] == 120
    assert (cells.drop("none") == 40).all() and len(cells) == 10
    # One template, one length, secrets and names all different.
    assert frame.response.str.fullmatch(r"The locker code is #\d(-\d){5}\.").all()
    assert frame.response.nunique() == frame.instruction.nunique() == splits.secret_id.nunique() == len(frame)
    assert frame.instruction.str.len().nunique() == 1
    texts = synthetic.generate(300, overlap=0.0, seed=0).response
    for size in (400, 1000):
        tok = tokenizer.load({"train_size": size}, train_texts=texts)
        assert len({len(ids) for ids in tok.encode_batch(frame.response.tolist())}) == 1
    assert splits.coin.mean() == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(480))
    pd.testing.assert_frame_equal(frame, roles.make_canaries(40, seed=7)[0])


def test_training_ids():
    rows = [
        ("a", "private", "", 1, 0),
        ("b", "heldout", "", 1, 1),
        ("c", "public", "", 1, 0),
        ("d", "calib", "", 1, 1),
        ("e", "calib", "", 1, 0),
        ("f", "dev", "", 1, 1),
        ("g", "population", "", 1, 1),
        ("t", "canary", "teacher_only", 4, 1),
        ("u", "canary", "teacher_only", 4, 0),
        ("s", "canary", "student_only", 16, 1),
        ("v", "canary", "both", 2, 1),
        ("w", "canary", "both", 2, 0),
        ("n", "canary", "none", 0, 1),
    ]
    splits = pd.DataFrame(rows, columns=["example_id", "role", "placement", "repeats", "coin"])

    def trained(*train_roles: str) -> dict[str, int]:
        table = roles.training_ids(splits, train_roles)
        return dict(zip(table.example_id, table.repeats, strict=True))

    assert trained("private") == {"a": 1, "d": 1, "t": 4, "v": 2}
    assert trained("public") == {"c": 1, "s": 16, "v": 2}
    assert trained("heldout") == {"b": 1, "e": 1}
    assert trained("private", "heldout") == {"a": 1, "b": 1, "d": 1, "e": 1, "t": 4, "v": 2}
    with pytest.raises(DataError, match="dev"):
        trained("dev")
