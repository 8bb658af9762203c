"""Records: instruction data and plain text, from files or the Hugging Face hub, as one table.

A table (pandas.DataFrame) has the columns COLUMNS, one row per distinct content, ordered by `example_id`. Nothing
downstream depends on the order of the file that a record came from.
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import resource
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd

COLUMNS = ("example_id", "group", "task", "instruction", "input", "response", "source", "role")

# Which of a source's fields is what. `instruction` and `response` must be there, `input` and `task` may. Nested formats
# (self_instruct, sni) are flattened to Alpaca's fields first. A format without an instruction is plain text.
FORMATS = {
    "dolly": {"instruction": "instruction", "input": "context", "response": "response", "task": "category"},
    "alpaca": {"instruction": "instruction", "input": "input", "response": "output", "task": "task"},
    "prompt_response": {"instruction": "prompt", "response": "response", "task": "task"},
    "prompt_completion": {"instruction": "prompt", "response": "completion", "task": "task"},
    "text": {"response": "text"},
}
NESTED = {"self_instruct": "alpaca", "sni": "alpaca"}
TEXT_UNITS = ("article", "paragraph", "line")
OBJECTS = 32  # bytes that a parsed JSON text needs at most for each of its own: `{},` is the worst, and close to that
SPLIT = "split it, or take a part"
RECORD = 1024  # bytes that a record needs besides its own: its place, its ids, its row in the table
_ARTICLE = re.compile(r" = [^=].* = ?")  # WikiText: " = Title = "; sections have more equals signs


class DataError(ValueError):
    """Data that cannot be used; the message says which file, line, key or id, and what to do. It never quotes text."""


def load(
    path: str | Path | Sequence[str | Path] | None = None,
    *,
    dataset: str | None = None,
    split: str | None = None,
    format: str = "auto",
    fields: Mapping[str, str] | None = None,
    group_key: str | None = None,
    text_unit: str = "article",
    limit: int | None = None,
    seed: int = 0,
    all_references: bool = False,
) -> pd.DataFrame:
    """Reads records and returns them de-duplicated on content, ordered by id.

    Args:
        path: one file or several: .jsonl, .json, .txt (each also .gz) or .parquet.
        dataset: instead of a path, a hub id for `datasets.load_dataset`, its configuration after a colon.
        split: the dataset's split.
        format: a key of FORMATS, "self_instruct", "sni", or "auto": told from the fields of the first record.
        fields: our name -> the source's field name, for sources in no known format (or to override one).
        group_key: a field of the source (a person, a passage): records that share its value share a `group`, and so a
            role. Records where it is blank, and all records when it is None, are groups of their own.
        text_unit: what a record of a .txt file is: "article" (WikiText headings), "paragraph" or "line".
        limit: keep this many records, picked by a seeded hash of their ids.
        seed: seed of that hash.
        all_references: where an instance of a nested format has several outputs, a record for each instead of one for
            the first; `limit` then counts these.

    Returns:
        A table of COLUMNS. `attrs["duplicates"]` counts the rows left out because their content was already there.

    Raises:
        DataError: unreadable file, broken JSON, unknown field name, record without a response; names file and line.
    """
    if (path is None) == (dataset is None):
        raise DataError("name either data.path (a file) or data.dataset (a hub id), not both and not neither")
    if dataset is not None:
        name, stem = dataset, dataset.split("/")[-1]
    else:
        paths = [Path(p) for p in ([path] if isinstance(path, str | Path) else path)]
        name, stem = ", ".join(p.name for p in paths), paths[0].name.split(".")[0]
    with _enough_memory(name):
        if dataset is not None:
            raw = list(_read_hub(dataset, split))
        else:
            raw = list(_bounded(name, (pair for p in paths for pair in _read_file(p, text_unit)), _memory))
        if not raw:
            raise DataError(f"{name}: no records in it")

        flat = list(_bounded(name, (pair for place, record in raw for pair in _flatten(place, record, all_references))))
        if not flat:
            raise DataError(f"{name}: no record has an instance")
        names = _field_names(flat, format, dict(fields or {}), group_key)
        rows = [row for place, record in flat if (row := _row(place, record, names, group_key, stem)) is not None]
        if not rows:
            raise DataError(f"{name}: every text in it is blank")
        frame = make_frame(rows)
        if limit is not None and limit < len(frame):
            keep = np.argsort(uniform(seed, "limit", frame["example_id"]), kind="stable")[:limit]
            frame = frame.iloc[np.sort(keep)].reset_index(drop=True)
    return frame


def make_frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Adds ids to rows of (group or None, task, instruction or None, input, response, source), de-duplicates, sorts.

    A row may have a `role` that it was written for; "", the default, leaves it to the coin of `roles.assign`.
    Of rows with the same content the one whose task and group come first in the alphabet stays, so that the result does
    not depend on the order of the rows. A group of None becomes the record's own id.
    """
    rows = [dict(row, example_id=content_id(row["instruction"], row["input"], row["response"])) for row in rows]
    for row in rows:
        row["group"] = row["group"] or row["example_id"]
        row.setdefault("role", "")
    frame = pd.DataFrame(rows, columns=list(COLUMNS), dtype=object).sort_values(["example_id", "task", "group"])
    distinct = frame.drop_duplicates("example_id").reset_index(drop=True)
    distinct.attrs["duplicates"] = len(frame) - len(distinct)
    return distinct


def content_id(instruction: str | None, input: str, response: str) -> str:
    """The record's id: the first 16 hex digits of the sha256 of its NUL-joined content."""
    return hashlib.sha256("\0".join((instruction or "", input, response)).encode()).hexdigest()[:16]


def uniform(seed: int, purpose: str, keys: Iterable[str]) -> np.ndarray:
    """A number in [0, 1) for every key, by hash alone: float64 [n]. Purposes give independent numbers."""
    # The seed and purpose are hashed once; a copy of that state then takes each key.
    start = hashlib.blake2b(f"{seed}\0{purpose}\0".encode(), digest_size=8)

    def bits(key: str) -> int:
        state = start.copy()
        state.update(key.encode())
        return int.from_bytes(state.digest(), "big") >> 11  # the 53 bits that a float64 holds exactly

    return np.fromiter((bits(key) for key in keys), np.float64) / 2.0**53


# --- Reading: (place, raw record) pairs, where a place is "file:line" ---


def most_bytes() -> int:
    """The largest data file that is read, unpacked: a quarter of the memory that this process may have.

    Files are read whole, and their bytes, their text and their records are in memory at once.
    """
    own, _ = resource.getrlimit(resource.RLIMIT_AS)
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return (machine if own == resource.RLIM_INFINITY else min(own, machine)) // 4


def read_text(path: Path, most: int | None = None) -> str:
    """The text of a UTF-8 file, packed or not; at most `most` bytes (default `most_bytes()`), counted unpacked.

    Raises DataError on a missing, broken or larger file, and on other bytes than UTF-8.
    """
    return _decode(path, _read_whole(path, most_bytes() if most is None else most))


def _decode(path: Path, content: bytes, start: int = 0) -> str:
    """The text of bytes that stand at `start` of a file."""
    try:
        with _enough_memory(path):
            return content.decode("utf-8" if start else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {start + error.start})") from None


def _read_whole(path: Path, most: int, way_out: str = SPLIT) -> bytes:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            return _read_bytes(path, file, most, way_out)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: broken gzip file ({error})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except MemoryError:
        raise _too_large(path, most, way_out) from None


def _read_bytes(path: Path, file: BinaryIO, most: int, way_out: str) -> bytes:
    """In pieces: what a packed file unpacks to is known only when it is unpacked."""
    pieces, size = [], 0
    while piece := file.read(1 << 20):
        size += len(piece)
        if size > most:
            raise _too_large(path, most, way_out)
        pieces.append(piece)
    return b"".join(pieces)


def _too_large(path: Path | str, most: int, way_out: str = SPLIT) -> DataError:
    return DataError(f"{path}: more than {most / 2**20:.0f} MiB, the most that is read here: {way_out}")


@contextlib.contextmanager
def _enough_memory(what: Path | str) -> Iterator[None]:
    """Where there is none left in the block, a DataError says so."""
    try:
        yield
    except MemoryError:
        raise DataError(f"{what}: more than the memory that is free here: {SPLIT}") from None


def _bounded(name: str, pairs: Iterable[tuple[str, Any]], memory: Callable = sys.getsizeof) -> Iterator:
    """The same pairs; a DataError where they need more than half of the memory: small records need more than text."""
    most, size = 2 * most_bytes(), 0
    for place, record in pairs:
        size += RECORD + memory(record)
        if size > most:
            raise _too_large(f"{name}: its records need", most)
        yield place, record


def _memory(value: Any) -> int:
    """Bytes of memory that a JSON value needs, with all that is in it."""
    size, left = 0, [value]
    while left:
        value = left.pop()
        size += sys.getsizeof(value)
        if isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list):
            left += value
    return size


def _read_file(path: Path, text_unit: str) -> Iterator[tuple[str, dict]]:
    kind = next((s for s in reversed(path.suffixes) if s != ".gz"), "")
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".txt": _read_txt, ".parquet": _read_parquet}
    if kind not in readers or (kind == ".parquet" and path.suffix == ".gz"):
        raise DataError(f"{path}: cannot tell the format; supported are .jsonl .json .txt (each also .gz) and .parquet")
    if kind == ".parquet":
        return _read_parquet(path)
    return _read_txt(path, read_text(path), text_unit) if kind == ".txt" else readers[kind](path)


def parse_json(text: str, place: str, first_line: int = 1) -> Any:
    """The value of a JSON text. Raises DataError that names `place` and line, and quotes no text.

    It needs up to OBJECTS times the memory of the text, which is the caller's to bound.
    """
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except json.JSONDecodeError as error:  # its message does not quote the text
        line = first_line + error.lineno - 1
        raise DataError(f"{place}:{line}: broken JSON ({error.msg}, column {error.colno})") from None
    except MemoryError:
        raise DataError(f"{place}:{first_line}: more JSON than the memory that is free here: {SPLIT}") from None
    except RecursionError:
        raise DataError(f"{place}:{first_line}: JSON nested too deeply") from None
    except ValueError:
        raise DataError(f"{place}:{first_line}: a number of more digits than are read") from None
    except _Doubled:
        raise DataError(f"{place}:{first_line}: a JSON object has a key twice: which one counts is not known") from None


class _Doubled(Exception):
    """Of two values with one key this parser takes the last, others the first."""


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Doubled
    return found


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    # Lines end at "\n" alone: a record may hold other line separators, which are not ours. Each is decoded for itself,
    # because one rare character makes a text of all of them four times as large.
    most, start = most_bytes() // OBJECTS, 0
    for number, line in enumerate(io.BytesIO(_read_whole(path, most_bytes())), 1):
        if len(line) > most:
            raise _too_large(f"{path.name}:{number}", most, "take this line out, or make several records of it")
        text = _decode(path, line.removesuffix(b"\n"), start)
        start += len(line)
        if text.strip():
            yield f"{path.name}:{number}", parse_json(text, path.name, number)


def _read_json(path: Path) -> Iterator[tuple[str, dict]]:
    way_out = "one record per line (.jsonl) or Parquet may be longer"
    text = _decode(path, _read_whole(path, most_bytes() // OBJECTS, way_out))
    data = parse_json(text, path.name)
    for number, record in enumerate(data if isinstance(data, list) else [data], 1):
        yield f"{path.name}: record {number}", record


def _read_txt(path: Path, text: str, unit: str) -> Iterator[tuple[str, dict]]:
    if unit not in TEXT_UNITS:
        raise DataError(f"data.text_unit is {unit!r}; known are {', '.join(TEXT_UNITS)}")
    lines = [line.rstrip("\r") for line in text.split("\n")]
    blank = [not line.strip() for line in lines]
    after_blank = [True, *blank[:-1]]
    if unit == "line":
        starts = list(range(len(lines)))
    elif unit == "paragraph":
        starts = [i for i, line in enumerate(lines) if after_blank[i] and not blank[i]]
    else:
        # Between blank lines only: a few lines of tables and formulas inside articles look like a title too.
        before_blank = [*blank[1:], True]
        starts = [i for i, line in enumerate(lines) if _ARTICLE.fullmatch(line) and after_blank[i] and before_blank[i]]
        if not starts:
            raise DataError(f"{path}: no ' = Title = ' line in it; set data.text_unit to 'paragraph' or 'line'")
    if not starts or starts[0] != 0:
        starts.insert(0, 0)
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        if body := "\n".join(lines[start:end]).strip():
            yield f"{path.name}:{start + 1}", {"text": body}


def _read_parquet(path: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise DataError(f"{path}: no such file")
    most, size, rows = most_bytes(), 0, []
    try:
        with pq.ParquetFile(path) as file:
            if len(set(file.schema_arrow.names)) < len(file.schema_arrow.names):
                raise DataError(f"{path}: two columns have one name: which one counts is not known")
            for batch in file.iter_batches(batch_size=1024):  # what it unpacks to stands nowhere that can be trusted
                batch.validate(full=True)
                packed = map(pa.types.is_dictionary, batch.schema.types)  # one text for many rows
                columns = [c.dictionary_decode() if p else c for c, p in zip(batch.columns, packed, strict=True)]
                size += sum(column.nbytes for column in columns)
                if size > most:
                    raise _too_large(path, most)
                rows += pa.RecordBatch.from_arrays(columns, batch.schema.names).to_pylist()
    except MemoryError:  # pyarrow's own is one of these too
        raise _too_large(path, most) from None
    except (pa.ArrowException, OSError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a Parquet file, or a damaged one") from None
    return ((f"{path.name}: row {number}", row) for number, row in enumerate(rows, 1))


def _read_hub(dataset: str, split: str | None) -> Iterator[tuple[str, dict]]:
    import datasets

    name, _, config = dataset.partition(":")
    try:
        data = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"cannot load the dataset {dataset!r} (split {split!r}): {error}") from error
    if isinstance(data, dict):
        raise DataError(f"the dataset {dataset!r} has the splits {', '.join(data)}: name one as data.split")
    return ((f"{dataset} ({split}): row {number}", row) for number, row in enumerate(data, 1))


# --- From raw records to rows ---


def _flatten(place: str, record: Any, all_references: bool) -> Iterator[tuple[str, dict]]:
    """Yields the record, or one per instance of a self-instruct or Super-NaturalInstructions task."""
    if not isinstance(record, dict):
        raise DataError(f"{place}: a record must be a JSON object, this is a {type(record).__name__}")
    nested = record.get("Instances", record.get("instances"))
    if nested is None:
        yield place, record
        return
    shared = {key: value for key, value in record.items() if key not in ("Instances", "instances")}
    if "Definition" in record:
        lines = record["Definition"] if isinstance(record["Definition"], list) else [record["Definition"]]
        if not all(isinstance(line, str) for line in lines):
            raise DataError(f"{place}: Definition must be a text, or a list of texts")
        shared = {"instruction": "\n".join(lines)}
    if not isinstance(nested, list):
        raise DataError(f"{place}: instances must be a list, this is a {type(nested).__name__}")
    for number, instance in enumerate(nested, 1):
        where = f"{place}, instance {number}"
        if not isinstance(instance, dict):
            raise DataError(f"{where}: must be a JSON object, this is a {type(instance).__name__}")
        outputs = instance.get("output")
        if isinstance(outputs, list):  # several references: those that say something
            outputs = [text for text in outputs if isinstance(text, str) and text.strip()] or [""]
            outputs = outputs if all_references else outputs[:1]
        else:
            outputs = [outputs]
        task = {}
        if "Definition" in record and "id" in instance:
            task = {"task": str(instance["id"]).split("-")[0]}  # "task002-<hash>"
        for output in outputs:
            yield where, {**shared, **instance, "output": output, **task}


def _field_names(
    records: list[tuple[str, dict]], format: str, fields: dict[str, str], group_key: str | None
) -> dict[str, str]:
    """Our name -> the source's field name, with everything that the caller named checked to exist."""
    place, first = records[0]
    ours = ("instruction", "input", "response", "task")
    if unknown := sorted(set(fields) - set(ours)):
        raise DataError(f"data.fields sets {', '.join(unknown)}; it can set {', '.join(ours)}")
    found = _listed(first)
    if format == "auto":
        required = {name: {names.get("instruction"), names["response"]} - {None} for name, names in FORMATS.items()}
        format = next((name for name, needed in required.items() if needed <= set(first)), "")
        if not format and "response" not in fields:
            known = "; ".join(f"{name} ({', '.join(sorted(needed))})" for name, needed in required.items())
            raise DataError(f"{place}: unknown fields (found: {found}). Known formats: {known}. Or set data.fields")
    elif format not in FORMATS and format not in NESTED:
        raise DataError(f"data.format is {format!r}; known are auto, {', '.join([*FORMATS, *NESTED])}")
    names = {**FORMATS.get(NESTED.get(format, format), {}), **fields}
    named = [*fields.values(), *([group_key] if group_key else [])]
    for name in named:
        if not any(name in record for _, record in records):
            raise DataError(f"{place}: no record has the field {name!r} (found: {found})")
    return names


def _row(place: str, record: dict, names: dict[str, str], group_key: str | None, stem: str) -> dict | None:
    text = {ours: _text(place, record, name) for ours, name in names.items()}
    is_text = "instruction" not in names
    if not text["response"].strip():
        if is_text:
            return None  # a blank line of a text is not a record
        state = "is empty" if names["response"] in record else f"is missing (found: {_listed(record)})"
        name = names["response"]
        raise DataError(f"{place}: the record has no response: its {name!r} {state}; add it or take the record out")
    if not is_text and not (text["instruction"] + text.get("input", "")).strip():
        raise DataError(f"{place}: the record has no instruction: its {names['instruction']!r} is empty or missing")
    group = str(record.get(group_key) or "").strip() if group_key else ""
    return {
        # The value may be private, and of any kind.
        "group": hashlib.sha256(group.encode(errors="surrogatepass")).hexdigest()[:16] if group else None,
        "task": text.get("task") or stem,
        "instruction": None if is_text else text["instruction"],
        "input": text.get("input", ""),
        "response": text["response"],
        "source": place,
    }


def _listed(record: dict, most: int = 12) -> str:
    """The field names of a record for a message; those that may be text are counted only."""
    names = sorted(name for name in record if re.fullmatch(r"[A-Za-z_][\w.-]{0,39}", str(name), re.A))
    others = len(record) - len(names[:most])
    return ", ".join([*names[:most], *([f"{others} more"] if others else [])]) or "none"


def _text(place: str, record: dict, name: str) -> str:
    value = record.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{place}: the field {name!r} is a {type(value).__name__}, not a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{place}: the field {name!r} holds half a surrogate pair, which is no text") from None
    return value
