"""Train, distil, score and audit: `python main.py --config=configs/X.py --workdir=DIR [--config.key=value]`.

Running the same command again continues: finished work is skipped, interrupted work resumes at its last checkpoint,
work whose inputs changed is refused with a message that says which.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

import attacks.audit
import attacks.prediction
import attacks.report
from attacks.tables import TableError
from kd_jax import experiment, locks, manifest, private, processes, runs, sharding, storage, tables
from kd_jax.data.records import DataError
from kd_jax.errors import ConfigError
from kd_jax.hf import CheckpointError
from kd_jax.manifest import StaleWork
from kd_jax.plan import plan
from kd_jax.shadow import stage as shadow
from kd_jax.study import Study, open_study


def _filter(study: Study) -> None:
    experiment.write_lists(study, attacks.prediction.write_filter)


def _attack(study: Study) -> None:
    manifest.check_below(study.workdir / "scores")
    report = storage.local_copy(study.workdir / "report", write=True)
    with storage.local_copy(study.workdir / "scores") as scores, report as out:
        attacks.audit.audit(scores, out, experiment.audit_settings(study))


def _report(study: Study) -> None:
    with storage.local_copy(study.workdir / "report", write=True) as out:
        attacks.report.build(out, show_canaries=study.config.report.show_canaries)


STAGES: dict[str, Callable[[Study], object]] = {
    "train": runs.train_runs,
    "score": tables.score_runs,
    "filter": _filter,
    "shadow": shadow.run_chains,
    "attack": _attack,
    "report": _report,
}
ALONE = ("attack", "report")  # need no accelerator: the first process does them when the others are gone
LOOP = ("train", "score", "filter", "train", "score")  # where runs are trained without what a filter found
PREEMPTED = "preempted: the same command continues from here"
EXPECTED = (ConfigError, DataError, CheckpointError, TableError, StaleWork, FileNotFoundError, FloatingPointError)

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "config file, e.g. configs/quickstart.py or configs/gpt2_kd.py:small"
)
WORKDIR = flags.DEFINE_string(
    "workdir", "runs/default", "folder of all that the experiment writes; or gs://bucket/folder"
)
COORDINATOR = flags.DEFINE_string("coordinator", "", "host:port of process 0, where no cluster says it")
PROCESSES = flags.DEFINE_integer("processes", 0, "number of processes, with --coordinator")
PROCESS = flags.DEFINE_integer("process", -1, "which of them this is, from 0")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "join the other workers of a TPU pod or cluster")
CHOSEN = flags.DEFINE_list("stages", None, f"plan, or of {', '.join(STAGES)}; default all, with --only train,score")
TOPOLOGY = flags.DEFINE_multi_string("topology", [], "of a plan: v5e:8x8, v5p:4x4x4, gpu:8, ...; may be repeated")
ONLY = flags.DEFINE_string("only", "", "train and score one run alone, e.g. students/kd")
EXPORT = flags.DEFINE_string("export", "", "write the run named by --only as a Hugging Face folder, and stop")


def main(_: list[str]) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("kd_jax").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.WARNING)  # libraries report every checkpoint they touch
    os.umask(0o077)  # everything that a run writes is its owner's alone
    config = CONFIG.value
    default = [name for name in STAGES if not _nothing_for(name, config)]
    chosen = CHOSEN.value or (["train", "score"] if ONLY.value else default)
    everything = not ONLY.value and set(chosen) >= set(default)
    try:
        _check(config, chosen)
        if chosen == ["plan"]:
            return plan.run(config, WORKDIR.value, TOPOLOGY.value)
        workdir = storage.as_path(WORKDIR.value)
        storage.check(workdir)
        private.warn_of_open(workdir)
        if everything and (last := experiment.last_result(config, workdir)):
            print(f"All done before.\n{last}")
            return
        processes.watch()
        processes.initialize(COORDINATOR.value, PROCESSES.value, PROCESS.value, always=DISTRIBUTED.value)
        processes.check_shared(workdir)
        held = [] if EXPORT.value else locks.take(workdir, chosen, ONLY.value)  # noqa: F841  until this function ends
        if not processes.first():
            logging.getLogger("kd_jax").setLevel(logging.WARNING)  # what the first one says is enough
        processes.check_same(experiment.result_inputs(config))
        with jax.set_mesh(sharding.make_mesh(**config.mesh)):
            study = open_study(config, workdir, jax.sharding.get_mesh(), ONLY.value)
            processes.check_same(study.data.fingerprints())
            if EXPORT.value:
                return experiment.export(study, ONLY.value, Path(EXPORT.value))
            if "shadow" in chosen:
                shadow.check(study)
            for name in (*(LOOP if "filter" in chosen else LOOP[:2]), "shadow"):
                if name in chosen:
                    STAGES[name](study)
        if not processes.leave():
            return
        for name in ALONE:
            if name in chosen:
                STAGES[name](study)
        if everything:
            print(experiment.record_result(study))
    except EXPECTED as error:
        processes.fail(f"error: {error}")
    except processes.Preempted:
        processes.fail(PREEMPTED, processes.TRY_AGAIN)
    except KeyboardInterrupt:
        processes.fail("interrupted: the same command continues from the last checkpoint")
    except Exception as error:
        if message := storage.full(error, WORKDIR.value):
            processes.fail(f"error: {message}")
        if processes.interrupted(error):
            processes.fail(PREEMPTED, processes.TRY_AGAIN)
        if jax.distributed.is_initialized():
            processes.fail(traceback.format_exc())
        raise


def _nothing_for(stage: str, config: ConfigDict) -> str:
    """Why a stage has nothing to do under this config, or ""."""
    if stage == "filter" and not any(run.get("exclude") for run in config.runs.values()):
        return "no run of the config has `exclude`, so that there is nothing to filter for"
    if stage == "shadow" and config.shadow.design == "none":
        return "config.shadow.design is none, so that there are no chains to train"
    return ""


def _check(config: ConfigDict, chosen: list[str]) -> None:
    """What can be known before any work. Raises ConfigError."""
    if unknown := set(chosen) - {*STAGES, "plan"}:
        raise ConfigError(f"unknown stages {sorted(unknown)}; known: {['plan', *STAGES]}")
    for name in chosen:
        if reason := _nothing_for(name, config):
            raise ConfigError(f"--stages={name}: {reason}")
    if "plan" in chosen and len(chosen) > 1:
        raise ConfigError("--stages=plan stands alone: it neither reads data nor trains")
    if TOPOLOGY.value and chosen != ["plan"]:
        raise ConfigError("--topology belongs to --stages=plan")
    if EXPORT.value and (not ONLY.value or "://" in EXPORT.value):
        raise ConfigError("--export needs --only to name the run, and a local folder")
    try:
        attacks.audit.check(config.attack.primary, config.attack.role_pair, config.attack.bootstrap)
    except ValueError as error:
        raise ConfigError(f"config.attack: {error}") from error


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
