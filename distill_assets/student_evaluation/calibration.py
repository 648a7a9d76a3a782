"""Does a model know how often it is right? Expected calibration error, before and after one temperature.

The temperature is fitted on about half of the rows, and both errors are measured on the others, so
that it cannot fit what it is judged by. A row's half follows from its key alone.

Legend: N = positions, H = temperatures tried, B = bins.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

N_BINS = 15
# Powers of two from 0.35 to 2.83, four an octave; a parabola through the best three finds what lies between.
_LOG2_STEP = 0.25
_LOG2_TEMPERATURES = np.arange(-6, 7) * _LOG2_STEP
TEMPERATURES: tuple[float, ...] = tuple(float(t) for t in 2.0**_LOG2_TEMPERATURES)


@dataclass(frozen=True)
class Calibration:
    """Calibration of one model on the positions of one half of the rows.

    `ece_share` is the expected calibration error as it is, `tempered_ece_share` with the logits
    divided by `temperature`; both are shares of 1.
    """

    temperature: float
    ece_share: float
    tempered_ece_share: float
    n_fitted_positions: int
    n_rows: int
    n_positions: int


def is_fitted_on(key: str) -> bool:
    """Whether the row with this key is of the half on which temperatures are fitted."""
    return hashlib.sha256(key.encode()).digest()[0] % 2 == 0


def nll_by_temperature(logits_NV: Tensor, gold_N: Tensor) -> NDArray[np.float64]:
    """Negative log-likelihood of the gold ids summed over the positions, at each of TEMPERATURES: [H], nats."""
    shifted_NV = logits_NV - logits_NV.amax(-1, keepdim=True)
    gold_logit_N = shifted_NV.gather(1, gold_N[:, None])[:, 0]
    scaled_NV = torch.empty_like(shifted_NV)
    sums = []
    for temperature in TEMPERATURES:
        torch.mul(shifted_NV, 1 / temperature, out=scaled_NV)
        nll_N = scaled_NV.exp_().sum(-1).log() - gold_logit_N / temperature
        sums.append(float(nll_N.sum(dtype=torch.float64)))
    return np.array(sums)


def fit_temperature(nll_H: NDArray[np.float64]) -> float:
    """The temperature of the least negative log-likelihood, of those from the first to the last tried."""
    best = int(nll_H.argmin())
    if not 0 < best < len(nll_H) - 1:
        return TEMPERATURES[best]
    before, here, after = nll_H[best - 1 : best + 2]
    offset = 0.5 * (before - after) / (before - 2 * here + after)
    return float(2.0 ** (_LOG2_TEMPERATURES[best] + offset * _LOG2_STEP))


def calibration_error(confidence_N: NDArray[np.floating], right_N: NDArray[np.bool_]) -> float:
    """Expected calibration error: mean distance of confidence and accuracy over N_BINS bins of equal width.

    `confidence_N` is the probability of the likeliest id, `right_N` whether that id came next. Guo
    et al., "On Calibration of Modern Neural Networks" (2017), section 2.
    """
    bin_N = np.minimum((confidence_N * N_BINS).astype(np.int64), N_BINS - 1)
    excess_B = np.bincount(bin_N, weights=confidence_N - right_N, minlength=N_BINS)
    return float(np.abs(excess_B).sum() / len(confidence_N))
