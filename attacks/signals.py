"""Attacks that need nothing but one model's pass over the text, and the arithmetic on ragged tokens under all attacks.

Every function takes the Tokens of a role (n examples, flat columns of all their scored tokens) and returns one score
per example [n], higher for what looks more like a member; -inf abstains.  `lp_t` is the log-probability of token t.
"""

from collections.abc import Callable, Iterator

import numpy as np

from attacks.tables import Tokens

VARIANCE_FLOOR = 1e-6  # of log-probabilities under the model; below, a z-score is rounding error
LEAST_LOSS = 1e-12  # of a text that the model knows by heart; keeps ratios of losses finite
CELLS = 1 << 21  # of one padded block


class CannotScore(ValueError):
    """An attack cannot be run on these tables; the message says why, and ends up in summary.json."""


# --- arithmetic on ragged tokens -------------------------------------------------------------------------------------


def segment_sum(values: np.ndarray, tokens: Tokens) -> np.ndarray:
    """Sum of per-token values per example [n], in float64; 0 for an example without tokens."""
    return np.bincount(tokens.owner, values, len(tokens.ids))


def segment_mean(values: np.ndarray, tokens: Tokens) -> np.ndarray:
    """Mean of per-token values per example [n]; 0 for an example without tokens."""
    return segment_sum(values, tokens) / np.maximum(tokens.lengths, 1)


def blocks(tokens: Tokens, cells: int = CELLS) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Padded views of the tokens, examples of like length together: (examples [b], flat index [b, T], inside [b, T]).

    Examples without tokens are in none.  Where `inside` is False the index is any valid one.
    """
    order = np.argsort(-tokens.lengths, kind="stable")
    order = order[tokens.lengths[order] > 0]
    while len(order):
        width = tokens.lengths[order[0]]
        examples, order = np.split(order, [max(1, cells // width)])
        index = tokens.offsets[examples][:, None] + np.arange(width)
        inside = np.arange(width) < tokens.lengths[examples][:, None]
        yield examples, np.minimum(index, tokens.offsets[-1] - 1), inside


def sorted_within(values: np.ndarray, tokens: Tokens) -> np.ndarray:
    """The flat values, ascending within every example."""
    out = np.empty_like(values)
    for _, index, inside in blocks(tokens):
        block = np.where(inside, values[index], np.inf)
        block.sort(axis=1)
        out[index[inside]] = block[inside]
    return out


def lowest_count(lengths: np.ndarray, k: float) -> np.ndarray:
    """`max(1, floor(k T))`, forgiving of rounding (0.29 * 100)."""
    return np.maximum(1, np.floor(k * lengths + 1e-9)).astype(np.int64)


def lowest_mean(tokens: Tokens, name: str, make: Callable[[], np.ndarray], k: float) -> np.ndarray:
    """Mean of the lowest `max(1, floor(k T))` of the T values of each example [n]; they are sorted once per `name`."""
    ordered = tokens.once(("sorted", name), lambda: sorted_within(make(), tokens))
    count = np.minimum(lowest_count(tokens.lengths, k), tokens.lengths)
    starts = tokens.offsets[:-1]
    padded = np.append(ordered, ordered.dtype.type(0))  # so that the end of the last example is an index
    sums = np.add.reduceat(padded, np.stack([starts, starts + count], axis=1).ravel(), dtype=np.float64)[::2]
    return sums / np.maximum(count, 1)


def spread(tokens: Tokens) -> np.ndarray:
    """`sigma_t` clamped at the root of VARIANCE_FLOOR, flat."""
    return np.sqrt(np.maximum(tokens.token["logp_std"].astype(np.float64) ** 2, VARIANCE_FLOOR))


def first_occurrence(tokens: Tokens) -> np.ndarray:
    """Is this the first place in its example where this token id stands?  Flat mask."""
    return tokens.once("first occurrence", lambda: _first_occurrence(tokens))


def _first_occurrence(tokens: Tokens) -> np.ndarray:
    found = np.zeros(len(tokens.owner), bool)
    ids = tokens.token["target_id"].astype(np.int64)
    for examples, index, inside in blocks(tokens):
        width = index.shape[1]
        keys = np.where(inside, ids[index] * width + np.arange(width), np.iinfo(np.int64).max)
        keys.sort(axis=1)
        first = np.ones(keys.shape, bool)
        first[:, 1:] = keys[:, 1:] // width != keys[:, :-1] // width
        row, column = np.nonzero(first & (keys < np.iinfo(np.int64).max))
        found[tokens.offsets[examples[row]] + keys[row, column] % width] = True
    return found


# --- attacks ---------------------------------------------------------------------------------------------------------


def loss(tokens: Tokens) -> np.ndarray:
    """`mean_t lp_t`: minus the loss. Access: logprobs (attacks.md 3.1; Yeom et al. 2018)."""
    return tokens.once("loss", lambda: segment_mean(tokens.token["logp"], tokens))


def perplexity(tokens: Tokens) -> np.ndarray:
    """`-exp(-mean_t lp_t)`: minus the perplexity, which ranks exactly as the loss. Access: logprobs (3.2)."""
    return -np.exp(-loss(tokens))


def total(tokens: Tokens) -> np.ndarray:
    """`sum_t lp_t`: log-probability of the text; unlike the mean it mixes in the length. Access: logprobs (3.2)."""
    return segment_sum(tokens.token["logp"], tokens)


def zlib_ratio(tokens: Tokens) -> np.ndarray:
    """`mean_t lp_t / zlib_bytes`: the loss against how well zlib compresses the scored text. Access: logprobs (3.3)."""
    return loss(tokens) / tokens.example["zlib_bytes"]


def min_k(tokens: Tokens, k: float = 0.2) -> np.ndarray:
    """Min-K%: mean of the lowest k of `lp_t`. Access: logprobs (3.5; Shi et al. 2024)."""
    return lowest_mean(tokens, "logp", lambda: tokens.token["logp"], k)


def min_k_plus_plus(tokens: Tokens, k: float = 0.2) -> np.ndarray:
    """Min-K%++: mean of the lowest k of `z_t = (lp_t + H_t) / sigma_t`. Access: distribution (3.6; arXiv:2404.02936).

    Entropy H_t and sigma_t, the spread of log p under p itself, are those of the model's next-token distribution.
    """
    return lowest_mean(
        tokens, "z", lambda: (tokens.token["logp"] + tokens.token["entropy"].astype(np.float64)) / spread(tokens), k
    )


def gap_k(tokens: Tokens, k: float = 0.2, w: float = 3) -> np.ndarray:
    """Gap-K%: mean of the lowest k of the means of `(lp_t - max_v log p) / sigma_t` over windows of w (<= T) tokens.

    Access: distribution (3.7; arXiv:2601.19936). k and w are ours: the paper's were not to be had.
    """
    gaps = (tokens.token["logp"].astype(np.float64) - tokens.token["top1_logp"]) / spread(tokens)
    finite = np.nan_to_num(gaps)  # an example with a NaN is reported as one by `score`
    scores = np.zeros(len(tokens.ids))
    for examples, index, inside in blocks(tokens):
        lengths = tokens.lengths[examples]
        width = np.minimum(int(w), lengths)[:, None]
        sums = np.pad(np.cumsum(np.where(inside, finite[index], 0), axis=1), ((0, 0), (1, 0)))
        ends = np.minimum(np.arange(index.shape[1]) + width, lengths[:, None])
        windows = (np.take_along_axis(sums, ends, axis=1) - sums[:, :-1]) / width
        number = lengths - width[:, 0] + 1
        windows = np.sort(np.where(np.arange(index.shape[1]) < number[:, None], windows, np.inf), axis=1)
        count = lowest_count(number, k)
        lowest = np.arange(index.shape[1]) < count[:, None]
        scores[examples] = np.where(lowest, windows, 0).sum(axis=1) / count
    return scores


def surp(tokens: Tokens, k: float = 0.4, e: float = 2.0) -> np.ndarray:
    """SURP: mean of `lp_t` over tokens among the lowest k of their text at which the entropy is below e nats.

    A text without such a token abstains; tokens that tie with the last of the lowest count as well.
    Access: distribution (3.8).
    """
    logp = tokens.token["logp"]
    ordered = tokens.once(("sorted", "logp"), lambda: sorted_within(logp, tokens))
    last = tokens.offsets[:-1] + np.minimum(lowest_count(tokens.lengths, k), tokens.lengths) - 1
    highest = ordered[np.clip(last, 0, max(len(ordered) - 1, 0))] if len(ordered) else np.zeros(len(last))
    chosen = (logp <= highest[tokens.owner]) & (tokens.token["entropy"] < e)
    number = np.bincount(tokens.owner[chosen], minlength=len(tokens.ids))
    sums = np.bincount(tokens.owner[chosen], logp[chosen], len(tokens.ids))
    return np.where(number > 0, sums / np.maximum(number, 1), -np.inf)


def dc_pdd(tokens: Tokens, counts: np.ndarray, a: float = 0.01) -> np.ndarray:
    """DC-PDD: mean over first occurrences of `min(a, p_t log(1 / f_t))`, f the smoothed frequency of the token.

    counts [V]: of every id in the public role.  Access: logprobs+public-data (3.9; Zhang et al. 2024).
    """
    first = first_occurrence(tokens)
    terms = dc_pdd_terms(tokens, counts)
    owner = tokens.owner[first]
    number = np.bincount(owner, minlength=len(tokens.ids))
    return np.bincount(owner, np.minimum(terms, a), len(tokens.ids)) / np.maximum(number, 1)


def dc_pdd_terms(tokens: Tokens, counts: np.ndarray) -> np.ndarray:
    """`p_t log(1 / f_t)` of the first occurrences, before they are capped."""
    first = first_occurrence(tokens)
    if len(targets := tokens.token["target_id"]) and targets.max() >= len(counts):
        raise CannotScore(f"text/token_counts.npz counts {len(counts)} ids, the tables have id {targets.max()}")
    rarity = -np.log((counts + 1) / (counts.sum() + len(counts)))
    return np.exp(tokens.token["logp"][first].astype(np.float64)) * rarity[tokens.token["target_id"][first]]


def gap(tokens: Tokens) -> np.ndarray:
    """Share of tokens that greedy decoding gets right: the gap attack, token by token. Access: logprobs (Yeom 2018)."""
    return segment_mean(tokens.token["top1_id"] == tokens.token["target_id"], tokens)


def clamped(tokens: Tokens) -> int:
    """Response tokens whose spread Min-K%++ had to clamp (a nearly certain or nearly uniform prediction)."""
    return int(np.sum(tokens.token["logp_std"].astype(np.float64) ** 2 < VARIANCE_FLOOR))
