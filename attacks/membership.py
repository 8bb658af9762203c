"""Membership attacks: arithmetic on score tables.  Every score is higher for records that look more like members.

An attack is one function of `Tokens` (a reference attack: of the target's and the reference's) and one row of ATTACKS.
Its id is its name, a reference run after a colon, other than default parameters after an at sign: `loss`,
`reference:base_student`, `min_k@k=0.3`, `loss@eos=1` (the end-of-text token is scored too).

A score of -inf is an abstention: the attack has nothing to go by, a response without tokens for instance.  A NaN is an
error in the tables.  Neither is ever dropped.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from attacks.tables import SEGMENTS, Tokens

VARIANCE_FLOOR = 1e-6  # of log-probabilities under the model; below, a z-score is rounding error


class MissingField(ValueError):
    """The score table lacks a column that this attack needs."""


class DifferentTokens(ValueError):
    """Target and reference were not scored on the same tokens, so that they cannot be subtracted."""


# --- helpers on flat arrays ------------------------------------------------------------------------------------------


def segment_mean(values: np.ndarray, tokens: Tokens) -> np.ndarray:
    """Mean of per-token values per example [n]; 0 for an example without tokens."""
    return np.bincount(tokens.owner, values, len(tokens.ids)) / np.maximum(tokens.lengths, 1)


def lowest_mean(values: np.ndarray, tokens: Tokens, k: float) -> np.ndarray:
    """Mean of the lowest `max(1, floor(k T))` of the T values of each example [n]."""
    count = np.maximum(1, np.floor(k * tokens.lengths + 1e-9)).astype(np.int64)
    owner = tokens.owner  # sorting within examples leaves it as it is
    ordered = values[np.lexsort((values, owner))]
    lowest = np.arange(len(values)) - tokens.offsets[:-1][owner] < count[owner]
    return np.bincount(owner[lowest], ordered[lowest], len(tokens.ids)) / count


# --- attacks ---------------------------------------------------------------------------------------------------------


def loss(tokens: Tokens) -> np.ndarray:
    """`mean_t lp_t`: minus the loss (attacks.md 3.1)."""
    return segment_mean(tokens.token["logp"], tokens)


def zlib_ratio(tokens: Tokens) -> np.ndarray:
    """`mean_t lp_t / zlib_bytes`: the loss against how well zlib compresses the scored text (attacks.md 3.3)."""
    return loss(tokens) / tokens.example["zlib_bytes"]


def min_k(tokens: Tokens, k: float = 0.2) -> np.ndarray:
    """Min-K%: mean of the lowest k of `lp_t` (attacks.md 3.5; Shi et al. 2024)."""
    return lowest_mean(tokens.token["logp"], tokens, k)


def min_k_plus_plus(tokens: Tokens, k: float = 0.2) -> np.ndarray:
    """Min-K%++: mean of the lowest k of `z_t = (lp_t + H_t) / sigma_t` (attacks.md 3.6; arXiv:2404.02936).

    Entropy H_t and sigma_t, the spread of log p under p itself, are those of the model's next-token distribution.
    """
    sigma = np.sqrt(np.maximum(tokens.token["logp_std"].astype(np.float64) ** 2, VARIANCE_FLOOR))
    return lowest_mean((tokens.token["logp"] + tokens.token["entropy"]) / sigma, tokens, k)


def reference_difference(tokens: Tokens, reference: Tokens) -> np.ndarray:
    """`mean_t lp_t - mean_t lp_R,t`: the loss against that of a reference model (attacks.md 4.1)."""
    return loss(tokens) - loss(reference)


@dataclass(frozen=True)
class Attack:
    """One row of ATTACKS.

    function: scores [n] of Tokens; its keyword arguments are the attack's parameters.
    access: what the attacker must have.  needs: the columns it reads.  reference: takes a second model's Tokens.
    """

    function: Callable[..., np.ndarray]
    access: str
    needs: tuple[str, ...]
    reference: bool = False


ATTACKS = {
    "loss": Attack(loss, "logprobs", ("logp",)),
    "zlib": Attack(zlib_ratio, "logprobs", ("logp", "zlib_bytes")),
    "min_k": Attack(min_k, "logprobs", ("logp",)),
    "min_k_plus_plus": Attack(min_k_plus_plus, "distribution", ("logp", "entropy", "logp_std")),
    "reference": Attack(reference_difference, "logprobs", ("logp",), reference=True),
}
REFERENCE_ACCESS = {
    "base_student": "+base-model",
    "base_teacher": "+base-model",
    "reference": "+base-model",
    "null": "+public-data",
}


# --- ids and scores --------------------------------------------------------------------------------------------------


def parse(attack_id: str) -> tuple[str, str, dict[str, float]]:
    """`name:reference@k=0.3,eos=1` -> (name, reference or "", parameters). Raises ValueError on an unknown name."""
    head, _, given = attack_id.partition("@")
    name, _, reference = head.partition(":")
    if name not in ATTACKS:
        raise ValueError(f"unknown attack '{attack_id}'; known are {', '.join(ATTACKS)}")
    return name, reference, {k: float(v) for k, _, v in (p.partition("=") for p in given.split(",") if p)}


def access(attack_id: str) -> str:
    """What the attacker must have; a reference no outsider can have (another private model) makes it `auditor`."""
    name, reference, _ = parse(attack_id)
    if not reference:
        return ATTACKS[name].access
    return ATTACKS[name].access + REFERENCE_ACCESS[reference] if reference in REFERENCE_ACCESS else "auditor"


def expand(attack_ids: list[str], references: list[str], run: str) -> list[str]:
    """The attacks on one run: `reference@..` stands for one attack per reference; never a run against itself."""
    ids = []
    for attack_id in attack_ids:
        name, reference, _ = parse(attack_id)
        if not ATTACKS[name].reference:
            ids.append(attack_id)
            continue
        params = attack_id.partition("@")[1:]
        ids += ["".join((name, ":", r, *params)) for r in ([reference] if reference else references) if r != run]
    return ids


def score(attack_id: str, tokens: Tokens, reference: Tokens | None = None) -> np.ndarray:
    """Scores [n] of one attack on all examples of a role.

    -inf where an example has no scored token (abstention), NaN where a field it needs is not finite.
    Raises MissingField where the table lacks a column, DifferentTokens where the reference was scored on others.
    """
    name, _, params = parse(attack_id)
    attack = ATTACKS[name]
    segments = [SEGMENTS["response"], *([SEGMENTS["eos"]] if params.pop("eos", 0) else [])]
    inputs = [t.select(segments) for t in ([tokens, reference] if attack.reference else [tokens])]
    broken = np.zeros(len(tokens.ids), bool)
    for part in inputs:
        if absent := [f for f in attack.needs if f not in part.token and f not in part.example]:
            raise MissingField(f"{name} needs {', '.join(absent)}, which the score table does not have")
        if not same_tokens(part, inputs[0]):
            raise DifferentTokens("the reference was not scored on the same examples and tokens")
        for column in (part.token[f] for f in attack.needs if f in part.token):
            broken |= np.bincount(part.owner, ~np.isfinite(column), len(part.ids)) > 0
    scores = attack.function(*inputs, **params)
    scores = np.where(inputs[0].lengths == 0, -np.inf, scores)
    return np.where(broken, np.nan, scores)


def same_tokens(a: Tokens, b: Tokens) -> bool:
    """Were both scored on the same examples, token by token (as far as the tables tell)?"""
    if not np.array_equal(a.ids, b.ids) or not np.array_equal(a.offsets, b.offsets):
        return False
    known = "target_id" in a.token and "target_id" in b.token
    return not known or np.array_equal(a.token["target_id"], b.token["target_id"])


def clamped(tokens: Tokens) -> int:
    """Response tokens whose spread Min-K%++ had to clamp (a nearly certain or nearly uniform prediction)."""
    spread = tokens.select([SEGMENTS["response"]]).token["logp_std"].astype(np.float64)
    return int(np.sum(spread**2 < VARIANCE_FLOOR))
