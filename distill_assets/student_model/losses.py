"""What a student pays at a position, from its float32 logits and the teacher's sparse target.

Legend: N = positions, V = real vocabulary ids, K = most ids kept. Every function is pure, takes
one chunk of rows and returns one value a position, in nats; who walks the chunks is `module.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill_assets.foundation.language_model import NEVER


def forward_kl_tail_bucket(logits_NV: Tensor, ids_NK: Tensor, logprobs_NK: Tensor, tail_logprob_N: Tensor) -> Tensor:
    """Forward KL over the kept ids S and one bucket for all others, [N] in nats.

    sum_S p_i (log p_i - log q_i) + m (log m - log Q), where m is the teacher's mass outside S and
    Q the student's. log Q is a log-sum-exp over the complement of S, never log(1 - sum q): that
    difference has no digits left where the tail is small. The gradient on the logits is q_i - p_i
    in S and q_j (1 - m / Q) outside.

    `logprobs_NK` is -inf where a slot holds nothing (its id is not looked at), `tail_logprob_N` is
    -inf where there is no tail; exponentiated, both together sum to 1. Where there is a tail, an id
    outside S must exist to hold it. A position with no kept id and all mass in the tail costs nothing.
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
    return support_N + tail_logprob_N.exp() * tailed_N * (tail_logprob_N - log_tail_q_N)


def cross_entropy(logits_NV: Tensor, gold_N: Tensor) -> Tensor:
    """-log q of the token that came, [N] in nats."""
    return logits_NV.logsumexp(-1) - logits_NV.gather(1, gold_N[:, None])[:, 0]
