"""Which captures a student learnt from, read from the student's own `distillation.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from distill_assets.foundation.files import PARTIAL

LINEAGE_FILE = "distillation.json"


@dataclass(frozen=True)
class StudentLineage:
    """A student and the captures it learnt from: (shard, version, capture_id, examples, chosen), of which the last
    has a bit for each row, the first row's first, and is None where it learnt from all.
    """

    student_id: str
    kind: str
    folder: str
    created: str
    captures: tuple[tuple[str, str, str, int, bytes | None], ...]


def read_lineages(students: Path) -> list[StudentLineage]:
    """Lineage of every whole student below `students`, by folder name.

    A record that cannot be read is left out: the catalog must not stop on a student somebody
    damaged, and the student's own loader says what is wrong with it.
    """
    lineages = []
    for file in sorted(students.glob(f"*/{LINEAGE_FILE}")):
        if file.parent.name.startswith(PARTIAL):
            continue
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            spec = record["spec"]
            captures = tuple(
                (str(c["shard"]), str(c["version"]), str(c["capture_id"]), int(c["rows"]), _chosen(c.get("chosen")))
                for c in spec["captures"]
            )
            lineages.append(
                StudentLineage(
                    student_id=spec["student_id"],
                    kind=spec["kind"],
                    folder=str(file.parent),
                    created=record["created"],
                    captures=captures,
                )
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return lineages


def _chosen(bits: str | None) -> bytes | None:
    return None if bits is None else bytes.fromhex(bits or "00")  # DuckDB knows no bit string without bits
