"""Where a student starts: a folder, some layers of its teacher, or random weights of a configuration."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from distill_assets.foundation.errors import ModelError, SettingsError
from distill_assets.foundation.language_model import load_model, verify_split
from distill_assets.foundation.model_folders import ModelFolder
from distill_assets.foundation.settings import StudentSettings
from distill_assets.foundation.tokenizers import load_tokenizer, quiet_transformers
from distill_assets.student_model.origin import given, require_layers
from distill_assets.student_model.passes import room_for_student


def initial_student(
    student: StudentSettings,
    teacher: ModelFolder,
    student_folder: ModelFolder | None,
    n_real: int,
    seed: int,
    device: torch.device,
) -> PreTrainedModel:
    """The untrained student in float32 and training mode, on `device`.

    `student_folder` is the resolved `student.model`, None for the other two origins; `n_real` is
    the width of a new head unless the configuration names a vocab_size; `seed` draws random
    weights. BOS, EOS and PAD are those of the teacher's tokenizer, which the student is saved
    with. Raises SettingsError for a layer or configuration that cannot be, ModelError for a model
    that cannot be loaded or taken apart, TrainingError for one without room in memory.
    """
    with room_for_student(device):
        if student.from_teacher_layers is not None:
            model = _from_layers(teacher, student.from_teacher_layers)
        elif student.config is not None:
            model = _from_config({"vocab_size": n_real, **student.config}, seed)
        else:
            model = load_model(given(student_folder), "float32", torch.device("cpu"))
        model.to(device)  # type: ignore[arg-type]
    tokenizer = load_tokenizer(teacher)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, value in special.items():
        setattr(model.config, name, value)
    model.generation_config = GenerationConfig(**special)
    return model.train()


def _new_model(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """Random float32 weights of `config`; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    return model


def _from_config(values: dict[str, Any], seed: int) -> PreTrainedModel:
    model_type = values["model_type"]
    rest = {key: value for key, value in values.items() if key != "model_type"}
    try:
        config = AutoConfig.for_model(model_type, **copy.deepcopy(rest))
    except Exception as error:  # each configuration class validates in its own way
        raise SettingsError(f"student.config: not a {model_type} configuration ({_reason(error)})") from error
    # transformers keeps whatever it does not know as an attribute, so a misspelt key would change nothing
    known = {field.name for field in dataclasses.fields(config)} | set(config.attribute_map)
    if unknown := sorted(key for key in rest if key not in known and key in vars(config)):
        raise SettingsError(f"student.config: {unknown[0]} is not a key of a {model_type} configuration; correct it")
    try:
        model = _new_model(config, seed)
        verify_split(model.eval(), f"student.config ({model_type})")
    except ModelError:
        raise
    except Exception as error:
        raise SettingsError(f"student.config: no causal language model can be made of it ({_reason(error)})") from error
    return model


def _from_layers(teacher: ModelFolder, layers: list[int]) -> PreTrainedModel:
    """A new model with fewer layers, every weight copied; built from its own configuration, so that
    loading what is saved builds the same."""
    require_layers(teacher, layers)
    whole = load_model(teacher, "float32", torch.device("cpu"))
    path = _layer_list(whole, teacher.name)
    try:
        student = _new_model(_fewer_layers(whole.config, layers), seed=0)
        student.load_state_dict(_chosen_weights(whole.state_dict(), path, layers), strict=True)
    except Exception as error:  # configuration and shapes are checked by transformers and torch, each its own way
        raise ModelError(
            f"{teacher.name}: a {type(whole).__name__} of the layers {layers} cannot be made ({_reason(error)}); "
            "start the student from model or config instead"
        ) from error
    verify_split(student.eval(), f"{teacher.name}, layers {layers}")
    return student


def _layer_list(model: PreTrainedModel, name: str) -> str:
    """Name of the one list in the model's body that holds its `num_hidden_layers` layers."""
    n_layers = getattr(model.config, "num_hidden_layers", None)
    body = model.base_model_prefix
    lists = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers and path.split(".")[0] == body
    ]
    outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    if len(outermost) != 1:
        raise ModelError(
            f"{name}: {type(model).__name__} does not keep its {n_layers} layers in one list; "
            "start the student from model or config instead"
        )
    return outermost[0]


def _fewer_layers(config: PretrainedConfig, layers: list[int]) -> PretrainedConfig:
    values = config.to_dict()
    n_layers = config.num_hidden_layers
    for key, value in values.items():
        if "layer" in key and isinstance(value, list) and len(value) == n_layers:  # layer_types and its kin
            values[key] = [value[i] for i in layers]
    values[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(layers)
    return type(config).from_dict(values)


def _chosen_weights(weights: dict[str, Any], path: str, layers: list[int]) -> dict[str, Any]:
    """The teacher's weights under the student's names: layer `layers[i]` becomes layer i."""
    place = {f"{old}": f"{new}" for new, old in enumerate(layers)}
    chosen = {}
    for name, weight in weights.items():
        if not name.startswith(f"{path}."):
            chosen[name] = weight
            continue
        old, _, rest = name.removeprefix(f"{path}.").partition(".")
        if old in place:
            chosen[f"{path}.{place[old]}.{rest}"] = weight
    return chosen


def _reason(error: Exception) -> str:
    """What a multi-line error of transformers or torch says, on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
