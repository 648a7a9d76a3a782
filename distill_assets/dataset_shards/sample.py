"""A few texts of the user's own, for whoever wants to try something on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice

from distill_assets.dataset_shards.discover import Shard
from distill_assets.dataset_shards.read import read_rows
from distill_assets.dataset_shards.rows import BadRow, Chat, Completion, Row, Text
from distill_assets.foundation.errors import ShardError, UnreadableFile

SHARDS, ROWS, CHARACTERS = 8, 25, 2000


def sample_texts(shards: Iterable[Shard]) -> list[str]:
    """Texts of the first rows of the first shards, each cut; rows and shards that cannot be read are left out.

    Whoever encodes a shard reports what is wrong with it.
    """
    found: list[str] = []
    for shard in islice(shards, SHARDS):
        with suppress(ShardError, UnreadableFile):
            for row in read_rows(shard.path, ROWS):
                found += [] if isinstance(row, BadRow) else [text[:CHARACTERS] for text in _texts(row)]
    return list(dict.fromkeys(found))


def _texts(row: Row) -> Iterator[str]:
    match row.content:
        case Text(text):
            yield text
        case Completion(prompt, completion):
            yield from (prompt, completion)
        case Chat(messages):
            yield from (message.content for message in messages)
