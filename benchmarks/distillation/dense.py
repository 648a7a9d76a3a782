"""The teacher's whole distributions: what the dense arm learns from, and what all arms are measured against.

Legend: N = positions, V = vocabulary ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill_assets.dataset_shards.encode import row_key
from distill_assets.foundation.files import replacing
from distill_assets.foundation.language_model import hidden_states, real_logits


class DenseTargets:
    """Log-probabilities of every position of some rows, float16 on disk; each token but the last is a position."""

    def __init__(self, path: Path, rows: Sequence[np.ndarray], vocabulary: int) -> None:
        ends = np.cumsum([len(row) - 1 for row in rows])
        self._slices = {key_of(row): slice(end - len(row) + 1, end) for row, end in zip(rows, ends, strict=True)}
        self._logprobs_NV = np.memmap(path, dtype=np.float16, mode="r", shape=(int(ends[-1]), vocabulary))

    def of(self, keys: Sequence[str]) -> Tensor:
        """Log-probabilities [N, V] of these rows, one row after another; exponentiated, each sums to 1."""
        parts = [self._logprobs_NV[self._slices[key]] for key in keys]
        return torch.from_numpy(np.concatenate(parts)).float().log_softmax(-1)


def key_of(row: np.ndarray) -> str:
    """The key of a row whose tokens are all targets but the first."""
    return row_key(row, np.arange(len(row)) > 0)


@torch.inference_mode()
def write_dense(model: PreTrainedModel, rows: Sequence[np.ndarray], path: Path, say: Callable[[str], None]) -> None:
    """One row after another, and whole or not at all."""
    vocabulary = int(model.config.vocab_size)
    with replacing(path) as beside, beside.open("wb") as file:
        for number, row in enumerate(rows):
            ids_1T = torch.from_numpy(row.astype(np.int64))[None]
            logits_NV = real_logits(model, hidden_states(model, ids_1T)[0, :-1], vocabulary)
            file.write(logits_NV.log_softmax(-1).half().numpy().tobytes())
            if number % 500 == 0:
                say(f"dense distributions, row {number} of {len(rows)}")
