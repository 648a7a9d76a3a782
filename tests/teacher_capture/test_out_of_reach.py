"""Captures that the system does not give just now may be whole: nothing is put in their place, and no teacher is paid
again for what they hold.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from distill_assets.dataset_shards.discover import discover_shards, place_of_shard
from distill_assets.dataset_shards.encode import encode_shard
from distill_assets.definitions import defs
from distill_assets.foundation.errors import CaptureOutOfReach, PinnedCapture
from distill_assets.orchestration.bring_up_to_date import bring_up_to_date
from distill_assets.orchestration.due import due
from distill_assets.orchestration.instance import open_instance
from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.orchestration.states import AssetStates
from distill_assets.orchestration.verify import verify
from distill_assets.teacher_capture.capture import capture_shard
from distill_assets.teacher_capture.chunks import Chunk, ChunkFolder, Cost, Figures
from distill_assets.teacher_capture.contents import Needs, contents
from distill_assets.teacher_capture.importing import import_jsonl
from distill_assets.teacher_capture.plan import plan_capture
from distill_assets.teacher_capture.store import read_capture, read_rows
from tests import tiny
from tests.bench import Bench, edit

_withheld: dict[str, int] = {}


def _refuse(event: str, args: tuple[object, ...]) -> None:
    if event == "open" and (number := _withheld.get(str(args[0]))) is not None:
        raise OSError(number, os.strerror(number), args[0])


@pytest.fixture(scope="module", autouse=True)
def refusing() -> None:
    """Rights would not do: tests may be run by root."""
    sys.addaudithook(_refuse)  # called when a file is about to be opened; it can never be taken off again


@contextmanager
def out_of_reach(path: Path, number: int = errno.EACCES) -> Iterator[None]:
    """Whoever opens this file in the block is told this, and nobody remembers what it says."""
    os.utime(path)
    _withheld[str(path)] = number
    try:
        yield
    finally:
        del _withheld[str(path)]


@pytest.fixture
def bench(tmp_path: Path, teacher_folder: Path) -> Bench:
    return Bench(tiny.make_home(tmp_path / "home", teacher_folder, shards=1))


def capture(bench: Bench, shard: str = "s0") -> int:
    """Captures a shard; returns how many rows the teacher saw."""
    report = capture_shard(bench.spec, bench.shards[shard], bench.store, device="cpu")
    return report.capture.stats.rows_captured if report.written else 0


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EIO, errno.ESTALE])
def test_a_current_capture_is_neither_made_again_nor_called_damaged(bench: Bench, number: int) -> None:
    capture(bench)
    [path] = bench.home.captures.rglob("s0@*.parquet")
    before = path.read_bytes()
    spec, shard = bench.spec, bench.shards["s0"]
    with out_of_reach(path, number), pytest.raises(CaptureOutOfReach, match="and may be whole; mend that") as caught:
        capture_shard(spec, shard, bench.store, device="cpu")
    assert str(caught.value).startswith(f"{path}: cannot be read now ({os.strerror(number)})")
    assert path.read_bytes() == before and bench.store.failure(spec.capture_id, "s0", shard.version) is None
    assert capture(bench) == 0


def _more_rows(bench: Bench) -> None:
    tiny.write_jsonl(bench.home.root / "shards" / "s0.jsonl", tiny.example_rows(7))


def _fewer_ids(bench: Bench) -> None:
    edit(bench.home.root, targets={"k": 3})


@pytest.mark.parametrize(("change", "rows"), [(_more_rows, 1), (_fewer_ids, 0)])
def test_rows_it_holds_are_waited_for(bench: Bench, change: Callable[[Bench], None], rows: int) -> None:
    capture(bench)
    [path] = bench.home.captures.rglob("s0@*.parquet")
    change(bench)
    spec, shard = bench.spec, bench.shards["s0"]
    with out_of_reach(path):
        with pytest.raises(CaptureOutOfReach):
            capture_shard(spec, shard, bench.store, device="cpu")
        found = discover_shards(bench.home.root, bench.home.settings().data, bench.home.hashes())
        [plan] = [p for p in plan_capture(spec, found, bench.store, ()).shards if p.shard == "s0"]
        assert plan.state == "failed" and "cannot be read now (Permission denied)" in plan.reason
        [item] = [item for item in contents(bench.home.captures) if item.path == path]
        assert item in Needs(spec, found, bench.store), "gc would take what nobody could look into"
    assert bench.store.failure(spec.capture_id, "s0", shard.version) is None
    assert capture(bench) == rows


def test_one_that_is_damaged_is_still_made_again(bench: Bench) -> None:
    assert capture(bench) == 6
    [path] = bench.home.captures.rglob("s0@*.parquet")
    path.write_bytes(path.read_bytes()[:-40])
    assert capture(bench) == 6


def test_a_finished_chunk_is_not_scored_again(bench: Bench) -> None:
    capture(bench)
    spec, shard = bench.spec, bench.shards["s0"]
    [path] = bench.home.captures.rglob("s0@*.parquet")
    rows = read_rows(path)
    folder = ChunkFolder(bench.store.unfinished(spec.capture_id, "s0", shard.version), spec.targets, spec.identity)
    chunk = Chunk(0, encode_shard(shard, spec.encoder).rows)
    folder.write(chunk, rows, Figures.of(rows, Cost(len(rows), 100, 0.5)), ())
    path.unlink()
    [file] = folder.files()
    with out_of_reach(file), pytest.raises(CaptureOutOfReach):
        capture_shard(spec, shard, bench.store, device="cpu")
    report = capture_shard(spec, shard, bench.store, device="cpu")
    assert report.capture.stats.seconds == 0.5  # as the chunk says


def test_an_import_is_not_called_damaged(bench: Bench) -> None:
    line = {"input_ids": [7, 10, 11], "topk_ids": [[10], [11], []], "topk_logprobs": [[-0.5], [-0.5], []]}
    source = tiny.write_jsonl(bench.home.root / "in.jsonl", [line])
    place = place_of_shard(bench.home.root, bench.home.settings().data, "x")
    path = import_jsonl(source, "x", bench.spec, bench.store, place).capture.path
    spec, shard = bench.spec, bench.shards["x"]
    with out_of_reach(path), pytest.raises(CaptureOutOfReach) as caught:
        bench.store.pinned(spec, shard)
    assert not isinstance(caught.value, PinnedCapture) and "import it again" not in str(caught.value)
    assert bench.store.pinned(spec, shard) == read_capture(path)
    before = path.read_bytes()
    other = tiny.write_jsonl(bench.home.root / "in.jsonl", [line | {"topk_logprobs": [[-0.7], [-0.5], []]}])
    with out_of_reach(path), pytest.raises(CaptureOutOfReach):
        import_jsonl(other, "x", spec, bench.store, place)
    assert path.read_bytes() == before


def test_the_others_go_on(bench: Bench) -> None:
    """A run with an import and a capture that nobody can look into: the shards fail by name, and nothing else."""
    root = bench.home.root
    tiny.write_jsonl(root / "shards" / "heldout.jsonl", tiny.example_rows(6, start=50))
    line = {"input_ids": [7, 10, 11], "topk_ids": [[10], [11], []], "topk_logprobs": [[-0.5], [-0.5], []]}
    source = tiny.write_jsonl(root / "in.jsonl", [line])
    imported = import_jsonl(
        source, "x", bench.spec, bench.store, place_of_shard(root, bench.home.settings().data, "x")
    ).capture.path
    bring_up_to_date(defs, bench.home, shards=["s0"], device="cpu")
    [captured] = bench.home.captures.rglob("s0@*.parquet")
    whole = {path: path.read_bytes() for path in (imported, captured)}
    with out_of_reach(imported), out_of_reach(captured):
        assert {p.path for p in verify(bench.home).problems} >= {imported, captured}
        for problem in verify(bench.home).problems:
            if problem.path in whole:
                assert "and may be whole; mend that, or move it out of captures/" in problem.message
                assert "delete" not in problem.message and "import it again" not in problem.message
        with pytest.raises(CaptureOutOfReach), open_instance(bench.home) as instance:
            due(instance, AssetStates(Pipeline(bench.home)), "teacher_capture")
        report = bring_up_to_date(defs, bench.home, device="cpu")
        assert {"s0", "x"} <= report.failures.keys()
        assert all("cannot be read now" in report.failures[shard] for shard in ("s0", "x"))
    assert whole == {path: path.read_bytes() for path in whole}
    after = bring_up_to_date(defs, bench.home, device="cpu")
    assert not after.failures and after.rows_captured == 6, "the held-out shard alone"
