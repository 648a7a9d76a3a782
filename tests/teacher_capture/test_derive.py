"""Fewer ids from captures that hold more: without the teacher, and as the teacher would have given them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distill_assets.dataset_shards.discover import discover_shards
from distill_assets.dataset_shards.encode import EncodedRow, encode_shard
from distill_assets.foundation.progress import Progress
from distill_assets.foundation.settings import TargetSettings
from distill_assets.teacher_capture.capture import CaptureReport, capture_shard
from distill_assets.teacher_capture.derive import can_serve
from distill_assets.teacher_capture.inspection import inspect_capture
from distill_assets.teacher_capture.plan import ShardPlan, plan_capture
from distill_assets.teacher_capture.store import read_rows
from tests import tiny
from tests.bench import Bench, edit, replace


def home(folder: Path, teacher: Path, **targets: object) -> Bench:
    return Bench(tiny.make_home(folder, teacher, shards=1, targets=targets))


def capture(bench: Bench, **options: object) -> CaptureReport:
    return capture_shard(bench.spec, bench.shards["s0"], bench.store, device="cpu", **options)  # type: ignore[arg-type]


def encoded(bench: Bench) -> tuple[EncodedRow, ...]:
    return encode_shard(bench.shards["s0"], bench.spec.encoder).rows


def planned(bench: Bench) -> ShardPlan:
    found = discover_shards(bench.home.root, bench.home.settings().data, bench.home.hashes())
    return {p.shard: p for p in plan_capture(bench.spec, found, bench.store, ()).shards}["s0"]


@pytest.mark.parametrize("tail_samples", [0, 3])  # which are left out
def test_derived_targets_are_those_of_the_teacher(tmp_path: Path, teacher_folder: Path, tail_samples: int) -> None:
    wanted = {"k": 5, "min_probability": 0.03, "precision": "exact"}
    direct = capture(home(tmp_path / "direct", teacher_folder, **wanted)).capture
    source = capture(
        home(tmp_path / "home", teacher_folder, k=40, precision="exact", tail_samples=tail_samples)
    ).capture
    bench = home(tmp_path / "home", teacher_folder, **wanted)
    assert (planned(bench).rows_to_capture, planned(bench).state) == (0, "settings_changed")
    assert f"6 rows can be derived from {source.capture_id}" in planned(bench).reason

    derived = capture(bench).capture
    assert derived.capture_id == direct.capture_id != source.capture_id
    assert derived.derived_from == (source.capture_id,) and direct.derived_from == ()
    assert (derived.stats.rows_captured, derived.stats.rows_reused, derived.stats.tokens_captured) == (0, 6, 0)
    assert not any(inspect_capture(derived.path, n_ids=320))
    kept = []
    for mine, theirs in zip(read_rows(derived.path), read_rows(direct.path), strict=True):
        a, b = mine.targets, theirs.targets
        assert a.tail_sample_ids_PS is None
        for name in ("positions_P", "offsets_P1", "support_ids_N"):
            assert np.array_equal(getattr(a, name), getattr(b, name)), name
        # The sum over the vocabulary is taken in another order where other ids are kept.
        assert np.allclose(a.support_logprobs_N, b.support_logprobs_N, atol=2e-6)
        for name in ("gold_logprob_P", "entropy_P"):
            assert np.allclose(getattr(a, name), getattr(b, name), rtol=2e-3), name  # stored as float16
        assert np.allclose(np.exp(a.tail_logprob_P), np.exp(b.tail_logprob_P), atol=1e-3)  # stored as float16
        kept += a.kept_P.tolist()
    assert min(kept) < max(kept) == 5  # both limits were met


class Stopped(Exception):
    pass


@pytest.mark.parametrize("tail_samples", [0, 3])
def test_chunks_of_a_capture_under_way_serve_fewer_ids_too(
    tmp_path: Path, teacher_folder: Path, tail_samples: int
) -> None:
    source = home(tmp_path / "home", teacher_folder, k=40, tail_samples=tail_samples)
    tiny.write_jsonl(source.home.root / "shards" / "s0.jsonl", tiny.example_rows(120))

    def stop(progress: Progress) -> None:
        if progress.done > 0.8 * progress.total:
            raise Stopped

    with pytest.raises(Stopped):
        capture(source, batch_tokens=64, on_progress=stop)
    source_id = source.spec.capture_id
    left, bench = planned(source).rows_to_capture, home(tmp_path / "home", teacher_folder, k=8)
    tiny.write_jsonl(bench.home.root / "shards" / "s0.jsonl", tiny.example_rows(120))
    assert 0 < left < 120 and planned(bench).rows_to_capture == left
    derived = capture(bench).capture
    assert derived.stats.rows_captured == left and derived.derived_from == (source_id,)


def test_a_compact_capture_keeps_its_mass_when_narrowed(tmp_path: Path, teacher_folder: Path) -> None:
    source = capture(home(tmp_path / "home", teacher_folder, k=40)).capture
    derived = capture(home(tmp_path / "home", teacher_folder, k=3)).capture
    for mine, theirs in zip(read_rows(derived.path), read_rows(source.path), strict=True):
        starts = theirs.targets.offsets_P1[:-1]
        expected = (starts[:, None] + np.arange(3)).ravel()
        assert np.array_equal(mine.targets.support_ids_N, theirs.targets.support_ids_N[expected])
        assert np.allclose(
            mine.targets.log_total_mass_P(), theirs.targets.log_total_mass_P(), atol=1e-2
        )  # tails are stored in 1/64 nat


def test_where_it_came_from_is_handed_on_and_force_asks_the_teacher(tmp_path: Path, teacher_folder: Path) -> None:
    source = capture(home(tmp_path / "home", teacher_folder, k=40)).capture
    bench = home(tmp_path / "home", teacher_folder, k=3)
    capture(bench)
    tiny.write_jsonl(bench.home.root / "shards" / "s0.jsonl", [*tiny.example_rows(6), *tiny.example_rows(1, start=60)])
    next_version = capture(bench).capture
    assert next_version.derived_from == (source.capture_id,)
    assert (next_version.stats.rows_captured, next_version.stats.rows_reused) == (1, 6)
    forced = capture(bench, force=True).capture
    assert forced.derived_from == () and forced.stats.rows_captured == 7


@pytest.mark.parametrize("wider", [{"k": 41}, {"k": 40, "min_probability": 0.0}, {"k": 8, "precision": "exact"}])
def test_what_is_not_stored_is_captured(tmp_path: Path, teacher_folder: Path, wider: dict[str, object]) -> None:
    capture(home(tmp_path / "home", teacher_folder, k=40, min_probability=0.001))
    assert capture(home(tmp_path / "home", teacher_folder, **wider)).capture.stats.rows_captured == 6


@pytest.mark.parametrize(
    "targets",
    [{"k": 8}, {"k": 8, "tail_samples": 2}, {"kind": "sampled", "samples": 9}, {"kind": "threshold", "tau": 0.1}],
)
def test_rows_that_other_data_settings_leave_alone_are_not_captured_again(
    tmp_path: Path, teacher_folder: Path, targets: dict[str, object]
) -> None:
    longest = max(row.input_ids.size for row in encoded(home(tmp_path / "home", teacher_folder)))

    def bench(name: str, max_length: int) -> Bench:
        root = tiny.make_home(tmp_path / name, teacher_folder, shards=1, data={"max_length": max_length})
        replace(root, targets=targets)
        return Bench(root)

    cut = sum(row.input_ids.size > longest - 1 for row in encoded(bench("home", longest)))
    assert 0 < cut < 6
    first = capture(bench("home", longest - 1)).capture
    wider = bench("home", longest)
    assert planned(wider).rows_to_capture == cut
    assert f"{6 - cut} row" in planned(wider).reason and first.capture_id in planned(wider).reason
    here = capture(wider).capture
    assert (here.stats.rows_captured, here.derived_from) == (cut, ())
    afresh = capture(bench("other", longest)).capture
    assert here.capture_id == afresh.capture_id
    for mine, theirs in zip(read_rows(here.path), read_rows(afresh.path), strict=True):
        assert mine.key == theirs.key and mine.truncated == theirs.truncated
        assert np.array_equal(mine.targets.support_ids_N, theirs.targets.support_ids_N)
        assert np.allclose(mine.targets.support_logprobs_N, theirs.targets.support_logprobs_N, atol=1 / 16 + 1e-6)
        assert (mine.targets.tail_sample_ids_PS is None) == (theirs.targets.tail_sample_ids_PS is None)
        if mine.targets.tail_sample_ids_PS is not None:
            assert np.array_equal(mine.targets.tail_sample_ids_PS, theirs.targets.tail_sample_ids_PS)


def test_fewer_ids_of_them_are_not_either(tmp_path: Path, teacher_folder: Path) -> None:
    source = capture(home(tmp_path / "home", teacher_folder, k=40)).capture
    bench = Bench(
        tiny.make_home(tmp_path / "home", teacher_folder, shards=1, targets={"k": 3}, data={"max_length": 200})
    )
    derived = capture(bench).capture
    assert 0 < source.stats.truncated_rows < 6
    assert (derived.stats.rows_captured, derived.derived_from) == (source.stats.truncated_rows, (source.capture_id,))


def test_another_dtype_serves_nothing(tmp_path: Path, teacher_folder: Path) -> None:
    capture(home(tmp_path / "home", teacher_folder, k=40))
    bench = home(tmp_path / "home", teacher_folder, k=3)
    edit(bench.home.root, teacher={"dtype": "bfloat16"})
    assert capture(bench).capture.stats.rows_captured == 6


def test_the_best_source_is_taken(tmp_path: Path, teacher_folder: Path) -> None:
    capture(home(tmp_path / "home", teacher_folder, k=40))
    capture(home(tmp_path / "home", teacher_folder, k=20), force=True)
    exact = capture(home(tmp_path / "home", teacher_folder, k=60, precision="exact"), force=True).capture
    assert capture(home(tmp_path / "home", teacher_folder, k=3)).capture.derived_from == (exact.capture_id,)


def test_which_settings_can_serve_which() -> None:
    stored = TargetSettings(k=8, min_probability=0.01).model_dump()
    assert can_serve(stored, TargetSettings(k=8, min_probability=0.01))
    assert can_serve(stored, TargetSettings(k=2, min_probability=0.5))
    assert not can_serve(stored, TargetSettings(k=9, min_probability=0.01))
    assert not can_serve(stored, TargetSettings(k=8, min_probability=0.001))
    assert not can_serve(stored, TargetSettings(k=8, min_probability=0.01, precision="exact"))
    assert can_serve({**stored, "precision": "exact"}, TargetSettings(k=8, min_probability=0.01))
    assert can_serve({**stored, "tail_samples": 4}, TargetSettings(k=8, min_probability=0.01))
    assert not can_serve({**stored, "tail_samples": 4}, TargetSettings(k=8, min_probability=0.01, tail_samples=4))
