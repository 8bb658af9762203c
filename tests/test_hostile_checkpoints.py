"""Folders of models that somebody else made: every one is read, or refused with a CheckpointError that says where."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limited import run_limited

from kd_jax import hf
from kd_jax.families import CheckpointError

FIXTURES = Path(__file__).parent / "fixtures"
WEIGHTS, SETTINGS, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
CONFIGS = {name: json.loads((FIXTURES / name / SETTINGS).read_text()) for name in ("gpt2", "llama", "opt", "qwen3")}
WHOLE = (FIXTURES / "gpt2" / WEIGHTS).read_bytes()
SIZE = struct.unpack("<Q", WHOLE[:8])[0]
HEADER, DATA = json.loads(WHOLE[8 : 8 + SIZE]), WHOLE[8 + SIZE :]
FIRST, SECOND = [name for name in HEADER if name != "__metadata__"][:2]
BOUNDED = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**63, -(2**64), 10**18, 10**300]),
    st.floats(),
    st.text(max_size=20),
    st.just("x" * 10_000),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.sampled_from(["rope_type", "rope_theta", "type", "partial_rotary_factor"]), st.text(max_size=3)),
)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of a good folder."""
    shutil.copytree(FIXTURES / "gpt2", tmp_path / "model")
    return tmp_path / "model"


def weights(header: dict | bytes, data: bytes = DATA, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def with_first(**changes) -> dict:
    return HEADER | {FIRST: HEADER[FIRST] | changes}


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        hf.check_pretrained(folder)
    said = str(error.value)
    assert len(said) < 1500 and said.isprintable(), "a message that can be read"
    return said


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        weights(HEADER, size=len(WHOLE)),
        weights(HEADER, size=2**63),
        weights(HEADER, size=101 << 20),
        weights(b"import os"),
        weights(b"\xff\xfe{}"),
        weights(b"[]"),
        weights(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        weights(with_first(data_offsets=[-4, 4])),
        weights(with_first(data_offsets=[2**60, 2**60 + 4])),
        weights(with_first(data_offsets=HEADER[SECOND]["data_offsets"])),
        weights(with_first(data_offsets=HEADER[FIRST]["data_offsets"][::-1])),
        weights(with_first(shape=[2**62, 2**62])),
        weights(with_first(shape=[-1])),
        weights(with_first(dtype="I64")),
        weights(with_first(dtype="object")),
        weights(json.dumps(HEADER).encode()[:-1] + b"," + json.dumps({FIRST: HEADER[FIRST]}).encode()[1:]),
        weights(HEADER, DATA[:-4]),
        weights(HEADER, DATA + b"more"),
    ],
)
def test_weights_that_lie_are_refused_by_the_file(content, folder):
    (folder / WEIGHTS).write_bytes(content)
    said = refusal(folder)
    assert str(folder / WEIGHTS) in said and "ownload it again" in said


def test_names_of_tensors_reach_no_terminal_as_they_are(folder):
    names = {"\x1b[2J\n" + "n" * 100_000: HEADER[FIRST]}
    (folder / WEIGHTS).write_bytes(weights({k: v for k, v in HEADER.items() if k != FIRST} | names))
    assert "left over 'transformer.\\x1b[2J\\nnnn" in refusal(folder)


@BOUNDED
@given(st.lists(st.tuples(st.integers(0, 8 + SIZE - 1), st.integers(0, 255)), min_size=1, max_size=5))
def test_any_bytes_in_a_header(tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("model") / "m"
    shutil.copytree(FIXTURES / "gpt2", folder)
    content = bytearray(WHOLE)
    for place, value in changes:
        content[place] = value
    (folder / WEIGHTS).write_bytes(content)
    try:
        hf.check_pretrained(folder)
    except CheckpointError as error:
        assert str(folder) in str(error)


@BOUNDED
@given(st.sampled_from(sorted(CONFIGS)), st.data())
def test_any_value_of_any_key_of_a_config(family, data):
    config = dict(CONFIGS[family])
    keys = st.sampled_from(sorted(set(config) | {"sliding_window", "use_sliding_window", "rope_scaling", "head_dim"}))
    config |= data.draw(st.dictionaries(keys, HOSTILE, min_size=1, max_size=2))
    try:
        found = hf.config_from_hf(config)
    except CheckpointError as error:
        assert str(error).startswith("config.json") and len(str(error)) < 600
    else:  # sizes that arrays may have
        assert 0 < found.vocab_size * found.width * found.layers * found.heads < 2**63


@pytest.mark.parametrize("content", ["", "[]", "null", '"x"', '{"a":' * 100_000, '{"a": ' + "9" * 10_000, b"\xff\xfe"])
def test_settings_that_are_none(content, folder):
    (folder / SETTINGS).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert str(folder / SETTINGS) in refusal(folder)


def test_settings_of_any_size_are_not_read(folder):
    os.truncate(folder / SETTINGS, 1 << 40)  # a sparse file
    assert "at most 33554432 are read" in refusal(folder)


@pytest.mark.parametrize("value", ["object", "int32", "../float32", 3, {"a": 1}])
def test_dtypes_of_no_weights(value, folder):
    (folder / SETTINGS).write_text(json.dumps(CONFIGS["gpt2"] | {"dtype": value}))
    with pytest.raises(CheckpointError, match="dtype=.*; it must be of float64"):
        hf.load_pretrained(folder, dtype=None)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/outside.safetensors", "a/b.safetensors", "..", "", "weights.bin", "a\0", 3, []]
)
def test_an_index_names_files_of_its_own_folder_alone(name, folder):
    (folder / WEIGHTS).rename(folder.parent / "outside.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {FIRST: name}}))
    assert "is not the name of a safetensors file in this folder" in refusal(folder)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": "x"}'])
def test_an_index_of_another_kind(content, folder):
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(content)
    assert str(folder / INDEX) in refusal(folder)


def test_links_are_followed_to_weights_alone(folder):
    """The hub's cache is made of links, so that they are read; what is no safetensors file is not quoted."""
    (folder / WEIGHTS).rename(folder.parent / "blob")
    (folder / WEIGHTS).symlink_to(folder.parent / "blob")
    hf.check_pretrained(folder)
    (folder.parent / "blob").write_text("a private line of another file\n" * 20)
    assert "private" not in refusal(folder)
    (folder.parent / "blob").unlink()
    assert "has neither" in refusal(folder)


def test_hostile_folders_need_no_memory(folder):
    """Headers of 100 MiB and models of 10^12 layers, in a process that may ask for half a gibibyte."""
    (folder / SETTINGS).write_text(json.dumps(CONFIGS["gpt2"] | {"n_layer": 10**12}))
    other = folder.with_name("other")
    shutil.copytree(FIXTURES / "gpt2", other)
    with (other / WEIGHTS).open("wb") as file:
        file.write(weights(b"", b"", size=100 << 20))
        file.truncate(200 << 20)
    lines = run_limited(
        "import sys; from kd_jax import hf; hf.check_pretrained(sys.argv.pop(1))",  # with its threads and programs
        "for folder in sys.argv[1:]:\n"
        "    try: hf.check_pretrained(folder)\n"
        "    except hf.CheckpointError as error: print(error)",
        *map(str, (FIXTURES / "gpt2", folder, other)),
    )
    assert len(lines) == 2 and "n_layer=1000000000000;" in lines[0] and "a header of 104857600 bytes" in lines[1]
