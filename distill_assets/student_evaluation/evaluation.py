"""Held-out figures of every model, with intervals, and what the pictures and the report are made of."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from distill_assets.foundation.errors import TrainingError
from distill_assets.foundation.progress import ProgressListener, ignore_progress
from distill_assets.student_evaluation.figures import EntropyBin, PositionTable, Scope, entropy_bins, kept_mass
from distill_assets.student_evaluation.metrics import METRICS
from distill_assets.student_evaluation.samples import Sample, choose_samples, make_sample
from distill_assets.student_evaluation.scoring import PositionScores, score_model
from distill_assets.student_model.vocabulary import StudentVocabulary
from distill_assets.teacher_capture.sparse_targets import CapturedRow


@dataclass(frozen=True)
class Evaluation:
    """All held-out figures. `kept_mass[j - 1]` is the mean mass of the first j stored ids."""

    overall: Scope
    shards: tuple[Scope, ...]
    entropy_bins: tuple[EntropyBin, ...]
    kept_mass: tuple[float, ...]
    samples: tuple[Sample, ...]

    @property
    def rival(self) -> str | None:
        """Whom the student is measured against: the control, else the untrained student."""
        return next((name for name in ("control", "untrained") if name in self.overall.differences), None)

    @property
    def outcome(self) -> Literal["closer", "farther", "undecided"]:
        """Where the paired interval of the KL difference, student - rival, puts the student."""
        sign = self.overall.differences[self.rival]["kl"].sign if self.rival else 0
        return "closer" if sign < 0 else "farther" if sign > 0 else "undecided"

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values; metrics say what they mean."""
        meanings = {m.key: {"label": m.label, "unit": m.unit, "meaning": m.meaning} for m in METRICS}
        return {"metrics": meanings, "outcome": self.outcome, "rival": self.rival, **asdict(self)}


def evaluate(
    rows_by_shard: Mapping[str, Sequence[CapturedRow]],
    models: Mapping[str, Callable[[], PreTrainedModel]],
    vocabulary: StudentVocabulary,
    *,
    on_progress: ProgressListener = ignore_progress,
) -> Evaluation:
    """Score each model on the held-out rows and compare.

    `models` maps names, `student` among them, to loaders; each model is loaded, scored where it
    lies and released before the next. The teacher's figures come from the capture alone. Rows must
    have been fitted to `vocabulary` (student_model.vocabulary); positions where nothing of the
    teacher's support is left say nothing and are not counted. Raises TrainingError when there is
    nothing held out, and what `score_model` raises.
    """
    rows_by_shard = {shard: [_telling(row) for row in rows] for shard, rows in rows_by_shard.items()}
    rows = [row for shard_rows in rows_by_shard.values() for row in shard_rows]
    if not any(row.targets.n_positions for row in rows):
        raise TrainingError(
            "there are no held-out rows to evaluate on; add a shard whose name matches data.heldout in distill.yaml "
            "(heldout.jsonl by default), or name an existing shard there"
        )
    scores = {name: _load_and_score(load, rows, vocabulary, name, on_progress) for name, load in models.items()}
    table = PositionTable.of(rows, scores)
    return Evaluation(
        overall=table.scope("all held-out rows", np.ones(len(rows), dtype=bool)),
        shards=_by_shard(rows_by_shard, table),
        entropy_bins=entropy_bins(table),
        kept_mass=kept_mass(rows),
        samples=_samples(rows_by_shard, table),
    )


def _telling(row: CapturedRow) -> CapturedRow:
    """`row` without positions whose support holds no probability at all."""
    t = row.targets
    stays_P = np.isfinite(t.support_logprobs_N[t.offsets_P1[:-1]])
    if stays_P.all():
        return row
    return replace(row, targets=t.at(stays_P))


def _load_and_score(
    load: Callable[[], PreTrainedModel],
    rows: Sequence[CapturedRow],
    vocabulary: StudentVocabulary,
    name: str,
    on_progress: ProgressListener,
) -> PositionScores:
    model = load()
    scores = score_model(model, rows, vocabulary, name=name, on_progress=on_progress)
    del model
    gc.collect()  # before the device's cache is emptied, which gives back only what nothing holds
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return scores


def _by_shard(rows_by_shard: Mapping[str, Sequence[CapturedRow]], table: PositionTable) -> tuple[Scope, ...]:
    ends = np.cumsum([len(rows) for rows in rows_by_shard.values()])
    index = np.arange(table.n_rows)
    return tuple(
        table.scope(shard, (index >= end - len(rows)) & (index < end))
        for (shard, rows), end in zip(rows_by_shard.items(), ends, strict=True)
        if any(row.targets.n_positions for row in rows)
    )


def _samples(rows_by_shard: Mapping[str, Sequence[CapturedRow]], table: PositionTable) -> tuple[Sample, ...]:
    named = [(shard, row) for shard, rows in rows_by_shard.items() for row in rows]
    return tuple(
        make_sample(*named[int(table.row_N[n])], int(table.slot_N[n]), n, table.scores)
        for n in choose_samples(table.entropy_N, table.row_N)
    )
