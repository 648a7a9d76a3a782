"""Several processes that train one student must decide alike."""

from __future__ import annotations

from typing import TypeVar

from accelerate.utils import broadcast_object_list

Told = TypeVar("Told")


def told_by_first(value: Told) -> Told:
    """What the first of the training processes says; where there is one, its own. All must ask."""
    told = [value]
    broadcast_object_list(told)
    return told[0]
