from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from distill_assets.tokenizer_compatibility.fingerprint import tokenizer_fingerprint
from tests.tokenizer_compatibility import mutations as m


def test_it_survives_saving_copying_and_loading(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere")
    loaded = {tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path / name)) for name in ("a", "elsewhere")}
    assert loaded == {tokenizer_fingerprint(tokenizer)}


def test_calls_with_truncation_and_padding_leave_no_trace(tokenizer: PreTrainedTokenizerFast) -> None:
    before = tokenizer_fingerprint(tokenizer)
    assert len(before) == 16 and int(before, 16) >= 0
    copy = m.changed(tokenizer)
    copy(["a b", "c"], truncation=True, max_length=2, padding="max_length")
    assert copy.backend_tokenizer.truncation is not None
    assert tokenizer_fingerprint(copy) == before


@pytest.mark.parametrize(
    ("change", "attributes"),
    [
        (m.swap_ids, {}),
        (m.swap_merges, {}),
        (m.add_special, {}),
        (m.nfc, {}),
        (m.digits_alone, {}),
        (m.strip_left, {}),
        (m.insert_bos, {"add_bos_token": True}),
        (None, {"eos_token": "<|pad|>"}),
        (None, {"pad_token": None}),
        (None, {"chat_template": "{{ messages }}"}),
    ],
)
def test_every_kind_of_content_changes_it(
    tokenizer: PreTrainedTokenizerFast, change: Any, attributes: dict[str, Any]
) -> None:
    same, other = m.changed(tokenizer), m.changed(tokenizer, change, **attributes)
    assert tokenizer_fingerprint(same) == tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)


def test_the_loader_class_is_content(tokenizer: PreTrainedTokenizerFast) -> None:
    class Another(PreTrainedTokenizerFast):
        pass

    other = Another(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>"
    )
    other.chat_template = tokenizer.chat_template
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)


def test_a_tokenizer_in_python_is_known_by_what_it_does() -> None:
    a, b, c = ByT5Tokenizer(), ByT5Tokenizer(), ByT5Tokenizer(extra_ids=10)
    assert not a.is_fast
    assert tokenizer_fingerprint(a) == tokenizer_fingerprint(b) != tokenizer_fingerprint(c)
