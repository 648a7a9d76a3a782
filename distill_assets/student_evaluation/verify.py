"""Reports on disk: are all four files of each there, as they were written, and of this very report?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill_assets.foundation.errors import UnreadableFile, first_line
from distill_assets.foundation.files import PARTIAL
from distill_assets.foundation.problems import FileListener, Problem
from distill_assets.foundation.written_files import changed_files, foreign_files
from distill_assets.student_evaluation.identity import HTML_FILE, JSON_FILE, ROWS_FILE, SUMMARY_FILE
from distill_assets.student_evaluation.per_row import RowSums

FILES = (HTML_FILE, JSON_FILE, SUMMARY_FILE, ROWS_FILE)
AGAIN = "delete the folder, then `distill run` writes it again if it is still wanted"


def verify_reports(reports: Path, on_file: FileListener) -> Iterator[Problem]:
    """Problems of the folders in `reports/`, current or not."""
    for folder in sorted(reports.glob("*")):
        if folder.name.startswith(PARTIAL):
            continue
        if not any((folder / name).exists() for name in FILES):
            yield Problem("orphaned", folder, "no report of ours; move it out of reports/")
            continue
        yield from foreign_files(folder, FILES)
        try:
            record = _record(folder)
            named = str(record["details"]["report_id"])
            written = dict(record.get("files", {}))  # reports written before there were hashes have none
            for name in FILES:
                if name not in written:
                    on_file(folder / name)
        except (OSError, ValueError, KeyError, TypeError, UnreadableFile) as error:
            yield Problem("damaged", folder, f"not whole ({first_line(error)}); {AGAIN}")
            continue
        if named != folder.name:
            yield Problem("mismatch", folder, f"by its {JSON_FILE} it is report {named}; {AGAIN}")
        yield from changed_files(folder, written, JSON_FILE, AGAIN, on_file)


def _record(folder: Path) -> dict[str, Any]:
    """What report.json says; one of the exceptions above when one of the files is gone or ends early."""
    page, summary = (folder / name for name in (HTML_FILE, SUMMARY_FILE))
    if not page.read_text(encoding="utf-8").rstrip().endswith("</html>"):
        raise ValueError(f"{page.name} ends early")
    if not summary.read_text(encoding="utf-8").strip():
        raise ValueError(f"{summary.name} is empty")
    RowSums.read(folder / ROWS_FILE)
    record: dict[str, Any] = json.loads((folder / JSON_FILE).read_text(encoding="utf-8"))
    if lacking := sorted({"verdict", "summary", "overall", "details"} - set(record)):
        raise ValueError(f"{JSON_FILE} lacks {lacking[0]}")
    return record
