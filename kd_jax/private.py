"""What other users of this machine could read of a run. What a run writes is its owner's alone (mode 0700 and 0600);
what lay there before is as somebody left it."""

from __future__ import annotations

import logging
import shlex
import stat

from kd_jax import storage
from kd_jax.storage import Path

log = logging.getLogger(__name__)

OTHERS = stat.S_IRWXG | stat.S_IRWXO


def open_to_others(folder: Path) -> list[Path]:
    """The folder and what is in it, as far as its group or anybody may read, write or enter it; links are not followed.

    Nothing in a bucket, whose own settings say who reads it, and where there is no folder yet.
    """
    if not storage.is_local(folder) or not folder.exists():
        return []
    paths = (folder, *sorted(folder.rglob("*")))
    return [path for path in paths if not path.is_symlink() and path.lstat().st_mode & OTHERS]


def warn_of_open(folder: Path) -> None:
    """Log a warning where a work directory that is there already, or what is in it, is open to others."""
    if found := open_to_others(folder):
        log.warning(
            "warning: %s is open to other users of this machine (%d files and folders), and is to hold scores of "
            "private records. To close it: chmod -R go= %s",
            *(folder, len(found), shlex.quote(str(folder))),
        )
