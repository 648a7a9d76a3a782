"""Devices that a test runs on: the CPU everywhere, CUDA where it is, and several GPUs where there are several."""

from __future__ import annotations

import pytest
import torch

NEEDS_CUDA = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
NEEDS_TWO = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)]
SPREAD = pytest.param("spread", marks=NEEDS_TWO)  # one model over all GPUs
