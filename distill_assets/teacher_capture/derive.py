"""Targets that stored ones can serve: fewer ids of each position, without the teacher.

A capture that kept the k likeliest ids holds the k' < k likeliest too, and those above a higher
probability; the mass of what is dropped joins the tail. Tail samples were drawn outside one support and
cannot stand for another: they serve none, and are left out. From a compact capture the threshold is met on rounded
log-probabilities, so ids within 1/32 nat of it may fall on either side; below 1.2e-7, where a byte ends, it drops none.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from distill_assets.foundation.errors import CaptureError
from distill_assets.foundation.settings import TargetSettings
from distill_assets.teacher_capture.chunks import told_identity
from distill_assets.teacher_capture.identity import CaptureSpec
from distill_assets.teacher_capture.reuse import KeyIndex
from distill_assets.teacher_capture.store import CaptureStore, read_capture


def can_serve(stored: Mapping[str, Any], wanted: TargetSettings) -> bool:
    """Whether captures with the target settings `stored` hold all that `wanted` asks for."""
    return (
        stored["kind"] == wanted.kind == "top_k"
        and not wanted.tail_samples
        and stored["k"] >= wanted.k
        and stored["min_probability"] <= wanted.min_probability
        and stored["precision"] in ("exact", wanted.precision)
    )


def sources(store: CaptureStore, spec: CaptureSpec) -> list[str]:
    """Other capture identities that differ in their target settings only and can serve these, best first:
    exact before compact, then the one that keeps least besides.
    """
    wanted = {name: value for name, value in spec.identity.items() if name != "targets"}
    found = []
    for capture_id in store.capture_ids():
        identity = _identity(store, capture_id) if capture_id != spec.capture_id else None
        if identity is None or {n: v for n, v in identity.items() if n != "targets"} != wanted:
            continue
        targets = identity["targets"]
        if can_serve(targets, spec.targets):
            besides = (targets["k"], -targets["min_probability"], targets.get("tail_samples", 0))
            found.append((targets["precision"] != "exact", *besides, capture_id))
    return [capture_id for *_, capture_id in sorted(found)]


def _identity(store: CaptureStore, capture_id: str) -> Mapping[str, Any] | None:
    for path in store.files(capture_id).values():
        try:
            return read_capture(path).identity
        except CaptureError:
            continue  # the next file of this identity says the same
    return next(filter(None, map(told_identity, store.all_unfinished(capture_id))), None)


def derivable(sources: Mapping[str, KeyIndex], keys: Collection[str]) -> dict[str, str]:
    """Those of `keys` that `sources`, by capture id, hold: each with the id of the first that does."""
    found: dict[str, str] = {}
    for capture_id, rows in sources.items():
        found |= {key: capture_id for key in keys if key not in found and key in rows}
    return found
