"""The `distill` command as a user meets it: real processes, exit codes, one JSON object, short errors."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest

from distill_assets import cli
from tests import tiny
from tests.bench import edit, replace

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
    root = tiny.make_home(tmp_path_factory.mktemp("cli") / "home", teacher_folder, shards=2, evaluation={"dense": True})
    return root, answer("run", "--device", "cpu", home=root)


@pytest.fixture
def fresh(made: tuple[Path, dict[str, Any]]) -> Iterator[Path]:
    """The home that was run once, put back as it was afterwards."""
    root, _ = made
    backup = root.with_name("backup")
    shutil.copytree(root, backup)
    yield root
    shutil.rmtree(root)
    backup.rename(root)


def snapshot(root: Path) -> dict[str, bytes]:
    """Every result that must survive a failure, byte for byte."""
    results = [root / "catalog.duckdb"]
    for folder, ending in (("captures", "*.parquet"), ("students", "*"), ("reports", "*")):
        results += (root / folder).rglob(ending)
    return {str(path.relative_to(root)): path.read_bytes() for path in results if path.is_file()}


def test_run_answers_what_it_did(made: tuple[Path, dict[str, Any]]) -> None:
    root, ran = made
    assert ran["captured_shards"] == ["heldout", "s0", "s1"]
    assert (ran["rows_captured"], ran["rows_reused"]) == (18, 0)
    assert ran["tokens_captured"] > 0 and ran["seconds"] > 0
    assert ran["estimate"]["seconds"] is None and ran["estimate"]["basis"].startswith("no speed yet")
    assert ran["estimate"]["bytes"] > 0 and ran["bytes_written"] == ran["catalog"]["bytes"]
    assert (root / "students" / ran["student_id"] / "model.safetensors").is_file()
    assert Path(answer("report", home=root)["path"]).is_file()


LIST_HEAVY = """
import sys
from distill_assets.cli import main
try:
    main()
finally:
    print("imported:", sorted({"dagster", "polars", "torch", "transformers"} & sys.modules.keys()), file=sys.stderr)
"""


@pytest.mark.parametrize(("command", "imported"), [("plan", []), ("status", []), ("run", ["dagster"]), ("report", [])])
def test_that_all_is_current_is_known_without_torch(
    made: tuple[Path, dict[str, Any]], command: str, imported: list[str]
) -> None:
    """To import it takes longer than all the rest; Dagster only where runs are made."""
    words = [sys.executable, "-c", LIST_HEAVY, command, "--home", str(made[0])]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr.endswith(f"imported: {imported}\n"), result.stderr


def test_students_of_the_home_are_compared(made: tuple[Path, dict[str, Any]]) -> None:
    root, ran = made
    told = answer("report", "--compare", ran["student_id"][:6], ran["control_id"], home=root)
    assert Path(told["path"]).is_relative_to(root / "comparisons") and Path(told["path"]).is_file()
    student, control = told["students"]
    assert (student["kind"], control["student_id"]) == ("student", ran["control_id"])
    figures = ran["evaluation"]["models"]  # the very figures of the report, dense ones as the home asks for
    for name, compared in (("student", student), ("control", control)):
        assert compared["figures"]["dense_kl_nats"]["value"] == pytest.approx(figures[name]["dense_kl_nats"]["value"])
    shown = distill("report", "--compare", ran["student_id"], ran["control_id"], home=root).stdout
    assert told["path"] in shown and ran["student_id"][:6] in shown
    assert "there is no student ffff" in refusal("report", "--compare", "ffff", "aaaa", home=root, code=2)
    assert "report --compare abcd" in refusal("report", "abcd", home=root, code=2)


def test_plan_status_and_a_second_run(made: tuple[Path, dict[str, Any]]) -> None:
    root, ran = made
    plan = answer("plan", home=root)
    planned = plan["shards"]
    assert plan["then"] == [] and "Then " not in distill("plan", home=root).stdout
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
    assert {(a["state"], a["reason"]) for a in status["assets"]} == {("current", "")}
    assert all(Path(a["path"]).exists() for a in status["assets"])
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


def test_json_has_no_infinity(capsys: pytest.CaptureFixture[str]) -> None:
    cli.print_json({"rows": [{"x": float("inf"), "y": [float("nan"), 1.5]}]})
    assert json.loads(capsys.readouterr().out) == {"rows": [{"x": None, "y": [None, 1.5]}]}


def test_wrong_usage_is_one_json_object_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["distill", "plan", "--bogus", "--json"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "--bogus" in json.loads(capsys.readouterr().out)["error"]


def test_export_writes_one_shard_or_all(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    root, _ = made
    assert answer("export", tmp_path / "all.jsonl", home=root)["rows"] == 18
    assert answer("export", tmp_path / "one.jsonl", "--shard", "s1", home=root)["rows"] == 6
    message = refusal("export", tmp_path / "none.jsonl", "--shard", "nope", home=root, code=2)
    assert "there is no shard nope" in message and not (tmp_path / "none.jsonl").exists()


def test_import_takes_what_export_wrote(fresh: Path, tmp_path: Path) -> None:
    source = tmp_path / "s1.jsonl"
    answer("export", source, "--shard", "s1", home=fresh)
    found = answer("import", source, "--shard", "elsewhere", home=fresh)
    assert (found["rows"], found["shard"], found["written"], found["dropped_last"]) == (6, "elsewhere", True, 0)
    assert Path(found["path"]) == fresh / "shards" / "elsewhere.jsonl" and Path(found["path"]).is_file()
    assert "nothing was done" in distill("import", source, "--shard", "elsewhere", home=fresh).stdout
    assert {p["shard"]: p["state"] for p in answer("plan", home=fresh)["shards"]}["elsewhere"] == "current"
    message = refusal("import", source, "--shard", "short", "--rows", "shifted", home=fresh)
    assert "s1.jsonl line 1: topk_ids has" in message and "with --rows shifted\nnothing was imported" in message
    assert "a key is a plain name" in refusal("import", source, "--shard", "../evil", home=fresh, code=2)
    assert "import with --replace" in answer("import", source, "--shard", "s0", home=fresh, code=1)["error"]


def test_import_says_how_often_the_likeliest_id_is_the_next_token(home: Path, tmp_path: Path) -> None:
    def rows(shift: int) -> list[dict[str, Any]]:
        """30 rows of 6 tokens; each list's likeliest id is the next token, or so many ids above it."""
        tokens = [[10 + i, 80 + i, 150 + i, 220 + i, 11 + i, 81 + i] for i in range(30)]
        lists = {"topk_logprobs": [[-0.5]] * 5 + [[]]}
        return [{"input_ids": ids, "topk_ids": [*([i + shift] for i in ids[1:]), []], **lists} for ids in tokens]

    right = tiny.write_jsonl(tmp_path / "right.jsonl", rows(0))
    other = tiny.write_jsonl(tmp_path / "other.jsonl", rows(35))
    shown = distill("import", right, "--shard", "mine", home=home)
    assert "The likeliest id is the next token at 100.0% of 120 positions." in shown.stdout and not shown.stderr
    warned = distill("import", other, "--shard", "mine", "--replace", "--json", home=home)
    assert json.loads(warned.stdout)["next_token_hit_rate"] == 0.0
    assert "warning:" in warned.stderr and "at 0.0% of 120 positions of shard mine" in warned.stderr
    assert "ids of another tokenizer" in warned.stderr
    few = tiny.write_jsonl(tmp_path / "few.jsonl", rows(35)[:24])  # 96 positions do not tell
    assert not distill("import", few, "--shard", "few", home=home).stderr
    short = [{"input_ids": [7, 8], "topk_ids": [[8], []], "topk_logprobs": [[-0.5], []]}]  # no token t + 2
    assert answer("import", tiny.write_jsonl(few, short), "--shard", "short", home=home)["next_token_hit_rate"] is None


def test_check_prints_the_verdict(made: tuple[Path, dict[str, Any]], tmp_path: Path, teacher_folder: Path) -> None:
    root, _ = made
    assert answer("check", home=root)["verdict"] == "identical"
    other = tiny.save_model(tmp_path / "other", tiny.train_tokenizer([t[::-1] for t in tiny.TEXT]))
    found = answer("check", "--teacher", teacher_folder, "--student", other, code=1)
    assert found["verdict"] == "incompatible" and found["reasons"]
    assert {"first_difference", "probe", "compared"} <= set(found)
    shown = distill("check", "--teacher", teacher_folder, "--student", other, code=1).stdout
    assert shown.startswith("incompatible\n") and "the first id that differs" in shown and "blocks" in shown
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


def test_init_refuses_a_folder_that_is_not_there(tmp_path: Path, teacher_folder: Path) -> None:
    options = "--teacher", teacher_folder, "--student", "./models/stduent"
    said = refusal("init", tmp_path / "home", *options, code=2)
    assert "--student ./models/stduent: there is no such folder here; give one, or a hub id" in said
    assert not (tmp_path / "home").exists()


def test_init_refuses_a_folder_without_a_model(tmp_path: Path, teacher_folder: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    said = refusal("init", tmp_path / "home", "--teacher", folder, code=2)
    assert f"--teacher {folder}: no config.json in {folder}; name a transformers model folder" in said
    shutil.copy(teacher_folder / "config.json", folder)
    said = refusal("init", tmp_path / "home", "--teacher", teacher_folder, "--student", folder, code=2)
    assert f"--student {folder}: no .safetensors in {folder}; " in said
    assert not (tmp_path / "home").exists()


def test_a_teacher_whose_folder_is_gone_is_named_by_its_setting(fresh: Path, tmp_path: Path) -> None:
    edit(fresh, teacher={"model": str(tmp_path / "gone")})
    for command in ("plan", "status", "verify", "run"):
        assert f"teacher.model {tmp_path / 'gone'}: no folder at " in refusal(command, home=fresh)


def test_bad_rows_that_are_left_out_are_told(fresh: Path) -> None:
    def planned() -> dict[str, Any]:
        return {shard["shard"]: shard for shard in answer("plan", home=fresh)["shards"]}["s1"]

    with (fresh / "shards" / "s1.jsonl").open("a") as shard:
        shard.write('{"prompt": 3}\n')
    edit(fresh, data={"on_bad_row": "skip"})
    assert planned()["state"] == "changed" and planned()["reason"].endswith("; 1 bad row left out")
    edit(fresh, data={"on_bad_row": "fail"})
    assert "s1" in answer("run", "--shard", "s1", "--device", "cpu", home=fresh, code=1)["failures"]
    edit(fresh, data={"on_bad_row": "skip"})
    assert planned()["state"] == "failed" and planned()["reason"].startswith("the last try failed: shard s1")
    assert planned()["reason"].endswith("; 1 bad row left out")
    shown = distill("run", "--shard", "s1", "--device", "cpu", home=fresh)
    assert "Left out: 1 bad row" in shown.stdout and "failed: 0 of 6 rows" in shown.stderr
    shard_file = fresh / "shards" / "heldout.jsonl"
    shard_file.write_text(shard_file.read_text() + "[]\n" * 2)
    assert answer("run", "--shard", "heldout", "--device", "cpu", home=fresh)["bad_rows"] == 2


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


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"teacher": {"model": "nowhere"}}, "no folder at"),
        ({"teacher": {"model": "bare"}}, "no .safetensors in"),
        ({"student": {"model": "other"}}, "are incompatible: "),
        ({"targets": {"k": 5000}}, "targets.k is 5000, but"),
    ],
)
def test_settings_that_cannot_be_used_leave_results_alone(
    section: dict[str, dict[str, Any]], message: str, fresh: Path, teacher_folder: Path
) -> None:
    tiny.save_model(fresh / "other", tiny.train_tokenizer([t[::-1] for t in tiny.TEXT]))
    shutil.copytree(teacher_folder, fresh / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    (replace if "student" in section else edit)(fresh, **section)
    before = snapshot(fresh)
    assert message in refusal("run", home=fresh)
    assert snapshot(fresh) == before


def test_a_home_that_lost_its_settings_keeps_its_results(fresh: Path) -> None:
    (fresh / "distill.yaml").unlink()
    before = snapshot(fresh)
    assert "has no distill.yaml; `distill init" in refusal("run", home=fresh)
    assert snapshot(fresh) == before


def test_devices_that_are_not_there(tmp_path: Path, teacher_folder: Path) -> None:
    root = tiny.make_home(tmp_path / "home", teacher_folder, shards=1)
    before = sorted(root.rglob("*"))
    for wrong in ("nonsense", "cuda:", "cpu:0"):
        assert f"device {wrong} is not known" in refusal("run", "--device", wrong, home=root, code=2)
    assert sorted(root.rglob("*")) == before
    assert "device cuda:99 was asked for, but" in refusal("run", "--device", "cuda:99", home=root)


BAD_SHARDS = {
    "empty.jsonl": b"",
    "cut.jsonl": b'{"text": "whole"}\n{"prompt": "cut off',
    "kind.jsonl": b'{"text": "a", "messages": []}\n',
    "latin.jsonl": b'{"text": "caf\xe9"}\n',
    "two.jsonl": b'{"text": "a"}\n',
    "two.txt": b"a\n",
    "..dots.jsonl": b'{"text": "a"}\n',
}
WHAT_IS_WRONG = {
    "empty": "has no rows to learn from",
    "cut": "line 2: not valid JSON",
    "kind": "line 1: a row must be of one kind",
    "latin": "line 1: not UTF-8: byte 0xe9",
    "two": "two.jsonl and shards/two.txt have the same key; rename all but one",
    "..dots": "begins with a dot; rename the file",
}


def test_bad_shards_fail_by_name_and_leave_results_alone(fresh: Path, tmp_path: Path) -> None:
    for name, content in BAD_SHARDS.items():
        (fresh / "shards" / name).write_bytes(content)
    before = snapshot(fresh)
    failed = answer("run", "--device", "cpu", home=fresh, code=1)
    assert failed["captured_shards"] == [] and failed["student_id"] is None
    assert failed["failures"].keys() == WHAT_IS_WRONG.keys()
    for key, reason in WHAT_IS_WRONG.items():
        assert reason in failed["failures"][key] and "\n" not in failed["failures"][key]
    assert "no student was trained" in failed["error"] and len(failed["error"].splitlines()) == 2
    assert snapshot(fresh) == before

    states = {p["shard"]: p["state"] for p in answer("plan", home=fresh)["shards"]}
    assert {key for key, state in states.items() if state == "failed"} == WHAT_IS_WRONG.keys()
    shown = distill("plan", home=fresh).stdout
    assert "0 of 9 shards to capture" in shown and "6 shards failed and cannot be captured until mended" in shown
    message = refusal("export", tmp_path / "none.jsonl", "--shard", "cut", home=fresh, code=1)
    assert "shard cut has no current capture" in message


def test_odd_names_and_a_huge_row_are_captured(fresh: Path) -> None:
    """A row of 5 MB is cut at `data.max_length` and counted; the key is the name as it is written."""
    names = ["with space", 'it\'s "quoted"', "big"]
    for i, name in enumerate(names[:2]):
        tiny.write_jsonl(fresh / "shards" / f"{name}.jsonl", tiny.example_rows(2, start=600 + 10 * i))
    huge = {"text": "The cat sat on the mat. " * 210_000}
    tiny.write_jsonl(fresh / "shards" / "big.jsonl", [huge, {"text": "A cat."}])
    options = [part for name in names for part in ("--shard", name)]
    ran = answer("run", "--device", "cpu", *options, home=fresh)
    assert sorted(ran["captured_shards"]) == sorted(names) and ran["rows_captured"] == 6
    query = "SELECT shard, examples, tokens, truncated_rows FROM captures WHERE shard NOT IN ('heldout', 's0', 's1')"
    found = {row["shard"]: row for row in answer("sql", query, home=fresh)["rows"]}
    assert found.keys() == set(names) and found["big"]["truncated_rows"] == 1
    assert found["big"]["examples"] == 2 and 64 < found["big"]["tokens"] < 80


def test_a_bad_shard_fails_the_run_and_keeps_the_others(tmp_path: Path, teacher_folder: Path) -> None:
    root = tiny.make_home(tmp_path / "home", teacher_folder, shards=2)
    with (root / "shards" / "s0.jsonl").open("a") as stream:
        stream.write('{"prompt": "cut off')
    failed = answer("run", "--device", "cpu", home=root, code=1)
    assert failed["captured_shards"] == ["heldout", "s1"] and list(failed["failures"]) == ["s0"]
    assert "s0" in failed["error"] and "line 7" in failed["error"]
    assert failed["student_id"] is None and not (root / "students").exists()
    status = answer("status", home=root)
    assert {s["shard"]: s["state"] for s in status["shards"]}["s0"] == "failed"
    assert {a["asset"]: (a["state"], a["reason"]) for a in status["assets"]} == {
        "tokenizer_compatibility": ("current", ""),
        "teacher_capture": ("failed", "1 shard failed"),
        "capture_catalog": ("stale", "teacher_capture is not current"),
        "student_model": ("missing", "never made"),
        "control_student": ("missing", "never made"),
        "student_evaluation": ("missing", "never made"),
    }


def start_run(root: Path) -> subprocess.Popen[str]:
    """`distill run` in a process group of its own, as a terminal's foreground job."""
    return subprocess.Popen(
        [*DISTILL, "run", "--device", "cpu", "--home", str(root)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def press_ctrl_c(process: subprocess.Popen[str]) -> str:
    """Signal the whole group, as a terminal does; what was said from then on, of which the end must be our one line."""
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    said = [line for line in stderr.splitlines() if not line.startswith("•")]
    assert len(said) == 1 and said[0].startswith("error: interrupted"), stderr
    assert psutil.wait_procs(children, timeout=15)[1] == []
    return stderr


def test_ctrl_c_keeps_what_was_finished(tmp_path: Path, teacher_folder: Path) -> None:
    root = tiny.make_home(tmp_path / "home", teacher_folder, shards=40, rows=20, training={"epochs": 200})
    process = start_run(root)
    deadline = time.monotonic() + 120
    while not list((root / "captures").rglob("[!.]*@*.parquet")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    press_ctrl_c(process)
    kept = list((root / "captures").rglob("*.parquet"))
    assert kept and not list((root / "captures").rglob(".partial*"))
    planned = answer("plan", home=root)["shards"]
    assert sum(p["state"] == "current" for p in planned) == len(kept) < 41


def test_ctrl_c_in_training_leaves_no_student(tmp_path: Path, teacher_folder: Path) -> None:
    root = tiny.make_home(tmp_path / "home", teacher_folder, shards=1, rows=40, training={"epochs": 5000})
    process = start_run(root)
    assert process.stderr is not None
    seen = ""
    while "student_model" not in seen:
        line = process.stderr.readline()
        assert line, seen
        seen += line
    time.sleep(3)
    before = snapshot(root)
    press_ctrl_c(process)
    assert snapshot(root) == before and not list((root / "students").glob("*"))
    assert {p["state"] for p in answer("plan", home=root)["shards"]} == {"current"}


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_the_ui_ends_with_all_its_children(how: str, tmp_path: Path, teacher_folder: Path) -> None:
    """Started with SIGINT ignored, as a script's background job is."""
    root = tiny.make_home(tmp_path / "home", teacher_folder, shards=1)
    port = free_port()
    command = shlex.join([*DISTILL, "ui", "--home", str(root), "--port", str(port)])
    with (tmp_path / "ui.log").open("w") as log:
        process = subprocess.Popen(
            ["sh", "-c", f"trap '' INT; exec {command}"], stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for_server(port, process)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 3
        if how == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=15) == 0
        assert psutil.wait_procs(children, timeout=15)[1] == []
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))
    said = (tmp_path / "ui.log").read_text()
    assert "Traceback" not in said and "SupersessionWarning" not in said


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for_server(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while True:
        assert process.poll() is None and time.monotonic() < deadline
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/server_info", timeout=2).close()
            return
        except OSError:
            time.sleep(0.3)


def test_every_command_is_in_the_readme() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for command in ("demo", "init", "env", "check", "plan", "run", "status", "sql", "export", "report", "ui"):
        assert f"distill {command}" in readme
        assert "Usage" in distill(command, "--help").stdout


def test_the_version_is_the_package_s() -> None:
    assert distill("--version").stdout == f"distill_assets {version('distill_assets')}\n"


def test_verify_names_what_is_damaged_and_gc_removes_what_is_superseded(fresh: Path) -> None:
    whole = answer("verify", home=fresh)
    assert whole["problems"] == whole["closed_runs"] == [] and whole["files"] > 10
    assert "no problem found" in distill("verify", home=fresh).stdout

    tiny.write_jsonl(fresh / "shards" / "s1.jsonl", tiny.example_rows(8, start=100))
    checked = answer("run", "--shard", "s1", "--device", "cpu", home=fresh)["checks"]
    assert {name: check["passed"] for name, check in checked.items()}["capture_is_complete"]
    before = snapshot(fresh)
    would = answer("gc", "--dry-run", home=fresh)
    assert would["dry_run"] and would["bytes"] > 0 and snapshot(fresh) == before
    [superseded] = would["removed"]
    assert (superseded["kind"], Path(superseded["path"]).name[:3]) == ("capture", "s1@")
    assert "1 thing" in distill("gc", home=fresh).stdout
    assert not Path(superseded["path"]).exists() and answer("gc", home=fresh)["removed"] == []

    [file] = (fresh / "captures").glob("*/s1@*.parquet")
    file.write_bytes(file.read_bytes()[:-50])
    [problem] = answer("verify", home=fresh, code=1)["problems"]
    assert (problem["kind"], problem["path"]) == ("damaged", str(file)) and "`distill run`" in problem["message"]
    shown = distill("verify", home=fresh, code=1).stdout
    assert f"damaged {file}: " in shown and "1 problem found" in shown

    settings = (fresh / "distill.yaml").read_text()
    (fresh / "distill.yaml").write_text(settings.replace("shards/*", "shard/*"))
    assert "no shard matches" in refusal("gc", home=fresh)
    assert file.exists()
