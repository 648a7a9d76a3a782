"""Which ids a tokenizer puts around a text by itself, BOS in front, perhaps EOS behind, and those of a text without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from distill_assets.foundation.errors import ModelError, first_line
from distill_assets.foundation.tokenizers import panics_as_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXTS = ("a", "the", "1", ".", "\u4e00")


def inserted_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """(ids in front, ids behind) that encoding adds to every text, found by encoding one.

    Configuration does not tell: `add_bos_token` and a post-processor may contradict each other. The
    text is one the tokenizer has ordinary tokens for: an unknown one may become the very id that is inserted.
    Raises ModelError when no text's own ids are found between them.
    """
    special = set(tokenizer.all_special_ids)
    said = "no text can be encoded"
    for text in _TEXTS:
        try:
            [bare], [full] = (_encoded(tokenizer, [text], inserting) for inserting in (False, True))
        except ModelError:  # it has no token for a part of this one, and none for what is unknown
            continue
        for start in range(len(full) - len(bare) + 1):
            if special.isdisjoint(bare) and bare and full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
        said = f"encodes {text!r} as {bare} alone but as {full} with special tokens"
    raise ModelError(f"{type(tokenizer).__name__}: {said}, so what it inserts is unclear; use another tokenizer")


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, none inserted before or after it. ModelError when one has a part that is no token's."""
    return _encoded(tokenizer, texts, inserting=False) if texts else []


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], inserting: bool) -> list[list[int]]:
    try:
        with panics_as_errors():
            ids: list[list[int]] = tokenizer(
                list(texts),
                add_special_tokens=inserting,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )["input_ids"]
    except Exception as error:  # the library behind it raises this very kind
        raise ModelError(
            f"{type(tokenizer).__name__}: a text cannot be encoded ({first_line(error)}); use a tokenizer that has a "
            "token for what is unknown to it"
        ) from error
    return ids
