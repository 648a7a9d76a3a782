"""Held-out figures of every model, with intervals, and what the pictures and the report are made of."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from distill_assets.foundation.errors import TrainingError
from distill_assets.foundation.progress import ProgressListener, ignore_progress
from distill_assets.student_evaluation.bootstrap import INTERVAL
from distill_assets.student_evaluation.calibration import Calibration
from distill_assets.student_evaluation.completions import (
    Completion,
    choose_prompts,
    continue_greedily,
    make_completion,
)
from distill_assets.student_evaluation.dense import DenseTeacher
from distill_assets.student_evaluation.figures import (
    EntropyBin,
    PositionTable,
    Scope,
    entropy_bins,
    kept_ids,
    kept_mass,
)
from distill_assets.student_evaluation.identity import CONTROL, STUDENT, TEACHER, UNTRAINED
from distill_assets.student_evaluation.metrics import BY_KEY, METRICS, Metric
from distill_assets.student_evaluation.per_row import RowSums
from distill_assets.student_evaluation.samples import Sample, choose_samples, make_sample
from distill_assets.student_evaluation.scoring import PositionScores, score_model
from distill_assets.student_model.vocabulary import StudentVocabulary
from distill_assets.teacher_capture.sparse_targets import CapturedRow
from distill_assets.teacher_capture.teacher import Teacher


@dataclass(frozen=True)
class Evaluation:
    """All held-out figures. `kept_mass[j - 1]` is the mean mass of the first j stored ids, of which a position has
    `kept_ids` on average.

    `calibration` is of each model that has one, `per_row` what the figures are sums of.
    """

    overall: Scope
    shards: tuple[Scope, ...]
    entropy_bins: tuple[EntropyBin, ...]
    calibration: Mapping[str, Calibration]
    kept_mass: tuple[float, ...]
    kept_ids: float
    samples: tuple[Sample, ...]
    completions: tuple[Completion, ...]
    per_row: RowSums

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What was measured: with or without the whole distribution of the teacher."""
        return tuple(m for m in METRICS if m.key in self.overall.models[STUDENT])

    @property
    def is_dense(self) -> bool:
        return "dense_kl_nats" in self.overall.models[STUDENT]

    @property
    def kl(self) -> Metric:
        """The KL that decides: over the whole vocabulary where that is known."""
        return BY_KEY["dense_kl_nats" if self.is_dense else "kl_nats"]

    @property
    def rival(self) -> str | None:
        """Whom the student is measured against: the control, else the untrained student."""
        return next((name for name in (CONTROL, UNTRAINED) if name in self.overall.differences), None)

    @property
    def outcome(self) -> Literal["closer", "farther", "undecided"]:
        """Where the paired interval of the KL difference, student - rival, puts the student."""
        sign = self.overall.differences[self.rival][self.kl.key].sign if self.rival else 0
        return "closer" if sign < 0 else "farther" if sign > 0 else "undecided"

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values; metrics say what they mean."""
        told = {
            "metrics": {m.key: m.to_json() for m in self.metrics},
            "intervals": INTERVAL,
            "differences_are": "the student's figure minus that of the model named",
            "outcome": self.outcome,
            "rival": self.rival,
            "decided_by": self.kl.key,
        }
        return told | {name: value for name, value in asdict(self).items() if name != "per_row"}


def evaluate(
    rows_by_shard: Mapping[str, Sequence[CapturedRow]],
    models: Mapping[str, Callable[[], PreTrainedModel]],
    vocabulary: StudentVocabulary,
    *,
    teacher: Callable[[], AbstractContextManager[Teacher]] | None = None,
    end_id: int | None = None,
    on_progress: ProgressListener = ignore_progress,
) -> Evaluation:
    """Score each model on the held-out rows and compare.

    `models` maps names, `student` among them, to loaders; each model is loaded, scored where it
    lies and released before the next. Without `teacher` its figures come from the capture alone.
    With it, its body runs over the rows once and its head stays loaded beside each model, for the
    figures on the whole vocabulary. Completions end at `end_id`. Rows must have been fitted to
    `vocabulary` (student_model.vocabulary); positions where nothing of the teacher's support is left
    say nothing and are not counted. Raises TrainingError when there is nothing held out, and what
    `score_model` raises.
    """
    rows_by_shard = {shard: [_telling(row) for row in rows] for shard, rows in rows_by_shard.items()}
    rows = [row for shard_rows in rows_by_shard.values() for row in shard_rows]
    if not any(row.targets.n_positions for row in rows):
        raise TrainingError(
            "there are no held-out rows to evaluate on; add a shard whose name matches data.heldout in distill.yaml "
            "(heldout.jsonl by default), or name an existing shard there"
        )
    prompts = choose_prompts(rows)
    scores: dict[str, PositionScores] = {}
    written: dict[str, list[tuple[int, ...]]] = {}

    def look_at(name: str, model: PreTrainedModel, dense: DenseTeacher | None) -> None:
        scores[name] = score_model(model, rows, vocabulary, name=name, dense=dense, on_progress=on_progress)
        if name != UNTRAINED:  # nobody reads what it writes
            written[name] = continue_greedily(model, rows, prompts, vocabulary, end_id)

    with ExitStack() as stack:
        dense = None
        if teacher is not None:
            loaded = stack.enter_context(teacher())
            dense = DenseTeacher.of(loaded, rows, vocabulary, on_progress=on_progress)
            look_at(TEACHER, loaded.model, dense)
        for name, load in models.items():
            model = load()
            look_at(name, model, dense)
            del model
            gc.collect()  # before the device's cache is emptied, which gives back only what nothing holds
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    table = PositionTable.of(rows, scores)
    named = [(shard, row) for shard, shard_rows in rows_by_shard.items() for row in shard_rows]
    return Evaluation(
        overall=table.scope("all held-out rows", np.ones(len(rows), dtype=bool)),
        shards=_by_shard(rows_by_shard, table),
        entropy_bins=entropy_bins(table),
        calibration=table.calibration(),
        kept_mass=kept_mass(rows),
        kept_ids=kept_ids(rows),
        samples=_samples(named, table),
        completions=tuple(
            make_completion(*named[prompt.row], prompt, {name: texts[n] for name, texts in written.items()})
            for n, prompt in enumerate(prompts)
        ),
        per_row=RowSums.of(named, table),
    )


def _telling(row: CapturedRow) -> CapturedRow:
    """`row` without positions whose support holds no probability at all."""
    t = row.targets
    stays_P = np.isfinite(t.support_logprobs_N[t.offsets_P1[:-1]])
    if stays_P.all():
        return row
    return replace(row, targets=t.at(stays_P))


def _by_shard(rows_by_shard: Mapping[str, Sequence[CapturedRow]], table: PositionTable) -> tuple[Scope, ...]:
    ends = np.cumsum([len(rows) for rows in rows_by_shard.values()])
    index = np.arange(len(table.rows))
    return tuple(
        table.scope(shard, (index >= end - len(rows)) & (index < end))
        for (shard, rows), end in zip(rows_by_shard.items(), ends, strict=True)
        if any(row.targets.n_positions for row in rows)
    )


def _samples(named: Sequence[tuple[str, CapturedRow]], table: PositionTable) -> tuple[Sample, ...]:
    return tuple(
        make_sample(*named[int(table.row_N[n])], int(table.slot_N[n]), n, table.scores)
        for n in choose_samples(table.entropy_N, table.row_N)
    )
