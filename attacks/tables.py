"""Score tables: Parquet files with one row per example and list columns per scored token, read into flat arrays.

SCORES/<run>/seed<k>/plain/<role>-00000.parquet    SCORES/text/{<role>.parquet, splits.parquet, token_counts.npz}
SCORES/<run>/seed<k>/<variant>/<role>-00000.parquet: the same records under a prefix, lower-cased, ...: `variant` in the
metadata of the file names it.
SCORES/pairs/<a>__<b>/seed<k>/<role>-00000.parquet: run b beside its teacher a, the variant `pair:<a>` of b.
"""

import zipfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from attacks.parquet import TableError, most_bytes, read_frame, read_json, read_metadata, read_schema, read_table

IDENTITY = ("example_id", "role", "task")
SEGMENTS = {"response": 1, "eos": 2}
OTHER_FOLDERS = ("plain", "generated", "continued", "pair")  # beside the variants: plain tables, and no score tables
MOST_IDS = 1 << 24  # token ids of a vocabulary
MOST_NAME = 256  # characters of an id, a role, a task
CONTINUED = ("example_id", "decoding", "prefix", "suffix", "target_ids", "generated_ids", "drawn")
T = TypeVar("T")


@dataclass(frozen=True)
class Tokens:
    """One role of one run, in the order of the example ids, so that the order of rows on disk changes nothing.

    ids, task: str [n].  offsets: int64 [n + 1], tokens of example i are offsets[i]:offsets[i + 1].
    token: field -> flat array [offsets[-1]].  example: field -> array [n].  kept: see `once`.
    """

    ids: np.ndarray
    task: np.ndarray
    offsets: np.ndarray
    token: dict[str, np.ndarray]
    example: dict[str, np.ndarray]
    kept: dict = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens per example [n]."""
        return np.diff(self.offsets)

    @cached_property
    def owner(self) -> np.ndarray:
        """Index of the example that each token belongs to."""
        return np.repeat(np.arange(len(self.ids)), self.lengths)

    def once(self, name: object, make: Callable[[], T]) -> T:
        """What `make` returns, computed at the first call: several attacks need the same sorted tokens."""
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]

    def select(self, segments: Collection[int]) -> "Tokens":
        """Only the tokens of these segments; an example may be left with none. Itself where that is all of them."""
        return self.once(("segments", *sorted(segments)), lambda: self._select(segments))

    def _select(self, segments: Collection[int]) -> "Tokens":
        keep = np.isin(self.token["segment"], list(segments))
        if keep.all():
            return self
        offsets = np.concatenate([[0], np.cumsum(keep)])[self.offsets]
        return Tokens(self.ids, self.task, offsets, {k: v[keep] for k, v in self.token.items()}, self.example)

    def take(self, rows: np.ndarray) -> "Tokens":
        """These examples (indices or a mask) in this order."""
        rows = np.arange(len(self.ids))[rows]
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        flat = np.arange(offsets[-1]) + np.repeat(self.offsets[rows] - offsets[:-1], lengths)
        token, example = {k: v[flat] for k, v in self.token.items()}, {k: v[rows] for k, v in self.example.items()}
        return Tokens(self.ids[rows], self.task[rows], offsets, token, example)


@dataclass(frozen=True)
class ScoreTable:
    """What one run (one seed of it) left on disk. Nothing but metadata is in memory until `load`.

    files: by role.  variants: by name, the tables of the same model on changed text.
    """

    run: str
    seed: int
    step: str
    provenance: dict
    files: dict[str, list[Path]]
    warnings: tuple[str, ...] = field(default=())
    variants: dict[str, "ScoreTable"] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.run}/seed{self.seed}"

    @property
    def folder(self) -> Path:
        """Where the run keeps its score tables, its ledger and what it generated."""
        return next(iter(self.files.values()))[0].parents[1]

    @cached_property
    def columns(self) -> set[str]:
        """Columns that the files of every role have."""
        return set.intersection(*(set(read_schema(paths[0]).names) for paths in self.files.values()))

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
    """Find the plain score tables under `scores_dir`, by run and seed, with their variants.  Reads metadata only.

    What a table is stands in its Parquet metadata; a directory without it is taken by its path, with a warning.
    Raises TableError where there is no table, or where two directories claim the same run, seed and variant.
    """
    root = Path(scores_dir)
    found = [*root.glob("**/seed*/*/*.parquet"), *root.glob("pairs/*/seed*/*.parquet")]
    folders = sorted({path.parent for path in found if not path.parent.name.startswith(".")})  # half deleted
    if not any(folder.name == "plain" for folder in folders):
        raise TableError(f"{root}: no score tables; expected <run>/seed<k>/plain/<role>-00000.parquet below it")
    tables: dict[tuple[str, int], ScoreTable] = {}
    variants: list[tuple[Path, str, ScoreTable]] = []
    for folder in folders:
        if folder.name in OTHER_FOLDERS[1:]:
            continue
        if (folder / "begun").exists():
            raise TableError(f"{folder}: scoring is not finished; run the score stage again")
        table, variant = _describe(root, folder)
        if folder.name != "plain":
            if variant not in OTHER_FOLDERS:
                variants.append((folder, variant, table))
            continue
        if (table.run, table.seed) in tables:
            raise TableError(f"{folder}: a second table of {table.name}; the metadata of two directories name one run")
        tables[table.run, table.seed] = table
    for folder, variant, table in variants:
        if (table.run, table.seed) not in tables:
            raise TableError(f"{folder}: the variant {variant} of {table.name}, which has no plain table")
        known = tables[table.run, table.seed].variants
        if variant in known:
            raise TableError(f"{folder}: a second table of the variant {variant} of {table.name}")
        known[variant] = table
    for (run, _), table in tables.items():  # checkpoints that were trained elsewhere say nothing of each other
        if run == "student" and any(other == "teacher" for other, _ in tables) and not table.provenance.get("teacher"):
            table.provenance["teacher"] = "teacher"
    return [tables[key] for key in sorted(tables)]


def read_text(scores_dir: str | Path, role: str) -> pd.DataFrame:
    """Token ids and surface features of one role's text, by example id. Without `group` every record is its own.

    Raises TableError on missing columns and duplicate ids.
    """
    path = Path(scores_dir) / "text" / f"{role}.parquet"
    frame = _by_id(path, ("prompt_ids", "response_ids"))
    for name in ("prompt_ids", "response_ids"):
        if not frame[name].map(_are_ids).all():
            raise TableError(f"{path}: {name} must be a list of token ids in every row")
    if (few := frame["prompt_ids"].map(len) + frame["response_ids"].map(len) == 0).any():
        raise TableError(f"{path}: {few.sum()} texts without a token, the first is {few.idxmax()}")
    return frame if "group" in frame else frame.assign(group=frame.index)


def read_splits(scores_dir: str | Path) -> pd.DataFrame | None:
    """Roles and coins by example id, or None where they were not kept. Without `placement` a canary is in both models.

    Raises TableError on missing columns and duplicate ids.
    """
    path = Path(scores_dir) / "text" / "splits.parquet"
    if not path.exists():
        return None
    frame = _by_id(path, ("role", "coin"))
    return frame if "placement" in frame else frame.assign(placement="both")


def read_continued(table: ScoreTable, role: str) -> pd.DataFrame | None:
    """What a run generated after prefixes of one role's records, one row per example, decoding and cut; None without.

    Columns example_id, decoding, prefix, suffix, target_ids, generated_ids (lists of token ids), drawn (bool).
    Raises TableError on missing columns, doubled rows, another run's table, and one that is not finished.
    """
    folder = table.folder / "continued"
    paths = sorted(folder.glob(f"{role}-*.parquet"))
    if not paths:
        return None
    if (folder / "begun").exists():
        raise TableError(f"{folder}: generation is not finished; run the score stage again")
    for path in paths:
        if absent := [name for name in CONTINUED if name not in read_schema(path).names]:
            raise TableError(f"{path}: no column {', '.join(absent)}; a table of continuations has them")
        told = read_metadata(path)
        owner = told.get("run", table.run), told.get("seed", str(table.seed))
        if owner != (table.run, str(table.seed)):
            raise TableError(f"{path}: it says that it belongs to {owner[0]}/seed{owner[1]}, not to {table.name}")
    frame = pd.concat([read_frame(path) for path in paths], ignore_index=True)
    if doubled := int(frame.duplicated(["example_id", "decoding", "prefix", "suffix"]).sum()):
        raise TableError(f"{folder}: {doubled} rows of role '{role}' stand there twice; generate again")
    return frame


def read_counts(scores_dir: str | Path) -> np.ndarray | None:
    """How often each token id occurs in the public role [V], or None where it was not kept."""
    path = Path(scores_dir) / "text" / "token_counts.npz"
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            packed = archive.getinfo("counts.npy").file_size
        if packed > most_bytes():
            raise TableError(f"{path}: `counts` unpacks to {packed} bytes, a quarter of this machine's memory or more")
        with np.load(path, allow_pickle=False) as arrays:
            counts = np.asarray(arrays["counts"])
    except TableError:
        raise
    except Exception:  # an archive, a header that is a Python literal, packed bytes: each fails in its own ways
        raise TableError(f"{path}: no array `counts` in it (np.savez(path, counts=...))") from None
    if counts.ndim != 1 or counts.dtype.kind not in "iuf" or not (counts >= 0).all():
        raise TableError(f"{path}: `counts` is {counts.dtype} {counts.shape}, not a number of times for each token id")
    return counts


def _by_id(path: Path, needed: tuple[str, ...]) -> pd.DataFrame:
    frame = read_frame(path)
    if absent := [name for name in ("example_id", *needed) if name not in frame]:
        raise TableError(f"{path}: no column {', '.join(absent)}; it needs example_id, {', '.join(needed)}")
    frame = frame.assign(example_id=frame["example_id"].astype(str)).set_index("example_id")
    if (longest := frame.index.str.len().max()) > MOST_NAME:
        raise TableError(f"{path}: an example_id has {longest} characters; names have at most {MOST_NAME}")
    if not frame.index.is_unique:
        raise TableError(f"{path}: {frame.index.duplicated().sum()} duplicate example ids; one row a record is needed")
    return frame


def _are_ids(value: object) -> bool:
    """Is this a list of token ids?"""
    if not isinstance(value, np.ndarray) or value.ndim != 1:
        return False
    return not value.size or (value.dtype.kind in "iu" and 0 <= value.min() and value.max() < MOST_IDS)


def _describe(root: Path, folder: Path) -> tuple[ScoreTable, str]:
    """The tables of one directory, and which variant they are."""
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.parquet")):
        files.setdefault(path.stem.rsplit("-", 1)[0], []).append(path)
    told = {path: read_metadata(path) for paths in files.values() for path in paths}
    owners = {(meta.get("run"), meta.get("seed"), meta.get("variant")) for meta in told.values()}
    if len(owners) > 1:
        raise TableError(f"{folder}: its files name different runs ({sorted(map(str, owners))}); keep one run a folder")
    meta = next(iter(told.values()))
    if "run" in meta and "seed" in meta:
        provenance = read_json(meta.get("provenance", "{}"), folder, "provenance", dict)
        if not meta["seed"].isdecimal() or len(meta["seed"]) > 9:
            raise TableError(f"{folder}: the metadata of its files name no seed: a number is needed")
        table = ScoreTable(meta["run"], int(meta["seed"]), meta.get("step", ""), provenance, files)
        return table, meta.get("variant", folder.name)
    run, seed = folder.parents[1].relative_to(root).as_posix(), folder.parent.name.removeprefix("seed")
    warning = f"{run}/seed{seed}: no metadata in its score tables: taken by their path, its training is unknown"
    if not seed.isdigit():
        raise TableError(f"{folder}: no metadata, and '{folder.parent.name}' is not seed<number>")
    return ScoreTable(run, int(seed), "", {}, files, (warning,)), folder.name


def _read(path: Path, role: str, fields: set[str]) -> Tokens:
    schema = read_schema(path)
    columns = schema.names
    measured = "kl_ab" if "kl_ab" in columns else "logp"  # of a pair of models, of one
    if absent := [c for c in (*IDENTITY, "segment", measured) if c not in columns]:
        raise TableError(
            f"{path}: no column {', '.join(absent)}; a score table has {', '.join(IDENTITY)} and "
            "list columns per scored token, segment and logp among them"
        )
    for name in ("segment", measured):
        if not _is_list(schema.field(name).type):
            raise TableError(f"{path}: {name} is {schema.field(name).type}, not a list with a number per scored token")
    table = read_table(path, {*IDENTITY, *fields})
    ids = _text(table, "example_id", path)
    if wrong := set(_text(table, "role", path)) - {role}:
        raise TableError(f"{path}: rows of role {', '.join(sorted(wrong))} in a file of role '{role}'")
    offsets = np.zeros(len(ids) + 1, np.int64)
    token, example = {}, {}
    for name in ("segment", *sorted(set(table.column_names) - {*IDENTITY, "segment"})):  # segment gives the lengths
        column = table[name].combine_chunks()
        kind = column.type.value_type if _is_list(column.type) else column.type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
            raise TableError(f"{path}: {name} is {column.type}, not numbers")
        flat = column.flatten() if _is_list(column.type) else column
        if (
            column.null_count
            and (flat is not column or not pa.types.is_floating(kind))
            or (flat.null_count and not pa.types.is_floating(kind))
        ):
            raise TableError(f"{path}: {name} has empty cells; every scored token needs a number")
        if flat is column:
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
        token[name] = flat.to_numpy(zero_copy_only=False)
    return Tokens(ids, _text(table, "task", path), offsets, token, example)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _text(table: pa.Table, name: str, path: Path) -> np.ndarray:
    """A column of names as str [n]: an array has the width of its longest, so that one must not be very long."""
    try:
        column = table[name].cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise TableError(f"{path}: {name} is {table[name].type}, not a text") from None
    if (longest := pc.max(pc.utf8_length(column)).as_py() or 0) > MOST_NAME:
        raise TableError(f"{path}: a {name} has {longest} characters; names have at most {MOST_NAME}")
    return np.asarray(column.to_pylist(), str)


def _in_id_order(parts: list[Tokens]) -> Tokens:
    ids = np.concatenate([p.ids for p in parts])
    if len(parts) == 1 and (ids[1:] >= ids[:-1]).all():
        return parts[0]
    order = np.argsort(ids, kind="stable")
    lengths = np.concatenate([p.lengths for p in parts])
    starts = np.cumsum(lengths) - lengths
    offsets = np.concatenate([[0], np.cumsum(lengths[order])])
    take = np.arange(offsets[-1]) + np.repeat(starts[order] - offsets[:-1], lengths[order])
    together = {k: np.concatenate([p.token[k] for p in parts])[take] for k in parts[0].token}
    example = {k: np.concatenate([p.example[k] for p in parts])[order] for k in parts[0].example}
    return Tokens(ids[order], np.concatenate([p.task for p in parts])[order], offsets, together, example)
