"""Rows the teacher has seen already, found by row key in whichever capture file holds them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from distill_assets.foundation.errors import CaptureError
from distill_assets.teacher_capture.sparse_targets import SparseTargets
from distill_assets.teacher_capture.store import CaptureStore, read_row_keys, read_rows


class _KeyIndex:
    """Row key -> a file that holds it, for one capture identity; a file is read once a process."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[int, int]] = {}
        self._holders: dict[str, Path] = {}

    def look_at(self, files: Collection[Path]) -> None:
        """Take in files that are new or were replaced, and forget those that are gone."""
        signatures = {path: (stat.st_mtime_ns, stat.st_size) for path in files for stat in [path.stat()]}
        if any(signatures.get(path) != signature for path, signature in self._seen.items()):
            self._seen, self._holders = {}, {}
        for path in signatures.keys() - self._seen.keys():
            self._seen[path] = signatures[path]
            try:
                self._holders.update({row.key: path for row in read_row_keys(path)})
            except CaptureError:
                continue  # a damaged file offers nothing to reuse; whoever needs the file itself hears of it

    def holders(self, keys: Collection[str]) -> dict[str, Path]:
        return {key: self._holders[key] for key in keys if key in self._holders}


_indexes: dict[Path, _KeyIndex] = {}


def captured_keys(store: CaptureStore, capture_id: str, keys: Collection[str]) -> dict[str, Path]:
    """Those of `keys` that are captured under this identity, each with a file that holds it."""
    index = _indexes.setdefault(store.root / capture_id, _KeyIndex())
    index.look_at(store.files(capture_id).values())
    return index.holders(keys)


def captured_targets(store: CaptureStore, capture_id: str, keys: Collection[str]) -> dict[str, SparseTargets]:
    """The stored targets of those of `keys` that are captured under this identity."""
    holders = captured_keys(store, capture_id, keys)
    targets: dict[str, SparseTargets] = {}
    for path in set(holders.values()):
        targets.update({row.key: row.targets for row in read_rows(path) if holders.get(row.key) == path})
    return targets
