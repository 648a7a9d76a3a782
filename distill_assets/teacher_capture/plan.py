"""What a run would capture, and why, found without running anything.

A shard's state is decided by the store: `current` if a valid capture of this content exists under
this capture identity. The first that applies of: failed, new, settings_changed, changed, removed,
current.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distill_assets.dataset_shards.discover import Discovery, Shard
from distill_assets.dataset_shards.encode import encode_shard
from distill_assets.foundation.errors import CaptureError, DistillError, PinnedCapture
from distill_assets.teacher_capture.derive import derivable, sources
from distill_assets.teacher_capture.identity import CaptureSpec
from distill_assets.teacher_capture.reuse import captured_keys
from distill_assets.teacher_capture.store import Capture, CaptureStore, read_capture

State = Literal["failed", "new", "settings_changed", "changed", "removed", "current"]


@dataclass(frozen=True)
class ShardPlan:
    """One shard's state. Estimates are None where no earlier capture exists to go by."""

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
    """The whole plan: `shards` for people, `todo` for whoever runs it."""

    capture_id: str
    shards: tuple[ShardPlan, ...]
    todo: tuple[Shard, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class _History:
    """Shards captured before: under this identity, and under any. `sources`: captures to derive these from."""

    own: Collection[str]
    any: Collection[str]
    sources: Collection[str]


@dataclass(frozen=True)
class _Experience:
    """What earlier captures cost, to estimate from."""

    bytes_per_row_token: float | None
    tokens_per_second: float | None


def plan_capture(
    spec: CaptureSpec, discovery: Discovery, store: CaptureStore, catalogued: Collection[str]
) -> CapturePlan:
    """Compare shards on disk with the store; `catalogued` are the shard keys of the catalog.

    Only shards that are not current are read and encoded.
    """
    experience = _experience(spec, store)
    history = _History(
        own=store.known_shards(spec.capture_id),
        any={shard for capture_id in store.capture_ids() for shard in store.known_shards(capture_id)},
        sources=sources(store, spec),
    )
    plans: list[ShardPlan] = []
    todo: list[Shard] = []
    problems: list[str] = []
    for problem in discovery.problems:
        plans.append(ShardPlan(problem.key, "failed", problem.message, None, 0, 0))
        problems.append(problem.message)
    for shard in discovery.shards:
        plan = _plan_shard(spec, shard, store, history, experience)
        plans.append(plan)
        if plan.state != "current":
            todo.append(shard)
    present = {plan.shard for plan in plans}
    plans += [
        ShardPlan(key, "removed", "the file is gone; it leaves the catalog at the next run", None, 0, 0)
        for key in sorted(set(catalogued) - present)
    ]
    return CapturePlan(spec.capture_id, tuple(sorted(plans, key=lambda p: p.shard)), tuple(todo), tuple(problems))


def _plan_shard(
    spec: CaptureSpec, shard: Shard, store: CaptureStore, history: _History, experience: _Experience
) -> ShardPlan:
    try:
        if current := store.current(spec, shard):
            reason = "imported" if current.is_imported else "captured as it is"
            return ShardPlan(shard.key, "current", reason, current.stats.rows, 0, 0)
        state, reason = _why(spec, shard, store, history)
    except PinnedCapture as error:
        return ShardPlan(shard.key, "failed", str(error), None, 0, 0)
    except CaptureError as damaged:
        state, reason = "failed", str(damaged)
    try:
        rows = encode_shard(shard, spec.encoder).rows
    except DistillError as error:
        return ShardPlan(shard.key, "failed", str(error), None, 0, 0)
    keys = {row.key for row in rows}
    own = captured_keys(store, spec.capture_id, keys)
    others = derivable(store, history.sources, keys - own.keys())
    if others:
        from_ids = ", ".join(sorted({capture_id for capture_id, _ in others.values()}))
        reason += f"; {len(others):,} rows can be derived from {from_ids}"
    new = {row.key: row for row in rows if row.key not in own and row.key not in others}
    tokens = sum(len(row.input_ids) for row in new.values())
    all_tokens = sum(len(row.input_ids) for row in rows)
    return ShardPlan(
        shard=shard.key,
        state=state,
        reason=reason,
        rows=len(rows),
        rows_to_capture=len(new),
        tokens_to_capture=tokens,
        estimated_bytes=round(all_tokens * experience.bytes_per_row_token) if experience.bytes_per_row_token else None,
        estimated_seconds=round(tokens / experience.tokens_per_second, 1) if experience.tokens_per_second else None,
    )


def _why(spec: CaptureSpec, shard: Shard, store: CaptureStore, history: _History) -> tuple[State, str]:
    if message := store.failure(spec.capture_id, shard.key, shard.version):
        return "failed", message
    if shard.key not in history.any:
        return "new", "never captured"
    if shard.key not in history.own:
        return "settings_changed", f"captured before, but not under capture {spec.capture_id}"
    return "changed", "the content is not what was captured"


def _experience(spec: CaptureSpec, store: CaptureStore) -> _Experience:
    """Bytes a token and teacher speed, from the captures under this identity, else from all there are."""
    own = list(_readable(store.files(spec.capture_id).values()))
    others = [] if own else [c for i in store.capture_ids() for c in _readable(store.files(i).values())]
    seen = own or others
    tokens = sum(capture.stats.tokens for capture in seen)
    run = [capture.stats for capture in seen if capture.stats.tokens_captured]
    seconds = sum(stats.seconds for stats in run)
    return _Experience(
        bytes_per_row_token=sum(capture.bytes for capture in seen) / tokens if tokens else None,
        tokens_per_second=sum(stats.tokens_captured for stats in run) / seconds if seconds > 0 else None,
    )


def _readable(paths: Iterable[Path]) -> list[Capture]:
    captures = []
    for path in paths:
        try:
            captures.append(read_capture(path))
        except CaptureError:
            continue  # the shard that owns it is planned as failed; an estimate can do without it
    return captures
