"""What is learnt from of a capture, against all of it."""

from __future__ import annotations

import numpy as np
import pytest

from distill_assets.student_model.choice import as_bits, choices
from distill_assets.teacher_capture.capture import capture_shard
from distill_assets.teacher_capture.store import Capture, read_row_keys, read_rows
from tests.bench import Bench


@pytest.fixture
def captures(bench: Bench) -> list[Capture]:
    return [capture_shard(bench.spec, bench.shards[key], bench.store, device="cpu").capture for key in ("s0", "s1")]


def test_chosen_rows_are_read_and_named_and_the_others_are_not(captures: list[Capture]) -> None:
    rows = np.array([0, 3, 4], dtype=np.int32)
    [choice] = choices(captures, {"s1": rows})
    everything, keys = read_rows(captures[1].path), read_row_keys(captures[1].path)
    assert choice.row_keys() == [keys[0], keys[3], keys[4]]
    for row, wanted in zip(choice.read(), [everything[i] for i in rows], strict=True):
        assert (row.row, row.key) == (wanted.row, wanted.key)
        assert np.array_equal(row.input_ids, wanted.input_ids)
        assert np.array_equal(row.targets.support_ids_N, wanted.targets.support_ids_N)
        assert np.array_equal(row.targets.support_logprobs_N, wanted.targets.support_logprobs_N)
    used = choice.used()
    assert (used.shard, used.rows, used.chosen) == ("s1", 3, "98")  # 100110 and two bits that are no rows


def test_without_a_choice_all_is_learnt_from(captures: list[Capture]) -> None:
    parts = choices(captures, None)
    assert [len(part.read()) for part in parts] == [6, 6]
    assert [(used.rows, used.chosen) for used in (part.used() for part in parts)] == [(6, None), (6, None)]


def test_bits_say_which_rows() -> None:
    chosen = np.random.default_rng(0).random(1000) < 0.3
    bits = bytes.fromhex(as_bits(np.flatnonzero(chosen).astype(np.int32), 1000))
    assert [bool(bits[i // 8] >> (7 - i % 8) & 1) for i in range(1000)] == chosen.tolist()
