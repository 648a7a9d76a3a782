from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from distill_assets.foundation.errors import HomeError, SettingsError
from distill_assets.foundation.home import DAGSTER_VARIABLE, HOME_VARIABLE, Home, default_home, find_home, make_home


@pytest.fixture
def other(tmp_path: Path) -> Path:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "distill.yaml").write_text("teacher: {model: a}\nstudent: {model: b}\n")
    return tmp_path / "other"


def test_the_named_home_wins_over_the_variable(home: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_home(home).root == home.resolve()
    monkeypatch.setenv(HOME_VARIABLE, str(other))
    assert find_home().root == other.resolve()
    assert find_home(home).root == home.resolve()


def test_a_checkout_has_a_home_of_its_own() -> None:
    folder = default_home()
    assert folder is not None
    assert (folder.parent / "workspace.yaml").exists()
    assert folder.name == "data"


def test_a_relative_home_is_made_absolute(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home.parent)
    assert find_home(Path(home.name)).root == home.resolve()


def test_a_folder_without_settings_is_no_home(tmp_path: Path) -> None:
    with pytest.raises(HomeError, match=r"has no distill\.yaml; `distill init"):
        find_home(tmp_path)


def test_dagster_home_may_be_this_home_s_and_nothing_else(
    home: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DAGSTER_VARIABLE, str(home / "dagster" / ".." / "dagster"))
    assert find_home(home).root == home.resolve()
    with pytest.raises(HomeError) as caught:
        find_home(other)
    said = str(caught.value)
    assert str(home / "dagster") in said  # what the variable says
    assert str(other.resolve() / "dagster") in said  # what it should say
    assert 'eval "$(distill env --home' in said


def test_settings_are_read_afresh(home: Path) -> None:
    at = Home(home)
    assert at.settings().targets.k == 8
    at.settings_file.write_text(at.settings_file.read_text().replace("k: 8", "k: 9"))
    assert at.settings().targets.k == 9
    at.settings_file.unlink()
    with pytest.raises(SettingsError, match="does not exist"):
        at.settings()


def test_the_dagster_folder_is_quiet_and_an_edited_one_is_kept(tmp_path: Path) -> None:
    at = Home(tmp_path)
    at.prepare_dagster()
    file = at.dagster / "dagster.yaml"
    written = yaml.safe_load(file.read_text())
    assert written["telemetry"] == {"enabled": False}
    assert written["nux"] == {"enabled": False}
    assert written["concurrency"]["pools"]["granularity"] == "op"
    file.write_text("telemetry: {enabled: false}\n")
    at.prepare_dagster()
    assert file.read_text() == "telemetry: {enabled: false}\n"


def test_everything_made_lies_in_the_home(tmp_path: Path) -> None:
    at = Home(tmp_path)
    made = [at.captures, at.catalog, at.students, at.reports, at.tokenizer_report, at.models, at.dagster]
    assert {path.parent for path in made} == {tmp_path}
    assert len(set(made)) == len(made)
    cache = at.hashes()
    cache.hash_of(Path(__file__))
    cache.save()
    assert (tmp_path / ".cache" / "hashes.json").exists()


@pytest.mark.parametrize("name", ["what?", "a*b", "runs[1]", "back\\slash"])
def test_a_home_whose_path_is_a_pattern_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(HomeError, match="may not contain"):
        make_home(tmp_path / name, "teacher: {model: a}\nstudent: {model: b}\n")
    assert not (tmp_path / name).exists()
    (tmp_path / name).mkdir()
    with pytest.raises(HomeError, match="may not contain"):
        find_home(tmp_path / name)
