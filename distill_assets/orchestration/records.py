"""Dagster's records brought in line with the store: observations, and captures it has not heard of."""

import dagster as dg
from dagster import DagsterEventType

from distill_assets.orchestration import metadata
from distill_assets.orchestration.partitions import (
    DATA_VERSION_TAG,
    recorded_version,
    recorded_versions,
    shard_data_version,
    sync_partitions,
)
from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.orchestration.states import AssetStates


def needs_run(instance: dg.DagsterInstance, states: AssetStates, asset: str) -> bool:
    """Whether an unpartitioned asset is not current in the store, or Dagster does not know that it is."""
    return not states.is_current(asset) or recorded_version(instance, asset) != states.data_version(asset)


def new_observations(instance: dg.DagsterInstance, states: AssetStates) -> list[dg.AssetObservation]:
    """An observation for each shard whose version Dagster has not seen."""
    versions = {key: states.capture_version(key) for key in states.pipeline.shards}
    seen = recorded_versions(instance, "dataset_shards", DagsterEventType.ASSET_OBSERVATION)
    return [
        dg.AssetObservation("dataset_shards", partition=key, tags={DATA_VERSION_TAG: version})
        for key, version in versions.items()
        if seen.get(key) != version
    ]


def unrecorded_captures(instance: dg.DagsterInstance, pipeline: Pipeline) -> list[dg.AssetMaterialization]:
    """A materialisation for each capture that is current in the store but not in Dagster."""
    recorded = recorded_versions(instance, "teacher_capture")
    return [
        metadata.materialization_of(capture, False, "found in the store")
        for capture in (entry.capture for entry in pipeline.entries)
        if recorded.get(capture.shard) != shard_data_version(capture.version, capture.capture_id)
    ]


def observe_shards(instance: dg.DagsterInstance, states: AssetStates) -> None:
    """Register the shards as partitions and record those that changed."""
    sync_partitions(instance, set(states.pipeline.shards))
    for observation in new_observations(instance, states):
        instance.report_runless_asset_event(observation)


def add_missing_captures(instance: dg.DagsterInstance, pipeline: Pipeline) -> None:
    """Record captures that Dagster has not heard of, without the teacher."""
    for materialization in unrecorded_captures(instance, pipeline):
        instance.report_runless_asset_event(materialization)
