"""Real processes that train one student together: as one alone, whatever ends whom."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from distill_assets.foundation.errors import StaleInputs
from distill_assets.foundation.files import remove
from distill_assets.foundation.home import Home
from distill_assets.foundation.progress import Progress
from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.orchestration.students import StudentSide
from distill_assets.orchestration.training_processes import require_devices, train_in_processes
from distill_assets.student_model.saving import read_student
from distill_assets.teacher_capture.capture import capture_shard
from tests import tiny
from tests.bench import Bench


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    return captured(tmp_path_factory.mktemp("processes") / "home", teacher_folder, epochs=2)


def captured(root: Path, teacher_folder: Path, **training: Any) -> Path:
    """A home to train in: one shard to learn from, one to validate on."""
    tiny.make_home(root, teacher_folder, shards=2, rows=9, data={"validation": ["s1"]}, training=training)
    Pipeline(Home(root)).check_tokenizers()
    bench = Bench(root)
    for shard in bench.shards.values():
        capture_shard(bench.spec, shard, bench.store, device="cpu")
    return root


def test_two_processes_train_the_student_that_one_does(root: Path, tmp_path: Path) -> None:
    """Shares of batches add up, batches of an odd number of rows included; the first process saves and tells."""
    students = StudentSide(Pipeline(Home(root)))
    seen: list[Progress] = []
    students.train("student", device="cpu", force=True, processes=2, pass_tokens=80, on_progress=seen.append)
    together = read_student(students.folder("student")).report
    students.train("student", device="cpu", force=True)
    alone = read_student(students.folder("student")).report
    assert [p.done for p in seen] == list(range(1, alone.steps + 1))
    assert [p.tokens for p in together.curve] == [p.tokens for p in alone.curve]
    for ours, theirs in (
        ([p.loss for p in together.curve], [p.loss for p in alone.curve]),
        ([p.kd for p in together.validation], [p.kd for p in alone.validation]),
    ):
        assert ours == pytest.approx(theirs, rel=2e-5)
    assert not list(students.home.training.glob("*-*"))


TRAIN = """
import sys
from pathlib import Path
from distill_assets.foundation.home import Home
from distill_assets.orchestration.pipeline import Pipeline
from distill_assets.orchestration.students import StudentSide

def listen(progress):
    print(progress.done, flush=True)

students = StudentSide(Pipeline(Home(Path(sys.argv[1]))))
students.train("student", device="cpu", force=True, processes=2, on_progress=listen, checkpoint_seconds=0.0)
"""


def test_two_processes_stop_together_where_one_does(tmp_path: Path, teacher_folder: Path) -> None:
    far_too_large: dict[str, Any] = {"learning_rate": 0.2, "early_stopping": 1, "validate_every": 2}
    root = captured(tmp_path / "home", teacher_folder, epochs=9, **far_too_large)
    students = StudentSide(Pipeline(Home(root)))
    reports = []
    for processes in (1, 2):
        students.train("student", device="cpu", force=True, processes=processes)
        reports.append(read_student(students.folder("student")).report)
    alone, together = reports
    assert alone.stopping is not None and together.stopping is not None
    assert together.steps == alone.steps < alone.stopping.planned_steps
    assert together.stopping.kept_step == alone.stopping.kept_step
    assert together.stopping.kept_loss == pytest.approx(alone.stopping.kept_loss, rel=1e-3)


def test_processes_end_with_the_one_that_called_them_and_go_on_from_their_checkpoint(
    tmp_path: Path, teacher_folder: Path
) -> None:
    """To the curve and the weights of two that nobody disturbed. There are steps enough to be killed in."""
    root = captured(tmp_path / "home", teacher_folder, epochs=20, batch_tokens=64)
    students = StudentSide(Pipeline(Home(root)))
    students.train("student", device="cpu", force=True, processes=2)
    undisturbed, weights = read_student(students.folder("student")).report, trained(students)
    with subprocess.Popen([sys.executable, "-c", TRAIN, str(root)], stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        while int(caller.stdout.readline()) < 3:
            pass
        family = psutil.Process(caller.pid).children(recursive=True)
        assert len(family) >= 3  # the launcher and two that train
        os.kill(caller.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
    remove(students.folder("student"))
    seen: list[Progress] = []
    students.train("student", device="cpu", force=False, processes=2, on_progress=seen.append)
    assert 2 <= seen[0].done < undisturbed.steps and seen[-1].done == undisturbed.steps
    assert read_student(students.folder("student")).report.curve == undisturbed.curve
    assert trained(students) == weights


def trained(students: StudentSide) -> bytes:
    return (students.folder("student") / "model.safetensors").read_bytes()


def test_what_a_process_raises_is_raised_here(root: Path, tmp_path: Path) -> None:
    with pytest.raises(StaleInputs, match="changed while the student was about to be trained"):
        train_in_processes(
            Home(root), "student", "0" * 16, tmp_path, processes=2, device="cpu", how={}, on_progress=lambda p: None
        )


def test_on_a_cpu_any_number_of_processes_is_welcome() -> None:
    require_devices("cpu", 3)
