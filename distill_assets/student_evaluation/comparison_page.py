"""A comparison of students as one self-contained HTML page, and as JSON."""

from __future__ import annotations

from pathlib import Path

from distill_assets.foundation.files import replacing_folder, write_json, write_text
from distill_assets.student_evaluation.bootstrap import REPLICATES
from distill_assets.student_evaluation.comparison import Comparison
from distill_assets.student_evaluation.page import data_uri, template
from distill_assets.student_evaluation.wording import MINUS, column, write_estimate

COMPARISON_FILE, COMPARISON_JSON = "comparison.html", "comparison.json"


def write_comparison(comparison: Comparison, folder: Path) -> Path:
    """Write comparison.html and comparison.json into `folder`, which is replaced whole; the page's path."""
    # matplotlib takes most of a second, and whoever only asks for help draws nothing.
    from distill_assets.student_evaluation.plots import draw_comparison

    names = comparison.names
    models = {f"{names[s.student_id]} {s.kind}": s.figures for s in comparison.students}
    picture = draw_comparison(models, comparison.measures)
    page = template("comparison.html.jinja").render(
        comparison=comparison,
        figures=figure_rows(comparison),
        differences=difference_rows(comparison),
        settings=setting_rows(comparison),
        picture=data_uri(picture),
        replicates=REPLICATES,
    )
    with replacing_folder(folder) as beside:
        write_text(beside / COMPARISON_FILE, page)
        write_json(beside / COMPARISON_JSON, comparison.to_json())
    return folder / COMPARISON_FILE


def figure_rows(comparison: Comparison) -> list[dict[str, str]]:
    """One row a student, ready to print; column headings are the keys, intervals are 95%."""
    return [
        {
            "student": comparison.names[s.student_id],
            "kind": s.kind,
            **{column(m): write_estimate(m, s.figures[m.key]) for m in comparison.measures},
            "positions": f"{comparison.n_positions:,}",
            "rows": f"{comparison.n_rows:,}",
        }
        for s in comparison.students
    ]


def difference_rows(comparison: Comparison) -> list[dict[str, str]]:
    """One row a student but the first: it minus the first, shares in percentage points."""
    first, *others = comparison.students
    names = comparison.names
    return [
        {
            "difference": f"{names[s.student_id]} {MINUS} {names[first.student_id]}",
            **{
                column(m, difference=True): write_estimate(m, s.differences[m.key], signed=True)
                for m in comparison.measures
            },
        }
        for s in others
    ]


def setting_rows(comparison: Comparison) -> list[dict[str, str]]:
    """One row a setting that is not the same for all, a column a student."""
    names = comparison.names.values()
    return [{"setting": name, **dict(zip(names, values, strict=True))} for name, values in comparison.settings.items()]
