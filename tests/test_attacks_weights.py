"""White-box tables: reading them, the attacks on them, and the part of the records that they are of."""

import json

import numpy as np
import planted_whitebox as planted
import pyarrow.parquet as pq
import pytest
from planted_regimes import make
from planted_scores import World
from planted_study import ids_of, study
from test_attacks_scoring import study_of

from attacks import membership
from attacks.corrections import attack_rows
from attacks.membership import DifferentTokens, score
from attacks.rows import membership_rows
from attacks.signals import CannotScore
from attacks.study import Scores
from attacks.tables import TableError, read_scores
from attacks.weights import Whitebox, read_whitebox

LAYERS = 3
ATTACKS = ("gradient_norm", "gradient_global", "mope", "mope_antithetic")


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path, {"private": 60, "heldout": 50, "calib": 30}, seed=2)
    made.write("students/kd", {"private": 0.3}, technique="kd", setting="disjoint")
    return made


def read(world, role="private"):
    (table,) = read_scores(world.folder)
    return read_whitebox(table, role)


def path_of(world, role="private", shard=0):
    return world.folder / "students/kd/seed0/whitebox" / f"{role}-{shard:05d}.parquet"


def test_rows_come_in_the_order_of_the_ids_whatever_the_files(world):
    planted.write(world, "students/kd", planted.leak_in(LAYERS, 1))
    whole = pq.read_table(path_of(world))
    box = read(world)
    assert (np.diff(np.unique(box.ids, return_inverse=True)[1]) == 1).all() and len(box.ids) == 60
    assert box.blocks == ("embedding", "0", "1", "2", "head") and box.settings["sigma"] == 0.01
    assert box.columns["swap"].shape == (60, 5) and box.columns["lens"].shape == (60, 4)
    row = whole.slice(17, 1).to_pylist()[0]
    at = np.searchsorted(box.ids, row["example_id"])
    for name in ("mope", "swap", "lens"):
        np.testing.assert_array_equal(box.columns[name][at], row[name])
    assert (box.task[at], box.lengths[at]) == (row["task"], row["n_tokens"])
    planted.save(world, whole.slice(40), "students/kd", "private", LAYERS)
    planted.save(world, whole.slice(0, 40), "students/kd", "private", LAYERS, shard=1)
    split = read(world)
    np.testing.assert_array_equal(split.columns["noise_absolute"], box.columns["noise_absolute"])
    np.testing.assert_array_equal(split.ids, box.ids)


def test_without_the_folder_or_the_role_there_is_none(world):
    assert read(world) is None
    planted.write(world, "students/kd", planted.leak_in(LAYERS, 1))
    assert read(world, "calib") is None


def test_strange_and_half_files_are_named(world):
    planted.write(world, "students/kd", planted.leak_in(LAYERS, 1))
    whole, path = pq.read_table(path_of(world)), path_of(world)
    told = {k.decode(): v.decode() for k, v in whole.schema.metadata.items()}
    four = {"blocks": json.dumps(planted.names(2))}
    broken = {
        "no nll": (whole.drop_columns(["nll"]), {}),
        "no metadata 'blocks'": (whole, {"blocks": None}),
        "metadata 'whitebox' is no JSON dict": (whole, {"whitebox": "[0.01]"}),
        "must be texts of at most": (whole.set_column(2, "task", [["x" * 10_000] * 60]), {}),
        "mope is string, not numbers": (whole.set_column(whole.column_names.index("mope"), "mope", [["a"] * 60]), {}),
        "must have 4 numbers in every row: 4 blocks": (whole, four),
        "of role heldout in a file of role 'private'": (
            whole.set_column(1, "role", [["heldout"] * 60]).replace_schema_metadata(told),
            {},
        ),
    }
    for words, (table, changed) in broken.items():
        kept = {k: v for k, v in (told | changed).items() if v is not None}
        pq.write_table(table.replace_schema_metadata(kept), path)
        with pytest.raises(TableError, match=words) as raised:
            read(world)
        assert str(path) in str(raised.value)
    planted.save(world, whole, "students/kd", "private", LAYERS)
    planted.save(world, whole.slice(0, 2), "students/kd", "private", LAYERS, shard=1)
    with pytest.raises(TableError, match="2 duplicate example ids"):
        read(world)
    planted.save(world, whole.drop_columns(["swap"]), "students/kd", "private", LAYERS, shard=1)
    with pytest.raises(TableError, match="two passes"):
        read(world)
    (path.parent / "begun").touch()
    with pytest.raises(TableError, match="not finished"):
        read(world)


def planted_tokens():
    tokens = make({"logp": -np.ones(8)}, [2, 2, 2, 2])
    names = ("gradient_1", "gradient_inf", "gradient_global", "mope", "mope_antithetic")
    columns = {name: np.arange(4.0) + 10 * k for k, name in enumerate(names)}
    return tokens, {"whitebox": Whitebox(tokens.ids, tokens.task, tokens.lengths, columns, ("embedding", "head"), {})}


def test_attacks_are_the_columns_with_their_signs():
    tokens, inputs = planted_tokens()
    box = inputs["whitebox"]
    np.testing.assert_array_equal(score("gradient_norm", tokens, **inputs), -box.columns["gradient_inf"])
    np.testing.assert_array_equal(score("gradient_norm@p=1", tokens, **inputs), -box.columns["gradient_1"])
    np.testing.assert_array_equal(score("gradient_norm@p=inf", tokens, **inputs), -box.columns["gradient_inf"])
    np.testing.assert_array_equal(score("gradient_global", tokens, **inputs), -box.columns["gradient_global"])
    np.testing.assert_array_equal(score("mope", tokens, **inputs), box.columns["mope"])
    np.testing.assert_array_equal(score("mope_antithetic", tokens, **inputs), box.columns["mope_antithetic"])
    assert all(membership.access(attack) == "weights" for attack in ATTACKS)
    with pytest.raises(CannotScore, match="no column gradient_3"):
        score("gradient_norm@p=3", tokens, **inputs)
    with pytest.raises(DifferentTokens, match="other examples"):
        score("mope", tokens.take(np.arange(3)), **inputs)


def test_only_the_records_that_the_weights_saw_are_attacked(world):
    planted.write(world, "students/kd", planted.leak_in(LAYERS, 1), examples=40)
    made = study_of(world.folder, attacks=["loss", *ATTACKS, "gradient_norm@p=1"])
    (pair,) = made.pairs("students/kd", 0, "mope", "private-heldout")
    assert (len(pair.members), len(pair.nonmembers)) == (40, 40)
    assert set(pair.member_ids) == set(world.roles["private"]["ids"][:40])
    by_id = dict(zip(pair.member_ids, pair.members, strict=True))
    first = pq.read_table(path_of(world)).slice(0, 1).to_pylist()[0]
    assert by_id[first["example_id"]] == first["mope"]
    rows = {(r["attack"], r["metric"]): r for r in membership_rows(made) if r["task"] == "all"}
    assert rows["mope", "auc"]["n_members"] == 40 and rows["loss", "auc"]["n_members"] == 60
    assert rows["gradient_norm", "auc"]["access"] == "weights" and rows["gradient_norm@p=1", "auc"]["value"] > 0.6
    assert "not looked into on role 'calib'" in rows["mope", "balanced_accuracy"]["reason"]


def test_examples_that_the_plain_table_lacks_are_an_error(world):
    planted.write(world, "students/kd", planted.leak_in(LAYERS, 1))
    whole = pq.read_table(path_of(world))
    ids = ["elsewhere", *whole["example_id"].to_pylist()[1:]]
    planted.save(world, whole.set_column(0, "example_id", [ids]), "students/kd", "private", LAYERS)
    with pytest.raises(TableError, match="1 examples that the plain one lacks.*elsewhere"):
        study_of(world.folder)


def test_without_a_table_or_a_form_one_line_says_so(world):
    world.write("null")
    planted.write(world, "students/kd", planted.leak_in(LAYERS, 1))
    for role in ("private", "heldout"):
        noise = pq.read_table(path_of(world, role)).drop_columns(["gradient_inf", "gradient_global"])
        planted.save(world, noise, "students/kd", role, LAYERS)
    made = study_of(world.folder, attacks=["loss", *ATTACKS])
    assert made.plan == {"students/kd": ["loss", "mope", "mope_antithetic"], "null": ["loss"]}
    told = {row["reason"]: row for row in made.unavailable}
    line = told["no white-box table: the weights were not looked into (whitebox.runs)"]
    assert (line["models"], line["attacks"]) == ("null", ", ".join(ATTACKS))
    assert told["no gradient_inf in the white-box table (whitebox.forms)"]["models"] == "students/kd"


def test_not_a_number_is_an_error_of_the_tables(world):
    planted.write(world, "students/kd", planted.leak_in(LAYERS, 1))
    table = pq.read_table(path_of(world))
    values = table["mope"].to_numpy().copy()
    values[:2] = np.nan
    planted.save(
        world, table.set_column(table.column_names.index("mope"), "mope", [values]), "students/kd", "private", 3
    )
    row = next(r for r in membership_rows(study_of(world.folder, attacks=["loss", "mope"])) if r["attack"] == "mope")
    assert "2 of 60 members" in row["reason"]


def test_the_strongest_attack_is_sought_among_attacks_on_the_same_records():
    """A white-box attack on a part of the records is in Holm's family, and not in the maximum."""
    rng = np.random.default_rng(0)
    both = lambda m, n: (rng.normal(size=m) + 0.3, rng.normal(size=n))
    made = study({("students/kd", 0, attack): both(80, 80) for attack in ("loss", "zlib")})
    for role, values in zip(("private", "heldout"), both(30, 30), strict=True):
        ids = ids_of(role, 30)
        made.scores["students/kd", 0, "mope", role] = Scores(
            ids, np.array(["all"] * 30), values + 9 * (role == "private")
        )
    made.plan["students/kd"].append("mope")
    rows = {(row["attack"], row["rule"]): row for row in attack_rows(made)}
    assert rows["mope", "holm"]["auc"] == 1 and rows["mope", "holm"]["family"] == 2
    ((best, maximum),) = [(attack, row) for (attack, rule), row in rows.items() if rule == "maximum"]
    assert best != "mope" and maximum["family"] == 2 and maximum["n_members"] == 80
