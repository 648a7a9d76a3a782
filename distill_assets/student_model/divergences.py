"""How far a student is from its teacher, over the outcomes that a sparse target tells apart.

Legend: N = positions, K = most ids kept, J = K + 1 outcomes: the kept ids, then the tail, the bucket of all others.

A divergence takes log-probabilities [N, J] of teacher and student and gives one value a position, in nats,
and its slopes [N, J]: how it changes with each of the student's log-probabilities log q_j. What that means for
logits is the same for all divergences and stands in `losses`. Slopes that differ by a multiple of q_j
mean the same there, because the q_j sum to 1: a constant added to d/dq_j may be left out.

An outcome that the teacher gives -inf does not exist: an empty slot, or the tail where all ids
are kept. It adds nothing to value or slopes, whatever the student's entry. The others must be all there
is: probabilities of the teacher that sum to 1, and of the student too, or reverse KL and JSD do not see
where the rest of the student's mass is.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from distill_assets.foundation.language_model import NEVER
from distill_assets.foundation.settings import Objective

Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def divergence(objective: Objective, temperature: float = 1.0) -> Divergence:
    """The divergence of that name. A temperature other than 1 belongs to forward_kl alone."""
    if temperature == 1.0:
        return _DIVERGENCES[objective]
    if objective != "forward_kl":
        raise ValueError(f"{objective} has no temperature")
    return lambda teacher_NJ, student_NJ: forward_kl_at_temperature(teacher_NJ, student_NJ, temperature)


def forward_kl(teacher_NJ: Tensor, student_NJ: Tensor) -> tuple[Tensor, Tensor]:
    """sum_j p_j (log p_j - log q_j), and its slopes -p_j."""
    p_NJ, logp_NJ, logq_NJ = _masked(teacher_NJ, student_NJ)
    return _sum(p_NJ, logp_NJ - logq_NJ), -p_NJ


def reverse_kl(teacher_NJ: Tensor, student_NJ: Tensor) -> tuple[Tensor, Tensor]:
    """sum_j q_j (log q_j - log p_j).

    d/dq_j is log q_j - log p_j + 1, of which the 1 may be left out; dq_j / dlog q_j is q_j.
    """
    _, logp_NJ, logq_NJ = _masked(teacher_NJ, student_NJ)
    slope_NJ = _student(teacher_NJ, logq_NJ) * (logq_NJ - logp_NJ)
    return slope_NJ.sum(-1), slope_NJ


def jsd(teacher_NJ: Tensor, student_NJ: Tensor) -> tuple[Tensor, Tensor]:
    """Jensen-Shannon divergence: KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2; at most log 2.

    d/dq_j is log(q_j / m_j) / 2 - (p_j + q_j) / 4 m_j + 1 / 2, of which the last two terms cancel.
    """
    p_NJ, logp_NJ, logq_NJ = _masked(teacher_NJ, student_NJ)
    logm_NJ = torch.logaddexp(logp_NJ, logq_NJ) - math.log(2.0)
    slope_NJ = 0.5 * _student(teacher_NJ, logq_NJ) * (logq_NJ - logm_NJ)
    return 0.5 * _sum(p_NJ, logp_NJ - logm_NJ) + slope_NJ.sum(-1), slope_NJ


def renormalized(teacher_NJ: Tensor, student_NJ: Tensor) -> tuple[Tensor, Tensor]:
    """Forward KL from the kept ids alone, their probabilities grown to 1, to the student's whole softmax.

    What many do with a top-k record: it takes the tail for impossible. Here to be compared with.
    """
    no_tail_N1 = torch.full_like(teacher_NJ[:, -1:], -torch.inf)
    kept_NJ = torch.cat([teacher_NJ[:, :-1], no_tail_N1], dim=1)
    log_total_N1 = kept_NJ.logsumexp(-1, keepdim=True)
    return forward_kl(kept_NJ - log_total_N1.masked_fill(log_total_N1 == -torch.inf, 0.0), student_NJ)


def forward_kl_at_temperature(teacher_NJ: Tensor, student_NJ: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Forward KL in its two parts, of which the second is softened: kept or tail, and which of the kept.

    With P and m = 1 - P the teacher's mass on kept ids and tail, and Q_S and Q the student's:
    P log(P / Q_S) + m log(m / Q) + P T^2 sum_S p'_j (log p'_j - log q'_j), where p' = softmax_S(log p / T)
    and q' = softmax_S(log q / T). At T = 1 that is forward KL; the tail is never softened, as nobody knows
    its shape. T^2 belongs to the loss, and so to its gradient, which otherwise would fade with 1 / T^2.

    Slopes: log Q_S grows with log q_j by q_j / Q_S, log q'_i by (1[i = j] - q'_j) / T. So on a kept id
    -P q_j / Q_S + P T (q'_j - p'_j), and on the tail -m.
    """
    p_NJ, logp_NJ, logq_NJ = _masked(teacher_NJ, student_NJ)
    absent_NK = teacher_NJ[:, :-1] == -torch.inf
    kept_p_NK = logp_NJ[:, :-1].masked_fill(absent_NK, NEVER)
    kept_q_NK = logq_NJ[:, :-1].masked_fill(absent_NK, NEVER)
    log_P_N1, log_Q_N1 = kept_p_NK.logsumexp(-1, keepdim=True), kept_q_NK.logsumexp(-1, keepdim=True)
    P_N1 = log_P_N1.exp()
    soft_p_NK, soft_q_NK = (kept_p_NK / temperature).log_softmax(-1), (kept_q_NK / temperature).log_softmax(-1)
    of_kept_N = _sum(soft_p_NK.exp(), (soft_p_NK - soft_q_NK).masked_fill(absent_NK, 0.0))
    kept_or_tail_N = (P_N1 * (log_P_N1 - log_Q_N1))[:, 0] + p_NJ[:, -1] * (logp_NJ[:, -1] - logq_NJ[:, -1])
    slope_NK = P_N1 * (temperature * (soft_q_NK.exp() - soft_p_NK.exp()) - (kept_q_NK - log_Q_N1).exp())
    value_N = kept_or_tail_N + temperature**2 * P_N1[:, 0] * of_kept_N
    return value_N, torch.cat([slope_NK, -p_NJ[:, -1:]], dim=1)


_DIVERGENCES: dict[Objective, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "renormalized": renormalized,
}


def _masked(teacher_NJ: Tensor, student_NJ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's probabilities, and both log-probabilities with 0 for an outcome that does not exist."""
    absent_NJ = teacher_NJ == -torch.inf
    return teacher_NJ.exp(), teacher_NJ.masked_fill(absent_NJ, 0.0), student_NJ.masked_fill(absent_NJ, 0.0)


def _student(teacher_NJ: Tensor, logq_NJ: Tensor) -> Tensor:
    """The student's probabilities of the outcomes that exist."""
    return logq_NJ.exp().masked_fill(teacher_NJ == -torch.inf, 0.0)


def _sum(weights_NJ: Tensor, values_NJ: Tensor) -> Tensor:
    return torch.linalg.vecdot(weights_NJ, values_NJ)
