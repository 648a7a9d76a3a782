"""How far a long step is, as a value that a terminal, a log and a web page can all show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One report of a running step: `done` of `total` `unit`s after `seconds`."""

    step: str
    done: int
    total: int
    unit: str
    seconds: float
    note: str = ""

    @property
    def rate(self) -> float:
        """Units a second since the step began; 0 before anything was done."""
        return self.done / self.seconds if self.seconds > 0 else 0.0

    @property
    def eta_seconds(self) -> float | None:
        """Seconds left at the present rate, or None before there is a rate."""
        return (self.total - self.done) / self.rate if self.rate > 0 else None


ProgressListener = Callable[[Progress], None]


def ignore_progress(progress: Progress) -> None:
    """The listener of whoever does not want to know."""


def as_line(progress: Progress) -> str:
    """`teacher on s0: 1,200 of 5,000 tokens, 410 tokens/s, 9 s left`."""
    line = f"{progress.step}: {progress.done:,} of {progress.total:,} {progress.unit}"
    if progress.rate:
        line += f", {progress.rate:,.3g} {progress.unit}/s, {progress.eta_seconds or 0:,.0f} s left"
    return f"{line}, {progress.note}" if progress.note else line
