"""What is wrong with a file of a home, as a value every room can report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# damaged: not what was written; orphaned: nothing refers to it; missing: something refers to it and it is
# gone; mismatch: whole, but not what its name or the catalog says.
ProblemKind = Literal["damaged", "orphaned", "missing", "mismatch"]

FileListener = Callable[[Path], None]  # told of each file before it is read


@dataclass(frozen=True)
class Problem:
    """One problem of one file or folder; `message` says what is wrong and what to do."""

    kind: ProblemKind
    path: Path
    message: str
