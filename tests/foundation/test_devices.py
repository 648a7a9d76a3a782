"""Devices are leased between real processes; a process that dies gives its device back."""

from __future__ import annotations

import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from distill_assets.foundation.devices import Turn, cuda_choices, is_out_of_memory, leased

HOLD = """
import sys, time
from functools import partial
from pathlib import Path
from distill_assets.foundation.devices import leased
options = {"every": sys.argv[2] == "every", "folder": Path(sys.argv[1]), "on_wait": partial(print, flush=True)}
with leased(["cuda:0", "cuda:1"], **options) as name:
    print(name, flush=True)
    time.sleep(60)
"""
NAMES = ["cuda:0", "cuda:1"]


@contextmanager
def holder(folder: Path, which: str = "one") -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), which], stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def taken_by(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_processes_take_one_device_each_and_give_it_back_when_killed(tmp_path: Path) -> None:
    with holder(tmp_path) as first:
        assert taken_by(first) == "cuda:0"
        with leased(NAMES, folder=tmp_path) as ours:
            assert ours == "cuda:1"
        first.send_signal(signal.SIGKILL)
        first.wait()
        with leased(NAMES, folder=tmp_path) as ours:
            assert ours == "cuda:0"


def test_who_needs_all_devices_waits_for_all(tmp_path: Path) -> None:
    with holder(tmp_path) as first:
        assert taken_by(first) == "cuda:0"
        with holder(tmp_path, "every") as waiting:
            assert taken_by(waiting) == "waits for cuda:0, which other processes use"
            time.sleep(1.0)
            assert waiting.poll() is None and not has_spoken(waiting)
            first.kill()
            first.wait()
            assert taken_by(waiting) == "None"


def has_spoken(process: subprocess.Popen[str]) -> bool:
    return bool(select.select([process.stdout], [], [], 0)[0])


def test_nothing_is_leased_where_there_is_no_choice(tmp_path: Path) -> None:
    with leased([], folder=tmp_path / "locks") as ours:
        assert ours is None
    assert not (tmp_path / "locks").exists()


def test_a_cpu_leaves_no_choice() -> None:
    assert cuda_choices("cpu") == []


def test_a_device_stays_taken_until_it_is_given_back(tmp_path: Path) -> None:
    unloaded: list[str] = []
    turn = Turn(tmp_path, lambda: not unloaded.append("teacher"))  # type: ignore[func-returns-value]

    def device_of(model: str) -> str | None:
        with turn.taken(model, NAMES) as name:
            return name

    assert device_of("teacher") == "cuda:0"
    unloaded.clear()
    assert device_of("teacher") == "cuda:0" and not unloaded
    with holder(tmp_path) as other:
        assert taken_by(other) == "cuda:1"
        turn.give_back()
        assert unloaded == ["teacher"] and device_of("another teacher") == "cuda:0"
    unloaded.clear()
    assert device_of("teacher") == "cuda:0" and unloaded  # of the other teacher, given back for it
    turn.give_back()
    with leased(NAMES, every=True, folder=tmp_path) as ours:
        assert ours is None


@pytest.mark.parametrize("which", ["one", "every"])
def test_a_device_that_is_not_in_use_goes_to_who_waits_for_it(tmp_path: Path, which: str) -> None:
    """Whoever holds one may be waiting himself, for what the other has."""
    turns = [Turn(tmp_path), Turn(tmp_path)]
    with turns[0].taken("teacher", NAMES) as first, turns[1].taken("teacher", NAMES) as second:
        assert [first, second] == NAMES
        with holder(tmp_path, which) as waiting:
            assert taken_by(waiting).startswith("waits for cuda:0")
            time.sleep(3.0)
            assert waiting.poll() is None and not has_spoken(waiting), "they are in use"
            waiting.kill()
    with holder(tmp_path, which) as waiting:
        said = taken_by(waiting)
        while said.startswith("waits for "):
            said = taken_by(waiting)
        assert said in (["None"] if which == "every" else NAMES)
    for turn in turns:
        turn.give_back()


def test_a_device_stays_until_what_is_on_it_is_unloaded(tmp_path: Path) -> None:
    asked: list[float] = []

    def let_go() -> bool:
        asked.append(time.monotonic())
        return len(asked) > 2

    turn = Turn(tmp_path, let_go)
    with turn.taken("teacher", ["cuda:0", "cuda:1"], every=True):
        asked.clear()
    with holder(tmp_path) as waiting:
        assert taken_by(waiting).startswith("waits for cuda:0 or cuda:1")
        assert taken_by(waiting) == "cuda:0" and len(asked) > 2
    turn.give_back()


@pytest.mark.parametrize(
    ("error", "out"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("CUDA error: out of memory"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error: Exception, out: bool) -> None:
    assert is_out_of_memory(error) is out
