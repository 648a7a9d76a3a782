"""Markdown with pictures for an asset's page: the web UI shows images that are part of the text."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate
from typing import Any

from distill_assets.capture_catalog.query import mass_by_rank
from distill_assets.foundation.wording import counted
from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.student_model.saving import StudentRecord

MOST_SHARDS, MOST_ROWS = 16, 8  # looked at for the picture: a home may hold millions of rows


def of_catalog(pipeline: Pipeline) -> str:
    """Sums over current captures, and the mass that the likeliest j ids of a position hold; "" without captures."""
    from distill_assets.student_evaluation.plots import draw_kept_mass  # matplotlib takes a second

    if not (sums := pipeline.catalog_summary()):
        return ""
    shards = [entry.capture.shard for entry in pipeline.entries[:MOST_SHARDS]]
    mass = mass_by_rank(pipeline.home.catalog, pipeline.home.captures, shards, MOST_ROWS)
    rows = {
        "shards": f"{sums['shards']:,}",
        "examples": f"{sums['examples']:,}",
        "tokens": f"{sums['tokens']:,}",
        "scored positions": f"{sums['supervised_tokens']:,}",
        "bytes a position": f"{sums['bytes_per_token']:.1f}",
        "ids kept": f"{sums['mean_kept_ids']:.1f}",
        "mass kept": f"{sums['mean_kept_mass']:.1%}",
    }
    looked_at = f"the first {MOST_ROWS} rows of {len(shards)} of {counted(sums['shards'], 'shard')}"
    return f"{_table(rows)}\n\n{_picture('mass kept', draw_kept_mass(list(accumulate(mass))))}\n\nFrom {looked_at}."


def of_student(record: StudentRecord) -> str:
    """What the student learnt from, and its losses over the steps."""
    from distill_assets.student_evaluation.plots import draw_curves

    report = record.report
    rows = {
        "kind": record.spec.kind,
        "captures": f"{len(record.spec.captures):,}",
        "rows": f"{report.rows:,}",
        "steps": f"{report.steps:,}",
        "supervised tokens": f"{report.supervised_tokens:,}",
        "seconds of training": f"{report.seconds:,.1f} on {report.device}",
    }
    picture = draw_curves({record.spec.kind: [asdict(point) for point in report.curve]})
    return f"{_table(rows)}\n\n{_picture('losses over the steps', picture)}"


def _table(rows: Mapping[str, Any]) -> str:
    lines: Sequence[str] = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---:|", *lines])


def _picture(words: str, png: bytes) -> str:
    return f"![{words}](data:image/png;base64,{base64.b64encode(png).decode('ascii')})"
