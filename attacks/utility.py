"""Rows of utility.csv and the gate made of them: how useful a model is, for a leak means nothing without it.

<run>/seed<k>/generated/<set>.parquet holds ROUGE of generated responses, one row per example and sampling seed.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from attacks.gates import NOT_RUN, gate_row
from attacks.parquet import TableError, read_frame, read_metadata, read_schema
from attacks.statistics import Interval, difference, over_seeds
from attacks.study import Study, Totals

UNDERTRAINED = "undertrained: a low leak is no evidence"
LOSSES = {"dev": ("dev_loss", "perplexity"), "heldout": ("heldout_loss", "heldout_perplexity")}
GENERATED = {"rouge_l": 100, "rouge_1": 100, "rouge_2": 100, "n_tokens": 1}  # column -> what it is multiplied by
Block = list[tuple[int, Totals]]


def utility_rows(study: Study) -> list[dict]:
    """Rows of utility.csv for every run, per seed and over several.

    `dev_loss`, `heldout_loss`: token means in nats; `perplexity`, `heldout_perplexity`: their exponentials.
    `rouge_l@<set>`, `rouge_1@..`, `rouge_2@..`: 100 x F1, `response_tokens@<set>`: length; means over examples, each
    example the mean of its sampling seeds.  `grid_dev_loss@lr=<lr>`: every learning rate that was tried.
    Raises TableError on a generated table that cannot be read.
    """
    rows = []
    for run in study.runs:
        measures = {}
        for role, (loss, perplexity) in LOSSES.items():
            found = _measured(study, _loss_blocks(study, run, role))
            measures[loss] = found
            measures[perplexity] = {s: (Interval(*np.exp(each).tolist()), n) for s, (each, n) in found.items()}
        for name, totals in _generated(study, run).items():
            measures[name] = _measured(study, _blocks(totals))
        measures |= _grid(study, run)
        for measure, by_seed in measures.items():
            for seed, (found, n) in by_seed.items():
                numbers = {"value": found.value, "ci_low": found.low, "ci_high": found.high, "n": n, "seed": seed}
                rows.append(study.head(run) | {"measure": measure} | numbers)
    return rows


# --- estimates -------------------------------------------------------------------------------------------------------


def _ratio(totals: Totals) -> float:
    return float(totals.above.sum() / totals.below.sum())


def _drawn(study: Study, totals: Totals) -> np.ndarray:
    names = study.group_names(totals.ids)
    groups = None if len(np.unique(names)) == len(names) else np.unique(names, return_inverse=True)[1]
    counts = study.resampler.counts(totals.ids, groups)
    return (counts @ totals.above) / (counts @ totals.below)


def _interval(values: list[float], draws: list[np.ndarray]) -> Interval:
    """Of one seed by percentiles of its bootstrap [B], of several over seeds and examples."""
    if len(values) == 1:
        return Interval(values[0], *np.quantile(draws[0], [0.025, 0.975]).tolist())
    mean = over_seeds(values, float(np.mean(draws, axis=0).var()))
    return Interval(*difference(mean.value, mean.se, df=mean.df)[:3])


def _blocks(found: dict[int, Totals]) -> dict[int | str, Block]:
    """Each seed alone, and all together where there are several."""
    blocks: dict[int | str, Block] = {seed: [(seed, totals)] for seed, totals in found.items()}
    return blocks | ({"all": list(found.items())} if len(found) > 1 else {})


def _loss_blocks(study: Study, run: str, role: str) -> dict[int | str, Block]:
    seeds = [seed for seed in study.seeds(run) if (run, seed, role) in study.losses]
    return _blocks({seed: study.losses[run, seed, role] for seed in seeds})


def _measured(study: Study, blocks: dict[int | str, Block]) -> dict[int | str, tuple[Interval, int]]:
    """By seed, the interval and the number of examples."""
    found = {}
    for seed, block in blocks.items():
        totals = [each for _, each in block]
        found[seed] = _interval([_ratio(x) for x in totals], [_drawn(study, x) for x in totals]), len(totals[0].ids)
    return found


# --- generated responses and learning rates --------------------------------------------------------------------------


def _generated(study: Study, run: str) -> dict[str, dict[int, Totals]]:
    """Measure -> training seed -> its values by example."""
    found: dict[str, dict[int, Totals]] = {}
    for seed in study.seeds(run):
        folder = study.tables[run, seed].folder / "generated"
        for path in sorted(folder.glob("*.parquet")):
            means = _means(path, run, seed)
            for column, scale in GENERATED.items():
                name = f"{'response_tokens' if column == 'n_tokens' else column}@{path.stem}"
                totals = Totals(means.index.to_numpy(str), scale * means[column].to_numpy(float), np.ones(len(means)))
                found.setdefault(name, {})[seed] = totals
    return found


def _means(path: Path, run: str, seed: int) -> pd.DataFrame:
    """Mean over the sampling seeds of each example, in the order of the ids."""
    if (path.parent / "begun").exists():
        raise TableError(f"{path.parent}: generation is not finished; run the score stage again")
    if absent := [column for column in ("example_id", "seed", *GENERATED) if column not in read_schema(path).names]:
        raise TableError(f"{path}: no column {', '.join(absent)}; a table of generated responses has them")
    told = read_metadata(path)
    owner = told.get("run", run), told.get("seed", str(seed))
    if owner != (run, str(seed)):
        raise TableError(f"{path}: it says that it belongs to {owner[0]}/seed{owner[1]}, not to {run}/seed{seed}")
    frame = read_frame(path)
    if frame.empty:
        raise TableError(f"{path}: no rows; generate again or remove the file")
    if doubled := int(frame.duplicated(["example_id", "seed"]).sum()):
        raise TableError(f"{path}: {doubled} examples stand there twice for the same sampling seed")
    return frame.groupby("example_id")[list(GENERATED)].mean().sort_index()


def _grid(study: Study, run: str) -> dict[str, dict[int | str, tuple[Interval, None]]]:
    """Dev loss of every learning rate that was tried; a run that diverged has none, and nothing has an interval."""
    found: dict[str, dict[int | str, list[float]]] = {}
    for seed in study.seeds(run):
        for point in (study.tables[run, seed].provenance.get("training") or {}).get("grid") or []:
            loss = point.get("dev_loss")
            value = float(loss) if loss is not None and np.isfinite(loss) else np.nan
            by_seed = found.setdefault(f"grid_dev_loss@lr={point['lr']:g}", {})
            by_seed[seed] = [value]
            if len(study.seeds(run)) > 1:
                by_seed.setdefault("all", []).append(value)
    return {
        name: {seed: (Interval(float(np.mean(values)), np.nan, np.nan), None) for seed, values in by_seed.items()}
        for name, by_seed in found.items()
    }


# --- the gate --------------------------------------------------------------------------------------------------------


def base_of(study: Study, run: str) -> str:
    """The pre-trained checkpoint a run started from."""
    told = study.provenance(run).get("init") or ""
    return told if told.startswith("base_") else "base_teacher" if run in ("teacher", "swap") else "base_student"


def utility_gate(study: Study) -> list[dict]:
    """Dev loss of every trained run less that of its base (the gate), and of every student less that of the null."""
    rows = []
    for run in (r for r in study.runs if not r.startswith("base_") and r != "reference"):
        base = base_of(study, run)
        rows += _loss_gaps(study, run, base, lambda gap: "ok" if gap.high < 0 else UNDERTRAINED) or [
            gate_row("utility", run, f"dev_loss_minus_{base}", NOT_RUN)
        ]
        if run in study.students:
            rows += _loss_gaps(
                study, run, "null", lambda gap: "ok: better than null" if gap.high < 0 else "ok: no better than null"
            )
    return rows


def _loss_gaps(study: Study, run: str, other: str, verdict: Callable[[Interval], str]) -> list[dict]:
    rows = []
    for seed, block in _loss_blocks(study, run, "dev").items():
        values, draws = [], []
        for each, totals in block:
            rival = study.losses.get((other, study.match(other, each), "dev")) if other in study.runs else None
            if rival is None or not np.array_equal(totals.ids, rival.ids):
                continue
            values.append(_ratio(totals) - _ratio(rival))
            draws.append(_drawn(study, totals) - _drawn(study, rival))
        if len(values) == len(block):
            gap = _interval(values, draws)
            n = len(block[0][1].ids)
            rows.append(gate_row("utility", run, f"dev_loss_minus_{other}", verdict(gap), gap, seed=seed, n=n))
    return rows
