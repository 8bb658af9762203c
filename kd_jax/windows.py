"""Overlapping windows of long plain texts: from how many places of a text can a model be made to continue it?

A scoring variant (arXiv:2505.12546): every `stride` tokens of a text a window of `prefix` tokens, which are context,
and `suffix` tokens, which are scored; ids `<record>@<first token of the window>`. The last window ends with the text.
A text is tokenised once, as for training; it is cut between tokens, whatever windows it was trained in.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from kd_jax import prepare
from kd_jax.data import encode
from kd_jax.data.encode import PROMPT, RESPONSE, SPECIAL, Encoded, ragged
from kd_jax.data.records import uniform
from kd_jax.errors import ConfigError

ROLES = ("private", "heldout")
SIZE = (50, 50)  # prefix and suffix, where no cut is named
SHORTEST = 20  # tokens of a window


@dataclasses.dataclass(frozen=True)
class Windows:
    """Tokens that are given and scored, tokens from one window to the next, and how many texts of each role."""

    prefix: int
    suffix: int
    stride: int
    texts: int
    seed: int

    @property
    def size(self) -> int:
        return self.prefix + self.suffix


def windows(settings: ConfigDict, data: prepare.Data, max_length: int, seed: int) -> Windows | None:
    """`config.memorization` as it applies to these texts; None where it asks for none.

    A window is as long as the longest cut, or less, in proportion: it fits into `max_length` tokens, and both roles
    have `coverage_texts` texts that hold one (or all that they have).
    Raises ConfigError for instruction records, for texts of less than SHORTEST tokens, and on senseless numbers.
    """
    if settings.coverage_texts < 0 or settings.stride < 1:
        raise ConfigError("memorization.coverage_texts must not be negative, memorization.stride must be positive")
    if not settings.coverage_texts:
        return None
    prefix, suffix = max(settings.cuts, key=sum, default=SIZE)
    room = max_length - (_first(data.encoded) is not None)
    for role in ROLES:
        lengths = np.sort(_Texts(data.of_role(role)).lengths)[::-1]
        if not len(lengths):
            raise ConfigError(f"memorization.coverage_texts needs plain texts, and the role {role} has none")
        room = min(room, int(lengths[: settings.coverage_texts][-1]))
    if room < SHORTEST:
        raise ConfigError(
            f"memorization.coverage_texts {settings.coverage_texts}: windows of {room} tokens are all that texts and "
            f"data.max_length leave room for, of at least {SHORTEST}; ask for fewer texts"
        )
    if room < prefix + suffix:
        prefix, suffix = prefix * room // (prefix + suffix), -(-suffix * room // (prefix + suffix))
    return Windows(int(prefix), int(suffix), int(settings.stride), int(settings.coverage_texts), seed)


def build(data: prepare.Data, encoded: Encoded, spec: Windows) -> tuple[Encoded, dict[str, int]]:
    """Windows of one role's examples `encoded`, text by text in order of their ids' hashes; and how many there are."""
    texts = _Texts(encoded)
    long = np.flatnonzero(texts.lengths >= spec.size)
    chosen = long[np.argsort(uniform(spec.seed, "coverage", texts.ids[long]), kind="stable")][: spec.texts]
    last = texts.lengths[chosen] - spec.size  # the place where the last window begins
    counts = last // spec.stride + 1 + (last % spec.stride > 0)
    text = np.repeat(chosen, counts)
    begin = np.minimum(ragged(np.zeros_like(counts), counts) * spec.stride, np.repeat(last, counts))
    tokens = texts.tokens[ragged(texts.starts[text] + begin, np.full(len(text), spec.size))].reshape(-1, spec.size)
    kinds = np.repeat(np.array([PROMPT, RESPONSE], np.int8), [spec.prefix, spec.suffix])
    suffixes = data.tokenizer.decode_batch(list(tokens[:, spec.prefix :]))
    first = _first(encoded)
    if first is not None:
        tokens = np.concatenate([np.full((len(text), 1), first, np.int32), tokens], axis=1)
        kinds = np.concatenate([[SPECIAL], kinds]).astype(np.int8)
    made = Encoded(
        np.array([f"{texts.ids[t]}@{b}" for t, b in zip(text, begin)], object),
        texts.ids[text],
        texts.task[text],
        tokens.ravel(),
        np.arange(len(text) + 1) * tokens.shape[1],
        np.tile(kinds, len(text)),
        *encode.measure(suffixes),
        encoded.counts,
    )
    return made, {"texts": len(chosen), "windows": len(text), "text_tokens": int(texts.lengths[chosen].sum())}


class _Texts:
    """The plain texts among examples, each put together again from the windows that it was cut into.

    ids, task, starts, lengths: of every text [m]; tokens: of all, one after the other.
    """

    def __init__(self, encoded: Encoded):
        encoded = encoded.take(np.flatnonzero(["#" in name for name in encoded.example_id]))
        response = encoded.segment == RESPONSE
        first = np.flatnonzero(np.append(True, encoded.record_id[1:] != encoded.record_id[:-1])[: len(encoded)])
        self.ids, self.task = encoded.record_id[first], encoded.task[first]
        self.tokens = encoded.tokens[response]
        before = np.concatenate([[0], np.cumsum(response)])[encoded.offsets]
        self.starts = before[:-1][first]
        self.lengths = np.diff(np.append(self.starts, before[-1]))


def _first(encoded: Encoded) -> int | None:
    """The token that every example begins with, if there is one."""
    return int(encoded.tokens[0]) if encoded.segment[0] == SPECIAL else None
