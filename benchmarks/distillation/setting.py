"""How large everything is, and where it lies on disk once it is made."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .text import sources


@dataclass(frozen=True)
class Setting:
    """Sizes of text, teacher and students, and on which seeds. A seed sets initial weights and row order."""

    name: str
    vocabulary: int = 2048
    row_tokens: int = 192  # a longer document is cut into several rows
    teacher_tokens: int = 400_000  # seen once; the students' rows are among them
    student_tokens: int = 100_000
    heldout_tokens: int = 30_000
    teacher_width: int = 256
    teacher_layers: int = 6
    student_width: int = 128
    student_layers: int = 4
    teacher_batch_tokens: int = 1024
    student_batch_tokens: int = 1024
    teacher_learning_rate: float = 2.0e-3
    student_learning_rate: float = 3.0e-3
    first_seeds: tuple[int, ...] = (0, 1)
    fresh_seeds: tuple[int, ...] = tuple(range(200, 208))  # those from 100 on were seen while arms were added
    n_best: int = 6
    gradient_batches: int = 24

    def teacher_folder(self, cache: Path) -> Path:
        """Rows and teacher of this setting and these sources: another one has another folder."""
        made_of = {name: value for name, value in asdict(self).items() if name in _TEACHERS}
        return cache / f"teacher-{_digest(made_of | {'sources': sources()})}"

    def student_folder(self, cache: Path) -> Path:
        """Captures and students."""
        made_of = {name: value for name, value in asdict(self).items() if name in _STUDENTS}
        return cache / f"students-{_digest(made_of | {'teacher': self.teacher_folder(cache).name})}"


# What decides which rows and teacher, which students: what is asked of them besides changes none of them.
_TEACHERS = (
    *("vocabulary", "row_tokens", "teacher_tokens", "heldout_tokens", "teacher_width", "teacher_layers"),
    *("teacher_batch_tokens", "teacher_learning_rate"),
)
_STUDENTS = (
    *("student_tokens", "student_width", "student_layers", "student_batch_tokens", "student_learning_rate"),
    "gradient_batches",
)


def _digest(made_of: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:8]


FULL = Setting("full")
QUICK = Setting(
    "quick",
    teacher_tokens=150_000,
    student_tokens=40_000,
    heldout_tokens=12_000,
    teacher_width=192,
    teacher_layers=5,
    fresh_seeds=tuple(range(200, 205)),
    n_best=2,
    gradient_batches=8,
)
