"""Exposure: ranks among references, the tail of the fitted distribution, and rows for planted canaries."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from planted_scores import QUICK, World
from scipy import stats

from attacks.audit import complete
from attacks.exposure import COLUMNS, exposure_facts, exposure_rows, extrapolated, interpolated, log_cdf
from attacks.report.canaries import _exposure_row
from attacks.scoring import load_study


def test_ranks():
    """Order of the output is that of the input; a tie counts the reference first; worse than all is negative."""
    references = np.array([4.0, 1, 3, 2])
    np.testing.assert_allclose(interpolated(np.array([5.0, 0.5, 2]), references), [2 - np.log2(5), 2, 2 - np.log2(3)])
    losses = np.random.default_rng(0).normal(size=50)
    ranked = interpolated(losses, np.random.default_rng(1).normal(size=200))
    assert (np.diff(ranked[np.argsort(losses)]) <= 0).all()


@pytest.mark.parametrize("shape", [-3.0, 0.0, 2.0])
def test_tail_against_scipy_and_beyond_it(shape, check):
    x = np.array([-2.0, 0.0, 0.7, 3.0])
    expected = stats.skewnorm.logcdf(x, shape, 0.5, 1.2)
    check("log CDF of the skew-normal against scipy", np.max(np.abs(log_cdf(x, shape, 0.5, 1.2) - expected)), 2e-3)
    far = log_cdf(np.array([-60.0, -50.0]), shape, 0.5, 1.2)
    assert np.isfinite(far).all() and far[0] < far[1] < -500
    if shape == 0:  # the normal's tail is known everywhere
        np.testing.assert_allclose(far, stats.norm.logcdf((np.array([-60.0, -50]) - 0.5) / 1.2), rtol=1e-4)


def test_extrapolation_agrees_with_ranks_where_both_reach():
    rng = np.random.default_rng(2)
    references, losses = rng.normal(3, 0.4, 2000), np.array([2.2, 2.6, 3.0, 3.5, 0.5])
    tail, fit = extrapolated(losses, references)
    np.testing.assert_allclose(tail[:4], interpolated(losses[:4], references), atol=0.35)
    assert tail[4] > 20 > np.log2(2000) and fit > 0.05  # far beyond what ranks can say


def canaries(folder, repeats=True) -> World:
    world = World(folder, {"private": 30, "heldout": 30, "canary": 120}, seed=3)
    world.write("teacher", {"canary": 0.6}, train_roles=["private"])
    world.write_text()
    path = folder / "text" / "splits.parquet"
    splits = pd.read_parquet(path)
    splits["placement"] = np.where(splits.index % 3 == 0, "teacher_only", "none")
    splits.assign(repeats=np.where(splits.index % 2, 4, 1)).to_parquet(path)
    return world


def test_rows_of_planted_canaries(tmp_path):
    world = canaries(tmp_path)
    study = load_study(tmp_path, complete(QUICK | {"attacks": ["loss"]}, tmp_path))
    rows = exposure_rows(study)
    splits = pd.read_parquet(tmp_path / "text" / "splits.parquet").query("role == 'canary'").set_index("example_id")
    inserted = splits[(splits.coin == 1) & (splits.placement != "none")]
    assert [row["example_id"] for row in rows] == sorted(inserted.index) and set(rows[0]) == set(COLUMNS.split())
    assert {row["n_references"] for row in rows} == {int((splits.placement == "none").sum())}
    table = world.roles["canary"]
    assert len(table["ids"]) == 120
    best = min(rows, key=lambda row: row["loss"])
    assert best["exposure"] == max(row["exposure"] for row in rows)
    facts = exposure_facts(rows)
    assert sum(f["n"] for f in facts) == len({row["example_id"] for row in rows})
    assert {f["repeats"] for f in facts} <= {1, 4}
    assert all(f["exposure"] <= f["saturates"] for f in facts)


def test_seeds_are_no_further_canaries():
    """Three seeds that say the same of four canaries: the standard error is that of four numbers, not of twelve."""
    same = {"model": "teacher", "placement": "both", "repeats": 1, "extrapolated": None, "n_references": 64}
    bits = [1.0, 2.0, 4.0, 5.0]
    rows = [same | {"seed": k, "example_id": f"c{i}", "exposure": b} for k in range(3) for i, b in enumerate(bits)]
    (fact,) = exposure_facts(rows)
    assert (fact["n"], fact["exposure"]) == (4, 3.0)
    assert fact["standard_error"] == pytest.approx(np.std(bits, ddof=1) / 2)
    cells = [row | {"fit_p": np.nan, "extrapolated": np.nan, "seed": str(row["seed"])} for row in rows]
    shown = _exposure_row(SimpleNamespace(settings={}), ("teacher", "both", 1), pd.DataFrame(cells))
    assert shown["Exposure (bits)"].replace("\xa0", " ") == "3.00 ± 0.91" and shown["Canaries"] == "4"


def test_without_canaries_there_are_no_rows(tmp_path):
    world = World(tmp_path, {"private": 30, "heldout": 30})
    world.write("teacher")
    assert exposure_rows(load_study(tmp_path, complete(QUICK | {"attacks": ["loss"]}, tmp_path))) == []
