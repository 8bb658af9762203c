"""Train many models of one shape by one compiled program: one after another, under `lax.map`, or under `vmap`.

All have the same recipe, objective and number of steps; they differ in start, teacher, records, and the order of these.
The step is that of every other run (`kd_jax/train.py`), SEGMENT of them to a call. Each way gives the same models, but
for the order of float sums.

loop   one model at a time; rows of a batch over the mesh as in any run
map    the models of a group in one call, one after another on the device; rows as in any run
vmap   the models of a group at once, over the mesh's data axis; a device holds its models whole
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax import lora, optim, processes, sharding
from kd_jax.data.batches import TrainingRows
from kd_jax.data.encode import Encoded
from kd_jax.distill.objective import Objective
from kd_jax.errors import ConfigError
from kd_jax.loop import SCHEDULE
from kd_jax.train import Recipe, TrainState, make_train_step
from kd_jax.transformer import ModelConfig, Transformer

WAYS = ("loop", "map", "vmap")
SEGMENT = 32  # optimiser steps of one call: their batches, some MB a model, are on the device together
GROUP = 8  # models of one call under map and vmap, for each device of the data axis
READ = ("tokens", "targets", "segment_ids", "positions", "loss_mask")

# The fastest way by backend, as `python -m benchmarks shadow` measures it. On 2 CPU cores loop and map tied (medians of
# 23 and 25 models of 0.45 M parameters a minute), vmap made 14; a loop can stop after any chain. Accelerators, which
# one small model leaves idle, take vmap; none is measured yet.
FASTEST = {"cpu": "loop"}


@dataclasses.dataclass(frozen=True)
class Training:
    """What all the models of one kind (teachers, or students) have in common."""

    recipe: Recipe
    objective: Objective
    steps: int
    vocab: int
    row_length: int
    packed: bool

    @property
    def has_teacher(self) -> bool:
        return self.objective.technique != "sft" and self.objective.kd_ratio > 0

    def rows(self, encoded: Encoded, seed: int) -> TrainingRows:
        """The rows of as many epochs of a model's own records as its steps take."""
        wanted = self.steps * self.recipe.batch_rows
        epochs = -(-wanted // self.epoch_rows(encoded, seed))
        while len(rows := self._rows(encoded, seed, epochs)) < wanted:  # epochs pack differently
            epochs += 1
        return rows

    def epoch_rows(self, encoded: Encoded, seed: int = 0) -> int:
        """The rows of one epoch."""
        return len(self._rows(encoded, seed, 1))

    def _rows(self, encoded: Encoded, seed: int, epochs: int) -> TrainingRows:
        return TrainingRows(encoded, row_length=self.row_length, packed=self.packed, seed=seed, epochs=epochs)


def check(objective: Objective, recipe: Recipe, name: str) -> None:
    """Raises ConfigError where chains cannot repeat a run: only fixed data can be laid out for many models at once."""
    checks = [
        (
            objective.policy == "dataset" and not objective.lm_coef,
            f"technique {objective.technique} with policy {objective.policy!r} and lm_coef {objective.lm_coef:g}: "
            "chains train on the records themselves; what works are kd (any divergence, any share of labels) and sft",
        ),
        (recipe.select == "last", f"recipe {recipe.name} selects {recipe.select!r}; chains keep the last parameters"),
        (recipe.cache != "top_k", f"recipe {recipe.name} caches {recipe.cache!r}; chains run the teacher itself"),
    ]
    for good, message in checks:
        if not good:
            raise ConfigError(f"shadow.student: run {name}: {message}")


def resolve(way: str) -> str:
    """The way that `shadow.way` names; auto: the fastest one measured for this backend. Raises ConfigError."""
    if way not in ("auto", *WAYS):
        raise ConfigError(f"shadow.way is {way!r}; known are auto, {', '.join(WAYS)}")
    return FASTEST.get(jax.default_backend(), "vmap") if way == "auto" else way


def group_size(way: str, mesh: Mesh) -> int:
    """Models that one call of `train` is made for; fewer are filled up by the caller, so that no shape changes."""
    return {"loop": 1, "map": GROUP, "vmap": GROUP * mesh.shape["data"]}[way]


def train(
    models: Sequence[Transformer],
    teachers: Sequence[Transformer] | None,
    rows: Sequence[TrainingRows],
    keys: Sequence[jax.Array],
    spec: Training,
    way: str,
    mesh: Mesh,
) -> tuple[list[Transformer], np.ndarray]:
    """Train each model on its own rows, by its own teacher where the objective has one.

    Args:
        models: to start from; they are left as they are.
        rows: of each model, `spec.rows`.
        keys: of each model, for adapters and dropout.

    Returns:
        The trained models, adapters merged, and the loss of every step, float32 [models, steps].
    """
    if way == "loop" and len(models) > 1:
        found = [
            train([m], teachers and [teachers[i]], [rows[i]], [keys[i]], spec, way, mesh) for i, m in enumerate(models)
        ]
        return [one[0] for one, _ in found], np.concatenate([losses for _, losses in found])
    begin, segment = _compiled(
        dataclasses.replace(spec.recipe, **SCHEDULE), spec.objective, spec.vocab, spec.has_teacher, way, mesh
    )
    if spec.recipe.lora_rank:
        models = [
            lora.attach(m, spec.recipe.lora, jax.random.fold_in(key, 1)) for m, key in zip(models, keys, strict=True)
        ]
    trainable, frozen = zip(*map(lora.split, models))
    together = (lambda trees: trees[0]) if way == "loop" else _stack
    state = begin(together(trainable), together([jax.random.key_data(key) for key in keys]))
    fixed = together(frozen), together(teachers) if spec.has_teacher else None
    r, losses = spec.recipe, []
    rate = optim.schedule(r.schedule, lr=r.lr, lr_min=r.lr_min, warmup_steps=r.warmup_steps, steps=spec.steps)
    for first in range(0, spec.steps, SEGMENT):
        count = min(SEGMENT, spec.steps - first)
        batches = [_batches(one, first, r) for one in rows]
        rates = np.array([rate(first + i) for i in range(SEGMENT)], np.float32)
        state, values = segment(state, *fixed, _place(batches, way, mesh), rates, count)
        losses.append(values[..., :count])
        if processes.preempted():
            raise processes.Preempted
        jax.block_until_ready(losses[-2:-1])  # the host lays out batches one call ahead, not all of them
    losses = np.concatenate([np.atleast_2d(jax.device_get(part)) for part in losses], axis=1)
    done = [state.model] if way == "loop" else _unstack(state.model, len(models), mesh)
    return [lora.merge(lora.join(m, f)) for m, f in zip(done, frozen, strict=True)], losses


@functools.lru_cache(maxsize=8)
def _compiled(recipe: Recipe, objective: Objective, vocab: int, has_teacher: bool, way: str, mesh: Mesh):
    """`begin(models, keys) -> state` and `segment(state, frozen, teachers, batches, rates, n) -> state, losses`."""
    tx = optim.optimizer(b1=recipe.b1, b2=recipe.b2, eps=recipe.eps, weight_decay=recipe.weight_decay, clip=recipe.clip)
    step = make_train_step(tx, recipe, objective, vocab, has_teacher)

    def begin(model, key):
        return TrainState(jnp.zeros((), jnp.int32), model, tx.init(model), key)

    def segment(state, frozen, teacher, batches, rates, n):
        def one(i, carry):
            state, losses = carry
            batch = jax.tree.map(lambda x: x[i], batches)
            state, values = step(state, frozen, teacher, batch | {"ce_mask": batch["loss_mask"]}, None, rates[i])
            return state, losses.at[i].set(values["loss"])

        return jax.lax.fori_loop(0, n, one, (state, jnp.zeros(SEGMENT)))

    def mapped(state, frozen, teacher, batches, rates, n):
        return jax.lax.map(lambda own: segment(*own, rates, n), (state, frozen, teacher, batches))

    begins = begin if way == "loop" else jax.vmap(begin)
    runs = {"loop": segment, "map": mapped, "vmap": jax.vmap(segment, in_axes=(0, 0, 0, 0, None, None))}[way]
    keep = lambda state: jax.lax.with_sharding_constraint(state, _shardings(state, way, mesh))

    def run(*args):
        state, losses = runs(*args)
        return keep(state), jax.lax.with_sharding_constraint(losses, NamedSharding(mesh, P()))

    return jax.jit(lambda *args: keep(begins(*args))), jax.jit(run, donate_argnums=0)


def _shardings(tree, way: str, mesh: Mesh):
    """Where a state lies: as any run's, the models of a group along an axis in front."""
    if way == "loop":
        return sharding.shardings(tree, mesh)
    if way == "vmap":
        return jax.tree.map(lambda _: NamedSharding(mesh, P("data")), tree)
    single = sharding.shardings(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree), mesh)
    return jax.tree.map(lambda s: NamedSharding(mesh, P(None, *s.spec)), single)


def _batches(rows: TrainingRows, first: int, recipe: Recipe) -> dict[str, np.ndarray]:
    """The batches of a segment that begins with step `first`: `[SEGMENT, micro-batches, R, T]`."""
    found = rows.batch(np.arange(first * recipe.batch_rows, (first + SEGMENT) * recipe.batch_rows))
    shape = (SEGMENT, recipe.accumulation, recipe.micro_batch_rows, -1)
    return {key: found[key].reshape(shape) for key in READ}


def _place(batches: list[dict], way: str, mesh: Mesh) -> dict[str, jax.Array]:
    """Host arrays, the same on every process, to the device: rows over the mesh, or models under vmap."""
    if way == "loop":
        return sharding.place_batch(batches[0], mesh, leading=2, whole=True)
    stacked = {key: np.stack([batch[key] for batch in batches]) for key in READ}
    if way == "map":
        return sharding.place_batch(stacked, mesh, leading=3, whole=True)
    place = NamedSharding(mesh, P("data"))
    return {k: jax.make_array_from_callback(x.shape, place, x.__getitem__) for k, x in stacked.items()}


@jax.jit
def _stack(trees: Sequence):
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *trees)


def _unstack(tree, count: int, mesh: Mesh) -> list:
    """The models of a stack, each placed as any run's."""
    single = jax.eval_shape(lambda t: jax.tree.map(lambda x: x[0], t), tree)
    take = jax.jit(lambda t, i: jax.tree.map(lambda x: x[i], t), out_shardings=sharding.shardings(single, mesh))
    return [take(tree, i) for i in range(count)]


def words(cfg: ModelConfig) -> str:
    """The size of a model in words: "2 layers x 64, 0.21 M parameters"."""
    model = jax.eval_shape(functools.partial(Transformer, cfg), jax.random.key(0))
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(model))
    return f"{cfg.layers} layers x {cfg.width}, {parameters / 1e6:.2f} M parameters"
