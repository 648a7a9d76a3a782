"""The whole chain through real Dagster runs, in process: only what changed runs, and the store is the truth."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from distill_assets.definitions import defs
from distill_assets.foundation.errors import (
    DeviceError,
    DistillError,
    IncompatibleTokenizers,
    SettingsError,
    StaleInputs,
    TrainingError,
    UsageError,
)
from distill_assets.foundation.home import Home
from distill_assets.foundation.progress import Progress
from distill_assets.orchestration.bring_up_to_date import RunReport, bring_up_to_date
from distill_assets.orchestration.instance import open_instance
from distill_assets.orchestration.partitions import recorded_version, recorded_versions
from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.orchestration.progress import shown_by
from distill_assets.orchestration.states import AssetStates
from distill_assets.orchestration.status import home_status, what_follows, what_is_refused
from tests import tiny
from tests.bench import edit, put_back
from tests.devices import DEVICES

WHOLE_RUN = [
    "tokenizer_compatibility",
    "teacher_capture[heldout]",
    "teacher_capture[s0]",
    "teacher_capture[s1]",
    "capture_catalog",
    "student_model",
    "control_student",
    "student_evaluation",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    """A home that was run once; tests work on copies at the same path depth."""
    root = tiny.make_home(tmp_path_factory.mktemp("made") / "home", teacher_folder, shards=2)
    report = bring_up_to_date(defs, Home(root), device="cpu")
    assert report.materialized == WHOLE_RUN
    assert (report.rows_captured, report.rows_reused, report.failures) == (18, 0, {})
    return root


@pytest.fixture
def fresh(made: Path) -> Iterator[Path]:
    """The home that was run once, put back as it was afterwards."""
    with put_back(made):
        yield made


def run(root: Path, **options: object) -> RunReport:
    return bring_up_to_date(defs, Home(root), device="cpu", **options)  # type: ignore[arg-type]


def shard(root: Path, key: str) -> Path:
    return root / "shards" / f"{key}.jsonl"


def test_a_second_run_and_a_touch_do_nothing(fresh: Path) -> None:
    for file in (fresh / "shards").iterdir():
        os.utime(file, (1, 1))
    report = run(fresh)
    assert report.materialized == [] and report.captured_shards == []
    assert report.student_id and report.report and Path(report.report).is_file()


def test_one_changed_row_runs_one_shard_and_a_new_student(fresh: Path) -> None:
    before = run(fresh)
    shard(fresh, "s1").write_text(shard(fresh, "s1").read_text().replace("Question 100", "Question C"))
    report = run(fresh)
    assert (report.captured_shards, report.rows_captured, report.rows_reused) == (["s1"], 1, 5)
    assert report.student_id != before.student_id and report.control_id != before.control_id
    assert "tokenizer_compatibility" not in report.materialized


def test_a_held_out_change_makes_a_new_report_and_no_new_student(fresh: Path) -> None:
    before = run(fresh)
    trained_on = json.loads(shard(fresh, "s0").read_text().splitlines()[0])
    tiny.write_jsonl(shard(fresh, "heldout"), [*tiny.example_rows(7, start=9000), trained_on])
    report = run(fresh)
    assert (report.rows_captured, report.student_id) == (1, before.student_id)
    assert report.report and before.report and report.report != before.report
    assert not {"student_model", "control_student"} & set(report.materialized)
    warning = "1 of the held-out rows are among those the student learnt from"
    assert warning in Path(report.report).read_text() and warning not in Path(before.report).read_text()


def test_deleting_and_adding_shards(fresh: Path) -> None:
    shard(fresh, "s1").unlink()
    tiny.write_jsonl(shard(fresh, "s9"), tiny.example_rows(4, start=500))
    report = run(fresh)
    assert report.captured_shards == ["s9"]
    assert report.catalog is not None and report.catalog["shards"] == 3
    record = json.loads((fresh / "students" / str(report.student_id) / "distillation.json").read_text())
    assert sorted(used["shard"] for used in record["spec"]["captures"]) == ["s0", "s9"]


def test_settings_change_all_and_back_is_current_at_once(fresh: Path) -> None:
    before = run(fresh)
    edit(fresh, targets={"k": 4})
    changed = run(fresh)
    assert sorted(changed.captured_shards) == ["heldout", "s0", "s1"]
    assert changed.student_id != before.student_id and changed.control_id == before.control_id
    edit(fresh, targets={"k": 8})
    back = run(fresh)
    assert back.captured_shards == [] and back.student_id == before.student_id


def test_records_say_what_the_store_holds(fresh: Path) -> None:
    with open_instance(Home(fresh)) as instance:
        states = AssetStates(Pipeline(Home(fresh)))
        recorded = recorded_versions(instance, "teacher_capture")
        assert recorded == {key: states.capture_version(key) for key in ("heldout", "s0", "s1")}
        assert recorded_version(instance, "student_model") == states.data_version("student_model")
        instance.wipe_assets([dg.AssetKey("teacher_capture")])
    assert run(fresh).captured_shards == []
    with open_instance(Home(fresh)) as instance:
        assert recorded_versions(instance, "teacher_capture") == recorded


def test_a_bad_shard_does_not_hold_back_the_others(fresh: Path) -> None:
    before = run(fresh)
    shard(fresh, "s0").write_text('{"prompt": "a", "completion": 3}\n')
    tiny.write_jsonl(shard(fresh, "s5"), tiny.example_rows(3, start=700))
    report = run(fresh)
    assert report.captured_shards == ["s5"] and list(report.failures) == ["s0"]
    assert "line 1" in report.failures["s0"]
    assert report.catalog is not None and report.catalog["shards"] == 3
    assert not {"student_model", "student_evaluation"} & set(report.materialized)
    with pytest.raises(DistillError, match=r"s0.*line 1"):
        report.raise_failures()
    assert (fresh / "students" / str(before.student_id)).is_dir()
    tiny.write_jsonl(shard(fresh, "s0"), tiny.example_rows(6))
    assert run(fresh).failures == {}


def test_a_student_of_another_family_stops_everything(tmp_path: Path, teacher_folder: Path) -> None:
    other = tiny.save_model(tmp_path / "other", tiny.train_tokenizer([t[::-1] for t in tiny.TEXT]))
    root = tiny.make_home(tmp_path / "home", teacher_folder, shards=1, student={"model": str(other)})
    with pytest.raises(IncompatibleTokenizers):
        run(root)
    assert not list((root / "captures").rglob("*.parquet"))
    with open_instance(Home(root)) as instance, pytest.raises(IncompatibleTokenizers):
        defs.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=instance, asset_selection=[dg.AssetKey("teacher_capture")], partition_key="s0"
        )


def test_one_asset_only_of_an_incompatible_pair(tmp_path: Path, teacher_folder: Path) -> None:
    other = tiny.save_model(tmp_path / "other", tiny.train_tokenizer([t[::-1] for t in tiny.TEXT]))
    root = tiny.make_home(tmp_path / "home", teacher_folder, shards=1, student={"model": str(other)})
    for _ in range(2):
        with pytest.raises(IncompatibleTokenizers):
            run(root, only="tokenizer_compatibility")


@pytest.mark.parametrize("device", DEVICES)
def test_the_whole_chain_in_half_precision(tmp_path: Path, teacher_folder: Path, device: str) -> None:
    root = tiny.make_home(tmp_path / "home", teacher_folder, shards=2, evaluation={"dense": True})
    edit(root, teacher={"dtype": "bfloat16"}, training={"kd_weight": 1.0, "epochs": 20})
    report = bring_up_to_date(defs, Home(root), device=device)
    assert report.materialized == WHOLE_RUN and report.failures == {}
    assert report.checks and all(check["passed"] for check in report.checks.values())
    assert report.evaluation is not None
    models = report.evaluation["models"]
    for figure in ("kl_nats", "dense_kl_nats"):
        assert models["student"][figure]["value"] < 0.9 * models["untrained"][figure]["value"]
    assert bring_up_to_date(defs, Home(root), device=device).materialized == []


def test_an_absent_device_fails_no_shard(fresh: Path) -> None:
    tiny.write_jsonl(shard(fresh, "s0"), tiny.example_rows(2, start=60))
    with pytest.raises(DeviceError):
        bring_up_to_date(defs, Home(fresh), device="cuda:99")
    assert {s.shard: s.state for s in home_status(Pipeline(Home(fresh))).shards}["s0"] == "changed"


def test_a_shard_edited_during_the_run_does_not_stop_it(fresh: Path) -> None:
    for key, start in (("s0", 800), ("s1", 900)):
        tiny.write_jsonl(shard(fresh, key), tiny.example_rows(4, start=start))

    def edit_s1(line: str) -> None:
        if "teacher_capture s0" in line:
            tiny.write_jsonl(shard(fresh, "s1"), tiny.example_rows(5, start=950))

    report = run(fresh, on_step=edit_s1, shards=["s0", "s1"])
    assert report.captured_shards == ["s0", "s1"] and report.failures == {}


def test_what_cannot_be_trained_is_said_before_the_teacher_is_paid_for(fresh: Path, tmp_path: Path) -> None:
    edit(fresh, student={"from_teacher_layers": [0, 99]}, targets={"k": 3})
    with pytest.raises(SettingsError, match="layer 99 does not exist"):
        run(fresh)
    edit(fresh, student={"from_teacher_layers": [0, 2]}, targets={"k": 8})
    shard(fresh, "heldout").unlink()
    tiny.write_jsonl(shard(fresh, "s5"), tiny.example_rows(3, start=700))
    before = set((fresh / "students").iterdir())
    report = RunReport()
    with pytest.raises(TrainingError, match="no held-out shard"):
        run(fresh, report=report)
    assert report.captured_shards == ["s5"] and report.seconds > 0  # what was done is told all the same
    assert set((fresh / "students").iterdir()) == before


def test_one_shard_only(fresh: Path) -> None:
    for key in ("s0", "s1"):
        tiny.write_jsonl(shard(fresh, key), tiny.example_rows(7, start=800 if key == "s0" else 900))
    report = run(fresh, shards=["s1"])
    assert report.captured_shards == ["s1"] and "student_model" not in report.materialized
    with pytest.raises(UsageError, match="there is no shard nope"):
        run(fresh, shards=["nope"])


def test_one_asset_only(fresh: Path) -> None:
    edit(fresh, training={"seed": 7})
    report = run(fresh, only="student_model")
    assert report.materialized == ["student_model"]
    tiny.write_jsonl(shard(fresh, "s0"), tiny.example_rows(2))
    with pytest.raises(
        StaleInputs, match=r"student_model reads teacher_capture, .* `distill run --only teacher_capture`"
    ):
        run(fresh, only="student_model")
    with pytest.raises(UsageError, match="choose one of: tokenizer_compatibility"):
        run(fresh, only="nothing")


def test_the_plan_says_what_follows_the_captures(fresh: Path) -> None:
    def following() -> list[tuple[str, bool]]:
        pipeline = Pipeline(Home(fresh))
        return [(f.asset, f.last_seconds is not None) for f in what_follows(pipeline, pipeline.plan())]

    assert following() == []
    edit(fresh, training={"seed": 8})
    students = [("student_model", True), ("control_student", True), ("student_evaluation", False)]
    assert following() == students
    edit(fresh, control=False)
    assert following() == [students[0], students[2]]
    tiny.write_jsonl(shard(fresh, "s0"), tiny.example_rows(2))
    assert following() == [("capture_catalog", False), students[0], students[2]]
    tiny.write_jsonl(shard(fresh, "s0"), [{"nothing": 1}])  # it leaves the catalog, and stops the students
    assert following() == [("capture_catalog", False)]


def test_the_plan_says_what_a_run_would_refuse(fresh: Path) -> None:
    def foreseen() -> tuple[str, list[str]]:
        pipeline = Pipeline(Home(fresh))
        plan = pipeline.plan()
        return what_is_refused(pipeline, plan), [f.asset for f in what_follows(pipeline, plan)]

    assert foreseen() == ("", [])
    settings = (fresh / "distill.yaml").read_text()
    for data, said in (
        ({"heldout": ["*"]}, "there are no training shards"),
        ({"heldout": ["nothing*"]}, "there is no held-out shard"),
        ({"shards": "nowhere/*"}, "there are no shards"),
    ):
        edit(fresh, data=data)
        refused, following = foreseen()
        assert refused.startswith(said) and not {"student_model", "student_evaluation"} & set(following)
        with pytest.raises(DistillError, match=re.escape(refused)):
            run(fresh)
        (fresh / "distill.yaml").write_text(settings)
    report = json.loads((fresh / "tokenizer_report.json").read_text())
    refusal = {"usable": False, "verdict": "incompatible", "reasons": ["other ids"]}
    (fresh / "tokenizer_report.json").write_text(json.dumps(report | refusal))
    assert foreseen() == ("incompatible: other ids", [])


def test_a_check_that_cannot_be_made_says_why(fresh: Path) -> None:
    tiny.write_jsonl(shard(fresh, "s0"), tiny.example_rows(2, start=300))
    settings = (fresh / "distill.yaml").read_text()
    said: list[str] = []

    def listen(line: str) -> None:
        said.append(line)
        if line.startswith("checks of"):
            (fresh / "distill.yaml").write_text("teacher: [")
        elif line == "capture_catalog":
            (fresh / "distill.yaml").write_text(settings)

    report = run(fresh, shards=["s0"], on_step=listen)
    assert report.captured_shards == ["s0"] and report.catalog is not None
    assert set(report.checks) == {"capture_is_complete", "capture_is_aligned", "capture_is_faithful"}
    for check in report.checks.values():
        assert not check["passed"] and "could not be made" in check["found"] and "distill.yaml" in check["found"]
    assert sum("could not be made" in line for line in said) == 3


def test_checks_tell_how_far_they_are(fresh: Path) -> None:
    tiny.write_jsonl(shard(fresh, "s0"), tiny.example_rows(2, start=300))
    steps: list[Progress] = []
    with shown_by(steps.append):
        run(fresh, shards=["s0"])
    assert {"captures compared with shards", "guesses counted", "rows scored again"} <= {step.step for step in steps}
    assert [(s.done, s.total) for s in steps if s.step == "rows scored again"] == [(0, 4), (1, 4), (2, 4), (4, 4)]


def test_without_a_control(fresh: Path) -> None:
    edit(fresh, control=False)
    report = run(fresh)
    assert report.control_id is None
    told = report.to_json()
    assert told["evaluation"]["models"]["student"]["kl_nats"]["value"] > 0 and "summary" not in told
    assert {a.asset: a.state for a in home_status(Pipeline(Home(fresh))).assets}["control_student"] == "off"


def test_no_shards(tmp_path: Path, teacher_folder: Path) -> None:
    root = tiny.make_home(tmp_path / "home", teacher_folder, shards=0)
    (root / "shards" / "heldout.jsonl").unlink()
    with pytest.raises(StaleInputs, match="there are no shards"):
        run(root)


def test_status_after_a_run_and_after_a_change(fresh: Path) -> None:
    status = home_status(Pipeline(Home(fresh)))
    assert {s.state for s in status.shards} == {a.state for a in status.assets} == {"current"}
    tiny.write_jsonl(shard(fresh, "s0"), tiny.example_rows(2))
    status = home_status(Pipeline(Home(fresh)))
    assert {s.shard: s.state for s in status.shards} == {"heldout": "current", "s0": "changed", "s1": "current"}
    assert {a.asset: a.state for a in status.assets} == {
        "tokenizer_compatibility": "current",
        "teacher_capture": "stale",
        "capture_catalog": "stale",
        "student_model": "stale",
        "control_student": "stale",
        "student_evaluation": "stale",
    }


def test_what_a_person_sees_on_an_asset(fresh: Path) -> None:
    with open_instance(Home(fresh)) as instance:

        def seen(asset: str) -> dict[str, object]:
            event = instance.get_latest_materialization_event(dg.AssetKey(asset))
            assert event is not None and event.asset_materialization is not None
            return {name: value.value for name, value in event.asset_materialization.metadata.items()}

        capture, evaluation = seen("teacher_capture"), seen("student_evaluation")
        assert capture["rows"] == capture["rows captured"] == 6 and capture["file written"] is True
        assert {"tokens", "supervised tokens", "bytes", "bytes per token", "tokens per second"} <= capture.keys()
        assert {"mean entropy (nats)", "mean kept mass", "mean ids kept", "teacher perplexity"} <= capture.keys()
        assert "KL" in str(evaluation["verdict"]) and float(str(evaluation["student: KL from teacher"])) > 0
        assert "data:image/png" in str(evaluation["summary"])

        defs.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=instance, asset_selection=[dg.AssetKey("teacher_capture")], partition_key="s0"
        )
        again = seen("teacher_capture")  # nothing was done, so no cost is told
        assert again["file written"] is False and not {"rows captured", "tokens per second"} & again.keys()
