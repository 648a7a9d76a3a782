"""Float32 matrix products on a CPU, without gradients, by the faster of the two libraries that PyTorch brings along.

PyTorch takes MKL for float32, and MKL leaves half the width of an AMD processor with AVX-512 unused; oneDNN does not
(benchmarks/cpu_products.py compares them). Which of the two it is follows from the processor and the limits of the
process, never from what was faster today: a capture that goes on after a kill must round as it did before.

oneDNN is given whole `ROWS` of rows only, because it keeps what it made for each new number of them, and nothing
where memory may be refused, because it does not look whether it was and crashes.

Legend: N = rows, D = width, C = columns of the product.
"""

from __future__ import annotations

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
_MOST_MORE = 1 / 4  # of a pass that may be added to make it whole: more would cost what is gained


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
    is_plain_bias = bias is None or (_is_plain(bias) and bias.shape == weight.shape[:1])
    if _is_matrix(weight) and _is_plain(input) and is_plain_bias and input.shape[:-1].numel() % ROWS == 0:
        return _by_one_dnn(input, weight, bias)
    return linear(input, weight, bias)


def _by_one_dnn(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return product


def whole_rows(rows_ND: Tensor) -> Tensor:
    """The rows with as many of zeros after them as make them whole."""
    more = -len(rows_ND) % ROWS
    return pad(rows_ND, (0, 0, 0, more)) if more else rows_ND


def fast_product(rows: Tensor, weight_CD: Tensor) -> Tensor:
    """The product [..., C] of float32 rows [..., D] and a weight that `is_fast`, by oneDNN."""
    rows_ND = rows.flatten(0, -2)
    product_NC = _by_one_dnn(whole_rows(rows_ND), weight_CD, None)[: len(rows_ND)]
    return product_NC.view(*rows.shape[:-1], len(weight_CD))


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


def whole_shape(n_rows: int, length: int, whole: int, longest: float) -> tuple[int, int]:
    """Of the shapes (rows, length) that hold this one, are a multiple of `whole` and not above `longest` in length, the
    one of fewest tokens; this one where that would add too many.
    """
    lengths = range(length, int(min(length + whole - 1, max(length, longest))) + 1)
    shapes = [(rows, wide) for wide in lengths for rows in range(n_rows, n_rows + whole) if rows * wide % whole == 0]
    least = min(shapes, key=lambda shape: shape[0] * shape[1])
    return least if least[0] * least[1] <= (1 + _MOST_MORE) * n_rows * length else (n_rows, length)


def is_fast(weight: Tensor) -> bool:
    """Whether oneDNN is the faster one for products with this weight, here and now."""
    return (
        not _may_be_refused_memory()  # asked first: the others try it
        and _is_matrix(weight)
        and bool(torch.backends.mkldnn.enabled)
        and _on_this_processor()
    )


def _is_matrix(weight: Tensor) -> bool:
    return _is_plain(weight) and weight.dim() == 2 and weight.shape[1] > 0


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is of float32 on a CPU, of no kind that multiplies itself, and neither a gradient nor another dtype is
    asked for.
    """
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and tensor.layout == torch.strided
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def one_dnn_is_faster(instructions: str, processor: str) -> bool:
    """Whether on a processor with these vector instructions, in PyTorch's words, that Linux describes so."""
    return instructions == "AVX512" and "AuthenticAMD" in processor


@lru_cache(maxsize=1)
def _on_this_processor() -> bool:
    try:
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    instructions = torch.backends.cpu.get_cpu_capability()
    if not torch.backends.mkl.is_available() or not one_dnn_is_faster(instructions, processor):
        return False
    with suppress(AttributeError, RuntimeError, TypeError), torch.inference_mode():  # no stable part of PyTorch
        return bool(_by_one_dnn(torch.ones(2, 3), torch.ones(4, 3), torch.ones(4)).eq(4.0).all())
    return False


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
