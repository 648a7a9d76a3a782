"""What automation should run now: what is not current although all that it is made from is there."""

from collections.abc import Mapping

import dagster as dg

from distill_assets.orchestration.records import needs_run
from distill_assets.orchestration.states import AssetStates

UNPARTITIONED = ""  # the key of an asset that has no partitions

Due = Mapping[str, str]  # partition -> what would be tried: asked for again only when that changes


def due(instance: dg.DagsterInstance, states: AssetStates, asset: str) -> Due | None:
    """What of `asset` should run, by partition; None while an input is missing or stale.

    Raises DistillError where there is more to say: an unreadable distill.yaml, an impossible student, no
    held-out shard.
    """
    if not _inputs_are_ready(instance, states, asset):
        return None
    if asset == "teacher_capture":
        usable = states.pipeline.shards.keys() & set(states.pipeline.uncaptured)
        if usable:  # what fails for a capture that is out of reach would not be tried again once it is back
            states.pipeline.store.require_in_reach(states.pipeline.spec.capture_id)
        return {key: _attempt(states, key) for key in sorted(usable)}
    return {UNPARTITIONED: states.data_version(asset)} if needs_run(instance, states, asset) else {}


def _inputs_are_ready(instance: dg.DagsterInstance, states: AssetStates, asset: str) -> bool:
    if asset == "tokenizer_compatibility":
        return True
    if needs_run(instance, states, "tokenizer_compatibility") or not states.pipeline.tokenizer_report().usable:
        return False
    if asset == "teacher_capture":
        states.pipeline.require_usable_pair()
        return True
    if asset == "capture_catalog":  # it lists what is captured; shards that failed do not hold it back
        return bool(states.pipeline.entries) or states.pipeline.home.catalog.exists()
    states.students.require_inputs()
    return not states.stale_inputs(asset)


def _attempt(states: AssetStates, key: str) -> str:
    """What decides how a capture ends: content, settings, and files that are there but not current."""
    pipeline, shard = states.pipeline, states.pipeline.shards[key]
    stale_file = pipeline.store.path_of(pipeline.spec.capture_id, key, shard.version).exists()
    pinned = pipeline.store.is_pinned(key)
    return f"{states.capture_version(key)} {pipeline.settings.data.on_bad_row} {stale_file} {pinned}"
