"""Which rows make an optimiser step, and how they become tensors.

Legend: R = rows, B = rows of a tensor, T = tokens of one, M = tokens of all rows, N = supervised positions of all
rows in row order, K = most ids kept at one of them, S = most tail samples.

The plan depends on the rows alone, never on device or number of processes: one planned batch is
one optimiser step, and several processes share it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from distill_assets.foundation.errors import TrainingError
from distill_assets.teacher_capture.sparse_targets import CapturedRow, SparseDistributions, SparseTargets

IGNORED = -100  # label of a position that is not supervised; the value transformers counts around
_WINDOW = 64  # batches' worth of shuffled rows sorted by length together: little padding, still mixed


def plan_batches(
    lengths: Sequence[int],
    batch_tokens: int,
    epochs: int,
    seed: int,
    rows_of: Callable[[int], Sequence[int]] | None = None,
) -> list[list[int]]:
    """Row indices of every optimiser step of all epochs: those that `rows_of` gives for an epoch (from 0), else each
    row once an epoch.

    Padded tokens (rows x longest) are at most `batch_tokens`; a longer row is a batch of its own.
    Rows are shuffled, sorted by length inside a window, packed, and the batches shuffled.
    """
    rows = [range(len(lengths)) if rows_of is None else rows_of(epoch) for epoch in range(epochs)]
    planned = [_plan_epoch(rows[epoch], lengths, batch_tokens, f"{seed}:{epoch}") for epoch in range(epochs)]
    return [batch for batches in planned for batch in batches]


def _plan_epoch(rows: Sequence[int], lengths: Sequence[int], batch_tokens: int, seed: str) -> list[list[int]]:
    shuffle = random.Random(seed).shuffle
    order = list(rows)
    shuffle(order)
    mean_length = sum(lengths[i] for i in order) / max(1, len(order))
    window = max(1, round(_WINDOW * batch_tokens / max(1.0, mean_length)))
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        batch: list[int] = []
        for index in sorted(order[start : start + window], key=lambda i: -lengths[i]):
            if batch and lengths[batch[0]] * (len(batch) + 1) > batch_tokens:
                batches.append(batch)
                batch = []
            batch.append(index)
        batches.append(batch)
    shuffle(batches)
    return batches


def epoch_ends(plan: Sequence[Sequence[int]], sizes: Sequence[int]) -> list[int]:
    """Numbers (from 1) of the steps after which each epoch was seen, one after another of so many rows."""
    steps = {seen: step for step, seen in enumerate(accumulate(map(len, plan), initial=0))}
    return [steps[seen] for seen in accumulate(sizes)]


def collate(rows: Sequence[CapturedRow], with_targets: bool, packed: bool = False) -> dict[str, Tensor]:
    """Right-padded tensors of some rows, the arguments of `DistillationModule.forward`.

    `packed`: the rows stand one after another in one, without padding, and `positions_BT` begin anew with each.

    `labels` [B, T] already stand where they are predicted: labels[b, t] is token t + 1 at a
    supervised position t, IGNORED elsewhere. Targets follow the labels in row order: ids with their
    weights where they have some, else with log-probabilities and tail, normalised here, and tail
    samples if any row has some; the control's batches have none. No rows (a process whose share of a batch is
    empty) give one padding token that trains nothing.
    """
    lengths_R = np.array([len(row.input_ids) for row in rows] or [1])
    width = lengths_R.sum() if packed else lengths_R.max()
    starts_R = lengths_R.cumsum() - lengths_R if packed else width * np.arange(len(lengths_R))
    ids_BT = np.zeros((1 if packed else len(lengths_R), width), dtype=np.int64)
    labels_BT = np.full_like(ids_BT, IGNORED)
    position_M = np.arange(lengths_R.sum()) - np.repeat(lengths_R.cumsum() - lengths_R, lengths_R)
    if rows:  # all of them at once: the tensors of a row are so small that calls would cost more than work
        ids, labels = ids_BT.reshape(-1), labels_BT.reshape(-1)
        ids[np.repeat(starts_R, lengths_R) + position_M] = np.concatenate([row.input_ids for row in rows])
        positions_R = [row.targets.n_positions for row in rows]
        next_N = np.repeat(starts_R, positions_R) + np.concatenate([row.targets.positions_P for row in rows]) + 1
        if (next_N >= np.repeat(starts_R + lengths_R, positions_R)).any():
            raise IndexError("a position has no token after it in its row")
        labels[next_N - 1] = ids[next_N]
    batch = {
        "ids_BT": torch.from_numpy(ids_BT),
        "labels": torch.from_numpy(labels_BT),
        "weight_N": torch.from_numpy(_weights(rows)),
    }
    if packed:
        batch["positions_BT"] = torch.from_numpy(position_M[None])
    if with_targets:
        batch |= _targets([row.targets for row in rows])
    return batch


def _weights(rows: Sequence[CapturedRow]) -> np.ndarray:
    """What each position of each row counts [N]."""
    positions_R = [row.targets.n_positions for row in rows]
    weight_N = np.repeat(np.array([row.weight for row in rows], dtype=np.float32), positions_R)
    for row, end in zip(rows, accumulate(positions_R), strict=True):
        if row.position_weights is not None:
            weight_N[end - row.targets.n_positions : end] *= row.position_weights
    return weight_N


def _targets(parts: Sequence[SparseTargets]) -> dict[str, Tensor]:
    if not parts:
        nothing = np.zeros((0, 1))
        return {
            "support_ids_NK": torch.from_numpy(nothing.astype(np.int64)),
            "support_logprobs_NK": torch.from_numpy(nothing.astype(np.float32)),
            "tail_logprob_N": torch.zeros(0),
        }
    if len({part.weights_N is None for part in parts}) > 1:
        raise TrainingError(
            "captures of different kinds of targets (imported ones are top_k) cannot be learnt from together; "
            "set targets.kind: top_k in distill.yaml"
        )
    # Once for all rows: row by row it takes several times as long.
    whole = SparseDistributions.joined(parts).normalized()
    k = int(whole.kept_P.max(initial=1))
    ids_NK, logprobs_NK = map(torch.from_numpy, whole.padded(k))
    if whole.weights_N is not None:
        return {"support_ids_NK": ids_NK, "support_weights_NK": torch.from_numpy(whole.padded_weights(k))}
    batch = {"support_ids_NK": ids_NK, "support_logprobs_NK": logprobs_NK}
    batch["tail_logprob_N"] = torch.from_numpy(whole.tail_logprob_P)
    s = max((part.tail_sample_ids_PS.shape[1] for part in parts if part.tail_sample_ids_PS is not None), default=0)
    if s:
        batch["tail_sample_ids_NS"] = torch.from_numpy(np.concatenate([_tail_samples(part, s) for part in parts]))
    return batch


def _tail_samples(part: SparseTargets, s: int) -> np.ndarray:
    """Tail samples of each position [P, s], -1 where there is none, as in all of an imported row."""
    samples_PS = np.full((part.n_positions, s), -1, dtype=np.int64)
    if (ids_PS := part.tail_sample_ids_PS) is not None:
        samples_PS[:, : ids_PS.shape[1]] = ids_PS
    return samples_PS
