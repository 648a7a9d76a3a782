"""What a student pays at a position, from its logits and the teacher's sparse target, and the gradient on the logits.

Legend: N = positions, V = real vocabulary ids, K = most ids kept, J = K + 1 outcomes, S = tail samples,
L = ids that count one by one.

Every loss here is a function of the student's log-probabilities of few things: of kept ids, of the tail
(all other ids together, Q their probability), and of single ids such as the token that came. Its gradient on
the logits z follows by hand. With q = softmax(z) and Q = sum of q over the ids of the tail,

    d log q_i / d z_j = 1[i = j] - q_j
    d log Q   / d z_j = 1[j in the tail] q_j / Q - q_j

so a loss with the slopes a_i on log q_i and a_T on log Q, which together are A, has the gradient

    at a kept id j          a_j - A q_j
    at an id j of the tail  (a_T - A Q) q_j / Q
    and at a single id j    a_j besides

The slopes of divergences stand in `divergences`. Weighted ids i of a drawn target are single ids with slopes
-w_i, the gold token is one with -1, without any a_T. Tail samples, lambda m mean_j(-log(q_j / Q)),
are single ids with slopes -lambda m / s and add lambda m to a_T; their A is 0.

Only the tail is dense, and there the gradient is one number a position times a softmax over the
tail: it takes the place of the logits it is made from. With logits relative to the largest of the tail no
tail is so small that it loses its digits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distill_assets.foundation.language_model import NEVER
from distill_assets.foundation.settings import Objective
from distill_assets.student_model.divergences import divergence


@dataclass(frozen=True)
class PositionTargets:
    """What N positions are to learn: the token that came, and what the teacher thought, in one of two forms.

    With `logprobs_NK` the kept ids and the tail are outcomes of one distribution: exponentiated, a position's
    log-probabilities and `tail_logprob_N` sum to 1. -inf is a slot that holds nothing (its id is not
    looked at) or a tail that is not there. Where there is a tail, some id must be outside the kept ones to hold it, and
    where there is none, no id. With `weights_NK` the ids count what they weigh, as they are: weights
    are right on average over draws, and dividing by their sum would bias them. A weight of 0 fills a slot.
    `tail_sample_ids_NS` are ids outside the kept ones, -1 where there is none. `weight_N` is what a
    position counts in all sums.
    """

    gold_N: Tensor
    weight_N: Tensor
    ids_NK: Tensor | None = None
    logprobs_NK: Tensor | None = None
    tail_logprob_N: Tensor | None = None
    weights_NK: Tensor | None = None
    tail_sample_ids_NS: Tensor | None = None

    def rows(self, part: slice) -> PositionTargets:
        def cut(column: Tensor | None) -> Tensor | None:
            return None if column is None else column[part]

        return PositionTargets(
            self.gold_N[part],
            self.weight_N[part],
            cut(self.ids_NK),
            cut(self.logprobs_NK),
            cut(self.tail_logprob_N),
            cut(self.weights_NK),
            cut(self.tail_sample_ids_NS),
        )


@dataclass(frozen=True)
class LossMixture:
    """kd_weight x distillation + (1 - kd_weight) x cross-entropy on the gold token.

    Distillation is `objective` over the kept ids and the tail, plus `tail_sample_weight` times what tail samples
    say; for targets with weights it is their cross-entropy, and for no targets it is 0, and so is kd_weight.
    """

    objective: Objective = "forward_kl"
    temperature: float = 1.0
    kd_weight: float = 1.0
    tail_sample_weight: float = 0.0

    def shares(self, targets: PositionTargets) -> tuple[float, float]:
        """Weights of distillation and cross-entropy in the loss."""
        return (0.0, 1.0) if targets.ids_NK is None else (self.kd_weight, 1.0 - self.kd_weight)


@dataclass(frozen=True)
class _Kept:
    """Kept ids of each position as outcomes. An empty slot repeats a kept one, `slot_NK`, so that writing to all
    ids writes to nothing else; a position that keeps nothing has `some_N1` False, and its ids are not to be written to.
    """

    ids_NK: Tensor
    slot_NK: Tensor
    some_N1: Tensor
    logits_NK: Tensor
    teacher_NJ: Tensor

    @staticmethod
    def taken_out_of(logits_NV: Tensor, targets: PositionTargets) -> _Kept | None:
        """The kept ids and their logits, which are NEVER in `logits_NV` afterwards: what is left is the tail."""
        ids_NK, logprobs_NK, tail_logprob_N = targets.ids_NK, targets.logprobs_NK, targets.tail_logprob_N
        if ids_NK is None or logprobs_NK is None or tail_logprob_N is None:
            return None
        teacher_NJ = torch.cat([logprobs_NK, tail_logprob_N[:, None]], dim=1).to(logits_NV.dtype)
        is_kept_NK = logprobs_NK > -torch.inf
        first_N1 = is_kept_NK.to(torch.int8).argmax(-1, keepdim=True)
        slot_NK = torch.where(is_kept_NK, torch.arange(ids_NK.shape[1], device=ids_NK.device), first_N1)
        some_N1 = is_kept_NK.any(-1, keepdim=True)
        ids_NK = ids_NK.gather(1, slot_NK)
        kept_NK = logits_NV.gather(1, ids_NK)
        logits_NV.scatter_(1, ids_NK, torch.where(some_N1, NEVER, kept_NK))
        return _Kept(ids_NK, slot_NK, some_N1, kept_NK, teacher_NJ)

    def log_sum_N(self) -> Tensor:
        """log of the sum of exp(logit) over the kept ids."""
        return self.logits_NK.masked_fill(self.teacher_NJ[:, :-1] == -torch.inf, NEVER).logsumexp(-1)

    def write(self, gradient_NV: Tensor, values_NK: Tensor) -> None:
        """Put the values of kept slots where their ids are."""
        values_NK = values_NK.gather(1, self.slot_NK)
        gradient_NV.scatter_(1, self.ids_NK, torch.where(self.some_N1, values_NK, gradient_NV.gather(1, self.ids_NK)))


def losses_and_gradient(
    logits_NV: Tensor, targets: PositionTargets, mixture: LossMixture, with_gradient: bool = True
) -> tuple[Tensor, Tensor]:
    """Distillation loss and cross-entropy of every position, [N] in nats, neither weighted nor mixed.

    `logits_NV` becomes the gradient of the sum over positions of weight x mixed loss; scratch without
    `with_gradient`. Ids that are not real stand at NEVER and get no gradient.
    """
    drawn_NL, drawn_slopes_NL = _drawn(targets, mixture, logits_NV.dtype)
    gold_N1 = targets.gold_N[:, None]
    gold_logit_N, drawn_logits_NL = logits_NV.gather(1, gold_N1)[:, 0], logits_NV.gather(1, drawn_NL)
    kept = _Kept.taken_out_of(logits_NV, targets)

    max_N1 = logits_NV.amax(-1, keepdim=True)
    sum_N = logits_NV.sub_(max_N1).exp_().sum(-1)
    log_tail_N = max_N1[:, 0] + sum_N.log()
    log_z_N = log_tail_N if kept is None else torch.logaddexp(kept.log_sum_N(), log_tail_N)
    log_Q_N = log_tail_N - log_z_N

    ce_N = log_z_N - gold_logit_N
    kd_N = torch.linalg.vecdot(drawn_slopes_NL, drawn_logits_NL - log_z_N[:, None])
    slope_sum_N, tail_slope_N = drawn_slopes_NL.sum(-1), torch.zeros_like(kd_N)
    if kept is not None:
        student_NJ = torch.cat([kept.logits_NK - log_z_N[:, None], log_Q_N[:, None]], dim=1)
        compare = divergence(mixture.objective, mixture.temperature)
        divergence_N, slopes_NJ = compare(kept.teacher_NJ, student_NJ)
        tail_slope_N = slopes_NJ[:, -1] - slope_sum_N  # of the tail, and of tail samples
        kd_N = kd_N + divergence_N - slope_sum_N * log_Q_N
        slope_sum_N = slopes_NJ.sum(-1)
    if not with_gradient:
        return kd_N, ce_N

    kd_scale_N, ce_scale_N = (targets.weight_N.to(kd_N.dtype) * share for share in mixture.shares(targets))
    slope_sum_N = kd_scale_N * slope_sum_N - ce_scale_N
    logits_NV.mul_(((kd_scale_N * tail_slope_N - slope_sum_N * log_Q_N.exp()) / sum_N)[:, None])
    if kept is not None:
        q_NK = student_NJ[:, :-1].exp()
        kept.write(logits_NV, kd_scale_N[:, None] * slopes_NJ[:, :-1] - slope_sum_N[:, None] * q_NK)
    logits_NV.scatter_add_(1, drawn_NL, kd_scale_N[:, None] * drawn_slopes_NL)
    logits_NV.scatter_add_(1, gold_N1, -ce_scale_N[:, None])
    return kd_N, ce_N


def _drawn(targets: PositionTargets, mixture: LossMixture, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Ids that count one by one for distillation, and their slopes; [N, 0] where there are none.

    An id that comes twice has the same slope both times, so that sums have the same bits in any order.
    """
    if targets.weights_NK is not None and targets.ids_NK is not None:
        return targets.ids_NK, -targets.weights_NK.to(dtype)
    if targets.tail_sample_ids_NS is None or targets.tail_logprob_N is None or not mixture.tail_sample_weight:
        none_N0 = targets.gold_N[:, None][:, :0]
        return none_N0, none_N0.to(dtype)
    is_drawn_NS = targets.tail_sample_ids_NS >= 0
    tail_N = mixture.tail_sample_weight * targets.tail_logprob_N.to(dtype).exp()
    slope_N = tail_N / is_drawn_NS.sum(-1).clamp_min(1)
    return targets.tail_sample_ids_NS.clamp_min(0), -slope_N[:, None] * is_drawn_NS
