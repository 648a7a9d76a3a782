"""Dagster's records brought in line with the store: observations, and captures it has not heard of."""

import dagster as dg
from dagster import DagsterEventType

from distill_assets.orchestration import metadata
from distill_assets.orchestration.partitions import (
    DATA_VERSION_TAG,
    recorded_versions,
    shard_data_version,
    sync_partitions,
)
from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.orchestration.states import AssetStates


def observe_shards(instance: dg.DagsterInstance, states: AssetStates) -> None:
    """Register the shards as partitions and record an observation for each that changed."""
    versions = {key: states.capture_version(key) for key in states.pipeline.shards}
    sync_partitions(instance, set(versions))
    seen = recorded_versions(instance, "dataset_shards", DagsterEventType.ASSET_OBSERVATION)
    for key, version in versions.items():
        if seen.get(key) != version:
            observation = dg.AssetObservation("dataset_shards", partition=key, tags={DATA_VERSION_TAG: version})
            instance.report_runless_asset_event(observation)


def add_missing_captures(instance: dg.DagsterInstance, pipeline: Pipeline) -> None:
    """Record captures that are current in the store but not in Dagster, without the teacher."""
    recorded = recorded_versions(instance, "teacher_capture")
    for entry in pipeline.entries:
        capture = entry.capture
        version = shard_data_version(capture.version, capture.capture_id)
        if recorded.get(capture.shard) != version:
            instance.report_runless_asset_event(
                dg.AssetMaterialization(
                    "teacher_capture",
                    partition=capture.shard,
                    description="found in the store",
                    metadata=metadata.of_capture(capture),
                    tags={DATA_VERSION_TAG: version},
                )
            )
