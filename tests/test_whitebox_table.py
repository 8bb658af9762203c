"""White-box tables of a study: whose they are, what they hold, and when they are made again."""

import json

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from planted_examples import encoded

from configs import base, quickstart
from kd_jax import graph, manifest, runs, sharding, study, tables
from kd_jax.data.records import uniform
from kd_jax.errors import ConfigError
from kd_jax.whitebox import table

PER_BLOCK = ("noise_absolute", "noise_relative", "swap", "swap_back", "gradient_block")
PER_EXAMPLE = ("nll", "mope", "mope_antithetic", "emergence")
NORMS = ("gradient_1", "gradient_2", "gradient_inf", "gradient_global")


def config(**changes):
    """A base, and a run that starts from it: the smallest study with something to swap."""
    made = quickstart.get_config("tiny")
    made.data.synthetic.records = 300
    made.data.minimum = 20
    made.data.max_length, made.data.row_length = 96, 384  # one bucket of lengths holds every example
    made.data.max_prompt = 64
    small = dict(train_roles=("private",), recipe="matched")
    made.runs = {
        "base_student": base.run("student"),
        "direct": base.run("student", "sft", init="base_student", **small),
    }
    made.attack.headline = "direct"
    made.score.roles = ("private", "heldout")
    made.whitebox.update(runs=("direct",), examples=9, draws=2, batch_rows=1)
    made.whitebox.update(changes)
    return made


def work(workdir, **changes) -> None:
    with jax.set_mesh(sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])):
        opened = study.open_study(config(**changes), workdir, jax.sharding.get_mesh())
        runs.train_runs(opened)
        tables.score_runs(opened)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("study")
    work(workdir)
    return workdir


def files(workdir, run: str) -> dict[str, int]:
    found = (workdir / "scores" / run / "seed0" / "whitebox").glob("*.parquet")
    return {f.name: f.stat().st_mtime_ns for f in sorted(found)}


def test_columns_metadata_and_the_same_examples_for_all_runs(made, check):
    ids = {}
    for run in ("direct", "base_student"):
        assert list(files(made, run)) == ["heldout-00000.parquet", "private-00000.parquet"]
        for role in ("private", "heldout"):
            rows = pq.read_table(made / "scores" / run / "seed0" / "whitebox" / f"{role}-00000.parquet")
            assert rows.column_names[:5] == ["example_id", "role", "task", "n_tokens", "nll"] and len(rows) == 9
            assert rows["role"].unique().to_pylist() == [role]
            ids.setdefault(role, rows["example_id"].to_pylist())
            assert rows["example_id"].to_pylist() == ids[role], "the same for all runs"
            told = {k.decode(): v.decode() for k, v in rows.schema.metadata.items()}
            assert (told["run"], told["variant"], told["seed"]) == (run, "whitebox", "0")
            assert json.loads(told["blocks"]) == ["embedding", "0", "head"]
            settings = json.loads(told["whitebox"])
            compared = "base_student" if run != "base_student" else None
            assert settings | {"base": compared, "draws": 2, "sigma": 0.01, "noise_seed": 0} == settings
            for name in PER_EXAMPLE + NORMS:
                assert str(rows.schema.field(name).type) == "float", name
                assert np.isfinite(rows[name].to_numpy()).all(), name
            wanted = [n for n in PER_BLOCK if compared or not n.startswith("swap")]
            assert set(rows.column_names[5:]) == {*wanted, *PER_EXAMPLE[1:], *NORMS, "lens"}
            lists = {name: np.array(rows[name].to_pylist()) for name in [*wanted, "lens"]}
            assert all(v.shape == (9, 2 if name == "lens" else 3) for name, v in lists.items())
            plain = pq.read_table(made / "scores" / run / "seed0" / "plain" / f"{role}-00000.parquet").to_pandas()
            nll = -plain.set_index("example_id").loc[ids[role]].logp.map(np.mean).to_numpy()
            check("white-box: nll vs score table", np.abs(rows["nll"].to_numpy() - nll).max(), 1e-5)
            check("white-box: last lens row vs nll", np.abs(lists["lens"][:, -1] + nll).max(), 1e-5)
            square = (lists["gradient_block"] ** 2).sum(1) / rows["gradient_global"].to_numpy() ** 2
            check("white-box: blocks' squares vs the global norm", np.abs(square - 1).max(), 1e-5)


def test_a_second_start_does_nothing_and_other_settings_are_made_anew(made):
    before, plain = files(made, "direct"), made / "scores" / "direct" / "seed0" / "plain" / "private-00000.parquet"
    stamp = plain.stat().st_mtime_ns
    work(made)
    assert files(made, "direct") == before
    work(made, forms=("lens",), sigma=0.02)
    after = files(made, "direct")
    assert list(after) == list(before) and all(after[name] > before[name] for name in before)
    assert plain.stat().st_mtime_ns == stamp, "the plain tables stay"
    told = pq.read_schema(made / "scores" / "direct" / "seed0" / "whitebox" / "private-00000.parquet")
    assert json.loads(told.metadata[b"whitebox"])["sigma"] == 0.02 and "mope" not in told.names
    folder = made / "scores" / "direct" / "seed0" / "whitebox"
    (folder / "manifest.json").unlink()  # interrupted before its end, with one shard missing
    (folder / "heldout-00000.parquet").unlink()
    work(made, forms=("lens",), sigma=0.02)
    resumed = files(made, "direct")
    assert resumed["private-00000.parquet"] == after["private-00000.parquet"] and set(resumed) == set(after)


def test_tables_of_another_model_are_refused(made):
    folder = made / "scores" / "base_student" / "seed0" / "whitebox"
    inputs = manifest.read(folder)["inputs"]
    manifest.write(folder, inputs | {"model": "another"}, {})
    with pytest.raises(manifest.StaleWork, match="model: was 'another'"):
        work(made, forms=tuple(inputs["whitebox"]["forms"]), sigma=inputs["whitebox"]["sigma"])
    manifest.write(folder, inputs, {})


def test_examples_are_the_first_by_seeded_hash():
    e = encoded(20)
    few = table.examples(e, 5, seed=3)
    rank = uniform(3, "whitebox", e.example_id)
    assert few.example_id.tolist() == [i for i, r in zip(e.example_id, rank) if r <= np.sort(rank)[4]]
    assert set(few.example_id) < set(table.examples(e, 6, seed=3).example_id), "more examples hold the fewer"
    assert table.examples(e, 0, seed=3) is e and table.examples(e, 50, seed=3) is e


def test_bases_are_where_the_chain_of_init_begins():
    made = base.standard_runs(init="matched", seeds=(0, 1)).to_dict()
    made["init_student"]["seeds"] = (5,)
    parsed = {r.name: r for r in graph.parse(made, {"teacher", "student"}, {"matched"}, dict(sft="sft", kd="kd"))}
    assert table.base_of(parsed, "students/kd", 1) == ("base_student", 0)
    assert table.base_of(parsed, "base_teacher", 1) == ("base_teacher", 1)
    asked = base.get_config()
    assert table.chosen(asked, parsed) == set()
    asked.whitebox.runs = ("students/kd", "teacher")
    assert table.chosen(asked, parsed) == {"students/kd", "teacher", "null", "base_student", "base_teacher"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(runs=("students/kd",)), "whitebox.runs names 'students/kd'"),
        (dict(forms=("lense",)), "lense"),
        (dict(roles=("population", "calib", "nobody")), "no record has the role 'nobody'"),
        (dict(roles=()), "whitebox.roles is empty"),
        (dict(draws=0), "draws"),
        (dict(examples=-1), "whitebox.examples"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        with jax.set_mesh(sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])):
            study.open_study(config(**changes), tmp_path, jax.sharding.get_mesh())
