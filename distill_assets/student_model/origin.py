"""What a student starts from, by name: nothing is loaded here."""

from __future__ import annotations

from distill_assets.foundation.errors import SettingsError
from distill_assets.foundation.fingerprints import HashCache, digest
from distill_assets.foundation.model_folders import ModelFolder
from distill_assets.foundation.settings import StudentSettings


def initial_weights_fingerprint(
    student: StudentSettings,
    teacher: ModelFolder,
    student_folder: ModelFolder | None,
    n_real: int,
    seed: int,
    hashes: HashCache,
) -> str:
    """Hash of what `initial_student` starts from, without loading it: files' content, layers, or a recipe."""
    if student.from_teacher_layers is not None:
        return digest({"teacher": teacher.fingerprint(hashes), "layers": student.from_teacher_layers})
    if student.config is not None:
        return digest({"config": {"vocab_size": n_real, **student.config}, "seed": seed})
    return digest({"model": given(student_folder).fingerprint(hashes)})


def require_layers(teacher: ModelFolder, layers: list[int]) -> None:
    """SettingsError unless the teacher's configuration has all `layers`; nothing is loaded."""
    n_layers = teacher.config().get("num_hidden_layers", teacher.config().get("n_layer"))
    if isinstance(n_layers, int) and layers[-1] >= n_layers:  # settings hold them increasing
        raise SettingsError(
            f"student.from_teacher_layers: layer {layers[-1]} does not exist; {teacher.name} has {n_layers} layers, "
            f"0 to {n_layers - 1}"
        )


def given(folder: ModelFolder | None) -> ModelFolder:
    """The resolved `student.model`; ValueError for a caller that forgot it."""
    if folder is None:
        raise ValueError("student.model needs its resolved folder")
    return folder
