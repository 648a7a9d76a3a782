"""Identity is content, never time: canonical hashes of values and of files.

A `HashCache` remembers a file's hash under (size, mtime_ns, ctime_ns, inode). It only saves
reading: it never decides anything, and `rehash=True` ignores what it remembers.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa

from distill_assets.foundation.errors import UnreadableFile
from distill_assets.foundation.files import write_json

SHORT = 16  # hexadecimal digits of an identity in names and reports: 64 bits
_BLOCK = 1 << 20


def digest(value: Any, length: int = SHORT) -> str:
    """Hexadecimal SHA-256 of `value` as canonical JSON, cut to `length` digits.

    Raises TypeError for anything JSON cannot hold: a silent `str()` would make identities of
    memory addresses.
    """
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()[:length]


def open_decompressed(path: Path) -> IO[bytes]:
    """Open a file for reading bytes, decompressed by its ending (`.gz`, `.zst`) or as it is."""
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.suffix == ".zst":
        return cast(IO[bytes], pa.CompressedInputStream(pa.OSFile(str(path), "rb"), "zstd"))
    return path.open("rb")


def _blocks(path: Path) -> Iterator[bytes]:
    with open_decompressed(path) as stream:
        while block := stream.read(_BLOCK):
            yield block


def content_hash(path: Path) -> str:
    """Full hexadecimal SHA-256 of a file's decompressed bytes; UnreadableFile when it cannot be read."""
    hasher = hashlib.sha256()
    try:
        for block in _blocks(path):
            hasher.update(block)
    except FileNotFoundError:
        raise UnreadableFile(f"{path}: the file is gone; put it back, or run again without it") from None
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise UnreadableFile(f"{path}: cannot be read to its end ({error}); write the file again") from error
    return hasher.hexdigest()


def file_stamp(path: Path) -> list[int]:
    """Size, dates and inode: with other bytes a file has another stamp. UnreadableFile when it is gone."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        raise UnreadableFile(f"{path}: the file is gone; put it back, or run again without it") from None
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


class HashCache:
    """Content hashes of files, and what else takes long to find out, kept in one JSON file between processes.

    Losing the cache, or two processes overwriting each other's, costs reading and nothing else.
    """

    def __init__(self, file: Path, rehash: bool = False) -> None:
        self._file = file
        self._rehash = rehash
        self._known: dict[str, list[Any]] = {}
        self._fresh: set[str] = set()
        self._folders: dict[Path, Path] = {}
        if not rehash and file.exists():
            try:
                known = json.loads(file.read_text(encoding="utf-8"))
                self._known = known if isinstance(known, dict) else {}
            except (OSError, ValueError):
                self._known = {}

    def hash_of(self, path: Path, compute: Callable[[Path], str] = content_hash) -> str:
        """The hash of `path`'s content, read only if the file is not the one remembered."""
        return str(self.value_of(self._name(path), file_stamp(path), lambda: compute(path)))

    def _name(self, path: Path) -> str:
        """The path with its links followed. A folder's are followed once: it may hold thousands of files."""
        if path.is_symlink():
            return str(path.resolve())
        if path.parent not in self._folders:
            self._folders[path.parent] = path.parent.resolve()
        return str(self._folders[path.parent] / path.name)

    def value_of(self, name: str, signature: Any, compute: Callable[[], Any], anew: bool = False) -> Any:
        """What was found out about `name` under this very `signature`, else computed, as it is `anew`. Both are JSON
        values with lists, not tuples: they are compared with what was read back.
        """
        entry = None if anew else self._known.get(name)
        if isinstance(entry, list) and len(entry) == 2 and entry[0] == signature:
            return entry[1]
        value = compute()
        self._known[name] = [signature, value]
        self._fresh.add(name)
        return value

    def save(self) -> None:
        """Write what was learnt; does nothing when nothing was."""
        if self._fresh:
            write_json(self._file, self._known)
            self._fresh.clear()
