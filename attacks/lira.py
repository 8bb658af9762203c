"""LiRA: how much likelier a model's statistic is among models trained with a record than among those without it.

References are the other shadow models; of a record, `in` are those trained with it and `out` those without.  A
reference that is missing is an error and not a smaller average.  Source: arXiv:2112.03570; attacks.md 6.2.

Legend: c chains, r references, n records, a statistics or augmentations of one record (optional axis).
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy import stats

from attacks.chains import Chains
from attacks.study import Unresolved

# Which sides of the references a form needs.
FORMS = {
    "online": ("in", "out"),
    "in_only": ("in",),
    "offline_pdf": ("out",),
    "offline_cdf": ("out",),
    "offset": ("in", "out"),
    "offset_out": ("out",),
}
ENOUGH = 32  # models a side, from which on every record has a spread of its own
FLOOR = 1e-3  # of the pooled spread: two models that agree by chance are no certainty


class Side(NamedTuple):
    """Centre and spread of one side's statistics, for every record [n] (or [a, n]); NaN where no value is valid."""

    centre: np.ndarray
    spread: np.ndarray


def fit(references: np.ndarray, chosen: np.ndarray, *, centre: str = "median", own: bool, compat: str = "") -> Side:
    """Centre and spread of the chosen references of each record.

    references: [r, n] or [r, a, n].  chosen: bool [r, n].  centre: median | mean.  own: a spread per record (standard
    deviation about the mean, ddof 0), else one pooled over all records: that of what is left after their centres.
    compat: "tfp" as tensorflow/privacy has it: 1e-30 instead of a floor, and a record without a valid value takes the
    mean over records.  NaN values are left out.  Raises Unresolved where a record has no reference.
    """
    if centre not in ("median", "mean") or compat not in ("", "tfp"):
        raise ValueError(f"centre is {centre!r} (median, mean), compat {compat!r} ('', 'tfp')")
    if lonely := int((~chosen.any(axis=0)).sum()):
        raise Unresolved(f"{lonely} records have no reference model on one side: more pairs of chains are needed")
    mask = chosen.reshape(chosen.shape[:1] + (1,) * (references.ndim - 2) + chosen.shape[1:])
    valid = mask & np.isfinite(references)
    count = valid.sum(axis=0)
    values, some = np.where(valid, references, 0.0), np.maximum(count, 1)
    mean = np.where(count > 0, values.sum(axis=0) / some, np.nan)
    middle = mean if centre == "mean" else _median(references, valid, count)
    rest = np.where(valid, references - np.where(count > 0, middle, 0), 0.0)
    total = max(int(count.sum()), 1)
    pooled = float(np.sqrt(max((rest**2).sum() / total - (rest.sum() / total) ** 2, 0.0)))
    spread = np.full(mean.shape, pooled)
    if own:
        about = np.where(valid, references - np.where(count > 0, mean, 0), 0.0)
        spread = np.where(count > 0, np.sqrt((about**2).sum(axis=0) / some), np.nan)
    if compat == "tfp":
        if (count == 0).any():
            middle, spread = (np.where(count > 0, part, np.nanmean(part)) for part in (middle, spread))
        return Side(middle, spread + 1e-30)
    return Side(middle, np.maximum(spread, FLOOR * pooled))


def _median(references: np.ndarray, valid: np.ndarray, count: np.ndarray) -> np.ndarray:
    ordered = np.sort(np.where(valid, references, np.inf), axis=0)  # what is not valid comes last
    last = np.maximum(count, 1)
    low, high = (np.take_along_axis(ordered, index[None], axis=0)[0] for index in ((last - 1) // 2, last // 2))
    return np.where(count > 0, low / 2 + high / 2, np.nan)


def score(phi: np.ndarray, sides: dict[str, Side], form: str = "online") -> np.ndarray:
    """Scores [n] of one form of FORMS, higher for members, of the target's statistic phi [n] or [a, n] (averaged).

    online: log-likelihood ratio of in and out.  in_only: log-likelihood of in.  offline_pdf: minus that of out, high on
    both sides of it.  offline_cdf: `-log(1 - Phi(z))` of the z-score among out, one-sided.  offset: phi less the middle
    of both centres, offset_out: less that of out.  A record without a valid value abstains (-inf).
    """
    sides = _spread_known(sides)
    if form == "online":
        found = _log_normal(phi, sides["in"]) - _log_normal(phi, sides["out"])
    elif form == "in_only":
        found = _log_normal(phi, sides["in"])
    elif form == "offline_pdf":
        found = -_log_normal(phi, sides["out"])
    elif form == "offline_cdf":
        found = -stats.norm.logsf((phi - sides["out"].centre) / sides["out"].spread)
    elif form == "offset":
        found = phi - (sides["in"].centre + sides["out"].centre) / 2
    elif form == "offset_out":
        found = phi - sides["out"].centre
    else:
        raise ValueError(f"unknown form {form!r}; known are {', '.join(FORMS)}")
    if found.ndim > 1:
        found = found.mean(axis=tuple(range(found.ndim - 1)))
    return np.where(np.isnan(found), -np.inf, found)


def _spread_known(sides: dict[str, Side]) -> dict[str, Side]:
    """One model a side has no spread: it takes the other side's; where neither has any, 1, which ranks alike."""
    bare = {name: not np.nanmax(side.spread, initial=0) > 1e-30 for name, side in sides.items()}
    stand_in = next((side.spread for name, side in sides.items() if not bare[name]), None)
    return {
        name: side._replace(spread=np.ones_like(side.spread) if stand_in is None else stand_in) if bare[name] else side
        for name, side in sides.items()
    }


def _log_normal(phi: np.ndarray, side: Side) -> np.ndarray:
    z = (phi - side.centre) / side.spread
    return -(z**2) / 2 - np.log(side.spread) - np.log(2 * np.pi) / 2


def lira(
    phi: np.ndarray,
    references: np.ndarray,
    inside: np.ndarray,
    form: str = "online",
    *,
    usable: np.ndarray | None = None,
    centre: str = "median",
    own: bool | None = None,
    compat: str = "",
) -> np.ndarray:
    """Scores [n] of one target model.

    phi: [n] (or [a, n]), its statistic.  references: [r, n] (or [r, a, n]), those of the others.  inside: bool [r, n],
    which were trained with the record.  usable: bool [r, n], which may be a reference of it; None: all.
    own: a spread per record; None: from ENOUGH models a side on.
    Raises Unresolved where a record has no reference on a side that the form needs.
    """
    usable = np.ones(inside.shape, bool) if usable is None else usable
    chosen = {"in": inside & usable, "out": ~inside & usable}
    if own is None:
        own = min(int(chosen[name].sum(axis=0).min()) for name in FORMS[form]) >= ENOUGH
    return score(phi, {n: fit(references, chosen[n], centre=centre, own=own, compat=compat) for n in FORMS[form]}, form)


# --- chains ----------------------------------------------------------------------------------------------------------


def chain_scores(
    chains: Chains, model: str, statistic: str, forms: Iterable[str], centre: str = "median"
) -> dict[str, np.ndarray]:
    """Of each form the scores [c, n] of all chains as targets, each against all others but its pair.

    `in` is what was in the teacher's data, for the student too.  Spread per record from ENOUGH models a side on.
    Raises Unresolved for the design `cheap`, whose students of one teacher are no independent references: what they
    share tells the teacher, and the teacher tells the members.
    """
    if chains.design == "cheap":
        raise Unresolved("one pair of teachers: its students give calibrated scores, no LiRA")
    return _against_others(chains, model, statistic, list(forms), centre)


def calibrated(chains: Chains, model: str, statistic: str = "LL") -> np.ndarray:
    """Scores [c, n]: a chain's statistic less the mean of the reference models without the record.

    Of the design `cheap`, less the middle of both teachers' students: students of one teacher resemble one another on
    every record, and a reference that changes sides with the membership would tell the two teachers apart.
    """
    form = "offset" if chains.design == "cheap" else "offset_out"
    return _against_others(chains, model, statistic, [form], "mean")[form]


def references(chains: Chains, model: str, side: str) -> int:
    """The fewest reference models that any record has on this side (`in` or `out`), whichever chain is the target."""
    inside = chains.teacher_in == (side == "in")
    return min(int((chains.comparable(target, model) & inside).sum(axis=0).min()) for target in range(len(chains)))


def _against_others(chains: Chains, model: str, statistic: str, forms: list[str], centre: str) -> dict[str, np.ndarray]:
    values = chains.statistic(model, statistic)
    needed = sorted({side for form in forms for side in FORMS[form]})
    own = min(references(chains, model, side) for side in needed) >= ENOUGH
    found = {form: np.empty(values.shape) for form in forms}
    for target, phi in enumerate(values):
        usable = chains.comparable(target, model)
        chosen = {side: usable & (chains.teacher_in == (side == "in")) for side in needed}
        sides = {side: fit(values, chosen[side], centre=centre, own=own) for side in needed}
        for form in forms:
            found[form][target] = score(phi, sides, form)
    return found
