"""Teacher text: whose words they are, what is kept of them, and that an interrupted generation goes on."""

import dataclasses

import numpy as np
import pytest
from test_feeds import END, LENGTH, data

from kd_jax import manifest
from kd_jax.data.encode import EOS, PROMPT, RESPONSE
from kd_jax.distill.teacher_text import generate_text
from kd_jax.generate import Samples


def sampler(calls, fail_at=None):
    """Answers 5, 6, 7 and EOS; the number of answered tokens is that of the prompt, at most 3."""

    def sample(model, tokens, lengths, keys, limits, seed, teacher):
        calls.append(len(lengths))
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        assert model == "the teacher" and (limits <= LENGTH - lengths).all()
        out = np.tile(np.array([5, 6, 7, END], np.int32), (len(lengths), 1))
        sizes = np.minimum(limits, 4).astype(np.int32)
        return Samples(out * (np.arange(4) < sizes[:, None]), sizes, sizes == 4, np.ones(len(lengths), np.int32))

    return sample


def make(folder, calls, *, encoded=None, inputs=None, prefix=0, **changes):
    return generate_text(
        folder, data() if encoded is None else encoded, sampler(calls, **changes), lambda: "the teacher",
        prefix=prefix, max_length=LENGTH, seed=3, inputs=inputs or {"teacher": "abc"}, label="text", shard_examples=16,
    )  # fmt: skip


def parts(encoded, segment):
    return [
        encoded.tokens[a:b][encoded.segment[a:b] == segment].tolist()
        for a, b in zip(encoded.offsets[:-1], encoded.offsets[1:])
    ]


def test_prompts_are_kept_and_responses_replaced(tmp_path):
    calls = []
    text = make(tmp_path, calls)
    assert parts(text, PROMPT) == parts(data(), PROMPT)
    assert parts(text, RESPONSE) == [[5, 6, 7]] * 60 and parts(text, EOS) == [[END]] * 60
    assert list(text.example_id) == list(data().example_id) and calls == [16, 16, 16, 12]
    facts = manifest.read(tmp_path)["facts"]
    assert facts == {"examples": 60, "tokens": 240, "ended": 60, "near_ties": 60}
    assert not [p for p in tmp_path.glob("*.parquet") if p.stat().st_mode & 0o077]


def test_a_second_start_reads_what_the_first_one_made(tmp_path):
    first, calls = make(tmp_path, []), []
    second = make(tmp_path, calls)
    assert calls == [] and first.fingerprint() == second.fingerprint()
    with pytest.raises(manifest.StaleWork, match="teacher"):
        make(tmp_path, [], inputs={"teacher": "xyz"})


def test_an_interrupted_generation_goes_on_at_the_missing_shard(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, [], fail_at=3)
    calls = []
    assert make(tmp_path, calls).fingerprint() == make(tmp_path / "whole", []).fingerprint()
    assert calls == [16, 12]


def test_a_repeated_record_gets_one_text(tmp_path):
    calls, twice = [], data().take(np.array([4, 9, 4, 4]))
    text = make(tmp_path, calls, encoded=twice)
    assert calls == [2] and list(text.example_id) == list(twice.example_id)


def test_a_prefix_is_continued_and_a_shorter_text_left_alone(tmp_path):
    """Borkar's hard targets: the first tokens of plain text, then the teacher's; all of it is scored."""
    segment = np.where(data().segment == PROMPT, RESPONSE, data().segment)
    plain = dataclasses.replace(data(), segment=segment.astype(np.int8))
    text = make(tmp_path, [], encoded=plain, prefix=12)
    for i, (a, b) in enumerate(zip(plain.offsets[:-1], plain.offsets[1:])):
        got = text.tokens[text.offsets[i] : text.offsets[i + 1]]
        if b - a > 12:
            assert got.tolist() == [*plain.tokens[a : a + 12], 5, 6, 7, END]
        else:
            np.testing.assert_array_equal(got, plain.tokens[a:b])
    assert PROMPT not in text.segment and (np.diff(plain.offsets) <= 12).any() and (np.diff(plain.offsets) > 12).any()
