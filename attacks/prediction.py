"""Which examples a student will memorize, told before it is distilled (memorization.md 8; borkar2026 2.8).

prediction.csv has, for every student and seed, at the main cut:

  protocol            fitted on                                     tried on
  paper               70 % of the memorized, three others each      the rest, three others each; mean of 100 trials
  paper_over_trials   the same values, the interval the middle 95 % of the trials: they share their examples, so it says
                      how little the draw of negatives matters, not how sure the value is
  matched_negatives   as `paper`, the others nearest in zlib_bytes; `matched_negatives:zlib_bytes,teacher_ppl`: in both
  natural_prior       the same as `paper`                           every example, by the trials that held it out
  halves              one half, by a hash of the group              the other half, and the other way round
  other_seed          a half under the labels of the next seed      the other half under those of this one
  other_student:<run> the same of another student
  filter              see `attacks/filtering.py`

All but `other_seed` and `other_student` need labels of the student that they predict (`halves` not the example's own
but others'): only those two could be told before a distillation, from one that was done earlier.
features: `paper` (zlib_bytes, teacher_ppl, baseline_ppl, kl), `teacher_only` (the first two), `extended`, or one alone.

  auc precision recall flagged   at log-odds 0; flagged: the share of examples that are
  average_precision precision_at_recall_0.95   at the true prior
  coefficient:<feature>          standardised; below 0: the smaller, the more at risk
  importance:<feature>           what the AUC loses when it is shuffled among the examples tried on (over trials only)
  memorized                      share of examples that are

Intervals are from resamples of the examples (groups, where they have some), in which all is fitted anew: with the
classifiers kept, an AUC's interval misses 0.5 up to one time in four where nothing can be predicted.
n: memorized examples, of `memorized` all examples.  A single feature's AUC is that of its stated direction.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from attacks import filtering
from attacks.classifier import TooFew, Trial, at_prior, crossed, importance, quality, trials, tried
from attacks.cuts import Memorized
from attacks.effects import share
from attacks.features import PAPER, RISK, Candidates, candidates, sets
from attacks.filtering import filter_rows, write_filter
from attacks.measures import told
from attacks.statistics import Interval, SeedMean, difference, logit_interval, over_seeds
from attacks.study import Study, Unresolved

COLUMNS = "student setting features protocol measure value ci_low ci_high n seed"
MATCHED = {"": ("zlib_bytes",), ":zlib_bytes,teacher_ppl": ("zlib_bytes", "teacher_ppl")}
REFITS, AGAIN = 100, 3  # resamples in which all is fitted anew; trials in each
OVER = "_over_trials"
DEPENDENT = (
    "Trials of the prediction share their examples: intervals over trials are far too narrow and only repeat how the "
    "paper counts; those over examples say how sure a value is."
)


class Measured(NamedTuple):
    """A value, and the same in resamples of the examples (of trials, where it is over these) [R], NaN where there is
    none; noise: what of the variance of the draws is of the procedure, not of the examples."""

    value: float
    draws: np.ndarray
    noise: float = 0.0


Table = dict[tuple[str, str, str], Measured]  # features, protocol, measure

__all__ = ["COLUMNS", "filter_rows", "main", "rows", "write_filter"]


def rows(study: Study, memorized: Memorized) -> list[dict]:
    """Rows of prediction.csv; one that could not be computed has a `reason`, and one row says why there is nothing."""
    students = [run for run in study.students if not study.provenance(run).get("exclude")]
    known: dict[tuple[str, int], Candidates] = {}
    found: list[dict] = []
    for run in students:
        for seed in study.seeds(run):
            try:
                known[run, seed] = candidates(study, memorized, run, seed)
            except Unresolved as why:
                found.append(_head(study, run) | {"measure": "prediction", "seed": seed, "reason": str(why)})
    for run in students:
        own = {seed: known[run, seed] for seed in study.seeds(run) if (run, seed) in known}
        found += _student_rows(study, run, own, _earlier(study, run, students, known))
    if known:
        study.note(DEPENDENT)
    if not students:
        found.append({"measure": "prediction", "reason": "no student that was distilled on all of its records"})
    return found + filter_rows(study, memorized)


def _head(study: Study, run: str) -> dict:
    return {"student": run, "setting": study.head(run)["setting"]}


def _earlier(study: Study, run: str, students: list[str], known: dict) -> dict[int, dict[str, Candidates]]:
    """By seed of a student and protocol, what another seed or another student of the setting and teacher memorized."""
    found: dict[int, dict[str, Candidates]] = {}
    seeds = [seed for seed in study.seeds(run) if (run, seed) in known]
    told = lambda name: [study.provenance(name).get(key) for key in ("setting", "teacher")]
    for seed, following in zip(seeds, [*seeds[1:], *seeds[:1]], strict=True):
        found[seed] = {}
        if following != seed:
            found[seed]["other_seed"] = known[run, following]
        for other in students:
            own = study.match(other, seed)
            if other != run and told(other) == told(run) and (other, own) in known:
                found[seed][f"other_student:{other}"] = known[other, own]
    return found


def _student_rows(study: Study, run: str, own: dict[int, Candidates], earlier: dict) -> Iterator[dict]:
    head, tables = _head(study, run), {}
    for seed, found in own.items():
        prior = share(study, found.ids, found.memorized, np.ones(len(found.ids), bool))
        at = {"features": "-", "protocol": "natural_prior", "measure": "memorized", "seed": seed, "n": len(found.ids)}
        yield head | at | told(prior)
        try:
            tables[seed] = _table(study, found, earlier[seed])
        except TooFew as why:
            yield head | {"measure": "prediction", "seed": seed, "reason": str(why)}
    for seed, table in tables.items():
        n = int(own[seed].memorized.sum())
        for key, measured in table.items():
            yield head | _named(key) | {"seed": seed, "n": n} | told(_interval(key, [measured], n))
    if 1 < len(tables) == len(own):
        n = min(int(found.memorized.sum()) for found in own.values())
        for key in tables[next(iter(tables))]:
            if all(key in table for table in tables.values()) and not key[1].endswith(OVER):
                measured = [table[key] for table in tables.values()]
                yield head | _named(key) | {"seed": "all", "n": n} | told(_interval(key, measured, n))


def _named(key: tuple[str, str, str]) -> dict:
    return dict(zip(("features", "protocol", "measure"), key, strict=True))


def _interval(key: tuple[str, str, str], each: list[Measured], n: int) -> Interval:
    """Over examples, and with several seeds over them too; over trials, the middle of them. n: memorized examples."""
    values, draws = [m.value for m in each], np.mean([m.draws for m in each], axis=0)
    made, draws = len(draws), draws[np.isfinite(draws)]
    if key[1].endswith(OVER):
        return Interval(values[0], *np.quantile(draws, [0.025, 0.975]).tolist())
    if not np.isfinite(values).all() or len(draws) < max(2, 0.8 * made):
        return Interval(float(np.mean(values)), np.nan, np.nan)  # resamples that lack a class tell nothing of its size
    noise = float(np.mean([m.noise for m in each])) / len(each)
    within, df = max(float(draws.var(ddof=1)) - noise, 0.0), np.inf
    mean = over_seeds(values, within) if len(each) > 1 else SeedMean(values[0], float(np.sqrt(within)), df)
    found = difference(mean.value, mean.se, df=mean.df)
    if key[2].startswith("coefficient:"):
        return Interval(found.value, found.low, found.high)
    if mean.se < 1e-12 or mean.value in (0.0, 1.0):
        return logit_interval(mean.value, mean.se, n, n, df=mean.df)  # its exact bounds
    # Not on the logit's scale: beside 1 a spread of a few points becomes an interval from 0 to 1 there.
    return Interval(found.value, max(found.low, 0.0), min(found.high, 1.0))


# --- one student and seed ---------------------------------------------------------------------------------------------


def _table(study: Study, found: Candidates, earlier: dict[str, Candidates]) -> Table:
    seed = study.settings["seed"]
    resamples = study.resampler.counts(found.ids, found.clusters)[:REFITS].astype(np.float64)
    made, table = list(trials(found, seed)), {}
    for name, columns in sets(found).items():
        table |= _trial_rows(found, columns, name, made, resamples)
        table |= _crossed_rows(found, found, columns, (name, "halves"), seed, resamples)
    for protocol, source in earlier.items():
        if np.array_equal(source.ids, found.ids):
            table |= _crossed_rows(source, found, PAPER, ("paper", protocol), seed, resamples)
    for name, columns in MATCHED.items():
        near = np.log(np.maximum(found.matrix(columns), 1e-9))
        near = (near - near.mean(axis=0)) / np.maximum(near.std(axis=0), 1e-9)
        matched = _trial_rows(found, PAPER, "paper", list(trials(found, seed, match=near)), resamples)
        of = {key[2]: measured for key, measured in matched.items() if key[1] == "paper"}
        table |= {("paper", f"matched_negatives{name}", measure): measured for measure, measured in of.items()}
    for name in (name for name in RISK if name in found.values):
        scores = RISK[name] * found.values[name]
        drawn = [quality(scores, found.memorized, counts)["auc"] for counts in resamples]
        table[name, "natural_prior", "auc"] = Measured(quality(scores, found.memorized)["auc"], np.array(drawn))
    return table


def _trial_rows(
    found: Candidates, columns: tuple[str, ...], features: str, made: list[Trial], resamples: np.ndarray
) -> Table:
    """Means over the trials; in every resample, over a few of them, fitted anew on the examples drawn."""
    values = [tried(found, columns, trial) for trial in made]
    again = [
        [tried(found, columns, made[(AGAIN * row + turn) % len(made)], counts) for turn in range(AGAIN)]
        for row, counts in enumerate(resamples)
    ]
    table: Table = {}
    for protocol, name in values[0]:
        each = np.array([value[protocol, name] for value in values])
        drawn = np.array([[value.get((protocol, name), np.nan) for value in turns] for turns in again])
        complete = drawn[np.isfinite(drawn).all(axis=1)]
        noise = float(complete.var(axis=1, ddof=1).mean()) if len(complete) else 0.0
        mean = float(_mean(each))
        # The trials of a resample differ among themselves too: that is no spread of their mean over all.
        table[features, protocol, name] = Measured(mean, _mean(drawn.T), noise * (1 / AGAIN - 1 / len(made)))
        if protocol == "paper":
            table[features, f"paper{OVER}", name] = Measured(mean, each)
    lost = [importance(found, columns, trial, number) for number, trial in enumerate(made)]
    for name in columns:
        each = np.array([one[name] for one in lost])
        table[features, f"paper{OVER}", f"importance:{name}"] = Measured(float(each.mean()), each)
    return table


def _mean(rows: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is a number; NaN where nothing is."""
    known = np.isfinite(rows)
    times = known.sum(axis=0)
    return np.where(times > 0, np.where(known, rows, 0).sum(axis=0) / np.maximum(times, 1), np.nan)


def _crossed_rows(
    source: Candidates,
    target: Candidates,
    columns: tuple[str, ...],
    named: tuple[str, str],
    seed: int,
    resamples: np.ndarray,
) -> Table:
    """named: features and protocol. Nothing where a half has too few to learn from."""
    y = target.memorized
    try:
        scores = crossed(source, target, columns, seed)
    except TooFew:
        return {}
    drawn = []
    for row, counts in enumerate(resamples):
        again = crossed(source, target, columns, seed + row, counts, fits=1)
        drawn.append(quality(again, y, counts) | at_prior(again, y, counts))
    values = quality(scores, y) | at_prior(scores, y)
    return {(*named, name): Measured(value, np.array([one[name] for one in drawn])) for name, value in values.items()}


def main() -> int:
    """Write the list of examples that a student memorizes, by a command; see `write_filter`."""
    parser = argparse.ArgumentParser(prog="python -m attacks.prediction", description=filtering.__doc__.split("\n")[0])
    parser.add_argument("scores_dir", type=Path, help="folder with <run>/seed<k>/plain/<role>-*.parquet and text/")
    parser.add_argument("--student", required=True, help="run whose memorized examples are predicted, students/kd")
    parser.add_argument("--out", type=Path, required=True, help="folder for list.parquet")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    given = parser.parse_args()
    try:
        counts = write_filter(given.scores_dir, given.out, {"student": given.student, "seed": given.seed})
    except (ValueError, OSError) as error:
        print(f"attacks.prediction: {error}", file=sys.stderr)
        return 2
    print(", ".join(f"{number} {what}" for what, number in counts.items()))
    return 0 if counts else 1


if __name__ == "__main__":
    sys.exit(main())
