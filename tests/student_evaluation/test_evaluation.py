"""The whole evaluation: figures against sums over positions, and what the outcome follows."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from distill_assets.foundation.errors import TrainingError
from distill_assets.student_evaluation.bootstrap import Estimate
from distill_assets.student_evaluation.evaluation import Evaluation, evaluate
from distill_assets.student_evaluation.figures import kept_mass
from distill_assets.student_evaluation.scoring import score_model
from distill_assets.student_model.vocabulary import StudentVocabulary
from distill_assets.teacher_capture.sparse_targets import CapturedRow, SparseTargets
from tests.student_evaluation.capturing import random_rows
from tests.student_evaluation.conftest import blurred, load

Shards = dict[str, list[CapturedRow]]


def test_figures_are_means_over_positions(
    evaluation: Evaluation, rows_by_shard: Shards, teacher_folder: Path, n_real: int
) -> None:
    model = blurred(teacher_folder, 0.03)
    for scope, rows in [
        (evaluation.overall, [row for shard_rows in rows_by_shard.values() for row in shard_rows]),
        *zip(evaluation.shards, rows_by_shard.values(), strict=True),
    ]:
        scores = score_model(model, rows, StudentVocabulary(n_real))
        figures = {key: e.value for key, e in scope.models["student"].items() if e is not None}
        assert figures["perplexity"] == pytest.approx(np.exp(scores.nll_N.mean()))
        assert figures["kl_nats"] == pytest.approx(scores.kl_N.mean())
        assert figures["agreement_share"] == pytest.approx(scores.agrees_N.mean())
        assert figures["acceptance_share"] == pytest.approx(scores.acceptance_N.mean())
        assert (scope.n_rows, scope.n_positions) == (len(rows), len(scores.kl_N))
    assert [scope.name for scope in evaluation.shards] == list(rows_by_shard)


def test_intervals_hold_their_figure_and_differences_are_paired(evaluation: Evaluation) -> None:
    models, differences = evaluation.overall.models, evaluation.overall.differences
    for name in ("untrained", "student", "control"):
        for e in models[name].values():
            assert e is not None and e.low is not None and e.high is not None
            assert e.low <= e.value <= e.high
    for other in ("untrained", "control"):
        for key, d in differences[other].items():
            ours, theirs = models["student"][key], models[other][key]
            assert ours is not None and theirs is not None
            assert d.value == pytest.approx(ours.value - theirs.value)
    student, control, d = models["student"]["kl_nats"], models["control"]["kl_nats"], differences["control"]["kl_nats"]
    widths = [e.high - e.low for e in (student, control, d)]  # type: ignore[union-attr,operator]
    assert widths[2] < np.hypot(widths[0], widths[1])  # what independent samples would give


def test_the_teacher_is_read_from_the_capture(evaluation: Evaluation, rows_by_shard: Shards) -> None:
    gold = np.concatenate([row.targets.gold_logprob_P for rows in rows_by_shard.values() for row in rows])
    figures = evaluation.overall.models["teacher"]
    assert figures["perplexity"] is not None and figures["perplexity"].value == pytest.approx(np.exp(-gold.mean()))
    assert figures["perplexity"].low is not None
    assert [(e.value, e.low) for key in ("kl_nats", "agreement_share", "acceptance_share") if (e := figures[key])] == [
        (0.0, None),
        (1.0, None),
        (1.0, None),
    ]


def test_outcome_follows_the_interval(
    evaluation: Evaluation, rows_by_shard: Shards, teacher_folder: Path, n_real: int
) -> None:
    assert (evaluation.rival, evaluation.outcome) == ("control", "closer")
    good, bad = (lambda: blurred(teacher_folder, 0.03)), (lambda: blurred(teacher_folder, 0.12))
    vocabulary = StudentVocabulary(n_real)
    assert evaluate(rows_by_shard, {"student": bad, "control": good}, vocabulary).outcome == "farther"
    twins = evaluate(rows_by_shard, {"student": good, "control": good}, vocabulary)
    assert twins.outcome == "undecided"
    for b in twins.entropy_bins:  # were the differences not paired, twins would seem to differ
        assert b.kl_difference["control"] == b.agreement_difference["control"] == Estimate(0.0, 0.0, 0.0)
        assert b.kl_nats["student"].low < b.kl_nats["student"].high  # type: ignore[operator]
    few = {"heldout": rows_by_shard["heldout-a"][:3]}
    assert evaluate(few, {"student": good, "control": bad}, vocabulary).outcome == "undecided"
    without_control = evaluate(rows_by_shard, {"untrained": bad, "student": good}, vocabulary)
    assert (without_control.rival, without_control.outcome) == ("untrained", "closer")
    alone = evaluate(rows_by_shard, {"student": good}, vocabulary)
    assert (alone.rival, alone.outcome) == (None, "undecided")


def test_one_model_at_a_time(rows_by_shard: Shards, teacher_folder: Path, n_real: int) -> None:
    alive: list[weakref.ref[PreTrainedModel]] = []

    def loader() -> PreTrainedModel:
        assert all(model() is None for model in alive), "the model before is still held"
        model = load(teacher_folder)
        alive.append(weakref.ref(model))
        return model

    evaluate(rows_by_shard, {"untrained": loader, "student": loader, "control": loader}, StudentVocabulary(n_real))
    assert len(alive) == 3


def test_nothing_held_out(teacher: PreTrainedModel, n_real: int) -> None:
    for rows_by_shard in ({}, {"heldout": []}):
        with pytest.raises(TrainingError, match=r"no held-out rows.*data\.heldout in distill\.yaml"):
            evaluate(rows_by_shard, {"student": lambda: teacher}, StudentVocabulary(n_real))


def test_entropy_bins_split_all_positions(evaluation: Evaluation, rows_by_shard: Shards, n_real: int) -> None:
    entropy = np.sort(np.concatenate([r.targets.entropy_P for rows in rows_by_shard.values() for r in rows]))
    bins = evaluation.entropy_bins
    assert sum(b.n_positions for b in bins) == len(entropy) == evaluation.overall.n_positions
    assert max(b.n_positions for b in bins) - min(b.n_positions for b in bins) <= 1
    start = 0
    for b in bins:
        part = entropy[start : start + b.n_positions]
        start += b.n_positions
        assert (b.low_nats, b.high_nats) == (pytest.approx(part[0]), pytest.approx(part[-1]))
        assert b.mean_nats == pytest.approx(part.mean(), rel=1e-5)
        assert list(b.kl_difference) == list(b.agreement_difference) == ["untrained", "control"]
        assert b.kl_difference["control"].value == pytest.approx(
            b.kl_nats["student"].value - b.kl_nats["control"].value
        )
    overall = evaluation.overall.models["student"]["agreement_share"]
    weighted = sum(b.agreement_share["student"].value * b.n_positions for b in bins) / len(entropy)
    assert overall is not None and weighted == pytest.approx(overall.value)


def targets(logprobs: list[list[float]], tails: list[float], **unknown: Any) -> SparseTargets:
    """Targets with ids 10, 11, ... at positions 0, 1, ..."""
    n = len(logprobs)
    return SparseTargets(
        positions_P=np.arange(n, dtype=np.int32),
        offsets_P1=np.cumsum([0, *map(len, logprobs)]).astype(np.int64),
        support_ids_N=np.concatenate([10 + np.arange(len(row)) for row in logprobs]).astype(np.int32),
        support_logprobs_N=np.concatenate([np.asarray(row, dtype=np.float32) for row in logprobs]),
        tail_logprob_P=np.array(tails, dtype=np.float32),
        gold_logprob_P=np.array(unknown.get("gold", [-1.0] * n), dtype=np.float32),
        entropy_P=np.array(unknown.get("entropy", [1.0] * n), dtype=np.float32),
    )


def captured(t: SparseTargets, row: int = 0) -> CapturedRow:
    ids = np.arange(20, 21 + t.n_positions, dtype=np.int32)
    return CapturedRow(row=row, key=f"key{row}", id=None, input_ids=ids, weight=1.0, truncated=False, targets=t)


def test_kept_mass_by_hand() -> None:
    first = captured(targets([np.log([0.5, 0.3, 0.1]).tolist(), np.log([0.6]).tolist()], np.log([0.1, 0.4]).tolist()))
    second = captured(targets([np.log([1.0, 0.5]).tolist()], [np.log(0.5)]))  # sums to 2: normalised on reading
    assert kept_mass([first, second]) == pytest.approx(
        ((0.5 + 0.6 + 0.5) / 3, (0.8 + 0.6 + 0.75) / 3, (0.9 + 0.6 + 0.75) / 3)
    )


def test_a_capture_without_gold_and_entropy(teacher: PreTrainedModel, n_real: int) -> None:
    rows = [
        captured(targets([[-0.5], [-0.5]], [-0.9, -0.9], gold=[-np.inf] * 2, entropy=[-np.inf] * 2), row=i)
        for i in range(30)
    ]
    evaluation = evaluate({"imported": rows}, {"student": lambda: teacher}, StudentVocabulary(n_real))
    assert evaluation.overall.models["teacher"]["perplexity"] is None
    assert evaluation.entropy_bins == ()
    assert {s.entropy_nats for s in evaluation.samples} == {None}
    json.dumps(evaluation.to_json(), allow_nan=False)


def test_positions_that_say_nothing_are_not_counted(teacher: PreTrainedModel, n_real: int) -> None:
    """What `fit_rows` leaves of a position whose whole support the student lacks."""
    plain = captured(targets([[-0.5, -1.5], [-0.4]], [-1.8, -1.1]))
    emptied = replace(
        plain,
        targets=replace(
            plain.targets,
            support_ids_N=np.array([10, 11, n_real + 5], dtype=np.int32),
            support_logprobs_N=np.array([-0.5, -1.5, -np.inf], dtype=np.float32),
            tail_logprob_P=np.array([-1.8, 0.0], dtype=np.float32),
        ),
    )
    only_first = captured(targets([[-0.5, -1.5]], [-1.8]))
    models, vocabulary = {"student": lambda: teacher}, StudentVocabulary(n_real)
    with_nothing, without = (evaluate({"heldout": [row]}, models, vocabulary).overall for row in (emptied, only_first))
    assert with_nothing.n_positions == 1
    # A head of two positions and one of a single position round differently on some processors.
    ours, theirs = (overall.models["student"]["kl_nats"].value for overall in (with_nothing, without))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_rows_without_positions_are_not_counted(teacher: PreTrainedModel, n_real: int) -> None:
    rows = random_rows(teacher, 6, k=4, n_real=n_real)
    empty = captured(targets([[-0.5]], [-0.9]), row=9)
    empty = replace(
        empty,
        targets=replace(
            empty.targets,
            positions_P=empty.targets.positions_P[:0],
            offsets_P1=np.zeros(1, dtype=np.int64),
            support_ids_N=empty.targets.support_ids_N[:0],
            support_logprobs_N=empty.targets.support_logprobs_N[:0],
            tail_logprob_P=empty.targets.tail_logprob_P[:0],
            gold_logprob_P=empty.targets.gold_logprob_P[:0],
            entropy_P=empty.targets.entropy_P[:0],
        ),
    )
    models, vocabulary = {"student": lambda: teacher}, StudentVocabulary(n_real)
    with_empty = evaluate({"heldout": [*rows[:3], empty, *rows[3:]]}, models, vocabulary)
    assert with_empty.overall.n_rows == 6
    assert (
        with_empty.overall.models["teacher"]
        == evaluate({"heldout": rows}, models, vocabulary).overall.models["teacher"]
    )


def test_json_and_repeatability(
    evaluation: Evaluation, rows_by_shard: Shards, teacher_folder: Path, stranger: PreTrainedModel, n_real: int
) -> None:
    text = json.dumps(evaluation.to_json(), allow_nan=False)
    assert json.loads(text)["overall"]["models"]["student"]["kl_nats"].keys() == {"value", "low", "high"}
    models = {
        "untrained": lambda: stranger,
        "student": lambda: blurred(teacher_folder, 0.03),
        "control": lambda: blurred(teacher_folder, 0.12),
    }
    assert json.dumps(evaluate(rows_by_shard, models, StudentVocabulary(n_real)).to_json()) == text
    assert torch.is_grad_enabled()
