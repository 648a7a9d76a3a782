"""A student trained by several processes of this machine, one a device: accelerate starts them, this module listens.

Each process is this module's `main`: the same training on the same home, of which accelerate makes one. What they
tell comes as JSON lines on their standard output, progress from the first of them and errors from any.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, get_args

from distill_assets.foundation import errors
from distill_assets.foundation.errors import DistillError, StaleInputs, TrainingError, UsageError
from distill_assets.foundation.home import Home
from distill_assets.foundation.progress import Progress, ProgressListener
from distill_assets.student_model.identity import StudentKind

_LISTEN_SECONDS = 0.2  # between two looks at signals: a read that waits would hear none
_PATIENCE_SECONDS = 10.0  # for processes that were asked to end


def train_in_processes(
    home: Home,
    kind: StudentKind,
    student_id: str,
    under_way: Path,
    *,
    processes: int,
    device: str,
    how: dict[str, Any],
    on_progress: ProgressListener,
) -> None:
    """Train the student of this kind and write its folder, as `StudentSide.train_here` does in one process.

    `under_way` is where its checkpoints lie; `how` goes to `train_student`. What a process raises is raised here;
    where one dies without a word, TrainingError says how. Whatever ends this function ends all processes, and so does
    the death of the process that called it.
    """
    from distill_assets.foundation.devices import resolve_device

    require_devices(device, processes)
    words = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    words += ["--num_processes", str(processes), "--main_process_port", "0", "--mixed_precision", "no"]
    words += ["--dynamo_backend", "no", "-m", __name__]
    words += [str(home.root), kind, student_id, str(under_way), json.dumps(how)]
    on_cpu = resolve_device(device).type == "cpu"
    environment = {**os.environ, "ACCELERATE_USE_CPU": str(on_cpu).lower(), "DISTILL_HOME": str(home.root)}
    with tempfile.TemporaryFile("w+", errors="replace") as said, _ended_with_us(words, environment, said) as process:
        failure = _listen(process, on_progress)
        code = process.wait()
        if failure is not None:
            raise failure
        if code:
            said.seek(0)
            raise TrainingError(
                f"student {student_id}: one of {processes} training processes died ({_last_words(said.read(), code)}); "
                "run again to go on from the last checkpoint, or train in one process"
            )


def require_devices(device: str, processes: int) -> None:
    """UsageError where `processes` cannot have a device each; on a CPU they share its cores."""
    from distill_assets.foundation.devices import cuda_choices, resolve_device

    target = resolve_device(device)
    if target.type == "cpu":
        return
    there = len(cuda_choices(device)) or 1
    if processes > there:
        raise UsageError(f"{processes} training processes need as many devices, and {device} is {there} here")


@contextmanager
def _ended_with_us(words: list[str], environment: dict[str, str], said: IO[str]) -> Iterator[subprocess.Popen[str]]:
    """The processes, a group of their own: Ctrl-C is heard here, and ends them."""
    process = subprocess.Popen(
        words,
        stdin=subprocess.PIPE,  # never written to: its end tells them that we are gone
        stdout=subprocess.PIPE,
        stderr=said,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_PATIENCE_SECONDS)
        process.stdout.close()


def _listen(process: subprocess.Popen[str], on_progress: ProgressListener) -> DistillError | None:
    """Pass progress on until the processes close their output; the first error that one told of."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    failure: DistillError | None = None
    while True:
        try:
            line = lines.get(timeout=_LISTEN_SECONDS)
        except queue.Empty:
            continue
        if line is None:
            return failure
        with suppress(ValueError):  # a library's own print
            told = json.loads(line)
            if isinstance(told, dict) and "progress" in told:
                on_progress(Progress(**told["progress"]))
            elif isinstance(told, dict) and "error" in told and failure is None:
                failure = getattr(errors, told["error"])(told["message"])


def _last_words(said: str, code: int) -> str:
    """What the end of a process's standard error says; launchers add pages of their own to it."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    ends = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    return (ends or lines or [f"exit code {code}"])[0][:300]


def main() -> None:
    """One of the processes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("home", type=Path)
    parser.add_argument("kind", choices=get_args(StudentKind))
    parser.add_argument("student_id")
    parser.add_argument("under_way", type=Path)
    parser.add_argument("how", type=json.loads)
    given = parser.parse_args()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    rank = int(os.environ["RANK"])

    def tell(progress: Progress) -> None:
        if rank == 0:
            _say(progress=asdict(progress))

    try:
        _train(given, tell)
    except DistillError as error:
        _say(error=type(error).__name__, message=str(error))
        raise SystemExit(1) from None


def _train(given: argparse.Namespace, tell: ProgressListener) -> None:
    from distill_assets.orchestration.pipeline import Pipeline
    from distill_assets.orchestration.students import StudentSide

    students = StudentSide(Pipeline(Home(given.home)))
    if students.ids[given.kind] != given.student_id:
        raise StaleInputs(f"distill.yaml or a shard changed while the {given.kind} was about to be trained; run again")
    device = "cpu" if os.environ["ACCELERATE_USE_CPU"] == "true" else f"cuda:{os.environ['LOCAL_RANK']}"
    students.train_here(given.kind, device=device, under_way=given.under_way, on_progress=tell, **given.how)


def _say(**told: Any) -> None:
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # waits until whoever called is gone
    os._exit(1)


if __name__ == "__main__":
    main()
