"""When an asset runs by itself: when the store lacks what would be made now."""

import json
from functools import lru_cache

import dagster as dg
from dagster import AutomationCondition as Condition

from distill_assets.foundation.errors import DistillError
from distill_assets.foundation.home import find_home
from distill_assets.orchestration.due import due
from distill_assets.orchestration.instance import THIS_PROCESS
from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.orchestration.states import AssetStates


@lru_cache(maxsize=1)
def _states(evaluation_id: int, moment: object) -> AssetStates:
    """One look at the home for all assets of a tick."""
    return AssetStates(Pipeline(find_home()))


class IsDue(dg.AutomationCondition[dg.AssetKey]):
    """True where `due` says so, once for each attempt.

    Dagster's own conditions know only its event log: not distill.yaml, not which files are there. This
    one asks the store, as `distill run` does, so that both do the same. What was requested is
    remembered, so that a failed run is not requested again until its input changes, but only as long
    as this process lives: whoever stops the web UI in the middle of a run finds it go on at the next start.
    """

    @property
    def name(self) -> str:
        return "not current in the store, inputs ready, not requested for this content yet"

    def evaluate(self, context: dg.AutomationContext[dg.AssetKey]) -> dg.AutomationResult[dg.AssetKey]:
        try:
            states = _states(context.evaluation_id, context.evaluation_time)
            wanted = due(context.asset_graph_view.instance, states, context.key.to_user_string())
        except DistillError as error:
            context.log.warning(str(error))
            wanted = None
        if wanted is None or _inputs_are_requested(context):
            return dg.AutomationResult(context, context.get_empty_subset(), cursor=context.cursor)
        memory = json.loads(context.cursor or "{}")
        before: dict[str, str] = memory["requested"] if memory.get("process") == THIS_PROCESS else {}
        requested = {key: version for key, version in before.items() if wanted.get(key) == version}
        candidates = context.candidate_subset
        if candidates.is_partitioned:
            now = candidates.expensively_compute_partition_keys() & wanted.keys() - requested.keys()
            subset = candidates.compute_intersection_with_partition_keys(now)
        else:
            now = set() if candidates.is_empty else wanted.keys() - requested.keys()
            subset = candidates if now else context.get_empty_subset()
        requested |= {key: wanted[key] for key in now}
        memory = {"process": THIS_PROCESS, "requested": requested}
        return dg.AutomationResult(context, subset, cursor=json.dumps(memory))


def _inputs_are_requested(context: dg.AutomationContext[dg.AssetKey]) -> bool:
    """Whether this very tick asks for an input. Dagster's `will_be_requested` sees only what fits one run."""
    requested = context.request_subsets_by_key
    parents = context.asset_graph.get(context.key).parent_keys
    return any(key in requested and not requested[key].is_empty for key in parents)


# In this order: what is running, or waits for an input that is running, is no candidate for `IsDue`.
WHEN_DUE = ~Condition.in_progress() & ~Condition.any_deps_in_progress() & IsDue()
