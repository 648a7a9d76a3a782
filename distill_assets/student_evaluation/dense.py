"""The teacher's whole distribution at every supervised position, without ever holding it.

The teacher's body runs once; its final hidden states are kept, and its head is computed again for
a chunk of positions whenever a model is compared there.

Legend: N = supervised positions of all rows, D = the teacher's width, V = ids both sides have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill_assets.foundation.language_model import real_logits
from distill_assets.foundation.progress import ProgressListener, ignore_progress
from distill_assets.student_evaluation.packing import batches, final_states, places
from distill_assets.student_model.vocabulary import StudentVocabulary
from distill_assets.teacher_capture.sparse_targets import CapturedRow
from distill_assets.teacher_capture.teacher import Teacher


@dataclass(frozen=True)
class DenseTeacher:
    """A teacher and its final hidden states, in the host's memory, in the order of the rows."""

    teacher: Teacher
    states_ND: Tensor
    vocabulary: StudentVocabulary

    @classmethod
    @torch.inference_mode()
    def of(
        cls,
        teacher: Teacher,
        rows: Sequence[CapturedRow],
        vocabulary: StudentVocabulary,
        *,
        batch_tokens: int | None = None,
        on_progress: ProgressListener = ignore_progress,
    ) -> DenseTeacher:
        """Run the body of `teacher` over `rows`."""
        plan = batches(teacher.model, rows, range(len(rows)), batch_tokens)
        index_N, parts = [], []
        for _, index, states in final_states(teacher.model, rows, plan, "run the teacher again", on_progress):
            index_N.append(index)
            parts.append(states.cpu())
        order = torch.from_numpy(np.argsort(np.concatenate(index_N)))
        return cls(teacher, torch.cat(parts)[order], vocabulary)

    def final_states(
        self, rows: Sequence[CapturedRow], plan: Sequence[Sequence[int]]
    ) -> Iterator[tuple[Sequence[int], NDArray[np.int64], Tensor]]:
        """As `packing.final_states` of the teacher, from what is kept."""
        for batch in plan:
            index_N = places(rows, batch)
            yield batch, index_N, self.states_ND[torch.from_numpy(index_N)].to(self.teacher.device)

    def logprobs(self, index_N: NDArray[np.int64], device: torch.device) -> Tensor:
        """log p [N, V] in float32 at these positions, over the ids both sides have; the others have none of it."""
        states_ND = self.states_ND[torch.from_numpy(index_N)].to(self.teacher.device)
        unused = torch.tensor(self.vocabulary.unused, dtype=torch.int64)
        return real_logits(self.teacher.model, states_ND, self.vocabulary.n_real, unused).log_softmax(-1).to(device)
