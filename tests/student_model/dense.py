"""Losses as they are written, over the whole vocabulary, with autograd: what the fused ones are held against."""

from __future__ import annotations

import torch
from torch import Tensor

from distill_assets.foundation.language_model import NEVER, PlainHead
from distill_assets.student_model.losses import LossMixture, PositionTargets


def dense_head_loss(
    hidden_ND: Tensor,
    head: PlainHead,
    n_real: int,
    unused: Tensor,
    targets: PositionTargets,
    mixture: LossMixture,
) -> Tensor:
    """Sum over positions of weight x mixed loss, in the dtype given; float64 for an oracle."""
    logits_NW = hidden_ND @ head.weight_WD.T
    if head.bias_W is not None:
        logits_NW = logits_NW + head.bias_W
    logits_NW = logits_NW * head.scale
    if head.cap is not None:
        logits_NW = head.cap * torch.tanh(logits_NW / head.cap)
    logq_NV = logits_NW[:, :n_real].index_fill(1, unused, NEVER).log_softmax(-1)
    ce_N = -logq_NV.gather(1, targets.gold_N[:, None])[:, 0]
    if targets.ids_NK is None:
        return targets.weight_N.to(ce_N.dtype) @ ce_N
    kd_N = _distillation(logq_NV, targets, mixture)
    return targets.weight_N.to(ce_N.dtype) @ (mixture.kd_weight * kd_N + (1 - mixture.kd_weight) * ce_N)


def _distillation(logq_NV: Tensor, targets: PositionTargets, mixture: LossMixture) -> Tensor:
    assert targets.ids_NK is not None
    logq_NK = logq_NV.gather(1, targets.ids_NK)
    if targets.weights_NK is not None:
        return -(targets.weights_NK.to(logq_NK.dtype) * logq_NK).sum(-1)
    assert targets.logprobs_NK is not None and targets.tail_logprob_N is not None
    logp_NK, tail_N = targets.logprobs_NK.to(logq_NK.dtype), targets.tail_logprob_N.to(logq_NK.dtype)
    log_Q_N = logq_NV.scatter(1, targets.ids_NK, -torch.inf).logsumexp(-1)
    logp_NJ, logq_NJ = torch.cat([logp_NK, tail_N[:, None]], 1), torch.cat([logq_NK, log_Q_N[:, None]], 1)
    if mixture.objective == "reverse_kl":
        kd_N = _kl(logq_NJ, logp_NJ)
    elif mixture.objective == "jsd":
        logm_NJ = ((logp_NJ.exp() + logq_NJ.exp()) / 2).log()
        kd_N = (_kl(logp_NJ, logm_NJ) + _kl(logq_NJ, logm_NJ)) / 2
    elif mixture.objective == "renormalized":
        kd_N = _kl(logp_NK.log_softmax(-1), logq_NK)
    elif mixture.temperature != 1.0:
        T, P_N, Q_S_N = mixture.temperature, logp_NK.exp().sum(-1), logq_NK.exp().sum(-1)
        kd_N = P_N * (P_N / Q_S_N).log() + tail_N.exp() * (tail_N - log_Q_N)
        kd_N = kd_N + P_N * T**2 * _kl((logp_NK / T).log_softmax(-1), (logq_NK / T).log_softmax(-1))
    else:
        kd_N = _kl(logp_NJ, logq_NJ)
    if targets.tail_sample_ids_NS is not None:
        drawn_NS = targets.tail_sample_ids_NS >= 0
        terms_NS = log_Q_N[:, None] - logq_NV.gather(1, targets.tail_sample_ids_NS.clamp_min(0))
        mean_N = (terms_NS * drawn_NS).sum(-1) / drawn_NS.sum(-1).clamp_min(1)
        kd_N = kd_N + mixture.tail_sample_weight * tail_N.exp() * mean_N
    return kd_N


def _kl(logp_NJ: Tensor, logq_NJ: Tensor) -> Tensor:
    return (logp_NJ.exp() * (logp_NJ - logq_NJ)).sum(-1)


# Every loss the product has, by name: the form of its targets, and the mixture.
LOSSES: dict[str, tuple[str, LossMixture]] = {
    "forward_kl": ("top_k", LossMixture("forward_kl", kd_weight=0.9)),
    "forward_kl, T = 2": ("top_k", LossMixture("forward_kl", temperature=2.0, kd_weight=0.9)),
    "forward_kl, tail samples": ("tail_samples", LossMixture("forward_kl", kd_weight=0.9, tail_sample_weight=0.5)),
    "reverse_kl": ("top_k", LossMixture("reverse_kl", kd_weight=0.9)),
    "jsd": ("top_k", LossMixture("jsd", kd_weight=0.9)),
    "renormalized": ("top_k", LossMixture("renormalized", kd_weight=0.9)),
    "weights": ("weights", LossMixture(kd_weight=0.9)),
    "cross-entropy": ("none", LossMixture()),
}


def random_targets(form: str, teacher_NV: Tensor, k: int, seed: int) -> PositionTargets:
    """Targets of a teacher's log-probabilities (-inf for ids that are not real); some gold tokens are kept ids."""
    generator = torch.Generator().manual_seed(seed)
    probabilities_NV = teacher_NV.exp()
    gold_N = probabilities_NV.multinomial(1, generator=generator)[:, 0]
    weight_N = 0.5 + torch.rand(len(gold_N), generator=generator)
    if form == "none":
        return PositionTargets(gold_N, weight_N)
    if form == "weights":
        ids_NK = probabilities_NV.topk(k).indices
        weights_NK = torch.rand(ids_NK.shape, generator=generator) / k
        return PositionTargets(gold_N, weight_N, ids_NK, weights_NK=weights_NK)
    top = teacher_NV.topk(k)
    outside_NV = teacher_NV.scatter(1, top.indices, -torch.inf)
    tail_N = outside_NV.logsumexp(-1)
    targets = PositionTargets(gold_N, weight_N, top.indices, top.values, tail_N)
    if form == "tail_samples":
        samples_NS = outside_NV.softmax(-1).multinomial(3, replacement=True, generator=generator)
        samples_NS[1, 1:] = -1  # fewer, and none
        samples_NS[2] = -1
        targets = PositionTargets(gold_N, weight_N, top.indices, top.values, tail_N, tail_sample_ids_NS=samples_NS)
    return targets
