"""Prediction of what is memorized, and the filter: planted studies, nulls, scikit-learn, labels that must not leak."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import invented_memorization
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, precision_recall_curve
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from attacks import classifier, filtering, prediction
from attacks.classifier import TooFew, crossed, fit, fitted_on, quality, trials
from attacks.cuts import Memorized
from attacks.features import PAPER, Candidates, candidates
from attacks.resampling import Resampler
from attacks.study import Study
from attacks.tables import TableError, read_scores, read_splits

ROOT = Path(__file__).parent.parent
LENGTH, CUT = 12, (0, 10)


def write(folder, run, seed, ids, columns, lists, variant="plain", **provenance):
    """One score table of `LENGTH` response tokens an example; lists: [n, LENGTH]."""
    told = {"run": run, "seed": str(seed), "variant": variant, "provenance": json.dumps(provenance)}
    offsets = pa.array(np.arange(len(ids) + 1) * LENGTH, pa.int32())
    flat = {name: pa.ListArray.from_arrays(offsets, pa.array(np.asarray(x).reshape(-1))) for name, x in lists.items()}
    table = pa.table({"example_id": ids, "role": ["private"] * len(ids), "task": ["qa"] * len(ids)} | columns | flat)
    place = {"plain": folder / run}.get(variant, folder / "pairs" / f"teacher__{run}") / f"seed{seed}"
    place = place / "plain" if variant == "plain" else place
    place.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(told), place / "private-00000.parquet")


def planted(folder, n=240, share=0.25, *, informative=True, short=0, students=("students/kd",), seeds=(0,), again=()):
    """A study whose student memorizes the examples of low zlib and low perplexity; or any, if not `informative`.

    again: (run, exclude, ids that it memorizes, number left out).  Returns ids and what is memorized.
    """
    rng = np.random.default_rng(0)
    ids = np.array([f"r{i:04d}" for i in range(n)])
    memorized = rng.random(n) < share
    easy = memorized if informative else rng.random(n) < share
    zlib = np.where(easy, 20, 60) + rng.integers(-8, 9, n)
    target = rng.integers(50, size=(n, LENGTH))
    segment = np.ones((n, LENGTH), np.int8)
    segment[:short, 5:] = 2  # of a short response only five tokens count; what is left over is no response token
    columns = {"zlib_bytes": zlib, "n_bytes": np.full(n, 80)}

    def table(run, seed, nats, hits, **told):
        logp = -np.abs(nats + 0.1 * rng.normal(size=(n, LENGTH)) * nats)
        top = np.where(hits[:, None], target, (target + 1) % 50)
        lists = {"logp": logp, "target_id": target, "top1_id": top, "segment": segment}
        lists |= {
            "entropy": -logp,
            "rank": (~hits[:, None] + np.zeros((1, LENGTH), int)),
            "top2_gap": np.ones_like(logp),
        }
        write(folder, run, seed, ids, columns, lists, **told)

    nats = np.where(easy, 1.0, 3.0)[:, None]
    table("base_student", 0, 4 + 0 * nats, np.zeros(n, bool), technique="none")
    table("teacher", 0, nats, easy, technique="sft", train_roles=["private"])
    table("direct", 0, 1.2 * nats, easy, technique="sft", train_roles=["private"])
    kl = np.abs(np.where(easy, 0.2, 0.6)[:, None] + 0.1 * rng.normal(size=(n, LENGTH)))
    told = {"technique": "sft", "pair": {"teacher": "teacher", "seed": 0}}
    lists = {"kl_ab": kl, "target_id": target, "segment": segment}
    write(folder, "direct", 0, ids, columns, lists, variant="pair:teacher", **told)
    shared = dict(technique="kd", setting="shared", teacher="teacher", init="base_student")
    for run in students:
        for seed in seeds:
            table(run, seed, nats, memorized & (rng.random(n) < 0.95), **shared)
    for run, exclude, hits, number in again:
        told = dict(exclude=exclude, excluded=number, excluded_exposures=0.4)
        table(run, 0, nats, np.isin(np.arange(n), hits), **told, **shared)
    return ids, memorized


def opened(folder, bootstrap=40) -> tuple[Study, Memorized]:
    tables = {(t.run, t.seed): t for t in read_scores(folder)}
    study = Study({"seed": 0}, tables, read_splits(folder), Resampler(bootstrap, 0))
    return study, Memorized(study, [CUT])


def invented(rng, n=300, positives=60, effect=0.0, **changes) -> Candidates:
    y = np.isin(np.arange(n), rng.permutation(n)[:positives])
    values = {name: np.exp(rng.normal(3, 0.5, n) - effect * y) for name in PAPER}
    made = dict(ids=np.array([f"e{i:04d}" for i in range(n)]), memorized=y, values=values, clusters=None)
    return Candidates(**(made | {"half": rng.random(n) < 0.5} | changes))


def frame(rows) -> pd.DataFrame:
    return pd.DataFrame([r for r in rows if "reason" not in r]).set_index(["protocol", "features", "measure", "seed"])


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    _, memorized = planted(folder, students=("students/kd", "students/seqkd"), seeds=(0, 1))
    assert 40 < memorized.sum() < 80
    return folder, *opened(folder)


@pytest.fixture(scope="module")
def table(study) -> pd.DataFrame:
    return frame(r for r in prediction.rows(*study[1:]) if r["student"] == "students/kd")


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_planted_cause_is_found_in_its_direction(table):
    auc = table.xs("auc", level="measure")
    for features in ("paper", "teacher_only", "extended"):
        assert auc.value["paper", features, 0] > 0.95 and auc.ci_low["paper", features, 0] > 0.9
        assert auc.value["halves", features, 0] > 0.95
    assert auc.value["natural_prior", "zlib_bytes", 0] > 0.9, "low: at risk"
    coefficient = table.loc["paper", "paper", "coefficient:zlib_bytes", 0]
    assert coefficient.value < 0 and coefficient.ci_high < 0
    assert auc.value["matched_negatives", "paper", 0] < auc.value["paper", "paper", 0] + 1e-9
    assert {"paper", "halves", "natural_prior", "other_seed", "other_student:students/seqkd"} <= set(
        auc.index.levels[0]
    )


def test_intervals_hold_their_values_and_those_over_trials_are_apart(table):
    own = table[table.ci_low.notna() & ~table.index.get_level_values("protocol").str.endswith("over_trials")]
    assert ((own.ci_low <= own.value) & (own.value <= own.ci_high)).all()
    assert {0, 1, "all"} == set(table.index.get_level_values("seed"))
    over = table.xs("paper_over_trials", level="protocol").index.get_level_values("measure")
    assert {"auc", "precision", "recall", "coefficient:kl", "importance:kl"} <= set(over)
    natural = table.loc["natural_prior", "-", "memorized", 0]
    assert natural.n == 240 and natural.value == pytest.approx(0.25, abs=0.05)


def test_the_report_is_warned_that_trials_are_not_independent(study):
    assert any("share their examples" in note for note in study[1].notes)


def test_what_cannot_be_predicted_has_a_reason(tmp_path):
    planted(tmp_path, share=0.02)
    assert "at least 10" in reason(tmp_path)
    (tmp_path / "pairs/teacher__direct/seed0/private-00000.parquet").unlink()
    assert "score.pairs = ('teacher:direct',)" in reason(tmp_path)


def reason(folder) -> str:
    (row,) = (r for r in prediction.rows(*opened(folder)) if "reason" in r)
    return row["reason"]


def test_short_responses_are_no_candidates(tmp_path):
    ids, _ = planted(tmp_path, short=30)
    found = candidates(*opened(tmp_path), "students/kd", 0)
    assert list(found.ids) == list(ids[30:])
    assert found.values["zlib_bytes"].shape == (210,) and set(found.half) == {False, True}


# --- classifiers ------------------------------------------------------------------------------------------------------


def test_coefficients_are_scikit_learns(check):
    found = invented(np.random.default_rng(1), effect=0.6)
    x, y = found.matrix(PAPER), found.memorized
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, tol=1e-10, max_iter=10000)).fit(x, y)
    ours = fit(x, y)
    check("coefficients vs scikit-learn", np.abs(ours.weights - theirs[1].coef_[0]).max(), 1e-4)
    check("log-odds vs scikit-learn", np.abs(ours.score(x) - theirs.decision_function(x)).max(), 1e-3)
    times = np.random.default_rng(2).integers(0, 4, len(y))
    repeated = fit(np.repeat(x, times, axis=0), np.repeat(y, times))
    check("weighted vs repeated", np.abs(fit(x, y, times).weights - repeated.weights).max(), 1e-6)


def test_the_mean_of_classifiers_is_the_mean_of_their_log_odds(check):
    found = invented(np.random.default_rng(3), effect=0.4)
    everything, x = np.ones(300, bool), found.matrix(PAPER)
    one_by_one = []
    for number in range(classifier.FITS):
        rows = classifier._with_negatives(found.memorized, np.arange(300), np.random.default_rng([7, number]), None)
        one_by_one.append(fit(x[rows], found.memorized[rows]).score(x))
    mean = fitted_on(found, PAPER, everything, 7).score(x)
    check("mean classifier vs mean of log-odds", np.abs(mean - np.mean(one_by_one, axis=0)).max(), 1e-8)


def test_halves_never_see_their_own_label():
    rng = np.random.default_rng(4)
    found = invented(rng, effect=0.5)
    before = crossed(found, found, PAPER, 0)
    flipped = found.memorized ^ found.half  # all labels of one half
    after = crossed(invented(rng, memorized=flipped, values=found.values, half=found.half), found, PAPER, 0)
    assert np.array_equal(before[found.half], after[found.half]), "scored by the half whose labels stayed"
    assert not np.array_equal(before[~found.half], after[~found.half])


def test_trials_split_whole_groups_and_take_three_negatives():
    rng = np.random.default_rng(5)
    clusters = rng.integers(60, size=300)
    found = invented(rng, clusters=clusters)
    for trial in trials(found, 0, 5):
        assert not set(clusters[trial.train]) & set(clusters[trial.held_out]) and not set(trial.train) & set(trial.test)
        for rows in (trial.train, trial.test):
            positives = found.memorized[rows].sum()
            assert (~found.memorized[rows]).sum() == min(3 * positives, (~found.memorized[rows]).sum()) and positives
    alone = next(trials(invented(rng), 0, 1))
    assert len(alone.train) == 4 * 42 and len(alone.test) == 4 * 18 and len(alone.held_out) == 90
    with pytest.raises(TooFew, match="9 memorized"):
        next(trials(invented(rng, positives=9), 0))


def test_what_no_split_can_hold_out_is_refused():
    """All memorized examples are windows of one text: it is on one side only."""
    rng = np.random.default_rng(11)
    y = np.arange(300) < 20
    found = invented(rng, memorized=y, clusters=np.where(y, 0, np.arange(300)))
    with pytest.raises(TooFew, match="one group"):
        list(trials(found, 0, 5))
    both = invented(rng, memorized=y, clusters=np.where(np.arange(300) < 10, 0, 1))  # the others are with them
    for match in (None, both.matrix(PAPER)):
        with pytest.raises(TooFew, match="no split"):  # one side has no others
            list(trials(both, 0, 5, match))


def test_a_resample_without_a_positive_in_a_half_says_nothing():
    rng = np.random.default_rng(12)
    half = np.arange(300) % 2 == 1
    found = invented(rng, half=half)
    counts = np.where(found.memorized & half, 0.0, 1.0)
    scores = crossed(found, found, PAPER, 0, counts, fits=1)
    assert np.isnan(scores).all()
    for values in (quality(scores, found.memorized, counts), classifier.at_prior(scores, found.memorized, counts)):
        assert values and np.isnan(list(values.values())).all()
    assert np.isfinite(crossed(found, found, PAPER, 0, np.ones(300), fits=1)).all()


def test_matched_negatives_lie_as_near_as_can_be():
    rng = np.random.default_rng(6)
    found = invented(rng, n=2000, positives=60, effect=1.5)
    zlib, gaps = found.values["zlib_bytes"], []
    for match in (None, np.log(zlib)[:, None]):
        trial = next(trials(found, 0, 1, match=match))
        of = [
            zlib[rows]
            for rows in (trial.train[found.memorized[trial.train]], trial.train[~found.memorized[trial.train]])
        ]
        gaps.append(np.log(of[1]).mean() - np.log(of[0]).mean())
    assert gaps[0] > 1.3 and gaps[1] < gaps[0] / 2, "of 60 low ones few others are as low"
    near = classifier._nearest(np.array([[0.0], [10.0]]), np.array([[9.0], [1.0], [50.0], [11.0], [-1.0]]), 4, rng)
    assert sorted(near) == [0, 1, 3, 4]
    assert sorted(classifier._nearest(np.zeros((3, 1)), np.arange(40.0)[:, None], 40, rng)) == list(range(40))


@pytest.mark.parametrize("ties", [False, True])
def test_quality_is_scikit_learns_and_weights_are_repeats(ties, check):
    rng = np.random.default_rng(8)
    y, scores = rng.random(200) < 0.2, rng.normal(size=200)
    scores = np.round(scores + y, 1) if ties else scores + y
    found = classifier.at_prior(scores, y)
    check("average precision", abs(found["average_precision"] - average_precision_score(y, scores)), 1e-12)
    precision, recall, _ = precision_recall_curve(y, scores)
    expected = precision[np.flatnonzero(recall >= 0.95)[-1]]  # of the highest threshold
    check("precision at recall .95", abs(found["precision_at_recall_0.95"] - expected), 1e-12)
    assert (
        quality(scores, y)["recall"] == (scores[y] > 0).mean()
        and quality(scores, y)["precision"] == y[scores > 0].mean()
    )
    times = rng.integers(0, 3, 200)
    both = [f(np.repeat(scores, times), np.repeat(y, times)) for f in (quality, classifier.at_prior)]
    weighted = [f(scores, y, times) for f in (quality, classifier.at_prior)]
    for one, other in zip(both, weighted, strict=True):
        check("weighted vs repeated", max(abs(one[k] - other[k]) for k in one), 1e-6)


def test_nothing_is_predicted_where_there_is_nothing(monkeypatch):
    """The interval of an AUC holds 0.5 at its nominal rate, classifiers and all."""
    for name, value in {"MATCHED": {}, "sets": lambda _: {"paper": PAPER[:2]}, "RISK": {}, "REFITS": 60}.items():
        monkeypatch.setattr(prediction, name, value)
    monkeypatch.setattr(classifier, "TRIALS", 15)
    monkeypatch.setattr(prediction, "trials", lambda found, seed: trials(found, seed, 15))
    held, studies = {}, 30
    for number in range(studies):
        study = Study({"seed": number}, {}, None, Resampler(60, number))
        table = prediction._table(study, invented(np.random.default_rng(100 + number), 200, 40), {})
        for key, measured in table.items():
            if key[2] == "auc" and not key[1].endswith("over_trials"):
                found = prediction._interval(key, [measured], 40)
                held.setdefault(key[1], []).append(found.low <= 0.5 <= found.high)
    least = stats.binom.ppf(0.001, studies, 0.95)
    assert set(held) == {"paper", "natural_prior", "halves"}
    assert all(sum(each) >= least for each in held.values()), {k: sum(v) for k, v in held.items()}


# --- the list ---------------------------------------------------------------------------------------------------------


def test_the_list_says_who_is_flagged_and_by_whom(tmp_path):
    ids, memorized = planted(tmp_path / "scores", short=20)
    settings = {"student": "students/kd", "cuts": [CUT], "seed": 3}
    counts = prediction.write_filter(tmp_path / "scores", tmp_path / "out", settings)
    found = pd.read_parquet(tmp_path / "out" / "list.parquet").set_index("example_id")
    assert list(found.columns) == ["predicted", "transferred", "random", "probability"]
    assert list(found.index) == list(ids) and found.dtypes.iloc[:3].eq(bool).all()
    assert found.random.sum() == found.predicted.sum() == counts["predicted"] == counts["random"]
    assert not found[["predicted", "transferred"]].iloc[:20].any().any() and found.probability.iloc[:20].isna().all()
    assert (found.predicted.iloc[20:] == memorized[20:]).mean() > 0.95, "what was planted"
    assert (found.transferred.iloc[20:] == memorized[20:]).mean() > 0.95
    assert (found.random.to_numpy() == memorized).mean() < 0.8
    before = (tmp_path / "out" / "list.parquet").read_bytes()
    prediction.write_filter(tmp_path / "scores", tmp_path / "out", settings)
    assert (tmp_path / "out" / "list.parquet").read_bytes() == before


def test_the_random_list_has_the_repeats_of_the_predicted_and_whole_suffixes_alone(tmp_path):
    ids, memorized = planted(tmp_path / "scores", short=20)
    repeats = np.where(memorized, np.where(np.arange(240) % 3 == 0, 16, 4), np.where(np.arange(240) % 5 == 0, 4, 1))
    splits = pd.DataFrame({"example_id": ids, "role": "private", "coin": 1, "group": ids, "repeats": repeats})
    (tmp_path / "scores" / "text").mkdir()
    splits.assign(placement="").to_parquet(tmp_path / "scores" / "text" / "splits.parquet")
    prediction.write_filter(tmp_path / "scores", tmp_path / "out", {"student": "students/kd", "cuts": [CUT]})
    found = pd.read_parquet(tmp_path / "out" / "list.parquet").assign(repeats=repeats)
    counts = found.groupby("repeats")[["predicted", "random"]].sum()
    assert (counts.predicted == counts.random).all() and (counts.loc[[4, 16]].predicted > 5).all()
    assert not (found.predicted == found.random).all() and not found.random.iloc[:20].any()


def test_the_list_is_refused_or_left_out_with_a_reason(tmp_path, caplog):
    planted(tmp_path / "scores", share=0.02)
    with caplog.at_level(logging.WARNING):
        assert prediction.write_filter(tmp_path / "scores", tmp_path / "out", {"student": "students/kd"}) == {}
    assert "at least 10" in caplog.text and not (tmp_path / "out").exists()
    with pytest.raises(TableError, match="no score table of 'students/gkd'"):
        prediction.write_filter(tmp_path / "scores", tmp_path / "out", {"student": "students/gkd"})
    with pytest.raises(TableError, match="needs scores of direct's teacher"):
        prediction.write_filter(tmp_path / "scores", tmp_path / "out", {"student": "direct"})
    with pytest.raises(ValueError, match="unknown settings studnet"):
        prediction.write_filter(tmp_path / "scores", tmp_path / "out", {"studnet": ""})
    with pytest.raises(ValueError, match="features are 'all'"):
        prediction.write_filter(tmp_path / "scores", tmp_path / "out", {"student": "students/kd", "features": "all"})


def test_the_command_writes_the_same_list(tmp_path):
    planted(tmp_path / "scores")
    command = [sys.executable, "-m", "attacks.prediction", tmp_path / "scores", "--student=students/kd"]
    done = subprocess.run([*command, f"--out={tmp_path / 'a'}"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "predicted" in done.stdout, done.stderr[-2000:]
    prediction.write_filter(tmp_path / "scores", tmp_path / "b", {"student": "students/kd"})
    a, b = (pd.read_parquet(tmp_path / name / "list.parquet") for name in "ab")
    pd.testing.assert_frame_equal(a, b)
    done = subprocess.run([*command[:-1], "--student=nobody", "--out=x"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "no score table of 'nobody'" in done.stderr


def test_what_the_filter_did_is_counted_on_all_examples(tmp_path):
    n = 240
    again = [
        ("students/kd_predicted", "predicted:students/kd", np.array([200, 201, 202]), 61),
        ("students/kd_random", "random:students/kd", np.arange(0, 40), 61),
        ("students/kd_transferred", "transferred:students/kd", np.arange(200, 203), 60),
    ]
    _, memorized = planted(tmp_path, n, students=("students/kd",), again=again)
    study, of = opened(tmp_path)
    first = of.of("students/kd", 0, "private", of.main).extracted
    rows = {(r["features"], r["measure"].partition("@")[0]): r for r in filtering.filter_rows(study, of)}
    assert {r["student"] for r in rows.values()} == {f"students/kd_{f}" for f in ("predicted", "random", "transferred")}
    own = lambda measure: rows["predicted", measure]
    assert own("memorized_before")["value"] == first.mean() and own("memorized_after")["value"] == 3 / n
    assert own("new")["value"] == np.sum(~first[[200, 201, 202]]) / n
    assert own("removed_count")["value"] == 61 and own("removed")["value"] == 61 / n
    assert own("difference")["value"] == pytest.approx(3 / n - first.mean()) and own("difference")["ci_high"] < 0
    assert own("difference_to_random")["value"] == pytest.approx(-37 / n)
    assert own("difference")["measure"] == "difference@k=10" and own("difference")["protocol"] == "filter"
    assert ("random", "difference_to_random") not in rows
    assert ("transferred", "difference_to_random") not in rows, "another number was left out"
    assert own("removed_exposures")["value"] == 0.4
    students = {r["student"] for r in prediction.rows(study, of) if r.get("protocol") != "filter"}
    assert students == {"students/kd"}, "a student that was filtered is not predicted once more"
    study.settings["filtered"] = {"students/late": "random:students/kd", "students/kd_random": "random:students/kd"}
    (late,) = (r for r in filtering.filter_rows(study, of) if "reason" in r)
    assert late["student"] == "students/late" and "no list of what students/kd memorizes" in late["reason"]


def test_the_report_is_shown_rows_that_the_audit_makes(table):
    """What the report's tests invent has names of features, protocols and measures that are really there."""
    named = lambda features, protocol, measure: (features, protocol.partition(":")[0], measure.partition("@")[0])
    real = {named(f, p, m) for p, f, m, _ in table.index}
    made = [r for r in invented_memorization.prediction_rows(invented_memorization.MODELS, "0")]
    told = {named(r["features"], r["protocol"], r["measure"]) for r in made if r["protocol"] != "filter"}
    assert told <= real, told - real
