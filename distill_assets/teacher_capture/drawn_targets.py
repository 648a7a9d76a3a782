"""Targets in which chance has a part, from hidden states: sampled, threshold, and top_k with tail samples.

Legend: N = positions, D = width, V = real vocabulary ids, K = slots for kept ids, S = draws at a position.

A draw looks at the whole distribution, so all logits of a few positions are held at once; plain
top_k never needs that (`top_k`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from distill_assets.foundation.language_model import head_rows, real_logits
from distill_assets.foundation.settings import TargetSettings
from distill_assets.teacher_capture.draws import draw_ids
from distill_assets.teacher_capture.support import choose_support, n_likeliest
from distill_assets.teacher_capture.teacher import ScoredPositions, Teacher


def drawn_targets(
    teacher: Teacher, hidden_ND: Tensor, gold_N: Tensor, targets: TargetSettings, bits_NS: Tensor
) -> Iterator[ScoredPositions]:
    """Kept ids with log-probabilities and weights, tail, gold log-probability and entropy, some positions at a time.

    `bits_NS` are the random numbers of the positions (`draws.row_bits`).
    """
    rows = head_rows(teacher.model)
    for hidden_CD, gold_C, bits_CS in zip(hidden_ND.split(rows), gold_N.split(rows), bits_NS.split(rows), strict=True):
        yield sparsify(real_logits(teacher.model, hidden_CD, teacher.n_real, teacher.unused), gold_C, targets, bits_CS)


def sparsify(logits_NV: Tensor, gold_N: Tensor, targets: TargetSettings, bits_NS: Tensor) -> ScoredPositions:
    """The targets of float32 logits, which are overwritten.

    One exponential over the vocabulary gives all of them: with z = logits - max and e = exp(z),
    log p = z - log(sum e), H = log(sum e) - (sum e z) / (sum e), and the tail is summed from what
    is left of e once the kept ids are taken out, so that it is exact however small it is.
    """
    top_NK, likeliest_NK = logits_NV.topk(n_likeliest(targets, logits_NV.shape[-1]), dim=-1)
    max_N1 = top_NK[:, :1]
    gold_N1 = logits_NV.gather(1, gold_N[:, None]) - max_N1
    z_NV = logits_NV.sub_(max_N1)
    e_NV = z_NV.exp()
    sum_N = e_NV.sum(-1)
    log_sum_N = sum_N.log()
    entropy_N = log_sum_N - torch.linalg.vecdot(e_NV, z_NV) / sum_N

    support = choose_support(likeliest_NK, top_NK - max_N1 - log_sum_N[:, None], e_NV, targets, bits_NS)
    outside_NV = e_NV.scatter_(1, support.ids_NK, 0.0)
    return ScoredPositions(
        ids_NK=support.ids_NK,
        logprobs_NK=z_NV.gather(1, support.ids_NK) - log_sum_N[:, None],
        keep_NK=support.keep_NK,
        tail_logprob_N=outside_NV.sum(-1).log() - log_sum_N,
        gold_logprob_N=gold_N1[:, 0] - log_sum_N,
        entropy_N=entropy_N.clamp_min(0.0),
        weights_NK=support.weights_NK,
        tail_sample_ids_NS=draw_ids(outside_NV, bits_NS) if targets.tail_samples else None,
    )
