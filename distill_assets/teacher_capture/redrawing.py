"""Do stored draws follow from the teacher's distributions and the row's own random numbers?

A draw takes the id on whose stretch of a line its random number falls, the ids side by side in their order.
Other arithmetic moves the ends of a stretch a little: if log-probabilities are off by e, the mass F before an
end, and the mass 1 - F behind it, are off by a factor exp(e) at most, so the end moves by no more than
(exp(e) - 1) min(F, 1 - F). Turned round, each stored draw says how large e must be to explain it, and that is
compared with noise. Draws of one position keep their order when ends move, so they are matched in order.

Legend: C = positions, V = real vocabulary ids, K = most ids kept at a position, S = draws at a position,
M = draws of all positions.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from distill_assets.foundation.settings import TargetSettings
from distill_assets.teacher_capture.sparse_targets import SparseTargets

INEXPLICABLE = 80.0  # nats; what no noise explains
_BITS = 2.0**31  # random numbers are below it
_ON_THE_LINE = 4e-6  # by which float32 sums of probabilities, and marks in steps of 2**-31, may be off
_NONE = -1  # in place of an id: no id has the place


def unexplained_nats(
    logprobs_CV: NDArray[np.float32], stored: SparseTargets, settings: TargetSettings, bits_CS: NDArray[np.int32]
) -> NDArray[np.float64]:
    """For each draw, and each weight that chance has a part in, the nats [M] by which the log-probabilities would
    have to be off to explain what is stored; INEXPLICABLE for what cannot be.

    `bits_CS` are the random numbers of the positions (`draws.row_bits`).
    """
    mass_CV = np.exp(logprobs_CV, dtype=np.float64)
    # Draws are in proportion. A float32 log-sum-exp of 50,000 ids leaves all log-probabilities off by 1e-5 together,
    # which moves no draw, but every place on this line.
    mass_CV /= mass_CV.sum(-1, keepdims=True)
    places_CS = bits_CS / _BITS
    if settings.kind == "sampled":
        return _of_counts(mass_CV, stored, settings.samples, places_CS)
    if settings.kind == "threshold":
        return _of_marks(logprobs_CV, mass_CV, stored, settings.tau, places_CS)
    return _of_tail_samples(mass_CV, stored, places_CS)


def _of_tail_samples(
    mass_CV: NDArray[np.float64], stored: SparseTargets, places_CS: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Draws from what is outside the stored support, in the order of the random numbers."""
    position_N = np.repeat(np.arange(stored.n_positions), stored.kept_P)
    outside_CV = mass_CV.copy()
    outside_CV[position_N, stored.support_ids_N] = 0.0
    has_tail_C = ~np.isneginf(stored.tail_logprob_P)
    wanted_C = np.where(has_tail_C, places_CS.shape[1], 0)
    is_right_C = stored.tail_samples_P == wanted_C
    drawn_C = is_right_C & has_tail_C
    assert stored.tail_sample_ids_PS is not None
    wrong = np.full(int((~is_right_C).sum()), INEXPLICABLE)
    if not drawn_C.any():
        return wrong
    ids_CS = stored.tail_sample_ids_PS[drawn_C, : places_CS.shape[1]].astype(np.int64)
    drawn_CV = outside_CV[drawn_C]
    drawn_CV /= np.maximum(drawn_CV.sum(-1, keepdims=True), np.finfo(np.float64).tiny)
    nats_CS = _nats(drawn_CV, ids_CS, places_CS[drawn_C])
    nats_CS[np.take_along_axis(drawn_CV, ids_CS, -1) == 0] = INEXPLICABLE
    return np.concatenate([nats_CS.ravel(), wrong])


def _of_counts(
    mass_CV: NDArray[np.float64], stored: SparseTargets, samples: int, places_CS: NDArray[np.float64]
) -> NDArray[np.float64]:
    """`sampled`: an id of weight n / samples was drawn n times. The likeliest alone may have been drawn never."""
    k = int(stored.kept_P.max())
    ids_CK, logprobs_CK = stored.padded(k)
    counts_CK = np.rint(stored.padded_weights(k) * samples).astype(np.int64)
    is_idle_CK = ~np.isneginf(logprobs_CK) & (counts_CK == 0)
    is_right_C = (counts_CK.sum(-1) == samples) & ~is_idle_CK[:, 1:].any(-1) & (counts_CK >= 0).all(-1)
    order_CK = ids_CK.argsort(-1, kind="stable")
    ids_CK, counts_CK = (np.take_along_axis(values, order_CK, -1)[is_right_C] for values in (ids_CK, counts_CK))
    drawn_CS = np.repeat(ids_CK.ravel(), counts_CK.ravel()).reshape(len(ids_CK), samples)
    nats_CS = _nats(mass_CV[is_right_C], drawn_CS, np.sort(places_CS[is_right_C], -1))
    return np.concatenate([nats_CS.ravel(), np.full(int((~is_right_C).sum()), INEXPLICABLE)])


def _of_marks(
    logprobs_CV: NDArray[np.float32],
    mass_CV: NDArray[np.float64],
    stored: SparseTargets,
    tau: float,
    places_C1: NDArray[np.float64],
) -> NDArray[np.float64]:
    """`threshold`: ids of weight tau lie under a mark, one every tau; the weight of others is their probability."""
    k = int(stored.kept_P.max())
    ids_CK, stored_CK = stored.padded(k)
    weights_CK = stored.padded_weights(k)
    is_kept_CK = ~np.isneginf(stored_CK)
    is_drawn_CK = is_kept_CK & (weights_CK == np.float32(tau))
    is_heavy_CK = is_kept_CK & ~is_drawn_CK & (weights_CK > 0)
    logprobs_CK = np.take_along_axis(logprobs_CV, ids_CK, -1).astype(np.float64)
    above_CK = logprobs_CK - math.log(tau)
    with np.errstate(divide="ignore", invalid="ignore"):  # weights that are not positive belong to no heavy id
        off_CK = np.maximum(np.abs(np.log(weights_CK) - logprobs_CK), -above_CK)
    nats_CK = np.where(is_heavy_CK, off_CK, np.maximum(above_CK, 0.0))
    nats_CK[:, 1:][is_kept_CK[:, 1:] & (weights_CK[:, 1:] <= 0)] = INEXPLICABLE

    n_marks = int(1.0 / tau) + 1
    position_C, slot_C = np.nonzero(is_heavy_CK)
    light_CV = mass_CV.copy()
    light_CV[position_C, ids_CK[position_C, slot_C]] = 0.0
    is_right_C = is_drawn_CK.sum(-1) <= n_marks
    end = logprobs_CV.shape[1]
    drawn_CK = np.sort(np.where(is_drawn_CK, ids_CK, end), -1)[is_right_C, :n_marks]
    drawn_CS = np.full((len(drawn_CK), n_marks), _NONE)
    drawn_CS[:, : drawn_CK.shape[1]] = np.where(drawn_CK < end, drawn_CK, _NONE)
    marks_CS = (places_C1[is_right_C] + np.arange(n_marks)) * tau
    nats_CS = _nats(light_CV[is_right_C], drawn_CS, marks_CS)
    wrong = np.full(int((~is_right_C).sum()), INEXPLICABLE)
    return np.concatenate([np.minimum(nats_CK[is_kept_CK], INEXPLICABLE), nats_CS.ravel(), wrong])


def _nats(
    mass_CV: NDArray[np.float64], ids_CS: NDArray[np.int64], places_CS: NDArray[np.float64]
) -> NDArray[np.float64]:
    """How far [C, S] log-probabilities are off if these ids own these places; for _NONE, if nobody does."""
    sums_CV = mass_CV.cumsum(-1)
    is_none_CS = ids_CS == _NONE
    ids_CS = np.where(is_none_CS, 0, ids_CS)
    upper_CS = np.where(is_none_CS, np.inf, np.take_along_axis(sums_CV, ids_CS, -1))
    lower_CS = np.where(is_none_CS, sums_CV[:, -1:], upper_CS - np.take_along_axis(mass_CV, ids_CS, -1))
    edge_CS = np.where(places_CS < lower_CS, lower_CS, upper_CS)
    off_CS = np.maximum(lower_CS - places_CS, places_CS - upper_CS) - _ON_THE_LINE
    room_CS = np.maximum(np.minimum(edge_CS, 1.0 - edge_CS), np.finfo(np.float64).tiny)
    nats_CS = np.where(off_CS > 0, np.log1p(np.maximum(off_CS, 0.0) / room_CS), 0.0)
    return np.minimum(nats_CS, INEXPLICABLE)
