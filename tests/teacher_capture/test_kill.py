"""A capture killed at any moment goes on from its last finished chunk and gives the same table."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from distill_assets.dataset_shards.discover import discover_shards
from distill_assets.dataset_shards.encode import encode_shard
from distill_assets.foundation.progress import Progress
from distill_assets.teacher_capture.capture import CaptureReport, capture_shard
from distill_assets.teacher_capture.chunks import CHUNK_BATCHES, plan_chunks, plan_windows
from distill_assets.teacher_capture.plan import plan_capture
from distill_assets.teacher_capture.store import read_rows
from tests import tiny
from tests.bench import Bench

BATCH_TOKENS = 64
ROWS = 300
KILLS = 3

CAPTURE = f"""
import sys
from pathlib import Path
from distill_assets.teacher_capture.capture import capture_shard
from tests.bench import Bench

bench = Bench(Path(sys.argv[1]))
capture_shard(bench.spec, bench.shards["s0"], bench.store, device="cpu", batch_tokens={BATCH_TOKENS},
              force=len(sys.argv) > 2, on_progress=lambda progress: print(progress.done, progress.total, flush=True))
"""


@pytest.fixture
def bench(tmp_path: Path, teacher_folder: Path) -> Bench:
    bench = Bench(tiny.make_home(tmp_path / "home", teacher_folder, shards=1))
    rows = tiny.example_rows(ROWS)
    tiny.write_jsonl(bench.home.root / "shards" / "s0.jsonl", [*rows, *rows[:5]])  # the last chunk repeats the first
    return bench


def capture(bench: Bench, **options: object) -> tuple[CaptureReport, int]:
    """The report, and how many tokens the teacher saw."""
    seen = [0]

    def listen(progress: Progress) -> None:
        seen[0] = progress.done

    report = capture_shard(
        bench.spec,
        bench.shards["s0"],
        bench.store,
        device="cpu",
        batch_tokens=BATCH_TOKENS,
        on_progress=listen,
        **options,  # type: ignore[arg-type]
    )
    return report, seen[0]


def killed_after(bench: Bench, reports: int, force: bool = False) -> int:
    """Start a capture, kill it (SIGKILL) after so many progress reports; the tokens it said it had done."""
    child = subprocess.Popen(
        [sys.executable, "-c", CAPTURE, str(bench.home.root), *(["force"] if force else [])],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert child.stdout is not None
    done = 0
    for _ in range(reports):
        done = int(child.stdout.readline().split()[0])
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    return done


def test_killed_captures_go_on_and_give_the_same_table(bench: Bench, tmp_path: Path, teacher_folder: Path) -> None:
    undisturbed = Bench(tiny.make_home(tmp_path / "other", teacher_folder, shards=1))
    (undisturbed.home.root / "shards" / "s0.jsonl").write_bytes((bench.home.root / "shards" / "s0.jsonl").read_bytes())
    expected, all_tokens = capture(undisturbed)

    moments = random.Random(0)
    seen = sum(killed_after(bench, moments.randrange(20, 90)) for _ in range(KILLS))
    assert not list(bench.home.captures.rglob("s0@*.parquet"))
    found = discover_shards(bench.home.root, bench.home.settings().data, bench.home.hashes())
    planned = {p.shard: p for p in plan_capture(bench.spec, found, bench.store, ()).shards}["s0"]
    assert 0 < planned.rows_to_capture < ROWS  # finished chunks count

    resumed, last = capture(bench)
    assert pq.read_table(resumed.capture.path).equals(pq.read_table(expected.capture.path))
    assert replace(resumed.capture.stats, seconds=0) == replace(expected.capture.stats, seconds=0)
    assert pq.ParquetFile(resumed.capture.path).num_row_groups > 3
    assert seen + last <= all_tokens + KILLS * CHUNK_BATCHES * BATCH_TOKENS  # at most one chunk done again each
    assert not list(bench.home.captures.rglob(".unfinished-*"))


def test_finished_chunks_serve_another_version_of_the_shard(bench: Bench) -> None:
    killed_after(bench, 120)
    tiny.write_jsonl(bench.home.root / "shards" / "s0.jsonl", tiny.example_rows(ROWS, start=1))
    stats = capture(bench)[0].capture.stats
    assert stats.rows == ROWS and 0 < stats.rows_captured < ROWS


def test_a_forced_capture_trusts_nothing_but_itself(bench: Bench) -> None:
    capture(bench)
    report, tokens = capture(bench, force=True)
    stats = report.capture.stats
    assert (stats.rows, stats.rows_captured, stats.rows_reused) == (ROWS + 5, ROWS, 5)
    assert tokens == stats.tokens_captured


def test_a_forced_capture_that_was_killed_goes_on_when_it_is_forced_again(bench: Bench) -> None:
    killed_after(bench, 60)  # its chunks a forced capture does not trust
    first = killed_after(bench, 120, force=True)
    report, tokens = capture(bench, force=True)
    stats = report.capture.stats
    assert (stats.rows_captured, stats.rows_reused) == (ROWS, 5) and 0 < tokens < stats.tokens_captured
    assert first + tokens >= stats.tokens_captured
    assert capture(bench, force=True)[1] == stats.tokens_captured


def test_damaged_chunks_are_done_again(bench: Bench) -> None:
    killed_after(bench, 120)
    [folder] = bench.home.captures.rglob(".unfinished-*")
    first = sorted(folder.glob("*.parquet"))[0]
    whole = first.read_bytes()
    first.write_bytes(whole[:-20])  # no footer: done again
    flipped = sorted(folder.glob("*.parquet"))[1]
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    assert capture(bench)[0].capture.stats.rows_captured == ROWS


def test_chunks_are_planned_from_the_rows_alone(bench: Bench) -> None:
    rows = encode_shard(bench.shards["s0"], bench.spec.encoder).rows
    chunks = plan_chunks(rows, BATCH_TOKENS)
    assert [row for chunk in chunks for row in chunk.rows] == list(rows)
    assert [chunk.start for chunk in chunks[1:]] == [c.start + len(c.rows) for c in chunks[:-1]]
    assert all(sum(len(r.input_ids) for r in c.rows) <= CHUNK_BATCHES * BATCH_TOKENS for c in chunks)
    assert len({chunk.fingerprint for chunk in chunks}) == len(chunks)
    [alone] = plan_chunks(rows[:1], 1)  # a row longer than the budget is a chunk of its own
    assert alone.rows == rows[:1]


def test_windows_are_consecutive_chunks_within_their_tokens(bench: Bench) -> None:
    rows = encode_shard(bench.shards["s0"], bench.spec.encoder).rows
    chunks = plan_chunks(rows, 8)
    assert len(chunks) > 20
    windows = list(plan_windows(chunks, 700))
    assert [chunk for window in windows for chunk in window] == chunks
    sizes = [sum(len(row.input_ids) for chunk in window for row in chunk.rows) for window in windows]
    assert len(windows) > 5 and max(sizes) <= 700
    assert [len(window) for window in plan_windows(chunks, 1)] == [1] * len(chunks)
    assert list(plan_windows(chunks)) == [chunks] and list(plan_windows([])) == []


def test_a_shuffled_shard_is_put_together_from_all_row_groups(bench: Bench) -> None:
    stored = {row.key: row for row in read_rows(capture(bench)[0].capture.path)}
    rows = tiny.example_rows(ROWS)
    random.Random(1).shuffle(rows)
    tiny.write_jsonl(bench.home.root / "shards" / "s0.jsonl", rows)
    report, tokens = capture(bench)
    assert (tokens, report.capture.stats.rows_reused) == (0, ROWS)
    for row in read_rows(report.capture.path):
        for name in ("positions_P", "support_ids_N", "support_logprobs_N", "tail_logprob_P", "gold_logprob_P"):
            assert np.array_equal(getattr(row.targets, name), getattr(stored[row.key].targets, name))
