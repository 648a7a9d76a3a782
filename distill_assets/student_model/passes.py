"""How one optimiser step is run: in passes of so many tokens, and of fewer where memory runs out.

Nothing here is part of what a student is. Which rows make a step, the plan says; a pass divides its loss by the
positions of the whole step, so gradients of passes add up to the step's, but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available

from distill_assets.foundation.devices import is_out_of_memory
from distill_assets.foundation.errors import DistillError, TrainingError
from distill_assets.foundation.language_model import keeps_packed_rows_apart
from distill_assets.foundation.settings import Precision
from distill_assets.foundation.tokenizers import quiet_transformers
from distill_assets.teacher_capture.sparse_targets import CapturedRow

_FLASH = "flash_attention_2"


class Passes:
    """Rows of a step cut into passes of at most `tokens`, padding included; None: what suits the device.

    `packed`: rows stand one after another without padding. `recompute`: layers are computed a second time in the
    backward pass, instead of what they made being kept. TrainingError where a model cannot do that.
    """

    def __init__(
        self, model: PreTrainedModel, tokens: int | None = None, packed: bool = False, recompute: bool = False
    ) -> None:
        self._model, self.packed = model, packed
        self.tokens = tokens or pass_tokens(model.device)
        self.note = ""  # on what memory made necessary
        if recompute and not self._recompute():
            raise TrainingError(f"a {type(model).__name__} knows no gradient checkpointing; leave it off")

    def of(self, rows: Sequence[CapturedRow]) -> list[list[CapturedRow]]:
        """The rows in order. A longer row is a pass of its own; no rows are one pass without any."""
        passes: list[list[CapturedRow]] = [[]]
        longest = total = 0
        for row in rows:
            length = len(row.input_ids)
            longest, total = max(longest, length), total + length
            if passes[-1] and (total if self.packed else longest * (len(passes[-1]) + 1)) > self.tokens:
                passes.append([])
                longest = total = length
            passes[-1].append(row)
        return passes

    def _size(self, rows: Sequence[CapturedRow]) -> int:
        lengths = [len(row.input_ids) for row in rows]
        return sum(lengths) if self.packed else max(lengths) * len(lengths)

    def take_less(self, rows: Sequence[CapturedRow]) -> None:
        """After a pass of `rows` that memory had no room for: half its tokens from now on. What cannot be halved has
        its layers recomputed, which takes longer; TrainingError where that was done already, or cannot be.
        """
        if len(rows) > 1:
            self.tokens = self._size(rows) // 2
        elif not self._recompute():
            raise TrainingError(
                f"{self._model.device} has no memory left for a training step with a row of {self._size(rows):,} "
                "tokens, weights, gradients and AdamW's moments beside it\n"
                "lower data.max_length, set training.precision: bfloat16, take a smaller student, or a device with more"
            )
        recomputed = ", layers computed twice" if self._model.is_activation_checkpointing else ""
        self.note = f"memory ran out: {self.tokens:,} tokens a pass{recomputed}"

    def _recompute(self) -> bool:
        """Have layers recomputed; False where they are already, or cannot be."""
        if self._model.is_activation_checkpointing:
            return False
        try:
            self._model.activation_checkpointing_enable()
        except ValueError:
            return False
        return True


def pass_tokens(device: torch.device) -> int:
    """Padded tokens in one forward and backward pass, unless somebody says otherwise: on a CPU the default of a whole
    step. Neither number was measured.
    """
    return 2048 if device.type == "cpu" else 8192


def prefers_packed_rows(model: PreTrainedModel, precision: Precision) -> bool:
    """Whether rows without padding cost less; the model then has flash attention, which looks back no further than
    a row's beginning. Any other attention makes a mask [M, M] of M packed tokens, and computes all of it.

    It needs CUDA, bfloat16, flash_attn installed, and a model that knows it and that nothing else mixes rows of.
    """
    if model.device.type != "cuda" or precision != "bfloat16" or not is_flash_attn_2_available():
        return False
    before = model.config._attn_implementation
    try:
        with quiet_transformers():
            model.set_attn_implementation(_FLASH)
    except (ValueError, ImportError):
        return False
    with torch.autocast("cuda", torch.bfloat16):
        if model.config._attn_implementation == _FLASH and keeps_packed_rows_apart(model):
            return True
    model.set_attn_implementation(before)
    return False


def random_state(device: torch.device) -> Callable[[], None]:
    """What sets random numbers back to where they are now: a step done again has the dropout of one done at once."""
    host, beside = torch.get_rng_state(), torch.get_device_module(device) if device.type != "cpu" else None
    there = None if beside is None else beside.get_rng_state()

    def back() -> None:
        torch.set_rng_state(host)
        if beside is not None:
            beside.set_rng_state(there)

    return back


@contextmanager
def room_for_student(device: torch.device, model: PreTrainedModel | None = None) -> Iterator[None]:
    """TrainingError where memory runs out for what passes of fewer tokens do not make smaller: the weights, or, of a
    `model` that is there, what AdamW keeps with them.
    """
    try:
        yield
    except (RuntimeError, MemoryError, DistillError) as error:
        if not (is_out_of_memory(error) or (error.__cause__ is not None and is_out_of_memory(error.__cause__))):
            raise
    else:
        return
    what = "the student's weights"
    if model is not None:
        n, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
        gib = (4 * n + 12 * trained) / 2**30
        what += f", gradients and AdamW's moments ({n:,} parameters, {trained:,} of them trained: {gib:,.2f} GiB)"
    raise TrainingError(f"{device} has no memory left for {what}\ntake a smaller student, or a device with more")
