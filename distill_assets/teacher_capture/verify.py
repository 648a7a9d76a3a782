"""Every file in `captures/` looked at: read to its last byte, or told from what belongs there."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from distill_assets.foundation.errors import CaptureError, CaptureOutOfReach
from distill_assets.foundation.problems import FileListener, Problem
from distill_assets.teacher_capture.chunks import reading_chunk
from distill_assets.teacher_capture.contents import Item, Needs, contents
from distill_assets.teacher_capture.identity import CaptureSpec
from distill_assets.teacher_capture.inspection import inspect_capture
from distill_assets.teacher_capture.store import IMPORT_AGAIN, CaptureStore, read_capture

GC = "`distill gc` removes it"
_AGAIN = "delete it, then `distill run` makes it again"
_LATER = "`distill run` copies what is whole of it, and `distill gc` removes it after that"
_ORPHANS = {
    "leftover": "left by a process that was killed",
    "unfinished": "finished chunks that no shard on disk would go on from",
    "failure": "tells of a failure of content that is gone",
}


def verify_captures(
    spec: CaptureSpec, needs: Needs, store: CaptureStore, is_busy: Callable[[], bool], on_file: FileListener
) -> Iterator[Problem]:
    """Problems of `captures/`. Superseded captures are none; nor is a shard without a capture, which is to be
    captured; nor, while somebody works in the home, what looks left over: it may be theirs. `is_busy` is asked
    last, for reading takes long: whoever ended meanwhile has taken away what was theirs.
    """
    left = []
    for item in contents(store.root):
        if item.kind == "capture":
            on_file(item.path)
            try:
                for kind, reason in inspect_capture(item.path, _n_ids(spec, item)):
                    yield Problem(kind, item.path, f"{reason}; {remedy_for(item, needs)}")
            except CaptureOutOfReach as error:
                yield Problem("damaged", item.path, str(error).removeprefix(f"{item.path}: "))
        elif item.kind == "stranger":
            yield Problem("orphaned", item.path, "nothing of ours; move it out of captures/")
        elif item.kind in _ORPHANS and item not in needs:
            left.append(Problem("orphaned", item.path, f"{_ORPHANS[item.kind]}; {GC}"))
        elif item.kind == "unfinished":
            yield from _verify_chunks(item, on_file)
    if not is_busy():
        yield from (problem for problem in left if problem.path.exists())


def remedy_for(item: Item, needs: Needs) -> str:
    """What to do about a capture that is not what it should be."""
    if item.is_imported:
        return IMPORT_AGAIN
    if needs.is_current(item):
        return _AGAIN
    return _LATER if item in needs else GC


def _n_ids(spec: CaptureSpec, item: Item) -> int | None:
    """Where ids end; None for a capture by another tokenizer."""
    try:
        same = read_capture(item.path).identity["tokenizer"] == spec.identity["tokenizer"]
    except CaptureError:
        return None
    return spec.tokenizer.ids.n_real if same else None


def _verify_chunks(item: Item, on_file: FileListener) -> Iterator[Problem]:
    for file in sorted(item.path.glob("*.parquet")):
        on_file(file)
        try:
            with reading_chunk(file) as (_, chunk):
                for group in range(chunk.num_row_groups):
                    chunk.read_row_group(group)
        except CaptureError as error:
            if file.exists():  # else its capture was finished in this moment
                yield Problem("damaged", file, str(error).removeprefix(f"{file}: "))
