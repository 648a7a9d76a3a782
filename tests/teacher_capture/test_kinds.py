"""Every kind of targets from teacher to Parquet and back; what serves whom; what JSONL refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from distill_assets.dataset_shards.encode import encode_shard
from distill_assets.foundation.errors import CaptureError
from distill_assets.teacher_capture.capture import CaptureReport, capture_shard
from distill_assets.teacher_capture.engine import score_rows
from distill_assets.teacher_capture.faithful import check_faithful
from distill_assets.teacher_capture.interchange import export_jsonl
from distill_assets.teacher_capture.store import read_rows
from distill_assets.teacher_capture.teacher import load_teacher
from tests import tiny
from tests.bench import Bench

KINDS = {
    "sampled": {"kind": "sampled", "samples": 9},
    "threshold": {"kind": "threshold", "tau": 0.03},
    "tail samples": {"k": 6, "tail_samples": 3},
    "tail samples of few": {"k": 320, "min_probability": 0.004, "tail_samples": 2},
}


def bench_of(root: Path, teacher: Path, targets: dict[str, object], **sections: object) -> Bench:
    tiny.make_home(root, teacher, shards=2, **sections)
    file = root / "distill.yaml"
    file.write_text(file.read_text().replace("targets:\n  k: 8\n", f"targets: {json.dumps(targets)}\n"))
    return Bench(root)


def capture(bench: Bench, key: str = "s0", **options: object) -> CaptureReport:
    return capture_shard(bench.spec, bench.shards[key], bench.store, device="cpu", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_reads_back_identical(tmp_path: Path, teacher_folder: Path, kind: str) -> None:
    bench = bench_of(tmp_path, teacher_folder, {**KINDS[kind], "precision": "exact"})
    report = capture(bench, batch_tokens=256)
    rows = encode_shard(bench.shards["s0"], bench.spec.encoder).rows
    teacher = load_teacher(bench.spec.weights, "float32", "cpu")
    scored = dict(score_rows(teacher, rows, bench.spec.targets, 256))
    columns = pq.read_schema(report.capture.path).names
    assert ("weights" in columns, "tail_sample_ids" in columns) == (
        not kind.startswith("tail"),
        kind.startswith("tail"),
    )
    for i, row in enumerate(read_rows(report.capture.path)):
        mine, theirs = row.targets, scored[i]
        for name in ("positions_P", "offsets_P1", "support_ids_N", "support_logprobs_N"):
            assert np.array_equal(getattr(mine, name), getattr(theirs, name)), name
        for name in ("weights_N", "tail_sample_ids_PS"):
            a, b = getattr(mine, name), getattr(theirs, name)
            assert (a is None) == (b is None)
            assert a is None or (a.dtype == b.dtype and np.array_equal(a, b))


@pytest.mark.parametrize("precision", ["compact", "exact"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_honest_capture_is_faithful(tmp_path: Path, teacher_folder: Path, kind: str, precision: str) -> None:
    bench = bench_of(tmp_path, teacher_folder, {**KINDS[kind], "precision": precision})
    report = check_faithful(bench.spec, [capture(bench).capture], "cpu")
    assert report.passed and report.rows == 6, report


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_the_true_probabilities(tmp_path: Path, teacher_folder: Path, kind: str) -> None:
    bench = bench_of(tmp_path, teacher_folder, {**KINDS[kind], "precision": "exact"})
    stats = capture(bench).capture.stats
    rows = read_rows(bench.store.path_of(bench.spec.capture_id, "s0", bench.shards["s0"].version))
    mass = np.concatenate(
        [np.add.reduceat(np.exp(r.targets.support_logprobs_N), r.targets.offsets_P1[:-1]) for r in rows]
    )
    assert stats.mean_kept_mass == pytest.approx(mass.mean(), abs=1e-4) and 0.1 < stats.mean_kept_mass < 1
    assert stats.kept_ids == sum(len(r.targets.support_ids_N) for r in rows)


def test_a_position_without_a_tail_has_an_empty_list_of_samples(tmp_path: Path, teacher_folder: Path) -> None:
    bench = bench_of(tmp_path, teacher_folder, {"k": 320, "tail_samples": 3})
    table = pq.read_table(capture(bench).capture.path)
    assert all(ids == [] for row in table["tail_sample_ids"].to_pylist() for ids in row)
    assert all(x is None for row in table["tail_logprob"].to_pylist() for x in row)
    for row in read_rows(bench.store.path_of(bench.spec.capture_id, "s0", bench.shards["s0"].version)):
        assert row.targets.tail_sample_ids_PS is not None
        assert row.targets.tail_sample_ids_PS.shape == (row.targets.n_positions, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_draws_the_same_in_another_order_and_other_chunks(
    tmp_path: Path, teacher_folder: Path, kind: str
) -> None:
    first = bench_of(tmp_path / "a", teacher_folder, KINDS[kind])
    second = bench_of(tmp_path / "b", teacher_folder, KINDS[kind])
    tiny.write_jsonl(
        second.home.root / "shards" / "s0.jsonl", [*reversed(tiny.example_rows(6)), *tiny.example_rows(3, 70)]
    )
    here = {row.key: row.targets for row in read_rows(capture(first, batch_tokens=256).capture.path)}
    there = {row.key: row.targets for row in read_rows(capture(second, batch_tokens=32).capture.path)}
    assert len(there) == 9
    for key, targets in here.items():
        assert np.array_equal(targets.support_ids_N, there[key].support_ids_N)
        for name in ("weights_N", "tail_sample_ids_PS"):
            if getattr(targets, name) is not None:
                assert np.allclose(getattr(targets, name), getattr(there[key], name), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_capture_goes_on_to_the_same_table(tmp_path: Path, teacher_folder: Path, kind: str) -> None:
    whole = bench_of(tmp_path / "a", teacher_folder, KINDS[kind])
    broken = bench_of(tmp_path / "b", teacher_folder, KINDS[kind])
    for bench in (whole, broken):
        tiny.write_jsonl(bench.home.root / "shards" / "s0.jsonl", tiny.example_rows(40))
    expected = pq.read_table(capture(whole, batch_tokens=16).capture.path)
    seen = []

    def interrupt(progress: object) -> None:
        seen.append(progress)
        if len(seen) == 25:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(broken, batch_tokens=16, on_progress=interrupt)
    assert list(broken.home.captures.rglob(".unfinished-*/*.parquet"))
    resumed = capture(broken, batch_tokens=16).capture
    assert pq.read_table(resumed.path).equals(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_moved_keep_their_draws_without_the_teacher(tmp_path: Path, teacher_folder: Path, kind: str) -> None:
    bench = bench_of(tmp_path, teacher_folder, KINDS[kind])
    before = {row.key: row.targets for row in read_rows(capture(bench).capture.path)}
    tiny.write_jsonl(bench.home.root / "shards" / "s1.jsonl", tiny.example_rows(6))
    moved = capture(bench, "s1").capture
    assert moved.stats.rows_captured == 0
    for row in read_rows(moved.path):
        for name in ("support_ids_N", "weights_N", "tail_sample_ids_PS"):
            a, b = getattr(row.targets, name), getattr(before[row.key], name)
            assert (a is None and b is None) or np.array_equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_drawn_serves_nobody_and_is_served_by_nobody(tmp_path: Path, teacher_folder: Path, kind: str) -> None:
    """The likeliest ids that stand beside tail samples do serve."""
    capture(bench_of(tmp_path, teacher_folder, KINDS[kind]))
    served = capture(bench_of(tmp_path, teacher_folder, {"k": 5, "min_probability": 0.02})).capture
    assert served.stats.rows_captured == (0 if kind.startswith("tail") else 6)
    capture(bench_of(tmp_path, teacher_folder, {"k": 320, "precision": "exact"}))
    other = {"sampled": {"samples": 8}, "threshold": {"tau": 0.2}}.get(kind, {"k": 4})
    assert capture(bench_of(tmp_path, teacher_folder, {**KINDS[kind], **other})).capture.stats.rows_captured == 6


def test_jsonl_has_the_likeliest_ids_without_tail_samples(tmp_path: Path, teacher_folder: Path) -> None:
    plain: dict[str, object] = {"k": 6, "precision": "exact"}
    exported = []
    for name, targets in (("plain", plain), ("samples", {**plain, "tail_samples": 3})):
        export_jsonl([capture(bench_of(tmp_path / name, teacher_folder, targets)).capture], tmp_path / f"{name}.jsonl")
        exported.append([json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()])
    for mine, theirs in zip(*exported, strict=True):
        assert mine.keys() == theirs.keys() and mine["topk_ids"] == theirs["topk_ids"]
        for a, b in zip(mine["topk_logprobs"], theirs["topk_logprobs"], strict=True):
            assert a == pytest.approx(b, abs=2e-6)  # the sum over the vocabulary is taken in another order
        for name in ("tail_logprob", "gold_logprob", "entropy"):  # stored as float16
            assert mine[name] == [None if b is None else pytest.approx(b, rel=2e-3) for b in theirs[name]]


@pytest.mark.parametrize("kind", ["sampled", "threshold"])
def test_jsonl_is_refused_before_anything_is_written(tmp_path: Path, teacher_folder: Path, kind: str) -> None:
    drawn = capture(bench_of(tmp_path, teacher_folder, KINDS[kind])).capture
    with pytest.raises(
        CaptureError, match=rf"^shard s0 was captured with targets of kind {kind}, .*targets.kind: top_k$"
    ):
        export_jsonl([drawn], tmp_path / "out.jsonl")
    assert not list(tmp_path.glob("*out.jsonl*"))


def test_each_setting_of_a_kind_is_in_the_identity_and_no_other(tmp_path: Path, teacher_folder: Path) -> None:
    settings: list[dict[str, object]] = [
        {"k": 8},
        {"k": 8, "tail_samples": 1},
        {"k": 8, "tail_samples": 2},
        {"kind": "sampled"},
        {"kind": "sampled", "samples": 7},
        {"kind": "threshold"},
        {"kind": "threshold", "tau": 0.1},
    ]
    specs = [bench_of(tmp_path, teacher_folder, one).spec for one in settings]
    assert len({spec.capture_id for spec in specs}) == len(specs)
    assert [sorted(spec.identity["targets"]) for spec in (specs[0], specs[2], specs[4], specs[6])] == [
        ["k", "kind", "min_probability", "precision"],
        ["k", "kind", "min_probability", "precision", "tail_samples"],
        ["kind", "precision", "samples"],
        ["kind", "precision", "tau"],
    ]
