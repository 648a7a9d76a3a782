"""What each kind of targets keeps at a position and takes on disk, beside what a plan foresees of it.

SmolLM2-135M in float32, real text, every token a target. `foreseen` is what the plan of a home without any
capture says of the same shard; `file / foreseen` is the file as it came out against that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workload import BenchHome, all_targets, arguments, real_rows, scratch, show, smollm2

from distill_assets.dataset_shards.discover import discover_shards
from distill_assets.teacher_capture.capture import capture_shard
from distill_assets.teacher_capture.plan import plan_capture

KINDS: tuple[dict[str, Any], ...] = (
    {"kind": "top_k", "k": 64},
    {"kind": "top_k", "k": 32},
    {"kind": "top_k", "k": 64, "min_probability": 0.002},
    {"kind": "top_k", "k": 64, "min_probability": 0.01},
    {"kind": "top_k", "k": 64, "min_probability": 0.01, "tail_samples": 4},
    {"kind": "top_k", "k": 16, "tail_samples": 4},
    {"kind": "sampled", "samples": 50},
    {"kind": "sampled", "samples": 16},
    {"kind": "threshold", "tau": 0.02},
    {"kind": "threshold", "tau": 0.1},
    {"kind": "top_k", "k": 32, "precision": "exact"},
)


def main() -> None:
    options = arguments(__doc__, tokens=(int, 3000, "tokens captured of each kind"))
    results = []
    with scratch() as folder:
        teacher = smollm2()
        rows = all_targets(real_rows(teacher, options.tokens))
        for number, targets in enumerate(KINDS):
            home = BenchHome(Path(folder) / str(number), teacher, **targets)
            home.write("s", rows)
            found = discover_shards(home.home.root, home.home.settings().data, home.home.hashes())
            [planned] = plan_capture(home.spec, found, home.store, ()).shards
            capture = capture_shard(home.spec, home.shards()["s"], home.store).capture
            assert planned.estimated_bytes is not None
            results.append(
                {
                    "targets": ", ".join(f"{name}: {value}" for name, value in targets.items()),
                    "ids a position": capture.stats.mean_kept_ids,
                    "mass kept": capture.stats.mean_kept_mass,
                    "bytes a position": capture.bytes_per_token,
                    "foreseen": planned.estimated_bytes / capture.stats.supervised_tokens,
                    "file / foreseen": capture.bytes / planned.estimated_bytes,
                }
            )
    show("kinds", results, options.json, tokens=options.tokens)


if __name__ == "__main__":
    main()
