"""Utility from generated responses and learning-rate grids, and the ledger: values by hand, files that are wrong."""

import numpy as np
import pandas as pd
import pytest
from planted_scores import QUICK, World, row, six, tables

from attacks.audit import audit
from attacks.tables import TableError

LOSS = QUICK | {"attacks": ["loss"], "blind": False, "headline_model": "students/kd"}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("utility")
    six(folder / "scores", records=60)
    summary = audit(folder / "scores", folder / "out", LOSS)
    return folder, tables(folder / "out"), summary


def small(folder, **provenance):
    world = World(folder / "scores", {"private": 20, "heldout": 20, "dev": 20})
    world.write("students/kd", technique="kd", **provenance)
    return world


def test_rouge_is_the_mean_over_examples_of_the_mean_over_samples(planted):
    folder, found, _ = planted
    for measure, column, scale in (("rouge_l@dev", "rouge_l", 100), ("response_tokens@dev", "n_tokens", 1)):
        each = []
        for k in range(3):
            frame = pd.read_parquet(folder / "scores/students/gkd" / f"seed{k}" / "generated/dev.parquet")
            by_example = scale * frame.groupby("example_id")[column].mean()
            each.append(by_example.mean())
            value = row(found["utility"], model="students/gkd", measure=measure, seed=str(k))
            assert value["value"] == pytest.approx(each[k]) and value["n"] == 60
            half = 1.96 * by_example.std() / np.sqrt(60)  # the interval is over examples, not over samples
            assert value["ci_high"] - value["ci_low"] == pytest.approx(2 * half, rel=0.25)
        pooled = row(found["utility"], model="students/gkd", measure=measure, seed="all")
        assert pooled["value"] == pytest.approx(np.mean(each)) and pooled["ci_low"] < np.mean(each) < pooled["ci_high"]
    assert row(found["utility"], model="null", measure="rouge_2@dev")["value"] < 100


def test_perplexity_of_both_roles(planted):
    found = planted[1]["utility"]
    for loss, perplexity in (("dev_loss", "perplexity"), ("heldout_loss", "heldout_perplexity")):
        a, b = (row(found, model="students/kd", measure=m, seed="1") for m in (loss, perplexity))
        np.testing.assert_allclose(
            np.exp(a[["value", "ci_low", "ci_high"]].astype(float)), b[["value", "ci_low", "ci_high"]].astype(float)
        )


def test_every_learning_rate_has_its_row_and_a_diverged_one_no_value(planted):
    folder, found, summary = planted
    grid = found["utility"].query("model == 'students/kd' and seed == '0'").set_index("measure")["value"]
    assert grid["grid_dev_loss@lr=0.0001"] == 2.3 and grid["grid_dev_loss@lr=0.0005"] == 2.1
    assert np.isnan(grid["grid_dev_loss@lr=0.002"])
    run = next(r for r in summary["runs"] if r["model"] == "students/kd")
    assert run["objective"]["divergence"] == "fkl" and run["training"]["2"]["select"] == "last"


def test_warnings_of_training_are_passed_on_once(planted):
    assert (
        "students/distillm (seed 0, 1, 2): it ended with phi = 0: no student sample was used" in planted[2]["warnings"]
    )


def test_ledgers_are_joined_and_counted(planted):
    folder, _, summary = planted
    ledger = pd.read_parquet(folder / "out/ledger.parquet")
    assert list(ledger.columns[:4]) == ["model", "seed", "example_id", "role"]
    assert ledger.groupby(["model", "seed"]).size().eq(200).all() and ledger["model"].nunique() == 6
    facts = {f["model"]: f for f in summary["ledger"] if f["seed"] == "0"}
    assert facts["students/gkd"]["shares"] == {"dataset": 0.5, "student": 0.5}
    assert (facts["students/gkd"]["own"], facts["students/gkd"]["foreign"]) == (0, 12)
    assert (facts["students/kd"]["own"], facts["students/kd"]["foreign"]) == (12, 0)
    assert facts["students/kd"]["mean_age"] is None and facts["students/gkd"]["mean_age"] == 6


def test_ledger_weights_and_plain_text(tmp_path):
    """Two uses of one prompt, by hand: tokens weigh the shares, uses weigh the age, plain text is no response."""
    small(tmp_path)
    at = {"loss": "kd", "first_step": 0, "last_step": 9, "times": 1, "replayed": False, "mean_age": 0.0, "max_age": 0}
    member = at | {"example_id": "p", "role": "private"}
    rows = [
        member | {"source": "student", "tokens": 30, "times": 3, "mean_age": 2.0, "max_age": 4},
        member | {"source": "student", "tokens": 10, "replayed": True, "mean_age": 10.0, "max_age": 10},
        member | {"source": "dataset", "tokens": 40},
        at | {"example_id": "w", "role": "corpus", "source": "lm_corpus", "tokens": 500, "loss": "ce"},
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "scores/students/kd/seed0/ledger.parquet")
    (facts,) = audit(tmp_path / "scores", tmp_path / "out", LOSS)["ledger"]
    assert facts["shares"] == {"dataset": 0.5, "student": 0.5} and facts["plain_tokens"] == 500
    assert facts["response_tokens"] == 80 and facts["replayed"] == 10 / 80
    assert facts["mean_age"] == (3 * 2 + 10) / 4 and facts["max_age"] == 10
    assert (facts["own"], facts["foreign"]) == (1, 1)


def test_old_tables_have_none_of_it(tmp_path):
    small(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/ledger.parquet").write_bytes(b"of an earlier audit")
    summary = audit(tmp_path / "scores", tmp_path / "out", LOSS)
    assert summary["ledger"] == [] and summary["ranking"] == [] and not (tmp_path / "out/ledger.parquet").exists()
    assert summary["runs"][0]["training"] == {} and summary["runs"][0]["objective"] is None
    assert not tables(tmp_path / "out")["utility"]["measure"].str.contains("@").any()


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda f: f.drop(columns="rouge_l"), "no column rouge_l"),
        (lambda f: f.head(0), "no rows"),
        (lambda f: pd.concat([f, f.head(2)]), "2 examples stand there twice"),
    ],
)
def test_generated_tables_that_cannot_be_used_are_named(tmp_path, change, words):
    small(tmp_path).write_generated("students/kd", "dev", 0.3)
    path = tmp_path / "scores/students/kd/seed0/generated/dev.parquet"
    change(pd.read_parquet(path)).to_parquet(path)
    with pytest.raises(TableError, match=f"dev.parquet: {words}"):
        audit(tmp_path / "scores", tmp_path / "out", LOSS)


def test_generated_tables_of_another_run_or_unfinished_are_refused(tmp_path):
    small(tmp_path).write_generated("students/kd", "dev", 0.3)
    folder = tmp_path / "scores/students/kd/seed0/generated"
    (folder / "begun").touch()
    with pytest.raises(TableError, match="not finished"):
        audit(tmp_path / "scores", tmp_path / "out", LOSS)
    (folder / "begun").unlink()
    folder.rename(tmp_path / "moved")
    small(tmp_path).write("students/gkd", technique="gkd")
    (tmp_path / "moved").rename(tmp_path / "scores/students/gkd/seed0/generated")
    with pytest.raises(TableError, match="belongs to students/kd/seed0, not to students/gkd/seed0"):
        audit(tmp_path / "scores", tmp_path / "out", LOSS)


def test_a_ledger_without_a_column_is_named(tmp_path):
    small(tmp_path).write_ledger("students/kd", {"dataset": 1.0})
    path = tmp_path / "scores/students/kd/seed0/ledger.parquet"
    pd.read_parquet(path).drop(columns="times").to_parquet(path)
    with pytest.raises(TableError, match="ledger.parquet: no column times"):
        audit(tmp_path / "scores", tmp_path / "out", LOSS)
