"""Targets that captures under other settings can serve without the teacher: the very ones, of rows that other data
settings encode alike, or fewer ids of each position.

A capture that kept the k likeliest ids holds the k' < k likeliest too, and those above a higher
probability; the mass of what is dropped joins the tail. Tail samples were drawn outside one support and
cannot stand for another: they serve none, and are left out. From a compact capture the threshold is met on rounded
log-probabilities, so ids within 1/32 nat of it may fall on either side; below 1.2e-7, where a byte ends, it drops none.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from distill_assets.foundation.settings import TargetSettings
from distill_assets.teacher_capture.chunks import told_identity
from distill_assets.teacher_capture.identity import CaptureSpec
from distill_assets.teacher_capture.reuse import KeyIndex
from distill_assets.teacher_capture.store import CaptureStore, WithoutDamaged, read_capture


def can_serve(stored: Mapping[str, Any], wanted: TargetSettings) -> bool:
    """Whether captures with the target settings `stored` hold all that `wanted` asks for."""
    return (
        stored["kind"] == wanted.kind == "top_k"
        and not wanted.tail_samples
        and stored["k"] >= wanted.k
        and stored["min_probability"] <= wanted.min_probability
        and stored["precision"] in ("exact", wanted.precision)
    )


@dataclass(frozen=True)
class Source:
    """Another capture identity whose rows can serve. `as_they_are`: only their encoding was asked for by other
    settings, and a row's key says what it came to.
    """

    capture_id: str
    as_they_are: bool


def sources(store: CaptureStore, spec: CaptureSpec) -> list[Source]:
    """Capture identities that differ in data or target settings only and can serve these targets, best first: the same
    ones, exact before compact, then the one that keeps least besides.
    """
    wanted = _of_teacher(spec.identity)
    found: list[tuple[tuple[Any, ...], Source]] = []
    for capture_id in store.capture_ids():
        identity = _identity(store, capture_id) if capture_id != spec.capture_id else None
        if identity is None or _of_teacher(identity) != wanted:
            continue
        targets = identity["targets"]
        if targets == spec.identity["targets"]:
            found.append(((0, capture_id), Source(capture_id, as_they_are=True)))
        elif can_serve(targets, spec.targets):
            besides = (targets["k"], -targets["min_probability"], targets.get("tail_samples", 0))
            found.append(((1, targets["precision"] != "exact", *besides, capture_id), Source(capture_id, False)))
    return [source for _, source in sorted(found, key=lambda each: each[0])]


def _of_teacher(identity: Mapping[str, Any]) -> dict[str, Any]:
    """All of a capture identity but what is asked of rows and of targets."""
    return {name: value for name, value in identity.items() if name not in ("encode", "targets")}


def _identity(store: CaptureStore, capture_id: str) -> Mapping[str, Any] | None:
    for path in store.files(capture_id).values():
        with WithoutDamaged():  # the next file of this identity says the same
            return read_capture(path).identity
    return next(filter(None, map(told_identity, store.all_unfinished(capture_id))), None)


def derivable(sources: Mapping[str, KeyIndex], keys: Collection[str]) -> dict[str, str]:
    """Those of `keys` that `sources`, by capture id, hold: each with the id of the first that does."""
    found: dict[str, str] = {}
    for capture_id, rows in sources.items():
        found |= {key: capture_id for key in keys if key not in found and key in rows}
    return found
