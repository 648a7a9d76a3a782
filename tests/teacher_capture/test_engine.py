"""The engine against a naive float64 oracle: full logits, a Python loop, one row at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from distill_assets.dataset_shards.encode import EncodedRow
from distill_assets.foundation.errors import CaptureError
from distill_assets.foundation.fingerprints import HashCache
from distill_assets.foundation.model_folders import resolve_model
from distill_assets.foundation.settings import Dtype, TargetSettings
from distill_assets.teacher_capture.engine import plan_batches, score_rows
from distill_assets.teacher_capture.sparse_targets import SparseTargets
from distill_assets.teacher_capture.teacher import Teacher, load_teacher
from tests import tiny
from tests.devices import DEVICES, SPREAD


def row(ids: list[int], mask: list[int] | None = None) -> EncodedRow:
    return EncodedRow(
        input_ids=np.array(ids, dtype=np.int32),
        loss_mask=np.array(mask or [0] + [1] * (len(ids) - 1), dtype=bool),
        key=f"{hash(tuple(ids)):032x}",
        id=None,
        weight=1.0,
        truncated=False,
        line=1,
    )


ROWS = [row([5, 9, 77, 300, 12, 8]), row([7, 8]), row([40, 41, 42, 43], [0, 0, 1, 1]), row([90 + i for i in range(40)])]


@pytest.fixture(scope="module", params=[*DEVICES, SPREAD])
def teacher(teacher_folder: Path, request: pytest.FixtureRequest) -> Teacher:
    return load(teacher_folder, request.param)


def load(folder: Path, device: str = "cpu", dtype: Dtype = "float32") -> Teacher:
    weights = resolve_model(str(folder), None, folder).weights(HashCache(folder.parent / "none.json"))
    return load_teacher(weights, dtype, "cuda" if device == "spread" else device, device == "spread")


def score(teacher: Teacher, rows: list[EncodedRow], batch_tokens: int = 64, **targets: object) -> list[SparseTargets]:
    settings = TargetSettings.model_validate({"k": 8, **targets})
    found = dict(score_rows(teacher, rows, settings, batch_tokens))
    return [found[i] for i in range(len(rows))]


def dense_logprobs(folder: Path, one: EncodedRow, n_real: int) -> np.ndarray:
    """log p over real ids at every position, float64, [T, V], from the plain model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        logits = model(torch.tensor([one.input_ids.tolist()])).logits[0, :, :n_real]
    return torch.log_softmax(logits, -1).numpy()


@pytest.mark.parametrize("min_probability", [0.0, 0.02])
@pytest.mark.parametrize("k", [1, 8, 320])
def test_targets_equal_the_dense_distribution(
    teacher: Teacher, teacher_folder: Path, k: int, min_probability: float
) -> None:
    for one, targets in zip(ROWS, score(teacher, ROWS, k=k, min_probability=min_probability), strict=True):
        logp_TV = dense_logprobs(teacher_folder, one, teacher.n_real)
        assert targets.positions_P.tolist() == [t for t in range(len(one.input_ids) - 1) if one.loss_mask[t + 1]]
        for p, t in enumerate(targets.positions_P):
            order = np.argsort(-logp_TV[t])[:k]
            kept = [i for n, i in enumerate(order) if n == 0 or np.exp(logp_TV[t, i]) >= min_probability]
            part = slice(targets.offsets_P1[p], targets.offsets_P1[p + 1])
            assert targets.support_ids_N[part].tolist() == kept
            assert np.allclose(targets.support_logprobs_N[part], logp_TV[t, kept], atol=2e-5)
            outside = np.delete(np.exp(logp_TV[t]), kept).sum()
            if len(kept) == teacher.n_real:
                assert np.isneginf(targets.tail_logprob_P[p])
            else:
                assert np.isclose(targets.tail_logprob_P[p], np.log(outside), atol=2e-5)
            assert np.isclose(targets.gold_logprob_P[p], logp_TV[t, one.input_ids[t + 1]], atol=2e-5)
            entropy = -(np.exp(logp_TV[t]) * logp_TV[t]).sum()
            assert np.isclose(targets.entropy_P[p], entropy, atol=2e-5)


def test_a_shift_by_one_row_would_be_seen(teacher: Teacher, teacher_folder: Path) -> None:
    """Gold log-probabilities must be those of token t+1: neither t nor t+2 gives the same numbers."""
    one = ROWS[3]
    (targets,) = score(teacher, [one])
    logp_TV = dense_logprobs(teacher_folder, one, teacher.n_real)
    positions = targets.positions_P[:-1]
    for shift in (0, 2):
        shifted = logp_TV[positions, one.input_ids[positions + shift]]
        assert not np.allclose(targets.gold_logprob_P[:-1], shifted, atol=1e-2)


def test_batching_does_not_change_the_targets(teacher: Teacher) -> None:
    one_by_one = [score(teacher, [one])[0] for one in ROWS]
    for alone, together in zip(one_by_one, score(teacher, ROWS, batch_tokens=1000), strict=True):
        assert (alone.support_ids_N == together.support_ids_N).all()
        assert np.allclose(alone.support_logprobs_N, together.support_logprobs_N, atol=1e-5)


def test_padding_rows_of_the_head_take_no_mass(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    padded = load(tiny.save_model(tmp_path / "padded", tokenizer, pad_head=24))
    assert padded.n_real == len(tokenizer)
    for targets in score(padded, ROWS, k=320):
        assert targets.support_ids_N.max() < len(tokenizer)
        mass = np.add.reduceat(np.exp(targets.support_logprobs_N.astype(np.float64)), targets.offsets_P1[:-1])
        assert np.allclose(mass, 1.0, atol=1e-5)


def test_logits_that_are_not_finite_name_row_and_position(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    teacher = load(tiny.save_model(tmp_path / "broken", tokenizer))
    with torch.no_grad():
        teacher.model.get_input_embeddings().weight[77] = float("nan")
    with pytest.raises(CaptureError, match=r"position \d+ of the row in line 1 \(key ") as caught:
        score(teacher, [row([5, 9, 77, 300, 12, 8])])
    assert "\n" not in str(caught.value)
    load_teacher.cache_clear()


def test_batches_fit_the_budget_and_hold_every_row_once() -> None:
    lengths = [3, 50, 7, 7, 2, 31, 100, 1]
    batches = plan_batches(lengths, 64)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or longest * len(batch) <= 64
    assert batches[0] == [6]  # the longest first, alone because it is over the budget


def test_a_head_that_is_fetched_when_it_is_called_gives_the_same(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """As accelerate leaves what does not fit on any device: its weights are nowhere in between."""
    teacher = load(tiny.save_model(tmp_path / "untied", tokenizer, tie_word_embeddings=False))
    expected = score(teacher, ROWS)
    dispatch_model(teacher.model, {"model": "cpu", "lm_head": "disk"}, main_device="cpu", offload_dir=tmp_path / "head")
    assert teacher.model.get_output_embeddings().weight.device.type == "meta"
    for a, b in zip(score(teacher, ROWS), expected, strict=True):
        assert np.array_equal(a.support_ids_N, b.support_ids_N)
        assert np.allclose(a.support_logprobs_N, b.support_logprobs_N, atol=1e-5)
    load_teacher.cache_clear()


def test_rows_are_not_beside_others_whose_length_would_turn_them() -> None:
    lengths = [20, 3, 11, 9, 10, 2, 30]
    batches = plan_batches(lengths, 64, apart_at=10)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len({lengths[i] > 10 for i in batch}) == 1
    assert any(len(batch) > 1 for batch in batches)


def test_a_teacher_that_turns_long_rows_otherwise_gives_each_row_what_it_gets_alone(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """As Phi-3 does from 4,096 tokens on; this one from 8."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 8, "factor": 4.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
    teacher = load(tiny.save_model(tmp_path / "turning", tokenizer, rope_parameters=rope))
    together, alone = score(teacher, ROWS, 512, k=320), [score(teacher, [one], k=320)[0] for one in ROWS]
    for a, b in zip(together, alone, strict=True):
        assert np.allclose(a.entropy_P, b.entropy_P, atol=1e-4) and np.allclose(
            a.gold_logprob_P, b.gold_logprob_P, atol=1e-4
        )
    mixed = np.zeros((2, 40), dtype=np.int64)
    mixed[0], mixed[1, :6] = ROWS[3].input_ids, ROWS[0].input_ids
    with torch.no_grad():
        beside = teacher.model(torch.from_numpy(mixed)).logits[1, :5].log_softmax(-1).amax(-1).numpy()
    assert np.abs(beside - alone[0].support_logprobs_N[alone[0].offsets_P1[:-1]]).max() > 1e-3, (
        "the fixture must need it"
    )
    load_teacher.cache_clear()


@pytest.mark.parametrize("device", DEVICES)
def test_half_precision_weights_have_float32_sums(teacher_folder: Path, device: str) -> None:
    """A log-sum-exp in bfloat16 would leave masses that miss 1 by a per cent."""
    teacher = load(teacher_folder, device, "bfloat16")
    for one, targets in zip(ROWS, score(teacher, ROWS, k=320), strict=True):
        mass_P = np.add.reduceat(np.exp(targets.support_logprobs_N.astype(np.float64)), targets.offsets_P1[:-1])
        assert np.allclose(mass_P, 1.0, atol=1e-5)
        logp_TV = dense_logprobs(teacher_folder, one, teacher.n_real)
        order_PK = targets.support_ids_N.reshape(targets.n_positions, -1)
        dense_PK = np.take_along_axis(logp_TV[targets.positions_P], order_PK, axis=1)
        error_PK = targets.support_logprobs_N.reshape(order_PK.shape) - dense_PK
        assert 1e-3 < (np.exp(dense_PK) * np.abs(error_PK)).sum(-1).mean() < 0.1  # rounded weights, no more
    load_teacher.cache_clear()
