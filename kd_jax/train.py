"""The training step and the loop around it.

One jitted step runs teacher and student on a batch, the fused head between them, and the optimizer. The loss is a sum
over tokens divided by the tokens of the whole optimiser step, so it does not depend on how the batch is split over
micro-batches or devices.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax import optim, sharding
from kd_jax.checkpoint import Checkpoints
from kd_jax.errors import ConfigError
from kd_jax.head import Loss, head_loss
from kd_jax.metrics import Metrics, progress
from kd_jax.transformer import Transformer

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one run is trained. Every key of a recipe in the configs, with its unit."""

    name: str = "matched"
    steps: int = 0  # optimiser steps; 0 = as many as `epochs` make
    epochs: int = 10  # passes over the run's records, where `steps` is 0
    batch_rows: int = 16  # rows of one optimiser step over all devices (records, where data.pack is False)
    accumulation: int = 1  # micro-batches the step is split into
    lr: float = 5e-4  # peak learning rate
    lr_min: float = 0.0  # learning rate at the last step (cosine, linear)
    schedule: str = "cosine"  # cosine | linear | constant
    warmup_steps: int = 0  # optimiser steps
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2  # matrices only
    clip: float = 1.0  # global gradient norm; 0 = none
    divergence: str = "fkl"  # used where the run has a teacher
    kd_ratio: float = 1.0  # weight of the divergence; 1 - kd_ratio is the weight of the cross entropy
    student_T: float = 1.0
    teacher_T: float = 1.0
    t_squared: bool = True  # multiply the divergence by student_T ** 2
    compute_dtype: str = "float32"  # float32 | bfloat16 (parameters stay float32)
    remat: bool = False  # recompute block activations in the backward pass
    chunk: int = 0  # rows per chunk of the head; 0 = by vocabulary and backend
    evaluations: int = 4  # evenly spread over the run, the last at its end
    checkpoints: int = 2  # evenly spread over the run, the last at its end

    def __post_init__(self) -> None:
        if not 0.0 <= self.kd_ratio <= 1.0:
            raise ConfigError(f"recipes.{self.name}: kd_ratio must lie in [0, 1], got {self.kd_ratio}")
        if self.compute_dtype not in DTYPES:
            raise ConfigError(f"recipes.{self.name}: compute_dtype must be one of {sorted(DTYPES)}")
        if self.schedule not in optim.SCHEDULES:
            raise ConfigError(f"recipes.{self.name}: schedule must be one of {optim.SCHEDULES}")
        if self.batch_rows < 1 or self.accumulation < 1 or self.batch_rows % self.accumulation:
            raise ConfigError(
                f"recipes.{self.name}: accumulation {self.accumulation} must divide batch_rows {self.batch_rows}"
            )
        if self.epochs <= 0 or self.lr <= 0 or self.steps < 0:
            raise ConfigError(f"recipes.{self.name}: epochs and lr must be positive, steps not negative")
        try:
            self.loss(1, teacher=True)
        except ConfigError as error:
            raise ConfigError(f"recipes.{self.name}: {error}") from error

    @property
    def micro_batch_rows(self) -> int:
        return self.batch_rows // self.accumulation

    def loss(self, vocab: int, teacher: bool) -> Loss:
        """The head's loss for an effective vocabulary, with or without a teacher."""
        divergence = self.divergence if teacher else None
        return Loss(vocab, divergence, self.student_T, self.teacher_T, self.t_squared, self.chunk)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What persists from step to step, and what a checkpoint holds."""

    step: jax.Array  # int32 scalar
    model: Transformer
    opt_state: optax.OptState
    rng: jax.Array  # key data, for techniques that sample


# ------------------------------------------------------------------------------------------------------------ step


def token_losses(model: Transformer, teacher: Transformer | None, batch: dict, weights: dict, spec: Loss, **compute):
    """`head_loss` of a `[R, T]` batch; `weights` are `[R, T]`. Returns loss and per-token values `[R * T]`."""
    where = (batch["tokens"], batch["segment_ids"], batch["positions"])
    flat = lambda x: x.reshape((-1,) + x.shape[2:])
    h_s = flat(model.hidden(*where, **compute))
    h_t = None if teacher is None else flat(jax.lax.stop_gradient(teacher.hidden(*where, dtype=compute["dtype"])))
    heads = model.head(), None if teacher is None else teacher.head()
    return head_loss(h_s, heads[0], h_t, heads[1], flat(batch["targets"]), jax.tree.map(flat, weights), spec)


def make_train_step(tx: optax.GradientTransformation, recipe: Recipe, vocab: int, has_teacher: bool) -> Callable:
    """`step(state, teacher, batch) -> (state, metrics)`; batch arrays are `[accumulation, R, T]`.

    Metrics (scalars): `loss`, `ce`, `kd` (nats per scored token), `tokens` (scored), `gradient_norm`.
    """
    spec = recipe.loss(vocab, has_teacher)
    compute = {"dtype": DTYPES[recipe.compute_dtype], "remat": recipe.remat}
    coefficients = {"ce": 1.0 - recipe.kd_ratio, "kd": recipe.kd_ratio} if has_teacher else {"ce": 1.0}

    def micro_batch(model, teacher, batch, n_tokens):
        mask = batch["loss_mask"].astype(jnp.float32)
        weights = {term: mask * (c / n_tokens) for term, c in coefficients.items()}
        loss, values = token_losses(model, teacher, batch, weights, spec, **compute)
        return loss, {term: jnp.sum(v) / n_tokens for term, v in values.items()}

    def step(state: TrainState, teacher: Transformer | None, batch: dict) -> tuple[TrainState, dict]:
        tokens = jnp.sum(batch["loss_mask"])
        n_tokens = jnp.maximum(tokens, 1).astype(jnp.float32)  # of the whole step, before its first micro-batch

        def accumulate(carry, micro):
            out, grads = jax.value_and_grad(micro_batch, has_aux=True)(state.model, teacher, micro, n_tokens)
            return jax.tree.map(jnp.add, carry, (out, grads)), None

        zero = jax.tree.map(jnp.zeros_like, state.model)
        carry = ((jnp.zeros(()), {term: jnp.zeros(()) for term in coefficients}), zero)
        if recipe.accumulation == 1:
            carry, _ = accumulate(carry, jax.tree.map(lambda x: x[0], batch))
        else:
            carry, _ = jax.lax.scan(accumulate, carry, batch)
        (loss, values), grads = carry
        updates, opt_state = tx.update(grads, state.opt_state, state.model)
        metrics = {"loss": loss, **values, "tokens": tokens, "gradient_norm": optax.tree.norm(grads)}
        model = optax.apply_updates(state.model, updates)
        return TrainState(state.step + 1, model, opt_state, state.rng), metrics

    return step


def init_state(model: Transformer, tx: optax.GradientTransformation, rng: jax.Array, mesh: Mesh) -> TrainState:
    """Fresh state on the mesh; the optimizer state gets the parameters' shardings (a bare jit would replicate it)."""

    def make(model):
        return TrainState(jnp.zeros((), jnp.int32), model, tx.init(model), jax.random.key_data(rng))

    return jax.jit(make, out_shardings=sharding.shardings(jax.eval_shape(make, model), mesh))(model)


# ------------------------------------------------------------------------------------------------------------ loop


@dataclasses.dataclass(frozen=True)
class Task:
    """Everything `fit` needs besides the model: where to write, what to feed, what to watch."""

    label: str
    folder: Path
    steps: int
    iterator: Iterator[dict[str, np.ndarray]]  # grain iterator of `[batch_rows, T]` arrays, from the start
    evaluate: Callable[[Transformer], dict[str, float]]
    keep: int = 2


def fit(model: Transformer, teacher: Transformer | None, recipe: Recipe, task: Task, *, vocab: int, rng, mesh: Mesh):
    """Train to `task.steps`, resuming at the newest checkpoint in `task.folder`; returns the trained model.

    Raises FloatingPointError when the loss stops being finite, naming the step and the last good checkpoint.
    """
    rate = optim.schedule(
        recipe.schedule, lr=recipe.lr, lr_min=recipe.lr_min, warmup_steps=recipe.warmup_steps, steps=task.steps
    )
    tx = optim.optimizer(
        rate, b1=recipe.b1, b2=recipe.b2, eps=recipe.eps, weight_decay=recipe.weight_decay, clip=recipe.clip
    )
    state = init_state(model, tx, rng, mesh)
    step_fn = jax.jit(
        make_train_step(tx, recipe, vocab, teacher is not None),
        donate_argnums=0,
        out_shardings=(sharding.shardings(state, mesh), NamedSharding(mesh, P())),
    )
    checkpoints = Checkpoints(task.folder / "checkpoints", keep=task.keep)
    start = checkpoints.latest_step or 0
    if start:
        abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, sharding.shardings(state, mesh)
        )
        state = checkpoints.restore(abstract, task.iterator)
    metrics = Metrics(task.folder, step=start)
    try:
        state = _loop(state, teacher, recipe, task, step_fn, rate, checkpoints, metrics, start, mesh)
    finally:
        metrics.close()
        checkpoints.close()
    return state.model


def _loop(state, teacher, recipe, task, step_fn, rate, checkpoints, metrics, start, mesh):
    evaluate_at, save_at = _marks(task.steps, recipe.evaluations), _marks(task.steps, recipe.checkpoints)
    log_every = max(1, task.steps // 100)
    if start == 0:
        metrics.write(0, task.evaluate(state.model))
    bar = progress(task.steps, task.label, initial=start)
    window, since = [], time.perf_counter()
    for step in range(start + 1, task.steps + 1):
        batch = _split(next(task.iterator), recipe.accumulation)
        state, values = step_fn(state, teacher, sharding.place_batch(batch, mesh, leading=1))
        window.append(values)
        if step % log_every == 0 or step in evaluate_at or step in save_at:
            # the only host sync of the loop: one fetch for the whole window, after its last step was dispatched
            row = _summary(jax.device_get(window), time.perf_counter() - since)
            if not math.isfinite(row["train/loss"]):
                raise FloatingPointError(
                    f"{task.label}: loss is {row['train/loss']} in the {len(window)} steps up to {step}; last good "
                    f"checkpoint: step {checkpoints.latest_step or 0} in {task.folder / 'checkpoints'}. Lower the "
                    "learning rate or check the batch's records."
                )
            row["train/learning_rate"] = float(rate(step - 1))
            bar.set_postfix(loss=f"{row['train/loss']:.3f}", refresh=False)
            bar.update(step - bar.n)
            if step in evaluate_at:
                row |= task.evaluate(state.model)
            metrics.write(step, row)
            if step in save_at:
                checkpoints.save(step, state, task.iterator)
            window, since = [], time.perf_counter()
    bar.close()
    return state


def _marks(steps: int, count: int) -> set[int]:
    """`count` evenly spread steps, the last of them `steps`."""
    return {max(1, round(steps * (i + 1) / count)) for i in range(count)}


def _split(batch: dict[str, np.ndarray], accumulation: int) -> dict[str, np.ndarray]:
    """`[R, T]` to `[accumulation, R / accumulation, T]`; what the step does not read stays on the host."""
    wanted = ("tokens", "targets", "segment_ids", "positions", "loss_mask")
    return {k: batch[k].reshape(accumulation, -1, *batch[k].shape[1:]) for k in wanted}


def _summary(window: list[dict], seconds: float) -> dict[str, float]:
    """Token-weighted means of a window of steps."""
    tokens = np.array([w["tokens"] for w in window], np.float64)
    mean = lambda key: float(np.dot([w[key] for w in window], tokens) / max(tokens.sum(), 1.0))
    row = {f"train/{key}": mean(key) for key in ("loss", "ce", "kd") if key in window[0]}
    row["train/gradient_norm"] = float(np.mean([w["gradient_norm"] for w in window]))
    row["train/scored_tokens_per_second"] = float(tokens.sum() / max(seconds, 1e-9))
    return row
