"""When things run by themselves: the shard watcher, the conditions, the nightly refresh."""

from collections.abc import Callable

import dagster as dg

from distill_assets.foundation.errors import DistillError
from distill_assets.foundation.home import find_home
from distill_assets.foundation.settings import AutomationSettings
from distill_assets.orchestration import records
from distill_assets.orchestration.bring_up_to_date import bring_up_to_date
from distill_assets.orchestration.instance import UNFINISHED, close_dead_runs
from distill_assets.orchestration.partitions import partition_changes, shard_partitions
from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.orchestration.states import AssetStates

# Written by the daemon before its next tick, at some 40 ms each: of 2,000 new shards a batch at a time.
MOST_EVENTS = 200


def automation_settings() -> AutomationSettings:
    """The home's automation settings, read when the code location loads; the defaults if unreadable.

    A distill.yaml with an error must not take the web UI down: the assets say what is wrong.
    """
    try:
        return find_home().settings().automation
    except DistillError:
        return AutomationSettings()


def shard_watcher(settings: AutomationSettings, most_events: int = MOST_EVENTS) -> dg.SensorDefinition:
    """Registers shards that come, forgets those that go, observes those that changed.

    It also closes runs whose process is gone, and records captures that are in the store only: those
    of a range of partitions, for one, to which Dagster gives one data version. A tick records
    `most_events` of both at most; the next one asks Dagster what is still missing.
    """

    @dg.sensor(
        name="shard_watcher",
        minimum_interval_seconds=settings.watch_seconds,
        default_status=dg.DefaultSensorStatus.RUNNING if settings.start else dg.DefaultSensorStatus.STOPPED,
        description="Looks at the shard files; touching one does nothing, changing one is observed once.",
    )
    def watch(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        for run_id in close_dead_runs(context.instance):
            context.log.warning(f"closed run {run_id}, whose process was gone")
        try:
            states = AssetStates(Pipeline(find_home()))
            states.pipeline.home.sweep()
            shards = set(states.pipeline.shards)
            events: list[dg.AssetObservation | dg.AssetMaterialization] = [
                *records.new_observations(context.instance, states)
            ]
            # A run that is under way records its captures itself.
            if not context.instance.get_runs_count(dg.RunsFilter(statuses=UNFINISHED)):
                events += records.unrecorded_captures(context.instance, states.pipeline)
        except DistillError as error:
            return dg.SkipReason(str(error))
        new, gone = partition_changes(context.instance, shards)
        requests: list[dg.AddDynamicPartitionsRequest | dg.DeleteDynamicPartitionsRequest] = []
        if new:
            requests.append(shard_partitions.build_add_request(new))
        if gone:
            requests.append(shard_partitions.build_delete_request(gone))
        return dg.SensorResult(dynamic_partitions_requests=requests, asset_events=events[:most_events])

    return watch


def conditions_sensor(settings: AutomationSettings) -> dg.AutomationConditionSensorDefinition:
    """Evaluates the assets' automation conditions; stopped unless `automation.start`.

    In the code location's process, for the conditions are ours.
    """
    return dg.AutomationConditionSensorDefinition(
        "keep_up_to_date",
        target=dg.AssetSelection.all(),
        default_status=dg.DefaultSensorStatus.RUNNING if settings.start else dg.DefaultSensorStatus.STOPPED,
        minimum_interval_seconds=settings.watch_seconds,
        use_user_code_server=True,
    )


def refresh_job(definitions: Callable[[], dg.Definitions]) -> dg.JobDefinition:
    """The job behind the schedule: what `distill run` does. `definitions` is called when it runs."""

    class RefreshConfig(dg.Config):
        device: str = "auto"

    @dg.op(
        required_resource_keys={"process_mark"},
        description="Capture what changed, refresh the catalog, train and evaluate; what is current is left alone.",
    )
    def bring_everything_up_to_date(context: dg.OpExecutionContext, config: RefreshConfig) -> None:
        report = bring_up_to_date(definitions(), find_home(), device=config.device, on_step=context.log.info)
        context.log.info(f"captured {len(report.captured_shards)} shards, {report.rows_captured} rows")
        report.raise_failures()

    @dg.job(name="refresh", description="Bring everything up to date, through one run an asset and changed shard.")
    def refresh() -> None:
        bring_everything_up_to_date()

    return refresh


def nightly_refresh(job: dg.JobDefinition, settings: AutomationSettings) -> dg.ScheduleDefinition:
    """The schedule of `refresh_job`, at `automation.schedule`."""
    return dg.ScheduleDefinition(
        name="nightly_refresh",
        job=job,
        cron_schedule=settings.schedule,
        default_status=dg.DefaultScheduleStatus.RUNNING if settings.start else dg.DefaultScheduleStatus.STOPPED,
    )
