"""Scoring variants: what comes before a record, what its response becomes, and that no role is treated differently."""

import numpy as np
import pytest
import tokenizers

from kd_jax import prepare, variants
from kd_jax.data import encode, records, roles
from kd_jax.data.encode import EOS, PROMPT, RESPONSE, SPECIAL
from kd_jax.data.tokenizer import Tokenizer
from kd_jax.errors import ConfigError

LONG = 4096


@pytest.fixture(scope="module", params=["eos", "none"])
def data(request) -> prepare.Data:
    """400 invented records, one token a byte, so that every text comes back from its tokens."""
    rng = np.random.default_rng(0)
    words = np.array(["Ada", "river", "seven", "Blue", "stone", "tree"])
    rows = [
        {"group": None, "task": "t", "instruction": f"Question {i}?", "input": "", "source": f"made:{i}"}
        | {"response": " ".join(words[rng.integers(6 if i % 3 else 1, size=rng.integers(1, 5))]).lower() * (i % 5 == 0)
           or " ".join(words[rng.integers(6, size=rng.integers(1, 6))])}
        for i in range(400)
    ]  # fmt: skip
    frame = records.make_frame(rows)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate([*alphabet, "<eos>"])}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    tok = Tokenizer(backend, eos="<eos>", bos=None)
    encoded = encode.encode(frame, tok, template="plain", bos=request.param, max_length=96, max_prompt=40)
    return prepare.Data(frame, roles.assign(frame, seed=1), tok, encoded, {})


def build(data, name, role="private", **changes):
    return variants.build(name, data, data.of_role(role), **({"seed": 3, "max_positions": LONG} | changes))


def part(encoded, i, *segments) -> list[int]:
    at = slice(encoded.offsets[i], encoded.offsets[i + 1])
    return encoded.tokens[at][np.isin(encoded.segment[at], segments)].tolist()


@pytest.mark.parametrize("name,coin", [("recall", 0), ("recall_members", 1)])
def test_the_prefix_is_context_of_the_right_half(data, name, coin):
    plain, (made, facts) = data.of_role("private"), build(data, name)
    assert list(made.example_id) == list(plain.example_id) and facts["left_out"] == 0
    calib = data.splits[(data.splits.role == "calib") & (data.splits.coin == coin)]
    assert facts["shots"] == variants.SHOTS == len(set(facts["shot_ids"]) & set(calib.example_id))
    shots = data.encoded.select(facts["shot_ids"])
    prefix = [t for i in range(len(shots)) for t in part(shots, i, PROMPT, RESPONSE, EOS)]
    assert facts["prefix_tokens"] == len(prefix)
    np.testing.assert_array_equal(made.scored_lengths, plain.scored_lengths)
    for i in range(len(plain)):
        assert part(made, i, SPECIAL) == part(plain, i, SPECIAL)  # one BOS, at the beginning
        assert made.tokens[made.offsets[i]] == (
            plain.tokens[plain.offsets[i]] if part(plain, i, SPECIAL) else prefix[0]
        )
        assert part(made, i, PROMPT) == prefix + part(plain, i, PROMPT)
        assert part(made, i, RESPONSE, EOS) == part(plain, i, RESPONSE, EOS)


def test_all_roles_get_the_same_shots_and_the_order_of_records_plays_no_part(data):
    (_, here), (_, there) = build(data, "recall"), build(data, "recall", "heldout")
    assert here["shot_ids"] == there["shot_ids"]
    shuffled = prepare.Data(data.frame, data.splits[::-1], data.tokenizer, data.encoded, {})
    assert build(shuffled, "recall")[1] == here
    assert build(data, "recall", seed=4)[1]["shot_ids"] != here["shot_ids"]
    # Trained with `heldout`, a run has seen the other half.
    assert build(data, "recall", swapped=True)[1] == build(data, "recall_members")[1]


def test_shots_are_dropped_from_the_front_until_the_longest_record_fits(data):
    _, whole = build(data, "recall")
    longest, room = whole["longest_example"], whole["longest_example"] + whole["prefix_tokens"]
    assert longest == data.encoded.lengths.max()
    made, fewer = build(data, "recall", max_positions=room - 1)
    assert fewer["shot_ids"] == whole["shot_ids"][1:] and fewer["shots_dropped"] == 1
    assert made.lengths.max() <= room - 1
    with pytest.raises(ConfigError, match="not one of 12 shots fits"):
        build(data, "recall", max_positions=longest + 5)


def test_shots_are_never_scored_under_their_own_prefix(data):
    made, facts = build(data, "recall", "calib")
    assert facts["left_out"] == 12 and not set(made.record_id) & set(facts["shot_ids"])
    assert len(made) == len(data.of_role("calib")) - 12


def test_lower_case(data):
    plain, (made, facts) = data.of_role("private"), build(data, "lowercase")
    texts = [data.tokenizer.decode(part(plain, i, RESPONSE)) for i in range(len(plain))]
    assert [data.tokenizer.decode(part(made, i, RESPONSE)) for i in range(len(made))] == [t.lower() for t in texts]
    assert facts == {"unchanged": sum(t == t.lower() for t in texts), "examples": len(plain), "cut": 0}
    assert 0 < facts["unchanged"] < len(plain)
    for i in range(len(plain)):
        for segment in (PROMPT, EOS, SPECIAL):
            assert part(made, i, segment) == part(plain, i, segment)
    assert list(made.n_bytes) == [len(t) for t in texts]
    cut, facts = build(data, "lowercase", max_positions=int(plain.lengths.max()) - 2)
    assert facts["cut"] > 0 and cut.lengths.max() <= plain.lengths.max()


def test_neighbours_swap_a_tenth_of_the_response_for_ids_of_like_frequency(data):
    plain, (made, facts) = data.of_role("private"), build(data, "neighbours")
    assert len(made) == variants.COPIES * len(plain) and len(set(made.example_id)) == len(made)
    source = plain.take(np.repeat(np.arange(len(plain)), variants.COPIES))
    changed = made.tokens != source.tokens
    assert not changed[made.segment != RESPONSE].any()
    assert np.add.reduceat(changed, made.offsets[:-1]).min() >= 1
    assert facts["swapped_tokens"] == changed.sum() and facts["generator"] == "frequency-matched swaps"
    assert 0.08 < changed.sum() / facts["response_tokens"] < 0.2  # a tenth, and one at least of the short ones
    counts = encode.token_counts(data.of_role("public"), data.tokenizer.vocab_size)
    rank = np.argsort(np.argsort(counts, kind="stable"))
    moved = np.abs(rank[made.tokens[changed]] - rank[source.tokens[changed]])
    assert moved.min() >= 1 and moved.max() <= variants.NEAREST
    # The copies of a record are the same whatever else is in the table, and its copies differ.
    alone, _ = variants.build("neighbours", data, plain.take(np.array([7])), seed=3, max_positions=LONG)
    at = slice(made.offsets[70], made.offsets[80])
    np.testing.assert_array_equal(alone.tokens, made.tokens[at])
    assert len({tuple(part(alone, i, RESPONSE)) for i in range(10)}) > 5


def test_an_unknown_variant_is_refused(data):
    with pytest.raises(ConfigError, match="score.variants names 'upper'; known are recall"):
        build(data, "upper")
