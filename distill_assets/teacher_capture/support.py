"""Which ids of a position are kept, by each kind of targets.

Legend: N = positions, V = real vocabulary ids, K = slots for kept ids, S = draws at a position.

Whatever the kind: no id stands twice at a position, likelier ids come first, and the very first is
the likeliest of all, which a drawn support holds at weight 0 if chance left it out. So kept mass,
the tail and the likeliest id mean the same everywhere; training alone looks at the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distill_assets.foundation.settings import TargetSettings
from distill_assets.teacher_capture.draws import draw_ids, draw_systematically


@dataclass(frozen=True)
class Support:
    """Kept ids of N positions. `keep_NK` marks the filled slots, a prefix; an empty slot repeats the first id.

    `weights_NK` (0 in empty slots) estimates the distribution without bias; None for `top_k`, whose
    ids weigh what they are likely.
    """

    ids_NK: Tensor
    keep_NK: Tensor
    weights_NK: Tensor | None


def n_likeliest(targets: TargetSettings, n_real: int) -> int:
    """How many of the likeliest ids `choose_support` must be shown."""
    if targets.kind == "top_k":
        return targets.k
    # No more than 1 / tau ids are as likely as tau; one more, in case rounding lets one in.
    return 1 if targets.kind == "sampled" else min(n_real, int(1.0 / targets.tau) + 1)


def choose_support(
    likeliest_NK: Tensor, logprobs_NK: Tensor, mass_NV: Tensor, targets: TargetSettings, bits_NS: Tensor
) -> Support:
    """The ids these targets keep, of distributions in proportion to `mass_NV` (the largest is 1).

    `likeliest_NK` are the `n_likeliest` ids in descending order with their log-probabilities,
    `bits_NS` random numbers (see `draws`).
    """
    if targets.kind == "sampled":
        return _drawn(likeliest_NK, mass_NV, targets.samples, bits_NS)
    if targets.kind == "threshold":
        return _above_or_drawn(likeliest_NK, logprobs_NK, mass_NV, targets.tau, bits_NS)
    keep_NK = torch.ones_like(likeliest_NK, dtype=torch.bool)
    if targets.min_probability > 0:
        keep_NK = logprobs_NK >= math.log(targets.min_probability)
        keep_NK[:, 0] = True
    return Support(torch.where(keep_NK, likeliest_NK, likeliest_NK[:, :1]), keep_NK, None)


def _drawn(likeliest_N1: Tensor, mass_NV: Tensor, samples: int, bits_NS: Tensor) -> Support:
    """`sampled`: every draw weighs 1 / samples."""
    ids_NS = draw_ids(mass_NV, bits_NS)
    weights_NS = torch.full_like(ids_NS, 1.0 / samples, dtype=mass_NV.dtype)
    return _merged(likeliest_N1, ids_NS, weights_NS, mass_NV)


def _above_or_drawn(likeliest_NK: Tensor, logprobs_NK: Tensor, mass_NV: Tensor, tau: float, bits_N1: Tensor) -> Support:
    """`threshold`: ids of at least `tau` weigh what they are likely, those kept by chance weigh `tau`."""
    heavy_NK = logprobs_NK >= math.log(tau)
    masses_NK = mass_NV.gather(1, likeliest_NK)
    heavy_N1 = (masses_NK * heavy_NK).sum(-1, keepdim=True)
    # Taken out in place and put back: a copy would double what is held of the vocabulary.
    drawn_NS = draw_systematically(mass_NV.scatter_(1, likeliest_NK, masses_NK * ~heavy_NK), heavy_N1, tau, bits_N1)
    mass_NV.scatter_(1, likeliest_NK, masses_NK)
    first_N1 = likeliest_NK[:, :1]
    ids_NM = torch.cat([torch.where(heavy_NK, likeliest_NK, first_N1), drawn_NS.where(drawn_NS >= 0, first_N1)], 1)
    weights_NM = torch.cat([logprobs_NK.exp() * heavy_NK, tau * (drawn_NS >= 0)], 1)
    return _merged(first_N1, ids_NM, weights_NM, mass_NV)


def _merged(first_N1: Tensor, ids_NM: Tensor, weights_NM: Tensor, mass_NV: Tensor) -> Support:
    """Entries of equal ids added up, likelier ids first; `first_N1` leads, at weight 0 if it has no entry."""
    ids_NK, order_NK = torch.cat([first_N1, ids_NM], 1).sort(-1)
    weights_NK = torch.cat([torch.zeros_like(weights_NM[:, :1]), weights_NM], 1).gather(1, order_NK)
    slot_NK = torch.zeros_like(ids_NK)
    slot_NK[:, 1:] = (ids_NK[:, 1:] != ids_NK[:, :-1]).cumsum(-1)
    keep_NK = torch.arange(ids_NK.shape[1], device=ids_NK.device) <= slot_NK[:, -1:]
    weights_NK = torch.zeros_like(weights_NK).scatter_add_(1, slot_NK, weights_NK)
    ids_NK = first_N1.repeat(1, ids_NK.shape[1]).scatter_(1, slot_NK, ids_NK)
    # Another id may be exactly as likely as the first: the first is set above all, empty slots below.
    rank_NK = mass_NV.gather(1, ids_NK).masked_fill(ids_NK == first_N1, torch.inf).masked_fill(~keep_NK, -1.0)
    order_NK = rank_NK.argsort(dim=-1, descending=True, stable=True)
    return Support(*(column.gather(1, order_NK) for column in (ids_NK, keep_NK, weights_NK)))
