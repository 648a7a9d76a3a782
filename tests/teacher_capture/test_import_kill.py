"""An import killed at any moment leaves the home as it was, and the same import then does the whole."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from distill_assets.dataset_shards.discover import place_of_shard
from distill_assets.teacher_capture.importing import ImportReport, import_jsonl
from tests.bench import Bench

ROWS = 2560
IMPORT = """
import sys
from pathlib import Path
from distill_assets.teacher_capture.importing import import_jsonl
from tests.bench import Bench

bench = Bench(Path(sys.argv[1]))
import_jsonl(Path(sys.argv[2]), "big", bench.spec, bench.store, bench.home.root / "shards" / "big.jsonl",
             chunk_numbers=2000, on_progress=lambda step: print(step.done, flush=True))
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "big.jsonl"
    with path.open("w") as stream:
        for i in range(ROWS):
            ids = [10 + i % 200, 10 + i // 200, 7, 8]
            lists = {"topk_ids": [[t, 300] for t in ids[1:]] + [[]], "topk_logprobs": [[-0.5, -2.0]] * 3 + [[]]}
            stream.write(json.dumps({"input_ids": ids} | lists) + "\n")
    return path


def whole_import(bench: Bench, source: Path) -> ImportReport:
    place = place_of_shard(bench.home.root, bench.home.settings().data, "big")
    return import_jsonl(source, "big", bench.spec, bench.store, place)


def files(root: Path) -> dict[str, bytes]:
    """Everything a reader of the home would take for a result."""
    folders = ("shards", "captures")
    return {
        str(path.relative_to(root)): path.read_bytes()
        for folder in folders
        for path in (root / folder).rglob("*")
        if path.is_file() and not any(part.startswith(".partial-") for part in path.parts)
    }


def test_a_killed_import_leaves_nothing_and_is_done_again(bench: Bench, source: Path) -> None:
    before = files(bench.home.root)
    for reports in (1, 5, 10):
        child = subprocess.Popen(
            [sys.executable, "-c", IMPORT, str(bench.home.root), str(source)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert child.stdout is not None
        told = [int(child.stdout.readline()) for _ in range(reports)]
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL and told[-1] == 256 * reports
        assert files(bench.home.root) == before
    done = whole_import(bench, source)
    assert done.written and done.capture.stats.rows == ROWS and "big" in bench.shards
    assert set(files(bench.home.root)) - set(before) == {
        "shards/big.jsonl",
        str(done.capture.path.relative_to(bench.home.root)),
    }


def test_a_capture_without_its_shard_is_taken_up(bench: Bench, source: Path) -> None:
    first = whole_import(bench, source)
    table = pq.read_table(first.capture.path)
    first.shard_file.unlink()  # what a kill between the two publications leaves
    again = whole_import(bench, source)
    assert again.written and again.capture == first.capture and pq.read_table(again.capture.path).equals(table)
    assert bench.shards["big"].version == again.capture.version
