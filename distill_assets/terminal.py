"""How the command line shows things: Rich tables on stdout, progress on stderr, plain when piped."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from distill_assets.foundation.progress import Progress as Step

if TYPE_CHECKING:
    from distill_assets.foundation.home import Home
    from distill_assets.orchestration.bring_up_to_date import RunReport
    from distill_assets.orchestration.status import HomeStatus
    from distill_assets.teacher_capture.plan import CapturePlan
    from distill_assets.tokenizer_compatibility.compare import TokenizerReport

PIPED_WIDTH = 160  # a table in a file or pipe is not squeezed into 80 columns

out = Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)
err = Console(stderr=True, highlight=False, soft_wrap=True)

STATE_STYLES = {
    "current": "green", "removed": "dim", "failed": "bold red", "new": "yellow", "changed": "yellow",
    "settings_changed": "yellow", "stale": "yellow", "missing": "yellow", "off": "dim",
}  # fmt: skip


class ProgressBar:
    """Shows steps as bars on a terminal, and as a line every PLAIN_SECONDS elsewhere."""

    PLAIN_SECONDS = 15.0

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None
        self._step = ""
        self._said_at = time.monotonic()

    def say(self, line: str) -> None:
        err.print(f"[dim]•[/] {escape(line)}")

    def show(self, step: Step) -> None:
        if not err.is_terminal:
            self._show_plain(step)
            return
        if self._task is None or step.step != self._step:
            self.clear()
            self._task = self._progress.add_task("", total=step.total)
            self._step = step.step
        rate = f"{step.rate:,.3g} {step.unit}/s" if step.rate else ""
        self._progress.update(
            self._task, completed=step.done, total=step.total, description=escape(step.step), rate=rate, note=step.note
        )
        if step.done >= step.total:
            self.clear()

    def _show_plain(self, step: Step) -> None:
        if time.monotonic() - self._said_at >= self.PLAIN_SECONDS:
            self._said_at = time.monotonic()
            self.say(f"{step.step}: {step.done:,} of {step.total:,} {step.unit} {step.note}".rstrip())

    def clear(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None


@contextmanager
def progress_bar() -> Iterator[ProgressBar]:
    """A bar that goes away when the block ends."""
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}% {task.fields[rate]}"),
        TimeRemainingColumn(compact=True),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        bar = ProgressBar(progress)
        yield bar
        bar.clear()


def _state(state: str) -> str:
    return f"[{STATE_STYLES.get(state, '')}]{state}[/]" if STATE_STYLES.get(state) else state


def _number(value: Any, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        name, right = (column[1:], True) if column.startswith(">") else (column, False)
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    return table


def show_plan(plan: CapturePlan) -> None:
    """Shards with their state, why, and what capturing them would cost."""
    table = _table("shard", "state", ">rows", ">rows to capture", ">tokens to capture", ">seconds (est.)", "why")
    for shard in plan.shards:
        table.add_row(
            escape(shard.shard), _state(shard.state), _number(shard.rows), _number(shard.rows_to_capture),
            _number(shard.tokens_to_capture), _number(shard.estimated_seconds, 1), escape(shard.reason),
        )  # fmt: skip
    out.print(table)
    todo = [shard for shard in plan.shards if shard.state not in ("current", "removed")]
    tokens = sum(shard.tokens_to_capture for shard in plan.shards)
    out.print(f"\n{len(todo)} of {len(plan.shards)} shards to capture, {tokens:,} tokens for the teacher.")


def show_status(status: HomeStatus) -> None:
    """Shards, then assets."""
    shards = _table("shard", "role", "state", ">examples", ">tokens", ">bytes/token", ">kept mass", ">perplexity")
    for shard in status.shards:
        shards.add_row(
            escape(shard.shard), shard.role, _state(shard.state), _number(shard.examples), _number(shard.tokens),
            _number(shard.bytes_per_token, 1), _number(shard.mean_kept_mass, 3), _number(shard.teacher_perplexity, 2),
        )  # fmt: skip
    out.print(shards)
    assets = _table("asset", "state", "version", "path")
    for asset in status.assets:
        assets.add_row(asset.asset, _state(asset.state), asset.version or "-", escape(asset.path or "-"))
    out.print()
    out.print(assets)


def show_run(report: RunReport) -> None:
    """What was captured, and how the students stand."""
    if not report.materialized:
        if not report.failures:
            out.print("Everything is up to date; nothing was run.")
    else:
        speed = (
            f", {report.tokens_captured / report.capture_seconds:,.0f} tokens/s"
            if report.tokens_captured and report.capture_seconds
            else ""
        )
        out.print(
            f"Captured {len(report.captured_shards)} shards: {report.rows_captured:,} rows through the teacher "
            f"({report.tokens_captured:,} tokens{speed}), {report.rows_reused:,} rows reused. "
            f"{report.seconds:,.1f} s in all."
        )
    if catalog := report.catalog:
        out.print(
            f"Catalog: {catalog['shards']} shards, {catalog['examples']:,} examples, "
            f"{catalog['supervised_tokens']:,} scored positions, {catalog['bytes_per_token']:.1f} bytes each, "
            f"{catalog['mean_kept_ids']:.1f} ids and {catalog['mean_kept_mass']:.1%} of the mass kept."
        )
    if report.evaluation:
        out.print()
        show_rows(tuple(report.evaluation[0]), [tuple(row.values()) for row in report.evaluation])
    if report.student_id:
        out.print(f"\nStudent {report.student_id}" + (f", report {report.report}" if report.report else ""))


def show_next_steps(home: Home, is_default: bool) -> None:
    """Where to look after the demo."""
    option = "" if is_default else f" --home {home.root}"
    out.print("\nNext:")
    out.print("  open the report above in a browser")
    out.print(f'  distill sql "SELECT shard, examples, tokens FROM captures ORDER BY shard"{option}')
    out.print(f"  edit a shard in {home.root / 'shards'}, then distill plan{option} and distill run{option}")
    out.print(f"  distill ui{option}   (the asset graph in a browser)")


def show_tokenizer_report(report: TokenizerReport) -> None:
    """The verdict first, then what differs and the evidence."""
    style = "green" if report.usable else "bold red"
    out.print(f"[{style}]{report.verdict}[/]")
    for reason in report.reasons:
        out.print(f"  {escape(reason)}")
    for difference in report.differences:
        mark = "[bold red]blocks[/]" if difference.blocking else "[dim]noted[/]"
        out.print(f"  {mark} {difference.name}: {escape(difference.detail)}")


def show_rows(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Any query result as a table; numbers to the right."""
    numeric = [
        bool(rows) and all(isinstance(r[i], int | float) or r[i] is None for r in rows) for i in range(len(columns))
    ]
    table = _table(*(f">{name}" if right else name for name, right in zip(columns, numeric, strict=True)))
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    out.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return escape(str(dict(value)))
    return escape(str(value))
