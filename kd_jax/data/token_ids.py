"""Examples that are given as token ids: a table of prefixes and one of suffixes, as lm-extraction-benchmark has them.

Ids are used as they are: decoding them and encoding the text need not give them back.
"""

import hashlib
import pathlib

import numpy as np
import pandas as pd

from kd_jax.data.encode import BOS_POLICIES, PROMPT, RESPONSE, SPECIAL, Encoded, measure
from kd_jax.data.records import DataError
from kd_jax.data.tokenizer import Tokenizer


def load(path: str) -> np.ndarray:
    """Token ids int32 [n, length] of a .npy file. Raises DataError on what is no such table."""
    file = pathlib.Path(path)
    if not file.is_file():
        raise DataError(f"{path}: no such file")
    with file.open("rb") as handle:
        if handle.read(6) != np.lib.format.MAGIC_PREFIX:
            raise DataError(f"{path}: not a .npy file of numbers (np.save writes one)")
    try:  # mapped: an array that the header says is longer than the file is refused before memory is asked for
        ids = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # the header is a Python literal, and fails in as many ways
        raise DataError(f"{path}: not a .npy file of numbers, or a cut one ({type(error).__name__})") from None
    if ids.ndim != 2 or not ids.size:
        raise DataError(f"{path}: shape {ids.shape}; it needs [texts, tokens]")
    if not np.issubdtype(ids.dtype, np.integer):
        raise DataError(f"{path}: {ids.dtype}; token ids are integers (uint16 as published)")
    if ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
        raise DataError(f"{path}: ids from {ids.min()} to {ids.max()}; token ids are not negative")
    return np.array(ids, np.int32)


def pair(prefix: str, suffix: str) -> tuple[np.ndarray, np.ndarray]:
    """Prefixes [n, a] and suffixes [n, k] of two files, row by row. Raises DataError on numbers of rows that differ."""
    prefixes, suffixes = load(prefix), load(suffix)
    if len(prefixes) != len(suffixes):
        raise DataError(f"{prefix} has {len(prefixes)} rows, {suffix} has {len(suffixes)}: row i of both is one text")
    return prefixes, suffixes


def encode(prefixes: np.ndarray, suffixes: np.ndarray, tokenizer: Tokenizer, bos: str) -> Encoded:
    """One example a row, ordered by id: the prefix is its prompt, the suffix its response, without EOS.

    tokenizer: whose ids they are; it gives the sizes of the texts, and the BOS that `bos` asks for.
    A row's id is a hash of its content. The benchmark has some rows twice and counts each: the id of a further one
    ends in ".2" and so on (see `content`).
    Raises DataError on ids that the tokenizer does not have, and on an unknown policy or a BOS that is not there.
    """
    first = {"none": [], "bos": [tokenizer.bos_id], "eos": [tokenizer.eos_id]}.get(bos)
    if first is None or None in first:
        raise DataError(f"data.bos is {bos!r}; known are {', '.join(BOS_POLICIES)}, and bos needs a token for it")
    if (most := max(prefixes.max(), suffixes.max())) >= tokenizer.vocab_size:
        raise DataError(
            f"token id {most} is beyond the tokenizer's {tokenizer.vocab_size} tokens: the files are of another one"
        )
    n, shape = len(prefixes), f"{prefixes.shape[1]}+{suffixes.shape[1]}:".encode()
    tokens = np.concatenate([np.tile(np.array(first, np.int32), (n, 1)), prefixes, suffixes], axis=1).astype(np.int32)
    digests = pd.Series([hashlib.sha256(shape + row[len(first) :].tobytes()).hexdigest()[:16] for row in tokens])
    copy = digests.groupby(digests).cumcount() + 1
    names = digests + np.where(copy > 1, "." + copy.astype(str), "")
    order = np.argsort(names.to_numpy(str), kind="stable")
    kinds = np.repeat([SPECIAL, PROMPT, RESPONSE], [len(first), prefixes.shape[1], suffixes.shape[1]])
    counts = dict.fromkeys(("dropped_long_prompt", "cut_prompt", "cut_response", "dropped_short_window"), 0)
    counts |= dict(records=n, examples=n, tokens=tokens.size, scored_tokens=suffixes.size, without_eos=n)
    return Encoded(
        names.to_numpy(object)[order],
        names.to_numpy(object)[order],
        np.full(n, "all", object),
        tokens[order].ravel(),
        np.arange(n + 1) * tokens.shape[1],
        np.tile(kinds.astype(np.int8), n),
        *measure(tokenizer.decode_batch(suffixes[order].tolist())),
        counts,
    )


def content(example_ids: np.ndarray) -> np.ndarray:
    """What equal rows share: their ids without the number of the copy, str [n]."""
    return np.array([name.partition(".")[0] for name in example_ids], object)
