"""Reports of the domain as Dagster metadata: what a person sees on an asset's page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from distill_assets.capture_catalog.refresh import CatalogReport
from distill_assets.orchestration.partitions import DATA_VERSION_TAG, shard_data_version
from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.student_evaluation.report import HTML_FILE, JSON_FILE, SUMMARY_FILE
from distill_assets.student_model.saving import StudentRecord
from distill_assets.teacher_capture.capture import CaptureReport
from distill_assets.teacher_capture.store import Capture
from distill_assets.tokenizer_compatibility.compare import TokenizerReport

WRITTEN = "file written"  # False when the capture was current and nothing was done
MOST_LISTED = 50  # rows of a table or list in a message; the catalog has them all

Metadata = dict[str, Any]


def of_capture(capture: Capture) -> Metadata:
    """Figures of one captured shard; numbers plot over partitions and time."""
    stats = capture.stats
    values: Metadata = {
        "rows": stats.rows,
        "rows captured": stats.rows_captured,
        "rows reused": stats.rows_reused,
        "tokens": stats.tokens,
        "supervised tokens": stats.supervised_tokens,
        "bytes": capture.bytes,
        "bytes per token": capture.bytes_per_token,
        "mean entropy (nats)": stats.mean_entropy,
        "mean kept mass": stats.mean_kept_mass,
        "mean ids kept": stats.mean_kept_ids,
        "teacher perplexity": stats.teacher_perplexity,
        "truncated rows": stats.truncated_rows,
        "bad rows": stats.bad_rows,
        "seconds": stats.seconds,
        "capture id": capture.capture_id,
        "file": dg.MetadataValue.path(capture.path),
    }
    if stats.tokens_per_second is not None:
        values["tokens per second"] = stats.tokens_per_second
    return values


def materialization_of(capture: Capture, description: str) -> dg.AssetMaterialization:
    """A capture as a record of its partition, with its own data version."""
    return dg.AssetMaterialization(
        "teacher_capture",
        partition=capture.shard,
        description=description,
        metadata=of_capture(capture),
        tags={DATA_VERSION_TAG: shard_data_version(capture.version, capture.capture_id)},
    )


def of_captures(captures: Sequence[Capture]) -> Metadata:
    """Sums of a run over several partitions."""
    return {
        "shards": len(captures),
        "rows captured": sum(c.stats.rows_captured for c in captures),
        "rows reused": sum(c.stats.rows_reused for c in captures),
    }


def of_capture_report(report: CaptureReport) -> Metadata:
    """`of_capture`, whether a file was written, and the rows that were skipped as bad."""
    values = of_capture(report.capture) | {WRITTEN: report.written}
    if report.bad_rows:
        values["skipped rows"] = dg.MetadataValue.md("\n".join(f"- {line}" for line in report.bad_rows[:MOST_LISTED]))
    return values


def of_tokenizers(report: TokenizerReport, file: Path) -> Metadata:
    return {
        "verdict": report.verdict,
        "reasons": "\n".join(report.reasons) or "none",
        "differences": ", ".join(difference.name for difference in report.differences) or "none",
        "file": dg.MetadataValue.path(file),
    }


def of_catalog(report: CatalogReport, pipeline: Pipeline) -> Metadata:
    """Sums, and the first captures as a table."""
    captures = [
        {
            "shard": entry.capture.shard,
            "role": entry.role,
            "examples": entry.capture.stats.rows,
            "tokens": entry.capture.stats.tokens,
            "bytes per token": round(entry.capture.bytes_per_token, 1),
            "mean entropy": round(entry.capture.stats.mean_entropy, 3),
            "kept mass": round(entry.capture.stats.mean_kept_mass, 4),
            "teacher perplexity": round(entry.capture.stats.teacher_perplexity, 2),
        }
        for entry in pipeline.entries[:MOST_LISTED]
    ]
    return {
        "shards": report.shards,
        "examples": report.examples,
        "tokens": report.tokens,
        "bytes": report.bytes,
        "superseded captures": report.superseded,
        "students": report.students,
        "capture files read": report.files_read,
        "captures": table(captures),
        "file": dg.MetadataValue.path(pipeline.home.catalog),
    }


def of_student(record: StudentRecord, folder: Path) -> Metadata:
    report = record.report
    return {
        "student id": record.spec.student_id,
        "rows": report.rows,
        "steps": report.steps,
        "supervised tokens": report.supervised_tokens,
        "seconds": report.seconds,
        "tokens per second": report.supervised_tokens / report.seconds,
        "loss of the last step": report.final_loss,
        "device": report.device,
        "folder": dg.MetadataValue.path(folder),
    }


def of_report(folder: Path) -> Metadata:
    """The summary with its pictures, and where the whole report lies."""
    return {
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
