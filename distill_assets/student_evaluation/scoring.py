"""What a model makes of captured rows, position by position.

Legend: B = rows of a batch, T = tokens of a row, N = supervised positions, D = width,
V = real vocabulary ids, K = most ids kept at a position.

Position t of a row predicts input_ids[t + 1], from hidden state t.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from distill_assets.foundation.errors import IncompatibleTokenizers, TrainingError
from distill_assets.foundation.language_model import (
    forward_batch_tokens,
    head_rows,
    head_width,
    hidden_states,
    real_logits,
)
from distill_assets.foundation.progress import Progress, ProgressListener, ignore_progress
from distill_assets.student_evaluation.metrics import compare_outcomes
from distill_assets.student_model.vocabulary import StudentVocabulary
from distill_assets.teacher_capture.engine import plan_batches
from distill_assets.teacher_capture.sparse_targets import CapturedRow

SHOWN = 5  # likeliest ids remembered at each position


@dataclass(frozen=True)
class PositionScores:
    """One model at every supervised position, in the order of the rows given.

    `nll_N` is -log q(next token), `kl_N` KL(teacher || model) on the K + 1 outcomes, both in nats;
    `acceptance_N` a probability. `top_ids_NS` and `top_probabilities_NS` are the model's likeliest
    ids, likeliest first.
    """

    nll_N: NDArray[np.float64]
    kl_N: NDArray[np.float64]
    agrees_N: NDArray[np.bool_]
    acceptance_N: NDArray[np.float64]
    top_ids_NS: NDArray[np.int64]
    top_probabilities_NS: NDArray[np.float32]


@dataclass(frozen=True)
class _Batch:
    """Rows packed for the model; targets normalised, `ids_NK` padded with the position's first id."""

    ids_BT: Tensor
    row_N: Tensor
    position_N: Tensor
    gold_N: Tensor
    ids_NK: Tensor
    logprobs_NK: NDArray[np.float32]
    tail_logprob_N: NDArray[np.float32]


@torch.inference_mode()
def score_model(
    model: PreTrainedModel,
    rows: Sequence[CapturedRow],
    vocabulary: StudentVocabulary,
    *,
    name: str = "model",
    batch_tokens: int | None = None,
    on_progress: ProgressListener = ignore_progress,
) -> PositionScores:
    """Score `model`, where it lies and in evaluation mode, on every supervised position of `rows`.

    Rows must have been fitted to `vocabulary` (student_model.vocabulary). Raises
    IncompatibleTokenizers when one holds an id outside it or the head is too narrow,
    TrainingError when the model's figures are not finite.
    """
    _require_vocabulary(model, rows, vocabulary, name)
    model.eval()
    unused = torch.tensor(vocabulary.unused, dtype=torch.int64, device=model.device)
    counts = [row.targets.n_positions for row in rows]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    parts: list[PositionScores] = []
    order: list[NDArray[np.int64]] = []
    began, done = time.monotonic(), 0
    for chosen in plan_batches(
        [len(row.input_ids) for row in rows], batch_tokens or forward_batch_tokens(model.device)
    ):
        batch_rows = [rows[i] for i in chosen]
        parts.append(_score_batch(model, _pack(batch_rows), vocabulary.n_real, unused))
        _require_finite(parts[-1], batch_rows, name)
        order += [np.arange(offsets[i], offsets[i + 1]) for i in chosen]
        done += sum(counts[i] for i in chosen)
        on_progress(Progress(f"evaluate {name}", done, int(offsets[-1]), "positions", time.monotonic() - began))
    return _joined(parts, np.argsort(np.concatenate(order)))


def _joined(parts: Sequence[PositionScores], order: NDArray[np.int64] | None = None) -> PositionScores:
    names = [field.name for field in fields(PositionScores)]
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return PositionScores(**{name: values if order is None else values[order] for name, values in joined.items()})


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


def _pack(rows: Sequence[CapturedRow]) -> _Batch:
    ids_BT = torch.zeros((len(rows), max(len(row.input_ids) for row in rows)), dtype=torch.int64)
    for b, row in enumerate(rows):
        ids_BT[b, : len(row.input_ids)] = torch.from_numpy(row.input_ids.astype(np.int64))
    targets = [row.targets.normalized() for row in rows]
    row_N = torch.from_numpy(np.repeat(np.arange(len(rows)), [t.n_positions for t in targets]))
    position_N = torch.from_numpy(np.concatenate([t.positions_P for t in targets]).astype(np.int64))
    k = max(int(t.kept_P.max(initial=1)) for t in targets)
    padded = [t.padded(k) for t in targets]
    ids_NK, logprobs_NK = (np.concatenate(arrays) for arrays in zip(*padded, strict=True))
    return _Batch(
        ids_BT=ids_BT,
        row_N=row_N,
        position_N=position_N,
        gold_N=ids_BT[row_N, position_N + 1],
        # an empty slot repeats the first id, so that marking the ids marks nothing else
        ids_NK=torch.from_numpy(np.where(np.isneginf(logprobs_NK), ids_NK[:, :1], ids_NK)),
        logprobs_NK=logprobs_NK,
        tail_logprob_N=np.concatenate([t.tail_logprob_P for t in targets]),
    )


def _score_batch(model: PreTrainedModel, batch: _Batch, n_real: int, unused: Tensor) -> PositionScores:
    device = model.device
    hidden_BTD = hidden_states(model, batch.ids_BT.to(device))
    hidden_ND = hidden_BTD[batch.row_N.to(device), batch.position_N.to(device)]
    del hidden_BTD
    parts: list[PositionScores] = []
    chunk_rows = head_rows(model)
    for start in range(0, max(len(hidden_ND), 1), chunk_rows):
        part = slice(start, start + chunk_rows)
        logits_NV = real_logits(model, hidden_ND[part], n_real, unused)
        ids_NK = batch.ids_NK[part].to(device)
        log_total_N1 = logits_NV.logsumexp(-1, keepdim=True)
        top_NS, top_ids_NS = logits_NV.topk(min(SHOWN, n_real), dim=-1)
        nll_N = (log_total_N1 - logits_NV.gather(1, batch.gold_N[part, None].to(device)))[:, 0]
        model_NK = logits_NV.gather(1, ids_NK) - log_total_N1
        # the tail is summed over the ids that are left: 1 - sum would lose a small one to rounding
        model_tail_N = logits_NV.scatter_(1, ids_NK, -torch.inf).logsumexp(-1) - log_total_N1[:, 0]
        kl_N, acceptance_N = compare_outcomes(
            batch.logprobs_NK[part], batch.tail_logprob_N[part], model_NK.cpu().numpy(), model_tail_N.cpu().numpy()
        )
        parts.append(
            PositionScores(
                nll_N=nll_N.cpu().numpy().astype(np.float64),
                kl_N=kl_N,
                agrees_N=(top_ids_NS[:, 0] == ids_NK[:, 0]).cpu().numpy(),
                acceptance_N=acceptance_N,
                top_ids_NS=top_ids_NS.cpu().numpy(),
                top_probabilities_NS=(top_NS - log_total_N1).exp().cpu().numpy(),
            )
        )
    return _joined(parts)
