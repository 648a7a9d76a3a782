"""One small real tokenizer of each family, trained on the spot, and its JSON changed and loaded again.

Legend: byte_level = BPE over bytes; fallback = BPE as converted from SentencePiece, with bytes for what
is unknown; unigram; wordpiece.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests import tiny

State = dict[str, Any]
Change = Callable[[State], State | None]

_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_TEXT = [
    *tiny.TEXT,
    "the theme of the other weather; there then, gather whether 1234 5678 90 100 1000",
    "lower lowest slower slow flow flown unbelievable believable able table stable",
    "snake_case don't can't re-do co-op <a> [b] {c} (d) and/or  two  blanks   three",
]
ROLES = {
    "byte_level": {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"},
    "fallback": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "unigram": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "wordpiece": {"unk_token": "[UNK]", "pad_token": "[PAD]", "mask_token": "[MASK]"},
}


def load(family: str, state: State, **attributes: Any) -> PreTrainedTokenizerFast:
    """A tokenizer from its backend's JSON; `attributes` are set on it afterwards."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **ROLES[family])
    tokenizer.chat_template = tiny.CHAT_TEMPLATE if family == "byte_level" else None
    for name, value in attributes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def changed(family: str, *changes: Change, **attributes: Any) -> PreTrainedTokenizerFast:
    """The family's tokenizer after `changes` of its JSON, each in place or by a new one."""
    state = copy.deepcopy(trained(family))
    for change in changes:
        state = change(state) or state
    return load(family, state, **attributes)


@cache
def trained(family: str) -> State:
    """The JSON of the family's tokenizer; do not change it."""
    state: State = json.loads(_TRAINED[family]().to_str())
    return state


def _byte_level() -> Tokenizer:
    return tiny.train_tokenizer().backend_tokenizer


def _fallback() -> Tokenizer:
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=[*specials, *_BYTES], show_progress=False)
    backend.train_from_iterator(_TEXT, trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in specials]
    backend = Tokenizer.from_str(json.dumps(state))
    backend.pre_tokenizer = None  # type: ignore[assignment]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def _unigram() -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=220, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(_TEXT, trainer)
    return backend


def _wordpiece() -> Tokenizer:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=320, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False
    )
    backend.train_from_iterator(_TEXT, trainer)
    return backend


_TRAINED = {"byte_level": _byte_level, "fallback": _fallback, "unigram": _unigram, "wordpiece": _wordpiece}
