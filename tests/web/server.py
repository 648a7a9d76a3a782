"""A real `distill ui` of a home (web server, daemon, code location, SQLite), and what is asked of it.

Everything goes over HTTP, as the browser does it: nothing here opens the home's instance, so no test
can be helped along by its own process.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

LOCATION = {"repositoryLocationName": "distill_assets.definitions", "repositoryName": "__repository__"}
PARTITIONED = ("dataset_shards", "teacher_capture")
SENSORS = ("shard_watcher", "keep_up_to_date")
UNFINISHED = {"QUEUED", "NOT_STARTED", "MANAGED", "STARTING", "STARTED", "CANCELING"}
PATIENCE_SECONDS = 300.0  # for what takes 10 s on a quiet machine
LOOK_SECONDS = 0.3

Found = TypeVar("Found")


def wait_for(look: Callable[[], Found], what: str, seconds: float = PATIENCE_SECONDS) -> Found:
    """What `look` finds as soon as that is true; AssertionError with the last finding after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}; the last look found {found!r}"
        time.sleep(LOOK_SECONDS)
    return found


def wait_until_empty(look: Callable[[], Found], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    """`wait_for` the opposite, so that a failure tells what was left."""
    deadline = time.monotonic() + seconds
    while left := look():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}; left: {left!r}"
        time.sleep(LOOK_SECONDS)


@dataclass(frozen=True)
class Run:
    """A run as the server lists it. `key`: its partition, or the two ends of its range as `first...last`."""

    run_id: str
    job: str
    status: str
    assets: tuple[str, ...]
    key: str | None
    tags: Mapping[str, str]
    created: float
    ended: float | None

    def __str__(self) -> str:
        name = "+".join(self.assets) or self.job
        return f"{name}[{self.key}]" if self.key else name


@dataclass(frozen=True)
class Tick:
    """One evaluation of a sensor or schedule."""

    status: str
    started: float
    ended: float | None
    run_ids: tuple[str, ...]
    skip_reason: str | None


@dataclass(frozen=True)
class Asset:
    """What the UI shows of an asset: FRESH, STALE or MISSING, by partition where it has any (`states`), else
    under the key "". `failed`: partitions whose last attempt failed.
    """

    states: Mapping[str, str]
    failed: frozenset[str]

    @property
    def state(self) -> str:
        """Of an asset without partitions."""
        return self.states[""]


class Server:
    """`distill ui` of one home as a process group of its own. `start` it again after `kill` or `stop`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = root.parent / "ui.log"
        self.process: subprocess.Popen[bytes] | None = None

    # the processes ---------------------------------------------------------------------------

    def start(self) -> None:
        """Returns when the web server answers and the code location is loaded."""
        command = [sys.executable, "-m", "distill_assets.cli", "ui", "--home", str(self.root), "--port", str(self.port)]
        environment = {
            name: value for name, value in os.environ.items() if name not in ("DAGSTER_HOME", "DISTILL_HOME")
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)
        wait_for(self._answers, "the web server")
        wait_for(self._is_loaded, "the code location")

    def _answers(self) -> bool:
        assert self.process is not None and self.process.poll() is None, self.log.read_text()
        try:
            urllib.request.urlopen(f"{self.url}/server_info", timeout=2).close()
        except OSError:
            return False
        return True

    def _is_loaded(self) -> bool:
        [entry] = self.ask(_LOCATIONS)["workspaceOrError"]["locationEntries"]
        loaded = (entry["locationOrLoadError"] or {}).get("__typename")
        assert loaded != "PythonError", self.log.read_text()
        return bool((entry["loadStatus"], loaded) == ("LOADED", "RepositoryLocation"))

    def stop(self) -> None:
        """Ctrl-C, and SIGKILL for what is left of the group after half a minute."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=30)
        self._kill_group()

    def _kill_group(self) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def kill_daemon(self) -> None:
        """SIGKILL to the daemon; whatever Dagster then leaves of the others ends by itself or is killed too."""
        assert self.process is not None
        [daemon] = [
            child
            for child in psutil.Process(self.process.pid).children(recursive=True)
            if "dagster._daemon" in child.cmdline()
        ]
        daemon.kill()
        self.process.wait(timeout=PATIENCE_SECONDS)
        self._kill_group()

    # questions -------------------------------------------------------------------------------

    def ask(self, query: str, **variables: Any) -> dict[str, Any]:
        """The data of a GraphQL answer; AssertionError with the server's words for an error."""
        request = urllib.request.Request(
            f"{self.url}/graphql",
            data=json.dumps({"query": query, "variables": variables}).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error
        assert "errors" not in answer, answer["errors"]
        data: dict[str, Any] = answer["data"]
        return data

    def runs(self, asset: str | None = None) -> list[Run]:
        """All runs, oldest first; with `asset`: those that were to make it."""
        listed = self.ask(_RUNS)["runsOrError"]["results"]
        runs = [_as_run(run) for run in reversed(listed)]
        return [run for run in runs if asset is None or asset in run.assets]

    def ticks(self, name: str) -> list[Tick]:
        """Evaluations of a sensor or schedule, oldest first."""
        return [_as_tick(tick) for tick in reversed(self._instigator(name)["ticks"])]

    def is_on(self, name: str) -> bool:
        return bool(self._instigator(name)["status"] == "RUNNING")

    def _instigator(self, name: str) -> dict[str, Any]:
        kind = _kind(name)
        found = self.ask(_INSTIGATOR[kind], selector={**LOCATION, f"{kind.lower()}Name": name})["found"]
        assert "state" in found, found
        state: dict[str, Any] = found["state"]
        return state

    def assets(self) -> dict[str, Asset]:
        """Each asset as the server shows it."""
        data = self.ask(_ASSETS, partitioned=[{"path": [asset]} for asset in PARTITIONED])
        names = {node["assetKey"]["path"][0]: node["staleStatus"] for node in data["all"]}
        shown = {name: Asset({"": state}, frozenset()) for name, state in names.items() if name not in PARTITIONED}
        for node in data["partitioned"]:
            states = dict(zip(node["partitionKeys"], node["staleStatusByPartition"], strict=True))
            failed = node["assetPartitionStatuses"].get("failedPartitions", ())
            shown[node["assetKey"]["path"][0]] = Asset(states, frozenset(failed))
        return shown

    def wait_for_runs(self, run_ids: Iterable[str]) -> list[Run]:
        """These runs, once all have ended."""
        wanted = set(run_ids)

        def ended() -> list[Run] | None:
            found = [run for run in self.runs() if run.run_id in wanted]
            return found if {run.run_id for run in found if run.status not in UNFINISHED} == wanted else None

        return wait_for(ended, f"the end of {len(wanted)} runs") or []

    def last_words(self, run_id: str) -> str:
        """What a failed run says of its failures."""
        events = self.ask(_FAILURES, run_id=run_id)["logsForRun"]["events"]
        errors = [event["error"] for event in events if event.get("error")]
        return "\n".join(e["message"] for error in errors for e in (error, error["cause"]) if e)

    def wait_for_ticks(self, name: str, n: int = 2) -> None:
        """Until a sensor has begun and ended `n` more evaluations."""
        now = time.time()
        wait_for(
            lambda: len([t for t in self.ticks(name) if t.started > now and t.status != "STARTED"]) >= n,
            f"{n} ticks of {name}",
        )

    def wait_until_quiet(self) -> None:
        """Until nothing runs and the conditions, asked twice since, request nothing."""
        busy = time.time()

        def is_quiet() -> bool:
            nonlocal busy
            if self.under_way():
                busy = time.time()
                return False
            since = [t for t in self.ticks("keep_up_to_date") if t.started > busy and t.status != "STARTED"]
            return len(since) >= 2 and all(t.status == "SKIPPED" for t in since[-2:])

        wait_for(is_quiet, "the automation to settle", 600)

    def under_way(self) -> list[str]:
        """Runs and backfills that are not over."""
        backfills = self.ask(_BACKFILLS)["partitionBackfillsOrError"]["results"]
        open_ = [
            f"backfill {b['id']}" for b in backfills if not b["status"].startswith(("COMPLETED", "FAILED", "CANCELED"))
        ]
        return open_ + [str(run) for run in self.runs() if run.status in UNFINISHED]

    # the person at the UI --------------------------------------------------------------------

    def switch(self, name: str, on: bool) -> None:
        """Start or stop a sensor or schedule."""
        state = self._instigator(name)
        kind = _kind(name)
        if on:
            selector = {**LOCATION, f"{kind.lower()}Name": name}
            answer = self.ask(_SWITCH_ON[kind], selector=selector)
        else:
            answer = self.ask(_SWITCH_OFF[kind], id=state["id"])
        assert "message" not in answer["done"], answer

    def launch(self, asset: str, key: str | None = None, config: Mapping[str, Any] | None = None) -> str:
        """Materialise an asset as the button and the launchpad do, with run configuration of its op; the run's id."""
        selector = {**LOCATION, "pipelineName": "__ASSET_JOB", "assetSelection": [{"path": [asset]}]}
        tags = [{"key": "dagster/partition", "value": key}] if key else []
        answer = self.ask(
            _LAUNCH,
            params={
                "selector": selector,
                "mode": "default",
                "runConfigData": {"ops": {asset: {"config": config}}} if config else {},
                "executionMetadata": {"tags": tags},
            },
        )["launched"]
        assert "run" in answer, answer
        run_id: str = answer["run"]["runId"]
        return run_id

    def backfill_all(self, asset: str) -> str:
        """A backfill of all partitions; its id."""
        answer = self.ask(_BACKFILL, params={"assetSelection": [{"path": [asset]}], "allPartitions": True})["launched"]
        assert "backfillId" in answer, answer
        backfill_id: str = answer["backfillId"]
        return backfill_id

    def reload(self) -> None:
        """Load the code location anew, as the button on the deployment page does."""
        answer = self.ask(_RELOAD, name=LOCATION["repositoryLocationName"])["done"]
        assert answer["__typename"] == "WorkspaceLocationEntry", answer
        wait_for(self._is_loaded, "the reloaded code location")


def _as_run(run: Mapping[str, Any]) -> Run:
    tags = {tag["key"]: tag["value"] for tag in run["tags"]}
    ends = [tags.get(f"dagster/asset_partition_range_{end}") for end in ("start", "end")]
    key = tags.get("dagster/partition") or (f"{ends[0]}...{ends[1]}" if ends[0] else None)
    assets = tuple(a["path"][0] for a in run["assetSelection"] or ())
    return Run(run["runId"], run["jobName"], run["status"], assets, key, tags, run["creationTime"], run["endTime"])


def _as_tick(tick: Mapping[str, Any]) -> Tick:
    return Tick(tick["status"], tick["timestamp"], tick["endTimestamp"], tuple(tick["runIds"]), tick["skipReason"])


def _kind(name: str) -> str:
    return "Sensor" if name in SENSORS else "Schedule"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


_RUNS = """{ runsOrError { ... on Runs { results {
    runId jobName status creationTime endTime assetSelection { path } tags { key value }
} } ... on PythonError { message } } }"""
_LOCATIONS = """{ workspaceOrError { ... on Workspace {
    locationEntries { loadStatus locationOrLoadError { __typename } }
} } }"""
_FAILURES = """query($run_id: ID!) { logsForRun(runId: $run_id) { ... on EventConnection { events {
    ... on RunFailureEvent { error { message cause { message } } }
    ... on ExecutionStepFailureEvent { error { message cause { message } } }
} } } }"""
_BACKFILLS = """{ partitionBackfillsOrError { ... on PartitionBackfills { results { id status } }
    ... on PythonError { message }
} }"""
_STATE = "id selectorId status ticks(limit: 40) { status timestamp endTimestamp runIds skipReason }"
# What the page of one of them asks. Asked for all at once, the server finds no tick from before it was started.
_INSTIGATOR = {
    kind: f"""query($selector: {kind}Selector!) {{ found: {kind.lower()}OrError({kind.lower()}Selector: $selector) {{
        ... on {kind} {{ state: {kind.lower()}State {{ {_STATE} }} }} ... on PythonError {{ message }}
    }} }}"""
    for kind in ("Sensor", "Schedule")
}
_ASSETS = """query($partitioned: [AssetKeyInput!]!) {
    all: assetNodes { assetKey { path } staleStatus }
    partitioned: assetNodes(assetKeys: $partitioned) {
        assetKey { path } partitionKeys staleStatusByPartition
        assetPartitionStatuses { ... on DefaultPartitionStatuses { failedPartitions } }
    }
}"""
_SWITCH_ON = {
    kind: f"""mutation($selector: {kind}Selector!) {{ done: start{kind}({kind.lower()}Selector: $selector) {{
        ... on PythonError {{ message }}
    }} }}"""
    for kind in ("Sensor", "Schedule")
}
_SWITCH_OFF = {
    "Sensor": "mutation($id: String) { done: stopSensor(id: $id) { ... on PythonError { message } } }",
    "Schedule": "mutation($id: String) { done: stopRunningSchedule(id: $id) { ... on PythonError { message } } }",
}
_LAUNCH = """mutation($params: ExecutionParams!) { launched: launchPipelineExecution(executionParams: $params) {
    __typename ... on LaunchRunSuccess { run { runId } } ... on Error { message }
    ... on RunConfigValidationInvalid { errors { message } }
} }"""
_BACKFILL = """mutation($params: LaunchBackfillParams!) { launched: launchPartitionBackfill(backfillParams: $params) {
    __typename ... on LaunchBackfillSuccess { backfillId } ... on Error { message }
} }"""
_RELOAD = """mutation($name: String!) { done: reloadRepositoryLocation(repositoryLocationName: $name) {
    __typename ... on PythonError { message }
} }"""
