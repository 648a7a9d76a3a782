"""Adapters: what they change, what they leave alone, and that the saved student is an ordinary one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from distill_assets.foundation.errors import SettingsError
from distill_assets.foundation.language_model import is_plain, verify_split
from distill_assets.foundation.model_folders import ModelFolder
from distill_assets.foundation.settings import LoraSettings, StudentSettings
from distill_assets.student_model.identity import StudentKind
from distill_assets.student_model.initial import initial_student
from distill_assets.student_model.lora import Adapters
from distill_assets.student_model.training import train_student
from distill_assets.student_model.verify import verify_students
from distill_assets.teacher_capture.sparse_targets import CapturedRow
from tests.devices import DEVICES
from tests.student_model.test_training import fresh, spec_of

LORA = {"rank": 4, "alpha": 8.0}
IDS = torch.tensor([[1, 40, 77, 12, 9]])


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=64)).eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits


def changed(start: PreTrainedModel, folder: Path) -> set[str]:
    """Names of weights that are not as they were."""
    before, after = start.state_dict(), AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert before.keys() == after.keys()
    return {name for name in after if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("device", DEVICES)
def test_adapters_learn_the_same_from_layers_that_are_computed_twice(
    teacher: ModelFolder, tokenizer: PreTrainedTokenizerFast, rows: list[CapturedRow], tmp_path: Path, device: str
) -> None:
    """The embeddings are frozen, so nothing that enters a layer asks for a gradient; its adapters do."""
    kept, recomputed = (
        train_student(
            spec_of(lora=LORA, epochs=2, learning_rate=1e-2), fresh(teacher), tokenizer, rows, tmp_path / str(twice),
            device=device, gradient_checkpointing=twice,
        )
        for twice in (False, True)
    )  # fmt: skip
    assert [p.loss for p in recomputed.curve] == pytest.approx([p.loss for p in kept.curve], rel=1e-5)
    assert kept.curve[-1].loss < 0.99 * kept.curve[0].loss


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["student", "control"])
def test_adapters_alone_are_trained_and_the_student_is_saved_as_any_other(
    teacher: ModelFolder, tokenizer: PreTrainedTokenizerFast, rows: list[CapturedRow], tmp_path: Path,
    kind: StudentKind, device: str,
) -> None:  # fmt: skip
    spec = spec_of(kind, epochs=4, learning_rate=1e-2, lora=LORA, early_stopping=9)
    report = train_student(spec, fresh(teacher), tokenizer, rows, tmp_path / "x", validation=rows, device=device)
    assert report.validation[-1].loss < 0.9 * report.validation[0].loss
    assert changed(fresh(teacher), tmp_path / "x") == {
        name for name, _ in fresh(teacher).named_parameters() if name.endswith("_proj.weight")
    }
    assert not (tmp_path / "x" / "adapter").exists()  # nobody has the model it belongs to
    assert "Adapters of rank 4 (alpha 8, dropout 0) on all-linear were" in (tmp_path / "x" / "README.md").read_text()
    verify_split(AutoModelForCausalLM.from_pretrained(tmp_path / "x"), "x")


def test_beside_a_student_that_began_as_a_model_lie_its_adapters_as_peft_loads_them(
    teacher: ModelFolder, tokenizer: PreTrainedTokenizerFast, rows: list[CapturedRow], tmp_path: Path
) -> None:
    origin = StudentSettings(model=str(teacher.path))
    start = initial_student(origin, teacher, teacher, 320, 0, torch.device("cpu"))
    spec = replace(spec_of(lora={**LORA, "targets": ["q_proj", "mlp.up_proj"]}, learning_rate=1e-2), origin=origin)
    train_student(spec, start, tokenizer, rows, tmp_path / spec.student_id, device="cpu")
    folder = tmp_path / spec.student_id
    base = AutoModelForCausalLM.from_pretrained(teacher.path)
    assert {name.rpartition(".layers.")[2].partition(".")[2] for name in changed(base, folder)} == {
        "self_attn.q_proj.weight", "mlp.up_proj.weight",
    }  # fmt: skip
    untouched = logits(base)
    with_adapter = logits(PeftModel.from_pretrained(base, folder / "adapter"))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(folder)), with_adapter, rtol=1e-4, atol=1e-4)
    assert (with_adapter - untouched).abs().max() > 0.01
    assert list(verify_students(tmp_path, lambda path: None)) == []
    file = folder / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert [problem.path for problem in verify_students(tmp_path, lambda path: None)] == [file]


@pytest.mark.parametrize("make", [gpt2, None])
def test_merging_changes_nothing_of_what_the_model_says(teacher: ModelFolder, make: object, tmp_path: Path) -> None:
    model = gpt2() if make is gpt2 else fresh(teacher)
    before = logits(model)
    random_state = torch.get_rng_state()
    adapters = Adapters(model, LoraSettings(rank=2, dropout=0.5), seed=3)
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.testing.assert_close(logits(model), before)  # they begin as nothing
    assert is_plain(model.get_output_embeddings())
    assert {name.rpartition(".")[0].split(".")[-2] for name, w in model.named_parameters() if w.requires_grad} == {
        "lora_A", "lora_B",
    }  # fmt: skip
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    said = logits(model)
    adapters.merge()
    torch.testing.assert_close(logits(model), said, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(said, before, atol=1e-2)
    assert not any("lora" in name for name, _ in model.named_modules())


def test_the_seed_draws_the_first_weights(teacher: ModelFolder) -> None:
    def drawn(seed: int) -> list[torch.Tensor]:
        model = fresh(teacher)
        Adapters(model, LoraSettings(**LORA), seed)
        return [weight for name, weight in model.named_parameters() if "lora_A" in name]

    assert all(torch.equal(a, b) for a, b in zip(drawn(0), drawn(0), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(drawn(0), drawn(1), strict=True))


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "proj", "query"])
def test_targets_that_are_no_linear_layer_of_the_body_are_refused(teacher: ModelFolder, target: str) -> None:
    with pytest.raises(
        SettingsError, match=rf"lora\.targets: .* no linear layer {target}; it has q_proj, k_proj, v_proj"
    ):
        Adapters(fresh(teacher), LoraSettings(targets=["v_proj", target]), seed=0)


def test_a_checkpoint_holds_the_adapters_alone(
    teacher: ModelFolder, tokenizer: PreTrainedTokenizerFast, rows: list[CapturedRow], tmp_path: Path
) -> None:
    held: list[set[str]] = []

    def look(progress: object) -> None:
        for file in (tmp_path / "under_way").glob("checkpoint-*/model.safetensors"):
            held.append(set(load_file(file)))

    train_student(
        spec_of(lora=LORA), fresh(teacher), tokenizer, rows, tmp_path / "x", device="cpu",
        under_way=tmp_path / "under_way", checkpoint_seconds=0.0, on_progress=look,
    )  # fmt: skip
    assert held and all(".lora_" in name for names in held for name in names)
