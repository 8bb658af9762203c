"""The same seed on the same machine gives the same bits; another number of devices or rows changes rounding alone."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_study import shared

CLOCKED = {"train/scored_tokens_per_second"}


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    """A run from data to report; test_secrets.py looks at the same."""
    return shared(tmp_path_factory.getbasetemp(), "first", umask=0, PYTHONHASHSEED="1")[0]


@pytest.fixture(scope="module")
def again(tmp_path_factory, first) -> Path:
    """The same from scratch, with another order of Python's sets."""
    return shared(tmp_path_factory.getbasetemp(), "again", "--stages=train,score", PYTHONHASHSEED="2")[0]


@pytest.fixture(scope="module")
def spread(tmp_path_factory) -> Path:
    """Its teacher, on four devices, scored in batches of another size."""
    keys = ("--only=teacher", "--config.score.batch_rows=4", "--config.utility.seeds=()")
    return shared(tmp_path_factory.getbasetemp(), "spread", *keys, devices=4)[0]


def metrics(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in CLOCKED} for row in rows]


def tables(workdir: Path) -> list[Path]:
    return sorted(path.relative_to(workdir) for path in (workdir / "scores").rglob("*.parquet"))


def test_the_same_seed_gives_the_same_losses_bit_for_bit(first, again):
    names = sorted(path.relative_to(first) for path in first.rglob("metrics.jsonl"))
    assert len(names) >= 3
    for name in names:
        rows = metrics(first / name.parent)
        assert "train/loss" in rows[-1] and rows == metrics(again / name.parent), name


def test_the_same_seed_gives_the_same_parameters_and_splits(first, again):
    for manifest in first.glob("runs/**/manifest.json"):
        facts = [json.loads((d / manifest.relative_to(first)).read_text())["facts"] for d in (first, again)]
        assert facts[0].get("params_fingerprint") == facts[1].get("params_fingerprint"), manifest
    assert pq.read_table(first / "splits.parquet").equals(pq.read_table(again / "splits.parquet"))
    assert (first / "tokenizer/tokenizer.json").read_bytes() == (again / "tokenizer/tokenizer.json").read_bytes()


def test_the_same_seed_gives_the_same_score_tables_bit_for_bit(first, again):
    """Tables of all runs, variants and pairs, what was generated, and their metadata."""
    assert tables(first) == tables(again) and len(tables(first)) > 20
    for name in tables(first):
        one, other = pq.read_table(first / name), pq.read_table(again / name)
        assert one.equals(other) and told(one) == told(other), name


def told(table: pa.Table) -> dict:
    """What a table says of itself, but for the hash of the sources, which somebody may be editing."""
    metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    provenance = json.loads(metadata.pop("provenance", "{}"))
    provenance.pop("code_version", None)
    return metadata | provenance


def test_devices_and_batches_change_rounding_alone(first, spread, check):
    where = Path("runs/teacher/seed0")
    for one, other in zip(metrics(first / where), metrics(spread / where), strict=True):
        for key in ("train/loss", "eval/dev_loss"):
            if key in one:
                check("loss of a whole run on 4 devices vs 1", abs(one[key] - other[key]), 1e-5)
    for role in ("private", "heldout"):
        name = f"scores/teacher/seed0/plain/{role}-00000.parquet"
        one, other = (pq.read_table(folder / name) for folder in (first, spread))
        assert one["example_id"].equals(other["example_id"])
        means = [[np.mean(row, dtype=np.float64) for row in t["logp"].to_pylist()] for t in (one, other)]
        check("mean log-probability of an example on 4 devices vs 1", np.abs(np.subtract(*means)).max(), 1e-5)
