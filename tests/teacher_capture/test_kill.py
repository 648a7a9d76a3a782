"""A capture killed at any moment goes on from its last finished chunk and gives the same table."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
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
from distill_assets.teacher_capture.teacher import load_teacher
from tests import tiny
from tests.bench import Bench

BATCH_TOKENS = 64
ROWS = 300

# Libraries are loaded once; each line of input is a capture in a process of its own, killed (SIGKILL) as asked: by
# itself after so many reports of progress, or when it opens, renames or removes a file of captures/ for the so-maniest
# time, counted from the renaming to a certain name; or by its parent after so many seconds.
CAPTURES = f"""
import json, os, signal, sys, time
from pathlib import Path
from distill_assets.teacher_capture.capture import capture_shard
from tests.bench import Bench

STEPS = ("open", "os.rename", "os.remove", "os.rmdir")

def capture(root, log, reports=None, step=None, since=None, force=False, **_):
    bench, counting, steps, told = Bench(Path(root)), since is None, 0, 0
    stream = os.open(log, os.O_WRONLY | os.O_CREAT)

    def count(event, args):
        nonlocal counting, steps
        if event in STEPS and ("captures" in str(args[0]) or event == "os.remove"):  # some by their bare names
            counting = counting or event == "os.rename" and Path(args[1]).name.startswith(since)
            if counting and steps == step:
                os.kill(os.getpid(), signal.SIGKILL)
            steps += counting

    def listen(progress):
        nonlocal told
        os.pwrite(stream, f"{{progress.done:9}}".encode(), 0)
        told += 1
        if told == reports:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    capture_shard(bench.spec, bench.shards["s0"], bench.store, device="cpu", batch_tokens={BATCH_TOKENS},
                  force=force, on_progress=listen)

for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if not child:
        capture(**asked)
        os._exit(0)
    if "seconds" in asked:
        time.sleep(asked["seconds"])
        os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Killer:
    """Has shards captured by processes that are killed."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process, self._folder, self.kills = process, folder, 0

    def kill(self, bench: Bench, **when: object) -> int:
        """Have a capture of s0 killed; how many tokens the teacher had seen in it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        log = self._folder / f"log{self.kills}"
        self.kills += 1
        self._process.stdin.write(json.dumps({"root": str(bench.home.root), "log": str(log), **when}) + "\n")
        self._process.stdin.flush()
        assert int(self._process.stdout.readline()) == -signal.SIGKILL
        return int(log.read_text() or 0) if log.exists() else 0


@pytest.fixture(scope="module")
def killer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killer]:
    command = [sys.executable, "-c", CAPTURES]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as process:
        yield Killer(process, tmp_path_factory.mktemp("killed"))


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


@pytest.fixture
def undisturbed(bench: Bench, tmp_path: Path, teacher_folder: Path) -> Bench:
    """Another home with the same shard."""
    other = Bench(tiny.make_home(tmp_path / "other", teacher_folder, shards=1))
    shutil.copy(bench.home.root / "shards" / "s0.jsonl", other.home.root / "shards" / "s0.jsonl")
    return other


def assert_same(report: CaptureReport, expected: CaptureReport) -> None:
    assert pq.read_table(report.capture.path).equals(pq.read_table(expected.capture.path))
    assert replace(report.capture.stats, seconds=0) == replace(expected.capture.stats, seconds=0)


def test_killed_captures_go_on_and_give_the_same_table(bench: Bench, undisturbed: Bench, killer: Killer) -> None:
    load_teacher.cache_clear()
    began = time.monotonic()
    expected, all_tokens = capture(undisturbed)
    seconds = time.monotonic() - began

    random_ = random.Random(0)
    moments: list[dict[str, object]] = [{"seconds": random_.uniform(0, 0.4) * seconds} for _ in range(2)]
    moments += [{"reports": random_.randrange(20, 90)} for _ in range(2)]
    moments += [{"step": random_.randrange(1, 30)} for _ in range(3)]
    moments += [{"reports": 3}]  # while the teacher computes
    seen = sum(killer.kill(bench, **moment) for moment in moments)
    assert not list(bench.home.captures.rglob("s0@*.parquet"))
    found = discover_shards(bench.home.root, bench.home.settings().data, bench.home.hashes())
    planned = {p.shard: p for p in plan_capture(bench.spec, found, bench.store, ()).shards}["s0"]
    assert 0 < planned.rows_to_capture < ROWS  # finished chunks count

    assert len(list(bench.home.captures.rglob(".partial-*-s0@*~"))) == 1  # of the last kill
    resumed, last = capture(bench)
    assert_same(resumed, expected)
    assert pq.ParquetFile(resumed.capture.path).num_row_groups > 3
    assert seen + last <= all_tokens + len(moments) * CHUNK_BATCHES * BATCH_TOKENS  # at most one chunk done again each
    assert not list(bench.home.captures.rglob(".unfinished-*")) and not list(bench.home.captures.rglob(".partial-*"))


def test_a_kill_around_publication_costs_nothing(bench: Bench, undisturbed: Bench, killer: Killer) -> None:
    """Before the capture gets its name, just after, and while the chunks, which are in it now, are removed."""
    expected, _ = capture(undisturbed)
    killer.kill(bench, step=0, since="s0@")
    chunks = len(list(bench.home.captures.rglob(".unfinished-*/*.parquet")))
    assert chunks > 3 and not list(bench.home.captures.rglob("s0@*.parquet"))
    for step in (0, 1, 8):
        copy = bench.home.root.with_name(f"step{step}")
        shutil.copytree(bench.home.root, copy)
        here = Bench(copy)
        assert killer.kill(here, step=step, since="s0@") == 0
        published = bool(list(here.home.captures.rglob("s0@*.parquet")))
        report, tokens = capture(here)
        assert published == (step > 0) == (not report.written) and tokens == 0, step
        assert_same(report, expected)
    left = len(list(here.home.captures.rglob(".unfinished-*/*.parquet")))
    assert 0 < left < chunks  # the last kill came in the middle of the removal


def test_finished_chunks_serve_another_version_of_the_shard(bench: Bench, killer: Killer) -> None:
    killer.kill(bench, reports=120)
    tiny.write_jsonl(bench.home.root / "shards" / "s0.jsonl", tiny.example_rows(ROWS, start=1))
    stats = capture(bench)[0].capture.stats
    assert stats.rows == ROWS and 0 < stats.rows_captured < ROWS


def test_a_forced_capture_trusts_nothing_but_itself(bench: Bench) -> None:
    capture(bench)
    report, tokens = capture(bench, force=True)
    stats = report.capture.stats
    assert (stats.rows, stats.rows_captured, stats.rows_reused) == (ROWS + 5, ROWS, 5)
    assert tokens == stats.tokens_captured


def test_a_forced_capture_that_was_killed_goes_on_when_it_is_forced_again(bench: Bench, killer: Killer) -> None:
    killer.kill(bench, reports=60)  # its chunks a forced capture does not trust
    first = killer.kill(bench, reports=120, force=True)
    report, tokens = capture(bench, force=True)
    stats = report.capture.stats
    assert (stats.rows_captured, stats.rows_reused) == (ROWS, 5) and 0 < tokens < stats.tokens_captured
    assert first + tokens >= stats.tokens_captured
    assert capture(bench, force=True)[1] == stats.tokens_captured


def test_damaged_chunks_are_done_again(bench: Bench, killer: Killer) -> None:
    killer.kill(bench, reports=120)
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
