"""`distill gc`: removes what nothing of a home refers to, and nothing it did not make.

Captures go when they were superseded, or their shard is gone, and no shard that is still to be captured
would copy rows from them. Imported ones go only when asked for. Students and reports go once the current
ones are there, and comparisons with them. A student that is kept keeps its record of what it learnt from,
whether or not those captures are kept.
"""

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path, PurePath
from typing import Any

import dagster as dg

from distill_assets.dataset_shards.discover import discover_shards
from distill_assets.foundation.errors import HomeError, StaleInputs
from distill_assets.foundation.files import leftovers, remove, remove_empty, size_of
from distill_assets.foundation.fingerprints import SHORT
from distill_assets.foundation.home import Home
from distill_assets.orchestration.instance import close_dead_runs, open_instance, under_way
from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.orchestration.states import AssetStates
from distill_assets.student_model.checkpoints import student_under_way
from distill_assets.student_model.identity import student_of_events
from distill_assets.teacher_capture.contents import Item, Needs, contents, is_ours


@dataclass(frozen=True)
class Removal:
    """One thing that goes: a capture, unfinished chunks, a failure record, a leftover, a student, the checkpoints or
    TensorBoard events of one, a report, a comparison, or a folder that is empty then.
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


def collect_garbage(home: Home, dry_run: bool, imported: bool = False) -> GarbageReport:
    """Remove what nothing refers to; with `dry_run` only say what that is. `imported`: of imported captures
    those whose content no shard file has, too.

    StaleInputs when no shard matches; SettingsError or ModelError when settings or teacher cannot be read;
    HomeError while anything else is under way. It has the home's lock alone, so that what starts meanwhile
    looks at the store only afterwards.
    """
    with open_instance(home) as instance:
        close_dead_runs(instance)
        _require_quiet(instance)  # before the lock, for it can name the run
        with home.in_use.alone():
            _require_quiet(instance)
            pipeline, found = _look(home, imported)
            return found if dry_run else _remove(pipeline, found)


def _require_quiet(instance: dg.DagsterInstance) -> None:
    if running := under_way(instance):
        raise HomeError(f"{running} is under way in this home, so nothing is removed; wait for it, or cancel it")


def _look(home: Home, imported: bool) -> tuple[Pipeline, GarbageReport]:
    pipeline = Pipeline(home)
    if not pipeline.shards:
        raise StaleInputs(
            f"no shard matches data.shards ({pipeline.settings.data.shards}) in {home.root}, so everything would go; "
            "mend the pattern, or delete the folders by hand"
        )
    kept: list[str] = []
    removals = [*_captures(pipeline, imported, kept), *_students_and_reports(pipeline, kept)]
    for folder in home.kept_clean:
        removals += [Removal("leftover", path, size_of(path)) for path in leftovers(folder)]
    return pipeline, GarbageReport(tuple(removals), tuple(kept), dry_run=True)


def _remove(pipeline: Pipeline, found: GarbageReport) -> GarbageReport:
    """The catalog forgets first: a kill then leaves files that the next call removes, and nothing listed that
    is gone.
    """
    if pipeline.home.catalog.exists():
        pipeline.refresh_catalog(without=frozenset(removal.path for removal in found.removed))
    for removal in found.removed:
        if removal.kind == "folder":
            remove_empty(removal.path)
        else:
            remove(removal.path)
    return GarbageReport(found.removed, found.kept, dry_run=False)


def _captures(pipeline: Pipeline, imported: bool, kept: list[str]) -> Iterator[Removal]:
    if _is_link(pipeline.home.captures, kept):
        return
    if pipeline.uncaptured:
        kept.append(f"what shard {pipeline.uncaptured[0]} may be captured from: it has no current capture yet")
    needs = Needs(pipeline.spec, pipeline.discovery, pipeline.store)
    for capture_id, group in groupby(contents(pipeline.store.root), key=lambda item: item.capture_id):
        items = list(group)
        unneeded = [item for item in items if item not in needs]
        if imports := [item for item in unneeded if item.kind == "capture" and item.is_imported]:
            spared = _spared(pipeline, imports, imported, kept)
            unneeded = [item for item in unneeded if item not in spared]
        yield from (Removal(i.kind, i.path, size_of(i.path)) for i in unneeded if i.kind != "empty")
        if capture_id and len(unneeded) == len(items):
            yield Removal("folder", pipeline.store.root / capture_id, 0)


def _spared(pipeline: Pipeline, imports: Collection[Item], imported: bool, kept: list[str]) -> Collection[Item]:
    """Those of the imported captures that stay though no shard has their content. Nobody could make them again, so
    they go only when asked for, and not while a file beside the shards that data.shards does not match has it.
    """
    if not imported:
        kept.append(
            f"imported captures whose content no shard has ({len(imports)}, the first is {next(iter(imports)).path}): "
            "nobody can make them again; `distill gc --imported` removes them"
        )
        return imports
    data = pipeline.settings.data
    everything = data.model_copy(
        update={"shards": str(PurePath(data.shards).with_name("*")), "heldout": [], "validation": []}
    )
    beside = discover_shards(pipeline.home.root, everything, pipeline.hashes)
    versions = {shard.version[:SHORT] for shard in beside.shards}
    unknown = {problem.key for problem in beside.problems}
    spared = [item for item in imports if item.version in versions or item.shard in unknown]
    if spared:
        kept.append(
            f"imported captures whose rows lie beside the shards ({len(spared)}, the first is {spared[0].path}): "
            f"data.shards ({data.shards}) does not match their file"
        )
    return spared


def _students_and_reports(pipeline: Pipeline, kept: list[str]) -> Iterator[Removal]:
    """Which are current is known once every shard is captured; the others stay until those are made."""
    students = AssetStates(pipeline).students
    home = pipeline.home
    if not pipeline.uncaptured and students.can_be_named and not _is_link(home.training, kept):
        yield from _checkpoints(home.training, set(students.ids.values()))
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
    if not _is_link(home.tensorboard, kept):
        yield from _events(home.tensorboard, current[home.students])


def _checkpoints(root: Path, awaited: Collection[str]) -> Iterator[Removal]:
    """Those of students that nobody waits for any more."""
    for path in sorted(root.glob("*")):
        student = student_under_way(path.name)
        if is_ours(student) and student not in awaited and not path.is_symlink():
            yield Removal("checkpoints", path, size_of(path))


def _events(root: Path, wanted: Collection[str]) -> Iterator[Removal]:
    """What TensorBoard shows of students that nobody wants any more, and that are gone or go."""
    for path in sorted(root.glob("*")):
        student = student_of_events(path.name)
        if is_ours(student) and student not in wanted and not path.is_symlink():
            yield Removal("events", path, size_of(path))


def _is_link(folder: Path, kept: list[str]) -> bool:
    if folder.is_symlink():
        kept.append(f"{folder.name}: it is a link, and links are not followed")
    return folder.is_symlink()
