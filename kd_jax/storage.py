"""Where the work directory is: a folder of this machine, or of a bucket (`gs://bucket/folder`).

A local path is a `pathlib.Path`. One on Google Cloud Storage is an `etils.epath.Path`: the same methods, by way of
fsspec and gcsfs; orbax, tensorstore and tensorboardX take its text. Here is what the two have not in common. Every file
is written whole or not at all, for its owner alone: locally under a temporary name, mode 0600, then renamed; in a
bucket as one upload, which nobody sees before it is complete (who may read it there is a setting of the bucket). A
bucket needs no folders, its objects cannot grow, and nothing of it can be mapped into memory.

Credentials are the libraries' own: application default credentials, or the service account of the machine.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import logging
import os
import pathlib
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from kd_jax.errors import ConfigError

log = logging.getLogger(__name__)

Path = pathlib.Path | epath.Path
SCHEME = "gs://"
FULL = (errno.ENOSPC, errno.EDQUOT)
SEAL, UNSEALED = b"sha256:", b"0" * 64  # see write_parquet


def as_path(place: str | Path) -> Path:
    """The path that a user names. Raises ConfigError for other object stores than gs://, or if gcsfs is missing."""
    text = str(place)
    if "://" not in text:
        return pathlib.Path(text)
    if not text.startswith(SCHEME) or not text.removeprefix(SCHEME).strip("/"):
        raise ConfigError(f"{text}: a work directory is a local folder or {SCHEME}bucket/folder")
    try:
        fsspec.get_filesystem_class("gs")
    except ImportError as error:
        raise ConfigError(f"{text} needs the package gcsfs: pip install -r requirements-tpu.txt") from error
    # Lists of files must be those of now: other processes write here too, and tensorstore does.
    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
    return epath.Path(text)


def is_local(path: str | Path) -> bool:
    """Is this a path of the machine's own file system?"""
    return not str(path).startswith(SCHEME)


def check(folder: Path) -> None:
    """Write and delete a file in a bucket's folder. Raises ConfigError if that fails: nothing else would work."""
    if is_local(folder):
        return
    mark = str(folder / f".write-test-{uuid.uuid4().hex}")
    try:
        _bucket().pipe_file(mark, b"x")
        _bucket().rm_file(mark)
    except Exception as error:  # of three client libraries, each with its own
        raise ConfigError(
            f"{folder} cannot be written ({type(error).__name__}: {error}): does the bucket exist, and may this "
            "account create and delete its objects? Without a service account: gcloud auth application-default login"
        ) from error


def free_bytes(folder: Path) -> int | None:
    """Free space where `folder` is or will be; None in a bucket, which has no limit to measure."""
    if not is_local(folder):
        return None
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def full(error: BaseException, workdir: str | Path) -> str | None:
    """What to tell of an error whose cause is a full disk: which file, what is free; None of any other error.

    TensorStore says it in words only, and libraries wrap errors in errors of their own.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        numbered = isinstance(error, OSError) and error.errno in FULL
        if numbered or "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
            named = re.search(r'"(/[^"]+)"', str(error))  # as TensorStore does
            place = (error.filename if numbered else named and named[1]) or str(workdir)
            free = free_bytes(pathlib.Path(place)) if is_local(place) else None
            left = "" if free is None else f" ({free / 1e6:.1f} MB free)"
            return (
                f"the disk is full{left}: {place} could not be written. What was there before is as it was; make room, "
                "and the same command continues from the last checkpoint"
            )
        error = error.__cause__ or error.__context__
    return None


# --------------------------------------------------------------------------------------------------- single files


@contextlib.contextmanager
def create(path: Path) -> Iterator[BinaryIO]:
    """A handle to write the file `path` with, and its folders; the file is there after the block, if nothing failed."""
    if not is_local(path):
        buffer = io.BytesIO()
        yield buffer
        _bucket().pipe_file(str(path), buffer.getvalue())
        return
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = _temporary(path)
    with naming(path):
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())  # before the name says that it is whole
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)  # on a full disk, every half file counts
            raise


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """A full disk is reported with the name of the file, which the error of a write has not."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL and not error.filename:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_bytes(path: Path, content: bytes) -> None:
    with create(path) as handle:
        handle.write(content)


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode())


def write_parquet(path: Path, rows: pa.Table, metadata: Mapping[str, str]) -> None:
    """Write Parquet (zstd, a checksum for every page); `metadata` says what the table is.

    The file's own metadata have one more entry, `seal`: the sha256 of the whole file but for these digits. See `whole`.
    """
    rows, buffer = rows.replace_schema_metadata(metadata), io.BytesIO()
    with pq.ParquetWriter(buffer, rows.schema, compression="zstd", write_page_checksum=True) as writer:
        writer.write_table(rows)
        writer.add_key_value_metadata({"seal": (SEAL + UNSEALED).decode()})
    with create(path) as handle:
        for part in _seal(buffer.getvalue()):
            handle.write(part)


def _seal(content: bytes) -> tuple[bytes, bytes, bytes]:
    """A Parquet file in three parts: up to the digits of its seal, the digits that it should have, and the rest."""
    start = content.rfind(SEAL) + len(SEAL)  # among the last things: in the footer
    end = start + len(UNSEALED)
    summary = hashlib.sha256(content[:start])
    summary.update(UNSEALED)
    summary.update(content[end:])
    return content[:start], summary.hexdigest().encode(), content[end:]


def whole(path: Path, *, sealed: bool = False) -> bool:
    """Is there a Parquet file that can be read to its end? One that cannot is named in the log.

    With `sealed`, is it what `write_parquet` wrote, to the byte: checksums of pages cover neither names nor metadata.
    """
    if not path.exists():
        return False
    try:
        if sealed:
            content = path.read_bytes()
            if b"".join(_seal(content)) != content:
                raise ValueError("not as it was written")
        else:
            for _ in pq.ParquetFile(readable(path), page_checksum_verification=True).iter_batches():
                pass  # checksums are compared as pages are read
    except (OSError, ValueError) as error:  # of Arrow: what it finds at the place where a file is cut or altered
        log.warning("damaged: %s (%s); made again", path, type(error).__name__)
        return False
    return True


def readable(path: Path) -> pathlib.Path | io.BytesIO:
    """What pandas and pyarrow can read a whole file from: they would open a bucket by clients of their own."""
    return path if is_local(path) else io.BytesIO(path.read_bytes())


class Log:
    """A text file that grows line by line, begun with `lines`.

    In a bucket the whole text is uploaded with each line: for logs of some hundred lines.
    """

    def __init__(self, path: Path, lines: Iterable[str] = ()) -> None:
        self._path, self._text = path, "".join(f"{line}\n" for line in lines)
        write_text(path, self._text)
        self._handle = path.open("a") if is_local(path) else None

    def add(self, line: str) -> None:
        if self._handle is None:
            self._text += f"{line}\n"
            write_text(self._path, self._text)
        else:
            with naming(self._path):
                self._handle.write(f"{line}\n")
                self._handle.flush()

    def close(self) -> None:
        if self._handle is not None:
            self._handle.close()


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """A checksum of each of these files of a folder; "" where there is none.

    Of a local file the sha256: it costs one reading of the file, several at a time. Of an object of a bucket the
    checksum that the store itself keeps of it, which costs no download.
    """
    names = list(names)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: _digest(folder / name), names)))


def _digest(path: Path) -> str:
    try:
        if is_local(path):
            with path.open("rb") as handle:
                return hashlib.file_digest(handle, "sha256").hexdigest()
        return _bucket().info(str(path)).get("crc32c") or hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return ""


# -------------------------------------------------------------------------------------------------- files and folders


def files(folder: Path, *, deep: bool = True) -> list[str]:
    """Names of the files below a folder, relative to it and sorted; none where there is no folder.

    Without `deep`, those of the folder itself. Files that are being written are left out.
    """
    if is_local(folder):
        found = [p.relative_to(folder).as_posix() for p in folder.glob("**/*" if deep else "*") if p.is_file()]
    else:
        found = [name for name in _names(folder) if deep or "/" not in name]
    return sorted(n for n in found if not any(map(_is_temporary, pathlib.PurePosixPath(n).parts)))


def _temporary(path: Path) -> Path:
    """A name beside `path` that no other program takes; `files` and the audit leave it out."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def _is_temporary(name: str) -> bool:
    return bool(re.fullmatch(r"\..+\.[0-9a-f-]{12,}\.tmp", name))


def sweep(folder: Path, *, but: str) -> None:
    """Delete what killed programs left half written or half deleted below a local folder, except below its `but`."""
    for place, below, names in os.walk(folder):
        here = pathlib.Path(place)
        if here == folder and but in below:
            below.remove(but)
        for name in filter(_is_temporary, [*below, *names]):
            _delete(here / name)
        below[:] = [name for name in below if not _is_temporary(name)]


def copy(source: Path, target: Path) -> None:
    """Copy a file within the machine or within buckets, over one that is there."""
    if is_local(target):
        with create(target) as handle, source.open("rb") as content:
            shutil.copyfileobj(content, handle)
    else:
        _bucket().copy([str(source)], [str(target)])


def copytree(source: Path, target: Path) -> None:
    """Copy a folder's files into another within the machine or within buckets, over those that are there."""
    if is_local(target):
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        names = _names(source)
        _bucket().copy([f"{source}/{name}" for name in names], [f"{target}/{name}" for name in names])


def rmtree(folder: Path) -> None:
    """Delete a folder, or a file, at once for all that look at it by name; nothing to do where there is none.

    A local one gets a temporary name first: half a folder would be taken for work of another kind.
    """
    if is_local(folder):
        with contextlib.suppress(FileNotFoundError):
            _delete(folder.rename(_temporary(folder)))
    else:
        with contextlib.suppress(FileNotFoundError):
            _bucket().rm(str(folder), recursive=True)


def _delete(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def local_copy(folder: Path, *, write: bool = False) -> Iterator[pathlib.Path]:
    """`folder` for programs that know local files alone: itself if it is local, else a temporary copy for the block.

    With `write`, what the block leaves in the copy replaces the bucket's folder at the end, if nothing failed.
    """
    if is_local(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as name:  # mode 0700
        place, before = pathlib.Path(name), _names(folder)
        _bucket().get([f"{folder}/{n}" for n in before], [str(place / n) for n in before])
        yield place
        if write:
            after = [p.relative_to(place).as_posix() for p in sorted(place.rglob("*")) if p.is_file()]
            _bucket().put([str(place / n) for n in after], [f"{folder}/{n}" for n in after])
            for gone in sorted(set(before) - set(after)):
                _bucket().rm_file(f"{folder}/{gone}")


def _bucket() -> fsspec.AbstractFileSystem:
    return fsspec.filesystem("gs")


def _names(folder: Path) -> list[str]:
    """Files below a bucket's folder, relative to it."""
    bucket = _bucket()
    root = bucket._strip_protocol(str(folder)) + "/"  # as its lists have it
    return [name.removeprefix(root) for name in bucket.find(str(folder))]
