"""Captures as a wrong engine would write them: whole files with true statistics, found out by asking the teacher
again, and by `verify` where the file contradicts itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from distill_assets.foundation.settings import TargetSettings
from distill_assets.teacher_capture.arrow import parquet_writer, to_arrow
from distill_assets.teacher_capture.capture import capture_shard
from distill_assets.teacher_capture.chunks import Cost, Figures, total_stats
from distill_assets.teacher_capture.faithful import check_faithful
from distill_assets.teacher_capture.inspection import inspect_capture
from distill_assets.teacher_capture.sparse_targets import SparseTargets
from distill_assets.teacher_capture.store import FOOTER, Capture, read_capture, read_rows
from tests import tiny
from tests.bench import Bench

Change = Callable[[SparseTargets], SparseTargets]
Captured = Callable[[str], tuple[Bench, Capture]]
SETTINGS: dict[str, dict[str, object]] = {
    "exact": {"k": 8, "precision": "exact"},
    "exact likely": {"k": 8, "min_probability": 0.02, "precision": "exact"},
    "nearly all": {"k": 250, "precision": "exact"},
    "compact": {"k": 8},
    "sampled": {"kind": "sampled", "samples": 9},
    "threshold": {"kind": "threshold", "tau": 0.03},
    "tail samples": {"k": 8, "tail_samples": 2},
}


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Captured:
    """A home whose s0 is captured with these settings, and its capture; made once each, whole again each time."""
    made: dict[str, tuple[Bench, Capture, bytes]] = {}

    def of(settings: str) -> tuple[Bench, Capture, bytes]:
        if settings not in made:
            root = tiny.make_home(tmp_path_factory.mktemp("home"), teacher_folder, shards=1, rows=8)
            file = root / "distill.yaml"
            file.write_text(
                file.read_text().replace("targets:\n  k: 8\n", f"targets: {json.dumps(SETTINGS[settings])}\n")
            )
            bench = Bench(root)
            capture = capture_shard(bench.spec, bench.shards["s0"], bench.store, device="cpu").capture
            made[settings] = (bench, capture, capture.path.read_bytes())
        bench, capture, content = made[settings]
        capture.path.write_bytes(content)
        return bench, capture

    return of


def written(capture: Capture, change: Change) -> Capture:
    """The capture as an engine would have left it that makes such targets: its statistics are those of its rows."""
    footer = json.loads(pq.read_metadata(capture.path).metadata[FOOTER])
    targets = TargetSettings.model_validate(footer["identity"]["targets"])
    rows = [replace(row, targets=change(row.targets)) for row in read_rows(capture.path)]
    stats = total_stats([Figures.of(rows, Cost(len(rows), 0, 1.0))], 0, 0)
    with parquet_writer(capture.path, targets) as writer:
        writer.write_table(to_arrow(rows, targets))
        writer.add_key_value_metadata({FOOTER.decode(): json.dumps(footer | {"stats": asdict(stats)})})
    return read_capture(capture.path)


def with_ids(targets: SparseTargets, stays_N: np.ndarray) -> SparseTargets:
    """Some of the kept ids; the mass of the others joins the tail, as if they had never been seen among them."""
    position_N = np.repeat(np.arange(targets.n_positions), targets.kept_P)
    kept_P = np.bincount(position_N[stays_N], minlength=targets.n_positions)
    lost_P = np.bincount(
        position_N, np.where(stays_N, 0.0, np.exp(targets.support_logprobs_N)), minlength=targets.n_positions
    )
    return replace(
        targets,
        offsets_P1=np.concatenate([[0], kept_P.cumsum()]),
        support_ids_N=targets.support_ids_N[stays_N],
        support_logprobs_N=targets.support_logprobs_N[stays_N],
        tail_logprob_P=np.log(np.exp(targets.tail_logprob_P) + lost_P).astype(np.float32),
    )


def slots(targets: SparseTargets) -> np.ndarray:
    return np.arange(len(targets.support_ids_N)) - np.repeat(targets.offsets_P1[:-1], targets.kept_P)


def second_and_third_lost(targets: SparseTargets) -> SparseTargets:
    return with_ids(targets, ~np.isin(slots(targets), [1, 2]))


def gold_of_the_neighbour(targets: SparseTargets) -> SparseTargets:
    return replace(targets, gold_logprob_P=np.roll(targets.gold_logprob_P, 1))


def entropy_zero(targets: SparseTargets) -> SparseTargets:
    return replace(targets, entropy_P=np.zeros_like(targets.entropy_P))


def small_tails_lost(targets: SparseTargets) -> SparseTargets:
    tail_P = targets.tail_logprob_P
    return replace(targets, tail_logprob_P=np.where(tail_P < np.log(0.011), -np.inf, tail_P).astype(np.float32))


def weighing(weight: float) -> Change:
    return lambda targets: replace(targets, weights_N=np.full_like(targets.support_logprobs_N, weight))


def weights_of_the_neighbour(targets: SparseTargets) -> SparseTargets:
    """Sound by themselves, and drawn: only not for these ids."""
    assert targets.weights_N is not None
    weights = [np.roll(part, 1) for part in np.split(targets.weights_N, targets.offsets_P1[1:-1])]
    return replace(targets, weights_N=np.concatenate(weights))


def samples_of_the_support(targets: SparseTargets) -> SparseTargets:
    assert targets.tail_sample_ids_PS is not None
    first_P1 = targets.support_ids_N[targets.offsets_P1[:-1], None]
    return replace(targets, tail_sample_ids_PS=np.broadcast_to(first_P1, targets.tail_sample_ids_PS.shape))


def samples_from_the_front(targets: SparseTargets) -> SparseTargets:
    """From outside the support, but always the same: no chance in it."""
    assert targets.tail_sample_ids_PS is not None
    kept = np.split(targets.support_ids_N, targets.offsets_P1[1:-1])
    ids_PS = [np.setdiff1d(np.arange(60), ids)[: targets.tail_sample_ids_PS.shape[1]] for ids in kept]
    return replace(targets, tail_sample_ids_PS=np.array(ids_PS, dtype=np.int32))


WRONG: list[tuple[str, Change, set[str], str | None]] = [
    ("exact", second_and_third_lost, {"ids kept"}, "does not keep k (8) ids"),
    ("exact", lambda t: t.narrowed(1, 0.0), {"ids kept"}, "does not keep k (8) ids"),
    ("exact likely", second_and_third_lost, {"ids kept"}, "gold_logprob that its support and tail rule out"),
    ("exact", gold_of_the_neighbour, {"largest gold difference"}, "gold_logprob that its support"),
    ("compact", gold_of_the_neighbour, {"largest gold difference"}, "gold_logprob that its support"),
    ("compact", entropy_zero, {"largest entropy difference"}, "entropy its support and tail rule out"),
    ("nearly all", small_tails_lost, {"largest tail difference"}, None),
    ("sampled", weighing(0.0), {"ids drawn"}, "weights that kind sampled"),
    ("sampled", weighing(7.0), {"ids drawn"}, "weights that kind sampled"),
    ("sampled", weights_of_the_neighbour, {"ids drawn"}, None),
    ("threshold", weighing(0.0), {"ids drawn"}, "weights that kind threshold"),
    ("threshold", weighing(7.0), {"ids drawn"}, "weights that kind threshold"),
    ("threshold", weights_of_the_neighbour, {"ids drawn"}, "weights that kind threshold"),
    ("tail samples", samples_of_the_support, {"ids drawn"}, "tail_sample_ids from outside"),
    ("tail samples", samples_from_the_front, {"ids drawn"}, None),
]


@pytest.mark.parametrize(("settings", "change", "failed", "said"), WRONG)
def test_what_a_wrong_engine_writes_is_found_out(
    captured: Captured,
    settings: str,
    change: Change,
    failed: set[str],
    said: str | None,
) -> None:
    bench, capture = captured(settings)
    wrong = written(capture, change)
    report = check_faithful(bench.spec, [wrong], "cpu")
    assert failed <= set(report.failed), report
    found = list(inspect_capture(wrong.path, bench.spec.encoder.n_real))
    if said is not None:
        [(kind, reason)] = found
        assert kind == "damaged" and said in reason


def test_more_ids_than_asked_for_and_ids_too_unlikely_are_found_out(
    captured: Captured,
) -> None:
    """A capture that keeps what its settings leave out, under the name of those settings."""
    for settings, asked in (("exact", {"k": 6}), ("exact", {"min_probability": 0.02})):
        bench, capture = captured(settings)
        spec = replace(bench.spec, targets=bench.spec.targets.model_copy(update=asked))
        assert check_faithful(spec, [capture], "cpu").failed == ["ids kept"]


@pytest.mark.parametrize("settings", SETTINGS)
def test_what_the_engine_writes_is_not(captured: Captured, settings: str) -> None:
    """The same way through the file, nothing changed; also where the teacher's arithmetic is coarse."""
    bench, capture = captured(settings)
    same = written(capture, lambda targets: targets)
    assert check_faithful(bench.spec, [same], "cpu").failed == []
    assert list(inspect_capture(same.path, bench.spec.encoder.n_real)) == []
    file = bench.home.settings_file
    text = file.read_text()
    file.write_text(text.replace("float32", "bfloat16"))
    coarse = capture_shard(bench.spec, bench.shards["s0"], bench.store, device="cpu", batch_tokens=100).capture
    assert check_faithful(bench.spec, [coarse], "cpu").failed == []
    assert list(inspect_capture(coarse.path, bench.spec.encoder.n_real)) == []
    file.write_text(text)
