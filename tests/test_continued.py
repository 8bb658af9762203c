"""Generated continuations: they say what one scoring pass says, of the examples that were asked for."""

import jax
import numpy as np
import pandas as pd
import pytest
from make_fixtures import FIXTURES
from ml_collections import ConfigDict

from configs import base
from kd_jax import continued, generate, score, sharding
from kd_jax.continued import Continuing, choose, continuing, near_ties
from kd_jax.data.encode import EOS, PROMPT, RESPONSE, Encoded
from kd_jax.errors import ConfigError
from kd_jax.hf import load_pretrained
from kd_jax.metrics import progress
from kd_jax.transformer import ModelConfig, Transformer

VOCAB, CONTEXT = 40, 16  # of the fixtures


def mesh():
    return sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])


def made(parts: list[tuple[list[int], list[int], bool]], kind: str = "{}") -> Encoded:
    """Examples of (prompt, response, whether the response's last token is EOS)."""
    tokens = [np.array([*prompt, *response], np.int32) for prompt, response, _ in parts]
    segments = [
        [PROMPT] * len(prompt) + [RESPONSE] * (len(response) - ended) + [EOS] * ended
        for prompt, response, ended in parts
    ]
    ids = np.array([kind.format(f"{i:04d}") for i in range(len(parts))], object)
    sizes = np.ones(len(parts), np.int32)
    offsets = np.concatenate([[0], np.cumsum([len(t) for t in tokens])])
    flat = np.concatenate(tokens), offsets, np.concatenate(segments).astype(np.int8)
    return Encoded(ids, ids, np.full(len(parts), "t", object), *flat, sizes, sizes, {})


def half_known(model: Transformer, n: int, eos_id: int, text: bool) -> Encoded:
    """Texts that the model itself would go on with, of which most have a wrong token somewhere."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 6, n)
    prompts = [rng.integers(0, VOCAB - 1, length).tolist() for length in lengths]
    said = generate.generate(
        model, np.concatenate(prompts), lengths, np.zeros(n, np.uint32), generate.Sampling(0.0, max_new_tokens=8),
        vocab=VOCAB, eos_id=eos_id, seed=0, mesh=mesh(),
    )  # fmt: skip
    parts = []
    for prompt, tokens, length, ended in zip(prompts, said.tokens, said.lengths, said.ended):
        response = tokens[:length].tolist()
        at = rng.integers(0, 11)
        if at < length - ended:
            response[at] = (response[at] + 1) % VOCAB if (response[at] + 1) % VOCAB != eos_id else response[at] - 1
        prompt = [t if t != eos_id else (t + 1) % VOCAB for t in prompt]
        parts.append(([], prompt + response, bool(ended)) if text else (prompt, response, bool(ended)))
    return made(parts, "{}#0" if text else "{}")


def continue_all(model, encoded, folder, spec, eos_id) -> tuple[pd.DataFrame, pd.DataFrame, dict]:
    """The plain score table and the continuations of one role."""
    scoring = score.Scoring(VOCAB, row_length=CONTEXT, batch_rows=8)
    with progress(0, "test") as bar:
        score.score_role(model, encoded, "private", folder / "plain", scoring, mesh(), {"variant": "plain"}, bar)
        facts = continued.continue_role(
            model, encoded, "private", folder / "plain", folder / "continued", spec,
            vocab=VOCAB, eos_id=eos_id, mesh=mesh(), metadata={"variant": "continued"}, bar=bar,
        )  # fmt: skip
        assert bar.total == facts["examples"]
    read = lambda name: pd.read_parquet(folder / name / "private-00000.parquet")
    return read("plain"), read("continued"), facts


def leading(a, b) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


@pytest.mark.parametrize("case, text", [("gpt2", False), ("llama", True)])
def test_what_is_generated_matches_as_far_as_the_one_pass_verdict_says(case, text, tmp_path, check):
    """For every cut of every example; texts and responses that the model knows in part."""
    model, eos_id = load_pretrained(FIXTURES / case), {"gpt2": 3, "llama": 7}[case]
    encoded = half_known(model, 32, eos_id, text)
    prefixes = (1, 2, 4, 7) if text else (0, 1, 2, 4)
    spec = Continuing(tuple((a, k) for a in prefixes for k in (1, 2, 3, 5, 8)), ("greedy",), 1000, 0)
    plain, found, facts = continue_all(model, encoded, tmp_path, spec, eos_id)
    scored, matches, differ = plain.set_index("example_id"), [], 0
    for row in found.itertuples():
        i = int(row.example_id[:4])
        whole = encoded.tokens[encoded.offsets[i] : encoded.offsets[i + 1]]
        kinds = encoded.segment[encoded.offsets[i] : encoded.offsets[i + 1]]
        true = whole[kinds != PROMPT][row.prefix : row.prefix + row.suffix]
        assert row.target_ids.tolist() == true.tolist() and len(row.generated_ids) <= row.suffix
        skip = row.prefix - text  # the first token of a text is not in the table
        one = scored.loc[row.example_id]
        hits = (one.top1_id == one.target_id)[skip : skip + row.suffix]
        matched = len(hits) if hits.all() else int(np.argmin(hits))
        differ += leading(row.generated_ids, row.target_ids) != matched
        assert row.ended == (eos_id in row.generated_ids)
        matches.append((matched, len(true)))
    counts = found.groupby(["prefix", "suffix"]).size()
    for (prefix, _), n in counts.items():
        response = np.add.reduceat(encoded.segment == RESPONSE, encoded.offsets[:-1])
        assert n == (response > prefix).sum()
    assert len(counts) == 20 and facts["examples"] == 32
    share = np.mean([m == n for m, n in matches])
    assert 0.1 < share < 0.9 and len({m for m, _ in matches}) > 6  # neither all known nor all wrong
    check(f"one-pass and generated matches that differ, {case}: {len(found)} cuts", differ, 0)


def test_a_near_tie_counts_up_to_the_first_miss():
    encoded = made([([9], [1, 2, 3, 4], False)] * 6)
    target = np.tile([1, 2, 3, 4], 6)
    top1, gap = target.copy(), np.ones(24)
    top1[[5, 9, 13]] = 0  # rows 1, 2, 3 miss their second token
    gap[[3, 4, 9, 14, 16]] = 1e-4  # row 0 last; row 1 first; row 2 at the miss; row 3 after it; row 4 first
    scored = dict(target_id=target, top1_id=top1, top2_gap=gap)
    assert near_ties(scored, encoded, 0, 4).tolist() == [True, True, True, False, True, False]
    assert near_ties(scored, encoded, 0, 3).tolist() == [False, True, True, False, True, False]
    assert near_ties(scored, encoded, 1, 3).tolist() == [True, False, True, False, False, False]
    # Of a bare text the first token is not scored: two tokens given are one scored token left out.
    text = made([([], [9, 1, 2, 3, 4], False)] * 6, "{}#0")
    assert near_ties(scored, text, 2, 3).tolist() == near_ties(scored, encoded, 1, 3).tolist()
    with pytest.raises(ValueError, match="24 scored tokens do not belong"):
        near_ties(scored, made([([9], [1, 2], False)]), 0, 3)


def test_a_near_tie_is_continued_besides_what_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(continued, "NEAR_TIE", 0.05)
    model = load_pretrained(FIXTURES / "gpt2")
    encoded = half_known(model, 32, 3, False)
    spec = Continuing(((0, 4), (0, 8)), ("greedy",), 17, 5)
    plain, found, facts = continue_all(model, encoded, tmp_path, spec, 3)
    close = {
        row.example_id
        for row in plain.itertuples()
        if row.top2_gap[: min(8, leading(row.top1_id, row.target_id) + 1)].min() < 0.05
    }
    picked = set(encoded.example_id[choose(encoded, 0, spec)])
    assert set(found.example_id) == picked | close and len(picked) == 17 and close - picked
    assert set(found.example_id[found.drawn]) == picked, "the rest is no even sample"
    assert facts == {"examples": len(picked | close), "near_ties": len(close)}


def test_the_choice_is_a_hash_of_ids_of_long_enough_examples():
    encoded = made([([1], [2] * (1 + i % 4), False) for i in range(40)])
    spec = Continuing(((2, 2),), ("greedy",), 7, 0)
    chosen = set(encoded.example_id[choose(encoded, 2, spec)])
    assert len(chosen) == 7 and all(int(name) % 4 >= 2 for name in chosen)
    shuffled = encoded.take(np.random.default_rng(0).permutation(40))
    assert set(shuffled.example_id[choose(shuffled, 2, spec)]) == chosen
    other = set(encoded.example_id[choose(encoded, 2, Continuing(((2, 2),), ("greedy",), 7, 1))])
    assert other != chosen
    assert choose(encoded, 2, Continuing(((2, 2),), ("greedy",), 100, 0)).sum() == 20
    assert not choose(encoded, 4, spec, np.ones(40, bool)).any()


def test_zhang2025_bans_repeats_and_the_end_and_stops_where_the_context_does():
    cfg = ModelConfig(
        vocab_size=VOCAB, width=16, layers=1, heads=2, kv_heads=2, head_dim=8, mlp=16, max_positions=48, embed_dim=16
    )
    model = jax.tree.map(lambda x: 4 * x, Transformer(cfg, jax.random.key(0)))
    prompts = [[5, 6] * 4, [1] * 7, list(range(20))]
    encoded = made([(prompt, [2, 3, 4], False) for prompt in prompts])
    settings = dict(vocab=VOCAB, mesh=mesh())
    free = continued.generated(model, encoded, np.arange(3), 0, 32, "zhang2025", eos_id=-1, **settings)
    eos_id = int(free.tokens[0, 3])  # a token that would end the text early
    found = continued.generated(model, encoded, np.arange(3), 0, 32, "zhang2025", eos_id=eos_id, **settings)
    assert found.lengths.tolist() == [32, 32, 28] and not found.ended.any()
    for prompt, tokens, length in zip(prompts, found.tokens, found.lengths):
        assert eos_id not in tokens[:length]
        text = [*prompt, *tokens[:length].tolist()]
        grams = [tuple(text[i : i + 6]) for i in range(len(prompt) - 5, len(text) - 5)]
        assert len(set(grams)) == len(grams)
    rows = continued.table(encoded, np.arange(3), "private", "zhang2025", (0, 32), found, np.ones(3, bool)).to_pandas()
    assert rows.generated_ids.map(len).tolist() == [32, 32, 28] and set(rows.suffix) == {32}
    assert rows.target_ids.map(list).tolist() == [[2, 3, 4]] * 3


def settings(**changes) -> ConfigDict:
    config = base.get_config().memorization
    config.update(changes)
    return config


def test_default_cuts_are_those_that_some_example_has():
    pairs = made([([1], [2] * 25, True), ([1], [2] * 12, True)])
    assert continuing(settings(), pairs, 0).cuts == ((0, 10), (0, 20), (0, 50))
    texts = made([([], [2] * 83, False)], "{}#0")
    assert continuing(settings(), texts, 0).cuts == ((50, 10), (50, 20), (50, 32), (50, 50))
    own = continuing(settings(cuts=((32, 10), (8, 20)), continue_suffix=12), texts, 0)
    assert own.prefixes == [8, 32] and own.suffixes(32) == [10, 12] and own.suffixes(8, "zhang2025") == [32]


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(decodings=("greedy", "beam")), "memorization.decodings names beam; known are greedy, zhang2025"),
        (dict(continue_examples=1, decodings=()), "memorization.decodings names none; known are greedy, zhang2025"),
        (dict(continue_examples=-1), "continue_examples must not be negative"),
        (dict(cuts=((60, 30),)), r"\(60, 30\) is longer than every text; the longest has 83 tokens"),
        (dict(cuts=((0, 30),)), r"\(0, 30\): a prefix is at least 1, for a text needs a beginning"),
        (dict(cuts=((5, 0),)), r"\(5, 0\): a prefix is at least 1.*, a suffix 1"),
    ],
)
def test_wrong_settings_are_named(change, words):
    with pytest.raises(ConfigError, match=words):
        continuing(settings(**change), made([([], [2] * 83, False)], "{}#0"), 0)
