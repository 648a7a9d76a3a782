"""What targets are, whatever the teacher said: rules that follow from their settings and their arithmetic.

Nothing here asks a teacher, so each rule allows for all that storage may have rounded, and for no more.

Legend: P = supervised positions of a row, N = ids kept in the whole row, K = most ids kept at a position,
S = most tail samples of one, V = real vocabulary ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from distill_assets.foundation.settings import TargetSettings
from distill_assets.teacher_capture.arrow import POSITION_STEPS
from distill_assets.teacher_capture.sparse_targets import LOGPROB_STEP, CapturedRow, SparseTargets
from distill_assets.teacher_capture.store import Capture

FLOAT16 = 2.0**-11  # relative rounding of a stored float16
LOWEST_CODE = -255 * LOGPROB_STEP  # where the compact code saturates
NOTHING = -80.0  # the log of next to nothing: float32 sums lose less than this
_ARITHMETIC = 1e-3  # nats by which two ways to the same float32 figure may differ
_Values = TypeVar("_Values", float, NDArray[np.float64])


def position_rounding(value: _Values, precision: str) -> _Values:
    """The most by which storage rounds a tail, gold log-probability or entropy of this size."""
    return FLOAT16 * abs(value) + (0.5 / POSITION_STEPS if precision == "compact" else 0.0)


@dataclass(frozen=True)
class TargetRules:
    """What the rows of one capture must satisfy. `n_ids`: V, where it is known.

    Of an imported capture it is only known how many ids a position keeps at most: another engine's settings,
    and its rounding, are its own.
    """

    settings: TargetSettings
    n_ids: int | None
    is_imported: bool
    is_derived: bool

    @staticmethod
    def of(capture: Capture, n_ids: int | None) -> TargetRules:
        settings = TargetSettings.model_validate(dict(capture.identity["targets"]))
        return TargetRules(settings, n_ids, capture.is_imported, bool(capture.derived_from))

    def broken_by(self, row: CapturedRow) -> str | None:
        """The first rule that does not hold, and where; for rows whose ids and numbers are sound."""
        targets = row.targets
        rules = [self._count(targets)]
        if not self.is_imported:
            rules += [
                self._least_likely(targets),
                self._weights(targets),
                self._tail_samples(targets),
                self._gold(targets, row.input_ids[targets.positions_P + 1]),
                self._entropy(targets),
            ]
        for wrong_P, reason in rules:
            if wrong_P.any():
                return f"position {targets.positions_P[int(wrong_P.argmax())]} {reason}"
        return None

    @property
    def _half_step(self) -> float:
        """By how much a kept id's log-probability may be rounded, nats."""
        return LOGPROB_STEP / 2 if self.settings.precision == "compact" else 0.0

    def _rounding_P(self, values_P: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of tail, gold or entropy, which in a derived capture were rounded twice."""
        return (2 if self.is_derived else 1) * position_rounding(values_P, self.settings.precision)

    def _count(self, targets: SparseTargets) -> tuple[NDArray[np.bool_], str]:
        if self.settings.kind != "top_k":
            return np.zeros(1, dtype=bool), ""  # sums of weights tell
        k = self.settings.k if self.n_ids is None else min(self.settings.k, self.n_ids)
        if self.is_imported or self.settings.min_probability:
            return targets.kept_P > k, f"keeps more ids than k ({k})"
        return targets.kept_P != k, f"does not keep k ({k}) ids"

    def _least_likely(self, targets: SparseTargets) -> tuple[NDArray[np.bool_], str]:
        if not self.settings.min_probability:
            return np.zeros(1, dtype=bool), ""
        least = math.log(self.settings.min_probability) - self._half_step - _ARITHMETIC
        last_P = targets.support_logprobs_N[targets.offsets_P1[1:] - 1]
        return (last_P < least) & (targets.kept_P > 1), "keeps an id less likely than min_probability"

    def _weights(self, targets: SparseTargets) -> tuple[NDArray[np.bool_], str]:
        weights_N, starts = targets.weights_N, targets.offsets_P1[:-1]
        if weights_N is None:
            return np.zeros(1, dtype=bool), ""
        is_first_N = np.zeros(len(weights_N), dtype=bool)
        is_first_N[starts] = True
        is_idle_N = is_first_N & (weights_N == 0)  # the likeliest is kept whatever chance says
        sum_P = np.add.reduceat(weights_N, starts, dtype=np.float64)
        if self.settings.kind == "sampled":
            draws_N = weights_N * self.settings.samples
            is_right_N = is_idle_N | ((np.rint(draws_N) >= 1) & (np.abs(draws_N - np.rint(draws_N)) < 0.1))
            most_off = 0.5 / self.settings.samples
        else:
            tau = self.settings.tau
            off = self._half_step + _ARITHMETIC
            with np.errstate(divide="ignore"):
                is_own_N = np.abs(np.log(weights_N) - targets.support_logprobs_N) <= off
            is_light_N = targets.support_logprobs_N <= math.log(tau) + off
            is_own_N &= weights_N >= np.float32(tau * (1 - _ARITHMETIC))
            is_right_N = is_own_N | (is_light_N & (is_idle_N | (weights_N == np.float32(tau))))
            most_off = tau * (1 + _ARITHMETIC) + _ARITHMETIC  # one mark more or less
        wrong_P = ~np.logical_and.reduceat(is_right_N, starts) | (np.abs(sum_P - 1.0) > most_off)
        return wrong_P, f"has weights that kind {self.settings.kind} does not give"

    def _tail_samples(self, targets: SparseTargets) -> tuple[NDArray[np.bool_], str]:
        if targets.tail_sample_ids_PS is None:
            return np.zeros(1, dtype=bool), ""
        wanted_P = np.where(np.isneginf(targets.tail_logprob_P), 0, self.settings.tail_samples)
        place_N = np.repeat(np.arange(targets.n_positions, dtype=np.int64), targets.kept_P) << 32
        place_P1 = np.arange(targets.n_positions, dtype=np.int64)[:, None] << 32
        is_kept_PS = np.isin(targets.tail_sample_ids_PS + place_P1, targets.support_ids_N + place_N)
        is_kept_PS &= targets.tail_sample_ids_PS >= 0
        wrong_P = (targets.tail_samples_P != wanted_P) | is_kept_PS.any(-1)
        return wrong_P, f"has not {self.settings.tail_samples} tail_sample_ids from outside its support_ids"

    def _gold(self, targets: SparseTargets, gold_ids_P: NDArray[np.int32]) -> tuple[NDArray[np.bool_], str]:
        """gold_logprob beside what support and tail say of the token that came."""
        position_N = np.repeat(np.arange(targets.n_positions), targets.kept_P)
        gold_P = targets.gold_logprob_P.astype(np.float64)
        off_P = self._rounding_P(gold_P) + self._half_step + _ARITHMETIC
        is_gold_N = targets.support_ids_N == gold_ids_P[position_N]
        said_P = np.full(targets.n_positions, np.nan)
        said_P[position_N[is_gold_N]] = targets.support_logprobs_N[is_gold_N]
        lowest = LOWEST_CODE if self.settings.precision == "compact" else -np.inf
        differs_P = np.abs(np.maximum(gold_P, lowest) - said_P) > off_P  # False where gold is not kept
        most_P = np.maximum(targets.tail_logprob_P.astype(np.float64), NOTHING)
        most_P += self._rounding_P(most_P)
        if self.settings.kind == "top_k":
            most_P = np.minimum(most_P, targets.support_logprobs_N[targets.offsets_P1[1:] - 1])
        too_likely_P = np.isnan(said_P) & (gold_P > most_P + off_P)
        return differs_P | too_likely_P, "has a gold_logprob that its support and tail rule out"

    def _entropy(self, targets: SparseTargets) -> tuple[NDArray[np.bool_], str]:
        """The entropy of kept ids is known; that of the tail is least when it is on few ids, most when on all."""
        starts = targets.offsets_P1[:-1]
        normal = targets.normalized()
        logprobs_N, tail_P = normal.support_logprobs_N.astype(np.float64), normal.tail_logprob_P.astype(np.float64)
        head_P = np.add.reduceat(-np.exp(logprobs_N) * logprobs_N, starts)
        tail_P = np.maximum(tail_P, NOTHING)
        mass_P = np.exp(tail_P)
        # An id outside is no likelier than the tail, nor than the last id of top_k, or the first of any kind.
        bound_P = logprobs_N[targets.offsets_P1[1:] - 1 if self.settings.kind == "top_k" else starts]
        # What a derived tail was summed from may have been lifted to the end of the code, id by id.
        least_P = head_P if self.is_derived else head_P - mass_P * np.minimum(bound_P, tail_P)
        n_outside_P = math.inf if self.n_ids is None else np.maximum(self.n_ids - targets.kept_P, 1)
        most_P = head_P + mass_P * (np.log(n_outside_P) - tail_P)
        # Probabilities off by a factor of 1 + r, r small, that still add up to one change an entropy H by r H at most.
        relative = 2 * max(self._half_step, 2 * _ARITHMETIC)
        entropy_P = targets.entropy_P.astype(np.float64)
        off_P = self._rounding_P(entropy_P) + relative + 2 * _ARITHMETIC + targets.kept_P * math.exp(LOWEST_CODE) * 16
        below_P = entropy_P < least_P * (1 - relative) - off_P
        return below_P | (entropy_P > most_P * (1 + relative) + off_P), "has an entropy its support and tail rule out"
