"""Float32 matrix products on a CPU, without gradients, by the faster of the two libraries that PyTorch brings along.

PyTorch multiplies float32 by MKL, to which AMD's are processors in general (`MKL_VERBOSE=1`); oneDNN takes AVX-512
where it is. Which of them follows from the processor and the shape, never from what was faster today: a capture that
goes on after a kill must round as it did before. benchmarks/cpu_products.py compares them.

oneDNN is given whole `ROWS` of rows only, because it keeps what it made for each new number of them, and nothing
where memory may be refused, because it does not look whether it was and crashes.

Legend: N = rows, D = width, C = columns of the product.
"""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from torch.overrides import TorchFunctionMode

ROWS = 16


class OneDnnProducts(TorchFunctionMode):
    """Inside, oneDNN multiplies in float32 layers that are linear and whose inputs are whole `ROWS` of rows."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return (_linear if func is linear else func)(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if _are_plain(input, weight) and input.shape[:-1].numel() % ROWS == 0:
        return _by_one_dnn(input, weight, bias)
    return linear(input, weight, bias)


def _by_one_dnn(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return product


def fast_product(rows_ND: Tensor, weight_CD: Tensor) -> Tensor:
    """Their product [N, C] by oneDNN, for a weight that `is_fast`."""
    n_rows = len(rows_ND)
    return _by_one_dnn(pad(rows_ND, (0, 0, 0, -n_rows % ROWS)), weight_CD, None)[:n_rows]


@contextmanager
def products_of(model: nn.Module) -> Iterator[int]:
    """Inside, the layers of a model are multiplied by the faster library. Yields of how many tokens a pass must be a
    multiple for it.
    """
    if is_fast(next(model.parameters())):
        with OneDnnProducts():
            yield ROWS
    else:
        yield 1


def whole_length(n_rows: int, length: int, whole: int) -> int:
    """The least length, of at least `length`, at which `n_rows` rows have a multiple of `whole` tokens."""
    return length + -length % (whole // math.gcd(whole, n_rows))


def is_fast(weight: Tensor) -> bool:
    """Whether oneDNN is the faster one for this weight, here and now."""
    return _are_plain(weight) and _on_this_processor() and not _may_be_refused_memory()


def _are_plain(*tensors: Tensor) -> bool:
    """Whether they are of float32 on a CPU, and no gradient and no other dtype is asked for."""
    plain = all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
    return plain and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def one_dnn_is_faster(instructions: str, processor: str) -> bool:
    """Whether on a processor with these vector instructions, in PyTorch's words, that the system describes so."""
    return instructions == "AVX512" and "AuthenticAMD" in processor


@lru_cache(maxsize=1)
def _on_this_processor() -> bool:
    if not one_dnn_is_faster(torch.backends.cpu.get_cpu_capability(), _processor()):
        return False
    with suppress(AttributeError, RuntimeError, TypeError), torch.inference_mode():  # no stable part of PyTorch
        return bool(_by_one_dnn(torch.ones(2, 3), torch.ones(4, 3), torch.ones(4)).eq(4.0).all())
    return False


def _processor() -> str:
    """What the system says of the processor, its maker's name in it."""
    with suppress(OSError):
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    return platform.processor()


def _may_be_refused_memory() -> bool:
    """Whether this process may be told that there is no memory. Else it is killed, if there is none."""
    if sys.platform != "linux":
        return True
    import resource

    limits = (resource.getrlimit(which)[0] for which in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    return any(limit != resource.RLIM_INFINITY for limit in limits) or _never_overcommits()


@lru_cache(maxsize=1)
def _never_overcommits() -> bool:
    with suppress(OSError):
        return Path("/proc/sys/vm/overcommit_memory").read_text(encoding="ascii").strip() == "2"
    return False
