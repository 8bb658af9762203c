"""Rows of attacks.csv: all attacks on one model together, and what is left of them once their number is counted.

One attack per study is named beforehand (`primary`) and keeps its p-value.  The others of the same model, role pair and
seed are a family: Holm.  And the strongest of all attacks is compared with the strongest of the same attacks when the
labels are shuffled (statistics.md 8): the greatest of many AUCs is above 0.5 where there is nothing to find.  Attacks
that read the teacher itself stay outside, on every model: what they find may be the teacher's leak alone.  The maximum
is over attacks on the same records; white-box ones, which see a part of them, are in Holm's family only.
"""

import numpy as np

from attacks.membership import ATTACKS, parse
from attacks.resampling import Permuter, permuted_aucs
from attacks.rows import Sample, against_chance, auc_of, by_seed, same_examples
from attacks.statistics import correct
from attacks.study import Study

PERMUTATIONS = 1000
RULES = {
    "primary": "named beforehand",
    "holm": "Holm over the other attacks",
    "maximum": "maximum over attacks on the same records",
}


def attack_rows(study: Study) -> list[dict]:
    """Rows of attacks.csv for every model and role pair: one per attack, one for their maximum.

    `p_value`: two-sided, against an AUC of 0.5.  `p_corrected`: by `rule`, over `family` attacks; for `maximum` that of
    the permutation test (one-sided: the greatest AUC), beside the median of the greatest under shuffled labels.
    """
    permuter, rows = Permuter(PERMUTATIONS, study.settings["seed"]), []
    for run in study.runs:
        for role_pair in study.role_pairs(run):
            own = [a for a in study.attacks(run) if not ATTACKS[parse(a)[0]].reads_teacher]
            found = {attack: by_seed(study, run, attack, role_pair)[0] for attack in own}
            shuffled: dict[int | str, dict[str, np.ndarray]] = {}
            for seed in study.seeds(run):
                samples = {attack: of[seed] for attack, of in found.items() if seed in of}
                shuffled[seed] = _shuffled(permuter, samples)
                at = study.head(run) | {"role_pair": role_pair, "seed": seed}
                rows += _family(study, at, {attack: [sample] for attack, sample in samples.items()}, shuffled[seed])
            if len(shuffled) > 1:
                rows += _all_seeds(study, study.head(run) | {"role_pair": role_pair, "seed": "all"}, found, shuffled)
    return rows


def _all_seeds(study: Study, at: dict, found: dict[str, dict], shuffled: dict) -> list[dict]:
    """Attacks that every seed has, on the same records in every seed: labels are shuffled once for all seeds."""
    whole = {attack: list(of.values()) for attack, of in found.items() if len(of) == len(shuffled)}
    whole = {a: block for a, block in whole.items() if all(same_examples(block[0], sample) for sample in block)}
    together = [attack for attack in whole if all(attack in of for of in shuffled.values())]
    return _family(study, at, whole, {a: np.mean([of[a] for of in shuffled.values()], axis=0) for a in together})


def _shuffled(permuter: Permuter, samples: dict[str, Sample]) -> dict[str, np.ndarray]:
    """By attack, its AUC [B] under shuffled labels, the same shuffles for all; `averaged` has them exchanged in one.

    Of attacks on different records only those on the most.
    """
    if not samples:
        return {}
    most = max(samples.values(), key=lambda sample: len(sample[0].members) + len(sample[0].nonmembers))
    samples = {attack: sample for attack, sample in samples.items() if same_examples(sample, most)}
    (first, *swap), *_ = samples.values()
    labels = permuter.labels(first.member_ids, first.nonmember_ids, first.groups)
    both = lambda a, b: np.array([np.concatenate([a(sample), b(sample)]) for sample in samples.values()])
    aucs = permuted_aucs(both(lambda s: s[0].members, lambda s: s[0].nonmembers), labels)
    if swap:  # its non-members are the members of the first
        aucs = (aucs + 1 - permuted_aucs(both(lambda s: s[1].nonmembers, lambda s: s[1].members), labels)) / 2
    return dict(zip(samples, aucs.T, strict=True))


def _family(study: Study, at: dict, blocks: dict[str, list[Sample]], shuffled: dict[str, np.ndarray]) -> list[dict]:
    if not blocks:
        return []
    primary, rows = study.settings["primary"], []
    for attack, block in blocks.items():
        influences = [auc_of(sample) for sample in block]
        value, p = float(np.mean([each.value for each in influences])), against_chance(influences, block)
        numbers = {"attack": attack, "auc": value, "p_value": p, "p_corrected": p, "rule": "primary", "family": 1}
        rows.append(at | numbers | dict(zip(("n_members", "n_nonmembers"), _sizes(block), strict=True)))
    others = [row for row in rows if row["attack"] != primary]
    correct(others)
    for row in others:
        row |= {"rule": "holm", "family": len(others)}
    together = [row for row in rows if row["attack"] in shuffled]
    if not together:
        return rows
    best = max(together, key=lambda row: row["auc"])
    greatest = np.max([shuffled[row["attack"]] for row in together], axis=0)
    reached = np.sum(greatest >= best["auc"] - 1e-12)
    p = float((1 + reached) / (len(greatest) + 1))
    maximum = {"p_value": None, "p_corrected": p, "rule": "maximum", "family": len(together)}
    return [*rows, best | maximum | {"null_median": float(np.median(greatest))}]


def _sizes(block: list[Sample]) -> tuple[int, int]:
    pair = block[0][0]
    return len(pair.members), len(pair.nonmembers)


def corrected_facts(study: Study, rows: list[dict]) -> dict:
    """For summary.json: of the students, which attack is strongest and whether it survives the correction; in words."""
    strongest, words = [], []
    for run in study.students or [study.settings["headline_model"]]:
        pairs = [study.settings["role_pair"], "private-heldout"]
        mine = [row for row in rows if row["model"] == run and row["rule"] == "maximum" and row["role_pair"] in pairs]
        mine.sort(key=lambda row: (pairs.index(row["role_pair"]), row["seed"] != "all"))
        if not mine:
            continue
        row = mine[0]
        keys = ("model", "role_pair", "seed", "attack", "auc", "p_corrected", "null_median", "family")
        strongest.append({key: row[key] for key in keys})
        words.append(
            f"{run}: of {row['family']} attacks {row['attack']} is the strongest, AUC {row['auc']:.3f}; shuffled "
            f"labels give a strongest of {row['null_median']:.3f}, and one as strong with p = {row['p_corrected']:.3g}."
        )
    return {"permutations": PERMUTATIONS, "rules": RULES, "strongest": strongest, "words": words}
