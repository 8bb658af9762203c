"""Many processes, one program: who writes, what all agree on, and values that lie on devices of other processes.

Every process runs the same Python on the same data and shares the work directory. Arrays on the mesh are global; files
are written by the first process, or each by one of them, and read by all after `barrier`. With one process all of this
does nothing.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from kd_jax import storage
from kd_jax.errors import ConfigError
from kd_jax.storage import Path


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
    count = count or int(os.environ.get("JAX_NUM_PROCESSES", 0))
    index = index if index >= 0 else int(os.environ.get("JAX_PROCESS_ID", -1))
    if coordinator:
        if not 0 <= index < count:
            raise ConfigError(
                f"--coordinator={coordinator} needs --processes above 0 and --process from 0 to below it (or "
                f"JAX_NUM_PROCESSES and JAX_PROCESS_ID), got {count} and {index}"
            )
        jax.distributed.initialize(coordinator, count, index)
    elif always:
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"--distributed: no other processes were found to join ({error})") from error


def fail(message: str) -> NoReturn:
    """End with exit code 1 and a message; at once where others wait, who then end by themselves.

    A normal exit would wait minutes for processes that wait for this one.
    """
    if not jax.distributed.is_initialized():
        sys.exit(message)
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


def leave() -> bool:
    """Part from the other processes when the devices' work is done. True for the one that goes on alone."""
    goes_on = first()
    if jax.process_count() > 1:
        barrier("done")
        jax.distributed.shutdown()
    return goes_on


def first() -> bool:
    """Is this the process that writes what is written once?"""
    return jax.process_index() == 0


def turn(index: int) -> bool:
    """Is this the process that writes piece `index` of many, which all have?"""
    return index % jax.process_count() == jax.process_index()


def barrier(name: str) -> None:
    """Wait for all processes, for example until a file that the first one writes is there."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agree(value):
    """The first process's value (anything that JSON holds) on every process."""
    if jax.process_count() == 1:
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
    if jax.process_count() == 1 or not isinstance(x, jax.Array) or x.is_fully_replicated or x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def check_shared(workdir: Path) -> None:
    """Raises ConfigError where the processes do not see the same work directory (a local disk of each machine)."""
    if jax.process_count() == 1:
        return
    mark = workdir / f".shared-{agree(os.getpid())}"

    once(lambda: storage.write_text(mark, ""), "work directory")
    seen = multihost_utils.process_allgather(np.array(mark.exists()))
    once(mark.unlink, "work directory seen")
    if not np.all(seen):
        raise ConfigError(
            f"--workdir={workdir}: {int((~seen).sum())} of {len(seen)} processes do not see what the first one writes "
            "there; all need one shared directory (gs://..., or a network file system)"
        )
