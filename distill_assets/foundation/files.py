"""Files and folders that are whole or absent: written beside, synced, renamed."""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

PARTIAL = ".partial-"  # what an unfinished neighbour's name begins with; nobody reads such a name
_RANDOM_DIGITS = 8  # that follow, so that two writers have names of their own
_REPLACED = f"{PARTIAL}was-"  # the folder whose place is being taken
DAY_SECONDS = 86_400
_DISK_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS})
# Libraries that put the operating system's error into an exception of their own, which is no OSError.
_REWORDING = frozenset({"sqlite3", "sqlalchemy", "duckdb", "_duckdb", "safetensors", "safetensors_rust"})
_DISK_WORDS = (
    "database or disk is full",
    "disk I/O error",
    "No space left on device",
    "File too large",
    "Disk quota exceeded",
)


def _beside(path: Path) -> Path:
    # Its end is another one too: whoever reads captures/*/*.parquet with DuckDB or Polars finds what is finished.
    return path.with_name(f"{PARTIAL}{uuid.uuid4().hex[:_RANDOM_DIGITS]}-{path.name}~")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Hold a lock file; who comes second waits. The system frees that of a process that dies."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # whoever waits for the removed file sees that it is none, and tries anew


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write; on success it takes `path`'s place in one step.

    On any exception, an interrupt included, the neighbour is removed and `path` is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    try:
        yield beside
        _sync(beside)
        os.replace(beside, path)
        _sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Like `replacing` for a folder: yields an empty one that becomes `path` when the block succeeds.

    An existing `path` is moved aside first and removed last, so that it is never half of each. A kill
    between the two leaves it aside, from where `sweep` brings it back.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    beside.mkdir()
    try:
        yield beside
        for file in beside.rglob("*"):
            if file.is_file():
                file.chmod(beside.stat().st_mode & 0o666)  # safetensors keeps its files from everybody else
                _sync(file)
        if path.exists():
            old = path.with_name(_REPLACED + path.name)
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
            try:
                os.replace(beside, path)
            except BaseException:
                os.replace(old, path)
                raise
            gone = _beside(path)
            os.replace(old, gone)  # what is half removed must not be brought back
            shutil.rmtree(gone)
        else:
            os.replace(beside, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def sweep(folder: Path, untouched_seconds: float = DAY_SECONDS, aside_seconds: float = 60.0) -> list[Path]:
    """Clean up what killed processes left in `folder`: bring back what was moved aside and not replaced,
    remove unfinished neighbours. Only what nobody touched for a while, for it may be under way; taking a
    folder's place takes a moment, so what was moved aside is brought back after `aside_seconds`.

    Returns the paths dealt with.
    """
    swept = []
    for left in sorted(folder.glob(f"{PARTIAL}*")):
        try:
            age_seconds = time.time() - left.stat().st_ctime
            path = left.with_name(left.name.removeprefix(_REPLACED))
            if left.name.startswith(_REPLACED) and not path.exists():
                if age_seconds < aside_seconds:
                    continue
                os.replace(left, path)
            elif age_seconds < untouched_seconds:
                continue
            elif left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()
        except OSError:
            continue  # somebody else was faster, or it is not ours to remove
        swept.append(left)
    return swept


def sweep_beside(path: Path) -> None:
    """Remove what killed writers of the file `path` left beside it, for whoever alone may write it now."""
    for left in path.parent.glob(f"{PARTIAL}{'?' * _RANDOM_DIGITS}-{glob.escape(path.name)}~"):
        left.unlink(missing_ok=True)


def leftovers(folder: Path) -> list[Path]:
    """What unfinished processes left in `folder`, but for what `sweep` would bring back. Links are none."""
    return [
        left
        for left in sorted(folder.glob(f"{PARTIAL}*"))
        if not left.is_symlink()
        and not (left.name.startswith(_REPLACED) and not left.with_name(left.name.removeprefix(_REPLACED)).exists())
    ]


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; a link counts for itself."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_symlink() or not file.is_dir())


def remove(path: Path) -> None:
    """Remove a file, or a folder with all in it; what links in it point to stays. A folder is moved aside
    first: a kill leaves a leftover, never half of it under its name.
    """
    if path.is_dir() and not path.is_symlink():
        gone = _beside(path)
        os.replace(path, gone)
        shutil.rmtree(gone)
    else:
        path.unlink(missing_ok=True)


def remove_empty(folder: Path) -> None:
    """Remove a folder, unless somebody has put something into it."""
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def disk_problem(error: BaseException) -> str | None:
    """What a full or failing disk said, wherever in the chain of causes it stands; None for any other error.

    Databases and safetensors put the operating system's error into words of their own.
    """
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        text = str(link).strip().splitlines()[0] if str(link).strip() else ""
        if isinstance(link, OSError) and link.errno in _DISK_ERRNOS:
            return f"{link.filename}: {link.strerror}" if link.filename else str(link.strerror)
        if type(link).__module__.partition(".")[0] in _REWORDING and any(words in text for words in _DISK_WORDS):
            return text
        link = link.__cause__ or link.__context__
    return None


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text whole or not at all."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, keys in the order given, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
