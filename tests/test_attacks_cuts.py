"""Extraction from one pass: fixed values, real greedy decoding, explicit distributions, and what must never count."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from attacks.cuts import Cut, Memorized, default_cuts, extract
from attacks.study import Unresolved
from attacks.tables import Tokens

VOCAB = 5
SCHEMES = [(1.0, None, None), (2.0, None, None), (0.5, None, None), (1.0, 2, None), (0.5, 2, None), (1.0, None, 0.7)]


def name_of(t: float, k: int | None, p: float | None) -> str:
    return f"k={k},t={t:g}" if k else f"p={p:g},t={t:g}" if p else f"t={t:g}"


def fields(logits: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics of rows of logits [N, V], as the scoring pass defines them."""
    lp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    own = np.take_along_axis(logits, targets[:, None], axis=1)
    ordered = np.sort(logits, axis=1)
    found = {
        "target_id": targets,
        "segment": np.ones(len(targets), int),
        "logp": np.take_along_axis(lp, targets[:, None], axis=1)[:, 0],
        "top1_id": logits.argmax(axis=1),
        "top2_gap": ordered[:, -1] - ordered[:, -2],
        "rank": (logits > own).sum(axis=1),
        "entropy": -(np.exp(lp) * lp).sum(axis=1),
    }
    for t in (0.5, 1.0, 2.0):
        found[f"lse_t{t:g}"] = np.log(np.exp(lp / t).sum(axis=1))
        for k in (2, 3, 4):
            found[f"topk_lse_k{k}_t{t:g}"] = np.log(np.exp(np.sort(lp / t, axis=1)[:, -k:]).sum(axis=1))
        q = np.exp(lp / t - found[f"lse_t{t:g}"][:, None])
        descending = -np.sort(-q, axis=1)
        above = np.cumsum(descending, axis=1) - descending
        found[f"nucleus_p0.7_t{t:g}"] = np.where(above < 0.7, descending, 0).sum(axis=1)
        found[f"cum_above_p0.7_t{t:g}"] = np.where(logits > own, q, 0).sum(axis=1)
    return found


def tokens(parts: list[dict[str, np.ndarray]], ids: list[str] | None = None, eos: list[bool] | None = None) -> Tokens:
    """Examples of these fields; those with `eos` end in one."""
    offsets = np.concatenate([[0], np.cumsum([len(part["logp"]) for part in parts])])
    flat = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    for end, has in zip(offsets[1:], eos or []):
        flat["segment"][end - 1] += has
    names = np.array(ids or [f"r{i:05d}" for i in range(len(parts))])
    return Tokens(names, np.full(len(names), "all"), offsets, flat, {})


def by_hits(*patterns: str, ids=None, eos=None) -> Tokens:
    """Examples whose argmax hits where the pattern has a 1."""
    parts = []
    for pattern in patterns:
        hit = np.array(list(pattern), int)
        n = len(hit)
        parts.append({"logp": np.full(n, -0.5), "target_id": hit, "top1_id": np.ones(n, int)})
        parts[-1] |= {"segment": np.ones(n, int), "top2_gap": np.ones(n), "rank": 1 - hit, "entropy": np.ones(n)}
    return tokens(parts, ids, eos)


def cut_out(found: Tokens, prefix: int, suffix: int, bos: str = "none"):
    return extract(found, Cut(prefix, suffix), "teacher", 0, "private", bos)


# --- fixed values (memorization.md 12) -------------------------------------------------------------------------------


def test_worked_example(check):
    t, v = np.arange(6)[:, None], np.arange(VOCAB)
    found = cut_out(tokens([fields(((4 * t + 7 * v + 3 * t * v) % 17) / 4, np.array([2, 1, 4, 1, 0, 2]))]), 0, 6)
    assert (found.matched[0], found.hits[0], found.extracted[0], found.full[0]) == (2, 4, False, True)
    check("extraction: accuracy and strength of the worked example", abs(found.accuracy[0] - 0.666667), 1e-6)
    check("extraction: accuracy and strength of the worked example", abs(found.strength[0] - 0.333333), 1e-6)
    wanted = {"t=1": -4.749088, "k=4,t=1": -4.519400, "k=3,t=1": -4.089112, "t=2": -6.388305, "k=4,t=0.5": -4.012278}
    for scheme, value in wanted.items():
        check("extraction: log p_z of the worked example", abs(found.log_p[scheme][0] - value), 2e-6)
    assert found.log_p["k=2,t=2"][0] < 0  # a finite one: no target is third or worse
    assert found.gap[0] == 0.75  # of the leading hits and the first miss
    assert np.isclose(found.entropy[0], np.mean([1.115640, 1.097429, 1.192567, 1.549376, 0.717544, 1.103724]))


# --- a model that can be decoded -------------------------------------------------------------------------------------


def trigram(seed: int, integers: bool) -> np.ndarray:
    """Logits [V, V, V] after the last two tokens; small integers tie often."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(3, size=(VOCAB,) * 3) if integers else 2 * rng.normal(size=(VOCAB,) * 3)
    return drawn.astype(float)


def passed(model: np.ndarray, texts: np.ndarray) -> Tokens:
    """One teacher-forced pass over texts [N, T + 2]; their first two tokens are the prompt."""
    return tokens([fields(model[text[:-2], text[1:-1]], text[2:]) for text in texts])


def decode(model: np.ndarray, history: np.ndarray, steps: int) -> np.ndarray:
    for _ in range(steps):
        history = np.append(history, np.flatnonzero(model[history[-2], history[-1]] == model[*history[-2:]].max())[0])
    return history


def test_one_pass_is_real_greedy_decoding(check):
    rng, disagreed, cases, extracted = np.random.default_rng(0), 0, 0, 0
    for seed in range(4):
        model = trigram(seed, integers=True)
        texts = rng.integers(VOCAB, size=(80, 16))
        for text in texts[
            ::2
        ]:  # texts that the model itself goes on with from somewhere, and then often not to the end
            start = rng.integers(2, 12)
            text[:] = decode(model, text[:start], 16 - start)
            text[rng.integers(16)] = rng.integers(VOCAB)
        found = passed(model, texts)
        for prefix, suffix in itertools.product((0, 1, 3, 6), (1, 2, 4, 8)):
            verdict = cut_out(found, prefix, suffix)
            for i, text in enumerate(texts):
                start = 2 + prefix
                generated = decode(model, text[:start], suffix)[start:]
                right = generated == text[start : start + suffix]
                leading = suffix if right.all() else int(right.argmin())
                disagreed += (verdict.matched[i] != leading) + (verdict.extracted[i] != right.all())
                cases, extracted = cases + 1, extracted + right.all()
    assert cases == 5120 and 500 < extracted < 4500
    check("extraction: one pass against greedy decoding, verdicts that differ", disagreed, 0)


def test_suffix_probability_is_the_product_along_the_path_and_sums_to_one(check):
    model, suffix = trigram(7, integers=False), 3
    every = np.array(list(itertools.product(range(VOCAB), repeat=suffix)))
    texts = np.concatenate([np.tile([1, 3], (len(every), 1)), every], axis=1)
    found = cut_out(passed(model, texts), 0, suffix)
    for scheme in SCHEMES:
        q = adjusted(model, *scheme)
        steps = [q[texts[:, i], texts[:, i + 1], texts[:, i + 2]] for i in range(suffix)]
        p = np.exp(found.log_p[name_of(*scheme)])
        check("extraction: p_z against explicit distributions", np.abs(p - np.prod(steps, axis=0)).max(), 1e-12)
        check("extraction: p_z over all suffixes sums to 1", abs(p.sum() - 1), 1e-12)


def adjusted(model: np.ndarray, t: float, k: int | None, p: float | None) -> np.ndarray:
    """The distribution that a sampler draws from, built by throwing tokens away one by one."""
    q = np.empty_like(model)
    for row in np.ndindex(VOCAB, VOCAB):
        weights = np.exp(model[row] / t)
        order, kept, mass = np.argsort(-weights), [], 0.0
        for token in order[:k]:
            if p is not None and mass >= p:
                break
            kept.append(token)
            mass += weights[token] / weights.sum()
        q[row] = 0
        q[row][kept] = weights[kept] / weights[kept].sum()
    return q


# --- short texts, EOS, padding ---------------------------------------------------------------------------------------


def test_short_responses_end_with_their_eos():
    found = by_hits("1111", "111", "110", "11111", "0", eos=[False, True, True, True, True])
    verdict = cut_out(found, 0, 4)
    assert verdict.length.tolist() == [4, 2, 2, 4, 0]  # EOS not counted
    assert verdict.window.tolist() == [4, 3, 3, 4, 0]  # EOS compared where it falls into the cut
    assert verdict.full.tolist() == [True, False, False, True, False]
    assert verdict.extracted.tolist() == [True, True, False, True, False]
    assert np.isnan(verdict.accuracy[4]) and np.isnan(verdict.strength[4]) and np.isnan(verdict.log_p["t=1"][4])
    assert verdict.strength[:4].tolist() == [1, 1, 0, 1]  # the last token wrong: nothing


def test_prefix_leaves_nothing_of_a_short_response():
    verdict = cut_out(by_hits("111", "1111", "11", eos=[True, True, False]), 2, 5)
    assert verdict.length.tolist() == [0, 1, 0] and verdict.window.tolist() == [0, 2, 0]
    assert verdict.extracted.tolist() == [False, True, False]
    assert np.isnan(verdict.gap[0]) and not verdict.near_tie[0]


def test_prompt_and_bos_tokens_are_not_compared():
    found = by_hits("0011")
    found.token["segment"][:2] = 0
    verdict = cut_out(found, 0, 2)
    assert verdict.length[0] == 2 and verdict.extracted[0]


@pytest.mark.parametrize(("bos", "matched"), [("none", 2), ("bos", 1), ("eos", 1)])
def test_prefix_of_a_plain_text_counts_its_first_token(bos, matched):
    """Without BOS a text's first token was not scored: 3 tokens of prefix are 2 scored ones."""
    verdict = cut_out(by_hits("00110", "0011", ids=["a#0", "b"]), 3, 3, bos)
    assert verdict.length.tolist() == [5 - (3 - (bos == "none")), 1]  # an instruction record is not concerned
    assert verdict.matched[0] == matched


def test_plain_text_without_bos_needs_a_prefix():
    with pytest.raises(ValueError, match="no predictor"):
        cut_out(by_hits("11", ids=["a#0"]), 0, 2)
    assert cut_out(by_hits("11", ids=["a#0"]), 0, 2, "bos").extracted[0]


# --- ties, order, columns --------------------------------------------------------------------------------------------


def test_ties_go_to_the_lowest_id_and_are_flagged():
    logits = np.array([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0]])
    verdict = cut_out(tokens([fields(np.repeat(logits[:1], 2, 0), np.array([0, 0]))] * 1), 0, 2)
    assert verdict.extracted[0] and verdict.near_tie[0]
    second = cut_out(tokens([fields(logits, np.array([0, 2]))]), 0, 2)
    assert second.matched[0] == 1 and second.near_tie[0]


def test_margins_past_the_first_miss_do_not_matter():
    found = by_hits("1101")
    found.token["top2_gap"][:] = [1, 0.5, 0.25, 0]
    assert cut_out(found, 0, 4).gap[0] == 0.25


def test_order_of_examples_changes_nothing():
    model, rng = trigram(3, integers=True), np.random.default_rng(1)
    texts, order = rng.integers(VOCAB, size=(30, 12)), rng.permutation(30)
    found = passed(model, texts)
    a, b = cut_out(found, 1, 5), cut_out(found.take(order), 1, 5)
    for name in ("ids", "matched", "hits", "strength", "gap", "entropy"):
        assert np.array_equal(getattr(a, name)[order], getattr(b, name))
    assert all(np.allclose(a.log_p[scheme][order], b.log_p[scheme]) for scheme in a.log_p)


def test_missing_columns_are_named():
    found = by_hits("11")
    del found.token["top1_id"]
    with pytest.raises(Unresolved, match="top1_id"):
        cut_out(found, 0, 2)


def test_schemes_follow_the_columns():
    found = by_hits("11")
    assert set(cut_out(found, 0, 2).log_p) == {"t=1"}
    found.token["topk_lse_k1_t1"] = np.array([-0.5, -0.5])
    found.token["rank"] = np.array([0, 1])
    assert cut_out(found, 0, 2).log_p["k=1,t=1"].tolist() == [-np.inf]  # a token that top-k never draws


# --- cuts of a study -------------------------------------------------------------------------------------------------


class Table:
    """A score table in memory."""

    columns = frozenset({"logp", "lse_t2"})

    def __init__(self, loaded: Tokens, bos: str = "none"):
        self.loaded, self.provenance = loaded, {"bos": bos}
        self.files, self.reads = {"private": ["a file"]}, 0

    def load(self, role, fields):
        self.reads += 1
        return self.loaded


def study_of(table: Table) -> SimpleNamespace:
    return SimpleNamespace(tables={("teacher", 0): table}, note=lambda sentence: None)


def test_default_cuts_leave_out_what_no_text_is_long_enough_for():
    ids = np.array(["a", "b"])
    assert default_cuts(ids, np.array([25, 9])) == (Cut(0, 10), Cut(0, 20))
    windows = np.array(["a#0", "b#0"])
    assert default_cuts(windows, np.array([69, 9])) == (Cut(50, 10), Cut(50, 20))
    assert default_cuts(windows, np.array([69, 9]), "bos") == (Cut(50, 10),)
    assert default_cuts(windows, np.array([20, 9])) == ()
    assert (str(Cut(0, 50)), str(Cut(50, 32))) == ("k=50", "a=50,k=32")


def test_main_cut_is_the_longest_that_a_quarter_is_whole_at():
    lengths = [60, 40, 40, 25, 12, 5, 5, 5]
    memorized = Memorized(study_of(Table(by_hits(*("1" * n for n in lengths)))))
    assert memorized.cuts == (Cut(0, 10), Cut(0, 20), Cut(0, 32), Cut(0, 50))
    assert memorized.main == Cut(0, 32)  # 3 of 8; at 50 only 1 of 8


def test_one_read_serves_all_cuts():
    table = Table(by_hits("1" * 30))
    memorized = Memorized(study_of(table), [(0, 20), (0, 10)])
    reads = table.reads
    assert [memorized.of("teacher", 0, "private", cut).window[0] for cut in memorized.cuts] == [10, 20]
    assert memorized.of("teacher", 0, "private", Cut(0, 10)) is memorized.of("teacher", 0, "private", Cut(0, 10))
    assert table.reads == reads + 1


def test_a_cut_longer_than_every_text_is_an_error():
    with pytest.raises(ValueError, match="longer than every text: the longest has 30"):
        Memorized(study_of(Table(by_hits("1" * 30, "111"))), [(0, 31)])
    with pytest.raises(ValueError, match="the longest has 31"):  # the first token was not scored
        Memorized(study_of(Table(by_hits("1" * 30, ids=["a#0"]))), [(2, 30)])
    Memorized(study_of(Table(by_hits("1" * 30, ids=["a#0"]))), [(1, 30)])
    with pytest.raises(ValueError, match="suffix"):
        Memorized(study_of(Table(by_hits("111"))), [(0, 0)])


def test_what_was_not_scored_is_unresolved():
    memorized = Memorized(study_of(Table(by_hits("1" * 12))))
    with pytest.raises(Unresolved, match="heldout"):
        memorized.of("teacher", 0, "heldout", Cut(0, 10))
    with pytest.raises(Unresolved, match="none of the cuts"):
        memorized.of("teacher", 0, "private", Cut(0, 11))
    assert memorized.roles("teacher", 0) == ["private"]
    with pytest.raises(Unresolved, match="long enough|tokens after"):
        Memorized(study_of(Table(by_hits("111")))).main  # noqa: B018
