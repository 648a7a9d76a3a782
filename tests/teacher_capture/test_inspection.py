"""A capture file read to its last byte: what it takes to notice each kind of damage."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill_assets.dataset_shards.discover import Discovery
from distill_assets.foundation.errors import CaptureError
from distill_assets.foundation.settings import TargetSettings
from distill_assets.teacher_capture.arrow import parquet_writer, to_arrow
from distill_assets.teacher_capture.capture import capture_shard
from distill_assets.teacher_capture.inspection import inspect_capture
from distill_assets.teacher_capture.plan import plan_capture
from distill_assets.teacher_capture.sparse_targets import CapturedRow
from distill_assets.teacher_capture.store import FOOTER, read_capture, read_row_group, read_row_keys, read_rows
from tests import tiny
from tests.bench import Bench

KINDS: dict[str, dict[str, object]] = {
    "compact": {"k": 8},
    "exact": {"k": 8, "precision": "exact"},
    "sampled": {"kind": "sampled", "samples": 12},
    "threshold": {"kind": "threshold", "tau": 0.03, "precision": "exact"},
    "tail samples": {"k": 8, "tail_samples": 2},
}


@pytest.fixture(params=KINDS)
def captured(request: pytest.FixtureRequest, tmp_path: Path, teacher_folder: Path) -> tuple[Bench, Path]:
    """A home whose s0 is captured in several row groups."""
    bench = Bench(tiny.make_home(tmp_path / "home", teacher_folder, shards=1, rows=80))
    settings = bench.home.settings_file
    settings.write_text(
        settings.read_text().replace("targets:\n  k: 8\n", f"targets: {json.dumps(KINDS[request.param])}\n")
    )
    report = capture_shard(bench.spec, bench.shards["s0"], bench.store, device="cpu", batch_tokens=64)
    assert pq.ParquetFile(report.capture.path).num_row_groups > 1
    return bench, report.capture.path


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """The file with other columns and valid checksums, its footer as it was."""
    footer = pq.read_metadata(path).metadata[FOOTER]
    table = change(pq.read_table(path))
    with parquet_writer(path, targets_of(path)) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({FOOTER.decode(): footer})


def targets_of(path: Path) -> TargetSettings:
    return TargetSettings.model_validate(json.loads(pq.read_metadata(path).metadata[FOOTER])["identity"]["targets"])


def with_row(path: Path, number: int, change: Callable[[CapturedRow], CapturedRow]) -> None:
    rows: Sequence[CapturedRow] = [change(r) if r.row == number else r for r in read_rows(path)]
    targets = targets_of(path)
    rewrite(path, lambda _: to_arrow(rows, targets))


def problems(bench: Bench, path: Path) -> list[tuple[str, str]]:
    return list(inspect_capture(path, bench.spec.encoder.n_real))


def test_a_whole_file_has_no_problem(captured: tuple[Bench, Path]) -> None:
    bench, path = captured
    assert problems(bench, path) == []
    rewrite(path, lambda table: table)
    assert problems(bench, path) == []


def with_a_bit_flipped(path: Path, whole: bytes, at: int, bit: int) -> None:
    content = bytearray(whole)
    content[at] ^= 1 << bit
    path.write_bytes(content)
    moment = path.stat().st_ctime_ns + at  # files of one moment and size would be taken for the same
    os.utime(path, ns=(moment, moment))


def footer_start(whole: bytes) -> int:
    return len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")


def readings(path: Path, targets: TargetSettings) -> dict[str, object]:
    """What each way to read the file gives, None where it says that the file is damaged."""
    ways: dict[str, Callable[[], object]] = {
        "rows": lambda: to_arrow(read_rows(path), targets),
        "to learn from": lambda: to_arrow(read_rows(path, to_learn_from=True), targets),
        "a group": lambda: to_arrow(read_row_group(path, 1, keys), targets),
        "keys": lambda: read_row_keys(path),
        "capture": lambda: read_capture(path),
    }
    keys = {f"{i:032x}" for i in range(3)}
    found: dict[str, object] = {}
    for name, read in ways.items():
        try:
            found[name] = read()
        except CaptureError as error:
            assert str(error).startswith(f"{path}: damaged or unreadable (") and "\n" not in str(error)
            found[name] = None
    return found


def test_every_flipped_bit_is_noticed_unless_it_changes_nothing(captured: tuple[Bench, Path]) -> None:
    bench, path = captured
    whole, targets, shards = path.read_bytes(), targets_of(path), Discovery(tuple(bench.shards.values()), ())
    before, random = readings(path, targets), np.random.default_rng(0)
    pages, footer = random.integers(4, footer_start(whole), 10), random.integers(footer_start(whole), len(whole), 20)
    noticed = 0
    for at in (*pages, *footer):
        with_a_bit_flipped(path, whole, int(at), int(random.integers(8)))
        for name, read in readings(path, targets).items():
            assert read is None or read == before[name], (at, name)
        if found := problems(bench, path):
            noticed += 1
            assert [kind for kind, _ in found] == ["damaged"]
        else:  # pages have headers with fields that no reader of ours uses
            assert at < footer_start(whole) or b"distill_footer_sha256" not in path.read_bytes()
    assert noticed > 22
    with_a_bit_flipped(path, whole, len(whole) - 12, 3)
    plans = {plan.shard: plan for plan in plan_capture(bench.spec, shards, bench.store, ()).shards}
    assert (plans["s0"].state, plans["s0"].rows_to_capture) == ("failed", 80)
    assert plans["heldout"].state == "new"  # it stops nobody else


def test_a_file_without_a_seal_is_read_and_its_damage_is_never_a_crash(captured: tuple[Bench, Path]) -> None:
    bench, path = captured
    targets = targets_of(path)
    before = readings(path, targets)
    rewrite(path, lambda table: table)
    whole, random = path.read_bytes(), np.random.default_rng(1)
    unsealed = readings(path, targets)
    assert all(unsealed[name] == before[name] for name in ("rows", "to learn from")) and unsealed["capture"] is not None
    for at in random.integers(footer_start(whole), len(whole), 12):
        with_a_bit_flipped(path, whole, int(at), int(random.integers(8)))
        readings(path, targets)
        problems(bench, path)


def test_columns_that_are_not_those_of_the_settings_are_damage(captured: tuple[Bench, Path]) -> None:
    bench, path = captured
    targets, footer, table = targets_of(path), pq.read_metadata(path).metadata[FOOTER], pq.read_table(path)
    keys = table.schema.get_field_index("key")
    as_bytes = table.set_column(keys, pa.field("key", pa.binary(), nullable=False), table["key"].cast(pa.binary()))
    with pq.ParquetWriter(path, as_bytes.schema) as writer:
        writer.write_table(as_bytes)
        writer.add_key_value_metadata({FOOTER.decode(): footer})
    assert set(readings(path, targets).values()) == {None}
    [(kind, reason)] = problems(bench, path)
    assert kind == "damaged" and "columns are not those" in reason


@pytest.mark.parametrize("cut", [1, 8, 1000])
def test_a_file_cut_short_is_damaged(captured: tuple[Bench, Path], cut: int) -> None:
    bench, path = captured
    path.write_bytes(path.read_bytes()[:-cut])
    assert [kind for kind, _ in problems(bench, path)] == ["damaged"]


def changed(row: CapturedRow, **arrays: np.ndarray) -> CapturedRow:
    return replace(row, targets=replace(row.targets, **arrays))


def swapped_first_two(row: CapturedRow) -> CapturedRow:
    logprobs = row.targets.support_logprobs_N.copy()
    logprobs[[0, 1]] = logprobs[[1, 0]] + np.float32([-0.5, 0.5])
    return changed(row, support_logprobs_N=logprobs)


def moved(values: np.ndarray, at: int | tuple[int, int], by: float) -> np.ndarray:
    values = values.copy()
    values[at] += by
    return values


WRONG = {
    "a mass of": lambda r: changed(r, tail_logprob_P=moved(r.targets.tail_logprob_P, 2, 1.5)),
    "not descending": swapped_first_two,
    "support_ids outside": lambda r: changed(r, support_ids_N=moved(r.targets.support_ids_N, 3, 100_000)),
    "an id twice": lambda r: changed(
        r, support_ids_N=np.concatenate([r.targets.support_ids_N[1:2], r.targets.support_ids_N[1:]])
    ),
    "input_ids outside": lambda r: replace(r, input_ids=moved(r.input_ids, 0, 100_000)),
    "its key": lambda r: replace(r, input_ids=np.concatenate([r.input_ids[:1], r.input_ids[:1], r.input_ids[2:]])),
    "positions that are not": lambda r: changed(r, positions_P=moved(r.targets.positions_P, -1, 1)),
    "entropy that is not a number": lambda r: changed(r, entropy_P=moved(r.targets.entropy_P, 0, np.nan)),
    "an entropy its support": lambda r: changed(r, entropy_P=moved(r.targets.entropy_P, 0, 90.0)),
    "gold_logprob": lambda r: changed(r, gold_logprob_P=moved(r.targets.gold_logprob_P, 0, -90.0)),
    "numbered 0": lambda r: replace(r, row=0),
    "weight -1": lambda r: replace(r, weight=-1.0),
    "truncated_rows": lambda r: replace(r, truncated=not r.truncated),
}


@pytest.mark.parametrize("said", WRONG)
def test_a_wrong_value_with_valid_checksums_is_named(captured: tuple[Bench, Path], said: str) -> None:
    bench, path = captured
    with_row(path, 5, WRONG[said])
    [(kind, reason)] = problems(bench, path)
    assert kind == "damaged" and said in reason
    if said not in ("gold_logprob", "truncated_rows", "numbered 0"):
        assert reason.startswith("row 5: ")


DRAWN = {
    "weights that are not finite": lambda t: replace(t, weights_N=moved(t.weights_N, 3, np.nan)),
    "weights below 0": lambda t: replace(t, weights_N=moved(t.weights_N, 0, -3.0)),
    "tail_sample_ids": lambda t: replace(t, tail_sample_ids_PS=moved(t.tail_sample_ids_PS, (1, 1), 100_000)),
}


@pytest.mark.parametrize(
    ("captured", "said"),
    [("sampled", "weights that are not finite"), ("threshold", "weights below 0"), ("tail samples", "tail_sample_ids")],
    indirect=["captured"],
)
def test_a_wrong_draw_is_named(captured: tuple[Bench, Path], said: str) -> None:
    bench, path = captured
    with_row(path, 5, lambda row: replace(row, targets=DRAWN[said](row.targets)))
    [(kind, reason)] = problems(bench, path)
    assert kind == "damaged" and reason.startswith(f"row 5: {said}")


def test_a_row_that_is_gone_and_lists_that_do_not_match_are_named(captured: tuple[Bench, Path]) -> None:
    bench, path = captured
    whole = path.read_bytes()
    rewrite(path, lambda table: table.slice(0, table.num_rows - 1))
    [(kind, reason)] = problems(bench, path)
    assert kind == "damaged" and "its footer says rows 80, its rows 79" in reason
    path.write_bytes(whole)

    def shorter(table: pa.Table) -> pa.Table:
        column = table.column_names.index("entropy")
        lists = [values[:-1] for values in table["entropy"].to_pylist()]
        return table.set_column(column, table.schema.field(column), pa.array(lists, table.schema.field(column).type))

    rewrite(path, shorter)
    [(kind, reason)] = problems(bench, path)
    assert kind == "damaged" and "entropy has not one entry a position" in reason


def test_a_footer_of_another_capture_is_a_mismatch(captured: tuple[Bench, Path]) -> None:
    bench, path = captured
    other = path.with_name(path.name.replace("s0@", "s1@"))
    path.rename(other)
    [(kind, reason)] = problems(bench, other)
    assert kind == "mismatch" and "s0@" in reason and "s1@" in reason
    other.rename(path)
    footer = json.loads(pq.read_metadata(path).metadata[FOOTER])
    targets = targets_of(path)
    footer["identity"]["dtype"] = "float16"
    table = pq.read_table(path)
    with parquet_writer(path, targets) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({FOOTER.decode(): json.dumps(footer)})
    [(kind, reason)] = problems(bench, path)
    assert kind == "mismatch" and "identity" in reason
