"""Reading shadow chains: statistics from tokens, who may be a reference, and that nothing is missing in silence."""

import json
import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attacks.chains import MODELS, read_chains
from attacks.study import Unresolved
from attacks.tables import TableError, read_scores
from tests.planted_chains import SIZES, write_chains
from tests.planted_couples import with_columns
from tests.planted_scores import World


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chains")
    return folder, *write_chains(folder, chains=4, records=40, population=12, group_size=2)


@pytest.fixture
def copied(planted, tmp_path):
    shutil.copytree(planted[0], tmp_path / "scores")
    return tmp_path / "scores"


def change(path, edit) -> None:
    table = pq.read_table(path)
    pq.write_table(edit(table).replace_schema_metadata(table.schema.metadata), path)


def test_the_design_is_read_with_what_stands_beside_it(planted):
    folder, teacher_in, student_in = planted
    chains = read_chains(folder)
    assert len(chains) == 4 and chains.design == "full" and chains.technique == "kd" and chains.setting == "disjoint"
    assert chains.sizes == SIZES and SIZES["student"] in chains.size and chains.hash == "hash0"
    np.testing.assert_array_equal(chains.teacher_in, teacher_in)
    np.testing.assert_array_equal(chains.student_in, student_in)
    assert chains.pairs.tolist() == [0, 0, 1, 1] and not student_in.any()
    assert (chains.teacher_in[0] == ~chains.teacher_in[1]).all() and (np.sort(chains.ids) == chains.ids).all()


def test_statistics_are_those_of_the_tokens(planted, check):
    chains = read_chains(planted[0])
    for model in MODELS:
        path = planted[0] / "shadow" / "chain002" / model
        frame = pd.concat([pd.read_parquet(path / f"{role}-00000.parquet") for role in ("private", "heldout")])
        frame = frame.set_index("example_id").loc[chains.ids]
        for number, (_, row) in enumerate(frame.iterrows()):
            lp, hit = row["logp"].astype(float), row["top1_id"] == row["target_id"]
            expected = {
                "LL": lp.mean(),
                "loss": lp.mean(),
                "prob": np.exp(lp.mean()),
                "logit": (lp - np.log(1 - np.exp(lp))).mean(),
                "hinge": np.where(hit, row["top2_gap"], lp - row["top1_logp"]).mean(),
                "accuracy": hit.mean(),
                "zlib": lp.mean() / row["zlib_bytes"],
                "min_k": np.sort(lp)[: max(1, int(0.2 * len(lp)))].mean(),
            }
            for name, value in expected.items():
                check("chain statistics from their tokens", abs(chains.statistic(model, name)[2, number] - value), 1e-5)
    assert chains.population("student", "LL").shape == (4, 12)


def test_order_of_rows_changes_nothing(planted, copied):
    rng = np.random.default_rng(0)
    for path in [copied / "shadow" / "design.parquet", *(copied / "shadow").glob("chain*/*/*.parquet")]:
        change(path, lambda table: table.take(rng.permutation(len(table))))
    one, two = read_chains(planted[0]), read_chains(copied)
    np.testing.assert_array_equal(one.teacher_in, two.teacher_in)
    np.testing.assert_array_equal(one.group, two.group)
    np.testing.assert_array_equal(one.statistic("teacher", "logit"), two.statistic("teacher", "logit"))
    np.testing.assert_array_equal(one.population("teacher", "LL"), two.population("teacher", "LL"))


def test_a_pair_is_never_its_own_reference(planted):
    chains = read_chains(planted[0])
    for target in range(4):
        for model in MODELS:
            assert (
                chains.comparable(target, model).all(axis=1).tolist() == (chains.pairs != chains.pairs[target]).tolist()
            )


def test_students_with_data_of_their_own_are_compared_with_those_that_agree_on_the_record(tmp_path):
    teacher_in, student_in = write_chains(tmp_path, design="two_by_two", chains=8, records=20)
    chains = read_chains(tmp_path)
    assert chains.setting == "shared"
    usable = chains.comparable(1, "student")
    assert not usable[:4].any() and (usable[4:] == (student_in[4:] == student_in[1])).all()
    # of another quadruple one with the record in the teacher's data and one without
    assert ((usable & teacher_in).sum(axis=0) == 1).all() and ((usable & ~teacher_in).sum(axis=0) == 1).all()
    assert chains.comparable(1, "teacher")[4:].all()


def test_ordinary_tables_and_chains_leave_each_other_alone(tmp_path):
    assert read_chains(tmp_path) is None
    World(tmp_path, {"private": 5, "heldout": 5}).write("teacher")
    write_chains(tmp_path, chains=4, records=10)
    assert [table.run for table in read_scores(tmp_path)] == ["teacher"]
    assert len(read_chains(tmp_path)) == 4


def test_copies_of_the_two_teachers_of_cheap_are_read(tmp_path):
    write_chains(tmp_path, design="cheap", chains=6, records=10)
    values = read_chains(tmp_path).statistic("teacher", "LL")
    np.testing.assert_array_equal(values[0], values[4])
    assert (values[0] != values[1]).all()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("manifest.json", "chain 2 of 4 is not finished"),
        ("student/heldout-00000.parquet", "chain002/student: no score table of role 'heldout'"),
    ],
)
def test_a_chain_that_is_not_whole_is_named(copied, what, words):
    (copied / "shadow" / "chain002" / what).unlink()
    with pytest.raises(TableError, match=words):
        read_chains(copied)


def test_a_missing_chain_and_a_missing_design_are_named(copied):
    shutil.rmtree(copied / "shadow" / "chain003")
    with pytest.raises(TableError, match="chain 3 of 4"):
        read_chains(copied)
    (copied / "shadow" / "design.parquet").unlink()
    with pytest.raises(TableError, match="no design.parquet"):
        read_chains(copied)


def test_a_record_less_or_a_model_that_diverged_is_an_error_not_a_smaller_average(copied):
    path = copied / "shadow" / "chain001" / "teacher" / "private-00000.parquet"
    whole = pq.read_table(path)
    change(path, lambda table: table.slice(1))
    with pytest.raises(TableError, match="lacks 1 records of role 'private', the first is private-"):
        read_chains(copied).statistic("teacher", "LL")
    logp = whole["logp"].combine_chunks().flatten().to_numpy().copy()
    logp[3] = np.nan
    change(path, lambda table: with_columns(whole, logp=logp))
    with pytest.raises(TableError, match="chain001/teacher: 1 records have a LL that is not a number"):
        read_chains(copied).statistic("teacher", "LL")
    assert read_chains(copied).statistic("student", "LL").shape == (4, 40)  # it is another model


def test_tables_of_another_design_or_precision_are_refused(copied):
    path = copied / "shadow" / "chain001" / "student" / "heldout-00000.parquet"
    table = pq.read_table(path)
    told = table.schema.metadata
    provenance = json.dumps(json.loads(told[b"provenance"]) | {"dtype": "bfloat16"})
    for changes, words in (
        ({b"design_hash": b"other"}, "design other"),
        ({b"chain": b"3"}, "of chain 3"),
        ({b"provenance": provenance.encode()}, r"not scored as chain 0 was \(dtype differ\)"),
    ):
        pq.write_table(table.replace_schema_metadata(told | changes), path)
        with pytest.raises(TableError, match=words):
            read_chains(copied).statistic("student", "LL")


def test_a_column_that_one_chain_lacks_is_none(copied):
    path = copied / "shadow" / "chain003" / "student" / "population-00000.parquet"
    change(path, lambda table: table.drop_columns("log1m_p"))
    chains = read_chains(copied)
    assert chains.statistic("student", "LL").shape == (4, 40)
    with pytest.raises(Unresolved, match=r"logit needs \(logp, log1m_p\)"):
        chains.statistic("student", "logit")


def test_a_record_without_response_tokens_is_silent(copied):
    for path in (copied / "shadow").glob("chain*/teacher/private-*.parquet"):

        def edit(table: pa.Table) -> pa.Table:
            segment = table["segment"].combine_chunks()
            values = segment.flatten().to_numpy().copy()
            first = table["example_id"].to_pylist().index("private-00000")
            values[segment.offsets[first].as_py() : segment.offsets[first + 1].as_py()] = 2
            return with_columns(table, segment=values)

        change(path, edit)
    values = read_chains(copied).statistic("teacher", "zlib")
    assert (np.isnan(values).sum(axis=0) == 4 * (read_chains(copied).ids == "private-00000")).all()


def test_a_design_that_does_not_fit_together_is_refused(copied):
    path = copied / "shadow" / "design.parquet"
    table = pq.read_table(path)
    lists = table["teacher_in"].to_pylist()
    for changed, words in (
        (table.drop_columns("group"), "no group"),
        (
            table.set_column(4, "teacher_in", pa.array([lists[0][:3], *lists[1:]])),
            "yes or no for 4 chains in every row",
        ),
        (table.set_column(4, "teacher_in", pa.array([[None] * 4, *lists[1:]])), "yes or no for 4 chains in every row"),
        (table.set_column(4, "teacher_in", pa.array(np.ones(40))), "yes or no for 4 chains in every row"),
        (pa.concat_tables([table, table.slice(0, 2)]), "2 duplicate example ids"),
        (
            table.replace_schema_metadata(table.schema.metadata | {b"pairs": b"[0, 0, 1.5, 1]"}),
            "no pair of every chain",
        ),
        (table.replace_schema_metadata(table.schema.metadata | {b"pairs": b"{"}), "'pairs' is no JSON list"),
    ):
        pq.write_table(changed, path)
        with pytest.raises(TableError, match=words):
            read_chains(copied)
    path.write_bytes(b"nothing")
    with pytest.raises(TableError, match="not a Parquet file"):
        read_chains(copied)
