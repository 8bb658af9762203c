"""What every model memorizes, by role, cut and seed, next to what it gives away of records it was never trained on.

memorization.csv has one row per model, measure, task, role and seed.  Role `private-heldout` is the gap of the two; a
canary counts as `canary_in` where its coin put it into the training data of the run or of its teacher, `canary_out`
where it did not.  Names carry the cut (`k=50`: after the prompt; `a=50,k=50`: after 50 tokens of a plain text):

  extracted@..       share of the examples with a whole suffix that greedy decoding gives verbatim
  exact_response@..  the same of all examples, a shorter one being given whole up to and with its EOS (singh2025)
  short@..           share of all examples whose suffix is shorter; they are in no other measure but the one before
  matched@.. accuracy@.. strength@..  means: leading tokens right, share of tokens right after the true history,
                     extraction strength
  near_ties@..       share of verdicts within NEAR_TIE of another: those that generation would have to settle
  log_p@..;scheme    mean log-probability of the suffix under a decoding scheme, of those that it can draw at all
  drawable@..;scheme share of the suffixes that a truncated scheme can draw
  np_extractable@..;scheme;n=..;p=..  share that n samples meet with probability p (main cut only)

and the rows of attacks/near_verbatim.py, attacks/coverage.py and attacks/extraction_benchmark.py.

Tasks: `all`, a task of the data, `repeats=<r>`, `placement=<p>`, `placement=<p>,repeats=<r>`, `length>=<k>` and
`length<<k>`; all but `all` at the main cut alone.  Canaries have one length: they count in every window with a token.
A placement says in whose data a canary lies, `teacher_only student_only both`.  Of a student that is trained on the
private records as its teacher is, all that lies there has `both`, and what lies in the public ones `neither`.
"""

from collections.abc import Callable, Iterator
from itertools import product

import numpy as np
import pandas as pd

from attacks.coverage import coverage_rows
from attacks.cuts import ROLES, Cut, Extraction, Memorized
from attacks.extraction_benchmark import recall_rows
from attacks.measures import GAPS, BySeed, Sample, measure_rows
from attacks.near_verbatim import near_verbatim_rows
from attacks.probabilistic import extractable
from attacks.study import CANARIES, Study, Unresolved

COLUMNS = "model technique setting measure task role value ci_low ci_high n seed"
SAMPLES = (1, 100, 10_000)
CHANCES = (0.5, 0.9)
Measure = Callable[[Extraction], Sample]
Found = dict[str, dict[int, Extraction]]  # by role and seed


def memorization_rows(study: Study, memorized: Memorized) -> list[dict]:
    """Rows of memorization.csv for all runs; one that could not be computed has a `reason` instead of a value."""
    rows = [*near_verbatim_rows(study, memorized), *recall_rows(study, memorized), *coverage_rows(study)]
    if not memorized.cuts:
        return [*rows, {"measure": "extracted", "task": "all", "reason": "no text is long enough for any cut"}]
    for run in study.runs:
        for cut in memorized.cuts:
            found, reasons = extractions(study, memorized, run, cut)
            at = study.head(run) | {"measure": f"extracted@{cut}", "task": "all"}
            rows += [at | {"role": role, "seed": seed, "reason": why} for (role, seed), why in reasons.items()]
            rows += _cut_rows(study, memorized, run, cut, found)
    return rows


def extractions(
    study: Study, memorized: Memorized, run: str, cut: Cut, roles: tuple[str, ...] = ROLES
) -> tuple[Found, dict[tuple[str, int], str]]:
    """Extractions of a run at a cut by role and seed, and the reasons of those that are not there."""
    found: Found = {}
    reasons = {}
    for seed in study.seeds(run):
        for role in (role for role in memorized.roles(run, seed) if role in roles):
            try:
                found.setdefault(role, {})[seed] = memorized.of(run, seed, role, cut)
            except Unresolved as why:
                reasons[role, seed] = str(why)
    return found, reasons


def extraction_table(study: Study, memorized: Memorized) -> pd.DataFrame:
    """Every example of every model, role and cut: extraction.parquet, from which all of the above can be made again."""
    frames = [
        pd.DataFrame(
            {"model": run, "seed": seed, "role": role, "example_id": e.ids, "task": e.task}
            | {"prefix": cut.prefix, "suffix": cut.suffix, "length": e.length, "window": e.window}
            | {"matched": e.matched, "extracted": e.extracted, "near_tie": e.near_tie, "log_p": e.log_p["t=1"]}
        )
        for run in study.runs
        for cut in memorized.cuts
        for role, by_seed in extractions(study, memorized, run, cut)[0].items()
        for seed, e in by_seed.items()
    ]
    columns = "model seed role example_id task prefix suffix length window matched extracted near_tie log_p".split()
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)


# --- measures: from an extraction to a sample ------------------------------------------------------------------------


def verdicts(cut: Cut) -> dict[str, Measure]:
    """What is also told by task and stratum."""
    return {
        f"extracted@{cut}": lambda e: Sample(e.ids, e.extracted, e.full),
        f"exact_response@{cut}": lambda e: Sample(e.ids, e.extracted, e.window > 0),
        f"matched@{cut}": lambda e: Sample(e.ids, e.matched, e.full, (0, cut.suffix)),
    }


def _measures(cut: Cut) -> dict[str, Measure]:
    return verdicts(cut) | {
        f"short@{cut}": lambda e: Sample(e.ids, ~e.full, np.ones(len(e.ids), bool)),
        f"accuracy@{cut}": lambda e: Sample(e.ids, e.accuracy, e.full),
        f"strength@{cut}": lambda e: Sample(e.ids, e.strength, e.full),
        f"near_ties@{cut}": lambda e: Sample(e.ids, e.near_tie, e.full),
    }


def _likelihoods(cut: Cut, scheme: str) -> dict[str, Measure]:
    name = f"@{cut};{scheme}"
    drawable = lambda e: np.isfinite(e.log_p[scheme])
    found = {f"log_p{name}": lambda e: Sample(e.ids, e.log_p[scheme], e.full & drawable(e), (-np.inf, 0))}
    return found if _is_whole(scheme) else found | {f"drawable{name}": lambda e: Sample(e.ids, drawable(e), e.full)}


def _discoverable(cut: Cut, scheme: str) -> dict[str, Measure]:
    """(n, p)-discoverable shares on the grid of SAMPLES and CHANCES."""
    return {
        f"np_extractable@{cut};{scheme};n={n};p={p:g}": lambda e, n=n, p=p: Sample(
            e.ids, extractable(e.log_p[scheme], n, p), e.full
        )
        for n, p in product(SAMPLES, CHANCES)
    }


def _is_whole(scheme: str) -> bool:
    """Can the scheme draw every suffix?"""
    return scheme.startswith("t=")


# --- rows of one run at one cut --------------------------------------------------------------------------------------


def _cut_rows(study: Study, memorized: Memorized, run: str, cut: Cut, found: Found) -> Iterator[dict]:
    own = {role: by_seed for role, by_seed in found.items() if role != "canary"}
    main = cut == memorized.main
    for name, measure in _measures(cut).items():
        yield from measure_rows(study, run, name, _sampled(own, measure))
    for scheme in dict.fromkeys(s for by_seed in own.values() for e in by_seed.values() for s in e.log_p):
        for name, measure in (_likelihoods(cut, scheme) | (_discoverable(cut, scheme) if main else {})).items():
            # Suffixes that a truncated scheme can draw are others in each role: their means are not subtracted, and
            # where there are none, `drawable` says so.
            partly = name.startswith("log_p") and not _is_whole(scheme)
            found_rows = measure_rows(study, run, name, _sampled(own, measure), gaps=not partly)
            yield from (row for row in found_rows if not (partly and "reason" in row))
    if main:
        for task, groups in _strata(study, run, own, cut).items():
            for name, measure in verdicts(cut).items():
                if task.startswith("length") and not name.startswith("exact_response"):
                    continue  # all others are of whole suffixes anyway
                yield from measure_rows(study, run, name, _sampled(own, measure, groups), task)
    if "canary" in found:
        yield from _canary_rows(study, run, cut, found["canary"], strata=main)


def _sampled(found: Found, measure: Measure, groups: dict | None = None) -> dict[str, BySeed]:
    """groups: by role and seed, the examples of a stratum, bool [n]; a role without any is left out."""
    sampled = {role: {seed: measure(e) for seed, e in by_seed.items()} for role, by_seed in found.items()}
    if groups is None:
        return sampled
    return {
        role: {seed: sample.within(groups[role, seed]) for seed, sample in by_seed.items()}
        for role, by_seed in sampled.items()
    }


def _strata(study: Study, run: str, found: Found, cut: Cut) -> dict[str, dict[tuple[str, int], np.ndarray]]:
    """Tasks, lengths and repeats: by task, then by role and seed, bool [n].

    What is repeated is compared with all held-out examples, whatever they were drawn for, unless the run (a swap, or
    its student) was trained on them.
    """
    each = [(role, seed, e) for role, by_seed in found.items() for seed, e in by_seed.items()]
    strata = {}
    tasks = sorted({str(task) for *_, e in each for task in np.unique(e.task)})
    for task in tasks if len(tasks) > 1 else ():
        strata[task] = {(role, seed): e.task == task for role, seed, e in each}
    if any(not e.full.all() for *_, e in each):
        strata[f"length>={cut.suffix}"] = {(role, seed): e.full for role, seed, e in each}
        strata[f"length<{cut.suffix}"] = {(role, seed): ~e.full for role, seed, e in each}
    trained = {"private", *study.trained_on(run)}
    repeats = {(role, seed): repeats_of(study, e.ids) for role, seed, e in each if role in trained}
    times = sorted({int(r) for found in repeats.values() for r in np.unique(found)})
    for r in times if len(times) > 1 else ():
        strata[f"repeats={r}"] = {
            (role, seed): repeats[role, seed] == r if (role, seed) in repeats else np.ones(len(e.ids), bool)
            for role, seed, e in each
        }
    return strata


def repeats_of(study: Study, ids: np.ndarray) -> np.ndarray:
    """How often each record was trained on, by the runs that were trained on its role [n]; 1 where nobody says."""
    try:
        rows = study.split_rows(ids)
    except Unresolved:
        return np.ones(len(ids), int)
    return rows["repeats"].to_numpy() if "repeats" in rows else np.ones(len(ids), int)


# --- canaries --------------------------------------------------------------------------------------------------------


def _canary_rows(study: Study, run: str, cut: Cut, found: dict[int, Extraction], strata: bool) -> Iterator[dict]:
    """Canaries by coin; by placement and repeats too with `strata`."""
    first = next(iter(found.values()))
    try:
        drawn = study.split_rows(first.ids)
    except Unresolved as why:
        yield study.head(run) | {
            "measure": f"exact_response@{cut}",
            "task": "all",
            "role": "canary",
            "reason": str(why),
        }
        return
    placement, inside = drawn["placement"].to_numpy(str), drawn["coin"].to_numpy() == 1
    groups = {"all": np.isin(placement, study.carried(run))}
    placement = _met(study, run, placement)
    if strata:
        times = repeats_of(study, first.ids)
        for name in sorted(set(placement) - {"none"}):
            groups[f"placement={name}"] = placement == name
            repeated = {f"placement={name},repeats={r}": (placement == name) & (times == r) for r in np.unique(times)}
            groups |= {task: group for task, group in repeated.items() if group.any()}
    wanted = {
        f"exact_response@{cut}": lambda e: Sample(e.ids, e.extracted, e.window > 0),
        f"matched@{cut}": lambda e: Sample(e.ids, e.matched, e.window > 0, (0, max(e.window, default=0))),
        f"log_p@{cut};t=1": lambda e: Sample(e.ids, e.log_p["t=1"], e.window > 0, (-np.inf, 0)),
    }
    for name, measure in wanted.items():
        for task, group in groups.items():
            of = {
                role: {seed: measure(e).within(group & (inside == (role == "canary_in"))) for seed, e in found.items()}
                for role in GAPS[CANARIES]
            }
            yield from measure_rows(study, run, name, of, task)


def _met(study: Study, run: str, placement: np.ndarray) -> np.ndarray:
    """Placements were named for students of public data: of others, who met the canaries [n]."""
    told = study.provenance(run)
    roles = told.get("train_roles") or ()
    if not told.get("teacher") or "private" not in roles:
        return placement
    placement = np.where(placement == "teacher_only", "both", placement)
    return placement if "public" in roles else np.where(placement == "student_only", "neither", placement)
