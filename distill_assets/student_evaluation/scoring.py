"""What a model makes of captured rows, position by position.

Legend: N = supervised positions, D = width, V = real vocabulary ids, K = most ids kept at a
position, S = likeliest ids remembered, H = temperatures tried.

Position t of a row predicts input_ids[t + 1], from hidden state t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from distill_assets.foundation.errors import IncompatibleTokenizers, TrainingError
from distill_assets.foundation.language_model import head_device, head_rows, head_width, real_logits
from distill_assets.foundation.progress import ProgressListener, ignore_progress
from distill_assets.student_evaluation.calibration import (
    TEMPERATURES,
    fit_temperature,
    is_fitted_on,
    nll_by_temperature,
)
from distill_assets.student_evaluation.dense import DenseTeacher
from distill_assets.student_evaluation.metrics import compare_dense, compare_outcomes
from distill_assets.student_evaluation.packing import batches, final_states
from distill_assets.student_model.vocabulary import StudentVocabulary
from distill_assets.teacher_capture.sparse_targets import CapturedRow

SHOWN = 5  # likeliest ids remembered at each position


@dataclass(frozen=True)
class PositionScores:
    """One model at every supervised position, in the order of the rows given.

    `nll_N` is -log q(next token), `kl_N` KL(teacher || model) on the K + 1 outcomes, both in nats;
    `acceptance_N` a probability. `top_ids_NS` and `top_probabilities_NS` are the model's likeliest
    ids, likeliest first; `right_N` says where the first of them came next. `tempered_N` is the
    first one's probability once the logits are divided by `temperature`, NaN at the positions that
    was fitted on (and everywhere where there are none of those). What begins with `dense` compares
    whole distributions, KLs in nats, the rest probabilities; None where no
    teacher was given, and of the teacher itself.
    """

    nll_N: NDArray[np.float64]
    kl_N: NDArray[np.float64]
    agrees_N: NDArray[np.bool_]
    acceptance_N: NDArray[np.float64]
    top_ids_NS: NDArray[np.int64]
    top_probabilities_NS: NDArray[np.float32]
    right_N: NDArray[np.bool_]
    tempered_N: NDArray[np.float64]
    dense_kl_N: NDArray[np.float64] | None
    dense_reverse_kl_N: NDArray[np.float64] | None
    dense_top5_N: NDArray[np.float64] | None
    dense_acceptance_N: NDArray[np.float64] | None
    temperature: float


@dataclass(frozen=True)
class _Outcomes:
    """Normalised targets of N positions; `ids_NK` is padded with the position's first id."""

    gold_N: Tensor
    ids_NK: Tensor
    logprobs_NK: NDArray[np.float32]
    tail_logprob_N: NDArray[np.float32]

    def at(self, part: slice) -> _Outcomes:
        return _Outcomes(self.gold_N[part], self.ids_NK[part], self.logprobs_NK[part], self.tail_logprob_N[part])


@torch.inference_mode()
def score_model(
    model: PreTrainedModel,
    rows: Sequence[CapturedRow],
    vocabulary: StudentVocabulary,
    *,
    name: str = "model",
    dense: DenseTeacher | None = None,
    batch_tokens: int | None = None,
    on_progress: ProgressListener = ignore_progress,
) -> PositionScores:
    """Score `model`, where it lies and in evaluation mode, on every supervised position of `rows`.

    Rows must have been fitted to `vocabulary` (student_model.vocabulary), and `dense` made of these
    rows. Rows on which the temperature is fitted come first. Raises IncompatibleTokenizers when a
    row holds an id outside the vocabulary or the head is too narrow, TrainingError when the model's
    figures are not finite.
    """
    _require_vocabulary(model, rows, vocabulary, name)
    model.eval()
    device = head_device(model)
    unused = torch.tensor(vocabulary.unused, dtype=torch.int64, device=device)
    halves = [[i for i, row in enumerate(rows) if is_fitted_on(row.key) is fitted] for fitted in (True, False)]
    plans = [batches(model, rows, half, batch_tokens) for half in halves]
    n_fitting = len(plans[0])
    nll_H = np.zeros(len(TEMPERATURES))
    temperature = math.nan
    parts: list[PositionScores] = []
    order: list[NDArray[np.int64]] = []
    plan = [batch for half in plans for batch in half]
    if is_teacher := dense is not None and model is dense.teacher.model:  # its body has run
        passes = dense.final_states(rows, plan)
    else:
        passes = final_states(model, rows, plan, f"evaluate {name}", on_progress)
    for number, (batch, index_N, states_ND) in enumerate(passes):
        if number == n_fitting > 0:
            temperature = fit_temperature(nll_H)
        batch_rows = [rows[i] for i in batch]
        outcomes = _outcomes(batch_rows)
        scored: list[PositionScores] = []
        chunk_rows = head_rows(model)
        for start in range(0, max(len(index_N), 1), chunk_rows):
            part = slice(start, start + chunk_rows)
            logits_NV = real_logits(model, states_ND[part], vocabulary.n_real, unused)
            if number < n_fitting:
                nll_H += nll_by_temperature(logits_NV, outcomes.gold_N[part].to(device))
            teacher_NV = None if dense is None or is_teacher else dense.logprobs(index_N[part], device)
            scored.append(_score(logits_NV, outcomes.at(part), teacher_NV, temperature))
        _require_finite(_joined(scored), batch_rows, name)
        parts += scored
        order.append(index_N)
    return replace(_joined(parts, np.argsort(np.concatenate(order))), temperature=temperature)


def _joined(parts: Sequence[PositionScores], order: NDArray[np.int64] | None = None) -> PositionScores:
    def column(name: str) -> NDArray[Any] | None:
        if getattr(parts[0], name) is None:
            return None
        values = np.concatenate([getattr(part, name) for part in parts])
        return values if order is None else values[order]

    names = [field.name for field in fields(PositionScores) if field.name != "temperature"]
    columns: dict[str, Any] = {name: column(name) for name in names}
    return PositionScores(**columns, temperature=parts[-1].temperature)


def _require_vocabulary(
    model: PreTrainedModel, rows: Sequence[CapturedRow], vocabulary: StudentVocabulary, name: str
) -> None:
    embeddings: Any = model.get_input_embeddings()
    n_embeddings = len(embeddings.weight)
    if head_width(model) < vocabulary.n_real:
        raise IncompatibleTokenizers(
            f"{name} has a head of {head_width(model)} ids, its vocabulary {vocabulary.n_real}; "
            "`distill check` compares it with the teacher's"
        )
    for row in rows:
        outcomes = np.concatenate([row.targets.support_ids_N, row.input_ids[row.targets.positions_P + 1]])
        strange = [*outcomes[~vocabulary.has(outcomes)], *row.input_ids[row.input_ids >= n_embeddings]]
        if strange:
            raise IncompatibleTokenizers(
                f"the captured row with key {row.key} holds id {strange[0]}, which {name} does not have; "
                "`distill check` compares the tokenizers"
            )


def _require_finite(scores: PositionScores, rows: Sequence[CapturedRow], name: str) -> None:
    bad_N = ~(np.isfinite(scores.nll_N) & np.isfinite(scores.kl_N) & np.isfinite(scores.acceptance_N))
    if bad_N.any():
        ends = np.cumsum([row.targets.n_positions for row in rows])
        key = rows[int(np.searchsorted(ends, bad_N.argmax(), side="right"))].key
        raise TrainingError(
            f"{name} gives figures that are not finite in the held-out row with key {key}; "
            "train it again, with a lower learning rate if its loss grew"
        )


def _outcomes(rows: Sequence[CapturedRow]) -> _Outcomes:
    targets = [row.targets.normalized() for row in rows]
    k = max(int(t.kept_P.max(initial=1)) for t in targets)
    padded = [t.padded(k) for t in targets]
    ids_NK, logprobs_NK = (np.concatenate(arrays) for arrays in zip(*padded, strict=True))
    gold = [row.input_ids[row.targets.positions_P + 1] for row in rows]
    return _Outcomes(
        gold_N=torch.from_numpy(np.concatenate(gold).astype(np.int64)),
        # an empty slot repeats the first id, so that marking the ids marks nothing else
        ids_NK=torch.from_numpy(np.where(np.isneginf(logprobs_NK), ids_NK[:, :1], ids_NK)),
        logprobs_NK=logprobs_NK,
        tail_logprob_N=np.concatenate([t.tail_logprob_P for t in targets]),
    )


def _score(logits_NV: Tensor, outcomes: _Outcomes, teacher_NV: Tensor | None, temperature: float) -> PositionScores:
    """Scores of a chunk of positions; `logits_NV` and `teacher_NV` are used up."""
    ids_NK, gold_N = outcomes.ids_NK.to(logits_NV.device), outcomes.gold_N.to(logits_NV.device)
    log_total_N1 = logits_NV.logsumexp(-1, keepdim=True)
    top_NS, top_ids_NS = logits_NV.topk(min(SHOWN, logits_NV.shape[1]), dim=-1)
    nll_N = (log_total_N1 - logits_NV.gather(1, gold_N[:, None]))[:, 0]
    model_NK = logits_NV.gather(1, ids_NK) - log_total_N1
    tempered_N = torch.full_like(nll_N, torch.nan)
    if not math.isnan(temperature):
        tempered_N = (top_NS[:, 0] / temperature - (logits_NV / temperature).logsumexp(-1)).exp()
    kl = reverse_kl = top5 = acceptance = None
    if teacher_NV is not None:
        teacher_top_NS = teacher_NV.topk(top_ids_NS.shape[1], dim=-1).indices
        shared_N = (teacher_top_NS[:, :, None] == top_ids_NS[:, None, :]).any(-1).float().mean(-1)
        found = (*compare_dense(teacher_NV, logits_NV - log_total_N1), shared_N)
        kl, reverse_kl, acceptance, top5 = (_on_host(values_N) for values_N in found)
    # the tail is summed over the ids that are left: 1 - sum would lose a small one to rounding
    model_tail_N = logits_NV.scatter_(1, ids_NK, -torch.inf).logsumexp(-1) - log_total_N1[:, 0]
    kl_N, acceptance_N = compare_outcomes(
        outcomes.logprobs_NK, outcomes.tail_logprob_N, model_NK.cpu().numpy(), model_tail_N.cpu().numpy()
    )
    return PositionScores(
        nll_N=_on_host(nll_N),
        kl_N=kl_N,
        agrees_N=(top_ids_NS[:, 0] == ids_NK[:, 0]).cpu().numpy(),
        acceptance_N=acceptance_N,
        top_ids_NS=top_ids_NS.cpu().numpy(),
        top_probabilities_NS=(top_NS - log_total_N1).exp().cpu().numpy(),
        right_N=(top_ids_NS[:, 0] == gold_N).cpu().numpy(),
        tempered_N=_on_host(tempered_N),
        dense_kl_N=kl,
        dense_reverse_kl_N=reverse_kl,
        dense_top5_N=top5,
        dense_acceptance_N=acceptance,
        temperature=temperature,
    )


def _on_host(values_N: Tensor) -> NDArray[np.float64]:
    return values_N.cpu().numpy().astype(np.float64)
