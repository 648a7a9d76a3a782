"""What knowing costs, over thousands of shards: a plan, a status, a sensor tick, a run with nothing changed.

A tiny teacher captures one shard; the others have that capture under their own names. Commands are processes of
their own, imports included; `import dagster` is measured beside them. Last, what a partition costs beside its teacher.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
from workload import BenchHome, Row, arguments, as_shard, random_model, scratch, seconds_of, show

from distill_assets.definitions import defs
from distill_assets.foundation.settings import AutomationSettings
from distill_assets.orchestration.automation import shard_watcher
from distill_assets.orchestration.bring_up_to_date import bring_up_to_date
from distill_assets.orchestration.instance import environment, open_instance
from distill_assets.teacher_capture.capture import capture_shard

VOCABULARY = 512
TURNS = 3
CHANGED = 10  # shards, besides one, to see what one more costs


def main() -> None:
    options = arguments(
        __doc__,
        shards=(int, 2000, "shards"),
        kilobytes=(int, 0, "size that blanks bring each shard to; 1000 makes 2 GB of 2000"),
    )
    with scratch() as folder:
        root = Path(folder)
        home = BenchHome(root / "home", random_model(root / "teacher", VOCABULARY, width=32, layers=1), k=4)
        os.environ.update(environment(home.home))
        draw = random.Random(0)
        for i in range(options.shards - 1):
            home.write(f"s{i}", [row(draw)])
        home.write("heldout", [row(draw)])
        for file in (home.home.root / "shards").iterdir():
            file.write_text(file.read_text().rstrip("\n").ljust(1000 * options.kilobytes) + "\n")
        shards = home.shards()
        first = capture_shard(home.spec, shards["heldout"], home.store, device="cpu").capture
        for shard in shards.values():
            if shard.key != "heldout":
                as_shard(home, first, shard.key, shard.version)
        show("orchestration", measure(home, draw), options.json, shards=options.shards, kilobytes=options.kilobytes)


def row(draw: random.Random) -> Row:
    return Row([draw.randrange(3, VOCABULARY) for _ in range(6)])


def measure(home: BenchHome, draw: random.Random) -> list[dict[str, Any]]:
    recorded = seconds_of(command("run", home))  # records, catalog, students, report
    ways = {
        "import dagster": lambda: subprocess.run([sys.executable, "-c", "import dagster"], check=True),
        "distill plan": command("plan", home),
        "distill status": command("status", home),
        "distill run, nothing changed": command("run", home),
    }
    seconds = {name: [seconds_of(way) for _ in range(TURNS)] for name, way in ways.items()}
    with open_instance(home.home) as instance:
        watch = lambda: shard_watcher(AutomationSettings())(dg.build_sensor_context(instance=instance))  # noqa: E731
        seconds["sensor tick, the first of a process"] = [seconds_of(watch)]
        seconds["sensor tick, another"] = [seconds_of(watch) for _ in range(TURNS)]
    return [
        {"what": "distill run, captures not recorded yet", "seconds": recorded},
        *({"what": name, "seconds": statistics.median(found)} for name, found in seconds.items()),
        {"what": "a partition, beside its teacher, in process", "seconds": overhead(home, draw)},
    ]


def overhead(home: BenchHome, draw: random.Random) -> float:
    """Seconds that one more changed shard takes, less what its capture took."""

    def run(names: list[str]) -> tuple[float, float]:
        for name in names:
            home.write(name, [row(draw)])
        report = bring_up_to_date(defs, home.home, shards=names, device="cpu")
        assert report.captured_shards == sorted(names)
        return report.seconds, report.capture_seconds

    run(["s0"])  # loads the teacher
    (few, few_captures), (many, many_captures) = run(["s0"]), run([f"s{i}" for i in range(1 + CHANGED)])
    return (many - many_captures - few + few_captures) / CHANGED


def command(name: str, home: BenchHome) -> Callable[[], object]:
    arguments = [sys.executable, "-m", "distill_assets.cli", name, "--json", "--home", str(home.home.root)]
    return lambda: subprocess.run(arguments, check=True, capture_output=True)


if __name__ == "__main__":
    main()
