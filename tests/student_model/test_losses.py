"""Losses and their gradients on logits against Python loops in float64, autograd, and the analytic gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distill_assets.foundation.language_model import NEVER
from distill_assets.student_model.losses import LossMixture, PositionTargets, losses_and_gradient

V = 23


def teacher_and_student(seed: int = 0, n: int = 6) -> tuple[Tensor, Tensor]:
    """Teacher log-probabilities and student logits [n, V] in float64."""
    torch.manual_seed(seed)
    return (2.0 * torch.randn(n, V, dtype=torch.float64)).log_softmax(-1), 2.0 * torch.randn(n, V, dtype=torch.float64)


def sparse(logprobs_NV: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Top-k ids, their log-probabilities, and the log of the mass outside (-inf for k = V)."""
    top = logprobs_NV.topk(k)
    tail_N = logprobs_NV.scatter(1, top.indices, -torch.inf).logsumexp(-1)
    return top.indices, top.values, tail_N


def distilled(logits_NV: Tensor, targets: PositionTargets, tail_sample_weight: float = 0.0) -> tuple[Tensor, Tensor]:
    """Distillation loss of every position, and the gradient of their sum."""
    gradient_NV = logits_NV.clone()
    mixture = LossMixture(kd_weight=1.0, tail_sample_weight=tail_sample_weight)
    kd_N, _ = losses_and_gradient(gradient_NV, targets, mixture)
    return kd_N, gradient_NV


def forward_kl(
    logits_NV: Tensor,
    ids_NK: Tensor,
    logprobs_NK: Tensor,
    tail_logprob_N: Tensor,
    tail_sample_ids_NS: Tensor | None = None,
    tail_sample_weight: float = 0.0,
) -> tuple[Tensor, Tensor]:
    gold_N = torch.zeros(len(logits_NV), dtype=torch.int64)
    targets = PositionTargets(
        gold_N, torch.ones(len(gold_N)), ids_NK, logprobs_NK, tail_logprob_N, tail_sample_ids_NS=tail_sample_ids_NS
    )
    return distilled(logits_NV, targets, tail_sample_weight)


def weighted(logits_NV: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> tuple[Tensor, Tensor]:
    gold_N = torch.zeros(len(logits_NV), dtype=torch.int64)
    return distilled(logits_NV, PositionTargets(gold_N, torch.ones(len(gold_N)), ids_NK, weights_NK=weights_NK))


def naive(logits: list[float], ids: list[int], logprobs: list[float], tail: float) -> float:
    """The formula as it is written in the design, with sums over a Python list."""
    total = math.fsum(math.exp(z) for z in logits)
    q = [math.exp(z) / total for z in logits]
    kept = [(i, lp) for i, lp in zip(ids, logprobs, strict=True) if lp > -math.inf]
    loss = math.fsum(math.exp(lp) * (lp - math.log(q[i])) for i, lp in kept)
    if tail > -math.inf:
        inside = {i for i, _ in kept}
        rest = math.fsum(p for j, p in enumerate(q) if j not in inside)
        loss += math.exp(tail) * (tail - math.log(rest))
    return loss


@pytest.mark.parametrize("k", [1, 5, V - 1, V])
def test_forward_kl_is_the_written_formula(k: int) -> None:
    teacher_NV, logits_NV = teacher_and_student()
    ids_NK, logprobs_NK, tail_N = sparse(teacher_NV, k)
    losses_N, _ = forward_kl(logits_NV, ids_NK, logprobs_NK, tail_N)
    for n, loss in enumerate(losses_N.tolist()):
        expected = naive(logits_NV[n].tolist(), ids_NK[n].tolist(), logprobs_NK[n].tolist(), float(tail_N[n]))
        assert loss == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("k", [1, 5, V - 1])
def test_gradient_is_q_minus_p_inside_and_q_times_one_minus_m_over_Q_outside(k: int) -> None:
    teacher_NV, logits_NV = teacher_and_student(1)
    ids_NK, logprobs_NK, tail_N = sparse(teacher_NV, k)
    _, gradient_NV = forward_kl(logits_NV, ids_NK, logprobs_NK, tail_N)
    q_NV = logits_NV.softmax(-1)
    for n in range(len(q_NV)):
        inside = set(ids_NK[n].tolist())
        rest = sum(float(q_NV[n, j]) for j in range(V) if j not in inside)
        for j in range(V):
            q = float(q_NV[n, j])
            analytic = q - math.exp(teacher_NV[n, j]) if j in inside else q * (1 - math.exp(tail_N[n]) / rest)
            assert float(gradient_NV[n, j]) == pytest.approx(analytic, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("k", [1, 5, V])
@pytest.mark.parametrize("objective", ["forward_kl", "reverse_kl", "jsd"])
def test_nothing_to_learn_when_the_student_is_the_stored_target(k: int, dtype: torch.dtype, objective: str) -> None:
    teacher_NV, _ = teacher_and_student(2)
    ids_NK, logprobs_NK, tail_N = sparse(teacher_NV, k)
    gold_N, weight_N = torch.zeros(len(ids_NK), dtype=torch.int64), torch.ones(len(ids_NK), dtype=dtype)
    targets = PositionTargets(gold_N, weight_N, ids_NK, logprobs_NK.to(dtype), tail_N.to(dtype))
    gradient_NV = teacher_NV.to(dtype) + 3.0
    losses_N, _ = losses_and_gradient(gradient_NV, targets, LossMixture(objective))  # type: ignore[arg-type]
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert losses_N.abs().max() < tolerance
    assert gradient_NV.abs().max() < tolerance


def test_all_ids_kept_is_the_dense_divergence() -> None:
    teacher_NV, logits_NV = teacher_and_student(3)
    dense_N = (teacher_NV.exp() * (teacher_NV - logits_NV.log_softmax(-1))).sum(-1)
    losses_N, gradient_NV = forward_kl(logits_NV, *sparse(teacher_NV, V))
    torch.testing.assert_close(losses_N, dense_N)
    torch.testing.assert_close(gradient_NV, logits_NV.softmax(-1) - teacher_NV.exp())


def test_empty_slots_change_neither_value_nor_gradient() -> None:
    teacher_NV, logits_NV = teacher_and_student(4)
    ids_NK, logprobs_NK, tail_N = sparse(teacher_NV, 4)
    some_id_outside = (ids_NK[:, :1] + 1) % V  # an empty slot's id must not be masked out of the tail
    padded_ids = torch.cat([torch.zeros_like(ids_NK[:, :1]), ids_NK, torch.zeros_like(ids_NK), some_id_outside], 1)
    empty = torch.full((len(ids_NK), 5), -torch.inf)
    padded_logprobs = torch.cat([empty[:, :1], logprobs_NK, empty], 1)
    padded = forward_kl(logits_NV, padded_ids, padded_logprobs, tail_N)
    for got, expected in zip(padded, forward_kl(logits_NV, ids_NK, logprobs_NK, tail_N), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("mass", "lowest"), [(1e-12, -9.0), (1e-6, -9.0), (0.5, -9.0), (0.5, -300.0)])
def test_a_small_tail_keeps_its_digits_in_float32(mass: float, lowest: float) -> None:
    """The student's own tail is about 3e-13, or far below what float32 can hold."""
    ids_NK = torch.tensor([[0, 1]])
    logprobs_NK = torch.tensor([[0.75 * (1 - mass), 0.25 * (1 - mass)]], dtype=torch.float64).log()
    tail_N = torch.tensor([mass], dtype=torch.float64).log()
    logits_NV = torch.tensor([[20.0, 19.0, lowest, lowest - 1, lowest - 2]])
    loss_N, gradient_NV = forward_kl(logits_NV, ids_NK, logprobs_NK.float(), tail_N.float())
    expected = naive(logits_NV[0].tolist(), [0, 1], logprobs_NK[0].tolist(), float(tail_N))
    assert loss_N.item() == pytest.approx(expected, rel=1e-5, abs=4e-6)  # one ulp of a logit of 20 is 2e-6
    q = logits_NV.double().softmax(-1)[0]
    outside = float(q[2] * (1 - mass / q[2:].sum()))
    assert float(gradient_NV[0, 2]) == pytest.approx(outside, rel=1e-4)


def test_no_tail_and_ids_without_a_token_give_finite_gradients() -> None:
    teacher_NV, logits_NV = teacher_and_student(5)
    logits_NV = logits_NV.float().index_fill(1, torch.tensor([2, 3]), NEVER)
    usable = [i for i in range(V) if i not in (2, 3)]
    ids_NK = torch.tensor([usable] * len(teacher_NV))
    logprobs_NK = teacher_NV[:, usable].log_softmax(-1).float()
    losses_N, gradient_NV = forward_kl(logits_NV, ids_NK, logprobs_NK, torch.full((len(ids_NK),), -torch.inf))
    dense_N = (logprobs_NK.exp() * (logprobs_NK - logits_NV[:, usable].log_softmax(-1))).sum(-1)
    torch.testing.assert_close(losses_N, dense_N)
    assert torch.isfinite(gradient_NV).all()
    assert (gradient_NV[:, [2, 3]] == 0).all()


@pytest.mark.parametrize("objective", ["forward_kl", "reverse_kl", "jsd", "renormalized"])
def test_a_position_with_everything_in_the_tail_costs_nothing(objective: str) -> None:
    _, logits_NV = teacher_and_student(6, n=2)
    ids_NK, logprobs_NK = torch.tensor([[0, 0], [4, 5]]), torch.full((2, 2), -torch.inf)
    logprobs_NK[1] = torch.tensor([0.3, 0.2]).log()
    targets = PositionTargets(
        torch.tensor([0, 0]), torch.ones(2), ids_NK, logprobs_NK.double(), torch.tensor([1.0, 0.5]).double().log()
    )
    kd_N, _ = losses_and_gradient(logits_NV, targets, LossMixture(objective))  # type: ignore[arg-type]
    assert kd_N[0].item() == pytest.approx(0.0, abs=1e-12)
    assert logits_NV[0].abs().max() < 1e-12
    assert kd_N[1] > 0.01 and logits_NV[1].abs().max() > 1e-3


def test_cross_entropy_is_the_negative_log_of_the_softmax() -> None:
    _, logits_NV = teacher_and_student(7, n=3)
    gold_N = torch.tensor([0, 5, 22])
    gradient_NV = logits_NV.clone()
    kd_N, ce_N = losses_and_gradient(gradient_NV, PositionTargets(gold_N, torch.tensor([1.0, 2.0, 0.5])), LossMixture())
    assert (kd_N == 0).all()
    for loss, row, gold in zip(ce_N, logits_NV.tolist(), gold_N.tolist(), strict=True):
        assert loss.item() == pytest.approx(-math.log(math.exp(row[gold]) / math.fsum(map(math.exp, row))))
    one_hot_NV = torch.nn.functional.one_hot(gold_N, V)
    torch.testing.assert_close(gradient_NV, torch.tensor([[1.0], [2.0], [0.5]]) * (logits_NV.softmax(-1) - one_hot_NV))


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_tail_samples_add_their_share_of_the_tail(weight: float) -> None:
    teacher_NV, logits_NV = teacher_and_student(8)
    ids_NK, logprobs_NK, tail_N = sparse(teacher_NV, 4)
    order = teacher_NV.argsort(-1, descending=True)
    samples_NS = torch.stack([order[:, 9], order[:, 4], order[:, 9]], 1)
    samples_NS[1, 2] = -1  # one fewer
    samples_NS[2] = -1  # none
    losses_N, gradient_NV = forward_kl(logits_NV, ids_NK, logprobs_NK, tail_N, samples_NS, weight)
    bucket_N, bucket_gradient_NV = forward_kl(logits_NV, ids_NK, logprobs_NK, tail_N)
    oracle_NV = logits_NV.clone().requires_grad_()
    q_NV = oracle_NV.softmax(-1)
    outside_N = 1 - q_NV.gather(1, ids_NK).sum(-1)
    expected = []
    for n in range(len(q_NV)):
        drawn = [int(j) for j in samples_NS[n] if j >= 0]
        terms = [-(q_NV[n, j] / outside_N[n]).log() for j in drawn]
        expected.append(weight * tail_N[n].exp() * sum(terms) / len(terms) if terms else 0.0 * outside_N[n])
    extra_N = torch.stack(expected)
    torch.testing.assert_close(losses_N, bucket_N + extra_N.detach())
    extra_N.sum().backward()
    torch.testing.assert_close(gradient_NV, bucket_gradient_NV + oracle_NV.grad)


@pytest.mark.parametrize("k", [1, 6])
def test_the_expected_gradient_with_tail_samples_is_the_dense_one(k: int) -> None:
    """The expectation is taken exactly: every id outside as the sample, weighted by how likely it is drawn."""
    teacher_NV, logits_NV = teacher_and_student(9)
    ids_NK, logprobs_NK, tail_N = sparse(teacher_NV, k)
    expected_NV = torch.zeros_like(logits_NV)
    for j in range(V):
        sample_N1 = torch.full((len(logits_NV), 1), j)
        _, gradient_NV = forward_kl(logits_NV, ids_NK, logprobs_NK, tail_N, sample_N1, 1.0)
        drawn_N = (teacher_NV[:, j] - tail_N).exp() * (ids_NK != j).all(-1)
        expected_NV += drawn_N[:, None] * gradient_NV
    dense_NV = logits_NV.softmax(-1) - teacher_NV.exp()
    torch.testing.assert_close(expected_NV, dense_NV)
    _, biased_NV = forward_kl(logits_NV, ids_NK, logprobs_NK, tail_N)
    assert (biased_NV - dense_NV).abs().max() > 0.01


def test_weights_are_taken_as_they_are_and_not_divided_by_their_sum() -> None:
    _, logits_NV = teacher_and_student(10, n=2)
    ids_NK, weights_NK = torch.tensor([[3, 8, 0], [5, 0, 0]]), torch.tensor([[0.5, 0.3, 0.0], [0.2, 0.0, 0.0]]).double()
    losses_N, gradient_NV = weighted(logits_NV, ids_NK, weights_NK)
    logq = logits_NV.log_softmax(-1)
    expected = [-0.5 * logq[0, 3] - 0.3 * logq[0, 8], -0.2 * logq[1, 5]]
    torch.testing.assert_close(losses_N, torch.stack(expected), rtol=1e-6, atol=1e-7)
    wanted_NV = torch.tensor([[0.8], [0.2]]) * logq.exp()
    wanted_NV[0, 3] -= 0.5
    wanted_NV[0, 8] -= 0.3
    wanted_NV[1, 5] -= 0.2
    torch.testing.assert_close(gradient_NV, wanted_NV, rtol=1e-6, atol=1e-7)


def test_empty_slots_and_missing_tails_of_drawn_targets_give_finite_gradients() -> None:
    _, logits_NV = teacher_and_student(11, n=1)
    logits_NV = logits_NV.float().index_fill(1, torch.tensor([0]), NEVER)  # id 0 fills empty slots
    loss_N, gradient_NV = weighted(logits_NV, torch.tensor([[4, 0]]), torch.tensor([[0.7, 0.0]]))
    assert torch.isfinite(loss_N).all() and torch.isfinite(gradient_NV).all()
    assert gradient_NV[0, 0] == 0
    everything = torch.arange(V)[None], torch.full((1, V), 1 / V).log()  # no tail, no samples
    no_tail = torch.full((1,), -torch.inf), torch.full((1, 2), -1)
    loss_N, gradient_NV = forward_kl(logits_NV[:, 1:].repeat(1, 2)[:, :V], *everything, *no_tail, 1.0)
    assert torch.isfinite(loss_N).all() and torch.isfinite(gradient_NV).all()
    assert gradient_NV.abs().max() > 0.01
