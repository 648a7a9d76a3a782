"""Which id a token is that an API names by its bytes only."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from distill_assets.foundation.errors import ModelError
from distill_assets.tokenizer_compatibility.sides import TokenizerSide

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACED = "\N{REPLACEMENT CHARACTER}".encode()  # what some servers write for a part of a character, whichever it is


def ids_by_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[bytes, int]:
    """Bytes -> the one id that stands for them in a text; special tokens by their names.

    Bytes that several ids stand for are left out, and those with a replacement character. Raises ModelError for a
    tokenizer that is not byte-level: its tokens write blanks and bytes in their own way, and lose some when decoded.
    """
    side = TokenizerSide(tokenizer.name_or_path, tokenizer, None)
    if not side.spelling.byte_level:
        raise ModelError(
            f"{type(tokenizer).__name__} ({side.name}) is not a byte-level tokenizer, so the bytes of a token do not "
            "tell its id; ask an engine that names ids"
        )
    bytes_of = {i: side.bytes_of(i) for i in side.tokens}
    times = Counter(bytes_of.values())
    return {said: i for i, said in bytes_of.items() if times[said] == 1 and _REPLACED not in said}
