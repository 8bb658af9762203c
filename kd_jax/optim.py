"""Optimizer and schedule of a recipe, from optax."""

from __future__ import annotations

import jax
import optax

from kd_jax.errors import ConfigError
from kd_jax.sharding import names

SCHEDULES = ("cosine", "linear", "constant")


def schedule(kind: str, *, lr: float, lr_min: float, warmup_steps: int, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 over `warmup_steps`, then `kind` down to `lr_min` at `steps` (`constant` stays at `lr`)."""
    if kind not in SCHEDULES:
        raise ConfigError(f"unknown schedule {kind!r}; known: {SCHEDULES}")
    if warmup_steps >= steps > 0:
        raise ConfigError(f"warmup_steps {warmup_steps} must be below the {steps} steps of the run")
    decay = max(steps - warmup_steps, 1)
    after = {
        "cosine": optax.cosine_decay_schedule(lr, decay, alpha=lr_min / lr if lr else 0.0),
        "linear": optax.linear_schedule(lr, lr_min, decay),
        "constant": optax.constant_schedule(lr),
    }[kind]
    if not warmup_steps:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, lr, warmup_steps), after], [warmup_steps])


def decayed(params):
    """Weight-decay mask: matrices yes, biases and norms no (by name: stacked biases have rank 2)."""
    leaves, treedef = jax.tree.flatten(params)
    flags = [not name.endswith(("bias", "scale", "_norm")) for name in names(params)]
    assert len(flags) == len(leaves)
    return jax.tree.unflatten(treedef, flags)


def optimizer(*, b1: float, b2: float, eps: float, weight_decay: float, clip: float) -> optax.GradientTransformation:
    """AdamW at learning rate 1, which the training step scales, behind a global-norm clip (`clip` 0: none)."""
    adamw = optax.adamw(1.0, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed)
    return optax.chain(optax.clip_by_global_norm(clip), adamw) if clip else adamw
