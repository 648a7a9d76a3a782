"""The teacher, loaded once in a process, and what it makes of rows of hidden states.

Legend: N = chosen positions, V = real vocabulary ids, K = most ids kept, S = draws at a position.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill_assets.foundation.language_model import (
    head_width,
    load_model,
    load_tokenizer,
    real_vocabulary_size,
    resolve_device,
    unused_ids,
)
from distill_assets.foundation.model_folders import ModelFolder
from distill_assets.foundation.settings import Dtype, TargetSettings
from distill_assets.teacher_capture.draws import draw_ids
from distill_assets.teacher_capture.support import choose_support, n_likeliest


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher. `unused` are ids below `n_real` that no token has; they take no mass."""

    model: PreTrainedModel
    n_real: int
    unused: Tensor

    @property
    def device(self) -> torch.device:
        return self.model.device


@lru_cache(maxsize=1)
def load_teacher(folder: ModelFolder, fingerprint: str, dtype: Dtype, device: str) -> Teacher:
    """Load a teacher, or give back the one loaded last if it is the same.

    `fingerprint` is there for the cache: weights replaced under the same name are loaded again.
    """
    target = resolve_device(device)
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, dtype, target)
    n_real = min(
        real_vocabulary_size(tokenizer), head_width(model)
    )  # a narrower head is refused by the tokenizer check
    unused = torch.tensor([i for i in unused_ids(tokenizer) if i < n_real], dtype=torch.int64, device=target)
    return Teacher(model=model, n_real=n_real, unused=unused)


@dataclass(frozen=True)
class ScoredPositions:
    """Sparse targets of N positions as tensors. `keep_NK` marks the kept ids, a prefix of each position's.

    `weights_NK` is None for top_k, `tail_sample_ids_NS` (-1 where there is no tail) without tail samples.
    """

    ids_NK: Tensor
    logprobs_NK: Tensor
    keep_NK: Tensor
    weights_NK: Tensor | None
    tail_sample_ids_NS: Tensor | None
    tail_logprob_N: Tensor
    gold_logprob_N: Tensor
    entropy_N: Tensor


def sparsify(logits_NV: Tensor, gold_N: Tensor, targets: TargetSettings, bits_NS: Tensor) -> ScoredPositions:
    """Kept log-probabilities, tail mass, gold log-probability and entropy from float32 logits.

    One exponential over the vocabulary gives all of them: with z = logits - max and e = exp(z),
    log p = z - log(sum e), H = log(sum e) - (sum e z) / (sum e), and the tail is summed from what
    is left of e once the kept ids are taken out, so that it is exact however small it is.
    `bits_NS` are the random numbers of the positions (`draws.row_bits`). `logits_NV` is overwritten.
    """
    top_NK, likeliest_NK = logits_NV.topk(n_likeliest(targets, logits_NV.shape[-1]), dim=-1)
    max_N1 = top_NK[:, :1]
    gold_N1 = logits_NV.gather(1, gold_N[:, None]) - max_N1
    z_NV = logits_NV.sub_(max_N1)
    e_NV = z_NV.exp()
    sum_N = e_NV.sum(-1)
    log_sum_N = sum_N.log()
    entropy_N = log_sum_N - torch.linalg.vecdot(e_NV, z_NV) / sum_N

    likeliest_logprobs_NK = top_NK - max_N1 - log_sum_N[:, None]
    support = choose_support(likeliest_NK, likeliest_logprobs_NK, e_NV, targets, bits_NS)
    outside_NV = e_NV.scatter_(1, support.ids_NK, 0.0)
    return ScoredPositions(
        ids_NK=support.ids_NK,
        logprobs_NK=z_NV.gather(1, support.ids_NK) - log_sum_N[:, None],
        keep_NK=support.keep_NK,
        weights_NK=support.weights_NK,
        tail_sample_ids_NS=draw_ids(outside_NV, bits_NS) if targets.tail_samples else None,
        tail_logprob_N=outside_NV.sum(-1).log() - log_sum_N,
        gold_logprob_N=gold_N1[:, 0] - log_sum_N,
        entropy_N=entropy_N.clamp_min(0.0),
    )
