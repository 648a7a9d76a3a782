"""Asset checks beside the blocking one of tokenizer_compatibility."""

import dagster as dg

from distill_assets.capture_catalog.verify import compare_with_store
from distill_assets.foundation.home import find_home
from distill_assets.orchestration.assets import capture_catalog, student_evaluation
from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.orchestration.students import StudentSide


@dg.asset_check(asset=capture_catalog, description="Every current capture is listed, with the rows its file has.")
def catalog_matches_store() -> dg.AssetCheckResult:
    pipeline = Pipeline(find_home())
    problems = compare_with_store(pipeline.home.catalog, [entry.capture for entry in pipeline.entries])
    return dg.AssetCheckResult(passed=not problems, metadata={"problems": "\n".join(problems[:20]) or "none"})


@dg.asset_check(
    asset=student_evaluation,
    description="The student is closer to the teacher (KL on held-out rows) than the control, beyond the interval.",
)
def student_beats_control() -> dg.AssetCheckResult:
    record = StudentSide(Pipeline(find_home())).evaluation()
    if record is None:
        return dg.AssetCheckResult(
            passed=False, severity=dg.AssetCheckSeverity.WARN, metadata={"verdict": "the report is not there, whole"}
        )
    if record["rival"] != "control":
        return dg.AssetCheckResult(passed=True, metadata={"verdict": "there is no control to compare with"})
    return dg.AssetCheckResult(
        passed=record["outcome"] == "closer",
        severity=dg.AssetCheckSeverity.WARN,
        metadata={"verdict": record["verdict"]},
    )
