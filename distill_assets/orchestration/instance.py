"""The Dagster instance of a home, and runs of dead processes in it."""

import os
import socket

import dagster as dg
import psutil
from dagster import DagsterRunStatus, RunsFilter

from distill_assets.foundation.home import DAGSTER_VARIABLE, HOME_VARIABLE, Home

HOST_TAG = "distill/host"
PROCESS_TAG = "distill/process"


def environment(home: Home) -> dict[str, str]:
    """What a Dagster process needs to work in this home."""
    return {HOME_VARIABLE: str(home.root), DAGSTER_VARIABLE: str(home.dagster)}


def open_instance(home: Home) -> dg.DagsterInstance:
    """The home's own instance; also sets this process's environment, which asset bodies read."""
    home.prepare_dagster()
    os.environ.update(environment(home))
    return dg.DagsterInstance.get()


def process_tags() -> dict[str, str]:
    """Who runs a run: this host, this process and when it began (pids are used again)."""
    process = psutil.Process()
    return {HOST_TAG: socket.gethostname(), PROCESS_TAG: f"{process.pid}@{process.create_time():.2f}"}


def close_dead_runs(instance: dg.DagsterInstance) -> list[str]:
    """Close runs whose process on this host is gone, and free their pool slots; returns their ids.

    A run killed with SIGKILL stays STARTED and keeps its slot: whoever comes next would wait for ever.
    """
    here = RunsFilter(
        statuses=[DagsterRunStatus.STARTED, DagsterRunStatus.STARTING, DagsterRunStatus.CANCELING],
        tags={HOST_TAG: socket.gethostname()},
    )
    closed = []
    for run in instance.get_runs(filters=here):
        if not _alive(run.tags.get(PROCESS_TAG, "")):
            instance.report_run_failed(run, "the process that ran this is gone (killed, or the machine restarted)")
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
            closed.append(run.run_id)
    return closed


def _alive(process: str) -> bool:
    pid, _, created = process.partition("@")
    try:
        return f"{psutil.Process(int(pid)).create_time():.2f}" == created
    except (psutil.NoSuchProcess, ValueError):
        return False
