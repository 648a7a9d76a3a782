"""Rows scored again, densely: what the teacher says of the ids a capture kept, and of those it left out.

Straight through the whole head and one log-softmax, not the way the engine goes: a mistake there must not be
made here a second time.

Legend: P = supervised positions of a row, C = positions looked at together, N = ids kept in the whole row,
K = most ids kept at a position, V = real vocabulary ids, D = width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill_assets.foundation.errors import CaptureError
from distill_assets.foundation.language_model import head_rows, hidden_states, real_logits
from distill_assets.foundation.settings import TargetSettings
from distill_assets.teacher_capture.draws import draws_per_position, row_bits
from distill_assets.teacher_capture.redrawing import unexplained_nats
from distill_assets.teacher_capture.sparse_targets import CapturedRow, SparseTargets
from distill_assets.teacher_capture.teacher import Teacher


@dataclass(frozen=True)
class Rescored:
    """`targets`: what is stored with the teacher's figures in place of its own, at the ids that are stored.
    `likeliest_P`, `outside_P`: log-probability of the likeliest id of all, and of those that were not kept (-inf:
    there are none). `draws_M`: how far, in nats, the teacher's log-probabilities would have to be off for each
    draw to be explained.
    """

    targets: SparseTargets
    likeliest_P: NDArray[np.float32]
    outside_P: NDArray[np.float32]
    draws_M: NDArray[np.float64]


@torch.inference_mode()
def rescored_rows(teacher: Teacher, rows: Sequence[CapturedRow], settings: TargetSettings) -> list[Rescored]:
    """The rows, in one forward pass; the head takes the positions of one row at a time."""
    ids_BT = torch.zeros((len(rows), max(len(row.input_ids) for row in rows)), dtype=torch.int64)
    for b, row in enumerate(rows):
        _require_ids(row, teacher.n_real)
        ids_BT[b, : len(row.input_ids)] = torch.from_numpy(row.input_ids.astype(np.int64))
    hidden_BTD = hidden_states(teacher.model, ids_BT.to(teacher.device))
    scored = []
    for b, row in enumerate(rows):
        positions_P = torch.from_numpy(row.targets.positions_P.astype(np.int64)).to(hidden_BTD.device)
        scored.append(_rescored(teacher, row, hidden_BTD[b, positions_P], settings))
    return scored


def _require_ids(row: CapturedRow, n_real: int) -> None:
    """A GPU that is asked for an id it does not have is lost to the whole process."""
    if max(row.input_ids.max(), row.targets.support_ids_N.max()) >= n_real:
        raise CaptureError(
            f"row {row.row} ({row.key}) holds ids of {n_real} and above, which the teacher does not have; "
            "`distill verify` says in which file"
        )


def _rescored(teacher: Teacher, row: CapturedRow, hidden_PD: Tensor, settings: TargetSettings) -> Rescored:
    stored = row.targets
    gold_P = row.input_ids[stored.positions_P + 1].astype(np.int64)
    bits_PS = row_bits(row.key, settings, stored.n_positions)
    parts = []
    rows = head_rows(teacher.model)
    for start in range(0, stored.n_positions, rows):
        part = slice(start, start + rows)
        is_here_P = np.zeros(stored.n_positions, dtype=bool)
        is_here_P[part] = True
        logits_CV = real_logits(teacher.model, hidden_PD[part], teacher.n_real, teacher.unused)
        parts.append(_of_part(logits_CV.log_softmax(-1), stored.at(is_here_P), gold_P[part], bits_PS[part], settings))
    kept_N, tail_P, gold_logprob_P, entropy_P, likeliest_P, outside_P, draws_M = (
        np.concatenate(columns) for columns in zip(*parts, strict=True)
    )
    targets = replace(
        stored,
        support_logprobs_N=kept_N,
        tail_logprob_P=tail_P,
        gold_logprob_P=gold_logprob_P,
        entropy_P=entropy_P,
    )
    return Rescored(targets, likeliest_P, outside_P, draws_M)


def _of_part(
    logprobs_CV: Tensor,
    stored: SparseTargets,
    gold_C: NDArray[np.int64],
    bits_CS: NDArray[np.int32],
    settings: TargetSettings,
) -> tuple[NDArray[Any], ...]:
    """Of C positions: log-probabilities of the kept ids, of the rest, of gold, entropy, log-probability of the
    likeliest id and of the likeliest that was not kept, nats for each draw.
    """
    ids_CK, logprobs_CK = stored.padded(int(stored.kept_P.max()))
    is_kept_CK = ~np.isneginf(logprobs_CK)
    ids_CK = np.where(is_kept_CK, ids_CK, ids_CK[:, :1])  # a slot that is empty repeats the first id
    ids = torch.from_numpy(ids_CK).to(logprobs_CV.device)
    kept_CK = logprobs_CV.gather(1, ids)
    outside_CV = logprobs_CV.scatter(1, ids, -torch.inf)
    gold = torch.from_numpy(gold_C).to(logprobs_CV.device)[:, None]
    figures = (
        outside_CV.logsumexp(-1),
        logprobs_CV.gather(1, gold)[:, 0],
        -torch.linalg.vecdot(logprobs_CV.exp(), logprobs_CV),
        logprobs_CV.amax(-1),
        outside_CV.amax(-1),
    )
    draws_M = np.zeros(0)
    if draws_per_position(settings):
        draws_M = unexplained_nats(logprobs_CV.cpu().numpy(), stored, settings, bits_CS)
    return (kept_CK.cpu().numpy()[is_kept_CK], *(figure.cpu().numpy() for figure in figures), draws_M)
