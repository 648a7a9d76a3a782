"""A loss that is no number: which rows it comes from, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from distill_assets.student_model.batches import collate
from distill_assets.student_model.module import DistillationModule
from distill_assets.student_model.weights import are_finite
from distill_assets.teacher_capture.sparse_targets import CapturedRow

_MOST_KEYS = 8  # named in a message


def why_not_finite(
    module: DistillationModule, rows: Sequence[CapturedRow], before: Sequence[str], with_targets: bool
) -> str:
    """Of a step over `rows` whose loss is not finite: where that comes from, with row keys, and what to do.

    `before` are the keys of the step before it: weights that are no numbers are its doing.
    """
    if not are_finite(module):
        return (
            f"the step before it left weights that are not finite ({_keys(before)}); lower training.learning_rate, or "
            f"look at these rows{_LOOK}"
        )
    alone = [row.key for row in rows if not math.isfinite(_loss(module, row, with_targets))]
    if alone and len(alone) < len(rows):
        return f"the other rows of its batch have one, but not {_keys(alone)}; mend these or leave them out{_LOOK}"
    keys = _keys([row.key for row in rows])
    if alone:
        return f"no row of its batch has one ({keys}); lower training.learning_rate, or look at these rows{_LOOK}"
    return f"each row of its batch has one alone ({keys}), so their sum is too large; lower training.batch_tokens"


_LOOK = " (`distill sql \"SELECT * FROM example('KEY')\"`)"


@torch.no_grad()
def _loss(module: DistillationModule, row: CapturedRow, with_targets: bool) -> float:
    was_training = module.training
    module.eval()
    batch = {name: tensor.to(module.model.device) for name, tensor in collate([row], with_targets).items()}
    loss = float(module(**batch, num_items_in_batch=1)["loss"])
    module.train(was_training)
    return loss


def _keys(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _MOST_KEYS} more" if len(keys) > _MOST_KEYS else ""
    return f"{'key' if len(keys) == 1 else 'keys'} {', '.join(keys[:_MOST_KEYS])}{more}"
