"""What of the captures a student learns from, and how often: `training.where` and `training.mixture`.

A row that is to come w times an epoch has come floor(u + w e) times before epoch e (from 0), where u in [0, 1) is a
hash of the seed and its key. With w = 1/2 about half of the rows come in an epoch and the others in the next. Which
ones depends on no other row: those that are appended change nothing for those that are there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from distill_assets.foundation.errors import SettingsError
from distill_assets.foundation.settings import TrainingSettings
from distill_assets.student_model.identity import WeightedRow
from distill_assets.student_model.saving import UsedCapture
from distill_assets.teacher_capture.sparse_targets import CapturedRow
from distill_assets.teacher_capture.store import Capture, RowKey, read_row_keys, read_rows

# Captures read at a time: Arrow keeps about two cores busy with one, and whole tables are in memory meanwhile.
_READERS = 4

Rows = NDArray[np.int32]  # numbers of rows of a capture, ascending


class Turns:
    """When each of some rows comes, by its `passes` an epoch."""

    def __init__(self, rows: Sequence[WeightedRow], seed: int) -> None:
        self._passes = np.array([row.passes for row in rows], dtype=np.float64)
        # Whole passes need no start.
        self._start = np.array([_start(row.key, seed) if row.passes % 1 else 0.0 for row in rows], dtype=np.float64)

    def before(self, epoch: int) -> NDArray[np.int64]:
        """How often each row has come when this epoch, from 0, begins."""
        return np.floor(self._start + self._passes * epoch).astype(np.int64)

    def of(self, epoch: int) -> list[int]:
        """Indices of the rows of an epoch, ascending; one that comes twice stands there twice."""
        rows: list[int] = np.repeat(np.arange(len(self._passes)), self.before(epoch + 1) - self.before(epoch)).tolist()
        return rows


def _start(key: str, seed: int) -> float:
    """Uniform in [0, 1), of 32 bits: whole numbers are added to it without rounding."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:4], "big") / 2**32


@dataclass(frozen=True)
class Choice:
    """A capture, the numbers of its rows that are learnt from (None: all), and how often an epoch they come."""

    capture: Capture
    rows: Rows | None = None
    passes: float = 1.0

    def row_keys(self) -> list[RowKey]:
        """Keys, weights and passes of the rows, in order."""
        keys = read_row_keys(self.capture.path)
        chosen = keys if self.rows is None else [keys[row] for row in self.rows]
        return chosen if self.passes == 1 else [replace(key, passes=self.passes) for key in chosen]

    def read(self) -> list[CapturedRow]:
        """The rows as a student learns from them."""
        rows = read_rows(self.capture.path, to_learn_from=True, only=self.rows)
        return rows if self.passes == 1 else [replace(row, passes=self.passes) for row in rows]

    @staticmethod
    def read_all(choices: Sequence[Choice]) -> list[CapturedRow]:
        """The rows of all of them, in their order; several captures are read at a time."""
        with ThreadPoolExecutor(_READERS) as pool:
            return [row for rows in pool.map(Choice.read, choices) for row in rows]

    def used(self) -> UsedCapture:
        """What a student's record says of it."""
        c, n = self.capture, self.capture.stats.rows
        if self.rows is None:
            return UsedCapture(c.shard, c.version, c.capture_id, n)
        return UsedCapture(c.shard, c.version, c.capture_id, len(self.rows), as_bits(self.rows, n))

    def ever_seen(self, training: TrainingSettings) -> Choice:
        """Without the rows that come in none of the epochs."""
        if self.passes * training.epochs >= 1:
            return self
        keys = self.row_keys()
        numbers = np.arange(len(keys), dtype=np.int32) if self.rows is None else self.rows
        return replace(self, rows=numbers[Turns(keys, training.seed).before(training.epochs) > 0])


def choices(captures: Iterable[Capture], training: TrainingSettings, chosen: Mapping[str, Rows] | None) -> list[Choice]:
    """What is learnt from of the training shards' captures. `chosen`: rows by shard; None: all of all.

    SettingsError where `training.mixture` names a shard that is not there, or leaves nothing.
    """
    captures = list(captures)
    _require_shards(training.mixture, [capture.shard for capture in captures])
    rows = {c.shard: None for c in captures} if chosen is None else chosen
    found = [Choice(c, rows[c.shard], passes_of(c.shard, training.mixture)) for c in captures if c.shard in rows]
    found = [choice.ever_seen(training) for choice in found if choice.passes]
    found = [choice for choice in found if choice.rows is None or len(choice.rows)]
    if not found and training.mixture:
        raise SettingsError(
            f"distill.yaml: training.mixture leaves no row to learn from in {training.epochs} epoch(s); "
            "raise a number of passes"
        )
    return found


def passes_of(shard: str, mixture: Mapping[str, float]) -> float:
    """How often an epoch the rows of a shard come: what the first pattern that fits its key says, else once."""
    return next((passes for pattern, passes in mixture.items() if fnmatchcase(shard, pattern)), 1.0)


def _require_shards(mixture: Mapping[str, float], shards: Sequence[str]) -> None:
    for pattern in mixture:
        if not any(fnmatchcase(shard, pattern) for shard in shards):
            there = ", ".join(sorted(shards)[:8]) + (" ..." if len(shards) > 8 else "")
            raise SettingsError(
                f"distill.yaml: training.mixture: {pattern} fits no training shard; mend it, or remove it\n"
                f"there are {there}"
            )


def as_bits(rows: Rows, n: int) -> str:
    """Which of `n` rows these are, in hexadecimal digits: the first row is the highest bit."""
    is_chosen = np.zeros(n, dtype=bool)
    is_chosen[rows] = True
    return np.packbits(is_chosen).tobytes().hex()
