"""What the tokenizer check takes on a large vocabulary, once both sides are loaded.

A byte-level BPE of made-up words, as many ids as asked for, against itself and against copies of which
each differs in one thing. Seconds are of one comparison, both sides; the limit is 5 seconds a side.
"""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from workload import arguments, show

from distill_assets.tokenizer_compatibility.compare import TokenizerSide, compare_tokenizers
from distill_assets.tokenizer_compatibility.definition import BYTE_ALPHABET

State = dict[str, Any]
NEVER = {"type": "Replace", "pattern": {"Regex": "(?!)"}, "content": "x"}  # what matches nothing


def main() -> None:
    options = arguments(__doc__, ids=(int, 256_000, "ids of the vocabulary"))
    state = made_up(options.ids)
    changes: dict[str, Callable[[State], None]] = {
        "nothing": lambda state: None,
        "two merges that cannot meet swapped": swap_apart,
        "merges ignored": lambda state: state["model"].update(ignore_merges=True),
        "the last 1,000 ids dropped": drop_last,
        "two ids swapped": swap_ids,
        "a merge moved": move_merge,
        "NFC": lambda state: state.update(normalizer={"type": "NFC"}),
        "a rule that no text shows": lambda state: state.update(normalizer=NEVER),
    }
    results = []
    for name, change in changes.items():
        other = copy.deepcopy(state)
        change(other)
        sides = [TokenizerSide(side, loaded(given), None) for side, given in (("teacher", state), ("student", other))]
        began, cpu = time.perf_counter(), time.process_time()
        report = compare_tokenizers(*sides)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        results.append({"difference": name, "verdict": report.verdict, "seconds": seconds, "CPU seconds": cpu})
    show("tokenizer_check", results, options.json, ids=options.ids)


def made_up(n_ids: int) -> State:
    """The JSON of a BPE over bytes whose merges join what earlier ones made, at random."""
    choose = random.Random(0)
    tokens = list(BYTE_ALPHABET)
    letters = [letter for letter in tokens if letter.isascii() and letter.isalpha()] + ["\u0120"]
    parts, short, merges, known = list(letters), list(letters), [], set(tokens)
    while len(tokens) < n_ids:
        left, right = choose.choice(parts), choose.choice(short)
        if left + right in known or len(left + right) > 16 or "\u0120" in right:
            continue
        known.add(left + right)
        tokens.append(left + right)
        parts.append(left + right)
        if len(short) < 2000:
            short.append(left + right)
        merges.append([left, right])
    backend = Tokenizer.from_str(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None, "decoder": None,
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges},
    }))  # fmt: skip
    state: State = json.loads(backend.to_str())
    return state


def loaded(state: State) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))


def swap_apart(state: State) -> None:
    merges = state["model"]["merges"]
    place = next(i for i in range(len(merges) // 2, len(merges)) if not involved(merges[i]) & involved(merges[i + 1]))
    merges[place], merges[place + 1] = merges[place + 1], merges[place]


def involved(merge: list[str]) -> set[str]:
    return {*merge, "".join(merge)}


def drop_last(state: State) -> None:
    for merge in state["model"]["merges"][-1000:]:
        del state["model"]["vocab"]["".join(merge)]
    del state["model"]["merges"][-1000:]


def swap_ids(state: State) -> None:
    vocabulary = state["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def move_merge(state: State) -> None:
    merges = state["model"]["merges"]
    merges.append(merges.pop(50))


if __name__ == "__main__":
    main()
