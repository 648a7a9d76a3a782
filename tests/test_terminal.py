"""Tables that fit their terminal, and sentences that count rightly."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from distill_assets import terminal
from distill_assets.foundation.progress import Progress
from distill_assets.orchestration.status import AssetStatus, HomeStatus, ShardStatus
from distill_assets.teacher_capture.plan import ShardPlan

LONG = "shard s1 (/home/me/shards/s1.jsonl) line 7: not valid JSON; mend it, or set data.on_bad_row: skip"
PLANS = [
    ShardPlan(
        "docstrings-functions", "settings_changed", "captured before, but not under this capture", 23, 23, 12_345
    ),
    ShardPlan("s1", "failed", LONG, None, 0, 0),
    ShardPlan("s2", "current", "captured as it is", 1_234, 0, 0),
]


def lines_of(table: Table, width: int) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return [line.rstrip() for line in captured.get().splitlines()]


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_a_plan_fits_and_breaks_no_state_and_no_number(width: int) -> None:
    lines = lines_of(terminal.plan_table(PLANS, width), width)
    assert max(map(len, lines)) <= width
    rows = {
        name: next(line for line in lines if line.startswith(name)) for name in ("docstrings-functions", "s1", "s2")
    }
    assert rows["docstrings-functions"].split()[1] == "settings_changed"
    assert "23" in rows["docstrings-functions"].split() and rows["s1"].split()[1] == "failed"
    assert lines[1].endswith("why")
    # Put together again, the folded reasons are whole.
    at = lines[1].index("why")
    assert LONG.replace(" ", "") in "".join(line[at:] for line in lines[2:]).replace(" ", "")


def test_wide_terminals_show_every_column_and_narrow_ones_drop_the_estimate_first() -> None:
    def headings(width: int) -> list[str]:
        return lines_of(terminal.plan_table(PLANS, width), width)[1].split()

    assert headings(160) == ["shard", "state", "rows", "capture", "capture", "(est.)", "why"]
    assert headings(100) == ["shard", "state", "rows", "capture", "capture", "why"]
    assert headings(80) == ["shard", "state", "capture", "why"]


def test_a_name_wider_than_the_terminal_is_folded() -> None:
    plan = ShardPlan("n" * 100, "new", "never captured", 1, 1, 10)
    lines = lines_of(terminal.plan_table([plan], 80), 80)
    assert max(map(len, lines)) <= 80 and "".join(lines).count("n" * 10) >= 5 and " new " in lines[2]


def test_of_thousands_what_is_not_current_is_shown_first_and_the_rest_counted() -> None:
    shards = [ShardPlan(f"s{i}", "current", "captured as it is", 1, 0, 0) for i in range(2000)]
    shards[1500] = ShardPlan("s1500", "changed", "-", 5, 1, 1)
    shown, more = terminal.at_a_glance(shards, 3)
    assert [shard.shard for shard in shown] == ["s1500", "s0", "s1"]
    assert more == "... and 1,997 shards more (1,997 current); a pipe or --json gets all."
    assert terminal.at_a_glance(shards, 2000) == (shards, "")


def test_the_summary_counts_what_will_be_tried_and_what_cannot() -> None:
    again = ShardPlan("s3", "failed", "disk was full", 5, 5, 100)
    assert terminal.plan_summary([*PLANS, again]) == [
        "2 of 4 shards to capture (1 of them failed before and will be tried again), 12,445 tokens for the teacher, "
        "0 bytes on disk.",
        "1 shard failed and cannot be captured until mended.",
    ]
    known = ShardPlan("s4", "changed", "-", 5, 1, 1, 1234567, 74.6)
    assert terminal.plan_summary([known]) == [
        "1 of 1 shard to capture, 1 token for the teacher, about 75 s, 1.2 MB on disk."
    ]


@pytest.mark.parametrize("width", [80, 160])
def test_status_says_why_only_where_something_is_not_current(width: int) -> None:
    shards = [ShardStatus("s0", "train", "current", "captured as it is", 6, 366, 50.4, 0.46, 2415.02)]
    assets = [AssetStatus("teacher_capture", "current", "", "4c7b5749c841e832", "/a/home/captures/4c7b5749c841e832")]
    assert "why" not in lines_of(terminal.status_table(shards, width), width)[0]
    shown = lines_of(terminal.asset_table(HomeStatus("/a/home", "x", (), tuple(assets)), width), width)
    assert "why" not in shown[0] and shown[1].split()[-1] == "captures/4c7b5749c841e832"
    shards.append(ShardStatus("s1", "train", "failed", LONG))
    assets.append(AssetStatus("capture_catalog", "stale", "teacher_capture is not current", None, None))
    assert lines_of(terminal.status_table(shards, width), width)[0].endswith("why")
    shown = lines_of(terminal.asset_table(HomeStatus("/a/home", "x", (), tuple(assets)), width), width)
    assert shown[0].endswith("why") and shown[2].endswith("teacher_capture is not current")


def test_figures_of_models_fit_the_terminal_and_lose_nothing() -> None:
    figures = {
        "Perplexity": "216,435 [169,679, 277,940]",
        "KL from teacher, dense (nats a position)": "8.5 [8.33, 8.75]",
    }
    summary = [{"model": name, **figures} for name in ("untrained", "student", "control", "teacher")]
    for width in (80, 160):
        lines = lines_of(terminal.evaluation_table(summary, width), width)
        words = " ".join(lines).split()
        assert lines[0].split() == ["untrained", "student", "control", "teacher"]
        assert words.count("216,435") == words.count("277,940]") == words.count("8.5") == 4
    assert len(lines) == 3  # a line a figure where there is room


@pytest.mark.parametrize("width", [60, 80, 100])
def test_figures_keep_their_names_on_a_narrow_terminal(width: int) -> None:
    name = "Perplexity on the text itself"
    models = ("untrained", "student", "control", "teacher")
    table = terminal.evaluation_table([{"model": m, name: "216,435 [169,679, 277,940]"} for m in models], width)
    words = " ".join(lines_of(table, width)).split()
    assert set(words) >= {*name.split(), *models}
    assert [words.count(figure) for figure in ("216,435", "[169,679,", "277,940]")] == [4, 4, 4]


def test_one_is_singular_whichever_form_the_unit_came_in() -> None:
    assert [terminal.counted(n, unit) for n in (0, 1, 1200) for unit in ("step", "steps")] == [
        "0 steps", "0 steps", "1 step", "1 step", "1,200 steps", "1,200 steps",
    ]  # fmt: skip


def test_progress_in_a_pipe_says_how_fast_and_when_it_is_done_but_not_often(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.progress_bar() as bar:
        bar.PLAIN_SECONDS = 0.0
        bar.show(Progress("teacher on s0", 1200, 5000, "tokens", 4.0, "on cpu"))
        bar.PLAIN_SECONDS = 15.0
        bar.show(Progress("teacher on s0", 2400, 5000, "tokens", 8.0))
    [line] = capsys.readouterr().err.splitlines()
    assert line == "• teacher on s0: 1,200 of 5,000 tokens, 300 tokens/s, 13 s left, on cpu"


def test_the_command_is_named_as_the_shell_finds_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed = Path(sys.executable).with_name("distill")
    monkeypatch.setenv("PATH", str(installed.parent))
    assert terminal.command_name() == "distill"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert terminal.command_name() == str(installed)
    monkeypatch.chdir(installed.parents[2])
    assert terminal.command_name() == "/".join(installed.parts[-3:])


def test_rows_of_many_columns_are_shown_a_field_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    columns = [f"column_{i}" for i in range(terminal.out.width // terminal.LEAST_COLUMN + 1)]
    terminal.show_rows(columns, [[f"value {i}" for i in range(len(columns))]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].split(maxsplit=1) == ["column_3", "value 3"] and len([x for x in lines if x]) == len(columns)
    terminal.show_rows(columns[:3], [["a", "b", "c"]])
    assert capsys.readouterr().out.splitlines()[1].split() == ["a", "b", "c"]


def test_a_query_without_an_answer_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    for columns in (["key"], [f"column_{i}" for i in range(100)]):
        terminal.show_rows(columns, [])
        assert capsys.readouterr().err == "no rows\n"
