"""Encoding: template bytes, the seam, cuts and their counts, windows of plain text, what is scored."""

import hashlib
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kd_jax.data import encode, records, synthetic, tokenizer
from kd_jax.data.encode import EOS, PROMPT, RESPONSE, SPECIAL, TEMPLATES
from kd_jax.data.records import DataError

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"


def frame_of(*rows: tuple[str | None, str, str]) -> pd.DataFrame:
    """Records of (instruction, input, response), in the order of their ids."""
    fields = [dict(zip(("instruction", "input", "response"), row, strict=True)) for row in rows]
    return records.make_frame({**row, "group": None, "task": "t", "source": f"f:{i}"} for i, row in enumerate(fields))


@pytest.fixture(scope="module")
def corpus() -> pd.DataFrame:
    return synthetic.generate(400, overlap=0.0, seed=0)


@pytest.fixture(scope="module")
def tok(corpus) -> tokenizer.Tokenizer:
    return tokenizer.load({"train_size": 400}, train_texts=corpus.response)


def run(frame: pd.DataFrame, tok: tokenizer.Tokenizer, **changes) -> encode.Encoded:
    options = {"template": "plain", "bos": "none", "max_length": 512, "max_prompt": 256}
    return encode.encode(frame, tok, **{**options, **changes})


def example(encoded: encode.Encoded, i: int) -> tuple[list[int], list[int]]:
    span = slice(encoded.offsets[i], encoded.offsets[i + 1])
    return encoded.tokens[span].tolist(), encoded.segment[span].tolist()


@pytest.mark.parametrize(
    ("form", "size", "sha256"),
    [
        (0, 153, "7768da83ee0feb389c3bbcac0841599b1f953ff9ee5c448ec02fc560d762893f"),
        (1, 225, "f1b8970aa9b05de470dbd1413609a155a16c9e9cfe4efbf01cf38dc2049fde66"),
    ],
)
def test_alpaca_bytes(form, size, sha256):
    data = TEMPLATES["alpaca"][form].encode()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (size, sha256)


@pytest.mark.parametrize("template", ["alpaca", "plain"])
def test_prompt_and_response_are_joined_in_token_space(corpus, tok, template):
    encoded = run(corpus, tok, template=template, bos="bos", max_prompt=400)
    assert encoded.example_id.tolist() == corpus.example_id.tolist()
    for i, row in enumerate(corpus.itertuples()):
        if template == "plain":
            prompt = f"{row.instruction}\n{row.input}\n" if row.input else f"{row.instruction}\n"
        else:
            prompt = TEMPLATES["alpaca"][bool(row.input)].replace("{instruction}", row.instruction)
            prompt = prompt.replace("{input}", row.input)
        ids, response = tok.encode_batch([prompt, row.response])
        assert example(encoded, i) == (
            [tok.bos_id, *ids, *response, tok.eos_id],
            [SPECIAL] + [PROMPT] * len(ids) + [RESPONSE] * len(response) + [EOS],
        )
    assert encoded.counts["scored_tokens"] == sum(map(len, tok.encode_batch(corpus.response.tolist()))) + len(corpus)
    assert encoded.counts["examples"] == encoded.counts["records"] == len(corpus)


def test_braces_in_a_record_are_text(tok):
    encoded = run(frame_of(("{input} {0}", "", "{response}")), tok)
    assert tok.decode(example(encoded, 0)[0]) == "{input} {0}\n{response}<|endoftext|>"


def test_long_prompts(tok):
    frame = frame_of(("a b c d e f g h", "", "yes"), ("a", "", "no"))
    long = int(frame.index[frame.response == "yes"][0])
    prompt = tok.encode_batch(["a b c d e f g h\n"])[0]
    kept = run(frame, tok, max_prompt=4, bos="eos")
    ids, segment = example(kept, long)
    assert ids[:5] == [tok.eos_id, *prompt[-4:]] and segment[:6] == [SPECIAL, *[PROMPT] * 4, RESPONSE]
    assert tok.decode(ids[5:-1]) == "yes" and segment[-1] == EOS
    assert (kept.counts["cut_prompt"], kept.counts["dropped_long_prompt"]) == (1, 0)

    dropped = run(frame, tok, max_prompt=4, long_prompt="drop")
    assert dropped.example_id.tolist() == frame.example_id[frame.response == "no"].tolist()
    assert (dropped.counts["cut_prompt"], dropped.counts["dropped_long_prompt"]) == (0, 1)
    with pytest.raises(DataError, match="none of 1 records is left"):
        run(frame_of(("a b c d e f g h", "", "yes")), tok, max_prompt=4, long_prompt="drop")


def test_a_cut_response_has_no_eos_and_its_bytes_are_those_kept(tok):
    frame = frame_of(("a", "", "b c d e f g h"))
    prompt, response = tok.encode_batch(["a\n", "b c d e f g h"])
    n = len(prompt) + len(response)
    whole = len(response)
    for length, kept, eos, cut in ((n + 1, whole, 1, 0), (n, whole, 0, 0), (n - 2, whole - 2, 0, 1)):
        encoded = run(frame, tok, max_length=length, max_prompt=len(prompt))
        ids, segment = example(encoded, 0)
        assert (segment.count(RESPONSE), segment.count(EOS)) == (kept, eos)
        assert (encoded.counts["cut_response"], encoded.counts["without_eos"]) == (cut, 1 - eos)
        text = tok.decode(response[:kept]).encode()
        assert (encoded.n_bytes[0], encoded.zlib_bytes[0]) == (len(text), len(zlib.compress(text, 6)))
    assert run(frame, tok, add_eos=False).segment.tolist().count(EOS) == 0


def test_joint_tokenisation_splits_at_the_length_of_the_prompt(corpus, tok):
    apart, joint = run(corpus, tok), run(corpus, tok, joint=True)
    together = tok.encode_batch([f"{r.instruction}\n{r.input}\n{r.response}" for r in corpus.itertuples() if r.input])
    rows = [i for i, r in enumerate(corpus.itertuples()) if r.input]
    for i, ids in zip(rows, together, strict=True):
        tokens, segment = example(joint, i)
        assert tokens == [*ids, tok.eos_id]
        assert segment.count(PROMPT) == example(apart, i)[1].count(PROMPT)


def test_plain_text_becomes_windows(tok):
    text = " ".join(f"word{i}" for i in range(40))
    frame = frame_of((None, "", text), (None, "", "tiny"))
    ids = tok.encode_batch([text])[0]
    name = frame.example_id[frame.response == text].item()
    for bos, room in (("none", 16), ("eos", 15)):
        encoded = run(frame, tok, template="text", bos=bos, max_length=16)
        own = [i for i, record in enumerate(encoded.record_id) if record == name]
        assert encoded.example_id[own].tolist() == [f"{name}#{k}" for k in range(-(-len(ids) // room))]
        pieces = [example(encoded, i) for i in own]
        words = [token for tokens, segment in pieces for token, s in zip(tokens, segment, strict=True) if s == RESPONSE]
        assert words == ids  # nothing lost, nothing twice
        assert all(len(tokens) == 16 for tokens, _ in pieces[:-1])
        assert sum(segment.count(EOS) for _, segment in pieces) == (len(ids) % room != 0)
        assert tok.decode(words) == text
        unscored = "" if bos == "eos" else "".join(tok.decode(tokens[:1]) for tokens, _ in pieces)
        assert encoded.n_bytes[own].sum() == len(text) - len(unscored)
        assert encoded.scored_lengths[own].sum() == len(ids) + (len(ids) % room != 0) - (bos == "none") * len(own)


def test_a_window_that_nothing_predicts_is_dropped_and_counted(tok):
    ids = tok.encode_batch(["a b c d e"])[0]
    frame = frame_of((None, "", "a b c d e"))
    with_rest = {"template": "text", "max_length": len(ids) - 1}
    encoded = run(frame, tok, add_eos=False, **with_rest)
    assert encoded.counts["dropped_short_window"] == 1 and len(encoded) == 1
    assert len(run(frame, tok, add_eos=True, **with_rest)) == 2  # its EOS is predicted
    assert len(run(frame, tok, add_eos=False, bos="eos", **with_rest)) == 2  # BOS predicts it


def test_records_and_text_mix_and_the_text_template_scores_everything(tok):
    frame = frame_of(("ask", "", "answer"), (None, "", "some text"))
    encoded = run(frame, tok)
    assert sorted("#" in name for name in encoded.example_id) == [False, True]
    whole = run(frame_of(("ask", "", "answer")), tok, template="text")
    assert tok.decode(example(whole, 0)[0][:-1]) == "ask\nanswer"
    assert set(whole.segment) == {RESPONSE, EOS}


def test_select_keeps_order_and_repeats(tok):
    frame = frame_of(("q", "", "one"), ("q", "", "two"), (None, "", "a long text " * 9))
    encoded = run(frame, tok, max_length=20, max_prompt=4)
    ids = frame.set_index("response").example_id
    picked = encoded.select([ids["two"], ids["one"], "unknown", ids["two"]])
    assert picked.example_id.tolist() == [ids["two"], ids["one"], ids["two"]]
    assert [tok.decode(example(picked, i)[0][:-1]) for i in range(3)] == ["q\ntwo", "q\none", "q\ntwo"]
    windows = encoded.select([ids["a long text " * 9]])
    assert [name.split("#")[1] for name in windows.example_id] == [str(k) for k in range(len(windows))]
    assert len(windows) > 1
    again = run(frame, tok, max_length=20, max_prompt=4)
    assert encoded.fingerprint() == again.fingerprint() != picked.fingerprint()


def test_text_table_and_token_counts(tok):
    frame = frame_of(("Ask me!", "", "Yes: 12.\nB"))
    encoded = run(frame, tok, bos="bos")
    (row,) = encode.text_table(encoded, frame, tok).to_dict("records")
    assert tok.decode(row["prompt_ids"]) == "Ask me!\n" and tok.decode(row["response_ids"]) == "Yes: 12.\nB"
    assert (row["example_id"], row["group"], row["task"]) == (frame.example_id[0], frame.group[0], "t")
    expected = {"f_chars": 18, "f_words": 5, "f_digits": 2, "f_upper": 3, "f_punct": 3, "f_lines": 3}
    assert {key: row[key] for key in expected} == expected
    counts = encode.token_counts(encoded, tok.vocab_size)
    assert counts.shape == (tok.vocab_size,) and counts.sum() == len(encoded.tokens) - 2
    assert counts[tok.eos_id] == 0 and counts[tok.encode_batch(["!"])[0][0]] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "vicuna"}, "alpaca, plain, text"),
        ({"bos": "yes"}, "none, bos, eos"),
        ({"long_prompt": "keep"}, "keep_end, drop"),
        ({"max_length": 256}, "no room"),
    ],
)
def test_bad_options(corpus, tok, changes, message):
    with pytest.raises(DataError, match=message):
        run(corpus, tok, **changes)


def test_a_response_without_a_token_is_refused_by_place():
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    blank = frame_of(("a", "", "a"), ("a", "", "\n"))
    with pytest.raises(DataError, match=r"f:1: the response of [0-9a-f]{16} has no token"):
        run(blank, tokenizer.Tokenizer(backend, eos="</s>", bos=None))
    with pytest.raises(DataError, match="no BOS token"):
        run(blank, tokenizer.Tokenizer(backend, eos="</s>", bos=None), bos="bos")


def test_real_dolly_in_gpt2_tokens():
    paths = [REAL / "dolly/databricks-dolly-15k.jsonl.gz", REAL / "gpt2_tokenizer/encoder.json.gz"]
    if not all(path.is_file() for path in paths):
        pytest.skip(f"no real data at {REAL}")
    frame = records.load(paths[0])
    tok = tokenizer.load({"vocab": str(paths[1]), "merges": str(REAL / "gpt2_tokenizer/vocab.bpe")})
    encoded = run(frame, tok, max_length=8192, max_prompt=6000)
    assert len(encoded) == 14_996 and encoded.counts["cut_prompt"] == encoded.counts["without_eos"] == 0
    responses = np.add.reduceat(encoded.segment == RESPONSE, encoded.offsets[:-1], dtype=int)
    assert np.median(responses) == pytest.approx(44, abs=1)  # the data's README: 1.19 million, median 44
    assert responses.sum() == pytest.approx(1.19e6, rel=0.01)
