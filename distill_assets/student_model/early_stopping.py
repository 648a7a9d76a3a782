"""When to stop, and which step to keep: by the loss on the validation rows, never on those that are held out.

All that decides is in the losses seen so far. A training that goes on from a checkpoint therefore stops where an
undisturbed one does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def best_look(losses: Sequence[float]) -> int | None:
    """Index of the lowest loss, of equal ones the first; None where none is a number."""
    numbers = [i for i, loss in enumerate(losses) if not math.isnan(loss)]
    return min(numbers, key=losses.__getitem__, default=None)


def is_over(losses: Sequence[float], patience: int) -> bool:
    """Whether the last `patience` looks brought nothing better than what was seen before them."""
    best = best_look(losses)
    return len(losses) - 1 - (-1 if best is None else best) >= patience
