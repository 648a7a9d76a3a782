"""Tables by shard and by entropy hold the figures they are of, and the paired differences."""

from __future__ import annotations

from dataclasses import replace

from distill_assets.student_evaluation.breakdowns import entropy_rows, shard_tables
from distill_assets.student_evaluation.evaluation import Evaluation
from distill_assets.student_evaluation.wording import number, write_estimate


def test_by_shard(dense_evaluation: Evaluation) -> None:
    tables = shard_tables(dense_evaluation)
    assert [scope.name for scope, _ in tables] == ["heldout-a", "heldout-b"]
    for scope, rows in tables:
        by_metric, gaps = rows[: len(dense_evaluation.metrics)], rows[len(dense_evaluation.metrics) :]
        for metric, row in zip(dense_evaluation.metrics, by_metric, strict=True):
            assert list(row) == ["figure", "untrained", "student", "control", "teacher", "student − control"]
            assert row["figure"].startswith(metric.label)
            assert row["control"] == write_estimate(metric, scope.models["control"][metric.key])
            difference = scope.differences["control"][metric.key]
            assert row["student − control"] == write_estimate(metric, difference, signed=True)
        assert [row["figure"] for row in gaps] == [
            "Share of the gap closed, by KL from teacher, dense (%)",
            "Share of the gap closed, by negative log-likelihood (%)",
        ]
        share = scope.closed[0].share
        assert share is not None and gaps[0]["student"].startswith(number(100 * share.value, 1) + " [")


def test_by_entropy(dense_evaluation: Evaluation) -> None:
    rows = entropy_rows(dense_evaluation)
    assert len(rows) == len(dense_evaluation.entropy_bins) > 1
    for row, b in zip(rows, dense_evaluation.entropy_bins, strict=True):
        assert (row["positions"], row["rows"]) == (str(b.n_positions), str(b.n_rows))
        assert row["entropy (nats)"] == f"{b.low_nats:.2f} to {b.high_nats:.2f}"
        assert row["Top-1 agreement, control (%)"] == number(100 * b.agreement_share["control"].value, 1)
        kl = write_estimate(dense_evaluation.kl, b.kl_difference["control"], signed=True)
        assert row["student − control (nats)"] == kl and " [" in kl


def test_without_a_rival_there_are_no_differences(evaluation: Evaluation) -> None:
    alone = replace(evaluation, overall=replace(evaluation.overall, differences={}))
    assert not [heading for heading in entropy_rows(alone)[0] if "−" in heading]
    assert list(shard_tables(alone)[0][1][0]) == ["figure", "untrained", "student", "control", "teacher"]
