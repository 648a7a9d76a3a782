"""Head and loss in one against dense float64 and autograd: every loss, every kind of head, dtypes, memory, misuse."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill_assets.foundation.language_model import PlainHead
from distill_assets.student_model.fused_head import head_loss
from distill_assets.student_model.losses import LossMixture, PositionTargets
from tests.devices import DEVICES
from tests.student_model.dense import LOSSES, dense_head_loss, random_targets

N, D, V, W, K = 13, 6, 29, 32, 5  # three padding rows of the head
UNUSED = torch.tensor([4, 9])
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scaled": {"scale": 0.3},
    "capped": {"cap": 3.0},
    "all of it": {"bias": True, "scale": 1.7, "cap": 3.0},
}


def inputs(dtype: torch.dtype = torch.float64, head: str = "plain", **sizes: int) -> tuple[Tensor, PlainHead]:
    torch.manual_seed(1)
    n, d, w = sizes.get("n", N), sizes.get("d", D), sizes.get("w", W)
    settings = dict(HEADS[head])
    bias = torch.randn(w, dtype=dtype).requires_grad_() if settings.pop("bias", False) else None
    hidden_ND = torch.randn(n, d, dtype=dtype).requires_grad_()
    return hidden_ND, PlainHead(torch.randn(w, d, dtype=dtype).requires_grad_(), bias, **settings)


def targets_of(form: str, n: int = N, v: int = V, k: int = K) -> PositionTargets:
    teacher_NV = (2.0 * torch.randn(n, v, dtype=torch.float64, generator=torch.Generator().manual_seed(2))).index_fill(
        1, UNUSED, -torch.inf
    )
    return random_targets(form, teacher_NV.log_softmax(-1), k, seed=3)


def trained(hidden_ND: Tensor, head: PlainHead) -> list[Tensor]:
    return [tensor for tensor in (hidden_ND, head.weight_WD, head.bias_W) if tensor is not None]


def on(device: str, hidden_ND: Tensor, head: PlainHead) -> tuple[Tensor, PlainHead]:
    """The same on another device; gradients arrive at the tensors given."""
    bias_W = None if head.bias_W is None else head.bias_W.to(device)
    return hidden_ND.to(device), replace(head, weight_WD=head.weight_WD.to(device), bias_W=bias_W)


def there(device: str, targets: PositionTargets) -> PositionTargets:
    columns = {field.name: getattr(targets, field.name) for field in fields(PositionTargets)}
    return PositionTargets(**{name: None if c is None else c.to(device) for name, c in columns.items()})


def as_float64(hidden_ND: Tensor, head: PlainHead) -> tuple[Tensor, PlainHead]:
    hidden, weight, bias = (
        None if tensor is None else tensor.detach().double().requires_grad_()
        for tensor in (hidden_ND, head.weight_WD, head.bias_W)
    )
    assert hidden is not None and weight is not None
    return hidden, replace(head, weight_WD=weight, bias_W=bias)


def relative_error(ours: Tensor, oracle: Tensor) -> float:
    return float((ours.detach().double() - oracle.detach()).norm() / oracle.detach().norm())


@pytest.mark.parametrize(("name", "head"), [*itertools.product(LOSSES, ["plain"]), *[("forward_kl", h) for h in HEADS]])
def test_values_and_gradients_are_the_dense_ones(name: str, head: str) -> None:
    form, mixture = LOSSES[name]
    given, targets = inputs(head=head), targets_of(form)
    loss, kd, ce = head_loss(*given, V, UNUSED, targets, mixture, chunk_rows=4)  # the last chunk is short
    (1.7 * loss).backward()
    dense = as_float64(*given)
    expected = dense_head_loss(*dense, V, UNUSED, targets, mixture)
    (1.7 * expected).backward()
    torch.testing.assert_close(loss.detach(), expected.detach())
    kd_weight, ce_weight = mixture.shares(targets)
    torch.testing.assert_close(kd_weight * kd + ce_weight * ce, loss.detach())
    assert not kd.requires_grad and not ce.requires_grad
    for ours, oracle in zip(trained(*given), trained(*dense), strict=True):
        torch.testing.assert_close(ours.grad, oracle.grad)
    assert (given[1].weight_WD.grad[V:] == 0).all() and (given[1].weight_WD.grad[UNUSED] == 0).all()


class Again(torch.autograd.Function):
    """A function whose gradient is asked for many times, as gradcheck does: its loss is made anew for each."""

    @staticmethod
    def forward(ctx: Any, loss_of: Any, *tensors: Tensor) -> Tensor:
        ctx.loss_of = loss_of
        ctx.save_for_backward(*tensors)
        return loss_of(*tensors)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        with torch.enable_grad():
            tensors = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            loss = ctx.loss_of(*tensors)
        return (None, *torch.autograd.grad(loss, tensors, upstream[0]))


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str) -> None:
    form, mixture = LOSSES[name]
    hidden_ND, head = inputs(head="all of it")
    targets = targets_of(form)

    def loss_of(hidden_ND: Tensor, weight_WD: Tensor, bias_W: Tensor) -> Tensor:
        parts = replace(head, weight_WD=weight_WD, bias_W=bias_W)
        return head_loss(hidden_ND, parts, V, UNUSED, targets, mixture, chunk_rows=5)[0]

    assert torch.autograd.gradcheck(lambda *tensors: Again.apply(loss_of, *tensors), trained(hidden_ND, head))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LOSSES)
def test_float32_is_within_2e_5_of_float64(name: str, device: str) -> None:
    form, mixture = LOSSES[name]
    given = inputs(torch.float32, n=96, d=32, w=600)
    targets = targets_of(form, n=96, v=600, k=16)
    loss, _, _ = head_loss(*on(device, *given), 600, UNUSED.to(device), there(device, targets), mixture, chunk_rows=32)
    loss.backward()
    dense = as_float64(*given)
    expected = dense_head_loss(*dense, 600, UNUSED, targets, mixture)
    expected.backward()
    assert relative_error(loss, expected) < 2e-5
    for ours, oracle in zip(trained(*given), trained(*dense), strict=True):
        assert relative_error(ours.grad, oracle.grad) < 2e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_rounds_products_and_nothing_else(autocast: bool, device: str) -> None:
    """The oracle has the same bfloat16 weights. 200 chunks added up in bfloat16 would be off by more."""
    form, mixture = LOSSES["forward_kl"]
    given = inputs(torch.float32 if autocast else torch.bfloat16, n=200, d=32, w=64)
    targets = targets_of(form, n=200, v=64, k=16)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        loss, _, _ = head_loss(
            *on(device, *given), 64, UNUSED.to(device), there(device, targets), mixture, chunk_rows=1
        )
    loss.backward()
    assert loss.dtype == torch.float32
    dense = as_float64(*given)
    expected = dense_head_loss(*dense, 64, UNUSED, targets, mixture)
    expected.backward()
    assert relative_error(loss, expected) < 5e-4
    for ours, oracle in zip(trained(*given), trained(*dense), strict=True):
        assert ours.grad.dtype == ours.dtype
        assert relative_error(ours.grad, oracle.grad) < 1e-2


class Operations(TorchDispatchMode):
    """Counts matrix products, and remembers the most elements any operation gave back."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.products += any(name in str(func) for name in ("aten.mm", "aten.addmm"))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return result


def test_one_chunk_of_logits_at_a_time_and_three_products_a_chunk() -> None:
    given, targets = inputs(n=60), targets_of("top_k", n=60)
    with Operations() as seen:
        head_loss(*given, V, UNUSED, targets, LossMixture(), chunk_rows=15)[0].backward()
    assert seen.products == 3 * 4
    assert 15 * V <= seen.largest < 60 * V


def test_a_frozen_head_costs_no_product_and_a_loss_without_gradient_one() -> None:
    hidden_ND, head = inputs()
    head.weight_WD.requires_grad_(False)
    targets = targets_of("top_k")
    with Operations() as seen:
        head_loss(hidden_ND, head, V, UNUSED, targets, LossMixture(), N)[0].backward()
    assert seen.products == 2
    assert hidden_ND.grad is not None and head.weight_WD.grad is None
    with torch.no_grad(), Operations() as seen:
        loss, _, _ = head_loss(hidden_ND, head, V, UNUSED, targets, LossMixture(), N)
    assert seen.products == 1
    torch.testing.assert_close(loss, dense_head_loss(hidden_ND, head, V, UNUSED, targets, LossMixture()).detach())


def test_the_chunks_make_no_difference_but_rounding_and_the_same_call_gives_the_same_bits() -> None:
    form, mixture = LOSSES["forward_kl, tail samples"]
    targets = targets_of(form)
    results = []
    for rows in (N, 1, 3, 3):
        given = inputs(torch.float32, "bias")
        loss = head_loss(*given, V, UNUSED, targets, mixture, rows)[0]
        loss.backward()
        results.append([loss.detach(), *(tensor.grad for tensor in trained(*given))])
    for other in results[1:]:
        for ours, whole in zip(other, results[0], strict=True):
            torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-6)
    for ours, again in zip(results[2], results[3], strict=True):
        assert torch.equal(ours, again)


def test_no_position_is_a_loss_of_zero_with_gradients_of_zero() -> None:
    hidden_ND, head = inputs(head="all of it", n=0)
    empty = targets_of("top_k").rows(slice(0, 0))
    loss, kd, ce = head_loss(hidden_ND, head, V, UNUSED, empty, LossMixture())
    loss.backward()
    assert loss.item() == kd.item() == ce.item() == 0.0
    assert all((tensor.grad == 0).all() for tensor in trained(hidden_ND, head))


def test_a_second_derivative_is_refused() -> None:
    hidden_ND, head = inputs()
    loss, _, _ = head_loss(hidden_ND, head, V, UNUSED, targets_of("top_k"), LossMixture())
    with pytest.raises(RuntimeError, match="first derivatives only; call backward without create_graph"):
        torch.autograd.grad(loss, hidden_ND, create_graph=True)


def test_the_gradient_is_handed_over_once() -> None:
    hidden_ND, head = inputs()
    loss, _, _ = head_loss(hidden_ND, head, V, UNUSED, targets_of("top_k"), LossMixture())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()
