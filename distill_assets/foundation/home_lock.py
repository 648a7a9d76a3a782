"""Who works in a home: those who write share one lock, and whoever removes files has it alone.

A lock of the operating system on one file, which frees it when a process ends, however it ends. Two holders
in one process count as two.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distill_assets.foundation.errors import HomeError


class HomeLock:
    """The lock of one home, on a file that is never removed."""

    def __init__(self, file: Path) -> None:
        self._file = file

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Held by whoever writes, and by whoever reads for longer than a moment; waits while files are removed."""
        with self._opened() as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Held by whoever removes files; HomeError, at once, while anybody else holds it."""
        with self._opened() as descriptor:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise HomeError(
                    "a capture, a training, an import or another `distill gc` is under way in this home, so nothing "
                    "is removed; wait for it, or end it"
                ) from None
            yield

    def is_held(self) -> bool:
        """Whether anybody holds it now."""
        try:
            with self.alone():
                return False
        except HomeError:
            return True

    @contextmanager
    def _opened(self) -> Iterator[int]:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            yield descriptor
        finally:
            os.close(descriptor)  # which frees what it held
