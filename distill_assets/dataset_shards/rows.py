"""The kinds of row a shard may hold, and how one mapping of values becomes one.

A row is one of {"text"}, {"prompt", "completion"}, {"messages": [{"role", "content"}]} or
{"input_ids"[, "loss_mask"][, "token_weights"]}, with an optional "id" and "weight"; an assistant's message may have a
"weight" too. A null counts as absent (Parquet has columns for every kind); keys of other names are the user's own and
are ignored.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
KIND_OF = {
    "text": "text",
    "prompt": "prompt and completion",
    "completion": "prompt and completion",
    "messages": "messages",
    "input_ids": "input_ids",
    "loss_mask": "input_ids",
    "token_weights": "input_ids",
}
KNOWN_KEYS = (*KIND_OF, "id", "weight")


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Completion:
    prompt: str
    completion: str


@dataclass(frozen=True)
class Message:
    role: str
    content: str
    weight: float = 1.0


@dataclass(frozen=True)
class Chat:
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Ids:
    """Ready-made ids. `loss_mask` and `token_weights` are None when the row has none."""

    input_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...] | None
    token_weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Row:
    """A valid row. `line` counts from 1: the line of a text file, the row of a Parquet file."""

    line: int
    content: Text | Completion | Chat | Ids
    id: str | None
    weight: float


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why."""

    line: int
    reason: str


class _Refused(Exception):
    """Carries the reason from where it is found to `parse_row`."""


def parse_row(line: int, values: object) -> Row | BadRow:
    """Turn one decoded JSON value or Parquet row into a `Row`, or say why it is none."""
    try:
        if not isinstance(values, Mapping):
            raise _Refused(f"a row must be a JSON object, not {_kind(values)}")
        present = {key: value for key, value in values.items() if value is not None}
        return Row(line, _content(present), _id(present.get("id")), _weight(present.get("weight", 1.0)))
    except _Refused as refused:
        return BadRow(line, str(refused))


def _content(values: Mapping[str, Any]) -> Text | Completion | Chat | Ids:
    kinds = list(dict.fromkeys(kind for key, kind in KIND_OF.items() if key in values))
    if not kinds:
        found = f"it has {', '.join(map(str, list(values)[:5]))}" if values else "it is empty"
        raise _Refused(f"a row needs text, prompt and completion, messages, or input_ids; {found}")
    if len(kinds) > 1:
        raise _Refused(f"a row must be of one kind, but this has {' as well as '.join(kinds)}")
    return _READERS[kinds[0]](values)


def _text(values: Mapping[str, Any]) -> Text:
    return Text(_filled("text", values["text"]))


def _completion(values: Mapping[str, Any]) -> Completion:
    for here, missing in (("prompt", "completion"), ("completion", "prompt")):
        if missing not in values:
            raise _Refused(f"{here} without {missing}")
    return Completion(_string("prompt", values["prompt"]), _filled("completion", values["completion"]))


def _chat(values: Mapping[str, Any]) -> Chat:
    messages = values["messages"]
    if not isinstance(messages, list) or not messages:
        raise _Refused("messages must be a list of at least one {role, content}")
    return Chat(tuple(_message(i, message) for i, message in enumerate(messages)))


def _message(i: int, message: object) -> Message:
    if not isinstance(message, Mapping):
        raise _Refused(f"messages[{i}] must be an object with role and content, not {_kind(message)}")
    try:  # its place is put into words only where something is wrong: that takes longer than to look
        return _message_of(message)
    except _Refused as refused:
        raise _Refused(f"messages[{i}]: {refused}") from None


def _message_of(values: Mapping[str, Any]) -> Message:
    role = values.get("role")
    if role not in ROLES:
        raise _Refused(f"role is {role!r}; allowed are {', '.join(ROLES)}")
    if values.get("tool_calls"):  # dropping it would leave a conversation that never took place
        raise _Refused("tool_calls are not supported; write the call into content")
    content = _string("content", values.get("content"))
    if (weight := values.get("weight")) is None:
        return Message(role, content)
    if role != "assistant":
        raise _Refused(f"weight belongs to messages of the assistant, not to one of role {role}")
    return Message(role, content, _weight(weight))


def _ids(values: Mapping[str, Any]) -> Ids:
    if "input_ids" not in values:
        raise _Refused(f"{'loss_mask' if 'loss_mask' in values else 'token_weights'} without input_ids")
    ids = values["input_ids"]
    if not isinstance(ids, list) or not ids:
        raise _Refused("input_ids must be a list of at least one integer")
    for i, value in enumerate(ids):
        if type(value) is not int or value < 0:
            raise _Refused(f"input_ids[{i}] is {value!r}; an id is an integer of at least 0")
    mask, weights = values.get("loss_mask"), values.get("token_weights")
    return Ids(
        tuple(ids),
        None if mask is None else _mask(mask, len(ids)),
        None if weights is None else _token_weights(weights, len(ids)),
    )


def _mask(mask: object, length: int) -> tuple[bool, ...]:
    for i, value in enumerate(values := _one_a_token("loss_mask", mask, length)):
        if type(value) not in (int, bool) or value not in (0, 1):
            raise _Refused(f"loss_mask[{i}] is {value!r}; allowed are 0 and 1")
    return tuple(map(bool, values))


def _token_weights(weights: object, length: int) -> tuple[float, ...]:
    values = _one_a_token("token_weights", weights, length)
    return tuple(_weight(value, f"token_weights[{i}]") for i, value in enumerate(values))


def _one_a_token(name: str, values: object, length: int) -> list[Any]:
    if not isinstance(values, list):
        raise _Refused(f"{name} must be a list, not {_kind(values)}")
    if len(values) != length:
        raise _Refused(f"{name} has {len(values)} entries for {length} input_ids")
    return values


def _id(value: object) -> str | None:
    if value is None:
        return None
    if type(value) is int:
        return str(value)
    return _string("id", value, "text or an integer")


def _weight(value: object, name: str = "weight") -> float:
    if type(value) not in (int, float):
        raise _Refused(f"{name} must be a number, not {_kind(value)}")
    try:
        weight = float(value)  # type: ignore[arg-type]
    except OverflowError:
        weight = math.inf
    if not (_fits_float32(weight) and weight >= 0):
        raise _Refused(f"{name} is {weight}; it must be at least 0 and below 3.4e38, as float32 can hold it")
    return weight


def _fits_float32(value: float) -> bool:
    """Whether it is finite as captures keep it."""
    try:
        return math.isfinite(*struct.unpack("f", struct.pack("f", value)))
    except OverflowError:
        return False


def _filled(name: str, value: object) -> str:
    text = _string(name, value)
    if not text:
        raise _Refused(f"{name} is empty")
    return text


def _string(name: str, value: object, allowed: str = "text") -> str:
    if not isinstance(value, str):
        raise _Refused(f"{name} must be {allowed}, not {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _Refused(f"{name} has half a surrogate pair at character {error.start + 1}; that is no text") from None
    return value


def _kind(value: object) -> str:
    """What JSON calls this type, for messages; other types (bytes, dates of Parquet) by their own name."""
    names = {type(None): "null", bool: "a boolean", str: "text", list: "a list", dict: "an object"}
    names |= {int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


_READERS: dict[str, Callable[[Mapping[str, Any]], Text | Completion | Chat | Ids]] = {
    "text": _text,
    "prompt and completion": _completion,
    "messages": _chat,
    "input_ids": _ids,
}
