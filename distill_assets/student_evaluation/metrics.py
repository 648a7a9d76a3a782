"""What is measured, and the two divergences on K + 1 outcomes.

Legend: N = positions, K = most ids kept at a position. The K + 1 outcomes of a position are the
ids the teacher's record kept there and one bucket, the tail, for all other ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Metric:
    """One figure: its key in JSON, how it is written, which direction is good and what it means."""

    key: str
    label: str
    unit: str
    better: Literal["lower", "higher"]
    style: Literal["number", "percent"]
    meaning: str


METRICS = (
    Metric(
        "perplexity",
        "Perplexity",
        "",
        "lower",
        "number",
        "exp of the mean negative log-likelihood of the token that really comes next, over the whole vocabulary.",
    ),
    Metric(
        "kl",
        "KL from teacher",
        "nats a position",
        "lower",
        "number",
        "Mean KL(teacher || model) on K + 1 outcomes: each id the capture kept, and one bucket for all others. "
        "Merging the others can only lower it: it is a lower bound of the KL on the whole vocabulary.",
    ),
    Metric(
        "agreement",
        "Top-1 agreement",
        "% of positions",
        "higher",
        "percent",
        "Share of positions at which the model's likeliest token is the teacher's likeliest token.",
    ),
    Metric(
        "acceptance",
        "Expected acceptance",
        "% of drafted tokens",
        "higher",
        "percent",
        "Chance that speculative decoding keeps a token drafted by the model: the mean of the sum of min(teacher, "
        "model) over the K + 1 outcomes. With the tail as one bucket it is an upper bound.",
    ),
)


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
