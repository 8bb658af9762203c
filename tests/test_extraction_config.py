"""Extraction from checkpoints trained elsewhere: texts that are given as token ids and used as they are."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_audit_config import checkpoint, read, scored

from configs import extraction
from kd_jax.data import token_ids
from kd_jax.data.records import DataError
from kd_jax.errors import ConfigError
from kd_jax.manifest import StaleWork

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "lm_extraction"
VOCAB = 320  # of the checkpoints
TEXTS, PREFIX, SUFFIX = 40, 50, 50


def save(path: Path, ids: np.ndarray) -> str:
    np.save(path, ids)
    return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, str]:
    """Two checkpoints, one with another tokenizer, and a table of random ids in the published form."""
    root = tmp_path_factory.mktemp("made")
    paths = {"student": checkpoint(root / "student", 0), "reference": checkpoint(root / "reference", 1)}
    paths["other"] = checkpoint(root / "other", 2, size=290)
    ids = np.random.default_rng(0).integers(0, VOCAB, (TEXTS, PREFIX + SUFFIX)).astype(np.uint16)
    paths["prefix"] = save(root / "prefix.npy", ids[:, :PREFIX])
    paths["suffix"] = save(root / "suffix.npy", ids[:, PREFIX:])
    return paths


def configured(made: dict[str, str], **changes):
    config = extraction.get_config()
    config.update({key: made[key] for key in ("student", "prefix", "suffix")})
    config.update(changes)
    return config


def test_ids_are_scored_as_they_are(made, tmp_path):
    """Random ids are no text that decoding and tokenising again would give back."""
    changes = dict(reference=made["reference"], memorization=dict(continue_examples=9))
    study = scored(configured(made, **changes), tmp_path)
    assert study.config.data.max_length == 128  # the context of the models
    ids = np.concatenate([np.load(made["prefix"]), np.load(made["suffix"])], axis=1).astype(np.int32)
    tok = study.data.tokenizer
    again = [tok.encode_batch([tok.decode(row)])[0] for row in ids.tolist()]
    assert np.mean([a != row for a, row in zip(again, ids.tolist())]) > 0.9
    rows = {tuple(row[PREFIX:]): row for row in ids.tolist()}
    for run in ("student", "reference"):
        table = read(tmp_path, run, "private")
        assert len(table) == TEXTS and set(table.n_tokens) == {SUFFIX} and table.example_id.is_monotonic_increasing
        assert {tuple(row) for row in table.target_id} == set(rows)
        assert all((np.array(segment) == 1).all() for segment in table.segment)
        assert {"topk_lse_k40_t1", "lse_t1"} <= set(table.columns)
    assert {p.name for p in (tmp_path / "scores" / "student" / "seed0" / "plain").glob("*.parquet")} == {
        "private-00000.parquet"
    }
    splits = pd.read_parquet(tmp_path / "splits.parquet")
    assert set(splits.role) == {"private"} and len(splits) == TEXTS
    texts = pd.read_parquet(tmp_path / "scores" / "text" / "private.parquet").set_index("example_id")
    for row in read(tmp_path, "student", "private").itertuples():
        assert [*texts.prompt_ids[row.example_id], *row.target_id] == rows[tuple(row.target_id)]

    continued = read(tmp_path, "student", "private", "continued")
    assert continued.example_id.nunique() == 9 and set(continued.prefix) == {0}
    assert sorted(set(continued.suffix)) == [10, 20, 32, 50]
    assert continued.generated_ids.map(len).max() <= 28 + 50  # the context ends after 128 tokens
    true = read(tmp_path, "student", "private").set_index("example_id").target_id
    for row in continued.itertuples():
        assert row.target_ids.tolist() == true[row.example_id][: row.suffix].tolist()

    # Again: nothing is done twice; another number of continuations is other work.
    stamp = (tmp_path / "scores/student/seed0/continued/private-00000.parquet").stat().st_mtime_ns
    scored(configured(made, **changes), tmp_path)
    assert (tmp_path / "scores/student/seed0/continued/private-00000.parquet").stat().st_mtime_ns == stamp
    changes["memorization"] = dict(continue_examples=8)
    with pytest.raises(StaleWork, match="continuations of .* seed 0 .*\n  continuing.examples: was 9, is 8"):
        scored(configured(made, **changes), tmp_path)


def test_rows_that_are_twice_there_are_one_group(made, tmp_path):
    both = {name: np.concatenate([np.load(made[name])] * 2) for name in ("prefix", "suffix")}
    doubled = made | {name: save(tmp_path / f"{name}.npy", ids[::-1]) for name, ids in both.items()}
    study = scored(configured(doubled, score=dict(temperatures=(), top_k=())), tmp_path / "work")
    assert len(study.data.encoded) == 2 * TEXTS and study.data.counts["distinct texts"] == TEXTS
    splits = study.data.splits
    assert splits.example_id.is_unique and set(splits.groupby("group").size()) == {2}
    table = read(tmp_path / "work", "student", "private").set_index("example_id").target_id.map(tuple)
    assert len(table) == 2 * TEXTS
    assert (table.groupby(splits.set_index("example_id").group.reindex(table.index)).nunique() == 1).all()


def ones(path: Path, *shape: int, value: int = 1) -> str:
    return save(path, np.full(shape, value))


@pytest.mark.parametrize(
    "change, error, words",
    [
        (lambda m, t: dict(prefix=""), ConfigError, "needs --config.prefix=...; see configs/extraction.py"),
        (lambda m, t: dict(prefix=str(t / "none.npy")), DataError, "none.npy: no such file"),
        (lambda m, t: dict(prefix=save(t / "f.npy", np.ones((40, 5)))), DataError, "f.npy: float64; token ids are"),
        (lambda m, t: dict(prefix=ones(t / "s.npy", 40)), DataError, r"shape \(40,\); it needs \[texts"),
        (lambda m, t: dict(suffix=ones(t / "n.npy", 40, 5, value=-1)), DataError, "ids from -1 to -1"),
        (lambda m, t: dict(suffix=ones(t / "v.npy", 40, 5, value=VOCAB)), DataError, "token id 320 is beyond the"),
        (lambda m, t: dict(suffix=ones(t / "l.npy", 39, 5)), DataError, "prefix.npy has 40 rows, .* has 39"),
        (lambda m, t: dict(prefix=text(t / "x.npy")), DataError, "x.npy: not a .npy file of numbers"),
        (
            lambda m, t: dict(reference=m["other"]),
            ConfigError,
            "reference has a tokenizer of its own, to which the ids",
        ),
        (lambda m, t: dict(suffix=ones(t / "b.npy", 40, 90)), ConfigError, "data.max_length is 128, but .* 140"),
        (lambda m, t: dict(memorization=dict(cuts=((0, 60),))), ConfigError, r"\(0, 60\) is longer than every text"),
        (lambda m, t: dict(memorization=dict(coverage_texts=3)), ConfigError, "coverage_texts needs plain texts"),
    ],
)
def test_wrong_input_is_named_in_a_line(change, error, words, made, tmp_path):
    with pytest.raises(error, match=words) as caught:
        scored(configured(made, **change(made, tmp_path)), tmp_path / "work")
    assert "\n" not in str(caught.value)


def text(path: Path) -> str:
    path.write_text("0 1 2\n")
    return str(path)


@pytest.mark.skipif(not REAL.is_dir(), reason="the published files are not here")
def test_the_published_files_have_the_published_shape():
    prefixes, suffixes = token_ids.pair(str(REAL / "val_prefix.npy"), str(REAL / "val_suffix.npy"))
    assert prefixes.shape == suffixes.shape == (1000, 50)
    assert len(np.unique(np.concatenate([prefixes, suffixes], axis=1), axis=0)) == 979  # 21 rows stand there twice
    assert 50000 < max(prefixes.max(), suffixes.max()) < 50257  # GPT-2's tokens
    assert prefixes.dtype == np.int32
