"""Does a capture say what the teacher says? A sample of rows is scored again and compared.

What may differ is measured, not guessed: the same rows scored one at a time and all together differ by
the order of arithmetic alone, and storage rounds by amounts that are known. Which ids were kept, and which were
drawn, is asked of the dense distributions in nats too: by how much they would have to be off to give what is stored.

Legend: P = supervised positions of a row, N = ids kept in the whole row, V = real vocabulary ids.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distill_assets.foundation.fingerprints import digest
from distill_assets.foundation.progress import Progress, ProgressListener, ignore_progress
from distill_assets.foundation.settings import TargetSettings
from distill_assets.teacher_capture.identity import CaptureSpec
from distill_assets.teacher_capture.redrawing import INEXPLICABLE
from distill_assets.teacher_capture.rescoring import Rescored, rescored_rows
from distill_assets.teacher_capture.sparse_targets import LOGPROB_STEP, CapturedRow, SparseTargets
from distill_assets.teacher_capture.store import Capture, read_row_group, read_row_keys
from distill_assets.teacher_capture.target_rules import LOWEST_CODE, NOTHING, position_rounding
from distill_assets.teacher_capture.teacher import teacher_in_turn

SAMPLE_ROWS, SAMPLE_TOKENS = 8, 2000
NOISES = 4.0  # times the measured noise: other batches than the two that were tried
LEAST_NOISE = 1e-3  # nats; float32 on another machine
LOGITS = 16.0  # a large logit: half precision rounds it by as many of its steps, even where two batches agree
_SATURATED = 12.0  # nats below 1 / V from which ids that the compact code lifts to its end add up to 2% of a tail


@dataclass(frozen=True)
class Compared:
    """A figure, the same figure of the teacher against itself, and the most that noise and rounding explain; of
    the place, where there are several, that is most above what is allowed.
    """

    value: float
    noise: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.value <= self.allowed


@dataclass(frozen=True)
class FaithfulReport:
    """`kl`: mean over positions of KL(teacher now || stored) on the kept ids and the rest, nats. `difference`,
    `tail_difference`, `gold_difference`, `entropy_difference`: the largest of a kept id's log-probability, of the
    rest's, of the token that came, and of the entropy, nats. `support`: the most by which an id that was left out
    is likelier than one that was kept, or than `min_probability` or `tau` ask, or the other way round, nats.
    `draws`: the most by which log-probabilities would have to be off to explain a draw or its weight, nats.

    Tails that were derived from another capture are sums of rounded values: `derived` says of how many rows.
    All zero when there was no row to ask about.
    """

    rows: int
    positions: int
    derived: int
    kl: Compared
    difference: Compared
    tail_difference: Compared
    gold_difference: Compared
    entropy_difference: Compared
    support: Compared
    draws: Compared

    @property
    def figures(self) -> dict[str, Compared]:
        """All that was compared, by what it is called in words."""
        return {
            "KL": self.kl,
            "largest difference": self.difference,
            "largest tail difference": self.tail_difference,
            "largest gold difference": self.gold_difference,
            "largest entropy difference": self.entropy_difference,
            "ids kept": self.support,
            "ids drawn": self.draws,
        }

    @property
    def failed(self) -> list[str]:
        """What is off by more than is allowed, in words."""
        return [name for name, compared in self.figures.items() if not compared.passed]

    @property
    def passed(self) -> bool:
        return not self.failed


def check_faithful(
    spec: CaptureSpec, captures: Sequence[Capture], device: str, on_progress: ProgressListener = ignore_progress
) -> FaithfulReport:
    """Score a sample of the captured rows again, alone and all in one batch, and compare with what is stored.

    The sample is the same for the same captures. Give captures of this very teacher. CaptureError when a
    file is damaged; no teacher is loaded for no row.
    """
    sample = _sample(captures)
    if not sample:
        nothing = Compared(0.0, 0.0, 0.0)
        return FaithfulReport(0, 0, 0, *[nothing] * 7)
    rows = [row for row, _ in sample]
    with teacher_in_turn(spec.weights, spec.dtype, device) as teacher:
        began = time.monotonic()
        alone: list[Rescored] = []

        def tell(done: int) -> None:
            seconds = time.monotonic() - began
            on_progress(Progress("rows scored again", done, 2 * len(rows), "rows", seconds))

        for row in rows:
            tell(len(alone))
            alone += rescored_rows(teacher, [row], spec.targets)
        tell(len(rows))
        pair = rows if len(rows) > 1 else rows * 2  # a batch of one is no batch
        together = rescored_rows(teacher, pair, spec.targets)[: len(rows)]
        tell(2 * len(rows))
        n_ids = teacher.n_real
    return _Comparison(spec, sample, alone, together, n_ids).report()


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


class _Comparison:
    """The stored rows beside the teacher's, scored `alone` and `together`."""

    def __init__(
        self,
        spec: CaptureSpec,
        sample: Sequence[tuple[CapturedRow, bool]],
        alone: Sequence[Rescored],
        together: Sequence[Rescored],
        n_ids: int,
    ) -> None:
        self.settings: TargetSettings = spec.targets
        self.is_compact = spec.targets.precision == "compact"
        self.least = _least_noise(spec.dtype)
        self.stored = [row.targets for row, _ in sample]
        self.is_derived = [derived for _, derived in sample]
        self.alone, self.now, self.again = alone, [r.targets for r in alone], [r.targets for r in together]
        self.lowest_derived_tail = math.log(n_ids) - _SATURATED

    def report(self) -> FaithfulReport:
        lowest = LOWEST_CODE if self.is_compact else NOTHING
        noise = _largest_off(self.now, self.again, "support_logprobs_N", lowest)
        off = noise * NOISES + self.least
        half_step = LOGPROB_STEP / 2 if self.is_compact else 0.0
        # What was derived from a compact capture was chosen by rounded log-probabilities.
        support = _joined(self._misplaced_P(*pair) for pair in zip(self.alone, self.stored, strict=True))
        chosen_by = half_step if any(self.is_derived) else 0.0
        return FaithfulReport(
            rows=len(self.stored),
            positions=sum(targets.n_positions for targets in self.stored),
            derived=sum(self.is_derived),
            kl=self._kl(),
            difference=_worst(_off(self.now, self.stored, "support_logprobs_N", lowest), noise, half_step + off),
            tail_difference=self._tails(),
            gold_difference=self._figure("gold_logprob_P", lambda gold_P: np.ones_like(gold_P)),
            # With log-probabilities off by e, an entropy H is off by e H, or e where that is more.
            entropy_difference=self._figure("entropy_P", lambda entropy_P: 1.0 + entropy_P),
            support=_worst(support, noise, 2 * off + chosen_by),
            draws=_worst(_joined(r.draws_M for r in self.alone), noise, 2 * off),
        )

    def _kl(self) -> Compared:
        value = _mean([_kl_P(now, then) for now, then in zip(self.now, self.stored, strict=True)])
        noise = _mean([_kl_P(now, again) for now, again in zip(self.now, self.again, strict=True)])
        # Log-probabilities that are off by at most r give a KL of at most r^2; an exact capture rounds only the tail.
        is_rounded = self.is_compact or any(self.is_derived)
        rounding = LOGPROB_STEP / 2 if is_rounded else position_rounding(LOWEST_CODE, "exact")
        return Compared(value, noise, rounding**2 + NOISES * noise + self.least**2)

    def _tails(self) -> Compared:
        """No tail counts as one of next to nothing."""
        noise = _largest_off(self.now, self.again, "tail_logprob_P", NOTHING)
        values, allowed = [], []
        for now, stored, derived in zip(self.now, self.stored, self.is_derived, strict=True):
            lowest = self.lowest_derived_tail if derived else NOTHING
            values.append(_off([now], [stored], "tail_logprob_P", lowest))
            rounding_P = self._rounding_P(np.maximum(stored.tail_logprob_P, lowest))
            allowed.append(
                2 * rounding_P + (LOGPROB_STEP / 2 + 0.02 if self.is_compact else 0.0) if derived else rounding_P
            )
        return _worst(_joined(values), noise, _joined(allowed) + NOISES * noise + self.least)

    def _figure(self, name: str, sensitivity: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Compared:
        """A figure of the dense distribution, which moves by `sensitivity` nats a nat of the log-probabilities."""
        noise = _largest_off(self.now, self.again, name, NOTHING)
        now_P = _joined(getattr(targets, name) for targets in self.now)
        stored_P = np.maximum(_joined(getattr(targets, name) for targets in self.stored), NOTHING)
        derived_P = np.repeat(self.is_derived, [targets.n_positions for targets in self.stored])
        rounding_P = self._rounding_P(stored_P) * (1 + derived_P)  # what was derived was rounded twice
        allowed_P = rounding_P + NOISES * noise + self.least * sensitivity(now_P)
        return _worst(_off(self.now, self.stored, name, NOTHING), noise, allowed_P)

    def _rounding_P(self, values_P: NDArray[np.float64]) -> NDArray[np.float64]:
        return position_rounding(values_P.astype(np.float64), self.settings.precision)

    def _misplaced_P(self, scored: Rescored, stored: SparseTargets) -> NDArray[np.float64]:
        """By how many nats the kept ids [P] are not those that the settings ask of the teacher's distribution."""
        logprobs_N = np.maximum(scored.targets.support_logprobs_N, NOTHING).astype(np.float64)
        outside_P = np.maximum(scored.outside_P, NOTHING).astype(np.float64)
        starts = stored.offsets_P1[:-1]
        misplaced_P = scored.likeliest_P - logprobs_N[starts]
        settings = self.settings
        if settings.kind == "threshold":
            return np.maximum(misplaced_P, outside_P - math.log(settings.tau))
        if settings.kind == "sampled":
            return misplaced_P
        least = math.log(settings.min_probability) if settings.min_probability else NOTHING
        last_P = np.minimum.reduceat(logprobs_N, starts)
        missing_P = outside_P - np.where(stored.kept_P >= settings.k, np.maximum(last_P, least), least)
        others_P = np.where(stored.kept_P > 1, least - last_P, 0.0)  # the first is kept however unlikely
        misplaced_P = np.max([misplaced_P, missing_P, others_P], axis=0)
        return np.where(stored.kept_P > settings.k, INEXPLICABLE, misplaced_P)


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


def _off(now: Sequence[SparseTargets], then: Sequence[SparseTargets], name: str, lowest: float) -> NDArray[np.float64]:
    """Absolute differences, nats; values below `lowest`, -inf too, count as it."""
    a, b = (np.maximum(_joined(getattr(targets, name) for targets in part), lowest) for part in (now, then))
    differences: NDArray[np.float64] = np.abs(a - b)
    return differences


def _largest_off(now: Sequence[SparseTargets], then: Sequence[SparseTargets], name: str, lowest: float) -> float:
    return float(_off(now, then, name, lowest).max())


def _worst(values: NDArray[np.float64], noise: float, allowed: float | NDArray[np.float64]) -> Compared:
    """The value that is most above what is allowed, or nearest to it; at least 0. Not a number is off most."""
    if not len(values):
        return Compared(0.0, noise, float(np.max(allowed)))
    values = np.nan_to_num(np.maximum(values, 0.0), nan=INEXPLICABLE)
    allowed_P = np.broadcast_to(allowed, values.shape)
    worst = int((values - allowed_P).argmax())
    return Compared(float(values[worst]), noise, float(allowed_P[worst]))


def _joined(parts: Iterable[NDArray[Any]]) -> NDArray[np.float64]:
    return np.concatenate(list(parts)).astype(np.float64)


def _mean(parts: Sequence[NDArray[np.float64]]) -> float:
    return float(np.concatenate(parts).mean())
