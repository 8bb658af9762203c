"""The programs that a config's runs execute, traced from shapes alone: train steps, score steps, sampling.

They are the package's own functions with the arguments, shardings and donations of a real start; two runs that share a
program share its entry. A compiler's work on them is in `kd_jax/plan/compiled.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax import generate, loop, lora, score, sharding
from kd_jax.graph import Run
from kd_jax.head import default_chunk
from kd_jax.plan.sketch import Sketch
from kd_jax.sampling import Sampling
from kd_jax.train import DTYPES, TrainState
from kd_jax.transformer import Transformer

STEP = ("tokens", "targets", "segment_ids", "positions", "loss_mask")  # what every batch has
SHARD = 1024  # prompts of teacher text that are sampled in one call (kd_jax.distill.teacher_text)
MEASURED = ("returns", "offset", "importance")  # of rollouts


@dataclasses.dataclass(frozen=True)
class Program:
    """One program, still untraced.

    `make()` gives a `jax.stages.Traced`; it is called with the mesh set and the platform's answers in place.
    """

    kind: str  # train | score | prepare | prefill | decode
    runs: tuple[str, ...]  # that execute it, or whose models do
    make: Callable[[], jax.stages.Traced]
    arguments: dict[str, object]  # trees of placed shapes, by name
    chunks: int  # turns of a loop whose number depends on the data
    rows: int  # of its batch, all chips and micro-batches
    tokens: int  # of these rows, padding included
    scored: int
    resident: object = ()  # trees that a chip holds meanwhile, and that are no arguments
    precision: str = "default"  # of its products, where they are of float32 numbers
    float32: bool = False
    made: dict[str, object] | None = None  # where the placed shapes of its result go, by kind, for the next of a chain

    @property
    def label(self) -> str:
        more = f" and {len(self.runs) - 2} more" if len(self.runs) > 2 else ""
        return f"{self.kind} {', '.join(self.runs[:2])}{more}"


@contextlib.contextmanager
def as_on(platform: str, mesh: Mesh) -> Iterator[None]:
    """Trace as on a machine of this platform.

    The model, its head and the sampler ask `jax.default_backend()` which form of an operation, which chunk and how many
    rows to take; here it answers for the chip that is planned for, not for the host that plans.
    """
    real = jax.default_backend
    jax.default_backend = lambda: platform
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            yield
    finally:
        jax.default_backend = real


def chip_bytes(tree) -> int:
    """Bytes per chip of a tree of placed shapes."""
    return sum(size for size, _, _ in leaves(tree))


def leaves(tree) -> list[tuple[int, str, tuple[int, ...]]]:
    """(bytes per chip, name, shape) of every array."""
    out = []
    for name, x in zip(sharding.names(tree), jax.tree.leaves(tree)):
        placed = getattr(x, "sharding", None)
        shape = placed.shard_shape(x.shape) if placed is not None else x.shape
        out.append((math.prod(shape) * np.dtype(x.dtype).itemsize, name, x.shape))
    return out


def all_programs(sketch: Sketch, mesh: Mesh, platform: str) -> list[list[Program]]:
    """Chains of programs on a platform; the later ones of a chain take what the earlier ones make."""
    with as_on(platform, mesh):  # which chunks and how many rows, too, is the platform's to say
        return _all_programs(sketch, mesh)


def _all_programs(sketch: Sketch, mesh: Mesh) -> list[list[Program]]:
    trained = [run for run in sketch.runs.values() if run.train_roles]
    chains = [[train_program(sketch, runs, mesh)] for runs in _grouped(sketch, trained, _step_identity)]
    heaviest: dict[str, dict] = {}  # what a step of training holds, by the model that is trained
    for (program,) in chains:
        name = sketch.runs[program.runs[0]].model
        if chip_bytes(program.arguments) > chip_bytes(heaviest.get(name, ())):
            heaviest[name] = program.arguments
    for name in sketch.shapes:
        if users := tuple(run.name for run in sketch.runs.values() if run.model == name):
            chains.append([score_program(sketch, name, users, mesh, heaviest.get(name))])
    samples = [run for run in trained if sketch.objective(run).on_policy or sketch.objective(run).policy == "teacher"]
    return chains + [sampling_programs(sketch, runs, mesh) for runs in _grouped(sketch, samples, _sampling_identity)]


def _grouped(sketch: Sketch, runs: list[Run], identity: Callable) -> list[list[Run]]:
    groups: dict[object, list[Run]] = {}
    for run in runs:
        groups.setdefault(identity(sketch, run), []).append(run)
    return list(groups.values())


def _step_identity(sketch: Sketch, run: Run) -> object:
    """What decides a run's training step, but for constants (learning rate, decay) that change no size."""
    recipe, o, compares = sketch.recipe(run), sketch.objective(run), sketch.compares(run)
    constants = loop.SCHEDULE | dict(evaluations=1, checkpoints=1, select="last", b1=0.9, b2=0.999, weight_decay=0.0)
    loss = (o.loss(sketch.vocab, compares, recipe.chunk), o.kd_ratio, o.lm_coef, o.lm_kd_ratio)
    policy = o.policy_gradient and (o.single_step, o.single_step_weighted, o.whiten, o.max_new_tokens)
    teacher = sketch.runs[run.teacher].model if compares else ""
    return run.model, teacher, dataclasses.replace(recipe, **constants), loss, policy


def _sampling_identity(sketch: Sketch, run: Run) -> object:
    recipe, o = sketch.recipe(run), sketch.objective(run)
    spec = o.sampling(sketch.config.data.max_length)
    who = (sketch.runs[run.teacher].model, "" if o.policy == "teacher" else run.model)
    size = 0 if o.policy == "teacher" else o.rollouts if o.policy_gradient else recipe.batch_rows
    return who, spec, size, recipe.compute_dtype, o.policy != "teacher" and recipe.lora


# ----------------------------------------------------------------------------------------------------------- train


def train_program(sketch: Sketch, runs: list[Run], mesh: Mesh) -> Program:
    """`kd_jax.loop`'s jitted step."""
    run = runs[0]
    recipe, objective, has_teacher = sketch.recipe(run), sketch.objective(run), sketch.compares(run)
    tx, step = loop._compiled.__wrapped__(
        dataclasses.replace(recipe, **loop.SCHEDULE), objective, sketch.vocab, has_teacher, mesh
    )
    state, frozen = _state(sketch, run, mesh, tx)
    teacher = _model(sketch, sketch.runs[run.teacher].model, mesh) if has_teacher else None
    shape = (recipe.accumulation, recipe.micro_batch_rows, sketch.row_length)
    names = {**dict.fromkeys(STEP[:-1], np.int32), "loss_mask": np.bool_}
    plain = _batch(shape, names, mesh) if objective.lm_coef else None
    names |= {"ce_mask": np.bool_} | (dict.fromkeys(MEASURED, np.float32) if objective.policy_gradient else {})
    batch = _batch(shape, names, mesh) | _cached(sketch, run, shape, mesh)
    rate = jax.ShapeDtypeStruct((), np.float32)
    scored = sketch.scored(recipe.batch_rows, sketch.config.data.pack)
    rows_scored = recipe.micro_batch_rows * sketch.row_length if plain is not None else 0
    return Program(
        kind="train",
        runs=tuple(r.name for r in runs),
        make=lambda: step.trace(state, frozen, teacher, batch, plain, rate),
        arguments={"state": state, "frozen": frozen, "teacher": teacher, "batch": batch, "plain": plain},
        chunks=_chunks(max(scored // recipe.accumulation, rows_scored), sketch.vocab, recipe.chunk, mesh),
        rows=recipe.batch_rows * (1 + bool(plain)),
        tokens=recipe.batch_rows * sketch.row_length * (1 + bool(plain)),
        scored=scored + rows_scored * recipe.accumulation,
        float32=recipe.compute_dtype == "float32",
    )


def _state(sketch: Sketch, run: Run, mesh: Mesh, tx):
    recipe = sketch.recipe(run)

    def make(key):
        model = Transformer(sketch.shapes[run.model].cfg, key)
        trainable, frozen = lora.split(lora.attach(model, recipe.lora, key))
        step = jnp.zeros((), jnp.int32)
        return TrainState(step, trainable, tx.init(trainable), jax.random.key_data(key)), frozen

    state, frozen = jax.eval_shape(make, jax.eval_shape(lambda: jax.random.key(0)))
    return loop._abstract(state, mesh), loop._abstract(frozen, mesh)


def _model(sketch: Sketch, name: str, mesh: Mesh) -> Transformer:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return loop._abstract(jax.eval_shape(functools.partial(Transformer, sketch.shapes[name].cfg), key), mesh)


def _batch(
    shape: tuple[int, ...], names: dict[str, object], mesh: Mesh, leading: int = 1
) -> dict[str, jax.ShapeDtypeStruct]:
    placed = sharding.rows(mesh, leading)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=placed) for name, dtype in names.items()}


def _cached(sketch: Sketch, run: Run, shape: tuple[int, ...], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    recipe = sketch.recipe(run)
    if recipe.cache == "none" or sketch.objective(run).on_policy or not sketch.compares(run):
        return {}
    if recipe.cache == "top_k":
        names = {"teacher_ids": np.int32, "teacher_logp": np.float32}
        return _batch((*shape, recipe.cache_k), names, mesh)
    width = sketch.shapes[sketch.runs[run.teacher].model].cfg.embed_dim
    return _batch((*shape, width), {"teacher_hidden": DTYPES[recipe.cache_dtype]}, mesh)


def _chunks(scored: int, vocab: int, chunk: int, mesh: Mesh) -> int:
    """Turns of the head's loop on a chip."""
    own = -(-scored // (mesh.shape["data"] * mesh.shape["fsdp"]))
    return max(1, -(-own // (chunk or default_chunk(vocab))))


# ----------------------------------------------------------------------------------------------------------- score


def score_program(sketch: Sketch, name: str, users: tuple[str, ...], mesh: Mesh, meanwhile: dict | None) -> Program:
    """`kd_jax.score`'s jitted step; evaluations run it while the state of training and the teacher are held."""
    s = sketch.config.score
    spec = score.Scoring(
        sketch.vocab,
        row_length=sketch.row_length,
        batch_rows=s.batch_rows,
        precision=s.precision,
        temperatures=tuple(s.temperatures),
        top_k=tuple(s.top_k),
        top_p=tuple(s.top_p),
    )
    step, model = score.make_score_step(spec, mesh), _model(sketch, name, mesh)
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = -(-spec.batch_rows // split) * split
    batch = _batch(
        (rows, sketch.row_length), {**dict.fromkeys(STEP[:-1], np.int32), "loss_mask": np.bool_}, mesh, leading=0
    )
    held = {}
    if meanwhile is not None:
        held = {"opt_state": meanwhile["state"].opt_state, "teacher": meanwhile["teacher"]}
    scored = sketch.scored(rows, packed=True)
    return Program(
        kind="score",
        runs=users,
        make=lambda: step.trace(model, batch),
        arguments={"model": model, "batch": batch},
        chunks=_chunks(scored, sketch.vocab, spec.chunk, mesh),
        rows=rows,
        tokens=rows * sketch.row_length,
        scored=scored,
        resident=held,
        precision=spec.precision,
        float32=True,
    )


# -------------------------------------------------------------------------------------------------------- sampling


def sampling_programs(sketch: Sketch, runs: list[Run], mesh: Mesh) -> list[Program]:
    """`kd_jax.generate`'s programs for runs that sample: weights made ready, prefill, and the last segment's decode."""
    run = runs[0]
    recipe, objective, data = sketch.recipe(run), sketch.objective(run), sketch.config.data
    spec = objective.sampling(data.max_length)
    student, teacher = (_model(sketch, n, mesh) for n in (run.model, sketch.runs[run.teacher].model))
    if objective.policy == "teacher":
        models, prompts, held = [teacher], SHARD, {}
    else:
        models = [student, teacher] if spec.mix_alpha else [student]
        prompts = objective.rollouts if objective.policy_gradient else recipe.batch_rows
        tx, _ = loop._compiled.__wrapped__(recipe, objective, sketch.vocab, True, mesh)
        state, frozen = _state(sketch, run, mesh, tx)
        held = {"state": state, "frozen": frozen, "teacher": teacher}
    names, dtype = tuple(r.name for r in runs), np.dtype(DTYPES[recipe.compute_dtype])
    return Sampler(sketch, names, mesh, spec, models, held, dtype, prompts).programs()


@dataclasses.dataclass
class Sampler:
    """Shapes of one sampling; the layout of what a program makes is the compiler's, and comes in by `made`."""

    sketch: Sketch
    runs: tuple[str, ...]
    mesh: Mesh
    spec: Sampling
    models: list[Transformer]
    held: dict[str, object]  # by training, where it samples
    dtype: np.dtype
    prompts: int
    made: dict[str, object] = dataclasses.field(default_factory=dict)  # results of earlier programs, placed

    def programs(self) -> list[Program]:
        lengths = np.full(self.prompts, self.sketch.config.data.max_prompt, np.int32)
        rows = max(map(len, generate._batches(lengths, 0, self.spec, self.mesh)))
        slots = generate._bucket(self.sketch.config.data.max_prompt)
        ints = functools.partial(jax.ShapeDtypeStruct, dtype=np.int32)
        uniform = jax.ShapeDtypeStruct((rows, self.spec.max_new_tokens), np.float32)
        batch = generate.Batch(
            ints((rows, slots)), ints((rows,)), ints((rows,)), ints(()), uniform if self.spec.temperature else None
        )
        fixed = dict(spec=self.spec, vocab=self.sketch.vocab, dtype=self.dtype, mesh=self.mesh)
        few = {k: fixed[k] for k in ("vocab", "dtype", "mesh")}
        last = list(generate._segments(self.spec.max_new_tokens))[-1:]

        def prefill():
            return generate._start.trace(self.models, self.made["prepare"], batch, **fixed)

        def decode():
            prompt, first, _ = self.made["prefill"]
            loop_ = generate.Loop(self._segments(rows * self.spec.beams), first.state)
            return generate._decode.trace(self.made["prepare"], prompt, batch, loop_, slots=last[0], **fixed)

        about = dict(runs=self.runs, rows=rows, chunks=1, made=self.made)
        about |= dict(float32=self.dtype == np.float32, precision="highest")
        # while a batch is decoded, a chip holds the models beside what is made ready of them
        meanwhile = self.held or {"models": self.models}
        args = {"models": self.models}
        made = [
            Program("prepare", make=lambda: generate._ready.trace(self.models, **few), arguments=args, tokens=0,
                    scored=0, resident=_without(self.held, self.models), **about),
            Program("prefill", make=prefill, arguments=args, tokens=rows * slots, scored=rows,
                    resident=_without(self.held, self.models), **about),
        ]  # fmt: skip
        if last:
            about["chunks"] = last[0]  # tokens of the last segment
            made.append(
                Program("decode", make=decode, arguments={}, tokens=rows, scored=rows, resident=meanwhile, **about)
            )
        return made

    def _segments(self, rows: int) -> list:
        """Segments of new tokens that are full when the last one is begun."""
        *before, _ = generate._segments(self.spec.max_new_tokens)

        def one(cfg, slots):
            tensor = "tensor" if cfg.kv_heads % self.mesh.shape["tensor"] == 0 else None
            placed = NamedSharding(self.mesh, P(sharding.BATCH, tensor))
            shape = (rows, cfg.kv_heads, slots, cfg.head_dim)
            return [(jax.ShapeDtypeStruct(shape, self.dtype, sharding=placed),) * 2 for _ in range(cfg.layers)]

        return [[one(model.cfg, slots) for slots in before] for model in self.models]


def _without(held, models: list[Transformer]):
    """What is held besides the models that are arguments."""
    if not held:
        return {}
    rest = {"opt_state": held["state"].opt_state}
    return rest if len(models) == 2 else rest | {"teacher": held["teacher"]}
