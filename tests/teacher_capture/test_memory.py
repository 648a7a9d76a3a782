"""Memory that runs out for real: the address space of a process is limited, and torch's allocator fails."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from distill_assets.dataset_shards.encode import EncodedRow
from distill_assets.foundation.errors import OutOfMemory
from distill_assets.foundation.fingerprints import HashCache
from distill_assets.foundation.model_folders import resolve_model
from distill_assets.foundation.settings import TargetSettings
from distill_assets.teacher_capture.capture import capture_shard
from distill_assets.teacher_capture.engine import score_rows
from distill_assets.teacher_capture.teacher import load_teacher
from tests import tiny
from tests.bench import Bench
from tests.devices import NEEDS_CUDA

MIB = 1 << 20
CAPTURE = """
import json, resource, sys
from pathlib import Path
from tests.bench import Bench
from distill_assets.teacher_capture import chunks
from distill_assets.teacher_capture.capture import capture_shard
from distill_assets.teacher_capture.teacher import load_teacher

root, room, kill_after = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
bench = Bench(root)
load_teacher(bench.spec.weights, "float32", "cpu")
capture_shard(bench.spec, bench.shards["small"], bench.store, device="cpu", force=True)  # libraries and threads are up
used = int(next(l for l in open("/proc/self/status") if l.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
notes = set()

def listen(progress):
    notes.add(progress.note)
    if kill_after and progress.done >= kill_after:
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)

try:
    shard, options = bench.shards["s0"], {"device": "cpu", "batch_tokens": 8192, "on_progress": listen}
    report = capture_shard(bench.spec, shard, bench.store, **options)
    print(json.dumps({"notes": sorted(notes), "path": str(report.capture.path)}))
except Exception as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
"""

# Once so much of the shard has been scored memory is full, but for what garbage holds, if `garbage`, and some room.
FULL = """
import gc, json, resource, sys, time
from pathlib import Path
import numpy as np
from tests.bench import Bench
from distill_assets.teacher_capture.capture import capture_shard

root, garbage, share, room = Path(sys.argv[1]), sys.argv[2] == "garbage", float(sys.argv[3]), int(sys.argv[4])
bench = Bench(root)
shard, options = bench.shards["s0"], {"device": "cpu", "batch_tokens": 128}
capture_shard(bench.spec, bench.shards["small"], bench.store, **options)  # libraries and threads are up
gc.disable()
kept = []

def listen(progress):
    if kept or progress.done < share * progress.total:
        return
    kept.append(progress.done)
    time.sleep(2)  # the chunk before has been written, and what that took is free
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), used + (64 << 20)))
    hog = []
    try:
        while True:
            hog.append(np.empty(64 << 10, dtype=np.uint8))
    except MemoryError:
        del hog[-room:]
    (hog if garbage else kept).append(hog)

try:
    report = capture_shard(bench.spec, shard, bench.store, on_progress=listen, **options)
    print(json.dumps({"path": str(report.capture.path), "filled": bool(kept)}))
except Exception as error:
    kept.clear()
    gc.collect()
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
"""


@pytest.fixture(autouse=True)
def memory_that_may_be_refused() -> Iterator[None]:
    """From the start, so that what is compared is all multiplied by one library: see `cpu_products`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 46 if soft == resource.RLIM_INFINITY else soft, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def make(root: Path, teacher: Path) -> Path:
    tiny.make_home(root, teacher, shards=0, data={"max_length": 256})
    tiny.write_jsonl(root / "shards" / "small.jsonl", tiny.example_rows(2))
    rows = [{"text": " ".join(tiny.TEXT[i % 4] for i in range(n, n + 4)) + str(n)} for n in range(110)]
    tiny.write_jsonl(root / "shards" / "s0.jsonl", rows)
    return root


def capture(root: Path, room: int, kill_after: int = 0) -> subprocess.CompletedProcess[str]:
    return python(CAPTURE, str(root), str(room), str(kill_after))


def fill_memory(root: Path, how: str, share: float = 1.0, room: int = 12) -> subprocess.CompletedProcess[str]:
    """`room` in pieces of 64 KB: twelve are enough for what a chunk is made of, four are not for compressing it."""
    return python(FULL, str(root), how, str(share), str(room))


def python(*command: str) -> subprocess.CompletedProcess[str]:
    # Else each thread's allocator reserves address space by the 64 MB, which is no memory used.
    lean = os.environ | {"MALLOC_ARENA_MAX": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    return subprocess.run([sys.executable, "-c", *command], capture_output=True, text=True, check=False, env=lean)


def test_passes_are_halved_and_a_killed_run_goes_on_alike(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    # Wide enough that a capture in passes of 8,192 tokens needs 640 MB, and 320 MB in passes of half as many.
    teacher = tiny.save_model(tmp_path / "teacher", tokenizer, hidden_size=1024, intermediate_size=4096)
    room = 480 * MIB
    whole = capture(make(tmp_path / "whole", teacher), room)
    answer = json.loads(whole.stdout)
    assert "error" not in answer, answer
    notes = [note for note in answer["notes"] if note]
    assert notes and all(note.startswith("memory ran out: ") for note in notes)

    root = make(tmp_path / "killed", teacher)
    killed = capture(root, room, kill_after=8_000)
    assert killed.returncode == -9
    [journal] = root.rglob("forward_tokens.json")
    assert json.loads(journal.read_text())["planned"] == 8192
    again = capture(root, room)
    left = json.loads(again.stdout)
    assert "error" not in left, left
    assert pq.read_table(left["path"]).equals(pq.read_table(answer["path"]))
    assert not list(root.rglob(".unfinished-*"))


def test_a_row_that_does_not_fit_alone_is_one_clear_line(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    teacher = tiny.save_model(tmp_path / "teacher", tokenizer, hidden_size=1024, intermediate_size=32_768)
    root = make(tmp_path / "home", teacher)
    answer = json.loads(capture(root, 40 * MIB).stdout)
    assert answer["error"].startswith("OutOfMemory: cpu has no memory left for a forward pass of 1 x ")
    assert "lower data.max_length" in answer["error"]
    bench = Bench(root)
    assert bench.store.failure(bench.spec.capture_id, "s0", bench.shards["s0"].version) is None


def test_chunks_that_find_no_memory_beside_the_teacher_are_written_when_it_rests(
    tmp_path: Path, teacher_folder: Path
) -> None:
    full, roomy = make(tmp_path / "full", teacher_folder), Bench(make(tmp_path / "roomy", teacher_folder))
    answer = json.loads(fill_memory(full, "garbage").stdout)
    assert answer.get("filled"), answer
    undisturbed = capture_shard(roomy.spec, roomy.shards["s0"], roomy.store, device="cpu", batch_tokens=128).capture
    assert pq.read_table(answer["path"]).equals(pq.read_table(undisturbed.path))
    assert not list(full.rglob(".unfinished-*"))


def test_a_row_that_finds_no_memory_beside_a_chunk_is_tried_alone(tmp_path: Path, teacher_folder: Path) -> None:
    """Each row is a pass of its own here; what fills memory before the third is gone when it is tried again."""
    full, roomy = make(tmp_path / "full", teacher_folder), Bench(make(tmp_path / "roomy", teacher_folder))
    answer = json.loads(fill_memory(full, "garbage", share=0.0, room=1).stdout)
    assert answer.get("filled"), answer
    undisturbed = capture_shard(roomy.spec, roomy.shards["s0"], roomy.store, device="cpu", batch_tokens=128).capture
    assert pq.read_table(answer["path"]).equals(pq.read_table(undisturbed.path))


def test_without_memory_for_a_chunk_the_finished_ones_stay(tmp_path: Path, teacher_folder: Path) -> None:
    root = make(tmp_path / "home", teacher_folder)
    answer = json.loads(fill_memory(root, "for good", room=4).stdout)
    assert answer["error"].startswith("OutOfMemory: shard s0: no memory left ("), answer
    assert "goes on from the last finished chunk" in answer["error"]
    assert list(root.rglob(".unfinished-s0@*/*.parquet"))
    bench = Bench(root)
    assert bench.store.failure(bench.spec.capture_id, "s0", bench.shards["s0"].version) is None
    seen: list[int] = []
    report = capture_shard(
        bench.spec, bench.shards["s0"], bench.store,
        device="cpu", batch_tokens=128, on_progress=lambda progress: seen.append(progress.done),
    )  # fmt: skip
    assert max(seen, default=0) < report.capture.stats.tokens / 2


def test_a_host_without_room_for_the_figures_is_out_of_memory_too(tmp_path: Path, teacher_folder: Path) -> None:
    """The last batch has been computed; what it gave finds no memory when it is unpacked."""
    weights = resolve_model(str(teacher_folder), None, teacher_folder).weights(HashCache(tmp_path / "none.json"))
    teacher = load_teacher(weights, "float32", "cpu")

    def row(n: int, n_targets: int) -> EncodedRow:
        ids, mask = np.arange(10, 10 + n, dtype=np.int32), np.arange(n) >= n - n_targets
        return EncodedRow(ids, mask, key="0" * 32, id=None, weight=1.0, truncated=False, line=1)

    # The first batch is given free when the second is unpacked: it holds next to nothing.
    rows = [row(241, 1)] * 20 + [row(240, 239)] * 20
    scored = score_rows(teacher, rows, TargetSettings(k=320, precision="exact"), 20 * 241)
    for _ in range(20):
        next(scored)
    hog, limits = [], resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    try:
        resource.setrlimit(resource.RLIMIT_AS, (used, limits[1]))
        with suppress(MemoryError):
            while True:  # what the allocator still holds
                hog.append(np.empty(64 << 10, dtype=np.uint8))
        hog.pop()
        with pytest.raises(OutOfMemory, match="cpu has no memory left") as caught:
            next(scored)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        hog.clear()
    assert caught.value.rows == 20


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=NEEDS_CUDA)])
def test_a_gpu_without_room_halves_its_passes(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, device: str) -> None:
    teacher = tiny.save_model(tmp_path / "teacher", tokenizer, hidden_size=1024, intermediate_size=2048)
    bench = Bench(make(tmp_path / "home", teacher))
    roomy = capture_shard(bench.spec, bench.shards["s0"], bench.store, device=device, batch_tokens=8192).capture
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved() + 120 * MIB
    notes = set()
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
    try:
        tight = capture_shard(
            bench.spec, bench.shards["s0"], bench.store,
            device=device, batch_tokens=8192, force=True, on_progress=lambda progress: notes.add(progress.note),
        ).capture  # fmt: skip
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any(note.startswith("memory ran out: ") for note in notes)
    assert tight.stats.rows == roomy.stats.rows and tight.stats.tokens_captured == roomy.stats.tokens_captured
    assert tight.stats.mean_entropy == pytest.approx(roomy.stats.mean_entropy, abs=1e-3)
