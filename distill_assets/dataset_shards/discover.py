"""Which files of a home are shards: keys, roles and content versions.

One bad file must not hold back the others, so what is wrong with a file is a `ShardProblem`, not
an exception.
"""

from __future__ import annotations

import stat
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path, PurePath
from typing import Literal

from distill_assets.foundation.errors import SettingsError, UnreadableFile, UsageError
from distill_assets.foundation.fingerprints import HashCache
from distill_assets.foundation.settings import DataSettings

Role = Literal["train", "heldout", "validation"]

ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")
KEY_BYTES = 200  # a key is part of file names, which end at 255 bytes
_FORBIDDEN_CATEGORIES = ("Cc", "Cs", "Zl", "Zp")  # control, undecodable bytes, line and paragraph separators


@dataclass(frozen=True)
class Shard:
    """A usable shard file. `version` is the full SHA-256 of its decompressed bytes."""

    key: str
    path: Path
    role: Role
    version: str


@dataclass(frozen=True)
class ShardProblem:
    """Why a file is not a shard. `key` is its key, or its whole name where it has none."""

    key: str
    message: str


@dataclass(frozen=True)
class Discovery:
    """Shards and problems, each sorted by key. Both empty when the pattern matches no file."""

    shards: tuple[Shard, ...]
    problems: tuple[ShardProblem, ...]


def discover_shards(root: Path, data: DataSettings, hashes: HashCache, only: str | None = None) -> Discovery:
    """Find the files `data.shards` matches under `root` and hash those not seen before; with `only`, those of this
    key alone.

    Raises SettingsError when a key is both held out and validation, or the pattern is malformed.
    """
    by_key: dict[str, list[Path]] = defaultdict(list)
    problems: list[ShardProblem] = []
    for path in _matching_files(root, data.shards):
        ending = _ending(path.name)
        key = path.name.removesuffix(ending or "")
        if only is not None and only not in (key, _printable(key)):
            continue
        if ending is None:
            shown, allowed = _printable(path.name), ", ".join(ENDINGS)
            problems.append(ShardProblem(shown, f"{shown}: not a shard file; name it with one of {allowed}"))
        elif reason := key_problem(key):
            problems.append(ShardProblem(_printable(key), f"{_printable(path.name)}: {reason}; rename the file"))
        else:
            by_key[key].append(path)

    shards: list[Shard] = []
    for key, paths in by_key.items():
        if len(paths) > 1:
            names = " and ".join(_printable(str(path.relative_to(root))) for path in paths)
            problems.append(ShardProblem(key, f"shard {key}: {names} have the same key; rename all but one"))
            continue
        role = _role(key, data)
        try:
            shards.append(Shard(key, paths[0], role, _version(paths[0], hashes)))
        except UnreadableFile as error:
            problems.append(ShardProblem(key, str(error)))
    return Discovery(tuple(sorted(shards, key=lambda s: s.key)), tuple(sorted(problems, key=lambda p: p.key)))


def key_problem(key: str) -> str | None:
    """Why `key` cannot be a shard's key, or None. A key becomes a file name and a Dagster partition."""
    if not key:
        return "the key (the name without its ending) is empty"
    if "/" in key or "\\" in key:
        return f"the key {_printable(key)!r} contains a slash or backslash; a key is a plain name, no path"
    if key[0] in ". ":
        return f"the key {_printable(key)!r} begins with a {'dot' if key[0] == '.' else 'blank'}"
    if ".." in key:
        return f"the key {_printable(key)!r} contains '..'"
    if any(character in key for character in "*?["):
        return f"the key {_printable(key)!r} contains *, ? or [, which file patterns give a meaning"
    if any(unicodedata.category(character) in _FORBIDDEN_CATEGORIES for character in key):
        return f"the key {_printable(key)!r} contains a control character or bytes that are not UTF-8"
    if len(key.encode()) > KEY_BYTES:
        return f"the key {key[:20]!r}... is longer than {KEY_BYTES} bytes"
    return None


def place_of_shard(root: Path, data: DataSettings, key: str) -> Path:
    """Where a JSONL file must lie to be the shard `key`; UsageError where none could, or another file is that shard."""
    if reason := key_problem(key):
        raise UsageError(f"{reason}; give another with --shard")
    pattern = PurePath(data.shards)
    name = f"{key}.jsonl"
    if any(character in str(pattern.parent) for character in "*?[") or pattern.name == "**":
        raise UsageError(
            f"data.shards is {data.shards}, which names no one folder to put {name} into; "
            "use a pattern such as shards/*.jsonl"
        )
    if not fnmatchcase(name, pattern.name):
        raise UsageError(
            f"data.shards ({data.shards}) does not match {name}; give another --shard, or mend the pattern"
        )
    folder = root / pattern.parent
    for other in _matching_files(root, data.shards):
        if other.name != name and (ending := _ending(other.name)) and other.name.removesuffix(ending) == key:
            raise UsageError(f"shard {key} is there as {other}; remove that file, or give another --shard")
    return folder / name


def folder_of_shards(root: Path, data: DataSettings) -> Path:
    """The folder in which, at whatever depth, `data.shards` looks for files."""
    parts = PurePath(data.shards).parts[:-1]
    return root.joinpath(*takewhile(lambda part: not set(part) & set("*?["), parts))


def _matching_files(root: Path, pattern: str) -> list[Path]:
    """Everything matched but folders and hidden names, unless the pattern itself names a hidden folder.

    Two dots hide nothing on purpose: such a name is looked at, and refused aloud.
    """
    named = set(PurePath(pattern).parts[:-1])
    try:
        matches = sorted(root.glob(pattern), key=str)
    except ValueError as error:
        raise SettingsError(f"data.shards: {pattern!r} is not a file pattern ({error})") from None
    return [
        path
        for path in matches
        if not any(_is_hidden(part) and part not in named for part in path.parts[len(root.parts) :])
        and not path.is_dir()
    ]


def _is_hidden(name: str) -> bool:
    return name.startswith(".") and not name.startswith("..")


def _ending(name: str) -> str | None:
    return next((ending for ending in ENDINGS if name.endswith(ending)), None)


def _role(key: str, data: DataSettings) -> Role:
    heldout = next((pattern for pattern in data.heldout if fnmatchcase(key, pattern)), None)
    validation = next((pattern for pattern in data.validation if fnmatchcase(key, pattern)), None)
    if heldout is not None and validation is not None:
        raise SettingsError(
            f"shard {key} matches data.heldout ({heldout}) and data.validation ({validation}); "
            "change one pattern so that a shard has one role"
        )
    return "heldout" if heldout is not None else "validation" if validation is not None else "train"


def _version(path: Path, hashes: HashCache) -> str:
    try:
        mode = path.stat().st_mode
    except (OSError, RuntimeError) as error:  # a dangling or circular link
        reason = getattr(error, "strerror", None) or str(error)
        raise UnreadableFile(f"{path}: cannot be opened ({reason}); put the file there, or remove it") from None
    if not stat.S_ISREG(mode):  # reading a pipe would wait for ever
        raise UnreadableFile(f"{path}: not a regular file; put a file there, or remove it")
    return hashes.hash_of(path)


def _printable(name: str) -> str:
    """`name` with control characters and undecodable bytes escaped, so that it can be shown and kept."""
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in _FORBIDDEN_CATEGORIES else c for c in name
    )
