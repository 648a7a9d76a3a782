"""Conversations as token ids, with the assistant's own tokens found by rendering.

A chat template is a program; nothing in its output says who wrote what. Two ways to know:
rendering the conversation up to a turn gives a prefix of the whole, so the turn is what is added;
or the template marks its turns with {% generation %}.

Legend: T = tokens, a span = (start, stop) in characters of the rendered text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distill_assets.dataset_shards.rows import Message
from distill_assets.foundation.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]
Weights = NDArray[np.float32]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARK = "\ufdd0content\ufdd0"  # begins with a code point that no text has

# Identity is content, never time: a template that prints today's date would give the same row other
# ids every day. Whatever day it asks for, it is this one (the default of Llama's own template).
_TODAY = {"%Y": "2024", "%m": "07", "%d": "26", "%b": "Jul", "%B": "July", "%A": "Friday", "%a": "Fri", "%y": "24"}
_DATE_MACRO = (
    "{%- macro strftime_now(format) -%}{%- set ns = namespace(text=format) -%}"
    + "".join(f"{{%- set ns.text = ns.text.replace('{code}', '{value}') -%}}" for code, value in _TODAY.items())
    + "{%- if '%' in ns.text -%}{{ raise_exception('it prints the time of day: ' + format) }}{%- endif -%}"
    "{{ ns.text }}{%- endmacro +%}"
)


class ChatProblem(Exception):
    """Why this conversation cannot be encoded; `str()` is the reason of a bad row."""


class ChatEncoder:
    """Renders and encodes conversations with a tokenizer's chat template.

    Raises ModelError when the tokenizer has no chat template or gives no character offsets.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise ModelError(
                "its rows are messages, but the teacher's tokenizer has no chat template; "
                "use prompt and completion rows, or a teacher with a template"
            )
        if not tokenizer.is_fast:
            raise ModelError(
                f"its rows are messages, but {type(tokenizer).__name__} does not tell which characters a token covers; "
                "use prompt and completion rows"
            )
        self._tokenizer = tokenizer
        template = tokenizer.get_chat_template()
        self._template = _DATE_MACRO + template if "strftime_now" in template else template
        self._added = np.array(sorted(tokenizer.added_tokens_decoder), dtype=np.int32)

    def encode(
        self, messages: Sequence[Message], max_length: int, every: bool
    ) -> tuple[Ids, Mask, Weights | None, bool]:
        """Ids [T], mask [T] and weights [T] of the conversation cut to `max_length`, and whether it was cut.

        Supervised is what the assistant writes: each of its turns' content and end-of-turn token,
        not the header before it; with `every`, all tokens. The weights are those of the turns, 1 between them, and None
        where no turn has one. Raises ChatProblem.
        """
        turns = [message.weight for message in messages if message.role == "assistant"]
        weighs_more_or_less = any(weight != 1 for weight in turns)
        text = self._render(messages)
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids_T = np.array(encoding["input_ids"][:max_length], dtype=np.int32)
        truncated = len(encoding["input_ids"]) > max_length
        if every and not weighs_more_or_less:
            return ids_T, np.ones(len(ids_T), dtype=bool), None, truncated
        offsets_T2 = np.array(encoding["offset_mapping"][:max_length], dtype=np.int64).reshape(-1, 2)
        mask_T, weights_T = np.full(len(ids_T), every), np.ones(len(ids_T), dtype=np.float32)
        try:
            spans = self._spans(messages, text, int(offsets_T2[:, 1].max(initial=0)))
            for span, weight in zip(spans, turns, strict=False):
                written_T = self._written(text, ids_T, offsets_T2, span)
                mask_T |= written_T
                weights_T[written_T] = weight
        except ChatProblem as problem:
            if weighs_more_or_less or not _GENERATION.search(self._template):  # marks do not say whose they are
                raise
            mask_T = self._marked_by_template(messages, str(problem))[:max_length]
        return ids_T, mask_T, weights_T if weighs_more_or_less else None, truncated

    def _spans(self, messages: Sequence[Message], text: str, limit: int) -> Iterator[tuple[int, int]]:
        """Span of each assistant turn that starts before `limit`.

        Turns behind it are cut off anyway, and rendering a prefix for each would cost quadratic time.
        """
        for i, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = self._up_to_content(messages[:i])
            if len(before) >= limit:
                return
            after = text if i + 1 == len(messages) else self._render(messages[: i + 1])
            if not after.startswith(before) or not text.startswith(after):
                raise ChatProblem(
                    f"the chat template renders messages[{i}] differently depending on what follows it, so the "
                    "assistant's tokens cannot be told apart; give prompt and completion rows, one a turn"
                )
            yield len(before), len(after)

    def _up_to_content(self, messages: Sequence[Message]) -> str:
        """The rendered text of `messages` and of the header of an assistant turn after them."""
        if messages and "add_generation_prompt" in self._template:
            return self._render(messages, add_generation_prompt=True)
        return self._render([*messages, Message("assistant", _MARK)]).partition(_MARK)[0]

    def _written(self, text: str, ids_T: Ids, offsets_T2: NDArray[np.int64], span: tuple[int, int]) -> Mask:
        """Tokens of one turn, without the blanks a template puts behind its end-of-turn token.

        A token belongs to the turn that its last character is in: some tokenizers trim blanks off
        the start of an offset, never off its end. An added token that begins in the header is part
        of the header even if it swallows blanks of the content.
        """
        start, stop = span
        is_added_T = np.isin(ids_T, self._added)
        inside_T: Mask = (offsets_T2[:, 1] > start) & (offsets_T2[:, 1] <= stop)
        inside_T &= ~(is_added_T & (offsets_T2[:, 0] < start))
        last_added = np.flatnonzero(inside_T & is_added_T)
        if len(last_added) and not text[offsets_T2[last_added[-1], 1] : stop].strip():
            inside_T[last_added[-1] + 1 :] = False
        return inside_T

    def _marked_by_template(self, messages: Sequence[Message], reason: str) -> Mask:
        encoding = self._apply(messages, return_dict=True, return_assistant_tokens_mask=True)
        mask_T: Mask = np.array(encoding["assistant_masks"], dtype=bool)
        if not mask_T.any():
            raise ChatProblem(f"{reason} (its generation marks are empty)")
        return mask_T

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        return str(self._apply(messages, tokenize=False, add_generation_prompt=add_generation_prompt))

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        values = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._tokenizer.apply_chat_template(values, chat_template=self._template, **options)
        except Exception as error:  # a template is its author's program and raises what it likes
            raise ChatProblem(
                f"the chat template refuses messages[:{len(messages)}] ({type(error).__name__}: {error})"
            ) from error
