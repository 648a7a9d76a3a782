"""One vocabulary under different loaders; folders that cannot be loaded, or not safely."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from distill_assets.foundation.errors import ModelError
from distill_assets.foundation.inserted_ids import inserted_ids, token_ids
from distill_assets.orchestration.compatibility import compare_models
from distill_assets.tokenizer_compatibility.compare import TokenizerReport, TokenizerSide, compare_tokenizers
from tests import tiny
from tests.tokenizer_compatibility import changes as c
from tests.tokenizer_compatibility.families import changed, trained


def compare(teacher: object, student: object) -> TokenizerReport:
    return compare_tokenizers(TokenizerSide("big", teacher, None), TokenizerSide("small", student, None))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def vocabulary_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    vocabulary = trained("wordpiece")["model"]["vocab"]
    file = tmp_path_factory.mktemp("slow") / "vocab.txt"
    file.write_text("\n".join(sorted(vocabulary, key=vocabulary.get)), encoding="utf-8")
    return str(file)


class Words(PreTrainedTokenizer):
    """Words between blanks, looked up in a list: rules in Python."""

    def __init__(self, words: list[str], separator: str | None = " ", **options: Any) -> None:
        self.ids = {word: i for i, word in enumerate(words)}
        self.separator = separator
        super().__init__(unk_token=words[0], **options)

    @property
    def vocab_size(self) -> int:
        return len(self.ids)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.ids)

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        return [word for word in text.split(self.separator) if word]

    def _convert_token_to_id(self, token: str) -> int:
        return self.ids.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return list(self.ids)[index]


WORDS = ["<unk>", "the", "quick", "brown", "fox", "a", "b"]


def fast_words(unknown: str = "<unk>") -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=unknown))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_a_slow_loader_that_agrees_may_pass_and_is_noted() -> None:
    report = compare(fast_words(), Words(WORDS))
    assert report.verdict == "identical", report.reasons
    [noted] = [d for d in report.differences if d.name == "loader"]
    assert "Words has rules in code" in noted.detail
    assert {line.result for line in report.compared if line.name in ("merges", "normalizer")} == {"not known"}


def test_texts_that_cannot_be_encoded_are_compared_too() -> None:
    without = fast_words("<none>")
    assert compare(without, fast_words("<none>")).verdict == "identical"
    report = compare(fast_words(), without)
    assert report.verdict == "incompatible" and report.probe is not None
    assert report.probe.student_tokens == ("(cannot be encoded)",) and set(report.probe.teacher_ids) == {0}
    assert "in the teacher and what cannot be encoded in the student" in report.reasons[0]
    with pytest.raises(ModelError, match=r"a text cannot be encoded \(.*\); use a tokenizer that has a token"):
        token_ids(without, ["a zebra"])
    assert inserted_ids(without) == ([], [])


def test_a_slow_loader_that_splits_at_other_blanks_is_found() -> None:
    report = compare(fast_words(), Words(WORDS, separator=None))
    assert report.verdict == "incompatible" and report.probe is not None
    assert not report.probe.text.strip()


def test_the_slow_loader_of_bert_drops_characters_that_the_fast_one_keeps(vocabulary_file: str) -> None:
    report = compare(changed("wordpiece"), BertTokenizerLegacy(vocabulary_file))
    assert report.verdict == "incompatible" and report.probe is not None
    assert unicodedata.category(report.probe.text) in ("Cn", "Co")


@pytest.mark.parametrize(
    "options", [{"do_lower_case": False}, {"tokenize_chinese_chars": False}, {"strip_accents": False}]
)
def test_a_slow_loader_that_segments_differently_is_found(vocabulary_file: str, options: dict[str, bool]) -> None:
    fast = changed("wordpiece", c.append("##犬"), c.append("犬"))
    file = Path(vocabulary_file)
    if options == {"tokenize_chinese_chars": False}:
        more = file.with_name("more.txt")
        more.write_text(file.read_text(encoding="utf-8") + "\n##犬\n犬", encoding="utf-8")
        file = more
    else:
        fast = changed("wordpiece")
    slow = BertTokenizerLegacy(str(file), **options)
    report = compare(fast, slow)
    assert report.verdict == "incompatible" and report.probe is not None
    text = report.probe.text
    assert fast(text, add_special_tokens=False)["input_ids"] == list(report.probe.teacher_ids)
    assert slow(text, add_special_tokens=False)["input_ids"] == list(report.probe.student_ids)
    assert report.probe.teacher_ids != report.probe.student_ids


def test_two_slow_loaders_of_one_vocabulary_pass() -> None:
    assert compare(ByT5Tokenizer(), ByT5Tokenizer()).verdict == "identical"


def test_a_loader_that_rebuilds_a_tokenizer_otherwise_is_found(tmp_path: Path) -> None:
    """The same vocabulary and merges: one class adds a normaliser and a pattern of its own."""
    plain = changed("byte_level")
    model = trained("byte_level")["model"]
    rebuilt = Qwen2Tokenizer(
        vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]],
        bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>", unk_token=None,
    )  # fmt: skip
    report = compare(plain, rebuilt)
    assert report.verdict == "incompatible"
    assert {"normalizer", "pre_tokenizer", "loader"} <= {d.name for d in report.differences}
    assert report.probe is not None and report.probe.teacher_ids != report.probe.student_ids


def test_another_class_with_the_same_rules_passes() -> None:
    class Another(PreTrainedTokenizerFast):
        pass

    plain = changed("byte_level")
    other = Another(tokenizer_object=plain.backend_tokenizer, bos_token="<|bos|>", eos_token="<|eos|>")
    report = compare(plain, other)
    assert report.verdict == "identical"
    assert "loader" in {d.name for d in report.differences}


def test_a_class_that_encodes_in_its_own_way_is_judged_by_what_it_does() -> None:
    class Shouting(PreTrainedTokenizerFast):
        def _encode_plus(self, text: object, *arguments: object, **options: object) -> object:
            loud = [t.upper() for t in text] if isinstance(text, list) else str(text).upper()
            return super()._encode_plus(loud, *arguments, **options)  # type: ignore[arg-type]

    plain = changed("byte_level")
    report = compare(plain, Shouting(tokenizer_object=plain.backend_tokenizer))
    assert report.verdict == "incompatible" and report.probe is not None
    assert report.probe.text.upper() != report.probe.text


def test_folders_of_tokenizers_alone_are_enough(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.save_pretrained(tmp_path / "a")
    tiny.save_model(tmp_path / "b", tokenizer, tie_word_embeddings=False)
    tiny.save_model(tmp_path / "c", tokenizer)
    report = compare_models("a", "b", tmp_path)
    assert (report.verdict, report.teacher.head_width, report.student.head_width) == ("identical", None, 320)
    assert "the teacher's head width is not known and was not compared" in report.reasons
    assert (report.teacher.tied, report.student.tied) == (None, False)
    [tied] = compare_models("b", "c", tmp_path).differences
    assert (tied.name, tied.blocking, tied.evidence) == ("tied_heads", False, {"teacher": False, "student": True})


def test_what_cannot_be_loaded_is_refused_with_the_reason(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for name in ("whole", "corrupt", "remote", "panicking"):
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "empty").mkdir()
    text = (tmp_path / "whole" / "tokenizer.json").read_text()
    (tmp_path / "corrupt" / "tokenizer.json").write_text(text[: len(text) // 2])
    rule = {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "?"}}
    (tmp_path / "panicking" / "tokenizer.json").write_text(json.dumps({**json.loads(text), **rule}))
    config = tmp_path / "remote" / "tokenizer_config.json"
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    config.write_text(json.dumps({**json.loads(config.read_text()), **own}))
    (tmp_path / "remote" / "own.py").write_text("raise SystemExit('was run')")
    for name, message in (
        ("empty", "empty: no tokenizer in"),
        ("corrupt", "corrupt: the tokenizer in .* cannot be loaded"),
        ("panicking", "panicking: the tokenizer in .* cannot be loaded"),
        ("remote", "remote: the tokenizer in .* needs code of its own"),
    ):
        with pytest.raises(ModelError, match=message) as caught:
            compare_models("whole", name, tmp_path)
        assert len(str(caught.value).splitlines()) == 1


def test_what_is_inserted_is_found_where_letters_are_unknown() -> None:
    """The unknown token may be the very one that is inserted."""

    def unknown_is_bos(state: dict[str, object]) -> None:
        model: dict[str, object] = state["model"]  # type: ignore[assignment]
        model["unk_token"] = "[CLS]"

    tokenizer = changed(
        "wordpiece", unknown_is_bos, c.insert("[CLS]"), c.setting("normalizer", None), c.rename("a", "A")
    )
    cls = trained("wordpiece")["model"]["vocab"]["[CLS]"]
    tokenizer.cls_token = "[CLS]"
    assert inserted_ids(tokenizer) == ([cls], [])
