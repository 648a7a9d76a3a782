"""The report as a browser sees it: whole, self-contained, and safe against what tokens contain."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from distill_assets.student_evaluation.evaluation import Evaluation
from distill_assets.student_evaluation.identity import report_id
from distill_assets.student_evaluation.plots import draw_pictures
from distill_assets.student_evaluation.report import (
    Heldout,
    ReportDetails,
    ReportFiles,
    TrainedOn,
    as_markdown,
    visible,
    write_report,
)
from distill_assets.student_evaluation.wording import summary_rows, verdict
from distill_assets.student_model.vocabulary import FitReport
from tests import tiny

CURVES = {"student": [{"step": i, "loss": 3.0 / i, "kd": 2.0 / i, "ce": 4.0 / i} for i in range(1, 9)]}
DETAILS = ReportDetails(
    report_id="0123456789abcdef",
    teacher="models/<b>teacher</b>",
    student="layers 0, 2 of the teacher",
    student_id="aaaa000011112222",
    control_id="bbbb000011112222",
    heldout=(
        Heldout("heldout-a", "ab" * 32, "cccc000011112222", 0, FitReport(0, 0, 0, 0.0)),
        Heldout("heldout-b", "cd" * 32, "cccc000011112222", 0, FitReport(0, 0, 0, 0.0)),
    ),
    teacher_weights="ee" * 32,
    teacher_dtype="bfloat16",
    dense=False,
    n_ids=320,
    supervise="completion",
    max_length=128,
    targets={"kind": "top_k", "k": 8},
    training={"objective": "forward_kl", "learning_rate": 0.001},
    trained_on=TrainedOn(rows=70, positions=1234, steps=8),
)
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags nest; keeps attributes, text and ids of what was seen."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def written(evaluation: Evaluation, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> ReportFiles:
    return write_report(evaluation, CURVES, DETAILS, tokenizer, tmp_path / "report")


def page(files: ReportFiles) -> Page:
    return Page(files.html.read_text(encoding="utf-8"))


TAIL_SAMPLES = {"kind": "top_k", "k": 8, "min_probability": 0.02, "tail_samples": 3}


@pytest.mark.parametrize(
    ("targets", "training", "said", "unsaid"),
    [
        (DETAILS.targets, {}, "loss: KL(teacher || student) over the kept ids and one", "to be compared"),
        (DETAILS.targets, {"objective": "renormalized"}, "ids alone, both renormalised.", "one bucket for the rest."),
        (TAIL_SAMPLES, {"tail_sample_weight": 0.5}, "0.5 × the rest's probability × mean −log", "Jensen"),
        (TAIL_SAMPLES, {"tail_sample_weight": 0.0, "objective": "jsd"}, "loss: Jensen-Shannon", "tail samples)."),
        ({"kind": "sampled", "samples": 9}, {}, "loss: the sum of w × −log q over the kept ids", "Only ids of p"),
    ],
)  # fmt: skip
def test_says_what_the_student_minimised(
    evaluation: Evaluation, tokenizer: PreTrainedTokenizerFast, tmp_path: Path,
    targets: Mapping[str, Any], training: dict[str, Any], said: str, unsaid: str,
) -> None:  # fmt: skip
    details = replace(DETAILS, targets=targets, training=training)
    text = page(write_report(evaluation, CURVES, details, tokenizer, tmp_path / "report")).text
    training_part = text[text.index("Losses of each of") :].partition("By held-out shard")[0]
    assert said in training_part and unsaid not in training_part
    assert ("Only ids of p ≥ 0.02 were kept" in text) == ("min_probability" in targets)


def test_says_what_was_compared_and_how_it_came_out(written: ReportFiles, evaluation: Evaluation) -> None:
    text = page(written).text
    assert verdict(evaluation) in text
    for said in ("aaaa000011112222", "bbbb000011112222", "cccc000011112222", "models/<b>teacher</b>", "heldout-b"):
        assert said in text
    for said in ("k 8", "70 rows in 8 steps, 1,234 positions counting repeats", "learning rate 0.001"):
        assert said in text
    for row in summary_rows(evaluation):
        assert row["KL from teacher (nats a position)"].split(" ")[0] in text
    assert f"{evaluation.overall.n_positions:,} positions of 30 held-out rows" in text
    assert "upper bound" in text and "lower bound" in text


def test_loads_nothing_from_elsewhere(written: ReportFiles) -> None:
    source = written.html.read_text(encoding="utf-8")
    parsed = page(written)
    assert not parsed.all("script") and not parsed.all("link")
    for _, attributes in parsed.tags:
        for name in ("src", "href", "srcset", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
        assert not [name for name in attributes if name.startswith("on")]
    assert "url(" not in source and "@import" not in source
    policy = next(m["content"] for m in parsed.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")


def test_pictures_are_inline_and_described(written: ReportFiles) -> None:
    images = page(written).all("img")
    assert len(images) == len(written.pictures) == 4
    for image, png in zip(images, written.pictures.values(), strict=True):
        assert len(image["alt"] or "") > 20
        assert base64.b64decode((image["src"] or "").removeprefix("data:image/png;base64,")) == png


def test_hostile_tokens_stay_text(evaluation: Evaluation, tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>\u202e|`"
    tokenizer = tiny.train_tokenizer()
    tokenizer.add_tokens([hostile])
    evil = tokenizer.convert_tokens_to_ids(hostile)
    expected = dict.fromkeys(("teacher", "student", "control"), ((evil, 0.5),))
    samples = tuple(
        replace(s, context_ids=(evil,), gold_id=evil, expected=expected, row_id=hostile) for s in evaluation.samples
    )
    files = write_report(
        replace(evaluation, samples=samples), {}, replace(DETAILS, student=hostile), tokenizer, tmp_path / "report"
    )
    parsed = page(files)
    assert not parsed.all("script")
    assert len(parsed.all("img")) == len(files.pictures)
    assert parsed.text.count("<script>alert(1)</script>") >= 3 * len(samples)
    assert "\\u202e" in parsed.text
    context = re.search(r'class="context"><code>(.*?)</code>', files.html.read_text(encoding="utf-8"))
    assert context is not None and "\u202e" not in context[1]


def test_json_holds_the_figures_and_texts(
    written: ReportFiles, evaluation: Evaluation, tokenizer: PreTrainedTokenizerFast
) -> None:
    record = json.loads(written.json.read_text(encoding="utf-8"))
    assert record["verdict"] == verdict(evaluation)
    assert record["outcome"] == "closer"
    kl = evaluation.overall.models["student"]["kl_nats"]
    assert kl is not None and record["overall"]["models"]["student"]["kl_nats"]["value"] == kl.value
    assert record["details"]["heldout"][0]["shard"] == "heldout-a"
    assert record["curves"]["student"][-1]["step"] == 8
    for sample, told in zip(evaluation.samples, record["samples"], strict=True):
        assert told["gold"] == visible(tokenizer.decode([sample.gold_id]), spaces=True)
        assert told["expected"]["student"][0]["id"] == sample.expected["student"][0][0]


def test_replaces_the_folder_and_repeats_byte_for_byte(
    written: ReportFiles, evaluation: Evaluation, tokenizer: PreTrainedTokenizerFast
) -> None:
    before = written.html.read_bytes(), written.json.read_bytes()
    (written.html.parent / "left-over.txt").write_text("old", encoding="utf-8")
    again = write_report(evaluation, CURVES, DETAILS, tokenizer, written.html.parent)
    assert (again.html.read_bytes(), again.json.read_bytes()) == before
    assert sorted(f.name for f in again.html.parent.iterdir()) == [
        "report.html",
        "report.json",
        "rows.parquet",
        "summary.md",
    ]
    assert [f.name for f in again.html.parent.parent.iterdir()] == ["report"]


def test_without_control_and_with_one_shard(
    evaluation: Evaluation, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    scope = evaluation.overall
    models = {name: figures for name, figures in scope.models.items() if name != "control"}
    alone = replace(
        evaluation,
        overall=replace(scope, models=models, differences={}),
        shards=evaluation.shards[:1],
        entropy_bins=(),
        samples=(),
    )
    files = write_report(alone, {}, replace(DETAILS, control_id=None), tokenizer, tmp_path / "report")
    text = page(files).text
    assert "Nothing to compare the student with" in text
    assert "There is one, heldout-a, so its figures are those above." in text


def test_markdown_is_pure_and_small(evaluation: Evaluation) -> None:
    pictures = draw_pictures(evaluation, CURVES)
    markdown = as_markdown(evaluation, DETAILS, pictures)
    assert len(markdown) < 300_000
    assert markdown.startswith(f"**{verdict(evaluation)}**")
    images = re.findall(r"!\[[^\]]+\]\(data:image/png;base64,([A-Za-z0-9+/=]+)\)", markdown)
    assert [base64.b64decode(image) for image in images] == list(pictures.values())
    assert not re.search(r"<[a-z/]", markdown)
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    assert [line.count("|") for line in tables] == [8] * 6 + [6] * 4
    assert "KL from teacher" in markdown and "30 held-out rows" in markdown


def test_report_id_is_content() -> None:
    students = {"student": "a" * 16, "control": "b" * 16}
    heldout = [("h1", "v1", "c"), ("h2", "v2", "c")]
    made = report_id(students, heldout, None)
    assert re.fullmatch(r"[0-9a-f]{16}", made)
    assert report_id(dict(reversed(students.items())), heldout[::-1], None) == made
    others = [
        report_id({"student": "b" * 16, "control": "a" * 16}, heldout, None),
        report_id({"student": "a" * 16}, heldout, None),
        report_id(students, heldout[:1], None),
        report_id(students, [("h1", "v2", "c"), ("h2", "v1", "c")], None),
        report_id(students, [("h1", "v1", "d"), ("h2", "v2", "c")], None),
        report_id(students, heldout, ["weights", "float32"]),
    ]
    assert len({made, *others}) == 7


@pytest.mark.parametrize(
    ("text", "spaces", "shown"),
    [
        (" a\n", True, "␣a↵"),
        (" a\tb", False, " a⇥b"),
        ("\u202ex\x00", False, "\\u202ex\\u0000"),
        ("東é🙂", True, "東é🙂"),
    ],
)
def test_visible(text: str, spaces: bool, shown: str) -> None:
    assert visible(text, spaces) == shown
