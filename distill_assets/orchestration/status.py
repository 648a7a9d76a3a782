"""The state of a home's shards and assets, for people."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from distill_assets.foundation.errors import DistillError, StaleInputs, TrainingError
from distill_assets.foundation.wording import counted
from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.orchestration.states import INPUTS, AssetStates
from distill_assets.student_evaluation.identity import HTML_FILE
from distill_assets.student_model.identity import StudentKind
from distill_assets.student_model.saving import StudentRecord, read_student
from distill_assets.teacher_capture.plan import CapturePlan

AssetState = Literal["current", "stale", "missing", "failed", "off"]
KINDS: Mapping[str, StudentKind] = {"student_model": "student", "control_student": "control"}


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
    """One asset. `stale`: made, but not from what is there now; `missing`: never made.

    `reason` is empty where it is current. `version` is what would be made now, None while an input is
    not current; `path` is None where nothing lies.
    """

    asset: str
    state: AssetState
    reason: str
    version: str | None
    path: str | None


@dataclass(frozen=True)
class HomeStatus:
    """Everything `distill status` shows."""

    home: str
    capture_id: str
    shards: tuple[ShardStatus, ...]
    assets: tuple[AssetStatus, ...]


@dataclass(frozen=True)
class Following:
    """An asset that a run would make after the captures; `last_seconds`: what the newest of its kind took to train,
    None where none was, or nothing is trained.
    """

    asset: str
    last_seconds: float | None = None


def what_is_refused(pipeline: Pipeline, plan: CapturePlan) -> str:
    """The error a run would end with, as far as is known without one: "" where none is foreseen. Shards that fail are
    in the plan.
    """
    return _refused_at_once(pipeline) or ("" if _has_failed(plan) else _error_of(pipeline.require_roles))


def _refused_at_once(pipeline: Pipeline) -> str:
    """Why a run would capture nothing."""
    if refused := _error_of(pipeline.require_any_shard):
        return refused
    try:
        return _refusal(pipeline)
    except DistillError as error:  # a student that is not there, or has no tokenizer
        return str(error)


def _error_of(requirement: Callable[[], None]) -> str:
    try:
        requirement()
    except DistillError as error:
        return str(error)
    return ""


def _has_failed(plan: CapturePlan) -> bool:
    return any(shard.state == "failed" and not shard.is_to_capture for shard in plan.shards)


def what_follows(pipeline: Pipeline, plan: CapturePlan) -> tuple[Following, ...]:
    """What a run would make besides captures, in its order. No student while a shard cannot be captured, or no shard
    is trained on or held out.
    """
    if _refused_at_once(pipeline):
        return ()
    states = AssetStates(pipeline)
    after = [asset for asset in INPUTS if asset != "teacher_capture"]
    if _has_failed(plan) or _error_of(pipeline.require_roles):
        after = ["tokenizer_compatibility", "capture_catalog"]
    changes = any(shard.is_to_capture or shard.state == "removed" for shard in plan.shards)
    try:
        todo = [asset for asset in after if _would_be_made(states, asset, changes)]
    except DistillError:  # settings or data of which nothing can be made; a run says so
        return ()
    return tuple(Following(asset, _last_seconds(pipeline, asset)) for asset in todo)


def _would_be_made(states: AssetStates, asset: str, captures_change: bool) -> bool:
    if asset == "control_student" and not states.pipeline.settings.control:
        return False
    if captures_change and asset != "tokenizer_compatibility":
        return True
    return not states.is_current(asset)


def _last_seconds(pipeline: Pipeline, asset: str) -> float | None:
    if asset not in KINDS:
        return None
    records = [record for folder in pipeline.home.students.glob("*") if (record := _record(folder))]
    of_kind = [record for record in records if record.spec.kind == KINDS[asset]]
    return max(of_kind, key=lambda record: record.created).report.seconds if of_kind else None


def home_status(pipeline: Pipeline) -> HomeStatus:
    """Compare what is there with what would be made now; runs nothing."""
    roles = {shard.key: shard.role for shard in pipeline.discovery.shards}
    captures = {entry.capture.shard: entry.capture for entry in pipeline.entries}
    plan = pipeline.plan()
    shards = []
    for planned in plan.shards:
        status = ShardStatus(planned.shard, roles.get(planned.shard, "-"), planned.state, planned.reason)
        if capture := captures.get(planned.shard):
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
        assets=tuple(_asset_status(states, asset, plan) for asset in INPUTS),
    )


def _asset_status(states: AssetStates, asset: str, plan: CapturePlan) -> AssetStatus:
    if asset == "control_student" and not states.pipeline.settings.control:
        return AssetStatus(asset, "off", "control is false in distill.yaml", None, None)
    try:
        stale_inputs = states.stale_inputs(asset)
        state, reason = _state(states, asset, stale_inputs, plan)
        version = path = None
        if asset == "teacher_capture":
            version = states.pipeline.spec.capture_id
        elif not stale_inputs:  # what it would be is known only when its inputs are
            version = states.data_version(asset)
        if asset in ("tokenizer_compatibility", "teacher_capture", "capture_catalog") or not stale_inputs:
            path = _path(states, asset)
    except DistillError as error:
        return AssetStatus(asset, "failed", str(error), None, None)
    return AssetStatus(asset, state, reason, version, str(path) if path and path.exists() else None)


def _state(states: AssetStates, asset: str, stale_inputs: Sequence[str], plan: CapturePlan) -> tuple[AssetState, str]:
    """The state of an asset and the reason, "" where it is current."""
    if asset == "tokenizer_compatibility" and (refusal := _refusal(states.pipeline)):
        return "failed", refusal
    if states.is_current(asset) and not stale_inputs:
        return "current", ""
    if asset == "teacher_capture" and (failed := sum(shard.state == "failed" for shard in plan.shards)):
        return "failed", f"{counted(failed, 'shard')} failed"
    if asset in KINDS and not stale_inputs and (folder := _path(states, asset)).exists():
        read_student(folder)  # there, but not whole: the error says what is wrong with it
    if not _ever_made(states.pipeline, asset):
        return "missing", "never made"
    return "stale", f"{stale_inputs[0]} is not current" if stale_inputs else _why_stale(states, asset)


def _refusal(pipeline: Pipeline) -> str:
    """Why the tokenizer report of this very pair says that it cannot be used, or ""."""
    found = pipeline.tokenizer_verdict
    return "" if found is None or found.usable else f"{found.verdict}: {'; '.join(found.reasons)}"


def _why_stale(states: AssetStates, asset: str) -> str:
    if asset == "teacher_capture":
        missing = len(states.pipeline.uncaptured)
        return f"{counted(missing, 'shard')} {'has' if missing == 1 else 'have'} no current capture"
    if asset == "capture_catalog":
        return "captures changed since, or the home was moved"
    return "settings or data changed since"


def _ever_made(pipeline: Pipeline, asset: str) -> bool:
    """Whether any version of the asset is there."""
    home = pipeline.home
    if asset in KINDS:
        records = [_record(folder) for folder in home.students.glob("*")]
        known = {record.spec.kind for record in records if record}
        # One that cannot be read may be of either kind: of the one that is not there otherwise.
        return KINDS[asset] in known or records.count(None) > (0 if known else 1)
    found = {
        "tokenizer_compatibility": lambda: home.tokenizer_report.exists(),
        "teacher_capture": lambda: any(pipeline.store.known_shards(i) for i in pipeline.store.capture_ids()),
        "capture_catalog": lambda: home.catalog.exists(),
        "student_evaluation": lambda: any(home.reports.glob(f"*/{HTML_FILE}")),
    }
    return found[asset]()


def _record(folder: Path) -> StudentRecord | None:
    try:
        return read_student(folder)
    except TrainingError:
        return None


def _path(states: AssetStates, asset: str) -> Path:
    home, students = states.pipeline.home, states.students
    paths = {
        "tokenizer_compatibility": lambda: home.tokenizer_report,
        "teacher_capture": lambda: home.captures / states.pipeline.spec.capture_id,
        "capture_catalog": lambda: home.catalog,
        "student_model": lambda: students.folder("student"),
        "control_student": lambda: students.folder("control"),
        "student_evaluation": lambda: students.report_folder / HTML_FILE,
    }
    return paths[asset]()


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
