"""Pairs of each verdict through the whole pipeline: what is masked stays masked, what must stop stops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from distill_assets.definitions import defs
from distill_assets.foundation.errors import IncompatibleTokenizers, TrainingError
from distill_assets.foundation.home import Home
from distill_assets.orchestration.bring_up_to_date import bring_up_to_date
from distill_assets.orchestration.instance import environment
from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.orchestration.students import StudentSide
from distill_assets.student_model.batches import collate
from distill_assets.student_model.losses import LossMixture
from distill_assets.student_model.module import DistillationModule
from distill_assets.student_model.vocabulary import fit_rows
from distill_assets.teacher_capture.sparse_targets import CapturedRow
from distill_assets.teacher_capture.store import read_rows
from tests import tiny
from tests.bench import edit

N = 320


def home_of(root: Path, teacher: Path, student: Path, **tokenizer: Any) -> Path:
    return tiny.make_home(
        root, teacher, shards=1, rows=4, student={"model": str(student)}, control=False,
        targets={"precision": "exact"}, tokenizer=tokenizer,
    )  # fmt: skip


def capture_and_train(root: Path) -> Path:
    """The check, every capture, the catalog and the student, as the assets do them; the student's folder."""
    pipeline = Pipeline(Home(root))
    pipeline.check_tokenizers()
    for key in pipeline.shards:
        pipeline.capture(key, device="cpu", batch_tokens=None, force=False)
    pipeline.refresh_catalog()
    students = StudentSide(Pipeline(Home(root)))
    students.train("student", device="cpu", force=False)
    return students.folder("student")


def captured(root: Path) -> list[CapturedRow]:
    return [row for entry in Pipeline(Home(root)).entries for row in read_rows(entry.capture.path)]


def head(folder: Path) -> torch.Tensor:
    return load_file(folder / "model.safetensors")["lm_head.weight"]


def head_gradient(root: Path, student: Path, rows: list[CapturedRow]) -> torch.Tensor:
    """Gradient of the training loss of `rows` on every row of the student's head."""
    vocabulary = StudentSide(Pipeline(Home(root))).vocabulary
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    module = DistillationModule(model, vocabulary, LossMixture(kd_weight=0.9, tail_sample_weight=0.5))
    batch = collate(fit_rows(rows, vocabulary, len(head(student)))[0], True)
    module(**batch, num_items_in_batch=sum(row.targets.n_positions for row in rows))["loss"].backward()
    gradient = model.get_output_embeddings().weight.grad
    assert gradient is not None
    return gradient


def test_a_padded_pair(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    teacher = tiny.save_model(tmp_path / "teacher", tokenizer, pad_head=64, tie_word_embeddings=False)
    student = tiny.save_model(tmp_path / "student", tokenizer, pad_head=24, seed=1, tie_word_embeddings=False)
    weights = load_file(teacher / "model.safetensors")
    weights["lm_head.weight"][N:] *= 30  # unmasked, padding would have nearly all of the mass
    save_file(weights, teacher / "model.safetensors", {"format": "pt"})
    root = home_of(tmp_path / "home", teacher, student)
    folder = capture_and_train(root)
    assert json.loads((root / "tokenizer_report.json").read_text())["verdict"] == "padded"

    rows = captured(root)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    for row in rows:
        targets = row.targets
        assert int(targets.support_ids_N.max()) < N
        with torch.no_grad():
            logits_TW = model(torch.from_numpy(row.input_ids.astype(np.int64))[None]).logits[0]
        assert logits_TW.softmax(-1)[:, N:].sum(-1).mean() > 0.5
        real_PV = logits_TW[targets.positions_P.tolist(), :N].log_softmax(-1)
        np.testing.assert_allclose(
            targets.support_logprobs_N[targets.offsets_P1[:-1]], real_PV.max(-1).values.numpy(), atol=1e-3
        )

    gradient = head_gradient(root, student, rows)
    assert gradient.shape[0] == N + 24 and torch.count_nonzero(gradient[N:]) == 0
    assert torch.count_nonzero(gradient[:N]) > 0
    trained = head(folder)
    assert torch.equal(trained[N:], head(student)[N:]) and not torch.equal(trained[:N], head(student)[:N])


def test_a_subset_pair(tmp_path: Path, teacher_folder: Path) -> None:
    n = 300
    smaller = tiny.train_tokenizer(vocab_size=n)
    student = tiny.save_model(tmp_path / "student", smaller, pad_head=40, seed=1, tie_word_embeddings=False)
    root = home_of(tmp_path / "home", teacher_folder, student)
    with pytest.raises(TrainingError, match=r"of the teacher's probability lies on ids the student lacks.*1\.00%"):
        capture_and_train(root)
    assert not (root / "students").exists() or not list((root / "students").iterdir())

    edit(root, tokenizer={"max_missing_mass": 1.0})
    folder = capture_and_train(root)
    found = json.loads((root / "tokenizer_report.json").read_text())
    assert (found["verdict"], found["missing_ids"]) == ("subset", {"count": 20, "ranges": [[n, N - 1]]})

    rows = captured(root)
    vocabulary = StudentSide(Pipeline(Home(root))).vocabulary
    fitted, fit = fit_rows(rows, vocabulary, n + 40)
    assert max(int(row.targets.support_ids_N.max()) for row in rows) >= n
    kept = [np.isfinite(row.targets.support_logprobs_N) for row in fitted]
    assert all(vocabulary.has(row.targets.support_ids_N[k]).all() for row, k in zip(fitted, kept, strict=True))
    told = json.loads((folder / "distillation.json").read_text())["report"]["fit"]
    assert 0.01 < told["mass_dropped"] < 1.0 and 0.01 < fit.mass_dropped < 1.0

    gradient = head_gradient(root, student, rows)
    assert torch.count_nonzero(gradient[n:]) == 0 and torch.count_nonzero(gradient[:n]) > 0
    trained = head(folder)
    assert torch.equal(trained[n:], head(student)[n:]) and not torch.equal(trained[:n], head(student)[:n])

    report = StudentSide(Pipeline(Home(root))).evaluate(device="cpu", force=False)
    [heldout] = json.loads((report / "report.json").read_text())["details"]["heldout"]
    assert heldout["fit"]["mass_dropped"] > 0.01
    told = (
        f"Of heldout, {100 * heldout['fit']['mass_dropped']:.2f}% of the teacher's probability lay on ids the student"
    )
    assert told in (report / "report.html").read_text() and "The 300 ids" in (report / "report.html").read_text()


def test_an_incompatible_pair_is_stopped_however_it_is_started(tmp_path: Path, teacher_folder: Path) -> None:
    other = tiny.save_model(tmp_path / "other", tiny.train_tokenizer([text[::-1] for text in tiny.TEXT]))
    root = home_of(tmp_path / "home", teacher_folder, other)
    ways: list[dict[str, Any]] = [
        {}, {"shards": ["s0"]}, {"only": "tokenizer_compatibility"}, {"only": "teacher_capture"}
    ]  # fmt: skip
    for options in ways:
        with pytest.raises(IncompatibleTokenizers, match=r"id 262 is .*; the text .* becomes"):
            bring_up_to_date(defs, Home(root), device="cpu", **options)
    command = [
        *(sys.executable, "-m", "dagster", "asset", "materialize", "-m", "distill_assets.definitions"),
        *("--select", "teacher_capture", "--partition", "s0"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, env=os.environ | environment(Home(root))
    )
    assert done.returncode != 0
    assert "are incompatible: id " in done.stdout + done.stderr
    assert not list((root / "captures").rglob("*.parquet"))


def test_what_was_accepted_is_carried_to_the_student(tmp_path: Path, teacher_folder: Path) -> None:
    renamed = json.loads((teacher_folder / "tokenizer.json").read_text())
    other = tiny.save_model(tmp_path / "other", tiny.train_tokenizer(), seed=1)
    for token in renamed["added_tokens"]:
        token["content"] = "<|human|>" if token["content"] == "<|user|>" else token["content"]
    renamed["model"]["vocab"]["<|human|>"] = renamed["model"]["vocab"].pop("<|user|>")
    (other / "tokenizer.json").write_text(json.dumps(renamed))
    root = home_of(tmp_path / "home", teacher_folder, other, accept=["token_ids", "segmentation"])
    folder = capture_and_train(root)
    found = json.loads((root / "tokenizer_report.json").read_text())
    assert (found["verdict"], found["usable"], found["accepted"]) == (
        "incompatible", True, ["token_ids", "segmentation"],
    )  # fmt: skip
    record = json.loads((folder / "distillation.json").read_text())
    assert record["spec"]["accepted_differences"] == ["token_ids", "segmentation"]
