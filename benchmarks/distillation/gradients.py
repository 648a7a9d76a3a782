"""Gradients of an arm beside dense ones, at a student half way through its training.

A batch's angle is bias and chance together; over many batches chance averages out, and what is left of the error
of the mean is bias, and the chance of that many batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from distill_assets.foundation.files import replacing, write_json

from .arms import DENSE, Arm
from .students import Workshop, batches_of, half_trained_student

_SEED = 1_000  # of the order of the batches, which no student has seen


def figures_file(shop: Workshop, arm: Arm) -> Path:
    return shop.students / "gradients" / f"{arm.slug}.json"


def _dense_file(shop: Workshop) -> Path:
    return shop.students / "gradients" / f"{DENSE}.npy"


def compare_gradients(shop: Workshop, arm: Arm) -> None:
    """Write an arm's figures; the dense arm, first, writes what the others are compared with."""
    torch.set_num_threads(1)
    figures_file(shop, arm).parent.mkdir(parents=True, exist_ok=True)
    if arm.name == DENSE:
        with replacing(_dense_file(shop)) as beside, beside.open("wb") as out:
            np.save(out, np.stack(list(_gradients(shop, arm))))
    expected_BP = np.load(_dense_file(shop), mmap_mode="r")
    angles, ratios = [], []
    total = np.zeros(expected_BP.shape[1])
    for gradient, expected in zip(_gradients(shop, arm), expected_BP, strict=True):
        norm, expected_norm = np.linalg.norm(gradient), np.linalg.norm(expected)
        angles.append(math.degrees(math.acos(min(1.0, float(gradient @ expected / (norm * expected_norm))))))
        ratios.append(float(norm / expected_norm))
        total += gradient
    expected_total = expected_BP.sum(0, dtype=np.float64)
    error = float(np.linalg.norm(total - expected_total) / np.linalg.norm(expected_total))
    figures = {"angle": float(np.mean(angles)), "norm_ratio": float(np.mean(ratios)), "mean_error": error}
    write_json(figures_file(shop, arm), figures)


def _gradients(shop: Workshop, arm: Arm) -> Iterator[NDArray[np.float32]]:
    """Of the whole student, batch by batch."""
    module = half_trained_student(shop, arm).train()
    for batch in batches_of(shop, arm, _SEED)[: shop.setting.gradient_batches]:
        module.zero_grad(set_to_none=True)
        module(**batch())["loss"].backward()
        parts = [parameter.grad.flatten() for parameter in module.parameters() if parameter.grad is not None]
        yield torch.cat(parts).numpy()
