"""A disk that takes no more: said in one line, and the same command goes on when there is room."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
from safetensors import SafetensorError

from distill_assets.foundation.files import disk_problem
from distill_assets.teacher_capture.capture import capture_shard
from distill_assets.teacher_capture.store import read_capture
from tests import tiny
from tests.bench import Bench

CAPTURE = """
import json, resource, shutil, subprocess, sys
from pathlib import Path
from distill_assets.foundation.files import disk_problem
from distill_assets.teacher_capture.capture import capture_shard
from tests.bench import Bench

bench, way, limits, result = Bench(Path(sys.argv[1])), sys.argv[2], json.loads(sys.argv[3]), Path(sys.argv[4])
spec, shard, captures = bench.spec, bench.shards["s0"], bench.home.captures

def leave(size):
    if way == "disk":
        subprocess.run(["mount", "-o", f"remount,size={size}", captures], check=True)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

def capture():
    return capture_shard(spec, shard, bench.store, device="cpu", batch_tokens=64).capture.path

captures.mkdir()
if way == "disk":
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", captures], check=True)
told = []
for limit in limits:
    leave(limit)
    try:
        capture()
    except OSError as error:
        left = [file.name for file in captures.rglob("*") if file.is_file()]
        told.append([disk_problem(error), left])
leave(1 << 30)
shutil.copy(capture(), result)
print(json.dumps(told))
"""
LARGEST_FILE_BYTES = 300_000  # Dagster's database reaches it in the middle of the first run


def run(home: Path, *, full: bool) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        if full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE_BYTES, LARGEST_FILE_BYTES))

    command = [sys.executable, "-m", "distill_assets.cli", "run", "--home", str(home), "--device", "cpu", "--json"]
    return subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, check=False)


def test_a_full_disk_is_one_line_and_loses_nothing(home: Path) -> None:
    failed = run(home, full=True)
    assert failed.returncode == 1
    assert "disk is full or cannot be written" in json.loads(failed.stdout)["error"]
    assert "disk is full or cannot be written" in failed.stderr.splitlines()[-1]
    kept = {path: path.read_bytes() for path in (home / "captures").rglob("*.parquet")}
    assert not list(home.rglob(".partial-*"))

    done = run(home, full=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["failures"] == {} and answer["report"]
    assert len(answer["captured_shards"]) == 4 - len(kept)
    assert all(path.read_bytes() == content for path, content in kept.items())


def can_mount(folder: Path) -> bool:
    """Whether a small disk of one's own is allowed here."""
    folder.mkdir()
    command = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    return shutil.which("unshare") is not None and subprocess.run(command, check=False).returncode == 0


def test_a_disk_that_fills_up_in_a_capture_keeps_its_finished_chunks(
    tmp_path: Path, teacher_folder: Path, bench: Bench
) -> None:
    """On a disk that is really full; where no disk can be mounted, with files that must not grow."""
    rows = tiny.example_rows(300)
    for root in (bench.home.root, other := tiny.make_home(tmp_path / "other", teacher_folder, shards=1)):
        tiny.write_jsonl(root / "shards" / "s0.jsonl", rows)
    undisturbed = Bench(other)
    expected = capture_shard(
        undisturbed.spec, undisturbed.shards["s0"], undisturbed.store, device="cpu", batch_tokens=64
    )
    whole, resumed = expected.capture.path.stat().st_size, tmp_path / "resumed.parquet"
    # Not a chunk fits; chunks fit, the capture (beside them, on a disk) does not.
    disk = can_mount(tmp_path / "mount")
    limits = [4096, whole if disk else whole // 2]
    command = [sys.executable, "-c", CAPTURE, str(bench.home.root), "disk" if disk else "file", json.dumps(limits)]
    own_mounts = ["unshare", "--map-root-user", "--mount"] if disk else []
    child = subprocess.run([*own_mounts, *command, str(resumed)], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    (said, nothing), (said_again, chunks) = json.loads(child.stdout)
    for problem in (said, said_again):
        assert os.strerror(errno.ENOSPC if disk else errno.EFBIG) in problem
    assert not [name for name in nothing if name.endswith(".parquet")]
    finished = [name for name in chunks if name.endswith(".parquet")]
    assert finished and all(re.fullmatch(r"\d{9}-\d+\.parquet|identity\.json", name) for name in chunks)
    assert read_capture(resumed).stats.rows_captured == len(rows)
    assert pq.read_table(resumed).equals(pq.read_table(expected.capture.path))


def test_the_disk_is_named_wherever_it_stands_in_the_chain() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/home/x/captures/a.parquet")
    try:
        try:
            raise full
        except OSError as error:
            raise RuntimeError("a step failed") from error
    except RuntimeError as error:
        assert disk_problem(error) == "/home/x/captures/a.parquet: No space left on device"
    assert disk_problem(sqlite3.OperationalError("database or disk is full")) == "database or disk is full"
    assert disk_problem(SafetensorError("I/O error: No space left on device (os error 28)")) is not None
    assert disk_problem(ValueError("row 3 says: database or disk is full")) is None
    assert disk_problem(OSError(errno.ENOENT, "No such file or directory", "x")) is None
    assert disk_problem(ValueError("5 is not a number")) is None
