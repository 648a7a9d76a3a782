"""Output head and loss in one function, a chunk of rows at a time, gradients made while a chunk's logits exist.

Legend: N = positions, C = positions of a chunk, D = width, W = rows of the head, V = real vocabulary ids.

With logits z = u(scale x (h W^T + b)), u the identity or a soft cap, and g the gradient on z (`losses`), the
gradients on hidden states, head and bias are scale x g' W, scale x g'^T h and the column sums of
scale x g', where g' = g u'. So the head costs three matrix products in all: no graph that would keep every chunk's
logits, and nothing computed again in the backward pass, which only scales what is there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill_assets.foundation.language_model import NEVER, PlainHead
from distill_assets.student_model.losses import LossMixture, PositionTargets, losses_and_gradient

# Most float32 logits held at once. Each chunk adds to the whole gradient of the head, which costs little where a chunk
# has many rows: on two cores, with 152k ids and width 256, the three products of 1,024 rows take 1.6 s, all of it takes
# 1.75 s with chunks of 512 rows and 2.0 s with 128.
_CHUNK_ROWS, _CHUNK_BYTES = 512, 320 << 20
_BLOCK_BYTES = 8 << 20  # of logits that a CPU goes over several times while they are in its caches


def head_loss(
    hidden_ND: Tensor,
    head: PlainHead,
    n_real: int,
    unused: Tensor,
    targets: PositionTargets,
    mixture: LossMixture,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(mixed loss, distillation loss, cross-entropy), sums over positions of weight x loss, in float32.

    Only the first has a gradient: on `hidden_ND`, and on the head's matrix and bias where they want one.
    It is a first derivative, and is given once: RuntimeError for a second backward pass and for create_graph.
    What is multiplied is rounded to the dtype of the matrix, or autocast's; sums within products and over chunks, and
    losses, are in float32 (float64 if that is the dtype).
    """
    rows = chunk_rows or max(16, min(_CHUNK_ROWS, _CHUNK_BYTES // (4 * n_real)))
    parts = [hidden_ND, head.weight_WD, head.bias_W]
    if not torch.is_grad_enabled():  # which a function cannot see from within
        parts = [None if part is None else part.detach() for part in parts]
    total: tuple[Tensor, Tensor, Tensor] = _HeadLoss.apply(*parts, head, n_real, unused, targets, mixture, rows)
    return total


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_WD: Tensor,
        bias_W: Tensor | None,
        head: PlainHead,
        n_real: int,
        unused: Tensor,
        targets: PositionTargets,
        mixture: LossMixture,
        rows: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_WD.dtype
        with torch.autocast(device, enabled=False):
            logits = _Logits(head, n_real, unused, dtype)
            gradients = _Gradients(hidden_ND, head, ctx.needs_input_grad, logits)
            kd, ce = torch.zeros(2, dtype=logits.wide, device=hidden_ND.device).unbind()
            buffer_CV = torch.empty((min(rows, len(hidden_ND)), n_real), dtype=logits.wide, device=hidden_ND.device)
            for start in range(0, len(hidden_ND), rows):
                part = slice(start, min(start + rows, len(hidden_ND)))
                logits_CV, hidden_CD = buffer_CV[: part.stop - start], logits.scaled(hidden_ND[part])
                slope_CV = logits.write(logits_CV, hidden_CD)
                more_kd, more_ce = _losses_and_gradient(logits_CV, targets.rows(part), mixture, gradients.wanted)
                kd, ce = kd + more_kd, ce + more_ce
                if gradients.wanted:
                    gradient_CV = logits_CV if slope_CV is None else logits_CV.mul_(slope_CV)
                    gradients.add(part, gradient_CV, hidden_CD)
        ctx.gradients = gradients.given()
        ctx.mark_non_differentiable(kd, ce)
        kd_share, ce_share = mixture.shares(targets)
        return kd_share * kd + ce_share * ce, kd, ce

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the loss has first derivatives only; call backward without create_graph")
        if ctx.gradients is None:
            raise RuntimeError("the gradient of this loss was handed over already; compute the loss again")
        # Scaled in place and let go of, or a head's worth of memory would be held twice.
        gradients, ctx.gradients = ctx.gradients, None
        return (*(None if g is None else g.mul_(upstream[0]) for g in gradients), *[None] * 6)


class _Logits:
    """How hidden states become logits of real ids: factors of products are rounded to `dtype`, all else is `wide`."""

    def __init__(self, head: PlainHead, n_real: int, unused: Tensor, dtype: torch.dtype) -> None:
        self.dtype, self.wide = dtype, torch.promote_types(dtype, torch.float32)
        self.head, self.unused = head, unused
        self.weight_VD = self.factor(head.weight_WD.detach()[:n_real])
        self.bias_V = None if head.bias_W is None else head.bias_W.detach()[:n_real].to(self.wide) * head.scale

    def factor(self, tensor: Tensor) -> Tensor:
        """As it enters a product. CUDA sums products of halves in float32; elsewhere what was rounded is made wide."""
        rounded = tensor.to(self.dtype)
        return rounded if rounded.is_cuda else rounded.to(self.wide)

    def product(self, left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
        """Of two factors, in `wide`."""
        if left.dtype == self.wide:
            return torch.mm(left, right, out=out)
        return torch.mm(left, right, out_dtype=self.wide, out=out)

    def scaled(self, hidden_CD: Tensor) -> Tensor:
        """Hidden states as they enter the product: scaling them scales logits and the matrix's gradient."""
        return self.factor(hidden_CD if self.head.scale == 1.0 else hidden_CD * self.head.scale)

    def write(self, logits_CV: Tensor, hidden_CD: Tensor) -> Tensor | None:
        """Fill `logits_CV`; the slope of the soft cap [C, V] is given back where there is one."""
        self.product(hidden_CD, self.weight_VD.T, out=logits_CV)
        if self.bias_V is not None:
            logits_CV.add_(self.bias_V)
        slope_CV = None
        if self.head.cap is not None:
            logits_CV.div_(self.head.cap).tanh_()
            slope_CV = 1.0 - logits_CV.square()
            logits_CV.mul_(self.head.cap)
        if self.unused.numel():
            logits_CV.index_fill_(1, self.unused, NEVER)
        return slope_CV


class _Gradients:
    """Gradients on hidden states, matrix and bias, those that are wanted; sums over chunks are in float32 or wider."""

    def __init__(self, hidden_ND: Tensor, head: PlainHead, wanted: tuple[bool, ...], logits: _Logits) -> None:
        self.wanted = any(wanted[:3])
        self._logits = logits
        self._of_hidden_ND = torch.empty_like(hidden_ND) if wanted[0] else None
        self._of_weight_WD = torch.zeros_like(head.weight_WD, dtype=logits.wide) if wanted[1] else None
        self._of_bias_W = None
        if head.bias_W is not None and wanted[2]:
            self._of_bias_W = torch.zeros_like(head.bias_W, dtype=logits.wide)

    def add(self, part: slice, gradient_CV: Tensor, hidden_CD: Tensor) -> None:
        logits, n_real = self._logits, gradient_CV.shape[1]
        factor_CV = logits.factor(gradient_CV)
        if self._of_hidden_ND is not None:
            self._of_hidden_ND[part] = logits.product(factor_CV, logits.weight_VD).mul_(logits.head.scale)
        if self._of_weight_WD is not None:
            total_VD = self._of_weight_WD[:n_real]
            if factor_CV.dtype == logits.wide:
                total_VD.addmm_(factor_CV.T, hidden_CD)
            else:
                total_VD += logits.product(factor_CV.T, hidden_CD)
        if self._of_bias_W is not None:
            self._of_bias_W[:n_real] += gradient_CV.sum(0).mul_(logits.head.scale)

    def given(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """As autograd wants them: in the dtypes of what they belong to."""
        head = self._logits.head
        of_weight_WD, of_bias_W = self._of_weight_WD, self._of_bias_W
        return (
            self._of_hidden_ND,
            None if of_weight_WD is None else of_weight_WD.to(head.weight_WD.dtype),
            None if of_bias_W is None or head.bias_W is None else of_bias_W.to(head.bias_W.dtype),
        )


def _losses_and_gradient(
    logits_CV: Tensor, targets: PositionTargets, mixture: LossMixture, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """`losses_and_gradient` of a chunk, summed: block after block on a CPU, whose caches hold a few rows."""
    rows = len(logits_CV)
    if logits_CV.device.type == "cpu":
        rows = max(1, _BLOCK_BYTES // (logits_CV.element_size() * logits_CV.shape[1]))
    kd, ce = logits_CV.new_zeros(2).unbind()
    for start in range(0, len(logits_CV), rows):
        part = slice(start, start + rows)
        block = targets.rows(part)
        kd_N, ce_N = losses_and_gradient(logits_CV[part], block, mixture, with_gradient)
        weight_N = block.weight_N.to(logits_CV.dtype)
        kd, ce = kd + weight_N @ kd_N, ce + weight_N @ ce_N
    return kd, ce
