"""Several processes on one home: they wait for each other, and a killed one does not block the next."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg
import psutil
import pytest
from dagster import DagsterRunStatus

from distill_assets.definitions import defs
from distill_assets.foundation.home import Home
from distill_assets.orchestration.bring_up_to_date import bring_up_to_date
from distill_assets.orchestration.instance import close_dead_runs, open_instance, process_tags
from distill_assets.orchestration.verify import verify

# A run as the web UI starts one (no tags of ours) that stays in the middle of its capture.
STUCK = """
import sys, time
from pathlib import Path
import dagster as dg
from distill_assets.definitions import defs
from distill_assets.foundation.home import Home
from distill_assets.orchestration import records
from distill_assets.orchestration.instance import open_instance
from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.orchestration.progress import shown_by
from distill_assets.orchestration.states import AssetStates

def stay(progress):
    print("in the middle", flush=True)
    time.sleep(600)

home = Home(Path(sys.argv[1]))
with open_instance(home) as instance, shown_by(stay):
    records.observe_shards(instance, AssetStates(Pipeline(home)))
    defs.resolve_implicit_global_asset_job_def().execute_in_process(
        instance=instance, asset_selection=[dg.AssetKey("teacher_capture")], partition_key="s0"
    )
"""


def test_a_killed_run_is_waited_for_while_it_lives_and_closed_when_it_is_dead(home: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", STUCK, str(home)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert child.stdout is not None
        while "in the middle" not in (line := child.stdout.readline()):
            assert line, "the child ended before it captured"
        said: list[str] = []

        def give_up_waiting(line: str) -> None:
            said.append(line)
            if "waits for" in line:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            bring_up_to_date(defs, Home(home), device="cpu", on_step=give_up_waiting)
        assert "teacher_capture waits for the gpu pool" in said[-1] and f"process {child.pid}" in said[-1]
        assert not any("closed" in line for line in said)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    said.clear()
    report = bring_up_to_date(defs, Home(home), device="cpu", on_step=said.append)
    assert "closed run" in said[0] and report.failures == {} and report.report
    with open_instance(Home(home)) as instance:
        [dead] = instance.get_runs(filters=dg.RunsFilter(statuses=[DagsterRunStatus.FAILURE]))
        assert dead.run_id[:8] in said[0]


def test_a_waiting_run_sleeps_and_hears_ctrl_c(home: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", STUCK, str(home)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    command = [sys.executable, "-m", "distill_assets.cli", "run", "--home", str(home), "--device", "cpu"]
    waiter = None
    try:
        assert holder.stdout is not None
        while "in the middle" not in (line := holder.stdout.readline()):
            assert line, "the holder ended before it captured"
        waiter = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job has it ignored
        )
        assert waiter.stderr is not None
        while "waits for the gpu pool" not in (line := waiter.stderr.readline()):
            assert line, "the second run did not wait"
        busy, began = psutil.Process(waiter.pid).cpu_times().user, time.monotonic()
        time.sleep(4)
        assert psutil.Process(waiter.pid).cpu_times().user - busy < (time.monotonic() - began) / 2
        waiter.send_signal(signal.SIGINT)
        assert waiter.wait(timeout=15) == 1
        assert "interrupted" in waiter.stderr.read()
    finally:
        for process in (holder, waiter):
            if process is not None:
                process.kill()
                process.wait()


def test_a_run_killed_while_it_waited_is_closed_too(home: Path) -> None:
    children = []
    try:
        for _ in range(2):  # the second one waits for the slot of the first
            child = subprocess.Popen(
                [sys.executable, "-c", STUCK, str(home)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            children.append(child)
            if len(children) == 1:
                assert child.stdout is not None
                while "in the middle" not in (line := child.stdout.readline()):
                    assert line, "the child ended before it captured"
        with open_instance(Home(home)) as instance:
            waiting = dg.RunsFilter(statuses=[DagsterRunStatus.STARTED])
            until = time.monotonic() + 60
            while len([r for r in instance.get_runs(filters=waiting) if "distill/process" in r.tags]) < 2:
                assert time.monotonic() < until, "the second run did not begin"
                time.sleep(0.2)
            assert close_dead_runs(instance) == []
            for child in children:
                os.kill(child.pid, signal.SIGKILL)  # a zombie until it is waited for
            time.sleep(0.5)
            assert len(verify(Home(home)).closed_runs) == 2
            assert close_dead_runs(instance) == []
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_a_run_executed_again_does_not_inherit_a_dead_process(home: Path) -> None:
    job = defs.resolve_implicit_global_asset_job_def()
    with open_instance(Home(home)) as instance:
        copied = {**process_tags("the-run-before"), "distill/process": "the-run-before@999999@1.00"}
        again = instance.create_run_for_job(job, tags=copied)
        assert close_dead_runs(instance) == []
        instance.add_run_tags(again.run_id, {"distill/process": f"{again.run_id}@999999@1.00"})
        assert close_dead_runs(instance) == [again.run_id]


def test_two_runs_on_a_fresh_home_share_the_work(home: Path) -> None:
    command = [sys.executable, "-m", "distill_assets.cli", "run", "--home", str(home), "--device", "cpu", "--json"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    answers = []
    for process in both:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert "Traceback" not in err
        answers.append(json.loads(out))
    captured = [shard for answer in answers for shard in answer["captured_shards"]]
    assert sorted(captured) == ["heldout", "s0", "s1", "s2"]  # each by one of them
    assert answers[0]["student_id"] == answers[1]["student_id"]
    assert len(list((home / "students").iterdir())) == 2
