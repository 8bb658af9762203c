"""The invented corpus: shape, distinctness, and what `overlap` promises."""

import pandas as pd
import pytest

from kd_jax.data import records, roles, synthetic

SHARES = {"private": 0.35, "public": 0.0, "heldout": 0.35, "dev": 0.13, "calib": 0.12, "population": 0.05}


@pytest.fixture(scope="module")
def corpus() -> pd.DataFrame:
    return synthetic.generate(2000, overlap=0.0, seed=0)


def test_shape(corpus):
    assert len(corpus) == 2000 and tuple(corpus.columns) == records.COLUMNS
    assert corpus.attrs["duplicates"] == 0
    assert corpus.role.value_counts().to_dict() == {"": 1200, "public": 800}
    assert corpus.task.value_counts().between(180, 320).all() and corpus.task.nunique() == 8
    assert corpus.instruction.str.split().str.len().between(8, 20).all()
    assert corpus.response.str.split().str.len().between(8, 25).all()
    assert corpus.response.nunique() == len(corpus)


def test_a_coin_decides_among_records_of_entities_of_their_own(corpus):
    """One record an entity, so members are independent; public records keep the role they were written for."""
    own = corpus[corpus.role == ""]
    assert own.source.nunique() == len(own) and (own.group == own.example_id).all()
    splits = roles.assign(corpus, SHARES, seed=3)
    assert (splits.role[corpus.role == "public"] == "public").all()
    drawn = splits.role[corpus.role == ""].value_counts(normalize=True)
    assert drawn.to_dict() == pytest.approx({k: v for k, v in SHARES.items() if v}, abs=0.05)


def test_seeds_give_other_records(corpus):
    pd.testing.assert_frame_equal(corpus, synthetic.generate(2000, overlap=0.0, seed=0))
    assert not set(corpus.example_id) & set(synthetic.generate(2000, overlap=0.0, seed=1).example_id)


def touched(frame: pd.DataFrame, role: str) -> float:
    """Share of a role's entities that a public record is about."""
    drawn = roles.assign(frame, SHARES, seed=3).role
    return frame.source[drawn == role].isin(frame.source[drawn == "public"]).mean()


@pytest.mark.parametrize("overlap, expected", [(0.0, 0.0), (0.5, 1 / 3), (1.0, 2 / 3)])
def test_overlap_is_how_often_public_prompts_touch_an_entity_of_any_role_alike(overlap, expected):
    frame = synthetic.generate(5000, overlap=overlap, seed=0)
    assert touched(frame, "private") == pytest.approx(expected, abs=0.05)
    assert touched(frame, "heldout") == pytest.approx(expected, abs=0.05)


def test_a_touching_record_repeats_facts_of_the_record_it_touches():
    frame = synthetic.generate(2000, overlap=1.0, seed=0)
    pairs = frame[frame.role == ""].merge(frame[frame.role == "public"], on="source", suffixes=("", "_public"))
    words = lambda column: pairs[column].str.lower().str.findall(r"\w+").map(set)
    shared = [len(a & b) for a, b in zip(words("response"), words("response_public"))]
    other = [len(a & b) for a, b in zip(words("response"), words("response_public").sample(frac=1, random_state=0))]
    assert sum(shared) > 1.3 * sum(other)


@pytest.mark.parametrize("bad", [{"records": 4, "overlap": 0.5}, {"records": 8, "overlap": 1.5}])
def test_errors(bad):
    with pytest.raises(records.DataError):
        synthetic.generate(**bad, seed=0)
