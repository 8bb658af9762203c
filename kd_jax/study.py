"""A study: a config bound to a work directory and a mesh, checked, with its data prepared and its models at hand."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import pandas as pd
from jax.sharding import Mesh
from ml_collections import ConfigDict

from kd_jax import (
    checkpoint,
    continued,
    excluded,
    foreign,
    graph,
    hf,
    manifest,
    pairs,
    prepare,
    processes,
    sharding,
    storage,
    train,
    utility,
    variants,
    windows,
)
from kd_jax import score as scoring
from kd_jax.data import tokenizer
from kd_jax.distill.objective import Objective
from kd_jax.errors import ConfigError
from kd_jax.generate import Sampling
from kd_jax.graph import Run
from kd_jax.transformer import ModelConfig, Transformer
from kd_jax.whitebox import table as whitebox
from kd_jax.whitebox.spec import Whitebox

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Study:
    """A config bound to a work directory and a mesh, with its data prepared and its graph of runs checked."""

    config: ConfigDict
    workdir: storage.Path
    mesh: Mesh
    data: prepare.Data
    runs: dict[str, Run]
    only: str = ""  # work on this run alone
    own_data: Mapping[str, prepare.Data] = dataclasses.field(default_factory=dict)  # of models with other tokenizers

    @property
    def vocab(self) -> int:
        """The effective vocabulary: the tokenizer's own size, whatever padding a model's rows have."""
        return self.data.tokenizer.vocab_size

    @property
    def nodes(self) -> list[tuple[Run, int]]:
        return [(r, s) for r in self.runs.values() if self.only in ("", r.name) for s in r.seeds]

    def ready(self) -> list[tuple[Run, int]]:
        """The nodes that need not wait for a list of records to leave out, neither themselves nor what they need."""
        waiting: set[str] = set()
        for run in self.runs.values():  # every run comes after those it needs
            if (run.exclude and not self.has_list(run.excluded_of)) or waiting & set(run.needs):
                waiting.add(run.name)
        waiting = set(processes.agree(sorted(waiting)))
        for name in sorted(waiting & {run.name for run, _ in self.nodes}):
            log.info("%s: waits for the filter stage, which says what it leaves out", name)
        return [(run, seed) for run, seed in self.nodes if run.name not in waiting]

    def has_list(self, name: str) -> bool:
        """Is the list there of what a run is likely to memorize, made from the models as they are now?

        Not where one of them is yet to be trained. Raises StaleWork where it was made from others.
        """
        place = excluded.list_of(self.workdir, name)
        try:
            return place.exists() and manifest.finished(place.parent, self.list_inputs(name), f"the list for {name}")
        except FileNotFoundError:
            return False

    def list_inputs(self, name: str) -> dict:
        """What decides the list for a run: the models whose scores it is made from, the records, and the cut.

        Raises FileNotFoundError where one of the models is not trained yet.
        """
        seed, models = self.runs[name].seeds[0], {}
        for other in (self.runs[n] for n in (name, self.runs[name].teacher, excluded.BASELINE)):
            found = manifest.read(self.folder(other, other.seed_for(seed)))
            if found is None:
                raise FileNotFoundError(f"the filter for {name} needs {other.name}, which is not trained yet")
            models[other.name] = found["facts"]["params_fingerprint"]
        cuts = self.config.memorization.cuts
        return dict(models=models, cuts=cuts, seed=self.config.seed, **self.data.fingerprints())

    def of(self, run: Run) -> Study:
        """This study as a run reads it: in the tokens of its own tokenizer, where that is another one."""
        return dataclasses.replace(self, data=self.own_data.get(run.model, self.data))

    def folder(self, run: Run, seed: int, kind: str = "runs") -> storage.Path:
        return self.workdir / kind / run.name / f"seed{seed}"


def open_study(config: ConfigDict, workdir: storage.Path, mesh: Mesh, only: str = "") -> Study:
    """Check the graph, recipes and models of a config, then prepare its data. Errors come before any training."""
    config = foreign.complete(config)
    techniques = {name: objective.technique for name, objective in config.objectives.items()}
    parsed = graph.parse(config.runs.to_dict(), set(config.models), set(config.recipes), techniques)
    runs = {r.name: r for r in parsed}
    excluded.check(config, runs)
    if only and only not in runs:
        raise ConfigError(f"--only={only}: no such run; runs: {sorted(runs)}")
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    for run in runs.values():
        if run.recipe and (rows := recipe_of(config, run).micro_batch_rows) % shards:
            raise ConfigError(
                f"recipes.{run.recipe}: {rows} rows of a micro-batch do not divide over {shards} devices "
                "(mesh.data x mesh.fsdp); change batch_rows, accumulation or mesh.tensor"
            )
        objective_of(config, run)
    if config.attack.headline not in runs:
        raise ConfigError(f"attack.headline is {config.attack.headline!r}, which is not a run; runs: {sorted(runs)}")
    pairs.chosen(tuple(config.score.pairs), runs)
    variants.check(config.score.variants)
    if foreign.elsewhere(config):
        foreign.check(config, workdir)
    data = prepare.prepare(config, workdir)
    own_data = {}
    if foreign.elsewhere(config):
        foreign.note_cuts(data, config)
        own_data = foreign.own_data(config, data)
    study = Study(config, workdir, mesh, data, runs, only, own_data)
    scoring_spec(study)
    sampling_spec(study)
    continuing_spec(study)
    windows_spec(study)
    whitebox_spec(study)
    whitebox.check(config, runs, set(data.splits.role))
    _check_utility(study)
    for name in config.models:
        _check_model(study, name)
    return study


def _check_utility(study: Study) -> None:
    u = study.config.utility
    wrong = [name for name in u.roles if not (study.data.splits.role == name).any()] if u.seeds else []
    if wrong:
        raise ConfigError(f"utility.roles: no record has the role {', '.join(wrong)}")
    if both := set(u.roles) & set(u.files):
        raise ConfigError(f"utility: {', '.join(both)} names a role and a file")
    for path in u.files.values() if u.seeds else ():
        if not Path(path).is_file():
            raise ConfigError(f"utility.files: {path} is not a file")


def recipe_of(config: ConfigDict, run: Run) -> train.Recipe:
    plain = config.recipes[run.recipe].to_dict()
    return train.Recipe(**{k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()})


def objective_of(config: ConfigDict, run: Run) -> Objective:
    return Objective(**config.objectives[run.objective_name].to_dict())


def sampling_spec(study: Study) -> Sampling:
    """How answers are decoded where utility is measured."""
    u = study.config.utility
    return Sampling(
        temperature=u.temperature,
        top_k=u.top_k,
        top_p=u.top_p,
        max_new_tokens=u.max_new_tokens or study.config.data.max_length,
        no_repeat_ngram=u.no_repeat_ngram,
    )


def answer_set(study: Study, model: Transformer, name: str, *, seeds: tuple[int, ...], limit: int) -> pd.DataFrame:
    """ROUGE of a model's answers to a role's prompts, or to those of a file that `utility.files` names.

    One row per example and sampling seed, see `utility.evaluate`.
    """
    data, files = study.config.data, study.config.utility.files
    if name in files:
        keys = ("template", "bos", "max_length", "max_prompt", "long_prompt", "joint")
        settings = {k: data[k] for k in keys}
        encoded, references = utility.instruction_set(files[name], study.data.tokenizer, **settings)
    else:
        encoded, references = study.data.of_role(name), utility.own_references(study.data.frame)
    return utility.evaluate(
        model,
        encoded,
        references,
        sampling_spec(study),
        seeds=seeds,
        tokenizer=study.data.tokenizer,
        vocab=study.vocab,
        mesh=study.mesh,
        limit=limit,
        total_length=data.max_length,
    )


def scoring_spec(study: Study) -> scoring.Scoring:
    s = study.config.score
    grid = {"temperatures": tuple(s.temperatures), "top_k": tuple(s.top_k), "top_p": tuple(s.top_p)}
    return scoring.Scoring(
        study.vocab,
        row_length=study.config.data.row_length or study.config.data.max_length,
        batch_rows=s.batch_rows,
        precision=s.precision,
        **grid,
    )


def continuing_spec(study: Study) -> continued.Continuing:
    """Which prefixes are continued by generation, and how."""
    return continued.continuing(study.config.memorization, study.data.of_role("private"), study.config.seed)


def windows_spec(study: Study) -> windows.Windows | None:
    """The overlapping windows in which long texts are scored, or None."""
    config = study.config
    return windows.windows(config.memorization, study.data, config.data.max_length, config.seed)


def whitebox_spec(study: Study) -> Whitebox:
    """How runs are looked into whose weights are at hand."""
    w, scored = study.config.whitebox, scoring_spec(study)
    plain = dict(vocab=scored.vocab, row_length=scored.row_length, precision=scored.precision, seed=study.config.seed)
    noise = dict(draws=w.draws, sigma=w.sigma, relative_sigma=w.relative_sigma)
    return Whitebox(**plain, **noise, batch_rows=w.batch_rows, forms=tuple(w.forms))


# ---------------------------------------------------------------------------------------------------------- models


def model_config(study: Study, name: str) -> ModelConfig:
    model = study.config.models[name]
    if model.path:
        return hf.read_config(model.path, revision=model.revision or None)
    sizes = model.scratch.to_dict() | {
        "vocab_size": study.vocab,
        "max_position_embeddings": study.config.data.max_length,
    }
    if "n_embd" in sizes:  # GPT-2's own name for the same key
        sizes["n_positions"] = sizes.pop("max_position_embeddings")
    return hf.config_from_hf(sizes)


def _check_model(study: Study, name: str) -> None:
    cfg, data, vocab = model_config(study, name), study.config.data, study.vocab
    if foreign.elsewhere(study.config):
        vocab = study.own_data.get(name, study.data).tokenizer.vocab_size
    if cfg.vocab_size < vocab:
        raise ConfigError(f"models.{name} has {cfg.vocab_size} vocabulary rows, the tokenizer {vocab} tokens")
    if cfg.max_positions < data.max_length:
        raise ConfigError(f"models.{name} has {cfg.max_positions} positions, data.max_length is {data.max_length}")
    path = study.config.models[name].path
    if path and study.config.tokenizer.path != path and not foreign.elsewhere(study.config):
        revision = study.config.models[name].revision
        tokenizer.same(study.data.tokenizer, tokenizer.load({"path": path, "revision": revision}))


def base_model(study: Study, run: Run, seed: int) -> Transformer:
    """A base: loaded tensor by tensor onto the mesh, or drawn from (config.seed, model, seed)."""
    model = study.config.models[run.model]
    if model.path:
        place = functools.partial(sharding.place, mesh=study.mesh)
        return hf.load_pretrained(model.path, revision=model.revision or None, place=place)
    return _draw(model_config(study, run.model), study.mesh)(key(study, f"init {run.model}", seed))


@functools.lru_cache(maxsize=8)
def _draw(config: ModelConfig, mesh: Mesh) -> Callable[[jax.Array], Transformer]:
    """Kept: every seed, and every stage that compares with the base, draws it again."""
    make = functools.partial(Transformer, config)
    return jax.jit(make, out_shardings=sharding.shardings(jax.eval_shape(make, jax.random.key(0)), mesh))


def number(study: Study, purpose: str, seed: int) -> int:
    """32 random bits for a purpose, from the study's seed and the run's."""
    word = hashlib.sha256(f"{study.config.seed} {purpose} {seed}".encode()).digest()
    return int.from_bytes(word[:4], "little")


def key(study: Study, purpose: str, seed: int) -> jax.Array:
    return jax.random.key(number(study, purpose, seed))


def load_run(study: Study, name: str, seed: int, params: storage.Path | None = None) -> Transformer:
    """The final parameters of a run, or those that `params` holds of it.

    Raises FileNotFoundError naming the run if it is not trained yet, and manifest.Damaged naming its damaged files."""
    run = study.runs[name]
    if not run.train_roles:
        return base_model(study, run, seed)
    folder = study.folder(run, seed)
    found = manifest.read(folder)
    if found is None:
        raise FileNotFoundError(f"run {name} seed {seed} is not trained yet: no manifest in {folder}")
    manifest.check(folder, manifest.digest(found))
    abstract = jax.eval_shape(functools.partial(Transformer, model_config(study, run.model)), jax.random.key(0))
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract,
        sharding.shardings(abstract, study.mesh),
    )
    return checkpoint.load_params(params or folder / "params", placed)


def named_files(config: ConfigDict) -> dict[str, str]:
    """Files and folders that the config names, by key."""
    named = {"data.path": config.data.path, "data.pretrain.path": config.data.pretrain.path}
    named |= {key: config[key] for key in ("members", "nonmembers", "prefix", "suffix") if key in config}
    named |= {"data.lm.path": config.data.lm.path, "data.exclude": excluded.path_of(config.data.exclude)}
    named |= {f"utility.files.{name}": path for name, path in config.utility.files.items()}
    named |= {f"models.{name}.path": model.path for name, model in config.models.items()}
    named |= {f"tokenizer.{key}": config.tokenizer[key] for key in ("path", "vocab", "merges", "json")}
    return {key: path for key, path in named.items() if path}


@functools.lru_cache(maxsize=1)
def code_version() -> str:
    """First 12 hex of a sha256 over the source files of both packages."""
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for path in sorted([*root.glob("kd_jax/**/*.py"), *root.glob("attacks/**/*.[ph][yt]*")]):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    from importlib.metadata import version

    return {p: version(p) for p in ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers")}
