"""Each kind of damage made for real in a home that was run, and seen by `verify` by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from distill_assets.definitions import defs
from distill_assets.foundation.home import Home
from distill_assets.orchestration.bring_up_to_date import bring_up_to_date
from distill_assets.orchestration.garbage import collect_garbage
from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.orchestration.states import AssetStates
from distill_assets.orchestration.verify import verify
from distill_assets.student_model.saving import RECORD_FILE
from distill_assets.teacher_capture.store import read_capture
from tests import tiny
from tests.bench import edit, put_back


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    """A home with history: run, one shard edited, run again."""
    root = tiny.make_home(tmp_path_factory.mktemp("made") / "home", teacher_folder, shards=2)
    bring_up_to_date(defs, Home(root), device="cpu")
    tiny.write_jsonl(root / "shards" / "s1.jsonl", tiny.example_rows(7, start=100))
    bring_up_to_date(defs, Home(root), device="cpu")
    return root


@pytest.fixture
def home(made: Path) -> Iterator[Home]:
    """That home, put back as it was afterwards."""
    with put_back(made):
        yield Home(made)


def found(home: Home) -> list[tuple[str, str]]:
    """(kind, path below the home) of every problem; each says what to do."""
    problems = verify(home).problems
    assert all("`distill " in p.message or "move it out" in p.message for p in problems), problems
    return sorted((p.kind, str(p.path.relative_to(home.root))) for p in problems)


def current(home: Home, shard: str) -> Path:
    rows = (home.root / "shards" / f"{shard}.jsonl").read_text().count("\n")
    [path] = [p for p in home.captures.glob(f"*/{shard}@*.parquet") if read_capture(p).stats.rows == rows]
    return path


def below(home: Home, path: Path) -> str:
    return str(path.relative_to(home.root))


def test_a_home_with_history_has_no_problem(home: Home) -> None:
    steps = []
    report = verify(home, steps.append)
    assert report.problems == ()
    of_students = sum(path.is_file() for path in home.students.rglob("*"))
    # Four captures, the catalog, the verdict, two pairs of students (all files), two reports of four.
    assert report.files == 4 + 1 + 1 + of_students + 2 * 4
    assert len(steps) == report.files and all(step.done <= step.total for step in steps)


def test_damaged_renamed_and_swapped_captures(home: Home) -> None:
    s0, s1 = current(home, "s0"), current(home, "s1")
    whole = bytearray(s0.read_bytes())
    whole[len(whole) // 2] ^= 1
    s0.write_bytes(whole)
    s1.write_bytes(s1.read_bytes()[:-30])
    assert found(home) == [("damaged", below(home, s0)), ("damaged", below(home, s1))]
    for path in (s0, s1):
        path.unlink()
    assert found(home) == [("missing", below(home, s0)), ("missing", below(home, s1))]
    bring_up_to_date(defs, home, device="cpu")
    assert found(home) == []

    aside = s0.with_name("aside")
    for source, target in ((s0, aside), (s1, s0), (aside, s1)):
        source.rename(target)
    swapped = found(home)
    assert {("mismatch", below(home, s0)), ("mismatch", below(home, s1))} <= set(swapped)
    assert bring_up_to_date(defs, home, device="cpu").captured_shards == ["s0", "s1"]
    assert found(home) == []

    s0.rename(s0.with_name("s7" + s0.name[2:]))
    assert ("mismatch", below(home, s0).replace("s0@", "s7@")) in found(home)


def test_a_shard_without_capture_is_no_problem_but_a_listed_one_is_missing(home: Home) -> None:
    tiny.write_jsonl(home.root / "shards" / "s9.jsonl", tiny.example_rows(3, start=700))
    (home.root / "shards" / "s0.jsonl").unlink()
    assert found(home) == []
    [old] = [p for p in home.captures.glob("*/s1@*.parquet") if read_capture(p).stats.rows == 6]
    old.unlink()  # superseded, and still in the catalog
    assert found(home) == [("missing", below(home, old))]


def test_what_does_not_belong_in_captures(home: Home, tmp_path: Path) -> None:
    [folder] = home.captures.iterdir()
    version = current(home, "s0").stem.partition("@")[2]
    (home.captures / "notes.txt").write_text("mine")
    (folder / "table.parquet").write_bytes(b"PAR1")
    (folder / "s0@zz.parquet").write_bytes(b"PAR1")
    (folder / ".partial-1a2b3c4d-s0@x.parquet").write_bytes(b"half")
    (folder / f"gone@{'0' * 16}.failed.json").write_text('{"shard": "gone", "message": "no"}')
    (folder / f".unfinished-s0@{version}").mkdir()  # s0 is captured, so nothing goes on from these
    (folder / f"link@{version}.parquet").symlink_to(folder / f"s0@{version}.parquet")
    (home.students / ".partial-9f9f9f9f-student").mkdir()
    expected = [
        folder / ".partial-1a2b3c4d-s0@x.parquet",
        folder / f".unfinished-s0@{version}",
        folder / f"gone@{'0' * 16}.failed.json",
        folder / f"link@{version}.parquet",
        folder / "s0@zz.parquet",
        folder / "table.parquet",
        home.captures / "notes.txt",
        home.students / ".partial-9f9f9f9f-student",
    ]
    assert found(home) == sorted(("orphaned", below(home, path)) for path in expected)
    collect_garbage(home, dry_run=False)
    assert found(home) == sorted(
        ("orphaned", below(home, path))
        for path in expected
        if path.name in {"notes.txt", "table.parquet"} or "zz" in path.name or "link" in path.name
    )


def test_the_catalog_edited_or_damaged(home: Home) -> None:
    whole = home.catalog.read_bytes()
    for statement, kind in (
        ("UPDATE capture_files SET bytes = bytes + 1 WHERE shard = 's0'", "mismatch"),
        ("UPDATE capture_files SET kept_ids = 1 WHERE shard = 's0'", "mismatch"),
        ("DELETE FROM capture_files WHERE shard = 's0'", "mismatch"),
        ("DELETE FROM capture_examples WHERE capture = 1 AND row = 0", "mismatch"),
        ("UPDATE catalog_meta SET home = '/elsewhere'", "mismatch"),
        (
            "UPDATE student_captures SET examples = 1 WHERE student_id = (SELECT min(student_id) FROM students)",
            "mismatch",
        ),
        ("DELETE FROM students WHERE student_id = (SELECT min(student_id) FROM students)", "mismatch"),
        ("DROP TABLE students", "damaged"),
    ):
        with duckdb.connect(home.catalog) as connection:
            connection.execute(statement)
        problems = found(home)
        assert [k for k, _ in problems] == [kind], (statement, problems)
        home.catalog.write_bytes(whole)
    content = bytearray(whole)
    for at in range(12_288, len(content), 4096):  # bytes of every block after the headers
        content[at] ^= 1
    home.catalog.write_bytes(content)
    assert found(home) == [("damaged", "catalog.duckdb")]
    home.catalog.unlink()
    assert found(home) == [("missing", "catalog.duckdb")]


@pytest.mark.parametrize("catalog", ["gone", "damaged"])
def test_what_is_gone_is_named_without_the_catalog(home: Home, catalog: str) -> None:
    s1 = current(home, "s1")
    student = home.students / AssetStates(Pipeline(home)).students.ids["student"]
    home.catalog.unlink()
    if catalog == "damaged":
        home.catalog.write_bytes(b"no catalog")
    shutil.rmtree(student)
    problem = ("missing" if catalog == "gone" else "damaged", "catalog.duckdb")
    assert found(home) == sorted([problem, ("missing", below(home, student))])
    s1.unlink()  # what would be trained now is not known then
    assert found(home) == sorted([problem, ("missing", below(home, s1))])


def test_a_damaged_capture_that_rows_may_yet_be_copied_from(home: Home) -> None:
    [old] = [p for p in home.captures.glob("*/s1@*.parquet") if read_capture(p).stats.rows == 6]
    flip(old, old.stat().st_size // 2)
    [problem] = verify(home).problems
    assert problem.path == old and problem.message.endswith("; `distill gc` removes it")
    current(home, "s1").unlink()
    tiny.write_jsonl(home.root / "shards" / "s1.jsonl", tiny.example_rows(6, start=100)[1:])  # rows of the damaged one
    [problem] = [p for p in verify(home).problems if p.path == old]
    assert "copies what is whole" in problem.message
    assert collect_garbage(home, dry_run=True).removed == ()


def test_students_that_are_not_whole(home: Home) -> None:
    first, second, third, fourth = sorted(home.students.iterdir())
    (first / "model.safetensors").unlink()
    weights = (second / "model.safetensors").read_bytes()
    (second / "model.safetensors").write_bytes(weights[:-100])
    (third / "tokenizer.json").write_text("{")
    (fourth / RECORD_FILE).write_text('{"spec": {"student_id": 1}}')
    [said] = [p.message for p in verify(home).problems if p.path == fourth]
    assert "spec.student_id: Input should be a valid string" in said and "\n" not in said and "pydantic" not in said
    assert found(home) == [
        ("damaged", below(home, first)),
        ("damaged", below(home, second / "model.safetensors")),
        ("damaged", below(home, third)),
        ("damaged", below(home, fourth)),
    ]


def test_weights_that_are_no_numbers_and_a_renamed_student(home: Home) -> None:
    first, second, *_ = sorted(home.students.iterdir())
    tensors = load_file(first / "model.safetensors")
    next(iter(tensors.values())).view(-1)[3] = float("nan")
    save_file(tensors, first / "model.safetensors", metadata={"format": "pt"})
    renamed = second.rename(second.with_name("f" * 16))
    (home.students / "notes").mkdir()
    assert found(home) == [
        ("damaged", below(home, first / "model.safetensors")),
        ("mismatch", below(home, renamed)),
        ("missing", below(home, second)),
        ("orphaned", "students/notes"),
    ]


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_bits_that_no_format_has_a_checksum_for(home: Home) -> None:
    weights = min(home.students.iterdir()) / "model.safetensors"
    flip(weights, -8)  # the last bit of a number
    capture = current(home, "s0")
    flip(capture, capture.read_bytes().index(b"teacher's distribution"))  # what its metadata says of positions
    expected = [("damaged", below(home, capture)), ("damaged", below(home, weights))]
    assert found(home) == expected
    Pipeline(home).refresh_catalog()  # it reads no file a second time, nor takes on what it has become
    assert found(home) == expected
    record = json.loads((weights.parent / RECORD_FILE).read_text())
    hashes = record.pop("files")
    record["weights"] = {weights.name: hashes[weights.name]}
    (weights.parent / RECORD_FILE).write_text(json.dumps(record))  # a student of which only those are known
    assert found(home) == expected
    del record["weights"]
    (weights.parent / RECORD_FILE).write_text(json.dumps(record))  # a student trained before there were hashes
    assert found(home) == expected[:1]


def test_each_file_of_a_student_and_a_report_and_those_that_nobody_wrote(home: Home) -> None:
    student, report = min(home.students.iterdir()), min(home.reports.iterdir())
    texts = [student / "README.md", student / "generation_config.json", report / "report.html", report / "summary.md"]
    tokenizer = json.loads((student / "tokenizer.json").read_text())
    (student / "tokenizer.json").write_text(json.dumps(tokenizer, indent=7))  # it still loads
    for text in texts:
        flip(text, text.stat().st_size // 2)
    (student / "notes").mkdir()
    foreign = [student / "notes" / "mine.txt", report / "mine.txt"]
    for file in foreign:
        file.write_text("mine")
    damaged = [("damaged", below(home, path)) for path in [*texts, student / "tokenizer.json"]]
    orphaned = [("orphaned", below(home, path)) for path in foreign]
    assert found(home) == sorted(damaged + orphaned)
    (student / "README.md").unlink()
    assert ("missing", below(home, student / "README.md")) in found(home)


def test_students_reports_and_a_verdict_that_are_gone(home: Home) -> None:
    student, report = min(home.students.iterdir()), AssetStates(Pipeline(home)).students.report_folder
    shutil.rmtree(report)
    home.tokenizer_report.unlink()
    assert found(home) == [("missing", below(home, report)), ("missing", "tokenizer_report.json")]
    shutil.rmtree(student)
    assert ("missing", below(home, student)) in found(home)
    bring_up_to_date(defs, home, device="cpu")
    assert student.exists() or found(home) == [("missing", below(home, student))]
    collect_garbage(home, dry_run=False)
    assert found(home) == []


def test_reports_that_are_not_whole(home: Home) -> None:
    first, second = sorted(home.reports.iterdir())
    page = (first / "report.html").read_bytes()
    (first / "report.html").write_bytes(page[: len(page) // 2])
    (second / "summary.md").unlink()
    assert found(home) == [("damaged", below(home, first)), ("damaged", below(home, second))]
    (first / "report.html").write_bytes(page)
    record = json.loads((first / "report.json").read_text())
    record["details"]["report_id"] = "0" * 16
    (first / "report.json").write_text(json.dumps(record))
    assert ("mismatch", below(home, first)) in found(home)
    home.tokenizer_report.write_text("{")
    assert ("damaged", "tokenizer_report.json") in found(home)


def test_a_damaged_capture_by_another_tokenizer_is_judged_without_its_vocabulary(home: Home) -> None:
    other = tiny.save_model(home.root / "other", tiny.train_tokenizer(vocab_size=300))
    edit(home.root, teacher={"model": str(other)})
    assert found(home) == []  # ids of the old captures reach beyond the new vocabulary
    assert max(map(max, pq.read_table(current(home, "s0"))["input_ids"].to_pylist())) >= 300
