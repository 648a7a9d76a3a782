"""The tokenizer check of a home, or of two models named on the command line."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_assets.foundation.errors import ModelError
from distill_assets.foundation.fingerprints import HashCache, digest
from distill_assets.foundation.model_folders import ModelFolder, resolve_model
from distill_assets.foundation.settings import Settings
from distill_assets.foundation.tokenizers import load_tokenizer, quiet_transformers
from distill_assets.teacher_capture.identity import CaptureSpec
from distill_assets.tokenizer_compatibility.compare import (
    TokenizerReport,
    TokenizerSide,
    compare_tokenizers,
    inherited_report,
)
from distill_assets.tokenizer_compatibility.facts import tokenizer_facts

CHECK_VERSION = 3  # part of a verdict's identity: raised when a verdict would come out differently

_reports: dict[str, TokenizerReport] = {}  # a verdict follows from its identity, so a process reaches it once


def configured_head_width(folder: ModelFolder) -> int | None:
    """Rows of the head as config.json says; None when it does not."""
    return _width(folder.config())


def _width(config: dict[str, Any]) -> int | None:
    inner = config.get("text_config")
    width = config.get("vocab_size", inner.get("vocab_size") if isinstance(inner, dict) else None)
    return width if isinstance(width, int) else None


def _tied(folder: ModelFolder) -> bool | None:
    """Whether the head is the input embedding, as transformers would build the model; None when it cannot tell."""
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(folder.path, trust_remote_code=False, local_files_only=True)
    except Exception:  # no configuration, or one that this version of transformers does not know
        return None
    tied = getattr(config.get_text_config(), "tie_word_embeddings", None)
    return tied if isinstance(tied, bool) else None


def student_head_width(settings: Settings, spec: CaptureSpec, student: ModelFolder | None) -> int:
    """Rows of the student's head: its own, its teacher's, or its configuration's (default: the real ids)."""
    origin = settings.student
    if origin.config is not None:
        return int(origin.config.get("vocab_size", spec.tokenizer.ids.n_real))
    folder = student or spec.teacher
    width = configured_head_width(folder)
    if width is None:
        raise ModelError(f"{folder.name}: config.json in {folder.path} names no vocab_size; add it")
    return width


def identity(settings: Settings, spec: CaptureSpec, student: ModelFolder | None, hashes: HashCache) -> str:
    """Hash of all that the verdict depends on."""
    return digest(
        {
            "check": CHECK_VERSION,
            "teacher": [spec.identity["tokenizer"], configured_head_width(spec.teacher)],
            "student": tokenizer_facts(student, hashes).fingerprint if student else None,
            "student_head": student_head_width(settings, spec, student),
            "accept": settings.tokenizer.accept,
        }
    )


def report(
    key: str,
    settings: Settings,
    spec: CaptureSpec,
    student: ModelFolder | None,
    own_texts: Callable[[], list[str]],
) -> TokenizerReport:
    """The verdict on a home's pair; `key` is its `identity`. `own_texts` are tried as probes too.

    They are no part of the identity: rules decide, and texts only show what rules that differ come to.
    """
    if key not in _reports:
        teacher = _side(spec.teacher)
        _reports[key] = (
            compare_tokenizers(teacher, _side(student), settings.tokenizer.accept, own_texts())
            if student
            else inherited_report(teacher, student_head_width(settings, spec, student))
        )
    return _reports[key]


def compare_models(teacher: str, student: str, root: Path) -> TokenizerReport:
    """The verdict on two models by name, without a home; weights are not needed."""
    sides = [_side(resolve_model(name, None, root, weights=False)) for name in (teacher, student)]
    return compare_tokenizers(sides[0], sides[1])


def _side(folder: ModelFolder) -> TokenizerSide:
    try:
        width = configured_head_width(folder)
    except ModelError:  # a tokenizer alone: its head is unknown, and the report says so
        width = None
    return TokenizerSide(folder.name, load_tokenizer(folder), width, _tied(folder))


@dataclass(frozen=True)
class WrittenVerdict:
    """What a tokenizer_report.json says, and the identity it was written for."""

    identity: str
    usable: bool
    verdict: str
    reasons: tuple[str, ...]


def written_verdict(file: Path) -> WrittenVerdict | None:
    """What was found out last; None when there is no report that can be read."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        return WrittenVerdict(told["identity"], told["usable"] is True, told["verdict"], tuple(told["reasons"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
