"""A home as its user edits it while a server runs on it, and what its files say afterwards.

What the teacher saw is read from the footers of capture files, never from Dagster.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distill_assets.capture_catalog.query import run_query
from distill_assets.teacher_capture.store import read_capture
from tests import tiny
from tests.bench import edit
from tests.web.server import Server, wait_until_empty

# What the UI shows for each state of `distill status`. A shard whose file is gone is no partition.
SHOWN = {
    "current": "FRESH",
    "stale": "STALE",
    "missing": "MISSING",
    "new": "MISSING",
    "changed": "STALE",
    "settings_changed": "STALE",
    "removed": None,
}

UNPARTITIONED = ("tokenizer_compatibility", "capture_catalog", "student_model", "control_student", "student_evaluation")


@dataclass(frozen=True)
class Captured:
    """Rows of one capture file: those the teacher saw, and those taken from earlier captures."""

    rows: int
    reused: int = 0


class LiveHome:
    """A home of `shards` training shards s0, s1, ... of six rows, and a held-out one, looked at from outside."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._fresh_numbers = itertools.count(20_000, 100)
        self._seen = self._files()

    # what a user does ------------------------------------------------------------------------

    def shard(self, key: str) -> Path:
        return self.root / "shards" / f"{key}.jsonl"

    def on_disk(self) -> set[str]:
        return {file.stem for file in (self.root / "shards").iterdir()}

    def rows(self, key: str) -> int:
        return len(self.shard(key).read_text().splitlines())

    def change_a_row(self, key: str) -> None:
        """The first row of a shard becomes one that no shard ever had."""
        first, *others = self.shard(key).read_text().splitlines(keepends=True)
        changed = {**json.loads(first), "completion": f" changed {next(self._fresh_numbers)}"}
        self._write(key, json.dumps(changed) + "\n" + "".join(others))

    def add(self, key: str, rows: int) -> None:
        new = tiny.example_rows(rows, start=next(self._fresh_numbers))
        self._write(key, "".join(json.dumps(row) + "\n" for row in new))

    def spoil(self, key: str) -> str:
        """Append a line that is no JSON; the text as it was."""
        good = self.shard(key).read_text()
        self._write(key, good + "{not json\n")
        return good

    def restore(self, key: str, text: str) -> None:
        self._write(key, text)

    def _write(self, key: str, text: str) -> None:
        beside = self.root / "written-beside"  # a server looks at any moment; it never sees half a file
        beside.write_text(text)
        beside.replace(self.shard(key))

    def edit(self, **sections: Mapping[str, object]) -> None:
        """Merge sections into distill.yaml."""
        edit(self.root, **sections)

    def settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = yaml.safe_load((self.root / "distill.yaml").read_text())
        return settings

    def keep_more(self) -> None:
        """One more id a position: no capture that is there can serve, so the teacher must see every row again."""
        self.edit(targets={"k": self.settings()["targets"]["k"] + 1})

    # what is found ---------------------------------------------------------------------------

    def _files(self) -> dict[Path, tuple[int, int]]:
        # What a killed process left unfinished begins with a dot, and so does a folder of chunks.
        files = (self.root / "captures").glob("[!.]*/[!.]*.parquet")
        return {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}

    def captured(self) -> dict[str, Captured]:
        """By shard, the capture files written since the last call."""
        now = self._files()
        new = [read_capture(file) for file, identity in now.items() if self._seen.get(file) != identity]
        self._seen = now
        assert len({capture.shard for capture in new}) == len(new), "a shard was captured twice"
        return {capture.shard: Captured(capture.stats.rows_captured, capture.stats.rows_reused) for capture in new}

    def nothing_new(self) -> bool:
        return self._files() == self._seen

    def students(self) -> set[str]:
        folder = self.root / "students"
        return {student.name for student in folder.iterdir()} if folder.exists() else set()

    def catalogued(self) -> set[str]:
        rows = run_query(self.root / "catalog.duckdb", self.root / "captures", "SELECT shard FROM captures").rows
        return {shard for (shard,) in rows}

    def distill(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        """The answer of `distill ... --json` in a process of its own."""
        result = self.command(sys.executable, "-m", "distill_assets.cli", *arguments, "--json")
        assert result.returncode == code, result.stderr
        answer: dict[str, Any] = json.loads(result.stdout)
        return answer

    def command(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A command as a user types it after `eval "$(distill env)"`."""
        return subprocess.run(
            command, capture_output=True, text=True, timeout=240, check=False, env=self._environment(), cwd=_CHECKOUT
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """`distill ... --json`, under way."""
        command = [sys.executable, "-m", "distill_assets.cli", *arguments, "--json"]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self._environment(), cwd=_CHECKOUT
        )

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "DISTILL_HOME": str(self.root), "DAGSTER_HOME": str(self.root / "dagster")}


_CHECKOUT = Path(__file__).resolve().parents[2]  # where workspace.yaml and pyproject.toml are: `dg` looks for them


def require_agreement(home: LiveHome, server: Server, assets: Collection[str] = UNPARTITIONED) -> None:
    """`distill status` and the staleness that the UI shows say the same of every shard and of these assets.

    The watcher has some ticks to tell Dagster what was done in other ways. Dagster's mark looks no further than
    the direct inputs of an asset: where the catalog is stale, it still calls the student fresh.
    """
    status = home.distill("status")
    shards = {shard["shard"]: SHOWN[shard["state"]] for shard in status["shards"]}
    others = {a["asset"]: SHOWN[a["state"]] for a in status["assets"] if a["asset"] in assets}
    expected = {name: shown for name, shown in {**shards, **others}.items() if shown}

    def disagreements() -> dict[str, tuple[str | None, str | None]]:
        shown = server.assets()
        said = {**shown["teacher_capture"].states, **{name: shown[name].state for name in assets}}
        names = sorted(expected.keys() | said.keys())
        return {name: (expected.get(name), said.get(name)) for name in names if expected.get(name) != said.get(name)}

    wait_until_empty(disagreements, "that (`distill status`, UI) agree", 60)
