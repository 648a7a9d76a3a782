"""The Dagster instance of a home, and runs of dead processes in it."""

import os
import socket
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import dagster as dg
import psutil
from dagster import DagsterRunStatus, RunsFilter
from filelock import FileLock

from distill_assets.foundation.home import DAGSTER_VARIABLE, HOME_VARIABLE, Home, find_home

# A run in one of these may still record something.
UNFINISHED = [
    DagsterRunStatus.QUEUED,
    DagsterRunStatus.NOT_STARTED,
    DagsterRunStatus.STARTING,
    DagsterRunStatus.STARTED,
    DagsterRunStatus.CANCELING,
]
HOST_TAG = "distill/host"
PROCESS_TAG = "distill/process"


def environment(home: Home) -> dict[str, str]:
    """What a Dagster process needs to work in this home."""
    return {HOME_VARIABLE: str(home.root), DAGSTER_VARIABLE: str(home.dagster)}


@contextmanager
def open_instance(home: Home) -> Iterator[dg.DagsterInstance]:
    """The home's own instance; also sets this process's environment, which asset bodies read."""
    home.prepare_dagster()
    os.environ.update(environment(home))
    with FileLock(home.dagster / "opening.lock"):  # the first to open it makes the databases
        instance = dg.DagsterInstance.get()
    with instance, quick_records(home):
        yield instance


@contextmanager
def quick_records(home: Home, run_id: str = "") -> Iterator[None]:
    """Makes writing this home's records, and those of one run, two to three times as fast, as long as it lasts.

    Dagster opens and closes an SQLite database for each event, and whoever closes one last copies its log into
    it and waits for the disk. While somebody has it open, who closes it is not the last.
    """
    folder = home.dagster / "history" / "runs"  # none where the records lie in another database
    of_all = [file for file in (folder.with_name("runs.db"), folder / "index.db", folder / ".db") if file.is_file()]
    of_run = [folder / f"{run_id}.db"] if run_id and folder.is_dir() else []
    with ExitStack() as stack:
        for database in (*of_all, *of_run):
            connection = stack.enter_context(closing(sqlite3.connect(database, check_same_thread=False)))
            # As Dagster sets it in the end, but before a run that is about to begin gets its tables: they are
            # then written at once. The first reading, of whatever, is what keeps the file open.
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("SELECT count(*) FROM sqlite_master").fetchall()
        yield


THIS_PROCESS = uuid.uuid4().hex  # as long as this process lives
CLOCK_SECONDS = 600.0  # a process seems to begin at another time when the clock of its machine is set


def _host() -> str:
    """This machine, and the container on it: pids of another one mean nothing here."""
    with suppress(OSError):
        return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"
    return socket.gethostname()


def process_tags(run_id: str) -> dict[str, str]:
    """Who runs a run: this host, this process and when it began (pids are used again).

    The run's id is part of it, for Dagster copies tags to a run that is executed again.
    """
    process = psutil.Process()
    return {HOST_TAG: _host(), PROCESS_TAG: f"{run_id}@{process.pid}@{process.create_time():.2f}"}


@dg.resource(
    description="Writes down which process runs a run, so that a dead one can be told from a live one, and keeps "
    "`distill gc` out of the home until it ends."
)
def process_mark(context: dg.InitResourceContext) -> Iterator[None]:
    """Initialised before the first step waits for a pool slot, however the run was started."""
    if context.instance is not None and context.run is not None:
        context.instance.add_run_tags(context.run.run_id, process_tags(context.run.run_id))
    home = find_home()
    with home.in_use.shared(), quick_records(home, context.run_id or ""):
        yield


def holder_of(instance: dg.DagsterInstance, pool: str) -> str | None:
    """Who holds the last slot of a pool, for a person who waits for it; None when a slot is free."""
    info = instance.event_log_storage.get_concurrency_info(pool)
    if not info.claimed_slots or len(info.claimed_slots) < (info.limit or 1):
        return None
    run_id = info.claimed_slots[0].run_id
    run = instance.get_run_by_id(run_id)
    pid, host = (_pid(run), run.tags.get(HOST_TAG, "").partition(" ")[0]) if run else (None, None)
    return f"run {run_id[:8]}" + (f", process {pid} on {host}" if pid and host else "")


def under_way(instance: dg.DagsterInstance, besides: str = "") -> str | None:
    """A run of this home that may still do something, in words; None when there is none but run `besides`."""
    runs = [run for run in instance.get_runs(filters=RunsFilter(statuses=UNFINISHED)) if run.run_id != besides]
    if not runs:
        return None
    pid = _pid(runs[0])
    return f"run {runs[0].run_id[:8]}, {runs[0].status.value.lower()}" + (f" in process {pid}" if pid else "")


def close_dead_runs(instance: dg.DagsterInstance) -> list[str]:
    """Close runs whose process on this host is gone, and free their pool slots; returns their ids.

    A run killed with SIGKILL stays STARTED and keeps its slot: whoever comes next would wait for ever.
    """
    here = RunsFilter(statuses=UNFINISHED, tags={HOST_TAG: _host()})
    closed = []
    for run in instance.get_runs(filters=here):
        if _is_dead(run):
            instance.report_run_failed(run, "the process that ran this is gone (killed, or the machine restarted)")
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
            closed.append(run.run_id)
    return closed


def _process(run: dg.DagsterRun) -> list[str]:
    """[pid, when it began] as marked for this very run, or []."""
    run_id, *process = run.tags.get(PROCESS_TAG, "").split("@")
    return process if run_id == run.run_id and len(process) == 2 else []


def _pid(run: dg.DagsterRun) -> str | None:
    return next(iter(_process(run)), None)


def _is_dead(run: dg.DagsterRun) -> bool:
    if not (process := _process(run)):
        return False  # nobody has begun it, as far as is known
    pid, began = process
    try:
        found = psutil.Process(int(pid))
        return found.status() == psutil.STATUS_ZOMBIE or abs(found.create_time() - float(began)) > CLOCK_SECONDS
    except (psutil.NoSuchProcess, ValueError):
        return True
