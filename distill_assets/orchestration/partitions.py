"""Shards as dynamic partitions, and what Dagster has seen of them."""

from collections.abc import Mapping

import dagster as dg
from dagster import DagsterEventType

DATA_VERSION_TAG, CODE_VERSION_TAG = "dagster/data_version", "dagster/code_version"
# Of an input, by name: the data version that was read, and the number of the event that told it.
INPUT_VERSION_TAG, INPUT_EVENT_TAG = "dagster/input_data_version/{}", "dagster/input_event_pointer/{}"

CODE_VERSION = "1"  # of all assets
MATERIALIZED, OBSERVED = DagsterEventType.ASSET_MATERIALIZATION, DagsterEventType.ASSET_OBSERVATION

SHARDS = "shards"
shard_partitions = dg.DynamicPartitionsDefinition(name=SHARDS)


def partition_changes(instance: dg.DagsterInstance, keys: set[str]) -> tuple[list[str], list[str]]:
    """(to add, to delete) so that the registered partitions are exactly `keys`."""
    registered = set(instance.get_dynamic_partitions(SHARDS))
    return sorted(keys - registered), sorted(registered - keys)


def sync_partitions(instance: dg.DagsterInstance, keys: set[str]) -> None:
    """Make the registered partitions exactly `keys`."""
    new, gone = partition_changes(instance, keys)
    if new:
        instance.add_dynamic_partitions(SHARDS, new)
    for key in gone:
        instance.delete_dynamic_partition(SHARDS, key)


def recorded_versions(
    instance: dg.DagsterInstance, asset: str, event: DagsterEventType = MATERIALIZED
) -> Mapping[str, str]:
    """Partition -> data version of its latest event, as Dagster has it on record."""
    tags = instance.event_log_storage.get_latest_tags_by_partition(dg.AssetKey(asset), event, [DATA_VERSION_TAG])
    return {partition: values[DATA_VERSION_TAG] for partition, values in tags.items() if DATA_VERSION_TAG in values}


def latest_events(
    instance: dg.DagsterInstance, asset: str, event: DagsterEventType = MATERIALIZED
) -> Mapping[str, int]:
    """Partition -> number of its latest event; later events have greater numbers."""
    return instance.event_log_storage.get_latest_storage_id_by_partition(dg.AssetKey(asset), event)


def recorded_version(instance: dg.DagsterInstance, asset: str) -> str | None:
    """Data version of an unpartitioned asset's latest materialisation."""
    entry = instance.get_latest_materialization_event(dg.AssetKey(asset))
    materialization = entry.asset_materialization if entry else None
    return (materialization.tags or {}).get(DATA_VERSION_TAG) if materialization else None
