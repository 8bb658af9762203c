"""Recipe and training step.

One jitted step runs teacher and student on a batch, the fused head between them, and the optimizer. The loss is a sum
over tokens divided by the tokens of the whole optimiser step, so it does not depend on how the batch is split over
micro-batches or devices.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax import lora, optim, sharding
from kd_jax.distill import policy_gradient
from kd_jax.distill.objective import Objective
from kd_jax.errors import ConfigError
from kd_jax.head import Loss, Policy, TopK, head_loss
from kd_jax.lora import Lora
from kd_jax.transformer import Transformer

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
SELECT = {"last": None, "best_dev_loss": ("eval/dev_loss", 1.0), "best_dev_rouge": ("eval/rouge_l", -1.0)}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one run is optimised, whatever its objective. Every key of a recipe in the configs, with its unit."""

    name: str = "matched"
    steps: int = 0  # optimiser steps; 0 = as many as `epochs` make
    epochs: int = 10  # passes over the run's records, where `steps` is 0
    batch_rows: int = 16  # rows of one optimiser step over all devices (records, where data.pack is False)
    accumulation: int = 1  # micro-batches the step is split into
    lr: float = 5e-4  # peak learning rate
    lr_grid: tuple[float, ...] = ()  # or: one of these, by the dev loss of the run's first seed; all are reported
    lr_min: float = 0.0  # learning rate at the last step (cosine, linear)
    schedule: str = "cosine"  # cosine | linear | constant
    warmup_steps: int = 0  # optimiser steps
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2  # matrices only
    clip: float = 1.0  # global gradient norm; 0 = none
    lora_rank: int = 0  # 0 = train every weight
    lora_alpha: float = 64.0
    lora_dropout: float = 0.0  # of the adapters' inputs
    lora_targets: tuple[str, ...] = ("q", "v")  # of q k v o up gate down
    select: str = "last"  # parameters that a run leaves: last | best_dev_loss | best_dev_rouge
    cache: str = "none"  # of the teacher on fixed data: none | exact (its last hidden states) | top_k (biased)
    cache_dtype: str = "float32"  # float32 | bfloat16
    cache_k: int = 64  # ids that top_k keeps; the rest is one outcome
    compute_dtype: str = "float32"  # float32 | bfloat16 (parameters stay float32)
    remat: bool = False  # recompute block activations in the backward pass
    chunk: int = 0  # rows per chunk of the head; 0 = by vocabulary and backend
    evaluations: int = 4  # evenly spread over the run, the last at its end
    checkpoints: int = 2  # evenly spread over the run, the last at its end

    def __post_init__(self) -> None:
        choices = {
            "compute_dtype": tuple(DTYPES),
            "cache_dtype": tuple(DTYPES),
            "schedule": optim.SCHEDULES,
            "select": tuple(SELECT),
            "cache": ("none", "exact", "top_k"),
        }
        checks = [
            (getattr(self, key) in known, f"{key} {getattr(self, key)!r} is not one of {', '.join(known)}")
            for key, known in choices.items()
        ]
        checks += [
            (
                self.batch_rows >= 1 and self.accumulation >= 1 and self.batch_rows % self.accumulation == 0,
                f"accumulation {self.accumulation} must divide batch_rows {self.batch_rows}",
            ),
            (
                self.epochs > 0 and min(self.lr, *self.lr_grid, 1.0) > 0 and self.steps >= 0,
                "epochs, lr and lr_grid must be positive, steps not negative",
            ),
            (self.evaluations >= 1 and self.checkpoints >= 1, "evaluations and checkpoints must be at least 1"),
        ]
        for good, message in checks:
            if not good:
                raise ConfigError(f"recipes.{self.name}: {message}")
        try:
            Lora(self.lora_rank, self.lora_alpha, self.lora_dropout, tuple(self.lora_targets))
        except ConfigError as error:
            raise ConfigError(f"recipes.{self.name}: {error}") from error

    @property
    def micro_batch_rows(self) -> int:
        return self.batch_rows // self.accumulation

    @property
    def lora(self) -> Lora:
        return Lora(self.lora_rank, self.lora_alpha, self.lora_dropout, tuple(self.lora_targets))

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates that this recipe tries."""
        return tuple(self.lr_grid) or (self.lr,)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What persists from step to step, and what a checkpoint holds."""

    step: jax.Array  # int32 scalar
    model: Transformer  # what is trained: all parameters, or the adapters alone
    opt_state: optax.OptState
    rng: jax.Array  # key data, for dropout


def token_losses(
    model: Transformer,
    teacher: Transformer | None,
    batch: dict,
    weights: dict,
    spec: Loss,
    *,
    policy: Policy | None = None,
    dtype=jnp.float32,
    remat: bool = False,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`head_loss` of a `[R, T]` batch; `weights` are `[R, T]`. Returns loss and per-token values `[R * T]`.

    The teacher's side comes from the batch where a cache put it there: `teacher_hidden [R, T, E]`, or `teacher_ids` and
    `teacher_logp [R, T, k]`.
    """
    where = (batch["tokens"], batch["segment_ids"], batch["positions"])
    flat = lambda x: x.reshape((-1,) + x.shape[2:])
    h_s = flat(model.hidden(*where, dtype=dtype, remat=remat, dropout_key=dropout_key))
    h_t = head_t = None
    if teacher is not None and "teacher_ids" in batch:
        head_t = TopK(flat(batch["teacher_ids"]), flat(batch["teacher_logp"]))
    elif teacher is not None:
        cached = batch.get("teacher_hidden")
        h_t = flat(
            jax.lax.stop_gradient(teacher.hidden(*where, dtype=dtype)) if cached is None else cached.astype(dtype)
        )
        head_t = teacher.head()
    weights = jax.tree.map(flat, weights)
    return head_loss(h_s, model.head(), h_t, head_t, flat(batch["targets"]), weights, spec, policy)


def make_train_step(
    tx: optax.GradientTransformation, recipe: Recipe, objective: Objective, vocab: int, has_teacher: bool
) -> Callable:
    """`step(state, frozen, teacher, batch, plain, rate) -> (state, metrics)`.

    `batch` arrays are `[micro-batches, R, T]` (see `kd_jax.distill.feeds`), `plain` those of plain text or None;
    `frozen` is the other half of `lora.split`; what `tx` says is multiplied by `rate`, so that learning
    rates share a program.
    Metrics (scalars): `loss`; `ce`, `kd`, `policy`, `lm` (nats per scored token); `tokens` (scored); `gradient_norm`.
    """
    compute = {"dtype": DTYPES[recipe.compute_dtype], "remat": recipe.remat}
    spec = objective.loss(vocab, has_teacher, recipe.chunk)
    lm_kd = objective.lm_kd_ratio if has_teacher else 0.0
    lm_spec = Loss(vocab, "fkl" if lm_kd else None, chunk=recipe.chunk)
    lm_weights = {"ce": objective.lm_coef * (1 - lm_kd)} | ({"kd": objective.lm_coef * lm_kd} if lm_kd else {})

    def data_loss(model, teacher, micro, n, key):
        each = micro["loss_mask"].astype(jnp.float32) / n
        weights, policy = {"ce": (1 - objective.kd_ratio if has_teacher else 1.0) * micro["ce_mask"] * each}, None
        if has_teacher:
            weights["kd"] = objective.kd_ratio * each
        if objective.policy_gradient:
            weights["kd"] = each * objective.single_step
            if objective.single_step_weighted:
                weights["kd"] *= micro["importance"]
            weights["policy"] = each
            flat = lambda x: x.reshape(-1)
            policy = Policy(flat(micro["advantage"]), flat(micro["offset"]))
        loss, values = token_losses(model, teacher, micro, weights, spec, policy=policy, dropout_key=key, **compute)
        return loss, {term: jnp.sum(v) / n for term, v in values.items()}

    def text_loss(model, teacher, micro, n, key):
        weights = {term: micro["loss_mask"] * (c / n) for term, c in lm_weights.items()}
        teacher = teacher if lm_kd else None
        loss, values = token_losses(model, teacher, micro, weights, lm_spec, dropout_key=key, **compute)
        return loss, {"lm": jnp.sum(values["ce"]) / n}

    def over_micro_batches(loss, state, frozen, teacher, batch, key):
        """Sum of losses, values and gradients; tokens of the whole step are counted before its first micro-batch."""
        n = jnp.maximum(jnp.sum(batch["loss_mask"]), 1).astype(jnp.float32)

        def one(trained, micro, index):
            dropout = jax.random.fold_in(key, index) if recipe.lora_rank and recipe.lora_dropout else None
            return loss(lora.join(trained, frozen), teacher, micro, n, dropout)

        gradient = jax.value_and_grad(one, has_aux=True)
        micro_batches = batch["tokens"].shape[0]
        if micro_batches == 1:
            return gradient(state.model, jax.tree.map(lambda x: x[0], batch), 0)
        shapes = jax.eval_shape(gradient, state.model, jax.tree.map(lambda x: x[0], batch), 0)
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        add = lambda carry, x: (jax.tree.map(jnp.add, carry, gradient(state.model, *x)), None)
        return jax.lax.scan(add, zero, (batch, jnp.arange(micro_batches)))[0]

    def step(state: TrainState, frozen, teacher, batch: dict, plain: dict | None = None, rate=1.0):
        tokens, key = jnp.sum(batch["loss_mask"]), jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        if objective.policy_gradient:
            batch = batch | {"advantage": advantages(objective, batch)}
        (loss, values), grads = over_micro_batches(data_loss, state, frozen, teacher, batch, key)
        if plain is not None:
            more = over_micro_batches(text_loss, state, frozen, teacher, plain, jax.random.fold_in(key, 1 << 20))
            loss, values = loss + more[0][0], values | more[0][1]
            grads = jax.tree.map(jnp.add, grads, more[1])
        updates, opt_state = tx.update(grads, state.opt_state, state.model)
        metrics = {"loss": loss, **values, "tokens": tokens, "gradient_norm": optax.tree.norm(grads)}
        model = optax.apply_updates(state.model, jax.tree.map(lambda u: rate * u, updates))
        return TrainState(state.step + 1, model, opt_state, state.rng), metrics

    return step


def advantages(objective: Objective, batch: dict) -> jax.Array:
    """Whitened returns of the step's tokens (or the returns themselves), `[micro-batches, R, T]`."""
    mask = batch["loss_mask"]
    if objective.whiten == "none":
        return jnp.where(mask, batch["returns"], 0.0)
    count = jnp.sum(mask).astype(jnp.float32)
    if objective.whiten == "reference":  # the reference code's window: every sample as long as the longest may be
        count = jnp.sum(jnp.max(batch["segment_ids"], axis=-1)).astype(jnp.float32) * objective.max_new_tokens
    return policy_gradient.whiten(batch["returns"], mask, count)


@functools.lru_cache(maxsize=8)
def make_measure(objective: Objective, recipe: Recipe, vocab: int, mesh: Mesh) -> Callable:
    """`measure(model, teacher, batch [R, T]) -> {returns, offset, importance}`, float32 `[R, T]`, of rollouts."""
    spec, o = Loss(vocab, chunk=recipe.chunk), objective

    def logps(model, batch):
        weights = {"ce": batch["loss_mask"].astype(jnp.float32)}
        _, values = token_losses(model, None, batch, weights, spec, dtype=DTYPES[recipe.compute_dtype])
        return -values["ce"].reshape(batch["tokens"].shape)

    def measure(model, teacher, batch):
        mask, segments = batch["loss_mask"], batch["segment_ids"]
        after = lambda x: jnp.pad(x[:, 1:], ((0, 0), (0, 1)))
        follows = mask & after(mask) & (segments == after(segments))
        logq, logp = logps(model, batch), logps(teacher, batch)
        log_w = policy_gradient.log_importance(logp, logq, mask, o.mix_alpha)
        r = policy_gradient.rewards(logp, logq, mask, o.reward_scale, o.reward_clip)
        total = policy_gradient.returns(r, mask, follows, o.gamma, o.return_from, o.length_norm)
        found = {"returns": total, "offset": logq - log_w, "importance": jnp.exp(log_w)}
        return {k: jnp.where(mask, v, 0.0) for k, v in found.items()}

    jitted = jax.jit(measure, out_shardings=NamedSharding(mesh, P()))
    wanted = ("tokens", "targets", "segment_ids", "positions", "loss_mask")
    return lambda model, teacher, batch: jitted(
        model, teacher, sharding.place_batch({k: batch[k] for k in wanted}, mesh, whole=True)
    )
