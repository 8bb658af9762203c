"""Who is a member: every record's role by seeded hash, and canaries, invented records that carry a known secret."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from kd_jax.data import records
from kd_jax.data.records import DataError, uniform

SHARES = {"private": 0.25, "public": 0.25, "heldout": 0.25, "dev": 0.1, "calib": 0.1, "population": 0.05}
SPLIT_COLUMNS = ("example_id", "group", "role", "task", "placement", "repeats", "coin", "template", "secret_id")
PLACEMENTS = ("teacher_only", "student_only", "both", "none")

_CANARY_TEMPLATE = "locker"
_CANARY_PROMPT = "What is the locker code of {name}?"
# Digits between hyphens are pieces of their own to any GPT-2-like tokenizer, so that all canaries have one length in
# tokens; a digit after a space may or may not have been merged with it.
_CANARY_RESPONSE = "The locker code is #{digits}."
# Of plain texts the whole is scored, so that the names are digits too: 13, so that a prefix of 32 tokens ends before
# the secret.
_CANARY_TEXT = "The locker code of guest #{name} is #{digits}."
# Canaries' names are longer than those of the synthetic corpus, so that they cannot occur in it.
_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z")
_VOWELS = ("a", "e", "i", "o", "u")


def assign(
    frame: pd.DataFrame,
    shares: Mapping[str, float] = SHARES,
    seed: int = 0,
    repeated: float = 0.0,
    times: Sequence[int] = (4, 16, 64),
) -> pd.DataFrame:
    """Gives every record a role by a seeded hash of its group, never by its place in the table.

    Adding records, or reordering them, moves no other record. Records of one group share role and coin. A record that
    was written for a role (its `role` is not "") keeps it.

    Args:
        frame: records, as `records.load` gives them.
        shares: role -> expected share of the groups; the shares sum to 1.
        seed: the split's seed.
        repeated: share of the groups whose records a run that is trained on their role meets `times` times an epoch,
            as many groups for each of `times`. Drawn alike for all roles: in those that no run is trained on it says
            what would have been, which makes them the control.

    Returns:
        A table of SPLIT_COLUMNS in the frame's order. `coin` is 1 for the half of `calib` that is trained on together
        with `private`, and 0 for the half trained on with `heldout`; for other roles it means nothing.
    """
    if unknown := sorted(set(shares) - set(SHARES)):
        raise DataError(f"data.roles names the roles {', '.join(unknown)}; known are {', '.join(SHARES)}")
    if min(shares.values()) < 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise DataError(f"data.roles must be positive and sum to 1, not to {sum(shares.values()):g}")
    if not 0 <= repeated <= 1 or not times or min(times) < 1:
        raise DataError(
            f"data.repeated needs a share in [0, 1] and times of at least 1, not {repeated:g} and {tuple(times)}"
        )
    names = [role for role in SHARES if role in shares]  # a fixed order: that of the caller's dict plays no part
    edges = np.cumsum([shares[role] for role in names])
    position = np.searchsorted(edges, uniform(seed, "role", frame["group"]), side="right")
    # Rounding may leave the last edge under 1; such a draw belongs to the last role that has a share.
    last = max(i for i, role in enumerate(names) if shares[role] > 0)
    drawn = np.array(names, object)[np.minimum(position, last)]
    role = np.where(frame["role"] == "", drawn, frame["role"])
    coin = uniform(seed, "coin", frame["group"]) < 0.5
    repeats = np.ones(len(frame), np.int32)
    if repeated:
        place = (uniform(seed, "repeats", frame["group"]) / repeated * len(times)).astype(int)
        repeats[place < len(times)] = np.array(times)[place[place < len(times)]]
    coin = coin.astype(np.int32)
    return _splits(frame, role=role, coin=coin, repeats=repeats, placement="", template="", secret_id="")


def by_file(members: pd.DataFrame, nonmembers: pd.DataFrame, calib_share: float, seed: int = 0) -> pd.DataFrame:
    """Roles of records whose file says what they are: members `private`, others `heldout`, a share of both `calib`.

    That share (of the groups of each file, by seeded hash; coin 1 of members, 0 of others) is for thresholds and shots.
    A group that is drawn in one file is drawn in the other too: nobody is in `calib` and evaluated as well.

    Returns:
        A table of SPLIT_COLUMNS, the members first, each in its frame's order.

    Raises:
        DataError: records that both files hold.
    """
    both = np.intersect1d(members["example_id"].astype(str), nonmembers["example_id"].astype(str))
    if len(both):
        some = ", ".join(both[:3]) + (", ..." if len(both) > 3 else "")
        raise DataError(
            f"{len(both)} of {len(members)} members have the same content as a non-member (example_id {some}): "
            "take them out of one of the two files"
        )
    for_calib: set[str] = set()
    for frame in (members, nonmembers):
        groups = frame["group"].drop_duplicates().to_numpy(object)
        order = np.argsort(uniform(seed, "calib", groups), kind="stable")
        for_calib |= set(groups[order[: round(calib_share * len(groups))]])
    parts = []
    for frame, role, coin in ((members, "private", 1), (nonmembers, "heldout", 0)):
        drawn = np.where(frame["group"].isin(for_calib), "calib", role)
        parts.append(_splits(frame, role=drawn, coin=coin, repeats=1, placement="", template="", secret_id=""))
    return pd.concat(parts, ignore_index=True)


def check(splits: pd.DataFrame, minimum: Mapping[str, int]) -> None:
    """Raises DataError unless each role in `minimum` holds that many records (at least one).

    Both halves of `calib` must hold half of its minimum.
    """
    counts = splits["role"].value_counts()
    needed = [(role, int(counts.get(role, 0)), max(1, least)) for role, least in minimum.items()]
    if "calib" in minimum:
        halves = splits.loc[splits["role"] == "calib", "coin"].value_counts()
        least = max(1, minimum["calib"] // 2)
        needed += [(f"calib (coin {coin})", int(halves.get(coin, 0)), least) for coin in (0, 1)]
    if short := [f"{role} has {count} of at least {least}" for role, count, least in needed if count < least]:
        raise DataError(f"too few records in a role: {'; '.join(short)}. Give more data, or change data.roles")


def make_canaries(
    n_per_cell: int,
    repeats: Sequence[int] = (1, 4, 16),
    placements: Sequence[str] = PLACEMENTS,
    seed: int = 0,
    text: bool = False,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Invents `n_per_cell` canaries for every (placement, repeats); those of `none` are the reference candidates.

    All come from one generator and one template: an invented name in the prompt, six digits in the response, all
    distinct; with `text`, plain texts that end in the six digits. All are of one length in tokens, where it is scored.
    A fair coin per canary, kept in the splits, says whether it goes into the training data that its placement
    names: what an audit from one training run rests on (arXiv:2305.08846). `none` is never trained on: repeats 0.

    Returns:
        (records, splits rows with role "canary").
    """
    if unknown := sorted(set(placements) - set(PLACEMENTS)):
        raise DataError(f"canary placements {', '.join(unknown)} are unknown; known are {', '.join(PLACEMENTS)}")
    cells = [(placement, count) for placement in placements for count in repeats for _ in range(n_per_cell)]
    rng = np.random.default_rng([seed, 0xCA])
    names = _distinct_digits(len(cells), 13, rng) if text else _distinct_names(len(cells), rng)
    rows = []
    for number, (name, secret) in enumerate(zip(names, _distinct_digits(len(cells), 6, rng), strict=True)):
        if text:
            content = {"instruction": None, "response": _CANARY_TEXT.format(name=name, digits=secret)}
        else:
            prompt = _CANARY_PROMPT.format(name=name)
            content = {"instruction": prompt, "response": _CANARY_RESPONSE.format(digits=secret)}
        rows.append({"group": None, "task": "canary", "input": "", "source": f"canary:{number}"} | content)
    frame = records.make_frame(rows)
    number = frame["source"].str.removeprefix("canary:").astype(int)
    placement = np.array([cells[i][0] for i in number], object)
    count = np.array([cells[i][1] for i in number], np.int32)
    splits = _splits(
        frame,
        role="canary",
        coin=(uniform(seed, "canary", frame["example_id"]) < 0.5).astype(np.int32),
        repeats=np.where(placement == "none", 0, count),
        placement=placement,
        template=_CANARY_TEMPLATE + "_text" * text,
        secret_id=[f"s{i:05d}" for i in number],
    )
    return frame, splits


def training_ids(splits: pd.DataFrame, train_roles: Iterable[str]) -> pd.DataFrame:
    """What a run on `train_roles` is trained on: a table of example_id and repeats, ordered by id.

    Besides the roles' own records these are the half of `calib` that goes with `private` (coin 1) or with `heldout`
    (coin 0), and the canaries with coin 1 placed with the teacher (runs on `private`) or the student (on `public`).
    """
    roles = set(train_roles)
    if unknown := sorted(roles - {"private", "public", "heldout"}):
        raise DataError(f"train_roles names {', '.join(unknown)}; a run trains on private, public or heldout")
    role, coin, placement = splits["role"], splits["coin"], splits["placement"]
    calib_coins = [coin for name, coin in (("private", 1), ("heldout", 0)) if name in roles]
    arms = {"private": ("teacher_only", "both"), "public": ("student_only", "both")}
    placed = [arm for name in arms if name in roles for arm in arms[name]]
    chosen = (
        role.isin(roles)
        | ((role == "calib") & coin.isin(calib_coins))
        | ((role == "canary") & (coin == 1) & placement.isin(placed))
    )
    return splits.loc[chosen, ["example_id", "repeats"]].sort_values("example_id").reset_index(drop=True)


def _splits(frame: pd.DataFrame, **columns) -> pd.DataFrame:
    table = frame[["example_id", "group", "task"]].assign(**columns)[list(SPLIT_COLUMNS)]
    return table.astype({"repeats": np.int32, "coin": np.int32})


def _distinct_digits(count: int, size: int, rng: np.random.Generator) -> list[str]:
    """Numbers of so many digits, with hyphens between them: "0-3-1-7"."""
    return ["-".join(f"{number:0{size}d}") for number in rng.choice(10**size, size=count, replace=False)]


def _distinct_names(count: int, rng: np.random.Generator) -> list[str]:
    """Invented names "Xaxaxaxa Yayayaya": four syllables each, all of the same length."""
    syllables = np.array([onset + vowel for onset in _ONSETS for vowel in _VOWELS])
    names: dict[str, None] = {}
    while len(names) < count:
        first, second = ("".join(part).capitalize() for part in rng.choice(syllables, (2, 4)))
        names[f"{first} {second}"] = None
    return list(names)
