"""What the sensors request, tick by tick, on a real home: as much as `distill run` would do, and no more."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import dagster as dg
import pytest
from dagster import DagsterEventType
from dagster._core.definitions.data_version import CachingStaleStatusResolver
from dagster._core.loader import LoadingContextForTest
from dagster._serdes import serialize_value

from distill_assets.definitions import defs
from distill_assets.foundation.home import Home
from distill_assets.foundation.settings import AutomationSettings
from distill_assets.orchestration.automation import shard_watcher
from distill_assets.orchestration.instance import open_instance
from distill_assets.orchestration.partitions import SHARDS, recorded_versions
from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.orchestration.states import INPUTS, AssetStates
from tests import tiny
from tests.bench import edit

FIRST_FILL = [
    ["tokenizer_compatibility"],
    ["teacher_capture[heldout]", "teacher_capture[s0]", "teacher_capture[s1]"],
    ["capture_catalog"],
    ["control_student", "student_model"],
    ["student_evaluation"],
    [],
]


class Daemon:
    """Ticks both sensors as Dagster's daemon does, and runs what they request."""

    def __init__(self, root: Path, instance: dg.DagsterInstance) -> None:
        self.root = root
        self.instance = instance
        self.cursor: Any = None

    def watch(self, sensor: dg.SensorDefinition | None = None) -> dg.SensorResult | dg.SkipReason:
        sensor = sensor or defs.get_sensor_def("shard_watcher")
        result = sensor(dg.build_sensor_context(instance=self.instance))
        if isinstance(result, dg.SensorResult):
            for request in result.dynamic_partitions_requests or ():
                if isinstance(request, dg.AddDynamicPartitionsRequest):
                    self.instance.add_dynamic_partitions(SHARDS, list(request.partition_keys))
                else:
                    for key in request.partition_keys:
                        self.instance.delete_dynamic_partition(SHARDS, key)
            for event in result.asset_events:
                self.instance.report_runless_asset_event(cast(dg.AssetObservation, event))
        return cast(dg.SensorResult, result)

    def requested(self) -> list[tuple[str, str | None]]:
        result = dg.evaluate_automation_conditions(defs, self.instance, cursor=self.cursor)
        self.cursor = result.cursor
        keys = [(asset, key) for asset in INPUTS for key in result.get_requested_partitions(dg.AssetKey(asset))]
        return sorted(keys, key=str)

    def tick(self) -> list[str]:
        """The names of what was requested; each has run when this returns, successfully or not."""
        self.watch()
        names = []
        for asset, key in self.requested():
            names.append(f"{asset}[{key}]" if key else asset)
            defs.resolve_implicit_global_asset_job_def().execute_in_process(
                instance=self.instance,
                asset_selection=[dg.AssetKey(asset)],
                partition_key=key,
                raise_on_error=False,
                run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
            )
        return names

    def settle(self) -> list[list[str]]:
        """Ticks until nothing is requested, twice over."""
        ticks = [self.tick()]
        while ticks[-1]:
            ticks.append(self.tick())
        assert self.tick() == []
        return ticks


@pytest.fixture
def daemon(tmp_path: Path, teacher_folder: Path) -> Iterator[Daemon]:
    root = tiny.make_home(tmp_path / "home", teacher_folder, shards=2)
    with open_instance(Home(root)) as instance:
        yield Daemon(root, instance)
    os.environ.pop("DAGSTER_HOME", None)
    os.environ.pop("DISTILL_HOME", None)


def shard(daemon: Daemon, key: str) -> Path:
    return daemon.root / "shards" / f"{key}.jsonl"


def test_a_fresh_home_is_filled_and_then_only_what_changed_runs(daemon: Daemon) -> None:
    assert daemon.settle() == FIRST_FILL

    for file in (daemon.root / "shards").iterdir():
        os.utime(file, (1, 1))
    assert daemon.settle() == [[]]  # touched

    shard(daemon, "s1").write_text(shard(daemon, "s1").read_text().replace("Question 100", "Question C"))
    tiny.write_jsonl(shard(daemon, "s2"), tiny.example_rows(4, start=500))
    assert daemon.settle()[0] == ["teacher_capture[s1]", "teacher_capture[s2]"]  # one changed, one new

    shard(daemon, "s2").unlink()
    after_deleting = daemon.settle()
    assert after_deleting == [["capture_catalog"], ["control_student", "student_model"], ["student_evaluation"], []]
    assert "s2" not in daemon.instance.get_dynamic_partitions(SHARDS)

    edit(daemon.root, training={"seed": 5})
    assert daemon.settle() == [["control_student", "student_model"], ["student_evaluation"], []]

    edit(daemon.root, targets={"k": 3})
    assert daemon.settle()[0] == FIRST_FILL[1]  # settings of the targets: every shard

    states = AssetStates(Pipeline(Home(daemon.root)))
    assert all(states.is_current(asset) for asset in INPUTS)
    recorded = recorded_versions(daemon.instance, "teacher_capture")
    assert {key: states.capture_version(key) for key in ("s0", "s1", "heldout")}.items() <= recorded.items()


def test_a_failing_shard_is_tried_once_holds_back_the_students_and_recovers(daemon: Daemon) -> None:
    good = shard(daemon, "s0").read_text()
    shard(daemon, "s0").write_text(good + "{not json\n")
    ticks = daemon.settle()
    assert ticks == [*FIRST_FILL[:3], []]  # tried with the others, not again, and no student on part of the data
    shard(daemon, "s0").write_text(good)
    assert daemon.settle() == [["teacher_capture[s0]"], *FIRST_FILL[2:]]


def test_what_would_mend_a_failed_shard_is_tried(daemon: Daemon) -> None:
    good = shard(daemon, "s0").read_text()
    shard(daemon, "s0").write_text(good + "{not json\n")
    assert daemon.settle() == [*FIRST_FILL[:3], []]
    edit(daemon.root, data={"on_bad_row": "skip"})
    assert daemon.settle() == [["teacher_capture[s0]"], *FIRST_FILL[2:]]
    edit(daemon.root, data={"on_bad_row": "fail"})
    assert daemon.settle() == [["teacher_capture[s0]"], ["capture_catalog"], []]  # tried, failed, and not listed
    shard(daemon, "s0").write_text(good)
    assert daemon.settle()[0] == ["teacher_capture[s0]"]


def test_a_damaged_or_deleted_capture_is_made_again(daemon: Daemon) -> None:
    daemon.settle()
    [file] = (daemon.root / "captures").rglob("s0@*.parquet")
    file.write_bytes(file.read_bytes()[:-30])
    assert daemon.settle()[0] == ["teacher_capture[s0]"]
    file.unlink()
    assert daemon.settle()[0] == ["teacher_capture[s0]"]
    assert AssetStates(Pipeline(Home(daemon.root))).is_current("student_evaluation")


def test_an_impossible_student_costs_no_teacher(daemon: Daemon) -> None:
    edit(daemon.root, student={"from_teacher_layers": [0, 99]})
    assert daemon.settle() == [FIRST_FILL[0], []]
    edit(daemon.root, student={"from_teacher_layers": [0, 2]})
    assert daemon.settle() == FIRST_FILL[1:]


def test_results_that_are_not_whole_are_made_again(daemon: Daemon) -> None:
    daemon.settle()
    states = AssetStates(Pipeline(Home(daemon.root)))
    (states.students.folder("student") / "model.safetensors").unlink()
    assert daemon.settle() == [["student_model"], []]
    (states.students.report_folder / "report.json").write_text("{")
    assert daemon.settle() == [["student_evaluation"], []]
    for file in (daemon.root / "shards").iterdir():
        file.unlink()
    assert daemon.settle() == [["capture_catalog"], []]  # nothing is left to list


NEXT_PROCESS = """
import sys
from pathlib import Path
import dagster as dg
from dagster._serdes import deserialize_value
from distill_assets.definitions import defs
from distill_assets.foundation.home import Home
from distill_assets.orchestration.instance import open_instance

with open_instance(Home(Path(sys.argv[1]))) as instance:
    result = dg.evaluate_automation_conditions(defs, instance, cursor=deserialize_value(sys.stdin.read()))
    print("requested", *sorted(result.get_requested_partitions(dg.AssetKey("teacher_capture"))))
"""


def test_another_process_asks_once_more_for_what_was_left_undone(daemon: Daemon) -> None:
    daemon.watch()
    shard(daemon, "s1").write_text("{not json\n")
    ticks = [daemon.tick(), daemon.tick()]
    assert ticks[-1] == FIRST_FILL[1] and "s1" not in recorded_versions(daemon.instance, "teacher_capture")
    assert "teacher_capture[s1]" not in daemon.tick()
    restarted = subprocess.run(
        [sys.executable, "-c", NEXT_PROCESS, str(daemon.root)],
        input=serialize_value(daemon.cursor),
        capture_output=True,
        text=True,
        check=True,
    )
    assert restarted.stdout.splitlines()[-1] == "requested s1"


def test_incompatible_tokenizers_stop_everything_and_a_mended_pair_resumes(
    daemon: Daemon, tmp_path: Path, teacher_folder: Path
) -> None:
    other = tiny.train_tokenizer([text[::-1] for text in tiny.TEXT])
    edit(daemon.root, student={"from_teacher_layers": None, "model": str(tiny.save_model(tmp_path / "other", other))})
    assert daemon.settle() == [["tokenizer_compatibility"], []]
    edit(daemon.root, student={"from_teacher_layers": [0], "model": None})
    assert daemon.settle() == FIRST_FILL


def test_a_range_of_partitions_gets_each_its_own_version_at_the_next_look(daemon: Daemon) -> None:
    daemon.watch()
    shard(daemon, "s1").write_text("{not json\n")
    daemon.watch()
    result = defs.resolve_implicit_global_asset_job_def().execute_in_process(
        instance=daemon.instance,
        asset_selection=[dg.AssetKey("teacher_capture")],
        raise_on_error=False,
        tags={"dagster/asset_partition_range_start": "heldout", "dagster/asset_partition_range_end": "s1"},
    )
    assert not result.success
    states = AssetStates(Pipeline(Home(daemon.root)))
    good = {key: states.capture_version(key) for key in ("heldout", "s0")}
    assert recorded_versions(daemon.instance, "teacher_capture") == good  # one bad shard loses no record

    tiny.write_jsonl(shard(daemon, "s1"), tiny.example_rows(3, start=700))
    daemon.watch()
    result = defs.resolve_implicit_global_asset_job_def().execute_in_process(
        instance=daemon.instance,
        asset_selection=[dg.AssetKey("teacher_capture")],
        tags={"dagster/asset_partition_range_start": "heldout", "dagster/asset_partition_range_end": "s1"},
    )
    assert result.success
    daemon.watch()
    states = AssetStates(Pipeline(Home(daemon.root)))
    assert recorded_versions(daemon.instance, "teacher_capture") == {
        key: states.capture_version(key) for key in ("heldout", "s0", "s1")
    }


def test_a_tick_records_a_batch_and_the_next_one_the_rest(daemon: Daemon) -> None:
    observed = DagsterEventType.ASSET_OBSERVATION
    counts = []
    for _ in range(3):
        result = daemon.watch(shard_watcher(AutomationSettings(), most_events=2))
        assert isinstance(result, dg.SensorResult)
        counts.append((len(result.asset_events), len(recorded_versions(daemon.instance, "dataset_shards", observed))))
    assert counts == [(2, 2), (1, 3), (0, 3)]


def shown(daemon: Daemon, key: str) -> str:
    """What the web UI says of a capture."""
    graph = defs.resolve_asset_graph()
    resolver = CachingStaleStatusResolver(daemon.instance, graph, LoadingContextForTest(daemon.instance))
    return str(resolver.get_status(dg.AssetKey("teacher_capture"), key).value)


def test_the_ui_sees_a_change_of_what_was_captured_in_a_range(daemon: Daemon) -> None:
    daemon.tick()
    defs.resolve_implicit_global_asset_job_def().execute_in_process(
        instance=daemon.instance,
        asset_selection=[dg.AssetKey("teacher_capture")],
        tags={"dagster/asset_partition_range_start": "heldout", "dagster/asset_partition_range_end": "s1"},
    )
    daemon.watch()  # each gets its own version
    assert [shown(daemon, key) for key in ("heldout", "s0", "s1")] == ["FRESH"] * 3
    tiny.write_jsonl(shard(daemon, "s1"), tiny.example_rows(3, start=700))
    daemon.watch()
    assert [shown(daemon, key) for key in ("s0", "s1")] == ["FRESH", "STALE"]


def test_a_capture_made_before_its_shard_was_observed_is_fresh_at_the_second_look(daemon: Daemon) -> None:
    daemon.settle()
    tiny.write_jsonl(shard(daemon, "s1"), tiny.example_rows(3, start=700))
    defs.resolve_implicit_global_asset_job_def().execute_in_process(
        instance=daemon.instance, asset_selection=[dg.AssetKey("teacher_capture")], partition_key="s1"
    )
    daemon.watch()
    assert shown(daemon, "s1") == "STALE"  # the record names the version that was observed before
    daemon.watch()
    assert shown(daemon, "s1") == "FRESH"
    quiet = daemon.watch()
    assert isinstance(quiet, dg.SensorResult) and not quiet.asset_events


def test_another_student_leaves_captures_fresh(daemon: Daemon) -> None:
    daemon.settle()
    edit(daemon.root, student={"from_teacher_layers": None, "config": {"model_type": "llama", "vocab_size": 400}})
    assert daemon.tick() == ["tokenizer_compatibility"]
    assert shown(daemon, "s1") == "STALE"  # its record names another verdict
    daemon.watch()
    assert shown(daemon, "s1") == "FRESH"


def test_broken_settings_are_said_and_change_nothing(daemon: Daemon) -> None:
    daemon.watch()
    assert daemon.requested() == [("tokenizer_compatibility", None)]
    settings = (daemon.root / "distill.yaml").read_text()
    (daemon.root / "distill.yaml").write_text("teacher: {modle: x}\n")
    result = daemon.watch()
    assert isinstance(result, dg.SkipReason) and "modle" in str(result.skip_message)
    assert daemon.requested() == []
    (daemon.root / "distill.yaml").write_text(settings)
    assert daemon.requested() == []  # what was asked for before is not asked for again
    assert set(daemon.instance.get_dynamic_partitions(SHARDS)) == {"heldout", "s0", "s1"}


def test_the_refresh_job_does_what_distill_run_does(daemon: Daemon) -> None:
    result = defs.resolve_job_def("refresh").execute_in_process(
        instance=daemon.instance, run_config={"ops": {"bring_everything_up_to_date": {"config": {"device": "cpu"}}}}
    )
    assert result.success
    states = AssetStates(Pipeline(Home(daemon.root)))
    assert all(states.is_current(asset) for asset in INPUTS)
    assert daemon.settle() == [[]]
