"""Bytes of a stored position on disk, what rounding loses, and how fast it reads back into training tensors.

One capture of real text by SmolLM2-135M with exact log-probabilities is published in each way, everything
included: ids of the rows, positions, tail, gold, entropy, footer. `KL lost` is the mean KL(exact || stored)
over the kept ids and one bucket for the rest. Reading back is what a training does, seals and checksums checked,
a store of such files into padded tensors, several files at a time, by turns with JSONL of the same ids in one thread;
the fastest of some rounds counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from workload import BenchHome, all_targets, arguments, by_turns, publish, real_rows, scratch, show, smollm2

from distill_assets.foundation.settings import TargetSettings
from distill_assets.student_model.batches import collate
from distill_assets.student_model.choice import Choice
from distill_assets.teacher_capture.arrow import to_arrow
from distill_assets.teacher_capture.capture import capture_shard
from distill_assets.teacher_capture.interchange import export_jsonl
from distill_assets.teacher_capture.sparse_targets import CapturedRow, SparseTargets
from distill_assets.teacher_capture.store import Capture, read_rows

K = 32
FILES = 10  # of the store that is read back: one, ten times
# Over the store in one timing: it is seconds of reading, not the milliseconds in which threads wake up.
PASSES, PASSES_JSONL = 10, 1
PRECISIONS = ("compact", "exact")
SCAN_ROWS = 16  # rows of one batch of training tensors: about the 2,048 tokens that `training.batch_tokens` holds


@dataclass(frozen=True)
class Kept:
    """Some of the ids of an exact capture, and in which precisions they are stored."""

    name: str
    targets: TargetSettings
    precisions: Sequence[str] = PRECISIONS

    def of(self, rows: Sequence[CapturedRow]) -> list[CapturedRow]:
        narrow = lambda targets: targets.narrowed(self.targets.k, self.targets.min_probability)  # noqa: E731
        return [replace(row, targets=narrow(row.targets)) for row in rows]


KEPT = (
    Kept(f"k = {K}", TargetSettings(k=K)),
    Kept("p >= 0.01, k <= 64", TargetSettings(k=64, min_probability=0.01), ("compact",)),
)


def main() -> None:
    options = arguments(
        __doc__, tokens=(int, 16_000, "tokens captured"), repeats=(int, 5, "rounds of reading, the fastest counts")
    )
    with scratch() as name:
        folder = Path(name)
        teacher = smollm2()
        home = BenchHome(folder / "home", teacher, k=64, precision="exact")
        home.write("s", all_targets(real_rows(teacher, options.tokens)))
        capture = capture_shard(home.spec, home.shards()["s"], home.store).capture
        exact = read_rows(capture.path)
        results = [line for kept in KEPT for line in measure(home, capture, kept, kept.of(exact), options.repeats)]
    show("storage", results, options.json, positions=capture.stats.supervised_tokens)


def measure(
    home: BenchHome, capture: Capture, kept: Kept, rows: Sequence[CapturedRow], repeats: int
) -> list[dict[str, Any]]:
    """A line for each way to store these rows."""
    precise = {p: write(home, capture, kept.targets.model_copy(update={"precision": p}), rows) for p in PRECISIONS}
    stored = {precision: precise[precision] for precision in kept.precisions}
    jsonl = home.home.root / "kept.jsonl"
    export_jsonl([precise["exact"]], jsonl)
    plain = write_plain(home.home.root / "plain.parquet", rows)
    scans: dict[str, Callable[[], None]] = {
        "JSONL": lambda: passes(scan_jsonl, jsonl, PASSES_JSONL),
        **{name: (lambda c=c: passes(scan, c, PASSES)) for name, c in stored.items()},  # type: ignore[misc]
    }
    times = by_turns(scans, repeats)
    seconds = {name: min(times[name]) / FILES / (PASSES_JSONL if name == "JSONL" else PASSES) for name in scans}
    files = {name: c.path for name, c in stored.items()} | {"plain float16 + int32 Parquet": plain, "JSONL": jsonl}
    positions = sum(row.targets.n_positions for row in rows)
    ids = sum(len(row.targets.support_ids_N) for row in rows)
    return [
        {
            "way": f"{name}, {kept.name}",
            "bytes a position": path.stat().st_size / positions,
            "ids a position": ids / positions,
            "KL lost": kl_lost(rows, read_rows(path)) if name in stored else None,
            "read tokens/s": positions / seconds[name] if name in seconds else None,
            "times JSONL": seconds["JSONL"] / seconds[name] if name in seconds else None,
        }
        for name, path in files.items()
    ]


def write(home: BenchHome, capture: Capture, targets: TargetSettings, rows: Sequence[CapturedRow]) -> Capture:
    """These rows as a capture of these targets."""
    return publish(home, capture, capture.shard, capture.version, to_arrow(rows, targets), targets)


def write_plain(path: Path, rows: Sequence[CapturedRow]) -> Path:
    """What one gets without thinking: two lists a position, zstd, Arrow's defaults; ids, positions and tail aside."""
    lists = [
        (t.support_ids_N[a:b], t.support_logprobs_N[a:b].astype(np.float16))
        for t in (row.targets for row in rows)
        for a, b in zip(t.offsets_P1[:-1], t.offsets_P1[1:], strict=True)
    ]
    ids, logprobs = zip(*lists, strict=True)
    pq.write_table(pa.table({"ids": list(ids), "logprobs": list(logprobs)}), path, compression="zstd")
    return path


def kl_lost(exact: Sequence[CapturedRow], stored: Sequence[CapturedRow]) -> float:
    total, positions = 0.0, 0
    for a, b in zip(exact, stored, strict=True):
        p, q = _outcomes(a.targets), _outcomes(b.targets)
        total += float((np.exp(p) * (p - q))[np.isfinite(p)].sum())
        positions += a.targets.n_positions
    return total / positions


def _outcomes(targets: SparseTargets) -> np.ndarray:
    """Log-probabilities of all outcomes of all positions, float64: kept ids, then tails."""
    normal = targets.normalized()
    return np.concatenate([normal.support_logprobs_N, normal.tail_logprob_P]).astype(np.float64)


def passes(scan_once: Callable[[Any], None], what: Any, n: int) -> None:
    for _ in range(n):
        scan_once(what)


def scan(capture: Capture) -> None:
    """Every row of a store of such captures as the batches a student is trained on."""
    rows = Choice.read_all([Choice(capture)] * FILES)
    for start in range(0, len(rows), SCAN_ROWS):
        collate(rows[start : start + SCAN_ROWS], with_targets=True)


def scan_jsonl(path: Path) -> None:
    """The same numbers from as many files of JSONL, a tensor a row, without a detour."""
    for _ in range(FILES):
        with path.open(encoding="utf-8") as stream:
            for line in stream:
                row = json.loads(line)
                torch.tensor(row["input_ids"])
                torch.tensor(padded(row["topk_ids"], 0))
                torch.tensor(padded(row["topk_logprobs"], -np.inf))
                torch.tensor([value for value in row["tail_logprob"] if value is not None])


def padded(lists: Sequence[list[Any]], nothing: float) -> list[list[Any]]:
    """The lists of supervised positions, all as long as the longest."""
    filled = [values for values in lists if values]
    k = max(map(len, filled))
    return [values + [nothing] * (k - len(values)) for values in filled]


if __name__ == "__main__":
    main()
