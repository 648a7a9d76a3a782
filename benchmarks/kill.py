"""Captures killed at any moment of their lives, each resumed: identical tables, and at most one chunk done again.

A real process captures one shard and is killed with SIGKILL; another one goes on, and is killed, until one finishes.
The table must equal the one of an undisturbed process. Kills come by turns at a random moment of the whole life of a
process (libraries, teacher and rows are loaded in it), of scoring, of publication (from when all chunks are
finished on), and of the clearing up (from when the capture has its name).
"""

from __future__ import annotations

import itertools
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from workload import BenchHome, Row, all_targets, arguments, n_tokens, random_model, scratch, show, with_random_ids

from distill_assets.foundation.devices import resolve_device
from distill_assets.foundation.language_model import forward_batch_tokens
from distill_assets.teacher_capture.chunks import CHUNK_BATCHES

BATCH_TOKENS = 64  # small passes: a chunk is then 2,048 tokens, and the shard has many
VOCABULARY = 8_000
CAPTURE = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from workload import BenchHome
from distill_assets.teacher_capture.capture import capture_shard

home = BenchHome(Path(sys.argv[2]), Path(sys.argv[3]), k=32)

def note(progress):
    with open(sys.argv[4], "a") as log:
        log.write(f"{progress.done} {progress.total}\\n")

capture_shard(home.spec, home.shards()["s"], home.store, device="auto", batch_tokens=int(sys.argv[5]), on_progress=note)
os._exit(0)  # what Python does at its end is no part of a capture
"""


def main() -> None:
    options = arguments(__doc__, kills=(int, 40, "kills"), tokens=(int, 16_000, "tokens of the shard"))
    with scratch() as name:
        folder = Path(name)
        teacher = random_model(folder / "teacher", VOCABULARY, width=64, layers=2)
        rows = all_targets(with_random_ids(lengths(options.tokens), VOCABULARY))
        undisturbed = Capturing(folder / "undisturbed", teacher, rows)
        seconds = undisturbed.seconds_of_stages()
        expected = table(folder / "undisturbed")
        random_ = random.Random(0)
        found = {stage: Outcome() for stage in seconds}
        turns = itertools.cycle(seconds)
        rounds = 0
        while sum(outcome.kills for outcome in found.values()) < options.kills:
            home = folder / f"round{rounds}"
            rounds += 1
            struck: list[str] = []  # stages in which this table's captures were killed
            left = n_tokens(rows)  # tokens that the next process would see if the kills before it cost nothing
            pending: Outcome | None = None  # of the last kill; what it cost the next process will tell
            while True:
                stage = next(turns)
                capturing = Capturing(home, teacher, rows)
                killed = capturing.kill(stage, random_.uniform(0, 1) * seconds[stage])
                done, total = capturing.seen()
                if pending is not None and (total or not killed):
                    pending.again.append(total - left)
                if total or not killed:
                    left = total - done
                if not killed:
                    break
                struck.append(stage)
                found[stage].kills += 1
                if total or pending is None:  # else the process was killed before it could tell what the last kill cost
                    pending = found[stage]
            same = table(home).equals(expected)
            for stage in set(struck):
                found[stage].captures += 1
                found[stage].identical += same
    results: list[dict[str, Any]] = [
        {
            "killed in": stage,
            "kills": outcome.kills,
            "captures": outcome.captures,
            "identical": outcome.identical,
            "tokens done again a kill": sum(outcome.again) / max(1, outcome.kills),
            "worst": max(outcome.again, default=0),
        }
        for stage, outcome in found.items()
    ]
    show(
        "kill",
        results,
        options.json,
        tables=rounds,
        chunk_tokens=CHUNK_BATCHES * BATCH_TOKENS,
        shard_tokens=n_tokens(rows),
        default_chunk=CHUNK_BATCHES * forward_batch_tokens(resolve_device("auto")),
    )


@dataclass
class Outcome:
    """What became of the kills in one stage."""

    kills: int = 0
    captures: int = 0
    identical: int = 0
    again: list[int] = field(default_factory=list)  # tokens that the teacher saw a second time


class Capturing:
    """A process that captures the shard `s` of a home, which is made if need be."""

    def __init__(self, root: Path, teacher: Path, rows: list[Row]) -> None:
        if not root.exists():
            BenchHome(root, teacher, k=32).write("s", rows)
        self._captures = root / "captures"
        self._log = root / f"log{time.monotonic_ns()}"
        arguments_ = [str(Path(__file__).parent), str(root), str(teacher), str(self._log), str(BATCH_TOKENS)]
        self.process = subprocess.Popen([sys.executable, "-c", CAPTURE, *arguments_])
        self._reached: dict[str, Callable[[], bool]] = {
            "life": lambda: True,
            "scoring": self._log.exists,
            "publication": self._all_chunks_are_there,
            "clearing up": lambda: any(self._captures.glob("*/s@*.parquet")),
        }

    def _all_chunks_are_there(self) -> bool:
        done, total = self.seen()
        return 0 < total == done

    def seconds_of_stages(self) -> dict[str, float]:
        """Run to the end; how long each stage is still to go when it is reached."""
        began = {}
        for stage in self._reached:
            assert self._wait_for(stage)
            began[stage] = time.monotonic()
        assert self.process.wait() == 0
        return {stage: time.monotonic() - moment for stage, moment in began.items()}

    def _wait_for(self, stage: str) -> bool:
        """Whether the process came to this stage; False when it ended without."""
        while not self._reached[stage]():
            if self.process.poll() is not None:
                return False
            time.sleep(0.0005)
        return True

    def kill(self, stage: str, seconds: float) -> bool:
        """Kill the process so long after a stage is reached; False when it ended before."""
        try:
            if self._wait_for(stage):
                self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
        status = self.process.wait()
        assert status in (0, -signal.SIGKILL)
        return status != 0

    def seen(self) -> tuple[int, int]:
        """Tokens that the teacher has seen in this process, and those it had to see; 0 and 0 when there were none."""
        lines = self._log.read_text().splitlines(keepends=True) if self._log.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        done, total = map(int, whole[-1].split()) if whole else (0, 0)
        return done, total


def lengths(tokens: int) -> list[Row]:
    random_ = random.Random(1)
    rows, total = [], 0
    while total < tokens:
        rows.append(Row([0] * random_.randint(10, 60)))
        total += len(rows[-1].ids)
    return rows


def table(root: Path) -> Any:
    [path] = (root / "captures").glob("*/s@*.parquet")
    return pq.read_table(path)


if __name__ == "__main__":
    main()
