"""Shards captured for real: reuse by row key, whole files, failures that lose nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import numpy as np
import pandas
import polars
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from distill_assets.foundation.errors import CaptureError, ShardError
from distill_assets.foundation.progress import Progress
from distill_assets.student_model.batches import collate
from distill_assets.teacher_capture.capture import CaptureReport, capture_shard
from distill_assets.teacher_capture.checks import check_complete
from distill_assets.teacher_capture.inspection import inspect_capture
from distill_assets.teacher_capture.store import FOOTER, read_capture, read_row_group, read_row_keys, read_rows
from tests import tiny
from tests.bench import Bench


def capture(bench: Bench, key: str, **options: object) -> CaptureReport:
    return capture_shard(bench.spec, bench.shards[key], bench.store, device="cpu", **options)  # type: ignore[arg-type]


def rewrite(bench: Bench, key: str, rows: list[dict[str, str]]) -> None:
    tiny.write_jsonl(bench.home.root / "shards" / f"{key}.jsonl", rows)


def test_a_capture_reads_back_as_it_was_described(bench: Bench) -> None:
    seen: list[Progress] = []
    report = capture(bench, "s0", on_progress=seen.append)
    stats = report.capture.stats
    rows = read_rows(report.capture.path)
    assert report.written
    assert [row.row for row in rows] == list(range(6))
    assert stats.rows == stats.rows_captured == 6
    assert stats.tokens == sum(len(row.input_ids) for row in rows)
    assert stats.supervised_tokens == sum(row.targets.n_positions for row in rows)
    gold = np.concatenate([row.targets.gold_logprob_P for row in rows]).astype(np.float64)
    assert stats.teacher_perplexity == pytest.approx(np.exp(-gold.mean()), rel=2e-3)  # float16 on disk
    mass = np.concatenate([row.targets.kept_mass_P() for row in rows])
    assert stats.mean_kept_mass == pytest.approx(mass.mean(), abs=0.03)  # 1/16-nat steps on disk
    assert seen[-1].done == seen[-1].total == stats.tokens_captured == stats.tokens
    footer = json.loads(pq.read_metadata(report.capture.path).metadata[FOOTER])
    assert footer["format_version"] == 1 and "token t+1" in footer["position"]
    assert list(bench.home.captures.rglob("*")) == [report.capture.path.parent, report.capture.path]


def test_plain_tools_read_the_file(bench: Bench) -> None:
    path = capture(bench, "s0").capture.path
    ours = read_rows(path)[0]
    first = polars.read_parquet(path).row(0, named=True)
    assert first["input_ids"] == ours.input_ids.tolist()
    assert [len(ids) for ids in first["support_ids"]] == ours.targets.kept_P.tolist()
    assert pandas.read_parquet(path).loc[0, "positions"].tolist() == ours.targets.positions_P.tolist()
    (entropy,) = duckdb.sql(f"SELECT entropy FROM '{path}' LIMIT 1").fetchall()[0]
    assert entropy == pytest.approx(ours.targets.entropy_P.tolist())


def test_exact_precision_keeps_float32(home: Path, teacher_folder: Path) -> None:
    tiny.make_home(home, teacher_folder, targets={"precision": "exact", "k": 320})
    bench = Bench(home)
    for row in read_rows(capture(bench, "s0").capture.path):
        assert np.abs(row.targets.log_total_mass_P()).max() < 1e-5  # k = V: nothing lost, nothing rounded
        assert np.isneginf(row.targets.tail_logprob_P).all()


def test_a_current_capture_is_not_made_again(bench: Bench) -> None:
    first = capture(bench, "s0").capture
    before = first.path.stat()
    again = capture(bench, "s0")
    assert not again.written and again.capture == first and first.path.stat() == before
    assert capture(bench, "s0", force=True).capture.stats.rows_captured == 6


def test_only_new_rows_see_the_teacher(bench: Bench) -> None:
    capture(bench, "s0")
    rows = tiny.example_rows(6)
    rewrite(bench, "s0", [*reversed(rows), *tiny.example_rows(2, start=50)])
    report = capture(bench, "s0")
    assert (report.capture.stats.rows_captured, report.capture.stats.rows_reused) == (2, 6)
    rewrite(bench, "renamed", rows)
    moved = capture(bench, "renamed")
    assert (moved.capture.stats.rows_captured, moved.capture.stats.rows_reused) == (0, 6)
    assert moved.capture.stats.tokens_per_second is None


def test_reused_rows_equal_captured_rows(bench: Bench) -> None:
    original = {row.key: row for row in read_rows(capture(bench, "s0").capture.path)}
    rewrite(bench, "s0", list(reversed(tiny.example_rows(6))))
    for row in read_rows(capture(bench, "s0").capture.path):
        before = original[row.key].targets
        for name in ("positions_P", "support_ids_N", "support_logprobs_N", "tail_logprob_P", "entropy_P"):
            assert np.array_equal(getattr(row.targets, name), getattr(before, name))


def test_weights_of_positions_are_stored_beside_targets_that_no_teacher_sees_again(
    bench: Bench, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = [tokenizer(text)["input_ids"][:20] for text in tiny.TEXT[:3]]
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "The cat"}]}
    rewrite(bench, "s0", [*({"input_ids": each} for each in ids), talk])  # type: ignore[list-item]
    plain = capture(bench, "s0").capture
    assert "position_weights" not in pq.read_schema(plain.path).names
    talk["messages"][1]["weight"] = 0.25  # type: ignore[assignment]
    weighted = [{"input_ids": ids[0]}, {"input_ids": ids[1], "token_weights": [0.5 * t for t in range(len(ids[1]))]}]
    rewrite(bench, "s0", [*weighted, {"input_ids": ids[2]}, talk])  # type: ignore[list-item]
    report = capture(bench, "s0")
    assert (report.capture.stats.rows_captured, report.capture.stats.rows_reused) == (0, 4)
    before, after = read_rows(plain.path), read_rows(report.capture.path, to_learn_from=True)
    assert [row.key for row in before] == [row.key for row in after]
    for old, new in zip(before, after, strict=True):
        assert np.array_equal(old.targets.support_logprobs_N, new.targets.support_logprobs_N)
    assert [row.position_weights is None for row in after] == [True, False, True, False]
    assert after[1].position_weights.tolist() == [0.5 * t for t in range(1, len(ids[1]))]  # type: ignore[union-attr]
    assert set(after[3].position_weights.tolist()) == {0.25}  # type: ignore[union-attr]
    assert [key.weighting for key in read_row_keys(report.capture.path)] == [row.weighting for row in after]
    assert list(inspect_capture(report.capture.path, n_ids=None)) == []
    assert check_complete(bench.spec, [(bench.shards["s0"], report.capture)]).passed
    talk["messages"][1]["weight"] = 0.5  # type: ignore[assignment]
    rewrite(bench, "s0", [*weighted, {"input_ids": ids[2]}, talk])  # type: ignore[list-item]
    assert "row 3 is not the shard's" in check_complete(bench.spec, [(bench.shards["s0"], report.capture)]).problems[0]


def test_repeated_rows_are_scored_once(bench: Bench) -> None:
    rewrite(bench, "s0", tiny.example_rows(2) * 3)
    stats = capture(bench, "s0").capture.stats
    assert (stats.rows, stats.rows_captured, stats.rows_reused) == (6, 2, 4)


def test_a_failure_is_remembered_and_leaves_the_old_capture(bench: Bench) -> None:
    old = capture(bench, "s0").capture
    (bench.home.root / "shards" / "s0.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 3}\n')
    shard = bench.shards["s0"]
    with pytest.raises(ShardError, match="line 2"):
        capture(bench, "s0")
    assert "line 2" in (bench.store.failure(bench.spec.capture_id, "s0", shard.version) or "")
    assert read_capture(old.path) == old
    rewrite(bench, "s0", tiny.example_rows(1))
    capture(bench, "s0")


@pytest.mark.parametrize("left_bytes", [0, 200])
def test_a_damaged_capture_says_so_and_is_made_again(bench: Bench, left_bytes: int) -> None:
    rewrite(bench, "other", tiny.example_rows(4))  # four of the six rows of s0
    capture(bench, "other")
    path = capture(bench, "s0").capture.path
    before = pq.read_table(path)
    path.write_bytes(path.read_bytes()[:left_bytes])
    with pytest.raises(CaptureError, match=rf"{path.name}: damaged.*delete it"):
        read_rows(path)
    with pytest.raises(CaptureError, match=rf"{path.name}: damaged.*`distill run` makes it again"):
        read_capture(path)
    again = capture(bench, "s0")
    assert again.written
    assert (again.capture.stats.rows_captured, again.capture.stats.rows_reused) == (2, 4)
    assert pq.read_table(path).equals(before)


def flip_a_bit(path: Path) -> None:
    """Flip one bit of `support_q` in the first row group; the footer stays whole."""
    whole = path.read_bytes()
    column = pq.read_metadata(path).row_group(0).column(7)
    place = column.data_page_offset + column.total_compressed_size // 2
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])


def test_a_flipped_bit_is_noticed(bench: Bench) -> None:
    path = capture(bench, "s0").capture.path
    flip_a_bit(path)
    with pytest.raises(CaptureError, match="damaged"):
        read_rows(path)


def test_rows_in_a_damaged_part_of_a_file_are_scored_again(bench: Bench) -> None:
    flip_a_bit(capture(bench, "s0").capture.path)
    rewrite(bench, "moved", [*tiny.example_rows(6), *tiny.example_rows(1, start=50)])
    stats = capture(bench, "moved").capture.stats
    assert (stats.rows_captured, stats.rows_reused) == (7, 0)


def test_rows_that_are_whole_elsewhere_are_not_scored_again(bench: Bench) -> None:
    damaged = capture(bench, "s0").capture.path
    rewrite(bench, "s1", list(reversed(tiny.example_rows(6))))
    whole = capture(bench, "s1").capture.path
    for path, other in ((damaged, whole), (whole, damaged)):  # whichever is looked at first
        before = path.read_bytes()
        flip_a_bit(path)
        rewrite(bench, "moved", tiny.example_rows(5))
        stats = capture(bench, "moved").capture.stats
        assert (stats.rows_captured, stats.rows_reused) == (0, 5), (path, other)
        path.write_bytes(before)
        bench.store.path_of(bench.spec.capture_id, "moved", bench.shards["moved"].version).unlink()


def test_chosen_rows_do_not_keep_their_row_group_in_memory(bench: Bench) -> None:
    """The rows of a group are views of shared arrays; those chosen must have arrays of their own size."""
    path = capture(bench, "s0").capture.path
    rows = read_rows(path)
    [chosen] = read_row_group(path, 0, {rows[4].key})
    assert chosen.row == 4 and np.array_equal(chosen.targets.support_ids_N, rows[4].targets.support_ids_N)
    own, shared = chosen.targets.support_logprobs_N, rows[4].targets.support_logprobs_N
    assert own.tolist() == shared.tolist()
    assert shared.base is not None and len(shared.base) > 4 * len(shared)
    assert own.base is not None and len(own.base) == len(own)
    assert read_row_group(path, 0, {"no such key"}) == []


def test_an_interrupt_leaves_nothing_half_written(bench: Bench) -> None:
    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(bench, "s0", on_progress=interrupt)
    assert [p for p in bench.home.captures.rglob("*") if p.is_file()] == []
    assert bench.store.failure(bench.spec.capture_id, "s0", bench.shards["s0"].version) is None


def test_logits_that_are_not_finite_name_the_shard_and_keep_finished_chunks(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"text": f"{tiny.TEXT[0]} {i}"} for i in range(100)]
    new = set(tokenizer(tiny.TEXT[4])["input_ids"]) - {i for row in rows for i in tokenizer(row["text"])["input_ids"]}
    teacher = tiny.save_model(tmp_path / "teacher", tokenizer, tie_word_embeddings=False)
    weights = load_file(teacher / "model.safetensors")
    weights["model.embed_tokens.weight"][sorted(new)] = float("nan")
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    bench = Bench(tiny.make_home(tmp_path / "home", teacher, shards=0))
    rewrite(bench, "s0", [*rows, {"text": tiny.TEXT[4]}])
    shard = bench.shards["s0"]
    with pytest.raises(CaptureError, match=r"not finite at position \d+ of the row in line 101 \(key ") as caught:
        capture(bench, "s0", batch_tokens=64)
    assert str(caught.value).startswith(f"shard s0 ({shard.path}): the teacher's logits")
    assert bench.store.failure(bench.spec.capture_id, "s0", shard.version) == str(caught.value)
    assert list(bench.home.captures.rglob(".unfinished-*/*.parquet"))


def test_bad_rows_left_out_are_not_current_once_they_fail_the_shard(bench: Bench) -> None:
    shard, settings = bench.home.root / "shards" / "s0.jsonl", bench.home.settings_file
    shard.write_text(shard.read_text() + '{"prompt": 3}\n')
    fail = settings.read_text()
    settings.write_text(fail.replace("max_length: 64", "max_length: 64\n  on_bad_row: skip"))
    assert capture(bench, "s0").capture.stats.bad_rows == 1
    assert not capture(bench, "s0").written
    settings.write_text(fail)
    with pytest.raises(ShardError, match="line 7"):
        capture(bench, "s0")


ANOTHER = """
import sys
from pathlib import Path
from distill_assets.teacher_capture.capture import capture_shard
from tests.bench import Bench

bench = Bench(Path(sys.argv[1]))
print("ready", flush=True)
print(capture_shard(bench.spec, bench.shards["s0"], bench.store, device="cpu").written, flush=True)
"""


def test_a_second_process_waits_and_takes_what_the_first_made(bench: Bench) -> None:
    """It starts while the first is in the middle of the shard, and asks for the same one."""
    processes: list[subprocess.Popen[str]] = []

    def start_another(progress: Progress) -> None:
        if not processes:
            command = [sys.executable, "-c", ANOTHER, str(bench.home.root)]
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            assert processes[0].stdout is not None and processes[0].stdout.readline() == "ready\n"
            time.sleep(2.0)
            assert processes[0].poll() is None  # it waits

    first = capture(bench, "s0", on_progress=start_another)
    [second] = processes
    out, _ = second.communicate(timeout=60)
    assert first.written and out == "False\n" and second.returncode == 0
    assert [p.name for p in first.capture.path.parent.iterdir()] == [first.capture.path.name]


def test_a_teacher_replaced_under_way_is_not_filed_under_the_old_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    teacher = tiny.save_model(tmp_path / "teacher", tokenizer, seed=0)
    bench = Bench(tiny.make_home(tmp_path / "home", teacher))
    spec = bench.spec
    other = tiny.save_model(tmp_path / "other", tokenizer, seed=1)
    shutil.copy(other / "model.safetensors", teacher)
    with pytest.raises(CaptureError, match=r"the weights in .*teacher were replaced under way; run again"):
        capture_shard(spec, bench.shards["s0"], bench.store, device="cpu")
    assert not list(bench.home.captures.rglob("*.parquet"))
    assert capture_shard(bench.spec, bench.shards["s0"], bench.store, device="cpu").written


def test_what_a_student_learns_from_is_all_but_what_it_is_measured_by(bench: Bench) -> None:
    path = capture(bench, "s0").capture.path
    whole, learnt = read_rows(path), read_rows(path, to_learn_from=True)
    assert [(row.key, row.weight, row.id, row.truncated) for row in learnt] == [
        (row.key, row.weight, row.id, row.truncated) for row in whole
    ]
    for mine, theirs in zip(learnt, whole, strict=True):
        assert np.isnan(mine.targets.gold_logprob_P).all() and np.isnan(mine.targets.entropy_P).all()
        assert not np.isnan(theirs.targets.entropy_P).any()
    for mine, theirs in zip(*(collate(rows, with_targets=True).items() for rows in (learnt, whole)), strict=True):
        assert mine[0] == theirs[0] and mine[1].equal(theirs[1])
