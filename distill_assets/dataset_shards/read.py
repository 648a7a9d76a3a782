"""Shard files row by row, each with the line it stands on.

JSONL is decoded line by line with the standard library: Polars guesses one schema for a whole file
and cannot say which line is wrong. Parquet has a schema and is read by Polars.
"""

from __future__ import annotations

import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import cast

import pyarrow as pa

from distill_assets.dataset_shards.rows import KIND_OF, KNOWN_KEYS, BadRow, Row, parse_row
from distill_assets.foundation.errors import ShardError, UnreadableFile
from distill_assets.foundation.fingerprints import open_decompressed

_BOM = b"\xef\xbb\xbf"


def read_rows(path: Path, at_most: int | None = None) -> Iterator[Row | BadRow]:
    """Yield every row of a shard file, or the first `at_most`, in order, good and bad.

    JSONL (plain, .gz, .zst): a row a line; blank lines are skipped. `.txt`: a `text` row a line
    without its line break; blank lines are skipped. Parquet: a row a row. Raises UnreadableFile
    when the file is gone or damaged, ShardError when no column of a Parquet file can be a row.
    """
    with _reading(path):
        yield from islice(_rows(path, at_most), at_most)


def _rows(path: Path, at_most: int | None) -> Iterator[Row | BadRow]:
    if path.suffix == ".parquet":
        yield from _read_parquet(path, at_most)
    elif path.suffix == ".txt":
        for line, content in _lines(path):
            yield _parse_text(line, content)
    else:
        for line, value in read_json_lines(path):
            yield value if isinstance(value, BadRow) else parse_row(line, value)


def read_json_lines(path: Path) -> Iterator[tuple[int, object]]:
    """Yield (line number, decoded value) of every line of a JSONL file (plain, .gz, .zst) that is not blank.

    In place of a line that is no JSON, or of which an object has a key twice, stands a BadRow that says why. Raises
    UnreadableFile when the file is gone or damaged.
    """
    with _reading(path):
        for line, content in _lines(path):
            yield line, _parse_json(line, content)


def count_lines(path: Path) -> int:
    """Lines of a JSONL file (plain, .gz, .zst), blank ones among them; UnreadableFile as `read_json_lines`."""
    with _reading(path), open_decompressed(path) as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """UnreadableFile for whatever says that a file is gone or damaged."""
    try:
        yield
    except FileNotFoundError:
        raise UnreadableFile(f"{path}: the file is gone; put it back, or run again without it") from None
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UnreadableFile:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return UnreadableFile(f"{path}: cannot be read to its end ({reason}); write the file again")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, bytes) of every line that is not blank; a byte order mark is dropped."""
    with open_decompressed(path) as raw, io.BufferedReader(cast(io.RawIOBase, raw)) as stream:
        for number, content in enumerate(stream, start=1):
            if number == 1:
                content = content.removeprefix(_BOM)
            if content.strip():
                yield number, content


def _decode(content: bytes) -> str:
    """Decode UTF-8; ValueError names the first byte that is not."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8: byte 0x{content[error.start]:02x} at byte {error.start + 1} of the line"
        ) from None


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; ValueError for a key that it has twice: a dict would keep the last in silence."""
    values = dict(pairs)
    if len(values) != len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise ValueError(f"it has the key {twice[:40]!r} more than once")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_object)  # one for all lines: to make it takes longer than to read one


def _parse_json(line: int, content: bytes) -> object:
    try:
        return _DECODER.decode(_decode(content).rstrip("\r\n"))
    except json.JSONDecodeError as error:
        cut = "" if content.endswith(b"\n") else "; the file ends in this line without a line break: is it cut off?"
        return BadRow(line, f"not valid JSON ({error.msg.removesuffix(' at')} at character {error.pos + 1}){cut}")
    except ValueError as error:  # not UTF-8, a key twice, or a number of thousands of digits
        return BadRow(line, str(error))
    except RecursionError:
        return BadRow(line, "not a row: nested too deeply")


def _parse_text(line: int, content: bytes) -> Row | BadRow:
    try:
        return parse_row(line, {"text": _decode(content.removesuffix(b"\n").removesuffix(b"\r"))})
    except ValueError as error:
        return BadRow(line, str(error))


def _read_parquet(path: Path, at_most: int | None) -> Iterator[Row | BadRow]:
    import polars as pl  # takes a tenth of a second, and to know that no shard changed nothing is read

    try:
        with path.open("rb") as file:  # a path would be taken as a pattern and its folders as columns
            found = pl.read_parquet_schema(file)
            columns = [name for name in KNOWN_KEYS if name in found]
            if not any(name in KIND_OF for name in columns):
                raise ShardError(
                    f"{path}: its columns are {', '.join(list(found)[:8])}; it needs text, prompt and completion, "
                    "messages, or input_ids"
                )
            file.seek(0)
            frame = pl.read_parquet(file, columns=columns, n_rows=at_most)
    except pl.exceptions.PolarsError as error:
        raise _damaged(path, error) from error
    for number, values in enumerate(frame.iter_rows(named=True), start=1):
        yield parse_row(number, values)
