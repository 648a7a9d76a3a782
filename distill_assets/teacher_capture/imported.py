"""What an imported capture is, and how one is made for a shard that was edited since, of the rows it was imported with.

Nobody here could make these log-probabilities again, and the teacher of the home must not stand in. So a row whose
`id` or `weight` was edited, one that stands elsewhere now, or the rows left when others were deleted take
theirs from an imported capture of the shard's own name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distill_assets.dataset_shards.discover import Shard
from distill_assets.dataset_shards.encode import EncodedRow, EncodedShard, place_in
from distill_assets.foundation.errors import CaptureError, CaptureOutOfReach, PinnedCapture
from distill_assets.foundation.fingerprints import digest
from distill_assets.foundation.settings import TargetSettings
from distill_assets.teacher_capture.arrow import to_arrow
from distill_assets.teacher_capture.chunks import Cost, Figures, plan_chunks, plan_windows, total_stats
from distill_assets.teacher_capture.identity import FORMAT_VERSION, CaptureSpec
from distill_assets.teacher_capture.reuse import Place, held, targets_at
from distill_assets.teacher_capture.sparse_targets import CapturedRow, SparseTargets
from distill_assets.teacher_capture.store import (
    IMPORT_AGAIN,
    IMPORTED,
    Capture,
    CaptureFile,
    CaptureStats,
    CaptureStore,
    read_capture,
)

_BATCH_TOKENS = 2_048  # for row groups of 65,536 tokens: no forward pass asks for others


class ImportedContent:
    """The rows of an imported capture, taken in as they are stored, and what the capture is by them."""

    def __init__(self, precision: Literal["compact", "exact"]) -> None:
        self._precision: Literal["compact", "exact"] = precision
        self._content = hashlib.sha256()
        self._most_kept = 1

    def add(self, rows: Sequence[CapturedRow]) -> None:
        """Take in the next row group."""
        for row in rows:
            self._most_kept = max(self._most_kept, int(row.targets.kept_P.max()))
            self._content.update(row.key.encode())
            for values in _arrays(row.targets):
                self._content.update(np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).tobytes())

    @property
    def settings(self) -> TargetSettings:
        """Target settings that say what is kept; as many ids as the fullest position so far."""
        return TargetSettings(k=self._most_kept, precision=self._precision)

    def identity(self, spec: CaptureSpec) -> dict[str, Any]:
        """What the capture is: these distributions of these rows, stored in this way. No teacher of the home's."""
        return {
            "format": FORMAT_VERSION,
            "source": IMPORTED,
            "tokenizer": spec.identity["tokenizer"],
            "targets": self.settings.identity,
            "content": self._content.hexdigest(),
        }

    def describe(
        self,
        file: CaptureFile,
        spec: CaptureSpec,
        shard: str,
        version: str,
        teacher: Mapping[str, Any],
        stats: CaptureStats,
        derived_from: Sequence[str] = (),
    ) -> None:
        """Write the footer of a capture that holds these rows."""
        identity = self.identity(spec)
        footer = {
            "format_version": FORMAT_VERSION,
            "source": IMPORTED,
            "capture_id": digest(identity),
            "shard": shard,
            "version": version,
            "identity": identity,
            "teacher": dict(teacher),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "derived_from": list(derived_from),
        }
        file.describe(footer, stats)


def content_of(targets: SparseTargets) -> bytes:
    """A hash of all that the targets of a row say."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(values).tobytes() for values in _arrays(targets))).digest()


def _arrays(targets: SparseTargets) -> tuple[np.ndarray, ...]:
    return (
        targets.offsets_P1,
        targets.support_ids_N,
        targets.support_logprobs_N,
        targets.tail_logprob_P,
        targets.gold_logprob_P,
        targets.entropy_P,
    )


def imported_source(
    spec: CaptureSpec, shard: Shard, store: CaptureStore, rows: Sequence[EncodedRow]
) -> tuple[Capture, dict[str, list[Place]]]:
    """The imported capture that an edited shard's rows are copied from, and the places of their keys in it.

    It was imported under the shard's own name and holds every row; of several the newest, for who imports a name
    again wants what is imported then. Never some rows from one and some from another: they may be of different
    teachers. PinnedCapture, with the first row that was not imported, where there is none.
    """
    captures = _imports(spec, shard, store)
    keys = {row.key for row in rows}
    held_by = [held(capture.path, [capture.path]).places(keys) for capture in captures]
    for capture, places in zip(captures, held_by, strict=True):
        if places.keys() == keys:
            return capture, places
    known = set().union(*held_by)
    missing = next((row for row in rows if row.key not in known), None)
    if missing is None:
        reason = f"its rows ({shard.path}) were imported at different times, and no import has them all"
    else:
        reason = (
            f"{place_in(shard, missing.line)} of {shard.path} has no imported log-probabilities (it was edited, or an "
            "import was cut off before it wrote the file)"
        )
    raise PinnedCapture(
        f"shard {shard.key} is not what was imported: {reason}; {IMPORT_AGAIN}, or give the file another name to let "
        "the teacher capture it"
    )


def _imports(spec: CaptureSpec, shard: Shard, store: CaptureStore) -> list[Capture]:
    """What was imported under the shard's name by this tokenizer, the newest first; PinnedCapture where all of it is
    by another, or damaged.
    """
    captures: list[Capture] = []
    damaged: list[Path] = []
    for (name, _), path in store.files(IMPORTED).items():
        if name != shard.key:
            continue
        try:
            capture = read_capture(path)
        except CaptureOutOfReach:
            raise
        except CaptureError:
            damaged.append(path)
            continue
        if capture.identity["tokenizer"] == spec.identity["tokenizer"]:
            captures.append(capture)
    if not captures:
        wrong = f"{damaged[0]} is damaged" if damaged else "with another tokenizer than the home has now"
        raise PinnedCapture(f"shard {shard.key} was imported, but {wrong}; {IMPORT_AGAIN}")
    return sorted(captures, key=lambda capture: (capture.created, capture.path.stat().st_mtime_ns), reverse=True)


def copy_imported(spec: CaptureSpec, shard: Shard, store: CaptureStore, encoded: EncodedShard) -> Capture:
    """Write the imported capture of an edited shard, whose footer says what it is derived from.

    PinnedCapture where a row was not imported, CaptureError where it cannot be read.
    """
    source, places = imported_source(spec, shard, store, encoded.rows)
    settings = TargetSettings.model_validate(dict(source.identity["targets"]))
    content, parts = ImportedContent(settings.precision), []
    weighted = encoded.has_position_weights
    with store.publishing(IMPORTED, shard.key, shard.version, settings, weighted) as file:
        for window in plan_windows(plan_chunks(encoded.rows, _BATCH_TOKENS)):
            targets = targets_at({row.key: places[row.key] for chunk in window for row in chunk.rows})
            for chunk in window:
                if lost := [row for row in chunk.rows if row.key not in targets]:
                    row = f"{place_in(shard, lost[0].line)} of {shard.path}"
                    raise PinnedCapture(
                        f"shard {shard.key}: {source.path} is damaged where it holds {row}; {IMPORT_AGAIN}"
                    )
                rows = [CapturedRow.of(chunk.start + i, row, targets[row.key][1]) for i, row in enumerate(chunk.rows)]
                content.add(rows)
                parts.append(Figures.of(rows, Cost(0, 0, 0.0)))
                file.append(to_arrow(rows, settings, weighted))
        stats = total_stats(parts, len(encoded.bad_rows), encoded.n_without_target)
        content.describe(file, spec, shard.key, shard.version, source.teacher, stats, [source.capture_id])
    return read_capture(file.path)
