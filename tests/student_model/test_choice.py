"""What is learnt from of captures, and when each row comes, against what a reader of the settings expects."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_assets.foundation.errors import CaptureError, SettingsError
from distill_assets.foundation.settings import TrainingSettings
from distill_assets.student_model.choice import Choice, Turns, as_bits, choices, passes_of
from distill_assets.teacher_capture.capture import capture_shard
from distill_assets.teacher_capture.store import Capture, read_row_keys, read_rows
from tests import tiny
from tests.bench import Bench


@dataclass(frozen=True)
class Row:
    key: str
    passes: float
    weight: float = 1.0
    weighting: str = ""


def row(number: int, passes: float) -> Row:
    return Row(hashlib.sha256(str(number).encode()).hexdigest()[:32], passes)


@pytest.fixture
def captures(bench: Bench) -> list[Capture]:
    return [capture_shard(bench.spec, bench.shards[key], bench.store, device="cpu").capture for key in ("s0", "s1")]


def test_chosen_rows_are_read_and_named_and_the_others_are_not(captures: list[Capture]) -> None:
    rows = np.array([0, 3, 4], dtype=np.int32)
    [choice] = choices(captures, TrainingSettings(), {"s1": rows})
    everything, keys = read_rows(captures[1].path), read_row_keys(captures[1].path)
    assert choice.row_keys() == [keys[0], keys[3], keys[4]]
    for row, wanted in zip(choice.read(), [everything[i] for i in rows], strict=True):
        assert (row.row, row.key) == (wanted.row, wanted.key)
        assert np.array_equal(row.input_ids, wanted.input_ids)
        assert np.array_equal(row.targets.support_ids_N, wanted.targets.support_ids_N)
        assert np.array_equal(row.targets.support_logprobs_N, wanted.targets.support_logprobs_N)
    used = choice.used()
    assert (used.shard, used.rows, used.chosen) == ("s1", 3, "98")  # 100110 and two bits that are no rows


def test_captures_are_read_side_by_side_in_their_order(captures: list[Capture]) -> None:
    parts = choices(captures, TrainingSettings(), {"s0": np.array([1, 5], dtype=np.int32), "s1": None}) * 10
    one_by_one = [row.key for part in parts for row in part.read()]
    assert [row.key for row in Choice.read_all(parts)] == one_by_one
    assert len(one_by_one) == 10 * (2 + 6)
    captures[1].path.write_bytes(captures[1].path.read_bytes()[:-100])
    with pytest.raises(CaptureError, match=f"{captures[1].path.name}: damaged"):
        Choice.read_all(parts)


def test_without_a_choice_all_is_learnt_from_once_an_epoch(captures: list[Capture]) -> None:
    parts = choices(captures, TrainingSettings(), None)
    assert [[row.passes for row in part.read()] for part in parts] == [[1.0] * 6, [1.0] * 6]
    assert [(used.rows, used.chosen) for used in (part.used() for part in parts)] == [(6, None), (6, None)]


def test_rows_that_never_come_are_not_learnt_from(bench: Bench) -> None:
    tiny.write_jsonl(bench.home.root / "shards" / "s0.jsonl", tiny.example_rows(30))
    capture = capture_shard(bench.spec, bench.shards["s0"], bench.store, device="cpu").capture
    training = TrainingSettings(mixture={"s*": 0.2}, epochs=2)
    [choice] = choices([capture], training, None)
    rows = read_rows(capture.path)
    turns = Turns([Row(row.key, 0.2) for row in rows], training.seed)
    seen = sorted({*turns.of(0), *turns.of(1)})
    assert [row.row for row in choice.read()] == seen and 0 < len(seen) < 30
    assert {row.passes for row in choice.read()} == {key.passes for key in choice.row_keys()} == {0.2}
    assert choice.used().rows == len(seen)
    [again] = choices([capture], training, {"s0": np.array(seen[1:], dtype=np.int32)})
    assert [row.row for row in again.read()] == seen[1:]


def test_mixtures_that_fit_nothing_or_leave_nothing_are_refused(captures: list[Capture]) -> None:
    with pytest.raises(SettingsError, match=r"training\.mixture: math\* fits no training shard.*\nthere are s0, s1"):
        choices(captures, TrainingSettings(mixture={"s*": 2, "math*": 0.5}), None)
    with pytest.raises(SettingsError, match=r"training\.mixture leaves no row to learn from in 3 epoch"):
        choices(captures, TrainingSettings(mixture={"*": 0}, epochs=3), None)


def test_the_first_pattern_that_fits_says_how_often() -> None:
    mixture = {"web-a*": 0.25, "web*": 0.5, "*": 2.0}
    assert [passes_of(shard, mixture) for shard in ("web-ab", "web-b", "math")] == [0.25, 0.5, 2.0]
    assert passes_of("math", {"web*": 0.5}) == 1.0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 1 / 3, 0.9, 1.0, 1.5, 2.0, 3.7]), min_size=1, max_size=40),
    st.integers(0, 9),
    st.integers(1, 9),
)
def test_in_any_run_of_epochs_a_row_comes_as_often_as_it_should_to_less_than_one(
    passes: list[float], seed: int, epochs: int
) -> None:
    rows = [row(i, each) for i, each in enumerate(passes)]
    turns = Turns(rows, seed)
    counts_ER = np.array([np.bincount(turns.of(epoch), minlength=len(rows)) for epoch in range(epochs)])
    for start in range(epochs):
        for end in range(start + 1, epochs + 1):
            came_R = counts_ER[start:end].sum(0)
            assert (np.abs(came_R - np.array(passes) * (end - start)) < 1 + 1e-9).all()
    assert (counts_ER.sum(0) == turns.before(epochs)).all()
    if passes == [1.0] * len(passes):
        assert turns.of(0) == list(range(len(rows)))


def test_which_rows_come_depends_on_seed_and_key_alone() -> None:
    rows = [row(i, 0.3) for i in range(2000)]
    first = Turns(rows, 0)
    drawn = set(first.of(0))
    assert abs(len(drawn) - 600) < 4 * math.sqrt(2000 * 0.3 * 0.7)
    assert drawn.isdisjoint(first.of(1)) and drawn != set(Turns(rows, 1).of(0))
    assert {i for i in Turns(rows + [row(i, 0.3) for i in range(5000, 5100)], 0).of(0) if i < 2000} == drawn
    assert {1999 - i for i in Turns(rows[::-1], 0).of(0)} == drawn


def test_bits_say_which_rows() -> None:
    chosen = np.random.default_rng(0).random(1000) < 0.3
    bits = bytes.fromhex(as_bits(np.flatnonzero(chosen).astype(np.int32), 1000))
    assert [bool(bits[i // 8] >> (7 - i % 8) & 1) for i in range(1000)] == chosen.tolist()
