"""What a student memorizes, and whether its teacher and the same model trained without a teacher memorize it as well.

T, B, S: examples that the teacher, the baseline (`direct`) and the student memorize at a cut (memorization.md 7;
borkar2026).  inheritance.csv has, per seed, for the union and the intersection over seeds, with the cut after an `@`:

  memorized            examples in T, B, S, T&B and T not B, of all examples whose suffix is whole
  region               the seven regions and what nobody memorizes, of the same
  easy_share           |T&B&S| / |S|              retention           |T&B&S| / |T&B|
  inheritance_rate     |T&S not B| / |T not B|    coverage            |T&B| / |B|
  inherited_share      |T&S not B| / |S|          student_only_share  |S only| / |S|
  seed_noise_rate      |T&B2 not B| / |T not B|, B2 the baseline of the next seed: what chance alone `inherits`
  inherited_less_noise inheritance_rate less seed_noise_rate, paired, with a p-value
  recurrence           examples that a model memorizes in so many of its seeds, where it has several
  forgotten_core       examples in B of every seed, and of these the ones in S of no seed
  transfer             region `t>r`: examples of which the teacher matches more than r of the window before its first
                       miss; value: the mean share that the student matches before its own.  The same with `direct`,
                       `null` and the base as student
  jaccard containment memorized_difference inheritance_difference     see attacks/overlap.py

`heldout_`: the same on records that nobody was trained on.  `coincidence_`: the setting is disjoint.  There the student
never saw the text: what it shares with its teacher is predictable text or has come through the teacher, and its overlap
with the baseline is none of its own memory.  The two never stand in one sentence.  Transfer, jaccard and containment
are named by what their own two models were trained on.  Unions and intersections take a model with one seed as it is.
"""

from collections.abc import Iterator

import numpy as np

from attacks.cuts import Cut, Memorized
from attacks.effects import combine, mean_of, paired, units, within
from attacks.measures import told
from attacks.overlap import (
    BASELINE,
    COINCIDENCE,
    beside,
    counted,
    kept,
    matched_share,
    missing,
    overlap_rows,
    prefix_of,
    technique_rows,
    whole,
)
from attacks.statistics import correct
from attacks.study import Study, Unresolved

COLUMNS = (
    "teacher baseline student setting measure region count denominator value ci_low ci_high p_value p_corrected seed"
)
REGIONS = {  # in teacher, baseline, student
    "T&B&S": (True, True, True),
    "T&B not S": (True, True, False),
    "T&S not B": (True, False, True),
    "B&S not T": (False, True, True),
    "T only": (True, False, False),
    "B only": (False, True, False),
    "S only": (False, False, True),
    "none": (False, False, False),
}
RATIOS = {  # measure: region, what it is a share of
    "easy_share": ("T&B&S", "S"),
    "inheritance_rate": ("T&S not B", "T not B"),
    "inherited_share": ("T&S not B", "S"),
    "retention": ("T&B&S", "T&B"),
    "coverage": ("T&B", "B"),
    "student_only_share": ("S only", "S"),
}
OVER_SEEDS = ("union", "intersection")
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 0.9999)
CONTROLS = (BASELINE, "null", "base_student")  # in the student's place
Trio = dict[str, np.ndarray]  # T, B, S: bool [n]


def sets(teacher: np.ndarray, baseline: np.ndarray, student: np.ndarray) -> dict[str, np.ndarray]:
    """The regions of three sets of examples (bool [n] each) by name, bool [n] each: every example is in exactly one."""
    inside = np.stack([teacher, baseline, student])
    return {name: (inside == np.array(pattern)[:, None]).all(axis=0) for name, pattern in REGIONS.items()}


def totals(trio: Trio) -> dict[str, np.ndarray]:
    """The sets that shares are taken of, bool [n] each."""
    return trio | {"T&B": trio["T"] & trio["B"], "T not B": trio["T"] & ~trio["B"]}


def taught(study: Study) -> list[tuple[str, str]]:
    """(teacher, student) of every student whose teacher was scored as well."""
    found = [(study.provenance(run).get("teacher"), run) for run in study.students]
    return [(teacher, run) for teacher, run in found if teacher in study.runs]


def _prefix(setting: str) -> str:
    return COINCIDENCE if setting == "disjoint" else ""


def rows(study: Study, memorized: Memorized) -> list[dict]:
    """Rows of inheritance.csv; one that could not be computed has a `reason`, and one row says why there is nothing.

    `p_corrected`: Holm over all rows of one measure, setting and seed.
    """
    couples = taught(study)
    reason = missing(memorized) if couples else "no student whose teacher was scored as well"
    if reason:
        return [{"measure": "inheritance", "reason": reason}]
    found = [row for teacher, student in couples for row in _student_rows(study, memorized, teacher, student)]
    families: dict[tuple[str, str], list[str]] = {}
    for teacher, student in couples:
        families.setdefault((teacher, study.head(student)["setting"]), []).append(student)
    for (teacher, setting), students in families.items():
        head = {"teacher": teacher, "baseline": BASELINE, "setting": setting}
        others = [run for run in study.runs if run.startswith(BASELINE)]
        controls = [run for run in CONTROLS if run in study.runs]
        for run in (*students, *controls):
            found += _transfer_rows(study, memorized, head | {"student": run})
        found += overlap_rows(study, memorized, head, [teacher, *others, *students])
        found += technique_rows(study, memorized, head, teacher, students, _prefix(setting))
    correct(found, lambda row: (row["measure"], row["setting"], row["seed"]))
    return found


# --- regions ---------------------------------------------------------------------------------------------------------


def _student_rows(study: Study, memorized: Memorized, teacher: str, student: str) -> Iterator[dict]:
    setting = study.head(student)["setting"]
    head = {"teacher": teacher, "baseline": BASELINE, "student": student, "setting": setting}
    if BASELINE not in study.runs:
        reason = f"no run '{BASELINE}' was scored: without a baseline nothing can be told to be inherited"
        yield head | {"measure": "inheritance", "seed": "all", "reason": reason}
        return
    wanted = [("private", cut, "") for cut in memorized.cuts] + [("heldout", memorized.main, "heldout_")]
    for role, cut, control in wanted:
        trios, reasons = {}, []
        ids = full = None
        for seed in study.seeds(student):
            try:
                ids, full, trios[seed] = _trio(study, memorized, (teacher, BASELINE, student), seed, role, cut, ids)
            except Unresolved as why:
                reasons.append(str(why))
        name = _prefix(setting) + control
        if reasons:
            at = {"measure": f"{name}region@{cut}", "seed": "all"}
            yield head | at | {"reason": "; ".join(dict.fromkeys(reasons))}
        own = {
            letter: [study.match(run, seed) for seed in trios]
            for letter, run in zip("TBS", (teacher, BASELINE, student), strict=True)
        }
        if len(trios) > 1:
            trios |= _over_seeds(trios)
        for seed, trio in trios.items():
            for row in _regions(study, ids, full, trio):
                seeds = own.get(row["region"]) if row["measure"] == "memorized" and seed in OVER_SEEDS else None
                if seeds is None or len(set(seeds)) > 1:
                    yield head | row | {"measure": f"{name}{row['measure']}@{cut}", "seed": seed}
        if role == "private":
            for row in _seed_rows(study, ids, full, trios, own):
                yield head | row | {"measure": f"{name}{row['measure']}@{cut}"}


def _trio(
    study: Study, memorized: Memorized, runs: tuple[str, ...], seed: int, role: str, cut: Cut, ids: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, Trio]:
    found = beside(study, memorized, runs, seed, role, cut)
    if ids is not None and not np.array_equal(ids, found[0].ids):
        raise Unresolved(f"seed {seed} was scored on other examples: no union or intersection with it")
    return found[0].ids, whole(found[0]), dict(zip("TBS", map(kept, found), strict=True))


def _over_seeds(trios: dict[int, Trio]) -> dict[str, Trio]:
    stacked = {name: np.stack([trio[name] for trio in trios.values()]) for name in "TBS"}
    return {
        "union": {name: each.any(axis=0) for name, each in stacked.items()},
        "intersection": {name: each.all(axis=0) for name, each in stacked.items()},
    }


def _regions(study: Study, ids: np.ndarray, full: np.ndarray, trio: Trio) -> Iterator[dict]:
    regions, whole_sets = sets(*trio.values()), totals(trio)
    for measure, named in (("memorized", whole_sets), ("region", regions)):
        for region, inside in named.items():
            yield {"measure": measure, "region": region} | counted(study, ids, inside, full)
    for measure, (region, of) in RATIOS.items():
        yield {"measure": measure, "region": region} | counted(
            study, ids, (regions | whole_sets)[region], whole_sets[of]
        )


def _seed_rows(
    study: Study, ids: np.ndarray, full: np.ndarray, trios: dict[int | str, Trio], own: dict[str, list[int]]
) -> Iterator[dict]:
    """What only several seeds can tell: noise of the baseline, how often an example recurs, what is never learnt.

    own: the seeds of T, B and S in the trios; a model with one seed stands in all of them, and has none of these rows.
    """
    seeds = [seed for seed in trios if seed not in OVER_SEEDS]
    if len(seeds) < 2:
        return
    for i, (seed, following) in enumerate(zip(seeds, [*seeds[1:], seeds[0]], strict=True)):
        if own["B"][i] == own["B"][(i + 1) % len(seeds)]:
            continue
        alone = totals(trios[seed])["T not B"]
        noise, inherited = trios[following]["B"] & alone, trios[seed]["S"] & alone
        yield {"measure": "seed_noise_rate", "region": "T&B2 not B", "seed": seed} | counted(study, ids, noise, alone)
        if alone.any():
            gap = paired(study, ids, inherited, noise, alone)
            at = {"measure": "inherited_less_noise", "region": "T not B", "seed": seed}
            count = {"count": int((inherited ^ noise).sum()), "denominator": int(alone.sum())}
            yield at | count | told(gap) | {"p_value": gap.p}
    several = [name for name in "TBS" if len(set(own[name])) > 1]
    for name in several:
        times = np.sum([trios[seed][name] for seed in seeds], axis=0)
        for k in range(1, len(seeds) + 1):
            at = {"measure": "recurrence", "region": f"{name} in {k} of {len(seeds)}", "seed": "all"}
            yield at | counted(study, ids, times == k, full)
    if {"B", "S"} <= set(several):
        core, ever = trios["intersection"]["B"], trios["union"]["S"]
        at = {"measure": "forgotten_core", "region": "B always, S never", "seed": "all"}
        yield at | counted(study, ids, core & ~ever, core)


# --- teacher-conditioned transfer ------------------------------------------------------------------------------------


def _transfer_rows(study: Study, memorized: Memorized, head: dict) -> Iterator[dict]:
    cut, run = memorized.main, head["student"]
    prefix = prefix_of(study, head["teacher"], run)
    for seed in study.seeds(run):
        at = head | {"measure": f"{prefix}transfer@{cut}", "seed": seed}
        try:
            teacher, student = beside(study, memorized, (head["teacher"], run), seed, "private", cut)
            full = whole(teacher)
        except Unresolved as why:
            yield at | {"reason": str(why)}
            continue
        taken, given = matched_share(student), matched_share(teacher)
        clusters = study.clusters(teacher.ids)
        for least in THRESHOLDS:
            chosen = full & (given > least)
            row = at | {"region": f"t>{least:g}", "count": int(chosen.sum()), "denominator": int(full.sum())}
            if chosen.sum() > 1:
                row |= told(
                    within(combine([mean_of(taken, chosen)], clusters), 0, 1, units(study, teacher.ids, chosen))
                )
            yield row
