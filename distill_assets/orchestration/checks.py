"""Asset checks beside the blocking one of tokenizer_compatibility."""

from collections.abc import Sequence
from typing import Any

import dagster as dg
from pydantic import Field

from distill_assets.capture_catalog.verify import compare_with_store
from distill_assets.foundation.errors import CaptureError
from distill_assets.foundation.home import find_home
from distill_assets.foundation.wording import counted
from distill_assets.orchestration import metadata
from distill_assets.orchestration.assets import GPU_POOL, PROCESS, capture_catalog, student_evaluation, teacher_capture
from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.orchestration.progress import progress_of
from distill_assets.orchestration.students import StudentSide
from distill_assets.teacher_capture.checks import check_aligned, check_complete

ERROR, WARN = dg.AssetCheckSeverity.ERROR, dg.AssetCheckSeverity.WARN


class ShardsConfig(dg.Config):
    """Which captures are looked at."""

    shards: list[str] = Field(default=[], description="none: the partitions of the run, else every current capture")


class FaithfulConfig(ShardsConfig):
    """Where the teacher runs."""

    device: str = "auto"


def _looked_at(
    context: dg.AssetCheckExecutionContext, config: ShardsConfig, pipeline: Pipeline
) -> tuple[list[str], Sequence[str]]:
    """Shards to look at that are captured, and those that are not. A check that runs with a partition's
    materialisation looks at that partition.
    """
    run = context.op_execution_context
    wanted = set(config.shards)
    if not wanted and (run.has_partition_key or run.has_partition_key_range):
        wanted = set(run.partition_keys)
    captured = {entry.capture.shard for entry in pipeline.entries}
    wanted = wanted or captured | set(pipeline.uncaptured)
    return sorted(wanted & captured), sorted(wanted - captured)


def _result(passed: bool, severity: dg.AssetCheckSeverity, said: str, figures: dict[str, Any]) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=passed, severity=severity, description=said, metadata=figures)


@dg.asset_check(
    asset=teacher_capture,
    required_resource_keys=PROCESS,
    description="Captures hold the very rows and positions of their shards, encoded again; no shard lacks one.",
)
def capture_is_complete(context: dg.AssetCheckExecutionContext, config: ShardsConfig) -> dg.AssetCheckResult:
    pipeline = Pipeline(find_home())
    shards, missing = _looked_at(context, config, pipeline)
    captures = {entry.capture.shard: entry.capture for entry in pipeline.entries}
    captured = [(pipeline.shards[key], captures[key]) for key in shards]
    report = check_complete(pipeline.spec, captured, progress_of(context))
    problems = [*report.problems, *(f"shard {key} has no current capture" for key in missing)]
    said = problems[0] if problems else f"{report.rows:,} rows are those of {counted(report.captures, 'shard')}"
    return _result(not problems, ERROR, said, metadata.of_complete(report, problems))


@dg.asset_check(
    asset=teacher_capture,
    required_resource_keys=PROCESS,
    description="The likeliest kept id of position t is not plainly more often token t or t+2 than token t+1.",
)
def capture_is_aligned(context: dg.AssetCheckExecutionContext, config: ShardsConfig) -> dg.AssetCheckResult:
    pipeline = Pipeline(find_home())
    shards, _ = _looked_at(context, config, pipeline)
    try:
        captures = [e.capture for e in pipeline.entries if e.capture.shard in shards]
        report = check_aligned(captures, progress_of(context))
    except CaptureError as error:
        return _result(False, WARN, str(error), {})
    before, here, after = report.rates
    said = f"the likeliest id is the next token at {here:.1%}, the one before at {before:.1%}, after at {after:.1%}"
    if not report.enough:
        said = f"{report.positions} positions are too few to tell"
    elif not report.passed:
        said += "; targets are at the wrong position, or the teacher is untrained and repeats what it reads"
    elif not report.tells:
        said += ": no evidence for or against"
    return _result(report.passed, WARN, said, metadata.of_aligned(report))


@dg.asset_check(
    asset=teacher_capture,
    pool=GPU_POOL,
    required_resource_keys=PROCESS,
    description="A sample of rows, scored again by the teacher, agrees but for rounding and measured noise: ids kept "
    "and drawn, log-probabilities, tail, gold, entropy.",
)
def capture_is_faithful(context: dg.AssetCheckExecutionContext, config: FaithfulConfig) -> dg.AssetCheckResult:
    pipeline = Pipeline(find_home())
    shards, _ = _looked_at(context, config, pipeline)
    captures = [e.capture for e in pipeline.entries if e.capture.shard in shards and not e.capture.is_imported]
    if shards and not captures:
        return _result(True, ERROR, "imported captures are of another engine, which cannot be asked again", {})
    from distill_assets.teacher_capture.faithful import check_faithful  # and torch, which takes seconds

    try:
        report = check_faithful(pipeline.spec, captures, config.device, progress_of(context))
    except CaptureError as error:
        return _result(False, ERROR, str(error), {})
    said = (
        f"{report.rows} rows scored again: KL {report.kl.value:.2g} nats (at most {report.kl.allowed:.2g}), largest "
        f"difference {report.difference.value:.3g} (at most {report.difference.allowed:.3g})"
    )
    if report.failed:
        said += f"; off by more than noise: {', '.join(report.failed)}"
    return _result(report.passed, ERROR, said, metadata.of_faithful(report))


CAPTURE_CHECKS = (capture_is_complete, capture_is_aligned, capture_is_faithful)
WITH_TEACHER = capture_is_faithful


@dg.asset_check(asset=capture_catalog, description="Every current capture is listed, with the rows its file has.")
def catalog_matches_store() -> dg.AssetCheckResult:
    pipeline = Pipeline(find_home())
    problems = compare_with_store(pipeline.home.catalog, [entry.capture for entry in pipeline.entries])
    return dg.AssetCheckResult(passed=not problems, metadata={"problems": "\n".join(problems[:20]) or "none"})


@dg.asset_check(
    asset=student_evaluation,
    description="The student is closer to the teacher (KL on held-out rows) than the control, beyond the interval.",
)
def student_beats_control() -> dg.AssetCheckResult:
    record = StudentSide(Pipeline(find_home())).evaluation()
    if record is None:
        return dg.AssetCheckResult(
            passed=False, severity=dg.AssetCheckSeverity.WARN, metadata={"verdict": "the report is not there, whole"}
        )
    if record["rival"] != "control":
        return dg.AssetCheckResult(passed=True, metadata={"verdict": "there is no control to compare with"})
    return dg.AssetCheckResult(
        passed=record["outcome"] == "closer",
        severity=dg.AssetCheckSeverity.WARN,
        metadata={"verdict": record["verdict"]},
    )
