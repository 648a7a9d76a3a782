"""`gc` on homes with history: what goes, what stays, and when it refuses."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pytest

from distill_assets.definitions import defs
from distill_assets.foundation.errors import HomeError, ModelError, SettingsError, StaleInputs
from distill_assets.foundation.files import remove
from distill_assets.foundation.home import Home
from distill_assets.foundation.progress import Progress
from distill_assets.orchestration.bring_up_to_date import bring_up_to_date
from distill_assets.orchestration.garbage import GarbageReport, collect_garbage
from distill_assets.orchestration.instance import open_instance
from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.orchestration.progress import shown_by
from distill_assets.orchestration.students import StudentSide
from distill_assets.orchestration.verify import verify
from distill_assets.teacher_capture.store import read_capture
from tests import tiny
from tests.bench import edit, put_back
from tests.orchestration.test_two_runs import STUCK


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    """A home with history: three shards, of which one is edited and one goes; then other targets."""
    root = tiny.make_home(tmp_path_factory.mktemp("made") / "home", teacher_folder, shards=3)
    bring_up_to_date(defs, Home(root), device="cpu")
    tiny.write_jsonl(root / "shards" / "s1.jsonl", tiny.example_rows(7, start=100))
    (root / "shards" / "s2.jsonl").unlink()
    edit(root, targets={"k": 6})
    bring_up_to_date(defs, Home(root), device="cpu")
    return root


@pytest.fixture
def home(made: Path) -> Iterator[Home]:
    """That home, put back as it was afterwards."""
    with put_back(made):
        yield Home(made)


def files(home: Home) -> set[str]:
    """Every file but those of the Dagster instance and of caches."""
    found = (str(p.relative_to(home.root)) for p in home.root.rglob("*") if p.is_file() or p.is_symlink())
    return {name for name in found if not name.startswith(("dagster/", ".cache/"))}


def removed(report: GarbageReport) -> list[tuple[str, str]]:
    return sorted((r.kind, r.path.name) for r in report.removed)


def test_superseded_captures_students_and_reports_go(home: Home) -> None:
    before, old = files(home), {p.parent for p in home.captures.glob("*/s2@*.parquet")}
    [old_captures] = old
    notes = home.students / "notes" / "mine.txt"
    notes.parent.mkdir()
    notes.write_text("kept")
    (home.captures / "table.parquet").write_bytes(b"mine")
    (home.comparisons / ("a" * 16)).mkdir(parents=True)
    (home.tensorboard / "notes").mkdir()
    dry = collect_garbage(home, dry_run=True)
    assert files(home) - before == {"students/notes/mine.txt", "captures/table.parquet"} and not before - files(home)

    report = collect_garbage(home, dry_run=False)
    assert report.removed == dry.removed and report.kept == ()
    kinds = [kind for kind, _ in removed(report)]
    # The control is the same whatever the targets, but its rows changed.
    assert {k: kinds.count(k) for k in set(kinds)} == {
        "capture": 4,
        "folder": 1,
        "student": 2,
        "events": 2,
        "report": 1,
        "comparison": 1,
    }
    assert not list(home.comparisons.iterdir())
    wanted = StudentSide(Pipeline(home)).ids
    assert {path.name for path in home.tensorboard.iterdir()} == {"notes", *(f"{k}-{i}" for k, i in wanted.items())}
    gone = before - files(home)
    assert sum(r.bytes for r in report.removed) == report.bytes > 0
    assert not old_captures.exists() and notes.read_text() == "kept" and (home.captures / "table.parquet").exists()
    assert {name.split("/")[0] for name in gone} == {"captures", "students", "tensorboard", "reports"}
    assert {"distill.yaml", "shards/s0.jsonl", "catalog.duckdb"} <= files(home)
    with duckdb.connect(home.catalog, read_only=True) as connection:
        assert connection.execute("SELECT count(*) FROM capture_history").fetchall() == [(0,)]
        assert connection.execute("SELECT count(*) FROM captures").fetchall() == [(3,)]
        assert connection.execute("SELECT count(*) FROM students").fetchall() == [(2,)]
    (home.captures / "table.parquet").unlink()
    shutil.rmtree(notes.parent)
    assert verify(home).problems == ()
    again = bring_up_to_date(defs, home, device="cpu")
    assert again.materialized == []
    assert collect_garbage(home, dry_run=False).removed == ()


def test_a_kill_before_anything_is_removed_leaves_a_consistent_home(home: Home) -> None:
    going = frozenset(r.path for r in collect_garbage(home, dry_run=True).removed)
    Pipeline(home).refresh_catalog(without=going)  # what a removal does first
    assert verify(home).problems == ()
    for path in sorted(going)[:3]:
        remove(path)
    assert verify(home).problems == ()
    collect_garbage(home, dry_run=False)
    assert not any(path.exists() for path in going)


def test_what_is_to_be_captured_keeps_what_it_can_be_copied_from(home: Home) -> None:
    tiny.write_jsonl(home.root / "shards" / "s1.jsonl", tiny.example_rows(8, start=100))
    [fewer] = [p.parent for p in home.captures.glob("*/s0@*") if len(list(p.parent.glob("*.parquet"))) == 3]
    version = Home(home.root).hashes().hash_of(home.root / "shards" / "s1.jsonl")
    going_on = fewer / f".unfinished-s1@{version[:16]}"
    orphaned = fewer / f".unfinished-s1@{'0' * 16}"
    for folder in (going_on, orphaned):
        folder.mkdir()
    report = collect_garbage(home, dry_run=False)
    assert "s1" in report.kept[0] and report.kept[1].startswith("students")
    assert going_on.exists() and not orphaned.exists()
    [kept] = fewer.glob("s1@*.parquet")
    assert read_capture(kept).stats.rows == 7
    assert len(list(home.students.iterdir())) == 4
    captured = bring_up_to_date(defs, home, device="cpu")
    assert (captured.rows_captured, captured.rows_reused) == (1, 7)
    assert verify(home).problems == ()
    assert kept.name in {name for _, name in removed(collect_garbage(home, dry_run=False))}


def test_leftovers_and_failures_of_content_that_is_gone_go(home: Home) -> None:
    collect_garbage(home, dry_run=False)
    [folder] = home.captures.iterdir()
    version = next(folder.glob("s0@*")).stem.partition("@")[2]
    left = [
        folder / f".partial-00000000-s0@{version}.parquet",
        folder / f"gone@{version}.failed.json",
        home.root / ".partial-00000000-catalog.duckdb",
        home.students / ".partial-00000000-student",
    ]
    for path in left[:3]:
        path.write_text("{}")
    (left[3] / "deep").mkdir(parents=True)
    kept = [folder / f"s0@{version}.failed.json", home.models / ".partial-00000000-teacher"]
    home.models.mkdir(exist_ok=True)
    for path in kept:
        path.write_text("{}")
    aside = home.students / ".partial-was-0123456789abcdef"  # a place being taken: not left over
    aside.mkdir()
    (home.captures / ("0" * 16)).mkdir()
    report = collect_garbage(home, dry_run=False)
    assert removed(report) == sorted(
        [("folder", "0" * 16), ("failure", left[1].name), *(("leftover", path.name) for path in (left[0], *left[2:]))]
    )
    assert not any(path.exists() for path in left) and all(path.exists() for path in (*kept, aside))


def test_checkpoints_stay_as_long_as_their_student_is_wanted(home: Home) -> None:
    wanted = StudentSide(Pipeline(home)).ids["student"]
    for name in (f"{wanted}-0123456789abcdef", "f" * 16 + "-0123456789abcdef"):
        (home.training / name / "checkpoint-3").mkdir(parents=True)
    (home.training / "notes.txt").write_text("a user's")
    assert ("checkpoints", "f" * 16 + "-0123456789abcdef") in removed(collect_garbage(home, dry_run=False))
    assert {path.name for path in home.training.iterdir()} == {f"{wanted}-0123456789abcdef", "notes.txt"}


def test_links_are_not_followed(home: Home, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("precious.parquet", "s0@0123456789abcdef.parquet"):
        (outside / name).write_text("mine")
    [folder] = [p.parent for p in home.captures.glob("*/s0@*") if len(list(p.parent.glob("*.parquet"))) == 3]
    (home.captures / ("a" * 16)).symlink_to(outside)
    (folder / f"s0@{'0' * 16}.parquet").symlink_to(outside / "precious.parquet")
    (folder / f".unfinished-s0@{'0' * 16}").symlink_to(outside)
    (folder / f".unfinished-s0@{'1' * 16}").mkdir()
    (folder / f".unfinished-s0@{'1' * 16}" / "out").symlink_to(outside)
    (home.students / ("b" * 16)).symlink_to(outside)
    (home.students / ".partial-link").symlink_to(outside)
    names = {path.name for path in outside.iterdir()}
    report = collect_garbage(home, dry_run=False)
    assert {path.name for path in outside.iterdir()} == names == {p.name for p in outside.iterdir() if p.read_text()}
    assert not any(r.path.is_symlink() for r in report.removed)
    assert ("unfinished", f".unfinished-s0@{'1' * 16}") in removed(report)
    assert (home.captures / ("a" * 16)).is_symlink() and (home.students / ("b" * 16)).is_symlink()

    moved = tmp_path / "students"
    shutil.move(home.students, moved)
    home.students.symlink_to(moved)
    (moved / ("c" * 16)).mkdir()
    report = collect_garbage(home, dry_run=False)
    assert "students: it is a link" in report.kept[0] and (moved / ("c" * 16)).exists()


def test_it_refuses_what_would_be_a_mistake(home: Home) -> None:
    before, text = files(home), home.settings_file.read_text()
    edit(home.root, data={"shards": "shard/*"})
    with pytest.raises(StaleInputs, match="no shard matches"):
        collect_garbage(home, dry_run=False)
    home.settings_file.write_text(text.replace("targets:", "targetz:"))
    with pytest.raises(SettingsError):
        collect_garbage(home, dry_run=False)
    home.settings_file.write_text(text)
    edit(home.root, teacher={"model": "./nowhere"})
    with pytest.raises(ModelError, match="nowhere"):
        collect_garbage(home, dry_run=False)
    assert files(home) == before
    with open_instance(home) as instance:
        failed = instance.get_runs(limit=1)[0]
        assert failed.is_finished  # a refusal leaves no run that would block the next


def test_it_refuses_while_a_run_is_under_way(home: Home) -> None:
    tiny.write_jsonl(home.root / "shards" / "s0.jsonl", tiny.example_rows(9, start=300))
    child = subprocess.Popen(
        [sys.executable, "-c", STUCK, str(home.root)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert child.stdout is not None
        while "in the middle" not in (line := child.stdout.readline()):
            assert line, "the child ended before it captured"
        before = files(home)
        for dry_run in (True, False):
            with pytest.raises(HomeError, match=f"in process {child.pid} is under way"):
                collect_garbage(home, dry_run=dry_run)
        assert files(home) == before
        leftover = home.captures / "0123456789abcdef"
        leftover.mkdir()
        (leftover / ".partial-00000000-s0").write_text("being written")
        assert [p for p in verify(home).problems if p.kind == "orphaned"] == []
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    orphaned = {p.path for p in verify(home).problems if p.kind == "orphaned"}
    assert leftover / ".partial-00000000-s0" in orphaned
    assert any(path.name.startswith(".lock-s0@") for path in orphaned)  # of the run that was killed
    assert orphaned <= {removal.path for removal in collect_garbage(home, dry_run=False).removed}
    assert [p for p in verify(home).problems if p.kind == "orphaned"] == []


def test_a_run_shuts_gc_out_from_its_beginning_to_its_end(home: Home) -> None:
    """By the lock, which it waits for: what is under way says nothing of a run that is about to start."""
    tiny.write_jsonl(home.root / "shards" / "s0.jsonl", tiny.example_rows(9, start=300))
    held: dict[str, bool] = {}

    def look(progress: Progress) -> None:
        what = progress.step.split()[0]
        held[what] = held.get(what, True) and home.in_use.is_held()
        if what == "train":
            with pytest.raises(HomeError, match="under way"):
                collect_garbage(home, dry_run=False)

    before = files(home)
    with shown_by(look):
        report = bring_up_to_date(defs, home, device="cpu")
    assert report.captured_shards == ["s0"] and {"teacher", "train"} <= held.keys() and all(held.values())
    assert before <= files(home) and not home.in_use.is_held()
