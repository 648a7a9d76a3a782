"""Ctrl-C that Dagster would swallow.

While a run writes its records, Dagster replaces the SIGINT handler with one that only sets a flag,
and drops the flag when the run ends: a Ctrl-C in that moment is lost, and the next shard begins.
Python's wake-up descriptor hears of a signal whatever handler is installed.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def noticed_interrupts() -> Iterator[Callable[[], None]]:
    """Yield a check that raises KeyboardInterrupt if SIGINT came since the block began.

    Signals reach the main thread only; elsewhere the check never raises.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    reader, writer = os.pipe()
    for descriptor in (reader, writer):
        os.set_blocking(descriptor, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def check() -> None:
        with contextlib.suppress(BlockingIOError):
            if signal.SIGINT in os.read(reader, 4096):
                raise KeyboardInterrupt

    try:
        yield check
    finally:
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)
