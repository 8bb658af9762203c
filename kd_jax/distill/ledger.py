"""The provenance ledger: which example entered which loss, how often, from which source, and how old the sample was.

While a run trains, every step is kept; at each checkpoint the steps since the last one are written as a shard, and a
resumed run drops the shards behind its checkpoint. Each is sealed and names the one before it (the step in its
metadata, 0 for none), so that `shards_intact` finds a damaged one and a missing one. When the run is done, `summarize`
makes one table of it. Sampling from a member's prompt is visible here although the member's own response was never
trained on.
"""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from kd_jax import processes, storage
from kd_jax.data.batches import Batch
from kd_jax.distill.feeds import Used
from kd_jax.distill.objective import Objective
from kd_jax.distill.policies import DATASET, LM_CORPUS, SOURCES, STUDENT, TEACHER
from kd_jax.storage import Path

log = logging.getLogger(__name__)

STEP_COLUMNS = {"step": np.int32, "example": np.int32, "source": np.int8, "created": np.int32, "tokens": np.int32}


class Ledger:
    """Rows of STEP_COLUMNS, one per step and example; `example` indexes the run's records, or its plain text's."""

    def __init__(self, folder: Path, *, step: int) -> None:
        self._folder, self._rows, self._before = folder, [], step
        processes.once(lambda: self._drop(step), f"ledger {folder} from {step}")

    def _drop(self, step: int) -> None:
        """Shards of steps that a resumed run takes again."""
        for shard in self._folder.glob("*.parquet"):
            if int(shard.stem) > step:
                shard.unlink()

    def add(self, step: int, used: Used) -> None:
        self._rows.append((np.full(len(used.example), step), used.example, used.source, used.created, used.tokens))

    def add_plain(self, step: int, batch: Batch) -> None:
        n = len(batch["examples"])
        self.add(step, Used(batch["examples"], np.full(n, LM_CORPUS), np.full(n, step), batch["counts"]))

    def write(self, step: int) -> None:
        """Write the rows since the last shard; `step` is the checkpoint that they belong to."""
        processes.once(lambda: self._write(step), f"ledger {self._folder} at {step}")
        self._rows, self._before = [], step

    def _write(self, step: int) -> None:
        columns = [np.concatenate(c) for c in zip(*self._rows)] if self._rows else [[] for _ in STEP_COLUMNS]
        frame = pd.DataFrame({name: np.asarray(c, dtype) for (name, dtype), c in zip(STEP_COLUMNS.items(), columns)})
        table = pa.Table.from_pandas(frame, preserve_index=False)
        storage.write_parquet(_shard(self._folder, step), table, {"before": str(self._before)})


def _shard(folder: Path, step: int) -> Path:
    return folder / f"{step:08d}.parquet"


def shards_intact(folder: Path, step: int) -> bool:
    """Are all shards up to that of the checkpoint `step` there and as they were written? If not, the log names one."""
    while step:
        path = _shard(folder, step)
        if not storage.whole(path, sealed=True):
            log.warning("%s is damaged or missing, and no checkpoint brings it back: the run starts anew", path)
            return False
        step = int(pq.read_schema(storage.readable(path)).metadata[b"before"])
    return True


def terms(objective: Objective, source: int, has_teacher: bool) -> str:
    """The losses that tokens of this source enter, e.g. `ce+kd`."""
    if source == LM_CORPUS:
        return "lm"
    if not has_teacher:
        return "ce"
    entered = {
        "ce": objective.kd_ratio < 1 and source in (DATASET, TEACHER),
        "policy": objective.policy_gradient,
        "kd": objective.single_step if objective.policy_gradient else objective.kd_ratio > 0,
    }
    return "+".join(name for name, does in entered.items() if does)


def summarize(folder: Path, objective: Objective, has_teacher: bool, records: np.ndarray, plain: np.ndarray | None):
    """One row per example, source and whether it was replayed.

    records, plain: ids of the run's records, and of its plain-text windows. Returns a frame with columns example_id,
    loss, source, replayed, times, tokens, mean_age and max_age (optimiser steps), first_step, last_step.
    """
    shards = [storage.readable(path) for path in sorted(folder.glob("*.parquet"))]
    rows = pd.concat(map(pd.read_parquet, shards), ignore_index=True)
    rows["age"] = rows.step - rows.created
    rows["replayed"] = (rows.age > 0) & (rows.source == STUDENT)  # later passes over a rollout are no replay
    is_plain = rows.source == LM_CORPUS
    rows["example_id"] = ""
    for wanted, ids in ((~is_plain, records), (is_plain, plain)):
        if wanted.any():
            rows.loc[wanted, "example_id"] = ids[rows.example[wanted]]
    found = rows.groupby(["example_id", "source", "replayed"], sort=True).agg(
        times=("step", "size"),
        tokens=("tokens", "sum"),
        mean_age=("age", "mean"),
        max_age=("age", "max"),
        first_step=("step", "min"),
        last_step=("step", "max"),
    )
    found = found.reset_index()
    found.insert(1, "loss", [terms(objective, s, has_teacher) for s in found.source])
    found["source"] = np.array(SOURCES)[found.source]
    return found
