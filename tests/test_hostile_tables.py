"""Score tables of unknown origin: audited, or refused with a TableError that names the file."""

import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limited import run_limited
from planted_scores import World

from attacks import parquet, tables
from attacks.parquet import TableError

BOUNDED = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
FIELDS = ("logp", "entropy", "rank", "top1_id", "n_tokens")
BROKEN = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def scores(tmp_path_factory) -> Path:
    """A folder of scores with everything that the readers below read."""
    folder = tmp_path_factory.mktemp("scores")
    world = World(folder, {"private": 12, "heldout": 12})
    world.write("teacher")
    ids = world.roles["private"]["ids"]
    text = {"example_id": ids, "prompt_ids": [[1, 2]] * len(ids), "response_ids": [[3]] * len(ids), "f_chars": 1.5}
    (folder / "text").mkdir()
    pd.DataFrame(text).to_parquet(folder / "text" / "private.parquet")
    pd.DataFrame({"example_id": ids, "role": "private", "coin": 1}).to_parquet(folder / "text" / "splits.parquet")
    np.savez_compressed(folder / "text" / "token_counts.npz", counts=np.arange(50))
    return folder


@pytest.fixture
def copy(scores, tmp_path) -> Path:
    shutil.copytree(scores, tmp_path / "scores")
    return tmp_path / "scores"


PLAIN = "teacher/seed0/plain/private-00000.parquet"
TEXT, SPLITS, COUNTS = "text/private.parquet", "text/splits.parquet", "text/token_counts.npz"


def read(folder: Path) -> list:
    """Everything that stands in a folder of scores."""
    loaded = [table.load(role, FIELDS) for table in tables.read_scores(folder) for role in table.files]
    return [*loaded, tables.read_text(folder, "private"), tables.read_splits(folder), tables.read_counts(folder)]


def refusal(folder: Path) -> str:
    with pytest.raises(TableError) as error:
        read(folder)
    assert len(str(error.value)) < 1000
    return str(error.value)


def changed(folder: Path, name: str, change) -> Path:
    """The folder, with the table `name` (and its metadata) changed."""
    table = pq.read_table(folder / name)
    pq.write_table(change(table), folder / name)
    return folder


def put(name: str, column) -> object:
    return lambda table: table.set_column(table.column_names.index(name), name, column(table[name]))


def test_a_whole_folder_is_read(scores):
    *loaded, text, splits, counts = read(scores)
    assert [len(tokens.ids) for tokens in loaded] == [12, 12]
    assert len(text) == len(splits) == 12 and list(counts) == list(range(50))


@BOUNDED
@given(st.sampled_from([PLAIN, TEXT, SPLITS, COUNTS]), BROKEN, st.booleans())
def test_any_bytes_in_any_file(scores, tmp_path_factory, name, changes, cut):
    folder = tmp_path_factory.mktemp("broken") / "scores"
    shutil.copytree(scores, folder)
    content = bytearray((folder / name).read_bytes())
    for place, value in changes:
        content[int(place * len(content))] = value
    (folder / name).write_bytes(content[: int(changes[0][0] * len(content))] if cut else content)
    try:
        read(folder)
    except TableError as error:
        assert str(folder) in str(error)
    finally:
        shutil.rmtree(folder.parent)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (PLAIN, put("logp", lambda c: pa.array([None, *c.to_pylist()[1:]], c.type)), "logp has empty cells"),
        (PLAIN, put("rank", lambda c: pa.array([[None] * len(r) for r in c.to_pylist()], c.type)), "rank has empty"),
        (PLAIN, put("logp", lambda c: pa.array([[["a"]]] * len(c))), "logp is list<.*>, not numbers"),
        (PLAIN, put("logp", lambda c: pa.array(["a"] * len(c))), "logp is string, not a list"),
        (PLAIN, put("n_tokens", lambda c: pa.array(["a"] * len(c))), "n_tokens is string, not numbers"),
        (PLAIN, put("example_id", lambda c: pa.array([[1]] * len(c))), "example_id is list<.*>, not a text"),
        (PLAIN, put("task", lambda c: pa.array(["t" * 10**6] * len(c))), "a task has 1000000 characters"),
        (PLAIN, lambda t: pa.Table.from_arrays([*t.columns, t["logp"]], [*t.column_names, "logp"]), "have one name"),
        (PLAIN, lambda t: t.replace_schema_metadata({"run": "a", "seed": "-1"}), "name no seed"),
        (PLAIN, lambda t: t.replace_schema_metadata({"run": "a", "seed": "9" * 5000}), "name no seed"),
        (PLAIN, lambda t: t.replace_schema_metadata({"run": "a", "seed": "0", "provenance": "[1]"}), "no JSON dict"),
        (PLAIN, lambda t: t.replace_schema_metadata({"run": "a", "seed": "0", "provenance": "{"}), "no JSON dict"),
        (PLAIN, lambda t: t.replace_schema_metadata({b"run": b"\xff", b"seed": b"0"}), "not a Parquet file"),
        (TEXT, put("prompt_ids", lambda c: pa.array(["ab"] * len(c))), "prompt_ids must be a list of token ids"),
        (TEXT, put("prompt_ids", lambda c: pa.array([["a"]] * len(c))), "prompt_ids must be a list of token ids"),
        (TEXT, put("prompt_ids", lambda c: pa.array([[-1]] * len(c))), "prompt_ids must be a list of token ids"),
        (TEXT, put("prompt_ids", lambda c: pa.array([[2**40]] * len(c))), "prompt_ids must be a list of token ids"),
        (SPLITS, put("example_id", lambda c: pa.array(["a" * 10**6] * len(c))), "an example_id has 1000000 char"),
    ],
)
def test_tables_that_lie(copy, name, change, message):
    if name == PLAIN and "replace_schema_metadata" in change.__code__.co_names:
        changed(copy, PLAIN.replace("private", "heldout"), change)  # both files of the folder say the same
    with pytest.raises(TableError, match=message):
        read(changed(copy, name, change))


def test_what_pandas_wrote_of_itself_is_left_aside(copy):
    """An index that is not there, types that are none, and an extension type that would be unpickled."""
    named = {"index_columns": ["absent", {"kind": "range"}], "columns": [{"name": 3}], "column_indexes": "x"}
    for told in (json.dumps(named), "{", "[]"):
        changed(copy, SPLITS, lambda t, told=told: t.replace_schema_metadata({"pandas": told}))
        read(copy)
    marker = copy / "was-run"
    pickled = f"cposix\nsystem\n(S'touch {marker}'\ntR.".encode()
    told = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickled}
    table = pq.read_table(copy / SPLITS)
    fields = [f.with_metadata(told) if f.name == "coin" else f for f in table.schema]
    pq.write_table(pa.Table.from_arrays(table.columns, schema=pa.schema(fields)), copy / SPLITS)
    read(copy)
    assert not marker.exists()


def archive(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.writestr(name, content)
    return buffer.getvalue()


def npy(array: np.ndarray, **keys) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **keys)
    return buffer.getvalue()


HUGE = npy(np.zeros(3, np.int64)).replace(b"(3,), }" + b" " * 15, b"(300000000000000000,), }"[:22])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\3\4",
        npy(np.zeros(3)),
        archive("counts.npy", b"x"),
        archive("other.npy", npy(np.zeros(3))),
        archive("counts.npy", npy(np.array([{}], object), allow_pickle=True)),
        archive("counts.npy", npy(np.array([[1]]))),
        archive("counts.npy", npy(np.array(["a"]))),
        archive("counts.npy", npy(np.array([-1]))),
        archive("counts.npy", HUGE),
    ],
)
def test_counts_that_are_none(copy, content):
    (copy / COUNTS).write_bytes(content)
    assert COUNTS in refusal(copy)


def test_tables_are_read_up_to_a_bound(copy, monkeypatch):
    monkeypatch.setattr(parquet, "most_bytes", lambda: 1 << 20)
    monkeypatch.setattr(tables, "most_bytes", lambda: 1 << 20)
    read(copy)
    (copy / COUNTS).write_bytes(archive("counts.npy", npy(np.zeros(1 << 18))))
    assert "unpacks to" in refusal(copy)
    changed(copy, PLAIN, put("logp", lambda c: pa.array([[0.0] * 50_000] * len(c), c.type)))
    assert (copy / PLAIN).stat().st_size < 50_000 and "unpacks to more than a quarter" in refusal(copy)


def test_bombs_need_no_memory(copy):
    """A table and an archive of more than the process may have, beside its libraries."""
    (copy / COUNTS).write_bytes(archive("counts.npy", npy(np.zeros(1 << 26))))
    name = pa.DictionaryArray.from_arrays(pa.array(np.zeros(1 << 20, np.int32)), pa.array(["t" * 1000]))
    lists = pa.array([[1.0]] * (1 << 20))
    columns = {"example_id": name, "role": name, "task": name, "segment": lists, "logp": lists}
    changed(copy, PLAIN, lambda table: pa.table(columns, metadata=table.schema.metadata))
    lines = run_limited(
        "import sys; from attacks import tables; tables.read_text(sys.argv[1], 'private')",
        "for read in (tables.read_counts, lambda f: tables.read_scores(f)[0].load('private', ['logp'])):\n"
        "    try: read(sys.argv[1])\n"
        "    except tables.TableError as error: print(error)",
        str(copy),
    )
    assert len(lines) == 2 and all("unpacks to" in line for line in lines)
