"""What lies in `captures/`, and what of it nothing needs.

Needed are the current captures, and whatever a capture that is still to be made would copy rows from:
files that hold rows of a shard without a current capture. Of imported captures those whose content a shard
has, whatever its name is now, and those of a shard that was edited. Links are never followed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distill_assets.dataset_shards.discover import Discovery, Shard
from distill_assets.dataset_shards.encode import encode_shard
from distill_assets.foundation.errors import CaptureError, CaptureOutOfReach, DistillError
from distill_assets.foundation.files import PARTIAL
from distill_assets.foundation.fingerprints import SHORT
from distill_assets.teacher_capture.derive import sources
from distill_assets.teacher_capture.identity import CaptureSpec
from distill_assets.teacher_capture.reuse import KeyIndex, captured_rows
from distill_assets.teacher_capture.store import IMPORTED, LOCK, CaptureStore

ItemKind = Literal["capture", "unfinished", "failure", "leftover", "stranger", "empty"]
IDENTITY = re.compile(rf"[0-9a-f]{{{SHORT}}}")  # the name of a folder that is named by an identity
_NAMES: dict[ItemKind, re.Pattern[str]] = {
    "capture": re.compile(rf"(.+)@([0-9a-f]{{{SHORT}}})\.parquet"),
    "failure": re.compile(rf"(.+)@([0-9a-f]{{{SHORT}}})\.failed\.json"),
    "unfinished": re.compile(rf"\.unfinished-(.+)@([0-9a-f]{{{SHORT}}})"),
}


@dataclass(frozen=True)
class Item:
    """One thing in `captures/`: what its name says it is. `empty` is a capture id's folder with nothing in
    it; a `stranger` is nothing of ours, a `leftover` the unfinished file, or the lock, of a
    process.
    """

    kind: ItemKind
    path: Path
    capture_id: str = ""
    shard: str = ""
    version: str = ""  # its first SHORT digits

    @property
    def is_imported(self) -> bool:
        return self.capture_id == IMPORTED


def contents(root: Path) -> Iterator[Item]:
    """Everything in `captures/`, by name."""
    for folder in _entries(root):
        if not (folder.is_dir(follow_symlinks=False) and is_ours(folder.name)):
            yield Item(_unnamed(folder), Path(folder.path))
            continue
        inside = _entries(folder.path)
        if not inside:
            yield Item("empty", Path(folder.path), folder.name)
        for entry in inside:
            yield _item(entry, folder.name)


def is_ours(folder: str) -> bool:
    """Whether a folder of captures has this name."""
    return folder == IMPORTED or IDENTITY.fullmatch(folder) is not None


def _entries(folder: Path | str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        return []


def _item(entry: os.DirEntry[str], capture_id: str) -> Item:
    for kind, pattern in _NAMES.items():
        fits = entry.is_dir(follow_symlinks=False) if kind == "unfinished" else entry.is_file(follow_symlinks=False)
        if fits and not entry.name.startswith(PARTIAL) and (name := pattern.fullmatch(entry.name)):
            return Item(kind, Path(entry.path), capture_id, name[1], name[2])
    return Item(_unnamed(entry), Path(entry.path), capture_id)


def _unnamed(entry: os.DirEntry[str]) -> ItemKind:
    return "leftover" if entry.name.startswith((PARTIAL, LOCK)) and not entry.is_symlink() else "stranger"


class Needs:
    """What of `captures/` is needed now."""

    def __init__(self, spec: CaptureSpec, discovery: Discovery, store: CaptureStore) -> None:
        self._spec, self._store = spec, store
        self._uncaptured = [shard for shard in discovery.shards if not _is_captured(spec, shard, store)]
        self._contents = {(shard.key, shard.version[:SHORT]) for shard in discovery.shards}
        self._current = {store.path_of(spec.capture_id, shard.key, shard.version) for shard in discovery.shards}
        self._versions = {version for _, version in self._contents}
        unreadable = {problem.key for problem in discovery.problems}
        self._to_look_into = unreadable | {shard.key for shard in self._uncaptured}
        self._to_copy_from = self._files_to_copy_from(unreadable)
        self._to_go_on_from = {store.unfinished(spec.capture_id, s.key, s.version) for s in self._uncaptured}

    def is_current(self, item: Item) -> bool:
        """Whether it is, by its name, the capture of a shard as it is now."""
        return item.path in self._current

    def __contains__(self, item: Item) -> bool:
        """Whether something refers to it, or would. A failure record tells of content that is still there;
        strangers are nobody's to judge.
        """
        if item.kind == "failure":
            return item.capture_id == self._spec.capture_id and (item.shard, item.version) in self._contents
        if item.is_imported:
            pinned = item.version in self._versions or item.shard in self._to_look_into
            return item.kind == "stranger" or (item.kind == "capture" and pinned)
        if item.kind == "capture":
            return self.is_current(item) or item.path in self._to_copy_from
        if item.kind == "unfinished":
            return item.path in self._to_go_on_from or any(item.path == file.parent for file in self._to_copy_from)
        return item.kind == "stranger"

    def _files_to_copy_from(self, unreadable: set[str]) -> set[Path]:
        """Files with rows of shards that are still to be captured; of a shard that cannot be read now, all
        its files under this identity.
        """
        files: set[Path] = set()
        captured: list[KeyIndex] = []
        if self._uncaptured:
            here = [self._spec.capture_id]
            try:
                here += [source.capture_id for source in sources(self._store, self._spec)]
                captured = [captured_rows(self._store, capture_id) for capture_id in here]
            except CaptureOutOfReach:  # what it holds may be needed, and so may all else that holds rows
                return {path for capture_id in self._store.capture_ids() for path in self._store.reusable(capture_id)}
        for shard in self._uncaptured:
            try:
                keys = {row.key for row in encode_shard(shard, self._spec.encoder).rows}
            except DistillError:
                unreadable = unreadable | {shard.key}
                continue
            files |= {path for rows in captured for at in rows.places(keys).values() for path, _ in at}
        own_files = self._store.files(self._spec.capture_id)
        return files | {path for (key, _), path in own_files.items() if key in unreadable}


def _is_captured(spec: CaptureSpec, shard: Shard, store: CaptureStore) -> bool:
    try:
        return store.current(spec, shard) is not None
    except CaptureError:
        return False
