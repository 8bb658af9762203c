"""Who is in which chain: balance, invariances, and what is kept on disk."""

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from kd_jax.errors import ConfigError
from kd_jax.manifest import StaleWork
from kd_jax.shadow import design


def records(n=60, first=0) -> pd.DataFrame:
    """Every third record shares its group with the one before it."""
    ids = np.arange(first, first + n)
    return pd.DataFrame(
        {
            "example_id": [f"r{i:04d}" for i in ids],
            "role": np.where(ids % 2, "private", "heldout"),
            "task": "qa",
            "group": [f"g{i - (i % 3 == 2)}" for i in ids],
        }
    )


@pytest.mark.parametrize("kind, chains", [("full", 16), ("cheap", 8), ("two_by_two", 12)])
def test_each_record_is_in_half_of_the_chains_and_groups_stay_together(kind, chains):
    drawn = design.draw(kind, chains, records(), seed=3)
    assert drawn.teacher_in.shape == (chains, 60)
    assert (drawn.teacher_in.sum(0) == chains // 2).all()
    assert (drawn.student_in.sum(0) == (chains // 2 if kind == "two_by_two" else 0)).all()
    for matrix in (drawn.teacher_in, drawn.student_in):
        assert (matrix[:, drawn.pool.group == "g4"].std(1) == 0).all()  # r0004 and r0005


def test_pairs_of_the_full_design_complement_one_another_and_differ_from_the_others():
    drawn = design.draw("full", 8, records(), seed=0)
    np.testing.assert_array_equal(drawn.pairs, [0, 0, 1, 1, 2, 2, 3, 3])
    np.testing.assert_array_equal(drawn.teacher_in[1::2], ~drawn.teacher_in[::2])
    assert len(np.unique(drawn.teacher_in, axis=0)) == 8
    assert abs(drawn.teacher_in[::2].mean() - 0.5) < 0.15


def test_each_quadruple_has_every_record_once_in_each_of_the_four_cells():
    drawn = design.draw("two_by_two", 8, records(), seed=0)
    np.testing.assert_array_equal(drawn.pairs, np.repeat([0, 1], 4))
    cells = 2 * drawn.teacher_in + drawn.student_in
    for quadruple in (cells[:4], cells[4:]):
        np.testing.assert_array_equal(np.sort(quadruple, axis=0), np.tile(np.arange(4)[:, None], 60))
    assert (drawn.teacher_in[0] != drawn.student_in[0]).any(), "the two coins are not one"


def test_cheap_chains_share_two_complementary_teachers():
    drawn = design.draw("cheap", 6, records(), seed=0)
    np.testing.assert_array_equal(drawn.teachers, [0, 1, 0, 1, 0, 1])
    np.testing.assert_array_equal(drawn.teacher_in, drawn.teacher_in[[0, 1, 0, 1, 0, 1]])
    np.testing.assert_array_equal(drawn.teacher_in[1], ~drawn.teacher_in[0])


def test_neither_order_nor_new_records_move_a_record():
    plain = design.draw("full", 4, records(), seed=0)
    shuffled = design.draw("full", 4, records().sample(frac=1, random_state=1), seed=0)
    assert shuffled.hash == plain.hash
    more = design.draw("full", 4, records(90), seed=0)
    np.testing.assert_array_equal(more.teacher_in[:, :60], plain.teacher_in)
    assert design.draw("full", 4, records(), seed=1).hash != plain.hash


def test_a_limit_keeps_records_by_hash_with_their_coins():
    whole, some = design.draw("full", 4, records(), seed=0), design.draw("full", 4, records(), seed=0, limit=20)
    assert len(some.pool) == 20
    place = np.flatnonzero(whole.pool.example_id.isin(some.pool.example_id))
    np.testing.assert_array_equal(some.teacher_in, whole.teacher_in[:, place])
    assert not (np.diff(place) == 1).all(), "not the first ones"


@pytest.mark.parametrize(
    "kind, chains, said",
    [
        ("half", 4, "none, full, cheap, two_by_two"),
        ("full", 5, "multiple of 2"),
        ("full", 2, "at least 4"),
        ("two_by_two", 6, "multiple of 4"),
    ],
)
def test_designs_that_cannot_be_balanced_are_refused(kind, chains, said):
    with pytest.raises(ConfigError, match=said):
        design.draw(kind, chains, records(), seed=0)


def test_what_is_kept_reads_back_and_refuses_another_design(tmp_path):
    path, drawn = tmp_path / "design.parquet", design.draw("two_by_two", 8, records(), seed=5)
    design.write(drawn, path, setting="shared", versions={"jax": "0"})
    kept = design.read(path)
    assert (kept.kind, kept.seed, kept.hash, kept.chains) == ("two_by_two", 5, drawn.hash, 8)
    np.testing.assert_array_equal(kept.student_in, drawn.student_in)
    pd.testing.assert_frame_equal(kept.pool, drawn.pool, check_dtype=False)
    table = pq.read_table(path)
    assert table["teacher_in"][0].as_py() == drawn.teacher_in[:, 0].tolist()
    told = table.schema.metadata
    assert (told[b"pairs"], told[b"setting"], told[b"versions"]) == (
        b"[0, 0, 0, 0, 1, 1, 1, 1]",
        b"shared",
        b'{"jax": "0"}',
    )

    design.write(drawn, path)  # the same again: nothing to do
    with pytest.raises(StaleWork, match="shadow.chains was 8, is 12"):
        design.write(design.draw("two_by_two", 12, records(), seed=5), path)
    with pytest.raises(StaleWork, match="examples of the pool was 60, is 90"):
        design.write(design.draw("two_by_two", 8, records(90), seed=5), path)


def test_matrices_that_were_changed_are_noticed(tmp_path):
    path = tmp_path / "design.parquet"
    design.write(design.draw("full", 4, records(), seed=0), path)
    table = pq.read_table(path)
    flipped = [[not x for x in row] for row in table["teacher_in"].to_pylist()]
    pq.write_table(table.set_column(4, "teacher_in", [flipped]), path)
    with pytest.raises(StaleWork, match="was changed after"):
        design.read(path)
