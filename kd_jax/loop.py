"""The loop around the training step: feeds, logs, evaluates, selects and saves, and resumes where it was cut off."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax import checkpoint, lora, manifest, optim, processes, sharding, storage
from kd_jax.checkpoint import Checkpoints
from kd_jax.distill import feeds
from kd_jax.distill.ledger import Ledger, shards_intact
from kd_jax.distill.objective import Objective
from kd_jax.metrics import Metrics, progress
from kd_jax.storage import Path
from kd_jax.train import SELECT, Recipe, TrainState, make_train_step
from kd_jax.transformer import Transformer

DIVERGED, PATIENCE = 3.0, 3  # see Loop._check
SHOWN = {"loss": "loss", "gradient norm": "gradient_norm"}


def init_state(model: Transformer, tx: optax.GradientTransformation, rng: jax.Array, mesh: Mesh) -> TrainState:
    """Fresh state on the mesh; the optimizer state gets the parameters' shardings (a bare jit would replicate it).

    `model` is given up: its buffers become the state's.
    """

    def make(model):
        return TrainState(jnp.zeros((), jnp.int32), model, tx.init(model), jax.random.key_data(rng))

    placed = sharding.shardings(jax.eval_shape(make, model), mesh)
    return jax.jit(make, out_shardings=placed, donate_argnums=0)(model)


@dataclasses.dataclass(frozen=True)
class Task:
    """Everything `fit` needs besides the models: where to write, what to feed, what to watch."""

    label: str
    folder: Path
    steps: int
    feed: feeds.DataFeed
    evaluate: Callable[[Transformer], dict[str, float]]
    iterators: dict[str, Iterator[dict[str, np.ndarray]]]  # grain iterators that a checkpoint keeps: data, and lm
    keep: int = 2  # training states, the newest; the selected parameters are kept besides
    trajectory: int = 0  # checkpoints whose parameters are kept for scoring, evenly spread


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run leaves."""

    model: Transformer  # adapters merged
    step: int  # that the parameters are of
    dev: dict[str, float]  # evaluation of that step
    feed: dict  # what the feed has to say: branches, threshold, warnings


def fit(
    model: Transformer,
    teacher: Transformer | None,
    recipe: Recipe,
    objective: Objective,
    task: Task,
    *,
    vocab: int,
    rng: jax.Array,
    mesh: Mesh,
) -> Trained:
    """Train to `task.steps`, resuming at the newest checkpoint in `task.folder`.

    Raises FloatingPointError when the loss stops being finite or keeps far above its start, naming the step, the ids of
    its batch's records and the last good checkpoint.
    """
    rate = optim.schedule(
        recipe.schedule, lr=recipe.lr, lr_min=recipe.lr_min, warmup_steps=recipe.warmup_steps, steps=task.steps
    )
    tx, step_fn = _compiled(dataclasses.replace(recipe, **SCHEDULE), objective, vocab, teacher is not None, mesh)
    if recipe.lora_rank:
        model = lora.attach(model, recipe.lora, jax.random.fold_in(rng, 1))
    trainable, frozen = lora.split(model)
    state = init_state(trainable, tx, rng, mesh)
    _check_kept(task, recipe)
    with Checkpoints(task.folder / "checkpoints", keep=task.keep) as checkpoints:
        start = checkpoints.latest_step or 0
        if start:
            state, feed_state = checkpoints.restore(_abstract(state, mesh), task.feed.state(), task.iterators)
            task.feed.restore(feed_state)
        with Metrics(task.folder, step=start) as metrics:
            loop = Loop(task, recipe, teacher, frozen, step_fn, rate, mesh, checkpoints, metrics, math.log(vocab))
            with processes.patience():
                state = loop.run(state, start)
    return loop.result(state)


def _check_kept(task: Task, recipe: Recipe) -> None:
    """Start anew where something is damaged or gone that no checkpoint brings back.

    That is the best parameters so far, those of an earlier step that are to be scored, or a shard of the ledger.
    """
    best = _best(task.folder) if SELECT[recipe.select] else 0
    lost = bool(best) and manifest.intact(_best_folder(task.folder, best)) is None
    steps = processes.agree(checkpoint.steps(task.folder / "checkpoints"))
    marked = marks(task.steps, task.trajectory) if task.trajectory and steps else set()
    kept = (_kept_params(task.folder, step).exists() for step in marked if step <= steps[0])
    lost = lost or bool(steps) and processes.first() and not shards_intact(task.folder / "ledger", steps[0])
    if processes.agree(lost or not all(kept)):
        processes.once(lambda: storage.rmtree(task.folder / "checkpoints"), f"checkpoints of {task.folder}")


def _best(folder: Path) -> int:
    """The step of the best parameters so far, 0 if there are none; the newest where an older one is still there."""
    below = folder / "best"
    found = [p for p in below.glob("step-*") if (p / manifest.NAME).exists()] if below.exists() else []
    return processes.agree(max((int(p.name.removeprefix("step-")) for p in found), default=0))


def _best_folder(folder: Path, step: int) -> Path:
    return folder / "best" / f"step-{step}"


def _kept_params(folder: Path, step: int) -> Path:
    return folder / "trajectory" / f"step-{step}"


# Keys of a recipe that no compiled step depends on, at one value each.
SCHEDULE = dict(name="", steps=0, epochs=1, lr=1.0, lr_grid=(), lr_min=0.0, schedule="constant", warmup_steps=0)


@functools.lru_cache(maxsize=32)
def _compiled(recipe: Recipe, objective: Objective, vocab: int, has_teacher: bool, mesh: Mesh):
    """Optimizer and jitted step: one for all runs that differ in data, seed, steps and learning rate alone."""
    tx = optim.optimizer(b1=recipe.b1, b2=recipe.b2, eps=recipe.eps, weight_decay=recipe.weight_decay, clip=recipe.clip)
    step = make_train_step(tx, recipe, objective, vocab, has_teacher)

    def placed(state, *inputs):
        state, metrics = step(state, *inputs)
        constrain = jax.lax.with_sharding_constraint
        return constrain(state, sharding.shardings(state, mesh)), constrain(metrics, NamedSharding(mesh, P()))

    return tx, jax.jit(placed, donate_argnums=0)


def _abstract(tree, mesh: Mesh):
    placed = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(placed, tree, sharding.shardings(tree, mesh))


@dataclasses.dataclass
class Loop:
    """The steps of one run: feeds, logs, evaluates, selects and saves."""

    task: Task
    recipe: Recipe
    teacher: Transformer | None
    frozen: Transformer
    step_fn: Callable
    rate: optax.Schedule
    mesh: Mesh
    checkpoints: Checkpoints
    metrics: Metrics
    uniform: float  # loss of a model that knows nothing: the log of the vocabulary
    last: dict[str, float] | None = None  # the newest evaluation
    first: float | None = None  # loss of the first log
    high: int = 0  # logs in a row whose loss is far above it
    sound: int = 0  # the newest checkpoint before them

    def run(self, state: TrainState, start: int) -> TrainState:
        task, recipe = self.task, self.recipe
        evaluate_at, save_at = marks(task.steps, recipe.evaluations), marks(task.steps, recipe.checkpoints)
        keep_at = marks(task.steps, task.trajectory) if task.trajectory else set()
        log_every = max(1, task.steps // 100)
        ledger = Ledger(task.folder / "ledger", step=start)
        if start == 0:
            self._evaluate(state, 0, {})
        bar = progress(task.steps, task.label, initial=start)
        window, since, self.sound = [], time.perf_counter(), start
        for step in range(start + 1, task.steps + 1):
            batch, used = self._next(step, state)
            ledger.add(step, used)
            plain = None
            if "lm" in task.iterators:
                plain = next(task.iterators["lm"])
                ledger.add_plain(step, plain)
                plain = self._place(feeds.split_rows(plain, task.feed.shapes.held))
            rate = np.float32(self.rate(step - 1))
            state, values = self.step_fn(state, self.frozen, self.teacher, self._place(batch), plain, rate)
            window.append((step, used.example, values))
            stop = processes.preempted()
            if step % log_every == 0 or step in evaluate_at | save_at | keep_at or stop:
                # the only host sync of the loop: one fetch for the whole window, after its last step was dispatched
                done = jax.device_get([values for _, _, values in window])
                row = _summary(done, time.perf_counter() - since)
                self._check(row, window, done)
                row["train/learning_rate"] = float(rate)
                bar.set_postfix(loss=f"{row['train/loss']:.3f}", refresh=False)
                bar.update(step - bar.n)
                if step in evaluate_at:
                    self._evaluate(state, step, row)
                else:
                    self.metrics.write(step, row)
                if step in keep_at:  # before the checkpoint, from which a later start goes on
                    kept = _kept_params(task.folder, step)
                    checkpoint.save_params(kept, lora.merge(lora.join(state.model, self.frozen)))
                if step in save_at or stop:
                    ledger.write(step)
                    self.checkpoints.save(step, state, task.feed.state(), task.iterators)
                    self.sound = self.sound if self.high else step
                window, since = [], time.perf_counter()
            if stop:
                raise processes.Preempted
        bar.close()
        return state

    def result(self, state: TrainState) -> Trained:
        """The selected parameters."""
        model, facts = lora.merge(lora.join(state.model, self.frozen)), self.task.feed.facts()
        step = _best(self.task.folder) if SELECT[self.recipe.select] else 0
        if not step:
            return Trained(model, self.task.steps, self.last or self._measure(state), facts)
        folder = _best_folder(self.task.folder, step)
        model = checkpoint.load_params(folder / "params", _abstract(model, self.mesh))
        return Trained(model, step, manifest.read(folder)["facts"]["dev"], facts)

    def _next(self, step: int, state: TrainState):
        """The batch of a step; an error of the worker that makes it says so."""
        try:
            return self.task.feed.next(step, lora.join(state.model, self.frozen), self.teacher)
        except Exception as error:
            error.add_note(
                f"{self.task.label}: no batch for step {step}; last good checkpoint: {self._last_good()}. The same "
                "command goes on from there."
            )
            raise

    def _place(self, batch):
        return sharding.place_batch(batch, self.mesh, leading=1)

    def _evaluate(self, state: TrainState, step: int, row: dict[str, float]) -> None:
        self.last = self._measure(state)
        self.task.feed.evaluated(self.last["eval/dev_loss"])
        self.metrics.write(step, row | self.last)
        rule = SELECT[self.recipe.select]
        if rule is None or step == 0:
            return
        (key, sign), found = rule, _best(self.task.folder)
        # A better one of a later step was found before the run was interrupted; the same step will find it again.
        if 0 < found <= step:
            before = processes.agree(manifest.read(_best_folder(self.task.folder, found)))["facts"]["dev"][key]
            if sign * self.last[key] >= sign * before:
                return
        # Each in a folder of its own, so that there is a whole one at any time.
        folder = _best_folder(self.task.folder, step)
        checkpoint.save_params(folder / "params", lora.merge(lora.join(state.model, self.frozen)))
        manifest.write(folder, {"select": self.recipe.select}, {"step": step, "dev": self.last})
        if found not in (0, step):
            processes.once(lambda: storage.rmtree(_best_folder(self.task.folder, found)), f"best of {found}")

    def _measure(self, state: TrainState) -> dict[str, float]:
        found = processes.agree(self.task.evaluate(lora.join(state.model, self.frozen)))
        if not all(map(math.isfinite, found.values())):
            raise FloatingPointError(
                f"{self.task.label}: an evaluation is not finite ({found}); last good checkpoint: {self._last_good()}. "
                "Lower the learning rate"
            )
        return found

    def _check(self, row: dict[str, float], window: list[tuple], done: list[dict]) -> None:
        """Raises FloatingPointError where a loss or gradient is not finite, or the loss is far above its start.

        Far is DIVERGED times the first log's loss, and that of a model that knows nothing, in PATIENCE logs in a row.
        Rewards of a policy gradient have no such scale.
        """
        finite = [math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"]) for values in done]
        if not all(finite):
            place = finite.index(False)
            values = ", ".join(f"{name} {done[place][key]:g}" for name, key in SHOWN.items())
            raise FloatingPointError(self._stopped(f"not finite: {values}", window[place]))
        loss = row["train/loss"]
        self.first = loss if self.first is None else self.first
        limit = DIVERGED * max(self.first, self.uniform)
        self.high = self.high + 1 if loss > limit and "train/policy" not in row else 0
        if self.high == PATIENCE:
            worst = int(np.argmax([values["loss"] for values in done]))
            what = f"loss {loss:.3g} has been above {limit:.3g}, {DIVERGED:g} times its start, in {PATIENCE} logs"
            raise FloatingPointError(self._stopped(what, window[worst]))

    def _stopped(self, what: str, of: tuple) -> str:
        step, examples, _ = of
        ids = list(dict.fromkeys(self.task.feed.encoded.record_id[examples].tolist()))
        more = f" and {len(ids) - 16} more" if len(ids) > 16 else ""
        return (
            f"{self.task.label}: {what}, at step {step}; records of its batch: {', '.join(ids[:16])}{more}; last good "
            f"checkpoint: {self._last_good()}. Lower the learning rate or check these records."
        )

    def _last_good(self) -> str:
        return f"step {self.sound} in {self.task.folder / 'checkpoints'}" if self.sound else "none"


def marks(steps: int, count: int) -> set[int]:
    """`count` evenly spread steps, the last of them `steps`."""
    return {max(1, round(steps * (i + 1) / count)) for i in range(count)}


def _summary(window: list[dict], seconds: float) -> dict[str, float]:
    """Token-weighted means of a window of steps."""
    tokens = np.array([w["tokens"] for w in window], np.float64)
    mean = lambda key: float(np.dot([w[key] for w in window], tokens) / max(tokens.sum(), 1.0))
    row = {f"train/{key}": mean(key) for key in ("loss", "ce", "kd", "policy", "lm") if key in window[0]}
    row["train/gradient_norm"] = float(np.mean([w["gradient_norm"] for w in window]))
    row["train/scored_tokens_per_second"] = float(tokens.sum() / max(seconds, 1e-9))
    return row
