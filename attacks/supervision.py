"""Mixed supervision (cui2026 3.3): do teacher and label pull the same way where the teacher is vulnerable?

supervision.csv has, for every student and its teacher and the groups that an attack on the teacher makes (vulnerable:
members that it flags at the calibration threshold, non_vulnerable: members that it misses, non_member), means over
examples of means over response tokens:

  teacher_agrees teacher_p teacher_nll   is the label the teacher's most probable token; its probability; -log of it
  gradient_cosine top1_agrees kl         of the pair tables: cosine of the gradients of cross entropy and KL by the
                                         student's logits; do both have the same top-1; KL(teacher || student)
  student_confidence student_entropy     the student's greatest probability, and its entropy
  confidence_gain                        that confidence less the one of the checkpoint that the student started from

and differences: `vulnerable-non_vulnerable`, and `vulnerable-matched_non_member`, the same against non-members on which
the teacher has the same log-likelihood.  What is measured on the teacher differs by construction where the attack is
made of the same log-probabilities (column by_construction): there the matched difference and other attacks count.
Attack `-` stands for all members against all non-members, whatever an attack says.
`p_corrected`: Holm over all attacks and students of one measure, group and seed in a setting.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from attacks import membership
from attacks.agreement import (
    NON_MEMBER,
    NON_VULNERABLE,
    RULES,
    VULNERABLE,
    chosen_attacks,
    couple,
    couples,
    decide,
    group_names,
)
from attacks.effects import Effect, combine, mean_of
from attacks.signals import loss, segment_mean
from attacks.statistics import Difference, Interval, correct
from attacks.study import Study, Unresolved
from attacks.tables import SEGMENTS, ScoreTable, Tokens

COLUMNS = (
    "teacher student setting attack measure group n value ci_low ci_high p_value p_corrected by_construction "
    "temperature seed"
)
ROLES = ("private", "heldout")
ON_TEACHER = ("teacher_agrees", "teacher_p", "teacher_nll")
MADE_OF_LIKELIHOOD = ("loss", "perplexity", "sum", "zlib", "min_k")
MEMBER = "member"
CONTRAST, MATCHED = f"{VULNERABLE}-{NON_VULNERABLE}", f"{VULNERABLE}-matched_{NON_MEMBER}"
GROUPS = (VULNERABLE, NON_VULNERABLE, NON_MEMBER, CONTRAST, MATCHED)
BINS_PER_SPREAD = 5  # of the teacher's log-likelihood of non-members, where records are matched on it


def matched_difference(values: np.ndarray, group: np.ndarray, other: np.ndarray, likelihood: np.ndarray) -> Effect:
    """Difference in the mean of values [N] between two groups (bool [N]) of the same likelihood [N].

    Least squares on the group, on bins of the likelihood and on the likelihood itself: records are compared within a
    bin, and what is left of the slope there is taken out.  Bins in which one group is absent play no part.
    Raises Unresolved where fewer than two records of a group have a counterpart.
    """
    width = likelihood[other].std() / BINS_PER_SPREAD
    if not width > 0:
        raise Unresolved("all non-members have the same likelihood: nothing to match on")
    bins = np.floor((likelihood - likelihood.min()) / width).astype(np.int64)
    bins = np.unique(bins, return_inverse=True)[1]
    both = (np.bincount(bins, group) > 0) & (np.bincount(bins, other) > 0)
    used = (group | other) & both[bins]
    if min((group & used).sum(), (other & used).sum()) < 2:
        raise Unresolved("the likelihoods of the vulnerable and the non-members do not overlap")

    def within(x: np.ndarray) -> np.ndarray:
        counts = np.maximum(np.bincount(bins[used], minlength=len(both)), 1)
        return np.where(used, x - (np.bincount(bins[used], x[used], len(both)) / counts)[bins], 0.0)

    x, slope, y = within(group.astype(float)), within(likelihood), within(values)
    if slope @ slope > 0:
        x, y = (v - slope * (slope @ v) / (slope @ slope) for v in (x, y))
    if not x @ x > 1e-9:
        raise Unresolved("within bins of the likelihood the groups are not to be told from the likelihood itself")
    value = (x @ y) / (x @ x)
    n = min(int((group & used).sum()), int((other & used).sum()))
    return Effect(float(value), x * (y - x * value) / (x @ x), used, n - 1)


# --- what is measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One student's seed: every measure by record, members before non-members in the order of their ids.

    likelihood: the teacher's mean log-probability [N].  clusters: codes [N] of records that belong together.
    """

    ids: np.ndarray
    members: np.ndarray
    clusters: np.ndarray
    likelihood: np.ndarray
    values: dict[str, np.ndarray]
    temperature: float | None


def measure(study: Study, teacher: str, student: str, seed: int) -> Measured:
    """Read the tables of both, of what the student started from and of the pair, as far as they are there.

    Raises Unresolved where teacher and student have no common records.
    """
    other = study.match(teacher, seed)
    if other is None:
        raise Unresolved(f"{teacher} has no seed {seed}")
    tables = {"teacher": study.tables[teacher, other], "student": study.tables[student, seed]}
    start = study.provenance(student).get("init")
    if start in study.runs and (start_seed := study.match(start, seed)) is not None:
        tables["start"] = study.tables[start, start_seed]
    if pair := tables["student"].variants.get(f"pair:{teacher}"):
        tables["pair"] = pair
    parts = [_of_role(tables, role) for role in ROLES]
    ids, likelihood = (np.concatenate([part[k] for part in parts]) for k in ("ids", "likelihood"))
    members = np.arange(len(ids)) < len(parts[0]["ids"])
    names = [name for name in parts[0]["values"] if name in parts[1]["values"]]
    values = {name: np.concatenate([part["values"][name] for part in parts]) for name in names}
    clusters = np.unique(study.group_names(ids), return_inverse=True)[1]
    told = pair.provenance.get("pair", {}) if pair else {}
    return Measured(ids, members, clusters, likelihood, values, told.get("temperature"))


def _of_role(tables: dict[str, ScoreTable], role: str) -> dict:
    read = {name: _response(table, role) for name, table in tables.items() if role in table.files}
    if absent := {"teacher", "student"} - set(read):
        raise Unresolved(f"the {' and the '.join(sorted(absent))} was not scored on role '{role}'")
    for name, tokens in read.items():
        if not membership.same_tokens(tokens, read["teacher"]):
            raise Unresolved(f"the {name} was scored on other examples or tokens than the teacher")
    values = dict(_measures(**read))
    broken = {k: int(np.sum(~np.isfinite(v))) for k, v in values.items()}
    if wrong := [f"{count} of {k}" for k, count in broken.items() if count]:
        raise Unresolved(f"values that are not numbers in role '{role}': {', '.join(wrong)}; a model may have diverged")
    return {"ids": read["teacher"].ids, "likelihood": loss(read["teacher"]), "values": values}


def _response(table: ScoreTable, role: str) -> Tokens:
    fields = ("logp", "target_id", "top1_id", "top1_logp", "entropy", "agree", "cos_ce_kl", "kl_ab")
    return table.load(role, fields).select([SEGMENTS["response"]])


def _measures(teacher: Tokens, student: Tokens, start: Tokens | None = None, pair: Tokens | None = None):
    """(name, mean over the response tokens of each example [n]) of everything that these tables tell."""
    of_teacher, of_student = teacher.token, student.token
    yield "teacher_p", segment_mean(np.exp(of_teacher["logp"]), teacher)
    yield "teacher_nll", -loss(teacher)
    if "top1_id" in of_teacher:
        yield "teacher_agrees", segment_mean(of_teacher["top1_id"] == of_teacher["target_id"], teacher)
    if "top1_logp" in of_student:
        confidence = segment_mean(np.exp(of_student["top1_logp"]), student)
        yield "student_confidence", confidence
        if start is not None and "top1_logp" in start.token:
            yield "confidence_gain", confidence - segment_mean(np.exp(start.token["top1_logp"]), start)
    if "entropy" in of_student:
        yield "student_entropy", segment_mean(of_student["entropy"], student)
    if pair is not None:
        for name, column in (("gradient_cosine", "cos_ce_kl"), ("top1_agrees", "agree"), ("kl", "kl_ab")):
            yield name, segment_mean(pair.token[column], pair)


# --- rows ------------------------------------------------------------------------------------------------------------


def rows(study: Study) -> list[dict]:
    """Rows of supervision.csv; one that could not be computed has a `reason`, and one row says why there is nothing."""
    pairs = couples(study)
    if not pairs:
        return [{"measure": "supervision", "reason": "no student whose teacher was scored as well"}]
    found = [row for teacher, student in pairs for row in _couple_rows(study, teacher, student)]
    correct(found, lambda row: tuple(row.get(key) for key in ("setting", "measure", "group", "seed")))
    without = [
        student
        for teacher, student in pairs
        if student in study.students
        and not any(f"pair:{teacher}" in study.tables[student, seed].variants for seed in study.seeds(student))
    ]
    if without:
        reason = "no pair tables with the teacher (score.pairs = ('students',)): no gradient cosine"
        found.append({"student": " ".join(without), "measure": "gradient_cosine", "reason": reason})
    return found


def _couple_rows(study: Study, teacher: str, student: str) -> Iterator[dict]:
    head = {"teacher": teacher, "student": student, "setting": study.head(student)["setting"]}
    measured: dict[int, Measured] = {}
    for seed in study.seeds(student):
        try:
            measured[seed] = measure(study, teacher, student, seed)
        except Unresolved as why:
            yield head | {"measure": "supervision", "seed": seed, "reason": str(why)}
    whole = {seed: (found, np.where(found.members, MEMBER, NON_MEMBER)) for seed, found in measured.items()}
    yield from _attack_rows(head | {"attack": "-"}, whole, (MEMBER, NON_MEMBER, f"{MEMBER}-{NON_MEMBER}"))
    refused: dict[str, list[str]] = {}
    for attack in chosen_attacks(study, teacher, student):
        grouped = {}
        for seed, found in measured.items():
            try:
                grouped[seed] = _groups(study, teacher, student, seed, attack, found)
            except Unresolved as why:
                refused.setdefault(str(why), []).append(attack)
        seeds = {seed: (measured[seed], groups) for seed, groups in grouped.items()}
        for row in _attack_rows(head | {"attack": attack}, seeds, GROUPS):
            if isinstance(row, str):
                refused.setdefault(row, []).append(attack)
            else:
                yield row
    for reason, attacks in refused.items():
        yield head | {"attack": " ".join(dict.fromkeys(attacks)), "measure": "supervision", "reason": reason}


def _groups(study: Study, teacher: str, student: str, seed: int, attack: str, found: Measured) -> np.ndarray:
    pair = couple(study, teacher, student, seed, attack).teacher
    if not np.array_equal(np.concatenate([pair.member_ids, pair.nonmember_ids]), found.ids):
        raise Unresolved("the attack scored other records than the tables have")
    return group_names(decide(study, pair, RULES[0]).members, len(pair.nonmembers))


def _attack_rows(
    head: dict, seeds: dict[int, tuple[Measured, np.ndarray]], wanted: tuple[str, ...]
) -> Iterator[dict | str]:
    """Rows of one attack, and the reasons of those that are not there."""
    name = head["attack"].partition(":")[0].partition("@")[0]
    for measure_name in dict.fromkeys(k for found, _ in seeds.values() for k in found.values):
        constructed = measure_name in ON_TEACHER and name in MADE_OF_LIKELIHOOD
        for group in wanted:
            at = head | {"measure": measure_name, "group": group}
            at["by_construction"] = "yes" if constructed and group != NON_MEMBER else ""
            effects: dict[int, tuple[Effect, Measured]] = {}
            for seed, (found, groups) in seeds.items():
                try:
                    effects[seed] = _effect(found, measure_name, groups, group), found
                except Unresolved as why:
                    yield f"{group}: {why}"
            for seed, each in effects.items():
                yield at | {"seed": seed} | _numbers([each], group)
            if 1 < len(effects) == len(seeds) and all(
                np.array_equal(found.ids, seeds[next(iter(seeds))][0].ids) for _, found in effects.values()
            ):
                yield at | {"seed": "all"} | _numbers(list(effects.values()), group)


def _effect(found: Measured, name: str, groups: np.ndarray, group: str) -> Effect:
    if name not in found.values:
        raise Unresolved(f"no {name} of this seed")
    values = found.values[name]
    if group == MATCHED:
        return matched_difference(values, groups == VULNERABLE, groups == NON_MEMBER, found.likelihood)
    first, _, second = group.partition("-")
    effect = mean_of(values, groups == first)
    return effect.minus(mean_of(values, groups == second)) if second else effect


def _numbers(effects: list[tuple[Effect, Measured]], group: str) -> dict:
    """Value, interval and p-value (of differences) of one seed, or over seeds and examples."""
    found = effects[0][1]
    each = [effect for effect, _ in effects]
    gap = combine(each, found.clusters)
    row = {"n": int(Effect.mean(each).used.sum()), "temperature": found.temperature}
    return row | _told(gap if "-" in group else Interval(gap.value, gap.low, gap.high))


def _told(found: Interval | Difference) -> dict:
    numbers = {"value": found.value, "ci_low": found.low, "ci_high": found.high}
    return numbers | ({"p_value": found.p} if isinstance(found, Difference) else {})
