"""Capture one shard: encode, reuse rows already captured, run the teacher on the rest, publish."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from distill_assets.dataset_shards.discover import Shard
from distill_assets.dataset_shards.encode import EncodedRow, describe_bad_row, encode_shard
from distill_assets.foundation.errors import SHARD_FAILURES
from distill_assets.foundation.language_model import forward_batch_tokens, resolve_device
from distill_assets.foundation.progress import Progress, ProgressListener, ignore_progress
from distill_assets.teacher_capture.chunks import ChunkFolder, Figures, plan_chunks, total_stats
from distill_assets.teacher_capture.engine import score_rows
from distill_assets.teacher_capture.identity import CaptureSpec
from distill_assets.teacher_capture.reuse import Place, captured_keys, held, targets_at
from distill_assets.teacher_capture.sparse_targets import CapturedRow, SparseTargets
from distill_assets.teacher_capture.store import Capture, CaptureStore
from distill_assets.teacher_capture.teacher import load_teacher


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
    only if a row is left for it. `force` recaptures every row. What is wrong with the shard is recorded
    in the store under this content and raised; anything else (a device, a full disk) only raised. The
    file appears whole or not at all; a killed run goes on from its last finished chunk.
    """
    name = (spec.capture_id, shard.key, shard.version)
    try:
        if not force and (current := store.current(spec.capture_id, shard, spec.encoder.skips_bad_rows)):
            return CaptureReport(current, written=False)
        report = _capture(spec, shard, store, device, batch_tokens, force, on_progress)
    except SHARD_FAILURES as error:
        store.record_failure(*name, str(error))
        raise
    store.forget_failure(*name)
    return report


def _capture(
    spec: CaptureSpec,
    shard: Shard,
    store: CaptureStore,
    device: str,
    batch_tokens: int | None,
    force: bool,
    on_progress: ProgressListener,
) -> CaptureReport:
    name = (spec.capture_id, shard.key, shard.version)
    encoded = encode_shard(shard, spec.encoder)
    budget = batch_tokens or forward_batch_tokens(resolve_device(device))
    chunks = plan_chunks(encoded.rows, budget)
    finished = ChunkFolder(store.unfinished(*name), spec.targets.precision)
    if force:
        finished.clear()

    def places(rows: Sequence[EncodedRow]) -> dict[str, Place]:
        """Where rows are captured already; `force` trusts only what this run made."""
        keys = {row.key for row in rows}
        if force:
            return held(finished.folder, finished.files(), keys)
        return captured_keys(store, spec.capture_id, keys)

    todo = [chunk for chunk in chunks if not finished.is_finished(chunk)]
    rows_todo = [row for chunk in todo for row in chunk.rows]
    known = places(rows_todo)
    meter = _Meter(shard.key, {row.key: len(row.input_ids) for row in rows_todo if row.key not in known}, on_progress)
    for chunk in todo:
        began = time.monotonic()
        targets = targets_at(places(chunk.rows))
        fresh = list({row.key: row for row in chunk.rows if row.key not in targets}.values())
        if fresh:
            teacher = load_teacher(spec.teacher, spec.weights, spec.dtype, device)
            began = time.monotonic()
            for i, scored in score_rows(teacher, fresh, spec.targets, budget):
                targets[fresh[i].key] = scored
                meter.count(fresh[i].key)
        rows = [_captured(chunk.start + i, row, targets[row.key]) for i, row in enumerate(chunk.rows)]
        tokens = sum(len(row.input_ids) for row in fresh)
        finished.write(chunk, rows, Figures.of(rows, len(fresh), tokens, time.monotonic() - began))
    capture = store.publish(
        finished.tables(chunks),
        spec.targets.precision,
        _footer(spec, shard),
        total_stats(finished.figures(chunks), len(encoded.bad_rows), encoded.n_without_target),
    )
    finished.clear()
    return CaptureReport(
        capture, written=True, bad_rows=tuple(describe_bad_row(shard, bad) for bad in encoded.bad_rows)
    )


class _Meter:
    """Tells a listener how many tokens the teacher has seen of those it must see."""

    def __init__(self, shard: str, lengths: Mapping[str, int], on_progress: ProgressListener) -> None:
        self._shard, self._lengths, self._on_progress = shard, lengths, on_progress
        self._total, self._done, self._started = sum(lengths.values()), 0, time.monotonic()

    def count(self, key: str) -> None:
        self._done += self._lengths.get(key, 0)
        seconds = time.monotonic() - self._started
        self._on_progress(Progress(f"teacher on {self._shard}", self._done, self._total, "tokens", seconds))


def _captured(number: int, row: EncodedRow, targets: SparseTargets) -> CapturedRow:
    return CapturedRow(
        row=number,
        key=row.key,
        id=row.id,
        input_ids=row.input_ids,
        weight=row.weight,
        truncated=row.truncated,
        targets=targets,
    )


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
