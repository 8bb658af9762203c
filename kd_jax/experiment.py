"""An experiment: the graph of runs trained and scored under one work directory, each piece once.

workdir/splits.parquet, tokenizer/          roles and tokenizer
workdir/runs/<name>/seed<k>/                checkpoints/, params/, metrics.jsonl, TensorBoard events, manifest.json
workdir/scores/<name>/seed<k>/plain/        score tables and manifest.json
workdir/scores/text/                        what text-only classifiers need
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from sklearn.metrics import roc_auc_score

from kd_jax import checkpoint, hf, manifest, prepare, train
from kd_jax import score as scoring
from kd_jax.data import batches, encode
from kd_jax.data.encode import Encoded
from kd_jax.graph import Run
from kd_jax.metrics import progress
from kd_jax.study import Study, base_model, code_version, key, load_run, recipe_of, scoring_spec, versions
from kd_jax.transformer import Transformer

log = logging.getLogger(__name__)


# ----------------------------------------------------------------------------------------------------------- train


def train_runs(study: Study) -> None:
    """Train every run that is not finished, in the order of the graph."""
    for run, seed in study.nodes:
        if run.train_roles:
            _train(study, run, seed)


def _train(study: Study, run: Run, seed: int) -> None:
    folder, inputs = study.folder(run, seed), _inputs(study, run, seed)
    if manifest.begin(folder, inputs, f"run {run.name} seed {seed}"):
        log.info("%s seed %d: finished before", run.name, seed)
        return
    recipe = recipe_of(study.config, run)
    encoded = _training_data(study, run)
    rows, steps = _training_rows(study, run, seed, recipe, encoded)
    task = train.Task(
        label=f"{run.name} seed{seed}",
        folder=folder,
        steps=steps,
        iterator=batches.training_iterator(
            rows, batch_rows=recipe.batch_rows, process_index=jax.process_index(), process_count=jax.process_count()
        ),
        evaluate=_evaluator(study),
    )
    init = load_run(study, run.init, study.runs[run.init].seed_for(seed)) if run.init else base_model(study, run, seed)
    teacher = load_run(study, run.teacher, study.runs[run.teacher].seed_for(seed)) if run.teacher else None
    model = train.fit(
        init, teacher, recipe, task, vocab=study.vocab, rng=key(study, f"train {run.name}", seed), mesh=study.mesh
    )
    checkpoint.save_params(folder / "params", model)
    facts = dict(
        params_fingerprint=checkpoint.fingerprint(model),
        step=task.steps,
        examples=len(encoded),
        code_version=code_version(),
        versions=versions(),
    )
    manifest.end(folder, inputs, facts)
    last = task.evaluate(model)
    n = min(study.config.probe.examples, *(sum(study.data.splits.role == r) for r in ("private", "heldout")))
    auc = last["probe/loss_attack_auc"]
    log.info(
        "%s: dev loss %.3f, loss attack on a probe of %d members and %d non-members: AUC %.3f +- %.3f",
        *(task.label, last["eval/dev_loss"], n, n, auc, 1.96 * _auc_error(auc, n)),
    )


def _auc_error(auc: float, n: int) -> float:
    """Standard error of an AUC on `n` members and `n` non-members (Hanley and McNeil 1982); the report uses DeLong."""
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    return float(np.sqrt((auc * (1 - auc) + (n - 1) * (q1 + q2 - 2 * auc**2)) / n**2))


def _training_rows(
    study: Study, run: Run, seed: int, recipe: train.Recipe, encoded: Encoded
) -> tuple[batches.TrainingRows, int]:
    """The rows of all epochs, and the optimiser steps; `recipe.steps` takes as many epochs as it needs."""
    data = study.config.data
    make = functools.partial(
        batches.TrainingRows,
        encoded,
        row_length=data.row_length or data.max_length,
        packed=data.pack,
        seed=_order_seed(study, run, seed),
    )
    if not recipe.steps:
        rows = make(epochs=recipe.epochs)
        return rows, -(-len(rows) // recipe.batch_rows)
    epochs = -(-recipe.steps * recipe.batch_rows // len(make(epochs=1)))
    while len(rows := make(epochs=epochs)) < recipe.steps * recipe.batch_rows:  # epochs pack differently
        epochs += 1
    return rows, recipe.steps


def _training_data(study: Study, run: Run) -> Encoded:
    if run.technique == "none":  # a base pre-trained from scratch
        return prepare.pretraining(study.config, study.data.tokenizer)
    return study.data.of_run(run.train_roles)


def _order_seed(study: Study, run: Run, seed: int) -> int:
    """Runs on the same roles see the same order, so that they differ in what their config says and nothing else."""
    word = hashlib.sha256(f"{study.config.seed} order {','.join(run.train_roles)} {seed}".encode()).digest()
    return int.from_bytes(word[:4], "little")


def _inputs(study: Study, run: Run, seed: int) -> dict:
    """What decides a run's result. Earlier runs enter by the fingerprint of their parameters."""
    earlier = {}
    for kind in ("init", "teacher"):
        if name := getattr(run, kind):
            source = study.runs[name]
            found = manifest.read(study.folder(source, source.seed_for(seed))) if source.train_roles else None
            if source.train_roles and found is None:
                raise FileNotFoundError(f"run {run.name} needs {name}, which is not trained yet")
            earlier[kind] = (
                found["facts"]["params_fingerprint"] if found else study.config.models[source.model].to_dict()
            )
    return dict(
        run=dataclasses.asdict(run) | {"seeds": [seed]},
        seed=study.config.seed,
        model=study.config.models[run.model].to_dict(),
        recipe=dataclasses.asdict(recipe_of(study.config, run)),
        earlier=earlier,
        rows=[study.config.data[k] for k in ("pack", "row_length", "max_length")],
        files={key: manifest.stamp(path) for key, path in _files(study.config).items() if key != "data.path"},
        **study.data.fingerprints(),
    )


def _evaluator(study: Study):
    """`evaluate(model)`: loss on fixed samples of `dev` and the loss attack's AUC on fixed members and non-members."""
    n, spec = study.config.probe.examples, scoring_spec(study)
    samples = {role: study.data.of_role(role) for role in ("dev", "private", "heldout")}

    def evaluate(model: Transformer) -> dict[str, float]:
        means, dev = {}, 0.0
        for role, encoded in samples.items():
            indices = np.arange(min(n, len(encoded)))
            counts, fields = scoring.score(model, encoded, indices, spec, study.mesh)
            sums = np.add.reduceat(fields["logp"].astype(np.float64), np.concatenate([[0], np.cumsum(counts)[:-1]]))
            means[role] = sums / counts
            dev = -sums.sum() / counts.sum() if role == "dev" else dev
        labels = np.repeat([1, 0], [len(means["private"]), len(means["heldout"])])
        auc = roc_auc_score(labels, np.concatenate([means["private"], means["heldout"]]))
        return {"eval/dev_loss": float(dev), "probe/loss_attack_auc": float(auc)}

    return evaluate


# ----------------------------------------------------------------------------------------------------------- score


def score_runs(study: Study) -> None:
    """Score every run on every scored role, and write the text tables."""
    prepare.write_text_tables(study.data, study.workdir / "scores" / "text")
    roles = {r: study.data.of_role(r) for r in study.config.score.roles}
    roles = {r: e for r, e in roles.items() if len(e)}
    for run, seed in study.nodes:
        _score(study, run, seed, roles)
    if study.config.report.show_canaries and not study.only:
        _show_canaries(study)


def _score(study: Study, run: Run, seed: int, roles: dict[str, Encoded]) -> None:
    folder = study.folder(run, seed, "scores") / "plain"
    trained = manifest.read(study.folder(run, seed)) if run.train_roles else None
    base = study.config.models[run.model]
    source = (
        trained["facts"]["params_fingerprint"] if trained else base.to_dict() | {"files": manifest.stamp(base.path)}
    )
    spec = scoring_spec(study)
    inputs = dict(
        model=source,
        scoring=dataclasses.asdict(spec),
        roles=sorted(roles),
        seed=study.config.seed,
        **study.data.fingerprints(),
    )
    if manifest.begin(folder, inputs, f"scores of {run.name} seed {seed}"):
        log.info("%s seed %d: scored before", run.name, seed)
        return
    model = load_run(study, run.name, seed)
    facts = dict(params_fingerprint=checkpoint.fingerprint(model), code_version=code_version())
    metadata = _metadata(study, run, seed, model, facts, trained, spec)
    with progress(sum(map(len, roles.values())), f"score {run.name} seed{seed}", unit="example") as bar:
        for role, encoded in roles.items():
            scoring.score_role(model, encoded, role, folder, spec, study.mesh, metadata, bar)
    manifest.end(folder, inputs, facts)


def _metadata(study: Study, run: Run, seed: int, model: Transformer, facts: dict, trained: dict | None, spec):
    """Parquet metadata: what the table is, so that no program parses paths."""
    provenance = dict(
        technique=run.technique,
        setting=run.setting,
        train_roles=list(run.train_roles),
        teacher=run.teacher or None,
        init=run.init or None,
        recipe=run.recipe or None,
        swap_of=run.swap_of or None,
        n_params=sum(int(x.size) for x in jax.tree.leaves(model)),
        tokenizer_fingerprint=study.data.tokenizer.fingerprint,
        splits_fingerprint=prepare.splits_fingerprint(study.data.splits),
        dtype="float32",
        matmul_precision=spec.precision,
        bos=study.config.data.bos,
        **facts,
    )
    step = trained["facts"]["step"] if trained else 0
    known = dict(run=run.name, seed=seed, split_seed=study.config.seed, step=step, variant="plain")
    return {k: str(v) for k, v in known.items()} | {"provenance": json.dumps(provenance)}


def _show_canaries(study: Study) -> None:
    """What models make of the invented canaries that went to the teacher alone; the report chooses which it prints.

    The guess is each model's most probable token at every position of the true response (teacher-forced).
    """
    splits = study.data.splits
    inserted = splits[(splits.role == "canary") & (splits.coin == 1) & (splits.placement == "teacher_only")]
    if inserted.empty:
        return
    encoded = study.data.encoded.select(inserted.example_id)
    frame = study.data.frame.set_index("example_id")
    rows = [
        dict(
            example_id=r.example_id,
            prompt=frame.instruction[r.example_id],
            response=frame.response[r.example_id],
            repeats=int(r.repeats),
            placement=r.placement,
            coin=int(r.coin),
            models={},
        )
        for r in inserted.itertuples()
    ]
    for name in ("teacher", study.config.attack.headline, "null"):
        if name not in study.runs:
            continue
        model = load_run(study, name, study.runs[name].seeds[0])
        counts, fields = scoring.score(model, encoded, np.arange(len(rows)), scoring_spec(study), study.mesh)
        ends = np.cumsum(counts)
        for row, start, end in zip(rows, ends - counts, ends):
            response = fields["segment"][start:end] == encode.RESPONSE
            guess = study.data.tokenizer.decode(fields["top1_id"][start:end][response].tolist())
            row["models"][name] = dict(guess=guess, mean_logp=float(fields["logp"][start:end].mean()))
    (study.workdir / "scores" / "text" / "canaries.json").write_text(json.dumps(rows, indent=1))


# ---------------------------------------------------------------------------------------------------------- result


def export(study: Study, name: str, folder: Path) -> None:
    """Write a run (its first seed) and the tokenizer as a Hugging Face folder, which must be new or empty."""
    run = study.runs[name]
    model = study.config.models[run.model]
    family = hf.read_family(model.path, revision=model.revision or None) if model.path else model.scratch.model_type
    eos = study.data.tokenizer.eos_id
    hf.save_pretrained(load_run(study, name, run.seeds[0]), folder, family=family, token_ids={"eos_token_id": eos})
    study.data.tokenizer.save(folder)
    log.info("%s written to %s", name, folder)


def audit_settings(study: Study) -> dict:
    """What the audit needs to know besides the score tables."""
    config = study.config
    return dict(
        title=config.title,
        primary=config.attack.primary,
        references=list(config.attack.references),
        headline_model=config.attack.headline,
        role_pair=config.attack.role_pair,
        seed=config.seed,
        blind=True,
        bootstrap=config.attack.bootstrap,
        tasks=True,
        unit="record",
        data=study.data.counts,
        versions=versions(),
        run_settings=manifest.flatten(json.loads(config.to_json_best_effort())),
    )


def _result_inputs(config: ConfigDict) -> dict:
    """Config, code and the files that it names: equal ones let a start end at once."""
    files = {key: manifest.stamp(path) for key, path in _files(config).items()}
    return {"config": manifest.digest(json.loads(config.to_json_best_effort())), "code": code_version(), "files": files}


def _files(config: ConfigDict) -> dict[str, str]:
    """Files and folders that the config names, by key."""
    named = {"data.path": config.data.path, "data.pretrain.path": config.data.pretrain.path}
    named |= {f"models.{name}.path": model.path for name, model in config.models.items()}
    named |= {f"tokenizer.{key}": config.tokenizer[key] for key in ("path", "vocab", "merges", "json")}
    return {key: path for key, path in named.items() if path}


def last_result(config: ConfigDict, workdir: Path) -> str | None:
    """The closing lines of a finished experiment with the same config, code and data, else None."""
    found = manifest.read(workdir)
    report = workdir / "report" / "index.html"
    if found is None or found["inputs"] != _result_inputs(config) or not report.exists():
        return None
    return found["facts"]["lines"]


def record_result(study: Study) -> str:
    """Write the work directory's manifest and return the closing lines: the report's sentence and its path."""
    summary = json.loads((study.workdir / "report" / "summary.json").read_text())
    lines = f"{summary['sentence']}\nReport: {study.workdir / 'report' / 'index.html'}"
    manifest.write(study.workdir, _result_inputs(study.config), {"lines": lines})
    return lines
