"""Captured rows made the naive way: the model's own forward, a full float64 softmax, one position at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill_assets.teacher_capture.sparse_targets import CapturedRow, SparseTargets
from tests import tiny


@torch.no_grad()
def captured_row(model: PreTrainedModel, ids: Sequence[int], first: int, k: int, weight: float = 1.0) -> CapturedRow:
    """A row whose tokens from index `first` on are targets; its targets are exact (not rounded)."""
    logits_TV = model(torch.tensor([list(ids)])).logits[0].double()
    logprobs_TV = logits_TV.log_softmax(-1)
    positions = range(first - 1, len(ids) - 1)
    support_ids, logprobs, tail, gold, entropy = [], [], [], [], []
    for t in positions:
        top = logprobs_TV[t].topk(k)
        support_ids.append(top.indices)
        logprobs.append(top.values)
        outside = logprobs_TV[t].index_fill(0, top.indices, -torch.inf)
        tail.append(float(outside.logsumexp(0)))
        gold.append(float(logprobs_TV[t, ids[t + 1]]))
        entropy.append(float(-(logprobs_TV[t].exp() * logprobs_TV[t]).sum()))
    return CapturedRow(
        row=0,
        key=hashlib.sha256(str((list(ids), first)).encode()).hexdigest()[:16],
        id=None,
        input_ids=np.array(ids, dtype=np.int32),
        weight=weight,
        truncated=False,
        targets=SparseTargets(
            positions_P=np.array(positions, dtype=np.int32),
            offsets_P1=np.arange(0, k * (len(positions) + 1), k),
            support_ids_N=torch.cat(support_ids).numpy().astype(np.int32),
            support_logprobs_N=torch.cat(logprobs).numpy().astype(np.float32),
            tail_logprob_P=np.array(tail, dtype=np.float32),
            gold_logprob_P=np.array(gold, dtype=np.float32),
            entropy_P=np.array(entropy, dtype=np.float32),
        ),
    )


def captured_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, n: int, k: int = 8, start: int = 0
) -> list[CapturedRow]:
    """`n` prompt/completion rows of at most 48 tokens, captured from `model`."""
    rows = []
    for example in tiny.example_rows(n, start):
        prompt = tokenizer(example["prompt"])["input_ids"]
        completion = tokenizer(example["completion"])["input_ids"]
        ids = [*prompt, *completion, tokenizer.eos_token_id][:48]
        rows.append(captured_row(model, ids, len(prompt), k))
    return rows


def row_of(
    ids: Sequence[int], positions: Sequence[int], targets: Sequence[dict[int, float]], tail: Sequence[float]
) -> CapturedRow:
    """A row with hand-written targets: one {id: probability} and one tail mass a position."""
    with np.errstate(divide="ignore"):
        return CapturedRow(
            row=0,
            key=f"{list(ids)}{list(positions)}",
            id=None,
            input_ids=np.array(ids, dtype=np.int32),
            weight=1.0,
            truncated=False,
            targets=SparseTargets(
                positions_P=np.array(positions, dtype=np.int32),
                offsets_P1=np.cumsum([0, *map(len, targets)]),
                support_ids_N=np.array([i for target in targets for i in target], dtype=np.int32),
                support_logprobs_N=np.log(np.array([p for target in targets for p in target.values()], np.float32)),
                tail_logprob_P=np.log(np.array(tail, dtype=np.float32)),
                gold_logprob_P=np.zeros(len(positions), np.float32),
                entropy_P=np.zeros(len(positions), np.float32),
            ),
        )


def shifted(row: CapturedRow) -> CapturedRow:
    """`row` with each position's target, of 8 ids, at the next position."""
    targets = row.targets
    return replace(
        row,
        targets=replace(
            targets,
            support_ids_N=np.roll(targets.support_ids_N, 8),
            support_logprobs_N=np.roll(targets.support_logprobs_N, 8),
            tail_logprob_P=np.roll(targets.tail_logprob_P, 1),
        ),
    )


@torch.no_grad()
def own_rows(model: PreTrainedModel, n: int, k: int = 8) -> list[CapturedRow]:
    """`n` rows of what `model` itself finds likeliest, captured from it: whatever it learns, it knew these better."""
    rows = []
    for first in range(40, 40 + n):
        ids = [first]
        while len(ids) < 16:
            ids.append(int(model.eval()(torch.tensor([ids])).logits[0, -1].argmax()))
        rows.append(captured_row(model, ids, 1, k))
    return rows
