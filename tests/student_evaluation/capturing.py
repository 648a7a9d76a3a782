"""Captured rows made by hand from a model's dense logits, independent of the capture code."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from distill_assets.teacher_capture.sparse_targets import CapturedRow, SparseTargets


@torch.no_grad()
def dense_logprobs(model: PreTrainedModel, input_ids: np.ndarray, n_real: int) -> np.ndarray:
    """log q [T, V] in float64 by the model's own forward on one unpadded row."""
    logits_TV = model(torch.from_numpy(input_ids.astype(np.int64))[None]).logits[0, :, :n_real]
    return logits_TV.double().log_softmax(-1).numpy()


def capture_row(
    model: PreTrainedModel, input_ids: list[int], positions: list[int], k: int, n_real: int, row: int = 0
) -> CapturedRow:
    """The exact top-k targets of one row, position by position; at odd positions one id fewer is kept."""
    ids = np.array(input_ids, dtype=np.int32)
    logp_TV = dense_logprobs(model, ids, n_real)
    support, values, tails, kept = [], [], [], []
    for t in positions:
        best = np.argsort(-logp_TV[t], kind="stable")[: k - t % 2 if k < n_real else k]
        rest = np.delete(np.exp(logp_TV[t]), best).sum()
        support.append(best)
        values.append(logp_TV[t, best])
        tails.append(np.log(rest) if rest > 0 else -np.inf)
        kept.append(len(best))
    return CapturedRow(
        row=row,
        key=f"key{row}",
        id=None,
        input_ids=ids,
        weight=1.0,
        truncated=False,
        targets=SparseTargets(
            positions_P=np.array(positions, dtype=np.int32),
            offsets_P1=np.concatenate([[0], np.cumsum(kept)]).astype(np.int64),
            support_ids_N=np.concatenate(support).astype(np.int32),
            support_logprobs_N=np.concatenate(values).astype(np.float32),
            tail_logprob_P=np.array(tails, dtype=np.float32),
            gold_logprob_P=np.array([logp_TV[t, ids[t + 1]] for t in positions], dtype=np.float32),
            entropy_P=np.array([-(np.exp(logp_TV[t]) * logp_TV[t]).sum() for t in positions], dtype=np.float32),
        ),
    )


def random_rows(
    model: PreTrainedModel, n: int, k: int, n_real: int, seed: int = 0, lengths: tuple[int, int] = (6, 24)
) -> list[CapturedRow]:
    """Rows of random ids of different lengths, the second half of each supervised."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        length = int(rng.integers(*lengths))
        ids = rng.integers(6, n_real, size=length).tolist()
        rows.append(capture_row(model, ids, list(range(length // 2, length - 1)), k, n_real, row=i))
    return rows
