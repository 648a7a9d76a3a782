"""Ctrl-C while Dagster runs in this process: heard always, and by this process alone.

While a run writes its records, Dagster replaces the SIGINT handler with one that only sets a flag,
and drops the flag when the run ends: a Ctrl-C in that moment is lost, and the next shard begins.
Python's wake-up descriptor hears of a signal whatever handler is installed.

A terminal sends Ctrl-C to every process of the group, and so to the two helpers that Dagster starts
for each step's log (watch_orphans): each would print a traceback. A child inherits the signal mask
of the thread that starts it, so the main thread blocks SIGINT, and a thread that only waits takes
it. Python runs the handler in the main thread all the same.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def noticed_interrupts() -> Iterator[Callable[[], None]]:
    """Yield a check that raises KeyboardInterrupt if SIGINT came since the block began.

    Children started in the block do not hear SIGINT; end them by other means. Python hands signals
    to the main thread only; elsewhere the check never raises.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    reader, writer = os.pipe()
    for descriptor in (reader, writer):
        os.set_blocking(descriptor, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    done = threading.Event()
    threading.Thread(target=done.wait, name="takes SIGINT", daemon=True).start()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    def check() -> None:
        with contextlib.suppress(BlockingIOError):
            if signal.SIGINT in os.read(reader, 4096):
                raise KeyboardInterrupt

    try:
        yield check
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        done.set()
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)
