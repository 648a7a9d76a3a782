"""A model's body over captured rows, batch after batch.

Legend: B = rows of a batch, T = tokens of a row, N = supervised positions, D = width.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from distill_assets.foundation.language_model import forward_batch_tokens, hidden_states, turning_length
from distill_assets.foundation.progress import Progress, ProgressListener
from distill_assets.teacher_capture.engine import plan_batches
from distill_assets.teacher_capture.sparse_targets import CapturedRow


def batches(
    model: PreTrainedModel, rows: Sequence[CapturedRow], among: Sequence[int], batch_tokens: int | None
) -> list[list[int]]:
    """The rows numbered `among` in batches that suit the model's device, unless `batch_tokens` says otherwise."""
    budget = batch_tokens or forward_batch_tokens(model.device)
    plan = plan_batches([len(rows[i].input_ids) for i in among], budget, turning_length(model))
    return [[among[j] for j in batch] for batch in plan]


def places(rows: Sequence[CapturedRow], batch: Sequence[int]) -> NDArray[np.int64]:
    """The places [N] of a batch's supervised positions among those of all rows."""
    ends = np.cumsum([row.targets.n_positions for row in rows])
    return np.concatenate([np.arange(ends[i] - rows[i].targets.n_positions, ends[i]) for i in batch])


def final_states(
    model: PreTrainedModel,
    rows: Sequence[CapturedRow],
    plan: Sequence[Sequence[int]],
    step: str,
    on_progress: ProgressListener,
) -> Iterator[tuple[Sequence[int], NDArray[np.int64], Tensor]]:
    """(numbers of the batch's rows, index_N, states_ND) of each batch of `plan`, on the model's device.

    `index_N` are the `places` of the batch. Progress is told once whoever asks for the next batch is
    done with this one.
    """
    counts = [row.targets.n_positions for row in rows]
    total = sum(counts[i] for batch in plan for i in batch)
    began, done = time.monotonic(), 0
    for batch in plan:
        chosen = [rows[i] for i in batch]
        ids_BT = torch.zeros((len(chosen), max(len(row.input_ids) for row in chosen)), dtype=torch.int64)
        for b, row in enumerate(chosen):
            ids_BT[b, : len(row.input_ids)] = torch.from_numpy(row.input_ids.astype(np.int64))
        row_N = torch.from_numpy(np.repeat(np.arange(len(chosen)), [counts[i] for i in batch]))
        position_N = torch.from_numpy(np.concatenate([row.targets.positions_P for row in chosen]).astype(np.int64))
        hidden_BTD = hidden_states(model, ids_BT.to(model.device))
        states_ND = hidden_BTD[row_N.to(hidden_BTD.device), position_N.to(hidden_BTD.device)]
        del hidden_BTD
        yield batch, places(rows, batch), states_ND
        done += len(row_N)
        on_progress(Progress(step, done, total, "positions", time.monotonic() - began))
