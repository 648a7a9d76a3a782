"""Sparse next-token distributions: some ids with their log-probabilities, and the mass of the rest.

Legend: P = supervised positions of a row, K = most ids kept at a position, N = ids kept in the
whole row (ragged: position p owns `offsets_P1[p]:offsets_P1[p + 1]`), S = most tail samples of one.

Position t holds the teacher's distribution of token t + 1 given tokens <= t.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from distill_assets.dataset_shards.encode import EncodedRow
from distill_assets.foundation.fingerprints import SHORT

LOGPROB_STEP = 1 / 16  # nats a step of the compact code; a byte reaches down to -15.94
ROUNDED_LOG_MASS = 0.05  # nats that storage may move the mass of a position: half a step, and what saturates
_EXP_HOLDS = 64.0  # nats around 0 in which float32 holds an exponential and much smaller ones beside it
LEAST_MASS, MOST_MASS = 0.96, 1.04  # what a position of another engine may add up to: it may have rounded too


@dataclass(frozen=True, kw_only=True)
class SparseDistributions:
    """What the teacher says at P positions. Log-probabilities are natural, raw (T = 1), descending in a position.

    Kept ids are unique in a position and the first is the teacher's likeliest. `tail_logprob_P` is
    the log of the mass outside the kept ids, -inf where nothing is outside. `weights_N` says what
    a kept id counts in training where chance had a part in keeping it; None where it counts what it
    is likely.
    """

    offsets_P1: NDArray[np.int64]
    support_ids_N: NDArray[np.int32]
    support_logprobs_N: NDArray[np.float32]
    tail_logprob_P: NDArray[np.float32]
    weights_N: NDArray[np.float32] | None = None

    @property
    def n_positions(self) -> int:
        return len(self.tail_logprob_P)

    @property
    def kept_P(self) -> NDArray[np.int64]:
        """Ids kept at each position."""
        return np.diff(self.offsets_P1)

    def log_total_mass_P(self) -> NDArray[np.float32]:
        """log of support mass + tail mass at each position; about 0, off by the rounding of storage."""
        starts = self.offsets_P1[:-1]
        if not len(starts):
            return np.zeros(0, dtype=np.float32)
        logprobs_N, tail_P = self.support_logprobs_N, self.tail_logprob_P
        top_P = np.maximum(logprobs_N[starts], tail_P)  # descending: the first is the largest
        shift_P = np.where(np.abs(top_P) > _EXP_HOLDS, top_P, np.float32(0))
        if shift_P.any():
            logprobs_N, tail_P = logprobs_N - np.repeat(shift_P, self.kept_P), tail_P - shift_P
        # In float64, one after another: a position's mass is the same whatever stands beside it.
        mass_P = np.add.reduceat(np.exp(logprobs_N), starts, dtype=np.float64) + np.exp(tail_P, dtype=np.float64)
        return (shift_P + np.log(mass_P)).astype(np.float32)

    def normalized(self) -> Self:
        """Support and tail as a distribution over K + 1 outcomes: one log-sum-exp over what is stored."""
        log_total = self.log_total_mass_P()
        return replace(
            self,
            support_logprobs_N=self.support_logprobs_N - np.repeat(log_total, self.kept_P),
            tail_logprob_P=self.tail_logprob_P - log_total,
        )

    def kept_mass_P(self) -> NDArray[np.float32]:
        """Probability on the kept ids, of the normalised K + 1 outcomes."""
        return (1.0 - np.exp(self.normalized().tail_logprob_P, dtype=np.float64)).astype(np.float32)

    def padded(self, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids [P, k] (0 where nothing) and log-probabilities [P, k] (-inf where nothing). ValueError
        where a position keeps more than k.

        Mask before arithmetic: -inf in a product gives NaN gradients.
        """
        places_N = self._places_N(k)
        return (
            self._padded(k, places_N, self.support_ids_N, np.int64(0)),
            self._padded(k, places_N, self.support_logprobs_N, np.float32(-np.inf)),
        )

    def padded_weights(self, k: int) -> NDArray[np.float32]:
        """Weights [P, k] in the places of `padded`, 0 where nothing; of targets that have weights."""
        assert self.weights_N is not None
        return self._padded(k, self._places_N(k), self.weights_N, np.float32(0))

    def _places_N(self, k: int) -> NDArray[np.int64] | None:
        """Where each kept id stands among P x k places; None where every place is taken."""
        if (most := int(self.kept_P.max(initial=0))) > k:
            raise ValueError(f"a position keeps {most} ids, more than {k}")
        if len(self.support_ids_N) == self.n_positions * k:
            return None
        before_P = np.arange(self.n_positions) * k - self.offsets_P1[:-1]
        return np.arange(len(self.support_ids_N)) + np.repeat(before_P, self.kept_P)

    def _padded(self, k: int, places_N: NDArray[np.int64] | None, values_N: NDArray[Any], nothing: Any) -> NDArray[Any]:
        if places_N is None:
            return values_N.reshape(self.n_positions, k).astype(np.result_type(nothing))
        values_PK = np.full((self.n_positions, k), nothing)
        values_PK.reshape(-1)[places_N] = values_N
        return values_PK

    @staticmethod
    def joined(parts: Sequence[SparseDistributions]) -> SparseDistributions:
        """Those of several rows of one kind, one row after another."""
        ends_P = np.concatenate([part.offsets_P1[1:] for part in parts])
        before_R = np.cumsum([0, *(len(part.support_ids_N) for part in parts[:-1])])
        ends_P += np.repeat(before_R, [part.n_positions for part in parts])

        def column(name: str) -> NDArray[Any]:
            return np.concatenate([getattr(part, name) for part in parts])

        return SparseDistributions(
            offsets_P1=np.concatenate([[0], ends_P]),
            support_ids_N=column("support_ids_N"),
            support_logprobs_N=column("support_logprobs_N"),
            tail_logprob_P=column("tail_logprob_P"),
            weights_N=None if any(part.weights_N is None for part in parts) else column("weights_N"),
        )


@dataclass(frozen=True, kw_only=True)
class SparseTargets(SparseDistributions):
    """The targets of one row: distributions, where in the row they stand, and what else is known of them.

    `tail_sample_ids_PS` are ids drawn from the tail, -1 where there is none; None
    where no such ids were asked for. `gold_logprob_P` and `entropy_P` are NaN where they are not known,
    as in captures of other engines.
    """

    positions_P: NDArray[np.int32]
    gold_logprob_P: NDArray[np.float32]
    entropy_P: NDArray[np.float32]
    tail_sample_ids_PS: NDArray[np.int32] | None = None

    @property
    def tail_samples_P(self) -> NDArray[np.int64]:
        """Tail samples of each position; of targets that have them."""
        return (self._tail_sample_ids_PS >= 0).sum(-1, dtype=np.int64)

    @property
    def tail_sample_ids_M(self) -> NDArray[np.int32]:
        """Tail samples of all positions, one after another; of targets that have them."""
        return self._tail_sample_ids_PS[self._tail_sample_ids_PS >= 0]

    @property
    def _tail_sample_ids_PS(self) -> NDArray[np.int32]:
        assert self.tail_sample_ids_PS is not None
        return self.tail_sample_ids_PS

    def at(self, stays_P: NDArray[np.bool_]) -> SparseTargets:
        """The targets of the positions marked."""
        stays_N = np.repeat(stays_P, self.kept_P)
        return SparseTargets(
            positions_P=self.positions_P[stays_P],
            offsets_P1=np.concatenate([[0], self.kept_P[stays_P].cumsum()]).astype(np.int64),
            support_ids_N=self.support_ids_N[stays_N],
            support_logprobs_N=self.support_logprobs_N[stays_N],
            tail_logprob_P=self.tail_logprob_P[stays_P],
            gold_logprob_P=self.gold_logprob_P[stays_P],
            entropy_P=self.entropy_P[stays_P],
            weights_N=None if self.weights_N is None else self.weights_N[stays_N],
            tail_sample_ids_PS=None if self.tail_sample_ids_PS is None else self.tail_sample_ids_PS[stays_P],
        )

    def narrowed(self, k: int, min_probability: float) -> SparseTargets:
        """At most k ids a position, of those only ids at least this likely (always the first); the mass of
        the others joins the tail. Tail samples, drawn outside one support only, are left out. For targets without
        weights.
        """
        slot_N = np.arange(len(self.support_ids_N)) - np.repeat(self.offsets_P1[:-1], self.kept_P)
        keep_N = slot_N < k
        if min_probability > 0:
            keep_N &= (self.support_logprobs_N >= np.float32(np.log(min_probability))) | (slot_N == 0)
        dropped_P = np.bincount(
            np.repeat(np.arange(self.n_positions), self.kept_P),
            weights=np.where(keep_N, 0.0, np.exp(self.support_logprobs_N, dtype=np.float64)),
            minlength=self.n_positions,
        )
        with np.errstate(divide="ignore"):  # log(0) = -inf: nothing is outside
            tail_P = np.log(np.exp(self.tail_logprob_P, dtype=np.float64) + dropped_P)
        kept_P = np.add.reduceat(keep_N, self.offsets_P1[:-1]) if self.n_positions else self.kept_P
        return replace(
            self,
            offsets_P1=np.concatenate([[0], kept_P.cumsum()]).astype(np.int64),
            support_ids_N=self.support_ids_N[keep_N],
            support_logprobs_N=self.support_logprobs_N[keep_N],
            tail_logprob_P=tail_P.astype(np.float32),
            tail_sample_ids_PS=None,
        )


@dataclass(frozen=True)
class CapturedRow:
    """One example as the store gives it back. `weight` is the row's own training weight, `position_weights` [P] what
    each supervised position counts besides (None: 1). `passes`, how often an epoch a student is to see it, is not
    stored: that is a setting.
    """

    row: int
    key: str
    id: str | None
    input_ids: NDArray[np.int32]
    weight: float
    truncated: bool
    targets: SparseTargets
    position_weights: NDArray[np.float32] | None = None
    passes: float = 1.0

    @property
    def weighting(self) -> str:
        return weighting(self.position_weights)

    @staticmethod
    def of(number: int, encoded: EncodedRow, targets: SparseTargets) -> CapturedRow:
        """The row `number` of a shard with its targets."""
        return CapturedRow(
            row=number,
            key=encoded.key,
            id=encoded.id,
            input_ids=encoded.input_ids,
            weight=encoded.weight,
            truncated=encoded.truncated,
            targets=targets,
            position_weights=encoded.position_weights,
        )


def weighting(position_weights: NDArray[np.float32] | None) -> str:
    """A hash of the weights of a row's positions, "" where all are 1."""
    if position_weights is None:
        return ""
    return hashlib.sha256(position_weights.astype("<f4").tobytes()).hexdigest()[:SHORT]


def encode_logprobs(logprobs: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Round to steps of 1/16 nat: q with log-probability = -q / 16, saturating at 255."""
    return np.clip(np.rint(-logprobs / LOGPROB_STEP), 0, 255).astype(np.uint8)


def decode_logprobs(q: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The log-probability a stored byte stands for."""
    return q.astype(np.float32) * np.float32(-LOGPROB_STEP)
