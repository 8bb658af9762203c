"""Attacks on saved checkpoints of one run: how the loss of a record fell while it was trained (attacks.md 8.4).

The idea of trajectories of the loss is LeakPro's (loss_trajectory.py, dts.py), which distil a copy of the target to get
one; here the run's own checkpoints are read, which is an auditor's privilege. Tables of the checkpoints are variants
`step-<n>` of the run's score tables; step 0 is the checkpoint that the run started from.

Every function takes the run's Tokens, [(step, Tokens), ...] of its checkpoints in any order, and the Tokens of what it
started from, all of the same examples and tokens. The curve is that of start and checkpoints; the run's own Tokens play
no part, since the parameters that were selected need not be the last. It returns one score per example [n], higher for
what looks more like a member; -inf abstains. Signs are fixed beforehand: a member's loss falls further and earlier.
"""

from collections.abc import Sequence

import numpy as np

from attacks.signals import CannotScore, loss
from attacks.tables import Tokens

Steps = Sequence[tuple[int, Tokens]]


def trajectory_slope(tokens: Tokens, steps: Steps, base: Tokens) -> np.ndarray:
    """Minus the least-squares slope of the mean NLL over the fraction of training. Access: auditor (8.4)."""
    at, nll = _curve(steps, base)
    centred = at - at.mean()
    return -(nll @ centred) / (centred @ centred)


def trajectory_area(tokens: Tokens, steps: Steps, base: Tokens, relative: float = 1) -> np.ndarray:
    """Mean over training of how far the NLL lies below that of the start (trapezoids over the fraction of training).

    relative=0: minus the mean NLL itself, with all that makes a record hard. Access: auditor (8.4).
    """
    at, nll = _curve(steps, base)
    return np.trapezoid((nll[:, :1] if relative else 0) - nll, at, axis=1)


def trajectory_drop(tokens: Tokens, steps: Steps, base: Tokens) -> np.ndarray:
    """NLL of the start minus that of the last checkpoint: how far the loss fell. Access: auditor (8.4)."""
    _, nll = _curve(steps, base)
    return nll[:, 0] - nll[:, -1]


def trajectory_half(tokens: Tokens, steps: Steps, base: Tokens) -> np.ndarray:
    """Minus the fraction of training after which half of the whole drop is reached, between checkpoints linearly.

    A record whose loss did not fall abstains. Access: auditor (8.4).
    """
    at, nll = _curve(steps, base)
    fallen = nll[:, :1] - nll
    level = fallen[:, -1] / 2
    end = np.argmax(fallen >= level[:, None], axis=1)  # the first checkpoint beyond half
    begin = np.maximum(end - 1, 0)
    rows = np.arange(len(nll))
    before, after = fallen[rows, begin], fallen[rows, end]
    share = np.where(after > before, (level - before) / np.where(after > before, after - before, 1), 0)
    return np.where(level > 0, -(at[begin] + share * (at[end] - at[begin])), -np.inf)


def _curve(steps: Steps, base: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """Fractions of training in [0, 1] of start and checkpoints [K], and the mean NLL of every example there [n, K]."""
    ordered = sorted([(0, base), *steps], key=lambda each: each[0])
    numbers = np.array([step for step, _ in ordered], float)
    if len(ordered) < 3 or len(np.unique(numbers)) < len(numbers):
        raise CannotScore(f"a trajectory needs two different checkpoints or more after the start, not {numbers[1:]}")
    return numbers / numbers[-1], -np.stack([loss(tokens) for _, tokens in ordered], axis=1)
