"""When an asset runs by itself, given what happened upstream."""

from dagster import AutomationCondition as Condition

_CHANGED = Condition.code_version_changed() | Condition.any_deps_match(Condition.data_version_changed())

# A capture runs when its shard or the settings changed since it was last requested, or when it is
# missing; a failed one waits for its input to change, or for somebody to run it again.
ON_CHANGE = (
    (
        _CHANGED.since_last_handled()  # type: ignore[misc]  # Dagster's own annotations disagree
        | (Condition.missing() & ~Condition.execution_failed())
    )
    & ~Condition.any_deps_missing()
    & ~Condition.any_deps_in_progress()
    & ~Condition.in_progress()
    & Condition.all_deps_blocking_checks_passed()
)
# The catalog describes whatever is captured, so one missing partition must not hold it back.
ON_ANY_CAPTURE = Condition.eager().without(~Condition.any_deps_missing())
ON_UPSTREAM = Condition.eager()
