"""The `distill` command as a user meets it: real processes, exit codes, one JSON object, short errors."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import tiny

DISTILL = [sys.executable, "-m", "distill_assets.cli"]


def distill(
    *arguments: str | Path, home: Path | None = None, code: int = 0, **env: str
) -> subprocess.CompletedProcess[str]:
    option = ["--home", str(home)] if home else []
    result = subprocess.run(
        [*DISTILL, *map(str, arguments), *option],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, **env},
    )
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result


def answer(*arguments: str | Path, home: Path | None = None, code: int = 0) -> dict[str, Any]:
    """The one JSON object a command prints on stdout."""
    value: dict[str, Any] = json.loads(distill(*arguments, "--json", home=home, code=code).stdout)
    return value


def refusal(*arguments: str | Path, home: Path | None = None, code: int = 1, **env: str) -> str:
    """The error of a command that must fail: at most three lines on stderr, nothing on stdout."""
    result = distill(*arguments, home=home, code=code, **env)
    message = result.stderr[result.stderr.index("error:") :]
    assert len(message.strip().splitlines()) <= 3
    return message


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> tuple[Path, dict[str, Any]]:
    """A home that `distill run` brought up to date, and what it answered."""
    root = tiny.make_home(tmp_path_factory.mktemp("cli") / "home", teacher_folder, shards=2)
    return root, answer("run", "--device", "cpu", home=root)


def test_run_answers_what_it_did(made: tuple[Path, dict[str, Any]]) -> None:
    root, ran = made
    assert ran["captured_shards"] == ["heldout", "s0", "s1"]
    assert (ran["rows_captured"], ran["rows_reused"]) == (18, 0)
    assert ran["tokens_captured"] > 0 and ran["seconds"] > 0
    assert (root / "students" / ran["student_id"] / "model.safetensors").is_file()
    assert Path(answer("report", home=root)["path"]).is_file()


def test_plan_status_and_a_second_run(made: tuple[Path, dict[str, Any]]) -> None:
    root, ran = made
    planned = answer("plan", home=root)["shards"]
    assert {
        "shard",
        "state",
        "rows",
        "rows_to_capture",
        "tokens_to_capture",
        "estimated_bytes",
        "estimated_seconds",
    } <= (set(planned[0]))
    assert {p["state"] for p in planned} == {"current"}
    status = answer("status", home=root)
    assert {a["state"] for a in status["assets"]} == {"current"}
    again = answer("run", "--device", "cpu", home=root)
    assert again["captured_shards"] == [] and again["student_id"] == ran["student_id"]
    assert "nothing was run" in distill("run", home=root).stdout


def test_sql_prints_a_table_or_json(made: tuple[Path, dict[str, Any]]) -> None:
    root, _ = made
    query = "SELECT shard, examples, tokens FROM captures ORDER BY shard"
    assert [row["shard"] for row in answer("sql", query, home=root)["rows"]] == ["heldout", "s0", "s1"]
    lines = distill("sql", query, home=root).stdout.splitlines()
    assert lines[0].split() == ["shard", "examples", "tokens"] and len(lines) == 4
    assert "only SELECT" in refusal("sql", "DROP TABLE examples", home=root, code=2)


def test_export_writes_one_shard_or_all(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    root, _ = made
    assert answer("export", tmp_path / "all.jsonl", home=root)["rows"] == 18
    assert answer("export", tmp_path / "one.jsonl", "--shard", "s1", home=root)["rows"] == 6
    assert "shard nope" in refusal("export", tmp_path / "none.jsonl", "--shard", "nope", home=root)


def test_check_prints_the_verdict(made: tuple[Path, dict[str, Any]], tmp_path: Path, teacher_folder: Path) -> None:
    root, _ = made
    assert answer("check", home=root)["verdict"] == "identical"
    other = tiny.save_model(tmp_path / "other", tiny.train_tokenizer([t[::-1] for t in tiny.TEXT]))
    found = answer("check", "--teacher", teacher_folder, "--student", other, code=1)
    assert found["verdict"] == "incompatible" and found["reasons"]
    assert {"first_difference", "probe"} <= set(found)
    assert "give both" in refusal("check", "--teacher", teacher_folder, code=2)


def test_init_makes_a_home_once(tmp_path: Path, teacher_folder: Path) -> None:
    root = tmp_path / "new home"
    assert Path(answer("init", root, "--teacher", teacher_folder)["home"]) == root
    assert "# " in (root / "distill.yaml").read_text()
    assert "is a home already" in refusal("init", root)
    assert "data.max_length is 2048, but" in refusal("run", home=root)
    file = root / "distill.yaml"
    file.write_text(file.read_text().replace("max_length: 2048", "max_length: 64"))
    assert "there are no shards" in refusal("run", home=root)


def test_init_takes_folders_from_where_the_user_stands(tmp_path: Path, teacher_folder: Path) -> None:
    relative = os.path.relpath(teacher_folder)
    answer("init", tmp_path / "home", "--teacher", relative, "--student", relative)
    assert f"model: {teacher_folder}" in (tmp_path / "home" / "distill.yaml").read_text()


def test_a_port_in_use_is_refused(made: tuple[Path, dict[str, Any]]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "cannot be used" in refusal("ui", "--port", str(taken.getsockname()[1]), home=made[0], code=2)


def test_env_can_be_evaluated(made: tuple[Path, dict[str, Any]]) -> None:
    root, _ = made
    exports = dict(shlex.split(line)[1].split("=", 1) for line in distill("env", home=root).stdout.splitlines())
    assert exports == {"DISTILL_HOME": str(root), "DAGSTER_HOME": str(root / "dagster")}


def test_homes_that_are_not(tmp_path: Path, made: tuple[Path, dict[str, Any]], teacher_folder: Path) -> None:
    assert "has no distill.yaml; `distill init" in refusal("plan", home=tmp_path)
    root, _ = made
    assert "DAGSTER_HOME is /elsewhere" in refusal("plan", home=root, DAGSTER_HOME="/elsewhere")
    broken = tiny.make_home(tmp_path / "broken", teacher_folder)
    file = broken / "distill.yaml"
    file.write_text(file.read_text().replace("k: 8", "k: none"))
    assert "distill.yaml line" in refusal("plan", home=broken) and "targets.k" in refusal("plan", home=broken)


def test_teachers_that_are_not(tmp_path: Path, teacher_folder: Path) -> None:
    missing = tiny.make_home(tmp_path / "a", tmp_path / "nowhere")
    assert "no folder at" in refusal("run", home=missing)
    bare = tmp_path / "bare"
    shutil.copytree(teacher_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    assert "no .safetensors in" in refusal("run", home=tiny.make_home(tmp_path / "b", bare))


def test_a_device_that_is_not_there(tmp_path: Path, teacher_folder: Path) -> None:
    root = tiny.make_home(tmp_path / "home", teacher_folder, shards=1)
    assert "device nonsense is not known" in refusal("run", "--device", "nonsense", home=root)


def test_a_bad_shard_fails_the_run_and_keeps_the_others(tmp_path: Path, teacher_folder: Path) -> None:
    root = tiny.make_home(tmp_path / "home", teacher_folder, shards=2)
    with (root / "shards" / "s0.jsonl").open("a") as stream:
        stream.write('{"prompt": "cut off')
    failed = answer("run", "--device", "cpu", home=root, code=1)
    assert failed["captured_shards"] == ["heldout", "s1"] and list(failed["failures"]) == ["s0"]
    assert "s0" in failed["error"] and "line 7" in failed["error"]
    assert failed["student_id"] is None and not (root / "students").exists()
    assert {p["shard"]: p["state"] for p in answer("plan", home=root)["shards"]}["s0"] == "failed"


def test_ctrl_c_keeps_what_was_finished(tmp_path: Path, teacher_folder: Path) -> None:
    root = tiny.make_home(tmp_path / "home", teacher_folder, shards=40, rows=20, training={"epochs": 200})
    process = subprocess.Popen(
        [*DISTILL, "run", "--device", "cpu", "--home", str(root)], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list((root / "captures").rglob("[!.]*@*.parquet")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and "interrupted" in stderr and "Traceback" not in stderr
    kept = list((root / "captures").rglob("*.parquet"))
    assert kept and not list((root / "captures").rglob(".partial*"))
    planned = answer("plan", home=root)["shards"]
    assert sum(p["state"] == "current" for p in planned) == len(kept) < 41


def test_ctrl_c_in_training_leaves_no_student(tmp_path: Path, teacher_folder: Path) -> None:
    root = tiny.make_home(tmp_path / "home", teacher_folder, shards=1, rows=40, training={"epochs": 5000})
    process = subprocess.Popen(
        [*DISTILL, "run", "--device", "cpu", "--home", str(root)], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    seen = ""
    while "student_model" not in seen:
        line = process.stderr.readline()
        assert line, seen
        seen += line
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 1 and "interrupted" in rest and "Traceback" not in rest
    assert not list((root / "students").glob("*"))
    assert {p["state"] for p in answer("plan", home=root)["shards"]} == {"current"}


def test_every_command_is_in_the_readme() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for command in ("demo", "init", "env", "check", "plan", "run", "status", "sql", "export", "report", "ui"):
        assert f"distill {command}" in readme
        assert "Usage" in distill(command, "--help").stdout
