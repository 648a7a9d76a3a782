from __future__ import annotations

import unicodedata
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from distill_assets.tokenizer_compatibility.probes import PROBES, in_context, shortest
from distill_assets.tokenizer_compatibility.report import ranges


def test_the_corpus_holds_what_it_promises() -> None:
    together = "".join(PROBES)
    assert len(PROBES) == len(set(PROBES))
    for part in ("\x00", "\r\n", "\u200d", "<|im_start|>", "犬", "    ", "1234567890"):
        assert part in together
    assert any(unicodedata.normalize("NFC", text) != text for text in PROBES)
    assert any(unicodedata.normalize("NFD", text) != text == unicodedata.normalize("NFC", text) for text in PROBES)
    assert any(len(text.split()) == 1 and len(text) > 60 for text in PROBES)
    together.encode()


def test_tokens_in_context() -> None:
    assert in_context(["<x>"]) == ["<x>", "a<x>b", "a  <x>  b", "<x>", "<X>"]


@given(before=st.text("abc", max_size=40), after=st.text("abc", max_size=40))
def test_shortest_keeps_only_what_matters(before: str, after: str) -> None:
    assert shortest(f"{before}XY{after}", lambda text: "XY" in text) == "XY"


@given(st.sets(st.integers(0, 30)))
def test_ranges_hold_exactly_the_ids(ids: set[int]) -> None:
    found = ranges(tuple(sorted(ids)))
    assert {i for first, last in found for i in range(first, last + 1)} == ids
    assert all(a[1] + 1 < b[0] for a, b in pairwise(found))
