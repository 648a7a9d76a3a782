"""The teacher, loaded once in a process, and what it makes of rows of hidden states.

Legend: N = chosen positions, V = real vocabulary ids, K = most ids kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill_assets.foundation.devices import cuda_choices, fits_one, leased, resolve_device
from distill_assets.foundation.errors import CaptureError
from distill_assets.foundation.language_model import (
    head_width,
    load_model,
    load_tokenizer,
    real_vocabulary_size,
    unused_ids,
)
from distill_assets.foundation.model_folders import Weights
from distill_assets.foundation.settings import Dtype, TargetSettings

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher. `unused` are ids below `n_real` that no token has; they take no mass."""

    model: PreTrainedModel
    n_real: int
    unused: Tensor

    @property
    def device(self) -> torch.device:
        return self.model.device


@contextmanager
def teacher_in_turn(weights: Weights, dtype: Dtype, device: str) -> Iterator[Teacher]:
    """The teacher on a device that is ours meanwhile.

    Where `device` leaves a choice of CUDA devices, one is leased, so that runs at the same time take one
    each; a teacher that does not fit into one is spread over all of them.
    """
    choices = cuda_choices(device)
    spread = bool(choices) and not fits_one(weights.folder.n_parameters() * _BYTES[dtype], choices)
    with leased(choices, every=spread) as one:
        yield load_teacher(weights, dtype, one or device, spread)


@lru_cache(maxsize=1)
def load_teacher(weights: Weights, dtype: Dtype, device: str, spread: bool = False) -> Teacher:
    """Load a teacher, or give back the one loaded last if it is the same.

    CaptureError when its files are no longer those that were hashed: a capture must never be filed under
    weights that did not make it.
    """
    target = resolve_device(device)
    tokenizer = load_tokenizer(weights.folder)
    model = load_model(weights.folder, dtype, target, spread)
    if weights.folder.stamp() != weights.stamp:
        raise CaptureError(f"the weights in {weights.folder.path} were replaced under way; run again")
    n_real = min(
        real_vocabulary_size(tokenizer), head_width(model)
    )  # a narrower head is refused by the tokenizer check
    unused = torch.tensor([i for i in unused_ids(tokenizer) if i < n_real], dtype=torch.int64, device=target)
    return Teacher(model=model, n_real=n_real, unused=unused)


@dataclass(frozen=True)
class ScoredPositions:
    """Sparse targets of N positions as tensors. `keep_NK` marks the kept prefix of each top-k."""

    ids_NK: Tensor
    logprobs_NK: Tensor
    keep_NK: Tensor
    tail_logprob_N: Tensor
    gold_logprob_N: Tensor
    entropy_N: Tensor


def sparsify(logits_NV: Tensor, gold_N: Tensor, targets: TargetSettings) -> ScoredPositions:
    """Top-k log-probabilities, tail mass, gold log-probability and entropy from float32 logits.

    One exponential over the vocabulary gives all of them: with z = logits - max and e = exp(z),
    log p = z - log(sum e), H = log(sum e) - (sum e z) / (sum e), and the tail is summed from what
    is left of e once the kept ids are taken out, so that it is exact however small it is.
    `logits_NV` is overwritten.
    """
    top_NK, ids_NK = logits_NV.topk(targets.k, dim=-1)
    max_N1 = top_NK[:, :1]
    gold_N1 = logits_NV.gather(1, gold_N[:, None]) - max_N1
    z_NV = logits_NV.sub_(max_N1)
    e_NV = z_NV.exp()
    sum_N = e_NV.sum(-1)
    log_sum_N = sum_N.log()
    entropy_N = log_sum_N - torch.linalg.vecdot(e_NV, z_NV) / sum_N

    logprobs_NK = top_NK - max_N1 - log_sum_N[:, None]
    keep_NK = torch.ones_like(ids_NK, dtype=torch.bool)
    if targets.min_probability > 0:
        keep_NK = logprobs_NK >= math.log(targets.min_probability)
        keep_NK[:, 0] = True
    outside_N = e_NV.scatter_(1, ids_NK, 0.0).sum(-1)
    dropped_N = ((top_NK - max_N1).exp() * ~keep_NK).sum(-1)
    return ScoredPositions(
        ids_NK=ids_NK,
        logprobs_NK=logprobs_NK,
        keep_NK=keep_NK,
        tail_logprob_N=(outside_N + dropped_N).log() - log_sum_N,
        gold_logprob_N=gold_N1[:, 0] - log_sum_N,
        entropy_N=entropy_N.clamp_min(0.0),
    )
