"""Rows in, sparse targets out: length-sorted batches through the teacher, head only where needed.

Legend: B = batch, T = tokens of a row, D = width, N = supervised positions of a batch,
K = most ids kept, S = draws at a position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from distill_assets.dataset_shards.encode import EncodedRow
from distill_assets.foundation.errors import CaptureError
from distill_assets.foundation.language_model import HEAD_ROWS, hidden_states, real_logits
from distill_assets.foundation.settings import TargetSettings
from distill_assets.teacher_capture.draws import row_bits
from distill_assets.teacher_capture.sparse_targets import SparseTargets
from distill_assets.teacher_capture.teacher import ScoredPositions, Teacher, sparsify


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Row indices in batches of at most `batch_tokens` padded tokens, longest rows first.

    Sorting by length leaves little padding, and an out-of-memory shows in the first batch. A row
    longer than the budget is a batch of its own. The plan depends on the lengths alone.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for index in order:
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def supervised_positions(row: EncodedRow) -> np.ndarray:
    """Positions t whose next token is a target: `loss_mask[t + 1]`; int32, ascending."""
    return np.flatnonzero(row.loss_mask[1:]).astype(np.int32)


def score_rows(
    teacher: Teacher, rows: Sequence[EncodedRow], targets: TargetSettings, batch_tokens: int
) -> Iterator[tuple[int, SparseTargets]]:
    """Yield (index, targets) for every row, batch by batch, not in order.

    Raises CaptureError, naming row and position, when the teacher's logits are not finite.
    """
    for batch in plan_batches([len(row.input_ids) for row in rows], batch_tokens):
        yield from zip(batch, _score_batch(teacher, [rows[i] for i in batch], targets), strict=True)


@torch.inference_mode()
def _score_batch(teacher: Teacher, rows: Sequence[EncodedRow], targets: TargetSettings) -> list[SparseTargets]:
    longest = max(len(row.input_ids) for row in rows)
    ids_BT = torch.zeros((len(rows), longest), dtype=torch.int64)
    for b, row in enumerate(rows):
        ids_BT[b, : len(row.input_ids)] = torch.from_numpy(row.input_ids.astype(np.int64))
    positions = [supervised_positions(row) for row in rows]
    row_N = torch.from_numpy(np.repeat(np.arange(len(rows)), [len(p) for p in positions]))
    position_N = torch.from_numpy(np.concatenate(positions).astype(np.int64))
    gold_N = ids_BT[row_N, position_N + 1].to(teacher.device)
    bits = [row_bits(row.key, targets, len(p)) for row, p in zip(rows, positions, strict=True)]
    bits_NS = torch.from_numpy(np.concatenate(bits)).to(teacher.device)

    hidden_BTD = hidden_states(teacher.model, ids_BT.to(teacher.device))
    hidden_ND = hidden_BTD[row_N.to(teacher.device), position_N.to(teacher.device)]
    del hidden_BTD
    scored = [
        sparsify(
            real_logits(teacher.model, hidden_ND[start : start + HEAD_ROWS], teacher.n_real, teacher.unused),
            gold_N[start : start + HEAD_ROWS],
            targets,
            bits_NS[start : start + HEAD_ROWS],
        )
        for start in range(0, len(hidden_ND), HEAD_ROWS)
    ]
    return _to_rows(scored, rows, positions)


def _to_rows(
    scored: Sequence[ScoredPositions], rows: Sequence[EncodedRow], positions: Sequence[np.ndarray]
) -> list[SparseTargets]:
    def host(name: str) -> np.ndarray:
        array: np.ndarray = torch.cat([getattr(part, name) for part in scored]).cpu().numpy()
        return array

    ids_NK, logprobs_NK, keep_NK = host("ids_NK"), host("logprobs_NK"), host("keep_NK")
    tail_N, gold_N, entropy_N = host("tail_logprob_N"), host("gold_logprob_N"), host("entropy_N")
    weights_NK = None if scored[0].weights_NK is None else host("weights_NK")
    tail_ids_NS = None if scored[0].tail_sample_ids_NS is None else host("tail_sample_ids_NS").astype(np.int32)
    out: list[SparseTargets] = []
    start = 0
    for row, positions_P in zip(rows, positions, strict=True):
        part = slice(start, start + len(positions_P))
        start = part.stop
        bad = ~np.isfinite(entropy_N[part]) | ~np.isfinite(logprobs_NK[part]).all(-1) | ~np.isfinite(gold_N[part])
        if bad.any():
            raise CaptureError(
                f"the teacher's logits are not finite at position {positions_P[bad.argmax()]} of the row with key "
                f"{row.key}; try dtype float32, or look for damaged weights"
            )
        kept_PK = keep_NK[part]
        out.append(
            SparseTargets(
                positions_P=positions_P,
                offsets_P1=np.concatenate([[0], kept_PK.sum(-1).cumsum()]).astype(np.int64),
                support_ids_N=ids_NK[part][kept_PK].astype(np.int32),
                support_logprobs_N=logprobs_NK[part][kept_PK],
                tail_logprob_P=tail_N[part],
                gold_logprob_P=gold_N[part],
                entropy_P=entropy_N[part],
                weights_N=None if weights_NK is None else weights_NK[part][kept_PK],
                tail_sample_ids_PS=None if tail_ids_NS is None else tail_ids_NS[part],
            )
        )
    return out
