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
before = 0

def note(progress):
    global before
    with open(sys.argv[4], "a") as log:
        log.write(f"{progress.done - before}\\n")
    before = progress.done

capture_shard(home.spec, home.shards()["s"], home.store, device="auto", batch_tokens=int(sys.argv[5]), on_progress=note)
"""


def main() -> None:
    options = arguments(__doc__, kills=(int, 20, "kills"), tokens=(int, 16_000, "tokens of the shard"))
    with scratch() as name:
        folder = Path(name)
        teacher = random_model(folder / "teacher", VOCABULARY, width=64, layers=2)
        rows = all_targets(with_random_ids(lengths(options.tokens), VOCABULARY))
        undisturbed = start(folder / "undisturbed", teacher, rows)
        began = time.monotonic()
        assert undisturbed.wait() == 0
        seconds = time.monotonic() - began
        expected = table(folder / "undisturbed")
        random_ = random.Random(0)
        kills = rounds = redone = worst = identical = 0
        while kills < options.kills:
            home = folder / f"round{rounds}"
            rounds += 1
            killed_here = 0
            while True:
                process = start(home, teacher, rows)
                try:
                    process.wait(timeout=random_.uniform(0.3, 1.0) * seconds if kills < options.kills else None)
                    break
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    kills += 1
                    killed_here += 1
            assert process.returncode == 0
            identical += table(home).equals(expected)
            again = sum(map(int, (home / "log").read_text().split())) - n_tokens(rows)
            redone += again
            worst = max(worst, again / max(1, killed_here))
    chunk = CHUNK_BATCHES * BATCH_TOKENS
    results: list[dict[str, Any]] = [
        {
            "kills": kills,
            "captures": rounds,
            "identical": identical,
            "tokens done again a kill": redone / kills,
            "worst": worst,
            "tokens of a chunk": chunk,
            "tokens of the shard": n_tokens(rows),
        }
    ]
    show("kill", results, options.json, default_chunk=CHUNK_BATCHES * forward_batch_tokens(resolve_device("auto")))


def lengths(tokens: int) -> list[Row]:
    random_ = random.Random(1)
    rows, total = [], 0
    while total < tokens:
        rows.append(Row([0] * random_.randint(10, 60)))
        total += len(rows[-1].ids)
    return rows


def start(root: Path, teacher: Path, rows: list[Row]) -> subprocess.Popen[bytes]:
    if not root.exists():
        BenchHome(root, teacher, k=32).write("s", rows)
    here = str(Path(__file__).parent)
    arguments_ = [here, str(root), str(teacher), str(root / "log"), str(BATCH_TOKENS)]
    return subprocess.Popen([sys.executable, "-c", CAPTURE, *arguments_])


def table(root: Path) -> Any:
    [path] = (root / "captures").glob("*/s@*.parquet")
    return pq.read_table(path)


if __name__ == "__main__":
    main()
