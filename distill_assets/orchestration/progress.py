"""Progress of a running asset: lines with an ETA in Dagster's log, and whoever else listens."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg

from distill_assets.foundation.progress import Progress, ProgressListener, as_line

FIRST_SECONDS, LOG_SECONDS = 1.0, 10.0  # each line is an event that takes Dagster some 40 ms to record

_listeners: list[ProgressListener] = []


@contextmanager
def shown_by(listener: ProgressListener) -> Iterator[None]:
    """Also show the progress of assets that run in this process to `listener` (a progress bar)."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def progress_of(context: dg.AssetExecutionContext | dg.AssetCheckExecutionContext) -> ProgressListener:
    """A listener that logs at most one line in LOG_SECONDS, the first after FIRST_SECONDS, and the last one."""
    logged = {"at": time.monotonic() + FIRST_SECONDS - LOG_SECONDS}

    def listen(progress: Progress) -> None:
        for listener in _listeners:
            listener(progress)
        now = time.monotonic()
        if now - logged["at"] >= LOG_SECONDS or progress.done >= progress.total:
            logged["at"] = now
            context.log.info(as_line(progress))

    return listen
