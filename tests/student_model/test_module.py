"""The module against a dense oracle: alignment, chunks, weights, shares of a step, memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from distill_assets.foundation.errors import ModelError
from distill_assets.foundation.language_model import PlainHead
from distill_assets.foundation.settings import Precision
from distill_assets.student_model.batches import IGNORED, collate
from distill_assets.student_model.losses import LossMixture, PositionTargets
from distill_assets.student_model.module import DistillationModule, mean_losses
from distill_assets.student_model.passes import Passes
from distill_assets.student_model.vocabulary import StudentVocabulary
from distill_assets.teacher_capture.sparse_targets import CapturedRow
from tests.devices import DEVICES
from tests.foundation.test_language_model import SHAPE, random_model
from tests.student_model.dense import dense_head_loss, random_targets
from tests.student_model.rows import captured_rows
from tests.student_model.test_fused_head import Operations


@pytest.fixture
def student(teacher_model: PreTrainedModel) -> PreTrainedModel:
    """The teacher with disturbed weights, so that there is something to learn."""
    student = copy.deepcopy(teacher_model)
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return student


@pytest.fixture
def vocabulary(tokenizer: PreTrainedTokenizerFast) -> StudentVocabulary:
    return StudentVocabulary(len(tokenizer))


def dense_loss(model: PreTrainedModel, rows: Sequence[CapturedRow], kd_weight: float) -> Tensor:
    """Sum over all positions, one at a time, from the model's own forward."""
    total = torch.zeros(())
    for row in rows:
        logq_TV = model(torch.from_numpy(row.input_ids.astype(np.int64))[None]).logits[0].log_softmax(-1)
        targets = row.targets.normalized()
        for p, t in enumerate(targets.positions_P):
            part = slice(targets.offsets_P1[p], targets.offsets_P1[p + 1])
            ids = torch.from_numpy(targets.support_ids_N[part].astype(np.int64))
            logp, tail = torch.from_numpy(targets.support_logprobs_N[part]), float(targets.tail_logprob_P[p])
            outside = torch.tensor([i for i in range(logq_TV.shape[1]) if i not in ids.tolist()])
            kd = (logp.exp() * (logp - logq_TV[t, ids])).sum()
            kd = kd + np.exp(tail) * (tail - logq_TV[t, outside].logsumexp(0))
            total = total + row.weight * (kd_weight * kd - (1 - kd_weight) * logq_TV[t, int(row.input_ids[t + 1])])
    return total


def gradients(model: PreTrainedModel) -> list[Tensor]:
    return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


def positions(rows: Sequence[CapturedRow]) -> int:
    return sum(row.targets.n_positions for row in rows)


@pytest.mark.parametrize("kd_weight", [1.0, 0.7])
def test_chunked_loss_and_gradient_equal_the_dense_ones(
    student: PreTrainedModel, vocabulary: StudentVocabulary, rows: list[CapturedRow], kd_weight: float
) -> None:
    rows = [replace(row, weight=0.5 + i % 3) for i, row in enumerate(rows)]
    loss = DistillationModule(student, vocabulary, LossMixture(kd_weight=kd_weight))(
        **collate(rows, with_targets=True)
    )["loss"]
    loss.backward()
    ours = gradients(student)
    student.zero_grad()
    expected = dense_loss(student, rows, kd_weight) / positions(rows)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for mine, dense in zip(ours, gradients(student), strict=True):
        torch.testing.assert_close(mine, dense, rtol=1e-3, atol=1e-6)


def test_the_teacher_as_its_own_student_has_nothing_to_learn_unless_rows_are_shifted(
    teacher_model: PreTrainedModel, vocabulary: StudentVocabulary, rows: list[CapturedRow]
) -> None:
    module = DistillationModule(teacher_model, vocabulary, LossMixture(kd_weight=1.0))

    def shifted(by: int) -> float:
        moved = []
        for row in rows:
            targets = row.targets
            inside = slice(1, -1)  # the first and last position have no neighbour to take
            kept = replace(
                targets,
                positions_P=targets.positions_P[inside],
                offsets_P1=np.arange(0, 8 * (targets.n_positions - 1), 8),
                support_ids_N=targets.support_ids_N[8 * (1 + by) : 8 * (targets.n_positions - 1 + by)],
                support_logprobs_N=targets.support_logprobs_N[8 * (1 + by) : 8 * (targets.n_positions - 1 + by)],
                tail_logprob_P=targets.tail_logprob_P[1 + by : targets.n_positions - 1 + by],
            )
            moved.append(replace(row, targets=kept))
        return float(module(**collate(moved, with_targets=True))["kd"])

    assert abs(shifted(0)) < 1e-5
    assert shifted(1) > 0.1
    assert shifted(-1) > 0.1


def test_the_cross_entropy_is_that_of_the_captured_gold_token(
    teacher_model: PreTrainedModel, vocabulary: StudentVocabulary, rows: list[CapturedRow]
) -> None:
    ce = DistillationModule(teacher_model, vocabulary, LossMixture(kd_weight=0.0))(**collate(rows, with_targets=False))[
        "ce"
    ]
    gold = np.concatenate([row.targets.gold_logprob_P for row in rows])
    assert float(ce) == pytest.approx(-gold.mean(dtype=np.float64), rel=1e-5)


def test_shares_of_a_step_add_up_to_the_step(
    student: PreTrainedModel, vocabulary: StudentVocabulary, rows: list[CapturedRow]
) -> None:
    module = DistillationModule(student, vocabulary, LossMixture(kd_weight=0.9))
    whole = module(**collate(rows, with_targets=True))["loss"]
    whole.backward()
    expected = gradients(student)
    student.zero_grad()
    total = 0.0
    for share in (rows[0::3], rows[1::3], rows[2::3], []):
        loss = module(**collate(share, with_targets=True), num_items_in_batch=positions(rows))["loss"]
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole.item(), rel=1e-5)
    for mine, dense in zip(gradients(student), expected, strict=True):
        torch.testing.assert_close(mine, dense, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_have_the_loss_and_gradients_of_padded_ones(
    student: PreTrainedModel, vocabulary: StudentVocabulary, rows: list[CapturedRow], attention: str
) -> None:
    student.double().set_attn_implementation(attention)
    module = DistillationModule(student, vocabulary, LossMixture(kd_weight=0.9))
    results = []
    for packed in (False, True):
        loss = module(**collate(rows, with_targets=True, packed=packed))["loss"]
        loss.backward()
        results.append([loss.detach(), *gradients(student)])
        student.zero_grad()
    for padded, packed_ in zip(*results, strict=True):
        torch.testing.assert_close(packed_, padded, rtol=1e-9, atol=1e-12)
    as_one = collate(rows, with_targets=True, packed=True)
    as_one["positions_BT"] = torch.arange(as_one["positions_BT"].shape[1])[None]
    assert abs(float(module(**as_one)["loss"]) - float(results[0][0])) > 1e-3


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_is_near_float64_and_leaves_weights_and_gradients_in_float32(
    vocabulary: StudentVocabulary, rows: list[CapturedRow], device: str
) -> None:
    """Within 0.1% of the loss, and 4% (L2 over a tensor) of each gradient, of weights that are not as wide as ours."""
    torch.manual_seed(0)
    student = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "vocab_size": vocabulary.n_real, "initializer_range": 0.1}))
    exact = copy.deepcopy(student).double()
    expected = DistillationModule(exact, vocabulary, LossMixture(kd_weight=0.9))(**collate(rows, True))["loss"]
    expected.backward()
    dtypes = set()
    layer = student.get_decoder().layers[0].mlp.down_proj
    layer.register_forward_hook(lambda module, given, made: dtypes.add(made.dtype))
    module = DistillationModule(student, vocabulary, LossMixture(kd_weight=0.9), "bfloat16").to(device)
    batch = {name: tensor.to(device) for name, tensor in collate(rows, True).items()}
    loss = module(**batch)["loss"]
    loss.backward()
    assert dtypes == {torch.bfloat16} and loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(expected), rel=1e-3)
    for name, weight in student.named_parameters():
        assert weight.dtype == weight.grad.dtype == torch.float32
        oracle = exact.get_parameter(name).grad
        assert (weight.grad.cpu() - oracle).norm() < 4e-2 * oracle.norm(), name


def kept_bytes(module: DistillationModule, batch: dict[str, Tensor]) -> tuple[int, Tensor]:
    """What a forward pass keeps for the backward pass beside weights, and its loss."""
    own = {weight.untyped_storage().data_ptr() for weight in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = module(**batch)["loss"]
        total = sum(kept.values())  # while they are there, so that no two have one address
        loss.backward()
    return total, loss.detach()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_recomputed_layers_give_the_same_gradients_and_are_not_kept(
    student: PreTrainedModel, vocabulary: StudentVocabulary, rows: list[CapturedRow], precision: Precision
) -> None:
    for layer in student.get_decoder().layers:
        layer.self_attn.attention_dropout = 0.3
    module = DistillationModule(student, vocabulary, LossMixture(kd_weight=0.9), precision).train()
    results = []
    for recompute in (False, True):
        Passes(student, recompute=recompute)
        torch.manual_seed(0)
        kept, loss = kept_bytes(module, collate(rows, with_targets=True))
        results.append((kept, [loss, *gradients(student)]))
        student.zero_grad()
    (kept, plain), (fewer, recomputed) = results
    assert fewer < 0.3 * kept
    for ours, expected in zip(recomputed, plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)


def test_padding_rows_of_the_head_and_unused_ids_take_no_part(
    student: PreTrainedModel, rows: list[CapturedRow], tokenizer: PreTrainedTokenizerFast
) -> None:
    unused = 7
    vocabulary = StudentVocabulary(len(tokenizer), unused=(unused,))
    wide = copy.deepcopy(student)
    wide.resize_token_embeddings(len(tokenizer) + 64, mean_resizing=False)
    with torch.no_grad():
        wide.get_input_embeddings().weight[len(tokenizer) :] = 3.0  # tied: logits that would take mass
    batch = collate(rows, with_targets=True)
    batch["support_ids_NK"] = batch["support_ids_NK"].where(batch["support_ids_NK"] != unused, 8)
    narrow_loss = DistillationModule(student, vocabulary, LossMixture(kd_weight=0.9))(**batch)["loss"]
    wide_module = DistillationModule(wide, vocabulary, LossMixture(kd_weight=0.9))
    wide_loss = wide_module(**batch)["loss"]
    torch.testing.assert_close(wide_loss, narrow_loss)
    wide_loss.backward()
    assert (wide.get_input_embeddings().weight.grad[len(tokenizer) :] == 0).all()


def test_mean_losses_are_means_over_positions_whatever_the_batches(
    student: PreTrainedModel, vocabulary: StudentVocabulary, rows: list[CapturedRow]
) -> None:
    module = DistillationModule(student, vocabulary, LossMixture(kd_weight=0.9)).train()
    whole = module(**collate(rows, with_targets=True))
    kd, ce = mean_losses(module, (collate(part, with_targets=True) for part in (rows[:1], rows[1:])))
    assert (kd, ce) == (pytest.approx(float(whole["kd"]), rel=1e-5), pytest.approx(float(whole["ce"]), rel=1e-5))
    assert module.training


def test_labels_count_supervised_positions(rows: list[CapturedRow]) -> None:
    labels = collate(rows, with_targets=True)["labels"]
    assert int((labels != IGNORED).sum()) == positions(rows)


def test_rows_of_several_lengths_do_not_see_their_padding(
    student: PreTrainedModel,
    vocabulary: StudentVocabulary,
    teacher_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows = captured_rows(teacher_model, tokenizer, 2, start=50)
    short = replace(
        rows[0],
        input_ids=rows[0].input_ids[: rows[0].targets.positions_P[1] + 1],
        targets=replace(
            rows[0].targets,
            positions_P=rows[0].targets.positions_P[:1],
            offsets_P1=rows[0].targets.offsets_P1[:2],
            support_ids_N=rows[0].targets.support_ids_N[:8],
            support_logprobs_N=rows[0].targets.support_logprobs_N[:8],
            tail_logprob_P=rows[0].targets.tail_logprob_P[:1],
        ),
    )
    module = DistillationModule(student, vocabulary, LossMixture(kd_weight=0.9))
    alone = module(**collate([short], with_targets=True), num_items_in_batch=1)["loss"]
    other = module(**collate([rows[1]], with_targets=True), num_items_in_batch=1)["loss"]
    together = module(**collate([short, rows[1]], with_targets=True), num_items_in_batch=1)["loss"]
    torch.testing.assert_close(together, alone + other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("drawn", ["weights", "tail samples"])
def test_chunked_losses_of_drawn_targets_equal_the_dense_ones(
    student: PreTrainedModel, vocabulary: StudentVocabulary, rows: list[CapturedRow], drawn: str
) -> None:
    rng = np.random.default_rng(0)
    drawn_rows = []
    for i, row in enumerate(rows):
        n = row.targets.n_positions
        columns: dict[str, Any] = {"weights_N": rng.random(8 * n, dtype=np.float32)}
        if drawn == "tail samples":
            outside = [np.setdiff1d(np.arange(300), row.targets.support_ids_N[8 * p : 8 * p + 8]) for p in range(n)]
            columns = {"tail_sample_ids_PS": np.stack([rng.choice(ids, 2) for ids in outside]).astype(np.int32)}
        drawn_rows.append(replace(row, weight=0.5 + i % 3, targets=replace(row.targets, **columns)))
    module = DistillationModule(student, vocabulary, LossMixture(kd_weight=0.7, tail_sample_weight=0.4))
    loss = module(**collate(drawn_rows, with_targets=True))["loss"]
    loss.backward()
    ours = gradients(student)
    student.zero_grad()
    total = torch.zeros(())
    for row in drawn_rows:
        logq_TV = student(torch.from_numpy(row.input_ids.astype(np.int64))[None]).logits[0].log_softmax(-1)
        ids_PK = torch.from_numpy(row.targets.support_ids_N.astype(np.int64)).view(-1, 8)
        logq_PV = logq_TV[torch.from_numpy(row.targets.positions_P.astype(np.int64))]
        if row.targets.weights_N is not None:
            kd = -(torch.from_numpy(row.targets.weights_N).view(-1, 8) * logq_PV.gather(1, ids_PK)).sum()
            ce = -logq_PV.gather(
                1, torch.from_numpy(row.input_ids[row.targets.positions_P + 1].astype(np.int64))[:, None]
            )
            total = total + row.weight * (0.7 * kd + 0.3 * ce.sum())
        else:
            samples_PS = torch.from_numpy(np.array(row.targets.tail_sample_ids_PS, dtype=np.int64))
            log_rest_P = logq_PV.scatter(1, ids_PK, -torch.inf).logsumexp(-1)
            terms_P = log_rest_P - logq_PV.gather(1, samples_PS).mean(-1)
            tail_P = torch.from_numpy(row.targets.normalized().tail_logprob_P).exp()
            total = total + row.weight * 0.7 * 0.4 * (tail_P * terms_P).sum()
    if drawn == "tail samples":
        total = total + dense_loss(student, drawn_rows, 0.7)
    expected = total / positions(drawn_rows)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for mine, dense in zip(ours, gradients(student), strict=True):
        torch.testing.assert_close(mine, dense, rtol=1e-3, atol=1e-6)


def random_batch(vocabulary: int, rows: int = 3) -> tuple[dict[str, Tensor], PositionTargets]:
    """A batch for any model of that vocabulary, every position supervised, and what its positions are to learn."""
    generator = torch.Generator().manual_seed(4)
    ids_BT = torch.randint(vocabulary, (rows, 12), generator=generator)
    labels_BT = torch.cat([ids_BT[:, 1:], torch.full((rows, 1), IGNORED)], 1)
    teacher_NV = (2.0 * torch.randn(11 * rows, vocabulary, generator=generator)).log_softmax(-1)
    targets = replace(random_targets("top_k", teacher_NV, 5, seed=5), gold_N=labels_BT[labels_BT != IGNORED])
    batch = {"ids_BT": ids_BT, "labels": labels_BT, "weight_N": targets.weight_N}
    sparse = {"support_ids_NK": targets.ids_NK, "support_logprobs_NK": targets.logprobs_NK}
    return {**batch, **sparse, "tail_logprob_N": targets.tail_logprob_N}, targets  # type: ignore[dict-item]


def loss_of_own_logits(model: PreTrainedModel, batch: dict[str, Tensor], targets: PositionTargets) -> Tensor:
    """From the model's own forward, its logits taken for hidden states of a head that does nothing."""
    logits_NV = model(input_ids=batch["ids_BT"]).logits[batch["labels"] != IGNORED]
    head = PlainHead(torch.eye(logits_NV.shape[1]), None)
    total = dense_head_loss(logits_NV, head, logits_NV.shape[1], torch.tensor([], dtype=torch.int64), targets, MIXTURE)
    return total / len(logits_NV)


MIXTURE = LossMixture(kd_weight=0.8)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["gemma2", "granite", "cohere"])
def test_scaled_and_capped_logits_are_learnt_as_the_model_makes_them(kind: str, tied: bool) -> None:
    model = random_model(kind)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    batch, targets = random_batch(96)
    loss = DistillationModule(model, StudentVocabulary(96), MIXTURE)(**batch)["loss"]
    loss.backward()
    ours = gradients(model)
    model.zero_grad()
    expected = loss_of_own_logits(model, batch, targets)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    dense = gradients(model)
    assert len(ours) == len(dense) == len(list(model.parameters()))
    for mine, other in zip(ours, dense, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-6)


def test_a_step_holds_no_logits_of_all_positions(student: PreTrainedModel, vocabulary: StudentVocabulary) -> None:
    batch, targets = random_batch(vocabulary.n_real, rows=100)
    module = DistillationModule(student, vocabulary, MIXTURE).train()
    with Operations() as seen:
        module(**batch)["loss"].backward()
    assert 0 < seen.largest <= len(targets.gold_N) * vocabulary.n_real // 2


def test_a_head_that_is_not_one_matrix_is_refused(student: PreTrainedModel, vocabulary: StudentVocabulary) -> None:
    student.set_output_embeddings(torch.nn.Sequential(student.get_output_embeddings()))
    with pytest.raises(ModelError, match="the head of this LlamaForCausalLM is a Sequential, not one matrix in memory"):
        DistillationModule(student, vocabulary, MIXTURE)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_whole_gradients_are_reduced_over_processes(student: PreTrainedModel, vocabulary: StudentVocabulary) -> None:
    """What reduction is given must be all of it: head and input embeddings are one parameter with gradients from two
    places. Tripling stands for adding up what other processes have."""
    batch, _ = random_batch(vocabulary.n_real)
    module = DistillationModule(student, vocabulary, MIXTURE)
    module(**batch)["loss"].backward()
    alone = gradients(student)
    student.zero_grad()

    def triple(_, bucket):  # type: ignore[no-untyped-def]  # torch refuses an annotation that is text
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(3.0 * bucket.buffer())
        return future

    wrapped = torch.nn.parallel.DistributedDataParallel(module)
    wrapped.register_comm_hook(None, triple)
    wrapped(**batch)["loss"].backward()
    for ours, expected in zip(gradients(student), alone, strict=True):
        torch.testing.assert_close(ours, 3.0 * expected, rtol=1e-5, atol=1e-7)
