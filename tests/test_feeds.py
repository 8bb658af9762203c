"""What a step trains on, per policy; that an interrupted run of any technique goes on exactly; and the ledger."""

import dataclasses
import functools

import jax
import numpy as np
import pandas as pd
import pytest

from kd_jax import loop, sharding, train
from kd_jax.data import batches, encode
from kd_jax.data.encode import EOS, PROMPT, RESPONSE, Encoded
from kd_jax.distill import feeds, ledger
from kd_jax.distill.objective import PRESETS, TECHNIQUES
from kd_jax.distill.policies import DATASET, LM_CORPUS, MIXED, STUDENT, TEACHER
from kd_jax.errors import ConfigError
from kd_jax.generate import Samples, Sampling, generate
from kd_jax.transformer import ModelConfig, Transformer

VOCAB, END, LENGTH, ROWS = 40, 0, 24, 8
SHAPES = feeds.Shapes(micro_rows=ROWS, row_length=2 * LENGTH, max_length=LENGTH, packed=True)


@functools.cache
def data(n=60, seed=0) -> Encoded:
    """Prompts of 3 to 7 tokens, responses of 4 to 9 and an EOS."""
    rng = np.random.default_rng(seed)
    prompt, response = rng.integers(3, 8, n), rng.integers(4, 10, n)
    segment = [np.repeat([PROMPT, RESPONSE, EOS], [p, r, 1]) for p, r in zip(prompt, response)]
    tokens = [np.append(rng.integers(1, VOCAB, p + r), END) for p, r in zip(prompt, response)]
    offsets = np.concatenate([[0], np.cumsum(prompt + response + 1)])
    ids, task = np.array([f"r{i:03d}" for i in range(n)], object), np.full(n, "t", object)
    flat = lambda parts, dtype: np.concatenate(parts).astype(dtype)
    zeros = np.zeros(n, np.int32)
    return Encoded(ids, ids, task, flat(tokens, np.int32), offsets, flat(segment, np.int8), zeros, zeros, {})


def training_rows(encoded, epochs=20):
    return batches.TrainingRows(encoded, row_length=2 * LENGTH, packed=True, seed=0, epochs=epochs)


def true_responses(encoded):
    """A sampler whose samples are the records' own responses (found by the prompt)."""
    own = {}
    for i in range(len(encoded)):
        tokens, segment = (a[encoded.offsets[i] : encoded.offsets[i + 1]] for a in (encoded.tokens, encoded.segment))
        own[tuple(tokens[segment == PROMPT])] = tokens[segment != PROMPT]

    def sample(model, tokens, lengths, keys, limits, seed, teacher):
        parts = [own[tuple(p)] for p in np.split(tokens, np.cumsum(lengths)[:-1])]
        out = np.zeros((len(parts), LENGTH), np.int32)
        for row, part in enumerate(parts):
            out[row, : len(part)] = part
        n = len(parts)
        return Samples(out, np.array([len(p) for p in parts], np.int32), np.ones(n, bool), np.zeros(n, np.int32))

    return sample


def make_feed(name, sample, *, measure=None, steps=12, **changes):
    objective = dataclasses.replace(PRESETS[name], **changes)
    rows = training_rows(data())
    iterator = batches.training_iterator(rows, batch_rows=ROWS)
    largest = rows.largest_batch(ROWS)
    if not objective.on_policy:
        return objective, feeds.DataFeed(data(), iterator, SHAPES, TEACHER if name == "seqkd" else DATASET)
    if objective.policy_gradient:
        return objective, feeds.RolloutFeed(
            data(), iterator, SHAPES, objective, sample, measure, seed=1, largest=largest
        )
    return objective, feeds.SampledFeed(
        data(), iterator, SHAPES, objective, sample, steps=steps, seed=1, largest=largest
    )


def scored(batch) -> dict[tuple, int]:
    """How often each (prompt ids, target ids of the scored tokens) of a batch comes."""
    found = {}
    for tokens, targets, segments, mask in zip(
        *(batch[k].reshape(-1, 2 * LENGTH) for k in ("tokens", "targets", "segment_ids", "loss_mask"))
    ):
        for s in range(1, segments.max() + 1):
            own = segments == s
            first = int(np.argmax(mask[own]))
            key = (tuple(tokens[own][: first + 1]), tuple(targets[own & mask]))
            found[key] = found.get(key, 0) + 1
    return found


# ---------------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("name", ["gkd", "imitkd", "distillm"])
def test_a_sample_equal_to_the_data_is_masked_and_aligned_like_the_data(name):
    """The on-policy mask is the data's: no shift by one, EOS counted once."""
    changes = {"gkd": dict(lmbda=1.0), "distillm": dict(phi=1.0)}.get(name, {})
    _, plain = make_feed("kd", None)
    _, sampled = make_feed(name, true_responses(data()), **changes)
    want, used = plain.next(1, None, None)
    got, from_samples = sampled.next(1, None, None)
    assert scored(got) == scored(want)
    assert got["loss_mask"].sum() == want["loss_mask"].sum() == used.tokens.sum() == from_samples.tokens.sum()
    assert sorted(used.example) == sorted(from_samples.example)
    assert (from_samples.source == STUDENT).all() and (used.source == DATASET).all()
    assert want["ce_mask"].sum() == want["loss_mask"].sum(), "cross entropy meets the data ..."
    assert got["ce_mask"].sum() == 0, "... and never a student's sample"


def test_a_sample_without_eos_scores_none():
    tokens, lengths = encode.prompts(data(), np.array([0, 1]))
    out = np.full((2, 5), 7, np.int32)
    samples = Samples(out, np.array([5, 3], np.int32), np.array([False, True]), np.zeros(2, np.int32))
    rows = feeds.join(tokens, lengths, samples, np.array([0, 1]), STUDENT, 3, LENGTH)
    encoded = feeds.as_encoded(rows, np.array(["a", "b"], object), np.array(["t", "t"], object))
    assert list(encoded.scored_lengths) == [5, 3]
    ends = [encoded.segment[encoded.offsets[i + 1] - 1] for i in range(2)]
    assert ends == [RESPONSE, EOS]
    assert (encoded.segment[: lengths[0]] == PROMPT).all() and (rows.created == 3).all()


def test_a_prefix_of_plain_text_is_scored_too():
    encoded = dataclasses.replace(data(), segment=np.where(data().segment == PROMPT, RESPONSE, data().segment))
    tokens, lengths = encode.prompts(encoded, np.arange(5), prefix=6)
    np.testing.assert_array_equal(lengths, np.full(5, 6))
    np.testing.assert_array_equal(tokens[:6], encoded.tokens[:6])
    samples = Samples(np.full((5, 4), 3, np.int32), np.full(5, 4, np.int32), np.zeros(5, bool), np.zeros(5, np.int32))
    rows = feeds.join(tokens, lengths, samples, np.arange(5), TEACHER, 0, LENGTH)
    assert list(feeds.as_encoded(rows, encoded.example_id[:5], encoded.task[:5], 6).scored_lengths) == [9] * 5


def test_copies_of_a_record_are_sampled_apart():
    twice = np.array([3, 4, 3, 3])
    keys = encode.sample_keys(data(), twice)
    assert len(set(keys.tolist())) == 4
    np.testing.assert_array_equal(encode.sample_keys(data(), np.array([4, 3])), keys[[1, 0]])


def test_replay_draws_what_was_pushed_and_knows_its_age():
    _, feed = make_feed("imitkd", true_responses(data()))
    ages = []
    for step in range(1, 30):
        _, used = feed.next(step, None, None)
        ages.append(step - used.created)
    assert (ages[0] == 0).all() and np.concatenate(ages).max() > 5 and min(a.min() for a in ages) >= 0
    assert feed.facts()["branches"] == {"fresh": 0, "replay": 29, "data": 0}


def test_gkd_mixes_data_and_samples_at_its_rate():
    _, feed = make_feed("gkd", true_responses(data()), lmbda=0.5)
    sources = [feed.next(step, None, None)[1].source[0] for step in range(1, 41)]
    assert 8 <= sum(s == STUDENT for s in sources) <= 32 and set(sources) == {DATASET, STUDENT}


def test_rollouts_are_passed_over_with_their_own_values():
    """Every sample's values come back at its own tokens, in every pass; each pass takes every sample once."""

    def measure(model, teacher, batch):
        value = batch["targets"] * 100.0 + batch["positions"]
        return {"returns": value, "offset": -value, "importance": value + 1}

    objective, feed = make_feed("minillm", true_responses(data()), measure=measure, rollouts=40, passes=2)
    seen = []
    for step in range(1, 40):
        batch, used = feed.next(step, None, None)
        mask = batch["loss_mask"]
        value = np.where(mask, batch["targets"] * 100.0 + batch["positions"], 0)
        np.testing.assert_array_equal(batch["returns"], value)
        np.testing.assert_array_equal(batch["offset"], -value)
        assert (batch["importance"][~mask] == 0).all() and (used.source == MIXED).all()
        seen.append((feed.sets, used.created[0], len(used.example)))
        if feed.sets == 3:
            break
    first = [n for s, _, n in seen if s == 1]
    assert len(first) == 2 * feed.parts and sum(first) >= 2 * 40
    assert {created for s, created, _ in seen if s == 1} == {1}


@pytest.mark.parametrize("name", ["imitkd", "distillm"])
def test_a_capacity_below_the_batch_is_refused(name):
    with pytest.raises(ConfigError, match=f"objectives.{name}: capacity 3 .* below the .* examples"):
        make_feed(name, None, capacity=3)


def test_empty_prompts_are_refused():
    text = dataclasses.replace(data(), segment=np.where(data().segment == PROMPT, RESPONSE, data().segment))
    with pytest.raises(ConfigError, match="60 of 60 training examples have an empty prompt"):
        iterator = batches.training_iterator(training_rows(text), batch_rows=ROWS)
        feeds.SampledFeed(text, iterator, SHAPES, PRESETS["gkd"], None, steps=3, seed=0, largest=10)


# ----------------------------------------------------------------------------------------------------------- resume


def models():
    cfg = ModelConfig(
        vocab_size=VOCAB, width=16, layers=1, heads=2, kv_heads=2, head_dim=8, mlp=32, max_positions=LENGTH,
        embed_dim=16, rotary_dim=8,
    )  # fmt: skip
    return Transformer(cfg, jax.random.key(0)), Transformer(cfg, jax.random.key(1))


RECIPE = train.Recipe(lr=3e-2, batch_rows=ROWS, evaluations=6, checkpoints=4, clip=0.0)
MESH = functools.cache(lambda: sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]))


EVERYTHING = "gkd with adapters, dropout, two micro-batches and plain text"


def fit(folder, case, steps=12):
    """Twelve steps of a technique from fixed models, with the real sampler; a dev loss that rises at times."""
    mesh, name, recipe = MESH(), case.split()[0], RECIPE
    objective = dataclasses.replace(PRESETS[name], capacity=60, rollouts=40, passes=2, phi=0.5)
    if case == EVERYTHING:
        recipe = dataclasses.replace(RECIPE, lora_rank=2, lora_dropout=0.2, accumulation=2)
        objective = dataclasses.replace(objective, lm_coef=1.0, lm_kd_ratio=0.5)
    sampling = dataclasses.replace(objective.sampling(LENGTH), max_new_tokens=8)

    def sample(model, tokens, lengths, keys, limits, seed, teacher):
        return generate(
            model, tokens, lengths, keys, sampling,
            vocab=VOCAB, eos_id=END, seed=seed, mesh=mesh, teacher=teacher, limits=np.minimum(limits, 8),
        )  # fmt: skip

    with jax.set_mesh(mesh):
        measure = train.make_measure(objective, recipe, VOCAB, mesh)
        changes = {f.name: getattr(objective, f.name) for f in dataclasses.fields(objective)}
        del changes["technique"]
        _, feed = make_feed(name, sample, measure=measure, steps=steps, **changes)
        iterators = {"data": feed.iterator}
        if objective.lm_coef:
            iterators["lm"] = batches.training_iterator(training_rows(data(seed=7)), batch_rows=ROWS)
        task = loop.Task(name, folder, steps, feed, lambda model: {"eval/dev_loss": dev(model)}, iterators)
        return loop.fit(*models(), recipe, objective, task, vocab=VOCAB, rng=jax.random.key(5), mesh=mesh)


def dev(model) -> float:
    """A loss that jumps up and down with the parameters, so that DistiLLM's threshold moves."""
    return float(1e3 * abs(np.asarray(model.embed.weight[...])[1, 1]) % 1.0)


@pytest.mark.parametrize("case", [*TECHNIQUES, EVERYTHING])
def test_killed_and_resumed_equals_uninterrupted(case, tmp_path, monkeypatch):
    whole = fit(tmp_path / "whole", case)
    placed, place = [], sharding.place_batch

    def interrupted(batch, mesh, leading=0, **keywords):
        placed.append(leading)
        if placed.count(1) > 8:  # optimiser steps; checkpoints are at 3, 6, 9
            raise KeyboardInterrupt
        return place(batch, mesh, leading, **keywords)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sharding, "place_batch", interrupted)
        fit(tmp_path / "cut", case)
    resumed = fit(tmp_path / "cut", case)
    for label, a, b in zip(sharding.names(whole.model), jax.tree.leaves(whole.model), jax.tree.leaves(resumed.model)):
        np.testing.assert_array_equal(a, b, err_msg=label)
    assert whole.feed == resumed.feed and whole.dev == resumed.dev
    tables = [
        ledger.summarize(tmp_path / d / "ledger", PRESETS["kd"], True, data().record_id, data().record_id)
        for d in ("whole", "cut")
    ]
    pd.testing.assert_frame_equal(*tables)


# ----------------------------------------------------------------------------------------------------------- ledger


def test_the_ledger_counts_what_was_used(tmp_path):
    book = ledger.Ledger(tmp_path, step=0)
    used = lambda example, source, created, tokens: feeds.Used(*map(np.asarray, (example, source, created, tokens)))
    book.add(1, used([0, 1], [STUDENT] * 2, [1, 1], [4, 5]))
    book.add(2, used([0, 0], [STUDENT, DATASET], [1, 2], [4, 7]))
    book.write(2)
    book.add(3, used([0], [STUDENT], [1], [4]))
    book.add(3, used([0], [LM_CORPUS], [3], [30]))
    book.write(3)
    ledger.Ledger(tmp_path, step=3)  # a resumed run keeps what its checkpoint has
    objective = dataclasses.replace(PRESETS["gkd"], kd_ratio=0.5)
    found = ledger.summarize(tmp_path, objective, True, np.array(["a", "b"]), np.array(["text#0"]))
    rows = {(r.example_id, r.source, r.replayed): r for r in found.itertuples()}
    assert set(rows) == {
        ("a", "student", False), ("b", "student", False), ("a", "student", True), ("a", "dataset", False),
        ("text#0", "lm_corpus", False),
    }  # fmt: skip
    again = rows["a", "student", True]
    assert (again.times, again.tokens, again.mean_age, again.max_age) == (2, 8, 1.5, 2)
    assert (again.first_step, again.last_step, again.loss) == (2, 3, "kd")
    assert rows["a", "dataset", False].loss == "ce+kd" and rows["text#0", "lm_corpus", False].loss == "lm"
    ledger.Ledger(tmp_path, step=2)
    assert len(ledger.summarize(tmp_path, objective, True, np.array(["a", "b"]), None)) == 4


def test_techniques_meet_the_same_prompts_at_the_same_steps():
    """A divergence or a policy changes responses, never which records are drawn when."""
    feeds_of = [make_feed(name, true_responses(data()), **c)[1] for name, c in (("kd", {}), ("gkd", {"lmbda": 0.7}))]
    for step in range(1, 10):
        a, b = (feed.next(step, None, None)[1] for feed in feeds_of)
        assert sorted(a.example) == sorted(b.example)


def test_sampling_settings_follow_the_objective():
    assert PRESETS["minillm"].sampling(64) == Sampling(max_new_tokens=64, mix_alpha=0.2)
    assert PRESETS["borkar_hard"].sampling(64).temperature == 0.0
