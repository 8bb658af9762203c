"""Score tables: Parquet files with one row per example and list columns per scored token, read into flat arrays.

SCORES/<run>/seed<k>/plain/<role>-00000.parquet    SCORES/text/{<role>.parquet, splits.parquet, token_counts.npz}
"""

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

IDENTITY = ("example_id", "role", "task")
SEGMENTS = {"response": 1, "eos": 2}


class TableError(ValueError):
    """A score table that cannot be audited; the message names the file and what to do."""


@dataclass(frozen=True)
class Tokens:
    """One role of one run, in the order of the example ids, so that the order of rows on disk changes nothing.

    ids, task: str [n].  offsets: int64 [n + 1], tokens of example i are offsets[i]:offsets[i + 1].
    token: field -> flat array [offsets[-1]].  example: field -> array [n].
    """

    ids: np.ndarray
    task: np.ndarray
    offsets: np.ndarray
    token: dict[str, np.ndarray]
    example: dict[str, np.ndarray]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per example [n]."""
        return np.diff(self.offsets)

    @property
    def owner(self) -> np.ndarray:
        """Index of the example that each token belongs to."""
        return np.repeat(np.arange(len(self.ids)), self.lengths)

    def select(self, segments: Collection[int]) -> "Tokens":
        """Only the tokens of these segments; an example may be left with none."""
        keep = np.isin(self.token["segment"], list(segments))
        offsets = np.concatenate([[0], np.cumsum(keep)])[self.offsets]
        return Tokens(self.ids, self.task, offsets, {k: v[keep] for k, v in self.token.items()}, self.example)


@dataclass(frozen=True)
class ScoreTable:
    """What one run (one seed of it) left on disk. Nothing but metadata is in memory until `load`."""

    run: str
    seed: int
    step: str
    provenance: dict
    files: dict[str, list[Path]]
    warnings: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        return f"{self.run}/seed{self.seed}"

    @property
    def folder(self) -> Path:
        """Where the run keeps its score tables, its ledger and what it generated."""
        return next(iter(self.files.values()))[0].parents[1]

    def load(self, role: str, fields: Collection[str]) -> Tokens:
        """Read one role. Of `fields` those that the files have; `segment` always.

        Raises TableError on missing identity columns, lists of unequal length, a wrong role, duplicate ids.
        """
        parts = [_read(path, role, set(fields) | {"segment"}) for path in self.files[role]]
        if len({(frozenset(p.token), frozenset(p.example)) for p in parts}) > 1:
            raise TableError(
                f"{self.files[role][0].parent}: the files of role '{role}' have different columns; "
                "they come from two scoring passes, score this run again"
            )
        tokens = _in_id_order(parts)
        doubled = tokens.ids[1:][tokens.ids[1:] == tokens.ids[:-1]]
        if len(doubled):
            raise TableError(
                f"{self.files[role][0].parent}: {len(doubled)} duplicate example ids in role '{role}', "
                f"the first is {doubled[0]}; every record must be scored once"
            )
        return tokens


def read_scores(scores_dir: str | Path) -> list[ScoreTable]:
    """Find the plain score tables under `scores_dir`, by run and seed.  Reads metadata only.

    What a table is stands in its Parquet metadata; a directory without it is taken by its path, with a warning.
    Raises TableError where there is no table, or where two directories claim the same run and seed.
    """
    root = Path(scores_dir)
    folders = sorted({path.parent for path in root.glob("**/seed*/plain/*.parquet")})
    if not folders:
        raise TableError(f"{root}: no score tables; expected <run>/seed<k>/plain/<role>-00000.parquet below it")
    tables: dict[tuple[str, int], ScoreTable] = {}
    for folder in folders:
        if (folder / "begun").exists():
            raise TableError(f"{folder}: scoring is not finished; run the score stage again")
        table = _describe(root, folder)
        if (table.run, table.seed) in tables:
            raise TableError(f"{folder}: a second table of {table.name}; the metadata of two directories name one run")
        tables[table.run, table.seed] = table
    return [tables[key] for key in sorted(tables)]


def read_text(scores_dir: str | Path, role: str) -> pd.DataFrame:
    """Token ids and surface features of one role's text, by example id. Raises TableError on duplicate ids."""
    return _by_id(Path(scores_dir) / "text" / f"{role}.parquet")


def read_splits(scores_dir: str | Path) -> pd.DataFrame | None:
    """Roles and coins by example id, or None where they were not kept. Raises TableError on duplicate ids."""
    path = Path(scores_dir) / "text" / "splits.parquet"
    return _by_id(path) if path.exists() else None


def _by_id(path: Path) -> pd.DataFrame:
    frame = pd.read_parquet(path).set_index("example_id")
    if not frame.index.is_unique:
        raise TableError(f"{path}: {frame.index.duplicated().sum()} duplicate example ids; one row a record is needed")
    return frame


def _describe(root: Path, folder: Path) -> ScoreTable:
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.parquet")):
        files.setdefault(path.stem.rsplit("-", 1)[0], []).append(path)
    told = {
        path: {k.decode(): v.decode() for k, v in (pq.read_schema(path).metadata or {}).items()}
        for paths in files.values()
        for path in paths
    }
    owners = {(meta.get("run"), meta.get("seed")) for meta in told.values()}
    if len(owners) > 1:
        raise TableError(f"{folder}: its files name different runs ({sorted(map(str, owners))}); keep one run a folder")
    meta = next(iter(told.values()))
    if "run" in meta and "seed" in meta:
        return ScoreTable(
            meta["run"], int(meta["seed"]), meta.get("step", ""), json.loads(meta.get("provenance", "{}")), files
        )
    run, seed = folder.parents[1].relative_to(root).as_posix(), folder.parent.name.removeprefix("seed")
    warning = f"{run}/seed{seed}: no metadata in its score tables: taken by their path, its training is unknown"
    if not seed.isdigit():
        raise TableError(f"{folder}: no metadata, and '{folder.parent.name}' is not seed<number>")
    return ScoreTable(run, int(seed), "", {}, files, (warning,))


def _read(path: Path, role: str, fields: set[str]) -> Tokens:
    columns = pq.read_schema(path).names
    if absent := [c for c in (*IDENTITY, "segment", "logp") if c not in columns]:
        raise TableError(
            f"{path}: no column {', '.join(absent)}; a score table has {', '.join(IDENTITY)} and "
            "list columns per scored token, segment and logp among them"
        )
    table = pq.read_table(path, columns=[*IDENTITY, *(c for c in columns if c in fields)])
    ids = _text(table, "example_id")
    if wrong := set(_text(table, "role")) - {role}:
        raise TableError(f"{path}: rows of role {', '.join(sorted(wrong))} in a file of role '{role}'")
    offsets = np.zeros(len(ids) + 1, np.int64)
    token, example = {}, {}
    for name in ("segment", *sorted(set(table.column_names) - {*IDENTITY, "segment"})):  # segment gives the lengths
        column = table[name].combine_chunks()
        if not pa.types.is_list(column.type) and not pa.types.is_large_list(column.type):
            example[name] = column.to_numpy(zero_copy_only=False)
            continue
        lengths = np.diff(column.offsets.to_numpy())
        if name == "segment":
            offsets[1:] = np.cumsum(lengths)
        elif (unequal := np.flatnonzero(lengths != np.diff(offsets))).size:
            row = unequal[0]
            raise TableError(
                f"{path}: example {ids[row]} has {lengths[row]} values of {name} and "
                f"{offsets[row + 1] - offsets[row]} of segment; one per scored token is needed"
            )
        token[name] = column.flatten().to_numpy(zero_copy_only=False)
    return Tokens(ids, _text(table, "task"), offsets, token, example)


def _text(table: pa.Table, name: str) -> np.ndarray:
    return np.asarray(table[name].to_pylist(), str)


def _in_id_order(parts: list[Tokens]) -> Tokens:
    ids = np.concatenate([p.ids for p in parts])
    order = np.argsort(ids, kind="stable")
    lengths = np.concatenate([p.lengths for p in parts])
    starts = np.cumsum(lengths) - lengths
    offsets = np.concatenate([[0], np.cumsum(lengths[order])])
    take = np.arange(offsets[-1]) + np.repeat(starts[order] - offsets[:-1], lengths[order])
    together = {k: np.concatenate([p.token[k] for p in parts])[take] for k in parts[0].token}
    example = {k: np.concatenate([p.example[k] for p in parts])[order] for k in parts[0].example}
    return Tokens(ids[order], np.concatenate([p.task for p in parts])[order], offsets, together, example)
