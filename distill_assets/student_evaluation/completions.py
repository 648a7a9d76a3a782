"""How some held-out rows go on, by each model: read side by side, with what really came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from distill_assets.foundation.language_model import head_width
from distill_assets.foundation.tokenizers import quiet_transformers
from distill_assets.student_evaluation.samples import CONTEXT_TOKENS
from distill_assets.student_model.vocabulary import StudentVocabulary
from distill_assets.teacher_capture.sparse_targets import CapturedRow

N_COMPLETIONS = 4
WRITTEN_TOKENS = 32
_PROMPT_OF_TEXT = 8  # tokens; a row that is all text has no prompt of its own


@dataclass(frozen=True)
class Prompt:
    """A row's number, and how many of its tokens are given."""

    row: int
    n_tokens: int


@dataclass(frozen=True)
class Completion:
    """The end of a prompt, how the row goes on, and how each model does: its likeliest token, one after another."""

    shard: str
    row: int
    row_id: str | None
    prompt_ids: tuple[int, ...]
    prompt_is_cut: bool
    gold_ids: tuple[int, ...]
    written_ids: Mapping[str, tuple[int, ...]]


def choose_prompts(rows: Sequence[CapturedRow], n: int = N_COMPLETIONS) -> list[Prompt]:
    """Up to `n` rows, evenly spaced among those that go on for at least half of WRITTEN_TOKENS.

    A prompt is what comes before the row's first supervised token, a few tokens where only one does.
    Depends on the rows alone.
    """
    prompts = []
    for i, row in enumerate(rows):
        if row.targets.n_positions:
            given = int(row.targets.positions_P[0]) + 1
            if given == 1:
                given = _PROMPT_OF_TEXT
            if len(row.input_ids) - given >= WRITTEN_TOKENS // 2:
                prompts.append(Prompt(i, given))
    spaced = np.linspace(0, len(prompts) - 1, min(n, len(prompts))).round().astype(int)
    return [prompts[i] for i in spaced]


@torch.inference_mode()
def continue_greedily(
    model: PreTrainedModel,
    rows: Sequence[CapturedRow],
    prompts: Sequence[Prompt],
    vocabulary: StudentVocabulary,
    end_id: int | None,
) -> list[tuple[int, ...]]:
    """At most WRITTEN_TOKENS ids of the vocabulary after each prompt, up to and with `end_id`.

    All prompts are continued at once, padded on the left: a step reads the weights once for all of them.
    """
    if not prompts:
        return []
    never = [*vocabulary.unused, *range(vocabulary.n_real, head_width(model))]
    settings = GenerationConfig(
        max_new_tokens=WRITTEN_TOKENS,
        do_sample=False,
        eos_token_id=end_id,
        pad_token_id=end_id or 0,
        suppress_tokens=never or None,
    )
    width = max(prompt.n_tokens for prompt in prompts)
    ids_BT = torch.zeros((len(prompts), width), dtype=torch.int64)
    seen_BT = torch.zeros_like(ids_BT)
    for b, prompt in enumerate(prompts):
        given = rows[prompt.row].input_ids[: prompt.n_tokens]
        ids_BT[b, width - prompt.n_tokens :] = torch.from_numpy(given.astype(np.int64))
        seen_BT[b, width - prompt.n_tokens :] = 1
    generate: Any = model.generate
    with quiet_transformers():
        out_BT = generate(ids_BT.to(model.device), attention_mask=seen_BT.to(model.device), generation_config=settings)
    return [_up_to(end_id, ids) for ids in out_BT[:, width:].tolist()]


def _up_to(end_id: int | None, ids: list[int]) -> tuple[int, ...]:
    """What was written: what follows the end is padding."""
    return tuple(ids[: ids.index(end_id) + 1] if end_id in ids else ids)


def make_completion(
    shard: str, row: CapturedRow, prompt: Prompt, written_ids: Mapping[str, tuple[int, ...]]
) -> Completion:
    """The completions of one prompt, by each model."""
    start = max(0, prompt.n_tokens - 2 * CONTEXT_TOKENS)
    return Completion(
        shard=shard,
        row=row.row,
        row_id=row.id,
        prompt_ids=tuple(int(i) for i in row.input_ids[start : prompt.n_tokens]),
        prompt_is_cut=start > 0,
        gold_ids=tuple(int(i) for i in row.input_ids[prompt.n_tokens :][:WRITTEN_TOKENS]),
        written_ids=written_ids,
    )
