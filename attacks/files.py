"""Files that are written whole or not at all, for their owner alone."""

import os
import uuid
from collections.abc import Iterable
from pathlib import Path


def write(folder: Path, contents: Iterable[tuple[str, bytes | None]]) -> None:
    """Put files into `folder`, which is made if need be: (name, content) each; None deletes what is there.

    All are first written beside what they replace, so that a full disk changes nothing.  Then the last is deleted, the
    others take their places, and the last comes at the end: where it is, the files are of one writing, not of two.
    Raises OSError, with the name of the file.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    mark = f"{os.getpid()}-{uuid.uuid4().hex}"
    written: dict[Path, Path | None] = {}
    try:
        for name, content in contents:
            path, temporary = folder / name, folder / f".{name}.{mark}.tmp"  # kd_jax lists no files of such names
            written[path] = None if content is None else temporary
            if content is not None:
                _create(temporary, content, path)
        *others, last = written
        if others:
            last.unlink(missing_ok=True)
        for path, temporary in written.items():
            if temporary is None:
                path.unlink(missing_ok=True)
            else:
                os.replace(temporary, path)
    finally:
        for temporary in filter(None, written.values()):
            temporary.unlink(missing_ok=True)  # on a full disk, every half file counts


def _create(temporary: Path, content: bytes, path: Path) -> None:
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())  # before the name says that it is whole
    except OSError as error:  # that of a write names no file
        raise OSError(error.errno, error.strerror, str(path)) from error
