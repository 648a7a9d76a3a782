"""States of shards: the first that applies of failed, new, settings_changed, changed, removed, current."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

from distill_assets.dataset_shards.discover import discover_shards
from distill_assets.foundation.errors import ShardError
from distill_assets.teacher_capture.capture import capture_shard
from distill_assets.teacher_capture.plan import FILE_BYTES, ShardPlan, plan_capture
from distill_assets.teacher_capture.store import read_capture
from tests import tiny
from tests.bench import Bench, replace


def plan(bench: Bench, catalogued: tuple[str, ...] = ()) -> dict[str, ShardPlan]:
    discovery = discover_shards(bench.home.root, bench.home.settings().data, bench.home.hashes())
    return {p.shard: p for p in plan_capture(bench.spec, discovery, bench.store, catalogued).shards}


def basis(bench: Bench) -> str:
    discovery = discover_shards(bench.home.root, bench.home.settings().data, bench.home.hashes())
    return plan_capture(bench.spec, discovery, bench.store, ()).basis


def capture_all(bench: Bench) -> None:
    for shard in bench.shards.values():
        capture_shard(bench.spec, shard, bench.store, device="cpu")


def states(bench: Bench, *catalogued: str) -> dict[str, str]:
    return {key: p.state for key, p in plan(bench, catalogued).items()}


def test_from_new_to_current(bench: Bench) -> None:
    assert set(states(bench).values()) == {"new"}
    first = plan(bench)["s0"]
    assert (first.rows, first.rows_to_capture, first.estimated_seconds) == (6, 6, None)
    capture_all(bench)
    assert set(states(bench).values()) == {"current"}
    assert all(p.rows_to_capture == p.tokens_to_capture == 0 for p in plan(bench).values())


def test_touching_is_nothing_changing_is_counted_in_rows(bench: Bench) -> None:
    capture_all(bench)
    shard = bench.home.root / "shards" / "s1.jsonl"
    os.utime(shard, (1, 1))
    assert states(bench)["s1"] == "current"
    shard.write_text(shard.read_text().replace("Question 100", "Question one hundred"))
    changed = plan(bench)["s1"]
    assert (changed.state, changed.rows, changed.rows_to_capture) == ("changed", 6, 1)
    assert changed.estimated_bytes and changed.estimated_seconds is not None


def test_rows_of_several_shards_go_to_the_teacher_once(bench: Bench) -> None:
    for key in ("a", "b"):
        tiny.write_jsonl(bench.home.root / "shards" / f"{key}.jsonl", tiny.example_rows(7))  # s0 has six of them
    found = plan(bench)
    assert [found[key].rows_to_capture for key in ("a", "b", "s0")] == [7, 0, 0]
    assert found["b"].reason == "never captured; 7 rows captured with shards before it"
    tokens = {key: p.tokens_to_capture for key, p in found.items()}
    for key, shard in bench.shards.items():
        stats = capture_shard(bench.spec, shard, bench.store, device="cpu").capture.stats
        assert (stats.rows_captured, stats.tokens_captured) == (found[key].rows_to_capture, tokens[key])


def test_estimates_say_what_they_are_based_on(bench: Bench) -> None:
    first = plan(bench)["s0"]
    assert basis(bench) == (
        "no speed yet before the first capture; 25 bytes a scored position, by rule of thumb; 6 kB a file besides"
    )
    capture_all(bench)
    made = read_capture(bench.store.path_of(bench.spec.capture_id, "s0", bench.shards["s0"].version))
    assert first.estimated_bytes == pytest.approx(made.bytes, rel=0.1)
    tiny.write_jsonl(bench.home.root / "shards" / "s9.jsonl", tiny.example_rows(6, start=500))
    assert "a scored position, measured on 4 captures under these settings; 6 kB" in basis(bench)
    known = plan(bench)["s9"]
    again = capture_shard(bench.spec, bench.shards["s9"], bench.store, device="cpu").capture
    assert known.estimated_bytes == pytest.approx(again.bytes, rel=0.1)
    assert known.estimated_seconds is not None
    tiny.write_jsonl(
        bench.home.root / "shards" / "one.jsonl", tiny.example_rows(1, start=600)
    )  # hardly more than a footer
    small = plan(bench)["one"]
    again = capture_shard(bench.spec, bench.shards["one"], bench.store, device="cpu").capture
    assert small.estimated_bytes == pytest.approx(again.bytes, rel=0.1)
    settings = bench.home.settings_file.read_text()
    bench.home.settings_file.write_text(settings.replace("k: 8", "k: 9"))
    assert "measured on 6 captures under other settings; 27 bytes" in basis(bench)


@pytest.mark.parametrize(
    ("targets", "measured"),  # bytes a position over 3,072 positions of SmolLM2-135M, by benchmarks/kinds.py
    [
        ({"k": 64}, 140.3),
        ({"k": 32}, 77.6),
        ({"k": 64, "min_probability": 0.01}, 30.6),
        ({"k": 16, "tail_samples": 4}, 52.1),
        ({"k": 64, "min_probability": 0.01, "tail_samples": 4}, 38.2),
        ({"kind": "sampled", "samples": 50}, 61.9),
        ({"kind": "sampled", "samples": 16}, 34.2),
        ({"kind": "threshold", "tau": 0.02}, 92.5),
        ({"kind": "threshold", "tau": 0.1}, 36.5),
        ({"k": 32, "precision": "exact"}, 147.3),
    ],
)
def test_a_first_plan_foresees_what_was_measured_of_each_kind(
    bench: Bench, targets: dict[str, Any], measured: float
) -> None:
    replace(bench.home.root, targets=targets)
    said = re.search(r"([0-9]+) bytes a scored position", basis(bench))
    assert said and int(said[1]) + FILE_BYTES / 3072 == pytest.approx(measured, rel=0.1)


def test_white_space_is_a_change_without_rows(bench: Bench) -> None:
    capture_all(bench)
    shard = bench.home.root / "shards" / "s1.jsonl"
    shard.write_text(shard.read_text().replace('{"prompt"', '{  "prompt"'))
    assert (plan(bench)["s1"].state, plan(bench)["s1"].rows_to_capture) == ("changed", 0)


def test_settings_and_back(bench: Bench) -> None:
    capture_all(bench)
    settings = bench.home.settings_file.read_text()
    bench.home.settings_file.write_text(settings.replace("k: 8", "k: 4"))
    assert set(states(bench).values()) == {"settings_changed"}
    bench.home.settings_file.write_text(settings)
    assert set(states(bench).values()) == {"current"}


def test_a_renamed_file_is_removed_and_new_without_rows(bench: Bench) -> None:
    capture_all(bench)
    folder = bench.home.root / "shards"
    (folder / "s2.jsonl").rename(folder / "z.jsonl")
    found = plan(bench, ("s0", "s1", "s2", "heldout"))
    assert (found["s2"].state, found["z"].state, found["z"].rows_to_capture) == ("removed", "new", 0)


def test_what_cannot_be_read_or_failed_before_is_failed(bench: Bench) -> None:
    tiny.write_jsonl(bench.home.root / "shards" / "s0.jsonl", [{"nothing": 1}])
    assert states(bench)["s0"] == "failed" and not plan(bench)["s0"].is_to_capture
    with pytest.raises(ShardError):
        capture_shard(bench.spec, bench.shards["s0"], bench.store, device="cpu")
    (bench.home.root / "shards" / "s1.parquet").write_bytes(b"collides with s1.jsonl")
    found = plan(bench)
    assert found["s0"].state == found["s1"].state == "failed"
    assert "s1.parquet" in found["s1"].reason and "s1.jsonl" in found["s1"].reason


def test_a_damaged_capture_is_named_and_would_be_made_again(bench: Bench) -> None:
    capture_all(bench)
    spec, shard = bench.spec, bench.shards["s0"]
    path = bench.store.path_of(spec.capture_id, "s0", shard.version)
    path.write_bytes(path.read_bytes()[:100])
    found = plan(bench)["s0"]
    assert (found.state, found.rows, found.rows_to_capture, found.is_to_capture) == ("failed", 6, 6, True)
    assert str(path) in found.reason and "`distill run` makes it again" in found.reason


def test_a_run_would_capture_what_is_not_current_and_can_be_read(bench: Bench) -> None:
    assert all(p.is_to_capture for p in plan(bench).values())
    capture_all(bench)
    assert not any(p.is_to_capture for p in plan(bench, ("gone",)).values())
    tiny.write_jsonl(bench.home.root / "shards" / "s1.jsonl", tiny.example_rows(2, start=700))
    bench.store.record_failure(bench.spec.capture_id, "s1", bench.shards["s1"].version, "the disk was full")
    again = plan(bench)["s1"]
    assert (again.state, again.reason, again.rows_to_capture) == ("failed", "the disk was full", 2)
    assert again.is_to_capture
