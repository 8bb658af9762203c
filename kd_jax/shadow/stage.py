"""The stage `shadow`: train and score every chain of the design, each finished before it counts.

scores/shadow/design.parquet                           who is in which chain (`kd_jax/shadow/design.py`)
scores/shadow/chain003/{teacher,student}/<role>-*.parquet  score tables of the pool and of `population`
scores/shadow/chain003/manifest.json                   what the chain was made from; it is written last

A chain repeats a run of the study and its teacher (`shadow.student`): their models, recipes and objectives, with
starts, orders and records of its own. A start that the study draws at random is drawn anew for every chain; one that
was loaded or pre-trained is the same for all. Parameters are not kept: a chain that was cut off is trained again, from
the same numbers. Canaries are in no chain.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
import pandas as pd
from jax.sharding import Mesh

from kd_jax import checkpoint, excluded, manifest, prepare, processes, sharding, storage
from kd_jax import score as scoring
from kd_jax.data.encode import Encoded
from kd_jax.errors import ConfigError
from kd_jax.graph import Run
from kd_jax.metrics import progress
from kd_jax.shadow import chains, design
from kd_jax.shadow.chains import Training
from kd_jax.shadow.design import Design
from kd_jax.study import (
    Study,
    code_version,
    key,
    load_run,
    model_config,
    number,
    objective_of,
    recipe_of,
    scoring_spec,
    versions,
)
from kd_jax.transformer import ModelConfig, Transformer

log = logging.getLogger(__name__)

POOL = ("private", "heldout")
KINDS = ("teacher", "student")


@dataclasses.dataclass(frozen=True)
class Kind:
    """What the teachers, or the students, of all chains have in common."""

    name: str  # teacher | student
    run: Run  # that they repeat
    training: Training
    fixed: Encoded | None  # records of every chain, besides its half of the pool
    start: Callable[[int], Transformer]  # from the number of a model
    source: object  # what identifies the starts


@dataclasses.dataclass(frozen=True)
class Work:
    """A design bound to a study: everything that trains and scores a chain."""

    study: Study
    design: Design
    pool: Encoded  # in the order of the design
    kinds: dict[str, Kind]  # teacher, student
    way: str

    @property
    def folder(self) -> storage.Path:
        return self.study.workdir / "scores" / "shadow"

    def place(self, chain: int) -> storage.Path:
        return self.folder / f"chain{chain:03d}"

    def title(self, chain: int) -> str:
        return f"chain {chain + 1} of {self.design.chains}"

    def records(self, name: str, chain: int) -> Encoded:
        """What the chain's teacher, or student, is trained on, as often as an epoch has it."""
        inside = np.flatnonzero(getattr(self.design, f"{name}_in")[chain])
        own, fixed = _repeated(self.study, self.pool.take(inside)), self.kinds[name].fixed
        return own if fixed is None else fixed if not len(inside) else _joined(fixed, own)

    def told(self) -> dict[str, str]:
        """The sizes of the models in words."""
        models = {name: model_config(self.study, kind.run.model) for name, kind in self.kinds.items()}
        return {f"{name}_size": chains.words(cfg) for name, cfg in models.items()}


class Trained(NamedTuple):
    model: Transformer
    loss: float  # mean of its last steps, nats per scored token of the objective


def run_chains(study: Study) -> None:
    """Train and score every chain that is not finished.

    Raises ConfigError for what chains cannot repeat, StaleWork where the design or what a finished chain was made from
    has changed, FloatingPointError naming the chain that diverges.
    """
    work = open_chains(study)
    _write_design(work)
    inputs = [_inputs(work, chain) for chain in range(work.design.chains)]
    left = [c for c, own in enumerate(inputs) if not manifest.finished(work.place(c), own, f"shadow chain {c}")]
    if before := work.design.chains - len(left):
        log.info("shadow: %d of %d chains finished before", before, work.design.chains)
    if not left:
        return
    size, began, done = chains.group_size(work.way, study.mesh), time.perf_counter(), 0
    cheap = _train(work, "teacher", [0, 1]) if work.design.kind == "cheap" else None
    for first in range(0, len(left), size):
        group = left[first : first + size]
        for chain in group:
            manifest.begin(work.place(chain), inputs[chain], f"shadow chain {chain}")
        teachers = [cheap[c % 2] for c in group] if cheap else _train(work, "teacher", group)
        students = _train(work, "student", group, teachers)
        for chain, teacher, student in zip(group, teachers, students, strict=True):
            facts = {name: _score(work, chain, name, of) for name, of in (("teacher", teacher), ("student", student))}
            done += 1
            each = (time.perf_counter() - began) / done
            manifest.end(work.place(chain), inputs[chain], facts | _circumstances(work, each))
            log.info(
                "%s: teacher loss %.3f, dev %.3f; student loss %.3f, dev %.3f; %s a chain, about %s left",
                *(work.title(chain), facts["teacher"]["loss"], facts["teacher"]["dev_loss"]),
                *(facts["student"]["loss"], facts["student"]["dev_loss"]),
                *(_duration(each), _duration(each * (len(left) - done))),
            )


def check(study: Study) -> None:
    """What can be known of the chains before anything is trained. Raises ConfigError naming the key."""
    s = study.config.shadow
    if s.student not in study.runs or not study.runs[s.student].teacher:
        raise ConfigError(f"shadow.student is {s.student!r}, which is not a distilled run; runs: {sorted(study.runs)}")
    chains.resolve(s.way)
    student = study.runs[s.student]
    if s.design != "two_by_two" and student.setting != "disjoint":
        raise ConfigError(
            f"shadow.student {s.student} has the setting {student.setting!r}; design {s.design} repeats a student that "
            "is distilled on public records alone (disjoint)"
        )
    for run in (study.runs[student.teacher], student):
        chains.check(objective_of(study.config, run), recipe_of(study.config, run), run.name)
        before = run.init
        while before:
            if seen := set(study.runs[before].train_roles) & set(POOL):
                raise ConfigError(
                    f"shadow.student: {run.name} starts from {before}, which is trained on {', '.join(sorted(seen))}, "
                    "records of the shadow pool: chains could not be without them"
                )
            before = study.runs[before].init
    _draw(study, _pool(study))


def open_chains(study: Study) -> Work:
    """The design, and what its chains repeat. Nothing is trained or written. Raises as `run_chains`."""
    check(study)
    pool = _pool(study)
    drawn = _draw(study, pool)
    place = pd.Series(np.arange(len(pool)), pool.example_id)
    pool = pool.take(place[drawn.pool.example_id].to_numpy())
    student = study.runs[study.config.shadow.student]
    public, whole = _repeated(study, _role(study, "public")), _repeated(study, pool)
    kinds = {
        "teacher": _kind(study, "teacher", study.runs[student.teacher], None, whole),
        "student": _kind(study, "student", student, public, whole if drawn.kind == "two_by_two" else None),
    }
    return Work(study, drawn, pool, kinds, chains.resolve(study.config.shadow.way))


# ---------------------------------------------------------------------------------------------------------------- data


def _role(study: Study, role: str) -> Encoded:
    """The examples of a role that a run may be trained on."""
    found = study.data.of_role(role)
    keep = ~excluded.inside(found.example_id, found.record_id, study.data.excluded)
    if not keep.any():
        raise ConfigError(f"shadow.design needs records of the role {role}, and there are none")
    return found.take(np.flatnonzero(keep))


def _pool(study: Study) -> Encoded:
    return functools.reduce(_joined, (_role(study, role) for role in POOL))


def _draw(study: Study, pool: Encoded) -> Design:
    s, known = study.config.shadow, study.data.splits.set_index("example_id").loc[pool.record_id]
    who = dict(example_id=pool.example_id, role=known.role.to_numpy(), task=pool.task, group=known.group.to_numpy())
    return design.draw(s.design, s.chains, pd.DataFrame(who), study.config.seed, s.records)


def _repeated(study: Study, encoded: Encoded) -> Encoded:
    """Examples as often as `data.repeated` has their records in an epoch."""
    times = study.data.splits.set_index("example_id").repeats.loc[encoded.record_id].to_numpy()
    return encoded.take(np.repeat(np.arange(len(encoded)), times))


def _joined(a: Encoded, b: Encoded) -> Encoded:
    flat = ("example_id", "record_id", "task", "tokens", "segment", "n_bytes", "zlib_bytes")
    both = {name: np.concatenate([getattr(a, name), getattr(b, name)]) for name in flat}
    return Encoded(**both, offsets=np.concatenate([a.offsets, a.offsets[-1] + b.offsets[1:]]), counts=a.counts)


# ------------------------------------------------------------------------------------------------------------ training


def _kind(study: Study, name: str, run: Run, fixed: Encoded | None, pool: Encoded | None) -> Kind:
    """The teachers or students of all chains; pool: what each is trained on a half of."""
    recipe, data = recipe_of(study.config, run), study.config.data
    if len(recipe.rates) > 1:  # the run searched it; its chains take what it found
        found = manifest.read(study.folder(run, run.seeds[0]))
        if found is None:
            raise FileNotFoundError(f"shadow chains take their learning rate from {run.name}, which is not trained yet")
        recipe = dataclasses.replace(recipe, lr=found["facts"]["lr"], lr_grid=())
    objective, row_length = objective_of(study.config, run), data.row_length or data.max_length
    spec = Training(recipe, objective, recipe.steps, study.vocab, row_length, data.pack)
    if not recipe.steps:  # the same number for all chains, whatever their halves hold exactly
        rows = sum(spec.epoch_rows(part) * share for part, share in ((fixed, 1.0), (pool, 0.5)) if part is not None)
        spec = dataclasses.replace(spec, steps=max(1, round(recipe.epochs * rows / recipe.batch_rows)))
    return Kind(name, run, spec, fixed, *_start(study, name, run))


def _start(study: Study, name: str, run: Run) -> tuple[Callable[[int], Transformer], object]:
    """Where the models of a kind start, and what identifies it."""
    origin, settings = study.runs[run.init], study.config.models[run.model]
    if not origin.train_roles and not settings.path:
        draw = _drawn(model_config(study, run.model), study.mesh)
        return lambda which: draw(key(study, f"init shadow {name}", which)), settings.to_dict()
    model = load_run(study, origin.name, origin.seed_for(run.seeds[0]))
    return lambda which: model, checkpoint.fingerprint(model)


@functools.lru_cache(maxsize=4)
def _drawn(cfg: ModelConfig, mesh: Mesh) -> Callable[[jax.Array], Transformer]:
    """One program that draws all models of a shape, each from its key."""
    make = functools.partial(Transformer, cfg)
    return jax.jit(make, out_shardings=sharding.shardings(jax.eval_shape(make, jax.random.key(0)), mesh))


def _train(work: Work, name: str, group: Sequence[int], teachers: Sequence[Trained] | None = None) -> list[Trained]:
    """Train the teachers, or the students, of these chains.

    Fewer than the program is made for are filled up with copies of the last, which are dropped.
    """
    study, kind, size = work.study, work.kinds[name], chains.group_size(work.way, work.study.mesh)
    found: list[Trained] = []
    for first in range(0, len(group), size):
        part = list(group[first : first + size])
        full = [*part, *part[-1:] * (size - len(part))]
        taught = [teachers[min(first + i, len(group) - 1)].model for i in range(size)] if teachers else None
        rows = [kind.training.rows(work.records(name, c), number(study, f"order shadow {name}", c)) for c in full]
        starts, keys = [kind.start(c) for c in full], [key(study, f"train shadow {name}", c) for c in full]
        models, losses = chains.train(starts, taught, rows, keys, kind.training, work.way, study.mesh)
        for chain, model, own in zip(part, models, losses):
            if not np.isfinite(own).all():
                step = int(np.flatnonzero(~np.isfinite(own))[0]) + 1
                raise FloatingPointError(
                    f"shadow {work.title(chain)}: the loss of its {name} is {own[step - 1]} at step {step}: lower the "
                    f"learning rate of recipes.{kind.run.recipe}, or check the records"
                )
            found.append(Trained(model, float(own[-chains.SEGMENT :].mean())))
    return found


# ------------------------------------------------------------------------------------------------------------- scoring


def _score(work: Work, chain: int, name: str, trained: Trained) -> dict:
    """Score tables of a chain's teacher or student; the facts that its manifest keeps."""
    folder, study, spec = work.place(chain) / name, work.study, scoring_spec(work.study)
    processes.once(lambda: storage.rmtree(folder), f"removal of {folder}")  # of a chain that was cut off
    if name == "teacher" and chain != (first := int(work.design.teachers[chain])):  # cheap: it is scored there
        processes.once(lambda: storage.copytree(work.place(first) / name, folder), f"copy of the teacher of {folder}")
        return manifest.read(work.place(first))["facts"][name] | {"copy_of": work.place(first).name}
    facts = dict(params_fingerprint=checkpoint.fingerprint(trained.model), code_version=code_version())
    metadata = _metadata(work, chain, name, trained.model, facts)
    roles = {role: work.pool.take(np.flatnonzero(work.design.pool.role == role)) for role in POOL}
    roles["population"] = study.data.of_role("population")
    with progress(sum(map(len, roles.values())), f"score {name} of {work.title(chain)}", unit="example") as bar:
        for role, encoded in roles.items():
            if len(encoded):
                scoring.score_role(trained.model, encoded, role, folder, spec, study.mesh, metadata, bar)
    return facts | {"loss": trained.loss, "dev_loss": _dev_loss(study, trained.model)}


def _dev_loss(study: Study, model: Transformer) -> float:
    """Nats per token on the records by which the study's own runs are watched."""
    dev = study.data.of_role("dev")
    indices = np.arange(min(study.config.probe.examples, len(dev)))
    return float(-scoring.score(model, dev, indices, scoring_spec(study), study.mesh)[1]["logp"].mean(dtype=np.float64))


def _metadata(work: Work, chain: int, name: str, model: Transformer, facts: dict) -> dict[str, str]:
    """Parquet metadata, as every score table has it, and the chain."""
    study, kind = work.study, work.kinds[name]
    recipe = kind.training.recipe
    provenance = dict(
        technique=kind.run.technique,
        setting=_setting(work) if name == "student" else kind.run.setting,
        repeats=kind.run.name,
        recipe=recipe.name,
        objective=kind.training.objective.distinctive(),
        n_params=sum(int(x.size) for x in jax.tree.leaves(model)),
        tokenizer_fingerprint=study.data.tokenizer.fingerprint,
        splits_fingerprint=prepare.splits_fingerprint(study.data.splits),
        dtype="float32",
        matmul_precision=scoring_spec(study).precision,
        bos=study.config.data.bos,
        **facts,
    )
    known = dict(run=f"shadow/{name}", seed=chain, split_seed=study.config.seed, step=kind.training.steps)
    known |= dict(variant="plain", chain=chain, design=work.design.kind, design_hash=work.design.hash)
    return {k: str(v) for k, v in known.items()} | {"provenance": json.dumps(provenance)}


def _write_design(work: Work) -> None:
    drawn, sees = work.design, bool(work.design.student_in.any())
    design.write(
        drawn,
        work.folder / "design.parquet",
        technique=work.kinds["student"].run.technique,
        setting=_setting(work),
        students="distilled on public and their half of the pool" if sees else "distilled on public alone",
        versions=versions(),
        **work.told(),
    )


def _setting(work: Work) -> str:
    return "shared" if work.design.student_in.any() else "disjoint"


def _inputs(work: Work, chain: int) -> dict:
    """What decides a chain's models and scores."""
    study = work.study
    made = {
        name: {
            "run": kind.run.name,
            "recipe": dataclasses.asdict(kind.training.recipe),
            "objective": dataclasses.asdict(kind.training.objective),
            "steps": kind.training.steps,
            "rows": [kind.training.packed, kind.training.row_length, study.config.data.max_length],
            "model": study.config.models[kind.run.model].to_dict(),
            "start": kind.source,
        }
        for name, kind in work.kinds.items()
    }
    left_out = manifest.digest(sorted(study.data.excluded))
    own = dict(chain=chain, design=work.design.hash, seed=study.config.seed, excluded=left_out)
    return own | made | dict(scoring=dataclasses.asdict(scoring_spec(study)), **study.data.fingerprints())


def _circumstances(work: Work, seconds: float) -> dict:
    """What a chain's manifest keeps of how it was made, without deciding anything."""
    return dict(way=work.way, seconds=round(seconds, 1), code_version=code_version(), versions=versions())


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
