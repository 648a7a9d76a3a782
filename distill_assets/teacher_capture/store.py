"""The capture store: `captures/<capture_id>/<shard>@<version>.parquet`, each file whole or absent.

The store is the truth; catalog and Dagster records describe it. A file's footer says what it is:
identity, settings, what a position means, statistics, tool versions.

Captures that were imported lie in `captures/imported/` and are pinned to their content: what another engine
said of it comes before what the teacher would say, under whatever name it lies among the shards, and neither
serves rows of the other.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from importlib.metadata import version as package_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from distill_assets.dataset_shards.discover import Shard
from distill_assets.foundation.errors import (
    CaptureError,
    CaptureOutOfReach,
    EditedImport,
    OutOfMemory,
    PinnedCapture,
    first_line,
)
from distill_assets.foundation.files import PARTIAL, replacing, write_json
from distill_assets.foundation.fingerprints import SHORT
from distill_assets.foundation.memory import memory_ran_out
from distill_assets.foundation.settings import TargetSettings
from distill_assets.teacher_capture.arrow import (
    NOT_LEARNT_FROM,
    capture_schema,
    from_arrow,
    older_schema,
    position_weights_of,
)
from distill_assets.teacher_capture.sealed import opened, sealed_writer
from distill_assets.teacher_capture.sparse_targets import CapturedRow, weighting

if TYPE_CHECKING:
    from distill_assets.teacher_capture.identity import CaptureSpec

FOOTER = b"distill"
POSITION_MEANING = "position t holds the teacher's distribution of token t+1 given tokens <= t; logprob = -support_q/16"
IMPORTED = "imported"  # the folder of pinned captures, and the source their footers name
IMPORT_AGAIN = "import it again (`distill import --replace`)"
UNFINISHED = ".unfinished-"
LOCK = ".lock-"
_TOOLS = ("distill_assets", "torch", "transformers", "pyarrow")
# What readers of Parquet, and of the JSON in it, raise on bytes that nobody wrote.
_UNREADABLE = (OSError, pa.ArrowException, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
# What the system says of a file that is not there. All else it says (rights, too many open files, a disk or a server
# that does not answer) may be said of one that is whole; of what is in a file, libraries complain without a number.
_NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL})
_SETTLED_NS = 2_000_000_000  # a folder's time of change may be this coarse


@dataclass(frozen=True)
class CaptureStats:
    """What a capture holds (means are over supervised positions) and what making it took.

    `mean_entropy` and `teacher_perplexity` are None where a position's is not known: the mean over the others
    would be that of another choice of positions. A perplexity that no float holds is None too.
    """

    rows: int
    tokens: int
    supervised_tokens: int
    kept_ids: int
    mean_entropy: float | None
    mean_kept_mass: float
    teacher_perplexity: float | None
    truncated_rows: int
    bad_rows: int
    rows_without_target: int
    rows_captured: int
    rows_reused: int
    tokens_captured: int
    seconds: float

    @property
    def mean_kept_ids(self) -> float:
        return self.kept_ids / self.supervised_tokens

    @property
    def tokens_per_second(self) -> float | None:
        """Teacher speed, or None when the teacher saw nothing."""
        return self.tokens_captured / self.seconds if self.tokens_captured and self.seconds > 0 else None


@dataclass(frozen=True)
class Capture:
    """One file of the store, as its footer describes it."""

    path: Path
    capture_id: str
    shard: str
    version: str
    bytes: int
    stats: CaptureStats
    identity: Mapping[str, Any] = field(compare=False)
    teacher: Mapping[str, Any] = field(compare=False)
    created: str = field(compare=False)
    derived_from: tuple[str, ...] = ()

    @property
    def is_imported(self) -> bool:
        return self.identity.get("source") == IMPORTED

    @property
    def bytes_per_token(self) -> float:
        """Bytes on disk, everything included, a supervised position."""
        return self.bytes / self.stats.supervised_tokens


def read_capture(path: Path) -> Capture:
    """Read a capture file's footer; CaptureError when it is damaged or not one of ours.

    Read once a process for each state of the file: sensors ask for thousands every few seconds.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise unreadable(path, error, "`distill run` makes it again") from error
    return _read_capture(path, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size)


@lru_cache(maxsize=100_000)
def _read_capture(path: Path, mtime_ns: int, ctime_ns: int, size: int) -> Capture:
    with reading(path, "`distill run` makes it again") as file:
        footer = _footer(file)
        if footer is None:
            raise CaptureError(f"{path}: a Parquet file, but not a capture; move it out of captures/")
        return Capture(
            path=path,
            capture_id=footer["capture_id"],
            shard=footer["shard"],
            version=footer["version"],
            bytes=size,
            stats=CaptureStats(**footer["stats"]),
            identity=footer["identity"],
            teacher=footer["teacher"],
            created=footer["created"],
            derived_from=tuple(footer.get("derived_from", ())),
        )


def unreadable(path: Path, error: Exception, remedy: str = "delete it and run again") -> CaptureError:
    """What to say of a capture file that cannot be read. Nobody here could make an imported one again."""
    if isinstance(error, OSError) and error.errno is not None and error.errno not in _NOT_THERE:
        return CaptureOutOfReach(
            f"{path}: cannot be read now ({error.strerror}), and may be whole; mend that, or move it out of captures/"
        )
    mend = IMPORT_AGAIN if path.parent.name == IMPORTED else remedy
    return CaptureError(f"{path}: damaged or unreadable ({first_line(error)}); {mend}")


class WithoutDamaged:
    """Goes on after a block that met a damaged capture, as if what it holds were not there. Not after one that is out
    of reach: the teacher would be paid again for what is there.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        return isinstance(error, CaptureError) and not isinstance(error, CaptureOutOfReach)


@contextmanager
def reading(path: Path, remedy: str = "delete it and run again") -> Iterator[pq.ParquetFile]:
    """The one way to read a file of captured rows; CaptureError when it is damaged, whatever the block, which does
    nothing but read, meets in it; CaptureOutOfReach when the system does not give it, OutOfMemory when there is no room
    for it. A capture has the columns and the number of rows that its footer says.
    """
    try:
        with opened(path) as file:
            if (footer := _footer(file)) is not None:
                said, held = footer["stats"]["rows"], file.metadata.num_rows
                if said != held:
                    raise ValueError(f"its footer says rows {said}, its rows {held}")
                names = file.schema_arrow.names
                known = _schemas(tuple(footer["identity"]["targets"].items()), "position_weights" in names)
                if not any(map(file.schema_arrow.equals, known)):
                    raise ValueError("its columns are not those of its target settings")
            yield file
    except _UNREADABLE as error:
        if memory_ran_out(error):
            raise OutOfMemory(f"{path}: no memory left to read it; free some, and run again") from error
        raise unreadable(path, error, remedy) from error


@lru_cache(maxsize=64)
def _schemas(targets: tuple[tuple[str, Any], ...], position_weights: bool) -> Sequence[pa.Schema]:
    """Columns of a capture of these targets, as files written now and before have them."""
    schema = capture_schema(TargetSettings(**dict(targets)), position_weights)
    return [schema, older_schema(schema)]


def _footer(file: pq.ParquetFile) -> dict[str, Any] | None:
    """What a capture file says it is; None for another Parquet file."""
    said = (file.metadata.metadata or {}).get(FOOTER)
    return None if said is None else dict(json.loads(said))


def read_rows(path: Path, to_learn_from: bool = False, only: NDArray[np.int32] | None = None) -> list[CapturedRow]:
    """The rows of a capture file, in order, as stored, or only what a student learns from; those numbered `only`, else
    all. CaptureError when it is damaged.
    """
    without = NOT_LEARNT_FROM if to_learn_from else frozenset()
    with reading(path) as file:
        table = file.read([name for name in file.schema_arrow.names if name not in without])
        return from_arrow(table if only is None else table.take(pa.array(only)))


@dataclass(frozen=True, slots=True)
class RowKey:
    """A captured row by name, with its training weight, the row group that holds it, a hash of the weights of its
    positions ("" without), and how often an epoch a student is to see it.
    """

    key: str
    weight: float
    row_group: int
    weighting: str = ""
    passes: float = 1.0


def read_row_keys(path: Path) -> list[RowKey]:
    """Keys and weights of a capture file's rows, in order; CaptureError when it is damaged.

    Read once a process for each state of the file: sensors ask every few seconds.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise unreadable(path, error, "run again") from error
    return _row_keys(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=100_000)
def _row_keys(path: Path, mtime_ns: int, size: int) -> list[RowKey]:
    with reading(path) as file:
        columns = [name for name in ("key", "weight", "position_weights") if name in file.schema_arrow.names]
        found = []
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=columns)
            plain = table.select(["key", "weight"]).to_pylist()
            for row, weights in zip(plain, position_weights_of(table), strict=True):
                found.append(RowKey(row["key"], row["weight"], group, weighting(weights)))
        return found


def read_row_group(path: Path, row_group: int, keys: Collection[str]) -> list[CapturedRow]:
    """The rows of one row group that have one of these keys; CaptureError when the file is damaged."""
    with reading(path) as file:
        table = file.read_row_group(row_group)
        # Chosen before they become rows: a row is a view, and one would keep the whole group in memory.
        return from_arrow(table.filter(pc.is_in(table["key"], value_set=pa.array(sorted(keys), pa.string()))))


class CaptureFile:
    """A capture file under way. `describe` it before its block ends: a file without a footer is no capture."""

    def __init__(self, path: Path, writer: pq.ParquetWriter) -> None:
        self.path = path
        self._writer = writer

    def append(self, table: pa.Table) -> None:
        self._writer.write_table(table)

    def describe(self, footer: Mapping[str, Any], stats: CaptureStats) -> None:
        """Say in the footer what the file is: identity, settings, what a position means, statistics, tools."""
        tools = {name: package_version(name) for name in _TOOLS} | {"python": platform.python_version()}
        content = {**footer, "position": POSITION_MEANING, "stats": asdict(stats), "tools": tools}
        self._writer.add_key_value_metadata({FOOTER.decode(): json.dumps(content, ensure_ascii=False)})


@dataclass(frozen=True)
class _Imports:
    """The imported captures by their names: shards, and files by the first SHORT digits of their version."""

    shards: frozenset[str]
    by_version: Mapping[str, tuple[Path, ...]]


_imports: dict[Path, tuple[int, _Imports]] = {}  # by folder: when it last changed, and what was in it then


def _stat_of(path: Path) -> os.stat_result | None:
    """None for what is not there; CaptureOutOfReach where nobody can tell."""
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unreadable(path, error) from error


def finished_files(folder: Path) -> list[Path]:
    """The Parquet files of a folder that nobody is writing; CaptureOutOfReach where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries)
    except (FileNotFoundError, NotADirectoryError):  # its capture was finished in this moment
        return []
    except OSError as error:
        raise unreadable(folder, error) from error
    return [folder / name for name in names if name.endswith(".parquet") and not name.startswith(PARTIAL)]


class CaptureStore:
    """Finds and writes the files below `captures/`. Holds no state of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path_of(self, capture_id: str, shard: str, version: str) -> Path:
        return self.root / capture_id / f"{shard}@{version[:SHORT]}.parquet"

    def pinned_path(self, shard: str, version: str) -> Path:
        return self.path_of(IMPORTED, shard, version)

    def capture_ids(self) -> list[str]:
        """Identities under which a teacher was run here; what was imported is none of them."""
        return sorted(folder.name for folder in self.root.glob("*") if folder.is_dir() and folder.name != IMPORTED)

    def files(self, capture_id: str) -> dict[tuple[str, str], Path]:
        """(shard, short version) -> file, for one capture identity."""
        folder = self.root / capture_id
        found: dict[tuple[str, str], Path] = {}
        with suppress(FileNotFoundError, NotADirectoryError):
            for name in sorted(entry.name for entry in os.scandir(folder)):
                shard, at, version = name.removesuffix(".parquet").rpartition("@")
                if at and name.endswith(".parquet") and not name.startswith(PARTIAL):
                    found[shard, version] = folder / name
        return found

    def find(self, capture_id: str, shard: str, version: str) -> Capture | None:
        """The capture of this content under this identity, or None; CaptureError when it is damaged, or by its
        footer another one.
        """
        path = self.path_of(capture_id, shard, version)
        if _stat_of(path) is None:
            return None
        found = read_capture(path)
        if (found.capture_id, found.shard, found.version) != (capture_id, shard, version):
            raise CaptureError(
                f"{path}: by its footer the capture of shard {found.shard}; `distill run` makes it again"
            )
        return found

    def current(self, spec: CaptureSpec, shard: Shard) -> Capture | None:
        """The capture that stands for this shard as it is: the pinned one, else that of this identity, unless it
        left out bad rows and such rows fail the shard.

        PinnedCapture when the shard was imported and the import does not fit, CaptureError when the
        teacher's capture is damaged.
        """
        if pinned := self.pinned(spec, shard):
            return pinned
        found = self.find(spec.capture_id, shard.key, shard.version)
        return found if found is None or not found.stats.bad_rows or spec.skips_bad_rows else None

    def is_pinned(self, shard: str) -> bool:
        """Whether any content of this shard was imported under this name: then the teacher never sees it."""
        return shard in self._imported().shards

    def pinned(self, spec: CaptureSpec, shard: Shard) -> Capture | None:
        """The imported capture of this very content, whatever the target settings and whatever the shard's name was
        when it was imported; None for a shard that was never imported. EditedImport when what was imported
        under its name is of other content, PinnedCapture when the import is by another tokenizer, or damaged.
        """
        imported = self._imported()
        paths = imported.by_version.get(shard.version[:SHORT], ())
        found = self._imports_of(shard, paths) if paths else []
        if not found and shard.key in imported.shards:
            raise EditedImport(
                f"shard {shard.key} ({shard.path}) is not what was imported; `distill run` brings it up to date, or "
                "says which row was not imported"
            )
        if not found:
            return None
        if len({capture.capture_id for capture in found}) > 1:
            names = " and ".join(capture.shard for capture in found)
            raise PinnedCapture(
                f"shard {shard.key} was imported as {names}, with different log-probabilities; {IMPORT_AGAIN} "
                f"as {shard.key}"
            )
        if found[0].identity["tokenizer"] != spec.identity["tokenizer"]:
            raise PinnedCapture(
                f"shard {shard.key} was imported with another tokenizer than the home has now; {IMPORT_AGAIN}, "
                f"or move {found[0].path} out of captures/ to let the teacher capture it"
            )
        return replace(found[0], shard=shard.key)

    def _imports_of(self, shard: Shard, paths: Collection[Path]) -> list[Capture]:
        """Those of these imported captures that are of a shard's content: the one of its name, else all;
        PinnedCapture when one is damaged.
        """
        own = self.pinned_path(shard.key, shard.version)
        found = []
        for path in [own] if own in paths else paths:
            try:
                found.append(read_capture(path))
            except CaptureOutOfReach:
                raise
            except CaptureError as error:
                raise PinnedCapture(f"shard {shard.key} was imported, but {path} is damaged; {IMPORT_AGAIN}") from error
        return [capture for capture in found if capture.version == shard.version]

    def _imported(self) -> _Imports:
        """What lies in `imported/`, listed anew only when the folder changed: whoever looks at all shards asks for
        each.
        """
        folder = self.root / IMPORTED
        if (stat := _stat_of(folder)) is None:
            return _Imports(frozenset(), {})
        changed = stat.st_mtime_ns
        if folder in _imports and _imports[folder][0] == changed:
            return _imports[folder][1]
        by_version: dict[str, tuple[Path, ...]] = {}
        files = self.files(IMPORTED)
        for (_, version), path in files.items():
            by_version[version] = (*by_version.get(version, ()), path)
        listed = _Imports(frozenset(shard for shard, _ in files), by_version)
        if time.time_ns() - changed > _SETTLED_NS:  # else a file may yet come within the same tick
            _imports[folder] = (changed, listed)
        return listed

    def known_shards(self, capture_id: str) -> set[str]:
        """Shards of which any version was captured under this identity."""
        return {shard for shard, _ in self.files(capture_id)}

    def unfinished(self, capture_id: str, shard: str, version: str) -> Path:
        """The folder for finished chunks of a capture that is under way."""
        return self.root / capture_id / f"{UNFINISHED}{shard}@{version[:SHORT]}"

    def all_unfinished(self, capture_id: str) -> list[Path]:
        """These folders of all captures under way."""
        return sorted((self.root / capture_id).glob(f"{UNFINISHED}*"))

    def lock(self, capture_id: str, shard: str, version: str) -> Path:
        """The file that whoever captures this shard version has locked."""
        return self.root / capture_id / f"{LOCK}{shard}@{version[:SHORT]}"

    def reusable(self, capture_id: str) -> list[Path]:
        """Every file that holds captured rows: captures, and chunks of captures under way."""
        found = [*self.files(capture_id).values()]
        for folder in self.all_unfinished(capture_id):
            found += finished_files(folder)
        return found

    def require_in_reach(self, capture_id: str) -> None:
        """CaptureOutOfReach when a file that rows would be copied from cannot be opened."""
        for path in self.reusable(capture_id):
            try:
                path.open("rb").close()
            except FileNotFoundError:  # its capture was finished in this moment
                continue
            except OSError as error:
                raise unreadable(path, error) from error

    @contextmanager
    def publishing(
        self, folder: str, shard: str, version: str, targets: TargetSettings, position_weights: bool = False
    ) -> Iterator[CaptureFile]:
        """A capture file to fill, a row group a table; when the block ends it appears whole, or not at all.

        `folder` is its capture id, or IMPORTED; `position_weights`: any of its rows has some.
        """
        path = self.path_of(folder, shard, version)
        with replacing(path) as beside, sealed_writer(beside, targets, position_weights=position_weights) as writer:
            yield CaptureFile(path, writer)

    def _failure_file(self, capture_id: str, shard: str, version: str) -> Path:
        return self.path_of(capture_id, shard, version).with_suffix(".failed.json")

    def record_failure(self, capture_id: str, shard: str, version: str, message: str) -> None:
        """Remember why this content could not be captured, so that plans can say so."""
        write_json(self._failure_file(capture_id, shard, version), {"shard": shard, "message": message})

    def forget_failure(self, capture_id: str, shard: str, version: str) -> None:
        self._failure_file(capture_id, shard, version).unlink(missing_ok=True)

    def failure(self, capture_id: str, shard: str, version: str) -> str | None:
        """Why the last try on this content failed, or None."""
        try:
            record = json.loads(self._failure_file(capture_id, shard, version).read_text(encoding="utf-8"))
            return str(record["message"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
