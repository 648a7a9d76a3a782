"""Completions against a loop that asks for the likeliest id, one row and one token at a time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from transformers import PreTrainedModel

from distill_assets.student_evaluation.completions import (
    N_COMPLETIONS,
    WRITTEN_TOKENS,
    choose_prompts,
    continue_greedily,
)
from distill_assets.student_evaluation.evaluation import Evaluation
from distill_assets.student_model.vocabulary import StudentVocabulary
from distill_assets.teacher_capture.sparse_targets import CapturedRow
from tests.student_evaluation.capturing import dense_logprobs, random_rows


def naive(model: PreTrainedModel, given: list[int], v: StudentVocabulary, end: int) -> tuple[int, ...]:
    ids = list(given)
    while len(ids) - len(given) < WRITTEN_TOKENS:
        logq = dense_logprobs(model, np.array(ids), v.n_real)[-1]
        logq[list(v.unused)] = -np.inf
        ids.append(int(logq.argmax()))
        if ids[-1] == end:
            break
    return tuple(ids[len(given) :])


def test_equals_the_loop(teacher: PreTrainedModel, stranger: PreTrainedModel, n_real: int) -> None:
    """Prompts of different lengths in one batch; a head with padding; an id that may not be written; an end."""
    rows = random_rows(teacher, 8, k=4, n_real=n_real, lengths=(40, 90))
    prompts = choose_prompts(rows)
    assert len({prompt.n_tokens for prompt in prompts}) > 1
    given = [rows[p.row].input_ids[: p.n_tokens].tolist() for p in prompts]
    free = [naive(stranger, ids, StudentVocabulary(n_real), -1) for ids in given]
    v = StudentVocabulary(n_real, (free[0][1],))
    end = free[1][5]
    expected = [naive(stranger, ids, v, end) for ids in given]
    assert expected != free and min(map(len, expected)) < WRITTEN_TOKENS
    assert continue_greedily(stranger, rows, prompts, v, end) == expected


def test_prompts_end_before_what_is_supervised(teacher: PreTrainedModel, n_real: int) -> None:
    rows = random_rows(teacher, 40, k=4, n_real=n_real, lengths=(10, 90))
    prompts = choose_prompts(rows)
    assert len(prompts) == N_COMPLETIONS and [p.row for p in prompts] == sorted({p.row for p in prompts})
    for prompt in prompts:
        assert prompt.n_tokens == rows[prompt.row].targets.positions_P[0] + 1
        assert len(rows[prompt.row].input_ids) - prompt.n_tokens >= WRITTEN_TOKENS // 2
    all_text = replace(rows[prompts[0].row], targets=rows[prompts[0].row].targets)
    all_text.targets.positions_P[0] = 0
    assert choose_prompts([all_text])[0].n_tokens == 8  # a prompt of one token would tell nothing
    assert choose_prompts([row for row in rows if len(row.input_ids) < 16]) == []


def test_side_by_side_with_what_came(evaluation: Evaluation, rows_by_shard: dict[str, list[CapturedRow]]) -> None:
    rows = {(shard, row.row): row.input_ids.tolist() for shard, some in rows_by_shard.items() for row in some}
    assert len(evaluation.completions) == N_COMPLETIONS
    for c in evaluation.completions:
        ids = rows[c.shard, c.row]
        start = len(ids) - len(c.gold_ids) if len(c.gold_ids) < WRITTEN_TOKENS else None
        both = [*c.prompt_ids, *c.gold_ids]
        assert any(ids[i : i + len(both)] == both for i in range(len(ids)))
        assert start is None or ids[start:] == list(c.gold_ids)
        assert list(c.written_ids) == ["student", "control"] and all(c.written_ids.values())
