"""`distill verify`: every file of a home read to its last byte and compared with what refers to it."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import dagster as dg

from distill_assets.capture_catalog.verify import verify_catalog
from distill_assets.foundation.errors import DistillError
from distill_assets.foundation.files import leftovers
from distill_assets.foundation.home import Home
from distill_assets.foundation.problems import FileListener, Problem
from distill_assets.foundation.progress import Progress, ProgressListener, ignore_progress
from distill_assets.orchestration import metadata
from distill_assets.orchestration.instance import close_dead_runs, open_instance, under_way
from distill_assets.orchestration.partitions import recorded_version, recorded_versions
from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.orchestration.states import OFF, AssetStates, shard_data_version
from distill_assets.student_evaluation.verify import verify_reports
from distill_assets.student_model.verify import verify_students
from distill_assets.teacher_capture.contents import Needs
from distill_assets.teacher_capture.store import IMPORT_AGAIN, IMPORTED
from distill_assets.teacher_capture.verify import GC, verify_captures


@dataclass(frozen=True)
class VerifyReport:
    """What was found; `files` were read. `closed_runs`: ids of Dagster's runs whose process was gone, closed now."""

    problems: tuple[Problem, ...]
    files: int
    closed_runs: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def verify(home: Home, on_progress: ProgressListener = ignore_progress) -> VerifyReport:
    """Read everything the system made in `home`; no file is changed. SettingsError or ModelError when what it
    should be cannot be known.
    """
    with open_instance(home) as instance:
        closed = close_dead_runs(instance)
        pipeline = Pipeline(home)
        counted = _Counter(home, on_progress)

        def is_busy() -> bool:
            return home.in_use.is_held() or under_way(instance) is not None

        problems = list(_problems(pipeline, is_busy, counted.read))
        said = {problem.path for problem in problems}
        problems += [problem for problem in _missing(AssetStates(pipeline), instance) if problem.path not in said]
    return VerifyReport(tuple(problems), counted.files, tuple(closed))


class _Counter:
    """Counts the files that are read, and says how far that is."""

    def __init__(self, home: Home, on_progress: ProgressListener) -> None:
        self.files, self._on_progress, self._started = 0, on_progress, time.monotonic()
        made = (home.captures, home.students, home.reports)
        self._total = sum(path.is_file() for folder in made for path in folder.rglob("*")) + 2

    def read(self, path: Path) -> None:
        seconds = time.monotonic() - self._started
        self._on_progress(Progress("verify", self.files, self._total, "files", seconds, path.name))
        self.files += 1


def _problems(pipeline: Pipeline, is_busy: Callable[[], bool], on_file: FileListener) -> Iterator[Problem]:
    home = pipeline.home
    needs = Needs(pipeline.spec, pipeline.discovery, pipeline.store)
    of_captures = list(verify_captures(pipeline.spec, needs, pipeline.store, is_busy, on_file))
    yield from of_captures
    yield from verify_catalog(
        home.catalog,
        pipeline.store,
        needs,
        home.students,
        [entry.capture for entry in pipeline.entries],
        pipeline.catalog_is_current,
        {problem.path for problem in of_captures},
        on_file,
    )
    yield from verify_students(home.students, on_file)
    yield from verify_reports(home.reports, on_file)
    if home.tokenizer_report.exists():
        on_file(home.tokenizer_report)
        try:
            json.loads(home.tokenizer_report.read_bytes())
        except ValueError as error:
            yield Problem("damaged", home.tokenizer_report, f"not JSON ({error}); `distill run` writes it again")
    if not is_busy():
        for folder in home.kept_clean:
            for path in leftovers(folder):
                yield Problem("orphaned", path, f"left by a process that was killed; {GC}")


def _missing(states: AssetStates, instance: dg.DagsterInstance) -> Iterator[Problem]:
    """What Dagster's last record says was made, would be made the same now, and is gone."""
    home = states.pipeline.home
    yield from _missing_captures(states.pipeline, instance)
    if recorded_version(instance, "capture_catalog") and states.pipeline.entries and not home.catalog.exists():
        yield Problem("missing", home.catalog, "there are captures, but no catalog of them; `distill run` builds it")
    for asset, place in (
        ("tokenizer_compatibility", lambda version: home.tokenizer_report),
        ("student_model", lambda version: home.students / version),
        ("control_student", lambda version: home.students / version),
        ("student_evaluation", lambda version: home.reports / version),
    ):
        recorded = recorded_version(instance, asset)
        if recorded in (None, OFF) or (path := place(recorded)).exists():
            continue
        try:
            is_wanted = states.data_version(asset) == recorded
        except DistillError:  # what it is made from is not there, so nothing would be made now
            continue
        if is_wanted:
            yield Problem("missing", path, "it was made, and nothing has changed since; `distill run` makes it again")


def _missing_captures(pipeline: Pipeline, instance: dg.DagsterInstance) -> Iterator[Problem]:
    """Captures of shards as they are now, by the name of the file that Dagster has on record. Of what was captured
    under other settings nothing is missed.
    """
    for key, recorded in recorded_versions(instance, "teacher_capture").items():
        shard = pipeline.shards.get(key)
        if (
            shard is None
            or key not in pipeline.uncaptured
            or not recorded.startswith(shard_data_version(shard.version, ""))
        ):
            continue
        path = _recorded_file(instance, key, pipeline.store.root)
        if path is None or path.exists():
            continue
        if path.parent.name == IMPORTED:
            yield Problem("missing", path, f"it was imported; {IMPORT_AGAIN}, else the teacher captures its rows")
        elif path.parent.name == pipeline.spec.capture_id:
            yield Problem("missing", path, "nothing has changed since it was made; `distill run` makes it again")


def _recorded_file(instance: dg.DagsterInstance, key: str, captures: Path) -> Path | None:
    """The file of a partition's latest materialisation. By name, for the home may have been moved since."""
    of_partition = dg.AssetRecordsFilter(asset_key=dg.AssetKey("teacher_capture"), asset_partitions=[key])
    [record] = instance.fetch_materializations(of_partition, limit=1).records
    materialization = record.asset_materialization
    file = materialization.metadata.get(metadata.FILE) if materialization else None
    return captures.joinpath(*Path(str(file.value)).parts[-2:]) if file else None
