"""`distill gc`: removes what nothing of a home refers to, and nothing it did not make.

Captures go when they were superseded, or their shard is gone, and no shard that is still to be captured
would copy rows from them. Students and reports go once the current ones are there, and comparisons with
them. A student that is kept keeps its record of what it learnt from, whether or not those captures are kept.
"""

import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import dagster as dg

from distill_assets.foundation.errors import HomeError, StaleInputs
from distill_assets.foundation.files import leftovers, remove, size_of
from distill_assets.foundation.home import Home
from distill_assets.orchestration.assets import GPU_POOL, PROCESS
from distill_assets.orchestration.instance import (
    close_dead_runs,
    open_instance,
    process_mark,
    process_tags,
    under_way,
)
from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.orchestration.states import AssetStates
from distill_assets.teacher_capture.contents import Needs, contents, is_ours


@dataclass(frozen=True)
class Removal:
    """One thing that goes: a capture, unfinished chunks, a failure record, a leftover, a student, a report,
    a comparison, or a folder that is empty then.
    """

    kind: str
    path: Path
    bytes: int


@dataclass(frozen=True)
class GarbageReport:
    """What was removed, or would be; `kept` says, a sentence each, what was not judged and why."""

    removed: tuple[Removal, ...]
    kept: tuple[str, ...]
    dry_run: bool

    @property
    def bytes(self) -> int:
        return sum(removal.bytes for removal in self.removed)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "bytes": self.bytes}


def collect_garbage(home: Home, dry_run: bool) -> GarbageReport:
    """Remove what nothing refers to; with `dry_run` only say what that is.

    StaleInputs when no shard matches; SettingsError or ModelError when settings or teacher cannot be read;
    HomeError while a run is under way. It holds the slot of the GPU pool as a run of its own, so that a run
    that starts meanwhile looks at the store only afterwards.
    """
    with open_instance(home) as instance:
        close_dead_runs(instance)
        _require_quiet(instance)
        if dry_run:
            return _look(home)[1]
        done: list[GarbageReport] = []

        @dg.op(pool=GPU_POOL, required_resource_keys=PROCESS)
        def remove_what_nothing_refers_to(context: dg.OpExecutionContext) -> None:
            _require_quiet(context.instance, besides=context.run_id)
            done.append(_remove(home))

        @dg.job(resource_defs={"process_mark": process_mark})
        def gc() -> None:
            remove_what_nothing_refers_to()

        run_id = str(uuid.uuid4())
        quiet = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
        gc.execute_in_process(instance=instance, run_id=run_id, run_config=quiet, tags=process_tags(run_id))
        return done[0]


def _require_quiet(instance: dg.DagsterInstance, besides: str = "") -> None:
    if running := under_way(instance, besides):
        raise HomeError(f"{running} is under way in this home, so nothing is removed; wait for it, or cancel it")


def _look(home: Home) -> tuple[Pipeline, GarbageReport]:
    pipeline = Pipeline(home)
    if not pipeline.shards:
        raise StaleInputs(
            f"no shard matches data.shards ({pipeline.settings.data.shards}) in {home.root}, so everything would go; "
            "mend the pattern, or delete the folders by hand"
        )
    kept: list[str] = []
    removals = [*_captures(pipeline, kept), *_students_and_reports(pipeline, kept)]
    for folder in home.kept_clean:
        removals += [Removal("leftover", path, size_of(path)) for path in leftovers(folder)]
    return pipeline, GarbageReport(tuple(removals), tuple(kept), dry_run=True)


def _remove(home: Home) -> GarbageReport:
    """The catalog forgets first: a kill then leaves files that the next call removes, and nothing listed that
    is gone.
    """
    pipeline, found = _look(home)
    if home.catalog.exists():
        pipeline.refresh_catalog(without=frozenset(removal.path for removal in found.removed))
    for removal in found.removed:
        remove(removal.path)
    return GarbageReport(found.removed, found.kept, dry_run=False)


def _captures(pipeline: Pipeline, kept: list[str]) -> Iterator[Removal]:
    if _is_link(pipeline.home.captures, kept):
        return
    if pipeline.uncaptured:
        kept.append(f"what shard {pipeline.uncaptured[0]} may be captured from: it has no current capture yet")
    needs = Needs(pipeline.spec, pipeline.discovery, pipeline.store)
    for capture_id, group in groupby(contents(pipeline.store.root), key=lambda item: item.capture_id):
        items = list(group)
        unneeded = [item for item in items if item not in needs]
        yield from (Removal(i.kind, i.path, size_of(i.path)) for i in unneeded if i.kind != "empty")
        if capture_id and len(unneeded) == len(items):
            yield Removal("folder", pipeline.store.root / capture_id, 0)


def _students_and_reports(pipeline: Pipeline, kept: list[str]) -> Iterator[Removal]:
    """Which are current is known once every shard is captured; the others stay until those are made."""
    students = AssetStates(pipeline).students
    home = pipeline.home
    if pipeline.uncaptured or not all(students.exists(kind) for kind in students.kinds):
        kept.append("students and reports: the current student is not trained yet")
        return
    # A comparison is of students most of which go, and one of those that stay is written again in a second.
    current: dict[Path, set[str]] = {home.students: set(students.ids.values()), home.comparisons: set()}
    if students.report_exists:
        current[home.reports] = {students.report_id}
    else:
        kept.append("reports: the current one is not written yet")
    for root, names in current.items():
        if _is_link(root, kept):
            continue
        for folder in sorted(root.glob("*")):
            ours = is_ours(folder.name) and folder.is_dir() and not folder.is_symlink()
            if ours and folder.name not in names:
                yield Removal(root.name.removesuffix("s"), folder, size_of(folder))


def _is_link(folder: Path, kept: list[str]) -> bool:
    if folder.is_symlink():
        kept.append(f"{folder.name}: it is a link, and links are not followed")
    return folder.is_symlink()
