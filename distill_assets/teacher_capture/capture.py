"""Capture one shard: encode, reuse rows already captured, run the teacher on the rest, publish."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from distill_assets.dataset_shards.discover import Shard
from distill_assets.dataset_shards.encode import EncodedRow, EncodedShard, describe_bad_row, encode_shard
from distill_assets.foundation.errors import SHARD_FAILURES
from distill_assets.foundation.language_model import forward_batch_tokens
from distill_assets.foundation.progress import Progress, ProgressListener, ignore_progress
from distill_assets.teacher_capture.engine import score_rows
from distill_assets.teacher_capture.identity import CaptureSpec
from distill_assets.teacher_capture.reuse import captured_targets
from distill_assets.teacher_capture.sparse_targets import CapturedRow, SparseTargets
from distill_assets.teacher_capture.store import Capture, CaptureStore, CaptureWriter, read_capture
from distill_assets.teacher_capture.teacher import Teacher, load_teacher

CHUNK_TOKENS = 65_536  # tokens in one row group


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
    file appears whole or not at all.
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
    known = {} if force else captured_targets(store, spec.capture_id, {row.key for row in encoded.rows})
    new = [row for row in encoded.rows if row.key not in known]
    teacher = None
    if new:
        teacher = load_teacher(spec.teacher, spec.weights, spec.dtype, device)

    started = time.monotonic()
    n_tokens = sum({row.key: len(row.input_ids) for row in new}.values())
    with store.writing(*name, spec.targets.precision) as writer:
        done = 0
        for start, chunk in _chunks(encoded.rows):
            fresh = {row.key: row for row in chunk if row.key not in known}
            for key, targets in _score(teacher, list(fresh.values()), spec, batch_tokens):
                known[key] = targets
                done += len(fresh[key].input_ids)
                seconds = time.monotonic() - started
                on_progress(Progress(f"teacher on {shard.key}", done, n_tokens, "tokens", seconds))
            writer.write(_captured(start + i, row, known[row.key]) for i, row in enumerate(chunk))
        _finish(writer, spec, shard, encoded, new, time.monotonic() - started)
    return CaptureReport(
        read_capture(store.path_of(*name)),
        written=True,
        bad_rows=tuple(describe_bad_row(shard, bad) for bad in encoded.bad_rows),
    )


def _chunks(rows: Sequence[EncodedRow]) -> Iterator[tuple[int, Sequence[EncodedRow]]]:
    """(first row, rows) of at most CHUNK_TOKENS tokens, planned from the rows alone."""
    start = tokens = 0
    for i, row in enumerate(rows):
        if tokens and tokens + len(row.input_ids) > CHUNK_TOKENS:
            yield start, rows[start:i]
            start, tokens = i, 0
        tokens += len(row.input_ids)
    yield start, rows[start:]


def _score(
    teacher: Teacher | None, rows: Sequence[EncodedRow], spec: CaptureSpec, batch_tokens: int | None
) -> Iterator[tuple[str, SparseTargets]]:
    if teacher is not None:
        budget = batch_tokens or forward_batch_tokens(teacher.device)
        for i, targets in score_rows(teacher, rows, spec.targets, budget):
            yield rows[i].key, targets


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


def _finish(
    writer: CaptureWriter,
    spec: CaptureSpec,
    shard: Shard,
    encoded: EncodedShard,
    new: Sequence[EncodedRow],
    seconds: float,
) -> None:
    scored = {row.key: len(row.input_ids) for row in new}  # a repeated row is scored once
    stats = writer.meter.stats(
        bad_rows=len(encoded.bad_rows),
        rows_without_target=encoded.n_without_target,
        rows_captured=len(scored),
        rows_reused=len(encoded.rows) - len(scored),
        tokens_captured=sum(scored.values()),
        seconds=seconds,
    )
    footer = {
        "format_version": spec.identity["format"],
        "capture_id": spec.capture_id,
        "shard": shard.key,
        "version": shard.version,
        "identity": dict(spec.identity),
        "teacher": {"name": spec.teacher.name, "revision": spec.teacher.revision},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    writer.finish(footer, stats)
