"""How the command line shows things: Rich tables on stdout, progress on stderr, plain when piped."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from distill_assets.foundation.progress import Progress as Step
from distill_assets.foundation.progress import as_line
from distill_assets.foundation.wording import counted, plural

if TYPE_CHECKING:
    from distill_assets.foundation.home import Home
    from distill_assets.orchestration.bring_up_to_date import RunReport
    from distill_assets.orchestration.garbage import GarbageReport
    from distill_assets.orchestration.status import Following, HomeStatus, ShardStatus
    from distill_assets.orchestration.verify import VerifyReport
    from distill_assets.student_evaluation.comparison import Comparison
    from distill_assets.teacher_capture.importing import ImportReport
    from distill_assets.teacher_capture.plan import CapturePlan, ShardPlan
    from distill_assets.tokenizer_compatibility.compare import TokenizerReport

AShard = TypeVar("AShard", "ShardPlan", "ShardStatus")

PIPED_WIDTH = 160  # a table in a file or pipe is not squeezed into 80 columns
GAP = 2  # blanks between columns
LEAST_COLUMN = 10  # a table of narrower columns is unreadable
LEAST_NAME = 20  # the name of a figure folds above that
LEAST_WHY = 30  # a column of reasons narrower than this is unreadable
MOST_SHARDS = 50  # on a terminal

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
        rate = f"{step.rate:,.3g} {plural(step.unit)}/s" if step.rate else ""
        self._progress.update(
            self._task, completed=step.done, total=step.total, description=escape(step.step), rate=rate, note=step.note
        )
        if step.done >= step.total:
            self.clear()

    def _show_plain(self, step: Step) -> None:
        if time.monotonic() - self._said_at >= self.PLAIN_SECONDS:
            self._said_at = time.monotonic()
            self.say(as_line(step))

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


def _number(value: Any, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        name, right = (column[1:], True) if column.startswith(">") else (column, False)
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    return table


@dataclass(frozen=True)
class Column:
    """A column of a table that must fit; of the `spare` ones the highest goes first when it is too wide."""

    heading: str
    cells: Sequence[str]
    right: bool = False
    spare: int = 0
    style_of: Mapping[str, str] = field(default_factory=dict)

    @property
    def width(self) -> int:
        return max(cell_len(text) for text in (*self.heading.split("\n"), *self.cells))


def fitted_table(columns: Sequence[Column], why: Sequence[str], width: int) -> Table:
    """A table of whole cells and, last, the reasons folded into what is left; no reason, no column.

    Spare columns go until the rest fits into `width` characters.
    """
    room = min(LEAST_WHY, max((cell_len(text) for text in why), default=0))
    shown = list(columns)
    while sum(column.width + GAP for column in shown) + room > width and any(column.spare for column in shown):
        shown.remove(max(shown, key=lambda column: column.spare))
    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    for column in shown:
        # A name that takes half the width is folded as reasons are; states and numbers never.
        whole = column is not shown[0] or 2 * column.width <= width
        table.add_column(column.heading, justify="right" if column.right else "left", no_wrap=whole, overflow="fold")
    if any(why):
        table.add_column("why", overflow="fold")
    for i, reason in enumerate(why):
        cells = [Text(column.cells[i], column.style_of.get(column.cells[i], "")) for column in shown]
        table.add_row(*cells, *([Text(reason)] if any(why) else []))
    return table


def plan_table(shards: Sequence[ShardPlan], width: int) -> Table:
    """Shards with their state, what capturing them would cost, and why."""
    return fitted_table(
        [
            Column("shard", [shard.shard for shard in shards]),
            Column("state", [shard.state for shard in shards], style_of=STATE_STYLES),
            Column("rows", [_number(shard.rows) for shard in shards], right=True, spare=2),
            Column("rows to\ncapture", [_number(shard.rows_to_capture) for shard in shards], right=True),
            Column("tokens to\ncapture", [_number(shard.tokens_to_capture) for shard in shards], right=True, spare=1),
            Column("seconds\n(est.)", [_number(shard.estimated_seconds, 1) for shard in shards], right=True, spare=3),
        ],
        [shard.reason for shard in shards],
        width,
    )


def at_a_glance(shards: Sequence[AShard], most: int) -> tuple[Sequence[AShard], str]:
    """At most this many shards, those that are not current before the others, and a line on what is left out."""
    if len(shards) <= most:
        return shards, ""
    ordered = sorted(shards, key=lambda shard: shard.state == "current")
    states = Counter(shard.state for shard in ordered[most:])
    others = ", ".join(f"{n:,} {state}" for state, n in states.most_common())
    return ordered[:most], f"... and {counted(states.total(), 'shard')} more ({others}); a pipe or --json gets all."


def _shown(shards: Sequence[AShard]) -> tuple[Sequence[AShard], str]:
    return at_a_glance(shards, MOST_SHARDS if out.is_terminal else len(shards))


def show_plan(plan: CapturePlan, following: Sequence[Following], refused: str) -> None:
    """The shards, and what a run would do in a sentence or two; `refused`: the error it would end with."""
    shown, more = _shown(plan.shards)
    out.print(plan_table(shown, out.width))
    out.print(more)
    for line in plan_summary(plan.shards):
        out.print(line)
    if any(shard.is_to_capture for shard in plan.shards):
        out.print(f"[dim]Estimated from {plan.basis}.[/]", soft_wrap=True)
    if following:
        out.print(f"Then {follow_up(following)}.", soft_wrap=True)
    if refused:
        out.print(f"[bold red]Then a run fails:[/] {escape(refused)}", soft_wrap=True)


def follow_up(following: Sequence[Following]) -> str:
    """`capture_catalog, student_model (last time 93 s)`: assets that are made besides captures."""
    return ", ".join(
        asset.asset + ("" if asset.last_seconds is None else f" (last time {asset.last_seconds:,.0f} s)")
        for asset in following
    )


def plan_summary(shards: Sequence[ShardPlan]) -> list[str]:
    """What is to capture and what it costs, and what cannot be captured."""
    todo = [shard for shard in shards if shard.is_to_capture]
    again = sum(shard.state == "failed" for shard in todo)
    failed = sum(shard.state == "failed" for shard in shards) - again
    tokens = sum(shard.tokens_to_capture for shard in todo)
    seconds = [shard.estimated_seconds for shard in todo if shard.estimated_seconds is not None]
    known = f", {_about(sum(seconds))}" if seconds else ""
    known += f", {_size(sum(shard.estimated_bytes or 0 for shard in todo))} on disk" if todo else ""
    lines = [
        f"{len(todo):,} of {counted(len(shards), 'shard')} to capture"
        + (f" ({again:,} of them failed before and will be tried again)" if again else "")
        + f", {counted(tokens, 'token')} for the teacher{known}."
    ]
    if failed:
        lines.append(f"{counted(failed, 'shard')} failed and cannot be captured until mended.")
    return lines


def _size(n_bytes: int) -> str:
    """`3.1 MB`, in powers of a thousand as disks are sold."""
    unit = min(3, max(0, (len(str(n_bytes)) - 1) // 3))
    return f"{n_bytes / 1000**unit:,.{1 if unit else 0}f} {('bytes', 'kB', 'MB', 'GB')[unit]}"


def _about(seconds: float) -> str:
    return f"about {seconds:,.0f} s" if seconds >= 1 else "less than 1 s"


def status_table(shards: Sequence[ShardStatus], width: int) -> Table:
    """Shards with the figures of their captures, and why those that are not current are not."""
    return fitted_table(
        [
            Column("shard", [shard.shard for shard in shards]),
            Column("role", [shard.role for shard in shards]),
            Column("state", [shard.state for shard in shards], style_of=STATE_STYLES),
            Column("examples", [_number(shard.examples) for shard in shards], right=True),
            Column("tokens", [_number(shard.tokens) for shard in shards], right=True, spare=1),
            Column("bytes/token", [_number(shard.bytes_per_token, 1) for shard in shards], right=True, spare=4),
            Column("kept mass", [_number(shard.mean_kept_mass, 3) for shard in shards], right=True, spare=3),
            Column("perplexity", [_number(shard.teacher_perplexity, 2) for shard in shards], right=True, spare=2),
        ],
        ["" if shard.state == "current" else shard.reason for shard in shards],
        width,
    )


def asset_table(status: HomeStatus, width: int) -> Table:
    """Assets with what they are, where they lie in the home, and why those that are not current are not."""
    assets = status.assets
    return fitted_table(
        [
            Column("asset", [asset.asset for asset in assets]),
            Column("state", [asset.state for asset in assets], style_of=STATE_STYLES),
            Column("version", [asset.version or "-" for asset in assets], spare=2),
            Column(
                "path in the home",
                [os.path.relpath(asset.path, status.home) if asset.path else "-" for asset in assets],
                spare=1,
            ),
        ],
        [asset.reason for asset in assets],
        width,
    )


def show_status(status: HomeStatus) -> None:
    """The home, its shards, its assets."""
    out.print(f"[bold]home[/] {escape(status.home)}, [bold]capture[/] {status.capture_id}\n", soft_wrap=True)
    shown, more = _shown(status.shards)
    out.print(status_table(shown, out.width))
    out.print(more)
    out.print(asset_table(status, out.width))


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
            f"Captured {counted(len(report.captured_shards), 'shard')}: "
            f"{counted(report.rows_captured, 'row')} through the teacher "
            f"({counted(report.tokens_captured, 'token')}{speed}), {counted(report.rows_reused, 'row')} reused. "
            f"{report.seconds:,.1f} s in all."
        )
    if report.bad_rows:
        out.print(f"[yellow]Left out:[/] {counted(report.bad_rows, 'bad row')}, as data.on_bad_row says.")
    if foreseen := report.estimate:
        seconds = "" if foreseen["seconds"] is None else f"{foreseen['seconds']:,.1f} s and "
        out.print(
            f"[dim]Estimated: {seconds}{_size(foreseen['bytes'])}; it took {report.capture_seconds:,.1f} s and "
            f"{_size(report.bytes_written)}. (From {foreseen['basis']}.)[/]",
            soft_wrap=True,
        )
    if catalog := report.catalog:
        out.print(
            f"Catalog: {counted(catalog['shards'], 'shard')}, {counted(catalog['examples'], 'example')}, "
            f"{counted(catalog['supervised_tokens'], 'scored position')}, {catalog['bytes_per_token']:.1f} bytes each, "
            f"{catalog['mean_kept_ids']:.1f} ids and {catalog['mean_kept_mass']:.1%} of the mass kept."
        )
    for name, check in report.checks.items():
        if not check["passed"]:
            out.print(f"[yellow]{name} failed:[/] {escape(check['found'])}", soft_wrap=True)
    if report.summary:
        out.print()
        out.print(evaluation_table(report.summary, out.width))
    if report.student_id:
        out.print(f"\nStudent {report.student_id}" + (f", report {report.report}" if report.report else ""))


def evaluation_table(summary: Sequence[Mapping[str, str]], width: int) -> Table:
    """A line a figure and a column a model, whose rows `summary` has; where that is too wide for `width` characters,
    intervals stand below their figures, and in two lines where that leaves less than LEAST_NAME for the names.
    """
    label, *figures = summary[0]
    cells = [[row[name] for row in summary] for name in figures]
    models = [row[label] for row in summary]
    names = max(map(cell_len, figures))
    for room, at, broken in ((names, " [", "\n["), (min(names, LEAST_NAME), ", ", ",\n")):
        if room + _figures_width(models, cells) > width:
            cells = [[text.replace(at, broken) for text in line] for line in cells]
    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    table.add_column("", overflow="fold")
    for model in models:
        table.add_column(model, justify="right", no_wrap=True)
    for name, line in zip(figures, cells, strict=True):
        table.add_row(Text(name), *map(Text, line))
    return table


def _figures_width(models: Sequence[str], cells: Sequence[Sequence[str]]) -> int:
    """Characters the models' columns take, with the gaps before them."""
    columns = zip(models, *cells, strict=True)
    return sum(GAP + max(cell_len(line) for text in column for line in text.split("\n")) for column in columns)


def show_comparison(comparison: Comparison) -> None:
    """Figures, differences and settings that differ, a table each."""
    from distill_assets.student_evaluation.comparison_page import difference_rows, figure_rows, setting_rows

    for note in comparison.notes:
        out.print(f"[dim]{escape(note)}[/]", soft_wrap=True)
    for rows in (figure_rows(comparison), difference_rows(comparison), setting_rows(comparison)):
        if rows:
            show_rows(tuple(rows[0]), [tuple(row.values()) for row in rows])
            out.print()


def show_problems(report: VerifyReport) -> None:
    """A problem a line, with its file, and how many files were read."""
    for run_id in report.closed_runs:
        out.print(f"[dim]closed run {run_id[:8]}, whose process was gone[/]")
    for problem in report.problems:
        out.print(f"[bold red]{problem.kind}[/] {escape(f'{problem.path}: {problem.message}')}", soft_wrap=True)
    found = counted(len(report.problems), "problem") if report.problems else "no problem"
    out.print(f"{counted(report.files, 'file')} read, {found} found.")


def show_removals(report: GarbageReport) -> None:
    """What was removed, or would be, and what was kept though it may be removed later."""
    for removal in report.removed:
        out.print(escape(f"{removal.kind:<10} {removal.bytes:>13,} bytes  {removal.path}"), soft_wrap=True)
    for sentence in report.kept:
        out.print(f"[dim]kept[/] {escape(sentence)}", soft_wrap=True)
    words = "would be removed" if report.dry_run else "removed"
    out.print(f"{counted(len(report.removed), 'thing')}, {counted(report.bytes, 'byte')} {words}.")


def show_import(shard: str, done: ImportReport) -> None:
    """What was imported, how well it guesses its own tokens, and what of the file was left out."""
    stats, found = done.capture.stats, done.aligned
    if not done.written:
        out.print(escape(f"Shard {shard} holds this very content already; nothing was done."), soft_wrap=True)
        return
    counts = f"{counted(stats.rows, 'row')}, {counted(stats.supervised_tokens, 'scored position')}"
    out.print(escape(f"Imported {counts} as shard {shard} ({done.shard_file})."), soft_wrap=True)
    if found.positions:
        out.print(
            f"The likeliest id is the next token at {found.rates[1]:.1%} of {counted(found.positions, 'position')}."
        )
    if done.dropped_last:
        out.print(f"Left out: the last position of {counted(done.dropped_last, 'row')}; no token comes after it.")
    if done.dropped_unsupervised:
        positions = counted(done.dropped_unsupervised, "position")
        out.print(f"Left out: {positions} whose next token loss_mask does not mark.")


def warn_of_other_ids(shard: str, done: ImportReport) -> None:
    """Say so where the imported distributions have next to nothing to do with the tokens beside them."""
    if done.guesses_nothing:
        positions = counted(done.aligned.positions, "position")
        err.print(
            f"[bold yellow]warning:[/] the likeliest id is the next token at {done.aligned.rates[1]:.1%} of {positions}"
            f" of shard {escape(shard)}, which is what ids of another tokenizer look like.\nThe ids must be those of"
            " the tokenizer of teacher.model; if they are not, remove the shard's file, or import right ones with"
            " --replace."
        )


def show_next_steps(home: Home, is_default: bool) -> None:
    """Where to look after the demo."""
    distill, option = command_name(), "" if is_default else f" --home {shlex.quote(str(home.root))}"
    for line in (
        "\nNext:",
        "  open the report above in a browser",
        f'  {distill} sql "SELECT shard, examples, tokens FROM captures ORDER BY shard"{option}',
        f"  edit a shard in {home.root / 'shards'}, then {distill} plan{option} and {distill} run{option}",
        f"  {distill} ui{option}   (the asset graph in a browser)",
    ):
        out.print(escape(line), soft_wrap=True)


def command_name() -> str:
    """`distill`, or where it lies if the shell would not find it: `make` starts it by its path."""
    installed = Path(sys.executable).with_name("distill")
    if shutil.which("distill") or not installed.exists():
        return "distill"
    here = Path.cwd()
    return shlex.quote(str(installed.relative_to(here) if installed.is_relative_to(here) else installed))


def show_tokenizer_report(report: TokenizerReport) -> None:
    """The verdict first, then a table of all that was compared, then the evidence."""
    from distill_assets.tokenizer_compatibility.markdown import side_by_side

    style = "green" if report.usable else "bold red"
    out.print(f"[{style}]{report.verdict}[/]")
    for reason in report.reasons:
        out.print(f"  {escape(reason)}", soft_wrap=True)
    table = _table("compared", "result", "found")
    marks = {"blocks": "bold red", "accepted": "yellow", "noted": "yellow", "not known": "dim", "same": "green"}
    for line in report.compared:
        table.add_row(line.what, f"[{marks[line.result]}]{line.result}[/]", escape(line.found))
    out.print()
    out.print(table)
    names = [escape(side.name) for side in (report.teacher, report.student)]
    if first := report.first_difference:
        headings = [heading for name in names for heading in (name, "bytes")]
        table = _table(">id", *headings, title="the first id that differs")
        sides = (first.teacher, first.teacher_bytes), (first.student, first.student_bytes)
        told = (("none", "") if token is None else (repr(token), hexed) for token, hexed in sides)
        table.add_row(str(first.id), *(escape(text or "") for pair in told for text in pair))
        out.print()
        out.print(table)
    if report.probe:
        table = _table(
            names[0], ">id", names[1], ">id", title=f"a text that gets other ids: {escape(repr(report.probe.text))}"
        )
        for tokens in side_by_side(report.probe):
            table.add_row(*map(escape, tokens))
        out.print()
        out.print(table)


def show_rows(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Any query result as a table, numbers to the right; a field a line where there are too many columns."""
    if not rows:
        err.print("[dim]no rows[/]")
    cells = [[_cell(value) for value in row] for row in rows]
    if len(columns) * LEAST_COLUMN > out.width:
        name_width = max(map(cell_len, columns))
        for row in cells:
            for name, text in zip(columns, row, strict=True):
                out.print(f"{escape(name):>{name_width}}  {text}", soft_wrap=True)
            out.print()
        return
    numeric = [
        bool(rows) and all(isinstance(r[i], int | float) or r[i] is None for r in rows) for i in range(len(columns))
    ]
    table = _table(*(f">{name}" if right else name for name, right in zip(columns, numeric, strict=True)))
    for row in cells:
        table.add_row(*row)
    out.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return escape(str(dict(value)))
    return escape(str(value))
