"""One student of one arm and seed: trained, and measured on held-out documents.

Legend: B = rows, T = tokens, N = positions, V = vocabulary ids, R = held-out rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill_assets.foundation.files import replacing
from distill_assets.foundation.language_model import hidden_states, real_logits
from distill_assets.student_evaluation.metrics import compare_dense
from distill_assets.student_model.batches import collate, plan_batches
from distill_assets.student_model.losses import LossMixture
from distill_assets.student_model.module import DistillationModule
from distill_assets.teacher_capture.sparse_targets import CapturedRow
from distill_assets.teacher_capture.store import read_rows

from .arms import DENSE, Arm
from .dense import DenseTargets, key_of
from .models import Batch, distillation_module, fit, hard_batch, llama, stored_rows
from .setting import Setting


@dataclass(frozen=True)
class Workshop:
    """Where a student finds what it needs: rows of the teacher's folder, and in its own dense targets, captures, runs.

    `captures`: the file of each arm; the two ends read rows, but no targets, of some other arm's.
    """

    setting: Setting
    teacher: Path
    students: Path
    captures: dict[str, Path]

    def run_file(self, arm: Arm, seed: int) -> Path:
        return self.students / "runs" / f"{arm.slug}-seed{seed}.npz"

    @property
    def half_trained(self) -> Path:
        """A dense student, half way: where gradients are compared."""
        return self.students / "half_trained.safetensors"

    def rows(self, arm: Arm) -> list[CapturedRow]:
        """In the order of their keys, which is the same for all arms."""
        return sorted(_captured(self.captures[arm.name]), key=lambda row: row.key)

    def dense(self, name: str) -> DenseTargets:
        rows = stored_rows(self.teacher, name, self.setting.student_tokens if name == "train" else None)
        return DenseTargets(self.students / "dense" / f"{name}.f16", rows, self.setting.vocabulary)


@lru_cache(maxsize=1)
def _captured(path: Path) -> list[CapturedRow]:
    return read_rows(path, to_learn_from=True)


def mixture_of(arm: Arm) -> LossMixture:
    """Distillation alone, so that arms differ in nothing else."""
    return LossMixture(**{"kd_weight": 1.0, **arm.mixture})


def batches_of(shop: Workshop, arm: Arm, seed: int) -> list[Callable[[], Batch]]:
    """What makes each batch of one pass over the rows."""
    rows = shop.rows(arm)
    plan = plan_batches([len(row.input_ids) for row in rows], shop.setting.student_batch_tokens, 1, seed)
    dense = shop.dense("train") if arm.name == DENSE else None

    def batch(indices: Sequence[int]) -> Batch:
        chosen = [rows[i] for i in indices]
        made = collate(chosen, with_targets=arm.targets is not None)
        return made if dense is None else made | _all_ids(dense.of([row.key for row in chosen]))

    return [lambda indices=indices: batch(indices) for indices in plan]


def _all_ids(logprobs_NV: Tensor) -> Batch:
    """Targets that keep every id, and so have no tail."""
    n, v = logprobs_NV.shape
    return {
        "support_ids_NK": torch.arange(v).expand(n, v).contiguous(),
        "support_logprobs_NK": logprobs_NV,
        "tail_logprob_N": torch.full((n,), -torch.inf),
    }


def new_student(shop: Workshop, arm: Arm, seed: int) -> DistillationModule:
    setting = shop.setting
    model = llama(setting, setting.student_width, setting.student_layers, seed)
    return distillation_module(model, setting, mixture_of(arm))


def half_trained_student(shop: Workshop, arm: Arm) -> DistillationModule:
    """The half-trained student with an arm's loss."""
    module = new_student(shop, arm, 0)
    module.model.load_state_dict(load_file(shop.half_trained), strict=False)
    return module


def train_and_measure(shop: Workshop, arm: Arm, seed: int) -> None:
    """Write the run's file: of each held-out row the sums of negative log-likelihood and KL, and its positions."""
    torch.set_num_threads(1)  # the same bits however many students are trained at a time
    module = new_student(shop, arm, seed)
    batches = batches_of(shop, arm, seed)

    def after(step: int) -> None:
        if arm.name == DENSE and seed == shop.setting.first_seeds[0] and step == len(batches) // 2:
            with replacing(shop.half_trained) as beside:
                save_file(_untied(module), beside)

    fit(module, batches, shop.setting.student_learning_rate, after)
    sums_RC = heldout_sums(module, shop)
    file = shop.run_file(arm, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as beside, beside.open("wb") as out:
        np.savez(out, sums=sums_RC)


def _untied(module: DistillationModule) -> dict[str, Tensor]:
    """Every weight once: the head is the embeddings."""
    return {name: tensor for name, tensor in module.model.state_dict().items() if name != "lm_head.weight"}


@torch.inference_mode()
def heldout_sums(module: DistillationModule, shop: Workshop) -> NDArray[np.float64]:
    """[R, 3]: negative log-likelihood, KL(teacher || student) over all ids, positions."""
    module.eval()
    rows, dense = stored_rows(shop.teacher, "heldout"), shop.dense("heldout")
    sums_RC = np.zeros((len(rows), 3))
    for indices in plan_batches([len(row) for row in rows], shop.setting.student_batch_tokens, 1, seed=0):
        chosen = [rows[i] for i in indices]
        batch = hard_batch(chosen)
        is_scored_BT = batch["labels"] >= 0
        hidden_ND = hidden_states(module.model, batch["ids_BT"])[is_scored_BT]
        logq_NV = real_logits(module.model, hidden_ND, shop.setting.vocabulary).log_softmax(-1)
        nll_N = -logq_NV.gather(1, batch["labels"][is_scored_BT][:, None])[:, 0]
        kl_N, _, _ = compare_dense(dense.of([key_of(row) for row in chosen]), logq_NV)
        row_N = np.repeat(indices, [len(row) - 1 for row in chosen])
        for column, values_N in enumerate((nll_N, kl_N, torch.ones_like(kl_N))):
            sums_RC[:, column] += np.bincount(row_N, weights=values_N.double().numpy(), minlength=len(rows))
    return sums_RC


def read_run(shop: Workshop, arm: Arm, seed: int) -> NDArray[np.float64]:
    with np.load(shop.run_file(arm, seed)) as stored:
        return stored["sums"]


def means(sums_RC: NDArray[np.float64]) -> dict[str, float]:
    """In nats a position."""
    nll, kl, positions = sums_RC.sum(0)
    return {"nll": float(nll / positions), "kl": float(kl / positions)}
