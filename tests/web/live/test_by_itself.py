"""What a home does by itself while people edit it: a real server and daemon, one home, in this order.

Each test leaves everything current for the next one, and runs alone on a home that fills itself first.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter

import pytest
from playwright.sync_api import Page, expect

from distill_assets.orchestration.assets import WHY_TAG
from tests import tiny
from tests.web.home import UNPARTITIONED, Captured, LiveHome, require_agreement
from tests.web.server import SENSORS, Run, Server, wait_for

pytestmark = pytest.mark.timeout(1800)  # a busy machine is no failure

TRAINING = [f"s{i}" for i in range(8)]
# The control does not depend on how many ids are kept, so it stays as it is; but it has a new catalog, which Dagster
# takes for a reason to call it stale.
AFTER_OTHER_TARGETS = [asset for asset in UNPARTITIONED if asset != "control_student"]
ONCE = ["capture_catalog", "student_model", "student_evaluation"]


def new_runs(server: Server, before: list[Run]) -> list[Run]:
    known = {run.run_id for run in before}
    return [run for run in server.runs() if run.run_id not in known]


def counts(runs: list[Run]) -> dict[str, int]:
    """How many of these runs were to make each asset."""
    return {asset: sum(asset in run.assets for run in runs) for run in runs for asset in run.assets}


def reasons(runs: list[Run]) -> Counter[str]:
    """How many shards these runs captured for each reason, by what their tags say."""
    found: Counter[str] = Counter()
    for run in runs:
        for words in run.tags[WHY_TAG].split(", ") if "teacher_capture" in run.assets else ():
            n, _, state = words.rpartition(" ")
            found[state] += int(n or 1)
    return found


def after_a_tick(server: Server) -> None:
    """Return just after a look at the shards, so that the edits that follow are seen together."""
    server.wait_for_ticks("shard_watcher", 1)


@pytest.fixture
def filled(home: LiveHome, server: Server) -> list[Run]:
    """A settled home with both sensors on, nothing captured that a test has not asked for; the runs so far."""
    for name in SENSORS:
        if not server.is_on(name):
            server.switch(name, True)
    server.wait_until_quiet()
    home.captured()
    return server.runs()


def switched_on(server: Server, page: Page, name: str) -> bool:
    """Click the switch of a sensor that is off; a click while the page is still being drawn does nothing."""
    row = page.locator("[data-index]", has=page.locator(f"a[href$='/sensors/{name}']"))
    switch = row.locator("input").last
    expect(switch).to_be_enabled(timeout=60_000)
    if not switch.is_checked():
        row.locator("label").last.click()
        with contextlib.suppress(AssertionError):
            expect(switch).to_be_checked(timeout=10_000)
    return server.is_on(name)


def test_sensors_switched_on_in_the_browser_fill_a_fresh_home(home: LiveHome, server: Server, page: Page) -> None:
    page.goto("/automation", wait_until="domcontentloaded")
    for name in SENSORS:
        assert not server.is_on(name)
        wait_for(lambda name=name: switched_on(server, page, name), f"{name} to be on")  # type: ignore[misc]
    wait_for(lambda: server.assets()["student_evaluation"].state == "FRESH", "the report", 600)
    server.wait_until_quiet()
    assert home.captured() == {key: Captured(6) for key in [*TRAINING, "heldout"]}
    assert counts(server.runs()) == {
        "tokenizer_compatibility": 1,
        "teacher_capture": 1,
        **dict.fromkeys(ONCE, 1),
        "control_student": 1,
    }
    assert {run.status for run in server.runs()} == {"SUCCESS"}
    require_agreement(home, server)


def test_a_batch_of_edits_captures_exactly_what_changed(home: LiveHome, server: Server, filled: list[Run]) -> None:
    after_a_tick(server)
    home.change_a_row("s1")
    home.change_a_row("s4")
    home.add("s8", rows=4)
    home.shard("s6").unlink()
    os.utime(home.shard("s2"))
    students = home.students()
    server.wait_until_quiet()
    assert home.captured() == {"s1": Captured(1, 5), "s4": Captured(1, 5), "s8": Captured(4)}
    runs = counts(new_runs(server, filled))
    assert {asset: runs.pop(asset) for asset in [*ONCE, "control_student"]} == dict.fromkeys(
        [*ONCE, "control_student"], 1
    )
    assert set(runs) == {"teacher_capture"}
    assert reasons(new_runs(server, filled)) >= Counter({"changed": 2, "new": 1})
    assert len(home.students() - students) == 2
    assert server.assets()["teacher_capture"].states.keys() == home.on_disk() == home.catalogued()
    require_agreement(home, server)


def test_a_bad_row_fails_its_shard_alone_is_tried_once_and_recovers(
    home: LiveHome, server: Server, filled: list[Run]
) -> None:
    after_a_tick(server)
    good = home.spoil("s0")
    home.change_a_row("s5")
    students = home.students()
    server.wait_until_quiet()
    assert home.captured() == {"s5": Captured(1, 5)}
    assert home.catalogued() == home.on_disk() - {"s0"} and home.students() == students
    assert server.assets()["teacher_capture"].failed == {"s0"}
    states = {shard["shard"]: shard["state"] for shard in home.distill("status")["shards"]}
    assert states.pop("s0") == "failed" and set(states.values()) == {"current"}

    failed = new_runs(server, filled)
    server.wait_for_ticks("keep_up_to_date", 4)
    assert new_runs(server, filled) == failed  # not hammered
    assert sum("teacher_capture" in run.assets for run in failed) <= 2  # s0 and s5 are no range: at most a run each

    home.restore("s0", good)
    before = server.runs()
    server.wait_until_quiet()
    assert home.captured() == {}  # the capture of the good text is still there
    assert home.catalogued() == home.on_disk() and len(home.students() - students) == 2
    assert counts(new_runs(server, before))["student_evaluation"] == 1
    assert server.assets()["teacher_capture"].failed == set()
    require_agreement(home, server)


def test_incompatible_tokenizers_stop_everything_until_the_pair_is_mended(
    home: LiveHome, server: Server, filled: list[Run], tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other") / "other"
    tiny.save_model(other, tiny.train_tokenizer([text[::-1] for text in tiny.TEXT]))
    after_a_tick(server)
    home.edit(student={"from_teacher_layers": None, "model": str(other)})
    home.change_a_row("s3")
    server.wait_until_quiet()
    assert home.captured() == {} and counts(new_runs(server, filled)) == {"tokenizer_compatibility": 1}
    [tokenizers] = [a for a in home.distill("status")["assets"] if a["asset"] == "tokenizer_compatibility"]
    assert tokenizers["state"] == "failed"
    [by_hand] = server.wait_for_runs([server.launch("teacher_capture", "s3")])
    assert by_hand.status == "FAILURE" and "are incompatible: id " in server.last_words(by_hand.run_id)
    assert home.captured() == {}

    home.edit(student={"from_teacher_layers": [0, 2], "model": None})
    server.wait_until_quiet()
    assert home.captured() == {"s3": Captured(1, 5)}
    assert counts(new_runs(server, filled))["student_evaluation"] == 1
    require_agreement(home, server)


def test_settings_edited_under_the_daemon_and_the_daemon_killed_in_the_middle(
    home: LiveHome, server: Server, filled: list[Run]
) -> None:
    home.keep_more()
    states = {shard["state"] for shard in home.distill("status")["shards"]}
    assert states == {"settings_changed"}

    def capturing() -> list[Run]:
        return [run for run in new_runs(server, filled) if "teacher_capture" in run.assets and run.status != "QUEUED"]

    wait_for(capturing, "a run of teacher_capture, without a reload")
    server.kill_daemon()
    server.start()
    assert all(server.is_on(name) for name in SENSORS)
    server.wait_until_quiet()
    assert home.captured() == {key: Captured(home.rows(key)) for key in home.on_disk()}
    assert server.under_way() == []
    assert {asset["state"] for asset in home.distill("status")["assets"]} == {"current"}
    require_agreement(home, server, AFTER_OTHER_TARGETS)


def test_a_reloaded_code_location_keeps_all_state(home: LiveHome, server: Server, filled: list[Run]) -> None:
    shown = server.assets()
    server.reload()
    assert all(server.is_on(name) for name in SENSORS)
    for name in SENSORS:
        server.wait_for_ticks(name, 3)
    assert new_runs(server, filled) == [] and home.nothing_new()
    assert server.assets() == shown


def refreshed(server: Server) -> None:
    """Return when a refresh that began after this call is over."""
    now = time.time()
    [run] = wait_for(
        lambda: [r for r in server.runs() if r.job == "refresh" and r.created > now and r.ended][:1],
        "a scheduled refresh",
    )
    assert run.status == "SUCCESS"


def test_the_schedule_refreshes_only_what_changed(home: LiveHome, server: Server, filled: list[Run]) -> None:
    server.switch("keep_up_to_date", False)
    server.switch("nightly_refresh", True)
    refreshed(server)
    assert {run.job for run in new_runs(server, filled)} == {"refresh"} and home.nothing_new()

    home.change_a_row("s1")
    home.add("s9", rows=3)
    deleted = sorted(home.on_disk() - {"heldout", "s1", "s9"})[-1]
    home.shard(deleted).unlink()
    refreshed(server)
    assert home.captured() == {"s1": Captured(1, 5), "s9": Captured(3)}
    why = {run.key: run.tags[WHY_TAG] for run in new_runs(server, filled) if WHY_TAG in run.tags}
    assert why == {"s1": "changed: 1 of 6 rows", "s9": "new: 3 of 3 rows"}
    require_agreement(home, server)

    home.keep_more()
    refreshed(server)
    assert home.captured().keys() == home.on_disk() == home.catalogued()
    require_agreement(home, server, AFTER_OTHER_TARGETS)
    server.switch("nightly_refresh", False)
