"""What every optimiser step trains on: packed batches of data, of student samples, or of MiniLLM's rollouts.

A feed turns the next batch of the data iterator into the step's batch. Every policy asks for the same records in the
same order: fresh samples answer the prompts that a run on the data would meet at that step. What is then trained on may
be a draw of the replay buffer, and MiniLLM passes several times over a set of prompts before it asks for the next.
Everything that a resumed run needs is in `state()`, arrays of fixed shapes; random numbers are drawn from (seed, step).

A feed's batch adds to those of `kd_jax.data.batches`, arrays `[micro-batches, R, T]`:
    ce_mask      bool, scored tokens of data or teacher text: cross entropy never meets a student's own sample
    returns, offset, importance   float32, of rollouts (see `kd_jax.distill.policy_gradient`)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from kd_jax.data import encode
from kd_jax.data.batches import Batch, one_batch
from kd_jax.data.encode import EOS, PROMPT, RESPONSE, Encoded, ragged
from kd_jax.distill import policies
from kd_jax.distill.objective import Objective
from kd_jax.distill.policies import DATASET, MIXED, STUDENT, ReplayBuffer, Sequences
from kd_jax.errors import ConfigError
from kd_jax.generate import Samples
from kd_jax.teacher_cache import BIASED

READ = ("tokens", "targets", "segment_ids", "positions", "loss_mask", "ce_mask", "returns", "offset", "importance")
CACHED = ("teacher_hidden", "teacher_ids", "teacher_logp")


class Used(NamedTuple):
    """Which examples a step trained on: arrays [n], as in `policies.Sequences`; `tokens` are the scored ones."""

    example: np.ndarray
    source: np.ndarray
    created: np.ndarray
    tokens: np.ndarray


@dataclasses.dataclass(frozen=True)
class Shapes:
    """How a feed lays its batches out."""

    micro_rows: int  # rows of a micro-batch
    row_length: int
    max_length: int  # tokens of an example
    packed: bool
    slots: np.ndarray | None = None  # which rows of a micro-batch lie on devices of this process; None: all

    @property
    def held(self) -> int:
        """Rows of a micro-batch that this process holds."""
        return self.micro_rows if self.slots is None else len(self.slots)


Sampler = Callable[..., Samples]
"""`sample(model, prompts, lengths, keys, limits, seed, teacher) -> Samples`, on whatever mesh the run has."""


class DataFeed:
    """The data itself, or the teacher's text in its place; the feeds that sample build on it."""

    def __init__(
        self, encoded: Encoded, iterator: Iterator[Batch], shapes: Shapes, source: int = DATASET, cache=None
    ) -> None:
        self.encoded, self.iterator, self.shapes, self.source, self.cache = encoded, iterator, shapes, source, cache

    def next(self, step: int, model, teacher) -> tuple[Batch, Used]:
        """The batch of optimiser step `step` (from 1), and what is in it."""
        batch = next(self.iterator)
        n = len(batch["examples"])
        used = Used(batch["examples"], np.full(n, self.source), np.full(n, step), batch["counts"])
        cached = self.cache.batch(batch) if self.cache is not None else {}
        return split_rows(batch | {"ce_mask": batch["loss_mask"]} | cached, self.shapes.held), used

    def evaluated(self, dev_loss: float) -> None:
        """Called before training and at every evaluation; only an adaptive policy cares."""

    def state(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps besides the iterator, as arrays of fixed shapes."""
        return {}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        if state:
            raise ValueError(f"a feed of data keeps nothing, but the checkpoint has {sorted(state)}")

    def facts(self) -> dict:
        """What a run's manifest says of the feed; `warnings` are shown."""
        biased = self.cache is not None and self.cache.spec.kind == "top_k"
        return {"warnings": [f"top-k teacher cache: {BIASED}"]} if biased else {}


class SamplingFeed(DataFeed):
    """What the feeds that sample share; `near_ties` counts tokens that another device might have drawn otherwise."""

    objective: Objective
    sample: Sampler
    seed: int
    near_ties: int = 0

    def _draw(self, examples: np.ndarray, model, teacher, step: int, source: int) -> Sequences:
        """Sample a response to the prompt of each of these examples."""
        tokens, lengths = encode.prompts(self.encoded, examples)
        number = int(np.random.default_rng([self.seed, step, 1]).integers(2**31))
        room = self.shapes.max_length - lengths
        found = self.sample(model, tokens, lengths, encode.sample_keys(self.encoded, examples), room, number, teacher)
        self.near_ties += int(np.sum(found.near_ties))
        return join(tokens, lengths, found, examples, source, step, self.shapes.max_length)

    def _own(self, batch: Batch) -> Batch:
        """Of a batch that every process has laid out as a whole, the rows of this one's devices."""
        whole, slots = split_rows(batch, self.shapes.micro_rows), self.shapes.slots
        return whole if slots is None else {k: v[:, slots] for k, v in whole.items()}


class SampledFeed(SamplingFeed):
    """Policies `mix`, `mix_replay`, `adaptive`: steps on student samples, replayed ones, or the data."""

    def __init__(
        self, encoded, iterator, shapes: Shapes, objective: Objective, sample: Sampler, *, steps, seed, largest
    ):
        super().__init__(encoded, iterator, shapes)
        check_prompts(encoded)
        check_capacity(objective, largest)
        self.objective, self.sample, self.steps, self.seed = objective, sample, steps, seed
        self.buffer = ReplayBuffer(objective.capacity, shapes.max_length) if objective.policy != "mix" else None
        self.phi, self.previous, self.branches = objective.phi, np.inf, dict.fromkeys(("fresh", "replay", "data"), 0)
        self._first = True

    def next(self, step: int, model, teacher) -> tuple[Batch, Used]:
        u, stored = policies.uniform(self.seed, step), 0 if self.buffer is None else len(self.buffer)
        branch = policies.choose(self.objective, u, step - 1, self.steps, self.phi, stored)
        self.branches[branch] += 1
        if branch == policies.DATA:
            return super().next(step, model, teacher)
        examples = next(self.iterator)["examples"]
        rows = None
        if branch == policies.FRESH or self.objective.policy == "mix_replay":
            rows = self._draw(examples, model, None, step, STUDENT)
            if self.buffer is not None:
                self.buffer.push(rows)
        if branch == policies.REPLAY:
            rows = self.buffer.draw(len(examples), np.random.default_rng([self.seed, step, 2]))
        batch, _ = _lay_out(rows, self.shapes)
        batch["ce_mask"] = np.zeros_like(batch["loss_mask"])
        return self._own(batch), _used(rows)

    def evaluated(self, dev_loss: float) -> None:
        if self._first:
            self._first, self.previous = False, dev_loss
        elif self.objective.policy == "adaptive":
            self.phi, self.previous = policies.next_threshold(self.objective, self.phi, self.previous, dev_loss)

    def state(self) -> dict[str, np.ndarray]:
        numbers = np.array([self.near_ties, self.phi, self.previous, *self.branches.values()], np.float64)
        return {"numbers": numbers} | ({} if self.buffer is None else self.buffer.state())

    def restore(self, state: dict[str, np.ndarray]) -> None:
        near, self.phi, self.previous, *counts = np.asarray(state["numbers"]).tolist()
        self.near_ties = int(near)
        self.branches = {name: int(count) for name, count in zip(self.branches, counts)}
        self._first = False
        if self.buffer is not None:
            self.buffer.restore({k: v for k, v in state.items() if k != "numbers"})

    def facts(self) -> dict:
        found = {"branches": dict(self.branches), "near_ties": self.near_ties}
        if self.objective.policy == "adaptive":
            found["phi"] = self.phi
            if self.branches["fresh"] + self.branches["replay"] == 0:
                what = f"no step used a student sample (phi ended at {self.phi:g})"
                found["warnings"] = [f"{what}: this was {self.objective.divergence} on the data"]
        return found


class RolloutFeed(SamplingFeed):
    """Policy `mixed_rollouts`: sample a set of prompts once, then several passes of optimiser steps over the set.

    `measure(model, teacher, batch) -> {"returns", "offset", "importance"}: [R, T]` of a packed batch of samples.
    """

    def __init__(
        self, encoded, iterator, shapes: Shapes, objective: Objective, sample: Sampler, measure, *, seed, largest
    ):
        super().__init__(encoded, iterator, shapes)
        check_prompts(encoded)
        self.objective, self.sample, self.measure, self.seed = objective, sample, measure, seed
        size = objective.rollouts + largest
        self.rows = Sequences.empty(size, shapes.max_length)
        self.values = {k: np.zeros((size, shapes.max_length), np.float32) for k in ("returns", "offset", "importance")}
        self.n = self.parts = self.done = self.sets = 0  # samples, batches they make, steps on them, sets so far

    def next(self, step: int, model, teacher) -> tuple[Batch, Used]:
        if self.done == self.parts * self.objective.passes:
            self._collect(step, model, teacher)
        turn, part = divmod(self.done, self.parts)
        order = np.random.default_rng([self.seed, self.sets, turn, 3]).permutation(self.n)
        chosen = np.array_split(order, self.parts)[part]
        self.done += 1
        rows = self.rows.take(chosen)
        batch, order = _lay_out(rows, self.shapes)
        counts = _scored(rows)[order]
        flat = ragged(chosen[order] * self.shapes.max_length, counts)
        extra = {k: np.zeros(batch["loss_mask"].shape, np.float32) for k in self.values}
        for name, values in self.values.items():
            extra[name][batch["loss_mask"]] = values.reshape(-1)[flat]
        extra["ce_mask"] = np.zeros_like(batch["loss_mask"])
        return self._own(batch | extra), _used(rows)

    def _collect(self, step: int, model, teacher) -> None:
        """As many batches of prompts as make `rollouts` samples, sampled and measured."""
        batches: list[np.ndarray] = []
        while sum(map(len, batches)) < self.objective.rollouts:
            if (batch := next(self.iterator, None)) is None:  # the last set of a run may be smaller
                break
            batches.append(batch["examples"])
        examples = np.concatenate(batches)
        rows = self._draw(examples, model, teacher, step, MIXED)
        self.n, self.parts, self.done, self.sets = len(rows), len(batches), 0, self.sets + 1
        for name, values in self.rows.arrays().items():
            values[: self.n] = getattr(rows, name)
        batch, order = _lay_out(rows, self.shapes)
        size = self.shapes.micro_rows
        counts = _scored(rows)[order]
        place = ragged(order * self.shapes.max_length, counts)
        parts = [
            self.measure(model, teacher, {k: v[i : i + size] for k, v in batch.items()})
            for i in range(0, len(batch["tokens"]), size)
        ]
        for name, values in self.values.items():
            values[:] = 0
            found = np.concatenate([np.asarray(part[name]) for part in parts])
            values.reshape(-1)[place] = found[batch["loss_mask"]]

    def state(self) -> dict[str, np.ndarray]:
        numbers = np.array([self.n, self.parts, self.done, self.sets, self.near_ties])
        return {"numbers": numbers, **self.rows.arrays(), **self.values}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        state = {k: np.array(v) for k, v in state.items()}
        self.n, self.parts, self.done, self.sets, self.near_ties = state.pop("numbers").tolist()
        self.values = {k: state.pop(k) for k in self.values}
        self.rows = Sequences(**state)

    def facts(self) -> dict:
        return {"branches": {"rollout_sets": self.sets}, "near_ties": self.near_ties}


# --------------------------------------------------------------------------------------------------------- samples


def join(tokens, lengths, found: Samples, examples, source: int, step: int, max_length: int) -> Sequences:
    """Prompts and the samples that follow them as rows."""
    n = len(lengths)
    rows = Sequences.empty(n, max_length)
    rows.tokens.reshape(-1)[ragged(np.arange(n) * max_length, lengths)] = tokens
    width = found.tokens.shape[1]
    from_samples = ragged(np.arange(n) * width, found.lengths)
    rows.tokens.reshape(-1)[ragged(np.arange(n) * max_length + lengths, found.lengths)] = found.tokens.reshape(-1)[
        from_samples
    ]
    rows.prompt[:], rows.length[:], rows.ended[:] = lengths, lengths + found.lengths, found.ended
    rows.example[:], rows.source[:], rows.created[:] = examples, source, step
    return rows


def as_encoded(rows: Sequences, ids: np.ndarray, task: np.ndarray, scored_prefix: int = 0) -> Encoded:
    """Rows as examples; the last `scored_prefix` tokens of a prompt count as response (plain text)."""
    n, width = rows.tokens.shape
    flat = ragged(np.arange(n) * width, rows.length)
    place = ragged(np.zeros(n, np.int64), rows.length)
    segment = np.where(place < np.repeat(rows.prompt - scored_prefix, rows.length), PROMPT, RESPONSE).astype(np.int8)
    offsets = np.concatenate([[0], np.cumsum(rows.length, dtype=np.int64)])
    segment[offsets[1:][rows.ended] - 1] = EOS
    unknown = np.zeros(n, np.int32)
    return Encoded(ids, ids, task, rows.tokens.reshape(-1)[flat], offsets, segment, unknown, unknown, {})


def _lay_out(rows: Sequences, shapes: Shapes) -> tuple[Batch, np.ndarray]:
    nobody = np.full(len(rows), "", object)
    encoded = as_encoded(rows, nobody, nobody)
    return one_batch(encoded, row_length=shapes.row_length, packed=shapes.packed, multiple=shapes.micro_rows)


def _scored(rows: Sequences) -> np.ndarray:
    return rows.length - np.maximum(rows.prompt, 1)  # the first token of all has no predictor


def _used(rows: Sequences) -> Used:
    return Used(rows.example, rows.source, rows.created, _scored(rows))


def split_rows(batch: Batch, micro_rows: int) -> Batch:
    """`[rows, T]` to `[micro-batches, micro_rows, T]`; what the step does not read stays behind."""
    split = lambda x: x.reshape(-1, micro_rows, *x.shape[1:])
    return {k: split(batch[k]) for k in READ + CACHED if k in batch}


def check_prompts(encoded: Encoded, prefix: int = 0) -> None:
    """Raises ConfigError where an example has nothing that a model could continue."""
    _, lengths = encode.prompts(encoded, np.arange(len(encoded)), prefix)
    if empty := int((lengths == 0).sum()):
        raise ConfigError(
            f"{empty} of {len(encoded)} training examples have an empty prompt, which no model can continue: use "
            "records with prompts, set data.bos, or, for teacher text on plain text, the objective's prefix"
        )


def check_capacity(objective: Objective, largest: int) -> None:
    """Raises ConfigError where the replay buffer holds less than the `largest` batch's examples."""
    if objective.policy in ("mix_replay", "adaptive") and objective.capacity < largest:
        raise ConfigError(
            f"objectives.{objective.technique}: capacity {objective.capacity} of the replay buffer is below the "
            f"{largest} examples of the largest batch"
        )
