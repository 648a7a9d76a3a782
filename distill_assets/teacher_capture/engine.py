"""Rows in, sparse targets out: length-sorted batches through the teacher, head only where needed.

Legend: B = batch, T = tokens of a row, D = width, N = supervised positions of a batch,
K = most ids kept, S = draws at a position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from distill_assets.dataset_shards.encode import EncodedRow, supervised_positions
from distill_assets.foundation.devices import free_memory, is_out_of_memory, sent
from distill_assets.foundation.errors import CaptureError, OutOfMemory
from distill_assets.foundation.language_model import (
    head_device,
    head_rows,
    hidden_states,
    is_plain,
    turning_length,
)
from distill_assets.foundation.settings import TargetSettings
from distill_assets.teacher_capture.drawn_targets import drawn_targets
from distill_assets.teacher_capture.draws import draws_per_position, row_bits
from distill_assets.teacher_capture.sparse_targets import SparseTargets
from distill_assets.teacher_capture.teacher import ScoredPositions, Teacher
from distill_assets.teacher_capture.top_k import MOST_ROWS, top_k_targets

_Work = TypeVar("_Work")


def plan_batches(lengths: Sequence[int], batch_tokens: int, apart_at: float = math.inf) -> list[list[int]]:
    """Row indices in batches of at most `batch_tokens` padded tokens, longest rows first.

    Of all ways to cut the rows, sorted by length, into batches, the one that costs least: padded tokens,
    and 1/32 of the budget for each forward pass (measured on a CPU: 37 tokens with passes of 1,024). Longest
    first, because an out-of-memory then shows in the first batch. A row longer than the budget is a batch
    of its own. No batch has both rows of more than `apart_at` tokens and others. The plan depends on the lengths alone.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    length_R = np.array([lengths[i] for i in order], dtype=np.int64)
    cost_R1 = np.zeros(len(order) + 1)  # least cost of the first r rows
    first_R1 = np.zeros(len(order) + 1, dtype=np.int64)  # where their last batch begins
    for stop in range(1, len(order) + 1):
        # A batch is as wide as its first row: one that begins at least so near fits.
        starts = np.arange(max(0, stop - max(1, batch_tokens // length_R[stop - 1])), stop)
        padded = length_R[starts] * (stop - starts)
        costs = cost_R1[starts] + padded + batch_tokens / 32
        costs[(padded > batch_tokens) & (stop - starts > 1)] = np.inf
        costs[(length_R[starts] > apart_at) & (length_R[stop - 1] <= apart_at)] = np.inf
        best = int(costs.argmin())
        cost_R1[stop], first_R1[stop] = costs[best], starts[best]
    batches: list[list[int]] = []
    stop = len(order)
    while stop:
        batches.append(order[first_R1[stop] : stop])
        stop = int(first_R1[stop])
    return batches[::-1]


def score_rows(
    teacher: Teacher, rows: Sequence[EncodedRow], targets: TargetSettings, batch_tokens: int
) -> Iterator[tuple[int, SparseTargets]]:
    """Yield (index, targets) for every row, batch by batch, not in order.

    One batch ahead: while a GPU computes a batch, the one before is copied to the host and unpacked.
    Raises CaptureError, naming row and position, when the teacher's logits are not finite; OutOfMemory
    when a batch does not fit.
    """
    ahead: _Launched | None = None
    for batch in plan_batches([len(row.input_ids) for row in rows], batch_tokens, turning_length(teacher.model)):
        here = [rows[i] for i in batch]
        launched = _within_memory(teacher, here, partial(_run_batch, teacher, batch, here, targets))
        if ahead is not None:
            yield from _within_memory(teacher, ahead.rows, ahead.collect)
        ahead = launched
    if ahead is not None:
        yield from _within_memory(teacher, ahead.rows, ahead.collect)


@dataclass(frozen=True)
class _Launched:
    """A batch whose figures are on their way to the host; `copied` fires when they are there."""

    indices: Sequence[int]
    rows: Sequence[EncodedRow]
    positions: Sequence[np.ndarray]
    columns: Mapping[str, Tensor]
    copied: torch.cuda.Event | None

    def collect(self) -> list[tuple[int, SparseTargets]]:
        if self.copied is not None:
            self.copied.synchronize()
        return list(zip(self.indices, _to_rows(self.columns, self.rows, self.positions), strict=True))


def _within_memory(teacher: Teacher, rows: Sequence[EncodedRow], work: Callable[[], _Work]) -> _Work:
    """What `work` on a batch of these rows gives; OutOfMemory when the device, or the host, has no room for it."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Outside the except block: the error's traceback holds on to every tensor of the batch.
    free_memory()
    longest = max(len(row.input_ids) for row in rows)
    raise OutOfMemory(
        f"{teacher.device} has no memory left for a forward pass of {len(rows)} x {longest} tokens; "
        "lower data.max_length, or use a device with more",
        len(rows),
    )


@torch.inference_mode()
def _run_batch(
    teacher: Teacher, indices: Sequence[int], rows: Sequence[EncodedRow], targets: TargetSettings
) -> _Launched:
    longest = max(len(row.input_ids) for row in rows)
    ids_BT = torch.zeros((len(rows), longest), dtype=torch.int64)
    for b, row in enumerate(rows):
        ids_BT[b, : len(row.input_ids)] = torch.from_numpy(row.input_ids.astype(np.int64))
    positions = [supervised_positions(row) for row in rows]
    row_N = torch.from_numpy(np.repeat(np.arange(len(rows)), [len(p) for p in positions]))
    position_N = torch.from_numpy(np.concatenate(positions).astype(np.int64))
    bits_NS: Tensor | None = None
    if draws_per_position(targets):
        bits = [row_bits(row.key, targets, len(row_P)) for row, row_P in zip(rows, positions, strict=True)]
        bits_NS = torch.from_numpy(np.concatenate(bits))

    # All that the head needs is sent before the body runs: from there on the host only asks, and can unpack the batch
    # before while a GPU computes.
    device = head_device(teacher.model)
    gold_N = sent(ids_BT[row_N, position_N + 1], device)
    row_N, position_N = sent(row_N, device), sent(position_N, device)
    bits_NS = None if bits_NS is None else sent(bits_NS, device)
    hidden_BTD = hidden_states(teacher.model, sent(ids_BT, teacher.device))
    there = hidden_BTD.device  # another one where the layers are spread over several
    hidden_ND = hidden_BTD[row_N.to(there), position_N.to(there)].to(device)
    del hidden_BTD
    parts: list[ScoredPositions]
    if bits_NS is not None:
        parts = list(drawn_targets(teacher, hidden_ND, gold_N, targets, bits_NS))
    else:
        # A head that comes in one block is bounded by the rows it is asked for.
        most = MOST_ROWS if is_plain(teacher.model.get_output_embeddings()) else head_rows(teacher.model)
        parts = [
            top_k_targets(teacher, hidden_CD, gold_C, targets)
            for hidden_CD, gold_C in zip(hidden_ND.split(most), gold_N.split(most), strict=True)
        ]
    names = [field.name for field in fields(ScoredPositions) if getattr(parts[0], field.name) is not None]
    columns = {name: _to_host(torch.cat([getattr(part, name) for part in parts])) for name in names}
    copied = None
    if device.type == "cuda":
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(device))
    return _Launched(indices, rows, positions, columns, copied)


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory that is under way, where the device can; else a finished one."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _to_rows(
    columns: Mapping[str, Tensor], rows: Sequence[EncodedRow], positions: Sequence[np.ndarray]
) -> list[SparseTargets]:
    host = {name: column.numpy() for name, column in columns.items()}
    ids_NK, logprobs_NK, keep_NK = host["ids_NK"], host["logprobs_NK"], host["keep_NK"]
    tail_N, gold_N, entropy_N = host["tail_logprob_N"], host["gold_logprob_N"], host["entropy_N"]
    weights_NK, tail_ids_NS = host.get("weights_NK"), host.get("tail_sample_ids_NS")
    out: list[SparseTargets] = []
    start = 0
    for row, positions_P in zip(rows, positions, strict=True):
        part = slice(start, start + len(positions_P))
        start = part.stop
        bad = ~np.isfinite(entropy_N[part]) | ~np.isfinite(logprobs_NK[part]).all(-1) | ~np.isfinite(gold_N[part])
        if bad.any():
            position = positions_P[bad.argmax()]
            raise CaptureError(
                f"the teacher's logits are not finite at position {position} of the row in line {row.line} "
                f"(key {row.key}); try dtype float32, or look for damaged weights"
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
                tail_sample_ids_PS=None if tail_ids_NS is None else tail_ids_NS[part].astype(np.int32),
            )
        )
    return out
