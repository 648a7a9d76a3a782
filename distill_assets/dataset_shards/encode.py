"""Rows as token ids with a loss mask, by the teacher's tokenizer.

Legend: T = tokens of a row. `loss_mask_T[t]` true means token t is a target, so position t - 1 is
scored; `loss_mask_T[0]` is always false, since nothing predicts the first token.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distill_assets.dataset_shards.chat import ChatEncoder, ChatProblem
from distill_assets.dataset_shards.discover import Shard
from distill_assets.dataset_shards.read import read_rows
from distill_assets.dataset_shards.rows import BadRow, Chat, Completion, Ids, Row, Text
from distill_assets.foundation.errors import ModelError, ShardError
from distill_assets.foundation.fingerprints import content_hash
from distill_assets.foundation.inserted_ids import inserted_ids, token_ids
from distill_assets.foundation.settings import DataSettings
from distill_assets.foundation.wording import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENCODING_RULES = 1  # raised whenever the same row would give other ids or another mask
BLOCK_ROWS = 256  # rows that are encoded together


@dataclass(frozen=True)
class EncodedRow:
    """One example. `input_ids` [T] int32, `loss_mask` [T] bool with at least one target, T >= 2.

    `key` names ids and mask, and nothing else: equal rows of other shards, with other ids or
    weights, have equal keys. `truncated`: tokens were cut off to fit `max_length`. `line`: where it stands
    in its shard, from 1. `token_weights` [T] float32: what each target counts besides the row's own weight; None where
    each counts 1.
    """

    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    key: str
    id: str | None
    weight: float
    truncated: bool
    line: int
    token_weights: NDArray[np.float32] | None = None

    @property
    def position_weights(self) -> NDArray[np.float32] | None:
        """The weights of the supervised positions, in their order."""
        return None if self.token_weights is None else self.token_weights[1:][self.loss_mask[1:]]


@dataclass(frozen=True)
class EncodedShard:
    """What became of a shard's rows; `n_truncated` counts among `rows`."""

    rows: tuple[EncodedRow, ...]
    bad_rows: tuple[BadRow, ...]
    n_without_target: int
    n_truncated: int

    @property
    def has_position_weights(self) -> bool:
        return any(row.token_weights is not None for row in self.rows)


def row_key(input_ids: NDArray[np.int32], loss_mask: NDArray[np.bool_]) -> str:
    """32 hexadecimal digits of SHA-256 over ids (int32) and mask (a byte each), little-endian."""
    mask_T = loss_mask.astype(np.uint8)
    mask_T[:1] = 0
    return hashlib.sha256(input_ids.astype("<i4").tobytes() + mask_T.tobytes()).hexdigest()[:32]


def supervised_positions(row: EncodedRow) -> NDArray[np.int32]:
    """Positions t whose next token is a target: `loss_mask[t + 1]`; ascending."""
    return np.flatnonzero(row.loss_mask[1:]).astype(np.int32)


def encoding_identity(data: DataSettings) -> dict[str, Any]:
    """What besides the tokenizer decides ids and masks, as JSON values."""
    return {"rules": ENCODING_RULES, "max_length": data.max_length, "supervise": data.supervise}


class Encoder:
    """Encodes rows with one tokenizer under one home's data settings. `n_real`: ids are below it.

    `text`, `prompt` + `completion`: what the tokenizer inserts in front of a text (BOS, or nothing),
    then each part encoded alone, then EOS unless the last part ends in it; a tokenizer without
    EOS ends nothing. Conversations: exactly what the chat template renders. `input_ids`: as given.
    A row longer than `max_length` is cut there and has no EOS of ours.

    Strings such as "<|im_end|>" inside a text become the special token, as in transformers: many
    data sets are rendered conversations and mean them. Clean untrusted text before.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataSettings, n_real: int) -> None:
        self._tokenizer = tokenizer
        self._data = data
        self.n_real = n_real
        self._front = inserted_ids(tokenizer)[0]
        self._eos = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]

    def of_imported(self) -> Encoder:
        """The same for a shard that was imported: its rows are what was imported, whatever `data.supervise` and
        `data.max_length` say now.
        """
        data = self._data.model_copy(update={"supervise": "completion", "max_length": sys.maxsize})
        return Encoder(self._tokenizer, data, self.n_real)

    @property
    def skips_bad_rows(self) -> bool:
        return self._data.on_bad_row == "skip"

    @cached_property
    def _chat(self) -> ChatEncoder:
        return ChatEncoder(self._tokenizer)

    @cached_property
    def ids_with_token(self) -> frozenset[int]:
        """The real ids: what a row, and a teacher's distribution, may hold."""
        return frozenset(i for i in self._tokenizer.get_vocab().values() if i < self.n_real)

    def encode(self, row: Row) -> EncodedRow | BadRow:
        """The row's ids and mask; the mask may be empty. ModelError: conversations cannot be encoded at all."""
        return self.encode_all([row])[0]

    def encode_all(self, rows: Sequence[Row]) -> list[EncodedRow | BadRow]:
        """Each of the rows as `encode` has it, sooner: to call a tokenizer costs more than to encode most texts."""
        tokenized = self._tokenize([text for row in rows for text in _texts(row.content)])
        return [self._encode(row, tokenized) for row in rows]

    def _encode(self, row: Row, tokenized: Mapping[str, Sequence[int]]) -> EncodedRow | BadRow:
        try:
            ids, mask, weights, truncated = self._ids_and_mask(row.content, tokenized)
        except (_BadIds, ChatProblem) as problem:
            return BadRow(row.line, str(problem))
        ids_T = np.array(ids, dtype=np.int32)
        mask_T = np.array(mask, dtype=bool)
        if self._data.supervise == "all":
            mask_T[:] = True
        mask_T[:1] = False
        key = row_key(ids_T, mask_T)
        return EncodedRow(ids_T, mask_T, key, row.id, row.weight, truncated, row.line, _other_than_one(weights, mask_T))

    def _ids_and_mask(
        self, content: Text | Completion | Chat | Ids, tokenized: Mapping[str, Sequence[int]]
    ) -> tuple[ArrayLike, ArrayLike, ArrayLike | None, bool]:
        longest = self._data.max_length
        match content:
            case Text(text):
                return self._with_ends([], tokenized[text])
            case Completion(prompt, completion):
                return self._with_ends(tokenized[prompt], tokenized[completion])
            case Chat(messages):
                return self._chat.encode(messages, longest, every=self._data.supervise == "all")
            case Ids(ids, given, weights):
                self._check(ids)
                mask = (True,) * len(ids) if given is None else given
                return ids[:longest], mask[:longest], weights and weights[:longest], len(ids) > longest

    def _with_ends(self, prompt: Sequence[int], target: Sequence[int]) -> tuple[ArrayLike, ArrayLike, None, bool]:
        longest = self._data.max_length
        end = [] if list(target[-1:]) == self._eos else self._eos
        ids = [*self._front, *prompt, *target, *end]
        truncated = len(ids) > longest
        n_unsupervised = len(self._front) + len(prompt)
        mask = [t >= n_unsupervised for t in range(min(len(ids), longest))]
        return ids[:longest], mask, None, truncated

    def _tokenize(self, texts: Sequence[str]) -> dict[str, Sequence[int]]:
        """Ids of each text, nothing inserted."""
        return dict(zip(texts, token_ids(self._tokenizer, texts), strict=True))

    def _check(self, ids: Sequence[int]) -> None:
        for i, value in enumerate(ids):
            if value >= self.n_real:
                raise _BadIds(f"input_ids[{i}] is {value}, but the teacher's ids end at {self.n_real - 1}")
            if value not in self.ids_with_token:
                raise _BadIds(f"input_ids[{i}] is {value}, an id the teacher's tokenizer has no token for")


def _other_than_one(weights: ArrayLike | None, mask_T: NDArray[np.bool_]) -> NDArray[np.float32] | None:
    """The weights of the targets, 1 elsewhere; None where all are 1, which is what no weights mean."""
    if weights is None:
        return None
    weights_T = np.where(mask_T, np.array(weights, dtype=np.float32), np.float32(1))
    return None if (weights_T == 1).all() else weights_T


class _BadIds(Exception):
    """Ids the teacher does not have."""


def _texts(content: Text | Completion | Chat | Ids) -> tuple[str, ...]:
    """What of a row is encoded as plain text."""
    match content:
        case Text(text):
            return (text,)
        case Completion(prompt, completion):
            return prompt, completion
        case _:
            return ()


def encoded_rows(shard: Shard, encoder: Encoder) -> Iterator[EncodedRow | BadRow]:
    """Read and encode every row of a shard, some at a time, bad ones and ones without a target among them.

    ShardError, at the end, when the file is no longer the version `shard` names; UnreadableFile when it is
    gone or damaged.
    """
    rows = read_rows(shard.path)
    while block := list(islice(rows, BLOCK_ROWS)):
        try:
            encoded = iter(encoder.encode_all([row for row in block if not isinstance(row, BadRow)]))
        except ModelError as error:
            raise ShardError(f"shard {shard.key} ({shard.path}): {error}") from error
        for row in block:
            yield row if isinstance(row, BadRow) else next(encoded)
    # A capture is filed under the version, so what was read must be what was hashed.
    if content_hash(shard.path) != shard.version:
        raise ShardError(f"shard {shard.key} ({shard.path}): the file changed since it was looked at; run again")


def encode_shard(shard: Shard, encoder: Encoder) -> EncodedShard:
    """Read and encode every row of a shard.

    Raises ShardError for a bad row (unless `on_bad_row` is skip), for a shard without a usable
    row, and when the file is no longer the version `shard` names; UnreadableFile when it is gone
    or damaged.
    """
    rows: list[EncodedRow] = []
    bad_rows: list[BadRow] = []
    n_without_target = 0
    for encoded in encoded_rows(shard, encoder):
        if isinstance(encoded, BadRow):
            bad_rows.append(encoded)
        elif encoded.loss_mask.any():
            rows.append(encoded)
        else:
            n_without_target += 1
    if bad_rows and not encoder.skips_bad_rows:
        raise ShardError(_bad_row_message(shard, bad_rows))
    if not rows:
        left_out = (
            f": {len(bad_rows)} bad, {n_without_target} without a target token" if bad_rows or n_without_target else ""
        )
        raise ShardError(
            f"shard {shard.key} ({shard.path}) has no rows to learn from{left_out}; add rows, or remove the file"
        )
    return EncodedShard(tuple(rows), tuple(bad_rows), n_without_target, sum(row.truncated for row in rows))


def place_in(shard: Shard, line: int) -> str:
    """`line 17`; Parquet has rows, not lines."""
    return f"{'row' if shard.path.suffix == '.parquet' else 'line'} {line}"


def describe_bad_row(shard: Shard, bad: BadRow) -> str:
    """`line 17: prompt without completion`"""
    return f"{place_in(shard, bad.line)}: {bad.reason}"


def _bad_row_message(shard: Shard, bad_rows: Sequence[BadRow]) -> str:
    more = len(bad_rows) - 1
    others = f" (and {counted(more, 'more bad row')})" if more else ""
    return (
        f"shard {shard.key} ({shard.path}) {describe_bad_row(shard, bad_rows[0])}{others}; "
        "mend it, or set data.on_bad_row: skip"
    )
