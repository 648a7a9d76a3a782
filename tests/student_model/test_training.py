"""Whole trainings of tiny students on a tiny teacher's real distributions."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from distill_assets.foundation.errors import TrainingError
from distill_assets.foundation.model_folders import ModelFolder
from distill_assets.foundation.progress import Progress
from distill_assets.foundation.settings import StudentSettings, TrainingSettings
from distill_assets.student_model.choice import Turns
from distill_assets.student_model.identity import StudentKind
from distill_assets.student_model.initial import initial_student
from distill_assets.student_model.losses import LossMixture
from distill_assets.student_model.module import DistillationModule
from distill_assets.student_model.passes import Passes
from distill_assets.student_model.saving import StudentReport, StudentSpec, UsedCapture, read_student
from distill_assets.student_model.training import (
    DistillationTrainer,
    learning_rate_share,
    train_student,
    training_arguments,
)
from distill_assets.student_model.vocabulary import StudentVocabulary
from distill_assets.teacher_capture.sparse_targets import CapturedRow
from tests.devices import DEVICES
from tests.student_model.events import scalars
from tests.student_model.rows import captured_row, captured_rows, own_rows, shifted

ORIGIN = StudentSettings(from_teacher_layers=[0, 2])


def spec_of(kind: StudentKind = "student", n_real: int = 320, **training: Any) -> StudentSpec:
    settings = {"learning_rate": 2e-3, "batch_tokens": 160, "epochs": 1, **training}
    return StudentSpec(
        student_id="0123456789abcdef",
        kind=kind,
        teacher="tiny-teacher",
        origin=ORIGIN,
        training=TrainingSettings(**settings),
        vocabulary=StudentVocabulary(n_real),
        captures=(UsedCapture("s0", "f" * 64, "c" * 16, 10),),
        accepted_differences=("chat_template",),
    )


@pytest.fixture
def start(teacher: ModelFolder) -> PreTrainedModel:
    return initial_student(ORIGIN, teacher, None, 320, 0, torch.device("cpu"))


def fresh(teacher: ModelFolder) -> PreTrainedModel:
    return initial_student(ORIGIN, teacher, None, 320, 0, torch.device("cpu"))


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_student_is_saved_whole_loads_with_transformers_and_generates(
    start: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[CapturedRow], tmp_path: Path
) -> None:
    seen: list[Progress] = []
    spec, folder = spec_of(), tmp_path / "students" / "x"
    report = train_student(spec, start, tokenizer, rows, folder, device="cpu", on_progress=seen.append)
    assert {"config.json", "model.safetensors", "tokenizer.json", "distillation.json", "README.md"} <= {
        file.name for file in folder.iterdir()
    }
    assert [file.name for file in folder.parent.iterdir()] == ["x"]

    loaded = AutoModelForCausalLM.from_pretrained(folder)
    loaded_tokenizer = AutoTokenizer.from_pretrained(folder)
    assert loaded.dtype == torch.float32
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    prompt = loaded_tokenizer("The cat", return_tensors="pt")
    assert loaded.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] > prompt["input_ids"].shape[1]
    assert loaded_tokenizer.chat_template == tokenizer.chat_template
    for mine, saved in zip(start.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(mine, saved)

    record = read_student(folder)
    assert record.spec == spec and record.report == report
    assert record.tools["torch"] == torch.__version__
    assert "tiny-teacher" in (folder / "README.md").read_text()
    assert [(p.done, p.total) for p in seen] == [(i + 1, report.steps) for i in range(report.steps)]
    assert re.fullmatch(rf"loss {report.final_loss:.4f}, [\d,]+ supervised tokens/s", seen[-1].note)


@pytest.mark.parametrize("device", DEVICES)
def test_the_curve_has_every_step_and_distillation_brings_the_student_to_the_teacher(
    start: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[CapturedRow], tmp_path: Path, device: str
) -> None:
    report = train_student(
        spec_of(epochs=8, kd_weight=0.9), start, tokenizer, rows, tmp_path / "x", validation=rows[:3], device=device
    )
    assert [point.step for point in report.curve] == list(range(1, report.steps + 1))
    for point in report.curve:
        assert point.kd is not None
        assert point.loss == pytest.approx(0.9 * point.kd + 0.1 * point.ce, rel=1e-4)
    per_epoch = sum(row.targets.n_positions for row in rows)
    assert report.supervised_tokens == sum(point.tokens for point in report.curve) == 8 * per_epoch
    assert [point.epoch for point in report.validation] == list(range(1, 9))
    kds = [point.kd for point in report.validation if point.kd is not None]
    assert len(kds) == 8 and kds[-1] < 0.6 * kds[0]


def test_training_on_shifted_rows_does_not_bring_the_student_to_the_teacher(
    teacher: ModelFolder, tokenizer: PreTrainedTokenizerFast, rows: list[CapturedRow], tmp_path: Path
) -> None:
    def reached(training_rows: Sequence[CapturedRow], name: str) -> float:
        report = train_student(
            spec_of(epochs=4, kd_weight=1.0), fresh(teacher), tokenizer, training_rows, tmp_path / name,
            validation=rows, device="cpu",
        )  # fmt: skip
        kd = report.validation[-1].kd
        assert kd is not None
        return kd

    assert reached(rows, "aligned") < 0.7 * reached([shifted(row) for row in rows], "shifted")


def test_the_same_call_gives_the_same_weights_whatever_the_order_of_the_rows(
    teacher: ModelFolder, tokenizer: PreTrainedTokenizerFast, rows: list[CapturedRow], tmp_path: Path
) -> None:
    for name, given in (("a", rows), ("b", rows[::-1])):
        train_student(spec_of(), fresh(teacher), tokenizer, given, tmp_path / name, device="cpu")
    train_student(spec_of(seed=1), fresh(teacher), tokenizer, rows, tmp_path / "c", device="cpu")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert weights(tmp_path / "a") != weights(tmp_path / "c")


def test_the_control_takes_the_same_steps_and_does_not_look_at_targets(
    teacher: ModelFolder, tokenizer: PreTrainedTokenizerFast, teacher_model: PreTrainedModel, rows: list[CapturedRow],
    tmp_path: Path,
) -> None:  # fmt: skip
    student = train_student(spec_of(), fresh(teacher), tokenizer, rows, tmp_path / "s", device="cpu")
    control = train_student(
        spec_of("control"), fresh(teacher), tokenizer, rows, tmp_path / "c", validation=rows[:2], device="cpu"
    )
    other_k = captured_rows(teacher_model, tokenizer, 10, k=3)
    train_student(spec_of("control", kd_weight=0.3), fresh(teacher), tokenizer, other_k, tmp_path / "c3", device="cpu")
    assert [(p.step, p.tokens, p.learning_rate) for p in student.curve] == [
        (p.step, p.tokens, p.learning_rate) for p in control.curve
    ]
    assert all(point.kd is None and point.loss == point.ce for point in control.curve)
    assert [point.kd for point in control.validation] == [None]
    assert weights(tmp_path / "c") == weights(tmp_path / "c3")


def test_frozen_embeddings_stay_as_they_start(
    start: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[CapturedRow], tmp_path: Path
) -> None:
    before = {name: weight.detach().clone() for name, weight in start.named_parameters()}
    train_student(spec_of(freeze_embeddings=True), start, tokenizer, rows, tmp_path / "x", device="cpu")
    same = {name for name, weight in start.named_parameters() if torch.equal(weight, before[name])}
    assert same == {"model.embed_tokens.weight"}


def test_row_weights_count(
    teacher: ModelFolder, tokenizer: PreTrainedTokenizerFast, rows: list[CapturedRow], tmp_path: Path
) -> None:
    doubled = [replace(row, weight=2.0) for row in rows]
    plain = train_student(spec_of(), fresh(teacher), tokenizer, rows, tmp_path / "a", device="cpu")
    heavy = train_student(spec_of(), fresh(teacher), tokenizer, doubled, tmp_path / "b", device="cpu")
    assert heavy.curve[0].loss == pytest.approx(2 * plain.curve[0].loss, rel=1e-5)


def test_two_passes_are_each_row_twice(
    teacher: ModelFolder, tokenizer: PreTrainedTokenizerFast, rows: list[CapturedRow], tmp_path: Path
) -> None:
    twice = [replace(row, passes=2.0) for row in rows]
    a = train_student(spec_of(epochs=2), fresh(teacher), tokenizer, twice, tmp_path / "a", device="cpu")
    b = train_student(spec_of(epochs=2), fresh(teacher), tokenizer, [*rows, *rows], tmp_path / "b", device="cpu")
    assert a.curve == b.curve
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_epochs_of_different_sizes_end_where_their_rows_do(
    teacher: ModelFolder, tokenizer: PreTrainedTokenizerFast, rows: list[CapturedRow], tmp_path: Path
) -> None:
    some = [replace(row, passes=0.5) for row in rows]
    turns = Turns(sorted(some, key=lambda row: row.key), spec_of().training.seed)
    report = train_student(
        spec_of(epochs=3), fresh(teacher), tokenizer, some, tmp_path / "a", validation=rows[:2], device="cpu"
    )
    assert [point.epoch for point in report.validation] == [1, 2, 3]
    ordered = sorted(some, key=lambda row: row.key)
    wanted = [sum(ordered[i].targets.n_positions for i in turns.of(epoch)) for epoch in range(3)]
    ends = [point.step for point in report.validation]
    steps = [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    assert [sum(report.curve[step].tokens for step in each) for each in steps] == wanted
    assert len(set(wanted)) > 1


class _Gradients(TrainerCallback):
    """Those of the first step, as the optimiser gets them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.found = model, list[torch.Tensor]()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.found = self.found or [
            weight.grad.clone() for weight in self.model.parameters() if weight.grad is not None
        ]


def test_passes_of_any_size_padded_or_packed_have_the_gradients_of_the_whole_step(
    teacher: ModelFolder, rows: list[CapturedRow], tmp_path: Path
) -> None:
    """In float64, so that only another normalisation would show: passes have 1 to 10 rows of different lengths."""
    plan = [list(range(10))]

    def trained(tokens: int, packed: bool) -> tuple[DistillationTrainer, list[torch.Tensor]]:
        model = fresh(teacher).double()
        module = DistillationModule(model, StudentVocabulary(320), LossMixture(kd_weight=0.9))
        arguments = training_arguments(spec_of(max_grad_norm=1e9).training, 1, torch.device("cpu"), tmp_path)
        trainer = DistillationTrainer(module, arguments, rows, plan, [len(rows)], True, Passes(model, tokens, packed))
        gradients = _Gradients(model)
        trainer.add_callback(gradients)
        trainer.train()
        return trainer, gradients.found

    whole, expected = trained(10_000, packed=False)
    for tokens, packed in ((160, False), (1, False), (160, True), (1, True)):
        parts, found = trained(tokens, packed)
        assert len(parts.passes.of(rows)) > 2
        assert parts.curve == [
            replace(whole.curve[0], **{n: pytest.approx(v) for n, v in asdict(whole.curve[0]).items()})
        ]
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_training_goes_on_with_passes_of_the_size_it_came_to(
    teacher: ModelFolder, tokenizer: PreTrainedTokenizerFast, rows: list[CapturedRow], tmp_path: Path
) -> None:
    def stop(progress: Progress) -> None:
        if progress.done == 3:
            raise KeyboardInterrupt

    under_way: dict[str, Any] = {"under_way": tmp_path / "under_way", "checkpoint_seconds": 0.0}
    small: dict[str, Any] = {"pass_tokens": 80, "gradient_checkpointing": True}
    train_three_epochs(teacher, tokenizer, rows, tmp_path / "whole passes")
    train_three_epochs(teacher, tokenizer, rows, tmp_path / "undisturbed", **small)
    with pytest.raises(KeyboardInterrupt):
        train_three_epochs(teacher, tokenizer, rows, tmp_path / "x", **small, **under_way, on_progress=stop)
    train_three_epochs(teacher, tokenizer, rows, tmp_path / "x", **under_way)
    assert weights(tmp_path / "x") == weights(tmp_path / "undisturbed") != weights(tmp_path / "whole passes")


def test_a_student_trained_in_bfloat16_is_saved_in_float32_with_what_small_steps_added_up_to(
    start: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[CapturedRow], tmp_path: Path
) -> None:
    report = train_student(
        spec_of(epochs=8, precision="bfloat16"), start, tokenizer, rows, tmp_path / "x", validation=rows, device="cpu"
    )
    kds = [point.kd for point in report.validation if point.kd is not None]
    assert kds[-1] < 0.6 * kds[0]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert saved.dtype == torch.float32
    assert any((weight != weight.bfloat16()).any() for weight in saved.parameters())
    assert "Arithmetic: bfloat16; weights float32" in (tmp_path / "x" / "README.md").read_text()


def test_the_rate_warms_up_then_falls_along_a_cosine_and_no_step_idles() -> None:
    shares = [learning_rate_share(step, 10, 4) for step in range(10)]
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0]
    assert shares[4:] == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 6)) for i in range(6)])
    assert min(shares) > 0
    assert [learning_rate_share(step, 3, 3) for step in range(4)] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])


def test_an_interrupt_leaves_the_old_student(
    teacher: ModelFolder, tokenizer: PreTrainedTokenizerFast, rows: list[CapturedRow], tmp_path: Path
) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.done == 2:
            raise KeyboardInterrupt

    train_student(spec_of(), fresh(teacher), tokenizer, rows, tmp_path / "x", device="cpu")
    before = weights(tmp_path / "x")
    with pytest.raises(KeyboardInterrupt):
        train_student(
            spec_of(seed=2), fresh(teacher), tokenizer, rows, tmp_path / "x", device="cpu", on_progress=interrupt
        )
    assert weights(tmp_path / "x") == before
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_rows_that_cannot_be_trained_on_are_refused(
    start: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[CapturedRow], tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match="no captured rows"):
        train_student(spec_of(), start, tokenizer, [], tmp_path / "x", device="cpu")
    with pytest.raises(TrainingError, match="no row has a target token that the student knows"):
        train_student(spec_of(n_real=2), start, tokenizer, [rows[0]], tmp_path / "x", device="cpu")
    with pytest.raises(TrainingError, match="its head has 320 rows, but 400 ids"):
        train_student(spec_of(n_real=400), start, tokenizer, rows, tmp_path / "x", device="cpu")


@pytest.mark.parametrize("objective", ["forward_kl", "reverse_kl", "jsd", "renormalized"])
def test_one_kept_id_a_position_is_enough_to_learn_from(
    teacher: ModelFolder, teacher_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path,
    objective: str,
) -> None:  # fmt: skip
    rows = captured_rows(teacher_model, tokenizer, 10, k=1)
    spec = spec_of(epochs=4, kd_weight=1.0, objective=objective)
    report = train_student(spec, fresh(teacher), tokenizer, rows, tmp_path / "x", validation=rows, device="cpu")
    assert 0.0 < report.validation[-1].loss < 0.9 * report.validation[0].loss


def test_a_row_without_a_supervised_position_is_left_out_and_counted(
    teacher: ModelFolder, tokenizer: PreTrainedTokenizerFast, rows: list[CapturedRow], tmp_path: Path
) -> None:
    nothing = replace(rows[3], key="0" * 16, targets=rows[3].targets.at(np.zeros(rows[3].targets.n_positions, bool)))
    plain = train_student(spec_of(), fresh(teacher), tokenizer, rows, tmp_path / "a", device="cpu")
    report = train_student(spec_of(), fresh(teacher), tokenizer, [nothing, *rows], tmp_path / "b", device="cpu")
    assert (report.rows, report.fit.rows_dropped) == (len(rows), 1)
    assert report.curve == plain.curve and weights(tmp_path / "a") == weights(tmp_path / "b")
    with pytest.raises(TrainingError, match="no row has a target token that the student knows"):
        train_student(spec_of(), fresh(teacher), tokenizer, [nothing], tmp_path / "x", device="cpu")


@pytest.mark.parametrize("kind", ["student", "control"])
def test_a_batch_may_be_of_one_token(
    teacher: ModelFolder, teacher_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path,
    kind: StudentKind,
) -> None:  # fmt: skip
    """One token goes in, the next one is the only target; longer rows have batches of their own all the same."""
    rows = [captured_row(teacher_model, [i, i + 1], 1, k=4) for i in range(40, 44)]
    rows.append(captured_row(teacher_model, [50, 51, 52, 53], 3, k=4))
    report = train_student(
        spec_of(kind, batch_tokens=2, epochs=3), fresh(teacher), tokenizer, rows, tmp_path / "x", validation=rows[:1],
        device="cpu",
    )  # fmt: skip
    assert report.steps == 15 and {point.tokens for point in report.curve} == {1}
    assert report.validation[-1].loss < report.validation[0].loss
    assert torch.isfinite(AutoModelForCausalLM.from_pretrained(tmp_path / "x").lm_head.weight).all()


def test_a_student_that_lacks_ids_trains_and_reports_what_that_cost(
    start: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[CapturedRow], tmp_path: Path
) -> None:
    report = train_student(spec_of(n_real=300), start, tokenizer, rows, tmp_path / "x", device="cpu")
    golds = np.concatenate([row.input_ids[row.targets.positions_P + 1] for row in rows])
    assert report.fit.positions_dropped == int((golds >= 300).sum()) > 0
    assert report.supervised_tokens == int((golds < 300).sum())
    assert 0.0 < report.fit.mass_dropped < 1.0


@pytest.mark.parametrize("content", ["", "{}", '{"spec": 1}', None])
def test_a_damaged_record_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "distillation.json").write_text(content)
    with pytest.raises(TrainingError, match=r"distillation\.json"):
        read_student(tmp_path)


UNTIL_KILLED = """
import json, os, signal, sys
from pathlib import Path
import torch
from transformers import AutoTokenizer
from distill_assets.foundation.language_model import load_model
from distill_assets.foundation.model_folders import ModelFolder
from tests.student_model.rows import captured_rows
from tests.student_model.test_training import train_three_epochs

folder, out, step, seconds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
teacher, tokenizer = ModelFolder("tiny-teacher", folder, None), AutoTokenizer.from_pretrained(folder)
rows = captured_rows(load_model(teacher, "float32", torch.device("cpu")), tokenizer, 10)

def listen(progress):
    if progress.done == step:
        os.kill(os.getpid(), signal.SIGKILL)

train_three_epochs(
    teacher, tokenizer, rows, out / "x", json.loads(sys.argv[5]), under_way=out / "under_way",
    checkpoint_seconds=seconds, events=out / "events", on_progress=listen,
)
"""
# Dropout, so that random numbers must go on where they were.
EXTRAS = {"lora": {"rank": 4, "dropout": 0.2}, "validate_every": 2, "early_stopping": 3, "learning_rate": 0.03}


def train_three_epochs(
    teacher: ModelFolder, tokenizer: PreTrainedTokenizerFast, rows: list[CapturedRow], folder: Path,
    extras: Mapping[str, Any] = MappingProxyType({}), **options: Any,
) -> StudentReport:  # fmt: skip
    """With extras the validation rows are such that it stops early."""
    validation = own_rows(fresh(teacher), 3) if extras else rows[:3]
    spec = spec_of(**{"epochs": 3, **extras})
    return train_student(spec, fresh(teacher), tokenizer, rows, folder, validation=validation, device="cpu", **options)


def train_until_killed(teacher: ModelFolder, out: Path, step: int, seconds: float, extras: Mapping[str, Any]) -> None:
    words = [sys.executable, "-c", UNTIL_KILLED, str(teacher.path), str(out), str(step), str(seconds)]
    words.append(json.dumps(extras))
    killed = subprocess.run(words, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (out / "x").exists()


@pytest.mark.parametrize(
    ("seconds", "steps", "extras"), [(0.0, (4, 7), {}), (0.0, (3, 6), EXTRAS), (math.inf, (7,), {})]
)
def test_a_killed_training_goes_on_to_the_same_bits(
    teacher: ModelFolder, tokenizer: PreTrainedTokenizerFast, rows: list[CapturedRow], tmp_path: Path, seconds: float,
    steps: tuple[int, ...], extras: dict[str, Any],
) -> None:  # fmt: skip
    whole = train_three_epochs(teacher, tokenizer, rows, tmp_path / "whole", extras)
    under_way = tmp_path / "under_way"
    for step in steps:
        train_until_killed(teacher, tmp_path, step, seconds, extras)
        assert len(list(under_way.glob("checkpoint-*"))) == (seconds == 0.0)  # one, however many were written
    seen: list[int] = []
    resumed = train_three_epochs(
        teacher, tokenizer, rows, tmp_path / "x", extras, under_way=under_way, events=tmp_path / "events",
        on_progress=lambda p: seen.append(p.done),
    )  # fmt: skip
    assert resumed.stopping == whole.stopping
    assert (whole.stopping is not None and whole.steps < whole.stopping.planned_steps) == bool(extras)
    assert [step for step, _ in scalars(tmp_path / "events")["train/loss"]] == list(range(1, whole.steps + 1))
    assert weights(tmp_path / "x") == weights(tmp_path / "whole")
    assert (resumed.curve, resumed.validation) == (whole.curve, whole.validation)
    assert seen[0] == (steps[-1] if seconds == 0.0 else 1) and seen[-1] == whole.steps
    assert not under_way.exists()


def damage_nothing(checkpoint: Path) -> None:
    """What the others are compared with."""


def cut_off(checkpoint: Path) -> None:
    (checkpoint / "whole.json").unlink()


def lose_the_optimizer(checkpoint: Path) -> None:
    (checkpoint / "optimizer.pt").unlink()


def flip_a_byte(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)


def halve_the_list(checkpoint: Path) -> None:
    (checkpoint / "whole.json").write_text('{"curve.js')


@pytest.mark.parametrize("damage", [damage_nothing, cut_off, lose_the_optimizer, flip_a_byte, halve_the_list])
def test_a_checkpoint_that_is_not_whole_is_no_reason_to_fail(
    teacher: ModelFolder, tokenizer: PreTrainedTokenizerFast, rows: list[CapturedRow], tmp_path: Path,
    damage: Callable[[Path], None],
) -> None:  # fmt: skip
    under_way, seen = tmp_path / "under_way", list[int]()
    options: dict[str, Any] = {"under_way": under_way, "checkpoint_seconds": 0.0}

    def stop(progress: Progress) -> None:
        if progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_three_epochs(teacher, tokenizer, rows, tmp_path / "x", **options, on_progress=stop)
    (under_way / "checkpoint-x").write_text("a file")
    damage(under_way / "checkpoint-2")
    train_three_epochs(
        teacher, tokenizer, rows, tmp_path / "x", **options, on_progress=lambda progress: seen.append(progress.done)
    )
    assert seen[0] == (3 if damage is damage_nothing else 1)
    train_three_epochs(teacher, tokenizer, rows, tmp_path / "whole")
    assert weights(tmp_path / "x") == weights(tmp_path / "whole")


def test_a_checkpoint_that_cannot_be_written_is_no_reason_to_stop(
    teacher: ModelFolder, tokenizer: PreTrainedTokenizerFast, rows: list[CapturedRow], tmp_path: Path
) -> None:
    under_way, notes = tmp_path / "under_way", list[str]()

    def listen(progress: Progress) -> None:
        notes.append(progress.note)
        if progress.done < 4:
            (under_way / f"checkpoint-{progress.done}").write_text("in the way of a folder")

    train_three_epochs(
        teacher, tokenizer, rows, tmp_path / "x", under_way=under_way, checkpoint_seconds=0.0, on_progress=listen
    )
    assert "no checkpoint: " in notes[1] and "no checkpoint: " not in notes[-1]
    assert not under_way.exists() and (tmp_path / "x" / "model.safetensors").is_file()
