"""A config as far as a plan needs it: its runs, the shapes of its models, its vocabulary, the size of its data.

Nothing is read but the config, `config.json` files, and, where the file is there, the number of records.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import huggingface_hub
import jax
from ml_collections import ConfigDict

from kd_jax import excluded, graph, hf, variants
from kd_jax.data import records, tokenizer
from kd_jax.data.roles import PLACEMENTS
from kd_jax.distill.objective import Objective
from kd_jax.errors import ConfigError
from kd_jax.graph import BASES, Run
from kd_jax.plan.published import PUBLISHED
from kd_jax.plan.stated import Stated
from kd_jax.study import objective_of, recipe_of
from kd_jax.train import Recipe
from kd_jax.transformer import ModelConfig

FILLED = 0.98  # of a packed row's tokens, on Dolly (kd_jax/data/batches.py)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model's shape and where it is known from."""

    cfg: ModelConfig
    source: str


@dataclasses.dataclass(frozen=True)
class Sketch:
    """What a plan knows of a config."""

    config: ConfigDict
    runs: dict[str, Run]
    shapes: dict[str, Shape]
    vocab: int
    records: int
    records_from: str
    stated: Stated

    @property
    def row_length(self) -> int:
        return self.config.data.row_length or self.config.data.max_length

    def recipe(self, run: Run) -> Recipe:
        return recipe_of(self.config, run)

    def objective(self, run: Run) -> Objective:
        return objective_of(self.config, run)

    def compares(self, run: Run) -> bool:
        """Whether a run's step holds its teacher, as `kd_jax.runs` decides."""
        o = self.objective(run)
        return run.technique not in BASES and (o.kd_ratio > 0 or o.lm_coef * o.lm_kd_ratio > 0)

    def examples(self, roles: tuple[str, ...]) -> int:
        """Records of roles, repeated ones as often; half of `calib` goes with `private`, the other with `heldout`."""
        shares, repeated = self.config.data.roles, self.config.data.repeated
        share = sum(shares.get(role, 0.0) for role in roles)
        share += shares.get("calib", 0.0) / 2 * len({"private", "heldout"} & set(roles))
        times = 1 + repeated.share * (sum(repeated.times) / len(repeated.times) - 1)
        return math.ceil(share * self.records * times)

    def scored_examples(self) -> int:
        """Examples of the roles that are scored."""
        shares, canaries = self.config.data.roles, self.config.data.canaries
        found = sum(math.ceil(shares.get(role, 0.0) * self.records) for role in self.config.score.roles)
        invented = canaries.per_cell * len(canaries.repeats) * len(PLACEMENTS)
        return found + (invented if "canary" in self.config.score.roles else 0)

    def kept(self, run: Run) -> int:
        """Checkpoints of a trained run, for each seed, that are kept for scoring."""
        count = self.config.score.trajectory
        if not count or not run.train_roles:
            return 0
        return min(count, self.steps(run) or count)  # of plain text to pre-train on the steps are not known

    def tables(self, run: Run) -> int:
        """How often the scored examples are scored for each seed of a run: as they are, as variants, by checkpoints."""
        copies = {"neighbours": variants.COPIES}
        return 1 + self.kept(run) + sum(copies.get(name, 1) for name in self.config.score.variants)

    def rows(self, examples: int, packed: bool) -> int:
        """Rows of so many records: of one epoch with `data.pack`, of a scoring pass always packed."""
        return math.ceil(examples * self.stated.record_tokens / self.row_length / FILLED) if packed else examples

    def searches(self, run: Run) -> int:
        """Seeds of a run with which every learning rate of its grid is tried, as `kd_jax.runs` decides."""
        rates, origin = self.recipe(run).rates, self.runs[run.swap_of or run.name]
        if len(rates) == 1:
            return 0
        if self.recipe(origin).rates != rates:
            return len(run.seeds)
        return 0 if run.swap_of else 1

    def fits(self, run: Run) -> int:
        """Trainings of a run: one a seed, and those of the other learning rates."""
        return len(run.seeds) + self.searches(run) * (len(self.recipe(run).rates) - 1)

    def steps(self, run: Run) -> int:
        """Optimiser steps of a run with one seed and one learning rate."""
        recipe = self.recipe(run)
        rows = self.rows(self.examples(run.train_roles), self.config.data.pack)
        return recipe.steps or math.ceil(recipe.epochs * rows / recipe.batch_rows)

    def scored(self, rows: int, packed: bool) -> int:
        """Scored tokens that so many rows hold."""
        stated = self.stated
        each = stated.scored_tokens
        if packed:
            each = self.row_length * FILLED * stated.scored_tokens / stated.record_tokens
        return math.ceil(rows * min(each, self.row_length))


def sketch(config: ConfigDict) -> Sketch:
    """Raises ConfigError for what a start would refuse, and for a model whose shape nothing here knows."""
    techniques = {name: objective.technique for name, objective in config.objectives.items()}
    parsed = graph.parse(config.runs.to_dict(), set(config.models), set(config.recipes), techniques)
    excluded.check(config, {run.name: run for run in parsed})
    vocab = _vocab(config)
    shapes = {name: _shape(config, name, vocab) for name in config.models}
    vocab = vocab or min(shape.cfg.vocab_size for shape in shapes.values())
    stated = Stated(**config.get("plan", {}))
    number, source = _records(config, stated)
    found = Sketch(config, {run.name: run for run in parsed}, shapes, vocab, number, source, stated)
    for run in parsed:
        if run.recipe:
            found.recipe(run)
        found.objective(run)
    return found


def check_rows(found: Sketch, mesh: jax.sharding.Mesh) -> None:
    """Rows of a micro-batch must divide over the mesh. Raises ConfigError as a start would, with what would do."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    used = {run.recipe: found.recipe(run).micro_batch_rows for run in found.runs.values() if run.recipe}
    wrong = {name: rows for name, rows in used.items() if rows % shards}
    if wrong:
        common = math.gcd(*used.values())
        rows = ", ".join(f"recipes.{name}: {rows} rows of a micro-batch" for name, rows in wrong.items())
        tensor = max(1, mesh.size // common)
        raise ConfigError(
            f"{rows} do not divide over {shards} devices (mesh.data x mesh.fsdp). The rows of all recipes divide over "
            f"{common}: of {mesh.size} devices set --config.mesh.tensor to {tensor} or more, or change batch_rows"
        )


def _shape(config: ConfigDict, name: str, vocab: int) -> Shape:
    model = config.models[name]
    if not model.path:
        sizes = model.scratch.to_dict()
        rows = {"vocab_size": vocab, "max_position_embeddings": config.data.max_length}
        if "n_embd" in sizes:
            rows["n_positions"] = rows.pop("max_position_embeddings")
        return Shape(hf.config_from_hf(sizes | rows), "scratch")
    file = Path(model.path) / "config.json"
    if not file.is_file():
        cached = huggingface_hub.try_to_load_from_cache(model.path, "config.json", revision=model.revision or None)
        file = Path(cached) if isinstance(cached, str) else file
    if file.is_file():
        return Shape(hf.config_from_hf(json.loads(file.read_text(encoding="utf-8"))), str(file))
    if model.path in PUBLISHED:
        keys = {k: v for k, v in PUBLISHED[model.path].items() if k != "tokenizer"}
        return Shape(hf.config_from_hf(keys), "table of published shapes (kd_jax/plan/published.py)")
    try:
        file = Path(huggingface_hub.hf_hub_download(model.path, "config.json", revision=model.revision or None))
    except Exception as error:  # whatever the hub or the network says
        raise ConfigError(
            f"models.{name}: {model.path} is no folder with a config.json, the hub does not answer and the table of "
            f"published shapes does not know it ({type(error).__name__}): give a folder that holds its config.json"
        ) from error
    return Shape(hf.config_from_hf(json.loads(file.read_text(encoding="utf-8"))), f"hub: {model.path}")


def _vocab(config: ConfigDict) -> int:
    """The tokenizer's size, where something here knows it, else 0."""
    spec, teacher = config.tokenizer.to_dict(), config.models.teacher.path
    if spec["train_size"]:
        return spec["train_size"]
    path = spec["path"] or teacher
    if spec["vocab"] or spec["json"] or (path and Path(path).is_dir()):
        try:
            return tokenizer.load(spec if spec["vocab"] or spec["json"] else {"path": path}).vocab_size
        except (OSError, ValueError):  # a folder that holds config.json alone
            return 0
    return PUBLISHED.get(path, {}).get("tokenizer", 0)


def _records(config: ConfigDict, stated: Stated) -> tuple[int, str]:
    data = config.data
    if data.synthetic.records:
        return data.synthetic.records, "data.synthetic.records"
    if data.path and Path(data.path).is_file():
        fields = {ours: theirs for ours, theirs in data.fields.items() if theirs}
        frame = records.load(data.path, format=data.format, text_unit=data.text_unit, fields=fields, seed=config.seed)
        size = sum(frame[c].fillna("").str.len() for c in ("instruction", "input", "response"))
        count = int(
            (~frame.task.isin(data.exclude_tasks) & ((size <= data.max_chars) if data.max_chars else True)).sum()
        )
        return min(count, data.limit or count), data.path
    return min(stated.records, data.limit or stated.records), "plan.records"
