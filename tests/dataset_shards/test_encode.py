from __future__ import annotations

import hashlib
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from distill_assets.dataset_shards.discover import Shard, discover_shards
from distill_assets.dataset_shards.encode import EncodedRow, Encoder, encode_shard, encoding_identity, row_key
from distill_assets.dataset_shards.rows import BadRow, Row, parse_row
from distill_assets.foundation.errors import ShardError
from distill_assets.foundation.fingerprints import HashCache
from distill_assets.foundation.settings import DataSettings
from distill_assets.foundation.tokenizers import TokenIds
from tests import tiny
from tests.dataset_shards.letters import BOS, BOT, END, EOS, NL, USER, A, B, C, D, letters


def encoder(*, bos: bool = False, n_real: int = 12, **data: Any) -> Encoder:
    return Encoder(letters(bos=bos), DataSettings(**data), n_real)


def encode(values: dict[str, Any], **options: Any) -> EncodedRow:
    row = parse_row(1, values)
    assert isinstance(row, Row)
    encoded = encoder(**options).encode(row)
    assert isinstance(encoded, EncodedRow)
    return encoded


TEXT = {"text": "abc"}
PAIR = {"prompt": "ab", "completion": "cd"}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
IDS = {"input_ids": [A, B, C]}
ALL: dict[str, Any] = {"supervise": "all"}


@pytest.mark.parametrize(
    ("values", "options", "ids", "mask", "truncated"),
    [
        (TEXT, {}, [A, B, C, EOS], [0, 1, 1, 1], False),
        (TEXT, {"bos": True}, [BOS, A, B, C, EOS], [0, 1, 1, 1, 1], False),
        ({"text": "ab</s>"}, {}, [A, B, EOS], [0, 1, 1], False),  # EOS is last already
        ({"text": "a</s>b"}, {}, [A, EOS, B, EOS], [0, 1, 1, 1], False),
        (TEXT, {"max_length": 4}, [A, B, C, EOS], [0, 1, 1, 1], False),
        (TEXT, {"max_length": 3}, [A, B, C], [0, 1, 1], True),  # only EOS was cut
        (TEXT, {"max_length": 2, "bos": True}, [BOS, A], [0, 1], True),
        (PAIR, {}, [A, B, C, D, EOS], [0, 0, 1, 1, 1], False),
        (PAIR, {"bos": True}, [BOS, A, B, C, D, EOS], [0, 0, 0, 1, 1, 1], False),
        (PAIR, {"bos": True, **ALL}, [BOS, A, B, C, D, EOS], [0, 1, 1, 1, 1, 1], False),
        (PAIR, {"max_length": 3}, [A, B, C], [0, 0, 1], True),
        (PAIR, {"max_length": 2}, [A, B], [0, 0], True),  # no target is left
        ({"prompt": "", "completion": "a"}, {}, [A, EOS], [0, 1], False),
        (CHAT, {}, [USER, NL, A, END, NL, BOT, NL, B, END, NL], [0, 0, 0, 0, 0, 0, 0, 1, 1, 0], False),
        (CHAT, {"bos": True, "max_length": 8}, [USER, NL, A, END, NL, BOT, NL, B], [0] * 7 + [1], True),
        (CHAT, ALL, [USER, NL, A, END, NL, BOT, NL, B, END, NL], [0] + [1] * 9, False),
        (IDS, {"bos": True}, [A, B, C], [0, 1, 1], False),
        (IDS, {"max_length": 2}, [A, B], [0, 1], True),
        ({**IDS, "loss_mask": [1, 0, 1]}, {}, [A, B, C], [0, 0, 1], False),
        ({**IDS, "loss_mask": [1, 0, 1]}, ALL, [A, B, C], [0, 1, 1], False),
        ({"input_ids": [A]}, {}, [A], [0], False),
    ],
)
def test_golden_encodings(
    values: dict[str, Any], options: dict[str, Any], ids: list[int], mask: list[int], truncated: bool
) -> None:
    row = encode(values, **options)
    assert row.input_ids.dtype == np.int32 and row.loss_mask.dtype == np.bool_
    assert row.input_ids.tolist() == ids
    assert row.loss_mask.astype(int).tolist() == mask
    assert row.truncated == truncated
    assert row.key == hashlib.sha256(struct.pack(f"<{len(ids)}i", *ids) + bytes(mask)).hexdigest()[:32]


@pytest.mark.parametrize(
    ("values", "options", "weights"),
    [
        ({**IDS, "token_weights": [5, 2, 0.5]}, {}, [1, 2, 0.5]),
        ({**IDS, "token_weights": [5, 2, 0.5]}, {"max_length": 2}, [1, 2]),
        ({**IDS, "loss_mask": [0, 0, 1], "token_weights": [5, 2, 0.5]}, {}, [1, 1, 0.5]),
        ({**IDS, "loss_mask": [0, 0, 1], "token_weights": [5, 2, 0.5]}, ALL, [1, 2, 0.5]),
        ({**IDS, "loss_mask": [0, 0, 1], "token_weights": [5, 2, 1]}, {}, None),
        ({"messages": [*CHAT["messages"][:1], {**CHAT["messages"][1], "weight": 0}]}, {}, [1] * 7 + [0, 0] + [1]),
        (CHAT, {}, None),
    ],
)
def test_weights_are_of_targets_and_change_no_key(
    values: dict[str, Any], options: dict[str, Any], weights: list[float] | None
) -> None:
    row = encode(values, **options)
    assert (None if row.token_weights is None else row.token_weights.tolist()) == weights
    without = {name: value for name, value in values.items() if name != "token_weights"}
    assert row.key == encode(without, **options).key
    if weights is not None and row.position_weights is not None:
        assert row.position_weights.tolist() == [w for w, m in zip(weights, row.loss_mask, strict=True) if m]


def test_a_tokenizer_without_eos_ends_nothing() -> None:
    tokenizer = letters()
    tokenizer.eos_token = None
    row = Encoder(tokenizer, DataSettings(), 12).encode(parse_row(1, TEXT))  # type: ignore[arg-type]
    assert isinstance(row, EncodedRow) and row.input_ids.tolist() == [A, B, C]


def test_prompt_and_completion_are_encoded_each_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer("the")["input_ids"]) < len(tokenizer("t")["input_ids"] + tokenizer("he")["input_ids"])
    row = Encoder(tokenizer, DataSettings(), 320).encode(
        parse_row(1, {"prompt": "t", "completion": "he"})  # type: ignore[arg-type]
    )
    assert isinstance(row, EncodedRow)
    expected = tokenizer("t")["input_ids"] + tokenizer("he")["input_ids"] + [tokenizer.eos_token_id]
    assert row.input_ids.tolist() == expected


@pytest.mark.parametrize(("ids", "reason"), [([A, 12], "input_ids[1] is 12"), ([2**40], "the teacher's ids end at 11")])
def test_ids_beyond_the_teachers(ids: list[int], reason: str) -> None:
    encoded = encoder().encode(parse_row(7, {"input_ids": ids}))  # type: ignore[arg-type]
    assert isinstance(encoded, BadRow)
    assert encoded.line == 7 and reason in encoded.reason


def test_an_id_without_a_token_is_refused() -> None:
    holey = letters(hole=True)
    n_real = TokenIds.of(holey).n_real
    encoded = Encoder(holey, DataSettings(), n_real).encode(parse_row(1, {"input_ids": [A, 12]}))  # type: ignore[arg-type]
    assert n_real == 14
    assert encoded == BadRow(1, "input_ids[1] is 12, an id the teacher's tokenizer has no token for")


ids_and_mask = st.integers(1, 8).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 11), min_size=n, max_size=n), st.lists(st.integers(0, 1), min_size=n, max_size=n)
    )
)
LETTERS = Encoder(letters(), DataSettings(), 12)


@settings(max_examples=60, deadline=None)
@given(a=ids_and_mask, b=ids_and_mask, weight=st.floats(0, 10), id_=st.none() | st.text(max_size=3))
def test_a_key_depends_on_ids_and_mask_alone(
    a: tuple[list[int], list[int]], b: tuple[list[int], list[int]], weight: float, id_: str | None
) -> None:
    def key(row: tuple[list[int], list[int]], **more: Any) -> str:
        encoded = LETTERS.encode(parse_row(1, {"input_ids": row[0], "loss_mask": row[1], **more}))  # type: ignore[arg-type]
        assert isinstance(encoded, EncodedRow)
        return encoded.key

    assert key(a) == key(a, weight=weight, id=id_)
    assert (key(a) == key(b)) == (a[0] == b[0] and a[1][1:] == b[1][1:])


def test_mask_of_the_first_token_does_not_count_and_is_not_changed() -> None:
    mask = np.array([True, True])
    ids = np.array([1, 2], dtype=np.int32)
    assert row_key(ids, mask) == row_key(ids, np.array([False, True]))
    assert mask.tolist() == [True, True]


def test_identity_is_what_changes_ids_or_masks() -> None:
    base = encoding_identity(DataSettings())
    assert base == {"rules": 1, "max_length": 2048, "supervise": "completion"}
    assert encoding_identity(DataSettings(on_bad_row="skip", shards="x/*", heldout=["y"], validation=["z"])) == base
    assert encoding_identity(DataSettings(max_length=5)) != base != encoding_identity(DataSettings(supervise="all"))


def shard(tmp_path: Path, content: str | bytes) -> Shard:
    file = tmp_path / "shards" / "s.jsonl"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    [found] = discover_shards(tmp_path, DataSettings(), HashCache(tmp_path / "hashes.json")).shards
    return found


def test_a_shard_of_all_kinds_with_counts(tmp_path: Path) -> None:
    path = tiny.write_jsonl(
        tmp_path / "shards" / "s.jsonl",
        [
            TEXT | {"id": 5, "weight": 0.5},
            PAIR,
            PAIR,
            CHAT,
            IDS,
            {"input_ids": [A]},
            {"input_ids": [A, B], "loss_mask": [1, 0]},
        ],
    )
    encoded = encode_shard(shard(tmp_path, path.read_bytes()), encoder(max_length=4))
    assert [row.input_ids.tolist() for row in encoded.rows] == [[A, B, C, EOS], [A, B, C, D], [A, B, C, D], [A, B, C]]
    assert encoded.rows[1].key == encoded.rows[2].key
    assert (encoded.rows[0].id, encoded.rows[0].weight) == ("5", 0.5)
    assert (encoded.n_without_target, encoded.n_truncated, encoded.bad_rows) == (3, 2, ())


BAD_LINES = (
    '{"text": "ab"}\n{"text": 1}\n\n{"input_ids": [1, 99]}\n{"messages": [{"role": "user", "content": "a"}]}\nx\n'
)


def test_a_bad_row_fails_the_shard_and_names_the_first(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"shard s .*line 2: text must be text, not a number \(and 2 more bad rows\)"):
        encode_shard(shard(tmp_path, BAD_LINES), encoder())


def test_bad_rows_are_listed_when_skipped(tmp_path: Path) -> None:
    encoded = encode_shard(shard(tmp_path, BAD_LINES), encoder(on_bad_row="skip"))
    assert [row.input_ids.tolist() for row in encoded.rows] == [[A, B, EOS]]
    assert [row.line for row in encoded.bad_rows] == [2, 4, 6]
    assert "ids end at 11" in encoded.bad_rows[1].reason
    assert encoded.n_without_target == 1


@pytest.mark.parametrize("content", ["", "\n\n", '{"input_ids": [6]}\n', "x\n"])
def test_a_shard_without_a_usable_row_is_an_error(tmp_path: Path, content: str) -> None:
    with pytest.raises(ShardError, match=r"shard s .*has no rows"):
        encode_shard(shard(tmp_path, content), encoder(on_bad_row="skip"))


def test_conversations_without_a_template_fail_whatever_bad_rows_do(tmp_path: Path) -> None:
    bare = Encoder(letters(chat_template=None), DataSettings(on_bad_row="skip"), 12)
    with pytest.raises(ShardError, match=r"shard s .*no chat template"):
        encode_shard(shard(tmp_path, '{"messages": [{"role": "user", "content": "a"}]}\n'), bare)


def test_a_file_that_changed_since_it_was_looked_at_is_not_filed_under_its_old_version(tmp_path: Path) -> None:
    seen = shard(tmp_path, '{"text": "ab"}\n')
    seen.path.write_text('{"text": "cd"}\n')
    with pytest.raises(ShardError, match="changed since"):
        encode_shard(seen, encoder())


def test_a_row_of_megabytes_is_cut_in_linear_time(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    found = shard(tmp_path, '{"text": "' + "a" * 1_000_000 + " the cat" * 125_000 + '"}\n')
    started = time.monotonic()
    [row] = encode_shard(found, Encoder(tokenizer, DataSettings(max_length=64), 320)).rows
    assert row.truncated and len(row.input_ids) == 64 and row.input_ids[-1] != tokenizer.eos_token_id
    assert time.monotonic() - started < 30  # a second or two; quadratic would be hours
