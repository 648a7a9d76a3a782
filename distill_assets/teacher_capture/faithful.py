"""Does a capture say what the teacher says? A sample of rows is scored again and compared.

What may differ is measured, not guessed: the same rows scored one at a time and all together differ by
the order of arithmetic alone, and storage rounds by amounts that are known. Log-probabilities are compared
at the ids that are stored, whichever they are, so that every kind of target is treated alike.

Legend: P = supervised positions of a row, N = ids kept in the whole row, K = most ids kept at a position,
V = real vocabulary ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from distill_assets.foundation.fingerprints import digest
from distill_assets.foundation.language_model import HEAD_ROWS, hidden_states, real_logits
from distill_assets.teacher_capture.identity import CaptureSpec
from distill_assets.teacher_capture.inspection import position_rounding
from distill_assets.teacher_capture.sparse_targets import LOGPROB_STEP, CapturedRow, SparseTargets
from distill_assets.teacher_capture.store import Capture, read_row_group, read_row_keys
from distill_assets.teacher_capture.teacher import Teacher, teacher_in_turn

SAMPLE_ROWS, SAMPLE_TOKENS = 8, 2000
NOISES = 4.0  # times the measured noise: other batches than the two that were tried
LEAST_NOISE = 1e-3  # nats; float32 on another machine
LOGITS = 16.0  # a large logit: half precision rounds it by as many of its steps, even where two batches agree
_LOWEST = -255 * LOGPROB_STEP  # where the compact code saturates


@dataclass(frozen=True)
class Compared:
    """A figure, the same figure of the teacher against itself, and the most that noise and rounding explain."""

    value: float
    noise: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.value <= self.allowed


@dataclass(frozen=True)
class FaithfulReport:
    """`kl`: mean over positions of KL(teacher now || stored) on the kept ids and the rest, nats; `difference`,
    `tail_difference`: the largest of a kept id's, and of the rest's, log-probability, nats. Tails that were
    derived from another capture are sums of rounded values and only part of the KL: `derived` says of how
    many rows. All zero when there was no row to ask about.
    """

    rows: int
    positions: int
    derived: int
    kl: Compared
    difference: Compared
    tail_difference: Compared

    @property
    def passed(self) -> bool:
        return self.kl.passed and self.difference.passed and self.tail_difference.passed


def check_faithful(spec: CaptureSpec, captures: Sequence[Capture], device: str) -> FaithfulReport:
    """Score a sample of the captured rows again, alone and all in one batch, and compare with what is stored.

    The sample is the same for the same captures. Give captures of this very teacher. CaptureError when a
    file is damaged; no teacher is loaded for no row.
    """
    sample = _sample(captures)
    if not sample:
        nothing = Compared(0.0, 0.0, 0.0)
        return FaithfulReport(0, 0, 0, nothing, nothing, nothing)
    rows = [row for row, _ in sample]
    with teacher_in_turn(spec.weights, spec.dtype, device) as teacher:
        alone = [_score_batch(teacher, [row])[0] for row in rows]
        pair = rows if len(rows) > 1 else rows * 2  # a batch of one is no batch
        together = _score_batch(teacher, pair)[: len(rows)]
    return _report(spec, sample, alone, together)


def _sample(captures: Sequence[Capture]) -> list[tuple[CapturedRow, bool]]:
    """At most SAMPLE_ROWS rows of about SAMPLE_TOKENS tokens over all captures, and whether each is derived."""
    ends = np.cumsum([capture.stats.rows for capture in captures])
    if not len(ends):
        return []
    names = [[capture.capture_id, capture.shard, capture.version] for capture in captures]
    generator = np.random.default_rng(int(digest(names), 16))
    chosen = generator.choice(int(ends[-1]), size=min(SAMPLE_ROWS, int(ends[-1])), replace=False)
    sample: list[tuple[CapturedRow, bool]] = []
    tokens = 0
    for number in chosen:
        which = int(np.searchsorted(ends, number, side="right"))
        capture = captures[which]
        row = _read_row(capture, int(number - (ends[which] - capture.stats.rows)))
        tokens += len(row.input_ids)
        if sample and tokens > SAMPLE_TOKENS:
            break
        sample.append((row, bool(capture.derived_from)))
    return sample


def _read_row(capture: Capture, number: int) -> CapturedRow:
    known = read_row_keys(capture.path)[number]
    rows = read_row_group(capture.path, known.row_group, [known.key])
    return next((row for row in rows if row.row == number), rows[0])


@torch.inference_mode()
def _score_batch(teacher: Teacher, rows: Sequence[CapturedRow]) -> list[SparseTargets]:
    """The teacher's log-probabilities of the ids that are stored, and of the rest, for each row, in one pass."""
    ids_BT = torch.zeros((len(rows), max(len(row.input_ids) for row in rows)), dtype=torch.int64)
    for b, row in enumerate(rows):
        ids_BT[b, : len(row.input_ids)] = torch.from_numpy(row.input_ids.astype(np.int64))
    hidden_BTD = hidden_states(teacher.model, ids_BT.to(teacher.device))
    scored = []
    for b, row in enumerate(rows):
        targets = row.targets
        position_P = torch.from_numpy(targets.positions_P.astype(np.int64)).to(hidden_BTD.device)
        ids_PK, stored_PK = targets.padded(int(targets.kept_P.max()))
        kept_PK = ~np.isneginf(stored_PK)
        ids_PK = np.where(kept_PK, ids_PK, ids_PK[:, :1])  # a slot that is empty repeats the first id
        parts = [
            _logprobs(teacher, hidden_BTD[b, position_P[start : start + HEAD_ROWS]], ids_PK[start : start + HEAD_ROWS])
            for start in range(0, targets.n_positions, HEAD_ROWS)
        ]
        logprobs_PK, tail_P = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        scored.append(replace(targets, support_logprobs_N=logprobs_PK[kept_PK], tail_logprob_P=tail_P))
    return scored


def _logprobs(
    teacher: Teacher, hidden_PD: torch.Tensor, ids_PK: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Log-probabilities [P, K] of these ids and [P] of all others together."""
    logprobs_PV = real_logits(teacher.model, hidden_PD, teacher.n_real, teacher.unused).log_softmax(-1)
    ids = torch.from_numpy(ids_PK).to(logprobs_PV.device)
    kept_PK = logprobs_PV.gather(1, ids)
    tail_P = logprobs_PV.scatter(1, ids, -torch.inf).logsumexp(-1)
    return kept_PK.cpu().numpy(), tail_P.cpu().numpy()


def _report(
    spec: CaptureSpec,
    sample: Sequence[tuple[CapturedRow, bool]],
    alone: Sequence[SparseTargets],
    together: Sequence[SparseTargets],
) -> FaithfulReport:
    stored = [row.targets for row, _ in sample]
    is_derived = any(derived for _, derived in sample)
    compact = spec.targets.precision == "compact"
    half_step = LOGPROB_STEP / 2 if compact else 0.0
    kl = _mean([_kl_P(now, then) for now, then in zip(alone, stored, strict=True)])
    kl_noise = _mean([_kl_P(now, again) for now, again in zip(alone, together, strict=True)])
    # Log-probabilities that are off by at most r give a KL of at most r^2; an exact capture rounds only the tail.
    rounding = LOGPROB_STEP / 2 if compact or is_derived else position_rounding(_LOWEST, "exact")
    kept = [_differences(now, then, "support_logprobs_N", compact) for now, then in zip(alone, stored, strict=True)]
    kept_noise = [
        _differences(now, again, "support_logprobs_N", compact) for now, again in zip(alone, together, strict=True)
    ]
    own = [i for i, (_, derived) in enumerate(sample) if not derived]
    tails = [_differences(alone[i], stored[i], "tail_logprob_P", False) for i in own]
    tail_noise = _largest([_differences(alone[i], together[i], "tail_logprob_P", False) for i in own])
    lowest_tail = _largest([np.abs(stored[i].tail_logprob_P[np.isfinite(stored[i].tail_logprob_P)]) for i in own])
    least = _least_noise(spec.dtype)

    def compared(value: float, noise: float, rounding: float) -> Compared:
        return Compared(value, noise, rounding + NOISES * noise + least)

    return FaithfulReport(
        rows=len(sample),
        positions=sum(targets.n_positions for targets in stored),
        derived=len(sample) - len(own),
        kl=Compared(kl, kl_noise, rounding**2 + NOISES * kl_noise + least**2),
        difference=compared(_largest(kept), _largest(kept_noise), half_step),
        tail_difference=compared(_largest(tails), tail_noise, position_rounding(lowest_tail, spec.targets.precision)),
    )


def _least_noise(dtype: str) -> float:
    """Nats that log-probabilities of this arithmetic may differ by, whatever was measured on a few rows."""
    return max(LEAST_NOISE, LOGITS * torch.finfo(getattr(torch, dtype)).eps)


def _kl_P(now: SparseTargets, stored: SparseTargets) -> NDArray[np.float64]:
    """KL(now || stored) [P] on the kept ids and the rest, nats; on the kept ids alone where no rest is stored."""
    no_rest_P = np.isneginf(stored.tail_logprob_P)
    tail_P = np.where(no_rest_P, -np.inf, now.tail_logprob_P).astype(np.float32)
    p, q = replace(now, tail_logprob_P=tail_P).normalized(), stored.normalized()
    log_p_N = p.support_logprobs_N.astype(np.float64)
    kept_N = np.exp(log_p_N) * (log_p_N - q.support_logprobs_N)
    with np.errstate(invalid="ignore"):  # -inf minus -inf, where there is no rest
        rest_P = np.exp(p.tail_logprob_P.astype(np.float64)) * (p.tail_logprob_P - q.tail_logprob_P)
    empty_P = np.isneginf(p.tail_logprob_P) | no_rest_P
    total_P: NDArray[np.float64] = np.add.reduceat(kept_N, stored.offsets_P1[:-1]) + np.where(empty_P, 0.0, rest_P)
    return total_P


def _differences(now: SparseTargets, then: SparseTargets, name: str, saturates: bool) -> NDArray[np.float32]:
    """Absolute differences, nats, of what both have; values below the compact code's range count as its end."""
    a, b = getattr(now, name), getattr(then, name)
    if saturates:
        a, b = np.maximum(a, _LOWEST), np.maximum(b, _LOWEST)
    both = np.isfinite(a) & np.isfinite(b)
    differences: NDArray[np.float32] = np.abs(a[both] - b[both])
    return differences


def _largest(parts: Sequence[NDArray[np.float32]]) -> float:
    return max((float(part.max()) for part in parts if len(part)), default=0.0)


def _mean(parts: Sequence[NDArray[np.float64]]) -> float:
    return float(np.concatenate(parts).mean())
