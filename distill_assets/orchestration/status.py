"""The state of a home's shards and assets, for people."""

from dataclasses import dataclass, replace
from pathlib import Path

from distill_assets.foundation.errors import DistillError, StaleInputs
from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.orchestration.states import INPUTS, AssetStates
from distill_assets.student_evaluation.report import HTML_FILE


@dataclass(frozen=True)
class ShardStatus:
    """One shard; figures are None where it has no current capture."""

    shard: str
    role: str
    state: str
    reason: str
    examples: int | None = None
    tokens: int | None = None
    bytes_per_token: float | None = None
    mean_kept_mass: float | None = None
    teacher_perplexity: float | None = None


@dataclass(frozen=True)
class AssetStatus:
    """One asset: `current`, `stale`, `off`, or `failed` with the reason as its path."""

    asset: str
    state: str
    version: str | None
    path: str | None


@dataclass(frozen=True)
class HomeStatus:
    """Everything `distill status` shows."""

    home: str
    capture_id: str
    shards: tuple[ShardStatus, ...]
    assets: tuple[AssetStatus, ...]


def home_status(pipeline: Pipeline) -> HomeStatus:
    """Compare what is there with what would be made now; runs nothing."""
    roles = {shard.key: shard.role for shard in pipeline.discovery.shards}
    captures = {entry.capture.shard: entry.capture for entry in pipeline.entries}
    shards = []
    for plan in pipeline.plan().shards:
        status = ShardStatus(plan.shard, roles.get(plan.shard, "-"), plan.state, plan.reason)
        if capture := captures.get(plan.shard):
            status = replace(
                status,
                examples=capture.stats.rows,
                tokens=capture.stats.tokens,
                bytes_per_token=capture.bytes_per_token,
                mean_kept_mass=capture.stats.mean_kept_mass,
                teacher_perplexity=capture.stats.teacher_perplexity,
            )
        shards.append(status)
    states = AssetStates(pipeline)
    return HomeStatus(
        home=str(pipeline.home.root),
        capture_id=pipeline.spec.capture_id,
        shards=tuple(shards),
        assets=tuple(_asset_status(states, asset) for asset in INPUTS),
    )


def _asset_status(states: AssetStates, asset: str) -> AssetStatus:
    try:
        if asset == "control_student" and not states.pipeline.settings.control:
            return AssetStatus(asset, "off", None, None)
        current = states.is_current(asset) and not states.stale_inputs(asset)
        version = states.pipeline.spec.capture_id if asset == "teacher_capture" else states.data_version(asset)
        return AssetStatus(asset, "current" if current else "stale", version, _path(states, asset))
    except DistillError as error:
        return AssetStatus(asset, "failed", None, str(error))


def _path(states: AssetStates, asset: str) -> str:
    home, students = states.pipeline.home, states.students
    paths = {
        "tokenizer_compatibility": lambda: home.tokenizer_report,
        "teacher_capture": lambda: home.captures / states.pipeline.spec.capture_id,
        "capture_catalog": lambda: home.catalog,
        "student_model": lambda: students.folder("student"),
        "control_student": lambda: students.folder("control"),
        "student_evaluation": lambda: students.report_folder / HTML_FILE,
    }
    return str(paths[asset]())


def latest_report(pipeline: Pipeline) -> tuple[Path, bool]:
    """(path, True) of the current report, else (path, False) of the newest; StaleInputs when there is none."""
    students = AssetStates(pipeline).students
    if students.report_exists:
        return students.report_folder / HTML_FILE, True
    home = pipeline.home
    reports = sorted(home.reports.glob(f"*/{HTML_FILE}"), key=lambda file: file.stat().st_mtime)
    if not reports:
        raise StaleInputs(f"there is no report in {home.reports} yet; `distill run` makes one")
    return reports[-1], False
