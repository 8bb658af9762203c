"""Attacks that compare a model with another one on the same text (attacks.md 4 and 8.2).

Each takes the Tokens of the target and of the reference and returns one score per example [n], higher for what looks
more like a member.  `d_t = lp_t - lp_R,t`.  The reference decides what the attacker must have: base models are to be
had with a model card, the null model needs the public training data, any other one makes the attack an auditor's.
"""

from collections.abc import Callable
from functools import wraps

import numpy as np

from attacks.signals import LEAST_LOSS, blocks, loss, lowest_count, sorted_within
from attacks.tables import Tokens

EPSILON = 1e-6  # nats; what a zero sum of shifts counts as
WIDTHS = (2, 3, 4, 6, 9, 13, 18, 25, 32, 40)


def reference_difference(tokens: Tokens, reference: Tokens) -> np.ndarray:
    """`mean_t lp_t - mean_t lp_R,t`: the loss against that of a reference model. Access: logprobs (4.1)."""
    return loss(tokens) - loss(reference)


def reference_ratio(tokens: Tokens, reference: Tokens) -> np.ndarray:
    """`-NLL / NLL_R`; -1 where both agree. Access: logprobs (4.1)."""
    return loss(tokens) / np.maximum(-loss(reference), LEAST_LOSS)


def _shift(tokens: Tokens, reference: Tokens) -> np.ndarray:
    return tokens.token["logp"].astype(np.float64) - reference.token["logp"]


def _errors(tokens: Tokens) -> np.ndarray:
    return tokens.token["top1_id"] != tokens.token["target_id"]


def _gains_and_losses(tokens: Tokens, reference: Tokens, where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    shift, n = _shift(tokens, reference), len(tokens.ids)
    return tuple(
        np.bincount(tokens.owner[s], shift[s] * sign, n)
        for s, sign in ((where & (shift > 0), 1), (where & (shift < 0), -1))
    )


def ez(tokens: Tokens, reference: Tokens) -> np.ndarray:
    """EZ-MIA: `log((P + eps) / (N + eps))`, P and N the gains and losses `d_t` where the target's top-1 is wrong.

    0 where nothing shifted; fewer than two such tokens abstain, which a memorized text does: see `ez_fallback`.
    Access: logprobs and top-1 ids (4.2; arXiv:2601.12104).
    """
    errors = _errors(tokens)
    up, down = _gains_and_losses(tokens, reference, errors)
    few = np.bincount(tokens.owner[errors], minlength=len(tokens.ids)) < 2
    return np.where(few, -np.inf, np.log((up + EPSILON) / (down + EPSILON)))


def ez_fallback(tokens: Tokens, reference: Tokens) -> np.ndarray:
    """The log ratio of `ez` over all tokens: never abstains, for strongly memorized text. Access: logprobs (4.2)."""
    up, down = _gains_and_losses(tokens, reference, np.ones(len(tokens.owner), bool))
    return np.log((up + EPSILON) / (down + EPSILON))


def ez_published(tokens: Tokens, reference: Tokens) -> np.ndarray:
    """`P / N` as published: 0 with fewer than two error tokens, and 0 where nothing lost, the most member-like texts.

    Kept to explain published numbers. Access: logprobs and top-1 ids (4.2; JetBrains-Research/ez-mia).
    """
    errors = _errors(tokens)
    up, down = _gains_and_losses(tokens, reference, errors)
    few = np.bincount(tokens.owner[errors], minlength=len(tokens.ids)) < 2
    return np.where(few | (down == 0), 0.0, up / np.where(down == 0, 1, down))


def wbc(tokens: Tokens, reference: Tokens, w: float = 0) -> np.ndarray:
    """WBC: share of windows in which the target's summed loss is strictly below the reference's, mean over WIDTHS.

    w: one width instead; 1 is the share of improved tokens.  A width is at most the length of the text.
    Access: logprobs (4.3; Stry233/WBC).
    """
    shift = _shift(tokens, reference)
    widths = [int(w)] if w else WIDTHS
    scores = np.zeros(len(tokens.ids))
    for examples, index, inside in blocks(tokens):
        lengths = tokens.lengths[examples]
        sums = np.pad(np.cumsum(np.where(inside, shift[index], 0), axis=1), ((0, 0), (1, 0)))
        whole = np.take_along_axis(sums, lengths[:, None], axis=1)[:, 0] > 0
        for width in widths:
            number = lengths - width + 1
            if width >= index.shape[1]:
                scores[examples] += whole
                continue
            better = (sums[:, width:] > sums[:, :-width]) & inside[:, width - 1 :]
            scores[examples] += np.where(number > 0, better.sum(axis=1) / np.maximum(number, 1), whole)
    return scores / len(widths)


def ht_ours(tokens: Tokens, reference: Tokens, k: float = 0.2) -> np.ndarray:
    """Mean gain in probability over the k hardest tokens of the reference (ties count). Access: logprobs (4.4).

    After arXiv:2601.20885; the exact choice of tokens there was not to be had, hence the name.
    """
    hard = reference.token["logp"]
    ordered = reference.once(("sorted", "logp"), lambda: sorted_within(hard, reference))
    last = reference.offsets[:-1] + np.minimum(lowest_count(reference.lengths, k), reference.lengths) - 1
    bound = ordered[np.maximum(last, 0)] if len(ordered) else np.zeros(len(last))
    chosen = hard <= bound[reference.owner]
    owner = tokens.owner[chosen]
    gain = np.exp(tokens.token["logp"][chosen].astype(np.float64)) - np.exp(hard[chosen].astype(np.float64))
    number = np.bincount(owner, minlength=len(tokens.ids))
    return np.bincount(owner, gain, len(tokens.ids)) / np.maximum(number, 1)


def calibrate(signal: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """`s(target) - s(reference)` for a signal s of one model: what is hard for both says nothing (6.4, 8.2)."""

    @wraps(signal)
    def calibrated(tokens: Tokens, reference: Tokens, **parameters: float) -> np.ndarray:
        return signal(tokens, **parameters) - signal(reference, **parameters)

    calibrated.__doc__ = f"`s(target) - s(reference)`, s = {signal.__name__} (attacks.md 6.4 and 8.2)."
    return calibrated
