"""Student and loss in one module, so that the loss is computed inside the wrapped forward.

Legend: B = rows, T = tokens, D = width, N = supervised positions, V = real vocabulary ids,
K = most ids kept, S = tail samples.

Head and loss are one function (`fused_head`), at supervised positions only.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill_assets.foundation.language_model import hidden_states, plain_head
from distill_assets.foundation.settings import Precision
from distill_assets.student_model.batches import IGNORED
from distill_assets.student_model.fused_head import head_loss
from distill_assets.student_model.losses import LossMixture, PositionTargets
from distill_assets.student_model.vocabulary import StudentVocabulary


class DistillationModule(nn.Module):
    """A student that returns its loss on a collated batch, computed in `precision`; its weights stay as they are.

    The control has batches without targets, and its loss is the cross-entropy whatever `mixture` says. ModelError for a
    student whose head is not one matrix.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        vocabulary: StudentVocabulary,
        mixture: LossMixture,
        precision: Precision = "float32",
    ) -> None:
        super().__init__()
        plain_head(model)
        self.model = model
        self.n_real = vocabulary.n_real
        self.mixture = mixture
        self.in_bfloat16 = precision == "bfloat16"
        self.register_buffer("unused", torch.tensor(vocabulary.unused, dtype=torch.int64), persistent=False)

    def forward(
        self,
        ids_BT: Tensor,
        labels: Tensor,
        weight_N: Tensor,
        support_ids_NK: Tensor | None = None,
        support_logprobs_NK: Tensor | None = None,
        support_weights_NK: Tensor | None = None,
        tail_logprob_N: Tensor | None = None,
        tail_sample_ids_NS: Tensor | None = None,
        positions_BT: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """`loss` to call backward on, and its parts `kd` and `ce`, detached, in nats a position.

        All three are weighted sums divided by `num_items_in_batch`, the number of supervised
        positions of the whole optimiser step, so that parts of a step add up to the step; without
        it, by this batch's own. `kd` is 0 for a batch without targets.
        """
        supervised_BT = labels != IGNORED
        targets = PositionTargets(
            gold_N=labels[supervised_BT],
            weight_N=weight_N,
            ids_NK=support_ids_NK,
            logprobs_NK=support_logprobs_NK,
            tail_logprob_N=tail_logprob_N,
            weights_NK=support_weights_NK,
            tail_sample_ids_NS=tail_sample_ids_NS,
        )
        unused = self.get_buffer("unused")
        with torch.autocast(ids_BT.device.type, torch.bfloat16, enabled=self.in_bfloat16):
            hidden_BTD = hidden_states(self.model, ids_BT, positions_BT)
            hidden_ND = hidden_BTD[supervised_BT]
            loss, kd, ce = head_loss(hidden_ND, plain_head(self.model), self.n_real, unused, targets, self.mixture)
        items = len(hidden_ND) if num_items_in_batch is None else num_items_in_batch
        loss = loss + 0.0 * hidden_BTD[0, 0, 0].float()  # an empty share still has a (zero) gradient
        return {"loss": loss / items, "kd": kd / items, "ce": ce / items}


@torch.no_grad()
def mean_losses(module: DistillationModule, batches: Iterable[dict[str, Tensor]]) -> tuple[float, float]:
    """Mean distillation loss and cross-entropy a position over all batches, in evaluation mode, nats."""
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
