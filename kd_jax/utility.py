"""Utility: ROUGE of generated responses against their references.

A model answers the prompts of a set of records under several sampling seeds. What is kept per answer are scores, not
text: `scores/<run>/seed<k>/generated/<set>.parquet`, one row per example and sampling seed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from jax.sharding import Mesh

from kd_jax import generate
from kd_jax.data import encode, records
from kd_jax.data.encode import PROMPT, Encoded
from kd_jax.data.tokenizer import Tokenizer
from kd_jax.errors import ConfigError
from kd_jax.storage import write_parquet
from kd_jax.transformer import Transformer

# Our name -> that of the rouge-score package.
MEASURES = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}

References = dict[str, list[str]]  # example_id -> the texts that count as a right answer, at least one


# ----------------------------------------------------------------------------------------------------------- ROUGE


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    """ROUGE-1, ROUGE-2 and ROUGE-L F1 as the rouge-score package has them, with the Porter stemmer.

    Args:
        predictions: [n] texts.
        references: [n] lists of texts, at least one each; every measure takes the best of them for itself.

    Returns:
        `rouge_1`, `rouge_2`, `rouge_l`: float64 [n] in [0, 1]. A prediction without a word scores 0.

    Raises:
        ValueError: lists of different lengths, or a prediction without references; names the counts or the row.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions do not go with {len(references)} lists of references")
    if empty := [row for row, texts in enumerate(references) if not texts]:
        raise ValueError(f"prediction {empty[0]} has no reference ({len(empty)} such in all)")
    pairs = [(prediction, tuple(texts)) for prediction, texts in zip(predictions, references)]
    scorer = _scorer()
    scored = {pair: scorer.score_multi(pair[1], pair[0]) for pair in set(pairs)}  # greedy answers often repeat
    return {
        ours: np.array([scored[pair][theirs].fmeasure for pair in pairs], np.float64)
        for ours, theirs in MEASURES.items()
    }


def _scorer():
    """The package's scorer; stems and tokenised texts are remembered for as long as it lives."""
    from nltk.stem import porter  # with rouge-score 1.5 s to import
    from rouge_score import rouge_scorer, tokenize, tokenizers

    class Stemmer:
        stem = staticmethod(functools.cache(porter.PorterStemmer().stem))

    class Remembering(tokenizers.Tokenizer):
        tokenize = staticmethod(functools.cache(lambda text: tokenize.tokenize(text, Stemmer)))

    return rouge_scorer.RougeScorer(list(MEASURES.values()), tokenizer=Remembering())


# ------------------------------------------------------------------------------------------------------ generation


def evaluate(
    model: Transformer,
    encoded: Encoded,
    references: Mapping[str, Sequence[str]],
    sampling: generate.Sampling,
    *,
    seeds: Sequence[int],
    tokenizer: Tokenizer,
    vocab: int,
    mesh: Mesh,
    limit: int = 0,
    total_length: int = 0,
) -> pd.DataFrame:
    """Lets a model answer prompts and scores the answers: one row per example and sampling seed.

    Args:
        model: placed on `mesh`.
        encoded: instruction records; what stands before their responses is the prompt, as it was cut for training.
        references: example_id -> texts, for every example that is used.
        sampling: how to decode. Greedy and beam search give every seed the same, so they use the first alone.
        seeds: sampling seeds.
        vocab: the effective vocabulary.
        limit: use the first `limit` examples (their order is that of hashed ids); 0 = all.
        total_length: prompt and response together get at most this many tokens (the papers: 512); 0 = no such limit.

    Returns:
        Columns example_id, task, seed, rouge_1, rouge_2, rouge_l (in [0, 1]), n_tokens (generated, EOS included) and
        ended (whether the model produced EOS). No text. `attrs["near_ties"]` counts the tokens whose draw was closer
        than rounding, so that another batch or device might have chosen otherwise.

    Raises:
        ConfigError: no seed, no example, a record without a prompt, no room for a response.
        ValueError: an example without a reference; names it.
    """
    n = min(limit, len(encoded)) if limit else len(encoded)
    _require_prompts(encoded, n)
    prompts, lengths = encode.prompts(encoded, np.arange(n))
    ids, task = encoded.example_id[:n], encoded.task[:n]
    if missing := [i for i in ids if not references.get(i)]:
        raise ValueError(f"example {missing[0]} has no reference ({len(missing)} such of {n})")
    if not seeds or not n:
        raise ConfigError(f"ROUGE needs at least one sampling seed and one example, got {len(seeds)} and {n}")
    limits = None
    if total_length:
        limits = np.minimum(total_length - lengths, sampling.max_new_tokens)
        if (limits < 1).any():
            raise ConfigError(f"{(limits < 1).sum()} prompts leave no room in a total length of {total_length} tokens")

    keys = encode.sample_keys(encoded, np.arange(n))
    frames, texts, near_ties = [], [], 0
    for seed in seeds if sampling.temperature else seeds[:1]:
        samples = generate.generate(
            model, prompts, lengths, keys, sampling,
            vocab=vocab, eos_id=tokenizer.eos_id, seed=seed, mesh=mesh, limits=limits,
        )  # fmt: skip
        near_ties += int(np.sum(samples.near_ties))
        texts += answers(samples, tokenizer)
        own = dict(example_id=ids, task=task, seed=seed, n_tokens=samples.lengths, ended=samples.ended)
        frames.append(pd.DataFrame(own))
    frame = pd.concat(frames, ignore_index=True)
    scores = rouge(texts, [references[i] for i in frame.example_id])
    frame = frame.assign(**scores)[["example_id", "task", "seed", *MEASURES, "n_tokens", "ended"]]
    frame.attrs["near_ties"] = near_ties
    return frame


def _require_prompts(encoded: Encoded, n: int) -> None:
    inside = encoded.segment[: int(encoded.offsets[n])] == PROMPT
    if bare := int(np.sum(np.add.reduceat(inside, encoded.offsets[:n], dtype=np.int64) == 0)):
        raise ConfigError(f"{bare} of {n} records have no prompt: ROUGE by generation needs instruction records")


def answers(samples: generate.Samples, tokenizer: Tokenizer) -> list[str]:
    """The texts of generated tokens: without EOS, cut where the end of the text is spelled out, stripped."""
    kept = np.asarray(samples.lengths) - np.asarray(samples.ended)
    texts = tokenizer.decode_batch([row[:size] for row, size in zip(np.asarray(samples.tokens), kept)])
    return [text.split(tokenizer.eos, 1)[0].strip() for text in texts]


def means(frame: pd.DataFrame) -> dict[str, float]:
    """Means over examples and seeds of `evaluate`'s table: ROUGE x 100, response tokens, share that ended."""
    scores = {name: 100.0 * float(frame[name].mean()) for name in MEASURES}
    return scores | {"response_tokens": float(frame.n_tokens.mean()), "ended": float(frame.ended.mean())}


# ------------------------------------------------------------------------------------------------- sets and tables


def instruction_set(
    path: str | Path,
    tokenizer: Tokenizer,
    *,
    template: str,
    bos: str,
    max_length: int,
    max_prompt: int,
    long_prompt: str = "keep_end",
    joint: bool = False,
    format: str = "auto",
    limit: int = 0,
    seed: int = 0,
) -> tuple[Encoded, References]:
    """Records of any instruction file, one example per distinct prompt, with everything that counts as its answer.

    References of a prompt are the outputs of all records that share it, and all outputs of a nested record
    (Super-NaturalInstructions). A prompt over `max_prompt` tokens keeps its end, or is left out; `Encoded.counts` says
    how many were (`cut_prompt`, `dropped_long_prompt`). `limit` prompts are kept (0 = all), picked by a seeded hash.
    The other settings are those of `records.load` and `encode.encode`.

    Raises:
        DataError: as those two; plain text without instructions.
    """
    frame = records.load(path, format=format, all_references=True)
    if frame.instruction.isna().any():
        raise records.DataError(f"{path}: plain text has no instructions to answer")
    prompts = frame.groupby(["instruction", "input"], sort=False)
    texts = prompts.response.agg(list).to_numpy()
    frame = prompts.head(1).reset_index(drop=True)
    if limit and limit < len(frame):
        keep = np.sort(np.argsort(records.uniform(seed, "limit", frame.example_id), kind="stable")[:limit])
        frame, texts = frame.iloc[keep].reset_index(drop=True), texts[keep]
    encoded = encode.encode(
        frame, tokenizer, template=template, bos=bos, max_length=max_length, max_prompt=max_prompt,
        long_prompt=long_prompt, joint=joint,
    )  # fmt: skip
    return encoded, dict(zip(frame.example_id, texts))


def own_references(frame: pd.DataFrame) -> References:
    """Each record's own response as its one reference, for records of the study (`records.load`'s table)."""
    return {example: [response] for example, response in zip(frame.example_id, frame.response)}


def write(frame: pd.DataFrame, path: Path, metadata: Mapping[str, str]) -> None:
    """Writes `evaluate`'s table as Parquet (mode 0600, whole or not at all).

    `metadata` is that of a score table (`run`, `seed`, `provenance`, ...); `variant` becomes "generated".
    """
    write_parquet(path, pa.Table.from_pandas(frame, preserve_index=False), {**metadata, "variant": "generated"})
