"""Teacher text: responses that a teacher generates once for fixed prompts, kept as a data set with its provenance.

A data set is a folder of Parquet shards (`example_id, tokens, prompt_length, ended, near_ties`; mode 0600) and a
manifest that says which teacher, prompts and sampling made it. Shards are whole or absent; an interrupted generation
continues, and makes damaged ones again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kd_jax import manifest, processes, storage
from kd_jax.data.encode import Encoded, prompts, ragged, sample_keys
from kd_jax.distill.feeds import Sampler, as_encoded, join
from kd_jax.distill.policies import TEACHER, Sequences
from kd_jax.metrics import progress
from kd_jax.storage import Path


def generate_text(
    folder: Path,
    encoded: Encoded,
    sample: Sampler,
    load_teacher: Callable,
    *,
    prefix: int,
    max_length: int,
    seed: int,
    inputs: dict,
    label: str,
    shard_examples: int = 1024,
) -> Encoded:
    """`encoded` with every response replaced by the teacher's; made once and then read from `folder`.

    `inputs` is what decides the text (fingerprints of teacher, data and tokenizer, the sampling). An example that is
    repeated in `encoded` gets one text. Raises StaleWork on other inputs.
    """
    _, first, place = np.unique(encoded.example_id, return_index=True, return_inverse=True)
    whole = encoded.take(first)
    inputs = inputs | {"examples": whole.fingerprint(), "prefix": prefix, "max_length": max_length, "seed": seed}
    done = manifest.begin(folder, inputs, label)
    shards = []
    teacher = None if done else load_teacher()
    with progress(len(whole), label, unit="example") as bar:
        for shard, start in enumerate(range(0, len(whole), shard_examples)):
            path = folder / f"text-{shard:05d}.parquet"
            examples = np.arange(start, min(start + shard_examples, len(whole)))
            kept = done or processes.first() and storage.whole(path, sealed=True)
            if not processes.agree(kept):
                rows, near_ties = _generate(whole, examples, sample, teacher, prefix, max_length, seed)
                made = _table(rows, near_ties, whole.example_id[examples])
                processes.once(lambda: storage.write_parquet(path, made, {"source": label}), f"{path}")  # noqa: B023
            shards.append(_read(path, examples, max_length))
            bar.update(len(examples))
    columns = [np.concatenate([getattr(s, f.name) for s in shards]) for f in dataclasses.fields(Sequences)]
    rows = Sequences(*columns)
    if not done:
        tables = (pq.read_table(storage.readable(p), columns=["near_ties"]) for p in folder.glob("text-*.parquet"))
        near = sum(pc.sum(table[0]).as_py() for table in tables)
        facts = {
            "examples": len(rows),
            "tokens": int((rows.length - rows.prompt).sum()),
            "ended": int(rows.ended.sum()),
            "near_ties": near,  # tokens that another device might have chosen otherwise
        }
        manifest.end(folder, inputs, facts)
    text = as_encoded(rows, whole.example_id, whole.task, scored_prefix=prefix)
    return dataclasses.replace(text, record_id=whole.record_id).take(place)


def _generate(whole: Encoded, examples, sample: Sampler, teacher, prefix: int, max_length: int, seed: int):
    tokens, lengths = prompts(whole, examples, prefix)
    room = np.where(lengths < whole.lengths[examples], max_length - lengths, 0)  # no more text than the prefix: keep it
    found = sample(teacher, tokens, lengths, sample_keys(whole, examples), room, seed, None)
    return join(tokens, lengths, found, examples, TEACHER, 0, max_length), found.near_ties


def _table(rows: Sequences, near_ties: np.ndarray, ids: np.ndarray) -> pa.Table:
    offsets = pa.array(np.concatenate([[0], np.cumsum(rows.length)]), pa.int32())
    flat = rows.tokens.reshape(-1)[ragged(np.arange(len(rows)) * rows.tokens.shape[1], rows.length)]
    return pa.table(
        {
            "example_id": pa.array(ids.tolist()),
            "tokens": pa.ListArray.from_arrays(offsets, pa.array(flat, pa.int32())),
            "prompt_length": pa.array(rows.prompt, pa.int32()),
            "ended": pa.array(rows.ended),
            "near_ties": pa.array(near_ties, pa.int32()),
        }
    )


def _read(path: Path, examples: np.ndarray, max_length: int) -> Sequences:
    table = pq.read_table(storage.readable(path), page_checksum_verification=True)
    rows = Sequences.empty(table.num_rows, max_length)
    tokens = table["tokens"].combine_chunks()
    rows.length[:] = tokens.value_lengths().to_numpy()
    rows.tokens.reshape(-1)[ragged(np.arange(len(rows)) * max_length, rows.length)] = tokens.values.to_numpy()
    rows.prompt[:], rows.ended[:] = table["prompt_length"].to_numpy(), table["ended"].to_numpy(zero_copy_only=False)
    rows.example[:], rows.source[:] = examples, TEACHER
    return rows
