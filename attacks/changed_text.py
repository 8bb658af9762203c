"""Attacks that compare a text with a changed form of it, scored by the same model: a *scoring variant*, one more table.

Higher looks more like a member.  Which changes there are, and how they are made: kd_jax/variants.py.
"""

import numpy as np

from attacks.signals import LEAST_LOSS, loss
from attacks.tables import Tokens


def _losses(tokens: Tokens) -> np.ndarray:
    return np.maximum(-loss(tokens), LEAST_LOSS)


def recall(tokens: Tokens, recall: Tokens) -> np.ndarray:
    """ReCaLL: `LL(x | P) / LL(x)`, P a prefix of known non-members; 1 with an empty prefix.

    Access: logprobs, and some known non-members for the prefix (attacks.md 5.1; Xie et al. 2024).
    """
    return _losses(recall) / _losses(tokens)


def con_recall(tokens: Tokens, recall: Tokens, recall_members: Tokens, gamma: float = 0.5) -> np.ndarray:
    """Con-ReCaLL: `(LL(x | P_non) - gamma LL(x | P_mem)) / LL(x)`; ReCaLL where gamma is 0.

    Access: logprobs, and some known members and non-members for the prefixes (5.2; Wang et al. 2024).
    """
    return (_losses(recall) - gamma * _losses(recall_members)) / _losses(tokens)


def lowercase(tokens: Tokens, lowercase: Tokens) -> np.ndarray:
    """`NLL(lower(x)) / NLL(x)`, each in its own tokens; 1 for a text without capitals. Access: logprobs (3.4)."""
    return _losses(lowercase) / _losses(tokens)


def neighbourhood(tokens: Tokens, neighbours: Tokens) -> np.ndarray:
    """`LL(x) - mean_j LL(x_j)` over copies x_j with some tokens swapped for others of like frequency.

    A copy's id is that of the text, a tilde, and its number.  A text without copies is an error of the tables (NaN).
    Access: logprobs (4.5; arXiv:2305.18462, where a masked model makes the copies).
    """
    parents = np.char.rpartition(neighbours.ids, "~")[:, 0]
    rows = np.minimum(np.searchsorted(tokens.ids, parents), len(tokens.ids) - 1)
    own = tokens.ids[rows] == parents
    number = np.bincount(rows[own], minlength=len(tokens.ids))
    sums = np.bincount(rows[own], loss(neighbours)[own], len(tokens.ids))
    return loss(tokens) - np.where(number > 0, sums / np.maximum(number, 1), np.nan)
