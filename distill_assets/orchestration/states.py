"""Which assets are current: their artifacts compared with what the pipeline would make now."""

from collections.abc import Callable, Mapping

from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.orchestration.students import StudentSide

OFF = "off"  # data version of the control when `control: false`

INPUTS: Mapping[str, tuple[str, ...]] = {
    "tokenizer_compatibility": (),
    "teacher_capture": ("tokenizer_compatibility",),
    "capture_catalog": ("teacher_capture",),
    "student_model": ("teacher_capture", "capture_catalog"),
    "control_student": ("teacher_capture", "capture_catalog"),
    "student_evaluation": ("teacher_capture", "capture_catalog", "student_model", "control_student"),
}


def shard_data_version(shard_version: str, capture_id: str) -> str:
    """Data version of a shard: content joined with the capture settings, so both kinds of change ripple."""
    return f"{shard_version[:16]}-{capture_id}"


class AssetStates:
    """Answers for one pipeline. Ask again with a new one after something was made."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.students = StudentSide(pipeline)
        self._current: dict[str, bool] = {}

    def data_version(self, asset: str) -> str:
        """The identity of what an unpartitioned asset would be now."""
        versions: Mapping[str, Callable[[], str]] = {
            "tokenizer_compatibility": lambda: self.pipeline.tokenizer_identity,
            "capture_catalog": lambda: self.pipeline.catalog_identity,
            "student_model": lambda: self.students.ids["student"],
            "control_student": lambda: self.students.ids.get("control", OFF),
            "student_evaluation": lambda: self.students.report_id,
        }
        return versions[asset]()

    def is_current(self, asset: str) -> bool:
        """Whether the artifact of this identity is there; looked at once."""
        if asset not in self._current:
            self._current[asset] = self._is_current(asset)
        return self._current[asset]

    def _is_current(self, asset: str) -> bool:
        if asset == "tokenizer_compatibility":
            return self.pipeline.tokenizer_verdict is not None
        if asset == "teacher_capture":
            return not self.pipeline.uncaptured
        if asset == "capture_catalog":
            return self.pipeline.catalog_is_current
        if asset == "student_evaluation":
            return self.students.report_exists
        if asset == "control_student" and not self.pipeline.settings.control:
            return True
        return self.students.exists("student" if asset == "student_model" else "control")

    def stale_inputs(self, asset: str) -> list[str]:
        """The inputs of an asset that are not current, in the graph's order."""
        return [name for name in INPUTS[asset] if not self.is_current(name)]

    def capture_version(self, key: str) -> str:
        """Data version of one shard, and of its capture once it is made."""
        shard = self.pipeline.shard(key)
        return shard_data_version(shard.version, self.pipeline.capture_id_of(shard))
