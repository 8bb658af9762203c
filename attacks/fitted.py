"""Attacks with something fitted: always on the `calib` role, which is never evaluated.

Each takes the Tokens of the target and of the calibration records whose membership the attacker knows, and returns one
score per example [n], higher for what looks more like a member.  The same model scores both.
"""

import numpy as np
from sklearn.linear_model import LogisticRegression, QuantileRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from attacks.signals import CannotScore, gap, loss, min_k, min_k_plus_plus, segment_mean, zlib_ratio
from attacks.tables import Tokens

FEWEST = 20  # calibration records of a class, below which nothing is fitted


def _difficulty(tokens: Tokens) -> np.ndarray:
    """What says how hard a text is, without its own likelihood [n, 4]; entropies are the model's own."""
    length = np.maximum(tokens.lengths, 1)
    size = np.maximum(tokens.example["n_bytes"], 1)
    entropy = segment_mean(tokens.token["entropy"], tokens)
    return np.stack([entropy, np.log(length), size / length, tokens.example["zlib_bytes"] / size], axis=1)


def _evidence(tokens: Tokens) -> np.ndarray:
    """Signals of membership and of difficulty [n, 9]."""
    signals = [signal(tokens) for signal in (loss, zlib_ratio, min_k, min_k_plus_plus, gap)]
    return np.concatenate([np.stack(signals, axis=1), _difficulty(tokens)], axis=1)


def _usable(tokens: Tokens, what: str) -> Tokens:
    """The calibration records that have tokens. Raises CannotScore where too few, or where one has no number."""
    tokens = tokens.take(tokens.lengths > 0) if (tokens.lengths == 0).any() else tokens
    if len(tokens.ids) < FEWEST:
        raise CannotScore(f"{len(tokens.ids)} calibration {what}: at least {FEWEST} are needed to fit anything")
    broken = int((~np.isfinite(_evidence(tokens)).all(axis=1)).sum())
    if broken:
        raise CannotScore(f"{broken} of {len(tokens.ids)} calibration {what} have a score that is not a number")
    return tokens


def quantile(tokens: Tokens, calib_nonmembers: Tokens, alpha: float = 0.9) -> np.ndarray:
    """`LL - q(text)`, q the alpha-quantile that non-members of this difficulty have, by linear quantile regression.

    Fitted by pinball loss.  Access: distribution, and known non-members (attacks.md 6.4; arXiv:2307.03694).
    """
    known = _usable(calib_nonmembers, "non-members")
    model = make_pipeline(StandardScaler(), QuantileRegressor(quantile=alpha, alpha=0, solver="highs"))
    model.fit(_difficulty(known), loss(known))
    return loss(tokens) - model.predict(np.nan_to_num(_difficulty(tokens)))


def combined(tokens: Tokens, calib_members: Tokens, calib_nonmembers: Tokens) -> np.ndarray:
    """Log-odds of a logistic regression over signals of one pass, trained on calibration records.

    Access: distribution, and known members and non-members (attacks.md 3.10 and statistics.md 8).
    """
    halves = [_usable(calib_members, "members"), _usable(calib_nonmembers, "non-members")]
    seen = np.concatenate([_evidence(half) for half in halves])
    label = np.repeat([1, 0], [len(half.ids) for half in halves])
    regression = LogisticRegression(class_weight="balanced", solver="newton-cholesky")
    model = make_pipeline(StandardScaler(), regression).fit(seen, label)
    return model.decision_function(np.nan_to_num(_evidence(tokens)))
