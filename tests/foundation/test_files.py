from __future__ import annotations

from pathlib import Path

import pytest

from distill_assets.foundation.files import replacing, replacing_folder, write_json


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
