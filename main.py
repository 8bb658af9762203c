"""Train, distil, score and audit: `python main.py --config=configs/X.py --workdir=DIR [--config.key=value]`.

Running the same command again continues: finished work is skipped, interrupted work resumes at its last checkpoint,
work whose inputs changed is refused with a message that says which.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

import attacks.audit
import attacks.report
from attacks.tables import TableError
from kd_jax import experiment, runs, sharding
from kd_jax.data.records import DataError
from kd_jax.errors import ConfigError
from kd_jax.hf import CheckpointError
from kd_jax.manifest import StaleWork
from kd_jax.study import Study, open_study

STAGES: dict[str, Callable[[Study], object]] = {
    "train": runs.train_runs,
    "score": experiment.score_runs,
    "attack": lambda s: attacks.audit.audit(s.workdir / "scores", s.workdir / "report", experiment.audit_settings(s)),
    "report": lambda s: attacks.report.build(s.workdir / "report", show_canaries=s.config.report.show_canaries),
}
EXPECTED = (ConfigError, DataError, CheckpointError, TableError, StaleWork, FileNotFoundError, FloatingPointError)

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "config file, e.g. configs/quickstart.py or configs/gpt2_kd.py:small"
)
WORKDIR = flags.DEFINE_string("workdir", "runs/default", "directory of all that the experiment writes")
CHOSEN = flags.DEFINE_list("stages", None, f"stages to run: {', '.join(STAGES)}; default all, with --only train,score")
ONLY = flags.DEFINE_string("only", "", "train and score one run alone, e.g. students/kd")
EXPORT = flags.DEFINE_string("export", "", "write the run named by --only as a Hugging Face folder, and stop")


def main(_: list[str]) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("kd_jax").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.WARNING)  # libraries report every checkpoint they touch
    os.umask(0o077)  # everything that a run writes is its owner's alone
    chosen = CHOSEN.value or (["train", "score"] if ONLY.value else list(STAGES))
    config, workdir = CONFIG.value, Path(WORKDIR.value)
    everything = not ONLY.value and set(chosen) == set(STAGES)
    try:
        _check(config, chosen)
        if everything and (last := experiment.last_result(config, workdir)):
            print(f"All done before.\n{last}")
            return
        with jax.set_mesh(sharding.make_mesh(**config.mesh)):
            study = open_study(config, workdir, jax.sharding.get_mesh(), ONLY.value)
            if EXPORT.value:
                return experiment.export(study, ONLY.value, Path(EXPORT.value))
            for name, stage in STAGES.items():
                if name in chosen:
                    stage(study)
        if everything:
            print(experiment.record_result(study))
    except EXPECTED as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command continues from the last checkpoint")


def _check(config: ConfigDict, chosen: list[str]) -> None:
    """What can be known before any work. Raises ConfigError."""
    if unknown := set(chosen) - set(STAGES):
        raise ConfigError(f"unknown stages {sorted(unknown)}; known: {list(STAGES)}")
    if "://" in WORKDIR.value:
        raise ConfigError(f"--workdir={WORKDIR.value}: only local directories are supported for now")
    if EXPORT.value and not ONLY.value:
        raise ConfigError("--export needs --only to name the run")
    try:
        attacks.audit.check(config.attack.primary, config.attack.role_pair, config.attack.bootstrap)
    except ValueError as error:
        raise ConfigError(f"config.attack: {error}") from error


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
