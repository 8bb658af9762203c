"""Records, tokenizers and token ids of unknown origin: read, or refused with a DataError that quotes nothing."""

import base64
import gzip
import io
import json
import shutil
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limited import run_limited

from kd_jax.data import records, token_ids, tokenizer
from kd_jax.data.records import DataError

SECRET = "Zq7 was never to be read"
BOUNDED = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(SECRET),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(["prompt", "response", "instruction", "instances", "Instances", "Definition", "output", "id"])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def spec(place) -> dict:
    """A good tokenizer.json."""
    tokenizer.load({"train_size": 300}, train_texts=["hello world"] * 3).save(place / "tokenizer")
    return json.loads((place / "tokenizer" / "tokenizer.json").read_text())


def refusal(make, *arguments, **keys) -> str:
    with pytest.raises(DataError) as error:
        make(*arguments, **keys)
    said = str(error.value)
    assert SECRET not in said and len(said) < 700
    assert error.value.__cause__ is None and error.value.__suppress_context__ or error.value.__context__ is None
    return said


def parquet(table: pa.Table, **keys) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **keys)
    return buffer.getvalue()


PARQUET = parquet(pa.table({"prompt": ["a"] * 50, "response": [f"{SECRET} {i}" for i in range(50)]}))
CHANGES = st.lists(st.tuples(st.integers(0, len(PARQUET) - 1), st.integers(0, 255)), min_size=1, max_size=4)
BAD_TEXT = pa.Array.from_buffers(
    pa.utf8(), 1, [None, pa.py_buffer(struct.pack("<2i", 0, 2)), pa.py_buffer(b"\xff\xfe")]
)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("half.jsonl", f'{{"prompt": "a", "response": "b"}}\n{{"prompt": "{SECRET}', "half.jsonl:2: broken JSON"),
        ("nul.jsonl", b"\0" * 1000, "nul.jsonl:1: broken JSON"),
        ("bytes.jsonl", b'{"prompt": "' + SECRET.encode() + b'\xff"}', "not UTF-8 text"),
        ("deep.jsonl", "[" * 100_000, "deep.jsonl:1: JSON nested too deeply"),
        ("deep.json", '{"a":' * 100_000, "deep.json:1: JSON nested too deeply"),
        ("digits.jsonl", '{"prompt": ' + "9" * 5000 + "}", "digits.jsonl:1: a number of more digits"),
        ("twice.jsonl", f'{{"prompt": "a", "response": "b", "response": "{SECRET}"}}', "twice.jsonl:1: .* a key twice"),
        ("number.jsonl", '{"prompt": "a", "response": 5}', "number.jsonl:1: the field 'response' is a int"),
        ("list.jsonl", f'{{"prompt": ["{SECRET}"], "response": "b"}}', "'prompt' is a list"),
        ("text.jsonl", f'"{SECRET}"', "text.jsonl:1: a record must be a JSON object"),
        ("keys.jsonl", json.dumps({f"{SECRET} {i}": 1 for i in range(5000)}), "found: 5000 more"),
        ("task.json", '{"Definition": [1], "Instances": []}', "Definition must be a text"),
        ("empty.json", '{"instruction": "a", "instances": []}', "empty.json: no record has an instance"),
        ("cut.jsonl.gz", gzip.compress(b"x" * 1000, mtime=0)[:-8], "broken gzip file"),
        ("none.jsonl.gz", SECRET.encode(), "broken gzip file"),
        ("junk.parquet", b"PAR1" + SECRET.encode() + b"PAR1", "not a Parquet file"),
        ("cut.parquet", PARQUET[:-9], "not a Parquet file"),
        ("kind.parquet", parquet(pa.table({"prompt": [b"a"], "response": [b"b"]})), "'prompt' is a bytes"),
        ("bytes.parquet", parquet(pa.table({"prompt": ["a"], "response": BAD_TEXT})), "not a Parquet file"),
        ("twice.parquet", parquet(pa.table([["a"], ["b"], ["c"]], ["prompt", "response", "response"])), "one name"),
    ],
)
def test_files_that_are_no_records(place, name, content, message):
    (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        records.load(place / name)
    assert name in refusal(records.load, place / name)


@BOUNDED
@given(st.lists(st.dictionaries(FIELDS, JSON, max_size=4), min_size=1, max_size=3), st.sampled_from([None, "id"]))
def test_any_json_is_records_or_is_refused(place, rows, group_key):
    path = place / "any.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        frame = records.load(path, group_key=group_key)
    except DataError as error:
        assert SECRET not in str(error) and "any.jsonl" in str(error)
    else:
        assert frame.response.map(type).eq(str).all() and frame.group.str.fullmatch(r"[0-9a-f]{16}").all()


@BOUNDED
@given(
    st.lists(st.tuples(st.integers(0, len(PARQUET) - 1), st.integers(0, 255)), min_size=1, max_size=4), st.booleans()
)
def test_any_bytes_in_a_parquet_file(place, changes, cut):
    content = bytearray(PARQUET)
    for where, value in changes:
        content[where] = value
    (place / "any.parquet").write_bytes(content[: changes[0][0]] if cut else content)
    try:
        records.load(place / "any.parquet")
    except DataError as error:
        assert SECRET not in str(error) and "any.parquet" in str(error)


@BOUNDED
@given(st.binary(max_size=300))
def test_any_bytes_in_text_files(place, content):
    for name in ("any.json", "any.jsonl", "any.txt", "any.jsonl.gz"):
        (place / name).write_bytes(content)
        try:
            records.load(place / name, text_unit="line")
        except DataError as error:
            assert name in str(error)


def test_packed_files_are_read_up_to_a_bound(place, monkeypatch):
    monkeypatch.setattr(records, "most_bytes", lambda: 1 << 20)
    (place / "bomb.jsonl.gz").write_bytes(gzip.compress(b" " * (1 << 24)))
    with (place / "large.jsonl").open("wb") as file:
        file.truncate(1 << 40)  # a sparse file
    index = pa.array(np.zeros(1 << 14, np.int32))
    rows = pa.DictionaryArray.from_arrays(index, pa.array(["b" * 1000]))
    (place / "bomb.parquet").write_bytes(parquet(pa.table({"prompt": rows, "response": rows})))
    assert (place / "bomb.parquet").stat().st_size < 10_000
    for name in ("bomb.jsonl.gz", "large.jsonl", "bomb.parquet"):
        assert f"{name}: more than 1 MiB, the most that is read here" in refusal(records.load, place / name)


def npy(header: str, data: bytes = b"", version: bytes = b"\1\0") -> bytes:
    size = struct.pack("<H" if version == b"\1\0" else "<I", len(header))
    return b"\x93NUMPY" + version + size + header.encode() + data


SHAPE = "{{'descr': '<i4', 'fortran_order': False, 'shape': {}}}\n"


@pytest.mark.filterwarnings("ignore:overflow encountered")  # NumPy, of the sizes that a header names
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\3\4",
        b"\x80\x04.",
        b"\x93NUMPY\x02\0" + struct.pack("<I", 2**31) + b"{",
        npy(SHAPE.format((10**6, 10**9))),
        npy(SHAPE.format((2**62, 2**62))),
        npy(SHAPE.format((-1, 4))),
        npy(SHAPE.format("(" * 5000)),
        npy("__import__('os').system('true')"),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (1, 1)}\n", b"\x80\x04."),
        npy(SHAPE.format((4, 4)), b"\xff" * 64),
    ],
)
def test_token_ids_that_are_none(place, content):
    (place / "ids.npy").write_bytes(content)
    assert "ids.npy" in refusal(token_ids.load, str(place / "ids.npy"))


def split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(content: str) -> dict:
    return {"type": "Replace", "pattern": {"String": "a"}, "content": content}


def charsmap(content: bytes) -> dict:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()}


END = "<|endoftext|>"
MAP = struct.pack("<2I", 4, 0) + b"abc\0"  # a table of one entry, whose look-ups end outside it
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False}
ADDED = {"id": 0, "content": END, "normalized": True, "special": True, **FLAGS}


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"type": "X"}},
        {"model": {"type": "WordLevel", "vocab": {END: 0}, "unk_token": "absent"}},
        {"model": {"type": "Unigram", "vocab": [["a", 0.0], [END, -1.0]], "unk_id": None}},
        {"model": {"type": "Unigram", "vocab": [["a", 0.0], [END, -1.0]], "unk_id": 99}},
        {"model": {"type": "BPE", "vocab": {END: 0, "a": 2**32 - 1}, "merges": []}},
        {"model": {"type": "BPE", "vocab": {END: 0, "a": -1}, "merges": []}},
        {"model": {"type": "BPE", "vocab": {END: 0}, "merges": ["absent too"]}},
        {"pre_tokenizer": split("((((")},
        {"pre_tokenizer": split("(a+)+$")},
        {"normalizer": replace("b" * 1_000_000)},
        {"normalizer": {"type": "Sequence", "normalizers": [replace("a" * 30)] * 4}},
        {"normalizer": charsmap(b"")},
        {"normalizer": charsmap(MAP), "added_tokens": [ADDED]},
        {"normalizer": charsmap(MAP), "added_tokens": []},
        {"decoder": {"type": "Strip", "content": "a", "start": 0, "stop": 5}},
    ],
)
def test_tokenizers_that_cannot_cut_or_explode(place, spec, change):
    (place / "tokenizer.json").write_text(json.dumps(spec | change))
    assert "tokenizer" in refusal(tokenizer.load, {"json": str(place / "tokenizer.json")})


def test_a_text_that_a_tokenizer_cannot_cut_is_not_quoted(place, spec):
    """The pattern is harmless on all but the record."""
    (place / "tokenizer.json").write_text(json.dumps(spec | {"pre_tokenizer": split("(Z|q+)+(?=!)")}))
    tok = tokenizer.load({"json": str(place / "tokenizer.json")})
    assert "tokenizer" in refusal(tok.encode_batch, ["fine", "q" * 5000 + SECRET])


def test_a_decoder_that_fails_on_some_ids_alone_is_refused_there(place, spec):
    """Where a text is shorter than what is to be stripped off it; what the probe makes is long enough."""
    strip = {"type": "Strip", "content": "Z", "start": 0, "stop": 2}
    decoder = {"type": "Sequence", "decoders": [{"type": "Fuse"}, strip]}
    (place / "tokenizer.json").write_text(json.dumps(spec | {"decoder": decoder}))
    tok = tokenizer.load({"json": str(place / "tokenizer.json")})
    ids = tok.encode_batch(["Z"])[0]
    assert "every id" in refusal(tok.decode, ids) and "every id" in refusal(tok.decode_batch, [ids])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b'{"a":' * 50_000])
def test_files_of_tokenizers_that_are_none(place, spec, content):
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        folder = place / "folder"
        shutil.copytree(place / "tokenizer", folder, dirs_exist_ok=True)
        (folder / name).write_bytes(content)
        assert name in refusal(tokenizer.load, {"path": str(folder)})
        shutil.rmtree(folder)
    (place / "vocab.json").write_bytes(content)
    (place / "merges.txt").write_text("")
    assert "vocab.json" in refusal(tokenizer.load, {"vocab": place / "vocab.json", "merges": place / "merges.txt"})


@pytest.mark.parametrize("value", [5, ["a"], {"content": 5}, "absent" * 10_000])
def test_end_tokens_of_another_kind(place, spec, value):
    (place / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"eos_token": value}))
    assert "eos" in refusal(tokenizer.load, {"path": str(place / "tokenizer")})


def test_code_and_chat_templates_in_a_folder_are_data(place, spec, monkeypatch):
    """A template that would leave a file behind, and a class of its own: neither is rendered, loaded or run."""
    marker = place / "was-run"
    template = f"{{{{ cycler.__init__.__globals__.os.system('touch {marker}') }}}}"
    auto = {"AutoTokenizer": ["evil.Tokenizer", None]}
    config = {"eos_token": END, "chat_template": template, "auto_map": auto, "tokenizer_class": "Tokenizer"}
    (place / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    (place / "tokenizer" / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    tok = tokenizer.load({"path": str(place / "tokenizer")})
    assert tok.decode(tok.encode_batch(["hello {{ 7 * 7 }}"])[0]) == "hello {{ 7 * 7 }}" and not marker.exists()


def test_bombs_need_no_memory(place, spec):
    """Packed and sparse files of gibibytes, and a tokenizer that blows up, in a process that may have 512 MiB."""
    (place / "b.jsonl.gz").write_bytes(_bomb(1 << 29))
    with (place / "b.json").open("wb") as file:
        file.truncate(1 << 36)
    index = pa.array(np.zeros(1 << 19, np.int32))
    rows = pa.DictionaryArray.from_arrays(index, pa.array(["b" * 1000]))
    (place / "b.parquet").write_bytes(parquet(pa.table({"prompt": rows, "response": rows})))
    (place / "tokenizer.json").write_text(json.dumps(spec | {"normalizer": replace("b" * 1_000_000)}))
    names = ("b.jsonl.gz", "b.json", "b.parquet", "tokenizer.json")
    lines = run_limited(
        "import sys; from pathlib import Path; from kd_jax.data import records, tokenizer; import pyarrow.parquet\n"
        "records.load(sys.argv[1]); tokenizer.load({'train_size': 300}, train_texts=['a'])",
        "for path in map(Path, sys.argv[2:]):\n"
        "    load = tokenizer.load if path.name == 'tokenizer.json' else records.load\n"
        "    try: load({'json': path} if path.name == 'tokenizer.json' else path)\n"
        "    except records.DataError as error: print(error)",
        str(_good(place)),
        *(str(place / name) for name in names),
    )
    assert len(lines) == 4 and all("more than" in line for line in lines[:3]) and "times as long" in lines[3]


def _bomb(size: int) -> bytes:
    """So many spaces, packed a MiB at a time."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=1) as file:
        for _ in range(size >> 20):
            file.write(b" " * (1 << 20))
    return buffer.getvalue()


def _good(place: Path) -> Path:
    (place / "good.parquet").write_bytes(PARQUET)
    return place / "good.parquet"


def test_small_objects_and_rare_characters_need_no_memory(place):
    """Texts that fit, whose objects or characters do not: each needs gibibytes where 512 MiB are to be had."""
    record = json.dumps({"prompt": SECRET, "response": "x \N{GRINNING FACE}"}, ensure_ascii=False).encode()
    keys = {f"k{i}": i for i in range(30_000)}
    contents = {
        "objects.json.gz": b"[" + b"{}," * (20 << 20) + b"{}]",
        "objects.jsonl.gz": b"{}\n" * (10 << 20),
        "line.jsonl.gz": record + b'\n{"prompt": [' + b"[]," * (20 << 20) + b"0]}",
        "instances.json.gz": json.dumps(keys | {"instances": [{"output": "x"}] * 30_000}).encode(),
        "character.jsonl.gz": record + b"\n" + (b" " * (1 << 20) + b"\n") * 160,
        "some.json.gz": b"[" + record + b"]",
    }
    for name, content in contents.items():
        (place / name).write_bytes(gzip.compress(content, 1))
    lines = run_limited(
        "import sys; from pathlib import Path; from kd_jax.data import records; import pyarrow.parquet\n"
        "records.load(sys.argv[1])",
        "for path in map(Path, sys.argv[2:]):\n"
        "    try: print(len(records.load(path)))\n"
        "    except records.DataError as error: print(error)",
        str(_good(place)),
        *(str(place / name) for name in contents),
    )
    objects, small, line, instances, *fine = lines
    assert "more than" in objects and "one record per line (.jsonl) or Parquet may be longer" in objects
    assert "more than" in small and "more than" in instances
    assert line.startswith("line.jsonl.gz:2: more than") and fine == ["1", "1"]
    assert SECRET not in "".join(lines)


def test_parsed_json_has_a_bound_for_every_byte_of_text():
    """The bound of a document's text rests on this number; records are counted with all that is in them."""
    for unit in ("{},", "[],", '{"":0},', '{"a":{}},', "[0],", "[[]],", '"ab",', "1e9,", '{"":[]},'):
        text = f"[{unit * 10_000}0]"
        tracemalloc.start()
        value = records.parse_json(text, "x")
        used, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < records.OBJECTS * len(text), unit
        assert records._memory(value) > 0.9 * used - 100_000, unit


def test_no_memory_left_is_an_error_of_the_data(monkeypatch):
    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(json, "loads", full)
    assert refusal(records.parse_json, SECRET, "x.json", 3).startswith("x.json:3: more JSON than the memory")
