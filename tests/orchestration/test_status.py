"""What `distill status` says of assets: missing is not stale, and everything that is not current says why."""

from __future__ import annotations

from pathlib import Path

from distill_assets.foundation.home import Home
from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.orchestration.states import INPUTS
from distill_assets.orchestration.status import AssetStatus, home_status
from distill_assets.orchestration.students import StudentSide
from distill_assets.teacher_capture.capture import capture_shard
from tests import tiny
from tests.bench import Bench


def assets(root: Path) -> dict[str, AssetStatus]:
    return {asset.asset: asset for asset in home_status(Pipeline(Home(root))).assets}


def capture_all(bench: Bench) -> None:
    for shard in bench.shards.values():
        capture_shard(bench.spec, shard, bench.store, device="cpu")


def test_in_a_new_home_all_is_missing_and_nothing_has_a_path(bench: Bench) -> None:
    found = assets(bench.home.root)
    assert list(found) == list(INPUTS)
    assert {(a.state, a.reason, a.path) for a in found.values()} == {("missing", "never made", None)}


def test_one_asset_after_the_other(bench: Bench) -> None:
    root = bench.home.root
    Pipeline(bench.home).check_tokenizers()
    capture_all(bench)
    found = assets(root)
    assert [found[name].state for name in ("tokenizer_compatibility", "teacher_capture")] == ["current", "current"]
    assert found["teacher_capture"].path == str(root / "captures" / bench.spec.capture_id)
    assert found["capture_catalog"].state == "missing" and found["capture_catalog"].version

    Pipeline(bench.home).refresh_catalog()
    catalog = assets(root)["capture_catalog"]
    assert (catalog.state, catalog.reason, catalog.path) == ("current", "", str(root / "catalog.duckdb"))
    student = assets(root)["student_model"]
    assert (student.state, student.path) == ("missing", None) and student.version

    for i, key in enumerate(("s0", "s1")):
        tiny.write_jsonl(root / "shards" / f"{key}.jsonl", tiny.example_rows(3, start=400 + 10 * i))
    found = assets(root)
    assert (found["teacher_capture"].state, found["teacher_capture"].reason) == (
        "stale",
        "2 shards have no current capture",
    )
    assert (found["capture_catalog"].state, found["capture_catalog"].reason) == (
        "stale",
        "teacher_capture is not current",
    )
    assert found["capture_catalog"].path and found["capture_catalog"].version is None


def test_captures_made_since_make_the_catalog_stale_by_themselves(bench: Bench) -> None:
    Pipeline(bench.home).check_tokenizers()
    capture_all(bench)
    Pipeline(bench.home).refresh_catalog()
    tiny.write_jsonl(bench.home.root / "shards" / "s9.jsonl", tiny.example_rows(2, start=500))
    capture_all(bench)
    catalog = assets(bench.home.root)["capture_catalog"]
    assert (catalog.state, catalog.reason) == ("stale", "captures changed since, or the home was moved")


def test_failed_shards_and_refused_pairs_are_failures(bench: Bench, tmp_path: Path) -> None:
    (bench.home.root / "shards" / "s1.jsonl").write_text("{}\n")
    capture = assets(bench.home.root)["teacher_capture"]
    assert (capture.state, capture.reason) == ("failed", "1 shard failed")
    other = tiny.save_model(tmp_path / "other", tiny.train_tokenizer([t[::-1] for t in tiny.TEXT]))
    root = tiny.make_home(tmp_path / "pair", bench.spec.teacher.path, student={"model": str(other)})
    Pipeline(Home(root)).check_tokenizers()
    found = assets(root)
    assert found["tokenizer_compatibility"].state == "failed"
    assert found["tokenizer_compatibility"].reason.startswith("incompatible: ")
    assert found["teacher_capture"].state == "missing"


def test_a_student_of_other_settings_is_stale_and_a_damaged_one_says_so(bench: Bench) -> None:
    root = bench.home.root
    Pipeline(bench.home).check_tokenizers()
    capture_all(bench)
    Pipeline(bench.home).refresh_catalog()
    StudentSide(Pipeline(bench.home)).train("student", device="cpu", force=False)
    found = assets(root)
    student = found["student_model"]
    assert (student.state, student.path) == ("current", str(root / "students" / str(student.version)))
    assert (found["control_student"].state, found["control_student"].reason) == ("missing", "never made")

    (root / "students" / str(student.version) / "distillation.json").write_text("{")
    damaged = assets(root)["student_model"]
    assert damaged.state == "failed" and "damaged" in damaged.reason
    assert assets(root)["control_student"].reason == "never made"  # the one that is there need not be it
    (root / "students" / ("0" * 16)).mkdir()
    assert assets(root)["control_student"].reason == "settings or data changed since"
    (root / "students" / ("0" * 16)).rmdir()

    StudentSide(Pipeline(bench.home)).train("student", device="cpu", force=True)
    settings = root / "distill.yaml"
    settings.write_text(settings.read_text().replace("epochs: 1", "epochs: 2"))
    changed = assets(root)["student_model"]
    assert (changed.state, changed.reason, changed.path) == ("stale", "settings or data changed since", None)
    assert changed.version not in (None, student.version)
