"""Low-rank adapters on a student's body: trained alone, merged into the weights before the student is saved.

Head and embeddings are left out, so the fused loss has the plain head it needs, and a student under adapters is
trained, watched and resumed as any other.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill_assets.foundation.errors import SettingsError
from distill_assets.foundation.settings import ALL_LINEAR, LoraSettings
from distill_assets.student_model.weights import copied


class Adapters:
    """The adapters of a model, which is changed in place: only they can be trained from here on.

    SettingsError where a target is no linear layer of the model's body. `seed` draws their first
    weights; the global random state is left as it was.
    """

    def __init__(self, model: PreTrainedModel, settings: LoraSettings, seed: int) -> None:
        from peft import LoraConfig, get_peft_model  # takes seconds to import, and few need it

        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]  # any number: it is divided by the rank
            lora_dropout=settings.dropout,
            target_modules=_layers(model, settings.targets),
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's own affairs
            torch.manual_seed(seed)
            self._with_adapters = get_peft_model(model, config)
        self._weights: dict[str, Tensor] = {}

    def merge(self) -> None:
        """Add them to the weights they stand beside, in float32 on the CPU; the model is a plain one again."""
        from peft import get_peft_model_state_dict

        self._with_adapters.to("cpu")
        self._weights = copied(get_peft_model_state_dict(self._with_adapters))
        self._with_adapters.merge_and_unload()

    def save(self, folder: Path, base: str) -> None:
        """Write what was merged as peft does, for who wants it on `base`, the model they were trained on, instead."""
        config = self._with_adapters.peft_config["default"]
        config.base_model_name_or_path = base
        config.inference_mode = True
        config.save_pretrained(str(folder))
        save_file(self._weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _layers(model: PreTrainedModel, targets: list[str]) -> list[str]:
    """Full names of the linear layers of the body that `targets` name by their last parts."""
    body = {id(module) for module in model.base_model.modules()} - {id(model.get_output_embeddings())}
    linear = [
        name for name, module in model.named_modules() if id(module) in body and isinstance(module, nn.Linear | Conv1D)
    ]
    for target in targets:
        if target != ALL_LINEAR and not any(_is_called(name, target) for name in linear):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
            raise SettingsError(
                f"training.lora.targets: the body of this {type(model).__name__} has no linear layer {target}; "
                f"it has {known or 'none at all'}"
            )
    if not linear:
        raise SettingsError(f"training.lora: the body of this {type(model).__name__} has no linear layer; remove it")
    return [name for name in linear if ALL_LINEAR in targets or any(_is_called(name, target) for target in targets)]


def _is_called(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")
