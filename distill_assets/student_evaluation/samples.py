"""A dozen held-out positions to read: where the models stand, told by their likeliest tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distill_assets.student_evaluation.scoring import SHOWN, PositionScores
from distill_assets.teacher_capture.sparse_targets import CapturedRow

N_SAMPLES = 12
CONTEXT_TOKENS = 24  # tokens shown before the predicted one

Ranked = tuple[tuple[int, float], ...]  # (id, probability), likeliest first


@dataclass(frozen=True)
class Sample:
    """One position: the end of its context, the token that came, and what each model expected.

    `entropy_nats` is the teacher's; None when the capture does not know it.
    """

    shard: str
    row: int
    row_id: str | None
    position: int
    context_ids: tuple[int, ...]
    context_is_cut: bool
    gold_id: int
    entropy_nats: float | None
    expected: Mapping[str, Ranked]


def choose_samples(entropy_N: NDArray[np.floating], row_N: NDArray[np.int64], n: int = N_SAMPLES) -> list[int]:
    """Up to `n` of N positions, by rising entropy: one from each of `n` equally large strata.

    In a stratum it is the position nearest to the middle whose row was not chosen before, else the
    middle one. Depends on the arguments alone.
    """
    by_entropy = np.argsort(entropy_N, kind="stable")
    chosen: list[int] = []
    rows: set[int] = set()
    for stratum in np.array_split(by_entropy, min(n, len(by_entropy))):
        outwards = stratum[np.argsort(np.abs(np.arange(len(stratum)) - len(stratum) // 2), kind="stable")]
        pick = next((int(i) for i in outwards if int(row_N[i]) not in rows), int(outwards[0]))
        chosen.append(pick)
        rows.add(int(row_N[pick]))
    return chosen


def make_sample(shard: str, row: CapturedRow, slot: int, n: int, scores: Mapping[str, PositionScores]) -> Sample:
    """The sample of supervised position `slot` of `row`, which is position `n` of `scores`."""
    position = int(row.targets.positions_P[slot])
    targets = row.targets.normalized()
    kept = slice(targets.offsets_P1[slot], targets.offsets_P1[slot + 1])
    entropy = float(targets.entropy_P[slot])
    start = max(0, position + 1 - CONTEXT_TOKENS)
    return Sample(
        shard=shard,
        row=row.row,
        row_id=row.id,
        position=position,
        context_ids=tuple(int(i) for i in row.input_ids[start : position + 1]),
        context_is_cut=start > 0,
        gold_id=int(row.input_ids[position + 1]),
        entropy_nats=entropy if np.isfinite(entropy) else None,
        expected={
            "teacher": _ranked(targets.support_ids_N[kept], np.exp(targets.support_logprobs_N[kept])),
            **{
                name: _ranked(s.top_ids_NS[n], s.top_probabilities_NS[n])
                for name, s in scores.items()
                if name != "teacher"  # what the record holds of it is shown
            },
        },
    )


def _ranked(ids: Sequence[int] | NDArray[np.integer], probabilities: NDArray[np.floating]) -> Ranked:
    return tuple((int(i), float(p)) for i, p in zip(ids[:SHOWN], probabilities[:SHOWN], strict=True))
