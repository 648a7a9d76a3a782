"""What a report is of, and its name; the files it is made of, and the models it tells of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill_assets.foundation.fingerprints import digest

REPORT_VERSION = 2  # part of a report's identity: raised when figures would come out differently
HTML_FILE, JSON_FILE, SUMMARY_FILE = "report.html", "report.json", "summary.md"
ROWS_FILE = "rows.parquet"
TEACHER, STUDENT, CONTROL, UNTRAINED = "teacher", "student", "control", "untrained"


def report_id(student_ids: Mapping[str, str], heldout: Sequence[tuple[str, str, str]], dense: Any) -> str:
    """16 hexadecimal digits: which students (`{"student": id, ...}`) on which held-out captures.

    `heldout` are (shard, version, capture id), in any order; `dense` is what the teacher's whole
    distribution is computed from, None where it is not.
    """
    return digest(
        {
            "report": REPORT_VERSION,
            "students": dict(student_ids),
            "heldout": sorted(map(list, heldout)),
            "dense": dense,
        }
    )
