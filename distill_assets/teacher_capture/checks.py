"""Is a capture what it should be: complete, aligned with its tokens, and what the teacher says?

Three questions, each answered by a report with the figures behind it. The last one needs the teacher and
asks it about a sample of rows only.

Legend: P = supervised positions of a row, N = ids kept in the whole row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from distill_assets.dataset_shards.discover import Shard
from distill_assets.dataset_shards.encode import EncodedRow, Encoder, encoded_rows, supervised_positions
from distill_assets.dataset_shards.rows import BadRow
from distill_assets.foundation.errors import SHARD_FAILURES, CaptureError
from distill_assets.foundation.progress import Progress, ProgressListener, ignore_progress
from distill_assets.teacher_capture.chunks import Cost, Figures
from distill_assets.teacher_capture.identity import CaptureSpec
from distill_assets.teacher_capture.inspection import capture_row_groups, statistics_problem
from distill_assets.teacher_capture.sparse_targets import CapturedRow, weighting
from distill_assets.teacher_capture.store import IMPORT_AGAIN, Capture

LEAST_POSITIONS = 100  # fewer say nothing about alignment
LEAST_RATE = 0.05  # hits of a teacher that cannot guess follow its whims, not chance: an untrained one made 1% of 2,275
_SIGNIFICANCE = 1e-3  # two-sided


@dataclass(frozen=True)
class CompleteReport:
    """Captures compared with their shards, encoded again."""

    captures: int
    rows: int
    positions: int
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.problems


def check_complete(
    spec: CaptureSpec, captured: Sequence[tuple[Shard, Capture]], on_progress: ProgressListener = ignore_progress
) -> CompleteReport:
    """Whether each capture holds the very rows and positions of its shard, in order, and its footer says so.

    Some rows are encoded, and one row group read, at a time; a shard's first problem is told.
    """
    problems, rows, positions = [], 0, 0
    began = time.monotonic()
    for done, (shard, capture) in enumerate(captured):
        seconds = time.monotonic() - began
        on_progress(Progress("captures compared with shards", done, len(captured), "shards", seconds, shard.key))
        try:
            parts = _compared(spec, shard, capture)
        except SHARD_FAILURES as error:
            problems.append(str(error))
            continue
        rows += sum(part.rows for part in parts)
        positions += sum(part.supervised_tokens for part in parts)
    return CompleteReport(len(captured), rows, positions, tuple(problems))


def _compared(spec: CaptureSpec, shard: Shard, capture: Capture) -> list[Figures]:
    """Sums of the capture's row groups; CaptureError where it is not its shard's."""
    where = f"shard {shard.key} ({capture.path})"
    remedy = IMPORT_AGAIN if capture.is_imported else "delete the file and run again"
    own = _OwnRows(shard, spec.encoder.of_imported() if capture.is_imported else spec.encoder)
    parts: list[Figures] = []
    captured = 0
    for group in capture_row_groups(capture.path):
        for row, wanted in zip(group, own, strict=False):
            if not _is_of(row, wanted):
                own.count_the_rest()  # a shard that changed under way is another matter, and says so
                raise CaptureError(f"{where}: row {row.row} is not the shard's; {remedy}")
        captured += len(group)
        parts.append(Figures.of(group, Cost(0, 0, 0.0)))
    own.count_the_rest()
    if captured != own.rows:
        raise CaptureError(f"{where}: {captured} rows, the shard has {own.rows}; {remedy}")
    if (capture.stats.bad_rows, capture.stats.rows_without_target) != (own.bad_rows, own.without_target):
        raise CaptureError(f"{where}: its footer counts other rows that were left out; {remedy}")
    if reason := statistics_problem(capture, parts):
        raise CaptureError(f"{where}: {reason}; {remedy}")
    return parts


class _OwnRows:
    """The rows that a shard's capture should hold, encoded as they are asked for; counts them and those left out."""

    def __init__(self, shard: Shard, encoder: Encoder) -> None:
        self._encoded = encoded_rows(shard, encoder)
        self.rows = self.bad_rows = self.without_target = 0

    def __iter__(self) -> Iterator[EncodedRow]:
        for row in self._encoded:
            if isinstance(row, BadRow):
                self.bad_rows += 1
            elif row.loss_mask.any():
                self.rows += 1
                yield row
            else:
                self.without_target += 1

    def count_the_rest(self) -> None:
        for _ in self:
            pass


def _is_of(row: CapturedRow, wanted: EncodedRow) -> bool:
    return (
        (row.key, row.id, row.truncated) == (wanted.key, wanted.id, wanted.truncated)
        and row.weight == np.float32(wanted.weight)
        and np.array_equal(row.input_ids, wanted.input_ids)
        and np.array_equal(row.targets.positions_P, supervised_positions(wanted))
        and row.weighting == weighting(wanted.position_weights)
    )


@dataclass(frozen=True)
class AlignedReport:
    """Of how many positions t the likeliest kept id is the token t, t + 1 or t + 2."""

    positions: int
    hits: tuple[int, int, int]

    @property
    def rates(self) -> tuple[float, ...]:
        return tuple(hits / max(self.positions, 1) for hits in self.hits)

    @property
    def enough(self) -> bool:
        return self.positions >= LEAST_POSITIONS

    @property
    def tells(self) -> bool:
        """Whether token t + 1, which is what position t tells of, is plainly hit most."""
        before, here, after = self.hits
        return self.enough and _is_more(here, max(before, after))

    @property
    def passed(self) -> bool:
        """False where a neighbour of token t + 1 is plainly hit more; what tells nothing passes."""
        before, here, after = self.hits
        most = max(before, after)
        return not (self.enough and most >= LEAST_RATE * self.positions and _is_more(most, here))


def _is_more(hits: int, others: int) -> bool:
    """Whether `hits` is significantly more than `others`, by a sign test in its normal approximation.

    A position where both hit, because the text repeats a token, should not count; that it does only makes
    the test stricter.
    """
    if hits <= others:
        return False
    z = (hits - others - 1) / math.sqrt(hits + others)
    return math.erfc(z / math.sqrt(2)) < _SIGNIFICANCE


def check_aligned(captures: Sequence[Capture], on_progress: ProgressListener = ignore_progress) -> AlignedReport:
    """Whether position t tells of token t + 1, by what a teacher is good at: guessing it.

    CaptureError when a file is damaged.
    """
    began = time.monotonic()

    def rows() -> Iterator[CapturedRow]:
        for done, capture in enumerate(captures):
            seconds = time.monotonic() - began
            on_progress(Progress("guesses counted", done, len(captures), "captures", seconds, capture.shard))
            for group in capture_row_groups(capture.path):
                yield from group

    return count_aligned(rows())


def count_aligned(rows: Iterable[CapturedRow]) -> AlignedReport:
    """The counts of these rows; positions of which token t + 2 exists are counted."""
    positions, hits = 0, np.zeros(3, dtype=np.int64)
    for row in rows:
        positions_P = row.targets.positions_P
        whole_P = positions_P + 2 < len(row.input_ids)
        likeliest_P = row.targets.support_ids_N[row.targets.offsets_P1[:-1]][whole_P]
        positions += int(whole_P.sum())
        for offset in range(3):
            hits[offset] += (likeliest_P == row.input_ids[positions_P[whole_P] + offset]).sum()
    before, here, after = hits.tolist()
    return AlignedReport(positions, (before, here, after))
