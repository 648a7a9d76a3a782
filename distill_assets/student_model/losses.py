"""What a student pays at a position, from its float32 logits and the teacher's sparse target.

Legend: N = positions, V = real vocabulary ids, K = most ids kept, S = tail samples. Every function
is pure, takes one chunk of rows and returns one value a position, in nats; who walks the chunks is
`module.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill_assets.foundation.language_model import NEVER


def forward_kl_tail_bucket(
    logits_NV: Tensor,
    ids_NK: Tensor,
    logprobs_NK: Tensor,
    tail_logprob_N: Tensor,
    tail_sample_ids_NS: Tensor | None = None,
    tail_sample_weight: float = 0.0,
) -> Tensor:
    """Forward KL over the kept ids S and one bucket for all others, [N] in nats.

    sum_S p_i (log p_i - log q_i) + m (log m - log Q), where m is the teacher's mass outside S and
    Q the student's. log Q is a log-sum-exp over the complement of S, never log(1 - sum q): that
    difference has no digits left where the tail is small. The gradient on the logits is q_i - p_i
    in S and q_j (1 - m / Q) outside.

    `logprobs_NK` is -inf where a slot holds nothing (its id is not looked at), `tail_logprob_N` is
    -inf where there is no tail; exponentiated, both together sum to 1. Where there is a tail, an id
    outside S must exist to hold it. A position with no kept id and all mass in the tail costs nothing.

    Tail samples j, drawn from the teacher's distribution outside S (-1 where there is none), add
    `tail_sample_weight` * m * mean_j(-log(q_j / Q)). The bucket does not see how the student spreads Q;
    with weight 1 the expected gradient is that of the KL over the whole vocabulary. The sum is a
    loss then and no divergence: it is not zero where the student equals the teacher.
    """
    kept_NK = logprobs_NK > -torch.inf
    some_N1 = kept_NK.any(-1, keepdim=True)
    first_N1 = ids_NK.gather(1, kept_NK.to(torch.int8).argmax(-1, keepdim=True))
    ids_NK = torch.where(kept_NK, ids_NK, first_N1)  # an empty slot repeats a kept id, so it masks nothing of its own

    # Support and complement are summed apart and joined: one pass over the vocabulary gives both Q and the whole.
    inside_NV = torch.zeros_like(logits_NV, dtype=torch.bool).scatter_(1, ids_NK, some_N1.expand_as(ids_NK))
    log_outside_N = logits_NV.masked_fill(inside_NV, NEVER).logsumexp(-1)
    kept_logits_NK = logits_NV.gather(1, ids_NK)
    log_z_N = torch.logaddexp(kept_logits_NK.masked_fill(~kept_NK, NEVER).logsumexp(-1), log_outside_N)
    log_q_NK = kept_logits_NK - log_z_N[:, None]
    # Masks come before arithmetic: an -inf that reaches a product gives NaN gradients.
    logprobs_NK = logprobs_NK.masked_fill(~kept_NK, 0.0)
    p_NK = logprobs_NK.exp() * kept_NK
    support_N = (p_NK * (logprobs_NK - log_q_NK)).sum(-1)

    log_tail_q_N = log_outside_N - log_z_N
    tailed_N = tail_logprob_N > -torch.inf
    tail_logprob_N = tail_logprob_N.masked_fill(~tailed_N, 0.0)
    tail_N = tail_logprob_N.exp() * tailed_N
    loss_N = support_N + tail_N * (tail_logprob_N - log_tail_q_N)
    if tail_sample_ids_NS is not None:
        drawn_NS = tail_sample_ids_NS >= 0
        some_N = drawn_NS.any(-1)
        drawn_logits_NS = logits_NV.gather(1, tail_sample_ids_NS.clamp_min(0)) * drawn_NS
        mean_N = drawn_logits_NS.sum(-1) / drawn_NS.sum(-1).clamp_min(1)
        loss_N = loss_N + tail_sample_weight * tail_N * some_N * (log_outside_N - mean_N)
    return loss_N


def weighted_cross_entropy(logits_NV: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """sum_i w_i (-log q_i) over ids whose weights estimate the teacher's distribution, [N] in nats.

    The weights need not sum to 1 at a position, only on average: dividing by their sum would bias
    the estimate. The expected gradient is that of the KL over the whole vocabulary; the value is off
    by the teacher's entropy. A slot of weight 0 counts nothing, whatever its id.
    """
    log_z_N = logits_NV.logsumexp(-1)
    return (weights_NK * (log_z_N[:, None] - logits_NV.gather(1, ids_NK))).sum(-1)


def cross_entropy(logits_NV: Tensor, gold_N: Tensor) -> Tensor:
    """-log q of the token that came, [N] in nats."""
    return logits_NV.logsumexp(-1) - logits_NV.gather(1, gold_N[:, None])[:, 0]
