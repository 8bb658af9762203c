"""An experiment: the graph of runs trained and scored under one work directory, each piece once.

workdir/splits.parquet, tokenizer/          roles and tokenizer
workdir/runs/<name>/seed<k>/                checkpoints/, params/, metrics.jsonl, TensorBoard events, manifest.json
workdir/scores/<name>/seed<k>/plain/        score tables and manifest.json; ledger.parquet beside them
workdir/scores/<name>/seed<k>/generated/    ROUGE of the run's answers, per example
workdir/scores/text/                        what text-only classifiers need
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from kd_jax import checkpoint, hf, manifest, prepare, utility
from kd_jax import score as scoring
from kd_jax.data import encode
from kd_jax.data.encode import Encoded
from kd_jax.distill.objective import Objective
from kd_jax.graph import Run
from kd_jax.metrics import progress
from kd_jax.study import (
    Study,
    answer_set,
    code_version,
    load_run,
    named_files,
    objective_of,
    recipe_of,
    sampling_spec,
    scoring_spec,
    versions,
)
from kd_jax.transformer import Transformer

log = logging.getLogger(__name__)

# Facts of a run's manifest that its score tables carry on to the audit.
TRAINING = (
    *("lr", "grid", "lr_from", "select", "selected_step", "steps", "response_tokens", "sources"),
    *("branches", "phi", "warnings", "fidelity"),
)


# ----------------------------------------------------------------------------------------------------------- score


def score_runs(study: Study) -> None:
    """Score every run on every scored role, and write the text tables."""
    prepare.write_text_tables(study.data, study.workdir / "scores" / "text")
    roles = {r: study.data.of_role(r) for r in study.config.score.roles}
    roles = {r: e for r, e in roles.items() if len(e)}
    for run, seed in study.nodes:
        _score(study, run, seed, roles)
        if study.config.utility.seeds:
            _answer(study, run, seed)
    if study.config.report.show_canaries and not study.only:
        _show_canaries(study)


def _trained(study: Study, run: Run, seed: int) -> tuple[dict | None, object]:
    """A run's manifest (None for a base as loaded), and what identifies its parameters."""
    trained = manifest.read(study.folder(run, seed)) if run.train_roles else None
    base = study.config.models[run.model]
    loaded = base.to_dict() | {"files": manifest.stamp(base.path)}
    return trained, trained["facts"]["params_fingerprint"] if trained else loaded


def _score(study: Study, run: Run, seed: int, roles: dict[str, Encoded]) -> None:
    folder = study.folder(run, seed, "scores") / "plain"
    trained, source = _trained(study, run, seed)
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
    if trained:
        shutil.copy(study.folder(run, seed) / "ledger.parquet", folder.parent / "ledger.parquet")
    manifest.end(folder, inputs, facts)


def _answer(study: Study, run: Run, seed: int) -> None:
    """ROUGE of a run's answers on every set that `config.utility` names."""
    folder, u = study.folder(run, seed, "scores") / "generated", study.config.utility
    trained, source = _trained(study, run, seed)
    inputs = dict(model=source, utility=u.to_dict(), seed=study.config.seed, **study.data.fingerprints())
    inputs["files"] = {name: manifest.stamp(path) for name, path in u.files.items()}
    if manifest.begin(folder, inputs, f"answers of {run.name} seed {seed}"):
        return
    model = load_run(study, run.name, seed)
    facts = dict(params_fingerprint=checkpoint.fingerprint(model), code_version=code_version())
    metadata = _metadata(study, run, seed, model, facts, trained, scoring_spec(study))
    sets = [*u.roles, *u.files]
    with progress(len(sets), f"answer {run.name} seed{seed}", unit="set") as bar:
        for name in sets:
            found = answer_set(study, model, name, seeds=tuple(u.seeds), limit=u.examples)
            facts[name] = utility.means(found) | {"near_ties": found.attrs["near_ties"]}
            utility.write(found, folder / f"{name}.parquet", metadata)
            bar.update()
    manifest.end(folder, inputs, facts | {"sampling": dataclasses.asdict(sampling_spec(study))})


def _metadata(study: Study, run: Run, seed: int, model: Transformer, facts: dict, trained: dict | None, spec):
    """Parquet metadata: what the table is, so that no program parses paths."""
    provenance = dict(
        technique=run.technique,
        setting=run.setting,
        train_roles=list(run.train_roles),
        teacher=run.teacher or None,
        init=run.init or None,
        recipe=recipe_of(study.config, run).name if run.recipe else None,
        swap_of=run.swap_of or None,
        n_params=sum(int(x.size) for x in jax.tree.leaves(model)),
        tokenizer_fingerprint=study.data.tokenizer.fingerprint,
        splits_fingerprint=prepare.splits_fingerprint(study.data.splits),
        dtype="float32",
        matmul_precision=spec.precision,
        bos=study.config.data.bos,
        **facts,
    )
    if trained:
        provenance["objective"] = objective_of(study.config, run).distinctive()
        provenance["training"] = {k: trained["facts"][k] for k in TRAINING if k in trained["facts"]}
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
        run_settings=_settings(config),
    )


def _settings(config: ConfigDict) -> dict[str, object]:
    """The config as dotted keys; of an objective, what differs from a technique's defaults."""
    plain = json.loads(config.to_json_best_effort())
    for name, objective in plain["objectives"].items():
        plain["objectives"][name] = Objective(**objective).distinctive()
    return manifest.flatten(plain)


def _result_inputs(config: ConfigDict) -> dict:
    """Config, code and the files that it names: equal ones let a start end at once."""
    files = {key: manifest.stamp(path) for key, path in named_files(config).items()}
    return {"config": manifest.digest(json.loads(config.to_json_best_effort())), "code": code_version(), "files": files}


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
