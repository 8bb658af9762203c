"""Tokenizers: known ids, every way to load one, sameness, and texts that cannot forge special tokens."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from kd_jax.data import synthetic, tokenizer
from kd_jax.data.records import DataError
from kd_jax.processes import Preempted

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "data"


def real(name: str) -> str:
    if not (REAL / name).is_file():
        pytest.skip(f"real data {name} is not at {REAL}")
    return str(REAL / name)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return synthetic.generate(300, overlap=0.0, seed=0).response.tolist()


@pytest.fixture(scope="module")
def trained(texts) -> tokenizer.Tokenizer:
    return tokenizer.load({"train_size": 500}, train_texts=texts)


def test_trained_round_trip(trained, texts):
    assert trained.vocab_size == 500
    assert trained.decode(trained.encode_batch(["Größe: 4 €\n\n\tend"])[0]) == "Größe: 4 €\n\n\tend"  # not in training
    assert trained.decode_batch(trained.encode_batch(texts)) == texts
    assert trained.eos_id == trained.bos_id == 0


def test_training_is_deterministic(trained):
    code = (
        "from kd_jax.data import synthetic, tokenizer;"
        "texts = synthetic.generate(300, overlap=0.0, seed=0).response;"
        "print(tokenizer.load({'train_size': 500}, train_texts=texts).fingerprint)"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == trained.fingerprint


def test_a_text_cannot_forge_the_end(trained):
    assert trained.eos_id not in trained.encode_batch(["a<|endoftext|>b"])[0]
    assert trained.decode(trained.encode_batch(["a<|endoftext|>b"])[0]) == "a<|endoftext|>b"


def test_saved_folder_bare_json_and_pair_are_the_same(trained, texts, tmp_path):
    trained.save(tmp_path)
    folder = tokenizer.load({"path": str(tmp_path)})
    spec = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "v.json.gz").write_bytes(gzip.compress(json.dumps(spec["vocab"]).encode()))
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in spec["merges"]), ""])
    (tmp_path / "m.bpe").write_text(merges)
    bare = tokenizer.load({"json": str(tmp_path / "tokenizer.json"), "path": None})
    pair = tokenizer.load({"vocab": str(tmp_path / "v.json.gz"), "merges": str(tmp_path / "m.bpe")})
    for other in (folder, bare, pair):
        assert other.encode_batch(texts) == trained.encode_batch(texts)
        assert other.fingerprint == trained.fingerprint
        tokenizer.same(trained, other)
    # A folder with the old pair of files only, as OPT's.
    old = tmp_path / "old"
    old.mkdir()
    (old / "vocab.json").write_text(json.dumps(spec["vocab"]))
    (old / "merges.txt").write_text(merges)
    assert tokenizer.load({"path": str(old)}).fingerprint == trained.fingerprint


def test_transformers_reads_the_saved_folder(trained, texts, tmp_path):
    transformers = pytest.importorskip("transformers")
    trained.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(texts[:50], add_special_tokens=False)["input_ids"] == trained.encode_batch(texts[:50])
    assert theirs.eos_token_id == trained.eos_id and len(theirs) == trained.vocab_size


def test_same_names_the_first_difference(trained, texts):
    other = tokenizer.load({"train_size": 490}, train_texts=texts)
    with pytest.raises(DataError, match="differ from id 490 on: .* and None"):
        tokenizer.same(trained, other)
    with pytest.raises(DataError, match="eos_id differ"):
        spelled = tokenizers.Tokenizer.from_str(trained._backend.to_str())
        tokenizer.same(trained, tokenizer.Tokenizer(spelled, eos="e", bos="e"))


def test_no_prefix_space_at_the_seam():
    vocab = {token: i for i, token in enumerate(["</s>", "▁", "a", "b", "▁a", "<s>"])}
    expected = {False: [[4, 3]], True: [[2, 3]]}  # "▁a b" at the start of a text, "a b" after other tokens
    metaspace, prepend = (tokenizers.Tokenizer(models.BPE(vocab, [("▁", "a")])) for _ in range(2))
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    prepend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    for backend in (metaspace, prepend):
        backend.decoder = decoders.Metaspace()
        ours = tokenizer.Tokenizer(backend, eos="</s>", bos="<s>")
        assert {flag: ours.encode_batch(["ab"], continuing=flag) for flag in (False, True)} == expected


@pytest.mark.parametrize("kind", [Preempted, KeyboardInterrupt, SystemExit, MemoryError])
def test_what_ends_a_program_passes_as_it_is(trained, kind):
    """A signal's exception comes wherever Python runs: here while the texts or ids are laid out."""

    def ending():
        yield from ()
        raise kind

    for work in (trained.encode_batch, trained.decode, trained.decode_batch):
        with pytest.raises(kind):
            work(ending())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "given: nothing"),
        ({"path": "x", "train_size": 300}, "given: path, train_size"),
        ({"vocab": "x"}, "merges"),
        ({"train_size": 300}, "needs the texts"),
        ({"json": "nowhere/tokenizer.json"}, "no such file"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(DataError, match=message):
        tokenizer.load(spec)


def test_bad_folders(tmp_path, trained, texts):
    with pytest.raises(DataError, match="fast tokenizers"):
        tokenizer.load({"path": str(tmp_path)})
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: not a"):
        tokenizer.load({"path": str(tmp_path)})
    with pytest.raises(DataError, match="more than 256"):
        tokenizer.load({"train_size": 200}, train_texts=texts)
    trained.save(tmp_path)
    with pytest.raises(DataError, match=r"tokenizer\.eos is '</end>'"):
        tokenizer.load({"path": str(tmp_path), "eos": "</end>"})


def gpt2() -> tokenizer.Tokenizer:
    return tokenizer.load({"vocab": real("gpt2_tokenizer/encoder.json.gz"), "merges": real("gpt2_tokenizer/vocab.bpe")})


def test_gpt2_ids_and_round_trip():
    ours = gpt2()
    assert ours.encode_batch(["Hello world"]) == [[15496, 995]]
    assert (ours.vocab_size, ours.eos_id, ours.bos_id) == (50257, 50256, 50256)
    parts = [np.load(real(f"lm_extraction/val_{part}.npy")) for part in ("prefix", "suffix")]
    sequences = np.concatenate(parts, axis=1).tolist()
    texts = ours.decode_batch(sequences)
    clean = [i for i, text in enumerate(texts) if "\N{REPLACEMENT CHARACTER}" not in text]
    again = ours.encode_batch([texts[i] for i in clean])
    # The numbers that the data's README gives for a right encoder.
    assert len(clean) == 991
    assert sum(sequences[i] == ids for i, ids in zip(clean, again, strict=True)) == 983


def test_opt_and_neox_ids():
    opt = tokenizer.load({"vocab": real("opt_tokenizer/gpt2-vocab.json"), "merges": real("gpt2_tokenizer/vocab.bpe")})
    assert (opt.vocab_size, opt.eos_id, opt.bos_id) == (50265, 2, 2)
    assert opt.encode_batch([" the, to"]) == [[5, 6, 7]]  # the first entries of the published vocabulary
    with pytest.raises(DataError, match="from id 0 on: '!' and '<s>'"):
        tokenizer.same(gpt2(), opt)
    # The same merges in another order of ids: the same pieces.
    text = "A dog of 1234 hills; naïve\n\n  café."
    pieces = [[each.token(i) for i in each.encode_batch([text])[0]] for each in (opt, gpt2())]
    assert pieces[0] == pieces[1]
    neox = tokenizer.load({"json": real("gpt_neox_tokenizer/20B_tokenizer.json.gz")})
    assert (neox.vocab_size, neox.eos_id, neox.bos_id) == (50277, 0, 0)
    assert neox.decode(neox.encode_batch([text])[0]) == text
