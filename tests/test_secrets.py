"""Nothing leaked, nobody let in: 1,000 planted strings are in no file and no message, files are their owner's, and
nothing that is read is run."""

import ast
import base64
import functools
import json
import logging
import re
import stat
import traceback
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_study import records as planted_records
from tiny_study import secrets, shared

from kd_jax import hf, prepare, private, sharding, storage
from kd_jax.data import records, roles, tokenizer
from kd_jax.data.encode import encode
from kd_jax.study import open_study

ROOT = Path(__file__).parent.parent
PLANTED = set(secrets())
FORM = re.compile(rb"Zq\d{4}[a-z]{8}")


def found(content: bytes) -> set[str]:
    """Planted strings in these bytes: as they are (so also escaped for JSON and HTML), in base64, in hex, as UTF-16."""
    views = [content, content.replace(b"\0", b"")]
    for run in re.findall(rb"[A-Za-z0-9+/_-]{16,}", content):
        for start in range(4):  # of a longer text, of which the planted one is a part
            piece = run[start : len(run) - ((len(run) - start) % 4 == 1)].replace(b"-", b"+").replace(b"_", b"/")
            views.append(base64.b64decode(piece + b"=" * (-len(piece) % 4)))
    for run in re.findall(rb"[0-9a-fA-F]{24,}", content):
        views += [bytes.fromhex(run[start : start + (len(run) - start) // 2 * 2].decode()) for start in range(2)]
    return {match.decode() for view in views for match in FORM.findall(view)} & PLANTED


def unpacked(path: Path) -> bytes:
    """A file's bytes; of a packed table also its cells and metadata."""
    content = path.read_bytes()
    if path.suffix != ".parquet":
        return content
    table = pq.read_table(path)
    text = [column for column in table.itercolumns() if "string" in str(column.type) or "binary" in str(column.type)]
    return content + str(table.schema.metadata).encode() + "\n".join(map(str, (c.to_pylist() for c in text))).encode()


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> tuple[Path, bytes]:
    """A run from data to report, started where others could read whatever does not say that they may not."""
    return shared(tmp_path_factory.getbasetemp(), "first", umask=0, PYTHONHASHSEED="1")


def test_the_search_finds_what_is_there():
    secret = secrets()[7]
    row = planted_records([secret])[0]
    for form in (
        json.dumps(row),
        base64.b64encode(f"xy{secret}z".encode()).decode(),
        secret.encode().hex(),
        f"a{secret}",
    ):
        assert found(b"\x00\xff" + form.encode() + b"\n") == {secret}
    assert found(secret.encode("utf-16")) == {secret} and not found(b"Zq0007aaaaaaaa " + secret[:-1].encode())


def test_a_thousand_planted_strings_are_in_no_file_and_on_no_terminal(study):
    """Logs, event files, metrics, manifests, checkpoints, tables and the report; score tables hold ids of tokens."""
    workdir, said = study
    assert len(PLANTED) == 1000 and not found(said) and b"AUC" in said
    paths = [path for path in workdir.rglob("*") if path.is_file()]
    kinds = {path.name.split(".")[0] for path in paths} | {path.suffix for path in paths}
    assert kinds >= {"events", "metrics", "manifest", "index", "summary", "ledger", "splits", ".csv", ".png", ".npz"}
    assert {path: some for path in paths if (some := found(unpacked(path)))} == {}


def test_everything_is_its_owners_alone_whatever_the_umask(study):
    workdir, _ = study
    assert private.open_to_others(workdir) == []
    modes = {stat.S_IMODE(path.stat().st_mode) for path in workdir.rglob("*")}
    assert modes == {0o600, 0o700}
    assert any("checkpoints" in path.parts for path in workdir.rglob("*")), "orbax's own files are among them"


def test_an_export_is_its_owners_alone(tmp_path):
    model = hf.load_pretrained(ROOT / "tests/fixtures/gpt2")
    extra = tmp_path / "LICENSE"
    extra.write_text("x")
    extra.chmod(0o666)
    hf.save_pretrained(model, tmp_path / "model", family="gpt2", tokenizer_files=[extra], shard_bytes=10_000)
    assert private.open_to_others(tmp_path / "model") == [] and len(list((tmp_path / "model").iterdir())) > 4


def test_a_work_directory_that_is_open_is_told(tmp_path, caplog):
    folder = tmp_path / "a b"
    private.warn_of_open(folder)
    (folder / "scores").mkdir(parents=True, mode=0o700)
    folder.chmod(0o700)
    private.warn_of_open(folder)
    assert not caplog.records
    storage.write_text(folder / "scores" / "x", "")
    (folder / "scores" / "x").chmod(0o640)
    (folder / "link").symlink_to(folder / "scores")  # of mode 0777, as all links
    folder.chmod(0o755)
    private.warn_of_open(folder)
    assert f"(2 files and folders), and is to hold scores of private records. To close it: chmod -R go= '{folder}'" in (
        caplog.text
    )


def lines(path: Path, *extra: str) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in planted_records(secrets(200))) + "".join(extra))
    return str(path)


SECRET = secrets()[0]
ROW = planted_records([SECRET])[0]


@pytest.mark.parametrize(
    ("extra", "keys"),
    [
        (f'{{"prompt": "{SECRET}', {}),
        (json.dumps([SECRET]), {}),
        (json.dumps({SECRET + " is the key": 1}), {}),
        (json.dumps(ROW | {"response": [SECRET]}), {}),
        (json.dumps(ROW | {"response": ""}), {}),
        (json.dumps(ROW | {"prompt": " "}), {}),
        (json.dumps(ROW)[:-1] + f', "prompt": "{SECRET} again"}}', {}),
        (json.dumps(ROW | {"response": f"{SECRET}\ud800"}), {}),
        ("", {"format": "dolly"}),
        ("", {"fields": {"response": "reply"}}),
        ("", {"fields": {"response": "person", "task": "respnse"}}),
        ("", {"group_key": "persn"}),
    ],
)
def test_messages_about_records_hold_ids_and_places(tmp_path, extra, keys):
    with pytest.raises(records.DataError) as error:
        records.load(lines(tmp_path / "records.jsonl", extra), **keys)
    assert not found("".join(traceback.format_exception(error.value)).encode())


def test_messages_about_examples_hold_ids(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    frame = records.load(lines(tmp_path / "records.jsonl"), group_key="person")
    tok = tokenizer.load({"train_size": 300}, train_texts=["hello world"] * 3)
    how = dict(template="plain", bos="none", max_length=64, max_prompt=40)
    twice = frame.iloc[:3].assign(role="")
    failures = [
        lambda: encode(frame, tok, **how | {"max_length": 8}),
        lambda: encode(frame, tok, **how | {"max_prompt": 2, "long_prompt": "drop"}),
        lambda: encode(frame.assign(response=""), tok, **how),
        lambda: roles.by_file(frame, twice, 0.1),
        lambda: roles.check(roles.assign(frame), {"private": 10**6}),
        lambda: tokenizer.load({"train_size": 300, "eos": "absent"}, train_texts=frame.response),
        lambda: tok.encode_batch([frame.response[0], "\ud800" + frame.response[0]]),
    ]
    for fail in failures:
        with pytest.raises(records.DataError) as error:
            fail()
        assert not found("".join(traceback.format_exception(error.value)).encode())
    assert not found(caplog.text.encode())


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.data.update(template="chat"),
        lambda c: c.data.update(max_length=20),
        lambda c: c.data.update(minimum=10**6),
        lambda c: c.data.update(limit=-1),
        lambda c: c.data.fields.update(response="reply"),
        lambda c: c.tokenizer.update(train_size=3),
        lambda c: c.models.student.update(scratch=dict(model_type="gpt2", n_embd=-5)),
    ],
)
def test_messages_about_settings_hold_none_of_the_data(change, tmp_path, capfd, caplog):
    from configs import quickstart

    config = quickstart.get_config("tiny")
    config.data.synthetic.records, config.data.path = 0, lines(tmp_path / "records.jsonl")
    change(config)
    with pytest.raises(ValueError) as error:
        open_study(config, tmp_path / "work", sharding.make_mesh(), "")
    shown = "".join(traceback.format_exception(error.value)) + "".join(capfd.readouterr()) + caplog.text
    assert not found(shown.encode())


# ------------------------------------------------------------------------------------------------- nobody let in

SOURCES = [
    ROOT / "main.py",
    *(p for n in ("kd_jax", "attacks", "configs", "benchmarks") for p in (ROOT / n).rglob("*.py")),
]
UNPICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
RUNNING = {"eval", "exec", "compile", "__import__"}
FORBIDDEN = {
    "os.system",
    "os.popen",
    "torch.load",
    "pd.read_pickle",
    "pandas.read_pickle",
    "yaml.load",
    "runpy.run_path",
}


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


def calls(path: Path) -> list[tuple[str, ast.Call, dict[str, object]]]:
    """What a file calls: dotted name, call, and keyword arguments, those that are constants by value."""
    found = [(dotted(node.func), node) for node in nodes(path) if isinstance(node, ast.Call)]
    return [(name, node, {key.arg: getattr(key.value, "value", key) for key in node.keywords}) for name, node in found]


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_nothing_is_unpickled_and_no_text_is_run():
    wrong = []
    for path in SOURCES:
        for node in nodes(path):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            wrong += [f"{path.name}: import {name}" for name in names if name.split(".")[0] in UNPICKLING]
        for name, call, keys in calls(path):
            if name in RUNNING | FORBIDDEN or "trust_remote_code" in keys or keys.get("allow_pickle"):
                wrong.append(f"{path.name}:{call.lineno}: {name}")
            if name in ("np.load", "numpy.load") and keys.get("allow_pickle") is not False:
                wrong.append(f"{path.name}:{call.lineno}: np.load without allow_pickle=False")
    assert not wrong


def test_no_shell_is_built_from_values():
    """Processes are started from lists of arguments; the shell scripts' own quoting is tested in test_launch.py."""
    wrong = []
    for path in SOURCES:
        for name, call, keys in calls(path):
            if keys.get("shell"):
                wrong.append(f"{path.name}:{call.lineno}: {name} in a shell")
            if name.startswith("subprocess.") and call.args and isinstance(call.args[0], ast.Constant | ast.JoinedStr):
                wrong.append(f"{path.name}:{call.lineno}: {name} of a text")
    for path in (ROOT / "launch").glob("*.sh"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = line.split(" # ")[0]
            if re.search(r"(^|[;&|\s])eval\s", code) or re.search(r'(?<!")\$@', code):
                wrong.append(f"{path.name}:{number}: {line.strip()}")
            if re.search(r'\b(ba)?sh -c "', code):
                wrong.append(f"{path.name}:{number}: a shell of values")
    assert not wrong


def test_token_ids_are_no_archive_of_objects(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{1: 2}], object), allow_pickle=True)
    from kd_jax.data import token_ids

    with pytest.raises(records.DataError, match="not a .npy file of numbers"):
        token_ids.load(str(tmp_path / "x.npy"))


def test_the_splits_hold_no_value_of_a_group(study):
    """A group is a person here; what is kept is a hash of the name."""
    frame = pq.read_table(study[0] / "splits.parquet").to_pandas()
    assert frame.group[frame.role != "canary"].str.fullmatch("[0-9a-f]{16}").all()
    assert frame.example_id.nunique() > 1000 and prepare.splits_fingerprint(frame)
