"""Cron expressions, told from other text where Dagster, which reads them in the end, is not imported."""

from __future__ import annotations

import re

_NICKNAMES = ("@hourly", "@daily", "@midnight", "@weekly", "@monthly", "@yearly", "@annually")
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")


def _field(low: int, high: int, names: tuple[str, ...] = (), special: str = "") -> re.Pattern[str]:
    """Comma-separated: *, a value, a range, each with or without a step; or something special."""
    value = f"(?:{'|'.join((*(f'0?{n}' for n in range(low, high + 1)), *names))})"
    item = rf"(?:\*|{value}(?:-{value})?)(?:/0*[1-9][0-9]*)?{special}"
    return re.compile(rf"(?:{item})(?:,(?:{item}))*")


_FIELDS = (
    _field(0, 59),
    _field(0, 23),
    _field(1, 31, special=r"|l|\?"),
    _field(1, 12, _MONTHS),
    _field(0, 7, _WEEKDAYS, special=rf"|l[0-7]|(?:[0-7]|{'|'.join(_WEEKDAYS)})#[1-5]|\?"),
)


def is_cron(expression: str) -> bool:
    """Whether this is minute, hour, day, month and weekday as cron writes them, or a name such as @daily."""
    text = expression.strip().lower()
    parts = text.split()
    if text in _NICKNAMES:
        return True
    if len(parts) != len(_FIELDS) or not all(map(re.Pattern[str].fullmatch, _FIELDS, parts)):
        return False
    return not (parts[2] in ("30", "31") and parts[3] in ("2", "02", "feb"))
