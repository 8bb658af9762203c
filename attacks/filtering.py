"""The list of training examples that a student is expected to memorize, and what leaving them out does.

Written as `list.parquet`, a row for every private example that was scored: example_id, and

  predicted     flagged by the paper's classifier, which saw all labels (bool)
  transferred   flagged by a classifier fitted on the other half of the examples: its own label was never seen (bool)
  random        by a seeded hash, of each number of repeats as many as predicted (bool): what is repeated is memorized,
                so that a draw from all texts would leave out much less of the training
  probability   of the paper's classifier; NaN where the text is shorter than the cut, which is never flagged or drawn

filter_rows (protocol `filter`, features: the form) compare the student distilled again without them with the first one,
on all private examples:

  memorized_before memorized_after new   shares: of the first student, of the second, and what only the second memorizes
  difference                             after less before, paired on the examples
  difference_to_random                   after, less after the random filter, paired likewise; only where both left out
                                         as many
  removed removed_count                  left out, of the private examples that were scored
  removed_exposures                      left out, of all that it would have been trained on, repeats counted
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import expit

from attacks import files
from attacks.classifier import TooFew, crossed, fitted_on, need
from attacks.cuts import Memorized
from attacks.effects import combine, mean_of, paired, share
from attacks.features import PAPER, ROLE, TEACHER_ONLY, candidates, hashed
from attacks.measures import told
from attacks.memorization import repeats_of
from attacks.overlap import beside, kept, whole
from attacks.resampling import Resampler
from attacks.statistics import Difference, Interval
from attacks.study import Study, Unresolved
from attacks.tables import TableError, read_scores, read_splits

DEFAULTS = {
    "student": "",  # a run
    "student_seed": None,  # whose labels; None: its first
    "cuts": (),  # (prefix, suffix) pairs; the longest that fits is the one that counts, see attacks/cuts.py
    "features": "paper",  # or teacher_only
    "seed": 0,
}
FORMS = ["predicted", "transferred", "random"]
SETS = {"paper": PAPER, "teacher_only": TEACHER_ONLY}
log = logging.getLogger(__name__)


def write_filter(scores_dir: str | Path, out_dir: str | Path, settings: dict) -> dict[str, int]:
    """Write the list for one student into `out_dir`; returns how many are memorized, predicted and so on.

    settings: keys of DEFAULTS.  Where too few are memorized to learn from, no list is written, a warning says so, and
    nothing is returned.  Raises TableError where scores are missing, ValueError on settings.
    """
    if unknown := set(settings) - set(DEFAULTS):
        raise ValueError(f"unknown settings {', '.join(sorted(unknown))}; known are {', '.join(DEFAULTS)}")
    full = DEFAULTS | settings
    if full["features"] not in SETS:
        raise ValueError(f"features are {full['features']!r}; known are {', '.join(SETS)}")
    tables = {(t.run, t.seed): t for t in read_scores(scores_dir)}
    study = Study({"seed": full["seed"]}, tables, read_splits(scores_dir), Resampler(1, full["seed"]))
    student = full["student"]
    if student not in study.runs:
        raise TableError(f"{scores_dir}: no score table of {student!r}; there are {', '.join(study.runs)}")
    try:
        frame, counts = _list(study, full)
    except TooFew as why:
        log.warning("no list for %s: %s", student, why)
        return {}
    except Unresolved as why:
        raise TableError(f"{scores_dir}: no list for {student}: {why}") from why
    files.write(Path(out_dir), [("list.parquet", frame.to_parquet(compression="zstd", index=False))])
    return counts


def _list(study: Study, settings: dict) -> tuple[pd.DataFrame, dict[str, int]]:
    student, seed, names = settings["student"], settings["seed"], SETS[settings["features"]]
    of = study.seeds(student)[0] if settings["student_seed"] is None else settings["student_seed"]
    memorized = Memorized(study, settings["cuts"])
    found = candidates(study, memorized, student, of)
    need(found)
    everything = np.ones(len(found.ids), bool)
    own = fitted_on(found, names, everything, seed).score(found.matrix(names))
    other = crossed(found, found, names, seed)
    ids = memorized.of(student, of, ROLE, memorized.main).ids
    frame = pd.DataFrame({"example_id": ids}).merge(
        pd.DataFrame(
            {"example_id": found.ids, "predicted": own > 0, "transferred": other > 0}
            | {"random": _as_many(own > 0, repeats_of(study, found.ids), hashed(f"random {seed}", found.ids))}
            | {"probability": expit(own)}
        ),
        how="left",
    )
    frame[FORMS] = frame[FORMS].eq(True)
    counts = {"memorized": int(found.memorized.sum()), "examples": len(ids)}
    return frame, counts | {form: int(frame[form].sum()) for form in FORMS}


def _as_many(flagged: np.ndarray, repeats: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Of each number of repeats as many as are flagged, those with the lowest keys: bool [n]."""
    _, codes, sizes = np.unique(repeats, return_inverse=True, return_counts=True)
    order = np.lexsort((keys, codes))
    place = np.empty(len(keys), int)
    place[order] = np.arange(len(keys)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return place < np.bincount(codes, flagged)[codes]


# --- what it does -----------------------------------------------------------------------------------------------------


def filter_rows(study: Study, memorized: Memorized) -> list[dict]:
    """Rows of protocol `filter` of prediction.csv, for every run that was trained without what a filter found."""
    again = {run: study.provenance(run)["exclude"] for run in study.runs if study.provenance(run).get("exclude")}
    found = []
    for run, excluded in study.settings.get("filtered", {}).items():
        if run not in again:
            first = excluded.partition(":")[2]
            why = f"not trained: no list of what {first} memorizes (too few texts to learn from, or no filter stage)"
            found.append({"student": run, "protocol": "filter", "measure": "difference", "reason": why})
    for run, excluded in again.items():
        form, _, first = excluded.partition(":")
        head = {"student": run, "setting": study.head(run)["setting"], "protocol": "filter", "features": form}
        random = next((r for r, e in again.items() if e == f"random:{first}" and r != run), None)
        if first not in study.runs:
            found.append(head | {"measure": "difference", "reason": f"{first} was not scored"})
            continue
        try:
            found += _compared(study, memorized, head, run, first, random)
        except Unresolved as why:
            found.append(head | {"measure": "difference", "reason": str(why)})
    return found


def _compared(
    study: Study, memorized: Memorized, head: dict, run: str, first: str, random: str | None
) -> Iterator[dict]:
    """Of each seed, and over the seeds where there are several."""
    cut, gaps = memorized.main, {"difference": [], "difference_to_random": []}
    named = lambda measure: head | {"measure": f"{measure}@{cut}"}
    for seed in study.seeds(run):
        after, before = map(kept, (both := beside(study, memorized, (run, first), seed, ROLE, cut)))
        ids, full = both[0].ids, whole(both[0])
        at = {"seed": seed, "n": int(full.sum())}
        sets = {"memorized_before": before, "memorized_after": after, "new": after & ~before}
        for measure, hits in sets.items():
            yield named(measure) | at | told(share(study, ids, hits, full))
        others = {"difference": before}
        own = study.tables[run, seed].provenance
        number, share_of = own.get("excluded") or 0, own.get("excluded_exposures")
        if random is not None and number == study.provenance(random).get("excluded"):
            others["difference_to_random"] = kept(beside(study, memorized, (run, random), seed, ROLE, cut)[1])
        for measure, other in others.items():
            yield named(measure) | at | told(_bounded(paired(study, ids, after, other, full)))
            gaps[measure].append(mean_of(after.astype(float) - other, full))
        yield head | {"measure": "removed_count", "seed": seed, "value": number}
        yield head | {"measure": "removed", "seed": seed, "value": number / len(ids), "n": len(ids)}
        if share_of is not None:
            yield head | {"measure": "removed_exposures", "seed": seed, "value": share_of}
    for measure, effects in gaps.items():
        if len(effects) > 1:
            found = combine(effects, study.clusters(ids))
            yield named(measure) | {"seed": "all", "n": int(full.sum())} | told(_bounded(found))


def _bounded(found: Difference) -> Interval:
    return Interval(found.value, max(found.low, -1.0), min(found.high, 1.0))
