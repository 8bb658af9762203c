"""Roles by seeded hash, the coins, repeats, and canaries."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from configs import base
from kd_jax import prepare
from kd_jax.data import records, roles, synthetic, tokenizer
from kd_jax.data.records import DataError
from kd_jax.errors import ConfigError

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"


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


TOKENIZERS = {
    "gpt2_tokenizer": {"vocab": "encoder.json.gz", "merges": "vocab.bpe"},
    "gpt_neox_tokenizer": {"json": "20B_tokenizer.json.gz"},
}


def cutters():
    texts = synthetic.generate(300, overlap=0.0, seed=0).response
    yield from (tokenizer.load({"train_size": size}, train_texts=texts) for size in (300, 400, 1000))
    for folder, files in TOKENIZERS.items():
        if (REAL / folder).is_dir():
            yield tokenizer.load({key: REAL / folder / name for key, name in files.items()})


def test_canaries_of_plain_text_end_in_their_secret_and_are_of_one_length_in_tokens():
    frame, splits = roles.make_canaries(40, seed=7, text=True)
    assert len(frame) == 480 and frame.instruction.isna().all() and set(splits.template) == {"locker_text"}
    parts = frame.response.str.extract(r"^The locker code of guest #(\d(?:-\d){12}) is #(\d(?:-\d){5})\.$")
    assert parts.notna().all(axis=None) and parts[0].is_unique and parts[1].is_unique
    for tok in cutters():
        ids = tok.encode_batch(frame.response.tolist())
        assert {len(row) for row in ids} == {len(ids[0])} and 32 <= len(ids[0]) - 12 and len(ids[0]) < 65
        # The secret is the end: the same places in all of them, and nothing but the digits differs there.
        tails = [tok.encode_batch([f"-{text[-12:]}"])[0][1:] for text in frame.response]
        assert {len(tail) for tail in tails} == {12}
        assert all(row[-12:] == tail for row, tail in zip(ids, tails, strict=True))
    # Who is inserted, and where, is drawn as for instructions.
    cells = splits.groupby(["placement", "repeats"]).size()
    assert cells["none", 0] == 120 and (cells.drop("none") == 40).all()
    assert 0.4 < splits.coin.mean() < 0.6


def data_config(tmp_path, rows: list[dict], **changes):
    config = base.get_config()
    path = tmp_path / "records.jsonl"
    pd.DataFrame(rows).to_json(path, orient="records", lines=True)
    config.data.update(dict(path=str(path), minimum=1, max_length=128, max_prompt=64) | changes)
    config.data.canaries.per_cell = 3
    config.tokenizer.train_size = 300
    return config


TEXTS = [{"text": f"The river number {i} is {i * i} miles long."} for i in range(200)]
PAIRS = [{"prompt": f"How long is river {i}?", "response": f"It is {i * i} miles long."} for i in range(200)]


@pytest.mark.parametrize(
    "rows, template, text",
    [(TEXTS, "alpaca", True), (TEXTS, "text", True), (PAIRS, "text", True), (PAIRS, "plain", False)],
    ids=["texts", "texts as text", "instructions as text", "instructions"],
)
def test_canaries_are_read_as_the_records_are(rows, template, text, tmp_path):
    data = prepare.prepare(data_config(tmp_path, rows, template=template), tmp_path / "work")
    canaries = data.of_role("canary")
    assert len(canaries) == 36 and all(("#" in name) == text for name in canaries.example_id)
    scored = [data.tokenizer.decode(part) for part in np.split(canaries.tokens, canaries.offsets[1:-1])]
    start = "The locker code of guest #" if text else "What is the locker code of "
    assert all(each.startswith(start) and each.endswith(".<|endoftext|>") for each in scored)
    assert len(set(canaries.scored_lengths)) == 1  # exposure compares texts of one length


def test_canaries_are_never_cut_in_two(tmp_path):
    with pytest.raises(ConfigError, match="data.max_length 20 cuts canaries in two"):
        prepare.prepare(data_config(tmp_path, TEXTS, max_length=20, max_prompt=10), tmp_path / "work")


# --- repeats ---------------------------------------------------------------------------------------------------------


def test_a_share_of_the_groups_is_repeated_and_no_role_changes():
    frame, n = frame_of(40_000, group_size=2), 20_000
    plain = roles.assign(frame, seed=5)
    splits = roles.assign(frame, seed=5, repeated=0.12, times=(4, 16, 64))
    for column in set(roles.SPLIT_COLUMNS) - {"repeats"}:
        assert (splits[column] == plain[column]).all()
    assert (splits.groupby("group").repeats.nunique() == 1).all()
    each = splits.drop_duplicates("group")
    for role in ("private", "heldout", "public"):
        own = each[each.role == role]
        share = own.repeats.value_counts(normalize=True)
        for times in (4, 16, 64):  # four standard errors of a binomial share
            assert share[times] == pytest.approx(0.04, abs=4 * np.sqrt(0.04 * 0.96 / len(own)))
        assert set(share.index) == {1, 4, 16, 64}
    assert len(each) == n
    # Who is repeated follows the group alone, and a larger share repeats those and others.
    fewer = roles.assign(frame.iloc[::2], seed=5, repeated=0.12)
    assert (fewer.repeats.to_numpy() == splits.repeats.iloc[::2].to_numpy()).all()
    more = roles.assign(frame, seed=5, repeated=0.5)
    assert (more.repeats[splits.repeats > 1] > 1).all()
    assert (roles.assign(frame, seed=5, repeated=1.0, times=(3,)).repeats == 3).all()


def test_repeated_records_are_trained_on_so_often_by_teacher_and_swap_alike(tmp_path):
    config = data_config(tmp_path, PAIRS, template="plain", repeated=dict(share=0.5, times=(4, 16)))
    data = prepare.prepare(config, tmp_path / "work")
    splits = data.splits.set_index("example_id")
    for role, coin in (("private", 1), ("heldout", 0)):
        trained = pd.Series(data.of_run((role,)).example_id).value_counts()
        own = splits[(splits.role == role) | ((splits.role == "calib") & (splits.coin == coin))]
        assert set(own.repeats) == {1, 4, 16}
        assert trained.reindex(own.index).equals(own.repeats.astype(trained.dtype).rename(trained.name))
        assert data.of_role(role).example_id.tolist() == sorted(own.index[own.role == role])  # scored once
    assert data.counts["trained on repeatedly (data.repeated)"] == (splits.repeats[splits.role != "canary"] > 1).sum()


@pytest.mark.parametrize("share, times", [(1.5, (4,)), (-0.1, (4,)), (0.1, ()), (0.1, (0, 4))])
def test_bad_repeats(share, times):
    with pytest.raises(DataError, match=r"data\.repeated needs a share in \[0, 1\]"):
        roles.assign(frame_of(3), repeated=share, times=times)


def test_nobody_is_a_calibration_record_and_evaluated():
    """Forty people have records in both files: each is on one side in both, and each file gives its share."""
    rows = frame_of(600, group_size=3).sample(frac=1, random_state=0)  # people g0 to g199
    person = rows["group"].str.removeprefix("g").astype(int)
    number = rows["example_id"].map({i: k for k, i in enumerate(sorted(rows["example_id"]))})
    shared = person < 40
    members = rows[(shared & (number % 2 == 0)) | ((person >= 40) & (person < 180))]
    nonmembers = rows[(shared & (number % 2 == 1)) | (person >= 180)]
    splits = roles.by_file(members, nonmembers, 0.2, seed=3)
    sides = splits.assign(calib=splits["role"] == "calib").groupby("group")["calib"]
    assert (sides.nunique() == 1).all()
    for frame in (members, nonmembers):
        own = splits[splits["example_id"].isin(frame["example_id"])]
        drawn = own[own["role"] == "calib"]["group"].nunique()
        assert 0.2 * own["group"].nunique() - 1 <= drawn <= 0.35 * own["group"].nunique()


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
