from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from distill_assets.foundation.errors import IncompatibleTokenizers, SettingsError
from distill_assets.tokenizer_compatibility.compare import (
    TokenizerReport,
    TokenizerSide,
    compare_tokenizers,
    inherited_report,
    require_compatible,
)
from distill_assets.tokenizer_compatibility.markdown import as_markdown
from tests import tiny
from tests.tokenizer_compatibility import mutations as m


def compare(
    teacher: PreTrainedTokenizerFast,
    student: PreTrainedTokenizerFast,
    widths: tuple[int | None, int | None] = (320, 320),
    **options: Any,
) -> TokenizerReport:
    return compare_tokenizers(
        TokenizerSide("big", teacher, widths[0]), TokenizerSide("small", student, widths[1]), **options
    )


def names(report: TokenizerReport, blocking: bool) -> set[str]:
    return {difference.name for difference in report.differences if difference.blocking == blocking}


# change of the student -> verdict, what blocks, what is told
PAIRS: dict[str, tuple[Any, dict[str, Any], str, set[str], set[str]]] = {
    "nothing": (None, {}, "identical", set(), set()),
    "another eos": (None, {"eos_token": "<|pad|>"}, "identical", set(), {"special_tokens"}),
    "no pad": (None, {"pad_token": None}, "identical", set(), {"special_tokens"}),
    "another bos": (None, {"bos_token": "<|eos|>"}, "identical", set(), {"special_tokens"}),
    "inserted bos": (m.insert_bos, {"add_bos_token": True}, "identical", set(), {"inserted"}),
    "another template": (None, {"chat_template": "{{ messages[0].content }}"}, "identical", set(), {"chat_template"}),
    "no template": (None, {"chat_template": None}, "identical", set(), {"chat_template"}),
    "failing template": (None, {"chat_template": "{{ 1 / 0 }}"}, "identical", set(), {"chat_template"}),
    "same rendering": (None, {"chat_template": tiny.CHAT_TEMPLATE + "{# a comment #}"}, "identical", set(), set()),
    "a flag without effect": (m.not_special, {}, "identical", set(), {"added_tokens"}),
    "a rule without effect": (m.harmless_normalizer, {}, "identical", set(), {"normalizer"}),
    "ignored merges": (m.ignore_merges, {}, "identical", set(), {"merges"}),
    "swapped ids": (m.swap_ids, {}, "incompatible", {"token_ids", "segmentation"}, set()),
    "renamed special": (m.rename_special, {}, "incompatible", {"token_ids", "segmentation"}, {"chat_template"}),
    "other merges": (m.swap_merges, {}, "incompatible", {"segmentation"}, {"merges"}),
    "NFC": (m.nfc, {}, "incompatible", {"segmentation"}, {"normalizer"}),
    "lowercase": (m.lowercase, {}, "incompatible", {"segmentation"}, {"normalizer", "chat_template"}),
    "digits alone": (m.digits_alone, {}, "incompatible", {"segmentation"}, {"pre_tokenizer", "chat_template"}),
    "prefix space": (m.prefix_space, {}, "incompatible", {"segmentation"}, {"pre_tokenizer", "chat_template"}),
    "lstrip": (m.strip_left, {}, "incompatible", {"segmentation"}, {"added_tokens", "chat_template"}),
    "student lacks an id": (m.drop_last_merge_and_token, {}, "subset", set(), {"missing_ids", "merges"}),
    "teacher lacks an id": (m.add_special, {}, "subset", set(), {"extra_ids", "chat_template"}),
}


@pytest.mark.parametrize("name", PAIRS)
def test_verdicts(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    change, attributes, verdict, blocking, told = PAIRS[name]
    student = m.changed(tokenizer, change, **attributes)
    report = compare(m.changed(tokenizer), student, (320, 321 if "teacher lacks" in name else 320))
    told = told | ({"head_padding"} if "teacher lacks" in name else set())
    assert (report.verdict, names(report, True), names(report, False)) == (verdict, blocking, told)
    assert report.usable == (verdict != "incompatible")
    assert bool(report.reasons)
    assert json.loads(json.dumps(report.to_json()))["verdict"] == verdict
    if "segmentation" in blocking:
        assert report.probe is not None
        text = report.probe.text
        assert list(report.probe.teacher_ids) == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert list(report.probe.student_ids) == student(text, add_special_tokens=False)["input_ids"]
        assert report.probe.teacher_ids != report.probe.student_ids
        assert len(text) < 30


def test_the_first_differing_id_with_both_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    report = compare(tokenizer, m.changed(tokenizer, m.rename_special))
    assert report.first_difference is not None
    assert (report.first_difference.id, report.first_difference.teacher) == (4, "<|user|>")
    assert report.first_difference.student == "<|human|>"


def test_a_shorter_text_cannot_show_that_nfc_matters(tokenizer: PreTrainedTokenizerFast) -> None:
    report = compare(tokenizer, m.changed(tokenizer, m.nfc))
    assert report.probe is not None
    assert len(report.probe.text) == 2  # a letter and its mark


def test_missing_ids_are_those_of_the_teacher(tokenizer: PreTrainedTokenizerFast) -> None:
    report = compare(tokenizer, m.changed(tokenizer, m.drop_last_merge_and_token))
    assert report.missing_ids == (319,)
    assert report.to_json()["missing_ids"] == {"count": 1, "ranges": [[319, 319]]}
    assert (report.teacher.n_real, report.student.n_real) == (320, 319)
    assert compare(tokenizer, m.changed(tokenizer, m.add_special), (320, 330)).missing_ids == ()


@pytest.mark.parametrize(
    ("widths", "verdict", "blocking"),
    [
        ((320, 320), "identical", set()),
        ((384, 384), "identical", set()),
        ((384, 320), "padded", set()),
        ((320, 512), "padded", set()),
        ((None, 320), "identical", set()),
        ((319, 320), "incompatible", {"teacher_head"}),
        ((320, 300), "incompatible", {"student_head"}),
    ],
)
def test_heads(
    tokenizer: PreTrainedTokenizerFast, widths: tuple[int | None, int | None], verdict: str, blocking: set[str]
) -> None:
    report = compare(tokenizer, m.changed(tokenizer), widths)
    assert (report.verdict, names(report, True)) == (verdict, blocking)
    assert (report.teacher.head_width, report.student.head_width) == widths
    assert any("not known" in reason for reason in report.reasons) == (None in widths)


def test_two_families_are_told_apart_by_more_than_size(tokenizer: PreTrainedTokenizerFast) -> None:
    other = tiny.train_tokenizer(tiny.TEXT[::-1][:3])
    assert len(other) == len(tokenizer)
    report = compare(tokenizer, other)
    assert report.verdict == "incompatible" and report.first_difference is not None
    assert report.first_difference.id == next(
        i for i in range(320) if tokenizer.convert_ids_to_tokens(i) != other.convert_ids_to_tokens(i)
    )


def test_a_text_of_the_users_own_can_be_the_evidence(tokenizer: PreTrainedTokenizerFast) -> None:
    def odd(state: dict[str, Any]) -> None:
        state["normalizer"] = {"type": "Replace", "pattern": {"Regex": "zyz{2}yva"}, "content": "Ə"}

    student = m.changed(tokenizer, odd)
    unseen = compare(tokenizer, student)
    assert unseen.verdict == "incompatible" and unseen.probe is None
    assert "differ in normalizers" in unseen.reasons[0] and "cannot be shown" in unseen.reasons[0]
    report = compare(tokenizer, student, extra_probes=["A zyzzyva is a weevil."])
    assert report.verdict == "incompatible"
    assert report.probe is not None and report.probe.text == "zyzzyva"


def test_accepting_every_blocking_difference_makes_a_pair_usable(tokenizer: PreTrainedTokenizerFast) -> None:
    student = m.changed(tokenizer, m.rename_special)
    half = compare(tokenizer, student, accept=["token_ids"])
    assert not half.usable and half.accepted == ("token_ids",)
    report = compare(tokenizer, student, accept=["segmentation", "token_ids", "normalizer"])
    assert report.usable and report.verdict == "incompatible"
    assert report.accepted == ("token_ids", "segmentation")
    require_compatible(report)


def test_merges_left_out_at_random_block_and_no_text_is_evidence(tokenizer: PreTrainedTokenizerFast) -> None:
    def chance(state: dict[str, Any]) -> None:
        state["model"]["dropout"] = 0.3

    for sides in ((chance, chance), (chance, None), (None, chance)):
        report = compare(*(m.changed(tokenizer, side) for side in sides))  # type: ignore[arg-type]
        assert (report.verdict, names(report, True), report.probe) == ("incompatible", {"segmentation"}, None)
        named = " and the ".join(name for name, side in zip(("teacher's", "student's"), sides, strict=True) if side)
        assert report.reasons[0].startswith(f"the {named} dropout leaves out merges at random")


def test_decoders_are_told_apart_by_what_they_make_of_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    def no_decoder(state: dict[str, Any]) -> None:
        state["decoder"] = None

    def in_a_sequence(state: dict[str, Any]) -> None:
        state["decoder"] = {"type": "Sequence", "decoders": [state["decoder"]]}

    student = m.changed(tokenizer, no_decoder)
    report = compare(tokenizer, student)
    [difference] = report.differences
    assert (report.verdict, difference.name, difference.blocking) == ("identical", "decoder", False)
    ids, texts = difference.evidence["ids"], difference.evidence["texts"]
    assert texts == [tokenizer.decode(ids), student.decode(ids)] and texts[0] != texts[1]
    assert "become" in difference.detail
    [difference] = compare(tokenizer, m.changed(tokenizer, in_a_sequence)).differences
    assert difference.detail == "the decoders differ in writing only"


def test_a_token_the_other_side_has_elsewhere(tokenizer: PreTrainedTokenizerFast) -> None:
    def moved(state: dict[str, Any]) -> None:
        state["model"]["vocab"]["718"] = 330

    there = m.changed(tokenizer, moved)
    place = tokenizer.get_vocab()["718"]
    report = compare(tokenizer, there, (320, 331))
    told = f"id {place} is '718' in the teacher and no token in the student, which has it as id 330 (2 ids differ)"
    assert report.reasons[0] == told
    assert f"| {place} | `` 718 `` | 373138 | none |  |" in as_markdown(report)
    assert compare(there, tokenizer, (331, 320)).reasons[0] == (
        f"id {place} is no token in the teacher and '718' in the student; the teacher has it as id 330 (2 ids differ)"
    )


@pytest.mark.parametrize("name", ["nonsense", "teacher_head", "student_head"])
def test_names_that_cannot_be_accepted(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    with pytest.raises(SettingsError, match=rf"{name} .*token_ids, segmentation"):
        compare(tokenizer, tokenizer, accept=[name])


def test_the_guard_says_who_what_where_and_what_to_do(tokenizer: PreTrainedTokenizerFast) -> None:
    require_compatible(compare(tokenizer, tokenizer))
    with pytest.raises(IncompatibleTokenizers) as caught:
        require_compatible(compare(tokenizer, m.changed(tokenizer, m.rename_special)))
    message = str(caught.value)
    for part in ("big", "small", "id 4 is '<|user|>'", "'<|human|>'", "accept: [token_ids, segmentation]"):
        assert part in message
    assert len(message.splitlines()) == 1
    with pytest.raises(IncompatibleTokenizers, match="300 rows for 320 token ids") as caught:
        require_compatible(compare(tokenizer, tokenizer, (320, 300)))
    assert "accept" not in str(caught.value)


@pytest.mark.parametrize(
    ("teacher", "student", "verdict"),
    [(320, 320, "identical"), (384, 320, "padded"), (320, 319, "incompatible"), (300, 320, "incompatible")],
)
def test_an_inherited_tokenizer_leaves_only_the_heads(
    tokenizer: PreTrainedTokenizerFast, teacher: int, student: int, verdict: str
) -> None:
    report = inherited_report(TokenizerSide("big", tokenizer, teacher), student)
    assert report.verdict == verdict
    assert report.usable == (verdict != "incompatible")
    assert (report.probe, report.first_difference, report.missing_ids) == (None, None, ())
    assert report.student.n_real == 320
