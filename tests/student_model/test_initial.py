"""Where a student starts, checked by rebuilding it by hand and by loading what it saves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    XLMConfig,
    XLMWithLMHeadModel,
)

from distill_assets.foundation.errors import ModelError, SettingsError
from distill_assets.foundation.fingerprints import HashCache
from distill_assets.foundation.model_folders import ModelFolder
from distill_assets.foundation.settings import StudentSettings
from distill_assets.student_model.initial import initial_student
from distill_assets.student_model.origin import initial_weights_fingerprint
from tests import tiny

CPU = torch.device("cpu")
SMALL = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1} | {
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}
IDS = torch.tensor([[1, 40, 77, 12, 9]])


def start(
    settings: StudentSettings, teacher: ModelFolder, folder: ModelFolder | None = None, seed: int = 0
) -> PreTrainedModel:
    return initial_student(settings, teacher, folder, 320, seed, CPU)


def test_chosen_layers_compute_what_the_teacher_without_the_others_computes(teacher: ModelFolder) -> None:
    student = start(StudentSettings(from_teacher_layers=[0, 2]), teacher)
    by_hand = LlamaForCausalLM.from_pretrained(teacher.path)
    by_hand.model.layers = torch.nn.ModuleList([by_hand.model.layers[0], by_hand.model.layers[2]])
    by_hand.config.num_hidden_layers = 2
    assert student.training and student.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(student(IDS, use_cache=False).logits, by_hand(IDS, use_cache=False).logits)
    assert student.config.num_hidden_layers == 2
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1]
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_all_layers_are_the_teacher_and_an_untied_head_comes_along(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tiny.save_model(tmp_path / "untied", tokenizer, tie_word_embeddings=False, pad_head=64)
    student = start(StudentSettings(from_teacher_layers=[0, 1, 2]), ModelFolder("untied", path, None))
    whole = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        torch.testing.assert_close(student(IDS).logits, whole(IDS).logits)
    assert student.lm_head.weight is not student.model.embed_tokens.weight


def test_per_layer_lists_of_the_configuration_follow_the_layers(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, layer_types=kinds, use_sliding_window=True, sliding_window=2,
        max_window_layers=0, eos_token_id=[1, 2, 3, 4],
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "q")
    tokenizer.save_pretrained(tmp_path / "q")
    student = start(StudentSettings(from_teacher_layers=[1, 2, 3]), ModelFolder("q", tmp_path / "q", None))
    assert student.config.layer_types == kinds[1:]
    student.eval().save_pretrained(tmp_path / "student")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, student(IDS).logits)


def test_another_architecture_with_other_names(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=3, n_head=2)).save_pretrained(
        tmp_path / "g"
    )
    tokenizer.save_pretrained(tmp_path / "g")
    student = start(StudentSettings(from_teacher_layers=[0, 2]), ModelFolder("g", tmp_path / "g", None)).eval()
    by_hand = GPT2LMHeadModel.from_pretrained(tmp_path / "g").eval()
    by_hand.transformer.h = torch.nn.ModuleList([by_hand.transformer.h[0], by_hand.transformer.h[2]])
    with torch.no_grad():
        torch.testing.assert_close(student(IDS, use_cache=False).logits, by_hand(IDS, use_cache=False).logits)


def test_a_layer_the_teacher_does_not_have_is_refused_with_its_number_of_layers(teacher: ModelFolder) -> None:
    with pytest.raises(SettingsError, match="layer 3 does not exist; tiny-teacher has 3 layers, 0 to 2"):
        start(StudentSettings(from_teacher_layers=[0, 3]), teacher)


def test_a_teacher_whose_layers_are_spread_over_lists_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    XLMWithLMHeadModel(
        XLMConfig(vocab_size=len(tokenizer), emb_dim=16, n_layers=3, n_heads=2, causal=True)
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="does not keep its 3 layers in one list; start the student from model"):
        start(StudentSettings(from_teacher_layers=[0, 1]), ModelFolder("x", tmp_path, None))


def test_layers_that_the_smaller_configuration_would_build_otherwise_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = Qwen2MoeConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, moe_intermediate_size=8, shared_expert_intermediate_size=8, num_experts=2,
        num_experts_per_tok=1, mlp_only_layers=[0],
    )  # fmt: skip
    Qwen2MoeForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"of the layers \[1, 2\] cannot be made"):
        start(StudentSettings(from_teacher_layers=[1, 2]), ModelFolder("moe", tmp_path, None))


def test_a_configuration_gives_random_weights_of_its_seed_and_the_teachers_ids(
    teacher: ModelFolder, tokenizer: PreTrainedTokenizerFast
) -> None:
    before = torch.random.get_rng_state()
    student = start(StudentSettings(config=SMALL), teacher)
    again = start(StudentSettings(config=SMALL), teacher)
    other = start(StudentSettings(config=SMALL), teacher, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert student.config.vocab_size == 320
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))
    assert not torch.equal(student.model.embed_tokens.weight, other.model.embed_tokens.weight)
    for place in (student.config, student.generation_config):
        assert place.bos_token_id == tokenizer.bos_token_id
        assert place.eos_token_id == tokenizer.eos_token_id
        assert place.pad_token_id == tokenizer.pad_token_id


def test_a_configuration_may_name_its_own_width(teacher: ModelFolder) -> None:
    assert start(StudentSettings(config={**SMALL, "vocab_size": 384}), teacher).config.vocab_size == 384


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "lama"}, "not a lama configuration"),
        ({"hiden_size": 8}, "hiden_size is not a key of a llama configuration"),
        ({"hidden_size": "wide"}, "expected int, got str"),
        ({"hidden_size": 15}, "not a multiple of the number of attention heads"),
        ({"model_type": "t5"}, "student.config"),
    ],
)
def test_an_impossible_configuration_is_refused(teacher: ModelFolder, change: dict[str, object], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        start(StudentSettings(config={**SMALL, **change}), teacher)


def test_a_folder_is_taken_as_it_is(teacher: ModelFolder, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tiny.save_model(tmp_path / "s", tokenizer, seed=3, num_hidden_layers=1)
    student = start(StudentSettings(model="s"), teacher, ModelFolder("s", path, None))
    whole = AutoModelForCausalLM.from_pretrained(path)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), whole.parameters(), strict=True))


def test_the_fingerprint_changes_with_what_the_weights_come_from_and_with_nothing_else(
    teacher: ModelFolder, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    hashes = HashCache(tmp_path / "hashes.json")

    def of(settings: StudentSettings, folder: ModelFolder | None = None, n_real: int = 320, seed: int = 0) -> str:
        return initial_weights_fingerprint(settings, teacher, folder, n_real, seed, hashes)

    layers, config = StudentSettings(from_teacher_layers=[0, 2]), StudentSettings(config=SMALL)
    assert of(layers) == of(layers, seed=1)
    assert of(layers) != of(StudentSettings(from_teacher_layers=[0, 1]))
    assert of(config) == of(StudentSettings(config={**SMALL, "vocab_size": 320}))
    assert len({of(config), of(config, seed=1), of(config, n_real=300)}) == 3
    one = ModelFolder("one", tiny.save_model(tmp_path / "1", tokenizer, seed=1), None)
    two = ModelFolder("two", tiny.save_model(tmp_path / "2", tokenizer, seed=2), None)
    named = StudentSettings(model="x")
    assert of(named, one) == of(named, ModelFolder("a copy", one.path, None))
    assert of(named, one) != of(named, two)
