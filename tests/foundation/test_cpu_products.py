"""Products by oneDNN: that they are right, when they are taken, and that a model's passes are whole."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from distill_assets.foundation.cpu_products import (
    ROWS,
    OneDnnProducts,
    fast_product,
    is_fast,
    one_dnn_is_faster,
    products_of,
    whole_shape,
)
from distill_assets.foundation.language_model import (
    head_blocks,
    head_logits,
    hidden_states,
    load_model,
    longest_padding,
)
from distill_assets.foundation.model_folders import ModelFolder

HAS_ONE_DNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a PyTorch without oneDNN")
AMD, INTEL = "vendor_id\t: AuthenticAMD\n", "vendor_id\t: GenuineIntel\n"
CPU = torch.device("cpu")
OP = "mkldnn::_linear_pointwise"


def operators(work: Callable[[], object]) -> set[str]:
    """The names of all operators that PyTorch runs meanwhile."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    return {event.key for event in profiler.key_averages()}


def rows_as(kind: str) -> torch.Tensor:
    torch.manual_seed(0)
    kinds = {
        "batch": torch.randn(4, 8, 96),
        "transposed": torch.randn(96, 32).t(),
        "swapped": torch.randn(8, 4, 96).transpose(0, 1),
        "every other": torch.randn(64, 96)[::2],
        "none": torch.randn(0, 96),
    }
    return kinds[kind]


@HAS_ONE_DNN
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["batch", "transposed", "swapped", "every other", "none"])
def test_the_product_is_the_same(kind: str, bias: bool) -> None:
    rows = rows_as(kind)
    layer = nn.Linear(96, 80, bias=bias)
    with torch.inference_mode():
        assert OP not in operators(lambda: layer(rows))
        with OneDnnProducts():
            assert OP in operators(lambda: layer(rows))
            product = layer(rows)
    exact = nn.functional.linear(rows.double(), layer.weight.double(), layer.bias.double() if bias else None)
    assert product.dtype == torch.float32 and product.shape == exact.shape
    torch.testing.assert_close(product.double(), exact, rtol=0, atol=2e-6)


@HAS_ONE_DNN
@pytest.mark.parametrize("shape", [(1,), (15,), (16,), (17,), (100,), (3, 7), (2, 8)])
def test_rows_that_are_not_whole_are_multiplied_as_such(shape: tuple[int, ...]) -> None:
    rows, weight = torch.randn(*shape, 24), torch.randn(40, 24)
    product = fast_product(rows, weight)
    assert product.shape == (*shape, 40) and product.is_contiguous()
    torch.testing.assert_close(product.double(), rows.double() @ weight.double().t(), rtol=0, atol=2e-5)


class Scaled(torch.Tensor):
    """A weight that multiplies itself, as those of quantisation and parallelism do."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [arg.as_subclass(torch.Tensor) if isinstance(arg, cls) else arg for arg in args]
        return 3.0 * func(*plain) if func is nn.functional.linear else func(*plain, **(kwargs or {}))


def odd(kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Arguments of `linear` that oneDNN is not for."""
    torch.manual_seed(0)
    rows, weight = torch.randn(ROWS, 8), torch.randn(4, 8)
    kinds: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = {
        "a row too many": (torch.randn(ROWS + 1, 8), weight, None),
        "float64": (rows.double(), weight.double(), None),
        "bfloat16": (rows.bfloat16(), weight.bfloat16(), None),
        "one bias for all": (rows, weight, torch.tensor(2.0)),
        "a bias of one": (rows, weight, torch.ones(1)),
        "a bias of a row": (rows, weight, torch.ones(1, 4)),
        "a vector": (rows, torch.randn(8), None),
        "no width": (torch.randn(ROWS, 0), torch.randn(4, 0), None),
        "another kind of weight": (rows, weight.as_subclass(Scaled), None),
    }
    return kinds[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "a row too many", "float64", "bfloat16", "one bias for all", "a bias of one", "a bias of a row", "a vector",
        "no width", "another kind of weight",
    ],
)  # fmt: skip
def test_what_one_dnn_is_not_for_is_left_to_pytorch(kind: str) -> None:
    rows, weight, bias = odd(kind)
    with torch.inference_mode():
        own = nn.functional.linear(rows, weight, bias)
        with OneDnnProducts():
            assert torch.equal(nn.functional.linear(rows, weight, bias), own)
            assert OP not in operators(lambda: nn.functional.linear(rows, weight, bias))


@pytest.mark.parametrize("asked", ["gradient", "autocast"])
def test_a_gradient_or_another_dtype_is_pytorch_s(asked: str) -> None:
    layer, rows = nn.Linear(8, 4), torch.randn(ROWS, 8)
    with torch.set_grad_enabled(asked == "gradient"), OneDnnProducts():
        with torch.autocast("cpu", torch.bfloat16, enabled=asked == "autocast"):
            assert OP not in operators(lambda: layer(rows))
        if asked == "gradient":
            layer(rows).sum().backward()
            assert layer.weight.grad is not None


def test_it_is_taken_by_what_the_processor_is() -> None:
    assert one_dnn_is_faster("AVX512", AMD)
    assert not one_dnn_is_faster("AVX2", AMD)
    assert not one_dnn_is_faster("AVX512", INTEL)
    assert not one_dnn_is_faster("NO AVX", "arm")


@given(st.integers(1, 100), st.integers(1, 2000), st.sampled_from([0, 300, 1024, float("inf")]))
def test_a_pass_is_made_whole_where_that_costs_little(n_rows: int, length: int, longest: float) -> None:
    rows, wide = whole_shape(n_rows, length, ROWS, longest)
    assert rows >= n_rows and wide >= length and rows * wide <= n_rows * length * 5 / 4
    assert wide <= max(length, longest)
    if (rows, wide) == (n_rows, length):
        # Whole already, or what one more row, or rows that are a multiple of 16 long, would add is too much.
        more = -n_rows % (ROWS // math.gcd(ROWS, length))
        assert n_rows * length % ROWS == 0 or (n_rows + more) * length > n_rows * length * 5 / 4
    else:
        assert rows * wide % ROWS == 0
    assert whole_shape(n_rows, length, 1, longest) == (n_rows, length)


@pytest.mark.parametrize("shape", [(3, 64), (1, 250), (31, 8)], ids=["whole", "wider", "a row more"])
def test_a_teacher_s_passes_are_by_one_dnn_where_that_is_faster(teacher_folder: Path, shape: tuple[int, int]) -> None:
    model = load_model(ModelFolder("tiny", teacher_folder, None), "float32", CPU)
    ids_BT = torch.arange(math.prod(shape)).view(shape)
    with torch.inference_mode():
        own_BTD = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
        ours_BTD = hidden_states(model, ids_BT)
        assert ours_BTD.shape == own_BTD.shape
        torch.testing.assert_close(ours_BTD, own_BTD, rtol=1e-4, atol=1e-4)
        fast = is_fast(model.get_output_embeddings().weight)
        assert (OP in operators(lambda: hidden_states(model, ids_BT))) == fast
    assert OP not in operators(lambda: hidden_states(model, ids_BT))


def test_a_head_s_blocks_are_by_one_dnn_where_that_is_faster(teacher_folder: Path) -> None:
    model = load_model(ModelFolder("tiny", teacher_folder, None), "float32", CPU)
    hidden_ND, none = torch.randn(21, model.config.hidden_size), torch.tensor([], dtype=torch.int64)
    with torch.inference_mode():
        own = model.get_output_embeddings()(hidden_ND)
        [(start, block)] = head_blocks(model, hidden_ND, len(own[0]), none)
        assert start == 0 and block.is_contiguous()
        torch.testing.assert_close(block, own, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(head_logits(model, hidden_ND), own, rtol=1e-4, atol=1e-4)
        fast = is_fast(model.get_output_embeddings().weight)
        for work in (lambda: list(head_blocks(model, hidden_ND, 300, none)), lambda: head_logits(model, hidden_ND)):
            assert (OP in operators(work)) == fast


SHAPE: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.mark.parametrize("length", [29, 30])
def test_a_row_as_long_as_the_model_has_positions_is_not_made_longer(length: int) -> None:
    """Its positions are learned: there is no vector for one more."""
    torch.manual_seed(0)
    config = OPTConfig(**SHAPE, word_embed_proj_dim=32, ffn_dim=48, max_position_embeddings=30)
    model = OPTForCausalLM(config).eval()
    assert longest_padding(model) == 30
    ids_BT = torch.arange(3 * length).view(3, length)
    with torch.inference_mode():
        own_BTD = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
        torch.testing.assert_close(hidden_states(model, ids_BT), own_BTD, rtol=1e-4, atol=1e-4)


def test_a_row_that_would_turn_by_its_neighbour_s_length_is_not_made_longer() -> None:
    """Beyond 15 tokens this model turns all of a row's positions by other angles."""
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 15, "factor": 4.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
    config = LlamaConfig(**SHAPE, intermediate_size=48, max_position_embeddings=64, rope_parameters=rope)
    model = LlamaForCausalLM(config).eval()
    assert longest_padding(model) == 0
    ids_BT = torch.arange(3 * 15).view(3, 15)
    with torch.inference_mode():
        own_BTD = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
        torch.testing.assert_close(hidden_states(model, ids_BT), own_BTD, rtol=1e-4, atol=1e-4)
        wider_BTD = hidden_states(model, nn.functional.pad(ids_BT, (0, 2)))[:, :15]
    assert (wider_BTD - own_BTD).abs().max() > 1e-2, "the fixture must need it"


def test_bfloat16_is_left_to_pytorch(teacher_folder: Path) -> None:
    model = load_model(ModelFolder("tiny", teacher_folder, None), "bfloat16", CPU)
    with torch.inference_mode(), products_of(model) as whole:
        assert whole == 1
        assert OP not in operators(lambda: hidden_states(model, torch.ones(2, 16, dtype=torch.int64)))


LIMITED = """
import resource, sys, torch
from distill_assets.foundation.cpu_products import is_fast, one_dnn_is_faster

torch.set_grad_enabled(False)
weight, cpuinfo = torch.ones(4, 4), open("/proc/cpuinfo").read()
limit, above = getattr(resource, sys.argv[1]), int(sys.argv[2])
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(limit, (used + above, resource.RLIM_INFINITY))
said = is_fast(weight)
resource.setrlimit(limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(said, is_fast(weight) == one_dnn_is_faster(torch.backends.cpu.get_cpu_capability(), cpuinfo))
"""


@HAS_ONE_DNN
@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
@pytest.mark.parametrize("above", [0, 1 << 40])
@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_where_memory_may_be_refused_nothing_is_left_to_one_dnn(limit: str, above: int) -> None:
    """Nor tried: the process would die of it."""
    done = subprocess.run([sys.executable, "-c", LIMITED, limit, str(above)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "False True\n"), done.stderr
