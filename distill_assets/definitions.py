"""What exists: seven assets, their checks, one sensor for shards, one for conditions, one schedule.

Read this first. Nothing else in the package wires anything.
"""

import warnings

import dagster as dg

# Observable source assets and backfill policies are marked beta; what they do here is tested.
warnings.filterwarnings("ignore", category=dg.BetaWarning)

from distill_assets.orchestration import assets, automation, checks  # noqa: E402
from distill_assets.orchestration.instance import process_mark  # noqa: E402

settings = automation.automation_settings()
refresh = automation.refresh_job(lambda: defs)

defs: dg.Definitions = dg.Definitions(
    assets=dg.with_source_code_references(
        [
            assets.dataset_shards,
            assets.tokenizer_compatibility,
            assets.teacher_capture,
            assets.capture_catalog,
            assets.student_model,
            assets.control_student,
            assets.student_evaluation,
        ]
    ),
    asset_checks=[*checks.CAPTURE_CHECKS, checks.catalog_matches_store, checks.student_beats_control],
    resources={"process_mark": process_mark},
    jobs=[refresh, assets.observe_shards],
    sensors=[automation.shard_watcher(settings), automation.conditions_sensor(settings)],
    schedules=[automation.nightly_refresh(refresh, settings)],
    # One process a run: the teacher is loaded once for all shards of a run, and steps start at once.
    executor=dg.in_process_executor,
)
