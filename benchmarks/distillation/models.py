"""Tokenizer, teacher and rows, made once; and the loop that teacher and students are trained by.

Legend: B = rows, T = tokens, N = positions, V = vocabulary ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from workload import Row

from distill_assets.foundation.files import replacing, replacing_folder
from distill_assets.student_model.batches import IGNORED, plan_batches
from distill_assets.student_model.losses import LossMixture
from distill_assets.student_model.module import DistillationModule
from distill_assets.student_model.training import learning_rate_share
from distill_assets.student_model.vocabulary import StudentVocabulary

from .setting import Setting
from .text import documents

_WARMUP = 0.05  # of the steps
_MAX_NORM = 1.0  # of a gradient
_CHECKPOINT_STEPS = 20
_CHARS_A_TOKEN = 4.5  # at most, of text as a tokenizer of 2,048 ids cuts it
Batch = dict[str, Tensor]


def prepare_rows(setting: Setting, folder: Path) -> None:
    """Train the tokenizer, cut all text into rows: `rows/{train,heldout}.npz` and `rows/tokenizer`."""
    if (folder / "rows").is_dir():
        return
    chars = [int(_CHARS_A_TOKEN * tokens) for tokens in (setting.teacher_tokens, setting.heldout_tokens)]
    train, heldout = documents(*chars)
    tokenizer = _train_tokenizer(train, setting.vocabulary)
    with replacing_folder(folder / "rows") as beside:
        tokenizer.save_pretrained(beside / "tokenizer")
        for name, texts, tokens in (
            ("train", train, setting.teacher_tokens),
            ("heldout", heldout, setting.heldout_tokens),
        ):
            rows = _rows(tokenizer, texts, setting.row_tokens, tokens)
            np.savez(beside / f"{name}.npz", ids=np.concatenate(rows), lengths=[len(row) for row in rows])


def stored_rows(folder: Path, name: str, most_tokens: int | None = None) -> list[np.ndarray]:
    """Ids of the rows, the first ones up to so many tokens."""
    with np.load(folder / "rows" / f"{name}.npz") as stored:
        ends = stored["lengths"].cumsum()
        rows = np.split(stored["ids"], ends[:-1])
    return rows if most_tokens is None else rows[: int((ends <= most_tokens).sum())]


def as_shard_rows(rows: Iterable[np.ndarray]) -> list[Row]:
    """Rows whose tokens are all targets but the first."""
    return [Row(row.tolist()) for row in rows]


def _train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with an end of text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>", pad_token="<|eos|>")


def _rows(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], longest: int, tokens: int) -> list[np.ndarray]:
    """Whole rows of the texts, in order, up to `tokens`."""
    rows: list[np.ndarray] = []
    total = 0
    for text in texts:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        for start in range(0, len(ids) - 1, longest):
            row = ids[start : start + longest]
            total += len(row)
            if total > tokens:
                return rows
            rows.append(np.array(row, dtype=np.int32))
    raise SystemExit(f"the text has only {total:,} tokens of {tokens:,}")


def llama(setting: Setting, width: int, layers: int, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights, head and embeddings tied."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=setting.vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(2, width // 32),
        num_key_value_heads=max(2, width // 32),
        max_position_embeddings=2048,  # as many as a home allows a row
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def distillation_module(model: LlamaForCausalLM, setting: Setting, mixture: LossMixture) -> DistillationModule:
    return DistillationModule(model, StudentVocabulary(setting.vocabulary), mixture)


def fit(
    module: DistillationModule,
    batches: Sequence[Callable[[], Batch]],
    learning_rate: float,
    after: Callable[[int], None] = lambda step: None,
    checkpoint: Path | None = None,
) -> None:
    """One optimiser step a batch, as a student of the product is trained; `after` hears of every step, from 1.

    With a `checkpoint`, a training that was killed goes on from the last one.
    """
    module.train()
    parameters = list(module.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    warmup, first = math.ceil(_WARMUP * len(batches)), 0
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    for step in range(first, len(batches)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * learning_rate_share(step, len(batches), warmup)
        loss = module(**batches[step]())["loss"]
        if not torch.isfinite(loss):
            raise SystemExit(f"the loss of step {step + 1} is {loss.item()}; lower the learning rate")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, _MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        after(step + 1)
        if checkpoint is not None and (step + 1) % _CHECKPOINT_STEPS == 0:
            with replacing(checkpoint) as beside:
                state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                torch.save(state, beside)


def hard_batch(rows: Sequence[np.ndarray]) -> Batch:
    """A batch without targets, for rows of which every token is learnt."""
    ids_BT = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.int64)
    labels_BT = torch.full_like(ids_BT, IGNORED)
    for b, row in enumerate(rows):
        ids_BT[b, : len(row)] = torch.from_numpy(row)
        labels_BT[b, : len(row) - 1] = torch.from_numpy(row[1:])
    return {"ids_BT": ids_BT, "labels": labels_BT, "weight_N": torch.ones(sum(len(row) - 1 for row in rows))}


def prepare_teacher(setting: Setting, folder: Path, say: Callable[[str], None]) -> Path:
    """The teacher's folder, trained once over all training rows by cross-entropy."""
    teacher = folder / "teacher"
    if teacher.is_dir():
        return teacher
    rows = stored_rows(folder, "train")
    plan = plan_batches([len(row) for row in rows], setting.teacher_batch_tokens, epochs=1, seed=0)
    module = distillation_module(
        llama(setting, setting.teacher_width, setting.teacher_layers, 0), setting, LossMixture()
    )
    batches = [lambda batch=batch: hard_batch([rows[i] for i in batch]) for batch in plan]

    def after(step: int) -> None:
        if step % 20 == 0:
            say(f"teacher, step {step} of {len(plan)}")

    checkpoint = folder / "teacher.checkpoint"
    fit(module, batches, setting.teacher_learning_rate, after, checkpoint)
    with replacing_folder(teacher) as beside:
        module.model.save_pretrained(beside)
        PreTrainedTokenizerFast.from_pretrained(folder / "rows" / "tokenizer").save_pretrained(beside)
    checkpoint.unlink(missing_ok=True)
    return teacher
