"""ROUGE against the package's published figures and by hand; answers from prompts, references, tables without text."""

import functools
import json
import os
import stat
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from rouge_score import rouge_scorer

from kd_jax import generate, sharding, utility
from kd_jax.data import encode, records, tokenizer
from kd_jax.errors import ConfigError
from kd_jax.transformer import ModelConfig, Transformer

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
ENCODING = dict(template="plain", bos="none", max_length=64, max_prompt=16)


def real(name: str) -> Path:
    if not (REAL / name).exists():
        pytest.skip(f"real data {name} is not at {REAL}")
    return REAL / name


# ----------------------------------------------------------------------------------------------------------- ROUGE


def test_rouge_is_the_packages(check):
    expected = json.loads(real("rouge/expected.json").read_text())["stemmer"]["lines"]
    lines = [real(f"rouge/{name}.txt").read_text().splitlines() for name in ("prediction", "target")]
    scores = utility.rouge(lines[0], [[text] for text in lines[1]])
    for ours, theirs in utility.MEASURES.items():
        assert scores[ours].dtype == np.float64
        want = [line[theirs][2] for line in expected]
        check("ROUGE vs rouge-score's published figures", np.abs(scores[ours] - want).max(), 1e-11)


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        # expected: F = 2 matches / (words of both), with bigrams for ROUGE-2
        ("the cat sat", ["the cat sat down"], (6 / 7, 4 / 5, 6 / 7)),
        ("sat the cat", ["the cat sat"], (1.0, 0.5, 2 / 3)),  # order matters to 2 and L alone
        ("the the the", ["the cat"], (2 / 5, 0.0, 2 / 5)),  # a repeated word counts once
        ("Running, RUNS!", ["run runs"], (1.0, 1.0, 1.0)),  # "runs" and "running" have the stem of "run"
        ("his", ["hi"], (0.0, 0.0, 0.0)),  # words of three letters have no stem
        ("a b", ["x y", "b a", "a c b"], (1.0, 0.0, 4 / 5)),  # each measure has a best reference of its own
        ("", ["word"], (0.0, 0.0, 0.0)),
        ("???", ["word"], (0.0, 0.0, 0.0)),
        ("word", ["!"], (0.0, 0.0, 0.0)),
    ],
)
def test_rouge_by_hand(prediction, references, expected):
    scores = utility.rouge([prediction], [references])
    np.testing.assert_allclose([scores[name][0] for name in utility.MEASURES], expected, atol=1e-12)


def test_rouge_is_what_the_package_gives_without_our_tokenizer(check):
    """Invented texts with capitals, numbers, accents and inflected words; one to three references."""
    rng = np.random.default_rng(0)
    words = "The cats' running runner ran 1,000 times: café, naïve happily happiness ponies pony U.S. e-mail".split()
    draw = lambda: " ".join(rng.choice(words, rng.integers(0, 25)))
    predictions, references = [draw() for _ in range(60)], [[draw() for _ in range(1 + i % 3)] for i in range(60)]
    plain = rouge_scorer.RougeScorer(list(utility.MEASURES.values()), use_stemmer=True)
    want = [plain.score_multi(texts, text) for text, texts in zip(predictions, references)]
    got = utility.rouge(predictions, references)
    for ours, theirs in utility.MEASURES.items():
        check("ROUGE vs rouge-score itself", np.abs(got[ours] - [row[theirs].fmeasure for row in want]).max(), 0)


def test_rouge_keeps_the_order_of_its_rows_and_repeats():
    scores = utility.rouge(["a b", "c", "a b"], [["a b"], ["d"], ["a"]])
    np.testing.assert_allclose(scores["rouge_1"], [1.0, 0.0, 2 / 3])


def test_rouge_of_lists_that_do_not_match():
    with pytest.raises(ValueError, match="2 predictions do not go with 1"):
        utility.rouge(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="prediction 1 has no reference"):
        utility.rouge(["a", "b"], [["a"], []])


# -------------------------------------------------------------------------------------------------------- evaluate

FRAME = records.make_frame(
    [
        dict(
            group=None,
            task=f"t{i % 2}",
            instruction=f"say {word} twice",
            input="",
            response=f"{word} {word}",
            source="x",
        )
        for i, word in enumerate(["red", "green", "blue", "a long and winding road", "gold"])
    ]
)


@functools.cache
def tok() -> tokenizer.Tokenizer:
    return tokenizer.load({"train_size": 300}, train_texts=[*FRAME.instruction, *FRAME.response])


@functools.cache
def encoded() -> encode.Encoded:
    return encode.encode(FRAME, tok(), **ENCODING)


@pytest.fixture
def planted(monkeypatch):
    """`generate` that answers with given texts; keeps the arguments of its calls."""
    calls = []

    def install(say, ended=True):
        def fake(model, prompts, lengths, keys, spec, *, vocab, eos_id, seed, mesh, limits=None):
            calls.append(dict(prompts=prompts, lengths=lengths, keys=keys, seed=seed, limits=limits, eos_id=eos_id))
            ids = [row + [eos_id] * ended for row in tok().encode_batch([say(i, seed) for i in range(len(lengths))])]
            tokens = np.zeros((len(ids), spec.max_new_tokens), np.int32)
            for row, own in zip(tokens, ids):
                row[: len(own)] = own
            n = len(ids)
            return generate.Samples(
                tokens, np.array([len(i) for i in ids], np.int32), np.full(n, ended), np.ones(n, np.int32)
            )

        monkeypatch.setattr(generate, "generate", fake)
        return calls

    return install


def evaluate(sampling=None, **changes):
    arguments = dict(seeds=(10, 20), tokenizer=tok(), vocab=300, mesh=None) | changes
    references = arguments.pop("references", utility.own_references(FRAME))
    data = arguments.pop("encoded", encoded())
    return utility.evaluate(None, data, references, sampling or generate.Sampling(max_new_tokens=40), **arguments)


def test_answers_are_scored_per_example_and_seed(planted):
    responses = FRAME.set_index("example_id").response[encoded().example_id].tolist()
    calls = planted(lambda i, seed: f"  {responses[i]}\n" if seed == 10 else "nothing of it")
    frame = evaluate()
    assert list(frame) == ["example_id", "task", "seed", "rouge_1", "rouge_2", "rouge_l", "n_tokens", "ended"]
    assert frame.example_id.tolist() == 2 * encoded().example_id.tolist()
    assert frame.task.tolist() == 2 * encoded().task.tolist()
    assert frame.seed.tolist() == [10] * 5 + [20] * 5 and frame.ended.all()
    assert (frame.rouge_l[frame.seed == 10] == 1).all() and (frame.rouge_l[frame.seed == 20] == 0).all()
    assert frame.attrs["near_ties"] == 10
    lengths = [len(ids) + 1 for ids in tok().encode_batch(["nothing of it"])]
    assert (frame.n_tokens[frame.seed == 20] == lengths[0]).all()
    whole = utility.means(frame)
    assert whole["rouge_l"] == whole["rouge_1"] == 50.0 and whole["ended"] == 1.0
    # The prompts are the templates' texts, and nothing of the responses.
    ends = np.cumsum(calls[0]["lengths"])
    got = tok().decode_batch([calls[0]["prompts"][end - n : end] for n, end in zip(calls[0]["lengths"], ends)])
    assert got == [f"{text}\n" for text in FRAME.set_index("example_id").instruction[encoded().example_id]]
    assert calls[0]["keys"].dtype == np.uint32 and len(set(calls[0]["keys"].tolist())) == 5


def test_a_first_token_is_part_of_the_prompt(planted):
    calls = planted(lambda i, seed: "x")
    evaluate(encoded=encode.encode(FRAME, tok(), **ENCODING | {"bos": "eos"}), seeds=(1,))
    starts = np.cumsum(calls[0]["lengths"]) - calls[0]["lengths"]
    assert (calls[0]["prompts"][starts] == tok().eos_id).all()


def test_random_numbers_follow_the_record_not_its_row(planted):
    calls = planted(lambda i, seed: "x")
    evaluate(seeds=(1,))
    backwards = encoded().example_id[::-1]
    evaluate(seeds=(1,), encoded=encoded().select(backwards))
    np.testing.assert_array_equal(calls[0]["keys"], calls[1]["keys"][::-1])


def test_an_answer_ends_where_the_end_of_text_is_spelled_out(planted):
    planted(lambda i, seed: f"red{tok().eos}green", ended=False)
    frame = evaluate(seeds=(1,), references={i: ["red"] for i in encoded().example_id})
    assert (frame.rouge_1 == 1).all() and not frame.ended.any()


def test_greedy_needs_one_seed_and_limits_hold(planted):
    calls = planted(lambda i, seed: "x")
    frame = evaluate(generate.Sampling(temperature=0.0, max_new_tokens=40), limit=3, total_length=20)
    assert len(calls) == 1 and frame.example_id.tolist() == encoded().example_id[:3].tolist()
    np.testing.assert_array_equal(calls[0]["limits"], np.minimum(20 - calls[0]["lengths"], 40))


def test_what_cannot_be_evaluated_is_said(planted):
    planted(lambda i, seed: "x")
    first, *others = encoded().example_id
    with pytest.raises(ValueError, match=f"example {first} has no reference \\(1 such of 5\\)"):
        evaluate(references={i: ["a"] for i in others})
    with pytest.raises(ConfigError, match="5 of 5 records have no prompt"):
        evaluate(encoded=encode.encode(FRAME.assign(instruction=None), tok(), **ENCODING))
    with pytest.raises(ConfigError, match="at least one sampling seed"):
        evaluate(seeds=())
    with pytest.raises(ConfigError, match="leave no room in a total length of 3 tokens"):
        evaluate(total_length=3)


def test_a_table_holds_no_text_and_says_whose_it_is(planted, tmp_path):
    planted(lambda i, seed: "red red")
    path = tmp_path / "scores" / "students" / "kd" / "seed0" / "generated" / "dev.parquet"
    frame = evaluate()
    utility.write(frame, path, {"run": "students/kd", "seed": "0", "variant": "plain", "provenance": "{}"})
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    metadata = pq.read_schema(path).metadata
    assert metadata[b"run"] == b"students/kd" and metadata[b"variant"] == b"generated"
    pd.testing.assert_frame_equal(pd.read_parquet(path), frame, check_dtype=False)
    assert b"winding" not in path.read_bytes()


# ------------------------------------------------------------------------------------------------ instruction sets


def test_every_output_and_every_record_of_a_prompt_is_a_reference(tmp_path):
    path = tmp_path / "task.json"
    instances = [
        {"id": "task9-a", "input": "one", "output": ["first", " ", "second"]},
        {"id": "task9-b", "input": "two", "output": ["third"]},
        {"id": "task9-c", "input": "one", "output": ["fourth", "first"]},
    ]
    path.write_text(json.dumps({"Definition": ["Count."], "Instances": instances}))
    data, references = utility.instruction_set(path, tok(), **ENCODING)
    assert sorted(map(sorted, references.values())) == [["first", "fourth", "second"], ["third"]]
    assert set(references) == set(data.example_id) and set(data.task) == {"task9"}
    prompts, lengths = encode.prompts(data, np.arange(2))
    texts = tok().decode_batch(np.split(prompts, np.cumsum(lengths)[:-1]))
    assert {text.splitlines()[-1]: sorted(references[i])[0] for i, text in zip(data.example_id, texts)} == {
        "one": "first",
        "two": "third",
    }
    limited, some = utility.instruction_set(path, tok(), **ENCODING, limit=1)
    assert len(limited) == 1 and some[limited.example_id[0]] == references[limited.example_id[0]]


def test_a_long_prompt_keeps_its_end_and_is_counted(tmp_path):
    path = tmp_path / "set.jsonl"
    rows = [{"instruction": f"start {'very ' * n}end", "input": "", "output": "x"} for n in (0, 60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data, _ = utility.instruction_set(path, tok(), **ENCODING)
    prompts, lengths = encode.prompts(data, np.arange(2))
    texts = tok().decode_batch(np.split(prompts, np.cumsum(lengths)[:-1]))
    assert data.counts["cut_prompt"] == 1 and max(lengths) == 16 and all(text.endswith("end\n") for text in texts)
    dropped, _ = utility.instruction_set(path, tok(), **ENCODING, long_prompt="drop")
    assert len(dropped) == dropped.counts["dropped_long_prompt"] == 1


def test_plain_text_is_no_instruction_set(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps({"text": "private words"}) + "\n")
    with pytest.raises(records.DataError, match="no instructions") as error:
        utility.instruction_set(path, tok(), **ENCODING)
    assert "private" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "examples", "several"),
    [
        ("self_instruct/user_oriented_instructions.jsonl", 252, 0),
        ("sni/task002_quoref_answer_generation/test.json.gz", 100, 17),
    ],
)
def test_published_sets(name, examples, several):
    data, references = utility.instruction_set(
        real(name), tok(), template="alpaca", bos="none", max_length=513, max_prompt=512
    )
    assert len(data) == len(references) == examples
    assert sum(len(texts) > 1 for texts in references.values()) == several


# --------------------------------------------------------------------------------------------------- a real sampler


def test_evaluate_with_the_sampler_itself():
    """Scores are those of the texts that the sampler gives, whatever the order of the records."""
    sizes = dict(vocab_size=300, width=16, layers=1, heads=2, kv_heads=2, head_dim=8, mlp=32, max_positions=64)
    model = Transformer(ModelConfig(**sizes, embed_dim=16, rotary_dim=8), jax.random.key(0))
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    sampling = generate.Sampling(max_new_tokens=12)
    with jax.set_mesh(mesh):
        model = jax.device_put(model, sharding.shardings(model, mesh))
        run = lambda data: utility.evaluate(
            model, data, utility.own_references(FRAME), sampling, seeds=(1, 2), tokenizer=tok(), vocab=300, mesh=mesh
        )
        frame, backwards = run(encoded()), run(encoded().select(encoded().example_id[::-1]))
        prompts, lengths = encode.prompts(encoded(), np.arange(len(encoded())))
        keys = encode.sample_keys(encoded(), np.arange(len(encoded())))
        samples = generate.generate(
            model, prompts, lengths, keys, sampling, vocab=300, eos_id=tok().eos_id, seed=2, mesh=mesh
        )
    assert frame.n_tokens[frame.seed == 2].tolist() == np.asarray(samples.lengths).tolist()
    want = utility.rouge(utility.answers(samples, tok()), FRAME.response.map(lambda text: [text]).tolist())
    np.testing.assert_array_equal(frame.rouge_1[frame.seed == 2], want["rouge_1"])
    by = ["seed", "example_id"]
    pd.testing.assert_frame_equal(
        frame.sort_values(by).reset_index(drop=True), backwards.sort_values(by).reset_index(drop=True)
    )
