"""From nothing to all runs: what is there already is not made again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from workload import BenchHome

from distill_assets.foundation.language_model import load_model
from distill_assets.foundation.model_folders import resolve_model
from distill_assets.teacher_capture.capture import capture_shard
from distill_assets.teacher_capture.store import Capture
from distill_assets.teacher_capture.teacher import release_teacher

from .arms import DENSE, HARD, Arm
from .dense import write_dense
from .gradients import compare_gradients, figures_file
from .models import as_shard_rows, prepare_rows, prepare_teacher, stored_rows
from .setting import Setting
from .students import Workshop, train_and_measure

_SHARD = "train"
Say = Callable[[str], None]


def prepare(setting: Setting, cache: Path, arms: Sequence[Arm], say: Say) -> tuple[Workshop, dict[str, Capture]]:
    """Rows, teacher, its dense distributions, and a capture for each arm that has targets."""
    teacher_folder, students = setting.teacher_folder(cache), setting.student_folder(cache)
    prepare_rows(setting, teacher_folder)
    teacher = prepare_teacher(setting, teacher_folder, say)
    _prepare_dense(setting, teacher_folder, students, say)
    rows = as_shard_rows(stored_rows(teacher_folder, "train", setting.student_tokens))
    captures: dict[str, Capture] = {}
    # The widest first: fewer ids are derived from it without the teacher.
    for arm in sorted(arms, key=lambda arm: -(arm.targets or {}).get("k", 0)):
        if arm.targets is not None:
            home = BenchHome(students / "home", teacher, **arm.targets)
            if _SHARD not in home.shards():
                home.write(_SHARD, rows)
            say(f"capture for {arm.name}")
            captures[arm.name] = capture_shard(home.spec, home.shards()[_SHARD], home.store).capture
    release_teacher()
    paths = {name: capture.path for name, capture in captures.items()}
    some = next(iter(paths.values()))  # of which the two ends read the rows
    return Workshop(setting, teacher_folder, students, {HARD: some, DENSE: some} | paths), captures


def _prepare_dense(setting: Setting, teacher: Path, students: Path, say: Say) -> None:
    for name, most_tokens in (("train", setting.student_tokens), ("heldout", None)):
        path = students / "dense" / f"{name}.f16"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            folder = resolve_model(str(teacher / "teacher"), None, teacher)
            model = load_model(folder, "float32", torch.device("cpu"))
            write_dense(model, stored_rows(teacher, name, most_tokens), path, say)


def train(pool: ProcessPoolExecutor, shop: Workshop, arms: Sequence[Arm], seeds: Sequence[int], say: Say) -> None:
    """Every arm on every seed; seed by seed, so that what is there when it is stopped can be compared."""
    todo = [(arm, seed) for seed in seeds for arm in arms if not shop.run_file(arm, seed).exists()]
    jobs = {pool.submit(train_and_measure, shop, arm, seed): f"{arm.name}, seed {seed}" for arm, seed in todo}
    _wait(jobs, "students", say)


def compare(pool: ProcessPoolExecutor, shop: Workshop, arms: Sequence[Arm], say: Say) -> None:
    """Gradients of every arm; the dense ones first."""
    for some in ([arm for arm in arms if arm.name == DENSE], [arm for arm in arms if arm.name != DENSE]):
        todo = [arm for arm in some if not figures_file(shop, arm).exists()]
        _wait({pool.submit(compare_gradients, shop, arm): arm.name for arm in todo}, "gradients", say)


def _wait(jobs: dict, what: str, say: Say) -> None:
    began = time.monotonic()
    for done, job in enumerate(as_completed(jobs), start=1):
        job.result()
        say(f"{what}: {done} of {len(jobs)}, last {jobs[job]} ({time.monotonic() - began:.0f} s)")
