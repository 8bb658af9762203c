"""Why an example is memorized: the model's entropy beside what it gives the true tokens (memorization.md 9).

mechanism.csv, at the main cut (after an `@`), for the groups of examples that teacher (T), baseline (B) and student (S)
memorize or not, and for records that nobody was trained on, where the same regions are of predictable text:

  entropy log_p                 mean over examples of the mean entropy over the window (nats), and of the summed
                                log-probability of the window, under `model`
  entropy_less_teacher ...      of baseline or student less that of the teacher, on the same examples
  kl_teacher_student kl_student_teacher   KL per response token, mean over records, of private and of heldout records
                                and their difference (role `private-heldout`)
  extracted_by_temperature      share of examples memorized by students that differ in the temperature alone; T=1 is
                                the control

Natural memorization is low entropy with a log-probability near 0; forced, high entropy with a log-probability near 0;
a student that stays flat where it cannot follow has high entropy and a low log-probability.  This is correlation.
Differences have no p-value here: what is claimed of them is tested in claims.csv.
"""

import json
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd

from attacks.cuts import Extraction, Memorized
from attacks.effects import Effect, combine, mean_of
from attacks.inheritance import sets, taught
from attacks.measures import Sample, blocks, estimate, told
from attacks.overlap import BASELINE, beside, kept, missing, whole
from attacks.signals import segment_mean
from attacks.study import Study, Unresolved
from attacks.tables import SEGMENTS, Tokens

COLUMNS = "student model technique setting group measure role value ci_low ci_high n seed"
ROLES = ("private", "heldout")
DIVERGENCES = {"kl_teacher_student": "kl_ab", "kl_student_teacher": "kl_ba"}
MOST_POINTS = 4000  # rows of the table for the figure, all models together
SAME_BUT_T = ("teacher", "setting", "technique", "init", "recipe", "train_roles", "n_params", "exclude")


def rows(study: Study, memorized: Memorized) -> list[dict]:
    """Rows of mechanism.csv; one that could not be computed has a `reason`, and one row says why there is nothing."""
    couples = taught(study)
    reason = missing(memorized) if couples else "no student whose teacher was scored as well"
    if reason:
        return [{"measure": "mechanism", "reason": reason}]
    found = []
    for teacher, student in couples:
        found += _group_rows(study, memorized, teacher, student)
    found += _divergence_rows(study)
    for series in temperatures(study):
        found += _temperature_rows(study, memorized, series)
    return found


# --- entropy against log-probability ---------------------------------------------------------------------------------


class Trio(NamedTuple):
    """Teacher, baseline and student of one seed and role, and the group of each example (str [n], "" where short)."""

    found: dict[str, Extraction]
    groups: np.ndarray


def _trio(study: Study, memorized: Memorized, teacher: str, student: str, seed: int, role: str) -> Trio:
    runs = (teacher, BASELINE, student)
    found = beside(study, memorized, runs, seed, role, memorized.main)
    full = whole(found[0])
    groups = np.full(len(full), "", object)
    for name, inside in sets(*map(kept, found)).items():
        groups[inside & full] = name
    return Trio(dict(zip(runs, found, strict=True)), groups.astype(str))


def _measures(found: Extraction) -> dict[str, np.ndarray]:
    return {"entropy": found.entropy, "log_p": found.log_p["t=1"]}


def _group_rows(study: Study, memorized: Memorized, teacher: str, student: str) -> Iterator[dict]:
    head = {"student": student, "setting": study.head(student)["setting"]}
    cut = memorized.main
    for role in ROLES:
        trios, reasons = _trios(study, memorized, teacher, student, role)
        if reasons:
            at = {"model": student, "measure": f"entropy@{cut}", "role": role}
            yield head | at | {"reason": "; ".join(dict.fromkeys(reasons))}
        for seed, block in blocks(trios).items():
            for row in _block_rows(study, block, teacher):
                name = {"measure": f"{row['measure']}@{cut}", "role": role, "seed": seed}
                technique = study.head(row["model"])["technique"]
                yield head | row | name | {"technique": technique}


def _trios(
    study: Study, memorized: Memorized, teacher: str, student: str, role: str
) -> tuple[dict[int, Trio], list[str]]:
    trios, reasons = {}, []
    for seed in study.seeds(student):
        try:
            trios[seed] = _trio(study, memorized, teacher, student, seed, role)
        except Unresolved as why:
            reasons.append(str(why))
    return trios, reasons


def _block_rows(study: Study, block: list[Trio], teacher: str) -> Iterator[dict]:
    """Means of every group with two examples or more in each seed, for all three models, and what they differ by."""
    for measure in ("entropy", "log_p"):
        values = [{model: _measures(found)[measure] for model, found in trio.found.items()} for trio in block]
        known = [np.isfinite(list(of.values())).all(axis=0) for of in values]  # a table may have no entropy
        for group in ("all", *sets(*np.zeros((3, 1), bool))):
            inside = [
                ok & (trio.groups != "" if group == "all" else trio.groups == group)
                for ok, trio in zip(known, block, strict=True)
            ]
            if min(each.sum() for each in inside) < 2:
                continue
            for model in block[0].found:
                at = {"model": model, "group": group}
                yield at | {"measure": measure} | _mean(study, block, [of[model] for of in values], inside)
                if model != teacher:
                    with np.errstate(invalid="ignore"):
                        less = [of[model] - of[teacher] for of in values]
                    yield at | {"measure": f"{measure}_less_teacher"} | _mean(study, block, less, inside)


def _mean(study: Study, block: list[Trio], values: list[np.ndarray], inside: list[np.ndarray]) -> dict:
    """Mean of one group over examples, and over seeds where the block has several; n: examples in any of them."""
    effects = [mean_of(np.where(i, v, 0.0), i) for v, i in zip(values, inside, strict=True)]
    return _numbers(effects, study.clusters(next(iter(block[0].found.values())).ids))


def _numbers(effects: list[Effect], clusters: np.ndarray | None) -> dict:
    return told(combine(effects, clusters)) | {"n": int(Effect.mean(effects).used.sum())}


def points(study: Study, memorized: Memorized) -> pd.DataFrame:
    """One row per model and example for the figure: student, model, seed, example_id, group, entropy, log_p.

    Private records, the first seed of each student; where there are more than MOST_POINTS, every group keeps its share,
    but at least 50 examples: those that come first by id, which is a hash of the content.
    """
    columns = ["student", "model", "seed", "example_id", "group", "entropy", "log_p"]
    frames = []
    couples = [] if missing(memorized) else taught(study)
    for teacher, student in couples:
        trios, _ = _trios(study, memorized, teacher, student, "private")
        for seed, trio in list(trios.items())[:1]:
            chosen = _thinned(trio.groups, MOST_POINTS // (3 * len(couples)))
            for model, found in trio.found.items():
                at = {"student": student, "model": model, "seed": seed, "example_id": found.ids[chosen]}
                values = {name: value[chosen] for name, value in _measures(found).items()}
                frames.append(pd.DataFrame(at | {"group": trio.groups[chosen]} | values))
    return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)


def _thinned(groups: np.ndarray, most: int) -> np.ndarray:
    """Indices of the examples to draw."""
    n = int((groups != "").sum())
    chosen = []
    for group in np.unique(groups[groups != ""]):
        inside = np.flatnonzero(groups == group)
        chosen.append(inside[: max(50, int(np.ceil(len(inside) * most / n)))])
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)


# --- how far the student is from its teacher -------------------------------------------------------------------------


def _divergence_rows(study: Study) -> Iterator[dict]:
    """KL per token of every run that was scored beside a teacher."""
    for run in study.runs:
        names = {name for seed in study.seeds(run) for name in study.tables[run, seed].variants}
        for variant in sorted(name for name in names if name.startswith("pair:")):
            yield from _pair_rows(study, run, variant)


def _pair_rows(study: Study, run: str, variant: str) -> Iterator[dict]:
    found: dict[int, tuple[dict, np.ndarray, np.ndarray]] = {}
    for seed in study.seeds(run):
        table = study.tables[run, seed].variants.get(variant)
        if table is not None and set(ROLES) <= set(table.files):
            both = [table.load(role, DIVERGENCES.values()).select([SEGMENTS["response"]]) for role in ROLES]
            ids = np.concatenate([tokens.ids for tokens in both])
            means = {
                name: np.concatenate([_per_token(column, tokens) for tokens in both])
                for name, column in DIVERGENCES.items()
                if all(column in tokens.token for tokens in both)
            }
            found[seed] = means, np.arange(len(ids)) < len(both[0].ids), ids
    for seed, block in blocks(found).items():
        alike = all(np.array_equal(ids, block[0][2]) for _, _, ids in block)
        for name in DIVERGENCES if alike else ():
            if all(name in means for means, _, _ in block):
                at = {"student": run, "group": "all", "measure": name, "seed": seed} | study.head(run)
                for role, numbers in _by_role(study, block, name):
                    yield at | {"role": role} | numbers


def _per_token(column: str, tokens: Tokens) -> np.ndarray:
    return np.where(tokens.lengths > 0, segment_mean(tokens.token[column], tokens), np.nan)


def _by_role(study: Study, block: list[tuple], name: str) -> Iterator[tuple[str, dict]]:
    clusters = study.clusters(block[0][2])
    sides = []
    for private in (True, False):
        usable = [np.isfinite(means[name]) & (members == private) for means, members, _ in block]
        if min(each.sum() for each in usable) < 2:
            return
        values = [np.nan_to_num(means[name]) for means, _, _ in block]
        sides.append([mean_of(v, u) for v, u in zip(values, usable, strict=True)])
    gaps = [a.minus(b) for a, b in zip(*sides, strict=True)]
    for role, effects in zip((*ROLES, "private-heldout"), (*sides, gaps), strict=True):
        yield role, _numbers(effects, clusters)


# --- temperature -----------------------------------------------------------------------------------------------------


def temperatures(study: Study) -> list[dict[float, str]]:
    """Students that differ in the temperature of distillation alone: by T, in rising order; two or more of them.

    Either both temperatures are T, or the student's alone is T and the teacher's 1.  Of two students alike in all this,
    T as well, the first stands in the series; a note says so.
    """
    found: dict[tuple, dict[float, str]] = {}
    again: list[tuple[dict[float, str], float, str]] = []
    for run in study.students:
        about = study.provenance(run)
        if about.get("objective") is None:
            continue
        rest = dict(about["objective"])  # of what is at its default nothing is listed
        T, of_teacher = float(rest.pop("student_T", 1.0)), float(rest.pop("teacher_T", 1.0))
        alike = json.dumps([{key: about.get(key) for key in SAME_BUT_T}, rest], sort_keys=True)
        for form, fits in (("both", of_teacher == T), ("student", of_teacher == 1.0)):
            if fits:
                series = found.setdefault((alike, form), {})
                if T in series:
                    again.append((series, T, run))
                else:
                    series[T] = run
    for series, T, run in again:
        if len(series) > 1:
            study.note(f"{run} is trained as {series[T]} is, at the same temperature: left out of the series over T.")
    ordered = [dict(sorted(series.items())) for series in found.values() if len(series) > 1]
    return [series for i, series in enumerate(ordered) if series not in ordered[:i]]


def swept(
    study: Study, memorized: Memorized, series: dict[float, str], role: str
) -> tuple[dict[int, list[Extraction]], list[str]]:
    """By seed, the extractions of a series in the order of T; and why a seed has none."""
    found, reasons = {}, []
    for seed in study.seeds(next(iter(series.values()))):
        try:
            found[seed] = beside(study, memorized, tuple(series.values()), seed, role, memorized.main)
            whole(found[seed][0])
        except Unresolved as why:
            found.pop(seed, None)
            reasons.append(str(why))
    return found, reasons


def _temperature_rows(study: Study, memorized: Memorized, series: dict[float, str]) -> Iterator[dict]:
    measure = f"extracted_by_temperature@{memorized.main}"
    for role in ROLES:
        found, reasons = swept(study, memorized, series, role)
        if reasons:
            first = next(iter(series.values()))
            at = {"student": first, "measure": measure, "role": role}
            yield study.head(first) | at | {"reason": "; ".join(dict.fromkeys(reasons))}
        for at, (T, run) in enumerate(series.items()):
            row = {"student": run, "group": f"T={T:g}", "measure": measure, "role": role} | study.head(run)
            samples = {seed: Sample(each[at].ids, kept(each[at]), each[at].full) for seed, each in found.items()}
            for seed, block in blocks(samples).items():
                try:
                    yield row | {"seed": seed, "n": block[0].n} | told(estimate(study, block))
                except Unresolved as why:
                    yield row | {"seed": seed, "reason": str(why)}
