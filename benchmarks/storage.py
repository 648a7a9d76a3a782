"""Bytes of a stored position on disk, what rounding loses, and how fast it reads back into training tensors.

One capture of real text by SmolLM2-135M with exact log-probabilities is written in each way, everything
included: ids of the rows, positions, tail, gold, entropy, footer. `KL lost` is the mean KL(exact || stored)
over the kept ids and one bucket for the rest. Reading back is a full scan into padded tensors, by turns.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from workload import BenchHome, all_targets, arguments, by_turns, real_rows, scratch, show, smollm2

from distill_assets.foundation.settings import TargetSettings
from distill_assets.student_model.batches import collate
from distill_assets.teacher_capture.arrow import NOT_LEARNT_FROM, from_arrow, parquet_writer, to_arrow
from distill_assets.teacher_capture.capture import capture_shard
from distill_assets.teacher_capture.interchange import export_jsonl
from distill_assets.teacher_capture.sparse_targets import CapturedRow, SparseTargets
from distill_assets.teacher_capture.store import read_rows

K = 32
PASSES = 10  # over a file in one timing: a store is seconds of reading, not the milliseconds in which threads wake up
SCAN_ROWS = 16  # rows of one batch of training tensors: about the 2,048 tokens that `training.batch_tokens` holds


def main() -> None:
    options = arguments(
        __doc__, tokens=(int, 16_000, "tokens captured"), repeats=(int, 5, "rounds of reading that count")
    )
    with scratch() as name:
        folder = Path(name)
        teacher = smollm2()
        home = BenchHome(folder / "home", teacher, k=64, precision="exact")
        home.write("s", all_targets(real_rows(teacher, options.tokens)))
        capture = capture_shard(home.spec, home.shards()["s"], home.store).capture
        exact = read_rows(capture.path)
        top = narrowed(exact, K)
        likely = narrowed(exact, 64, 0.01)
        ways = {
            f"compact, k = {K}": write(folder / "k.parquet", top, "compact"),
            "compact, p >= 0.01, k <= 64": write(folder / "p.parquet", likely, "compact"),
            f"exact, k = {K}": write(folder / "e.parquet", top, "exact"),
            f"plain float16 + int32 Parquet, k = {K}": write_plain(folder / "plain.parquet", top),
        }
        capture_of_top = replace(capture, path=folder / "e.parquet")
        export_jsonl([capture_of_top], folder / "k.jsonl")
        ways[f"JSONL, k = {K}"] = folder / "k.jsonl"
        scans: dict[str, Callable[[], None]] = {
            way: (lambda path=path: passes(scan_jsonl if path.suffix == ".jsonl" else scan, path))  # type: ignore[misc]
            for way, path in ways.items()
            if not way.startswith("plain")
        }
        seconds = by_turns(scans, options.repeats)
        slowest = f"JSONL, k = {K}"
        positions = sum(row.targets.n_positions for row in exact)
        results = []
        for way, path in ways.items():
            given = likely if "0.01" in way else top
            line: dict[str, Any] = {
                "way": way,
                "bytes a position": path.stat().st_size / positions,
                "ids a position": sum(len(r.targets.support_ids_N) for r in given) / positions,
                "KL lost": kl_lost(given, read_rows(path)) if way.startswith(("compact", "exact")) else None,
                "read tokens/s": None,
                "times JSONL": None,
            }
            if way in seconds:
                line["read tokens/s"] = PASSES * positions / statistics.median(seconds[way])
                pairs = zip(seconds[slowest], seconds[way], strict=True)
                line["times JSONL"] = statistics.median(j / s for j, s in pairs)
            results.append(line)
    show("storage", results, options.json, positions=positions)


def narrowed(rows: Sequence[CapturedRow], k: int, min_probability: float = 0.0) -> list[CapturedRow]:
    return [replace(row, targets=row.targets.narrowed(k, min_probability)) for row in rows]


def write(path: Path, rows: Sequence[CapturedRow], precision: Literal["compact", "exact"]) -> Path:
    targets = TargetSettings(precision=precision)
    with parquet_writer(path, targets) as writer:
        writer.write_table(to_arrow(rows, targets))
    return path


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


def passes(scan_once: Callable[[Path], None], path: Path) -> None:
    for _ in range(PASSES):
        scan_once(path)


def scan(path: Path) -> None:
    """Every row of a capture as the batches a student is trained on."""
    with pq.ParquetFile(path) as file:
        columns = [name for name in file.schema_arrow.names if name not in NOT_LEARNT_FROM]
        for group in range(file.num_row_groups):
            rows = from_arrow(file.read_row_group(group, columns))
            for start in range(0, len(rows), SCAN_ROWS):
                collate(rows[start : start + SCAN_ROWS], with_targets=True)


def scan_jsonl(path: Path) -> None:
    """The same tensors from JSONL, without a detour."""
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            row = json.loads(line)
            torch.tensor(row["input_ids"])
            ids = [ids for ids in row["topk_ids"] if ids]
            torch.tensor(ids)
            torch.tensor([values for values in row["topk_logprobs"] if values])
            torch.tensor([value for value in row["tail_logprob"] if value is not None])


if __name__ == "__main__":
    main()
