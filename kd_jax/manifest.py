"""Manifests: what a finished piece of work was made from, so that a later start can skip it or refuse to mix.

A manifest is a small JSON file written last. `inputs` decide: equal inputs mean finished work, different ones are
refused with the keys that differ. `facts` (code version, results) are recorded only. `files` has a checksum of every
file that the work left, `digest` one of the manifest itself: a damaged file is named, deleted and made again.

A copy beside it, written before it, takes its place where it is damaged. Work that is begun leaves a note of its
inputs first, `begun/manifest.json`: it tells interrupted work from files of unknown origin, which are deleted.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import pathlib

from kd_jax import processes, storage
from kd_jax.storage import Path

log = logging.getLogger(__name__)

NAME, COPY, BEGUN = "manifest.json", "manifest.copy.json", "begun"
SUFFIXES = (".parquet", ".npy", ".npz", ".json")  # of what work leaves in its folder; logs and training states are not
FOLDERS = ("params", "trajectory", "report", "teacher", "student")  # below it, whole


class StaleWork(RuntimeError):
    """Work in the folder was made from other inputs than the config asks for now, or cannot be read."""


class Damaged(StaleWork):
    """A manifest is cut short or altered."""


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
    """The manifest in `folder`, or None. Raises Damaged if it and its copy are cut short or altered."""
    if not (folder / NAME).exists():
        return None
    try:
        return _parse(folder / NAME)
    except Damaged as error:
        if (folder / COPY).exists():
            log.warning("%s is damaged: its copy is used", folder / NAME)
            return _parse(folder / COPY)
        raise error


def write(folder: Path, inputs: dict, facts: dict) -> None:
    """Write the manifest atomically. The first process writes; all return when it is there."""

    def work() -> None:
        content = _plain({"inputs": inputs, "facts": facts, "files": storage.digests(folder, _kept(folder))})
        text = json.dumps(content | {"digest": digest(content)}, indent=1, sort_keys=True)
        for name in (COPY, NAME):
            storage.write_text(folder / name, text)

    processes.once(work, f"manifest of {folder}")


def finished(folder: Path, inputs: dict, what: str) -> bool:
    """True if `folder` holds this work from these inputs, False if it holds none, or not all of it.

    Damaged files are named and deleted, and the manifest with them, so that they are made again. Raises StaleWork on
    other inputs.
    """
    found = read(folder)
    if found is None:
        return False
    _compare(found, inputs, folder, what)
    return intact(folder) is not None


def intact(folder: Path) -> dict | None:
    """The manifest, if all files are as it says; else None, and what is damaged is named and deleted, with it."""
    found = read(folder)
    if found is None:
        return None
    bad = processes.agree(_look(folder, found) if processes.first() else None)
    if not bad:
        return found
    log.warning("damaged: %s; made again", ", ".join(str(folder / name) for name in bad[:8]))

    def work() -> None:
        for name in [NAME, *sorted({name.partition("/")[0] for name in bad})]:
            storage.rmtree(folder / name)

    processes.once(work, f"removal of damaged files of {folder}")
    return None


def _look(folder: Path, found: dict) -> list[str]:
    """`damaged`, and the manifest put right where its copy was read."""
    try:
        _parse(folder / NAME)
    except Damaged:
        storage.copy(folder / COPY, folder / NAME)
    return damaged(folder, found)


def damaged(folder: Path, found: dict) -> list[str]:
    """Files that are not what a manifest says of them, or missing. It costs one reading of all of them."""
    kept = found.get("files", {})  # manifests of older versions have none
    now = storage.digests(folder, kept)
    return sorted(name for name in kept if now[name] != kept[name])


def check_below(folder: Path) -> None:
    """Raises Damaged naming files below a folder that are not what the manifests beside them say.

    For stages that read what others wrote, and may be started without them.
    """
    bad = []
    for name in storage.files(folder):
        place = (folder / name).parent
        if pathlib.PurePosixPath(name).name == NAME and place.name != BEGUN:
            bad += [str(place / other) for other in damaged(place, read(place))]
        elif pathlib.PurePosixPath(name).name == COPY and not any((place / n).exists() for n in (NAME, BEGUN)):
            bad.append(str(place / NAME))  # deleted with what was damaged, and not made again yet
    if bad:
        raise Damaged(_again(bad))


@functools.lru_cache(maxsize=256)
def check(folder: Path, digest: str) -> None:
    """Raises Damaged naming files of finished work that are not what its manifest, of this digest, says.

    For stages that read what others wrote, and may be started without them. Each state is looked at once.
    """
    bad = processes.agree(damaged(folder, read(folder)) if processes.first() else None)
    if bad:
        raise Damaged(_again([str(folder / name) for name in bad]))


def _again(bad: list[str]) -> str:
    return f"damaged: {', '.join(bad[:8])}: the stage that wrote it makes it again (--stages=train,score, or shadow)"


def begin(folder: Path, inputs: dict, what: str) -> bool:
    """Like `finished`; work that was only begun is checked against its `begun` note, so that a resume is safe.

    Files of which nothing says what they were made from are deleted, for example those that a run which was told to
    stop wrote into a folder that had just been deleted.
    """
    started = folder / BEGUN
    if finished(folder, inputs, what):
        _forget(started)  # left where a start died between the two steps of `end`
        return True
    # Files first, then the note: another program that shares this work may begin it now.
    left = processes.agree(len(storage.files(folder)) if processes.first() else None)
    if processes.agree((started / NAME).exists()):  # one process may already be writing it
        _compare(read(started), inputs, started, f"unfinished {what}")
        return False
    if processes.agree((folder / COPY).exists()):  # of work that was finished
        _compare(_parse(folder / COPY), inputs, folder, what)
    elif left:
        log.warning("%s: deleted %d files that nothing says the origin of; %s starts anew", folder, left, what)
        _forget(folder)
    write(started, inputs, {})
    return False


def end(folder: Path, inputs: dict, facts: dict) -> None:
    """Write the manifest of work that `begin` began, and drop its `begun` note."""
    write(folder, inputs, facts)
    _forget(folder / BEGUN)


def _forget(folder: Path) -> None:
    processes.once(lambda: storage.rmtree(folder), f"removal of {folder}")


def _parse(path: Path) -> dict:
    try:
        found = json.loads(path.read_bytes())
        own = found.pop("digest", None)
        older = own is None and found.keys() == {"inputs", "facts"}  # manifests of older versions have no checksum
        if not older and (own != digest(found) or not {"inputs", "facts"} <= found.keys()):
            raise ValueError("its checksum differs")
    except (ValueError, AttributeError) as error:  # of JSON, of UTF-8, or of what is no mapping
        raise Damaged(
            f"{path} is damaged, not readable JSON with its own checksum ({error}): delete {path.parent} to do this "
            "work again"
        ) from error
    return found


def _compare(found: dict, inputs: dict, folder: Path, what: str) -> None:
    """Raises StaleWork where a manifest has other inputs."""
    old, new = flatten(found["inputs"]), flatten(_plain(inputs))
    changed = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    if changed:
        rows = "\n".join(f"  {k}: was {old.get(k)!r}, is {new.get(k)!r}" for k in changed[:8])
        raise StaleWork(
            f"{what} in {folder} was made from other inputs:\n{rows}\nUse another --workdir, or delete this folder "
            "to do the work again."
        )


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


def _kept(folder: Path) -> list[str]:
    """Files of a piece of work that are checked."""
    own = [name for name in storage.files(folder, deep=False) if name.endswith(SUFFIXES) and name not in (NAME, COPY)]
    return own + [f"{below}/{name}" for below in FOLDERS for name in storage.files(folder / below)]


def _plain(value):
    """Through JSON, so that tuples and lists compare equal to what is read back."""
    return json.loads(json.dumps(value, default=str))
