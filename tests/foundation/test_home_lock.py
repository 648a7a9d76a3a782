"""The lock of a home: writers share it, who removes has it alone, and a killed process holds nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from distill_assets.foundation.errors import HomeError
from distill_assets.foundation.home_lock import HomeLock

HOLD = """
import sys, time
from pathlib import Path
from distill_assets.foundation.home_lock import HomeLock

with HomeLock(Path(sys.argv[1])).shared():
    print("held", flush=True)
    time.sleep(600)
"""


def test_writers_share_it_and_who_removes_has_it_alone(tmp_path: Path) -> None:
    lock = HomeLock(tmp_path / "dagster" / "lock")
    assert not lock.is_held()
    with lock.shared(), lock.shared():
        assert lock.is_held()
        with pytest.raises(HomeError, match="under way in this home, so nothing is removed"), lock.alone():
            pass
    with lock.alone(), pytest.raises(HomeError), lock.alone():
        pass
    assert not lock.is_held()


def test_a_writer_waits_for_who_removes(tmp_path: Path) -> None:
    lock = HomeLock(tmp_path / "lock")
    done = threading.Event()

    def write() -> None:
        with lock.shared():
            done.set()

    writer = threading.Thread(target=write)
    with lock.alone():
        writer.start()
        assert not done.wait(0.2)
    assert done.wait(30)
    writer.join()


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    lock = HomeLock(tmp_path / "lock")
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    assert lock.is_held()
    child.send_signal(signal.SIGKILL)
    child.wait()
    with lock.alone():
        pass
