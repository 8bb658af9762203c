"""Records to token ids: templates, the cut of long prompts, and which tokens are the response.

An example is one token sequence: [BOS] prompt response [EOS]. Instruction records give one example each; plain text is
cut into windows, each an example of its own.
"""

import dataclasses
import hashlib
import itertools
import zlib
from collections.abc import Sequence

import numpy as np
import pandas as pd

from kd_jax.data.records import DataError
from kd_jax.data.tokenizer import Tokenizer

PROMPT, RESPONSE, EOS, SPECIAL = 0, 1, 2, 3  # segments; RESPONSE and EOS are scored

# Template -> (without input, with input). "text" has none: the record is one plain text, and all of it is scored.
# Alpaca's bytes are tatsu-lab/stanford_alpaca's; a test holds their sha256.
TEMPLATES: dict[str, tuple[str, str] | None] = {
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:\n",
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    ),
    "plain": ("{instruction}\n", "{instruction}\n{input}\n"),
    "text": None,
}
BOS_POLICIES = ("none", "bos", "eos")


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Examples as flat arrays; example i owns tokens[offsets[i]:offsets[i + 1]].

    Attributes:
        example_id: [n] str; "<record id>#<window>" for plain text.
        record_id: [n] str, the id of the record that it comes from.
        task: [n] str.
        tokens: [total] int32.
        offsets: [n + 1] int64.
        segment: [total] int8: PROMPT, RESPONSE, EOS or SPECIAL (BOS).
        n_bytes, zlib_bytes: [n] int32, of the scored text as kept, without EOS: UTF-8 length, and that of its zlib
            stream at level 6.
        counts: what happened to how many: records, examples, dropped_long_prompt, cut_prompt, cut_response,
            without_eos, dropped_short_window, tokens, scored_tokens.
    """

    example_id: np.ndarray
    record_id: np.ndarray
    task: np.ndarray
    tokens: np.ndarray
    offsets: np.ndarray
    segment: np.ndarray
    n_bytes: np.ndarray
    zlib_bytes: np.ndarray
    counts: dict[str, int]

    def __len__(self) -> int:
        return len(self.example_id)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every example: int64 [n]."""
        return np.diff(self.offsets)

    @property
    def scored_lengths(self) -> np.ndarray:
        """Scored tokens of every example: its response and EOS, but never its very first token: int64 [n]."""
        scored = np.isin(self.segment, (RESPONSE, EOS))
        scored[self.offsets[:-1]] = False
        return np.add.reduceat(scored, self.offsets[:-1], dtype=np.int64)

    def select(self, record_ids: Sequence[str]) -> "Encoded":
        """The examples of these records in this order; a record named twice comes twice, an unknown one not at all.

        A record may be unknown because it was dropped (`long_prompt="drop"`). `counts` stay those of the whole.
        """
        own = pd.DataFrame({"record_id": self.record_id, "row": np.arange(len(self))})
        return self.take(
            pd.DataFrame({"record_id": np.asarray(record_ids, object)}).merge(own, how="inner")["row"].to_numpy()
        )

    def take(self, rows: np.ndarray) -> "Encoded":
        """These examples in this order."""
        lengths = self.lengths[rows]
        flat = ragged(self.offsets[rows], lengths)
        return Encoded(
            self.example_id[rows],
            self.record_id[rows],
            self.task[rows],
            self.tokens[flat],
            np.concatenate([[0], np.cumsum(lengths)]),
            self.segment[flat],
            self.n_bytes[rows],
            self.zlib_bytes[rows],
            self.counts,
        )

    def fingerprint(self) -> str:
        """sha256 over ids, tokens, offsets and segments."""
        digest = hashlib.sha256("\0".join(self.example_id).encode())
        for array in (self.tokens, self.offsets, self.segment):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def encode(
    frame: pd.DataFrame,
    tokenizer: Tokenizer,
    *,
    template: str,
    bos: str,
    max_length: int,
    max_prompt: int,
    long_prompt: str = "keep_end",
    add_eos: bool = True,
    joint: bool = False,
) -> Encoded:
    """Encodes records; prompt and response are tokenised apart and joined in token space.

    Args:
        frame: records, as `records.load` gives them. Rows without an instruction are plain text whatever the template:
            windows of `max_length` tokens with ids "<record>#<k>".
        tokenizer: the tokenizer.
        template: a key of TEMPLATES.
        bos: what an example begins with: "none", "bos" (the tokenizer's BOS) or "eos" (its EOS).
        max_length: longest example, BOS and EOS included. A response cut at it has no EOS.
        max_prompt: longest prompt in tokens, BOS not counted.
        long_prompt: "keep_end" cuts a longer prompt to its last `max_prompt` tokens (and BOS), "drop" leaves it out.
        add_eos: whether a whole response (or the last window of a text) ends in EOS.
        joint: tokenise prompt + response together and split at the token length of the prompt alone, as the published
            codes of MiniLLM and DistiLLM do; only for a paper's recipe.

    Raises:
        DataError: unknown template or policy, lengths with no room for a response, a record without a response token.
    """
    if template not in TEMPLATES:
        raise DataError(f"data.template is {template!r}; known are {', '.join(TEMPLATES)}")
    if long_prompt not in ("keep_end", "drop"):
        raise DataError(f"data.long_prompt is {long_prompt!r}; known are keep_end, drop")
    first = _first_token(tokenizer, bos)
    forms = TEMPLATES[template]
    is_text = frame["instruction"].isna().to_numpy() | (forms is None)
    if max_length < len(first) + (2 if is_text.all() else max_prompt + 1):
        raise DataError(f"data.max_length {max_length} leaves no room for a response after max_prompt {max_prompt}")

    parts = []
    if not is_text.all():
        assert forms is not None
        chosen = frame[~is_text]
        limits = (max_length, max_prompt, long_prompt == "drop")
        parts.append(_encode_pairs(chosen, tokenizer, forms, first, limits, add_eos, joint))
    if is_text.any():
        parts.append(_encode_texts(frame[is_text], tokenizer, first, max_length, add_eos))
    encoded = _join(parts)
    if not len(encoded):
        raise DataError(f"none of {len(frame)} records is left: their prompts are over data.max_prompt {max_prompt}")
    encoded.counts.update(
        records=len(frame),
        examples=len(encoded),
        tokens=len(encoded.tokens),
        scored_tokens=int(encoded.scored_lengths.sum()),
    )
    return encoded


def ragged(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The ranges starts[i], ..., starts[i] + lengths[i] - 1, one after the other: int64 [sum(lengths)]."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)


def prompts(encoded: Encoded, examples: np.ndarray, prefix: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """What a model is given of these examples: flat tokens and lengths `[n]`.

    That is everything before the response; with `prefix`, also the first `prefix` tokens of the response.
    """
    starts, ends = encoded.offsets[examples], encoded.offsets[examples + 1]
    responses = np.isin(encoded.segment, (RESPONSE, EOS))
    before = np.concatenate([[0], np.cumsum(~responses)])
    lengths = before[ends] - before[starts]  # the response is the end of every example
    lengths = np.minimum(lengths + prefix, ends - starts)
    return encoded.tokens[ragged(starts, lengths)], lengths


def sample_keys(encoded: Encoded, examples: np.ndarray) -> np.ndarray:
    """uint32 `[n]`, which with a seed decide a sample: a hash of the example's id and of its how-manieth copy it is."""
    ids = encoded.example_id[examples]
    copy = pd.Series(ids).groupby(ids).cumcount().to_numpy()
    return np.fromiter((zlib.crc32(f"{i}:{c}".encode()) for i, c in zip(ids, copy)), np.uint32, len(ids))


def text_table(encoded: Encoded, frame: pd.DataFrame, tokenizer: Tokenizer) -> pd.DataFrame:
    """What a classifier that sees only the text may use: one row per example.

    Columns: example_id, group, task, prompt_ids, response_ids (without BOS and EOS), and counts over the text of both:
    f_chars, f_words, f_digits, f_upper, f_punct, f_lines.
    """
    prompts, responses = (
        _split(encoded.tokens[keep], np.add.reduceat(keep, encoded.offsets[:-1], dtype=np.int64))
        for keep in (encoded.segment == PROMPT, encoded.segment == RESPONSE)
    )
    both = tokenizer.decode_batch([np.concatenate(pair) for pair in zip(prompts, responses, strict=True)])
    text = pd.Series(both, dtype=object)
    return pd.DataFrame(
        {
            "example_id": encoded.example_id,
            "group": frame.set_index("example_id")["group"].reindex(encoded.record_id).to_numpy(),
            "task": encoded.task,
            "prompt_ids": prompts,
            "response_ids": responses,
            "f_chars": text.str.len(),
            "f_words": text.str.count(r"\S+"),
            "f_digits": text.str.count(r"\d"),
            "f_upper": text.str.count(r"[A-Z]"),
            "f_punct": text.str.count(r"[^\w\s]"),
            "f_lines": text.str.count("\n") + 1,
        }
    )


def token_counts(encoded: Encoded, vocab_size: int) -> np.ndarray:
    """How often each id occurs in prompts and responses (BOS and EOS left out): int64 [vocab_size]."""
    return np.bincount(encoded.tokens[encoded.segment <= RESPONSE], minlength=vocab_size)


# --- Below: ids are flat arrays with lengths, so that nothing loops over tokens ---


def _first_token(tokenizer: Tokenizer, bos: str) -> list[int]:
    if bos not in BOS_POLICIES:
        raise DataError(f"data.bos is {bos!r}; known are {', '.join(BOS_POLICIES)}")
    if bos == "bos" and tokenizer.bos_id is None:
        raise DataError("data.bos is 'bos', but the tokenizer has no BOS token: use 'none' or 'eos'")
    return {"none": [], "bos": [tokenizer.bos_id], "eos": [tokenizer.eos_id]}[bos]


def _flat(ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    return np.fromiter(itertools.chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths


def _split(flat: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    ends = np.cumsum(lengths)
    return [flat[start:end] for start, end in zip(ends - lengths, ends, strict=True)]


def _require_tokens(frame: pd.DataFrame, n_tokens: np.ndarray) -> None:
    if (n_tokens == 0).any():
        row = frame.iloc[int(np.argmin(n_tokens))]
        raise DataError(f"{row['source']}: the response of {row['example_id']} has no token")


def _assemble(
    pool: np.ndarray,
    stretches: list[tuple[int, np.ndarray, np.ndarray]],
    first: list[int],
    eos_id: int,
    eos: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, offsets, segment) of examples that are BOS, stretches (segment, start, length) of the pool, and EOS."""
    n = len(eos)
    end = len(pool)
    pool = np.concatenate([pool, np.array([*first, eos_id], np.int32)])
    every = [
        (SPECIAL, np.full(n, end), np.full(n, len(first))),
        *stretches,
        (EOS, np.full(n, end + len(first)), eos.astype(np.int64)),
    ]
    kinds, starts, sizes = zip(*every, strict=True)
    size = np.stack(sizes, axis=1)
    tokens = pool[ragged(np.stack(starts, axis=1).ravel(), size.ravel())]
    segment = np.repeat(np.tile(np.array(kinds, np.int8), n), size.ravel())
    return tokens, np.concatenate([[0], np.cumsum(size.sum(axis=1))]), segment


def _encode_pairs(
    frame: pd.DataFrame,
    tokenizer: Tokenizer,
    forms: tuple[str, str],
    first: list[int],
    limits: tuple[int, int, bool],
    add_eos: bool,
    joint: bool,
) -> Encoded:
    max_length, max_prompt, drop_long = limits
    prompts = [
        forms[bool(context)].format(instruction=instruction, input=context)
        for instruction, context in zip(frame["instruction"], frame["input"], strict=True)
    ]
    responses = frame["response"].tolist()
    prompt_ids, prompt_n = _flat(tokenizer.encode_batch(prompts))
    if joint:
        together = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        all_ids, all_n = _flat(tokenizer.encode_batch(together))
        # The prompt is what precedes the split in the joint ids; where its last token merged, it is not its own ids.
        response_n = np.maximum(all_n - prompt_n, 0)
        pool, prompt_start = all_ids, np.cumsum(all_n) - all_n
        response_start = prompt_start + prompt_n
    else:
        response_ids, response_n = _flat(tokenizer.encode_batch(responses, continuing=True))
        pool, prompt_start = np.concatenate([prompt_ids, response_ids]), np.cumsum(prompt_n) - prompt_n
        response_start = len(prompt_ids) + np.cumsum(response_n) - response_n
    _require_tokens(frame, response_n)

    long = prompt_n > max_prompt
    rows = np.flatnonzero(~long if drop_long else np.ones_like(long))
    kept_prompt = np.minimum(prompt_n, max_prompt)[rows]
    room = max_length - len(first) - kept_prompt
    kept_response = np.minimum(response_n[rows], room)
    eos = add_eos & (response_n[rows] < room)
    stretches = [
        (PROMPT, (prompt_start + prompt_n)[rows] - kept_prompt, kept_prompt),
        (RESPONSE, response_start[rows], kept_response),
    ]
    tokens, offsets, segment = _assemble(pool, stretches, first, tokenizer.eos_id, eos)

    # A whole response is measured as it was written; of a cut one, the text that its kept tokens give.
    cut = kept_response < response_n[rows]
    texts = np.array(responses, object)[rows]
    kept_flat = pool[ragged(response_start[rows][cut], kept_response[cut])]
    texts[cut] = tokenizer.decode_batch(_split(kept_flat, kept_response[cut]))
    ids = frame["example_id"].to_numpy(object)[rows]
    return Encoded(
        ids,
        ids,
        frame["task"].to_numpy(object)[rows],
        tokens,
        offsets,
        segment,
        *measure(texts),
        counts={
            "dropped_long_prompt": int(long.sum()) if drop_long else 0,
            "cut_prompt": 0 if drop_long else int(long.sum()),
            "cut_response": int(cut.sum()),
            "without_eos": int((~eos).sum()),
            "dropped_short_window": 0,
        },
    )


def _encode_texts(
    frame: pd.DataFrame, tokenizer: Tokenizer, first: list[int], max_length: int, add_eos: bool
) -> Encoded:
    columns = [frame[name].where(frame[name].notna(), "") for name in ("instruction", "input", "response")]
    texts = ["\n".join(filter(None, parts)) for parts in zip(*columns, strict=True)]
    ids, n = _flat(tokenizer.encode_batch(texts))
    _require_tokens(frame, n)
    size = max_length - len(first)
    windows = -(-n // size)
    record = np.repeat(np.arange(len(n)), windows)
    number = ragged(np.zeros_like(windows), windows)
    starts = (np.cumsum(n) - n)[record] + number * size
    lengths = np.minimum(n[record] - number * size, size)
    # The last window ends in EOS if it has room; an EOS alone in a window would be predicted from nothing.
    eos = add_eos & (number == windows[record] - 1) & (lengths < size)
    # A single token without BOS or EOS has nothing that predicts it, or that it predicts.
    keep = lengths + eos + len(first) > 1
    record, number, starts, lengths, eos = (array[keep] for array in (record, number, starts, lengths, eos))

    unscored = 0 if first else 1  # without a BOS nothing predicts a window's first token
    scored = _split(ids[ragged(starts + unscored, lengths - unscored)], lengths - unscored)
    tokens, offsets, segment = _assemble(ids, [(RESPONSE, starts, lengths)], first, tokenizer.eos_id, eos)
    record_id = frame["example_id"].to_numpy(object)[record]
    example_id = np.array([f"{name}#{k}" for name, k in zip(record_id, number, strict=True)], object)
    return Encoded(
        example_id,
        record_id,
        frame["task"].to_numpy(object)[record],
        tokens,
        offsets,
        segment,
        *measure(tokenizer.decode_batch(scored)),
        counts={
            "dropped_long_prompt": 0,
            "cut_prompt": 0,
            "cut_response": 0,
            "without_eos": int((~eos).sum()),
            "dropped_short_window": int((~keep).sum()),
        },
    )


def measure(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    data = [text.encode() for text in texts]
    sizes = (map(len, data), (len(zlib.compress(text, 6)) for text in data))
    n_bytes, zlib_bytes = (np.fromiter(size, np.int32, len(data)) for size in sizes)
    return n_bytes, zlib_bytes


def _join(parts: list[Encoded]) -> Encoded:
    if len(parts) == 1:
        return parts[0]
    arrays = {
        field.name: np.concatenate([getattr(part, field.name) for part in parts])
        for field in dataclasses.fields(Encoded)
        if field.name not in ("counts", "offsets")
    }
    offsets = np.concatenate([[0], np.cumsum(np.concatenate([part.lengths for part in parts]))])
    counts = {key: sum(part.counts[key] for part in parts) for key in parts[0].counts}
    return Encoded(**arrays, offsets=offsets, counts=counts)
