"""Generated continuations: what a model says after a record's prompt, or after the first tokens of its text.

scores/<run>/seed<k>/continued/<role>-NNNNN.parquet, one row per example, decoding and cut:
example_id, role, task, decoding, prefix, suffix (tokens given and compared), target_ids (the true ones, EOS included
where it falls among them), generated_ids (as many at most), ended (EOS among them), near_ties (of the generation:
choices closer than rounding), drawn (bool: chosen by hash; false: for its near tie alone).

Prefixes are cut in token space and never tokenised again. Continued are some examples of each role by seeded hash, and
all whose verdict from the one scoring pass hangs on a lead that another program may turn around.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from kd_jax import generate, storage
from kd_jax.data import encode
from kd_jax.data.encode import EOS, RESPONSE, Encoded, ragged
from kd_jax.data.records import uniform
from kd_jax.errors import ConfigError
from kd_jax.generate import Sampling
from kd_jax.score import write_shards
from kd_jax.storage import Path
from kd_jax.transformer import Transformer

ROLES = ("private", "heldout", "canary")
SUFFIXES = (10, 20, 32, 50)
TEXT_PREFIX = 50  # of plain texts, where no cut is named
COMPARED = 32  # tokens of zhang2025
NEAR_TIE = 1e-3  # of two logits: below, a greedy token may flip between two programs
DECODINGS = {
    "greedy": {},
    # Published code of arXiv:2508.07054: no 6-gram twice, copies from the prompt included, and no end before length.
    "zhang2025": {"no_repeat_ngram": 6, "min_new_tokens": COMPARED},
}
SHARD = 4096  # examples of a file


@dataclasses.dataclass(frozen=True)
class Continuing:
    """What is continued, and how.

    cuts: (prefix, suffix) in tokens: of a response or plain text those that are given, and those that are generated.
    examples: of each role and prefix, by a hash of seed and id; 0: nothing is continued.
    """

    cuts: tuple[tuple[int, int], ...]
    decodings: tuple[str, ...]
    examples: int
    seed: int

    @property
    def prefixes(self) -> list[int]:
        return sorted({prefix for prefix, _ in self.cuts})

    def suffixes(self, prefix: int, decoding: str = "greedy") -> list[int]:
        """What is compared after this prefix, ascending."""
        return [COMPARED] if decoding == "zhang2025" else sorted(k for a, k in self.cuts if a == prefix)


def continuing(settings: ConfigDict, encoded: Encoded, seed: int) -> Continuing:
    """`config.memorization` as it applies to the private examples `encoded`; their own cuts where it names none.

    Raises ConfigError on cuts that no example has, on unknown decodings, and on numbers that make no sense.
    """
    unknown = sorted(set(settings.decodings) - set(DECODINGS))
    if unknown or not settings.decodings:
        found = ", ".join(unknown) or "none"
        raise ConfigError(f"memorization.decodings names {found}; known are {', '.join(DECODINGS)}")
    if settings.continue_examples < 0 or settings.continue_suffix < 1:
        raise ConfigError("memorization.continue_examples must not be negative, continue_suffix must be positive")
    responses = _responses(encoded)
    bare = bool((encoded.segment[encoded.offsets[:-1]] == RESPONSE).any())  # nothing predicts a first token
    for prefix, suffix in settings.cuts:
        if prefix < bare or suffix < 1:
            least = "1, for a text needs a beginning" if bare else "0"
            raise ConfigError(f"memorization.cuts: ({prefix}, {suffix}): a prefix is at least {least}, a suffix 1")
        if not (responses >= prefix + suffix).any():
            raise ConfigError(
                f"memorization.cuts: ({prefix}, {suffix}) is longer than every text; the longest has "
                f"{responses.max(initial=0)} tokens"
            )
    cuts = tuple((int(a), int(k)) for a, k in settings.cuts)
    if not cuts:
        prefix = TEXT_PREFIX if is_text(encoded).mean() > 0.5 else 0
        cuts = tuple((prefix, k) for k in SUFFIXES if (responses >= prefix + k).any())
    whole = {(prefix, settings.continue_suffix) for prefix, _ in cuts}
    return Continuing(tuple(sorted({*cuts, *whole})), tuple(settings.decodings), int(settings.continue_examples), seed)


def is_text(encoded: Encoded) -> np.ndarray:
    """Which examples are plain text? bool [n]."""
    return np.array(["#" in name for name in encoded.example_id], bool)


def choose(encoded: Encoded, prefix: int, spec: Continuing, close: np.ndarray | None = None) -> np.ndarray:
    """Which examples are continued after `prefix` tokens, bool [n]: some by hash, and those that are `close` [n].

    An example whose response ends before the cut has nothing to continue.
    """
    fit = np.flatnonzero(_responses(encoded) > prefix)
    order = fit[np.argsort(uniform(spec.seed, "continue", encoded.example_id[fit]), kind="stable")]
    chosen = np.zeros(len(encoded), bool)
    chosen[order[: spec.examples]] = True
    if close is not None:
        chosen[fit] |= close[fit]
    return chosen


def near_ties(scored: Mapping[str, np.ndarray], encoded: Encoded, prefix: int, suffix: int) -> np.ndarray:
    """Examples whose greedy match of `suffix` tokens after `prefix` may be another in another program: bool [n].

    scored: flat `target_id`, `top1_id`, `top2_gap` of the plain score table, in the order of `encoded`. What counts is
    the least lead up to the first miss, that one included: later tokens do not change the verdict.
    """
    counts = encoded.scored_lengths
    if counts.sum() != len(scored["top1_id"]):
        raise ValueError(f"{len(scored['top1_id'])} scored tokens do not belong to examples with {counts.sum()}")
    owner = np.repeat(np.arange(len(encoded)), counts)
    # A first token that nothing predicts is one of the prefix, and not in the table.
    skipped = prefix - (encoded.segment[encoded.offsets[:-1]] == RESPONSE)
    place = ragged(np.zeros(len(encoded), np.int64), counts) - skipped[owner]
    inside = (place >= 0) & (place < suffix)
    owner, place, gap = owner[inside], place[inside], scored["top2_gap"][inside]
    miss = (scored["top1_id"] != scored["target_id"])[inside]
    first = np.full(len(encoded), suffix)
    np.minimum.at(first, owner[miss], place[miss])
    found = np.zeros(len(encoded), bool)
    found[owner[(place <= first[owner]) & (gap < NEAR_TIE)]] = True
    return found


def continue_role(
    model: Transformer,
    encoded: Encoded,
    role: str,
    plain: Path,
    folder: Path,
    spec: Continuing,
    *,
    vocab: int,
    eos_id: int,
    mesh: Mesh,
    metadata: dict[str, str],
    bar: tqdm,
) -> dict[str, int]:
    """Continue the chosen examples of one role into `folder`; shards that exist are kept.

    plain: folder of the run's plain score tables.
    Returns how many examples were continued, and how many of them for a near tie.
    """
    scored = _read_scored(plain, role)
    close = {a: near_ties(scored, encoded, a, max(spec.suffixes(a))) for a in spec.prefixes}
    drawn = {a: choose(encoded, a, spec) for a in spec.prefixes}
    chosen = {a: choose(encoded, a, spec, close[a]) for a in spec.prefixes}
    rows = np.flatnonzero(np.any(list(chosen.values()), axis=0))
    bar.total += len(rows)

    def make(indices: np.ndarray) -> pa.Table:
        parts = []
        for prefix in spec.prefixes:
            own = rows[indices][chosen[prefix][rows[indices]]]
            for decoding in spec.decodings if len(own) else ():
                suffixes = spec.suffixes(prefix, decoding)
                samples = generated(
                    model, encoded, own, prefix, suffixes[-1], decoding, vocab=vocab, eos_id=eos_id, mesh=mesh
                )
                even = drawn[prefix][own]
                parts += [table(encoded, own, role, decoding, (prefix, k), samples, even) for k in suffixes]
        bar.update(len(indices))
        return pa.concat_tables(parts)

    write_shards(make, len(rows), role, folder, SHARD, metadata, bar)
    ties = np.any([chosen[a] & close[a] for a in spec.prefixes], axis=0)
    return {"examples": len(rows), "near_ties": int(ties.sum())}


def generated(
    model: Transformer,
    encoded: Encoded,
    examples: np.ndarray,
    prefix: int,
    suffix: int,
    decoding: str,
    *,
    vocab: int,
    eos_id: int,
    mesh: Mesh,
) -> generate.Samples:
    """Up to `suffix` tokens after the prompts of these examples and `prefix` tokens of their responses.

    Fewer where the model's context ends; the example itself fits into it.
    """
    prompts, lengths = encode.prompts(encoded, examples, prefix)
    sampling = Sampling(temperature=0.0, max_new_tokens=suffix, **DECODINGS[decoding])
    limits = np.minimum(suffix, model.cfg.max_positions - lengths)
    keys = np.zeros(len(examples), np.uint32)  # nothing is drawn
    return generate.generate(
        model, prompts, lengths, keys, sampling, vocab=vocab, eos_id=eos_id, seed=0, mesh=mesh, limits=limits
    )


def table(
    encoded: Encoded,
    examples: np.ndarray,
    role: str,
    decoding: str,
    cut: tuple[int, int],
    samples: generate.Samples,
    drawn: np.ndarray,
) -> pa.Table:
    """One row per example: the first `cut[1]` tokens that were generated after `cut[0]`, beside the true ones.

    drawn: which of the examples were chosen by hash, bool [n].
    """
    (prefix, suffix), n = cut, len(examples)
    ends = encoded.offsets[examples + 1]
    starts = ends - _tails(encoded)[examples] + prefix
    true = np.minimum(suffix, ends - starts)
    made = np.minimum(samples.lengths, suffix)
    inside = np.arange(samples.tokens.shape[1])[None] < made[:, None]
    columns = {
        "example_id": pa.array([str(i) for i in encoded.example_id[examples]]),
        "role": pa.array([role] * n),
        "task": pa.array([str(t) for t in encoded.task[examples]]),
        "decoding": pa.array([decoding] * n),
        "prefix": pa.array(np.full(n, prefix), pa.int32()),
        "suffix": pa.array(np.full(n, suffix), pa.int32()),
    }
    columns |= {
        "target_ids": _lists(true, encoded.tokens[ragged(starts, true)]),
        "generated_ids": _lists(made, samples.tokens[inside]),
        "ended": pa.array(samples.ended & (samples.lengths <= suffix)),
        "near_ties": pa.array(samples.near_ties, pa.int32()),
        "drawn": pa.array(drawn, pa.bool_()),
    }
    return pa.table(columns)


def _responses(encoded: Encoded) -> np.ndarray:
    """Response tokens of every example, EOS not counted, the first of a bare text counted: int64 [n]."""
    return np.add.reduceat(encoded.segment == RESPONSE, encoded.offsets[:-1], dtype=np.int64)


def _tails(encoded: Encoded) -> np.ndarray:
    """Tokens of response and EOS, which every example ends in: int64 [n]."""
    return np.add.reduceat(np.isin(encoded.segment, (RESPONSE, EOS)), encoded.offsets[:-1], dtype=np.int64)


def _lists(counts: np.ndarray, values: np.ndarray) -> pa.ListArray:
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(values, pa.int32()))


def _read_scored(folder: Path, role: str) -> dict[str, np.ndarray]:
    """What `near_ties` needs of a role's plain score tables, flat, in the order in which they were written."""
    names = ["target_id", "top1_id", "top2_gap"]
    paths = sorted(folder.glob(f"{role}-*.parquet"), key=str)
    whole = pa.concat_tables([pq.read_table(storage.readable(path), columns=names) for path in paths])
    return {name: whole[name].combine_chunks().flatten().to_numpy() for name in names}
