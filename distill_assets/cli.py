"""The `distill` command: thin. Each command is one call and a way to show what came back.

Figures go to stdout (with --json exactly one JSON object), everything else to stderr. dagster,
torch and transformers are imported only by the commands that need them, and a home is looked for
before they are: what is wrong with it is said at once.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import socket
import sys
import webbrowser
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version as package_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from distill_assets import terminal
from distill_assets.foundation.errors import DistillError, ModelError, StaleInputs, UsageError
from distill_assets.foundation.files import disk_problem
from distill_assets.foundation.home import HOME_VARIABLE, default_home, find_home, make_home
from distill_assets.foundation.wording import counted

if TYPE_CHECKING:
    from distill_assets.foundation.home import Home
    from distill_assets.orchestration.pipeline import Pipeline

app = typer.Typer(
    name="distill",
    help="Offline knowledge distillation: capture a teacher once, train students from the record.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
errors = Console(stderr=True, highlight=False, soft_wrap=True)

TYPER_INTERRUPTED = 130  # Typer turns Ctrl-C into this exit
SUPERSEDED = "Function `dev_command` is superseded"  # Dagster advises `dg dev`, which asks for a project folder
EXAMPLE_TEACHER = "HuggingFaceTB/SmolLM2-1.7B-Instruct"
EXAMPLE_STUDENT = "HuggingFaceTB/SmolLM2-135M-Instruct"

HomeOption = Annotated[
    Path | None,
    typer.Option("--home", help=f"The home folder; else ${HOME_VARIABLE}, else data/ of the checkout."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
RehashOption = Annotated[bool, typer.Option("--rehash", help="Read every file again instead of trusting its dates.")]


def _well_formed_device(name: str) -> str:
    """Refused before anything is done; whether the device is there, only PyTorch can say."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]+)?", name):
        raise UsageError(f"device {name} is not known; use auto, cpu, cuda, cuda:N or mps")
    return name


DeviceOption = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.", callback=_well_formed_device)
]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"distill_assets {package_version('distill_assets')}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    context.obj = {"debug": debug}


def main() -> None:
    """Entry point: errors of a user in one or two lines, exit 1 for a failure, 2 for wrong usage."""
    debug, as_json = "--debug" in sys.argv, "--json" in sys.argv
    try:
        app()
    except DistillError as error:
        _fail(error, str(error), error.exit_code, debug, as_json)
    except SystemExit as exit_:
        if exit_.code != TYPER_INTERRUPTED:
            if as_json and (say := getattr(exit_.__context__, "format_message", None)):  # wrong usage, told by Typer
                print_json({"error": say()})
            raise
        _fail(exit_, "interrupted; what was finished is kept, the same command goes on from there", 1, debug, as_json)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        if said := disk_problem(error):
            hint = "make room and run the same command again; what was finished is kept"
            _fail(error, f"the disk is full or cannot be written ({said}); {hint}", 1, debug, as_json)
        if isinstance(error, OSError):
            _fail(error, f"{error.filename or 'a file'}: {error.strerror or error}", 1, debug, as_json)
        raise


def _fail(error: BaseException, message: str, exit_code: int, debug: bool, as_json: bool) -> NoReturn:
    if debug:
        errors.print_exception()
    errors.print(f"[bold red]error:[/] {escape(message)}")
    if as_json and not getattr(error, "answered", False):
        print_json({"error": message})
    raise SystemExit(exit_code)


def print_json(value: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, default=str) + "\n")


def _finite(value: Any) -> Any:
    """`value` with null for numbers that JSON cannot write."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _pipeline(home: Home, rehash: bool = False) -> Pipeline:
    from distill_assets.orchestration.pipeline import Pipeline

    return Pipeline(home, rehash=rehash)


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(help="The folder to make a home of; made if it is not there.")],
    teacher: Annotated[str, typer.Option(help="Hub id or folder of the teacher.")] = EXAMPLE_TEACHER,
    student: Annotated[str, typer.Option(help="Hub id or folder of the student's initial weights.")] = EXAMPLE_STUDENT,
    as_json: JsonOption = False,
) -> None:
    """Make a new home: a commented distill.yaml, shards/, and the Dagster instance."""
    from distill_assets.foundation.settings_text import init_text

    home = make_home(directory, init_text(_model("--teacher", teacher), _model("--student", student)))
    if as_json:
        print_json({"home": str(home.root)})
    else:
        terminal.out.print(f"{home.root} is a home now.")
        terminal.out.print(f"Next: put shards into {home.root / 'shards'}, look at {home.settings_file}, then")
        terminal.out.print(f"  distill plan --home {shlex.quote(str(directory))}")


def _model(option: str, name: str) -> str:
    """A hub id, or the path of a folder, which is named from where the user stands, while distill.yaml is read from the
    home.
    """
    from distill_assets.foundation.model_folders import ModelFolder, is_hub_id

    folder = Path(name)
    with suppress(RuntimeError):  # ~ of nobody
        folder = folder.expanduser()
    if folder.is_dir():
        found = ModelFolder(f"{option} {name}", folder.resolve(), None)
        try:
            found.config()
            found.weight_files()
        except ModelError as error:
            raise UsageError(str(error)) from None
        return str(found.path)
    if not is_hub_id(name):
        raise UsageError(f"{option} {name}: there is no such folder here; give one, or a hub id (owner/name)")
    return name


@app.command()
def env(home: HomeOption = None) -> None:
    """Print shell exports, so that plain dagster and dg commands work in this home."""
    found = find_home(home)
    from distill_assets.orchestration.instance import environment

    found.prepare_dagster()
    for name, value in environment(found).items():
        typer.echo(f"export {name}={shlex.quote(value)}")


@app.command()
def check(
    teacher: Annotated[str | None, typer.Option(help="Compare this folder or hub id instead of the home's.")] = None,
    student: Annotated[str | None, typer.Option(help="... with this one.")] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare the tokenizers of teacher and student; exit 0 if the pair can be used, 1 if not."""
    from distill_assets.orchestration import compatibility

    if (teacher is None) != (student is None):
        raise UsageError("give both --teacher and --student, or neither")
    if teacher is not None and student is not None:
        report = compatibility.compare_models(teacher, student, Path.cwd())
    else:
        report = _pipeline(find_home(home)).tokenizer_report()
    if as_json:
        print_json(report.to_json())
    else:
        terminal.show_tokenizer_report(report)
    if not report.usable:
        raise SystemExit(1)


@app.command()
def plan(home: HomeOption = None, rehash: RehashOption = False, as_json: JsonOption = False) -> None:
    """What a run would capture, and why; runs nothing."""
    found_home = find_home(home)
    from distill_assets.orchestration.status import what_follows, what_is_refused

    pipeline = _pipeline(found_home, rehash)
    capture_plan = pipeline.plan()
    following, refused = what_follows(pipeline, capture_plan), what_is_refused(pipeline, capture_plan)
    if as_json:
        print_json(
            {
                "capture_id": capture_plan.capture_id,
                "shards": [asdict(shard) for shard in capture_plan.shards],
                "basis": capture_plan.basis,
                "then": [asdict(asset) for asset in following],
                "refused": refused or None,
            }
        )
    else:
        terminal.show_plan(capture_plan, following, refused)


@app.command()
def run(
    shard: Annotated[list[str] | None, typer.Option(help="Capture only this shard and refresh the catalog.")] = None,
    only: Annotated[str | None, typer.Option(help="Materialise this asset alone.")] = None,
    device: DeviceOption = "auto",
    processes: Annotated[int, typer.Option(min=1, help="Train in so many processes, one a device.")] = 1,
    force: Annotated[bool, typer.Option("--force", help="Capture again what is current.")] = False,
    rehash: RehashOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring everything up to date through Dagster runs; only what changed."""
    options = {"device": device, "processes": processes, "force": force, "rehash": rehash}
    _bring_up_to_date(find_home(home), as_json, shards=shard or [], only=only, **options)


def _bring_up_to_date(home: Home, as_json: bool, **options: Any) -> None:
    from distill_assets.orchestration.instance import environment

    os.environ.update(environment(home))  # the definitions read the home's automation settings
    from distill_assets.definitions import defs
    from distill_assets.orchestration.bring_up_to_date import RunReport, bring_up_to_date
    from distill_assets.orchestration.progress import shown_by

    report = RunReport()
    try:
        with terminal.progress_bar() as bar, shown_by(bar.show):
            bring_up_to_date(defs, home, on_step=bar.say, report=report, **options)
        if not as_json:
            terminal.show_run(report)
        report.raise_failures()
    except DistillError as error:
        if as_json:  # what was done before the error is told with it
            print_json(report.to_json() | {"error": str(error)})
            error.answered = True  # type: ignore[attr-defined]
        raise
    if as_json:
        print_json(report.to_json())


@app.command()
def demo(
    directory: Annotated[Path | None, typer.Argument(help="Default: data/ of the checkout.")] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """A real teacher on real text, from nothing to a report; a second run captures nothing."""
    # The bar of transformers' GGUF reader has no other switch, and tqdm reads this when it is imported.
    os.environ.setdefault("TQDM_DISABLE", "1")
    from distill_assets.demo import prepare_demo

    root = directory or default_home()
    if root is None:
        raise UsageError("outside a checkout, say where: distill demo DIR")
    with terminal.progress_bar() as bar:
        prepare_demo(root.expanduser().resolve(), bar.show)
    home = find_home(root)
    _bring_up_to_date(home, as_json, device=device)
    if not as_json:
        terminal.show_next_steps(home, is_default=directory is None)


@app.command()
def status(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """The state of each shard and each asset."""
    found_home = find_home(home)
    from distill_assets.orchestration.status import home_status

    found = home_status(_pipeline(found_home))
    if as_json:
        print_json(asdict(found))
    else:
        terminal.show_status(found)


@app.command()
def sql(
    query: Annotated[str, typer.Argument(help="One SELECT, for example: SELECT shard, examples FROM captures")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask the catalog: one read-only SELECT."""
    found = find_home(home)
    from distill_assets.capture_catalog.query import run_query

    result = run_query(found.catalog, found.captures, query)
    if as_json:
        print_json({"rows": [dict(zip(result.columns, row, strict=True)) for row in result.rows]})
    else:
        terminal.show_rows(result.columns, result.rows)


@app.command()
def export(
    out: Annotated[Path, typer.Argument(help="The JSONL file to write.")],
    shard: Annotated[list[str] | None, typer.Option(help="Only this shard.")] = None,
    encoded: Annotated[
        bool, typer.Option("--encoded", help="Not captures, but the rows' ids and mask, for another engine to score.")
    ] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace the file that is there.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write current captures as JSONL, one example a line."""
    found = find_home(home)
    from distill_assets.dataset_shards.discover import folder_of_shards
    from distill_assets.teacher_capture.interchange import export_encoded, export_jsonl, require_free

    require_free(out, (*found.own_places, folder_of_shards(found.root, found.settings().data)), replace)
    pipeline = _pipeline(found)
    present = {s.key for s in pipeline.discovery.shards} | {problem.key for problem in pipeline.discovery.problems}
    if unknown := [name for name in shard or [] if name not in present]:
        raise UsageError(f"there is no shard {unknown[0]}; `distill plan` lists them")
    if encoded:
        wanted = shard or sorted(present)
        if not wanted:
            raise StaleInputs("there is no shard to encode; put a file where data.shards of distill.yaml looks")
        rows = export_encoded([pipeline.shard(name) for name in wanted], pipeline.spec.encoder, out)
    else:
        captures = {entry.capture.shard: entry.capture for entry in pipeline.entries}
        if not captures:
            raise StaleInputs("nothing is captured yet; `distill run` captures")
        wanted = shard or sorted(captures)
        if missing := [name for name in wanted if name not in captures]:
            raise StaleInputs(f"shard {missing[0]} has no current capture; `distill plan` says why")
        rows = export_jsonl([captures[name] for name in wanted], out)
    if as_json:
        print_json({"rows": rows, "path": str(out)})
    else:
        counts = f"{counted(rows, 'row')} of {counted(len(wanted), 'shard')}"
        terminal.out.print(escape(f"{counts} written to {out}"), soft_wrap=True)


@app.command("import")
def import_(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN", exists=True, dir_okay=False, help="The JSONL file to read; .gz and .zst are decompressed."
        ),
    ],
    shard: Annotated[str, typer.Option(help="The key of the shard it becomes.")],
    rows: Annotated[
        Literal["aligned", "shifted"],
        typer.Option(help="aligned: T lists for T tokens; shifted: T - 1, without one for the last position."),
    ] = "aligned",
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace what is there: of other content, or damaged.")
    ] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make log-probabilities of another engine a shard with a capture of its own, which is never captured again."""
    pipeline = _pipeline(find_home(home))
    with terminal.progress_bar() as bar:
        done = pipeline.import_jsonl(source, shard, shifted=rows == "shifted", replace=replace, on_progress=bar.show)
    stats = done.capture.stats
    terminal.warn_of_other_ids(shard, done)
    if as_json:
        print_json(
            {
                "rows": stats.rows,
                "shard": shard,
                "path": str(done.shard_file),
                "capture": str(done.capture.path),
                "capture_id": done.capture.capture_id,
                "positions": stats.supervised_tokens,
                "written": done.written,
                "dropped_last": done.dropped_last,
                "dropped_unsupervised": done.dropped_unsupervised,
                "next_token_hit_rate": done.aligned.rates[1] if done.aligned.positions else None,
            }
        )
    else:
        terminal.show_import(shard, done)


@app.command()
def report(
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="With --compare: ids of students, or beginnings.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Put these students, of this home, in one table and one plot.")
    ] = False,
    open_it: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """The path of the latest report; with --compare, of a comparison of students."""
    if ids and not compare:
        raise UsageError(f"to compare students, write: distill report --compare {' '.join(ids)}")
    found = find_home(home)
    if compare:
        path, answer = _compare(found, ids or [], as_json)
    else:
        path, answer = _latest_report(found)
    if as_json:
        print_json({"path": str(path), **answer})
    else:
        typer.echo(str(path))
    if open_it and not webbrowser.open(path.as_uri()):
        errors.print("[dim]no browser was found to open it in[/]")


def _latest_report(home: Home) -> tuple[Path, dict[str, Any]]:
    from distill_assets.orchestration.status import latest_report

    path, is_current = latest_report(_pipeline(home))
    if not is_current:
        errors.print("[dim]the data or settings changed since; `distill run` makes the current report[/]")
    return path, {}


def _compare(home: Home, ids: list[str], as_json: bool) -> tuple[Path, dict[str, Any]]:
    from distill_assets.student_evaluation.comparison import compare_students
    from distill_assets.student_evaluation.comparison_page import write_comparison

    comparison = compare_students(ids, home.students, home.reports)
    path = write_comparison(comparison, home.comparisons / comparison.comparison_id)
    if not as_json:
        terminal.show_comparison(comparison)
    return path, comparison.to_json()


@app.command()
def verify(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Read every file of the home to its end and compare it with what refers to it; exit 1 if anything is wrong."""
    found_home = find_home(home)
    from distill_assets.orchestration.verify import verify as verify_home

    with terminal.progress_bar() as bar:
        found = verify_home(found_home, bar.show)
    if as_json:
        print_json(found.to_json())
    else:
        terminal.show_problems(found)
    if found.problems:
        raise SystemExit(1)


@app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    imported: Annotated[
        bool, typer.Option("--imported", help="Imported captures whose content no shard file has, too.")
    ] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove what nothing refers to: superseded captures, students and reports that are not current, comparisons,
    leftovers."""
    found_home = find_home(home)
    from distill_assets.orchestration.garbage import collect_garbage

    found = collect_garbage(found_home, dry_run, imported)
    if as_json:
        print_json(found.to_json())
    else:
        terminal.show_removals(found)


@app.command()
def ui(
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.", min=1, max=65535)] = 3000,
    home: HomeOption = None,
) -> None:
    """Start Dagster's web UI and daemon for this home, on loopback, until Ctrl-C."""
    found = find_home(home)
    from distill_assets.orchestration.instance import environment

    found.settings()  # an unreadable distill.yaml is said here, not in a browser
    _require_free(port)
    found.prepare_dagster()
    os.environ.update(environment(found))
    errors.print(f"web UI of {found.root}: http://127.0.0.1:{port} (answers in some seconds; Ctrl-C ends it)")
    command = ["dagster", "dev", "-m", "distill_assets.definitions", "-h", "127.0.0.1", "-p", str(port)]
    # A script's background job starts with SIGINT ignored, and Dagster then ignores SIGTERM as well.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    os.execv(sys.executable, [sys.executable, "-W", f"ignore:{SUPERSEDED}", "-m", *command])


def _require_free(port: int) -> None:
    """Dagster goes on without its web server when the port is taken, beside the other daemon."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UsageError(f"port {port} cannot be used ({error.strerror}); give another with --port") from None


if __name__ == "__main__":
    main()
