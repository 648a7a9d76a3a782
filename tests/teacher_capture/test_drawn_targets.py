"""Targets by chance: right on average, the same for the same row, never an id without mass.

Unbiasedness is tried on many row keys for one distribution: the mean of what was drawn must lie
within four standard errors of the dense probability.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from distill_assets.foundation.language_model import NEVER
from distill_assets.foundation.settings import TargetSettings
from distill_assets.teacher_capture.drawn_targets import sparsify
from distill_assets.teacher_capture.draws import draw_ids, draws_per_position, row_bits
from distill_assets.teacher_capture.engine import score_rows
from distill_assets.teacher_capture.redrawing import unexplained_nats
from distill_assets.teacher_capture.sparse_targets import SparseTargets
from distill_assets.teacher_capture.teacher import ScoredPositions, Teacher
from tests import tiny
from tests.devices import DEVICES
from tests.teacher_capture.test_engine import ROWS, dense_logprobs, load

V, KEYS = 60, 20_000
UNUSED = [0, 17, 41, V - 1]  # first and last among them: where an inverse CDF goes wrong
KINDS = {
    "sampled": TargetSettings(kind="sampled", samples=12),
    "threshold": TargetSettings(kind="threshold", tau=0.05),
    "tail samples": TargetSettings(k=5, tail_samples=3),
    "tail samples, few ids": TargetSettings(k=12, min_probability=0.1, tail_samples=2),
}


def one_distribution() -> tuple[torch.Tensor, NDArray[np.float64]]:
    """Logits and probabilities [V]: some ids likely, many not, some without a token."""
    logits_V = 2.0 * torch.randn(V, generator=torch.Generator().manual_seed(3))
    logits_V[UNUSED] = NEVER
    return logits_V, torch.softmax(logits_V.double(), -1).numpy()


def drawn(settings: TargetSettings, n: int = KEYS) -> ScoredPositions:
    """The same distribution at the single position of `n` rows."""
    bits_NS = torch.from_numpy(np.concatenate([row_bits(f"{i:032x}", settings, 1) for i in range(n)]))
    logits_V, _ = one_distribution()
    return sparsify(logits_V.repeat(n, 1), torch.full((n,), 5), settings, bits_NS)


def weighted_one_hots(found: ScoredPositions) -> NDArray[np.float64]:
    assert found.weights_NK is not None
    weights_NK = torch.where(found.keep_NK, found.weights_NK, 0.0).double()
    return torch.zeros(len(weights_NK), V, dtype=torch.float64).scatter_add_(1, found.ids_NK, weights_NK).numpy()


def within_four_errors(samples_NX: NDArray[np.float64], expected_X: NDArray[np.float64]) -> bool:
    errors_X = samples_NX.std(axis=0) / np.sqrt(len(samples_NX))
    return bool((np.abs(samples_NX.mean(axis=0) - expected_X) <= 4 * errors_X + 1e-7).all())


@pytest.mark.parametrize("kind", ["sampled", "threshold"])
def test_weights_are_the_distribution_on_average(kind: str) -> None:
    _, p_V = one_distribution()
    found = drawn(KINDS[kind])
    one_hots_NV = weighted_one_hots(found)
    assert within_four_errors(one_hots_NV, p_V)
    assert within_four_errors(one_hots_NV.sum(axis=1, keepdims=True), np.ones(1))
    assert (one_hots_NV[:, UNUSED] == 0).all()
    # The test has teeth: what a drawn id is short of would be seen.
    assert not within_four_errors(one_hots_NV, p_V * (1 + 0.2 * (p_V < 0.05)))


def test_sampled_weights_are_counts_and_threshold_weights_are_p_or_tau() -> None:
    _, p_V = one_distribution()
    counts_NV = weighted_one_hots(drawn(KINDS["sampled"], 200)) * 12
    assert np.allclose(counts_NV, counts_NV.round(), atol=1e-5) and np.allclose(counts_NV.sum(axis=1), 12, atol=1e-4)
    weights_NV = weighted_one_hots(drawn(KINDS["threshold"], 200))
    heavy_V = p_V >= 0.05
    assert 1 < heavy_V.sum() < 12
    assert np.allclose(weights_NV[:, heavy_V], p_V[heavy_V], atol=1e-6)
    light = weights_NV[:, ~heavy_V]
    assert np.isclose(light[light > 0], 0.05).all()
    kept_N = (light > 0).sum(axis=1)
    assert kept_N.max() - kept_N.min() <= 1  # one mark every tau: the number kept hardly varies


@pytest.mark.parametrize("kind", ["tail samples", "tail samples, few ids"])
def test_tail_samples_are_the_tail_on_average(kind: str) -> None:
    _, p_V = one_distribution()
    found = drawn(KINDS[kind])
    assert found.tail_sample_ids_NS is not None and found.weights_NK is None
    kept = found.ids_NK[0][found.keep_NK[0]].numpy()
    assert len(kept) < 6
    outside_V = p_V.copy()
    outside_V[kept] = 0.0
    one_hots_NV = np.stack([np.bincount(ids, minlength=V) for ids in found.tail_sample_ids_NS.numpy()])
    assert within_four_errors(one_hots_NV / one_hots_NV.sum(axis=1, keepdims=True), outside_V / outside_V.sum())
    assert (one_hots_NV[:, [*kept, *UNUSED]] == 0).all()
    assert np.allclose(found.tail_logprob_N.exp(), outside_V.sum(), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_support_is_unique_descending_true_and_begins_with_the_likeliest(kind: str) -> None:
    _, p_V = one_distribution()
    found = drawn(KINDS[kind], 300)
    for n in range(300):
        keep_K = found.keep_NK[n].numpy()
        ids = found.ids_NK[n].numpy()[keep_K]
        assert keep_K[: len(ids)].all()
        assert ids[0] == p_V.argmax() and len(set(ids)) == len(ids)
        assert (np.diff(p_V[ids]) <= 0).all()
        assert np.allclose(found.logprobs_NK[n].numpy()[keep_K], np.log(p_V[ids]), atol=1e-5)
        assert np.isclose(found.tail_logprob_N[n].exp(), 1 - p_V[ids].sum(), atol=1e-6)


def test_the_likeliest_id_that_was_not_drawn_is_held_at_weight_0() -> None:
    found = drawn(TargetSettings(kind="sampled", samples=1), 200)
    assert found.weights_NK is not None
    first_N = found.weights_NK[:, 0]
    assert 0 < int((first_N == 0).sum()) < 200
    assert (found.keep_NK.sum(-1) == torch.where(first_N == 0, 2, 1)).all()


def test_equally_likely_ids_keep_the_teachers_first_in_front() -> None:
    logits_NV = torch.zeros(50, V)
    settings = TargetSettings(kind="sampled", samples=8)
    bits_NS = torch.from_numpy(np.concatenate([row_bits(str(i), settings, 1) for i in range(50)]))
    first = int(logits_NV[0].topk(1).indices)
    found = sparsify(logits_NV, torch.zeros(50, dtype=torch.int64), settings, bits_NS)
    assert (found.ids_NK[:, 0] == first).all()


@pytest.mark.parametrize("extreme", [0, 2**31 - 1])
def test_no_random_number_reaches_an_id_without_mass(extreme: int) -> None:
    mass_NV = torch.tensor([[0.0, 1.0, 0.0, 1e-9, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1e-40, 0.0, 0.0]])
    ids_NS = draw_ids(mass_NV, torch.full((3, 1), extreme))
    assert ids_NS[:, 0].tolist() == [1 if extreme == 0 else 3, -1, 2]


def test_random_numbers_belong_to_the_row_and_the_kind() -> None:
    sampled, threshold = KINDS["sampled"], KINDS["threshold"]
    a = row_bits("0a", sampled, 3)
    assert a.shape == (3, 12) and row_bits("0a", threshold, 3).shape == (3, 1)
    assert (a == row_bits("0a", sampled, 3)).all()
    assert len({tuple(row_bits(key, sampled, 1)[0]) for key in ("0a", "0b", "a0")}) == 3
    assert a[0, 0] != row_bits("0a", threshold, 1)[0, 0]
    assert a.min() >= 0 and draws_per_position(TargetSettings()) == 0
    many = row_bits("x", TargetSettings(kind="sampled", samples=100), 1000)
    assert abs(many.mean() / 2**31 - 0.5) < 4 / np.sqrt(12 * many.size)
    # Written down, so that a capture can be reproduced with whatever NumPy comes.
    assert row_bits("0a", sampled, 1)[0, :3].tolist() == [1459086283, 1256111704, 1942826024]


@pytest.fixture(scope="module", params=DEVICES)
def teacher(teacher_folder: Path, request: pytest.FixtureRequest) -> Teacher:
    return load(teacher_folder, request.param)


def scored(teacher: Teacher, order: list[int], settings: TargetSettings, batch_tokens: int) -> list[SparseTargets]:
    found = dict(score_rows(teacher, [ROWS[i] for i in order], settings, batch_tokens))
    return [found[order.index(i)] for i in range(len(ROWS))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_draws_in_every_batch(teacher: Teacher, kind: str) -> None:
    together = scored(teacher, [0, 1, 2, 3], KINDS[kind], 1000)
    alone = scored(teacher, [2, 3, 0, 1], KINDS[kind], 1)
    for a, b in zip(together, alone, strict=True):
        assert a.support_ids_N.tolist() == b.support_ids_N.tolist()
        assert (a.weights_N is None) == (b.weights_N is None) == (kind.startswith("tail"))
        if a.weights_N is not None and b.weights_N is not None:
            np.testing.assert_allclose(a.weights_N, b.weights_N, rtol=1e-5)
        if a.tail_sample_ids_PS is not None and b.tail_sample_ids_PS is not None:
            assert a.tail_sample_ids_PS.tolist() == b.tail_sample_ids_PS.tolist()


def test_all_ids_kept_leave_no_tail_to_sample(teacher: Teacher) -> None:
    for targets in scored(teacher, [0, 1, 2, 3], TargetSettings(k=320, tail_samples=4), 64):
        assert targets.tail_sample_ids_PS is not None and (targets.tail_sample_ids_PS == -1).all()
        assert np.isneginf(targets.tail_logprob_P).all()


@pytest.mark.parametrize("kind", KINDS)
def test_padding_of_the_head_is_never_drawn(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    padded = load(tiny.save_model(tmp_path / "padded", tokenizer, pad_head=24))
    with torch.no_grad():
        padded.model.get_output_embeddings().weight[len(tokenizer) :] = 9.0
    for targets in scored(padded, [0, 1, 2, 3], KINDS[kind], 64):
        assert targets.support_ids_N.max() < len(tokenizer)
        if targets.tail_sample_ids_PS is not None:
            assert targets.tail_sample_ids_PS.max() < len(tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_drawn_equals_the_dense_distribution(teacher: Teacher, teacher_folder: Path, kind: str) -> None:
    for one, targets in zip(ROWS, scored(teacher, [0, 1, 2, 3], KINDS[kind], 64), strict=True):
        logp_PV = dense_logprobs(teacher_folder, one, teacher.n_real)[targets.positions_P]
        row_N = np.repeat(np.arange(targets.n_positions), targets.kept_P)
        assert np.allclose(targets.support_logprobs_N, logp_PV[row_N, targets.support_ids_N], atol=2e-5)
        assert targets.support_ids_N[targets.offsets_P1[:-1]].tolist() == logp_PV.argmax(-1).tolist()
        gold = logp_PV[np.arange(targets.n_positions), one.input_ids[targets.positions_P + 1]]
        assert np.allclose(targets.gold_logprob_P, gold, atol=2e-5)
        assert np.allclose(targets.entropy_P, -(np.exp(logp_PV) * logp_PV).sum(-1), atol=5e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_explained_by_the_distribution_whatever_all_of_it_is_off_by(
    teacher: Teacher, teacher_folder: Path, kind: str
) -> None:
    """A float32 log-sum-exp of a large vocabulary is off by 1e-5, which moves no draw."""
    settings = KINDS[kind]
    strange = []
    for one, targets in zip(ROWS, scored(teacher, [0, 1, 2, 3], settings, 64), strict=True):
        logp_PV = dense_logprobs(teacher_folder, one, teacher.n_real)[targets.positions_P].astype(np.float32)
        bits_PS = row_bits(one.key, settings, targets.n_positions)
        for shift in (0.0, 1e-4, -1e-4):
            assert unexplained_nats(logp_PV + np.float32(shift), targets, settings, bits_PS).max() < 2e-4
        strange.append(unexplained_nats(logp_PV, targets, settings, row_bits("0a", settings, len(logp_PV))))
    assert np.concatenate(strange).max() > 0.1
