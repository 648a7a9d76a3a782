"""Lists said to have the same effect have it, on every text of a small alphabet."""

from __future__ import annotations

from itertools import product

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import models

from distill_assets.tokenizer_compatibility.merge_order import same_effect, telling_texts

TEXTS = ["".join(letters) for n in range(1, 8) for letters in product("abc", repeat=n)]


@st.composite
def merge_lists(draw: st.DrawFn) -> list[tuple[str, str]]:
    """Each merge joins letters or what earlier ones made."""
    tokens, merges = ["a", "b", "c"], []
    for _ in range(draw(st.integers(2, 5))):
        merge = draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))
        if merge not in merges:
            merges.append(merge)
            tokens.append("".join(merge))
    return merges


def tokenised(merges: list[tuple[str, str]]) -> list[list[str]]:
    tokens = dict.fromkeys(["a", "b", "c", *("".join(merge) for merge in merges)])
    model = models.BPE({token: i for i, token in enumerate(sorted(tokens))}, merges)
    return [[piece.value for piece in model.tokenize(text)] for text in TEXTS]


@settings(max_examples=60, deadline=None)
@given(merges=merge_lists(), data=st.data())
def test_what_is_proven_holds(merges: list[tuple[str, str]], data: st.DataObject) -> None:
    other = data.draw(st.permutations(merges))
    assume(other != merges)
    if same_effect(merges, other):
        assert tokenised(merges) == tokenised(other)


def test_what_can_be_proven_and_what_shows_the_rest() -> None:
    merges = [("a", "b"), ("b", "c"), ("c", "c"), ("ab", "c")]
    assert same_effect(merges, list(merges))
    assert same_effect([*merges[:1], *merges[2:]], [merges[2], merges[0], merges[3]])
    swapped = [merges[1], merges[0], *merges[2:]]
    assert not same_effect(merges, swapped) and "abc" in telling_texts(merges, swapped, 10)
    assert not same_effect(merges, merges[:-1]) and telling_texts(merges, merges[:-1], 10) == ["abc"]
    early = [("ab", "c"), ("a", "b")]  # a merge before what makes its part: nothing is proven of such lists
    assert not same_effect([*early, ("x", "y"), ("z", "z")], [*early, ("z", "z"), ("x", "y")])
