"""What is measured, and the divergences: on K + 1 outcomes, and on the whole vocabulary.

Legend: N = positions, K = most ids kept at a position, V = ids both sides have. The K + 1 outcomes
of a position are the ids the teacher's record kept there and one bucket, the tail, for all others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Metric:
    """One figure: its key in JSON, how it is written, which direction is good and what it means.

    `column` is its field of `PositionScores`; `ideal` what the teacher has by definition, None
    where that is measured.
    """

    key: str
    column: str
    label: str
    unit: str
    better: Literal["lower", "higher"]
    style: Literal["number", "percent"]
    ideal: float | None
    meaning: str

    def to_json(self) -> dict[str, str]:
        """What stands beside its values, which are shares of 1 where the page says per cent."""
        values = "shares of 1" if self.style == "percent" else "as the unit says"
        return {
            "label": self.label, "unit": self.unit, "values": values, "better": self.better, "meaning": self.meaning,
        }  # fmt: skip


# From the record alone: no teacher is needed.
RECORD_METRICS = (
    Metric(
        "perplexity",
        "nll_N",
        "Perplexity",
        "",
        "lower",
        "number",
        None,
        "exp of the mean negative log-likelihood of the token that really comes next, over the whole vocabulary.",
    ),
    Metric(
        "kl_nats",
        "kl_N",
        "KL from teacher",
        "nats a position",
        "lower",
        "number",
        0.0,
        "Mean KL(teacher || model) on K + 1 outcomes: each id the capture kept, and one bucket for all others. "
        "Merging the others can only lower it: it is a lower bound of the KL on the whole vocabulary.",
    ),
    Metric(
        "agreement_share",
        "agrees_N",
        "Top-1 agreement",
        "% of positions",
        "higher",
        "percent",
        1.0,
        "Share of positions at which the model's likeliest token is the teacher's likeliest token.",
    ),
    Metric(
        "acceptance_share",
        "acceptance_N",
        "Expected acceptance",
        "% of drafted tokens",
        "higher",
        "percent",
        1.0,
        "Chance that speculative decoding keeps a token drafted by the model: the mean of the sum of min(teacher, "
        "model) over the K + 1 outcomes. With the tail as one bucket it is an upper bound.",
    ),
)

# Against the teacher's distribution over the whole vocabulary, which takes the teacher once more.
DENSE_METRICS = (
    Metric(
        "dense_kl_nats",
        "dense_kl_N",
        "KL from teacher, dense",
        "nats a position",
        "lower",
        "number",
        0.0,
        "Mean KL(teacher || model) over every id of the vocabulary both have.",
    ),
    Metric(
        "dense_reverse_kl_nats",
        "dense_reverse_kl_N",
        "Reverse KL, dense",
        "nats a position",
        "lower",
        "number",
        0.0,
        "Mean KL(model || teacher) over every id: large where the model says what the teacher would not.",
    ),
    Metric(
        "dense_top5_share",
        "dense_top5_N",
        "Top-5 agreement",
        "% of the teacher's five",
        "higher",
        "percent",
        1.0,
        "Mean share of the teacher's five likeliest tokens that are among the model's five likeliest.",
    ),
    Metric(
        "dense_acceptance_share",
        "dense_acceptance_N",
        "Expected acceptance, dense",
        "% of drafted tokens",
        "higher",
        "percent",
        1.0,
        "Mean of the sum of min(teacher, model) over every id, which is 1 - total variation: the chance that "
        "speculative decoding keeps a token drafted by the model.",
    ),
)
METRICS = RECORD_METRICS + DENSE_METRICS
BY_KEY = {metric.key: metric for metric in METRICS}


def compare_outcomes(
    teacher_NK: Floats, teacher_tail_N: Floats, model_NK: Floats, model_tail_N: Floats
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """KL(teacher || model) in nats and sum of min(teacher, model), both [N], on K + 1 outcomes.

    All arguments are log-probabilities; `teacher_NK` is -inf in slots that hold no id, where
    `model_NK` may hold anything finite. The acceptance of a drafted token is Leviathan et al.,
    "Fast Inference from Transformers via Speculative Decoding" (2023), section 3.
    """
    log_p = np.concatenate([teacher_NK, teacher_tail_N[:, None]], axis=1).astype(np.float64)
    log_q = np.concatenate([model_NK, model_tail_N[:, None]], axis=1).astype(np.float64)
    p, q = np.exp(log_p), np.exp(log_q)
    possible = p > 0  # 0 log 0 is 0, but -inf - -inf is not
    log_ratio = np.subtract(log_p, log_q, out=np.zeros_like(log_p), where=possible)
    return (p * log_ratio).sum(axis=1), np.minimum(p, q).sum(axis=1)


def compare_dense(log_p_NV: Tensor, log_q_NV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL(p || q), KL(q || p) in nats and sum of min(p, q), each [N], on the whole vocabulary.

    Log-probabilities must be finite; an id that is no outcome has one so low on both sides that
    its probability is 0.
    """
    p_NV, q_NV = log_p_NV.exp(), log_q_NV.exp()
    log_ratio_NV = log_p_NV - log_q_NV
    return (
        torch.linalg.vecdot(p_NV, log_ratio_NV),
        -torch.linalg.vecdot(q_NV, log_ratio_NV),
        torch.minimum(p_NV, q_NV).sum(-1),
    )
