"""Parquet files that somebody else may have made: read within a bound of memory, refused with a `TableError`.

What a file says of itself is not believed: how much it unpacks to is counted while it is unpacked, texts and lists are
checked, and what pandas keeps in the metadata of its own files is left aside.
"""

import json
import os
import resource
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq


class TableError(ValueError):
    """A score table that cannot be audited; the message names the file and what to do."""


def most_bytes() -> int:
    """The largest table that is read, unpacked: a quarter of the memory that this process may have."""
    own, _ = resource.getrlimit(resource.RLIMIT_AS)
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return (machine if own == resource.RLIM_INFINITY else min(own, machine)) // 4


def read_schema(path: Path) -> pa.Schema:
    """Names, types and metadata of a file's columns. Raises TableError on what is no Parquet, and on doubled names."""
    with _refused(path), pq.ParquetFile(path) as file:
        return _schema(path, file)


def read_metadata(path: Path) -> dict[str, str]:
    """What a file says of itself. Raises TableError as `read_schema` does."""
    schema = read_schema(path)
    with _refused(path):
        return {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}


def read_table(path: Path, columns: Collection[str] | None = None) -> pa.Table:
    """All rows of a file; of `columns` those that it has, in its order.

    Raises TableError on what is no whole Parquet file, and on one that unpacks to more than `most_bytes()`.
    """
    most, size, batches = most_bytes(), 0, []
    with _refused(path), pq.ParquetFile(path) as file:
        schema = _schema(path, file)
        wanted = [schema.field(name) for name in schema.names if columns is None or name in columns]
        packed = [pa.types.is_dictionary(field.type) for field in wanted]  # one text for many rows
        plain = [f.with_type(f.type.value_type) if p else f for f, p in zip(wanted, packed, strict=True)]
        for batch in file.iter_batches(batch_size=4096, columns=[field.name for field in wanted]):
            batch.validate(full=True)
            found = [c.dictionary_decode() if p else c for c, p in zip(batch.columns, packed, strict=True)]
            size += sum(column.nbytes for column in found)
            if size > most:
                raise _too_large(path)
            batches.append(pa.RecordBatch.from_arrays(found, schema=pa.schema(plain)))
        return pa.Table.from_batches(batches, pa.schema(plain)).replace_schema_metadata(schema.metadata)


def read_frame(path: Path, columns: Collection[str] | None = None) -> pd.DataFrame:
    """`read_table` as a frame with an index of its own."""
    table = read_table(path, columns).replace_schema_metadata(None)
    with _refused(path):
        return table.to_pandas()


def read_json(text: str, path: Path, what: str, kind: type) -> Any:
    """A JSON value of this kind in a file's metadata. Raises TableError on another one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, kind):
        raise TableError(f"{path}: its metadata '{what}' is no JSON {kind.__name__}; score this run again")
    return value


def _schema(path: Path, file: pq.ParquetFile) -> pa.Schema:
    schema = file.schema_arrow
    if len(set(schema.names)) < len(schema.names):
        raise TableError(f"{path}: two columns have one name: which one counts is not known")
    return schema


def _too_large(path: Path) -> TableError:
    return TableError(f"{path}: it unpacks to more than a quarter of this machine's memory: split it by records")


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    try:
        yield
    except TableError:
        raise
    except MemoryError:  # pyarrow's own is one of these too
        raise _too_large(path) from None
    except (pa.ArrowException, OSError, ValueError, TypeError, NotImplementedError):
        raise TableError(f"{path}: not a Parquet file, or a damaged one") from None
