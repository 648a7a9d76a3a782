"""What a run would capture, and why, found without running anything.

A shard's state is decided by the store: `current` if a valid capture of this content exists under
this capture identity. The first that applies of: failed, new, settings_changed, changed, removed,
current.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from distill_assets.dataset_shards.discover import Discovery, Shard
from distill_assets.dataset_shards.encode import encode_shard
from distill_assets.foundation.errors import CaptureError, DistillError, EditedImport, PinnedCapture
from distill_assets.foundation.settings import TargetSettings
from distill_assets.foundation.wording import counted
from distill_assets.teacher_capture.derive import derivable, sources
from distill_assets.teacher_capture.identity import CaptureSpec
from distill_assets.teacher_capture.imported import imported_source
from distill_assets.teacher_capture.reuse import KeyIndex, captured_rows
from distill_assets.teacher_capture.store import Capture, CaptureStore, read_capture

State = Literal["failed", "new", "settings_changed", "changed", "removed", "current"]

FILE_BYTES = 6_000  # of a capture file before its first position: footer and the beginnings of its columns


@dataclass(frozen=True)
class ShardPlan:
    """One shard's state. Seconds are not estimated before the first capture, nor bytes of rows that cannot be read."""

    shard: str
    state: State
    reason: str
    rows: int | None
    rows_to_capture: int
    tokens_to_capture: int
    estimated_bytes: int | None = None
    estimated_seconds: float | None = None

    @property
    def is_to_capture(self) -> bool:
        """Whether a run would capture it. What failed before is tried again, unless its rows cannot be read at all, or
        it was imported.
        """
        return self.rows is not None and self.state != "current"


@dataclass(frozen=True)
class CapturePlan:
    """The whole plan: `shards` for people, `todo` for whoever runs it, and what its estimates are based on."""

    capture_id: str
    shards: tuple[ShardPlan, ...]
    todo: tuple[Shard, ...]
    problems: tuple[str, ...]
    basis: str


class _Stored:
    """What the store holds. Listed once a plan, and only if a shard asks: for each shard anew it would be quadratic."""

    def __init__(self, spec: CaptureSpec, store: CaptureStore) -> None:
        self.spec, self.store = spec, store

    @cached_property
    def shards(self) -> set[str]:
        """Shards of which any version was captured under this identity."""
        return self.store.known_shards(self.spec.capture_id)

    @cached_property
    def shards_elsewhere(self) -> set[str]:
        """Those under another."""
        return {shard for capture_id in self.store.capture_ids() for shard in self.store.known_shards(capture_id)}

    @cached_property
    def rows(self) -> KeyIndex:
        """Rows captured under this identity."""
        return captured_rows(self.store, self.spec.capture_id)

    @cached_property
    def rows_elsewhere(self) -> dict[str, KeyIndex]:
        """Rows that can serve, by capture id."""
        found = sources(self.store, self.spec)
        return {source.capture_id: captured_rows(self.store, source.capture_id) for source in found}


@dataclass(frozen=True)
class _Experience:
    """What captures cost: measured, or as a rule of thumb. `basis` says which, in words."""

    bytes_per_position: float
    tokens_per_second: float | None
    basis: str

    def bytes_of(self, positions: int) -> int:
        """Of a capture file with this many scored positions."""
        return round(FILE_BYTES + positions * self.bytes_per_position)


def plan_capture(
    spec: CaptureSpec, discovery: Discovery, store: CaptureStore, catalogued: Collection[str]
) -> CapturePlan:
    """Compare shards on disk with the store; `catalogued` are the shard keys of the catalog.

    Only shards that are not current are read and encoded.
    """
    experience, stored = _experience(spec, store), _Stored(spec, store)
    plans: list[ShardPlan] = []
    todo: list[Shard] = []
    problems: list[str] = []
    planned: set[str] = set()
    for problem in discovery.problems:
        plans.append(ShardPlan(problem.key, "failed", problem.message, None, 0, 0))
        problems.append(problem.message)
    for shard in discovery.shards:
        plan = _plan_shard(shard, stored, experience, planned)
        plans.append(plan)
        if plan.state != "current":
            todo.append(shard)
    present = {plan.shard for plan in plans}
    plans += [
        ShardPlan(key, "removed", "the file is gone; it leaves the catalog at the next run", None, 0, 0)
        for key in sorted(set(catalogued) - present)
    ]
    return CapturePlan(
        spec.capture_id, tuple(sorted(plans, key=lambda p: p.shard)), tuple(todo), tuple(problems), experience.basis
    )


def capture_states(spec: CaptureSpec, shards: Iterable[Shard], store: CaptureStore) -> list[State]:
    """The state of each shard, found without reading it."""
    stored = _Stored(spec, store)

    def state_of(shard: Shard) -> State:
        try:
            return _state(shard, stored)[0]
        except PinnedCapture:
            return "failed"

    return [state_of(shard) for shard in shards]


def _state(shard: Shard, stored: _Stored) -> tuple[State, str, Capture | None]:
    """The state, the reason, and the current capture; PinnedCapture for an import that does not fit."""
    try:
        if current := stored.store.current(stored.spec, shard):
            return "current", "imported" if current.is_imported else "captured as it is", current
    except EditedImport:
        return "changed", "edited since it was imported", None
    except PinnedCapture:
        raise
    except CaptureError as damaged:
        return "failed", str(damaged), None
    if message := stored.store.failure(stored.spec.capture_id, shard.key, shard.version):
        return "failed", message, None
    if shard.key in stored.shards:
        return "changed", "the content is not what was captured", None
    if shard.key in stored.shards_elsewhere:
        return "settings_changed", f"captured before, but not under capture {stored.spec.capture_id}", None
    return "new", "never captured", None


def _plan_shard(shard: Shard, stored: _Stored, experience: _Experience, planned: set[str]) -> ShardPlan:
    """`planned`, to which the shard's are added, are keys of rows that shards before it bring to the teacher."""
    try:
        state, reason, current = _state(shard, stored)
        if current:
            return ShardPlan(shard.key, state, reason, current.stats.rows, 0, 0)
        if stored.store.is_pinned(shard.key):
            return _plan_copy(shard, state, reason, stored)
        encoded = encode_shard(shard, stored.spec.encoder)
        rows = encoded.rows
        keys = {row.key for row in rows}
        missing = {key for key in keys if key not in stored.rows}
        others = derivable(stored.rows_elsewhere, missing)
    except DistillError as error:
        return ShardPlan(shard.key, "failed", str(error), None, 0, 0)
    if encoded.bad_rows:
        reason = f"the last try failed: {reason}" if state == "failed" else reason
        reason += f"; {counted(len(encoded.bad_rows), 'bad row')} left out"
    if others:
        reason += f"; {counted(len(others), 'row')} can be derived from {', '.join(sorted(set(others.values())))}"
    missing -= others.keys()
    if twice := missing & planned:
        reason += f"; {counted(len(twice), 'row')} captured with shards before it"
        missing -= twice
    new = {row.key: row for row in rows if row.key in missing}
    planned.update(new)
    tokens = sum(len(row.input_ids) for row in new.values())
    positions = sum(int(row.loss_mask[1:].sum()) for row in rows)
    return ShardPlan(
        shard=shard.key,
        state=state,
        reason=reason,
        rows=len(rows),
        rows_to_capture=len(new),
        tokens_to_capture=tokens,
        estimated_bytes=experience.bytes_of(positions),
        estimated_seconds=round(tokens / experience.tokens_per_second, 1) if experience.tokens_per_second else None,
    )


def _plan_copy(shard: Shard, state: State, reason: str, stored: _Stored) -> ShardPlan:
    """Of an imported shard that was edited; PinnedCapture for a row that was not imported."""
    rows = encode_shard(shard, stored.spec.encoder.of_imported()).rows
    source, _ = imported_source(stored.spec, shard, stored.store, rows)
    positions = sum(int(row.loss_mask[1:].sum()) for row in rows)
    return ShardPlan(
        shard.key,
        state,
        f"{reason}; each of its rows was",
        len(rows),
        0,
        0,
        round(positions * source.bytes_per_token),
        0.0,
    )


def _experience(spec: CaptureSpec, store: CaptureStore) -> _Experience:
    """From captures under this identity; else speed from all there are, and bytes by a rule of thumb."""
    own = _readable(store.files(spec.capture_id).values())
    seen = own or [c for i in store.capture_ids() for c in _readable(store.files(i).values())]
    run = [capture.stats for capture in seen if capture.stats.tokens_captured]
    seconds = sum(stats.seconds for stats in run)
    speed = sum(stats.tokens_captured for stats in run) / seconds if seconds > 0 else None
    said = f"{speed:,.0f} tokens/s" if speed else "no speed yet"
    if own:
        positions = sum(capture.stats.supervised_tokens for capture in own)
        n_bytes = max(0.0, sum(capture.bytes for capture in own) - FILE_BYTES * len(own)) / positions
        measured = f", measured on {counted(len(own), 'capture')} under these settings"
        basis = f"{said} and {n_bytes:.0f} bytes a scored position{measured}"
    else:
        n_bytes, rule = _rule_of_thumb(spec.targets)
        source = (
            f", measured on {counted(len(seen), 'capture')} under other settings"
            if speed
            else " before the first capture"
        )
        basis = f"{said}{source}; {n_bytes:.0f} bytes a scored position, {rule}"
    return _Experience(n_bytes, speed, f"{basis}; {FILE_BYTES / 1000:.0f} kB a file besides")


def _rule_of_thumb(targets: TargetSettings) -> tuple[float, str]:
    """Bytes a position and where they are from: what benchmarks/storage.py measures of each kind.

    How many ids are kept where that is not k depends on how sure the teacher is. The powers were fitted to the
    dense distributions of SmolLM2-135M over 3,072 positions of Python's documentation (mean entropy 2.8 nats); they
    are within 7% of them for 1 to 256 samples, tau of 0.001 to 0.2, and min_probability of 0.0001 to 0.1.
    """
    if targets.kind == "sampled":
        ids, weight = targets.samples**0.72, 0.4
    elif targets.kind == "threshold":
        ids, weight = 1.25 * targets.tau**-0.7, 1.7
    else:
        ids, weight = float(targets.k), 0.0
        if targets.min_probability:
            ids = min(ids, max(1.0, 0.31 * targets.min_probability**-0.74))
    # Ids that are drawn are less alike from position to position, and compress less.
    each = (2.6 if targets.has_weights else 2.2) + weight + (2.0 if targets.precision == "exact" else 0.0)
    rule = "by rule of thumb"
    if targets.has_weights or targets.min_probability:
        rule = f"for the {ids:.0f} ids that a 135M model keeps of plain English, fewer the surer it is"
    return 7.5 + each * ids + 1.9 * targets.tail_samples, rule


def _readable(paths: Iterable[Path]) -> list[Capture]:
    captures = []
    for path in paths:
        try:
            captures.append(read_capture(path))
        except CaptureError:
            continue  # the shard that owns it is planned as failed; an estimate can do without it
    return captures
