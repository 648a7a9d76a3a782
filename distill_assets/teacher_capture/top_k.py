"""Top-k targets straight from hidden states, a block of the vocabulary at a time.

Legend: N = positions, D = width, V = real vocabulary ids, C = ids of one block, K = most ids kept,
J = candidates of a block: ids that may be among the K likeliest.

Why blocks: a block of logits is used while it is in the caches, its size does not grow with the
vocabulary, and the head's matrix product has all positions of the batch as its rows, where it is
fastest. Sums are kept relative to a reference, as in an online softmax.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distill_assets.foundation.language_model import head_blocks
from distill_assets.foundation.settings import TargetSettings
from distill_assets.teacher_capture.teacher import ScoredPositions, Teacher

MOST_ROWS = 2048  # positions at a time; more would make the blocks too narrow, or too large
_TILE = 16  # ids that are looked at together when a CPU searches for candidates; not neighbours, but a stride apart


@dataclass(frozen=True)
class _Sums:
    """The ids seen so far. With e = exp(logit - `reference_N`): `rest_N` is the sum of e over ids that are not
    among `top_NK`, `weighted_N` the sum of e x (logit - reference) over all.
    """

    reference_N: Tensor
    rest_N: Tensor
    weighted_N: Tensor
    top_NK: Tensor
    ids_NK: Tensor

    def sum_N(self) -> Tensor:
        """Sum of e over all ids."""
        return self.rest_N + (self.top_NK - self.reference_N[:, None]).exp().sum(-1)

    def relative_to(self, reference_N: Tensor) -> _Sums:
        """The same with another, larger reference."""
        below_N = self.reference_N - reference_N
        scale_N = below_N.exp()
        weighted_N = scale_N * (self.weighted_N + below_N * self.sum_N())
        return _Sums(reference_N, scale_N * self.rest_N, weighted_N, self.top_NK, self.ids_NK)

    def join(self, other: _Sums, k: int) -> _Sums:
        """Both together, with the K likeliest of both; who is not among them goes into the rest."""
        reference_N = torch.maximum(self.reference_N, other.reference_N)
        ours, others = self.relative_to(reference_N), other.relative_to(reference_N)
        candidates_NJ = torch.cat([ours.top_NK, others.top_NK], dim=1)
        top_NK, places_NK = candidates_NJ.topk(min(k, candidates_NJ.shape[1]), dim=-1)
        lost_N = (candidates_NJ - reference_N[:, None]).exp_().scatter_(1, places_NK, 0.0).sum(-1)
        return _Sums(
            reference_N=reference_N,
            rest_N=ours.rest_N + others.rest_N + lost_N,
            weighted_N=ours.weighted_N + others.weighted_N,
            top_NK=top_NK,
            ids_NK=torch.cat([ours.ids_NK, others.ids_NK], dim=1).gather(1, places_NK),
        )


def top_k_targets(teacher: Teacher, hidden_ND: Tensor, gold_N: Tensor, targets: TargetSettings) -> ScoredPositions:
    """Top-k log-probabilities, tail mass, gold log-probability and entropy of N positions, from float32 logits.

    The tail is summed from the ids outside, never taken as 1 - sum, so that it is exact however small.
    """
    seen: _Sums | None = None
    memory: Tensor | None = None
    gold_logit_N = torch.zeros(len(gold_N), device=hidden_ND.device)
    for start, logits_NC in head_blocks(teacher.model, hidden_ND, teacher.n_real, teacher.unused):
        width = logits_NC.shape[1]
        is_here_N = (gold_N >= start) & (gold_N < start + width)
        here_N1 = (gold_N - start).clamp(0, width - 1)[:, None]
        gold_logit_N = torch.where(is_here_N, logits_NC.gather(1, here_N1)[:, 0], gold_logit_N)
        memory = torch.empty_like(logits_NC) if memory is None else memory  # of the first block, the widest
        block = _sums_of(logits_NC, start, targets.k, None if seen is None else seen.top_NK, memory)
        seen = block if seen is None else seen.join(block, targets.k)
    assert seen is not None  # a vocabulary has ids
    log_sum_N = seen.sum_N().log()
    logprobs_NK = seen.top_NK - seen.reference_N[:, None] - log_sum_N[:, None]
    keep_NK = torch.ones_like(seen.ids_NK, dtype=torch.bool)
    if targets.min_probability > 0:
        keep_NK = logprobs_NK >= math.log(targets.min_probability)
        keep_NK[:, 0] = True
    dropped_N = ((seen.top_NK - seen.reference_N[:, None]).exp() * ~keep_NK).sum(-1)
    return ScoredPositions(
        ids_NK=seen.ids_NK,
        logprobs_NK=logprobs_NK,
        keep_NK=keep_NK,
        tail_logprob_N=(seen.rest_N + dropped_N).log() - log_sum_N,
        gold_logprob_N=gold_logit_N - seen.reference_N - log_sum_N,
        entropy_N=(log_sum_N - seen.weighted_N / log_sum_N.exp()).clamp_min(0.0),
    )


def _sums_of(logits_NC: Tensor, start: int, k: int, before_NK: Tensor | None, memory: Tensor) -> _Sums:
    """One block alone, its candidates as `top_NK`, relative to its own log-sum-exp. `logits_NC` is overwritten,
    and as much of `memory`.

    A softmax reads a block once and writes it once, which is what costs here: the log-sum-exp then is
    any id's logit less the log of its probability, most precisely the likeliest one's.
    """
    candidates_NJ, places_NJ = _candidates(logits_NC, k, before_NK)
    p_NC = torch.softmax(logits_NC, -1, out=memory.flatten()[: logits_NC.numel()].view(logits_NC.shape))
    largest_N1, which_N1 = candidates_NJ.max(-1, keepdim=True)
    reference_N1 = largest_N1 - p_NC.gather(1, places_NJ.gather(1, which_N1)).log()
    weighted_N = logits_NC.mul_(p_NC).sum(-1) - reference_N1[:, 0]
    rest_N = p_NC.scatter_(1, places_NJ, 0.0).sum(-1)
    block = _Sums(reference_N1[:, 0], rest_N, weighted_N, candidates_NJ, places_NJ + start)
    if before_NK is not None:
        return block
    top_NK, order_NK = candidates_NJ.topk(min(k, candidates_NJ.shape[1]), dim=-1)
    lost_N = (candidates_NJ - reference_N1).exp_().scatter_(1, order_NK, 0.0).sum(-1)
    return _Sums(block.reference_N, rest_N + lost_N, weighted_N, top_NK, block.ids_NK.gather(1, order_NK))


def _candidates(logits_NC: Tensor, k: int, before_NK: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits [N, J] and places [N, J] of ids among which are all of the block that belong to the K likeliest
    so far, `before_NK` being those of earlier blocks, descending.

    torch's topk costs a CPU as much as everything else besides the matrix product. Maxima of tiles cost
    next to nothing, and few tiles hold anything above the Kth logit of earlier blocks.
    """
    width = logits_NC.shape[1]
    n_tiles = width // _TILE
    needed = min(k, n_tiles)
    if logits_NC.device.type == "cpu" and width % _TILE == 0:
        maxima_NT = logits_NC.view(len(logits_NC), _TILE, n_tiles).amax(1)
        if before_NK is not None and before_NK.shape[1] == k:
            needed = min(needed, max(1, int((maxima_NT >= before_NK[:, -1:]).sum(-1).max())))
        if needed * _TILE <= width // 2:
            tiles_NT = maxima_NT.topk(needed, dim=-1).indices
            places_NJ = (tiles_NT[:, :, None] + torch.arange(0, width, n_tiles)).flatten(1)
            return logits_NC.gather(1, places_NJ), places_NJ
    top = logits_NC.topk(min(k, width), dim=-1)
    return top.values, top.indices
