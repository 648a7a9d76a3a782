"""Two chat templates compared by what they make of conversations, a system turn, tools and their answers among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill_assets.tokenizer_compatibility.report import Difference
from distill_assets.tokenizer_compatibility.sides import Pair, TokenizerSide

_ASKED = {"role": "user", "content": "What is 2 + 2?"}
_TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
            "required": ["a", "b"],
        },
    },
}
_CALL = {"type": "function", "id": "call00001", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
# name -> what `apply_chat_template` is given
_CONVERSATIONS: dict[str, dict[str, Any]] = {
    "without a system turn": {"conversation": [_ASKED, {"role": "assistant", "content": "4"}]},
    "with a system turn": {"conversation": [{"role": "system", "content": "Be brief."}, _ASKED]},
    "to be answered": {"conversation": [_ASKED], "add_generation_prompt": True},
    "of several turns": {
        "conversation": [_ASKED, {"role": "assistant", "content": "4"}, {"role": "user", "content": "Sure? "}]
    },
    "with tools": {"conversation": [_ASKED], "tools": [_TOOL]},
    "with a tool's turn": {
        "conversation": [
            _ASKED,
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "name": "add", "tool_call_id": "call00001", "content": "4"},
            {"role": "assistant", "content": "4"},
        ],
        "tools": [_TOOL],
    },
}


def chat_template(pair: Pair) -> Difference | None:
    """Rendered ids of conversations; what does not render is compared by the reason."""
    differing = {
        name: rendered
        for name, given in _CONVERSATIONS.items()
        if (rendered := [_rendered(side, given) for side in (pair.teacher, pair.student)])[0] != rendered[1]
    }
    if not differing:
        return None
    first = next(iter(differing))
    return Difference(
        "chat_template",
        False,
        f"the chat templates render a conversation {first} differently; the teacher's is used",
        {
            "differing": list(differing),
            "conversation": _CONVERSATIONS[first]["conversation"],
            "teacher": differing[first][0],
            "student": differing[first][1],
        },
    )


def _rendered(side: TokenizerSide, given: Mapping[str, Any]) -> list[int] | str:
    """Ids of the conversation, or why there are none."""
    if not side.tokenizer.chat_template:
        return "no chat template"
    try:
        text = str(side.tokenizer.apply_chat_template(**given, tokenize=False))
    except Exception as error:  # a template is its author's program and raises what it likes
        return f"{type(error).__name__}: {error}"
    return side.encode([text])[0]
