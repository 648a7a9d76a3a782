"""Sparse next-token distributions: some ids with their log-probabilities, and the mass of the rest.

Legend: P = supervised positions of a row, K = most ids kept at a position, N = ids kept in the
whole row (ragged: position p owns `offsets_P1[p]:offsets_P1[p + 1]`).

Position t holds the teacher's distribution of token t + 1 given tokens <= t.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

LOGPROB_STEP = 1 / 16  # nats a step of the compact code; a byte reaches down to -15.94


@dataclass(frozen=True)
class SparseTargets:
    """The targets of one row. Log-probabilities are natural, raw (T = 1), descending in a position.

    `tail_logprob_P` is the log of the mass outside the kept ids, -inf where nothing is outside.
    `gold_logprob_P` and `entropy_P` are NaN where they are not known, as in captures of other engines.
    """

    positions_P: NDArray[np.int32]
    offsets_P1: NDArray[np.int64]
    support_ids_N: NDArray[np.int32]
    support_logprobs_N: NDArray[np.float32]
    tail_logprob_P: NDArray[np.float32]
    gold_logprob_P: NDArray[np.float32]
    entropy_P: NDArray[np.float32]

    @property
    def n_positions(self) -> int:
        return len(self.positions_P)

    @property
    def kept_P(self) -> NDArray[np.int64]:
        """Ids kept at each position."""
        return np.diff(self.offsets_P1)

    def log_total_mass_P(self) -> NDArray[np.float32]:
        """log of support mass + tail mass at each position; about 0, off by the rounding of storage."""
        starts = self.offsets_P1[:-1]
        top = np.maximum(self.support_logprobs_N[starts], self.tail_logprob_P)  # descending: the first is the largest
        mass = np.exp(self.support_logprobs_N - np.repeat(top, self.kept_P), dtype=np.float64)
        total = np.add.reduceat(mass, starts) if len(starts) else np.zeros(0)
        total = total + np.exp((self.tail_logprob_P - top).astype(np.float64))
        return (top + np.log(total)).astype(np.float32)

    def normalized(self) -> SparseTargets:
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

    def narrowed(self, k: int, min_probability: float) -> SparseTargets:
        """At most k ids a position, of those only ids at least this likely (always the first); the mass of
        the others joins the tail.
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
        )

    def padded(self, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids [P, k] (0 where nothing) and log-probabilities [P, k] (-inf where nothing).

        Mask before arithmetic: -inf in a product gives NaN gradients.
        """
        slot_N = np.arange(len(self.support_ids_N)) - np.repeat(self.offsets_P1[:-1], self.kept_P)
        row_N = np.repeat(np.arange(self.n_positions), self.kept_P)
        ids_PK = np.zeros((self.n_positions, k), dtype=np.int64)
        logprobs_PK = np.full((self.n_positions, k), -np.inf, dtype=np.float32)
        ids_PK[row_N, slot_N] = self.support_ids_N
        logprobs_PK[row_N, slot_N] = self.support_logprobs_N
        return ids_PK, logprobs_PK


@dataclass(frozen=True)
class CapturedRow:
    """One example as the store gives it back. `weight` is the row's own training weight."""

    row: int
    key: str
    id: str | None
    input_ids: NDArray[np.int32]
    weight: float
    truncated: bool
    targets: SparseTargets


def encode_logprobs(logprobs: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Round to steps of 1/16 nat: q with log-probability = -q / 16, saturating at 255."""
    return np.clip(np.rint(-logprobs / LOGPROB_STEP), 0, 255).astype(np.uint8)


def decode_logprobs(q: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The log-probability a stored byte stands for."""
    return q.astype(np.float32) * np.float32(-LOGPROB_STEP)
