"""Which positions are shown, and what is shown of them."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import PreTrainedModel

from distill_assets.student_evaluation.evaluation import Evaluation
from distill_assets.student_evaluation.samples import CONTEXT_TOKENS, N_SAMPLES, choose_samples
from distill_assets.teacher_capture.sparse_targets import CapturedRow
from tests.student_evaluation.capturing import dense_logprobs


def test_chosen_by_rising_entropy_from_different_rows() -> None:
    rng = np.random.default_rng(0)
    entropy_N, row_N = rng.gamma(1.0, 2.0, size=400), np.repeat(np.arange(20), 20)
    chosen = choose_samples(entropy_N, row_N)
    assert len(chosen) == N_SAMPLES
    assert len(set(row_N[chosen])) == N_SAMPLES
    assert (np.diff(entropy_N[chosen]) > 0).all()
    ranks = np.argsort(np.argsort(entropy_N))[chosen]
    assert (ranks // (400 / N_SAMPLES)).astype(int).tolist() == list(range(N_SAMPLES))
    assert choose_samples(entropy_N, row_N) == chosen


@pytest.mark.parametrize(("n_positions", "n_rows"), [(5, 5), (40, 1), (1, 1)])
def test_few_positions_or_one_row(n_positions: int, n_rows: int) -> None:
    chosen = choose_samples(np.linspace(0, 1, n_positions), np.arange(n_positions) % n_rows)
    assert len(chosen) == len(set(chosen)) == min(N_SAMPLES, n_positions)


def test_a_sample_shows_the_right_position(
    evaluation: Evaluation, rows_by_shard: dict[str, list[CapturedRow]], teacher: PreTrainedModel, n_real: int
) -> None:
    rows = {(shard, row.row): row for shard, shard_rows in rows_by_shard.items() for row in shard_rows}
    assert len(evaluation.samples) == N_SAMPLES
    for sample in evaluation.samples:
        row = rows[sample.shard, sample.row]
        ids = row.input_ids.tolist()
        assert sample.gold_id == ids[sample.position + 1]
        assert list(sample.context_ids) == ids[: sample.position + 1][-CONTEXT_TOKENS:]
        assert sample.context_is_cut == (sample.position + 1 > CONTEXT_TOKENS)
        logp = dense_logprobs(teacher, row.input_ids, n_real)[sample.position]
        assert sample.entropy_nats == pytest.approx(-(np.exp(logp) * logp).sum(), rel=1e-4)
        for i, p in sample.expected["teacher"]:
            assert p == pytest.approx(np.exp(logp[i]), rel=1e-3)
        assert list(sample.expected) == ["teacher", "untrained", "student", "control"]
