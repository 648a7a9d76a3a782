"""Changes of a tokenizer's JSON: what another save, a careless fork or another conversion does to it.

Each takes a `State` and changes it in place, or returns a new one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.tokenizer_compatibility.families import Change, State

FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
BYTE_LEVEL_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_IN_THREES = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def setting(*path: Any) -> Change:
    """`setting("model", "dropout", 0.0)`: the last is the value, the others lead to its place."""

    def apply(state: State) -> None:
        *way, name, value = path
        place: Any = state
        for step in way:
            place = place[step]
        place[name] = value

    return apply


# written otherwise ---------------------------------------------------------------------------


def keys_backwards(state: State) -> State:
    """The order of keys in JSON, and of a vocabulary in it, means nothing."""

    def turned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: turned(value[key]) for key in reversed(list(value))}
        return [turned(item) for item in value] if isinstance(value, list) else value

    return turned(state)


def vocabulary_sorted(state: State) -> None:
    state["model"]["vocab"] = dict(sorted(state["model"]["vocab"].items()))


def merges_as_strings(state: State) -> None:
    """How versions before 0.20 of the library wrote them."""
    state["model"]["merges"] = [" ".join(merge) for merge in state["model"]["merges"]]


def listed_twice(state: State) -> None:
    state["added_tokens"].append(dict(state["added_tokens"][-1]))


def call_state(state: State) -> None:
    """What a call with truncation and padding leaves in the backend."""
    state["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    state["padding"] = {
        "strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "x",
    }  # fmt: skip


def in_sequences(name: str, nested: str) -> Change:
    """A rule wrapped in sequences, with an empty one beside it."""

    def apply(state: State) -> None:
        inner = [state[name]] if state[name] else []
        empty = {"type": "Sequence", nested: []}
        state[name] = {"type": "Sequence", nested: [{"type": "Sequence", nested: inner}, empty]}

    return apply


def split_written_out(state: State) -> None:
    split = {"type": "Split", "pattern": {"Regex": BYTE_LEVEL_PATTERN}, "behavior": "Isolated", "invert": False}
    state["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [split, {**state["pre_tokenizer"], "use_regex": False}],
    }


def space_as_regex(state: State) -> None:
    state["normalizer"]["normalizers"][1]["pattern"] = {"Regex": " "}


# rules ---------------------------------------------------------------------------------------


def normalizer_first(step: State) -> Change:
    def apply(state: State) -> None:
        after = [state["normalizer"]] if state["normalizer"] else []
        state["normalizer"] = {"type": "Sequence", "normalizers": [step, *after]} if after else step

    return apply


def normalizer_last(step: State) -> Change:
    def apply(state: State) -> None:
        state["normalizer"] = {"type": "Sequence", "normalizers": [state["normalizer"], step]}

    return apply


def pre_tokenizer_first(step: State) -> Change:
    def apply(state: State) -> None:
        after = [state["pre_tokenizer"]] if state["pre_tokenizer"] else []
        state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [step, *after]}

    return apply


def pattern(regex: str) -> Change:
    def apply(state: State) -> None:
        split_written_out(state)
        state["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": regex}

    return apply


def without_normalizer_step(index: int) -> Change:
    def apply(state: State) -> None:
        del state["normalizer"]["normalizers"][index]

    return apply


def insert(token: str) -> Change:
    """A post-processor that puts a token in front of every text."""

    def apply(state: State) -> None:
        i = next(t["id"] for t in state["added_tokens"] if t["content"] == token)
        first, second = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
        state["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": token, "type_id": 0}}, first],
            "pair": [first, second],
            "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]}},
        }

    return apply


# ids -----------------------------------------------------------------------------------------


def swap(first: str, second: str) -> Change:
    """Two tokens change ids."""

    def apply(state: State) -> None:
        vocabulary = state["model"]["vocab"]
        if isinstance(vocabulary, list):
            a, b = ([piece for piece, _ in vocabulary].index(token) for token in (first, second))
            vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
        else:
            vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]

    return apply


def shift_by_one(state: State) -> None:
    """A new special token after the others moves every ordinary token up by one id."""
    n = len(state["added_tokens"])
    vocabulary = state["model"]["vocab"]
    if isinstance(vocabulary, list):
        vocabulary.insert(n, ["<new>", 0.0])
    else:
        moved = {token: i + (i >= n) for token, i in vocabulary.items()}
        state["model"]["vocab"] = {**moved, "<new>": n}
    state["added_tokens"].append({"id": n, "content": "<new>", **FLAGS})


def rename(old: str, new: str) -> Change:
    """A token keeps its id and gets another name, wherever it is written."""

    def apply(state: State) -> None:
        for token in state["added_tokens"]:
            token["content"] = new if token["content"] == old else token["content"]
        vocabulary = state["model"]["vocab"]
        if isinstance(vocabulary, list):
            state["model"]["vocab"] = [[new if piece == old else piece, score] for piece, score in vocabulary]
        elif old in vocabulary:
            vocabulary[new] = vocabulary.pop(old)

    return apply


def append(token: str, score: float = -5.0) -> Change:
    """An ordinary token after the last one; a BPE cannot reach it unless a merge makes it."""

    def apply(state: State) -> None:
        vocabulary = state["model"]["vocab"]
        if isinstance(vocabulary, list):
            vocabulary.append([token, score])
        else:
            vocabulary[token] = max(vocabulary.values()) + 1

    return apply


def add_merged(left: str, right: str) -> Change:
    def apply(state: State) -> None:
        append(left + right)(state)
        state["model"]["merges"].append([left, right])

    return apply


def also_merged(left: str, right: str) -> Change:
    """Another merge that makes a token there is."""
    return lambda state: state["model"]["merges"].append([left, right])


def add_special(content: str, **flags: bool) -> Change:
    def apply(state: State) -> None:
        vocabulary = state["model"]["vocab"]
        own = range(len(vocabulary)) if isinstance(vocabulary, list) else vocabulary.values()
        taken = [*own, *(token["id"] for token in state["added_tokens"])]
        state["added_tokens"].append({"id": max(taken) + 1, "content": content, **FLAGS, **flags})

    return apply


def drop(token: str) -> Change:
    """A token goes, with every merge that makes or takes it."""

    def apply(state: State) -> None:
        model = state["model"]
        if isinstance(model["vocab"], list):
            model["vocab"] = [entry for entry in model["vocab"] if entry[0] != token]
        else:
            del model["vocab"][token]
        if "merges" in model:
            model["merges"] = [m for m in model["merges"] if token not in (*m, "".join(m))]

    return apply


def drop_last(n: int) -> Change:
    def apply(state: State) -> None:
        vocabulary = state["model"]["vocab"]
        names = [p for p, _ in vocabulary] if isinstance(vocabulary, list) else sorted(vocabulary, key=vocabulary.get)
        for token in names[-n:][::-1]:
            drop(token)(state)

    return apply


# merges and scores ---------------------------------------------------------------------------


def without_merge(left: str, right: str) -> Change:
    """The merge goes, its token stays."""
    return lambda state: state["model"]["merges"].remove([left, right])


def move_merge(left: str, right: str, place: int) -> Change:
    def apply(state: State) -> None:
        merges = state["model"]["merges"]
        merges.remove([left, right])
        merges.insert(place % (len(merges) + 1), [left, right])

    return apply


def merges_backwards(state: State) -> None:
    state["model"]["merges"].reverse()


def scores(change: Callable[[str, float], float]) -> Change:
    def apply(state: State) -> None:
        state["model"]["vocab"] = [[piece, change(piece, score)] for piece, score in state["model"]["vocab"]]

    return apply


# added tokens --------------------------------------------------------------------------------


def flag(content: str, name: str, value: bool = True) -> Change:
    def apply(state: State) -> None:
        next(token for token in state["added_tokens"] if token["content"] == content)[name] = value

    return apply


def not_added(content: str) -> Change:
    """An added token becomes an ordinary one of the same id."""

    def apply(state: State) -> None:
        state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] != content]

    return apply


def made_added(token: str) -> Change:
    """An ordinary token becomes an added one of the same id: found in texts before anything else."""

    def apply(state: State) -> None:
        vocabulary = state["model"]["vocab"]
        names = {p: i for i, (p, _) in enumerate(vocabulary)} if isinstance(vocabulary, list) else vocabulary
        state["added_tokens"].append({"id": names[token], "content": token, **FLAGS, "special": False})
        state["added_tokens"].sort(key=lambda entry: entry["id"])

    return apply
