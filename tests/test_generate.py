"""The sampler: the same tokens as full recomputation and as transformers, whatever the batch; the right frequencies."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_fixtures import CASES, FIXTURES, random_model

from kd_jax import generate as generation
from kd_jax import sampling, sharding
from kd_jax.errors import ConfigError
from kd_jax.generate import Samples, Sampling, generate
from kd_jax.hf import load_pretrained
from kd_jax.transformer import ModelConfig, Transformer

VOCAB = 40  # of the fixtures, whose context is 16 tokens
GREEDY = Sampling(temperature=0.0, max_new_tokens=8)
DRAWN = Sampling(max_new_tokens=8)
BEAMS = Sampling(temperature=0.0, max_new_tokens=8, beams=2)


def one():
    return sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])


@functools.cache
def small(seed: int = 0, **changes) -> Transformer:
    """Random and far from uniform; four key/value heads, so that the tensor axis can split them."""
    cfg = ModelConfig(
        **dict(vocab_size=300, width=32, layers=1, heads=8, kv_heads=4, head_dim=8, mlp=48, max_positions=256)
        | dict(embed_dim=32, rotary_dim=8)
        | changes
    )
    return jax.tree.map(lambda x: 6 * x, Transformer(cfg, jax.random.key(seed)))


@functools.cache
def request(n: int = 12, vocab: int = 300, longest: int = 30):
    """(prompts, lengths, keys) of mixed lengths."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, longest + 1, n).astype(np.int32)
    return rng.integers(0, vocab, lengths.sum()).astype(np.int32), lengths, rng.integers(0, 2**32, n).astype(np.uint32)


def run(model=None, spec=DRAWN, asked=None, **changes) -> Samples:
    settings = dict(vocab=290, eos_id=7, seed=5, mesh=one()) | changes
    return generate(model or small(), *(asked or request()), spec, **settings)


def rows(asked) -> list[np.ndarray]:
    return np.split(asked[0], np.cumsum(asked[1])[:-1])


def same(a: Samples, b: Samples, check, name: str) -> None:
    """Equal but for rows with a near tie, of which there are few."""
    differ = (a.tokens != b.tokens).any(axis=1) | (a.lengths != b.lengths) | (a.ended != b.ended)
    assert not (differ & (a.near_ties + b.near_ties == 0)).any()
    check(name, differ.mean(), 0.1)


# ------------------------------------------------------------------------------------- the same as other programs


hidden = jax.jit(Transformer.hidden)


def next_logits(model: Transformer, texts: np.ndarray) -> np.ndarray:
    """[R, T, V] of texts [R, T] in one pass without a cache: entry t predicts token t + 1."""
    positions = np.broadcast_to(np.arange(texts.shape[1], dtype=np.int32), texts.shape)
    return np.asarray(hidden(model, texts, np.ones_like(texts), positions) @ model.head().weight.T)


def transformers_text(model, prompt: np.ndarray, spec: Sampling, eos_id: int | None) -> np.ndarray:
    import torch

    torch.set_num_threads(1)  # more wait for each other longer than these models compute
    out = model.generate(
        torch.tensor(prompt[None].astype(np.int64)),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        **dict(max_new_tokens=spec.max_new_tokens, do_sample=False, eos_token_id=eos_id, pad_token_id=0),
        **dict(num_beams=spec.beams, no_repeat_ngram_size=spec.no_repeat_ngram),
        **({"min_new_tokens": spec.min_new_tokens} if spec.min_new_tokens else {}),
    )
    return out[0, len(prompt) :].numpy()


@pytest.mark.parametrize("case", CASES)
def test_greedy_equals_full_recomputation_and_transformers(case):
    model, asked = load_pretrained(FIXTURES / case), request(5, VOCAB, 8)
    found = run(model, GREEDY, asked, vocab=VOCAB, eos_id=-1)
    assert found.lengths.tolist() == [8] * 5 and not found.ended.any()
    texts = np.zeros((5, 16), np.int32)
    for text, prompt, tokens in zip(texts, rows(asked), found.tokens):
        text[: len(prompt) + 8] = [*prompt, *tokens]
    z = next_logits(model, texts)
    theirs = random_model(case) if importlib.util.find_spec("torch") else None
    for i, prompt in enumerate(rows(asked)):
        np.testing.assert_array_equal(found.tokens[i], z[i, len(prompt) - 1 : len(prompt) + 7].argmax(1))
        if theirs is not None:
            np.testing.assert_array_equal(found.tokens[i], transformers_text(theirs, prompt, GREEDY, None))


@pytest.mark.parametrize("case", ["gpt2", "llama_grouped"])
@pytest.mark.parametrize(
    "change",
    [
        dict(no_repeat_ngram=2),
        dict(beams=3),
        dict(beams=4, no_repeat_ngram=2, min_new_tokens=3),
        dict(min_new_tokens=4, no_repeat_ngram=2),
    ],
    ids=str,
)
def test_bans_and_beams_as_in_transformers(case, change):
    pytest.importorskip("torch", reason="PyTorch is not here; loops and enumeration are tested instead")
    spec, asked = dataclasses.replace(GREEDY, **change), request(6, VOCAB, 8)
    model, theirs, ended = load_pretrained(FIXTURES / case), random_model(case), 0
    probe = run(model, spec, asked, vocab=VOCAB, eos_id=-1).tokens
    for eos in np.argsort(-np.bincount(probe.ravel(), minlength=VOCAB))[:4].tolist():  # tokens that come up
        found = run(model, spec, asked, vocab=VOCAB, eos_id=eos)
        for i, prompt in enumerate(rows(asked)):
            want = transformers_text(theirs, prompt, spec, eos)
            np.testing.assert_array_equal(found.tokens[i, : found.lengths[i]], want)
            assert found.ended[i] == (eos in want) and not found.tokens[i, found.lengths[i] :].any()
            ended += found.ended[i]
    assert ended > 0


def test_beams_find_the_best_text_where_there_are_enough_of_them():
    """With V^2 beams the search over three tokens is exhaustive."""
    model, asked = load_pretrained(FIXTURES / "gpt2"), request(2, 5, 6)
    found = run(model, Sampling(temperature=0.0, max_new_tokens=3, beams=25), asked, vocab=5, eos_id=-1)
    for prompt, tokens in zip(rows(asked), found.tokens):
        texts = np.array(list(np.ndindex(5, 5, 5)), np.int32)
        z = next_logits(model, np.concatenate([np.tile(prompt, (125, 1)), texts], axis=1))[:, len(prompt) - 1 : -1, :5]
        logp = np.take_along_axis(jax.nn.log_softmax(z), texts[:, :, None], axis=2).sum((1, 2))
        np.testing.assert_array_equal(tokens, texts[logp.argmax()])


# -------------------------------------------------------------------------------- nothing but the example matters


@pytest.mark.parametrize("spec, size", [(DRAWN, 1), (BEAMS, 5)], ids=["drawn", "beams"])
def test_batch_size_changes_nothing(spec, size, check):
    same(run(spec=spec), run(spec=spec, batch_rows=size), check, "generation vs batch size: rows that differ")


def test_order_and_batch_mates_change_nothing(check):
    whole, asked = run(), request()
    some = np.array([9, 2, 4, 0, 1, 11, 5, 10, 3])
    part = (np.concatenate([rows(asked)[i] for i in some]), asked[1][some], asked[2][some])
    want = Samples(*(getattr(whole, f.name)[some] for f in dataclasses.fields(Samples)))
    same(run(asked=part), want, check, "generation vs order: rows that differ")


@pytest.mark.parametrize("spec", [DRAWN, BEAMS], ids=["drawn", "beams"])
def test_prompt_slots_and_segments_change_nothing(spec, monkeypatch, check):
    """Prompts with more room after them, and a cache that grows twice."""
    want = run(spec=spec)
    monkeypatch.setattr(generation, "_bucket", lambda length: 64)
    monkeypatch.setattr(generation, "_segments", lambda new: iter((3, 4)))
    same(run(spec=spec), want, check, "generation vs slots of the cache: rows that differ")


@pytest.mark.parametrize(
    "shape, spec",
    [((2, 2, 2), dataclasses.replace(DRAWN, mix_alpha=0.3, no_repeat_ngram=2)), ((8, 1, 1), DRAWN), ((2, 2, 2), BEAMS)],
    ids=["mixed", "drawn", "beams"],
)
def test_device_count_changes_nothing(shape, spec, check):
    mesh = sharding.make_mesh(*shape)
    placed = [jax.device_put(m, sharding.shardings(m, mesh)) for m in (small(), small(1))]
    found = run(placed[0], spec, mesh=mesh, teacher=placed[1])
    same(found, run(spec=spec, teacher=small(1)), check, "generation on 8 devices vs 1: rows that differ")


def test_limits_end_rows_and_change_nothing_else():
    limits = np.array([0, 1, 8] * 4, np.int32)
    found, whole = run(limits=limits), run()
    np.testing.assert_array_equal(found.lengths, np.minimum(whole.lengths, limits))
    for i, n in enumerate(found.lengths):
        np.testing.assert_array_equal(found.tokens[i, :n], whole.tokens[i, :n])
        assert not found.tokens[i, n:].any()


def test_seed_and_key_decide(check):
    whole = run()
    assert (run(seed=6).tokens != whole.tokens).any(axis=1).mean() > 0.5
    asked = request()
    keys = asked[2].copy()
    keys[0] += 1
    found = run(asked=(*asked[:2], keys))
    assert (found.tokens[0] != whole.tokens[0]).any()
    np.testing.assert_array_equal(found.tokens[1:], whole.tokens[1:])


def test_rows_end_at_eos():
    found = run(spec=dataclasses.replace(DRAWN, temperature=8.0), vocab=20)
    assert 0 < found.ended.sum() < 12 and found.tokens.max() < 20
    for tokens, length, ended in zip(found.tokens, found.lengths, found.ended):
        assert (tokens[:length] == 7).sum() == ended and not tokens[length:].any()
        assert not ended or tokens[length - 1] == 7
        assert ended or length == 8


def test_a_new_model_of_the_same_shape_is_not_compiled_again():
    run()
    before = generation._decode._cache_size(), generation._start._cache_size()
    run(small(2), seed=9)
    assert (generation._decode._cache_size(), generation._start._cache_size()) == before


# --------------------------------------------------------------------------------------------- the distribution


def oracle(z: np.ndarray, spec: Sampling) -> np.ndarray:
    """Probabilities in float64, by sorting."""
    z = np.asarray(z, np.float64) / spec.temperature
    order = np.argsort(-z, kind="stable")
    keep = np.zeros(len(z), bool)
    keep[order[: spec.top_k or None]] = True
    p = np.where(keep, np.exp(z - z.max()), 0)
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= spec.top_p]] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "spec",
    [
        Sampling(),
        Sampling(temperature=0.7, top_k=5),
        Sampling(top_p=0.8),
        Sampling(temperature=2.0, top_k=9, top_p=0.6),
    ],
)
def test_filters_against_sorting(spec, check):
    z = np.random.default_rng(0).normal(0, 3, (20, 700)).astype(np.float32)
    p, _ = sampling.filtered(z / np.float32(spec.temperature), spec)
    want = np.stack([oracle(row, spec) for row in z])
    np.testing.assert_array_equal(np.asarray(p) > 0, want > 1e-30)
    check("top-k and top-p vs sorting", np.abs(p - want).max(), 1e-5)


def test_draw_inverts_the_cdf():
    """Against a search in the float64 CDF, at uniforms that are not near an edge; zeros are never drawn."""
    rng = np.random.default_rng(1)
    p = rng.exponential(1, (4000, 700)) * (rng.random((4000, 700)) < 0.3)
    u = rng.random(4000)
    u[:3] = 0, 1 - 2**-24, 0.5
    p, u = p.astype(np.float32), u.astype(np.float32)
    token, near = sampling.draw(p, u)
    cdf = np.cumsum(p.astype(np.float64), axis=1)
    want = (cdf <= (u * cdf[:, -1])[:, None]).sum(1)
    assert (np.asarray(near) | (token == want)).all() and np.asarray(near).mean() < 0.01
    assert (p[np.arange(4000), token] > 0).all()


def test_mixed_sampling_has_the_frequencies_of_the_mixture(check):
    """A toy vocabulary, each side after its own top-p: chi-square of 20,000 first tokens against (1-a) q + a p."""
    models = [load_pretrained(FIXTURES / "gpt2"), jax.tree.map(lambda x: 2 * x, load_pretrained(FIXTURES / "gpt2"))]
    spec, n, vocab = Sampling(max_new_tokens=1, mix_alpha=0.3, temperature=1.5, top_p=0.9), 20_000, 12
    prompt = np.array([3, 9, 1], np.int32)
    asked = (np.tile(prompt, n), np.full(n, 3, np.int32), np.arange(n, dtype=np.uint32))
    found = run(models[0], spec, asked, vocab=vocab, eos_id=-1, teacher=models[1], batch_rows=4096).tokens[:, 0]
    q, p = (oracle(next_logits(m, prompt[None])[0, -1, :vocab], spec) for m in models)
    mixture = 0.7 * q + 0.3 * p
    assert (q != p).any() and (mixture == 0).any()
    counts = np.bincount(found, minlength=vocab)
    assert counts[mixture == 0].sum() == 0
    some = mixture > 0
    chi2 = ((counts[some] - n * mixture[some]) ** 2 / (n * mixture[some])).sum()
    degrees = some.sum() - 1
    check("mixed sampler: chi-square, deviations from its mean", (chi2 - degrees) / np.sqrt(2 * degrees), 4.0)


def test_the_limits_of_the_mixture():
    """At alpha 0 the student's draws, at alpha 1 the teacher's, and the same next to either end."""
    student, teacher = small(), small(1)
    alone = [run(m).tokens for m in (student, teacher)]
    assert (alone[0] != alone[1]).any()
    for alpha, want in [(0.0, alone[0]), (1e-7, alone[0]), (1 - 1e-7, alone[1]), (1.0, alone[1])]:
        found = run(student, dataclasses.replace(DRAWN, mix_alpha=alpha), teacher=teacher)
        assert ((found.tokens != want).any(axis=1) <= (found.near_ties > 0)).all()


def test_no_ngram_twice():
    """Against a loop over lists, on histories with many repeats."""
    rng = np.random.default_rng(2)
    history, count = rng.integers(0, 4, (50, 20)).astype(np.int32), rng.integers(1, 21, 50)
    for n in (1, 2, 3, 6):
        found = np.asarray(sampling.repeats(history, count, n, 5))
        for row, c, banned in zip(history.tolist(), count, found):
            text = row[:c]
            seen = {tuple(text[i : i + n]) for i in range(c - n + 1)}
            tail = text[c - n + 1 :] if n > 1 else []
            assert {v for v in range(5) if banned[v]} == {
                v for v in range(5) if len(tail) == n - 1 and (*tail, v) in seen
            }


def test_near_ties_are_counted():
    z = jnp.zeros((2, 9)).at[0, 4].set(1.0).at[1, 3:5].set(2.0)
    token, near = sampling.most_likely(z)
    assert token.tolist() == [4, 3] and near.tolist() == [False, True]
    p = jnp.full((2, 4), 0.25)
    token, near = sampling.draw(p, jnp.array([0.5, 0.6]))
    assert token.tolist() == [2, 2] and near.tolist() == [True, False]


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "setting, message",
    [
        (dict(temperature=-1), "temperature must not be negative"),
        (dict(top_p=0.0), "top_p must lie in"),
        (dict(mix_alpha=1.5), "mix_alpha must lie in"),
        (dict(max_new_tokens=0), "max_new_tokens must be positive"),
        (dict(max_new_tokens=8, min_new_tokens=9), r"min_new_tokens must lie in \[0, max_new_tokens 8\], got 9"),
        (dict(beams=2), "beams 2 needs temperature 0"),
        (dict(temperature=0, mix_alpha=0.5), "mix_alpha 0.5 needs a temperature"),
    ],
)
def test_settings_are_checked(setting, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**setting)


def test_prompts_are_checked_before_compilation(monkeypatch):
    monkeypatch.setattr(generation, "_ready", None)
    prompts, lengths, keys = request()
    empty = np.concatenate([lengths, [0]]).astype(np.int32)
    with pytest.raises(ConfigError, match="1 of 13 prompts are empty"):
        run(asked=(prompts, empty, np.append(keys, 1)))
    over = int((lengths + 230 > 256).sum())
    with pytest.raises(ConfigError, match=f"{over} of 12 prompts .* context of 256 positions"):
        run(spec=Sampling(max_new_tokens=230))
    with pytest.raises(ConfigError, match="needs a teacher"):
        run(spec=Sampling(mix_alpha=0.2))
    with pytest.raises(ConfigError, match="vocab 301"):
        run(vocab=301)


def test_no_prompts_give_no_samples():
    found = run(asked=(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.uint32)))
    assert found.tokens.shape == (0, 8) and found.lengths.shape == (0,)
