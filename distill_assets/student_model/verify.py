"""Students on disk read to their last byte: each file against its record."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from distill_assets.foundation.errors import ModelError, TrainingError, first_line
from distill_assets.foundation.files import PARTIAL
from distill_assets.foundation.model_folders import ModelFolder
from distill_assets.foundation.problems import FileListener, Problem
from distill_assets.foundation.tokenizers import load_tokenizer
from distill_assets.foundation.written_files import changed_files, foreign_files
from distill_assets.student_model.saving import ADAPTER, RECORD_FILE, read_student

AGAIN = "delete the folder, then `distill run` trains it again if it is still wanted"


def verify_students(students: Path, on_file: FileListener) -> Iterator[Problem]:
    """Problems of the folders in `students/`, current or not. The record holds a SHA-256 of every other file. Of an
    older student, whose record has none, a changed weight shows only where it is no number any more.
    """
    for folder in sorted(students.glob("*")):
        if folder.name.startswith(PARTIAL):
            continue
        if not (folder / RECORD_FILE).exists() and not list(folder.glob("*.safetensors")):
            yield Problem("orphaned", folder, "no student of ours; move it out of students/")
            continue
        on_file(folder / RECORD_FILE)
        yield from _verify_student(folder, on_file)


def _verify_student(folder: Path, on_file: FileListener) -> Iterator[Problem]:
    try:
        record = read_student(folder)
        if (named := record.spec.student_id) != folder.name:
            yield Problem("mismatch", folder, f"by its {RECORD_FILE} it is student {named}; {AGAIN}")
        saved = ModelFolder(folder.name, folder, None)
        saved.config()
        load_tokenizer(saved)
        weights = [*saved.weight_files(), *sorted((folder / ADAPTER).glob("*.safetensors"))]
    except (TrainingError, ModelError) as error:
        reason = str(error).partition("; ")[0]
        yield Problem("damaged", folder, f"{reason.removeprefix(f'{folder.name}: ')}; {AGAIN}")
        return
    yield from changed_files(folder, record.files, RECORD_FILE, AGAIN, on_file)
    if record.knows_all_files:
        yield from foreign_files(folder, {*record.files, RECORD_FILE})
        return
    for file in weights:
        if file.relative_to(folder).as_posix() not in record.files:
            on_file(file)
            if (found := _weights_problem(file)) is not None:
                yield Problem("damaged", file, f"{found}; {AGAIN}")


def _weights_problem(file: Path) -> str | None:
    """Reads the file tensor by tensor; its header says how long it must be."""
    try:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (a handle, not a mapping)
                if not torch.isfinite(weights.get_tensor(name)).all():
                    return f"weights {name} are not finite"
    except (OSError, SafetensorError) as error:
        return f"cannot be read to its end ({first_line(error)})"
    return None
