"""Records that training leaves out: ids from a file, for all runs, or from the list that a filter wrote for some.

A list is `workdir/filter/<run with dots>/list.parquet`: example_id and one bool column for every form of the filter.
It says which records the named run is likely to memorize; a run with `exclude="<form>:<run>"` is trained without those.
The manifest beside it says which models it was made from.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from ml_collections import ConfigDict

from kd_jax import storage
from kd_jax.data.records import DataError
from kd_jax.errors import ConfigError
from kd_jax.graph import Run
from kd_jax.storage import Path

BASELINE = "direct"  # beside which a filter sets the teacher


def sources(runs: Mapping[str, Run]) -> list[str]:
    """The runs for which others need a list, in the order of the graph."""
    named = {run.excluded_of for run in runs.values()}
    return [name for name in runs if name in named]


def check(config: ConfigDict, runs: Mapping[str, Run]) -> None:
    """Will there be what a filter reads? Raises ConfigError: better now than after the first training."""
    for name in sources(runs):
        pair = f"{runs[name].teacher}:{BASELINE}"
        wanted = {
            f"a run {BASELINE!r}": BASELINE in runs,
            f"{pair!r} in score.pairs": pair in tuple(config.score.pairs),
            "'private' in score.roles": "private" in config.score.roles,
        }
        if missing := [what for what, there in wanted.items() if not there]:
            raise ConfigError(f"a run excludes what a filter finds for {name}, which needs {', '.join(missing)}")


def list_of(workdir: Path, name: str) -> Path:
    """Where the list for a run is, or will be."""
    return workdir / "filter" / name.replace("/", ".") / "list.parquet"


def of_run(workdir: Path, run: Run, known: Collection[str]) -> frozenset[str]:
    """The ids that a run leaves out because of a list; known and errors as of `of_config`."""
    if not run.exclude:
        return frozenset()
    key, form = f"runs.{run.name}.exclude", run.exclude.partition(":")[0]
    return _read(list_of(workdir, run.excluded_of), form, key, known)


def of_config(named: str, known: Collection[str]) -> frozenset[str]:
    """The ids that `data.exclude` leaves out of all runs: a Parquet file with example_id, or `file:column`, where only
    those count whose column is true.

    known: ids of records and of windows of plain texts.  Raises DataError where the file or column is not there, or
    with the number of ids that are not known.
    """
    if not named:
        return frozenset()
    path, column = path_of(named), named.partition(".parquet:")[2]
    place = storage.as_path(path)
    if not path.endswith(".parquet") or not place.exists():
        raise DataError(f"data.exclude: {path} is not a Parquet file that is there (ids.parquet or ids.parquet:column)")
    return _read(place, column, "data.exclude", known)


def path_of(named: str) -> str:
    """The file in `data.exclude`, without its column."""
    path, found, _ = named.partition(".parquet:")
    return path + ".parquet" if found else named


def inside(example_ids: np.ndarray, record_ids: np.ndarray, ids: Collection[str]) -> np.ndarray:
    """Which examples are left out: by their own id, or by that of their record. bool [n]."""
    return pd.Series(example_ids).isin(ids).to_numpy() | pd.Series(record_ids).isin(ids).to_numpy()


def _read(path: Path, column: str, key: str, known: Collection[str]) -> frozenset[str]:
    wanted = ["example_id", *filter(None, [column])]
    try:
        if absent := set(wanted) - set(names := pq.read_schema(storage.readable(path)).names):
            raise DataError(f"{key}: {path} has no column {', '.join(sorted(absent))}; it has {names[:20]}")
        table = pq.read_table(storage.readable(path), columns=wanted)
        table.validate(full=True)
    except (pa.ArrowException, OSError, MemoryError) as error:
        raise DataError(f"{key}: {path} is not a Parquet file, or a damaged one") from error
    if column and not pa.types.is_boolean(table[column].type):
        raise DataError(f"{key}: {column} in {path} is {table[column].type}, not true or false")
    chosen = table.filter(table[column].fill_null(False)) if column else table
    ids = frozenset(chosen["example_id"].cast(pa.string()).to_pylist())
    if unknown := sorted(ids - set(known)):
        first = next((name for name in unknown if re.fullmatch(r"[0-9a-f]{16}([.#]\d+)?", name)), "")
        raise DataError(
            f"{key}: {len(unknown)} of {len(ids)} ids in {path} are of no record here, "
            + (f"the first is {first}" if first else "and they do not look like ids")  # they may be text
        )
    return ids
