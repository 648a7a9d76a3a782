"""How exact the fused losses are: value and gradients in float32 beside the dense losses, autograd and float64.

Errors are relative in L2 over a tensor. The oracle holds all logits of all positions in float64 and
takes every loss as it is written (`tests/student_model/dense.py`).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from workload import arguments, show

from distill_assets.foundation.devices import resolve_device
from distill_assets.foundation.language_model import PlainHead
from distill_assets.student_model.fused_head import head_loss
from distill_assets.student_model.losses import PositionTargets
from tests.student_model.dense import LOSSES, dense_head_loss, random_targets


def main() -> None:
    options = arguments(
        __doc__,
        vocabulary=(int, 49_152, "ids"),
        positions=(int, 256, "positions"),
        k=(int, 32, "ids kept at a position"),
        width=(int, 256, "width of the hidden states"),
        chunk=(int, 100, "positions of a chunk"),
        device=(str, "auto", "device"),
    )
    results = [measure(name, options) for name in LOSSES]
    sizes = {name: getattr(options, name) for name in ("vocabulary", "positions", "k", "width", "chunk")}
    show("losses", results, options.json, **sizes)


def measure(name: str, options: Any) -> dict[str, Any]:
    form, mixture = LOSSES[name]
    device = resolve_device(options.device)
    v, unused = options.vocabulary, torch.tensor([], dtype=torch.int64, device=device)
    torch.manual_seed(0)
    hidden_ND = torch.randn(options.positions, options.width)
    weight_WD = torch.randn(v, options.width) * 2 / options.width**0.5
    teacher_NV = ((hidden_ND + torch.randn_like(hidden_ND)) @ weight_WD.T).double().log_softmax(-1)
    columns = vars(random_targets(form, teacher_NV, options.k, seed=1))
    targets = PositionTargets(**{column: None if t is None else t.to(device) for column, t in columns.items()})
    fused = _trainable(hidden_ND.to(device), weight_WD.to(device))
    loss, _, _ = head_loss(fused[0], PlainHead(fused[1], None), v, unused, targets, mixture, options.chunk)
    loss.backward()
    dense = _trainable(hidden_ND.to(device).double(), weight_WD.to(device).double())
    expected = dense_head_loss(dense[0], PlainHead(dense[1], None), v, unused, targets, mixture)
    expected.backward()
    return {
        "loss": name,
        "nats a position": loss.item() / options.positions,
        "error of the loss": _relative(loss.detach(), expected.detach()),
        "of the hidden states' gradient": _relative(fused[0].grad, dense[0].grad),
        "of the head's gradient": _relative(fused[1].grad, dense[1].grad),
    }


def _trainable(*tensors: Tensor) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in tensors]


def _relative(ours: Tensor | None, oracle: Tensor | None) -> float:
    assert ours is not None and oracle is not None
    return float((ours.double() - oracle).norm() / oracle.norm())


if __name__ == "__main__":
    main()
