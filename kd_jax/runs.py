"""The graph of runs, trained one after another: data, teacher text and learning rate of each, and what it leaves.

workdir/runs/<name>/seed<k>/       checkpoints/, params/, ledger.parquet, metrics.jsonl, events, manifest.json
workdir/runs/<name>/seed<k>/lr<x>/ the same of each learning rate that was tried, where the recipe has a grid
workdir/generated/<teacher>/...    teacher text;  workdir/cache/<teacher>/...  hidden states of a teacher on fixed data
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable

import numpy as np
from sklearn.metrics import roc_auc_score

from kd_jax import (
    checkpoint,
    excluded,
    loop,
    manifest,
    prepare,
    processes,
    sharding,
    storage,
    teacher_cache,
    train,
    utility,
)
from kd_jax import score as scoring
from kd_jax.data import batches
from kd_jax.data.encode import Encoded
from kd_jax.distill import feeds, ledger, teacher_text
from kd_jax.distill.objective import Objective
from kd_jax.distill.policies import DATASET, SOURCES, STUDENT, TEACHER
from kd_jax.errors import ConfigError
from kd_jax.generate import Sampling, generate
from kd_jax.graph import BASES, Run
from kd_jax.storage import Path
from kd_jax.study import (
    Study,
    answer_set,
    base_model,
    code_version,
    key,
    load_run,
    named_files,
    number,
    objective_of,
    recipe_of,
    sampling_spec,
    scoring_spec,
    versions,
)
from kd_jax.transformer import Transformer

log = logging.getLogger(__name__)


def train_runs(study: Study) -> None:
    """Train every run that is not finished, in the order of the graph. Settings are checked before the first.

    Runs that leave out what a filter found wait for its list.
    """
    ready = study.ready()
    for run, seed in ready:
        if run.train_roles:
            _check(study, run, seed)
    for run, seed in ready:
        if run.train_roles:
            _train(study, run, seed)


def _check(study: Study, run: Run, seed: int) -> None:
    """What can be known of a run before anything is compiled. Raises ConfigError naming the key."""
    config, recipe, objective = study.config, recipe_of(study.config, run), objective_of(study.config, run)
    kept = config.checkpoints
    checks = [
        (kept.keep >= 1 and kept.finished >= 0, "checkpoints.keep must be at least 1, checkpoints.finished at least 0"),
        (not objective.lm_coef or config.data.lm.path, f"objectives.{run.objective_name}.lm_coef needs data.lm.path"),
        (
            recipe.select != "best_dev_rouge" or config.probe.rouge_examples,
            f"recipes.{run.recipe}.select best_dev_rouge needs probe.rouge_examples above 0",
        ),
        (
            recipe.cache == "none" or storage.is_local(study.workdir),
            f"recipes.{run.recipe}.cache needs a local --workdir: a cache is mapped into memory",
        ),
        (
            objective.prefix < config.data.max_length,
            f"objectives.{run.objective_name}.prefix must be below data.max_length",
        ),
    ]
    for good, message in checks:
        if not good:
            raise ConfigError(f"runs.{run.name}: {message}")
    if objective.on_policy or objective.policy == "teacher":
        encoded = _without(study, run, study.data.of_run(run.train_roles))
        feeds.check_prompts(encoded, objective.prefix)
        rows, _ = _training_rows(study, run, seed, recipe, encoded)
        feeds.check_capacity(objective, rows.largest_batch(recipe.batch_rows))


def _train(study: Study, run: Run, seed: int) -> None:
    folder, inputs = study.folder(run, seed), _inputs(study, run, seed)
    if manifest.begin(folder, inputs, f"run {run.name} seed {seed}"):
        log.info("%s seed %d: finished before", run.name, seed)
        _prune(study, folder)
        return
    recipe, objective = recipe_of(study.config, run), objective_of(study.config, run)
    rates, source = _rates(study, run, seed, recipe)
    fit = lambda lr, place: _fit(study, run, seed, dataclasses.replace(recipe, lr=lr, lr_grid=()), objective, place)
    if len(rates) == 1:
        facts = fit(rates[0], folder)
        grid = [{"lr": facts["lr"], "dev_loss": facts["dev"]["eval/dev_loss"]}]
    else:
        facts, grid = _search(folder, rates, fit)
    facts |= {"grid": grid, "lr_from": source, "code_version": code_version(), "versions": versions()}
    manifest.end(folder, inputs, facts)
    _prune(study, folder)
    _report(study, f"{run.name} seed{seed}", facts)


def _prune(study: Study, folder: Path) -> None:
    """Of a finished run, and of each learning rate that it tried, keep no more training states than the config says."""
    for place in (folder, *sorted(folder.glob("lr*"))):
        checkpoint.prune(place / "checkpoints", study.config.checkpoints.finished)


def _search(folder: Path, rates: tuple[float, ...], fit: Callable[[float, Path], dict]) -> tuple[dict, list[dict]]:
    """Train every learning rate in a folder of its own; the one of least dev loss moves to `folder`.

    Returns its facts and the whole grid. A rate at which training diverges has dev loss None and is out of the choice.
    """
    tried: dict[float, dict] = {}
    for lr in rates:
        place = folder / f"lr{lr:g}"
        if (found := manifest.intact(place)) is None:
            try:
                facts = fit(lr, place)
            except FloatingPointError as error:
                log.warning("%s", error)
                facts = {"lr": lr, "dev": {"eval/dev_loss": None}}
            manifest.write(place, {"lr": lr}, facts)
            found = {"facts": facts}
        tried[lr] = found["facts"]
    grid = [{"lr": lr, "dev_loss": facts["dev"]["eval/dev_loss"]} for lr, facts in tried.items()]
    finished = [point for point in grid if point["dev_loss"] is not None]
    if not finished:
        raise FloatingPointError(f"{folder}: training diverged at every learning rate of {rates}")
    best = min(finished, key=lambda point: point["dev_loss"])["lr"]

    def take() -> None:
        storage.copytree(folder / f"lr{best:g}" / "params", folder / "params")
        storage.copy(folder / f"lr{best:g}" / "ledger.parquet", folder / "ledger.parquet")
        if (folder / f"lr{best:g}" / "trajectory").exists():
            storage.copytree(folder / f"lr{best:g}" / "trajectory", folder / "trajectory")

    processes.once(take, f"best learning rate of {folder}")
    facts = tried[best]
    if best in (min(rates), max(rates)):
        edge = f"learning rate {best:g} is at the edge of its grid: a wider one may do better"
        facts = facts | {"warnings": [*facts.get("warnings", ()), edge]}
    return facts, grid


def _rates(study: Study, run: Run, seed: int, recipe: train.Recipe) -> tuple[tuple[float, ...], str]:
    """The learning rates to try, and where a single one was picked.

    A grid is searched once, with the run's first seed; the others, and the counterfactual of the run, take its result.
    """
    origin = study.runs[run.swap_of or run.name]
    if len(recipe.rates) == 1 or recipe_of(study.config, origin).rates != recipe.rates:
        return recipe.rates, "recipe"
    if origin.name == run.name and seed == run.seeds[0]:
        return recipe.rates, "grid"
    found = manifest.read(study.folder(origin, origin.seeds[0]))
    if found is None:
        raise FileNotFoundError(
            f"run {run.name} seed {seed} takes its learning rate from {origin.name} seed {origin.seeds[0]}, which is "
            "not trained yet"
        )
    return (found["facts"]["lr"],), f"{origin.name} seed {origin.seeds[0]}"


def _fit(study: Study, run: Run, seed: int, recipe: train.Recipe, objective: Objective, folder: Path) -> dict:
    """Train one learning rate into `folder`; returns the facts of its manifest."""
    uses_teacher = run.technique not in BASES
    load_teacher = functools.partial(load_run, study, run.teacher, _teacher_seed(study, run, seed))
    encoded = _training_data(study, run, seed, objective, load_teacher)
    rows, steps = _training_rows(study, run, seed, recipe, encoded)
    iterators = {"data": _iterator(study, rows, recipe)}
    plain = _plain_text(study, recipe, steps, seed) if objective.lm_coef else None
    if plain is not None:
        iterators["lm"] = _iterator(study, plain[1], recipe)
    init = load_run(study, run.init, study.runs[run.init].seed_for(seed)) if run.init else base_model(study, run, seed)
    # Cross entropy on teacher text needs the teacher no more.
    compares = objective.kd_ratio > 0 or objective.lm_coef * objective.lm_kd_ratio > 0
    teacher = load_teacher() if uses_teacher and compares else None
    feed = _feed(study, run, seed, recipe, objective, encoded, rows, iterators["data"], steps, teacher)
    task = loop.Task(
        label=f"{run.name} seed{seed}" + (f" lr {recipe.lr:g}" if folder.name.startswith("lr") else ""),
        folder=folder,
        steps=steps,
        feed=feed,
        evaluate=_evaluator(study),
        iterators=iterators,
        keep=study.config.checkpoints.keep,
        trajectory=study.config.score.trajectory,
    )
    rng = key(study, f"train {run.name}", seed)
    done = loop.fit(init, teacher, recipe, objective, task, vocab=study.vocab, rng=rng, mesh=study.mesh)
    checkpoint.save_params(folder / "params", done.model)
    plain_ids = None if plain is None else plain[0].example_id
    used = ledger.summarize(folder / "ledger", objective, teacher is not None, encoded.record_id, plain_ids)
    role = study.data.splits.set_index("example_id").role.reindex(used.example_id)
    used.insert(1, "role", np.where(used.source == "lm_corpus", "", role.fillna("")))
    table = used.to_parquet(index=False)
    processes.once(lambda: storage.write_bytes(folder / "ledger.parquet", table), f"ledger of {folder}")
    from_data = used[used.source != "lm_corpus"]
    for warning in done.feed.get("warnings", ()):
        log.warning("%s: %s", task.label, warning)
    return dict(
        params_fingerprint=checkpoint.fingerprint(done.model),
        lr=recipe.lr,
        steps=steps,
        select=recipe.select,
        selected_step=done.step,
        step=done.step,
        dev=done.dev,
        examples=len(encoded),
        **_facts_excluded(study, run),
        response_tokens=int(from_data.tokens.sum()),
        sources={str(k): int(v) for k, v in from_data.groupby(_source_label(from_data)).tokens.sum().items()},
        fidelity=objective.fidelity,
        trajectory=sorted(loop.marks(steps, task.trajectory)) if task.trajectory else [],
        **done.feed,
    )


def _source_label(used) -> np.ndarray:
    return np.where(used.replayed & (used.source == SOURCES[STUDENT]), "replay", used.source)


def _feed(study: Study, run: Run, seed, recipe, objective, encoded, rows, iterator, steps, teacher) -> feeds.DataFeed:
    data = study.config.data
    slots = sharding.own_rows(study.mesh, recipe.micro_batch_rows)
    shapes = feeds.Shapes(
        recipe.micro_batch_rows, data.row_length or data.max_length, data.max_length, data.pack, slots
    )
    if not objective.on_policy:
        cache = _cache(study, run, seed, recipe, objective, encoded, teacher)
        return feeds.DataFeed(encoded, iterator, shapes, TEACHER if objective.policy == "teacher" else DATASET, cache)
    sample = _sampler(study, recipe, objective.sampling(data.max_length))
    word, largest = number(study, f"samples {run.name}", seed), rows.largest_batch(recipe.batch_rows)
    if objective.policy_gradient:
        measure = train.make_measure(objective, recipe, study.vocab, study.mesh)
        return feeds.RolloutFeed(encoded, iterator, shapes, objective, sample, measure, seed=word, largest=largest)
    return feeds.SampledFeed(encoded, iterator, shapes, objective, sample, steps=steps, seed=word, largest=largest)


def _sampler(study: Study, recipe: train.Recipe, sampling: Sampling) -> feeds.Sampler:
    def sample(model, tokens, lengths, keys, limits, seed, teacher):
        return generate(
            model,
            tokens,
            lengths,
            keys,
            sampling,
            vocab=study.vocab,
            eos_id=study.data.tokenizer.eos_id,
            seed=seed,
            mesh=study.mesh,
            teacher=teacher,
            limits=np.minimum(limits, sampling.max_new_tokens),
            dtype=train.DTYPES[recipe.compute_dtype],
        )

    return sample


def _cache(study: Study, run: Run, seed: int, recipe, objective: Objective, encoded: Encoded, teacher):
    """The teacher's side of a run on fixed data, computed once, or None."""
    if recipe.cache == "none" or teacher is None:
        return None
    spec = teacher_cache.CacheSpec(
        kind=recipe.cache,
        dtype=recipe.cache_dtype,
        k=recipe.cache_k if recipe.cache == "top_k" else 0,
        row_length=study.config.data.row_length or study.config.data.max_length,
        batch_rows=recipe.micro_batch_rows,
        temperature=objective.teacher_T,
        compute_dtype=recipe.compute_dtype,
    )
    inputs = {"teacher": checkpoint.fingerprint(teacher), "tokenizer": study.data.tokenizer.fingerprint}
    folder = study.workdir / "cache" / run.teacher / f"seed{_teacher_seed(study, run, seed)}"
    folder /= manifest.digest([inputs, spec.identity, encoded.fingerprint()])
    return teacher_cache.build(folder, teacher, encoded, spec, study.mesh, inputs, study.vocab)


# ------------------------------------------------------------------------------------------------------------ data


def _training_data(study: Study, run: Run, seed: int, objective: Objective, load_teacher: Callable) -> Encoded:
    if run.technique == "none":  # a base pre-trained from scratch
        return prepare.plain_text(study.config, study.data.tokenizer, "pretrain")
    encoded = study.data.of_run(run.train_roles)
    if objective.policy != "teacher":
        return _without(study, run, encoded)
    teacher_seed = _teacher_seed(study, run, seed)
    sampling = objective.sampling(study.config.data.max_length)
    recipe = recipe_of(study.config, run)
    inputs = {
        "teacher": _identity(study, run.teacher, teacher_seed),
        "sampling": dataclasses.asdict(sampling),
        "compute_dtype": recipe.compute_dtype,
        "tokenizer": study.data.tokenizer.fingerprint,
        "roles": list(run.train_roles),
    }
    digest = manifest.digest([inputs, objective.prefix])
    text = teacher_text.generate_text(  # of all records: runs that leave some out share it with those that do not
        study.workdir / "generated" / run.teacher / f"seed{teacher_seed}" / digest,
        encoded,
        _sampler(study, recipe, sampling),
        load_teacher,
        prefix=objective.prefix,
        max_length=study.config.data.max_length,
        seed=number(study, f"text {run.teacher}", teacher_seed),
        inputs=inputs,
        label=f"text of {run.teacher} seed{teacher_seed}",
    )
    return _without(study, run, text)


def _left_out(study: Study, run: Run) -> frozenset[str]:
    """The ids that a run is not trained on, whatever its roles; a base's plain text has none."""
    if run.technique == "none":
        return frozenset()
    return study.data.excluded | excluded.of_run(study.workdir, run, study.data.ids)


def _without(study: Study, run: Run, encoded: Encoded) -> Encoded:
    """The examples that a run is trained on. Raises ConfigError where none is left."""
    ids = _left_out(study, run)
    if not ids:
        return encoded
    keep = ~excluded.inside(encoded.example_id, encoded.record_id, ids)
    if not keep.any():
        raise ConfigError(f"runs.{run.name}: data.exclude and exclude leave nothing of {len(encoded)} examples")
    return encoded.take(np.flatnonzero(keep))


def _facts_excluded(study: Study, run: Run) -> dict:
    """Different examples of a run's roles that it is not trained on, and their share of the data, repeats counted."""
    ids = _left_out(study, run)
    if not ids:
        return {"excluded": 0, "excluded_exposures": 0.0}
    encoded = study.data.of_run(run.train_roles)
    gone = excluded.inside(encoded.example_id, encoded.record_id, ids)
    return {"excluded": len(np.unique(encoded.example_id[gone])), "excluded_exposures": float(gone.mean())}


def _training_rows(
    study: Study, run: Run, seed: int, recipe: train.Recipe, encoded: Encoded
) -> tuple[batches.TrainingRows, int]:
    """The rows of all epochs, and the optimiser steps; `recipe.steps` takes as many epochs as it needs."""
    make = _rows_of(study, encoded, _order_seed(study, run, seed))
    if not recipe.steps:
        rows = make(epochs=recipe.epochs)
        return rows, -(-len(rows) // recipe.batch_rows)
    return _enough(make, recipe.steps * recipe.batch_rows), recipe.steps


def _rows_of(study: Study, encoded: Encoded, seed: int) -> Callable[..., batches.TrainingRows]:
    data = study.config.data
    length = data.row_length or data.max_length
    return functools.partial(batches.TrainingRows, encoded, row_length=length, packed=data.pack, seed=seed)


def _enough(make: Callable[..., batches.TrainingRows], wanted: int) -> batches.TrainingRows:
    """Rows of as many epochs as make `wanted` of them; epochs pack differently."""
    epochs = -(-wanted // len(make(epochs=1)))
    while len(rows := make(epochs=epochs)) < wanted:
        epochs += 1
    return rows


def _plain_text(study: Study, recipe: train.Recipe, steps: int, seed: int):
    """Windows of the language-model term's plain text, and their rows."""
    encoded = prepare.plain_text(study.config, study.data.tokenizer, "lm")
    make = _rows_of(study, encoded, number(study, "order lm", seed))
    return encoded, _enough(make, steps * recipe.batch_rows)


def _iterator(study: Study, rows: batches.TrainingRows, recipe: train.Recipe):
    slots = sharding.own_rows(study.mesh, recipe.micro_batch_rows)
    first = np.arange(0, recipe.batch_rows, recipe.micro_batch_rows)  # of every micro-batch
    return batches.training_iterator(rows, batch_rows=recipe.batch_rows, own=np.add.outer(first, slots).reshape(-1))


def _order_seed(study: Study, run: Run, seed: int) -> int:
    """Runs on the same roles see the same order, so that they differ in what their config says and nothing else."""
    return number(study, f"order {','.join(run.train_roles)}", seed)


def _teacher_seed(study: Study, run: Run, seed: int) -> int:
    return study.runs[run.teacher].seed_for(seed) if run.teacher else 0


def _identity(study: Study, name: str, seed: int):
    """What identifies the parameters of an earlier run: their fingerprint, or where a base comes from."""
    run = study.runs[name]
    if not run.train_roles:
        return study.config.models[run.model].to_dict()
    found = manifest.read(study.folder(run, seed))
    if found is None:
        raise FileNotFoundError(f"run {name} seed {seed} is needed here and not trained yet")
    return found["facts"]["params_fingerprint"]


def _read(objective: Objective) -> set[str]:
    """Files that training depends on besides the records, by their keys."""
    files = {"data.pretrain.path", *(f"tokenizer.{key}" for key in ("path", "vocab", "merges", "json"))}
    return files | {"models.teacher.path", "models.student.path"} | ({"data.lm.path"} if objective.lm_coef else set())


def _answers(study: Study) -> dict:
    """How dev prompts are answered where ROUGE selects a checkpoint."""
    return dataclasses.asdict(sampling_spec(study)) | {"seed": study.config.utility.seeds[:1]}


def _inputs(study: Study, run: Run, seed: int) -> dict:
    """What decides a run's result. Earlier runs enter by the fingerprint of their parameters."""
    named = {kind: name for kind in ("init", "teacher") if (name := getattr(run, kind))}
    earlier = {kind: _identity(study, name, study.runs[name].seed_for(seed)) for kind, name in named.items()}
    recipe, objective = recipe_of(study.config, run), objective_of(study.config, run)
    own, ids = dataclasses.asdict(run) | {"seeds": [seed]}, sorted(_left_out(study, run))
    if not run.exclude:
        del own["exclude"]  # so that runs which were trained before there was this key stay finished
    return dict(
        run=own,
        **({"excluded": manifest.digest(ids)} if ids else {}),
        seed=study.config.seed,
        model=study.config.models[run.model].to_dict(),
        recipe=dataclasses.asdict(recipe),
        answers=_answers(study) if recipe.select == "best_dev_rouge" else {},
        objective=dataclasses.asdict(objective),
        earlier=earlier,
        rows=[study.config.data[k] for k in ("pack", "row_length", "max_length")],
        lm=study.config.data.lm.to_dict() if objective.lm_coef else {},
        lr=_rates(study, run, seed, recipe)[0],
        probe=study.config.probe.to_dict(),
        **({"trajectory": study.config.score.trajectory} if study.config.score.trajectory else {}),
        files={key: manifest.stamp(path) for key, path in named_files(study.config).items() if key in _read(objective)},
        **study.data.fingerprints(),
    )


# ------------------------------------------------------------------------------------------------------ evaluation


def _evaluator(study: Study):
    """`evaluate(model)`: loss of `dev`, AUC of the loss attack, ROUGE-L where asked for; all on fixed samples."""
    probe, spec = study.config.probe, scoring_spec(study)
    samples = {role: study.data.of_role(role) for role in ("dev", "private", "heldout")}
    rouge_examples = probe.rouge_examples

    def evaluate(model: Transformer) -> dict[str, float]:
        means, dev = {}, 0.0
        for role, encoded in samples.items():
            indices = np.arange(min(probe.examples, len(encoded)))
            counts, fields = scoring.score(model, encoded, indices, spec, study.mesh)
            if not np.isfinite(fields["logp"]).all():
                return {"eval/dev_loss": float("nan")}
            sums = np.add.reduceat(fields["logp"].astype(np.float64), np.concatenate([[0], np.cumsum(counts)[:-1]]))
            means[role] = sums / counts
            dev = -sums.sum() / counts.sum() if role == "dev" else dev
        labels = np.repeat([1, 0], [len(means["private"]), len(means["heldout"])])
        auc = roc_auc_score(labels, np.concatenate([means["private"], means["heldout"]]))
        row = {"eval/dev_loss": float(dev), "probe/loss_attack_auc": float(auc)}
        if rouge_examples:
            answered = answer_set(
                study, model, "dev", seeds=study.config.utility.seeds[:1] or (10,), limit=rouge_examples
            )
            row["eval/rouge_l"] = utility.means(answered)["rouge_l"]
        return row

    return evaluate


def _report(study: Study, label: str, facts: dict) -> None:
    roles = study.data.splits.role
    n = min(study.config.probe.examples, *(int((roles == r).sum()) for r in ("private", "heldout")))
    auc = facts["dev"]["probe/loss_attack_auc"]
    picked = f", learning rate {facts['lr']:g} of {len(facts['grid'])}" if len(facts["grid"]) > 1 else ""
    log.info(
        "%s: dev loss %.3f%s, loss attack on a probe of %d members and %d non-members: AUC %.3f +- %.3f",
        *(label, facts["dev"]["eval/dev_loss"], picked, n, n, auc, 1.96 * _auc_error(auc, n)),
    )


def _auc_error(auc: float, n: int) -> float:
    """Standard error of an AUC on `n` members and `n` non-members (Hanley and McNeil 1982); the report uses DeLong."""
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    return float(np.sqrt((auc * (1 - auc) + (n - 1) * (q1 + q2 - 2 * auc**2)) / n**2))
