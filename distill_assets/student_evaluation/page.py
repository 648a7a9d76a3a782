"""What our HTML pages share: templates, filters, inline pictures."""

from __future__ import annotations

import base64
import json
from functools import lru_cache
from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template

from distill_assets.student_evaluation.wording import number


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def template(name: str) -> Template:
    """The template of this package with this name."""
    return _environment().get_template(name)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_source), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda share: number(100 * share, 1) + "%"
    environment.filters["shown"] = lambda value: value if isinstance(value, str) else json.dumps(value)
    environment.filters["number"] = number
    return environment


def _source(name: str) -> str:
    return files("distill_assets.student_evaluation").joinpath(name).read_text(encoding="utf-8")
