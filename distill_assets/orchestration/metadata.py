"""Reports of the domain as Dagster metadata: what a person sees on an asset's page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from distill_assets.capture_catalog.refresh import CatalogReport
from distill_assets.foundation.wording import counted
from distill_assets.orchestration import summaries
from distill_assets.orchestration.partitions import (
    CODE_VERSION,
    CODE_VERSION_TAG,
    DATA_VERSION_TAG,
    INPUT_EVENT_TAG,
    INPUT_VERSION_TAG,
)
from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.orchestration.states import shard_data_version
from distill_assets.student_evaluation.identity import HTML_FILE, JSON_FILE, SUMMARY_FILE, TEACHER
from distill_assets.student_model.saving import StudentRecord
from distill_assets.teacher_capture.checks import AlignedReport, CompleteReport
from distill_assets.teacher_capture.plan import State
from distill_assets.teacher_capture.store import Capture
from distill_assets.tokenizer_compatibility.compare import TokenizerReport
from distill_assets.tokenizer_compatibility.markdown import as_markdown

if TYPE_CHECKING:
    from distill_assets.teacher_capture.capture import CaptureReport
    from distill_assets.teacher_capture.faithful import FaithfulReport

FILE = "file"
WRITTEN = "file written"  # False when the capture was current and nothing was done
MOST_LISTED = 50  # lines of a list in a message
MOST_CAPTURES = 20  # rows of the catalog's table on its page; the catalog has them all

Metadata = dict[str, Any]

# Of a capture file, whatever its targets: which of them it has, they say.
CAPTURE_COLUMNS = dg.TableSchema(
    [
        dg.TableColumn(name, type, description)
        for name, type, description in (
            ("row", "int32", "number in the shard"),
            ("key", "string", "hash of ids and mask"),
            ("id", "string", "the row's own id, if it has one"),
            ("input_ids", "list<int32>", "the tokens"),
            ("weight", "float", "training weight"),
            ("position_weights", "list<float>", "what each position counts besides (only where rows say so)"),
            ("positions", "list<int32>", "scored positions t; each is about token t+1"),
            ("support_ids", "list<list<int32>>", "kept ids of each position, likeliest first"),
            ("support_q", "list<list<uint8>>", "log-probability = -q/16 (precision: compact)"),
            ("support_logprobs", "list<list<float>>", "log-probability (precision: exact)"),
            ("weights", "list<list<float>>", "what a kept id counts in training (sampled, threshold)"),
            ("tail_sample_ids", "list<list<int32>>", "ids drawn from the rest (tail_samples)"),
            ("tail_logprob", "list<halffloat>", "log of the mass of all other ids"),
            ("gold_logprob", "list<halffloat>", "of the token that came"),
            ("entropy", "list<halffloat>", "of the whole distribution, nats"),
            ("truncated", "bool", "cut at data.max_length"),
        )
    ]
)


def of_capture(capture: Capture, written: bool) -> Metadata:
    """Figures of one captured shard; numbers plot over partitions and time.

    What making it cost is left out where nothing was made: it would be told of an earlier run.
    """
    stats = capture.stats
    values: Metadata = {
        WRITTEN: written,
        "rows": stats.rows,
        "tokens": stats.tokens,
        "supervised tokens": stats.supervised_tokens,
        "bytes": capture.bytes,
        "bytes per token": round(capture.bytes_per_token, 1),
        "mean kept mass": round(stats.mean_kept_mass, 4),
        "mean ids kept": round(stats.mean_kept_ids, 2),
        "truncated rows": stats.truncated_rows,
        "bad rows": stats.bad_rows,
        "capture id": capture.capture_id,
        FILE: dg.MetadataValue.path(capture.path),
    }
    if stats.mean_entropy is not None:
        values["mean entropy (nats)"] = round(stats.mean_entropy, 4)
    if stats.teacher_perplexity is not None:
        values["teacher perplexity"] = round(stats.teacher_perplexity, 3)
    if capture.derived_from:
        values["derived from"] = ", ".join(capture.derived_from)
    if written:
        values |= {
            "rows captured": stats.rows_captured,
            "rows reused": stats.rows_reused,
            "seconds": round(stats.seconds, 2),
        }
        if stats.tokens_per_second is not None:
            values["tokens per second"] = round(stats.tokens_per_second, 1)
    return values


def materialization_of(
    capture: Capture, written: bool, description: str, inputs: Mapping[str, tuple[str, str]] | None = None
) -> dg.AssetMaterialization:
    """A capture as a record of its partition, with its own data version. `inputs`: for each asset it was made
    from, the data version and the number of the event that told it.
    """
    tags = {DATA_VERSION_TAG: shard_data_version(capture.version, capture.capture_id)}
    if inputs:
        tags[CODE_VERSION_TAG] = CODE_VERSION
    for asset, (version, event) in (inputs or {}).items():
        tags |= {INPUT_VERSION_TAG.format(asset): version, INPUT_EVENT_TAG.format(asset): event}
    return dg.AssetMaterialization(
        "teacher_capture",
        partition=capture.shard,
        description=description,
        metadata=of_capture(capture, written),
        tags=tags,
    )


def of_capture_report(report: CaptureReport) -> Metadata:
    """`of_capture`, and the rows that were skipped as bad."""
    values = of_capture(report.capture, report.written)
    if report.bad_rows:
        values["skipped rows"] = dg.MetadataValue.md("\n".join(f"- {line}" for line in report.bad_rows[:MOST_LISTED]))
    return values


def why(states: Sequence[State], force: bool = False) -> str:
    """Why a run captures these shards, for its tags: `changed`, or `2 changed, 1 new`."""
    counts = Counter("forced" if force and state == "current" else state for state in states)
    return ", ".join(counts) if len(states) == 1 else ", ".join(f"{counts[state]} {state}" for state in sorted(counts))


def in_words(reports: Sequence[CaptureReport]) -> str:
    """What a run captured, for its tags."""
    made = [report.capture.stats for report in reports if report.written]
    captured, rows = sum(stats.rows_captured for stats in made), sum(stats.rows for stats in made)
    return f"{captured:,} of {counted(rows, 'row')}" if rows else "nothing, all was current"


def of_tokenizers(report: TokenizerReport, file: Path) -> Metadata:
    return {
        "verdict": report.verdict,
        "reasons": "\n".join(report.reasons) or "none",
        "differences": ", ".join(difference.name for difference in report.differences) or "none",
        "report": dg.MetadataValue.md(as_markdown(report)),
        "file": dg.MetadataValue.path(file),
    }


def of_complete(report: CompleteReport, problems: Sequence[str]) -> Metadata:
    return {
        "captures": report.captures,
        "rows": report.rows,
        "positions": report.positions,
        "problems": "\n".join(problems[:MOST_LISTED]) or "none",
    }


def of_aligned(report: AlignedReport) -> Metadata:
    """How often the likeliest id of position t is token t, t + 1, t + 2: counts and rates."""
    values: Metadata = {"positions": report.positions}
    for name, hits, rate in zip(("t", "t+1", "t+2"), report.hits, report.rates, strict=True):
        values |= {f"hits of token {name}": hits, f"rate of token {name}": round(rate, 4)}
    return values


def of_faithful(report: FaithfulReport) -> Metadata:
    """Each figure beside the noise it was compared with and the most that was allowed, nats."""
    values: Metadata = {"rows": report.rows, "positions": report.positions, "rows with a derived tail": report.derived}
    for name, found in report.figures.items():
        values |= {name: found.value, f"{name}: noise": found.noise, f"{name}: allowed": found.allowed}
    return values


def of_catalog(report: CatalogReport, pipeline: Pipeline) -> Metadata:
    """Sums, the summary with its picture, and below them the first captures as a table, as wide as the page."""
    first = pipeline.entries[:MOST_CAPTURES]
    captures = [
        {
            "shard": entry.capture.shard,
            "role": entry.role,
            "examples": entry.capture.stats.rows,
            "bytes per token": round(entry.capture.bytes_per_token, 1),
            "kept mass": round(entry.capture.stats.mean_kept_mass, 4),
            "teacher perplexity": _rounded(entry.capture.stats.teacher_perplexity, 2),
        }
        for entry in first
    ]
    return {
        "shards": report.shards,
        "examples": report.examples,
        "tokens": report.tokens,
        "bytes": report.bytes,
        "superseded captures": report.superseded,
        "students": report.students,
        "capture files read": report.files_read,
        "summary": dg.MetadataValue.md(summaries.of_catalog(pipeline)),
        "file": dg.MetadataValue.path(pipeline.home.catalog),
        "captures" if len(first) == report.shards else f"the first {len(first)} captures": table(captures),
    }


def _rounded(value: float | None, digits: int) -> float | str:
    return "not known" if value is None else round(value, digits)


def of_student(record: StudentRecord, folder: Path, written: bool) -> Metadata:
    """What the student learnt from; what that cost only where it was trained now."""
    report = record.report
    values: Metadata = {
        WRITTEN: written,
        "student id": record.spec.student_id,
        "rows": report.rows,
        "steps": report.steps,
        "supervised tokens": report.supervised_tokens,
        "loss of the last step": round(report.final_loss, 4),
        "teacher's mass on ids the student lacks": round(report.fit.mass_dropped, 6),
        "positions left out": report.fit.positions_dropped,
        "device": report.device,
        "summary": dg.MetadataValue.md(summaries.of_student(record)),
        "folder": dg.MetadataValue.path(folder),
    }
    if stopping := report.stopping:
        values["early stopping"] = stopping.in_words()
        values["step kept"] = stopping.kept_step
    if report.validation:
        values[f"validation {record.spec.judged_by}"] = round(report.validation[-1].loss, 4)
    if written:
        values["seconds"] = round(report.seconds, 2)
        values["tokens per second"] = round(report.supervised_tokens / report.seconds, 1)
    return values


def of_report(folder: Path) -> Metadata:
    """The verdict, figures that plot over time, the summary with its pictures, and where the report lies."""
    record = json.loads((folder / JSON_FILE).read_text(encoding="utf-8"))
    figures = {
        f"{model}: {record['metrics'][name]['label']}": round(estimate["value"], 4)
        for model, estimates in record["overall"]["models"].items()
        for name, estimate in estimates.items()
        if model != TEACHER
    }
    for closed in record["overall"]["closed"]:
        if closed["share"] is not None:
            figures[f"share of the gap closed ({closed['measure']})"] = round(closed["share"]["value"], 4)
    for model, found in record["calibration"].items():
        figures[f"{model}: calibration error"] = round(found["ece_share"], 4)
    return {
        "verdict": record["verdict"],
        "held-out positions": record["overall"]["n_positions"],
        **figures,
        "summary": dg.MetadataValue.md((folder / SUMMARY_FILE).read_text(encoding="utf-8")),
        "report": dg.MetadataValue.path(folder / HTML_FILE),
        "figures": dg.MetadataValue.path(folder / JSON_FILE),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> dg.TableMetadataValue:
    """Rows of plain values as a table on the asset's page."""
    plain = [{k: v if isinstance(v, str | int | float | bool) else str(v) for k, v in row.items()} for row in rows]
    columns = [dg.TableColumn(name, type=_type(plain, name)) for name in (plain[0] if plain else {})]
    return dg.MetadataValue.table(
        records=[dg.TableRecord(row) for row in plain], schema=dg.TableSchema(columns=columns)
    )


def _type(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    kinds = {type(row[name]) for row in rows}
    return "float" if kinds <= {int, float} else "string"
