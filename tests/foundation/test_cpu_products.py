"""Products by oneDNN: that they are right, when they are taken, and that a model's passes are whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
    whole_length,
)
from distill_assets.foundation.language_model import hidden_states, load_model
from distill_assets.foundation.model_folders import ModelFolder

HAS_ONE_DNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a PyTorch without oneDNN")
AMD, INTEL = "vendor_id\t: AuthenticAMD\n", "vendor_id\t: GenuineIntel\n"
CPU = torch.device("cpu")
OP = "mkldnn::_linear_pointwise"


def operators(work: object) -> set[str]:
    """The names of all operators that PyTorch runs meanwhile."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()  # type: ignore[operator]
    return {event.key for event in profiler.key_averages()}


@HAS_ONE_DNN
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "rows",
    [torch.randn(4, 8, 96), torch.randn(96, 32).t(), torch.randn(8, 4, 96).transpose(0, 1), torch.randn(0, 96)],
    ids=["batch", "transposed", "swapped", "none"],
)
def test_the_product_is_the_same(rows: torch.Tensor, bias: bool) -> None:
    torch.manual_seed(0)
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
@pytest.mark.parametrize("n_rows", [1, 15, 16, 17, 100])
def test_rows_that_are_not_whole_are_multiplied_as_such(n_rows: int) -> None:
    rows, weight = torch.randn(n_rows, 24), torch.randn(40, 24)
    product = fast_product(rows, weight)
    torch.testing.assert_close(product.double(), rows.double() @ weight.double().t(), rtol=0, atol=2e-5)


@HAS_ONE_DNN
@pytest.mark.parametrize("why", ["gradient", "rows", "dtype", "weight", "autocast"])
def test_what_one_dnn_is_not_for_is_left_to_pytorch(why: str) -> None:
    layer, rows = nn.Linear(8, 4), torch.randn(ROWS, 8)
    if why == "rows":
        rows = torch.randn(ROWS + 1, 8)
    if why == "dtype":
        layer, rows = layer.double(), rows.double()
    if why == "weight":
        layer = layer.bfloat16()
        rows = rows.bfloat16()
    with torch.set_grad_enabled(why == "gradient"), OneDnnProducts():
        with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
            assert OP not in operators(lambda: layer(rows))
        if why == "gradient":
            layer(rows).sum().backward()
            assert layer.weight.grad is not None


def test_it_is_taken_by_what_the_processor_is() -> None:
    assert one_dnn_is_faster("AVX512", AMD)
    assert not one_dnn_is_faster("AVX2", AMD)
    assert not one_dnn_is_faster("AVX512", INTEL)
    assert not one_dnn_is_faster("NO AVX", "arm")


@given(st.integers(1, 100), st.integers(1, 2000))
def test_the_least_length_at_which_a_pass_is_whole(n_rows: int, length: int) -> None:
    whole = whole_length(n_rows, length, ROWS)
    assert n_rows * whole % ROWS == 0 and whole_length(n_rows, length, 1) == length
    assert all(n_rows * shorter % ROWS for shorter in range(length, whole))


@pytest.mark.parametrize("length", [9, 16])
def test_a_teacher_s_passes_are_by_one_dnn_where_that_is_faster(teacher_folder: Path, length: int) -> None:
    model = load_model(ModelFolder("tiny", teacher_folder, None), "float32", CPU)
    ids_BT = torch.arange(3 * length).view(3, length)
    with torch.inference_mode():
        own_BTD = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
        ours_BTD = hidden_states(model, ids_BT)
        torch.testing.assert_close(ours_BTD, own_BTD, rtol=1e-4, atol=1e-4)
        fast = is_fast(model.get_output_embeddings().weight)
        assert (OP in operators(lambda: hidden_states(model, ids_BT))) == fast
    assert OP not in operators(lambda: hidden_states(model, ids_BT))


@pytest.mark.parametrize("length", [29, 30])
def test_a_row_as_long_as_the_model_has_positions_is_not_made_longer(length: int) -> None:
    """Its positions are learned: there is no vector for one more."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 1}
    model = OPTForCausalLM(OPTConfig(vocab_size=96, num_attention_heads=4, max_position_embeddings=30, **shape)).eval()
    ids_BT = torch.arange(3 * length).view(3, length)
    with torch.inference_mode():
        own_BTD = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
        torch.testing.assert_close(hidden_states(model, ids_BT), own_BTD, rtol=1e-4, atol=1e-4)


def test_a_row_that_would_turn_by_its_neighbour_s_length_is_not_made_longer() -> None:
    """Beyond 15 tokens this model turns all of a row's positions by other angles."""
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 15, "factor": 4.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, **shape, max_position_embeddings=64, rope_parameters=rope))
    ids_BT = torch.arange(3 * 15).view(3, 15)
    with torch.inference_mode():
        own_BTD = model.eval().base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
        torch.testing.assert_close(hidden_states(model, ids_BT), own_BTD, rtol=1e-4, atol=1e-4)
        wider_BTD = hidden_states(model, nn.functional.pad(ids_BT, (0, 2)))[:, :15]
    assert (wider_BTD - own_BTD).abs().max() > 1e-2, "the fixture must need it"


def test_bfloat16_is_left_to_pytorch(teacher_folder: Path) -> None:
    model = load_model(ModelFolder("tiny", teacher_folder, None), "bfloat16", CPU)
    with torch.inference_mode(), products_of(model) as whole:
        assert whole == 1
        assert OP not in operators(lambda: hidden_states(model, torch.ones(2, 16, dtype=torch.int64)))


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_where_memory_may_be_refused_nothing_is_left_to_one_dnn(limit: str) -> None:
    code = (
        "import resource, torch; from distill_assets.foundation.cpu_products import is_fast; "
        f"resource.setrlimit(resource.{limit}, (1 << 40, 1 << 40)); torch.set_grad_enabled(False); "
        "print(is_fast(torch.ones(4, 4)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
