"""Signals of how the log-probability runs along a text, after CAMIA (attacks.md 3.10; arXiv:2409.13745).

Those that one pass over the text gives.  Their signs are fixed here, beforehand; the published code chooses each by the
labels that it is then tested on.  All need logprobs alone and use the first n tokens where they take an n.
"""

from collections.abc import Iterator

import numpy as np

from attacks.signals import blocks, first_occurrence, loss, segment_mean
from attacks.tables import Tokens


def _heads(tokens: Tokens, n: float) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Padded blocks of the first n tokens: (examples [b], lp [b, T], inside [b, T], tokens that count [b])."""
    for examples, index, inside in blocks(tokens):
        index, inside = index[:, : int(n)], inside[:, : int(n)]
        yield examples, tokens.token["logp"][index].astype(np.float64), inside, inside.sum(axis=1)


def camia_head(tokens: Tokens, n: float = 200) -> np.ndarray:
    """Mean of `lp_t` over the first n tokens."""
    scores = np.zeros(len(tokens.ids))
    for examples, logp, inside, number in _heads(tokens, n):
        scores[examples] = np.where(inside, logp, 0).sum(axis=1) / number
    return scores


def camia_confident(tokens: Tokens, tau: float = -1.0, n: float = 200) -> np.ndarray:
    """Share of the first n tokens with `lp_t >= tau`."""
    scores = np.zeros(len(tokens.ids))
    for examples, logp, inside, number in _heads(tokens, n):
        scores[examples] = ((logp >= tau) & inside).sum(axis=1) / number
    return scores


def camia_above_mean(tokens: Tokens) -> np.ndarray:
    """Share of tokens above the mean of their text: what is known leaves few tokens that pull the mean down."""
    return segment_mean(tokens.token["logp"] > loss(tokens)[tokens.owner], tokens)


def camia_above_running(tokens: Tokens) -> np.ndarray:
    """Share of tokens, from the second on, above the mean of all before them: what is known gets ever easier."""
    scores = np.zeros(len(tokens.ids))
    for examples, index, inside in blocks(tokens):
        logp = tokens.token["logp"][index].astype(np.float64)
        before = np.cumsum(logp, axis=1)[:, :-1] / np.arange(1, index.shape[1])
        above = (logp[:, 1:] > before) & inside[:, 1:]
        scores[examples] = above.sum(axis=1) / np.maximum(tokens.lengths[examples] - 1, 1)
    return scores


def camia_time(tokens: Tokens, share: float = 0.5, tau: float = -1.0) -> np.ndarray:
    """Minus the part of the text after which `share` of all its tokens were above tau; -1 where that never comes.

    Counted from the beginning (the published code counts from the end).
    """
    scores = np.full(len(tokens.ids), -1.0)
    for examples, index, inside in blocks(tokens):
        lengths = tokens.lengths[examples]
        reached = np.cumsum((tokens.token["logp"][index] >= tau) & inside, axis=1) >= share * lengths[:, None] - 1e-9
        first = np.argmax(reached, axis=1) + 1
        scores[examples] = np.where(reached[:, -1], -first / lengths, -1.0)
    return scores


def camia_diversity(tokens: Tokens) -> np.ndarray:
    """`LL / (distinct ids / T)`: a text that repeats itself is easy without having been seen."""
    distinct = np.bincount(tokens.owner[first_occurrence(tokens)], minlength=len(tokens.ids))
    return loss(tokens) * tokens.lengths / np.maximum(distinct, 1)


def camia_complexity(tokens: Tokens, levels: float = 4, n: float = 200) -> np.ndarray:
    """Minus the Lempel-Ziv complexity (phrases per token) of the first n `lp_t`, binned at -1, -2, -4, ... nats.

    The bins are ours: `levels` of them, cut at the same values for all texts.
    """
    cuts = -(2.0 ** np.arange(int(levels) - 2, -1, -1))
    scores = np.zeros(len(tokens.ids))
    for examples, logp, inside, number in _heads(tokens, n):
        scores[examples] = -_phrases(np.digitize(logp, cuts), inside, int(levels)) / number
    return scores


def _phrases(symbols: np.ndarray, inside: np.ndarray, levels: int) -> np.ndarray:
    """Phrases of the LZ78 parse of every row [b]: all rows step through their own tree of phrases together."""
    b, width = symbols.shape
    child, node = np.zeros((b, width + 1, levels), np.int16), np.zeros(b, np.int64)
    phrases, rows = np.zeros(b, np.int64), np.arange(b)
    for t in range(width):
        symbol = symbols[:, t]
        known = child[rows, node, symbol]
        new = (known == 0) & inside[:, t]
        phrases += new
        child[rows[new], node[new], symbol[new]] = phrases[new]
        node = np.where(new, 0, known)
    return phrases
