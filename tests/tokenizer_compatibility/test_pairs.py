"""Pairs made by changing real tokenizers: the verdict, its reasons, and whether the evidence is true.

No false accept: a pair that is let through is encoded again by both sides on thousands of texts made of
the pair's own tokens. No false reject: each pair that differs in writing only is here with the reason
why it may pass. The evidence of each `incompatible` is encoded again, apart from the code under test.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from distill_assets.tokenizer_compatibility.compare import TokenizerReport, TokenizerSide, compare_tokenizers
from distill_assets.tokenizer_compatibility.probes import PROBES
from tests.tokenizer_compatibility import changes as c
from tests.tokenizer_compatibility.families import Change, changed

IDS, TEXT = ("token_ids",), ("segmentation",)
BOTH = IDS + TEXT


@dataclass(frozen=True)
class Case:
    """`student`: changes of the student's JSON; `both`: of both sides' before that. `told`: what is noted besides.

    `shown`: whether a text is expected that shows the difference of segmentation.
    """

    student: tuple[Change, ...]
    verdict: str = "identical"
    blocks: tuple[str, ...] = ()
    told: tuple[str, ...] = ()
    both: tuple[Change, ...] = ()
    teacher: tuple[Change, ...] = ()
    widths: tuple[int | None, int | None] = (None, None)
    attributes: dict[str, Any] = field(default_factory=dict)
    shown: bool = True


def same(*student: Change, told: tuple[str, ...] = (), **more: Any) -> Case:
    return Case(student, told=told, **more)


def other(*student: Change, blocks: tuple[str, ...] = TEXT, told: tuple[str, ...] = (), **more: Any) -> Case:
    return Case(student, "incompatible", blocks, told, **more)


def subset(*student: Change, told: tuple[str, ...] = (), **more: Any) -> Case:
    return Case(student, "subset", told=told, **more)


NFC, NFD, NFKC, LOWER = ({"type": name} for name in ("NFC", "NFD", "NFKC", "Lowercase"))
DIGITS = {"type": "Digits", "individual_digits": True}
STRIP = {"type": "Strip", "strip_left": True, "strip_right": True}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
WEEVIL = {"type": "Replace", "pattern": {"String": "zyzzyva"}, "content": "weevil"}
NORM, PRE, MODEL, ADDED = "normalizer", "pre_tokenizer", "merges", "added_tokens"
CHAT, DECODER = "chat_template", "decoder"

BYTE_LEVEL = {
    "nothing": same(),
    "keys of the JSON in another order": same(c.keys_backwards),
    "merges as strings": same(c.merges_as_strings),
    "vocabulary sorted by token": same(c.vocabulary_sorted),
    "an added token listed twice": same(c.listed_twice),
    "state left by a call": same(c.call_state),
    "an empty normalizer": same(c.in_sequences("normalizer", "normalizers"), told=(NORM,)),
    "a pre-tokenizer in sequences": same(c.in_sequences("pre_tokenizer", "pretokenizers"), told=(PRE,)),
    "its pattern written out": same(c.split_written_out, told=(PRE,)),
    "offsets trimmed or not": same(c.setting("pre_tokenizer", "trim_offsets", False), told=(PRE,)),
    "dropout 0": same(c.setting("model", "dropout", 0.0), told=(MODEL,)),
    "an unknown token that never comes": same(c.setting("model", "unk_token", "<|bos|>"), told=(MODEL,)),
    "fusing what is never unknown": same(c.setting("model", "fuse_unk", True), told=(MODEL,)),
    "byte_fallback without byte tokens": same(c.setting("model", "byte_fallback", True), told=(MODEL,)),
    "an empty prefix": same(c.setting("model", "continuing_subword_prefix", ""), told=(MODEL,)),
    "an empty suffix": same(c.setting("model", "end_of_word_suffix", ""), told=(MODEL,)),
    "merges ignored that make every token": same(c.setting("model", "ignore_merges", True), told=(MODEL,)),
    "special or not": same(c.flag("<|user|>", "special", False), told=(ADDED,)),
    "normalized where nothing is": same(c.flag("<|user|>", "normalized"), told=(ADDED,)),
    "merges that cannot meet, swapped": same(c.move_merge("N", "u", 31), told=(MODEL,)),
    "a special token repeated by the model": same(
        c.append("<|x|>"), c.made_added("<|x|>"), c.flag("<|x|>", "special"), teacher=(c.add_special("<|x|>"),)
    ),
    "an identity replacement": same(
        c.normalizer_first({"type": "Replace", "pattern": {"String": "x"}, "content": "x"}), told=(NORM,)
    ),
    "stripping nothing": same(
        c.normalizer_first({"type": "Strip", "strip_left": False, "strip_right": False}), told=(NORM,)
    ),
    "NFC twice": same(c.normalizer_first(NFC), told=(NORM,), both=(c.normalizer_first(NFC),)),
    "NFC after NFKC, and NFKC": same(
        c.normalizer_last(NFC), told=(NORM,), both=(c.normalizer_first(NFKC),)
    ),
    "digits split twice": same(c.pre_tokenizer_first(DIGITS), told=(PRE,), both=(c.pre_tokenizer_first(DIGITS),)),
    "no decoder": same(c.setting("decoder", None), told=(DECODER,)),
    "BOS inserted": same(c.insert("<|bos|>"), told=("inserted",), attributes={"add_bos_token": True}),
    "another EOS": same(told=("special_tokens",), attributes={"eos_token": "<|pad|>"}),
    "another template": same(told=(CHAT,), attributes={"chat_template": "{{ messages[0].content }}"}),
    "two ids swapped": other(c.swap("the", "her"), blocks=BOTH),
    "two rare ids swapped": other(c.swap("718", "14"), blocks=BOTH),
    "a special token renamed": other(c.rename("<|user|>", "<|human|>"), blocks=BOTH, told=(CHAT,)),
    "two special tokens swapped": other(
        c.rename("<|user|>", "<|x|>"), c.rename("<|system|>", "<|user|>"), c.rename("<|x|>", "<|system|>"),
        blocks=BOTH, told=(CHAT,),
    ),
    "ids shifted by one": other(c.shift_by_one, blocks=BOTH, told=("extra_ids", CHAT)),
    "a token under an id that the other side lacks": other(
        c.setting("model", "vocab", "718", 330), blocks=BOTH, told=("missing_ids", "extra_ids")
    ),
    "a special token where the other side has none": other(
        c.add_special("<|t|>"), c.setting("model", "vocab", "<|t|>", 330),
        blocks=BOTH, told=("missing_ids", "extra_ids"), teacher=(c.add_special("<|t|>"),),
    ),
    "one id with two tokens on both sides": same(both=(c.drop("718"), c.add_special("<|new|>"))),
    "one id with two tokens on one side": other(
        c.add_special("<|new|>"), blocks=BOTH, both=(c.drop("718"),)
    ),
    "an id no text reaches, renamed": other(
        c.rename("spare", "reserved"), blocks=IDS, both=(c.append("spare"),)
    ),
    "a merge dropped": other(c.without_merge("h", "er"), told=(MODEL,)),
    "all merges dropped": other(c.setting("model", "merges", []), told=(MODEL, CHAT)),
    "a merge moved to the end": other(c.move_merge("e", "r", -1), told=(MODEL,)),
    "a merge moved to the front": other(c.move_merge("h", "e", 0), told=(MODEL,)),
    "merges backwards": other(c.merges_backwards, told=(MODEL,)),
    "merges ignored, of which one is lacking": other(
        c.setting("model", "ignore_merges", True), told=(MODEL,), both=(c.append("zeta"),)
    ),
    "NFC": other(c.normalizer_first(NFC), told=(NORM,)),
    "NFD": other(c.normalizer_first(NFD), told=(NORM,)),
    "NFKC instead of NFC": other(c.setting("normalizer", NFKC), told=(NORM,), both=(c.setting("normalizer", NFC),)),
    "lower case": other(c.normalizer_first(LOWER), told=(NORM, CHAT)),
    "stripping": other(c.normalizer_first(STRIP), told=(NORM, CHAT)),
    "a prefix": other(c.normalizer_first({"type": "Prepend", "prepend": " "}), told=(NORM, CHAT)),
    "a word replaced": other(c.normalizer_first(WEEVIL), told=(NORM,)),
    "digits alone": other(c.pre_tokenizer_first(DIGITS), told=(PRE, CHAT)),
    "digits in threes": other(c.pattern(c.DIGITS_IN_THREES), told=(PRE,), both=(c.add_merged("718", "15"),)),
    "a pattern of other words": other(c.pattern(r"\p{L}+|\s+|[^\s\p{L}]+"), told=(PRE, CHAT)),
    "add_prefix_space": other(c.setting("pre_tokenizer", "add_prefix_space", True), told=(PRE, CHAT)),
    "no pattern": other(c.setting("pre_tokenizer", "use_regex", False), told=(PRE,)),
    "no pre-tokenizer": other(c.setting("pre_tokenizer", None), blocks=BOTH, told=(PRE, CHAT)),
    "blanks dropped": other(c.pre_tokenizer_first({"type": "WhitespaceSplit"}), told=(PRE, CHAT)),
    "punctuation alone": other(c.pre_tokenizer_first({"type": "Punctuation", "behavior": "Isolated"}), told=(PRE,)),
    "lstrip": other(c.flag("<|user|>", "lstrip"), told=(ADDED,)),
    "rstrip": other(c.flag("<|pad|>", "rstrip"), told=(ADDED,)),
    "single_word": other(c.flag("<|pad|>", "single_word"), told=(ADDED,)),
    "normalized where capitals are": other(
        c.flag("<|user|>", "normalized"), told=(ADDED,), both=(c.normalizer_first(LOWER),)
    ),
    "an added token made ordinary": other(c.not_added("<|user|>"), told=(ADDED, CHAT)),
    "an ordinary token made added": other(c.made_added("her"), told=(ADDED,)),
    "special tokens split": other(told=(CHAT,), attributes={"split_special_tokens": True}),
    "a suffix": other(c.setting("model", "end_of_word_suffix", "e"), told=(MODEL, CHAT)),
    "a head padded": Case((), "padded", told=("head_padding",), widths=(320, 384)),
    "both heads padded alike": same(widths=(384, 384)),
    "one head unknown": same(widths=(None, 384)),
    "a head too narrow": other(blocks=("student_head",), told=("head_padding",), widths=(320, 319)),
    "the last token and its merge dropped": subset(c.drop_last(1), told=("missing_ids", MODEL)),
    "forty tokens dropped": subset(
        c.drop_last(40), told=("missing_ids", MODEL, "head_padding", CHAT), widths=(320, 280)
    ),
    "a token in the middle dropped": subset(c.drop("718"), told=("missing_ids", MODEL)),
    "a token appended": subset(c.add_merged("her", "e"), told=("extra_ids", MODEL)),
    "a special token appended": subset(c.add_special("<|extra|>"), told=("extra_ids",)),
    "each side has a token of its own": subset(
        c.add_merged("her", "e"), c.add_merged("her", "a"), c.drop("here"),
        told=("missing_ids", "extra_ids", MODEL), teacher=(c.add_merged("her", "e"),),
    ),
    "one id two special tokens": other(
        c.add_special("<|b|>"), blocks=BOTH, teacher=(c.add_special("<|a|>"),)
    ),
    "a part dropped of what stays": other(
        c.drop("718"), c.setting("model", "vocab", "7180", 320), told=("missing_ids", MODEL),
        both=(c.add_merged("718", "0"),),
    ),
    "a single word appended that hides another token": other(
        c.add_special("<|pad|><", single_word=True), told=("extra_ids",)
    ),
}  # fmt: skip

_NO_BYTES = tuple(c.drop(f"<0x{byte:02X}>") for byte in range(256))
FALLBACK = {
    "nothing": same(),
    "keys of the JSON in another order": same(c.keys_backwards),
    "merges as strings": same(c.merges_as_strings),
    "an added token listed twice": same(c.listed_twice),
    "a blank as a regular expression": same(c.space_as_regex, told=(NORM,)),
    "nothing is unknown, so no unknown token": same(c.setting("model", "unk_token", None), told=(MODEL,)),
    "nothing is unknown, so none fused": same(c.setting("model", "fuse_unk", False), told=(MODEL,)),
    "byte_fallback off where no bytes are": same(
        c.setting("model", "byte_fallback", False), told=(MODEL,), both=_NO_BYTES
    ),
    "merges of one token in another order": same(
        c.move_merge("in", "g", -2), told=(MODEL,),
        both=(c.add_merged("n", "g"), c.add_merged("i", "ng"), c.also_merged("in", "g")),
    ),
    "special or not": same(c.flag("</s>", "special", False), told=(ADDED,)),
    "BOS inserted": same(c.insert("<s>"), told=("inserted",)),
    "byte_fallback off": other(c.setting("model", "byte_fallback", False), blocks=BOTH, told=(MODEL,)),
    "two bytes swapped": other(c.swap("<0x41>", "<0xC3>"), blocks=BOTH),
    "a byte and its letter swapped": other(c.swap("<0x41>", "A"), blocks=BOTH),
    "two ids swapped": other(c.swap("▁the", "ther"), blocks=BOTH),
    "ids shifted by one": other(c.shift_by_one, blocks=BOTH, told=("extra_ids",)),
    "two merges that meet swapped": other(c.move_merge("l", "o", 7), told=(MODEL,)),
    "a merge dropped": other(c.without_merge("bl", "e"), told=(MODEL,)),
    "merges of three like letters in another order": other(
        c.move_merge("oo", "o", -2), told=(MODEL,), shown=False,
        both=(c.add_merged("o", "o"), c.add_merged("o", "oo"), c.also_merged("oo", "o")),
    ),
    "no prefix": other(c.without_normalizer_step(0), told=(NORM,)),
    "no replaced blanks": other(c.without_normalizer_step(1), blocks=BOTH, told=(NORM,)),
    "NFKC before": other(c.normalizer_first(NFKC), told=(NORM,)),
    "Metaspace instead": other(
        c.setting("normalizer", None), c.pre_tokenizer_first(METASPACE),
        told=(NORM, PRE),
    ),
    "digits alone": other(c.pre_tokenizer_first(DIGITS), told=(PRE,)),
    "BOS stripping to its right": other(c.flag("<s>", "rstrip"), told=(ADDED,)),
    "BOS normalized": other(c.flag("<s>", "normalized"), told=(ADDED, DECODER)),
    "tokens dropped": subset(c.drop_last(20), told=("missing_ids", MODEL)),
    "a special token appended": subset(c.add_special("<pad>"), told=("extra_ids",)),
}  # fmt: skip

UNIGRAM = {
    "nothing": same(),
    "keys of the JSON in another order": same(c.keys_backwards),
    "byte_fallback without byte tokens": same(c.setting("model", "byte_fallback", True), told=(MODEL,)),
    "a pre-tokenizer in sequences": same(c.in_sequences("pre_tokenizer", "pretokenizers"), told=(PRE,)),
    "NFC before NFKC": same(c.normalizer_first(NFC), told=(NORM,)),
    "two ids swapped": other(c.swap("▁the", "ther"), blocks=BOTH, told=(MODEL,)),
    "ids shifted by one": other(c.shift_by_one, blocks=BOTH, told=("extra_ids", MODEL)),
    "one score lowered": other(c.scores(lambda p, s: s - 20 if p == "▁the" else s), told=(MODEL,)),
    "one score a very little lower": other(
        c.scores(lambda p, s: s - 1e-9 if p == "he" else s), told=(MODEL,), shown=False
    ),
    "all scores equal": other(c.scores(lambda p, s: -3.0), told=(MODEL,)),
    "NFC instead of NFKC": other(
        c.without_normalizer_step(0), c.normalizer_first(NFC), told=(NORM,)
    ),
    "no normalizer": other(c.setting("normalizer", None), told=(NORM,)),
    "blanks not joined": other(c.without_normalizer_step(1), told=(NORM,)),
    "lower case": other(c.normalizer_first(LOWER), told=(NORM,)),
    "no blank in front": other(c.setting("pre_tokenizer", "prepend_scheme", "never"), told=(PRE,)),
    "a blank in front of the first only": other(c.setting("pre_tokenizer", "prepend_scheme", "first"), told=(PRE,)),
    "words not split": other(c.setting("pre_tokenizer", "split", False), told=(PRE,), both=(c.append("n▁", -0.5),)),
    "another unknown token": other(c.setting("model", "unk_id", 2), told=(MODEL,)),
    "an end token stripping": other(c.flag("</s>", "lstrip"), told=(ADDED,)),
    "a piece renamed": other(c.rename("▁slow", "▁slim"), blocks=BOTH),
    "the least likely piece dropped": subset(
        c.drop("ea"), told=("missing_ids", MODEL), both=(c.drop("ea"), c.append("ea", -9.0)),
    ),
    "a piece appended": subset(c.append("▁slim"), told=("extra_ids", MODEL)),
}  # fmt: skip

_MASK = "[MASK]"
WORDPIECE = {
    "nothing": same(),
    "keys of the JSON in another order": same(c.keys_backwards),
    "accents stripped as lower case does": same(c.setting("normalizer", "strip_accents", True), told=(NORM,)),
    "a mask stripping blanks that are dropped": same(c.flag(_MASK, "lstrip"), told=(ADDED,)),
    "pre-tokenized twice": same(c.pre_tokenizer_first({"type": "BertPreTokenizer"}), told=(PRE,)),
    "two ids swapped": other(c.swap("numbers", "looked"), blocks=BOTH),
    "a part and a word swapped": other(c.swap("e", "##e"), blocks=BOTH),
    "ids shifted by one": other(c.shift_by_one, blocks=BOTH, told=("extra_ids",)),
    "capitals kept": other(c.setting("normalizer", "lowercase", False), told=(NORM,)),
    "accents kept": other(c.setting("normalizer", "strip_accents", False), told=(NORM,)),
    "control characters kept": other(c.setting("normalizer", "clean_text", False), told=(NORM,)),
    "ideographs joined": other(
        c.setting("normalizer", "handle_chinese_chars", False), told=(NORM,), both=(c.append("##犬"), c.append("犬"))
    ),
    "another prefix": other(c.setting("model", "continuing_subword_prefix", "@@"), blocks=BOTH, told=(MODEL,)),
    "shorter words": other(c.setting("model", "max_input_chars_per_word", 20), told=(MODEL,)),
    "another unknown token": other(c.setting("model", "unk_token", "[PAD]"), told=(MODEL,)),
    "words by another pattern": other(c.setting("pre_tokenizer", {"type": "Whitespace"}), told=(PRE,)),
    "digits alone": other(c.pre_tokenizer_first(DIGITS), told=(PRE,)),
    "a mask found in small letters": other(c.flag(_MASK, "normalized"), told=(ADDED, DECODER)),
    "a mask that is a single word": other(c.flag(_MASK, "single_word"), told=(ADDED,)),
    "a piece that the model has on one side only": other(
        c.add_special("##zq"), both=(c.setting("normalizer", None),),
        teacher=(c.append("##zq"), c.made_added("##zq"), c.flag("##zq", "special")),
    ),
    "the last pieces dropped": subset(c.drop_last(3), told=("missing_ids",)),
    "a piece appended": subset(c.append("digital"), told=("extra_ids",)),
}  # fmt: skip

CASES: dict[tuple[str, str], Case] = {
    (family, name): case
    for family, cases in (
        ("byte_level", BYTE_LEVEL), ("fallback", FALLBACK), ("unigram", UNIGRAM), ("wordpiece", WORDPIECE),
    )
    for name, case in cases.items()
}  # fmt: skip


@pytest.mark.parametrize(("family", "name"), CASES)
def test_the_verdict_its_reasons_and_their_evidence(family: str, name: str) -> None:
    case = CASES[family, name]
    teacher = changed(family, *case.both, *case.teacher)
    student = changed(family, *case.both, *case.student, **case.attributes)
    report = compare_tokenizers(
        TokenizerSide("big", teacher, case.widths[0]), TokenizerSide("small", student, case.widths[1])
    )
    blocks, told = ({d.name for d in report.differences if d.blocking is blocking} for blocking in (True, False))
    assert (report.verdict, blocks, told) == (case.verdict, set(case.blocks), set(case.told))
    assert report.usable == (case.verdict != "incompatible") and report.reasons
    if report.usable:
        assert not disagreements(teacher, student)
    if "token_ids" in blocks:
        the_id_does_differ(report, teacher, student)
    if "segmentation" in blocks and case.shown:
        the_text_does_encode_differently(report, teacher, student)
    elif "segmentation" in blocks:
        assert report.probe is None and "cannot be shown" in report.reasons[0]


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    tokenizer.backend_tokenizer.encode_special_tokens = tokenizer.split_special_tokens
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def disagreements(teacher: PreTrainedTokenizerFast, student: PreTrainedTokenizerFast) -> list[str]:
    """Texts of the pair's own tokens and the corpus that get other ids, though both sides have all those ids."""
    shared = set(teacher.get_vocab().values()) & set(student.get_vocab().values())
    tokens = sorted({*teacher.get_vocab(), *student.get_vocab()})
    plain = [teacher.convert_tokens_to_string([token]) for token in tokens]
    random = Random(1)
    texts = [*PROBES, *plain, *("".join(random.choices(plain, k=random.randint(2, 5))) for _ in range(1500))]
    pairs = ((text, ids_of(teacher, text), ids_of(student, text)) for text in texts)
    return [text for text, ours, theirs in pairs if ours != theirs and shared.issuperset([*ours, *theirs])]


def the_id_does_differ(
    report: TokenizerReport, teacher: PreTrainedTokenizerFast, student: PreTrainedTokenizerFast
) -> None:
    first = report.first_difference
    assert first is not None
    assert first.teacher == teacher.convert_ids_to_tokens(first.id)
    assert first.student == student.convert_ids_to_tokens(first.id)
    assert (first.teacher, first.teacher_bytes) != (first.student, first.student_bytes)
    earlier = range(first.id)
    assert teacher.convert_ids_to_tokens(earlier) == student.convert_ids_to_tokens(earlier)


def the_text_does_encode_differently(
    report: TokenizerReport, teacher: PreTrainedTokenizerFast, student: PreTrainedTokenizerFast
) -> None:
    probe = report.probe
    assert probe is not None
    assert list(probe.teacher_ids) == ids_of(teacher, probe.text)
    assert list(probe.student_ids) == ids_of(student, probe.text)
    assert probe.teacher_ids != probe.student_ids
    assert [teacher.get_vocab()[token] for token in probe.teacher_tokens] == list(probe.teacher_ids)
    assert [student.get_vocab()[token] for token in probe.student_tokens] == list(probe.student_ids)
    assert len(probe.text) <= 30
    shorter = (probe.text[:i] + probe.text[i + 1 :] for i in range(len(probe.text)))
    shared = set(teacher.get_vocab().values()) & set(student.get_vocab().values())
    for text in shorter:  # no character of it is idle
        ours, theirs = ids_of(teacher, text), ids_of(student, text)
        assert ours == theirs or not shared.issuperset([*ours, *theirs])
