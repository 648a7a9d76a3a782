"""Rows the teacher has seen already, found by row key in whichever capture file holds them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from distill_assets.teacher_capture.sparse_targets import SparseTargets
from distill_assets.teacher_capture.store import (
    UNFINISHED,
    CaptureStore,
    RowKey,
    WithoutDamaged,
    read_row_group,
    read_row_keys,
    unreadable,
)

Place = tuple[Path, int]  # a file and its row group


class KeyIndex:
    """Row key -> where it is held, as when it last looked; a file's keys are read once a process."""

    def __init__(self) -> None:
        self._files: dict[Path, tuple[tuple[int, int], list[RowKey]]] = {}
        self._places: dict[str, tuple[Place, ...]] = {}

    def look_at(self, paths: Collection[Path]) -> None:
        """Take in files that are new or were replaced, and forget those that are gone."""
        signatures = {}
        for path in paths:
            try:
                stat = path.stat()
            except FileNotFoundError:  # another process finished its capture
                continue
            except OSError as error:
                raise unreadable(path, error) from error
            signatures[path] = (stat.st_mtime_ns, stat.st_size)
        gone = [path for path, (signature, _) in self._files.items() if signatures.get(path) != signature]
        for path in gone:
            for row in self._files.pop(path)[1]:
                if left := tuple(place for place in self._places.pop(row.key, ()) if place[0] != path):
                    self._places[row.key] = left
        for path in signatures.keys() - self._files.keys():
            self._files[path] = (signatures[path], _keys_if_whole(path))
            alone: dict[int, tuple[Place, ...]] = {}  # one for all rows of a group: there may be millions
            for row in self._files[path][1]:
                here = alone.setdefault(row.row_group, ((path, row.row_group),))
                before = self._places.get(row.key, ())
                if not before:
                    self._places[row.key] = here
                elif here[0] not in before:
                    self._places[row.key] = before + here

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def places(self, keys: Collection[str]) -> dict[str, list[Place]]:
        """Where each key that is held anywhere is held, always in the same order."""
        return {key: sorted(self._places[key], key=_last_chunks) for key in keys if key in self._places}


def _last_chunks(place: Place) -> tuple[bool, Place]:
    """Captures before chunks of captures under way, which go when those are finished."""
    return place[0].parent.name.startswith(UNFINISHED), place


def _keys_if_whole(path: Path) -> list[RowKey]:
    """A damaged file offers nothing to reuse; whoever needs the file itself hears of it."""
    with WithoutDamaged():
        return read_row_keys(path)
    return []


_indexes: dict[Path, KeyIndex] = {}


def held(folder: Path, files: Collection[Path]) -> KeyIndex:
    """The rows that `files` hold. `folder` names the index that remembers these files."""
    index = _indexes.setdefault(folder, KeyIndex())
    index.look_at(files)
    return index


def captured_rows(store: CaptureStore, capture_id: str) -> KeyIndex:
    """The rows that are captured under this identity, in captures or in chunks of captures under way."""
    return held(store.root / capture_id, store.reusable(capture_id))


def targets_at(places: Mapping[str, Sequence[Place]]) -> dict[str, tuple[Path, SparseTargets]]:
    """The stored targets of rows at known places, and the files they are from; only row groups that hold them are
    read.

    A row in a damaged part of a file is read where it is held besides. Rows that are nowhere undamaged are
    left out: for whoever asks, they are not captured.
    """
    found: dict[str, tuple[Path, SparseTargets]] = {}
    for choice in range(max(map(len, places.values()), default=0)):
        keys_at: dict[Place, set[str]] = {}
        for key, held_at in places.items():
            if key not in found and choice < len(held_at):
                keys_at.setdefault(held_at[choice], set()).add(key)
        for (path, group), keys in sorted(keys_at.items()):
            with WithoutDamaged():
                found.update({row.key: (path, row.targets) for row in read_row_group(path, group, keys)})
    return found
