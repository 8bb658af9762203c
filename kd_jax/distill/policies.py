"""Where the response tokens of a step come from: the draw, the adaptive threshold, and the replay buffer.

Nothing here knows a divergence. Every random number is drawn from (seed, step), so a resumed run repeats it.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from kd_jax.distill.objective import Objective

# Codes of a sample's source, as the replay buffer and the ledger keep them.
SOURCES = ("dataset", "teacher", "student", "mixed", "lm_corpus")
DATASET, TEACHER, STUDENT, MIXED, LM_CORPUS = range(len(SOURCES))
FRESH, REPLAY, DATA = "fresh", "replay", "data"  # branches of a step


def uniform(seed: int, step: int) -> float:
    """The one uniform number in [0, 1) of an optimiser step, the same on every process."""
    return float(np.random.default_rng([seed, step, 0]).random())


def choose(objective: Objective, u: float, step: int, steps: int, phi: float, stored: int) -> str:
    """The branch of step `step` (from 0) of `steps`: fresh student samples, replayed ones, or the data.

    `phi` is the adaptive threshold, `stored` the number of sequences in the buffer
    (jongwooko/distillm:finetune.py:265-323; GKD: arXiv:2306.13649).
    """
    o = objective
    if o.policy == "mix":
        return FRESH if u < o.lmbda else DATA
    if o.policy == "mix_replay":  # what is sampled is pushed, what is trained on is drawn from the store
        return REPLAY if u < o.lmbda else DATA
    if o.policy != "adaptive":
        return DATA
    share = {"decreasing": 1 - step / steps, "constant": 0.5, "increasing": step / steps}[o.replay]
    if u < phi * share or (u < phi and stored < o.capacity):
        return FRESH
    return REPLAY if u < phi else DATA


def next_threshold(objective: Objective, phi: float, previous: float, dev_loss: float) -> tuple[float, float]:
    """(phi, loss to compare with) after a dev evaluation: phi rises where the dev loss did, by `phi_eps` or more."""
    rises = dev_loss >= previous + objective.phi_eps
    if rises:
        phi = min(1.0, phi + objective.phi_step)
    return phi, dev_loss if rises or objective.phi_update == "always" else previous


@dataclasses.dataclass
class Sequences:
    """Prompts with responses, one row each, on the host.

    tokens [n, max_length] int32 (prompt, response, EOS where produced; 0 behind), prompt and length [n] int32,
    ended [n] bool, example [n] int32 (index of the record whose prompt it is), source [n] int8, created [n] int32 (the
    optimiser step that sampled it).
    """

    tokens: np.ndarray
    prompt: np.ndarray
    length: np.ndarray
    ended: np.ndarray
    example: np.ndarray
    source: np.ndarray
    created: np.ndarray

    def __len__(self) -> int:
        return len(self.length)

    def take(self, index: np.ndarray) -> Sequences:
        return Sequences(*(getattr(self, f.name)[index] for f in dataclasses.fields(self)))

    @classmethod
    def empty(cls, n: int, max_length: int) -> Sequences:
        whole = lambda dtype: np.zeros(n, dtype)
        tokens = np.zeros((n, max_length), np.int32)
        return cls(tokens, *map(whole, (np.int32, np.int32, np.bool_, np.int32, np.int8, np.int32)))

    def arrays(self) -> dict[str, np.ndarray]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


class ReplayBuffer:
    """The newest `capacity` sequences; draws are uniform without replacement."""

    def __init__(self, capacity: int, max_length: int) -> None:
        self._rows = Sequences.empty(capacity, max_length)
        self._pushed = 0  # over the whole run; the next one goes to `_pushed % capacity`

    def __len__(self) -> int:
        return min(self._pushed, len(self._rows))

    def push(self, new: Sequences) -> None:
        """Store `new`, which is no more than the capacity; the oldest leave."""
        place = (self._pushed + np.arange(len(new))) % len(self._rows)
        for name, values in self._rows.arrays().items():
            values[place] = getattr(new, name)
        self._pushed += len(new)

    def draw(self, n: int, rng: np.random.Generator) -> Sequences:
        """`n` stored sequences, or all where there are fewer."""
        return self._rows.take(rng.choice(len(self), size=min(n, len(self)), replace=False))

    def state(self) -> dict[str, np.ndarray]:
        return {**self._rows.arrays(), "pushed": np.array(self._pushed)}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        self._rows = Sequences(**{k: np.array(v) for k, v in state.items() if k != "pushed"})
        self._pushed = int(state["pushed"])
