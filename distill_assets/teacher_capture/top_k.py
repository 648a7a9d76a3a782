"""Top-k targets straight from hidden states, a block of the vocabulary at a time.

Legend: N = positions, D = width, V = real vocabulary ids, C = ids of one block, K = most ids kept,
J = most candidates of a position: ids that may be among the K likeliest; R = positions of a part,
S = tiles of a block, T = ids of a tile, M = tiles with candidates of all positions, H = candidates of all positions.

Why blocks: a block of logits is used while it is in the caches, its size does not grow with the
vocabulary, and the head's matrix product has all positions of the batch as its rows, where it is
fastest. Sums are kept relative to a reference, as in an online softmax.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill_assets.foundation.language_model import head_blocks
from distill_assets.foundation.settings import TargetSettings
from distill_assets.teacher_capture.teacher import ScoredPositions, Teacher

MOST_ROWS = 2048  # positions at a time; more would make the blocks too narrow, or too large
_TILE = 16  # ids that are looked at together when a CPU searches for candidates; not neighbours, but a stride apart
_SPARE = 128  # candidates beyond K that a position may have until the K likeliest are looked for
_CACHED_ROWS = 256  # positions whose probabilities a CPU sums up at a time, so that they never leave its caches


@dataclass(frozen=True)
class _Sums:
    """The ids seen so far. With e = exp(logit - `reference_N`): `mass_N` is the sum of e over all of them, `rest_N`
    over those that are not among the candidates, `weighted_N` the sum of e x (logit - reference) over all.

    Candidates are ids that may be among the K likeliest. A position with fewer than others has one of
    its own again in place of the missing, at a logit of -inf.
    """

    reference_N: Tensor
    mass_N: Tensor
    rest_N: Tensor
    weighted_N: Tensor
    candidates_NJ: Tensor
    ids_NJ: Tensor

    def relative_to(self, reference_N: Tensor) -> _Sums:
        """The same with another, larger reference."""
        below_N = self.reference_N - reference_N
        scale_N = below_N.exp()
        return replace(
            self,
            reference_N=reference_N,
            mass_N=scale_N * self.mass_N,
            rest_N=scale_N * self.rest_N,
            weighted_N=scale_N * (self.weighted_N + below_N * self.mass_N),
        )

    def join(self, other: _Sums) -> _Sums:
        """Both together, with the candidates of both."""
        reference_N = torch.maximum(self.reference_N, other.reference_N)
        ours, others = self.relative_to(reference_N), other.relative_to(reference_N)
        return _Sums(
            reference_N=reference_N,
            mass_N=ours.mass_N + others.mass_N,
            rest_N=ours.rest_N + others.rest_N,
            weighted_N=ours.weighted_N + others.weighted_N,
            candidates_NJ=torch.cat([ours.candidates_NJ, others.candidates_NJ], dim=1),
            ids_NJ=torch.cat([ours.ids_NJ, others.ids_NJ], dim=1),
        )

    def likeliest(self, k: int) -> _Sums:
        """The same with no candidates but the K likeliest, descending; the others go into the rest."""
        top_NK, places_NK = self.candidates_NJ.topk(min(k, self.candidates_NJ.shape[1]), dim=-1)
        lost_N = (self.candidates_NJ - self.reference_N[:, None]).exp_().scatter_(1, places_NK, 0.0).sum(-1)
        ids_NK = self.ids_NJ.gather(1, places_NK)
        return replace(self, rest_N=self.rest_N + lost_N, candidates_NJ=top_NK, ids_NJ=ids_NK)


def top_k_targets(teacher: Teacher, hidden_ND: Tensor, gold_N: Tensor, targets: TargetSettings) -> ScoredPositions:
    """Top-k log-probabilities, tail mass, gold log-probability and entropy of N positions, from float32 logits.

    The tail is summed from the ids outside, never taken as 1 - sum, so that it is exact however small.
    """
    seen: _Sums | None = None
    floor_N1: Tensor | None = None  # logits below it are not among the K likeliest
    gold_logit_N = torch.zeros(len(gold_N), device=hidden_ND.device)
    for start, logits_NC in head_blocks(teacher.model, hidden_ND, teacher.n_real, teacher.unused):
        width = logits_NC.shape[1]
        is_here_N = (gold_N >= start) & (gold_N < start + width)
        here_N1 = (gold_N - start).clamp(0, width - 1)[:, None]
        gold_logit_N = torch.where(is_here_N, logits_NC.gather(1, here_N1)[:, 0], gold_logit_N)
        block = _sums_of(logits_NC, start, targets.k, floor_N1)
        seen = block if seen is None else seen.join(block)
        n_candidates = seen.candidates_NJ.shape[1]
        # A floor that is a few blocks old lets more candidates pass; looking for the K likeliest costs more.
        if n_candidates > targets.k + _SPARE or (floor_N1 is None and n_candidates >= targets.k):
            seen = seen.likeliest(targets.k)
            floor_N1 = seen.candidates_NJ[:, -1:]
    assert seen is not None  # a vocabulary has ids
    seen = seen.likeliest(targets.k)
    log_sum_N = seen.mass_N.log()
    logprobs_NK = seen.candidates_NJ - seen.reference_N[:, None] - log_sum_N[:, None]
    keep_NK = torch.ones_like(seen.ids_NJ, dtype=torch.bool)
    if targets.min_probability > 0:
        keep_NK = logprobs_NK >= math.log(targets.min_probability)
        keep_NK[:, 0] = True
    dropped_N = ((seen.candidates_NJ - seen.reference_N[:, None]).exp() * ~keep_NK).sum(-1)
    return ScoredPositions(
        ids_NK=seen.ids_NJ,
        logprobs_NK=logprobs_NK,
        keep_NK=keep_NK,
        tail_logprob_N=(seen.rest_N + dropped_N).log() - log_sum_N,
        gold_logprob_N=gold_logit_N - seen.reference_N - log_sum_N,
        entropy_N=(log_sum_N - seen.weighted_N / seen.mass_N).clamp_min(0.0),
    )


def _sums_of(logits_NC: Tensor, start: int, k: int, floor_N1: Tensor | None) -> _Sums:
    """One block alone, relative to its own log-sum-exp. `logits_NC` is overwritten.

    A softmax reads logits once and writes them once, which is what costs here: the log-sum-exp then is
    any id's logit less the log of its probability, most precisely the likeliest one's.
    """
    candidates_NJ, places_NJ = _candidates(logits_NC, k, floor_N1)
    largest_N1, column_N1 = candidates_NJ.max(-1, keepdim=True)
    place_N1 = places_NJ.gather(1, column_N1)
    reference_N1, rest_N1, weighted_N1 = (torch.empty_like(largest_N1) for _ in range(3))
    rows = _CACHED_ROWS if logits_NC.device.type == "cpu" else len(logits_NC)
    memory_RC = torch.empty_like(logits_NC[:rows])
    for first in range(0, len(logits_NC), rows):
        part = slice(first, first + rows)
        p_RC = torch.softmax(logits_NC[part], -1, out=memory_RC[: len(logits_NC[part])])
        reference_N1[part] = largest_N1[part] - p_RC.gather(1, place_N1[part]).log()
        torch.sum(logits_NC[part].mul_(p_RC), -1, keepdim=True, out=weighted_N1[part])
        torch.sum(p_RC.scatter_(1, places_NJ[part], 0.0), -1, keepdim=True, out=rest_N1[part])
    return _Sums(
        reference_N=reference_N1[:, 0],
        mass_N=torch.ones_like(reference_N1[:, 0]),
        rest_N=rest_N1[:, 0],
        weighted_N=(weighted_N1 - reference_N1)[:, 0],
        candidates_NJ=candidates_NJ,
        ids_NJ=places_NJ + start,
    )


def _candidates(logits_NC: Tensor, k: int, floor_N1: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits [N, J] and places [N, J] of a block's candidates, as `_Sums` has them, its likeliest id always one.

    torch's topk costs a CPU as much as everything else besides the matrix product. Maxima of tiles cost
    next to nothing, and few tiles hold anything above the floor; without one, the Kth of the maxima will do.
    """
    n_rows, width = logits_NC.shape
    n_tiles = width // _TILE
    if logits_NC.device.type == "cpu" and width % _TILE == 0 and (floor_N1 is not None or k <= n_tiles):
        maxima_NS = logits_NC.view(n_rows, _TILE, n_tiles).amax(1)
        if floor_N1 is None:
            floor_N1 = maxima_NS.topk(k, dim=-1).values[:, -1:]
        floor_N1 = torch.minimum(floor_N1, maxima_NS.amax(-1, keepdim=True))
        # Not below, rather than above: so each position has a candidate, also where a logit is no number.
        row_M, tile_M = (~(maxima_NS < floor_N1)).nonzero(as_tuple=True)
        if len(row_M) * _TILE <= logits_NC.numel() // 4:
            flat_MT = (row_M * width + tile_M)[:, None] + torch.arange(0, width, n_tiles)
            flat_H = flat_MT[~(logits_NC.flatten()[flat_MT] < floor_N1[row_M])]
            count_N = (flat_H // width).bincount(minlength=n_rows)
            if count_N.max() <= k + _SPARE:  # else one position would make the tensors of all long
                return _side_by_side(logits_NC, flat_H, count_N)
    top = logits_NC.topk(min(k, width), dim=-1)
    return top.values, top.indices


def _side_by_side(logits_NC: Tensor, flat_H: Tensor, count_N: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [N, J] and places [N, J] of the elements `flat_H`, ascending, of which each position has `count_N`, one
    or more.
    """
    width = logits_NC.shape[1]
    row_H, place_H = flat_H // width, flat_H % width
    first_N = count_N.cumsum(0) - count_N
    rank_H = torch.arange(len(flat_H)) - first_N[row_H]
    places_NJ = place_H[first_N][:, None].repeat(1, int(count_N.max()))
    places_NJ[row_H, rank_H] = place_H
    candidates_NJ = torch.full_like(places_NJ, -torch.inf, dtype=logits_NC.dtype)
    candidates_NJ[row_H, rank_H] = logits_NC.flatten()[flat_H]
    return candidates_NJ, places_NJ
