"""What a rerun costs, against the first run: nothing changed, 1% of the rows appended, all rows reshuffled.

200 shards of real text through SmolLM2-135M, in this process: each run looks at the shard files, plans,
and captures what the plan says: the engine alone, without Dagster's records, the catalog and the capture checks.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

from workload import BenchHome, Row, arguments, n_tokens, scratch, show, smollm2, standard_library_rows

from distill_assets.dataset_shards.discover import discover_shards
from distill_assets.foundation.progress import Progress
from distill_assets.teacher_capture.capture import capture_shard
from distill_assets.teacher_capture.plan import plan_capture
from distill_assets.teacher_capture.teacher import load_teacher

SHARDS = 200


def main() -> None:
    options = arguments(
        __doc__, tokens=(int, 900_000, "most tokens of the first run"), device=(str, "auto", "device of the teacher")
    )
    with scratch() as folder:
        teacher = smollm2()
        rows = standard_library_rows(teacher, options.tokens)
        first = rows[: len(rows) * 100 // 101]
        home = BenchHome(Path(folder) / "home", teacher, k=32)
        write(home, first)
        load_teacher(home.spec.weights, "float32", options.device)
        runs = {"first run": run(home, options.device)}
        runs["nothing changed"] = run(home, options.device)
        write(home, rows)
        runs["1% of the rows appended"] = run(home, options.device)
        random.Random(0).shuffle(rows)
        write(home, rows)
        runs["all rows reshuffled"] = run(home, options.device)
    whole = runs["first run"]["seconds"]
    results = [
        {"run": name, **figures, "of the first run": figures["seconds"] / whole} for name, figures in runs.items()
    ]
    show("capture_reuse", results, options.json, shards=SHARDS, tokens=n_tokens(first))


def write(home: BenchHome, rows: list[Row]) -> None:
    for i in range(SHARDS):
        home.write(f"s{i:03d}", rows[i::SHARDS])


def run(home: BenchHome, device: str) -> dict[str, Any]:
    began, seen = time.perf_counter(), 0

    def count(progress: Progress) -> None:
        nonlocal seen
        seen = progress.done

    discovery = discover_shards(home.home.root, home.home.settings().data, home.hashes)
    plan = plan_capture(home.spec, discovery, home.store, ())
    tokens = 0
    for shard in plan.todo:
        seen = 0
        capture_shard(home.spec, shard, home.store, device=device, on_progress=count)
        tokens += seen
    return {"seconds": time.perf_counter() - began, "shards captured": len(plan.todo), "teacher tokens": tokens}


if __name__ == "__main__":
    main()
