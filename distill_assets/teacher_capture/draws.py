"""Ids drawn from the teacher's distributions, by random numbers that belong to the row.

Legend: P = supervised positions of a row, N = positions, V = real vocabulary ids, S = draws at a
position.

A row's random numbers are a function of its key and the kind of targets alone, so its draws do not
depend on the batch, the device, the process or the order in which rows are captured.

Probabilities are summed as integers. Integer sums are exact in every order, so an id without mass
(padding, no token) has an empty interval whatever a device's parallel sum does, and can never be drawn.
A probability is off by less than 2**-31, which is far below what a float32 softmax is off by.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill_assets.foundation.settings import TargetSettings

_BITS = 31  # of a random number: two of them multiplied fit an int64
_UNIT = 2.0**40  # integer mass of the likeliest id; 2**22 ids of it fit an int64
_SUM_ELEMENTS = 2**20  # integers summed at once: 8 MiB


def draws_per_position(targets: TargetSettings) -> int:
    """Random numbers a position takes; 0 where chance has no part."""
    return {"top_k": targets.tail_samples, "sampled": targets.samples, "threshold": 1}[targets.kind]


def row_bits(key: str, targets: TargetSettings, n_positions: int) -> NDArray[np.int32]:
    """The random numbers of one row, [P, S], uniform in 0 .. 2**31 - 1.

    They are the raw output of Philox, which NumPy keeps the same for ever; it does not promise that
    of the distributions it makes of it.
    """
    n_draws = draws_per_position(targets)
    seed = hashlib.blake2b(f"{targets.kind} {key}".encode(), digest_size=16).digest()
    raw = np.random.Philox(key=int.from_bytes(seed, "big")).random_raw(n_positions * n_draws)
    return (raw >> np.uint64(64 - _BITS)).astype(np.int32).reshape(n_positions, n_draws)


def draw_ids(mass_NV: Tensor, bits_NS: Tensor) -> Tensor:
    """Ids [N, S] drawn with replacement in proportion to `mass_NV` (float32, any scale per position).

    -1 throughout a position whose mass is 0.
    """
    drawn_NS = bits_NS.long()
    for part in _parts(mass_NV):
        mass_CV = mass_NV[part]
        # Scaled to its largest, so that the mass outside a sure support is resolved as finely as any.
        scale_C1 = mass_CV.amax(-1, keepdim=True).clamp_min(torch.finfo(mass_CV.dtype).tiny)
        sums_CV = _sums(mass_CV / scale_C1)
        places_CS = _share(sums_CV[:, -1:], drawn_NS[part])
        drawn_NS[part] = torch.where(sums_CV[:, -1:] > 0, _ids_at(sums_CV, places_CS), -1)
    return drawn_NS


def draw_systematically(light_NV: Tensor, other_N1: Tensor, tau: float, bits_N1: Tensor) -> Tensor:
    """Ids kept by chance, each with probability (its share of the whole mass) / `tau`; [N, S], -1 where none.

    `light_NV` (float32, at most 1) is 0 for ids that are kept anyway; `other_N1` is the mass of those.
    The masses lie side by side on a line with a mark every `tau` of the whole, the first at random:
    an id with a mark is kept. One random number a position does, the chance of each id is exact, and
    the number kept varies by one only. An id of more than `tau` may appear twice.
    """
    n_marks = int(1.0 / tau) + 1
    steps_1S = torch.arange(n_marks, device=light_NV.device)[None]
    kept_NS = torch.empty((len(light_NV), n_marks), dtype=torch.int64, device=light_NV.device)
    for part in _parts(light_NV):
        sums_CV = _sums(light_NV[part])
        step_C1 = _share(sums_CV[:, -1:] + (other_N1[part] * _UNIT).long(), round(tau * 2**_BITS))
        marks_CS = _share(step_C1, bits_N1[part].long()) + steps_1S * step_C1
        kept_NS[part] = torch.where(marks_CS < sums_CV[:, -1:], _ids_at(sums_CV, marks_CS), -1)
    return kept_NS


def _parts(mass_NV: Tensor) -> list[slice]:
    rows = max(1, _SUM_ELEMENTS // mass_NV.shape[-1])
    return [slice(start, start + rows) for start in range(0, len(mass_NV), rows)]


def _sums(mass_CV: Tensor) -> Tensor:
    """Exact running sums, in integers: id i owns the places from the sum before it up to, without, its own."""
    return (mass_CV * _UNIT).long().cumsum(-1)


def _share(whole: Tensor, bits: Tensor | int) -> Tensor:
    """floor(whole * bits / 2**31), exact though the product needs more than 64 bits."""
    high, low = whole >> _BITS, whole & (2**_BITS - 1)
    return high * bits + (low * bits >> _BITS)


def _ids_at(sums_CV: Tensor, places_CS: Tensor) -> Tensor:
    """The ids that own these places; a place behind the last owner gives some id, for the caller to mask."""
    return torch.searchsorted(sums_CV, places_CS, right=True).clamp_max_(sums_CV.shape[-1] - 1)
