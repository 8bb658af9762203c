"""Orbax checkpoints of a run: parameters, optimizer, step, RNG and the data iterator.

Arrays are stored under their dotted names, so that a checkpoint does not depend on the classes that hold them. When one
is complete, checksums of its files are written beside them: a checkpoint that does not agree with them is named and
deleted, and the one before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from kd_jax import processes, storage
from kd_jax.manifest import Damaged
from kd_jax.sharding import names
from kd_jax.storage import Path

log = logging.getLogger(__name__)

DIGESTS = "digests.json"


class Checkpoints:
    """The checkpoints of one run, newest `keep` of them. Damaged ones that are newer than a sound one are deleted."""

    def __init__(self, folder: str | Path, *, keep: int = 2):
        self._folder = storage.as_path(folder)
        processes.once(lambda: _drop_damaged(self._folder), f"checkpoints of {folder}")
        policy = ocp.training.preservation_policies.LatestN(keep)
        self._checkpointer = ocp.training.Checkpointer(
            _absolute(folder), preservation_policy=policy, cleanup_tmp_directories=True
        )

    @property
    def latest_step(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state, feed: dict[str, np.ndarray], iterators: dict) -> None:
        """Save `state` (any pytree), the feed's arrays and the iterators' positions; returns when it is on disk.

        The positions are the same on every process, so they are kept once, for any number of processes to go on from.
        """
        everything = {"state": _flat(state), **({"feed": feed} if feed else {})}
        places = {name: iterator.get_state() for name, iterator in iterators.items()}
        with _quiet():
            self._checkpointer.save_checkpointables(
                step, everything, force=True, overwrite=True, custom_metadata=places
            )
        processes.once(lambda: _write_digests(self._folder / str(step)), f"checksums of checkpoint {step}")

    def restore(self, abstract_state, feed: dict[str, np.ndarray], iterators: dict):
        """The newest state, as `abstract_state` says (shapes, dtypes, shardings), and the feed's arrays.

        `feed` says their shapes; the iterators move to their positions. Raises Damaged where a checkpoint without
        checksums cannot be read.
        """
        wanted = {"state": _flat(abstract_state), **({"feed": feed} if feed else {})}
        place = self._folder / str(self.latest_step)
        try:
            loaded = self._checkpointer.load_checkpointables(None, wanted)
        except Exception as error:  # orbax and TensorStore have many
            if (place / DIGESTS).exists():
                raise
            raise Damaged(f"{place} cannot be read ({error}): delete it to go on from an earlier checkpoint") from error
        places = self._checkpointer.checkpointables_metadata(None).custom_metadata
        for name, iterator in iterators.items():
            iterator.set_state(places[name])
        leaves = [loaded["state"][n] for n in names(abstract_state)]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), loaded.get("feed", {})

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        with _quiet():
            self._checkpointer.close()


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints below `folder`, of a run that is finished."""

    def work() -> None:
        for step in steps(folder)[keep:]:
            storage.rmtree(folder / str(step))

    processes.once(work, f"old checkpoints of {folder}")


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, newest first."""
    found = folder.iterdir() if folder.exists() else ()
    return sorted((int(p.name) for p in found if p.name.isdecimal()), reverse=True)


def _write_digests(folder: Path) -> None:
    kept = [name for name in storage.files(folder) if name != DIGESTS]
    storage.write_text(folder / DIGESTS, json.dumps(storage.digests(folder, kept), indent=1))


def _drop_damaged(folder: Path) -> None:
    """Delete checkpoints from the newest on until one agrees with its checksums, or has none yet."""
    for step in (folder / str(number) for number in steps(folder)):
        if not (bad := _differing(step)):
            return
        log.warning("damaged checkpoint %s (%s): deleted, the one before it is used", step, ", ".join(bad[:4]))
        storage.rmtree(step)


def _differing(step: Path) -> list[str]:
    """Files of a checkpoint that differ from its checksums."""
    path = step / DIGESTS
    if not path.exists():
        return []
    try:
        kept = json.loads(path.read_bytes())
        now = storage.digests(step, kept)
        return [name for name in kept if now[name] != kept[name]]
    except (ValueError, AttributeError):
        return [DIGESTS]


def save_params(folder: str | Path, params) -> None:
    """Write a run's final parameters alone: what scoring and later runs read."""
    with _quiet():
        ocp.save(_absolute(folder), _flat(params), overwrite=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs an error once for each of its threads that waits, and then raises it: raised is enough."""
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def load_params(folder: str | Path, abstract):
    """Parameters in the shapes, dtypes and shardings of `abstract`."""
    loaded = ocp.load(_absolute(folder), _flat(abstract))
    return jax.tree.unflatten(jax.tree.structure(abstract), [loaded[n] for n in names(abstract)])


def fingerprint(params) -> str:
    """First 16 hex of a sha256 over names, shapes, dtypes and bytes of all parameters."""
    digest = hashlib.sha256()
    for name, x in sorted(zip(names(params), jax.tree.leaves(params))):
        digest.update(f"{name} {x.shape} {x.dtype}".encode())
        # A stacked array is as large as a model: one layer at a time comes to the host.
        layers = range(x.shape[0]) if processes.several() and x.ndim > 2 else ()
        for part in (x[i] for i in layers) if layers else (x,):
            digest.update(np.ascontiguousarray(processes.to_host(part)).view(np.uint8).data)
    return digest.hexdigest()[:16]


def _flat(tree) -> dict:
    return dict(zip(names(tree), jax.tree.leaves(tree)))


def _absolute(path: str | Path) -> str:
    text = str(path)
    return text if "://" in text else str(pathlib.Path(text).absolute())
