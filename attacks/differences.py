"""Rows of differences.csv: what one model shows above another on the same records, paired and corrected (Holm).

Two claims, each a family of its own: how a student compares with null, its swap and its teacher, and how the students
of one setting compare with one another.  Students of different settings are never compared.
"""

from itertools import combinations
from typing import NamedTuple

import numpy as np

from attacks import membership
from attacks.rows import Sample, auc_of, by_seed, compare, same_examples, sizes
from attacks.statistics import Influence, Spread, correct, gap_spread
from attacks.study import Study, Unresolved


class Compared(NamedTuple):
    """One comparison: model a less model b. setting: of two students that are ranked against each other, else None."""

    a: str
    b: str
    role_pair: str
    setting: str | None = None


def difference_rows(study: Study) -> list[dict]:
    """Paired AUC differences: student against null, its swap, its teacher, and the students of its setting.

    The family of the correction is all comparisons of one claim, role pair, attack name and seed.  Between students
    over several seeds, the spread over seeds is pooled over all students of the setting (`over_seeds`).
    """
    families: dict[tuple, list[dict]] = {}
    rows = []
    for attack in dict.fromkeys(attack for run in study.students for attack in study.attacks(run)):
        spreads: dict[tuple, Spread | None] = {}
        for each in _comparisons(study):
            if not all(attack in study.attacks(run) for run in (each.a, each.b)):
                continue
            if membership.ATTACKS[membership.parse(attack)[0]].reads_teacher and study.swap(each.a) == each.b:
                continue  # another teacher is read beside the swap: the gap would be that of the two teachers
            group = (each.setting, each.role_pair)
            if each.setting and group not in spreads:
                spreads[group] = _spread(study, *group, attack)
            for row in _compared(study, each, attack, spreads.get(group)):
                rows.append(row)
                if "reason" not in row:
                    claim = (each.setting, each.role_pair, membership.parse(attack)[0], row["seed"])
                    families.setdefault(claim, []).append(row)
    for family in families.values():
        correct(family)
    return rows


def students_of(study: Study, setting: str) -> list[str]:
    """The students of one setting, which are compared and ranked among themselves."""
    return [run for run in study.students if study.head(run)["setting"] == setting]


def _comparisons(study: Study) -> list[Compared]:
    found = []
    for student in study.students:
        others = ["null", study.swap(student), study.provenance(student).get("teacher") or "teacher"]
        found += [Compared(student, b, "private-heldout") for b in dict.fromkeys(others) if b in study.runs]
    for setting in dict.fromkeys(study.head(run)["setting"] for run in study.students):
        pairs = combinations(students_of(study, setting), 2)
        found += [Compared(a, b, "private-heldout", setting) for a, b in pairs]
    return found + [c._replace(role_pair="averaged") for c in found if study.swap(c.a) and study.swap(c.b)]


def _spread(study: Study, setting: str, role_pair: str, attack: str) -> Spread | None:
    """Spread over seeds of the gap between any two students, from all that have the most common set of seeds."""
    tables = {}
    for run in students_of(study, setting):
        if role_pair == "averaged" and not study.swap(run):
            continue
        samples, reasons = by_seed(study, run, attack, role_pair)
        if not reasons and len(samples) > 1:
            tables.setdefault(tuple(samples), []).append([auc_of(sample).value for sample in samples.values()])
    largest = max(tables.values(), key=len, default=[])
    return gap_spread(np.array(largest)) if len(largest) > 1 else None


def _compared(study: Study, each: Compared, attack: str, spread: Spread | None) -> list[dict]:
    a, b, role_pair, _ = each
    blocks: dict[int | str, tuple[list[Sample], list[Sample]] | str] = {}
    for seed in study.seeds(a):
        try:
            other = study.match(b, seed)
            if other is None:
                raise Unresolved(f"{b} has no seed {seed}")
            both = study.pairs(a, seed, attack, role_pair), study.pairs(b, other, attack, role_pair)
            if not same_examples(*both):
                raise Unresolved(f"{a} and {b} were scored on different examples")
            blocks[seed] = ([both[0]], [both[1]])
        except Unresolved as why:
            blocks[seed] = str(why)
    influences: dict[int | str, list[list[Influence]]] = {
        seed: [[auc_of(side[0])] for side in block] for seed, block in blocks.items() if not isinstance(block, str)
    }
    if len(blocks) > 1:
        reasons = [block for block in blocks.values() if isinstance(block, str)]
        if not reasons:
            influences["all"] = [[of[side][0] for of in influences.values()] for side in (0, 1)]
            blocks["all"] = tuple([block[side][0] for block in blocks.values()] for side in (0, 1))
        else:
            blocks["all"] = "; ".join(dict.fromkeys(reasons))
    head = {
        "model_a": a,
        "model_b": b,
        "setting": study.head(a)["setting"],
        "access": membership.access(attack),
        "attack": attack,
        "role_pair": role_pair,
        "task": "all",
        "metric": "auc",
    }
    return [
        head
        | {"seed": seed}
        | ({"reason": block} if isinstance(block, str) else _gap(influences[seed], block[0], spread))
        for seed, block in blocks.items()
    ]


def _gap(influences: list[list[Influence]], samples: list[Sample], spread: Spread | None) -> dict:
    gap = compare(*influences, samples, pooled=spread)
    m, n = sizes(samples)
    return {
        "difference": gap.value,
        "ci_low": gap.low,
        "ci_high": gap.high,
        "ci_kind": "both" if len(samples) > 1 else "examples",
        "p_value": gap.p,
        "n_members": m,
        "n_nonmembers": n,
    }
