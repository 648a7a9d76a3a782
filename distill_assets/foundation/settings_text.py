"""distill.yaml as commented text, generated from the descriptions in `settings`.

Whoever writes a distill.yaml for a user writes it through here, so that comments and models
cannot diverge.
"""

from __future__ import annotations

import inspect
import math
import re
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from distill_assets.foundation.settings import (
    RECOMMENDED_TARGETS,
    Settings,
    Spec,
    StudentSettings,
    TeacherSettings,
)

_HEADER = """\
# What is made. Read afresh by every run: change a line, and only what depends on it is made again.
# How it is made (device, tokens a forward pass) is never said here. A key that is left out has its default.
"""


def init_text(teacher: str, student: str) -> str:
    """The commented distill.yaml of a new home: hub ids or folders of two models, the recommended targets, defaults
    for the rest.
    """
    return commented_settings(
        Settings(
            teacher=TeacherSettings(model=teacher),
            student=StudentSettings(model=student),
            targets=RECOMMENDED_TARGETS,
        )
    )


def commented_settings(settings: Settings) -> str:
    """YAML that `load_settings` reads back as equal `settings`, each key with its description beside it.

    A key without a value, or of another kind of targets, stands as a comment: it shows what could be said there.
    """
    lines = [_HEADER.rstrip("\n")]
    for name, field in Settings.model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, Spec):
            lines += ["", f"{name}:  # {_first_sentence(type(value))}", *_section(value)]
        else:
            lines += ["", _entry(name, value, field)]
    return "\n".join(lines) + "\n"


def _section(section: Spec) -> list[str]:
    fields = type(section).model_fields
    lines = []
    for name, field in fields.items():
        lines.append(f"  {'' if section.applies(name) else '# '}{_entry(name, getattr(section, name), field)}")
    return lines


def _entry(name: str, value: Any, field: FieldInfo) -> str:
    description = field.description or ""
    if get_origin(field.annotation) is Literal:
        choices = get_args(field.annotation)
        if not set(choices) <= set(re.findall(r"\w+", description)):
            description = f"{', '.join(map(str, choices))}: {description}"
    return f"{name}: {_flow(value)}  # {description}"


def _flow(value: Any) -> str:
    """A value as YAML on one line; an inline list takes scalars, lists and mappings alike."""
    value = value.model_dump() if isinstance(value, Spec) else value
    return yaml.safe_dump([value], default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf)[1:-2]


def _first_sentence(model: type[BaseModel]) -> str:
    return (inspect.getdoc(model) or "").splitlines()[0]
