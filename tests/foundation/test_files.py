from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from distill_assets.foundation.files import remove_empty, replacing, replacing_folder, sweep, sweep_beside, write_json


@pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_file_leaves_the_old_one_and_nothing_beside(
    tmp_path: Path, interruption: type[BaseException]
) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old")
    with pytest.raises(interruption), replacing(file) as beside:
        beside.write_text("half of the n")
        raise interruption
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_is_replaced_in_a_folder_that_is_made(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "er" / "a.json"
    write_json(file, {"b": 1, "a": "ü"})
    write_json(file, {"b": 2, "a": "ü"})
    assert file.read_text(encoding="utf-8") == '{\n  "b": 2,\n  "a": "ü"\n}\n'
    assert list(file.parent.iterdir()) == [file]


def test_an_unfinished_file_is_none_of_its_kind(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.parquet") as beside:
        beside.touch()
        assert list(tmp_path.glob("*.parquet")) == []  # hidden names match, as they do for DuckDB and Polars
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_a_file_nobody_wrote_is_an_error_not_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "a.txt"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt])
def test_an_interrupted_folder_leaves_the_old_one_and_nothing_beside(
    tmp_path: Path, interruption: type[BaseException]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old").touch()
    with pytest.raises(interruption), replacing_folder(folder) as beside:
        (beside / "new").touch()
        raise interruption
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["model", "model/old"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for name in ("first", "second"):
        with replacing_folder(folder) as beside:
            (beside / "inner").mkdir()
            (beside / "inner" / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        "model",
        "model/inner",
        "model/inner/second",
    ]


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old").touch()
    with pytest.raises(FileNotFoundError), replacing_folder(folder) as beside:
        beside.rmdir()
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["model", "model/old"]


KILLED_WHILE_REPLACING = """
import os, signal, sys
from pathlib import Path
from distill_assets.foundation import files

folder, event, moment = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
seen = 0

def audit(name, arguments):
    global seen
    if name == event:
        seen += 1
        if seen == moment:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(audit)
with files.replacing_folder(folder) as beside:
    (beside / "new").touch()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder to be replaced, with a file in it."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    return tmp_path / "model"


def kill_while_replacing(folder: Path, event: str, moment: int) -> None:
    """Kill a process that replaces `folder` just before its `moment`-th rename or removal."""
    command = [sys.executable, "-c", KILLED_WHILE_REPLACING, str(folder), event, str(moment)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL


@pytest.mark.parametrize("moment", [1, 2])  # the old one goes aside; the new one takes its place
def test_a_folder_survives_a_kill_while_it_is_replaced(tmp_path: Path, folder: Path, moment: int) -> None:
    kill_while_replacing(folder, "os.rename", moment)
    assert folder.exists() is (moment == 1)
    assert sweep(tmp_path) == []  # it may be under way
    assert sweep(tmp_path, untouched_seconds=0, aside_seconds=0)
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["model", "model/old"]


def test_what_is_being_removed_is_not_brought_back(tmp_path: Path, folder: Path) -> None:
    kill_while_replacing(folder, "shutil.rmtree", 2)  # the first clears the place of the old one
    assert (folder / "new").exists()
    assert len(list(tmp_path.glob(".partial-*"))) == 1  # the old one, half removed for all anybody knows
    shutil.rmtree(folder)
    assert sweep(tmp_path, untouched_seconds=0)
    assert list(tmp_path.iterdir()) == []


def test_only_the_neighbours_of_one_file_are_swept(tmp_path: Path) -> None:
    names = [
        ".partial-0123abcd-a@1~",
        ".partial-0123abcd-b-a@1~",
        ".partial-0123abcd-a@1",
        "a@1",
        "a@1~",
        ".partial-was-a@1",
        ".partial-0123abcd-c@1~",
    ]
    for name in names:
        (tmp_path / name).touch()
    sweep_beside(tmp_path / "a@1")
    sweep_beside(tmp_path / "[c]@1")  # a name, no pattern
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])


def test_sweeping_removes_unfinished_neighbours_only(tmp_path: Path) -> None:
    for name in ("a.parquet", ".partial-0123abcd-a.parquet", ".hidden"):
        (tmp_path / name).write_text(name)
    (tmp_path / ".partial-0123abcd-model").mkdir()
    (tmp_path / ".partial-0123abcd-model" / "file").touch()
    assert [path.name for path in sweep(tmp_path, untouched_seconds=0)] == [
        ".partial-0123abcd-a.parquet",
        ".partial-0123abcd-model",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "a.parquet"]


def test_files_are_as_readable_as_their_folder(tmp_path: Path) -> None:
    with replacing_folder(tmp_path / "model") as beside:
        (beside / "private").touch(mode=0o600)
    folder = tmp_path / "model"
    assert (folder / "private").stat().st_mode & 0o777 == folder.stat().st_mode & 0o666


def test_a_folder_that_filled_up_meanwhile_is_not_removed(tmp_path: Path) -> None:
    full, empty = tmp_path / "full", tmp_path / "empty"
    for folder in (full, empty):
        folder.mkdir()
    (full / "mine").write_text("kept")
    for folder in (full, empty):
        remove_empty(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["full"] and (full / "mine").read_text() == "kept"
