"""The content of a tokenizer as loaded, and its hash.

As loaded, not as saved: transformers rebuilds some tokenizers from vocabulary and merges, so the
same files behave differently under another class. File paths and the truncation and padding that
earlier calls left in the backend are no content.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from distill_assets.foundation.fingerprints import digest
from distill_assets.foundation.inserted_ids import inserted_ids
from distill_assets.tokenizer_compatibility.probes import PROBES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL_ROLES = ("bos", "eos", "pad", "unk")


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hexadecimal digits that change whenever class, vocabulary, rules, special ids or template do."""
    return digest(
        {
            "class": type(tokenizer).__name__,
            "backend": backend_state(tokenizer) or _observed_state(tokenizer),
            "special_ids": special_ids(tokenizer),
            "inserted": inserted_ids(tokenizer),
            "chat_template": tokenizer.chat_template,
        }
    )


def backend_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The fast backend's own JSON without call state; {} for a tokenizer in Python, which has none."""
    if not tokenizer.is_fast:
        return {}
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    del state["truncation"], state["padding"]
    return state


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """Role -> id of the special tokens that have one."""
    return {role: getattr(tokenizer, f"{role}_token_id") for role in SPECIAL_ROLES}


def _observed_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A tokenizer in Python keeps its rules in code: what it does to the probes stands for them."""
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROBES]
    return {"vocabulary": tokenizer.get_vocab(), "probes": encoded}
