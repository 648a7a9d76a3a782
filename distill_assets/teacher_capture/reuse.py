"""Rows the teacher has seen already, found by row key in whichever capture file holds them."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from pathlib import Path

from distill_assets.foundation.errors import CaptureError
from distill_assets.teacher_capture.sparse_targets import SparseTargets
from distill_assets.teacher_capture.store import CaptureStore, RowKey, read_row_group, read_row_keys

Place = tuple[Path, int]  # a file and its row group


class KeyIndex:
    """Row key -> where it is held, as when it last looked; a file's keys are read once a process."""

    def __init__(self) -> None:
        self._files: dict[Path, tuple[tuple[int, int], list[RowKey]]] = {}
        self._places: dict[str, set[Place]] = {}

    def look_at(self, paths: Collection[Path]) -> None:
        """Take in files that are new or were replaced, and forget those that are gone."""
        signatures = {}
        for path in paths:
            with contextlib.suppress(FileNotFoundError):  # another process finished its capture
                stat = path.stat()
                signatures[path] = (stat.st_mtime_ns, stat.st_size)
        gone = [path for path, (signature, _) in self._files.items() if signatures.get(path) != signature]
        for path in gone:
            for row in self._files.pop(path)[1]:
                if places := self._places.get(row.key):
                    places.discard((path, row.row_group))
                    if not places:
                        del self._places[row.key]
        for path in signatures.keys() - self._files.keys():
            self._files[path] = (signatures[path], _keys_or_none(path))
            for row in self._files[path][1]:
                self._places.setdefault(row.key, set()).add((path, row.row_group))

    def places(self, keys: Collection[str]) -> dict[str, Place]:
        """One place of each key that is held anywhere: of several always the same."""
        return {key: min(self._places[key]) for key in keys if key in self._places}


def _keys_or_none(path: Path) -> list[RowKey]:
    """A damaged file offers nothing to reuse; whoever needs the file itself hears of it."""
    try:
        return read_row_keys(path)
    except CaptureError:
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


def targets_at(places: Mapping[str, Place]) -> dict[str, SparseTargets]:
    """The stored targets of rows at known places; only the row groups that hold them are read.

    Rows in a damaged part of a file are left out: for whoever asks, they are not captured.
    """
    keys_at: dict[Place, set[str]] = {}
    for key, place in places.items():
        keys_at.setdefault(place, set()).add(key)
    targets: dict[str, SparseTargets] = {}
    for (path, group), keys in sorted(keys_at.items()):
        with contextlib.suppress(CaptureError):
            targets.update({row.key: row.targets for row in read_row_group(path, group, keys)})
    return targets
