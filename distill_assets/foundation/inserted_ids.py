"""Which ids a tokenizer puts around a text by itself, BOS in front, perhaps EOS behind, and those of a text without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from distill_assets.foundation.errors import ModelError

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
    for text in _TEXTS:
        bare = [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
        full = [int(i) for i in tokenizer(text, add_special_tokens=True)["input_ids"]]
        for start in range(len(full) - len(bare) + 1):
            if special.isdisjoint(bare) and bare and full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
    raise ModelError(
        f"{type(tokenizer).__name__}: encodes {text!r} as {bare} alone but as {full} with special tokens, "
        "so what it inserts is unclear; use another tokenizer"
    )


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, none inserted before or after it."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    return ids
