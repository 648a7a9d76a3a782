"""What is compared: the targets a student learns from, and the loss it learns by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

HARD, DENSE = "cross-entropy", "dense"  # what a teacher can add lies between these two
FAMILIES = ("renormalised", "top-k", "floor", "tail samples", "sampled", "threshold", "kd_weight 0.9")


@dataclass(frozen=True)
class Arm:
    """`targets` as in distill.yaml, None for the two ends; `mixture`: what differs from the loss's defaults."""

    name: str
    family: str
    targets: Mapping[str, Any] | None = None
    mixture: Mapping[str, Any] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        return "".join(c if c.isalnum() or c == "." else "-" for c in self.name)


def _top_k(k: int, **more: Any) -> dict[str, Any]:
    return {"kind": "top_k", "k": k, **more}


def _floor(p: float, samples: int, weight: float) -> Arm:
    targets = _top_k(64, min_probability=p, tail_samples=samples)
    name = f"p >= {p:g}, {samples} tail samples, lambda {weight:g}"
    return Arm(name, "tail samples", targets, {"tail_sample_weight": weight})


def _with_cross_entropy(arm: Arm) -> Arm:
    """With the token that came, as the product trains by default: it says something of the tail, too."""
    return Arm(f"{arm.name}, kd_weight 0.9", "kd_weight 0.9", arm.targets, {**arm.mixture, "kd_weight": 0.9})


_FLOORS = (0.01, 0.002)

_KD_ALONE: tuple[Arm, ...] = (
    *[Arm(f"renormalised top-{k}", "renormalised", _top_k(k), {"objective": "renormalized"}) for k in (12, 32, 50)],
    *[Arm(f"top-{k}", "top-k", _top_k(k)) for k in (8, 16, 32, 64)],
    *[Arm(f"p >= {p:g}", "floor", _top_k(64, min_probability=p)) for p in _FLOORS],
    *[_floor(p, samples, weight) for p in _FLOORS for samples in (2, 4) for weight in (0.25, 0.5, 1.0)],
    _floor(0.02, 4, 0.5),
    *[Arm(f"sampled {n}", "sampled", {"kind": "sampled", "samples": n}) for n in (8, 16, 50)],
    *[Arm(f"threshold {tau:g}", "threshold", {"kind": "threshold", "tau": tau}) for tau in (0.15, 0.1, 0.05)],
)
_ALSO_WITH_CROSS_ENTROPY = (
    *("top-16", "top-64", *(f"p >= {p:g}" for p in _FLOORS), "p >= 0.01, 4 tail samples, lambda 0.5"),
    *("sampled 16", "sampled 50", "threshold 0.05"),
)

ARMS: tuple[Arm, ...] = (
    Arm(HARD, HARD),
    Arm(DENSE, DENSE),
    *_KD_ALONE,
    *[_with_cross_entropy(arm) for arm in _KD_ALONE if arm.name in _ALSO_WITH_CROSS_ENTROPY],
)
BY_NAME = {arm.name: arm for arm in ARMS}
RECOMMENDED = "p >= 0.01, 4 tail samples, lambda 0.5, kd_weight 0.9"  # what `distill init` writes

JUDGED = (RECOMMENDED, "top-64, kd_weight 0.9")  # on fresh seeds in any case; the other: without `targets`

# What a run of minutes compares.
QUICK_ARMS = (
    HARD,
    DENSE,
    "renormalised top-12",
    "top-8",
    "top-64",
    "p >= 0.01",
    RECOMMENDED,
)
