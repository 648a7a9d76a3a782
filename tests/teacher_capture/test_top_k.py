"""Top-k targets block by block, against float64 on all logits at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from distill_assets.foundation import language_model
from distill_assets.foundation.settings import TargetSettings
from distill_assets.teacher_capture import top_k
from distill_assets.teacher_capture.teacher import Teacher
from distill_assets.teacher_capture.top_k import top_k_targets

VOCABULARY, WIDTH, POSITIONS = 5000, 16, 40
UNUSED = (3, 1500, 4999)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY + 8, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 1.5)
        model.lm_head.weight[VOCABULARY:] = 50.0  # padding that would take all the mass
    return Teacher(model, VOCABULARY, torch.tensor(UNUSED))


@contextmanager
def head_weights(teacher: Teacher, logit_W: Tensor) -> Iterator[None]:
    """A head that gives these logits to a hidden state of ones."""
    weight = teacher.model.lm_head.weight
    saved = weight.detach().clone()
    with torch.no_grad():
        weight[:] = logit_W[:, None] / WIDTH
        try:
            yield
        finally:
            weight[:] = saved


def check(teacher: Teacher, hidden_ND: Tensor, gold_N: Tensor, k: int, min_probability: float = 0.0) -> None:
    with torch.inference_mode():
        found = top_k_targets(teacher, hidden_ND, gold_N, TargetSettings(k=k, min_probability=min_probability))
        logits_NV = teacher.model.lm_head(hidden_ND)[:, :VOCABULARY].double()
        logits_NV[:, list(UNUSED)] = -torch.inf
        logp_NV = torch.log_softmax(logits_NV, -1).numpy()
    p_NV = np.exp(logp_NV)
    for n, logp_V in enumerate(logp_NV):
        keep_K = found.keep_NK[n].numpy()
        ids = found.ids_NK[n].numpy()[keep_K]
        best = np.sort(logp_V)[::-1][:k]
        expected = [value for i, value in enumerate(best) if i == 0 or np.exp(value) >= min_probability]
        assert len(set(ids)) == len(ids) == len(expected)
        np.testing.assert_allclose(logp_V[ids], expected, atol=2e-5)  # ties may be broken either way
        np.testing.assert_allclose(found.logprobs_NK[n].numpy()[keep_K], expected, atol=2e-5)
        outside = np.delete(p_NV[n], ids).sum()
        np.testing.assert_allclose(found.tail_logprob_N[n].exp(), outside, rtol=1e-4)
        np.testing.assert_allclose(found.gold_logprob_N[n], logp_V[gold_N[n]], atol=2e-5)
        entropy = -(p_NV[n] * np.where(p_NV[n] > 0, logp_V, 0)).sum()
        np.testing.assert_allclose(found.entropy_N[n], entropy, atol=5e-5)


@pytest.mark.parametrize("k", [1, 5, 64, 1030])
@pytest.mark.parametrize("block_bytes", [1, 2048 * 4 * POSITIONS, 1 << 30])  # blocks of 1024, of 2048, one block
def test_blocks_join_to_the_dense_distribution(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch, k: int, block_bytes: int
) -> None:
    monkeypatch.setattr(language_model, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(top_k, "_CACHED_ROWS", 16)
    torch.manual_seed(k)
    check(teacher, torch.randn(POSITIONS, WIDTH), torch.randint(0, 3, (POSITIONS,)) * 2000 + 7, k, 0.0)
    check(teacher, torch.randn(POSITIONS, WIDTH), torch.arange(POSITIONS) * 120 + 10, k, 0.01)


@pytest.mark.parametrize("slopes", [(1, -1, 0), (1, 1, 1), (-1, -1, -1), (0, 0, 0)])
def test_the_likeliest_ids_are_found_wherever_they_stand(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch, slopes: Sequence[float]
) -> None:
    """Rising logits make every tile of a later block a candidate; falling ones none but the largest; equal ones all."""
    monkeypatch.setattr(language_model, "BLOCK_BYTES", 1)
    with head_weights(teacher, torch.arange(VOCABULARY + 8) / 500):
        check(teacher, torch.tensor(slopes)[:, None].repeat(1, WIDTH).float(), torch.tensor([9, 2500, 4990]), 20)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("bad", [0, POSITIONS - 1])
def test_a_position_whose_logits_are_no_numbers_spoils_no_other(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch, value: float, bad: int
) -> None:
    monkeypatch.setattr(language_model, "BLOCK_BYTES", 1)
    torch.manual_seed(0)
    hidden_ND, gold_N, settings = torch.randn(POSITIONS, WIDTH), torch.arange(POSITIONS), TargetSettings(k=20)
    spoilt_ND, is_good_N = hidden_ND.clone(), torch.arange(POSITIONS) != bad
    spoilt_ND[bad] = value
    with torch.inference_mode():
        expected = top_k_targets(teacher, hidden_ND, gold_N, settings)
        found = top_k_targets(teacher, spoilt_ND, gold_N, settings)
    assert (found.entropy_N.isfinite() == is_good_N).all()
    for name in ("ids_NK", "logprobs_NK", "tail_logprob_N", "gold_logprob_N", "entropy_N"):
        torch.testing.assert_close(getattr(found, name)[is_good_N], getattr(expected, name)[is_good_N])


@pytest.mark.parametrize("k", [32, 512])
def test_one_position_that_says_little_takes_no_memory_of_all(k: int) -> None:
    """One whose logits are all the same, and one whose logits rise: each makes all ids of a block candidates."""
    n, vocabulary = 1024, 16_384
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.normal_()
        model.lm_head.weight[:, 0] = torch.arange(vocabulary) / 1000
    teacher, hidden_ND = Teacher(model, vocabulary, torch.tensor([], dtype=torch.int64)), torch.randn(n, WIDTH)
    hidden_ND[:, 0] = 0
    peaks = []
    for first in (None, torch.zeros(WIDTH), torch.eye(WIDTH)[0]):
        if first is not None:
            hidden_ND[0] = first
        with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            top_k_targets(teacher, hidden_ND, torch.zeros(n, dtype=torch.int64), TargetSettings(k=k))
        sizes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        peaks.append(max(accumulate(sizes)) / 2**20)
    assert max(peaks) < 48, peaks


def test_a_tail_far_below_rounding_is_exact(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mass outside is 1e-9: 1 - sum of the kept would be 0, or rounding noise."""
    monkeypatch.setattr(language_model, "BLOCK_BYTES", 1)
    logit_W = torch.zeros(VOCABULARY + 8)
    logit_W[2100] = 30.0
    with head_weights(teacher, logit_W):
        check(teacher, torch.ones(2, WIDTH), torch.tensor([2100, 5]), 1)


def test_blocks_are_as_small_as_asked(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_model, "BLOCK_BYTES", 1024 * 4 * POSITIONS)
    with torch.inference_mode():
        blocks = list(
            language_model.head_blocks(teacher.model, torch.randn(POSITIONS, WIDTH), VOCABULARY, teacher.unused)
        )
    assert [start for start, _ in blocks] == [0, 1024, 2048, 3072, 4096]
    assert all(logits.shape[1] <= 1024 for _, logits in blocks)
