"""Manifests: what a finished piece of work was made from, so that a later start can skip it or refuse to mix.

A manifest is a small JSON file written last. `inputs` decide: equal inputs mean finished work, different ones are
refused with the keys that differ. `facts` (code version, results) are recorded only.
"""

from __future__ import annotations

import hashlib
import json
import pathlib

from kd_jax import processes, storage
from kd_jax.storage import Path


class StaleWork(RuntimeError):
    """Work in the folder was made from other inputs than the config asks for now."""


def digest(value) -> str:
    """First 16 hex of the sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def flatten(value, prefix: str = "") -> dict[str, object]:
    """Nested dicts to dotted keys."""
    if not isinstance(value, dict):
        return {prefix: value}
    rows: dict[str, object] = {}
    for key, inner in value.items():
        rows |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return rows


def read(folder: Path) -> dict | None:
    """The manifest in `folder`, or None. Raises StaleWork if it cannot be read."""
    path = folder / "manifest.json"
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise StaleWork(f"{path} is not readable JSON ({error}): delete {folder} to do this work again") from error


def write(folder: Path, inputs: dict, facts: dict) -> None:
    """Write the manifest atomically. The first process writes; all return when it is there."""
    text = json.dumps({"inputs": _plain(inputs), "facts": _plain(facts)}, indent=1, sort_keys=True)
    processes.once(lambda: storage.write_text(folder / "manifest.json", text), f"manifest of {folder}")


def finished(folder: Path, inputs: dict, what: str) -> bool:
    """True if `folder` holds this work from these inputs, False if it holds none. Raises StaleWork on other inputs."""
    found = read(folder)
    if found is None:
        return False
    old, new = flatten(found["inputs"]), flatten(_plain(inputs))
    changed = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    if changed:
        rows = "\n".join(f"  {k}: was {old.get(k)!r}, is {new.get(k)!r}" for k in changed[:8])
        raise StaleWork(
            f"{what} in {folder} was made from other inputs:\n{rows}\nUse another --workdir, or delete this folder "
            "to do the work again."
        )
    return True


def begin(folder: Path, inputs: dict, what: str) -> bool:
    """Like `finished`; work that was only begun is checked against its `begun` note, so that a resume is safe."""
    started = folder / "begun"
    if finished(folder, inputs, what):
        _forget(started)  # left where a start died between the two steps of `end`
        return True
    if processes.agree(read(started) is not None):  # one process may already be writing it
        finished(started, inputs, f"unfinished {what}")
    else:
        write(started, inputs, {})
    return False


def end(folder: Path, inputs: dict, facts: dict) -> None:
    """Write the manifest of work that `begin` began, and drop its `begun` note."""
    write(folder, inputs, facts)
    _forget(folder / "begun")


def _forget(folder: Path) -> None:
    processes.once(lambda: storage.rmtree(folder), f"removal of {folder}")


def stamp(path: str) -> str:
    """A cheap fingerprint of a file, or of a folder's weights and settings: sizes, and the first and last MiB of each.

    What is not here (a hub id) is its own name.
    """
    root = pathlib.Path(path)
    found = sorted(p for p in root.glob("*") if p.suffix in (".json", ".safetensors")) if root.is_dir() else [root]
    if not all(p.is_file() for p in found):
        return path
    summary = hashlib.sha256()
    for file in found:
        size = file.stat().st_size
        with file.open("rb") as handle:
            summary.update(f"{file.name} {size}".encode() + handle.read(1 << 20))
            handle.seek(max(0, size - (1 << 20)))
            summary.update(handle.read())
    return summary.hexdigest()[:16]


def _plain(value):
    """Through JSON, so that tuples and lists compare equal to what is read back."""
    return json.loads(json.dumps(value, default=str))
