"""Membership attacks: arithmetic on score tables.  Every score is higher for records that look more like members.

An attack is one plain function of arrays and one row of ATTACKS; a new one needs no more than that and a planted leak
in tests/planted_regimes.py.  Its id is its name, a reference run after a colon, other than default parameters after an
at sign: `loss`, `reference:base_student`, `min_k@k=0.3`, `loss@eos=1` (the end-of-text token is scored too).

A score of -inf is an abstention: the attack has nothing to go by, a response without tokens for instance.  A NaN is an
error in the tables.  Neither is ever dropped.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from attacks import against_reference as against
from attacks import camia, changed_text, fitted, signals, trajectory, twohop, weights
from attacks.signals import CannotScore
from attacks.tables import SEGMENTS, Tokens

# What an attack may take beside the target's own Tokens; attacks/scoring.py loads it.
INPUTS = {
    "reference": "Tokens of the run after the colon",
    "base": "Tokens of the checkpoint at the beginning of the run's chain of `init`",
    "start": "Tokens of the run that this one started from",
    "teacher": "Tokens of the run's teacher",
    "teacher_base": "Tokens of the checkpoint that the teacher started from",
    "recall": "Tokens of the scoring variant of this name",
    "recall_members": "Tokens of the scoring variant of this name",
    "lowercase": "Tokens of the scoring variant of this name: of other tokens",
    "neighbours": "Tokens of the scoring variant of this name: of other examples",
    "steps": "[(step, Tokens), ...] of the run's earlier checkpoints, by step",
    "pair": "Tokens of the table of the run beside its teacher",
    "whitebox": "the Whitebox table of the run, of a part of the records",
    "counts": "how often each token id occurs in the public role [V]",
    "calib_members": "Tokens of the calibration records that the run, or its teacher, was trained on",
    "calib_nonmembers": "Tokens of those that it was not",
}
VARIANTS = ("recall", "recall_members", "lowercase", "neighbours")
OTHER_TOKENS = ("lowercase",)
OTHER_EXAMPLES = ("neighbours", "calib_members", "calib_nonmembers")


class MissingField(CannotScore):
    """The score table lacks a column that this attack needs."""


class DifferentTokens(CannotScore):
    """Target and reference were not scored on the same tokens, so that they cannot be subtracted."""


@dataclass(frozen=True)
class Attack:
    """One row of ATTACKS.

    function: scores [n] of the target's Tokens and of `inputs` in their order; its further arguments, which have
    defaults, are the attack's parameters.  access: what the attacker must have, before the reference.
    needs: the columns it reads.  inputs: of INPUTS.
    text_level: it compares means over texts, so that a reference may have another tokenizer.
    weights: the columns it reads of the white-box table.
    """

    function: Callable[..., np.ndarray]
    access: str
    needs: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    text_level: bool = False
    weights: tuple[str, ...] = ()

    @property
    def reference(self) -> bool:
        return "reference" in self.inputs

    @property
    def reads_teacher(self) -> bool:
        """Does it look at the teacher itself, so that it says something about members whichever model is attacked?"""
        return bool({"teacher", "pair"} & set(self.inputs))

    @property
    def fitted(self) -> bool:
        return any(name.startswith("calib_") for name in self.inputs)


_SPREAD = ("logp", "entropy", "logp_std")
_ERRORS = ("logp", "top1_id", "target_id")
_FITTED = (*_SPREAD, "top1_id", "target_id", "n_bytes", "zlib_bytes")
_REF = ("reference",)
_TWO_HOP = ("base", "teacher", "teacher_base")
_STEPS = ("steps", "start")

ATTACKS = {
    # One model, one pass.
    "loss": Attack(signals.loss, "logprobs", ("logp",)),
    "perplexity": Attack(signals.perplexity, "logprobs", ("logp",)),
    "sum": Attack(signals.total, "logprobs", ("logp",)),
    "zlib": Attack(signals.zlib_ratio, "logprobs", ("logp", "zlib_bytes")),
    "min_k": Attack(signals.min_k, "logprobs", ("logp",)),
    "min_k_plus_plus": Attack(signals.min_k_plus_plus, "distribution", _SPREAD),
    "gap_k": Attack(signals.gap_k, "distribution", ("logp", "top1_logp", "logp_std")),
    "surp": Attack(signals.surp, "distribution", ("logp", "entropy")),
    "gap": Attack(signals.gap, "logprobs", _ERRORS),
    "dc_pdd": Attack(signals.dc_pdd, "logprobs+public-data", ("logp", "target_id"), ("counts",)),
    # Against a reference.
    "reference": Attack(against.reference_difference, "logprobs", ("logp",), _REF, text_level=True),
    "ratio": Attack(against.reference_ratio, "logprobs", ("logp",), _REF, text_level=True),
    "ez": Attack(against.ez, "logprobs", _ERRORS, _REF),
    "ez_fallback": Attack(against.ez_fallback, "logprobs", ("logp",), _REF),
    "ez_published": Attack(against.ez_published, "logprobs", _ERRORS, _REF),
    "wbc": Attack(against.wbc, "logprobs", ("logp",), _REF),
    "ht_ours": Attack(against.ht_ours, "logprobs", ("logp",), _REF),
    "calibrated_zlib": Attack(
        against.calibrate(signals.zlib_ratio), "logprobs", ("logp", "zlib_bytes"), _REF, text_level=True
    ),
    "calibrated_min_k": Attack(against.calibrate(signals.min_k), "logprobs", ("logp",), _REF, text_level=True),
    "calibrated_min_k_plus_plus": Attack(
        against.calibrate(signals.min_k_plus_plus), "distribution", _SPREAD, _REF, text_level=True
    ),
    # Against a changed form of the text.
    "recall": Attack(changed_text.recall, "logprobs+nonmembers", ("logp",), ("recall",)),
    "con_recall": Attack(
        changed_text.con_recall, "logprobs+nonmembers+members", ("logp",), ("recall", "recall_members")
    ),
    "lowercase": Attack(changed_text.lowercase, "logprobs", ("logp",), ("lowercase",)),
    "neighbourhood": Attack(changed_text.neighbourhood, "logprobs", ("logp",), ("neighbours",)),
    # How the log-probability runs along the text.
    "camia_head": Attack(camia.camia_head, "logprobs", ("logp",)),
    "camia_confident": Attack(camia.camia_confident, "logprobs", ("logp",)),
    "camia_above_mean": Attack(camia.camia_above_mean, "logprobs", ("logp",)),
    "camia_above_running": Attack(camia.camia_above_running, "logprobs", ("logp",)),
    "camia_time": Attack(camia.camia_time, "logprobs", ("logp",)),
    "camia_diversity": Attack(camia.camia_diversity, "logprobs", ("logp", "target_id")),
    "camia_complexity": Attack(camia.camia_complexity, "logprobs", ("logp",)),
    # Fitted on calibration records.
    "quantile": Attack(fitted.quantile, "distribution+nonmembers", _FITTED, ("calib_nonmembers",)),
    "combined": Attack(
        fitted.combined, "distribution+nonmembers+members", _FITTED, ("calib_members", "calib_nonmembers")
    ),
    # Distillation: the teacher's shift in its student, and how the loss fell while the model was trained.
    "two_hop_covariance": Attack(twohop.two_hop_covariance, "auditor", ("logp",), _TWO_HOP),
    "two_hop_correlation": Attack(twohop.two_hop_correlation, "auditor", ("logp",), _TWO_HOP),
    "two_hop_slope": Attack(twohop.two_hop_slope, "auditor", ("logp",), _TWO_HOP),
    "two_hop_product": Attack(twohop.two_hop_product, "auditor", ("logp",), _TWO_HOP),
    "teacher_shift": Attack(twohop.teacher_shift, "auditor", ("logp",), _TWO_HOP),
    "teacher_kl": Attack(twohop.teacher_kl, "auditor", ("logp",), ("pair",)),
    "trajectory_slope": Attack(trajectory.trajectory_slope, "auditor", ("logp",), _STEPS),
    "trajectory_area": Attack(trajectory.trajectory_area, "auditor", ("logp",), _STEPS),
    "trajectory_drop": Attack(trajectory.trajectory_drop, "auditor", ("logp",), _STEPS),
    "trajectory_half": Attack(trajectory.trajectory_half, "auditor", ("logp",), _STEPS),
    # With the weights.
    "gradient_norm": Attack(weights.gradient_norm, "weights", (), ("whitebox",), weights=("gradient_inf",)),
    "gradient_global": Attack(weights.gradient_global, "weights", (), ("whitebox",), weights=("gradient_global",)),
    "mope": Attack(weights.mope, "weights", (), ("whitebox",), weights=("mope",)),
    "mope_antithetic": Attack(weights.mope_antithetic, "weights", (), ("whitebox",), weights=("mope_antithetic",)),
}
# What the first pages of a report show; all others are secondary.
FIRST = ("loss", "zlib", "min_k", "min_k_plus_plus", "reference", "ratio", "recall", "ez", "wbc")
REFERENCE_ACCESS = {
    "base_student": "+base-model",
    "base_teacher": "+base-model",
    "reference": "+base-model",
    "null": "+public-data",
}


# --- ids and scores --------------------------------------------------------------------------------------------------


def parse(attack_id: str) -> tuple[str, str, dict[str, float]]:
    """`name:reference@k=0.3,eos=1` -> (name, reference or "", parameters).

    Raises ValueError on an unknown name or parameter, a value that is no number, a reference to an attack without one.
    """
    name, reference, parameters = _parse(attack_id)
    return name, reference, dict(parameters)


@cache
def _parse(attack_id: str) -> tuple[str, str, tuple[tuple[str, float], ...]]:
    head, _, given = attack_id.partition("@")
    name, _, reference = head.partition(":")
    if name not in ATTACKS:
        raise ValueError(f"unknown attack '{attack_id}'; known are {', '.join(ATTACKS)}")
    if reference and not ATTACKS[name].reference:
        raise ValueError(f"attack '{attack_id}': {name} takes no reference")
    taken = inspect.signature(ATTACKS[name].function).parameters
    parameters = {}
    for key, _, value in (part.partition("=") for part in given.split(",") if part):
        if key != "eos" and (key not in taken or taken[key].default is inspect.Parameter.empty):
            raise ValueError(f"attack '{attack_id}': {name} has no parameter '{key}'")
        try:
            parameters[key] = float(value)
        except ValueError:
            raise ValueError(f"attack '{attack_id}': {key} must be a number, not '{value}'") from None
    return name, reference, tuple(parameters.items())


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


def segments(attack_id: str) -> list[int]:
    """The segments whose tokens it scores: the response, and the end-of-text token where `@eos=1` asks for it."""
    eos = parse(attack_id)[2].get("eos", 0)
    return [SEGMENTS["response"], *([SEGMENTS["eos"]] if eos else [])]


def score(attack_id: str, tokens: Tokens, *, cross_tokenizer: bool = False, **inputs: object) -> np.ndarray:
    """Scores [n] of one attack on all examples of a role; inputs: what the attack takes beside them, by its name.

    -inf where an example has no scored token (abstention), NaN where a field it needs is not finite.
    cross_tokenizer: the reference has another tokenizer, so that only its examples have to be the same.
    Raises MissingField where a table lacks a column, DifferentTokens where a reference was scored on others.
    """
    name, _, params = parse(attack_id)
    attack, wanted = ATTACKS[name], segments(attack_id)
    params.pop("eos", None)
    target = tokens.select(wanted)
    broken = _broken(name, target, attack.needs)
    chosen = []
    for given in attack.inputs:
        value = inputs[given]
        if given == "whitebox" and not np.array_equal(value.ids, target.ids):
            raise DifferentTokens("the white-box table has other examples")
        parts = [part for _, part in value] if given == "steps" else [value] if isinstance(value, Tokens) else []
        parts = [part.select(wanted) for part in parts]
        for part in parts:
            bad = _broken(name, part, ("kl_ab",) if given == "pair" else ATTACKS[name].needs)
            if given in OTHER_EXAMPLES:
                continue  # the function says what a NaN in them means
            if not same_tokens(part, target, ids_only=cross_tokenizer or given in OTHER_TOKENS):
                raise DifferentTokens(f"the {given} was not scored on the same examples and tokens")
            broken = broken | bad
        if given == "steps":
            chosen.append([(step, part) for (step, _), part in zip(value, parts, strict=True)])
        else:
            chosen.append(parts[0] if parts else value)
    scores = attack.function(target, *chosen, **params)
    scores = np.where(target.lengths == 0, -np.inf, scores)
    return np.where(broken, np.nan, scores)


def _broken(name: str, tokens: Tokens, needs: tuple[str, ...]) -> np.ndarray:
    """Examples of which a needed value is not finite [n]. Raises MissingField."""
    if absent := [f for f in needs if f not in tokens.token and f not in tokens.example]:
        raise MissingField(f"{name} needs {', '.join(absent)}, which the score table does not have")
    broken = np.zeros(len(tokens.ids), bool)
    for column in needs:
        if column in tokens.token and np.issubdtype(tokens.token[column].dtype, np.floating):
            broken |= tokens.once(("broken", column), lambda c=column: _not_finite(tokens.token[c], tokens))
    return broken


def _not_finite(column: np.ndarray, tokens: Tokens) -> np.ndarray:
    where = tokens.owner[~np.isfinite(column)]
    return np.bincount(where, minlength=len(tokens.ids)) > 0


def same_tokens(a: Tokens, b: Tokens, ids_only: bool = False) -> bool:
    """Were both scored on the same examples, token by token (as far as the tables tell)?"""
    if not np.array_equal(a.ids, b.ids):
        return False
    if ids_only or a is b:
        return True
    if not np.array_equal(a.offsets, b.offsets):
        return False
    known = "target_id" in a.token and "target_id" in b.token
    return not known or np.array_equal(a.token["target_id"], b.token["target_id"])
