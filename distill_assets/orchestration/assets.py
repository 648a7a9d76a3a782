"""The seven assets. Each body is one call between two translations: settings in, metadata out."""

from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field

from distill_assets.foundation.errors import SHARD_FAILURES
from distill_assets.foundation.fingerprints import digest
from distill_assets.foundation.home import find_home
from distill_assets.orchestration import metadata
from distill_assets.orchestration.automation_conditions import WHEN_DUE
from distill_assets.orchestration.partitions import CODE_VERSION, shard_partitions, sync_partitions
from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.orchestration.progress import progress_of
from distill_assets.orchestration.states import OFF, AssetStates, shard_data_version
from distill_assets.student_model.identity import StudentKind

if TYPE_CHECKING:
    from distill_assets.teacher_capture.capture import CaptureReport

PROCESS = {"process_mark"}  # initialised before a run waits for its pool
OWNERS = ["team:distillation"]
WHY_TAG, CAPTURED_TAG = "distill/why", "distill/captured"  # of a run, in words
GPU_POOL, CATALOG_POOL = "gpu", "catalog"
# A range of partitions is one run only if every selected asset says so, unpartitioned ones included.
MADE_HERE: dict[str, Any] = {
    "required_resource_keys": PROCESS,
    "owners": OWNERS,
    "code_version": CODE_VERSION,
    "backfill_policy": dg.BackfillPolicy.single_run(),
}
STUDENT: dict[str, Any] = {
    "deps": ["capture_catalog"],
    "group_name": "students",
    "kinds": {"huggingface", "pytorch"},
    "pool": GPU_POOL,
    "automation_condition": WHEN_DUE,
    **MADE_HERE,
}


class DeviceConfig(dg.Config):
    """How an asset is made. Never part of an identity."""

    device: str = "auto"
    force: bool = False


class TrainingConfig(DeviceConfig):
    """How a student is trained."""

    processes: int = Field(1, ge=1)  # of this machine, each with a device of its own; on a CPU they share it
    pass_tokens: int | None = None  # padded tokens in one forward and backward pass; None: what suits the device
    gradient_checkpointing: bool = False  # layers computed twice, not kept; comes by itself where memory runs out


class CaptureConfig(DeviceConfig):
    """How the teacher is run."""

    batch_tokens: int | None = None  # padded tokens in one forward pass; None: what suits the device


def look() -> AssetStates:
    """The home as it is now."""
    return AssetStates(Pipeline(find_home()))


@dg.observable_source_asset(
    partitions_def=shard_partitions,
    group_name="data",
    description="Shard files. A data version is the content joined with the capture settings: touching a file "
    "changes nothing.",
    tags={"dagster/kind/jsonl": "", "dagster/kind/parquet": ""},
    required_resource_keys=PROCESS,
)
def dataset_shards(context: dg.OpExecutionContext) -> dg.DataVersionsByPartition:
    states = look()
    keys = states.pipeline.shards.keys()
    sync_partitions(context.instance, set(keys))
    return dg.DataVersionsByPartition({key: states.capture_version(key) for key in keys})


observe_shards = dg.define_asset_job(
    "observe_shards",
    selection=dg.AssetSelection.assets("dataset_shards"),
    description="Register the shard files as partitions and observe their versions.",
)


@dg.asset(
    group_name="data",
    kinds={"huggingface"},
    **MADE_HERE,
    automation_condition=WHEN_DUE,
    check_specs=[
        dg.AssetCheckSpec(
            "tokenizers_are_compatible",
            asset="tokenizer_compatibility",
            blocking=True,
            description="Teacher and student mean the same by every id they share, and segment text alike.",
        )
    ],
    description="Compares teacher and student tokenizers and heads; blocks everything after it if they disagree.",
)
def tokenizer_compatibility(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    pipeline = look().pipeline
    report = pipeline.check_tokenizers()
    return dg.MaterializeResult(
        metadata=metadata.of_tokenizers(report, pipeline.home.tokenizer_report),
        data_version=dg.DataVersion(pipeline.tokenizer_identity),
        check_results=[
            dg.AssetCheckResult(
                check_name="tokenizers_are_compatible",
                passed=report.usable,
                metadata={"verdict": report.verdict, "reasons": "\n".join(report.reasons) or "none"},
            )
        ],
    )


@dg.asset(
    partitions_def=shard_partitions,
    deps=[dataset_shards, tokenizer_compatibility],
    group_name="capture",
    kinds={"pytorch", "parquet"},
    **MADE_HERE,
    pool=GPU_POOL,
    automation_condition=WHEN_DUE,
    metadata={"dagster/column_schema": metadata.CAPTURE_COLUMNS},
    description="The teacher's sparse next-token distributions of one shard, one Parquet file a shard version. "
    "Rows captured before are copied; the teacher sees only what is new.",
)
def teacher_capture(context: dg.AssetExecutionContext, config: CaptureConfig) -> dg.MaterializeResult:
    states = look()
    if WHY_TAG not in context.run.tags:  # `distill run` says more
        why = metadata.why(states.pipeline.capture_states(context.partition_keys), config.force)
        context.instance.add_run_tags(context.run.run_id, {WHY_TAG: why})
    reports: list[CaptureReport] = []
    failures: list[Exception] = []
    for key in context.partition_keys:
        try:
            report = states.pipeline.capture(key, **config.model_dump(), on_progress=progress_of(context))
        except SHARD_FAILURES as error:  # one shard does not hold back the others of the range
            context.log.error(str(error))
            failures.append(error)
            continue
        reports.append(report)
        context.add_asset_metadata(metadata.of_capture_report(report), partition_key=key)
    context.instance.add_run_tags(context.run.run_id, {CAPTURED_TAG: metadata.in_words(reports)})
    if failures:
        for report in reports:
            context.log_event(
                metadata.materialization_of(report.capture, report.written, "kept; another shard of the run failed")
            )
        raise failures[0]
    versions = [shard_data_version(r.capture.version, r.capture.capture_id) for r in reports]
    # A run of several partitions has one data version for all; whoever looks next records each its own.
    version = versions[0] if len(versions) == 1 else digest(versions)
    return dg.MaterializeResult(data_version=dg.DataVersion(version))


@dg.asset(
    deps=[teacher_capture],
    group_name="capture",
    kinds={"duckdb"},
    **MADE_HERE,
    pool=CATALOG_POOL,
    automation_condition=WHEN_DUE,
    description="DuckDB index of all captures: examples, statistics, lineage, history.",
)
def capture_catalog(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    pipeline = look().pipeline
    report = pipeline.refresh_catalog()
    return dg.MaterializeResult(
        metadata=metadata.of_catalog(report, pipeline), data_version=dg.DataVersion(report.identity)
    )


def _student(context: dg.AssetExecutionContext, config: TrainingConfig, kind: StudentKind) -> dg.MaterializeResult:
    states = look()
    written = config.force or not states.students.exists(kind)
    record = states.students.train(kind, **config.model_dump(), on_progress=progress_of(context))
    return dg.MaterializeResult(
        metadata=metadata.of_student(record, states.students.folder(kind), written),
        data_version=dg.DataVersion(record.spec.student_id),
    )


@dg.asset(
    **STUDENT,
    description="The student, trained on the captured distributions; loads with from_pretrained.",
)
def student_model(context: dg.AssetExecutionContext, config: TrainingConfig) -> dg.MaterializeResult:
    return _student(context, config, "student")


@dg.asset(
    **STUDENT,
    description="The honest control: same start, rows, order and steps, hard labels only.",
)
def control_student(context: dg.AssetExecutionContext, config: TrainingConfig) -> dg.MaterializeResult:
    if not find_home().settings().control:
        return dg.MaterializeResult(metadata={"control": "switched off"}, data_version=dg.DataVersion(OFF))
    return _student(context, config, "control")


@dg.asset(
    deps=[capture_catalog, student_model, control_student],
    group_name="students",
    kinds={"html"},
    **MADE_HERE,
    pool=GPU_POOL,
    automation_condition=WHEN_DUE,
    description="Held-out figures of untrained student, student, control and teacher, with plots.",
)
def student_evaluation(context: dg.AssetExecutionContext, config: DeviceConfig) -> dg.MaterializeResult:
    students = look().students
    folder = students.evaluate(device=config.device, force=config.force, on_progress=progress_of(context))
    return dg.MaterializeResult(metadata=metadata.of_report(folder), data_version=dg.DataVersion(students.report_id))
