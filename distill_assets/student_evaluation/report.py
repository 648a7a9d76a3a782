"""The report: one self-contained HTML page, the same as JSON, and a Markdown summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_assets.foundation.files import replacing_folder, write_json, write_text
from distill_assets.foundation.written_files import hashes_below
from distill_assets.student_evaluation.bootstrap import REPLICATES
from distill_assets.student_evaluation.breakdowns import entropy_rows, shard_tables
from distill_assets.student_evaluation.calibration import N_BINS
from distill_assets.student_evaluation.completions import WRITTEN_TOKENS, Completion
from distill_assets.student_evaluation.evaluation import Evaluation
from distill_assets.student_evaluation.figures import Scope
from distill_assets.student_evaluation.identity import (
    HTML_FILE,
    JSON_FILE,
    REPORT_VERSION,
    ROWS_FILE,
    SUMMARY_FILE,
)
from distill_assets.student_evaluation.metrics import DENSE_METRICS, RECORD_METRICS
from distill_assets.student_evaluation.page import data_uri, template
from distill_assets.student_evaluation.samples import Ranked, Sample
from distill_assets.student_evaluation.wording import (
    calibration_rows,
    difference_rows,
    gap_sentences,
    number,
    summary_rows,
    verdict,
)
from distill_assets.student_model.vocabulary import FitReport

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from distill_assets.student_evaluation.plots import Curve


@dataclass(frozen=True)
class Heldout:
    """One held-out capture: shard key, shard version, capture id.

    `rows_trained_on` of its rows are among those the student learnt from, too; `fit` is what the ids that
    the student lacks cost.
    """

    shard: str
    version: str
    capture_id: str
    rows_trained_on: int
    fit: FitReport


@dataclass(frozen=True)
class TrainedOn:
    """What a student learnt from: rows, and supervised positions in all its steps together."""

    rows: int
    positions: int
    steps: int


@dataclass(frozen=True)
class ReportDetails:
    """What was compared, and whether against the whole distribution of the teacher.

    `teacher_weights` is their fingerprint. `targets` and `training` are shown as they are, name by name; `supervise`
    and `max_length` are those of the data, `n_ids` how many ids teacher and student share.
    `stopping` is of each student that early stopping watched, in words.
    """

    report_id: str
    teacher: str
    student: str
    student_id: str
    control_id: str | None
    heldout: tuple[Heldout, ...]
    teacher_weights: str
    teacher_dtype: str
    dense: bool
    n_ids: int
    supervise: str
    max_length: int
    targets: Mapping[str, Any]
    training: Mapping[str, Any]
    trained_on: TrainedOn
    stopping: Mapping[str, str] = field(default_factory=dict)

    @property
    def rows_trained_on(self) -> int:
        return sum(h.rows_trained_on for h in self.heldout)


@dataclass(frozen=True)
class ReportFiles:
    """Where the report lies; `pictures` are its PNGs by name."""

    html: Path
    json: Path
    pictures: Mapping[str, bytes]


def write_report(
    evaluation: Evaluation,
    curves: Mapping[str, Curve],
    details: ReportDetails,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> ReportFiles:
    """Write report.html, report.json, summary.md and rows.parquet into `folder`, which is replaced whole.

    `curves` are training curves by model: mappings with `step` and losses such as `ce` and `kd`.
    """
    # matplotlib takes most of a second, and whoever only asks for a report's name draws nothing.
    from distill_assets.student_evaluation.plots import draw_pictures

    pictures = draw_pictures(evaluation, curves)
    samples = [describe_sample(sample, tokenizer) for sample in evaluation.samples]
    completions = [describe_completion(completion, tokenizer) for completion in evaluation.completions]
    page = template("report.html.jinja").render(
        evaluation=evaluation,
        details=details,
        verdict=verdict(evaluation),
        parts=_parts(evaluation),
        calibration=calibration_rows(evaluation),
        gaps=gap_sentences(evaluation),
        by_shard=shard_tables(evaluation),
        by_entropy=entropy_rows(evaluation),
        samples=samples,
        completions=completions,
        n_bins=N_BINS,
        replicates=REPLICATES,
        fewest_rows=min([*(s.n_rows for s in evaluation.shards), *(b.n_rows for b in evaluation.entropy_bins)]),
        written_tokens=WRITTEN_TOKENS,
        pictures=[
            {"name": name, "source": data_uri(png), **_captions(evaluation, details)[name]}
            for name, png in pictures.items()
        ],
    )
    record = {
        "report": REPORT_VERSION,
        "details": asdict(details),
        "verdict": verdict(evaluation),
        "summary": summary_rows(evaluation),
        **evaluation.to_json(),
        "samples": [asdict(sample) | text for sample, text in zip(evaluation.samples, samples, strict=True)],
        "completions": [asdict(c) | text for c, text in zip(evaluation.completions, completions, strict=True)],
        "curves": {name: list(curve) for name, curve in curves.items()},
    }
    with replacing_folder(folder) as beside:
        write_text(beside / HTML_FILE, page)
        write_text(beside / SUMMARY_FILE, as_markdown(evaluation, details, pictures))
        evaluation.per_row.write(beside / ROWS_FILE)
        write_json(beside / JSON_FILE, record | {"files": hashes_below(beside)})
    return ReportFiles(folder / HTML_FILE, folder / JSON_FILE, pictures)


def as_markdown(evaluation: Evaluation, details: ReportDetails, pictures: Mapping[str, bytes]) -> str:
    """Verdict, summary and pictures as plain Markdown; pictures are inline base64."""
    scope = evaluation.overall
    parts = [
        f"**{verdict(evaluation)}**",
        *(
            _markdown_table(rows)
            for part in _parts(evaluation)
            for rows in (part["figures"], part["differences"])
            if rows
        ),
        f"On {_size(scope)}. In brackets: 95% bootstrap intervals over rows. KL and expected acceptance that are not "
        "called dense are on the kept ids and one bucket for the rest: a lower and an upper bound of the dense ones.",
        *gap_sentences(evaluation),
    ]
    for name, png in pictures.items():
        caption = _captions(evaluation, details)[name]
        parts.append(f"### {caption['title']}\n\n![{caption['alt']}]({data_uri(png)})")
    return "\n\n".join(parts) + "\n"


def _markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    lines = [list(rows[0]), ["---", *["---:"] * (len(rows[0]) - 1)], *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _parts(evaluation: Evaluation) -> list[dict[str, Any]]:
    """What is told of the models, and the differences, from the record and against the whole distribution."""
    scope = evaluation.overall
    record = {
        "title": "From the record",
        "figures": summary_rows(evaluation, RECORD_METRICS),
        "differences": difference_rows(scope, RECORD_METRICS),
        "metrics": RECORD_METRICS,
        "note": "What can be told without the teacher: its record keeps some ids of a position, and the rest as one. "
        "Which ids those are decides on KL and expected acceptance. "
        + (
            "The teacher's row compares it, computed again, with its own record: how far it is from 0 and 100% is what "
            "rounding and the machine account for; its perplexity is a figure like the others."
            if evaluation.is_dense
            else "The teacher's own figures come from its record: its KL, agreement and acceptance are what they are "
            "by definition."
        ),
    }
    dense = {
        "title": "Against the teacher's whole distribution",
        "figures": summary_rows(evaluation, DENSE_METRICS) if evaluation.is_dense else [],
        "differences": difference_rows(scope, DENSE_METRICS) if evaluation.is_dense else [],
        "metrics": DENSE_METRICS,
        "note": "The teacher was run again over these rows. Its own figures are what they are by definition.",
    }
    return [dense, record] if evaluation.is_dense else [record]


def _size(scope: Scope) -> str:
    return f"{scope.n_positions:,} positions of {scope.n_rows:,} held-out rows"


def _captions(evaluation: Evaluation, details: ReportDetails) -> dict[str, dict[str, str]]:
    """Title, caption and alternative text of each picture."""
    scope = evaluation.overall
    models = ", ".join(scope.models)
    binned = sum(b.n_positions for b in evaluation.entropy_bins)
    k = len(evaluation.kept_mass)
    last = number(100 * evaluation.kept_mass[-1], 1)
    return {
        "dense": {
            "title": "Figures against the whole distribution",
            "caption": f"Each model's figure and 95% interval, on {_size(scope)}.",
            "alt": f"Four panels with a dot and interval each for {models}; the same figures as in the table.",
        },
        "metrics": {
            "title": "Figures from the record",
            "caption": f"Each model's figure and 95% interval, on {_size(scope)}.",
            "alt": f"Four panels with a dot and interval each for {models}; the same figures as in the table.",
        },
        "entropy": {
            "title": "Where the teacher is sure, and where it is not",
            "caption": "Share of positions at which a model's likeliest token is the teacher's, and mean "
            f"{evaluation.kl.label}, in bins of the entropy of the teacher's next-token distribution, which the record "
            f"holds, with 95% bands; {binned:,} positions, equally many a bin.",
            "alt": "Lines of top-1 agreement in percent, and of KL in nats, over the teacher's entropy in nats, one "
            "line a model.",
        },
        "kept_mass": {
            "title": "What the record kept of the teacher",
            "caption": f"Mean summed probability of the j likeliest ids kept at a position, of at most {k}, "
            f"{number(evaluation.kept_ids, 1)} on average; a position with fewer counts with all it has"
            f"{_where_it_ends(details.targets)}. On {_size(scope)}.",
            "alt": f"A rising line of mean kept mass over the number of ids kept, {last}% with {k}.",
        },
        "loss": {
            "title": "Training",
            "caption": f"Losses of each of the {details.trained_on.steps:,} optimiser steps (faint), before its "
            "update, and their mean over a twentieth of them, centred on the step and shorter at the ends, in nats: "
            "the sum over the step's supervised positions, each times its own and its row's weight, divided by their "
            "number. What the student minimises is kd_weight × distillation loss + (1 − kd_weight) × cross-entropy, "
            f"the control its cross-entropy. {_loss_in_words(details)}",
            "alt": "Falling lines of training loss over optimiser steps.",
        },
    }


def _where_it_ends(targets: Mapping[str, Any]) -> str:
    """What a line of kept mass must not be taken for."""
    least = targets.get("min_probability")
    if not least:
        return ""
    return f". Only ids of p ≥ {least:g} were kept: where the line is flat, positions have no more of those"


def _loss_in_words(details: ReportDetails) -> str:
    """What the distillation loss is, and whether it may be compared."""
    targets, training = details.targets, details.training
    if targets.get("kind", "top_k") != "top_k":
        return (
            "Distillation loss: the sum of w × −log q over the kept ids, w being their weights and q the student's "
            "probability; on average KL over all ids and a constant, so it does not go to 0, and is not to be compared "
            "with that of other targets."
        )
    said = f"Distillation loss: {_DIVERGENCES[training.get('objective', 'forward_kl')]}"
    samples, weight = targets.get("tail_samples", 0), training.get("tail_sample_weight", 0.0)
    if not samples or not weight:
        return said + "."
    return said + (
        f", and {weight:g} × the rest's probability × mean −log of the student's probability, within the rest, of "
        f"{samples} ids that were drawn from it (tail samples). This last part is a cross-entropy: it does not go to "
        "0, and the loss is not to be compared with that of other targets or weights."
    )


_BUCKET = "over the kept ids and one bucket for the rest"
_DIVERGENCES = {
    "forward_kl": f"KL(teacher || student) {_BUCKET}",
    "reverse_kl": f"KL(student || teacher) {_BUCKET}",
    "jsd": f"Jensen-Shannon divergence {_BUCKET}",
    "renormalized": "KL(teacher || student) over the kept ids alone, both renormalised",
}


def describe_sample(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The texts of a sample: `context`, `gold`, and per model `(token, probability, id)` lists."""

    def ranked(ids: Ranked) -> list[dict[str, Any]]:
        return [{"id": i, "token": visible(tokenizer.decode([i]), spaces=True), "probability": p} for i, p in ids]

    return {
        "context": ("…" if sample.context_is_cut else "") + visible(tokenizer.decode(list(sample.context_ids))),
        "gold": visible(tokenizer.decode([sample.gold_id]), spaces=True),
        "expected": {name: ranked(ids) for name, ids in sample.expected.items()},
    }


def describe_completion(completion: Completion, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The texts of a completion: `prompt`, `gold`, and `written` by model."""

    def text(ids: Sequence[int]) -> str:
        return visible(tokenizer.decode(list(ids)))

    return {
        "prompt": ("…" if completion.prompt_is_cut else "") + text(completion.prompt_ids),
        "gold": text(completion.gold_ids),
        "written": {name: text(ids) for name, ids in completion.written_ids.items()},
    }


def visible(text: str | list[str], spaces: bool = False) -> str:
    """Text with line breaks, tabs and unprintable characters written out, on request spaces too."""
    out = []
    for character in text:
        if character in _SIGNS and (spaces or character != " "):
            out.append(_SIGNS[character])
        elif character.isprintable():
            out.append(character)
        else:
            out.append(f"\\u{ord(character):04x}")
    return "".join(out)


_SIGNS = {"\n": "↵", "\t": "⇥", "\r": "\\r", " ": "␣"}
