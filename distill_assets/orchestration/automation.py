"""When things run by themselves: the shard watcher, the conditions, the nightly refresh."""

import json
from collections.abc import Callable

import dagster as dg

from distill_assets.foundation.errors import DistillError
from distill_assets.foundation.home import find_home
from distill_assets.foundation.settings import AutomationSettings
from distill_assets.orchestration.bring_up_to_date import bring_up_to_date
from distill_assets.orchestration.partitions import DATA_VERSION_TAG, SHARDS, shard_partitions
from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.orchestration.states import AssetStates


def automation_settings() -> AutomationSettings:
    """The home's automation settings, read when the code location loads; the defaults if unreadable.

    A distill.yaml with an error must not take the web UI down: the assets say what is wrong.
    """
    try:
        return find_home().settings().automation
    except DistillError:
        return AutomationSettings()


def shard_watcher(settings: AutomationSettings) -> dg.SensorDefinition:
    """Registers shards that come, forgets those that go, observes those that changed."""

    @dg.sensor(
        name="shard_watcher",
        minimum_interval_seconds=settings.watch_seconds,
        default_status=dg.DefaultSensorStatus.RUNNING if settings.start else dg.DefaultSensorStatus.STOPPED,
        description="Looks at the shard files; touching one does nothing, changing one is observed once.",
    )
    def watch(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        try:
            states = AssetStates(Pipeline(find_home()))
            shards = {key: states.capture_version(key) for key in states.pipeline.shards}
        except DistillError as error:
            return dg.SkipReason(str(error))
        seen = json.loads(context.cursor) if context.cursor else {}
        registered = set(context.instance.get_dynamic_partitions(SHARDS))
        requests: list[dg.AddDynamicPartitionsRequest | dg.DeleteDynamicPartitionsRequest] = []
        if new := sorted(shards.keys() - registered):
            requests.append(shard_partitions.build_add_request(new))
        if gone := sorted(registered - shards.keys()):
            requests.append(shard_partitions.build_delete_request(gone))
        return dg.SensorResult(
            dynamic_partitions_requests=requests,
            asset_events=[
                dg.AssetObservation("dataset_shards", partition=key, tags={DATA_VERSION_TAG: version})
                for key, version in shards.items()
                if seen.get(key) != version
            ],
            cursor=json.dumps(shards),
        )

    return watch


def conditions_sensor(settings: AutomationSettings) -> dg.AutomationConditionSensorDefinition:
    """Evaluates the assets' automation conditions; stopped unless `automation.start`."""
    return dg.AutomationConditionSensorDefinition(
        "keep_up_to_date",
        target=dg.AssetSelection.all(),
        default_status=dg.DefaultSensorStatus.RUNNING if settings.start else dg.DefaultSensorStatus.STOPPED,
        minimum_interval_seconds=settings.watch_seconds,
    )


def refresh_job(definitions: Callable[[], dg.Definitions]) -> dg.JobDefinition:
    """The job behind the schedule: what `distill run` does. `definitions` is called when it runs."""

    class RefreshConfig(dg.Config):
        device: str = "auto"

    @dg.op(description="Capture what changed, refresh the catalog, train and evaluate; what is current is left alone.")
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
