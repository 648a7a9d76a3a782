from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    XLMConfig,
    XLMWithLMHeadModel,
)

from distill_assets.foundation.devices import resolve_device
from distill_assets.foundation.errors import DeviceError, ModelError
from distill_assets.foundation.language_model import (
    NEVER,
    head_logits,
    head_width,
    hidden_states,
    keeps_packed_rows_apart,
    load_model,
    real_logits,
    verify_split,
)
from distill_assets.foundation.model_folders import ModelFolder
from distill_assets.foundation.tokenizers import TokenIds, load_tokenizer
from tests import tiny

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.35,  # wide enough that a soft cap bends the logits
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def saved(model: PreTrainedModel, path: Path) -> ModelFolder:
    model.save_pretrained(path)
    return ModelFolder(path.name, path, None)


def random_model(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=3.0))
    if kind == "granite":
        return GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=7.0, embedding_multiplier=3.0))
    return CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.0625))


@pytest.mark.parametrize("kind", ["gemma2", "granite", "cohere"])
def test_body_head_and_transform_give_the_model_s_own_logits(tmp_path: Path, kind: str) -> None:
    model = load_model(saved(random_model(kind), tmp_path / kind), "float32", CPU)  # verifies the split itself
    ids_BT = torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own = model(input_ids=ids_BT).logits
        ours = head_logits(model, hidden_states(model, ids_BT))
        plain = model.get_output_embeddings()(hidden_states(model, ids_BT))
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)
    assert (plain - own).abs().max() > 0.1, "the fixture must need the transform"


class BentHead(GraniteForCausalLM):
    """A model that does to its logits what no configuration key says."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + 0.01
        return output


def test_a_model_that_bends_its_logits_in_an_unknown_way_is_refused() -> None:
    model = BentHead(GraniteConfig(**SHAPE)).eval()
    with pytest.raises(ModelError, match="bent: BentHead changes its logits after the head"):
        verify_split(model, "bent")


def test_a_model_that_looks_ahead_is_refused() -> None:
    """It looks at as many ids as are no padding, and 2 is padding: of a single row 1, 2, ... it never saw the last."""
    torch.manual_seed(0)
    config = XLMConfig(vocab_size=96, emb_dim=16, n_layers=1, n_heads=2, pad_index=2)
    with pytest.raises(ModelError, match="ahead: XLMWithLMHeadModel lets a token see what comes after it"):
        verify_split(XLMWithLMHeadModel(config).eval(), "ahead")


def test_weights_that_are_not_numbers_are_named_as_what_is_wrong(teacher_folder: Path) -> None:
    model = load_model(ModelFolder("tiny", teacher_folder, None), "float32", CPU)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="tiny: its logits are not finite; its weights are damaged"):
        verify_split(model, "tiny")


def test_a_model_without_a_head_is_refused(teacher_folder: Path) -> None:
    body = load_model(ModelFolder("tiny", teacher_folder, None), "float32", CPU).base_model
    with pytest.raises(ModelError, match="LlamaModel has no language-model head"):
        verify_split(body, "tiny")


def test_padding_on_the_right_changes_no_real_position(teacher_folder: Path) -> None:
    model = load_model(ModelFolder("tiny", teacher_folder, None), "float32", CPU)
    row = torch.arange(10, 19)
    padded = torch.cat([row, torch.full((5,), 2)])
    with torch.no_grad():
        alone, beside = hidden_states(model, row[None]), hidden_states(model, padded[None])
    torch.testing.assert_close(beside[:, :9], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_have_the_hidden_states_they_have_alone(attention: str) -> None:
    model = random_model("cohere")
    model.set_attn_implementation(attention)
    rows = [torch.arange(3, 3 + n) for n in (7, 2, 11)]
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    with torch.no_grad():
        packed = hidden_states(model, torch.cat(rows)[None], positions[None])
        alone = torch.cat([hidden_states(model, row[None]) for row in rows], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    assert keeps_packed_rows_apart(model) and model.training


def test_large_states_do_not_look_like_mixed_rows() -> None:
    model = random_model("cohere").bfloat16()
    with torch.no_grad():
        model.base_model.norm.weight *= 100
    assert keeps_packed_rows_apart(model)


def test_a_model_that_looks_back_by_other_means_than_attention_mixes_packed_rows() -> None:
    for spread in (0.35, 0.02):  # that little of a row leaks into the next while a student is new is no excuse
        model = Lfm2ForCausalLM(
            Lfm2Config(**SHAPE | {"initializer_range": spread}, layer_types=["conv", "full_attention"])
        )
        assert not keeps_packed_rows_apart(model)
        with torch.autocast("cpu", torch.bfloat16):
            assert not keeps_packed_rows_apart(model)
        assert not keeps_packed_rows_apart(model.bfloat16())


def test_a_padded_head_is_cut_to_real_ids(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = ModelFolder("padded", tiny.save_model(tmp_path / "padded", tokenizer, pad_head=24), None)
    model = load_model(folder, "bfloat16", CPU)
    n_real = TokenIds.of(load_tokenizer(folder)).n_real
    assert (n_real, head_width(model)) == (len(tokenizer), len(tokenizer) + 24)
    hidden_ND = torch.randn(5, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        whole_NW = head_logits(model, hidden_ND)
        real_NV = real_logits(model, hidden_ND, n_real)
        masked_NV = real_logits(model, hidden_ND, n_real, torch.tensor([3, 7]))
    assert real_NV.dtype == torch.float32
    assert torch.equal(real_NV, whole_NW[:, :n_real].float())
    assert (masked_NV[:, [3, 7]] == NEVER).all()
    assert masked_NV.softmax(-1)[:, [3, 7]].sum() == 0
    kept = [i for i in range(n_real) if i not in (3, 7)]
    assert torch.equal(masked_NV[:, kept], real_NV[:, kept])


def test_ids_without_a_token_are_listed(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = TokenIds.of(tokenizer)
    assert (ids, len(ids)) == (TokenIds(len(tokenizer)), len(tokenizer))
    holey = TokenIds(9, (2, 5))
    assert len(holey) == 7 and holey.below(6) == {0, 1, 3, 4} and holey.below(99) == {0, 1, 3, 4, 6, 7, 8}


def test_weights_come_in_the_dtype_asked_for(teacher_folder: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        model = load_model(ModelFolder("tiny", teacher_folder, None), dtype, CPU)  # type: ignore[arg-type]
        assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
        assert not model.training


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_model_file_is_an_error_that_names_the_folder(
    tmp_path: Path, teacher_folder: Path, name: str
) -> None:
    folder = shutil.copytree(teacher_folder, tmp_path / "damaged")
    (folder / name).write_bytes((folder / name).read_bytes()[:-20])
    with pytest.raises(ModelError, match=f"damaged: .*{folder}"):
        load_model(ModelFolder("damaged", folder, None), "float32", CPU)


def test_a_damaged_tokenizer_is_an_error_that_names_the_folder(tmp_path: Path, teacher_folder: Path) -> None:
    folder = shutil.copytree(teacher_folder, tmp_path / "damaged")
    (folder / "tokenizer.json").write_text("{half")
    with pytest.raises(ModelError, match=f"damaged: the tokenizer in {folder} cannot be loaded"):
        load_tokenizer(ModelFolder("damaged", folder, None))


def test_the_cpu_is_always_there() -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gpu", "device gpu is not known; use auto, cpu, cuda, cuda:N or mps"),
        ("", "is not known"),
        ("meta", "device meta is not supported"),
        ("cuda:99", "device cuda:99 was asked for"),
    ],
)
def test_a_device_that_is_not_there_is_refused(name: str, reason: str) -> None:
    with pytest.raises(DeviceError, match=reason):
        resolve_device(name)


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = tiny.save_model(tmp_path / "model", tokenizer)
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if ".layers.1." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"9 weights are missing .*layers\.1\."):
        load_model(ModelFolder("tiny", folder, None), "float32", torch.device("cpu"))
