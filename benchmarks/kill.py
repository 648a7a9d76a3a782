"""Captures killed at random moments, each resumed: identical tables, and at most one chunk done again.

A real process captures one shard and is killed with SIGKILL; another one goes on, and is killed, until
one finishes. The table must equal the one of an undisturbed process.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
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
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from workload import BenchHome
from distill_assets.teacher_capture.capture import capture_shard

home = BenchHome(Path(sys.argv[2]), Path(sys.argv[3]), k=32)

def note(progress):
    with open(sys.argv[4], "a") as log:
        log.write(f"{progress.done} {progress.total}\\n")

capture_shard(home.spec, home.shards()["s"], home.store, device="auto", batch_tokens=int(sys.argv[5]), on_progress=note)
"""


def main() -> None:
    options = arguments(__doc__, kills=(int, 20, "kills"), tokens=(int, 16_000, "tokens of the shard"))
    with scratch() as name:
        folder = Path(name)
        teacher = random_model(folder / "teacher", VOCABULARY, width=64, layers=2)
        rows = all_targets(with_random_ids(lengths(options.tokens), VOCABULARY))
        undisturbed = Capturing(folder / "undisturbed", teacher, rows)
        undisturbed.wait_for_first_row()
        began = time.monotonic()
        assert undisturbed.process.wait() == 0
        seconds = time.monotonic() - began
        expected = table(folder / "undisturbed")
        random_ = random.Random(0)
        rounds = identical = 0
        again: list[int] = []  # tokens that each kill cost
        while len(again) < options.kills:
            home = folder / f"round{rounds}"
            rounds += 1
            left = n_tokens(rows)  # tokens that the next process would see if a kill cost nothing
            while True:
                capturing = Capturing(home, teacher, rows)
                finishes = not capturing.wait_for_first_row() or len(again) == options.kills
                try:
                    capturing.process.wait(timeout=None if finishes else random_.uniform(0, 0.8) * seconds)
                except subprocess.TimeoutExpired:
                    capturing.process.kill()
                    capturing.process.wait()
                done, total = capturing.seen()
                if total and left < n_tokens(rows):
                    again.append(total - left)
                left = total - done
                if capturing.process.returncode == 0:
                    break
            identical += table(home).equals(expected)
    chunk = CHUNK_BATCHES * BATCH_TOKENS
    results: list[dict[str, Any]] = [
        {
            "kills": len(again),
            "captures": rounds,
            "identical": identical,
            "tokens done again a kill": sum(again) / len(again),
            "worst": max(again),
            "tokens of a chunk": chunk,
            "tokens of the shard": n_tokens(rows),
        }
    ]
    show("kill", results, options.json, default_chunk=CHUNK_BATCHES * forward_batch_tokens(resolve_device("auto")))


class Capturing:
    """A process that captures the shard `s` of a home, which is made if need be."""

    def __init__(self, root: Path, teacher: Path, rows: list[Row]) -> None:
        if not root.exists():
            BenchHome(root, teacher, k=32).write("s", rows)
        self._log = root / f"log{time.monotonic_ns()}"
        arguments_ = [str(Path(__file__).parent), str(root), str(teacher), str(self._log), str(BATCH_TOKENS)]
        self.process = subprocess.Popen([sys.executable, "-c", CAPTURE, *arguments_])

    def wait_for_first_row(self) -> bool:
        """Whether the teacher has seen a row; False when the process ended without."""
        while not self._log.exists():
            if self.process.poll() is not None:
                return False
            time.sleep(0.002)
        return True

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
