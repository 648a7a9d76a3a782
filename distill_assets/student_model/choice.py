"""What of a capture a student learns from: all rows, or those that were chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distill_assets.student_model.saving import UsedCapture
from distill_assets.teacher_capture.sparse_targets import CapturedRow
from distill_assets.teacher_capture.store import Capture, RowKey, read_row_keys, read_rows


@dataclass(frozen=True)
class Choice:
    """A capture and the numbers of its rows that are learnt from, ascending; None: all."""

    capture: Capture
    rows: NDArray[np.int32] | None = None

    def row_keys(self) -> list[RowKey]:
        """Keys and weights of the rows, in order."""
        keys = read_row_keys(self.capture.path)
        return keys if self.rows is None else [keys[row] for row in self.rows]

    def read(self) -> list[CapturedRow]:
        """The rows as a student learns from them."""
        return read_rows(self.capture.path, to_learn_from=True, only=self.rows)

    def used(self) -> UsedCapture:
        """What a student's record says of it."""
        c, n = self.capture, self.capture.stats.rows
        if self.rows is None:
            return UsedCapture(c.shard, c.version, c.capture_id, n)
        return UsedCapture(c.shard, c.version, c.capture_id, len(self.rows), as_bits(self.rows, n))


def choices(captures: Iterable[Capture], chosen: Mapping[str, NDArray[np.int32]] | None) -> list[Choice]:
    """Those of `captures` of which any row is learnt from. `chosen`: rows by shard; None: all of all."""
    if chosen is None:
        return [Choice(capture) for capture in captures]
    return [Choice(capture, chosen[capture.shard]) for capture in captures if capture.shard in chosen]


def as_bits(rows: NDArray[np.int32], n: int) -> str:
    """Which of `n` rows these are, in hexadecimal digits: the first row is the highest bit."""
    is_chosen = np.zeros(n, dtype=bool)
    is_chosen[rows] = True
    return np.packbits(is_chosen).tobytes().hex()
