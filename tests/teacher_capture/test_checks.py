"""Complete, aligned, faithful: each passes on an honest capture and fails on what it is there for."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from distill_assets.foundation.settings import TargetSettings
from distill_assets.teacher_capture.arrow import parquet_writer, to_arrow
from distill_assets.teacher_capture.capture import capture_shard
from distill_assets.teacher_capture.checks import AlignedReport, check_aligned, check_complete
from distill_assets.teacher_capture.faithful import SAMPLE_ROWS, SAMPLE_TOKENS, check_faithful
from distill_assets.teacher_capture.sparse_targets import CapturedRow, SparseTargets
from distill_assets.teacher_capture.store import FOOTER, Capture, read_capture, read_rows
from tests import tiny
from tests.bench import Bench

ROWS = 30


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny teacher that has learnt the rows, so that it has an opinion of what comes next."""
    folder = tiny.save_model(tmp_path_factory.mktemp("trained"), tokenizer, initializer_range=0.05)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = [row["prompt"] + row["completion"] for row in tiny.example_rows(ROWS)]
    ids = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


Make = Callable[..., tuple[Bench, Capture]]


@pytest.fixture
def make(tmp_path: Path, trained: Path) -> Make:
    """A captured s0 in a home of its own."""

    def made(teacher: Path = trained, **targets: object) -> tuple[Bench, Capture]:
        root = tiny.make_home(tmp_path / teacher.name / "home", teacher, shards=1, rows=ROWS, targets=targets)
        bench = Bench(root)
        report = capture_shard(bench.spec, bench.shards["s0"], bench.store, device="cpu", batch_tokens=64)
        return bench, report.capture

    return made


def rewritten(capture: Capture, change: Callable[[Sequence[CapturedRow]], Sequence[CapturedRow]]) -> Capture:
    """The capture with other rows under its old footer, but for their number: else it is no capture at all."""
    footer = json.loads(pq.read_metadata(capture.path).metadata[FOOTER])
    targets = TargetSettings.model_validate(dict(capture.identity["targets"]))
    rows = change(read_rows(capture.path))
    footer["stats"]["rows"] = len(rows)
    with parquet_writer(capture.path, targets) as writer:
        writer.write_table(to_arrow(rows, targets))
        writer.add_key_value_metadata({FOOTER.decode(): json.dumps(footer)})
    return read_capture(capture.path)


def shifted(row: CapturedRow, by: int) -> CapturedRow:
    """The targets of each position moved to the position `by` later, as an off-by-one would."""
    targets = row.targets
    kept = np.split(np.arange(len(targets.support_ids_N)), targets.offsets_P1[1:-1])
    order = np.roll(np.arange(targets.n_positions), by)
    index_N = np.concatenate([kept[p] for p in order])
    return replace(
        row,
        targets=replace(
            targets,
            offsets_P1=np.concatenate([[0], targets.kept_P[order].cumsum()]),
            support_ids_N=targets.support_ids_N[index_N],
            support_logprobs_N=targets.support_logprobs_N[index_N],
            tail_logprob_P=targets.tail_logprob_P[order],
            gold_logprob_P=targets.gold_logprob_P[order],
            entropy_P=targets.entropy_P[order],
        ),
    )


@pytest.mark.parametrize("precision", ["compact", "exact"])
def test_an_honest_capture_passes_all_three(make: Make, precision: str) -> None:
    bench, capture = make(precision=precision)
    complete = check_complete(bench.spec, [(bench.shards["s0"], capture)])
    assert (complete.problems, complete.rows) == ((), ROWS)
    assert complete.positions == capture.stats.supervised_tokens

    aligned = check_aligned([capture])
    assert aligned.passed and aligned.tells and aligned.hits[1] > 2 * max(aligned.hits[0], aligned.hits[2])

    faithful = check_faithful(bench.spec, [capture], "cpu")
    assert faithful.passed and 0 < faithful.rows <= SAMPLE_ROWS and faithful.positions > 50
    assert 0 <= faithful.difference.noise < 1e-4  # float32: the order of sums, which oneDNN keeps whatever the batch
    most = 1 / 32 if precision == "compact" else 0
    assert most / 2 <= faithful.difference.value <= faithful.difference.allowed < most + 2e-3
    assert check_faithful(bench.spec, [capture], "cpu") == faithful


def test_targets_shifted_by_one_are_not_aligned_whichever_way(make: Make) -> None:
    _, capture = make()
    whole = capture.path.read_bytes()
    for by in (1, -1):
        capture.path.write_bytes(whole)
        moved = rewritten(capture, lambda rows, by=by: [shifted(row, by) for row in rows])
        report = check_aligned([moved])
        assert not report.passed and report.hits[1 - by] == max(report.hits)


@pytest.mark.parametrize(
    ("hits", "passed", "tells"),
    [
        ((40, 40, 0), True, False),
        ((70, 50, 0), True, False),  # z = 1.7
        ((0, 50, 90), False, False),
        ((90, 50, 0), False, False),
        ((50, 90, 50), True, True),
        ((49, 0, 0), True, False),  # no chance, yet of a teacher that hardly ever guesses right
        ((51, 0, 0), False, False),
    ],
)
def test_only_what_is_plainly_beside_the_next_token_fails(
    hits: tuple[int, int, int], passed: bool, tells: bool
) -> None:
    report = AlignedReport(1000, hits)
    assert (report.passed, report.tells) == (passed, tells)
    assert AlignedReport(99, hits).passed


def test_an_untrained_teacher_is_no_evidence(make: Make, teacher_folder: Path) -> None:
    _, capture = make(teacher_folder)
    report = check_aligned([capture])
    assert report.enough and report.passed and not report.tells
    assert report.hits[1] <= max(report.hits[0], report.hits[2])


def test_a_few_positions_are_no_evidence(make: Make) -> None:
    _, capture = make()
    moved = rewritten(capture, lambda rows: [shifted(row, 1) for row in rows[:2]])
    report = check_aligned([moved])
    assert report.passed and not report.enough and 0 < report.positions < 100


def test_a_row_dropped_swapped_or_weighed_otherwise_is_not_complete(make: Make) -> None:
    bench, capture = make()
    whole = capture.path.read_bytes()

    def swapped(rows: Sequence[CapturedRow]) -> list[CapturedRow]:
        numbers = [row.row for row in rows]
        return [replace(row, row=number) for number, row in zip(numbers, [rows[1], rows[0], *rows[2:]], strict=True)]

    changes: list[tuple[str, Callable[[Sequence[CapturedRow]], Sequence[CapturedRow]]]] = [
        (f"{ROWS - 1} rows, the shard has {ROWS}", lambda rows: rows[:-1]),
        ("row 0 is not the shard's", swapped),
        ("row 3 is not the shard's", lambda rows: [replace(r, weight=2.0) if r.row == 3 else r for r in rows]),
        ("its footer says mean_entropy", lambda rows: [_with_entropy(r, 3.0) for r in rows]),
    ]
    for said, change in changes:
        capture.path.write_bytes(whole)
        report = check_complete(bench.spec, [(bench.shards["s0"], rewritten(capture, change))])
        [problem] = report.problems
        assert not report.passed and said in problem and "shard s0" in problem
    capture.path.write_bytes(whole[: len(whole) // 2])
    assert not check_complete(bench.spec, [(bench.shards["s0"], capture)]).passed


def _with_entropy(row: CapturedRow, more: float) -> CapturedRow:
    return replace(row, targets=replace(row.targets, entropy_P=row.targets.entropy_P + np.float32(more)))


def test_log_probabilities_that_were_changed_are_not_faithful(make: Make) -> None:
    bench, capture = make(precision="exact")
    whole = capture.path.read_bytes()

    def changed(by: Callable[[SparseTargets], SparseTargets]) -> Capture:
        capture.path.write_bytes(whole)
        return rewritten(capture, lambda rows: [replace(row, targets=by(row.targets)) for row in rows])

    def one_id_lower(targets: SparseTargets) -> SparseTargets:
        logprobs = targets.support_logprobs_N.copy()
        logprobs[targets.offsets_P1[1:] - 1] -= 0.01  # the least likely id of each position
        return replace(targets, support_logprobs_N=logprobs)

    report = check_faithful(bench.spec, [changed(one_id_lower)], "cpu")
    assert not report.difference.passed and report.difference.value == pytest.approx(0.01, abs=1e-4)
    tail = check_faithful(
        bench.spec, [changed(lambda t: replace(t, tail_logprob_P=t.tail_logprob_P + np.float32(0.1)))], "cpu"
    )
    assert not tail.passed and not tail.tail_difference.passed and tail.difference.passed

    def sharper(targets: SparseTargets) -> SparseTargets:
        return replace(targets, support_logprobs_N=targets.support_logprobs_N * np.float32(1.3))

    assert not check_faithful(bench.spec, [changed(sharper)], "cpu").kl.passed


def test_another_teacher_and_shifted_targets_are_not_faithful(make: Make, teacher_folder: Path) -> None:
    bench, capture = make()
    other, of_another = make(teacher_folder)
    assert check_faithful(other.spec, [of_another], "cpu").passed
    report = check_faithful(bench.spec, [of_another], "cpu")
    assert not report.passed and report.kl.value > 100 * report.kl.allowed
    moved = rewritten(capture, lambda rows: [shifted(row, 1) for row in rows])
    assert not check_faithful(bench.spec, [moved], "cpu").passed


def test_half_precision_has_the_noise_it_has(make: Make, teacher_folder: Path) -> None:
    """Captured in other batches than it is scored again in, bfloat16 differs by much more than float32."""
    bench, _ = make(precision="exact")
    settings = bench.home.settings_file
    settings.write_text(settings.read_text().replace("float32", "bfloat16"))
    for batch_tokens in (64, 700):
        capture = capture_shard(
            bench.spec, bench.shards["s0"], bench.store, device="cpu", batch_tokens=batch_tokens, force=True
        ).capture
        report = check_faithful(bench.spec, [capture], "cpu")
        assert report.passed and report.difference.allowed >= 16 / 128  # at least, even where no noise was measured
    other, _ = make(teacher_folder)
    settings = other.home.settings_file
    settings.write_text(settings.read_text().replace("float32", "bfloat16"))
    assert not check_faithful(other.spec, [capture], "cpu").kl.passed


def test_derived_captures_are_faithful_their_tails_but_for_the_sum_of_rounding(make: Make, trained: Path) -> None:
    bench, _ = make(k=16)
    settings = bench.home.settings_file
    settings.write_text(settings.read_text().replace("k: 16", "k: 4"))
    derived = capture_shard(bench.spec, bench.shards["s0"], bench.store, device="cpu").capture
    assert derived.derived_from and derived.stats.rows_captured == 0
    report = check_faithful(bench.spec, [derived], "cpu")
    assert report.passed and report.derived == report.rows
    assert report.tail_difference.allowed > 1 / 32
    without = rewritten(derived, lambda rows: [replace(row, targets=_without_tails(row.targets)) for row in rows])
    assert check_faithful(bench.spec, [without], "cpu").failed == ["largest tail difference"]


def _without_tails(targets: SparseTargets) -> SparseTargets:
    return replace(targets, tail_logprob_P=np.full_like(targets.tail_logprob_P, -np.inf))


def test_targets_without_a_rest_are_compared_on_the_kept_ids(make: Make, tokenizer: PreTrainedTokenizerFast) -> None:
    bench, capture = make(k=len(tokenizer))
    report = check_faithful(bench.spec, [capture], "cpu")
    assert report.passed and report.tail_difference.value == 0.0


def test_the_sample_is_small_and_reaches_every_capture(make: Make) -> None:
    bench, capture = make()
    report = check_faithful(bench.spec, [capture] * 50, "cpu")
    assert report.rows == SAMPLE_ROWS
    assert check_faithful(bench.spec, [], "cpu").passed
    long = [{"text": " ".join(tiny.TEXT) * 4} for _ in range(ROWS)]
    tiny.write_jsonl(bench.home.root / "shards" / "s0.jsonl", long)
    settings = bench.home.settings_file
    settings.write_text(settings.read_text().replace("max_length: 64", "max_length: 256"))
    longer = capture_shard(bench.spec, bench.shards["s0"], bench.store, device="cpu").capture
    rows = check_faithful(bench.spec, [longer], "cpu").rows
    assert rows == SAMPLE_TOKENS // 256
