"""An experiment as a whole: what audit and filter are told of it, its closing lines, and the export of a run."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
from ml_collections import ConfigDict

from kd_jax import excluded, foreign, hf, manifest, processes, storage
from kd_jax.distill.objective import Objective
from kd_jax.errors import ConfigError
from kd_jax.study import (
    Study,
    code_version,
    load_run,
    named_files,
    versions,
)

log = logging.getLogger(__name__)


def export(study: Study, name: str, folder: Path) -> None:
    """Write a run (its first seed) and the tokenizer as a Hugging Face folder, which must be new or empty."""
    if jax.process_count() > 1:
        raise ConfigError("--export writes from one process: start it once, without --coordinator or --distributed")
    run = study.runs[name]
    model = study.config.models[run.model]
    family = hf.read_family(model.path, revision=model.revision or None) if model.path else model.scratch.model_type
    eos = study.data.tokenizer.eos_id
    trained, ids = load_run(study, name, run.seeds[0]), {"eos_token_id": eos}
    with tempfile.TemporaryDirectory() as place:  # the folder appears whole: with its tokenizer
        study.data.tokenizer.save(place)
        tokens = sorted(Path(place).iterdir())
        hf.save_pretrained(trained, folder, family=family, tokenizer_files=tokens, token_ids=ids)
    log.info("%s written to %s", name, folder)


def write_lists(study: Study, write: Callable[[Path, Path, dict], dict]) -> None:
    """Make the list for every run whose memorized records others leave out, unless it is there.

    write: makes the list for `settings["student"]` from a folder of scores in another folder, and returns its counts;
    none where there is too little to learn from, and then no list either.
    Raises StaleWork where a list was made from other models, FileNotFoundError where one of them is not trained yet.
    """
    for name in excluded.sources(study.runs):
        folder, inputs = excluded.list_of(study.workdir, name).parent, study.list_inputs(name)
        if processes.agree(study.has_list(name)):
            log.info("filter for %s: written before", name)
            continue
        seed, cuts = study.runs[name].seeds[0], [tuple(cut) for cut in study.config.memorization.cuts]
        settings = dict(student=name, student_seed=seed, cuts=cuts, seed=study.config.seed)
        counts: dict = {}

        def make() -> None:
            storage.rmtree(folder)  # noqa: B023  what a start left that died before the manifest
            scores = storage.local_copy(study.workdir / "scores")
            with scores as source, storage.local_copy(folder, write=True) as place:  # noqa: B023
                counts.update(write(source, place, settings))  # noqa: B023

        processes.once(make, f"list for {name}")
        if processes.agree(bool(counts)):
            manifest.write(folder, inputs, counts)
            log.info("filter for %s: %s", name, ", ".join(f"{number} {what}" for what, number in counts.items()))


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
        cuts=[list(cut) for cut in config.memorization.cuts],
        filtered={name: run.exclude for name, run in study.runs.items() if run.exclude},
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


def result_inputs(config: ConfigDict) -> dict:
    """Config, code and the files that it names: equal ones let a start end at once."""
    config = foreign.complete(config)
    files = {key: manifest.stamp(path) for key, path in named_files(config).items()}
    return {"config": manifest.digest(json.loads(config.to_json_best_effort())), "code": code_version(), "files": files}


def last_result(config: ConfigDict, workdir: storage.Path) -> str | None:
    """The closing lines of a finished experiment with the same config, code and data, else None."""
    try:
        found = manifest.read(workdir)
    except manifest.Damaged:
        return None  # everything is looked at again, and the manifest written anew
    report = workdir / "report" / "index.html"
    if found is None or found["inputs"] != result_inputs(config) or not report.exists():
        return None
    return None if manifest.damaged(workdir, found) else found["facts"]["lines"]


def record_result(study: Study) -> str:
    """Write the work directory's manifest and return the closing lines: the report's sentence and its path."""
    summary = json.loads((study.workdir / "report" / "summary.json").read_text())
    lines = f"{summary['sentence']}\nReport: {study.workdir / 'report' / 'index.html'}"
    manifest.write(study.workdir, result_inputs(study.config), {"lines": lines})
    return lines
