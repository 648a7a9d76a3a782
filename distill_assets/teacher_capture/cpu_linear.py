"""Linear layers on a CPU by the faster of the two libraries that PyTorch brings along.

PyTorch multiplies float32 matrices by MKL, to which AMD's are processors in general (`MKL_VERBOSE=1`); oneDNN takes
AVX-512 where it is (benchmarks/cpu_linear.py). Which of them follows from the processor, never from what was faster
today: a capture that goes on after a kill must round as it did before.
"""

from __future__ import annotations

import platform
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn


class OneDnnLinear(nn.Linear):
    """A linear layer of float32 on a CPU whose product is oneDNN's, where no gradient is asked for."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if torch.is_grad_enabled() else _product(input, self.weight, self.bias)


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return product


def speed_up_linear_layers(body: nn.Module) -> None:
    """Where oneDNN is the faster one, let it multiply in a body's float32 layers on the CPU; the weights stay as they
    are, and so do layers of other kinds.
    """
    if not _here():
        return
    for layer in body.modules():
        if type(layer) is nn.Linear and layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32:
            layer.__class__ = OneDnnLinear


def one_dnn_is_faster(instructions: str, processor: str) -> bool:
    """Whether on a processor with these vector instructions, in PyTorch's words, that the system describes so."""
    return instructions == "AVX512" and "AuthenticAMD" in processor


@lru_cache(maxsize=1)
def _here() -> bool:
    if not one_dnn_is_faster(torch.backends.cpu.get_cpu_capability(), _processor()):
        return False
    with suppress(AttributeError, RuntimeError, TypeError), torch.inference_mode():  # no stable part of PyTorch
        return bool(_product(torch.ones(2, 3), torch.ones(4, 3), torch.ones(4)).eq(4.0).all())
    return False


def _processor() -> str:
    """What the system says of the processor, its maker's name in it."""
    with suppress(OSError):
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    return platform.processor()
