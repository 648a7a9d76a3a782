"""Whether the files of a folder are those that were written: their SHA-256, taken then and compared later."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from distill_assets.foundation.errors import UnreadableFile, first_line
from distill_assets.foundation.fingerprints import content_hash
from distill_assets.foundation.problems import FileListener, Problem


def hashes_below(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, by its path from there."""
    return {name: content_hash(folder / name) for name in _names(folder)}


def changed_files(
    folder: Path, written: Mapping[str, str], record: str, again: str, on_file: FileListener
) -> Iterator[Problem]:
    """Files of `written` that are gone or hold other bytes. `record` is the file that has the hashes, `again` what
    to do.
    """
    for name, sha256 in sorted(written.items()):
        file = folder / name
        if not file.is_file():
            yield Problem("missing", file, f"{record} says it was written, and it is gone; {again}")
            continue
        on_file(file)
        try:
            if content_hash(file) != sha256:
                message = f"its bytes are not those that were written ({record} has their SHA-256); {again}"
                yield Problem("damaged", file, message)
        except UnreadableFile as error:
            yield Problem("damaged", file, f"cannot be read to its end ({first_line(error)}); {again}")


def foreign_files(folder: Path, ours: Collection[str]) -> Iterator[Problem]:
    """Files below `folder` that are not among `ours`."""
    for name in _names(folder):
        if name not in ours:
            yield Problem("orphaned", folder / name, f"no file of ours; move it out of {folder.parent.name}/")


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
