"""Student and loss in one module, so that the loss is computed inside the wrapped forward.

Legend: B = rows, T = tokens, D = width, N = supervised positions, V = real vocabulary ids,
K = most ids kept, S = tail samples.

The head is computed only at supervised positions and HEAD_ROWS of them at a time, each chunk's
gradient together with its loss, so that no [B, T, V] tensor exists and no chunk is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill_assets.foundation.language_model import HEAD_ROWS, hidden_states, real_logits
from distill_assets.student_model.batches import IGNORED
from distill_assets.student_model.losses import cross_entropy, forward_kl_tail_bucket, weighted_cross_entropy
from distill_assets.student_model.vocabulary import StudentVocabulary


class DistillationModule(nn.Module):
    """A student that returns its loss on a collated batch.

    `kd_weight` weighs the distillation loss, 1 - kd_weight the cross-entropy on the gold token; the
    control has kd_weight 0 and batches without targets. `tail_sample_weight` weighs tail samples
    against the tail's bucket.
    """

    accepts_loss_kwargs = True  # tells Trainer to pass the number of supervised positions of the whole step

    def __init__(
        self, model: PreTrainedModel, vocabulary: StudentVocabulary, kd_weight: float, tail_sample_weight: float = 0.0
    ) -> None:
        super().__init__()
        self.model = model
        self.n_real = vocabulary.n_real
        self.kd_weight = kd_weight
        self.tail_sample_weight = tail_sample_weight
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
        targets = (support_ids_NK, support_logprobs_NK, support_weights_NK, tail_logprob_N, tail_sample_ids_NS)

        def chunk_losses(hidden_CD: Tensor, start: int) -> tuple[Tensor, Tensor]:
            part = slice(start, start + len(hidden_CD))
            sparse = [None if column is None else column[part] for column in targets]
            return self._chunk_losses(hidden_CD, gold_N[part], weight_N[part], *sparse)

        head = [weight for weight in self.model.get_output_embeddings().parameters() if weight.requires_grad]
        loss, kd, ce = _ChunkedLoss.apply(chunk_losses, self._mixture(support_ids_NK is not None), hidden_ND, *head)
        items = len(hidden_ND) if num_items_in_batch is None else num_items_in_batch
        loss = loss + 0.0 * hidden_BTD[0, 0, 0].float()  # an empty share still has a (zero) gradient
        return {"loss": loss / items, "kd": kd / items, "ce": ce / items}

    def _mixture(self, with_targets: bool) -> tuple[float, float]:
        """Weights of distillation loss and cross-entropy in the loss."""
        return (self.kd_weight, 1.0 - self.kd_weight) if with_targets else (0.0, 1.0)

    def _chunk_losses(
        self,
        hidden_ND: Tensor,
        gold_N: Tensor,
        weight_N: Tensor,
        support_ids_NK: Tensor | None,
        support_logprobs_NK: Tensor | None,
        support_weights_NK: Tensor | None,
        tail_logprob_N: Tensor | None,
        tail_sample_ids_NS: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Weighted sums of distillation loss and cross-entropy over one chunk of rows.

        Ids with weights are learnt by their weights alone, others with their tail.
        """
        logits_NV = real_logits(self.model, hidden_ND, self.n_real, self.get_buffer("unused"))
        ce = (weight_N * cross_entropy(logits_NV, gold_N)).sum()
        kd = torch.zeros_like(ce)
        if support_ids_NK is not None and support_weights_NK is not None:
            kd = (weight_N * weighted_cross_entropy(logits_NV, support_ids_NK, support_weights_NK)).sum()
        elif support_ids_NK is not None and support_logprobs_NK is not None and tail_logprob_N is not None:
            kl_N = forward_kl_tail_bucket(
                logits_NV,
                support_ids_NK,
                support_logprobs_NK,
                tail_logprob_N,
                tail_sample_ids_NS,
                self.tail_sample_weight,
            )
            kd = (weight_N * kl_N).sum()
        return kd, ce


class _ChunkedLoss(torch.autograd.Function):
    """Sum of chunk losses whose gradients are made in the forward pass, while a chunk's logits exist.

    Keeping a graph for every chunk would keep all logits; recomputing them in the backward pass
    would compute the head twice. The gradient on hidden states and head weights is all that
    is kept; backward only scales it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        chunk_losses: Callable[[Tensor, int], tuple[Tensor, Tensor]],
        mixture: tuple[float, float],
        hidden_ND: Tensor,
        *head: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(mixed loss, distillation loss, cross-entropy), sums in float32; only the first has a gradient."""
        kd_sum, ce_sum = torch.zeros(2, dtype=torch.float32, device=hidden_ND.device).unbind()
        needs_gradient = any(ctx.needs_input_grad)
        hidden_gradient_ND = torch.zeros_like(hidden_ND)
        head_gradients = [torch.zeros_like(weight) for weight in head]
        for start in range(0, len(hidden_ND), HEAD_ROWS):
            part = slice(start, start + HEAD_ROWS)
            with torch.set_grad_enabled(needs_gradient):
                hidden_CD = hidden_ND[part].detach().requires_grad_(needs_gradient)
                kd, ce = chunk_losses(hidden_CD, start)
                mixed = mixture[0] * kd + mixture[1] * ce
            kd_sum, ce_sum = kd_sum + kd.detach(), ce_sum + ce.detach()
            if needs_gradient:
                hidden_gradient_ND[part], *gradients = torch.autograd.grad(mixed, [hidden_CD, *head])
                for total, gradient in zip(head_gradients, gradients, strict=True):
                    total += gradient
        ctx.save_for_backward(hidden_gradient_ND, *head_gradients)
        ctx.mark_non_differentiable(kd_sum, ce_sum)
        return mixture[0] * kd_sum + mixture[1] * ce_sum, kd_sum, ce_sum

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(gradient * upstream[0] for gradient in ctx.saved_tensors))


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
