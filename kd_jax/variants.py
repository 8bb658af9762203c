"""Scoring variants: the same records under a prefix, lower-cased, with swapped tokens.  Each is one more score table.

recall          the response after a prefix of calibration records that the run was not trained on (ReCaLL)
recall_members  the same with calibration records that it was trained on (Con-ReCaLL)
lowercase       the response in lower case, tokenised again
neighbours      COPIES copies of each record with SWAPPED of the response's tokens replaced by ids of like frequency;
                ids `<example>~<copy>`
Everything depends on ids, seed and the whole study alone, never on a role: what differed between roles would be taken
for membership.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable

import numpy as np

from kd_jax import prepare
from kd_jax.data import encode
from kd_jax.data.encode import PROMPT, RESPONSE, SPECIAL, Encoded, ragged
from kd_jax.data.records import uniform
from kd_jax.errors import ConfigError

NAMES = ("recall", "recall_members", "lowercase", "neighbours")
SHOTS = 12  # as published, at most: fewer where the context is short
COPIES = 10
SWAPPED = 0.1  # of the response's tokens, one at least
NEAREST = 16  # ranks by frequency that a token may move up or down


def build(
    name: str, data: prepare.Data, role_encoded: Encoded, *, seed: int, max_positions: int, swapped: bool = False
) -> tuple[Encoded, dict[str, object]]:
    """The examples of one role in the form of variant `name`, and facts about how they were made.

    seed: of the choice of shots and of swaps.  max_positions: longest sequence that the model takes.
    swapped: the run (or its teacher) was trained on `heldout`, so that the halves of `calib` change sides.
    Raises ConfigError on an unknown name, and where not one shot fits before the longest example.
    """
    check([name])
    if name in ("recall", "recall_members"):
        coin = int(name == "recall_members") ^ int(swapped)
        return _prefixed(data, role_encoded, coin, seed, max_positions)
    if name == "lowercase":
        return _lowercase(data, role_encoded, max_positions)
    return _neighbours(data, role_encoded, seed)


def check(names: Iterable[str]) -> None:
    """Raises ConfigError on an unknown name."""
    if unknown := sorted(set(names) - set(NAMES)):
        raise ConfigError(f"score.variants names '{unknown[0]}'; known are {', '.join(NAMES)}")


def fits(name: str, data: prepare.Data, *, seed: int, max_positions: int) -> bool:
    """Can a model of this context read the variant?  A prefix needs a calibration record, and room for one."""
    if name not in ("recall", "recall_members"):
        return True
    try:
        _prefix(data, int(name == "recall_members"), seed, max_positions)
    except ConfigError:
        return False
    return True


# --- a prefix of other records ---------------------------------------------------------------------------------------


def _prefixed(
    data: prepare.Data, encoded: Encoded, coin: int, seed: int, max_positions: int
) -> tuple[Encoded, dict[str, object]]:
    """Every example after the same shots; the shots themselves are left out of the examples."""
    prefix, used, facts = _prefix(data, coin, seed, max_positions)
    rest = encoded.take(np.flatnonzero(~np.isin(encoded.record_id, used)))
    return _insert(rest, prefix), facts | {"left_out": len(encoded) - len(rest)}


def _prefix(
    data: prepare.Data, coin: int, seed: int, max_positions: int
) -> tuple[np.ndarray, np.ndarray, dict[str, object]]:
    """Prompt, response and EOS of each shot, no second BOS: tokens, the shots' ids, and facts.

    Shots that do not fit before the longest record are dropped from the front.
    """
    shots = _shots(data, coin, seed)
    whole = int(data.encoded.lengths.max())  # of all roles, so that all roles get the same shots
    inner = [_ids(shots, i)[_segments(shots, i) != SPECIAL] for i in range(len(shots))]
    sizes = np.cumsum([len(each) for each in inner[::-1]])[::-1]  # of shots i to the last
    fit = np.flatnonzero(sizes + whole <= max_positions)
    if not len(fit):
        raise ConfigError(
            f"recall: not one of {len(shots)} shots fits before the longest record ({whole} tokens) in a context of "
            f"{max_positions}; shorten data.max_length or leave the variant out of score.variants"
        )
    first = int(fit[0])
    prefix, used = np.concatenate(inner[first:]), shots.record_id[first:]
    facts = {
        "shots": len(used), "shots_dropped": first, "prefix_tokens": len(prefix), "longest_example": whole,
        "shot_ids": used.tolist(),
    }  # fmt: skip
    return prefix, used, facts


def _shots(data: prepare.Data, coin: int, seed: int) -> Encoded:
    calib = data.splits[(data.splits.role == "calib") & (data.splits.coin == coin)]
    ids = calib.example_id.to_numpy(object)[np.argsort(uniform(seed, "shots", calib.example_id), kind="stable")]
    shots = data.encoded.select(ids)
    shots = shots.take(np.unique(shots.record_id, return_index=True)[1])  # one window of a long text
    order = np.argsort(uniform(seed, "shots", shots.record_id), kind="stable")[:SHOTS]
    if not len(order):
        raise ConfigError("recall takes its shots from the role calib, which has no record: see data.roles")
    return shots.take(order)


def _ids(encoded: Encoded, i: int) -> np.ndarray:
    return encoded.tokens[encoded.offsets[i] : encoded.offsets[i + 1]]


def _segments(encoded: Encoded, i: int) -> np.ndarray:
    return encoded.segment[encoded.offsets[i] : encoded.offsets[i + 1]]


def _insert(encoded: Encoded, prefix: np.ndarray) -> Encoded:
    """`prefix` after the BOS (or at the beginning) of every example, as part of the prompt."""
    begins = encoded.segment[encoded.offsets[:-1]] == SPECIAL
    pool = np.concatenate([encoded.tokens, prefix]).astype(np.int32)
    kinds = np.concatenate([encoded.segment, np.full(len(prefix), PROMPT, np.int8)])
    starts = np.stack([encoded.offsets[:-1], np.full(len(encoded), len(encoded.tokens)), encoded.offsets[:-1] + begins])
    lengths = np.stack([begins, np.full(len(encoded), len(prefix)), encoded.lengths - begins])
    flat = ragged(starts.T.ravel(), lengths.T.ravel().astype(np.int64))
    offsets = np.concatenate([[0], np.cumsum(encoded.lengths + len(prefix))])
    return dataclasses.replace(encoded, tokens=pool[flat], segment=kinds[flat], offsets=offsets)


# --- changed responses -----------------------------------------------------------------------------------------------


def _lowercase(data: prepare.Data, encoded: Encoded, max_positions: int) -> tuple[Encoded, dict[str, object]]:
    """The response as it was kept, decoded, lower-cased and tokenised again; prompt, BOS and EOS as they were."""
    response = encoded.segment == RESPONSE
    number = np.add.reduceat(response, encoded.offsets[:-1], dtype=np.int64)
    texts = data.tokenizer.decode_batch(np.split(encoded.tokens[response], np.cumsum(number)[:-1]))
    lowered = [text.lower() for text in texts]
    same = np.array([a == b for a, b in zip(texts, lowered, strict=True)])
    ids = data.tokenizer.encode_batch(lowered, continuing=True)
    length = np.array([len(each) for each in ids])
    # An unchanged text keeps its own tokens, which decoding and tokenising need not give back.
    room = max_positions - (encoded.lengths - number)
    kept = np.where(same, number, np.minimum(length, room))
    before = np.add.reduceat(np.isin(encoded.segment, (PROMPT, SPECIAL)), encoded.offsets[:-1], dtype=np.int64)
    starts = encoded.offsets[:-1]
    end = starts + before + number
    middle = np.where(same, starts + before, len(encoded.tokens) + np.cumsum(length) - length)
    flat = ragged(
        np.stack([starts, middle, end], axis=1).ravel(),
        np.stack([before, kept, encoded.offsets[1:] - end], axis=1).ravel(),
    )
    new = np.fromiter(itertools.chain.from_iterable(ids), np.int32, int(length.sum()))
    pool = np.concatenate([encoded.tokens, new])
    kinds = np.concatenate([encoded.segment, np.full(len(new), RESPONSE, np.int8)])
    n_bytes, zlib_bytes = encode.measure(lowered)
    changed = dataclasses.replace(
        encoded, tokens=pool[flat], segment=kinds[flat], n_bytes=n_bytes, zlib_bytes=zlib_bytes,
        offsets=np.concatenate([[0], np.cumsum(encoded.lengths - number + kept)]),
    )  # fmt: skip
    return changed, {"unchanged": int(same.sum()), "examples": len(encoded), "cut": int((length > kept)[~same].sum())}


def _neighbours(data: prepare.Data, encoded: Encoded, seed: int) -> tuple[Encoded, dict[str, object]]:
    """Copies of every example with some response tokens swapped: the generator `frequency-matched swaps`.

    A token becomes one that stands up to NEAREST ranks away in the order of counts of the public role.
    """
    public = data.of_role("public")
    if not len(public):
        raise ConfigError("neighbours needs the token frequencies of the role public, which has no record")
    counts = encode.token_counts(public, data.tokenizer.vocab_size)
    by_rank = np.argsort(counts, kind="stable")
    rank = np.empty_like(by_rank)
    rank[by_rank] = np.arange(len(by_rank))
    rows = np.repeat(np.arange(len(encoded)), COPIES)
    names = np.array([f"{encoded.example_id[r]}~{c % COPIES}" for c, r in enumerate(rows)], object)
    copies = dataclasses.replace(encoded.take(rows), example_id=names)
    keys = (uniform(seed, "neighbours", names) * 2.0**53).astype(np.uint64)
    place = ragged(np.zeros(len(copies), np.int64), copies.lengths).astype(np.uint64)
    draws = [_hashed(np.repeat(keys, copies.lengths), place * np.uint64(2) + np.uint64(k)) for k in (0, 1)]
    draw = np.where(copies.segment == RESPONSE, draws[0], 2.0)
    least = np.repeat(np.minimum.reduceat(draw, copies.offsets[:-1]), copies.lengths)
    chosen = (draw < SWAPPED) | ((draw == least) & (draw < 1))
    step = 1 + (draws[1][chosen] * 2 * NEAREST).astype(np.int64)
    step = np.where(step > NEAREST, NEAREST - step, step)  # 1 to NEAREST, up or down
    old = rank[copies.tokens[chosen]]
    new = np.where((old + step < 0) | (old + step >= len(rank)), old - step, old + step)
    tokens = copies.tokens.copy()
    tokens[chosen] = by_rank[np.clip(new, 0, len(rank) - 1)]
    facts = {
        "generator": "frequency-matched swaps", "copies": COPIES,
        "swapped_tokens": int(chosen.sum()), "response_tokens": int((copies.segment == RESPONSE).sum()),
    }  # fmt: skip
    return dataclasses.replace(copies, tokens=tokens), facts


def _hashed(keys: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each (key, counter), by splitmix64: the same whatever else is in the table."""
    with np.errstate(over="ignore"):
        z = keys + (counters + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2.0**53
