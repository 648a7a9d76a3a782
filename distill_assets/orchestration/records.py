"""Dagster's records brought in line with the store: observations, and captures it has not heard of."""

from itertools import takewhile

import dagster as dg

from distill_assets.orchestration import metadata
from distill_assets.orchestration.partitions import (
    DATA_VERSION_TAG,
    OBSERVED,
    latest_events,
    recorded_version,
    recorded_versions,
    sync_partitions,
)
from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.orchestration.states import AssetStates, shard_data_version

MOST_LOOKED_AT = 20  # comparisons of the tokenizers; more of them alike only mean that captures are recorded again


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
    """A materialisation for each current capture that is not on record since its shard was observed as it is, and the
    tokenizers found to be as they are.

    A record points at the events that told of its inputs. Without any, Dagster shows the capture as fresh whatever
    changes; pointing at earlier ones, as stale for ever. A shard not observed as it is is left for the next time.
    """
    tokenizers, tokenizers_since = _tokenizers(instance)
    recorded, written = recorded_versions(instance, "teacher_capture"), latest_events(instance, "teacher_capture")
    observed = recorded_versions(instance, "dataset_shards", OBSERVED)
    seen = latest_events(instance, "dataset_shards", OBSERVED)
    found = []
    for capture in (entry.capture for entry in pipeline.entries):
        key, version = capture.shard, shard_data_version(capture.version, capture.capture_id)
        if observed.get(key) != version:
            continue
        if recorded.get(key) != version or written[key] < max(seen[key], tokenizers_since):
            inputs = {"dataset_shards": (version, str(seen[key])), "tokenizer_compatibility": tokenizers}
            found.append(metadata.materialization_of(capture, False, "found in the store", inputs))
    return found


def _tokenizers(instance: dg.DagsterInstance) -> tuple[tuple[str, str], int]:
    """Data version of the tokenizers and the number of its latest event, and of the first since which it is so.

    Where they were never compared, what Dagster itself notes then.
    """
    records = instance.fetch_materializations(dg.AssetKey("tokenizer_compatibility"), limit=MOST_LOOKED_AT).records
    versions = [
        (r.asset_materialization.tags or {}).get(DATA_VERSION_TAG, "") for r in records if r.asset_materialization
    ]
    if not records:
        return ("INITIAL", "NULL"), 0
    same = list(takewhile(lambda pair: pair[1] == versions[0], zip(records, versions, strict=True)))
    return (versions[0], str(records[0].storage_id)), same[-1][0].storage_id


def observe_shards(instance: dg.DagsterInstance, states: AssetStates) -> None:
    """Register the shards as partitions and record those that changed."""
    sync_partitions(instance, set(states.pipeline.shards))
    for observation in new_observations(instance, states):
        instance.report_runless_asset_event(observation)


def add_missing_captures(instance: dg.DagsterInstance, pipeline: Pipeline) -> None:
    """Record captures that Dagster has not heard of, without the teacher."""
    for materialization in unrecorded_captures(instance, pipeline):
        instance.report_runless_asset_event(materialization)
