"""Dagster's records brought in line with the store: observations, and captures it has not heard of."""

import dagster as dg

from distill_assets.orchestration import metadata
from distill_assets.orchestration.partitions import (
    DATA_VERSION_TAG,
    OBSERVED,
    latest_events,
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
    seen = recorded_versions(instance, "dataset_shards", OBSERVED)
    return [
        dg.AssetObservation("dataset_shards", partition=key, tags={DATA_VERSION_TAG: version})
        for key, version in versions.items()
        if seen.get(key) != version
    ]


def unrecorded_captures(instance: dg.DagsterInstance, pipeline: Pipeline) -> list[dg.AssetMaterialization]:
    """A materialisation for each current capture that Dagster has no record of since it observed the shard as it is.

    The record points at that observation: what names no inputs Dagster shows as fresh whatever changes, and what
    was recorded before its shard was observed as stale for ever. So a shard that was not observed as it is, and all
    shards before the tokenizers were compared, are left for the next time.
    """
    tokenizers = instance.fetch_materializations(dg.AssetKey("tokenizer_compatibility"), limit=1).records
    if not tokenizers:
        return []
    compared = (recorded_version(instance, "tokenizer_compatibility") or "", tokenizers[0].storage_id)
    recorded, written = recorded_versions(instance, "teacher_capture"), latest_events(instance, "teacher_capture")
    observed = recorded_versions(instance, "dataset_shards", OBSERVED)
    seen = latest_events(instance, "dataset_shards", OBSERVED)
    found = []
    for capture in (entry.capture for entry in pipeline.entries):
        key, version = capture.shard, shard_data_version(capture.version, capture.capture_id)
        is_recorded = recorded.get(key) == version and written[key] > seen.get(key, 0)
        if observed.get(key) == version and not is_recorded:
            inputs = {"dataset_shards": (version, seen[key]), "tokenizer_compatibility": compared}
            found.append(metadata.materialization_of(capture, False, "found in the store", inputs))
    return found


def observe_shards(instance: dg.DagsterInstance, states: AssetStates) -> None:
    """Register the shards as partitions and record those that changed."""
    sync_partitions(instance, set(states.pipeline.shards))
    for observation in new_observations(instance, states):
        instance.report_runless_asset_event(observation)


def add_missing_captures(instance: dg.DagsterInstance, pipeline: Pipeline) -> None:
    """Record captures that Dagster has not heard of, without the teacher."""
    for materialization in unrecorded_captures(instance, pipeline):
        instance.report_runless_asset_event(materialization)
