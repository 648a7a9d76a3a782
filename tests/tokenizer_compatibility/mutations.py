"""A tokenizer rebuilt from its own JSON after a change: what a careless fork or conversion does."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

Change = Callable[[dict[str, Any]], None]


def changed(
    tokenizer: PreTrainedTokenizerFast, change: Change | None = None, **attributes: Any
) -> PreTrainedTokenizerFast:
    """`change` edits the backend's JSON in place; `attributes` are set on the loaded tokenizer."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if change:
        change(state)
    copy = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
    )
    copy.chat_template = tokenizer.chat_template
    for name, value in attributes.items():
        setattr(copy, name, value)
    return copy


def swap_ids(state: dict[str, Any]) -> None:
    """Two ordinary tokens change places, as "Ġthe" and "he" would in a vocabulary sorted anew."""
    vocabulary = state["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def rename_special(state: dict[str, Any]) -> None:
    """A special token keeps its id and gets another name (R1-Distill-Qwen)."""
    state["added_tokens"][4]["content"] = "<|human|>"
    vocabulary = state["model"]["vocab"]
    vocabulary["<|human|>"] = vocabulary.pop("<|user|>")


def swap_merges(state: dict[str, Any]) -> None:
    merges = state["model"]["merges"]
    merges.reverse()


def drop_last_merge_and_token(state: dict[str, Any]) -> None:
    left, right = state["model"]["merges"].pop()
    del state["model"]["vocab"][left + right]


def add_special(state: dict[str, Any]) -> None:
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    new = max(state["model"]["vocab"].values()) + 1
    state["added_tokens"].append({"id": new, "content": "<|tool|>", **token})


def nfc(state: dict[str, Any]) -> None:
    state["normalizer"] = {"type": "NFC"}


def lowercase(state: dict[str, Any]) -> None:
    state["normalizer"] = {"type": "Lowercase"}


def harmless_normalizer(state: dict[str, Any]) -> None:
    """Written otherwise, and does nothing."""
    state["normalizer"] = {"type": "Sequence", "normalizers": []}


def digits_alone(state: dict[str, Any]) -> None:
    digits = {"type": "Digits", "individual_digits": True}
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, state["pre_tokenizer"]]}


def prefix_space(state: dict[str, Any]) -> None:
    state["pre_tokenizer"]["add_prefix_space"] = True


def ignore_merges(state: dict[str, Any]) -> None:
    state["model"]["ignore_merges"] = True


def strip_left(state: dict[str, Any]) -> None:
    state["added_tokens"][1]["lstrip"] = True


def not_special(state: dict[str, Any]) -> None:
    state["added_tokens"][4]["special"] = False


def insert_bos(state: dict[str, Any]) -> None:
    state["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [0], "tokens": ["<|bos|>"]}},
    }
