"""Reading score tables: what is wrong with a file is said with its name; nothing is dropped."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from planted_scores import World

from attacks.tables import TableError, read_scores, read_splits, read_text

FIELDS = ("logp", "target_id", "zlib_bytes")


@pytest.fixture
def world(tmp_path):
    return World(tmp_path, {"private": 30, "heldout": 20}, seed=1)


def test_runs_are_found_by_metadata_not_by_path(world):
    world.write("students/kd", seed=3)
    os.rename(world.folder / "students", world.folder / "moved")
    (table,) = read_scores(world.folder)
    assert (table.run, table.seed, table.step) == ("students/kd", 3, "10") and not table.warnings
    assert table.provenance["dtype"] == "float32" and sorted(table.files) == ["heldout", "private"]


def test_without_metadata_the_path_counts_and_a_warning_says_so(world):
    path = world.folder / "students" / "foreign" / "seed2" / "plain" / "private-00000.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(world.table("private", 0, 0.3), path)
    (table,) = read_scores(world.folder)
    assert (table.run, table.seed, table.provenance) == ("students/foreign", 2, {})
    assert "students/foreign/seed2" in table.warnings[0] and "no metadata" in table.warnings[0]


def test_shards_and_row_order_change_nothing(world, tmp_path):
    whole = world.table("private", 0, 0.3)
    shuffled = whole.take(np.random.default_rng(0).permutation(30))
    world.save(whole, "a", "private")
    world.save(shuffled.slice(0, 11), "b", "private")
    world.save(shuffled.slice(11), "b", "private", shard=1)
    a, b = (t.load("private", FIELDS) for t in read_scores(tmp_path))
    np.testing.assert_array_equal(a.ids, b.ids)
    np.testing.assert_array_equal(a.offsets, b.offsets)
    for part in ("token", "example"):
        for name, values in getattr(a, part).items():
            np.testing.assert_array_equal(values, getattr(b, part)[name])
    # and the tokens are still those of their example
    rows = {r["example_id"]: r["logp"] for r in whole.select(["example_id", "logp"]).to_pylist()}
    np.testing.assert_array_equal(a.token["logp"][a.offsets[4] : a.offsets[5]], np.float32(rows[a.ids[4]]))


def test_selecting_segments_keeps_empty_examples(world):
    table = world.table("private", 0, 0.3)
    segments = table["segment"].combine_chunks()
    values = segments.flatten().to_numpy().copy()
    values[: segments.offsets[1].as_py()] = 2
    changed = pa.ListArray.from_arrays(segments.offsets, pa.array(values))
    world.save(table.set_column(table.column_names.index("segment"), "segment", changed), "a", "private")
    tokens = read_scores(world.folder)[0].load("private", FIELDS)
    kept = tokens.select([1])
    assert len(kept.ids) == 30 and (kept.lengths == 0).sum() == 1
    assert kept.lengths.sum() + tokens.select([2]).lengths.sum() == tokens.lengths.sum()


def broken(world, change) -> str:
    world.save(change(world.table("private", 0, 0.3)), "a", "private")
    with pytest.raises(TableError) as error:
        read_scores(world.folder)[0].load("private", FIELDS)
    return str(error.value)


def test_missing_columns(world):
    said = broken(world, lambda t: t.drop_columns(["logp", "task"]))
    assert "private-00000.parquet" in said and "no column task, logp" in said


def test_lists_of_unequal_length(world):
    def change(table):
        lists = table["logp"].to_pylist()
        lists[7] = lists[7][:-1]
        return table.set_column(table.column_names.index("logp"), "logp", pa.array(lists, pa.list_(pa.float32())))

    said = broken(world, change)
    assert world.roles["private"]["ids"][7] in said and "values of logp" in said


def test_duplicate_ids(world):
    said = broken(world, lambda t: pa.concat_tables([t, t.slice(3, 2)]))
    assert "2 duplicate example ids" in said and "role 'private'" in said


def test_rows_of_another_role(world):
    said = broken(world, lambda t: pa.concat_tables([t, world.table("heldout", 0, 0.3)]))
    assert "rows of role heldout" in said


def test_shards_of_two_passes(world):
    world.save(world.table("private", 0, 0.3).slice(0, 9), "a", "private")
    world.save(world.table("private", 0, 0.3).slice(9).drop_columns(["target_id"]), "a", "private", shard=1)
    with pytest.raises(TableError, match="different columns"):
        read_scores(world.folder)[0].load("private", FIELDS)


def test_directories_that_cannot_be_told_apart(world):
    with pytest.raises(TableError, match="no score tables; expected"):
        read_scores(world.folder)
    world.write("a", roles=["private"])
    source = world.folder / "a" / "seed0" / "plain"
    other = world.folder / "copy" / "seed0" / "plain"
    other.mkdir(parents=True)
    (other / "private-00000.parquet").write_bytes((source / "private-00000.parquet").read_bytes())
    with pytest.raises(TableError, match="second table of a/seed0"):
        read_scores(world.folder)
    world.write("b", roles=["heldout"])
    (world.folder / "b" / "seed0" / "plain" / "heldout-00000.parquet").rename(other / "heldout-00000.parquet")
    with pytest.raises(TableError, match="name different runs"):
        read_scores(world.folder)


def test_text_and_splits(world):
    assert read_splits(world.folder) is None
    world.write_text()
    assert len(read_text(world.folder, "private")) == 30 and set(read_splits(world.folder)["role"]) == set(world.roles)
    path = world.folder / "text" / "splits.parquet"
    rows = pq.read_table(path)
    pq.write_table(pa.concat_tables([rows, rows.slice(0, 4)]), path)
    with pytest.raises(TableError, match="4 duplicate example ids"):
        read_splits(world.folder)
