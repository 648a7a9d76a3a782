"""Finished chunks: what is damaged is done again, whatever is damaged; what goes away is looked for elsewhere."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from distill_assets.dataset_shards.encode import encode_shard
from distill_assets.foundation.progress import Progress
from distill_assets.teacher_capture import arrow
from distill_assets.teacher_capture.arrow import capture_schema, older_schema
from distill_assets.teacher_capture.capture import capture_shard
from distill_assets.teacher_capture.chunks import CHUNK_BATCHES, Chunk, ChunkFolder, Cost, Figures
from distill_assets.teacher_capture.reuse import captured_rows
from distill_assets.teacher_capture.sealed import sealed_writer
from distill_assets.teacher_capture.store import read_rows
from tests import tiny
from tests.bench import Bench


def unfinished(bench: Bench) -> tuple[ChunkFolder, Chunk, Path]:
    """s0 as a kill leaves it when all its rows are in a chunk, and its capture, moved out of the store."""
    path = capture_shard(bench.spec, bench.shards["s0"], bench.store, device="cpu").capture.path
    rows = read_rows(path)
    spec, shard = bench.spec, bench.shards["s0"]
    folder = ChunkFolder(bench.store.unfinished(spec.capture_id, "s0", shard.version), spec.targets, spec.identity)
    chunk = Chunk(0, encode_shard(shard, spec.encoder).rows)
    folder.write(chunk, rows, Figures.of(rows, Cost(len(rows), 100, 0.5)), {"0123456789abcdef"})
    return folder, chunk, path.rename(bench.home.root / path.name)


def test_a_chunk_with_a_bit_flipped_is_not_finished_unless_it_changes_nothing(bench: Bench) -> None:
    folder, chunk, _ = unfinished(bench)
    [file] = folder.files()
    whole = file.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    before = (folder.table(chunk), folder.figures([chunk]), folder.derived_from([chunk]))
    random = np.random.default_rng(0)
    redone = 0
    for at in (*random.integers(4, footer, 60), *random.integers(footer, len(whole), 60)):
        content = bytearray(whole)
        content[at] ^= 1 << int(random.integers(8))
        file.write_bytes(content)
        if folder.is_finished(chunk):
            assert (folder.table(chunk), folder.figures([chunk]), folder.derived_from([chunk])) == before, at
        else:
            redone += 1
    assert redone > 90


@pytest.mark.parametrize("force", [False, True])
def test_a_chunk_of_an_older_schema_is_finished(bench: Bench, monkeypatch: pytest.MonkeyPatch, force: bool) -> None:
    folder, chunk, undisturbed = unfinished(bench)
    [file] = folder.files()
    table, told = pq.read_table(file), pq.read_metadata(file).metadata
    with monkeypatch.context() as patch:
        schema = older_schema(capture_schema(bench.spec.targets))
        patch.setattr(arrow, "capture_schema", lambda *_: schema)
        with sealed_writer(file, bench.spec.targets) as writer:
            writer.write_table(table.cast(schema))
            writer.add_key_value_metadata({"distill_chunk": told[b"distill_chunk"].decode()})
    assert not pq.read_schema(file).equals(table.schema) and folder.is_finished(chunk)
    if force:
        (folder.folder / "forced").touch()
    report = capture_shard(bench.spec, bench.shards["s0"], bench.store, device="cpu", force=force)
    assert (report.capture.stats.rows_captured, report.capture.stats.seconds) == (6, 0.5)  # as the chunk says
    assert pq.read_table(report.capture.path).equals(pq.read_table(undisturbed))


def test_finished_chunks_outlive_a_run_with_smaller_ones(bench: Bench) -> None:
    """The first of the smaller begins where the larger one did."""
    rows = tiny.example_rows(60)
    tiny.write_jsonl(bench.home.root / "shards" / "s0.jsonl", rows)
    scored: list[int] = []  # tokens of each run

    class Killed(Exception):
        pass

    def run(batch_tokens: int, until: float) -> int:
        """The shard's tokens; 0 from a run that ends when so much of what it had to do is done."""
        scored.append(0)

        def listen(progress: Progress) -> None:
            scored[-1] = progress.done
            if progress.done > until * progress.total:
                raise Killed

        with suppress(Killed):
            shard, options = bench.shards["s0"], {"device": "cpu", "batch_tokens": batch_tokens}
            return capture_shard(bench.spec, shard, bench.store, on_progress=listen, **options).capture.stats.tokens
        return 0

    run(64, 0.9)
    folder = bench.store.unfinished(bench.spec.capture_id, "s0", bench.shards["s0"].version)
    before = {file.name: file.read_bytes() for file in folder.glob("*.parquet")}
    assert before
    run(8, 0.5)
    assert before.items() <= {file.name: file.read_bytes() for file in folder.glob("*.parquet")}.items()
    tokens = run(64, 1.0)
    assert sum(scored) <= tokens + CHUNK_BATCHES * (64 + 8), "a chunk of each run that was ended"


def test_nothing_of_a_chunk_is_finished_before_the_one_before_is_kept(bench: Bench) -> None:
    """So a kill never costs more than one."""
    tiny.write_jsonl(bench.home.root / "shards" / "s0.jsonl", tiny.example_rows(200))
    folder = bench.store.unfinished(bench.spec.capture_id, "s0", bench.shards["s0"].version)
    lost: list[int] = []

    def listen(progress: Progress) -> None:
        kept = 0
        for file in folder.glob("*.parquet"):
            kept += json.loads(pq.read_metadata(file).metadata[b"distill_chunk"])["figures"]["tokens"]
        lost.append(progress.done - kept)

    capture_shard(bench.spec, bench.shards["s0"], bench.store, device="cpu", batch_tokens=64, on_progress=listen)
    assert len(lost) == 200 and 32 * 48 < max(lost) <= CHUNK_BATCHES * 64


@pytest.mark.parametrize("said", [b"rows_captured", b"support_q"])
def test_a_chunk_whose_footer_is_damaged_does_not_stop_its_shard(bench: Bench, said: bytes) -> None:
    folder, _, _ = unfinished(bench)
    [file] = folder.files()
    whole = file.read_bytes()
    at = whole.rindex(said)
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 8]) + whole[at + 1 :])
    assert capture_shard(bench.spec, bench.shards["s0"], bench.store, device="cpu").capture.stats.rows_captured == 6


def test_chunks_of_a_neighbour_that_ends_meanwhile_are_read_from_its_capture(bench: Bench) -> None:
    folder, _, aside = unfinished(bench)
    capture = bench.store.path_of(bench.spec.capture_id, "s0", bench.shards["s0"].version)
    tiny.write_jsonl(bench.home.root / "shards" / "t.jsonl", tiny.example_rows(6)[::-1])
    captured_rows(bench.store, bench.spec.capture_id)  # the chunk's keys are known: it is opened for its rows next
    gone = False

    def neighbour_ends(event: str, args: tuple[object, ...]) -> None:
        nonlocal gone
        if event == "open" and not gone and str(args[0]).startswith(f"{folder.folder}/"):
            gone = True
            aside.rename(capture)
            shutil.rmtree(folder.folder)

    sys.addaudithook(neighbour_ends)  # called when a file is about to be opened; it can never be taken off again
    stats = capture_shard(bench.spec, bench.shards["t"], bench.store, device="cpu").capture.stats
    assert gone and (stats.rows_captured, stats.rows_reused) == (0, 6)
