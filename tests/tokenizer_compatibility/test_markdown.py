from __future__ import annotations

from distill_assets.tokenizer_compatibility.compare import TokenizerSide, compare_tokenizers, inherited_report
from distill_assets.tokenizer_compatibility.markdown import as_markdown, side_by_side
from tests.tokenizer_compatibility import changes as c
from tests.tokenizer_compatibility.families import changed


def test_the_verdict_comes_first_then_all_that_was_compared_then_the_evidence() -> None:
    student = changed("byte_level", c.rename("<|user|>", "<|human|>"))
    report = compare_tokenizers(
        TokenizerSide("big", changed("byte_level"), 320), TokenizerSide("small", student, 384), accept=["token_ids"]
    )
    told = as_markdown(report)
    assert told.startswith("**incompatible**: the pair cannot be used")
    assert len(report.compared) == 17
    assert {line.name: line.result for line in report.compared if line.result != "same"} == {
        "token_ids": "accepted",
        "segmentation": "blocks",
        "head_padding": "noted",
        "tied_heads": "not known",
        "chat_template": "noted",
    }
    for line in report.compared:
        assert f"| {line.what} | " in told
    assert "| 4 | `` <\\|user\\|> `` | 3c7c757365727c3e | `` <\\|human\\|> `` | 3c7c68756d616e7c3e |" in told
    assert report.probe is not None
    columns = list(zip(*side_by_side(report.probe), strict=True))
    assert [text for text in columns[0] if text] == list(report.probe.teacher_tokens)
    assert [int(i) for i in columns[3] if i] == list(report.probe.student_ids)
    lengths = {line.count("|") - line.count("\\|") for line in told.split("\n\n")[2].splitlines()}
    assert lengths == {4}


def test_a_pair_that_agrees_shows_no_evidence() -> None:
    side = TokenizerSide("big", changed("byte_level"), 320)
    told = as_markdown(compare_tokenizers(side, side))
    assert told.startswith("**identical**\n") and "The first id" not in told and "A text that" not in told
    assert "rows of the student's head" in as_markdown(inherited_report(side, 384))
