"""The stage `shadow`: what each chain is trained on, its tables, and how it goes on after it was cut off."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs import quickstart
from kd_jax import manifest, sharding
from kd_jax.errors import ConfigError
from kd_jax.manifest import StaleWork
from kd_jax.score import FIELDS
from kd_jax.shadow import chains, stage
from kd_jax.study import Study, open_study

ONE = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])


def config(design="full", way="loop"):
    """The smoke test's study, of which the chains need the records and nothing that is trained."""
    made = quickstart.get_config("tiny")
    made.data.synthetic.records = 500
    made.data.minimum = 20
    made.models.teacher.scratch = made.models.student.scratch  # one shape, and so fewer programs
    made.recipes.matched.update(steps=4)
    made.score.batch_rows = 4
    made.shadow.update(design=design, chains=4, way=way, records=60)
    return made


def opened(workdir: Path, **changes):
    made = config(**{k: changes.pop(k) for k in ("design", "way") if k in changes})
    made.update_from_flattened_dict(changes)
    with jax.set_mesh(ONE):
        return open_study(made, workdir, ONE)


def run(study: Study) -> None:
    with jax.set_mesh(ONE):
        stage.run_chains(study)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Four chains, run to their end."""
    made = opened(tmp_path_factory.mktemp("shadow"))
    run(made)
    return made


def tables(folder: Path) -> dict[str, pa.Table]:
    return {str(p.relative_to(folder)): pq.read_table(p) for p in sorted(folder.glob("chain*/*/*.parquet"))}


def logp(table: pa.Table) -> np.ndarray:
    return table["logp"].combine_chunks().flatten().to_numpy()


def test_every_chain_leaves_tables_of_pool_and_population(study):
    folder = study.workdir / "scores" / "shadow"
    made, kept = tables(folder), pq.read_table(folder / "design.parquet")
    names = [f"{kind}/{role}-00000.parquet" for kind in ("student", "teacher") for role in (*stage.POOL, "population")]
    assert sorted(made) == sorted(f"chain{c:03d}/{name}" for c in range(4) for name in names)
    for role in stage.POOL:
        ids = kept.filter(pa.compute.equal(kept["role"], role))["example_id"].to_pylist()
        for kind in ("teacher", "student"):
            table = made[f"chain003/{kind}/{role}-00000.parquet"]
            assert table["example_id"].to_pylist() == ids
            assert set(FIELDS) <= set(table.column_names)
            told = {k.decode(): v.decode() for k, v in table.schema.metadata.items()}
            assert (told["run"], told["chain"], told["step"]) == (f"shadow/{kind}", "3", "4")
            assert told["design_hash"] == kept.schema.metadata[b"hash"].decode()
    assert len(made["chain000/teacher/population-00000.parquet"]) == len(study.data.of_role("population")) > 0
    fingerprints = [
        json.loads(t.schema.metadata[b"provenance"])["params_fingerprint"]
        for name, t in made.items()
        if "private" in name
    ]
    assert len(set(fingerprints)) == 8, "four teachers and four students, all different"
    assert b"1 layers x 16" in kept.schema.metadata[b"student_size"]
    assert kept.schema.metadata[b"setting"] == b"disjoint"


def test_members_are_those_of_the_design_and_students_never_meet_the_pool(study):
    work, splits = stage.open_chains(study), study.data.splits.set_index("example_id")
    public = set(splits.index[splits.role == "public"])
    for chain in range(4):
        taught = work.records("teacher", chain)
        assert set(taught.example_id) == set(work.design.pool.example_id[work.design.teacher_in[chain]])
        assert set(work.records("student", chain).example_id) == public
        rows = work.kinds["student"].training.rows(work.records("student", chain), seed=0)
        seen = work.records("student", chain).example_id[rows.examples(np.arange(len(rows)))[0]]
        assert set(seen) <= public, "not one example of its batches is of the pool"
    population = set(study.data.of_role("population").example_id)
    assert not population & ({*work.design.pool.example_id} | public)


def test_students_of_a_two_by_two_design_meet_their_half(tmp_path):
    work = stage.open_chains(opened(tmp_path, design="two_by_two", **{"shadow.chains": 8}))
    for chain in (0, 5):
        own = set(work.records("student", chain).example_id)
        half = set(work.design.pool.example_id[work.design.student_in[chain]])
        assert half and half < own
        assert own - half == set(work.kinds["student"].fixed.example_id)


def test_it_goes_on_with_the_chain_that_was_cut_off(study, monkeypatch):
    folder = study.workdir / "scores" / "shadow"
    before, times = tables(folder), {p: p.stat().st_mtime_ns for p in folder.glob("chain*/*/*.parquet")}
    finished = manifest.read(folder / "chain002")
    (folder / "chain002" / "manifest.json").unlink()
    (folder / "chain002" / "student" / "population-00000.parquet").unlink()
    half = folder / "chain002" / "teacher" / "private-00000.parquet"
    half.write_bytes((folder / "chain000" / "teacher" / "private-00000.parquet").read_bytes())  # of another model

    calls, train = [], chains.train
    monkeypatch.setattr(chains, "train", lambda *args: calls.append(len(args[0])) or train(*args))
    run(study)
    assert calls == [1, 1], "one teacher and one student"
    after = tables(folder)
    assert all(after[name].equals(before[name], check_metadata=True) for name in before)
    assert {p.parts[-3] for p, t in times.items() if p.stat().st_mtime_ns != t} == {"chain002"}
    assert manifest.read(folder / "chain002")["inputs"] == finished["inputs"]


def test_changed_inputs_are_refused_by_name(study):
    with pytest.raises(StaleWork, match=r"(?s)shadow chain 0 .*teacher.recipe.lr: was 0.002, is 0.1"):
        run(opened(study.workdir, **{"recipes.matched.lr": 0.1}))
    with pytest.raises(StaleWork, match="shadow.chains was 4, is 6"):
        run(opened(study.workdir, **{"shadow.chains": 6}))


def test_groups_are_filled_up_to_the_size_of_their_program(tmp_path, monkeypatch):
    """Three chains, then one with two copies of it, whatever trains them (here: nothing)."""
    calls = []

    def train(models, teachers, rows, keys, spec, way, mesh):
        calls.append((way, [np.asarray(m.embed.weight)[0, 0] for m in models], teachers is not None))
        return list(models), np.zeros((len(models), spec.steps))

    monkeypatch.setattr(chains, "GROUP", 3)
    monkeypatch.setattr(chains, "train", train)
    run(opened(tmp_path, way="vmap"))
    assert [(way, len(starts), taught) for way, starts, taught in calls] == [
        ("vmap", 3, taught) for taught in (False, True, False, True)
    ]
    assert [len(set(starts)) for _, starts, _ in calls] == [3, 3, 1, 1]
    facts = [manifest.read(tmp_path / "scores" / "shadow" / f"chain{c:03d}")["facts"] for c in range(4)]
    assert len({f["teacher"]["params_fingerprint"] for f in facts}) == 4


def test_cheap_chains_share_their_teachers_tables(tmp_path):
    run(opened(tmp_path, design="cheap"))
    folder = tmp_path / "scores" / "shadow"
    made, facts = tables(folder), [manifest.read(folder / f"chain{c:03d}")["facts"] for c in range(4)]
    for first, second in ((0, 2), (1, 3)):
        name = "{}/private-00000.parquet"
        teacher, copy = (made[name.format(f"chain{c:03d}/teacher")] for c in (first, second))
        assert copy.equals(teacher, check_metadata=True)
        assert facts[second]["teacher"]["copy_of"] == f"chain{first:03d}"
        one, two = (logp(made[name.format(f"chain{c:03d}/student")]) for c in (first, second))
        assert np.abs(one - two).max() > 1e-4, "students of one teacher differ in their seeds"


def test_a_chain_that_diverges_is_named(tmp_path):
    with pytest.raises(FloatingPointError, match="chain 1 of 4: the loss of its teacher is .* lower the learning rate"):
        run(opened(tmp_path, **{"recipes.matched.lr": 1e30, "recipes.matched.steps": 8}))
    assert not (tmp_path / "scores" / "shadow" / "chain000" / "manifest.json").exists()


@pytest.mark.parametrize(
    "changes, run, said",
    [
        ({"shadow.student": "null"}, {}, "'null', which is not a distilled run"),
        ({"shadow.chains": 5}, {}, "shadow.chains is 5"),
        ({"shadow.way": "pmap"}, {}, "shadow.way is 'pmap'"),
        ({"objectives.kd.policy": "mix"}, {}, "run students/kd: technique kd with policy 'mix'"),
        ({}, {"init": "direct"}, "starts from direct, which is trained on private"),
        ({}, {"setting": "shared"}, "setting 'shared'; design full"),
    ],
)
def test_what_cannot_be_repeated_is_refused_before_any_training(study, changes, run, said):
    changed = study.config.copy_and_resolve_references()
    changed.update_from_flattened_dict(changes)
    student = dataclasses.replace(study.runs["students/kd"], **run)
    with pytest.raises(ConfigError, match=said):
        stage.check(dataclasses.replace(study, config=changed, runs=study.runs | {"students/kd": student}))
