"""Each way to start a capture, on one home that a server looks after: the teacher sees exactly what changed.

The sensors' and the schedule's way is in test_by_itself.py. Each test leaves every shard captured.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from distill_assets.orchestration.assets import CAPTURED_TAG
from tests.web.home import Captured, LiveHome, require_agreement
from tests.web.server import Server, wait_for, wait_until_empty

pytestmark = pytest.mark.timeout(900)

BIN = Path(sys.executable).parent
TRAINING = ["s0", "s1", "s2"]  # as few as have one between two that change: each costs a process in the launchpad
ROWS = 6
KNOWN_TO_DAGSTER = ("tokenizer_compatibility", "capture_catalog")
MATERIALIZE = [
    str(BIN / "dagster"),
    "asset",
    "materialize",
    "-m",
    "distill_assets.definitions",
    "--select",
    "teacher_capture",
]
LAUNCH = [str(BIN / "dg"), "launch", "--assets", "teacher_capture"]


@pytest.fixture(scope="module", autouse=True)
def watched(home: LiveHome, server: Server) -> Iterator[None]:
    """Everything current, and the watcher on, so that partitions come and go; nothing runs by itself."""
    server.switch("shard_watcher", True)
    home.distill("run")
    home.captured()
    yield


# The ways: each brings the captures of `keys` up to date and returns when that is done ---------------------------


class Ways:
    def __init__(self, home: LiveHome, server: Server, page: Page) -> None:
        self.home, self.server, self.page = home, server, page

    def ui_materialize(self, keys: Collection[str]) -> None:
        """The button of the partitions page, the keys picked one by one."""
        self._open_dialog()
        self.page.get_by_text("Select a partition or create one").click()
        for key in keys:
            self.page.get_by_role("menuitem").filter(has=self.page.locator(f"[title='{key}']")).click()
        self.page.get_by_text("Launch runs to materialize").click()  # closes the list
        self._launch_from_dialog()

    def ui_backfill_of_all(self, keys: Collection[str]) -> None:
        self._open_dialog()
        self.page.get_by_role("button", name="All", exact=True).click()
        self._launch_from_dialog()

    def _open_dialog(self) -> None:
        self.page.goto("/assets/teacher_capture?view=partitions", wait_until="domcontentloaded")
        self.page.get_by_role("button", name="Materialize").first.click()
        expect(self.page.get_by_text("Partition selection")).to_be_visible()

    def _launch_from_dialog(self) -> None:
        before = {run.run_id for run in self.server.runs()}
        self.page.get_by_role("button", name=re.compile("^Launch")).click()
        new = wait_for(lambda: [r.run_id for r in self.server.runs() if r.run_id not in before], "a run of the dialog")
        wait_until_empty(self.server.under_way, "the end of what the dialog launched")
        assert {run.status for run in self.server.runs() if run.run_id in new} == {"SUCCESS"}

    def launchpad_with_config(self, keys: Collection[str]) -> None:
        config = {"device": "cpu", "batch_tokens": 128}
        runs = [self.server.launch("teacher_capture", key, config) for key in keys]
        assert {run.status for run in self.server.wait_for_runs(runs)} == {"SUCCESS"}

    def dagster_asset_materialize(self, keys: Collection[str]) -> None:
        self._command(*MATERIALIZE, "--partition-range", f"{min(keys)}...{max(keys)}")

    def dg_launch(self, keys: Collection[str]) -> None:
        self._command(*LAUNCH, "--partition-range", f"{min(keys)}...{max(keys)}")

    def distill_run(self, keys: Collection[str]) -> None:
        self.home.distill("run")

    def _command(self, *command: str) -> None:
        result = self.home.command(*command)
        assert result.returncode == 0, result.stdout + result.stderr


WAYS: tuple[Callable[[Ways, Collection[str]], None], ...] = (
    Ways.ui_materialize,
    Ways.ui_backfill_of_all,
    Ways.launchpad_with_config,
    Ways.dagster_asset_materialize,
    Ways.dg_launch,
    Ways.distill_run,
)


@pytest.fixture
def ways(home: LiveHome, server: Server, page: Page) -> Ways:
    return Ways(home, server, page)


# The cells -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
class TestMatrix:
    def test_nothing_changed(self, way: Callable[..., None], ways: Ways) -> None:
        way(ways, {"s0", "s1"})
        assert ways.home.captured() == {}
        require_agreement(ways.home, ways.server, KNOWN_TO_DAGSTER)

    def test_one_changed_one_new_one_deleted(self, way: Callable[..., None], ways: Ways) -> None:
        home, server = ways.home, ways.server
        [deleted] = [key for key in home.on_disk() if key.startswith("t")] or [TRAINING[-1]]
        new = f"t-{way.__name__.replace('_', '-')}"
        home.shard(deleted).unlink()
        home.change_a_row("s1")
        home.add(new, rows=4)
        wait_for(lambda: server.assets()["teacher_capture"].states.keys() == home.on_disk(), "the watcher to see both")
        require_agreement(home, server, ["tokenizer_compatibility"])
        way(ways, {"s1", new})
        assert home.captured() == {"s1": Captured(1, ROWS - 1), new: Captured(4)}
        require_agreement(home, server, KNOWN_TO_DAGSTER)
        with pytest.raises(Refused, match=deleted):
            refuse(way, ways, deleted)
        assert home.captured() == {}

    def test_settings_changed(self, way: Callable[..., None], ways: Ways) -> None:
        home = ways.home
        home.keep_more()
        require_agreement(home, ways.server, ["tokenizer_compatibility"])
        way(ways, sorted(home.on_disk()))
        expected = {key: Captured(4 if key.startswith("t") else ROWS) for key in home.on_disk()}
        assert home.captured() == expected
        require_agreement(home, ways.server, KNOWN_TO_DAGSTER)


def test_a_backfill_and_two_runs_at_once_show_the_teacher_each_row_once(ways: Ways) -> None:
    home, server = ways.home, ways.server
    before = {run.run_id for run in server.runs()}
    home.keep_more()
    commands = [home.start("run") for _ in range(2)]
    ways.ui_backfill_of_all(())
    answers = [json.loads(command.communicate(timeout=600)[0]) for command in commands]
    assert [command.returncode for command in commands] == [0, 0], answers
    wait_until_empty(server.under_way, "the end of all runs")
    rows = {key: home.rows(key) for key in home.on_disk()}
    assert home.captured() == {key: Captured(n) for key, n in rows.items()}
    told = [run.tags.get(CAPTURED_TAG, "") for run in server.runs() if run.run_id not in before]
    assert sum(int(words.split()[0]) for words in told if words[:1].isdigit()) == sum(rows.values())
    assert sum(answer["rows_captured"] for answer in answers) <= sum(rows.values())
    require_agreement(home, server, KNOWN_TO_DAGSTER)


class Refused(Exception):
    """What a way says to whoever asks for a shard that was deleted."""


def refuse(way: Callable[..., None], ways: Ways, deleted: str) -> None:
    """Ask for a deleted shard; raises Refused with the last words."""
    home = ways.home
    if way is Ways.distill_run:
        error = home.distill("run", "--shard", deleted, code=2)["error"]
        raise Refused(error)
    if way in (Ways.dagster_asset_materialize, Ways.dg_launch):
        command = MATERIALIZE if way is Ways.dagster_asset_materialize else LAUNCH
        result = home.command(*command, "--partition", deleted)
        assert result.returncode != 0
        raise Refused(json.dumps((result.stdout + result.stderr).splitlines()[-15:]))
    if way is Ways.ui_backfill_of_all:  # all that there are: the deleted one is not offered
        assert deleted not in ways.server.assets()["teacher_capture"].states
        raise Refused(deleted)
    try:
        [run] = ways.server.wait_for_runs([ways.server.launch("teacher_capture", deleted)])
    except AssertionError as refusal:
        raise Refused(str(refusal)) from None
    assert run.status == "FAILURE"
    raise Refused(ways.server.last_words(run.run_id))
