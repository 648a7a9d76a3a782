"""Student and loss in one module, so that the loss is computed inside the wrapped forward.

Legend: B = rows, T = tokens, D = width, N = supervised positions, V = real vocabulary ids,
K = most ids kept.

The head is computed only at supervised positions and HEAD_ROWS of them at a time, forward and
again backward, so that no [B, T, V] tensor exists.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from distill_assets.foundation.language_model import HEAD_ROWS, hidden_states, real_logits
from distill_assets.student_model.batches import IGNORED
from distill_assets.student_model.losses import cross_entropy, forward_kl_tail_bucket
from distill_assets.student_model.vocabulary import StudentVocabulary


class DistillationModule(nn.Module):
    """A student that returns its loss on a collated batch.

    `kd_weight` weighs the divergence from the teacher, 1 - kd_weight the cross-entropy on the
    gold token; the control has kd_weight 0 and batches without targets.
    """

    accepts_loss_kwargs = True  # tells Trainer to pass the number of supervised positions of the whole step

    def __init__(self, model: PreTrainedModel, vocabulary: StudentVocabulary, kd_weight: float) -> None:
        super().__init__()
        self.model = model
        self.n_real = vocabulary.n_real
        self.kd_weight = kd_weight
        self.register_buffer("unused", torch.tensor(vocabulary.unused, dtype=torch.int64), persistent=False)

    def forward(
        self,
        ids_BT: Tensor,
        labels: Tensor,
        weight_N: Tensor,
        support_ids_NK: Tensor | None = None,
        support_logprobs_NK: Tensor | None = None,
        tail_logprob_N: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """`loss` to call backward on, and its parts `kd` and `ce`, detached, in nats a position.

        All three are weighted sums divided by `num_items_in_batch`, the number of supervised
        positions of the whole optimiser step, so that parts of a step add up to the step; without
        it, by this batch's own. `kd` is 0 for a batch without targets.
        """
        supervised_BT = labels != IGNORED
        hidden_BTD = hidden_states(self.model, ids_BT)
        hidden_ND, gold_N = hidden_BTD[supervised_BT], labels[supervised_BT]
        total = 0.0 * hidden_BTD[0, 0, :2].float()  # an empty share still has a (zero) gradient
        columns = [gold_N, weight_N, support_ids_NK, support_logprobs_NK, tail_logprob_N]
        for start in range(0, len(hidden_ND), HEAD_ROWS):
            part = slice(start, start + HEAD_ROWS)
            chunk = [None if column is None else column[part] for column in columns]
            total = total + checkpoint(
                self._chunk_losses, hidden_ND[part], *chunk, use_reentrant=False, preserve_rng_state=False
            )
        items = len(hidden_ND) if num_items_in_batch is None else num_items_in_batch
        kd, ce = (total / items).unbind()
        loss = ce if support_ids_NK is None else self.kd_weight * kd + (1.0 - self.kd_weight) * ce
        return {"loss": loss, "kd": kd.detach(), "ce": ce.detach()}

    def _chunk_losses(
        self,
        hidden_ND: Tensor,
        gold_N: Tensor,
        weight_N: Tensor,
        support_ids_NK: Tensor | None,
        support_logprobs_NK: Tensor | None,
        tail_logprob_N: Tensor | None,
    ) -> Tensor:
        """Weighted sums of divergence and cross-entropy over one chunk of rows, [2]."""
        logits_NV = real_logits(self.model, hidden_ND, self.n_real, self.get_buffer("unused"))
        ce = (weight_N * cross_entropy(logits_NV, gold_N)).sum()
        kd = torch.zeros_like(ce)
        if support_ids_NK is not None and support_logprobs_NK is not None and tail_logprob_N is not None:
            kl_N = forward_kl_tail_bucket(logits_NV, support_ids_NK, support_logprobs_NK, tail_logprob_N)
            kd = (weight_N * kl_N).sum()
        return torch.stack([kd, ce])


@torch.no_grad()
def mean_losses(module: DistillationModule, batches: Iterable[dict[str, Tensor]]) -> tuple[float, float]:
    """Mean divergence and cross-entropy a position over all batches, in evaluation mode, nats."""
    was_training = module.training
    module.eval()
    kd = ce = 0.0
    positions = 0
    for batch in batches:
        parts = module(**{name: tensor.to(module.model.device) for name, tensor in batch.items()}, num_items_in_batch=1)
        kd += float(parts["kd"])
        ce += float(parts["ce"])
        positions += int((batch["labels"] != IGNORED).sum())
    module.train(was_training)
    return kd / positions, ce / positions
