"""The invented corpus: shape, distinctness, and what `overlap` promises about roles."""

import itertools

import pandas as pd
import pytest

from kd_jax.data import records, roles, synthetic


@pytest.fixture(scope="module")
def corpus() -> pd.DataFrame:
    return synthetic.generate(2000, overlap=0.0, seed=0)


def test_shape(corpus):
    assert len(corpus) == 2000 and tuple(corpus.columns) == records.COLUMNS
    assert corpus.attrs["duplicates"] == 0
    assert corpus.task.value_counts().to_dict() == dict.fromkeys(synthetic._CATEGORIES, 250)
    assert corpus.instruction.str.split().str.len().between(8, 20).all()
    assert corpus.response.str.split().str.len().between(8, 25).all()
    assert corpus.response.nunique() == len(corpus)


def test_records_of_an_entity_share_facts(corpus):
    # Two records of one entity have more words in common than records of two entities.
    words = corpus.set_index("example_id").response.str.lower().str.findall(r"\w+").map(set)
    groups = [words[rows.example_id].tolist() for _, rows in corpus.groupby("group")]
    within = [len(a & b) for group in groups for a, b in itertools.pairwise(group)]
    between = [len(one[0] & other[0]) for one, other in itertools.pairwise(groups)]
    assert sum(within) / len(within) > 2 * sum(between) / len(between)


def test_seed_and_growth(corpus):
    pd.testing.assert_frame_equal(corpus, synthetic.generate(2000, overlap=0.0, seed=0))
    assert not set(corpus.example_id) & set(synthetic.generate(2000, overlap=0.0, seed=1).example_id)
    assert set(synthetic.generate(777, overlap=0.0, seed=0).example_id) < set(corpus.example_id)
    # The overlap changes who belongs together, not what is written.
    assert set(synthetic.generate(2000, overlap=0.7, seed=0).example_id) == set(corpus.example_id)


def entities_in_both(frame: pd.DataFrame) -> float:
    role = roles.assign(frame, seed=3).role
    private, public = (set(frame.source[role == name]) for name in ("private", "public"))
    return len(private & public) / len(private | public)


def test_overlap(corpus):
    assert entities_in_both(corpus) == 0
    half, whole = (synthetic.generate(2000, overlap=share, seed=0) for share in (0.5, 1.0))
    assert (whole.group == whole.example_id).all()
    # With 8 records a coin each, an entity misses private, or public, or both with 2 * 0.75^8 - 0.5^8.
    either, both = 1 - 0.5**8, 1 - (2 * 0.75**8 - 0.5**8)
    assert entities_in_both(whole) == pytest.approx(both / either, abs=0.08)
    apart = half[half.group == half.example_id]
    assert len(apart) / len(half) == pytest.approx(0.5, abs=0.12)
    assert not set(apart.source) & set(half.source[half.group != half.example_id])  # an entity is apart as a whole


@pytest.mark.parametrize("bad", [{"records": 0, "overlap": 0.5}, {"records": 8, "overlap": 1.5}])
def test_errors(bad):
    with pytest.raises(records.DataError):
        synthetic.generate(**bad, seed=0)
