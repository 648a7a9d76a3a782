"""Students beside each other: figures of their reports, paired differences, and what is refused."""

from __future__ import annotations

import json
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from distill_assets.foundation.errors import StaleInputs, UsageError
from distill_assets.foundation.settings import StudentSettings, TrainingSettings
from distill_assets.student_evaluation.bootstrap import bootstrap_sums
from distill_assets.student_evaluation.comparison import Comparison, compare_students
from distill_assets.student_evaluation.comparison_page import difference_rows, figure_rows, write_comparison
from distill_assets.student_evaluation.evaluation import Evaluation
from distill_assets.student_evaluation.per_row import RowSums
from distill_assets.student_evaluation.report import write_report
from distill_assets.student_model.saving import (
    CurvePoint,
    FitReport,
    StudentReport,
    StudentSpec,
    UsedCapture,
    save_student,
)
from distill_assets.student_model.vocabulary import StudentVocabulary
from tests.student_evaluation.test_report import DETAILS, Page

A, B, C, CONTROL = "aaaa" + "0" * 12, "aabb" + "0" * 12, "cccc" + "0" * 12, "dddd" + "0" * 12


class Shelf:
    """Folders `students` and `reports` with what a test puts there."""

    def __init__(self, root: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        self.students, self.reports = root / "students", root / "reports"
        self.model, self.tokenizer = model, tokenizer

    def student(
        self, i: str, kind: Any = "student", k: int = 8, rows: int = 6, tail_samples: int = 0, **training: Any
    ) -> None:
        targets = {"kind": "top_k", "k": k} | ({"tail_samples": tail_samples} if tail_samples else {})
        spec = StudentSpec(
            student_id=i,
            kind=kind,
            teacher="models/teacher",
            origin=StudentSettings(from_teacher_layers=[0, 2]),
            training=TrainingSettings(**training),
            vocabulary=StudentVocabulary(320),
            captures=(UsedCapture("s0", "ab" * 32, "c" * 16, rows),),
            targets=targets if kind == "student" else {},
        )
        curve = (CurvePoint(1, 1.0, 1.0, 1.0, 9, 1e-3),)
        report = StudentReport(rows, 0, 1, 9, 1.0, "cpu", FitReport(0, 0, 0, 0.0), curve, ())
        save_student(self.students / i, self.model, self.tokenizer, spec, report)

    def report(self, name: str, evaluation: Evaluation, student: str, **details: Any) -> None:
        told = replace(DETAILS, report_id=name, student_id=student, control_id=CONTROL, **details)
        write_report(evaluation, {}, told, self.tokenizer, self.reports / name)

    def compare(self, *ids: str) -> Comparison:
        return compare_students(ids, self.students, self.reports)


@pytest.fixture
def shelf(tmp_path: Path, stranger: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Shelf:
    shelf = Shelf(tmp_path, stranger, tokenizer)
    shelf.student(A)
    shelf.student(B, k=16, learning_rate=0.5, rows=7)
    shelf.student(CONTROL, kind="control")
    return shelf


def swapped(evaluation: Evaluation) -> Evaluation:
    """The same rows in another order, with the student and the untrained one changing places."""
    r = evaluation.per_row
    names = {"student": "untrained", "untrained": "student"}
    turned = RowSums(
        r.shards[::-1],
        r.rows[::-1],
        r.keys[::-1],
        r.positions_R[::-1],
        {(names.get(model, model), key): values[::-1] for (model, key), values in r.sums.items()},
    )
    return replace(evaluation, per_row=turned)


def test_rows_are_written_and_read(dense_evaluation: Evaluation, tmp_path: Path) -> None:
    r = dense_evaluation.per_row
    r.write(tmp_path / "rows.parquet")
    again = RowSums.read(tmp_path / "rows.parquet")
    assert (again.shards, again.rows, again.keys) == (r.shards, r.rows, r.keys)
    assert again.sums.keys() == r.sums.keys() and len(r.keys) == dense_evaluation.overall.n_rows
    for name, values in r.sums.items():
        np.testing.assert_array_equal(again.sums[name], values)
        figure = dense_evaluation.overall.models[name[0]][name[1]]
        mean = values.sum() / r.positions_R.sum()
        assert figure is not None and figure.value == pytest.approx(np.exp(mean) if name[1] == "perplexity" else mean)


def test_figures_are_those_of_the_reports_and_differences_are_paired(
    shelf: Shelf, dense_evaluation: Evaluation
) -> None:
    shelf.report("1" * 16, dense_evaluation, A, dense=True)
    shelf.report("2" * 16, swapped(dense_evaluation), B, dense=True)
    found = shelf.compare(A, B, CONTROL)
    assert [s.student_id for s in found.students] == [A, B, CONTROL] and found.notes == ()
    for s, name in zip(found.students, ("student", "untrained", "control"), strict=True):
        for key, figure in s.figures.items():  # intervals, too: the rows are drawn in the order of the report
            assert astuple(figure) == pytest.approx(astuple(dense_evaluation.overall.models[name][key]))  # type: ignore[arg-type]
    assert found.students[0].differences == {}
    assert "dense_kl_nats" in found.metrics and "kl_nats" not in found.metrics  # a bound of the other
    r = dense_evaluation.per_row
    sums = [r.positions_R, r.sums["student", "dense_kl_nats"], r.sums["untrained", "dense_kl_nats"]]
    drawn = bootstrap_sums(np.stack(sums, axis=1).astype(float))
    d = found.students[1].differences["dense_kl_nats"]
    assert d.low == pytest.approx(np.quantile((drawn[:, 2] - drawn[:, 1]) / drawn[:, 0], 0.025))
    assert (found.n_rows, found.n_positions) == (dense_evaluation.overall.n_rows, dense_evaluation.overall.n_positions)


def test_says_what_differs(shelf: Shelf, evaluation: Evaluation) -> None:
    shelf.report("1" * 16, evaluation, A)
    shelf.report("2" * 16, evaluation, B)
    found = shelf.compare(B, A)
    assert found.settings == {
        "targets.k": ("16", "8"),
        "training.learning_rate": ("0.5", "0.0002"),
        "data.s0": ("abababababab, 7 rows", "abababababab, 6 rows"),
    }
    shelf.student(C, tail_samples=4)
    shelf.report("3" * 16, evaluation, C)
    with_samples = shelf.compare(A, C).settings
    assert with_samples == {"targets.tail_samples": ("–", "4"), "training.tail_sample_weight": ("–", "0.5")}
    # A control was trained under these settings, but makes no use of them.
    assert shelf.compare(A, CONTROL).settings["training.objective"] == ("forward_kl", "–")


def test_only_what_means_the_same_is_compared(
    shelf: Shelf, evaluation: Evaluation, dense_evaluation: Evaluation
) -> None:
    other = tuple(replace(h, capture_id="f" * 16) for h in DETAILS.heldout)
    shelf.report("1" * 16, dense_evaluation, A, dense=True)
    shelf.report("2" * 16, dense_evaluation, B, dense=True, heldout=other)
    found = shelf.compare(A, B)
    assert "dense_kl_nats" in found.metrics and found.notes == ()
    shelf.report("2" * 16, evaluation, B)
    found = shelf.compare(A, B)
    assert found.metrics == ("perplexity", "kl_nats", "agreement_share", "acceptance_share") and found.notes == ()
    shelf.report("2" * 16, evaluation, B, heldout=other)
    found = shelf.compare(A, B)
    assert found.metrics == ("perplexity", "agreement_share") and "keep different ids" in found.notes[0]
    shelf.report("2" * 16, dense_evaluation, B, dense=True, teacher_weights="f" * 64)
    found = shelf.compare(A, B)
    assert found.metrics == ("perplexity",) and "teachers differ" in found.notes[0]


def test_dense_reports_are_preferred(shelf: Shelf, evaluation: Evaluation, dense_evaluation: Evaluation) -> None:
    for name, student in (("1", A), ("2", B)):
        shelf.report(name * 16, dense_evaluation, student, dense=True)
    shelf.report("3" * 16, evaluation, A)  # newer
    assert [s.report_id for s in shelf.compare(A, B).students] == ["1" * 16, "2" * 16]


def test_other_rows_are_not_compared(shelf: Shelf, evaluation: Evaluation) -> None:
    r = evaluation.per_row
    fewer = RowSums(r.shards[1:], r.rows[1:], r.keys[1:], r.positions_R[1:], {n: v[1:] for n, v in r.sums.items()})
    shelf.report("1" * 16, evaluation, A)
    shelf.report("2" * 16, replace(evaluation, per_row=fewer), B)
    with pytest.raises(StaleInputs, match=r"not measured on the same held-out rows .*30 rows.*29 rows.*`distill run`"):
        shelf.compare(A, B)
    # As many rows, but one of them scored at fewer positions, is another comparison too.
    cut = replace(r, positions_R=np.where(np.arange(len(r.keys)) == 3, r.positions_R - 1, r.positions_R))
    shelf.report("2" * 16, replace(evaluation, per_row=cut), B)
    with pytest.raises(StaleInputs, match="not measured on the same"):
        shelf.compare(A, B)
    shelf.report("3" * 16, evaluation, B)  # measured again on the rows of the other
    assert [s.report_id for s in shelf.compare(A, B).students] == ["1" * 16, "3" * 16]


def test_unknown_and_ambiguous_ids(shelf: Shelf, evaluation: Evaluation) -> None:
    shelf.report("1" * 16, evaluation, A)
    with pytest.raises(UsageError, match=rf"student aa may be {A} or {B}; write more"):
        shelf.compare("aa", CONTROL)
    with pytest.raises(UsageError, match=rf"no student {C} in .*there are: {A}, {B}, {CONTROL}"):
        shelf.compare(A, C)
    with pytest.raises(UsageError, match="no student"):
        shelf.compare(A, "")
    with pytest.raises(UsageError, match="at least two"):
        shelf.compare(A)
    with pytest.raises(UsageError, match="named twice"):
        shelf.compare(A, "aaaa")
    with pytest.raises(StaleInputs, match=rf"student {B} was never measured.*`distill run`"):
        shelf.compare("aaaa", "aabb")
    assert [s.kind for s in shelf.compare("aaaa", "d").students] == ["student", "control"]  # a beginning will do


def test_a_damaged_report_measured_nobody(shelf: Shelf, evaluation: Evaluation) -> None:
    shelf.report("1" * 16, evaluation, A)
    (shelf.reports / ("1" * 16) / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(StaleInputs, match="never measured"):
        shelf.compare(A, CONTROL)


def test_the_page(shelf: Shelf, dense_evaluation: Evaluation, tmp_path: Path) -> None:
    shelf.report("1" * 16, dense_evaluation, A, dense=True)
    shelf.report("2" * 16, swapped(dense_evaluation), B, dense=True)
    found = shelf.compare(A, B, CONTROL)
    path = write_comparison(found, tmp_path / "comparison")
    parsed = Page(path.read_text(encoding="utf-8"))
    for row in [*figure_rows(found), *difference_rows(found)]:
        for cell in row.values():
            assert cell.split(" [")[0] in parsed.text
    assert "training.learning_rate" in parsed.text and "0.5" in parsed.text
    assert len(parsed.all("img")) == 1 and not parsed.all("script") and not parsed.all("link")
    assert f"{found.n_positions:,} positions of {found.n_rows} held-out rows" in parsed.text
    told = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert [s["student_id"] for s in told["students"]] == [A, B, CONTROL]
    assert told["students"][1]["figures"]["dense_kl_nats"]["value"] == found.students[1].figures["dense_kl_nats"].value
    assert told["metrics"]["dense_kl_nats"]["unit"] == "nats a position"
    assert told["metrics"]["agreement_share"]["values"] == "shares of 1"
    assert told["metrics"]["agreement_share"]["better"] == "higher" and "whole rows" in told["intervals"]
