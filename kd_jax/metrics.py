"""What a run shows while it works: TensorBoard events, the same as JSON lines, and a progress bar."""

from __future__ import annotations

import json
import os
import sys
import time

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import directory_check
from tensorboardX.summary import scalar
from tqdm import tqdm

from kd_jax import storage
from kd_jax.storage import Path


class Metrics:
    """Scalars of one run into `folder` (process 0 writes, the others do nothing).

    A resumed run continues at `step`: JSON lines beyond it are dropped, TensorBoard purges its own.
    """

    def __init__(self, folder: str | Path, *, step: int = 0):
        self._events = self._lines = None
        if jax.process_index() != 0:
            return
        path = storage.as_path(folder) / "metrics.jsonl"
        kept = [line for line in _read_lines(path) if line["step"] <= step] if step else []
        self._lines = storage.Log(path, map(json.dumps, kept))
        self._events = Events(str(folder), purge_step=step + 1 if step else 0)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One row of scalars; names like `train/loss` become TensorBoard's groups."""
        if self._lines is None:
            return
        self._lines.add(json.dumps({"step": step, **{k: float(v) for k, v in values.items()}}))
        for name, value in values.items():
            self._events.add_scalar(name, float(value), step)
        self._events.flush()

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()
            self._events.close()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Events:
    """TensorBoard's scalars in `folder`, written by this thread, so that a failure is seen; from `purge_step` on anew.

    tensorboardX's own writer does it in a thread of its own: when that dies of a full disk, the program waits for it.
    """

    def __init__(self, folder: str, purge_step: int = 0) -> None:
        directory_check(folder)
        self._writer = EventsWriter(os.path.join(folder, "events"))
        self._local, self._flushed = storage.is_local(folder), time.monotonic()
        if purge_step:
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(wall_time=time.time(), step=purge_step, session_log=start))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))

    def flush(self) -> None:
        """Write to the disk; to a bucket, which takes the whole file each time, every two minutes."""
        if self._local or time.monotonic() - self._flushed > 120:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


def _read_lines(path: Path) -> list[dict]:
    """The complete lines of a JSONL file; a line cut off by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def progress(total: int, label: str, *, initial: int = 0, unit: str = "step") -> tqdm:
    """Progress bar with rate and time left, on process 0 only."""
    return tqdm(
        total=total,
        initial=initial,
        desc=label,
        unit=unit,
        disable=jax.process_index() != 0,
        mininterval=2.0 if sys.stderr.isatty() else 20.0,  # a log file needs fewer lines than a terminal
        dynamic_ncols=True,
    )
