"""The teacher, loaded once in a process, and what it makes of rows of hidden states.

Legend: N = chosen positions, K = most ids kept, S = tail samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill_assets.foundation.devices import Turn, cuda_choices, fits_one, free_memory, resolve_device
from distill_assets.foundation.errors import CaptureError
from distill_assets.foundation.language_model import head_width, load_model
from distill_assets.foundation.model_folders import Weights
from distill_assets.foundation.settings import Dtype
from distill_assets.foundation.tokenizers import TokenIds, load_tokenizer

_loaded: WeakSet[PreTrainedModel] = WeakSet()
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher. `unused` are ids below `n_real` that no token has, ascending, on the host; they take no
    mass.
    """

    model: PreTrainedModel
    n_real: int
    unused: Tensor

    @property
    def device(self) -> torch.device:
        return self.model.device


@contextmanager
def teacher_in_turn(
    weights: Weights, dtype: Dtype, device: str, on_wait: Callable[[str], None] = lambda said: None
) -> Iterator[Teacher]:
    """The teacher on a device that is ours meanwhile.

    Where `device` leaves a choice of CUDA devices, one is leased, so that runs at the same time take one
    each; a teacher that does not fit into one is spread over all of them. It stays loaded, and the device
    leased, until `release_teacher`, or until another process waits for it while it is not in use. `on_wait` is told
    when others have all of them.
    """
    choices = cuda_choices(device)
    spread = bool(choices) and not fits_one(weights.folder.n_parameters() * _BYTES[dtype], choices)
    with _turn.taken((weights, dtype), choices, every=spread, on_wait=on_wait) as leased:
        yield (
            load_teacher(weights, dtype, device, spread=True)
            if spread
            else load_teacher(weights, dtype, leased or device)
        )


def release_teacher() -> None:
    """Forget the loaded teacher and give its device back: a student needs the room."""
    _turn.give_back()


@lru_cache(maxsize=1)
def load_teacher(weights: Weights, dtype: Dtype, device: str, spread: bool = False) -> Teacher:
    """Load a teacher, or give back the one loaded last if it is the same.

    CaptureError when its files are no longer those that were hashed: a capture must never be filed under
    weights that did not make it.
    """
    target = resolve_device(device)
    ids = TokenIds.of(load_tokenizer(weights.folder))
    model = load_model(weights.folder, dtype, target, spread)
    if weights.folder.stamp() != weights.stamp:
        raise CaptureError(f"the weights in {weights.folder.path} were replaced under way; run again")
    n_real = min(ids.n_real, head_width(model))  # a narrower head is refused by the tokenizer check
    unused = torch.tensor(sorted(i for i in ids.unused if i < n_real), dtype=torch.int64)
    _loaded.add(model)
    return Teacher(model=model, n_real=n_real, unused=unused)


def _forget() -> bool:
    """Unload the teacher; whether it is gone: a frame that ends soon, or a traceback, may hold on to it."""
    if not _loaded:
        return True
    load_teacher.cache_clear()
    free_memory()
    return not _loaded


_turn = Turn(let_go=_forget)  # of the teacher that is loaded


@dataclass(frozen=True)
class ScoredPositions:
    """Sparse targets of N positions as tensors. `keep_NK` marks the kept ids, a prefix of each position's.

    `weights_NK` is None for top_k, `tail_sample_ids_NS` (-1 where there is no tail) without tail samples.
    """

    ids_NK: Tensor
    logprobs_NK: Tensor
    keep_NK: Tensor
    tail_logprob_N: Tensor
    gold_logprob_N: Tensor
    entropy_N: Tensor
    weights_NK: Tensor | None = None
    tail_sample_ids_NS: Tensor | None = None
