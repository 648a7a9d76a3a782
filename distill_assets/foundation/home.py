"""A home: a folder with distill.yaml in which everything made lives."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from distill_assets.foundation.errors import HomeError
from distill_assets.foundation.files import sweep, write_text
from distill_assets.foundation.fingerprints import HashCache
from distill_assets.foundation.home_lock import HomeLock
from distill_assets.foundation.settings import SETTINGS_FILE, Settings, load_settings

HOME_VARIABLE = "DISTILL_HOME"
DAGSTER_VARIABLE = "DAGSTER_HOME"

DAGSTER_YAML = """\
# Dagster's instance of this home, written by distill_assets. Records only; the data lies beside it.
telemetry:
  enabled: false
nux:
  enabled: false
concurrency:
  pools:
    default_limit: 1      # one teacher on the GPU, one writer of the catalog, one training at a time
    granularity: op       # `run` lets two command-line runs overlap
run_monitoring:
  enabled: true
  start_timeout_seconds: 180
  free_slots_after_run_end_seconds: 60
retention:
  schedule:
    purge_after_days: 90
  sensor:
    purge_after_days:
      skipped: 7
      failure: 30
      success: 90
"""


@dataclass(frozen=True)
class Home:
    """The folder and where everything in it lies. `root` is absolute."""

    root: Path

    @property
    def settings_file(self) -> Path:
        return self.root / SETTINGS_FILE

    @property
    def captures(self) -> Path:
        return self.root / "captures"

    @property
    def catalog(self) -> Path:
        return self.root / "catalog.duckdb"

    @property
    def students(self) -> Path:
        return self.root / "students"

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    @property
    def tokenizer_report(self) -> Path:
        return self.root / "tokenizer_report.json"

    @property
    def comparisons(self) -> Path:
        return self.root / "comparisons"

    @property
    def training(self) -> Path:
        """Checkpoints of students under way."""
        return self.root / ".cache" / "training"

    @property
    def tensorboard(self) -> Path:
        """Events of trainings, those under way among them."""
        return self.root / "tensorboard"

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def dagster(self) -> Path:
        return self.root / "dagster"

    @property
    def own_places(self) -> tuple[Path, ...]:
        """Files and folders of the home that nothing but the pipeline and the user's editor may write."""
        files = (self.settings_file, self.catalog, self.tokenizer_report)
        folders = (self.captures, self.students, self.reports, self.comparisons, self.models, self.dagster)
        return (*files, *folders, self.root / ".cache")

    @property
    def in_use(self) -> HomeLock:
        """Shared by all who write into this home, and held alone by who removes something from it."""
        return HomeLock(self.dagster / "in_use.lock")

    def settings(self) -> Settings:
        """distill.yaml as it is now; never remembered, so an edit is seen at the next call."""
        return load_settings(self.settings_file)

    def hashes(self, rehash: bool = False) -> HashCache:
        return HashCache(self.root / ".cache" / "hashes.json", rehash=rehash)

    @property
    def kept_clean(self) -> tuple[Path, ...]:
        """Folders, besides those of captures and models, in which files are made beside and renamed."""
        made = (
            self.root,
            self.root / ".cache",
            self.training,
            self.tensorboard,
            self.students,
            self.reports,
            self.comparisons,
        )
        return tuple(folder for folder in made if not folder.is_symlink())

    def sweep(self) -> list[Path]:
        """Clean up what killed processes left; see `files.sweep`."""
        made = (
            self.root,
            self.root / ".cache",
            self.training,
            self.tensorboard,
            self.models,
            self.students,
            self.reports,
            self.comparisons,
        )
        return [path for folder in (*made, *self.captures.glob("*")) for path in sweep(folder)]

    def prepare_dagster(self) -> None:
        """Make the Dagster instance folder; an existing dagster.yaml is the user's and is kept."""
        if not (self.dagster / "dagster.yaml").exists():
            write_text(self.dagster / "dagster.yaml", DAGSTER_YAML)


def make_home(folder: Path, settings_text: str) -> Home:
    """Make `folder` a home with this distill.yaml; HomeError when it is one already."""
    home = Home(folder.expanduser().resolve())
    require_folder(home.root)
    if home.settings_file.exists():
        raise HomeError(f"{home.root} is a home already; edit {home.settings_file}")
    (home.root / "shards").mkdir(parents=True, exist_ok=True)
    write_text(home.settings_file, settings_text)
    home.prepare_dagster()
    return home


def require_folder(root: Path) -> None:
    """HomeError where no home can be: in place of a file or below one, or under a name that DuckDB takes for another.

    It reads `*`, `?` and `[` in a file's name as a pattern and a backslash as a slash; none can be quoted.
    """
    if strange := sorted(set(str(root)) & set("*?[\\")):
        raise HomeError(f"{root}: the path of a home may not contain {strange[0]}; use another folder or rename it")
    there = next(path for path in (root, *root.parents) if path.exists())
    if not there.is_dir():
        raise HomeError(f"{there} is a file; name a folder")


def default_home() -> Path | None:
    """`data/` beside workspace.yaml when this package runs from a checkout, else None."""
    checkout = Path(__file__).resolve().parents[2]
    return checkout / "data" if (checkout / "workspace.yaml").exists() else None


def find_home(named: Path | None = None) -> Home:
    """The home named, else $DISTILL_HOME, else the checkout's `data/`.

    Raises HomeError when there is none, when it has no distill.yaml, or when DAGSTER_HOME points
    elsewhere: records of one home in the instance of another would say that nothing was captured.
    """
    variable = os.environ.get(HOME_VARIABLE)
    folder = named or (Path(variable) if variable else None) or default_home()
    if folder is None:
        raise HomeError(f"no home given: pass --home DIR or set {HOME_VARIABLE}; `distill init DIR` makes one")
    home = Home(folder.expanduser().resolve())
    require_folder(home.root)
    if not home.settings_file.exists():
        raise HomeError(f"{home.root} has no {SETTINGS_FILE}; `distill init {folder}` makes it a home")
    elsewhere = os.environ.get(DAGSTER_VARIABLE)
    if elsewhere and Path(elsewhere).expanduser().resolve() != home.dagster:
        raise HomeError(
            f"{DAGSTER_VARIABLE} is {elsewhere}, but this home keeps its records in {home.dagster}; "
            f'unset it, or run: eval "$(distill env --home {folder})"'
        )
    return home
