"""The weights of a student that training changes: what a checkpoint holds, and what is kept of the best step.

Frozen weights are not among them: an untrained student of the same identity has the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def trained_weights(module: nn.Module) -> dict[str, Tensor]:
    """The parameters themselves by name, those that are tied once."""
    return {name: weight.detach() for name, weight in module.named_parameters() if weight.requires_grad}


def copied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy in the machine's memory, which the next step leaves alone."""
    return {name: weight.to("cpu", copy=True) for name, weight in weights.items()}


@torch.no_grad()
def put_back(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a module trained weights; ValueError for those of another one."""
    own = trained_weights(module)
    if own.keys() != weights.keys():
        raise ValueError(f"weights of another module: {sorted(own.keys() ^ weights.keys())[:3]}")
    for name, weight in own.items():
        weight.copy_(weights[name])


def are_finite(module: nn.Module) -> bool:
    return all(bool(torch.isfinite(weight).all()) for weight in trained_weights(module).values())
