"""One work directory, one program: a second start is refused with who holds it.

A lock is a file in the work directory that says who holds it, and the kernel's lock on that file, which goes with its
process however that ends: what is left of a dead one is taken over. `--only` starts of different runs share a work
directory; so do an audit of score tables alone (`--stages=attack,report`) and a program that trains or scores. A bucket
has no such locks: nothing is checked there. On a network file system the lock is as good as the system's `flock`.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import logging
import os
import socket
from collections.abc import Sequence
from typing import TextIO

from kd_jax import processes, storage
from kd_jax.errors import ConfigError
from kd_jax.storage import Path

log = logging.getLogger(__name__)

WORK = {"train", "score", "shadow", "filter"}  # stages that write models and tables; the others write the report
ALL, RUN, REPORT = ".lock", ".lock-run-{}", ".lock-report"


def take(workdir: Path, stages: Sequence[str], only: str = "") -> list[TextIO]:
    """Lock what these stages write in a work directory, for the first process; held while the files are open.

    Raises ConfigError, on every process, naming the process that holds it.
    """
    held: list[TextIO] = []
    problem = processes.agree(_take_all(workdir, stages, only, held) if processes.first() else "")
    if problem:
        raise ConfigError(problem)
    return held


def _take_all(workdir: Path, stages: Sequence[str], only: str, held: list[TextIO]) -> str:
    if not storage.is_local(workdir):
        return ""
    workdir.mkdir(parents=True, exist_ok=True, mode=0o700)
    wanted = []  # name, mode, and folders that nobody else writes in while it is held
    if WORK & set(stages):
        # A program that works on all runs holds the first one alone; those of single runs share it.
        wanted.append((ALL, fcntl.LOCK_SH, ()) if only else (ALL, fcntl.LOCK_EX, ("",)))
        if only:
            wanted.append((RUN.format(only.replace("/", ".")), fcntl.LOCK_EX, (f"runs/{only}", f"scores/{only}")))
    if set(stages) - WORK:
        wanted.append((REPORT, fcntl.LOCK_EX, ("report",)))
    for name, mode, alone in wanted:
        handle = _open(workdir / name)
        try:
            fcntl.flock(handle, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            return f"--workdir={workdir} is in use by {_holders(workdir, name)}: wait for its end, or use another"
        except OSError as error:
            log.warning("%s cannot be locked (%s): take care that only one program works there", workdir, error)
            return ""
        if mode == fcntl.LOCK_EX:
            _sign(handle)
        held.append(handle)
        for folder in alone:
            storage.sweep(workdir / folder, but="report")
    return ""


def _open(path: Path) -> TextIO:
    return open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+")


def _sign(handle: TextIO) -> None:
    """Say in a lock who holds it."""
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    handle.truncate(0)
    json.dump({"pid": os.getpid(), "host": socket.gethostname(), "started": started}, handle)
    handle.flush()


def _holders(workdir: Path, name: str) -> str:
    """Who holds a lock: what it says itself, or, where many share it, what those of their runs say."""
    said = [_read(workdir / name)] if name != ALL or _is_held(workdir / ALL, fcntl.LOCK_SH) else []
    runs = sorted(workdir.glob(RUN.format("*"))) if not said else []
    said += [_read(path) for path in runs if _is_held(path, fcntl.LOCK_SH)]
    return ", ".join(filter(None, said)) or "another program"


def _is_held(path: Path, mode: int) -> bool:
    """Does a lock refuse this mode? Tried and given back."""
    with _open(path) as handle:
        try:
            fcntl.flock(handle, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _read(path: Path) -> str:
    try:
        by = json.loads(path.read_text())
        return f"process {by['pid']} on {by['host']}, started {by['started']}"
    except (ValueError, KeyError, TypeError):
        return ""  # it is just being written
