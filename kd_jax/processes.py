"""Many processes, one program: who writes, what all agree on, and values that lie on devices of other processes.

Every process runs the same Python on the same data and shares the work directory. Arrays on the mesh are global; files
are written by the first process, or each by one of them, and read by all after `barrier`. With one process all of this
does nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import itertools
import json
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from kd_jax import storage
from kd_jax.errors import ConfigError
from kd_jax.storage import Path

TRY_AGAIN = 75  # exit code of a program that was preempted: launchers start it again


class Preempted(BaseException):
    """The machine is being taken away: what there is has been saved, the same command continues."""


def initialize(coordinator: str = "", count: int = 0, index: int = -1, *, always: bool = False) -> None:
    """Join the other processes, where there are any; before anything touches a device.

    Args:
        coordinator: `host:port` of process 0; "" takes JAX_COORDINATOR_ADDRESS, and with it JAX_NUM_PROCESSES and
            JAX_PROCESS_ID; where that is empty too, the program is alone.
        count, index: number of processes, and which of them this is.
        always: ask `jax.distributed` itself, which knows TPU pods, GKE, SLURM and Open MPI.

    Raises ConfigError where a coordinator comes without count or index, or nothing is found to join.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    told = [os.environ.get(name, "") for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")]
    if not all(value.isdecimal() for value in told if value):
        raise ConfigError(f"JAX_NUM_PROCESSES and JAX_PROCESS_ID must be numbers, they are {told}")
    count = count or int(told[0] or 0)
    index = index if index >= 0 else int(told[1] or -1)
    if coordinator:
        if not 0 <= index < count:
            raise ConfigError(
                f"--coordinator={coordinator} needs --processes above 0 and --process from 0 to below it (or "
                f"JAX_NUM_PROCESSES and JAX_PROCESS_ID), got {count} and {index}"
            )
        try:
            jax.distributed.initialize(coordinator, count, index)
        except RuntimeError as error:
            raise ConfigError(f"--coordinator={coordinator}: not all {count} processes met there ({error})") from error
    elif always:
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"--distributed: no other processes were found to join ({error})") from error


def several() -> bool:
    """Are there other processes to wait for? Not before `initialize`, nor after `leave`."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def fail(message: str, code: int = 1) -> NoReturn:
    """End with a message and an exit code; at once where others wait, who then end by themselves.

    A normal exit would wait minutes for processes that wait for this one.
    """
    _end_watch()
    print(message, file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        os._exit(code)
    sys.exit(code)


def leave() -> bool:
    """Part from the other processes when the devices' work is done. True for the one that goes on alone."""
    goes_on = first()
    if several():
        barrier("done")
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()
        watch()  # it had the signal
    return goes_on


# ------------------------------------------------------------------------------------------------------ preemption

AGAIN = 1.0  # seconds until Preempted is raised once more, where something swallowed it
_asked, _patient, _points = False, False, itertools.count()


def watch() -> None:
    """Let SIGTERM, by which clouds take a machine away, raise Preempted: at once, or where `patience` says so.

    Python ignores what is raised in a finalizer or a callback of the garbage collector: it is raised again until it
    takes effect. With several processes `jax.distributed` has the signal, and lets all of them stop at the same step.
    """
    signal.signal(signal.SIGALRM, _ask)
    signal.signal(signal.SIGTERM, _ask)
    atexit.register(_end_watch)


def _end_watch() -> None:
    """The program is about to end: nothing is raised any more, and no alarm ends it otherwise."""
    global _patient
    _patient = True
    signal.setitimer(signal.ITIMER_REAL, 0)


def _ask(*_) -> None:
    global _asked
    _asked = True
    if _patient:
        return
    signal.setitimer(signal.ITIMER_REAL, AGAIN)
    if not interrupted(sys.exception()):  # it is on its way, and what it passes closes its files undisturbed
        raise Preempted


def interrupted(error: BaseException | None) -> bool:
    """Is an error Preempted, or one of what that interrupted?"""
    while error and not isinstance(error, Preempted):
        error = error.__context__
    return error is not None


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """Work that asks `preempted` itself, and saves before it stops. Raises Preempted at its end if nobody asked."""
    global _patient
    _patient = True
    try:
        yield
    finally:
        _patient = False
        if _asked:  # what the work itself raises goes first
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
    if _asked:
        raise Preempted


def preempted() -> bool:
    """Is the machine being taken away? The same answer on every process; all ask equally often."""
    return multihost_utils.reached_preemption_sync_point(next(_points)) if several() else _asked


# -------------------------------------------------------------------------------------------------------- agreement


def first() -> bool:
    """Is this the process that writes what is written once?"""
    return jax.process_index() == 0


def turn(index: int) -> bool:
    """Is this the process that writes piece `index` of many, which all have?"""
    return index % jax.process_count() == jax.process_index()


def barrier(name: str) -> None:
    """Wait for all processes, for example until a file that the first one writes is there."""
    if several():
        multihost_utils.sync_global_devices(name)


def agree(value):
    """The first process's value (anything that JSON holds) on every process."""
    if not several():
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    sent = np.zeros(size, np.uint8)
    sent[: len(text)] = text[:size]
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(sent))))


def once(work: Callable[[], object], name: str) -> None:
    """Let the first process do what is done once, and all others wait until it is done."""
    if first():
        work()
    barrier(name)


def to_host(x: jax.Array) -> np.ndarray:
    """A global array as a whole on every process's host."""
    if not several() or not isinstance(x, jax.Array) or x.is_fully_replicated or x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def check_shared(workdir: Path) -> None:
    """Raises ConfigError where the processes do not see the same work directory (a local disk of each machine)."""
    if not several():
        return
    mark = workdir / f".shared-{agree(uuid.uuid4().hex)}"
    once(lambda: storage.write_text(mark, ""), "work directory")
    seen = multihost_utils.process_allgather(np.array(mark.exists()))
    once(mark.unlink, "work directory seen")
    if not np.all(seen):
        raise ConfigError(
            f"--workdir={workdir}: {int((~seen).sum())} of {len(seen)} processes do not see what the first one writes "
            "there; all need one shared directory (gs://..., or a network file system)"
        )


def check_same(facts: dict[str, object]) -> None:
    """Raises ConfigError, on every process, naming the facts that are not the same on all of them."""
    if not several():
        return
    words = [hashlib.sha256(json.dumps(v, sort_keys=True, default=str).encode()).digest()[:4] for v in facts.values()]
    seen = multihost_utils.process_allgather(np.frombuffer(b"".join(words), np.uint32))
    other = [name for name, column in zip(facts, seen.T) if len(set(column.tolist())) > 1]
    if other:
        raise ConfigError(
            f"the processes differ in {', '.join(other)}: start all of them from one checkout, with the same flags and "
            "the same files"
        )
