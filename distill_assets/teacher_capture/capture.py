"""Capture one shard: encode, reuse rows already captured, run the teacher on the rest, publish."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from distill_assets.dataset_shards.discover import Shard
from distill_assets.dataset_shards.encode import EncodedRow, EncodedShard, describe_bad_row, encode_shard
from distill_assets.foundation.devices import free_memory, is_out_of_memory, resolve_device
from distill_assets.foundation.errors import (
    SHARD_FAILURES,
    CaptureError,
    CaptureOutOfReach,
    EditedImport,
    OutOfMemory,
)
from distill_assets.foundation.files import alone, sweep_beside
from distill_assets.foundation.language_model import forward_batch_tokens
from distill_assets.foundation.progress import Progress, ProgressListener, ignore_progress
from distill_assets.foundation.settings import TargetSettings
from distill_assets.teacher_capture.chunks import (
    ChunkFolder,
    ChunkWriter,
    Cost,
    derived_sources,
    plan_chunks,
    plan_windows,
    total_stats,
)
from distill_assets.teacher_capture.derive import Source, sources
from distill_assets.teacher_capture.engine import score_rows
from distill_assets.teacher_capture.identity import CaptureSpec
from distill_assets.teacher_capture.imported import copy_imported
from distill_assets.teacher_capture.reuse import KeyIndex, captured_rows, targets_at
from distill_assets.teacher_capture.sparse_targets import CapturedRow, SparseTargets
from distill_assets.teacher_capture.store import Capture, CaptureStore, WithoutDamaged, read_capture
from distill_assets.teacher_capture.teacher import Teacher, teacher_in_turn


@dataclass(frozen=True)
class CaptureReport:
    """A finished capture. `written` is False when it was current and nothing was done."""

    capture: Capture
    written: bool
    bad_rows: tuple[str, ...] = ()


def capture_shard(
    spec: CaptureSpec,
    shard: Shard,
    store: CaptureStore,
    *,
    device: str = "auto",
    batch_tokens: int | None = None,
    force: bool = False,
    on_progress: ProgressListener = ignore_progress,
) -> CaptureReport:
    """Make the capture of `shard` under `spec` current.

    Rows already captured under this identity, in whichever file, are copied; the teacher is loaded
    only if a row is left for it. `force` recaptures every row, but for chunks that a killed forced run finished;
    a damaged capture is made again; an imported
    one stands whatever is asked, is written anew for a shard that was edited but whose rows were all imported, and
    PinnedCapture is raised where it does not fit the shard. What is wrong with the shard is recorded in the store under
    this content and raised; anything else (a device, a full disk, a stored capture out of reach) only raised. The file
    appears whole or not at all; a killed run goes on from its last finished chunk.
    """
    name = (spec.capture_id, shard.key, shard.version)
    try:
        pinned = store.pinned(spec, shard)
    except EditedImport:
        encoded = encode_shard(shard, spec.encoder.of_imported())
        return CaptureReport(copy_imported(spec, shard, store, encoded), True, _bad_rows(shard, encoded))
    if current := pinned or (None if force else _current(spec, shard, store)):
        return CaptureReport(current, written=False)
    with alone(store.lock(*name)):  # two processes on one shard version would work in one folder of chunks
        if not force and (current := _current(spec, shard, store)):
            return CaptureReport(current, written=False)  # another process made it while we waited
        sweep_beside(store.path_of(*name))
        try:
            report = _within_memory(
                shard, partial(_capture, spec, shard, store, device, batch_tokens, force, on_progress)
            )
        except CaptureOutOfReach:
            raise
        except SHARD_FAILURES as error:
            store.record_failure(*name, str(error))
            raise
        store.forget_failure(*name)
        return report


def _current(spec: CaptureSpec, shard: Shard, store: CaptureStore) -> Capture | None:
    with WithoutDamaged():
        return store.current(spec, shard)
    return None


def _within_memory(shard: Shard, capture: Callable[[bool], CaptureReport]) -> CaptureReport:
    """What `capture` makes with chunks written beside the teacher's work; where memory runs out, once more from the
    last finished chunk, one thing after the other. OutOfMemory when that does not fit either.
    """
    for beside in (True, False):
        try:
            return capture(beside)
        except OutOfMemory:  # a single row's forward pass, which may fit once no chunk is written beside it
            if not beside:
                raise
        except (RuntimeError, OSError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            said = str(error).partition("\n")[0] or type(error).__name__
        free_memory()  # outside the except block, where the traceback holds on to the rows
    raise OutOfMemory(
        f"shard {shard.key}: no memory left ({said})\n"
        "free some, or split the shard, and run again: it goes on from the last finished chunk"
    )


def _capture(
    spec: CaptureSpec,
    shard: Shard,
    store: CaptureStore,
    device: str,
    batch_tokens: int | None,
    force: bool,
    on_progress: ProgressListener,
    beside: bool,
) -> CaptureReport:
    name = (spec.capture_id, shard.key, shard.version)
    encoded = encode_shard(shard, spec.encoder)
    planned = batch_tokens or forward_batch_tokens(resolve_device(device))
    chunks = plan_chunks(encoded.rows, planned)
    finished = ChunkFolder(store.unfinished(*name), spec.targets, spec.identity, encoded.has_position_weights)
    if force:
        finished.begin_anew()
    before = _Before(spec, store, finished, force)
    todo = [chunk for chunk in chunks if not finished.is_finished(chunk)]
    lengths = {row.key: len(row.input_ids) for chunk in todo for row in chunk.rows}
    meter = _Meter(shard.key, {key: lengths[key] for key in lengths.keys() - before.keys(lengths)}, on_progress)
    with (
        store.publishing(*name, spec.targets, encoded.has_position_weights) as file,
        ExitStack() as turn,
        ChunkWriter(finished, file, chunks, beside) as writer,
    ):
        teacher: Teacher | None = None
        for window in plan_windows(todo):
            stored = before.rows({row.key for chunk in window for row in chunk.rows})
            for chunk in window:
                keys = {row.key for row in chunk.rows}
                if again := keys - stored.keys():
                    # What this window scored before is read back, so that it is as after a kill: rounded.
                    writer.finish(again)
                    stored |= before.rows(again)
                fresh = list({row.key: row for row in chunk.rows if row.key not in stored}.values())
                began, scored = time.monotonic(), {}
                if fresh:
                    if teacher is None:
                        teacher = turn.enter_context(teacher_in_turn(spec.weights, spec.dtype, device, meter.tell))
                        began = time.monotonic()
                    try:
                        scored = _score(
                            teacher, chunk.start, fresh, spec.targets, finished, planned, meter, writer.keep
                        )
                    except CaptureError as error:
                        raise CaptureError(f"shard {shard.key} ({shard.path}): {error}") from error
                targets = scored | {key: stored[key].targets for key in keys & stored.keys()}
                derived_from = {source for key in keys & stored.keys() for source in stored[key].derived_from}
                rows = [CapturedRow.of(chunk.start + i, row, targets[row.key]) for i, row in enumerate(chunk.rows)]
                tokens = sum(len(row.input_ids) for row in fresh)
                cost = Cost(len(fresh), tokens, time.monotonic() - began)
                writer.write(chunk, rows, cost, derived_from)
        writer.finish_all()
        footer = _footer(spec, shard) | {"derived_from": finished.derived_from(chunks)}
        file.describe(footer, total_stats(finished.figures(chunks), len(encoded.bad_rows), encoded.n_without_target))
    finished.clear()
    return CaptureReport(read_capture(file.path), True, _bad_rows(shard, encoded))


def _bad_rows(shard: Shard, encoded: EncodedShard) -> tuple[str, ...]:
    return tuple(describe_bad_row(shard, bad) for bad in encoded.bad_rows)


@dataclass(frozen=True)
class _Stored:
    """A row as a file holds it, and the other captures it was derived from."""

    targets: SparseTargets
    derived_from: tuple[str, ...]


class _Before:
    """What is captured already of a shard's rows; `force` trusts only what this run made."""

    def __init__(self, spec: CaptureSpec, store: CaptureStore, finished: ChunkFolder, force: bool) -> None:
        self._spec, self._store, self._finished, self._force = spec, store, finished, force
        self._sources = [] if force else sources(store, spec)
        self._made = KeyIndex()  # of a forced capture's own chunks; nobody needs them when it has ended

    def _own(self) -> KeyIndex:
        if self._force:
            self._made.look_at(self._finished.files())
            return self._made
        return captured_rows(self._store, self._spec.capture_id)

    def _others(self) -> dict[Source, KeyIndex]:
        return {source: captured_rows(self._store, source.capture_id) for source in self._sources}

    def keys(self, keys: Collection[str]) -> set[str]:
        """Those of `keys` that need no teacher."""
        known = [self._own(), *self._others().values()]
        return {key for key in keys if any(key in rows for rows in known)}

    def rows(self, keys: set[str]) -> dict[str, _Stored]:
        """Those rows, read; what damaged files alone held is left out."""
        found = self._read(keys)
        # A neighbour that ends while its chunks are read takes them away; its capture holds the rows since.
        return found | self._read(keys - found.keys())

    def _read(self, keys: set[str]) -> dict[str, _Stored]:
        found, wanted = _as_they_are(self._own(), keys), self._spec.targets
        for source, rows in self._others().items():
            left = keys - found.keys()
            if source.as_they_are:
                found |= _as_they_are(rows, left)
            else:
                held = targets_at(rows.places(left))
                found |= {
                    key: _Stored(stored.narrowed(wanted.k, wanted.min_probability), (source.capture_id,))
                    for key, (_, stored) in held.items()
                }
        return found


def _as_they_are(rows: KeyIndex, keys: set[str]) -> dict[str, _Stored]:
    """Those of `keys` that are held there, with where they came from themselves."""
    held = targets_at(rows.places(keys))
    origins = _origins({path for path, _ in held.values()})
    return {key: _Stored(targets, origins[path]) for key, (path, targets) in held.items() if path in origins}


def _origins(paths: Collection[Path]) -> dict[Path, tuple[str, ...]]:
    """What files of captured rows were derived from; files that are damaged, or gone by now, are left out."""
    origins = {}
    for path in paths:
        with WithoutDamaged():
            origins[path] = derived_sources(path)
    return origins


class _Meter:
    """Tells a listener how many tokens the teacher has seen of those it must see."""

    def __init__(self, shard: str, lengths: Mapping[str, int], on_progress: ProgressListener) -> None:
        self._shard, self._left, self._on_progress = shard, dict(lengths), on_progress
        self._total, self._done, self._started = sum(lengths.values()), 0, time.monotonic()
        self.note = ""

    def count(self, key: str) -> None:
        self._done += self._left.pop(key, 0)  # a row that is scored a second time is no progress
        self.tell(self.note)

    def tell(self, note: str) -> None:
        seconds = time.monotonic() - self._started
        self._on_progress(Progress(f"teacher on {self._shard}", self._done, self._total, "tokens", seconds, note))


def _score(
    teacher: Teacher,
    start: int,
    rows: Sequence[EncodedRow],
    targets: TargetSettings,
    finished: ChunkFolder,
    planned: int,
    meter: _Meter,
    keep_before: Callable[[], None],
) -> dict[str, SparseTargets]:
    """Targets of the chunk at `start`, by row key; the chunk before is kept before the first of them counts. Where
    memory runs out, the chunk starts over with forward passes of half the tokens, and so do all after it, in this run
    and in one that goes on from it.
    """
    while True:
        budget = finished.forward_tokens(start, planned)
        scored = {}
        try:
            for i, row_targets in score_rows(teacher, rows, targets, budget):
                keep_before()
                scored[rows[i].key] = row_targets
                meter.count(rows[i].key)
            return scored
        except OutOfMemory as error:
            if error.rows == 1:
                raise
            finished.reduce_forward_tokens(start, planned, budget // 2)
            meter.note = f"memory ran out: {budget // 2:,} tokens a pass"


def _footer(spec: CaptureSpec, shard: Shard) -> dict[str, Any]:
    return {
        "format_version": spec.identity["format"],
        "capture_id": spec.capture_id,
        "shard": shard.key,
        "version": shard.version,
        "identity": dict(spec.identity),
        "teacher": {"name": spec.teacher.name, "revision": spec.teacher.revision},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
