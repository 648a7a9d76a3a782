"""What automation should run now: what is not current although all that it is made from is there."""

from collections.abc import Mapping

import dagster as dg

from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.orchestration.records import needs_run
from distill_assets.orchestration.states import AssetStates

UNPARTITIONED = ""  # the key of an asset that has no partitions

Due = Mapping[str, str]  # partition -> the data version it would get


def due(instance: dg.DagsterInstance, states: AssetStates, asset: str) -> Due | None:
    """What of `asset` should run, by partition; None while an input is missing, stale or refused.

    Raises DistillError when the home cannot be looked at.
    """
    if not _inputs_are_ready(instance, states, asset):
        return None
    if asset == "teacher_capture":
        usable = states.pipeline.shards.keys() & set(states.pipeline.uncaptured)
        return {key: states.capture_version(key) for key in sorted(usable)}
    return {UNPARTITIONED: states.data_version(asset)} if needs_run(instance, states, asset) else {}


def _inputs_are_ready(instance: dg.DagsterInstance, states: AssetStates, asset: str) -> bool:
    if asset == "tokenizer_compatibility":
        return True
    if needs_run(instance, states, "tokenizer_compatibility") or not states.pipeline.tokenizer_report().usable:
        return False
    if asset == "capture_catalog":  # it lists what is captured; shards that failed do not hold it back
        return bool(states.pipeline.entries) and not _awaited(states.pipeline)
    if states.stale_inputs(asset):
        return False
    if asset != "teacher_capture":
        states.students.require_inputs()
    return True


def _awaited(pipeline: Pipeline) -> list[str]:
    """Shards that will be captured: not current, and not failed with this content."""
    shards = [pipeline.shards[key] for key in pipeline.uncaptured if key in pipeline.shards]
    return [s.key for s in shards if not pipeline.store.failure(pipeline.spec.capture_id, s.key, s.version)]
