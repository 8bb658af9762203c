"""Reading records: formats, identity, de-duplication, and errors that say where."""

import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kd_jax.data import records
from kd_jax.data.records import COLUMNS, DataError

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
DOLLY = [
    {"instruction": "Name a bird", "context": "", "response": "Robin", "category": "open_qa"},
    {"instruction": "Who came?", "context": "Ann came.", "response": "Ann", "category": "closed_qa"},
    {"instruction": "Name a bird", "context": "", "response": "Wren", "category": "open_qa"},
]


def write(path: Path, content: str) -> Path:
    data = content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def real(name: str) -> Path:
    if not (REAL / name).is_file():
        pytest.skip(f"real data {name} is not at {REAL}")
    return REAL / name


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.json", "d.json.gz", "d.parquet"])
def test_every_file_kind_gives_the_same_records(tmp_path, name):
    path = tmp_path / name
    if name.endswith("parquet"):
        pd.DataFrame(DOLLY).to_parquet(path)
    else:
        write(path, jsonl(DOLLY) if "jsonl" in name else json.dumps(DOLLY, indent=1))
    frame = records.load(path)
    assert tuple(frame.columns) == COLUMNS
    assert sorted(zip(frame.task, frame.input, frame.response, strict=True)) == [
        ("closed_qa", "Ann came.", "Ann"),
        ("open_qa", "", "Robin"),
        ("open_qa", "", "Wren"),
    ]
    expected = hashlib.sha256(b"Who came?\0Ann came.\0Ann").hexdigest()[:16]
    row = frame.set_index("response").loc["Ann"]
    assert row["example_id"] == row["group"] == expected
    assert row["source"].startswith(name) and row["source"].endswith("2")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "a", "input": "b", "output": "c"}, ("a", "b", "c")),
        ({"prompt": "a", "response": "c"}, ("a", "", "c")),
        ({"prompt": "a", "completion": "c"}, ("a", "", "c")),
        ({"text": "c"}, (None, "", "c")),
        ({"id": "seed_task_0", "instruction": "a", "instances": [{"input": "b", "output": "c"}]}, ("a", "b", "c")),
        ({"Definition": "a", "Instances": [{"id": "task3-x", "input": "b", "output": "c"}]}, ("a", "b", "c")),
        ({"Definition": ["a"], "Instances": [{"id": "t-x", "input": "b", "output": ["", "c", "d"]}]}, ("a", "b", "c")),
    ],
)
def test_formats_are_told_from_their_fields(tmp_path, row, expected):
    frame = records.load(write(tmp_path / "x.jsonl", jsonl([row])))
    assert (frame.instruction[0], frame.input[0], frame.response[0]) == expected


def test_named_fields_and_tasks(tmp_path):
    rows = [{"question": "a", "answer": "b", "kind": "k"}, {"question": "c", "answer": "d"}]
    path = write(tmp_path / "qa.jsonl", jsonl(rows))
    frame = records.load(path, fields={"instruction": "question", "response": "answer", "task": "kind"})
    assert dict(zip(frame.response, frame.task, strict=True)) == {"b": "k", "d": "qa"}  # no task: the file's name


def test_identity_does_not_depend_on_order_and_duplicates_are_counted(tmp_path):
    # The same content in two categories: which one stays must not depend on the order of the file either.
    rows = [*DOLLY, {**DOLLY[0], "category": "brainstorming"}, DOLLY[1]]
    forward = records.load(write(tmp_path / "a.jsonl", jsonl(rows)))
    backward = records.load(write(tmp_path / "b.jsonl", jsonl(rows[::-1])))
    pd.testing.assert_frame_equal(forward.drop(columns="source"), backward.drop(columns="source"))
    assert len(forward) == 3 and forward.attrs["duplicates"] == 2
    assert set(forward.task) == {"brainstorming", "closed_qa", "open_qa"}


def test_groups_share_a_key_and_blank_keys_stand_alone(tmp_path):
    rows = [{"instruction": "a", "context": context, "response": f"r{i}"} for i, context in enumerate("ppq   ")]
    frame = records.load(write(tmp_path / "g.jsonl", jsonl(rows)), group_key="context").set_index("response")
    assert frame.group["r0"] == frame.group["r1"] != frame.group["r2"]
    alone = frame.loc[["r3", "r4", "r5"]]
    assert (alone.group == alone.example_id).all()
    assert "p" not in set(frame.group)  # the key's value may be private


def test_limit_picks_by_hash_and_grows_without_replacing(tmp_path):
    rows = [{"prompt": f"p{i}", "response": f"r{i}"} for i in range(50)]
    path = write(tmp_path / "l.jsonl", jsonl(rows))
    small, large = (set(records.load(path, limit=n, seed=1).example_id) for n in (10, 20))
    assert len(small) == 10 and len(large) == 20 and small < large
    shuffled = write(tmp_path / "m.jsonl", jsonl(rows[::-1]))
    assert set(records.load(shuffled, limit=10, seed=1).example_id) == small
    assert set(records.load(path, limit=10, seed=2).example_id) != small


def test_text_units(tmp_path):
    text = " \n = One = \n \n a b \n = not a title , k = \n c \n \n = = Part = = \n \n d \n \n = Two = \n \n e \n"
    path = write(tmp_path / "t.txt.gz", text)
    articles = records.load(path)
    assert sorted(articles.response.str[:8]) == ["= One = ", "= Two = "]
    assert articles.instruction.isna().all()
    assert {"t.txt.gz:2", "t.txt.gz:12"} == set(articles.source)
    assert len(records.load(path, text_unit="line")) == 8
    paragraphs = records.load(path, text_unit="paragraph")
    assert "a b \n = not a title , k = \n c" in set(paragraphs.response) and len(paragraphs) == 6


@pytest.mark.parametrize(
    ("name", "content", "kwargs", "message"),
    [
        ("a.jsonl", jsonl(DOLLY[:1]) + '{"instruction": "SECRET"\n', {}, r"a\.jsonl:2: broken JSON"),
        ("b.json", '[{"prompt": "SECRET",\n "response": }]', {}, r"b\.json:2: broken JSON"),
        ("c.jsonl", jsonl([DOLLY[0], {"instruction": "SECRET", "response": " "}]), {}, r"c\.jsonl:2: .*no response"),
        ("d.jsonl", jsonl([DOLLY[0], {"instruction": "SECRET"}]), {}, r"d\.jsonl:2: .*'response' is missing"),
        ("e.jsonl", jsonl([{"q": "SECRET", "a": "SECRET"}]), {}, r"e\.jsonl:1: unknown fields \(found: a, q\).*dolly"),
        ("f.jsonl", jsonl(DOLLY), {"fields": {"response": "reply"}}, r"f\.jsonl:1: .*'reply' \(found: category"),
        ("g.jsonl", jsonl(DOLLY), {"group_key": "person"}, r"'person'"),
        ("h.jsonl", jsonl(DOLLY), {"fields": {"reply": "response"}}, r"data\.fields sets reply"),
        ("i.jsonl", jsonl(DOLLY), {"format": "dollie"}, r"data\.format is 'dollie'; known are auto, dolly"),
        ("j.jsonl", "\n\n", {}, r"j\.jsonl: no records"),
        ("k.txt", "a\nb\n", {}, r"no ' = Title = ' line"),
        ("l.txt", "a\n", {"text_unit": "word"}, r"text_unit is 'word'"),
        ("m.csv", "a,b", {}, r"m\.csv: cannot tell the format"),
        ("n.jsonl", '["SECRET"]\n', {}, r"n\.jsonl:1: a record must be"),
        ("o.jsonl", jsonl([{"prompt": "SECRET", "response": 3}]), {}, r"o\.jsonl:1: the field 'response' is a int"),
        ("p.jsonl", '{"prompt": "x", "response": "\\ud800"}\n', {}, r"p\.jsonl:1: .*surrogate"),
        ("q.json", '{"Definition": "SECRET", "Instances": [{"input": "i", "output": [""]}]}', {}, r"instance 1"),
        ("r.parquet", "no parquet", {}, r"r\.parquet: not a Parquet"),
    ],
)
def test_errors_say_where_and_quote_nothing(tmp_path, name, content, kwargs, message):
    with pytest.raises(DataError, match=message) as error:
        records.load(write(tmp_path / name, content), **kwargs)
    assert "SECRET" not in str(error.value)


def test_broken_bytes(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"not gzip")
    (tmp_path / "b.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(DataError, match="broken gzip"):
        records.load(tmp_path / "a.jsonl.gz")
    with pytest.raises(DataError, match="not UTF-8"):
        records.load(tmp_path / "b.jsonl")
    with pytest.raises(DataError, match="no such file"):
        records.load(tmp_path / "c.jsonl")
    with pytest.raises(DataError, match="not both"):
        records.load(tmp_path / "b.jsonl", dataset="x/y")


def test_hub_datasets(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        data = datasets.Dataset.from_list([{"text": "one"}, {"text": ""}, {"text": "two"}])
        return data if split else datasets.DatasetDict({"train": data})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    frame = records.load(dataset="someone/texts:small", split="train")
    assert asked == [("someone/texts", "small", "train")]
    assert sorted(frame.response) == ["one", "two"]  # blank lines of a text are not records
    with pytest.raises(DataError, match="splits train"):
        records.load(dataset="someone/texts")


def test_uniform_is_uniform_and_purposes_are_independent():
    keys = [str(i) for i in range(20_000)]
    a, b, c = (records.uniform(seed, purpose, keys) for seed, purpose in ((0, "role"), (0, "coin"), (1, "role")))
    for draw in (a, b, c):
        assert 0 <= draw.min() and draw.max() < 1
        deciles = np.histogram(draw, 10, (0, 1))[0]
        assert ((deciles - 2000) ** 2 / 2000).sum() < 27.9  # chi-square, 9 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.03 and abs(np.corrcoef(a, c)[0, 1]) < 0.03


def test_real_dolly():
    frame = records.load(real("dolly/databricks-dolly-15k.jsonl.gz"))
    assert len(frame) == 14_996 and frame.attrs["duplicates"] == 15_011 - 14_996
    assert frame.instruction.nunique() == 14_779
    assert frame.task.nunique() == 8


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("self_instruct/user_oriented_instructions.jsonl", 252),
        ("self_instruct/seed_tasks.jsonl", 175),
        ("sni/task002_quoref_answer_generation/train.json.gz", 1000),
        ("sni/task363_sst2_polarity_classification/train.json.gz", 1000),
        ("wikitext2/train.txt.gz", 600),  # the published number of articles
        ("wikitext2/valid.txt.gz", 60),
    ],
)
def test_real_files(name, rows):
    frame = records.load(real(name))
    assert len(frame) + frame.attrs["duplicates"] == rows
