"""Linear layers whose product is oneDNN's, and when they are taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from distill_assets.foundation.fingerprints import HashCache
from distill_assets.foundation.model_folders import resolve_model
from distill_assets.teacher_capture.cpu_linear import OneDnnLinear, one_dnn_is_faster, speed_up_linear_layers
from distill_assets.teacher_capture.teacher import load_teacher

HAS_ONE_DNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a PyTorch without oneDNN")
AMD, INTEL = "vendor_id\t: AuthenticAMD\n", "vendor_id\t: GenuineIntel\n"


def layers(bias: bool) -> tuple[nn.Linear, nn.Linear]:
    """The same layer twice, the second with oneDNN's product."""
    torch.manual_seed(0)
    plain, fast = nn.Linear(96, 80, bias=bias), nn.Linear(96, 80, bias=bias)
    fast.load_state_dict(plain.state_dict())
    fast.__class__ = OneDnnLinear
    return plain, fast


@HAS_ONE_DNN
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "rows",
    [torch.randn(3, 7, 96), torch.randn(96, 5).t(), torch.randn(7, 3, 96).transpose(0, 1), torch.randn(0, 96)],
    ids=["batch", "transposed", "swapped", "none"],
)
def test_the_product_is_the_same(rows: torch.Tensor, bias: bool) -> None:
    plain, fast = layers(bias)
    with torch.inference_mode():
        product = fast(rows)
    exact = nn.functional.linear(
        rows.double(), plain.weight.double(), plain.bias.double() if plain.bias is not None else None
    )
    assert product.dtype == torch.float32 and product.shape == exact.shape
    torch.testing.assert_close(product.double(), exact, rtol=0, atol=2e-6)


@HAS_ONE_DNN
def test_gradients_flow_as_ever() -> None:
    plain, fast = layers(bias=True)
    rows = torch.randn(4, 96)
    for layer in (plain, fast):
        layer(rows).square().sum().backward()
    assert plain.weight.grad is not None and fast.weight.grad is not None
    assert torch.equal(plain.weight.grad, fast.weight.grad)


def test_it_is_taken_by_what_the_processor_is() -> None:
    assert one_dnn_is_faster("AVX512", AMD)
    assert not one_dnn_is_faster("AVX2", AMD)
    assert not one_dnn_is_faster("AVX512", INTEL)
    assert not one_dnn_is_faster("NO AVX", "arm")


def test_a_teacher_has_such_layers_where_they_are_faster_and_keeps_all_else(teacher_folder: Path) -> None:
    cpuinfo = Path("/proc/cpuinfo")
    here = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    kind = OneDnnLinear if one_dnn_is_faster(torch.backends.cpu.get_cpu_capability(), here) else nn.Linear
    weights = resolve_model(str(teacher_folder), None, teacher_folder).weights(HashCache(Path("none.json")))
    load_teacher.cache_clear()
    for dtype, expected in (("float32", kind), ("bfloat16", nn.Linear)):
        model = load_teacher(weights, dtype, "cpu").model
        found = {type(layer) for layer in model.base_model.modules() if isinstance(layer, nn.Linear)}
        assert found == {expected}
        assert type(model.get_output_embeddings()) is nn.Linear
    load_teacher.cache_clear()


def test_layers_of_another_kind_stay() -> None:
    class Adapted(nn.Linear):
        pass

    body = nn.Sequential(Adapted(4, 4), nn.Linear(4, 4, dtype=torch.float64), nn.Embedding(4, 4))
    before = [type(layer) for layer in body]
    speed_up_linear_layers(body)
    assert [type(layer) for layer in body] == before
