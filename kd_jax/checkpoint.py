"""Orbax checkpoints of a run: parameters, optimizer, step, RNG and the data iterator.

Arrays are stored under their dotted names, so that a checkpoint does not depend on the classes that hold them.
"""

from __future__ import annotations

import hashlib
import pathlib

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from kd_jax import processes
from kd_jax.sharding import names
from kd_jax.storage import Path


class Checkpoints:
    """The checkpoints of one run, newest `keep` of them."""

    def __init__(self, folder: str | Path, *, keep: int = 2):
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
        self._checkpointer.save_checkpointables(step, everything, force=True, overwrite=True, custom_metadata=places)

    def restore(self, abstract_state, feed: dict[str, np.ndarray], iterators: dict):
        """The newest state, as `abstract_state` says (shapes, dtypes, shardings), and the feed's arrays.

        `feed` says their shapes; the iterators move to their positions.
        """
        wanted = {"state": _flat(abstract_state), **({"feed": feed} if feed else {})}
        loaded = self._checkpointer.load_checkpointables(None, wanted)
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
        self._checkpointer.close()


def save_params(folder: str | Path, params) -> None:
    """Write a run's final parameters alone: what scoring and later runs read."""
    ocp.save(_absolute(folder), _flat(params), overwrite=True)


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
