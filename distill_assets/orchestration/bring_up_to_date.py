"""What `distill run` and the nightly schedule do: one Dagster run for each thing that changed.

Nothing built into Dagster selects "changed only", so this walks the graph in order, asks the
pipeline what is current, and runs exactly the rest, in this process, on the home's instance: real
run records, one load of the teacher, no run for what did not change.
"""

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import dagster as dg

from distill_assets.dataset_shards.discover import Shard
from distill_assets.foundation.errors import SHARD_FAILURES, CaptureError, StaleInputs, UsageError
from distill_assets.foundation.home import Home
from distill_assets.foundation.wording import counted
from distill_assets.orchestration import metadata, records
from distill_assets.orchestration.assets import WHY_TAG
from distill_assets.orchestration.checks import CAPTURE_CHECKS, WITH_TEACHER
from distill_assets.orchestration.instance import close_dead_runs, holder_of, open_instance, process_tags, quick_records
from distill_assets.orchestration.interrupts import noticed_interrupts
from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.orchestration.states import INPUTS, AssetStates
from distill_assets.orchestration.training_processes import require_devices
from distill_assets.student_evaluation.identity import HTML_FILE
from distill_assets.teacher_capture.plan import CapturePlan, ShardPlan

StepListener = Callable[[str], None]
POOL_SECONDS = 1.0  # between two looks at a pool that is full
WITH_DEVICE = frozenset({"teacher_capture", "student_model", "control_student", "student_evaluation"})
TRAINED = frozenset({"student_model", "control_student"})


@dataclass
class RunReport:
    """What a run did. `captured_shards`: those for which a file was written; `bad_rows`: theirs that were left out, as
    `data.on_bad_row` says; `estimate`: seconds, bytes and basis of the plan for these shards; `checks`: what the checks
    of these captures found, each with `passed` and `found`; `evaluation`: figures by model and metric, of which
    `summary` is the table in words.
    """

    captured_shards: list[str] = field(default_factory=list)
    rows_captured: int = 0
    rows_reused: int = 0
    bad_rows: int = 0
    tokens_captured: int = 0
    capture_seconds: float = 0.0
    bytes_written: int = 0
    estimate: dict[str, Any] | None = None
    materialized: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)
    catalog: dict[str, Any] | None = None
    student_id: str | None = None
    control_id: str | None = None
    evaluation: dict[str, Any] | None = None
    summary: list[dict[str, str]] = field(default_factory=list)
    report: str | None = None
    seconds: float = 0.0

    def _failure_message(self) -> str:
        first, *others = self.failures.values()
        more = f" (and {len(others)} more; `distill plan` lists them)" if others else ""
        return f"{first}{more}\nno student was trained; shards that could be captured are kept"

    def to_json(self) -> dict[str, Any]:
        """All of it as numbers: the table in words is for terminals."""
        return {name: value for name, value in asdict(self).items() if name != "summary"}

    def raise_failures(self) -> None:
        """CaptureError when a shard failed, in two lines."""
        if self.failures:
            raise CaptureError(self._failure_message())


def bring_up_to_date(
    definitions: dg.Definitions,
    home: Home,
    *,
    shards: Sequence[str] = (),
    only: str | None = None,
    device: str = "auto",
    processes: int = 1,
    force: bool = False,
    rehash: bool = False,
    on_step: StepListener = lambda line: None,
    report: RunReport | None = None,
) -> RunReport:
    """Materialise what is not current. `shards`: capture those and refresh the catalog only;
    `only`: that asset alone, StaleInputs if what it reads is not up to date. `report` is filled as the
    walk goes: whoever gives one still has it when an error or Ctrl-C ends the walk.

    A failing shard does not hold back the others: they are captured, the catalog is refreshed, no
    student is trained, and the report's `failures` say why. Any other failure is raised.
    """
    if only is not None and only not in INPUTS:
        raise UsageError(f"there is no asset {only} to run; choose one of: {', '.join(INPUTS)}")
    if only is not None and shards:
        raise UsageError("give --shard or --only, not both")
    if device not in ("auto", "cpu"):  # these are everywhere, and looking for others takes torch, and seconds
        from distill_assets.foundation.devices import resolve_device

        resolve_device(device)  # before a shard is tried, and not once a shard
    if processes > 1:
        require_devices(device, processes)
    started = time.monotonic()
    report = RunReport() if report is None else report
    home.sweep()
    with open_instance(home) as instance, noticed_interrupts() as check_interrupt:
        pipeline = Pipeline(home, rehash=rehash)
        walk = _Walk(definitions, instance, pipeline, report, device, processes, force, on_step, check_interrupt)
        try:
            if only is not None:
                walk.only(only)
            else:
                walk.everything(shards)
        finally:
            report.seconds = round(time.monotonic() - started, 2)
    return report


class _Walk:
    """One pass over the graph."""

    def __init__(
        self,
        definitions: dg.Definitions,
        instance: dg.DagsterInstance,
        pipeline: Pipeline,
        report: RunReport,
        device: str,
        processes: int,
        force: bool,
        on_step: StepListener,
        check_interrupt: Callable[[], None],
    ) -> None:
        self.job = definitions.resolve_implicit_global_asset_job_def()
        # The checks of captures run once for all shards, not once a shard.
        self.captures_alone = self.job.get_subset(
            asset_selection={dg.AssetKey("teacher_capture")}, asset_check_selection=frozenset()
        )
        self.graph = definitions.resolve_asset_graph()
        self.instance, self.pipeline, self.states = instance, pipeline, AssetStates(pipeline)
        self.device, self.processes, self.force, self.on_step = device, processes, force, on_step
        self.check_interrupt = check_interrupt
        self.report = report

        self._close_dead_runs()

    def everything(self, shards: Sequence[str]) -> None:
        plan = self.pipeline.plan()
        self._require_shards(plan, shards)
        records.observe_shards(self.instance, self.states)
        self._check_tokenizers()
        self._capture(plan, shards)
        self._bring("capture_catalog")
        self.report.catalog = self.pipeline.catalog_summary()
        if not shards and not self.report.failures:
            self.states.students.require_inputs()
            for asset in ("student_model", "control_student", "student_evaluation"):
                self._bring(asset)
            self._report_students()

    def only(self, asset: str) -> None:
        records.observe_shards(self.instance, self.states)
        if stale := self.states.stale_inputs(asset):
            raise StaleInputs(
                f"{asset} reads {stale[0]}, which is not up to date; `distill run --only {stale[0]}` makes that first, "
                "`distill run` everything"
            )
        if asset == "tokenizer_compatibility":
            self._check_tokenizers()
        elif asset == "teacher_capture":
            plan = self.pipeline.plan()
            self._require_shards(plan, ())
            self._capture(plan, ())
        else:
            self._bring(asset)
        if not self.pipeline.uncaptured:
            self._report_students()

    def _require_shards(self, plan: CapturePlan, shards: Sequence[str]) -> None:
        self.pipeline.require_any_shard()
        present = {p.shard for p in plan.shards if p.state != "removed"}
        for shard in shards:
            if shard not in present:
                raise UsageError(f"there is no shard {shard}; `distill plan` lists them")

    def _check_tokenizers(self) -> None:
        try:
            self._bring("tokenizer_compatibility")
        except dg.DagsterError:  # the blocking check failed; the guard says why, with the evidence
            self.pipeline.require_usable_pair()
            raise
        told = self.pipeline.tokenizer_verdict
        if told is None or not told.usable:  # else whoever captures or trains reaches the verdict again
            self.pipeline.require_usable_pair()

    def _capture(self, plan: CapturePlan, only: Sequence[str]) -> None:
        """Run the plan's shards, one Dagster run each; a failure is kept and the next one goes on."""
        records.add_missing_captures(self.instance, self.pipeline)
        planned = {p.shard: p for p in plan.shards if not only or p.shard in only}
        unusable = {p.key: p.message for p in self.pipeline.discovery.problems}
        for key in sorted(planned.keys() & unusable.keys()):
            self._failed(key, unusable[key])
        candidates = self.pipeline.discovery.shards if self.force else plan.todo
        tried = [shard for shard in candidates if shard.key in planned]
        for shard in tried:
            self._capture_one(shard, "forced: all rows" if self.force else _why(planned[shard.key]))
        if not self.force:  # nothing was foreseen of what is current
            self.report.estimate = _estimate(plan, self.report.captured_shards)
        if tried:
            self.pipeline.forget_captures()
            self.states = AssetStates(self.pipeline)
        if self.report.captured_shards:
            self._check_captures(self.report.captured_shards)

    def _check_captures(self, shards: Sequence[str]) -> None:
        """One run of the capture checks for all that was captured; what they find stops nothing.

        Where no row went through the teacher it is not loaded to be asked again.
        """
        chosen = [c for c in CAPTURE_CHECKS if c is not WITH_TEACHER or self.report.rows_captured]
        self.on_step("checks of teacher_capture on what was captured")
        self._wait_for_pools("teacher_capture")
        keys = frozenset(key for definition in chosen for key in definition.check_keys)
        configs: dict[str, dict[str, Any]] = {definition.op.name: {"shards": list(shards)} for definition in chosen}
        if WITH_TEACHER.op.name in configs:
            configs[WITH_TEACHER.op.name]["device"] = self.device
        result = self._execute(self.job.get_subset(asset_check_selection=keys), configs, raise_on_error=False)
        for evaluation in result.get_asset_check_evaluations():
            found = evaluation.description or ""
            self.report.checks[evaluation.check_name] = {"passed": evaluation.passed, "found": found}
            if not evaluation.passed:
                self.on_step(f"{evaluation.severity.value.lower()}: {evaluation.check_name} failed: {found}")
        names = {c.op.name: key.name for c in chosen for key in c.check_keys}
        for event in result.all_events:
            if event.is_step_failure:
                name, found = names[str(event.step_key)], f"it could not be made ({_cause(event)})"
                self.report.checks[name] = {"passed": False, "found": found}
                self.on_step(f"{name}: {found}")

    def _capture_one(self, shard: Shard, why: str) -> None:
        self.on_step(f"teacher_capture {shard.key} ({why})")
        try:
            written = self._materialize("teacher_capture", partition=shard.key, why=why)
            now = Pipeline(self.pipeline.home)  # the file may have been edited while other shards were captured
            capture = now.capture_of(now.shard(shard.key))
        except (*SHARD_FAILURES, StaleInputs) as error:
            self._failed(shard.key, str(error))
            return
        if not written:  # somebody else's run was faster
            return
        stats = capture.stats
        self.report.captured_shards.append(shard.key)
        self.report.bytes_written += capture.bytes
        self.report.rows_captured += stats.rows_captured
        self.report.rows_reused += stats.rows_reused
        self.report.bad_rows += stats.bad_rows
        self.report.tokens_captured += stats.tokens_captured
        self.report.capture_seconds = round(self.report.capture_seconds + stats.seconds, 2)

    def _failed(self, key: str, message: str) -> None:
        self.on_step(f"failed: {message}")
        self.report.failures[key] = message

    def _bring(self, asset: str) -> None:
        """Materialise an unpartitioned asset unless it is current and Dagster knows."""
        forced = self.force and asset in WITH_DEVICE
        if forced or records.needs_run(self.instance, self.states, asset):
            self.on_step(asset)
            self._materialize(asset)

    def _materialize(self, asset: str, partition: str | None = None, why: str | None = None) -> bool:
        """Run one asset; False when its body found its output there already and said so."""
        config: dict[str, dict[str, Any]] = {}
        if asset in WITH_DEVICE:
            config = {asset: {"device": self.device, "force": self.force}}
        if asset in TRAINED:
            config[asset]["processes"] = self.processes
        self._wait_for_pools(asset)
        selection: dict[str, Any] = {"asset_selection": [dg.AssetKey(asset)]}
        job = self.job
        if asset == "teacher_capture":
            job, selection = self.captures_alone, {}
        tags = {WHY_TAG: why} if why else {}
        result = self._execute(job, config, tags=tags, partition_key=partition, **selection)
        self.report.materialized.append(f"{asset}[{partition}]" if partition else asset)
        [event] = result.asset_materializations_for_node(asset)
        return event.metadata[metadata.WRITTEN].value is not False if metadata.WRITTEN in event.metadata else True

    def _execute(
        self,
        job: dg.JobDefinition,
        configs: Mapping[str, Mapping[str, Any]],
        tags: Mapping[str, str] | None = None,
        **options: Any,
    ) -> dg.ExecuteInProcessResult:
        """A Dagster run in this process. `configs`: run configuration by op."""
        run_id = str(uuid.uuid4())
        run_config = {
            "ops": {name: {"config": config} for name, config in configs.items()},
            "loggers": {"console": {"config": {"log_level": "CRITICAL"}}},
        }
        tags = {**process_tags(run_id), **(tags or {})}
        try:
            with quick_records(self.pipeline.home, run_id):
                return job.execute_in_process(
                    instance=self.instance, run_id=run_id, run_config=run_config, tags=tags, **options
                )
        except dg.DagsterExecutionInterruptedError:  # Dagster's own word for Ctrl-C inside a run
            raise KeyboardInterrupt from None
        finally:
            self.check_interrupt()

    def _wait_for_pools(self, asset: str) -> None:
        """Wait until no slot is missing, saying who holds it. Left to itself Dagster would wait too, but
        without sleeping, and deaf to Ctrl-C.
        """
        for pool in self.graph.get(dg.AssetKey(asset)).pools or ():
            said = None
            while holder := holder_of(self.instance, pool):
                if holder != said:
                    self.on_step(
                        f"{asset} waits for the {pool} pool, held by {holder}; if that process is gone, "
                        f"free the slot in the web UI (Deployment, Concurrency)"
                    )
                    said = holder
                time.sleep(POOL_SECONDS)
                self.check_interrupt()
                self._close_dead_runs()

    def _close_dead_runs(self) -> None:
        for run_id in close_dead_runs(self.instance):
            self.on_step(f"closed run {run_id[:8]}, whose process was gone")

    def _report_students(self) -> None:
        students = self.states.students
        made = {kind: students.ids[kind] for kind in students.kinds if students.exists(kind)}
        self.report.student_id, self.report.control_id = made.get("student"), made.get("control")
        if record := students.evaluation():
            overall = record["overall"]
            self.report.evaluation = {name: overall[name] for name in ("n_rows", "n_positions", "models")}
            self.report.summary = record["summary"]
            self.report.report = str(students.report_folder / HTML_FILE)


def _cause(failure: dg.DagsterEvent) -> str:
    """What ended a step, in a line: of its chain of errors the first that is not Dagster's, without its kind."""
    error = failure.step_failure_data.error
    while error and error.cause and (error.cls_name or "").startswith("Dagster"):
        error = error.cause
    lines = error.message.strip().splitlines() if error else []
    return lines[0].partition(": ")[2] or lines[0] if lines else "for no reason given"


def _why(plan: ShardPlan) -> str:
    return plan.state if plan.rows is None else f"{plan.state}: {plan.rows_to_capture:,} of {counted(plan.rows, 'row')}"


def _estimate(plan: CapturePlan, captured: Sequence[str]) -> dict[str, Any] | None:
    """What the plan foresaw for shards that were captured, to be told beside what it took."""
    planned = [p for p in plan.shards if p.shard in captured]
    if not planned:
        return None
    seconds = [p.estimated_seconds for p in planned]
    return {
        "seconds": None if None in seconds else round(sum(s for s in seconds if s is not None), 1),
        "bytes": sum(p.estimated_bytes or 0 for p in planned),
        "basis": plan.basis,
    }
