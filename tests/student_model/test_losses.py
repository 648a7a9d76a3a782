"""Losses against Python loops in float64 and against the analytic gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distill_assets.foundation.language_model import NEVER
from distill_assets.student_model.losses import cross_entropy, forward_kl_tail_bucket, weighted_cross_entropy

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
    losses_N = forward_kl_tail_bucket(logits_NV, ids_NK, logprobs_NK, tail_N)
    for n, loss in enumerate(losses_N.tolist()):
        expected = naive(logits_NV[n].tolist(), ids_NK[n].tolist(), logprobs_NK[n].tolist(), float(tail_N[n]))
        assert loss == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("k", [1, 5, V - 1])
def test_gradient_is_q_minus_p_inside_and_q_times_one_minus_m_over_Q_outside(k: int) -> None:
    teacher_NV, logits_NV = teacher_and_student(1)
    ids_NK, logprobs_NK, tail_N = sparse(teacher_NV, k)
    logits_NV.requires_grad_()
    forward_kl_tail_bucket(logits_NV, ids_NK, logprobs_NK, tail_N).sum().backward()
    q_NV = logits_NV.detach().softmax(-1)
    for n in range(len(q_NV)):
        inside = set(ids_NK[n].tolist())
        rest = sum(float(q_NV[n, j]) for j in range(V) if j not in inside)
        for j in range(V):
            q = float(q_NV[n, j])
            analytic = q - math.exp(teacher_NV[n, j]) if j in inside else q * (1 - math.exp(tail_N[n]) / rest)
            assert float(logits_NV.grad[n, j]) == pytest.approx(analytic, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("k", [1, 5, V])
def test_nothing_to_learn_when_the_student_is_the_stored_target(k: int, dtype: torch.dtype) -> None:
    teacher_NV, _ = teacher_and_student(2)
    ids_NK, logprobs_NK, tail_N = (
        part.to(dtype) if part.is_floating_point() else part for part in sparse(teacher_NV, k)
    )
    logits_NV = (teacher_NV.to(dtype) + 3.0).requires_grad_()
    losses_N = forward_kl_tail_bucket(logits_NV, ids_NK, logprobs_NK, tail_N)
    losses_N.sum().backward()
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert losses_N.abs().max() < tolerance
    assert logits_NV.grad.abs().max() < tolerance


def test_all_ids_kept_is_the_dense_divergence() -> None:
    teacher_NV, logits_NV = teacher_and_student(3)
    dense_N = (teacher_NV.exp() * (teacher_NV - logits_NV.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(forward_kl_tail_bucket(logits_NV, *sparse(teacher_NV, V)), dense_N)


def test_empty_slots_change_neither_value_nor_gradient() -> None:
    teacher_NV, logits_NV = teacher_and_student(4)
    ids_NK, logprobs_NK, tail_N = sparse(teacher_NV, 4)
    some_id_outside = (ids_NK[:, :1] + 1) % V  # an empty slot's id must not be masked out of the tail
    padded_ids = torch.cat([ids_NK, torch.zeros_like(ids_NK), some_id_outside], 1)
    padded_logprobs = torch.cat([logprobs_NK, torch.full((len(ids_NK), 5), -torch.inf)], 1)
    plain, padded = logits_NV.clone().requires_grad_(), logits_NV.clone().requires_grad_()
    losses_N = forward_kl_tail_bucket(padded, padded_ids, padded_logprobs, tail_N)
    losses_N.sum().backward()
    expected_N = forward_kl_tail_bucket(plain, ids_NK, logprobs_NK, tail_N)
    expected_N.sum().backward()
    torch.testing.assert_close(losses_N, expected_N)
    torch.testing.assert_close(padded.grad, plain.grad)


@pytest.mark.parametrize("mass", [1e-12, 1e-6, 0.5])
def test_a_small_tail_keeps_its_digits_in_float32(mass: float) -> None:
    ids_NK = torch.tensor([[0, 1]])
    logprobs_NK = torch.tensor([[0.75 * (1 - mass), 0.25 * (1 - mass)]], dtype=torch.float64).log()
    tail_N = torch.tensor([mass], dtype=torch.float64).log()
    logits_NV = torch.tensor([[20.0, 19.0, -9.0, -10.0, -11.0]])  # the student's own tail is about 3e-13
    loss_N = forward_kl_tail_bucket(logits_NV.requires_grad_(), ids_NK, logprobs_NK.float(), tail_N.float())
    loss_N.sum().backward()
    expected = naive(logits_NV[0].tolist(), [0, 1], logprobs_NK[0].tolist(), float(tail_N))
    assert loss_N.item() == pytest.approx(expected, rel=1e-5, abs=4e-6)  # one ulp of a logit of 20 is 2e-6
    q = logits_NV.detach().double().softmax(-1)[0]
    outside = float(q[2] * (1 - mass / q[2:].sum()))
    assert float(logits_NV.grad[0, 2]) == pytest.approx(outside, rel=1e-4)


def test_no_tail_and_ids_without_a_token_give_finite_gradients() -> None:
    teacher_NV, logits_NV = teacher_and_student(5)
    logits_NV = logits_NV.float().index_fill(1, torch.tensor([2, 3]), NEVER).requires_grad_()
    usable = [i for i in range(V) if i not in (2, 3)]
    ids_NK = torch.tensor([usable] * len(teacher_NV))
    logprobs_NK = teacher_NV[:, usable].log_softmax(-1).float()
    losses_N = forward_kl_tail_bucket(logits_NV, ids_NK, logprobs_NK, torch.full((len(ids_NK),), -torch.inf))
    losses_N.sum().backward()
    dense_N = (logprobs_NK.exp() * (logprobs_NK - logits_NV[:, usable].log_softmax(-1))).sum(-1)
    torch.testing.assert_close(losses_N, dense_N)
    assert torch.isfinite(logits_NV.grad).all()
    assert (logits_NV.grad[:, [2, 3]] == 0).all()


def test_a_position_with_everything_in_the_tail_costs_nothing() -> None:
    _, logits_NV = teacher_and_student(6, n=1)
    logits_NV.requires_grad_()
    loss_N = forward_kl_tail_bucket(logits_NV, torch.tensor([[0, 0]]), torch.full((1, 2), -torch.inf), torch.zeros(1))
    loss_N.sum().backward()
    assert loss_N.item() == pytest.approx(0.0, abs=1e-12)
    assert logits_NV.grad.abs().max() < 1e-12


def test_cross_entropy_is_the_negative_log_of_the_softmax() -> None:
    _, logits_NV = teacher_and_student(7, n=3)
    for loss, row, gold in zip(
        cross_entropy(logits_NV, torch.tensor([0, 5, 22])), logits_NV.tolist(), [0, 5, 22], strict=True
    ):
        assert loss.item() == pytest.approx(-math.log(math.exp(row[gold]) / math.fsum(map(math.exp, row))))


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_tail_samples_add_their_share_of_the_tail(weight: float) -> None:
    teacher_NV, logits_NV = teacher_and_student(8)
    ids_NK, logprobs_NK, tail_N = sparse(teacher_NV, 4)
    order = teacher_NV.argsort(-1, descending=True)
    samples_NS = torch.stack([order[:, 9], order[:, 4], order[:, 9]], 1)
    samples_NS[1, 2] = -1  # one fewer
    samples_NS[2] = -1  # none
    logits_NV.requires_grad_()
    losses_N = forward_kl_tail_bucket(logits_NV, ids_NK, logprobs_NK, tail_N, samples_NS, weight)
    losses_N.sum().backward()
    ours = logits_NV.grad.clone()
    oracle_NV = logits_NV.detach().clone().requires_grad_()
    q_NV = oracle_NV.softmax(-1)
    outside_N = 1 - q_NV.gather(1, ids_NK).sum(-1)
    bucket_N = forward_kl_tail_bucket(oracle_NV, ids_NK, logprobs_NK, tail_N)
    expected = []
    for n in range(len(q_NV)):
        drawn = [int(j) for j in samples_NS[n] if j >= 0]
        terms = [-(q_NV[n, j] / outside_N[n]).log() for j in drawn]
        expected.append(bucket_N[n] + (weight * tail_N[n].exp() * sum(terms) / len(terms) if terms else 0.0))
    torch.testing.assert_close(losses_N, torch.stack(expected))
    torch.stack(expected).sum().backward()
    torch.testing.assert_close(ours, oracle_NV.grad)


@pytest.mark.parametrize("k", [1, 6])
def test_the_expected_gradient_with_tail_samples_is_the_dense_one(k: int) -> None:
    """The expectation is taken exactly: every id outside as the sample, weighted by how likely it is drawn."""
    teacher_NV, logits_NV = teacher_and_student(9)
    ids_NK, logprobs_NK, tail_N = sparse(teacher_NV, k)
    expected_NV = torch.zeros_like(logits_NV)
    for j in range(V):
        student = logits_NV.clone().requires_grad_()
        sample_N1 = torch.full((len(logits_NV), 1), j)
        forward_kl_tail_bucket(student, ids_NK, logprobs_NK, tail_N, sample_N1, 1.0).sum().backward()
        drawn_N = (teacher_NV[:, j] - tail_N).exp() * (ids_NK != j).all(-1)
        expected_NV += drawn_N[:, None] * student.grad
    dense_NV = logits_NV.softmax(-1) - teacher_NV.exp()
    torch.testing.assert_close(expected_NV, dense_NV)
    biased = logits_NV.clone().requires_grad_()
    forward_kl_tail_bucket(biased, ids_NK, logprobs_NK, tail_N).sum().backward()
    assert (biased.grad - dense_NV).abs().max() > 0.01


def test_weights_are_taken_as_they_are_and_not_divided_by_their_sum() -> None:
    _, logits_NV = teacher_and_student(10, n=2)
    ids_NK, weights_NK = torch.tensor([[3, 8, 0], [5, 0, 0]]), torch.tensor([[0.5, 0.3, 0.0], [0.2, 0.0, 0.0]]).double()
    logits_NV.requires_grad_()
    losses_N = weighted_cross_entropy(logits_NV, ids_NK, weights_NK)
    logq = logits_NV.detach().log_softmax(-1)
    expected = [-0.5 * logq[0, 3] - 0.3 * logq[0, 8], -0.2 * logq[1, 5]]
    torch.testing.assert_close(losses_N.detach(), torch.stack(expected), rtol=1e-6, atol=1e-7)
    losses_N.sum().backward()
    wanted_NV = torch.tensor([[0.8], [0.2]]) * logq.exp()
    wanted_NV[0, 3] -= 0.5
    wanted_NV[0, 8] -= 0.3
    wanted_NV[1, 5] -= 0.2
    torch.testing.assert_close(logits_NV.grad, wanted_NV, rtol=1e-6, atol=1e-7)


def test_empty_slots_and_missing_tails_of_drawn_targets_give_finite_gradients() -> None:
    _, logits_NV = teacher_and_student(11, n=1)
    logits_NV = logits_NV.float().index_fill(1, torch.tensor([0]), NEVER).requires_grad_()  # id 0 fills empty slots
    loss_N = weighted_cross_entropy(logits_NV, torch.tensor([[4, 0]]), torch.tensor([[0.7, 0.0]]))
    ids_NK = torch.arange(V)[None]  # everything kept: no tail, no samples
    logprobs_NK = torch.full((1, V), 1 / V).log()
    no_tail = torch.full((1,), -torch.inf), torch.full((1, 2), -1)
    loss_N = loss_N + forward_kl_tail_bucket(logits_NV[:, 1:].repeat(1, 2)[:, :V], ids_NK, logprobs_NK, *no_tail, 1.0)
    loss_N.sum().backward()
    assert torch.isfinite(loss_N).all() and torch.isfinite(logits_NV.grad).all()
    assert logits_NV.grad[0, 0] == 0
