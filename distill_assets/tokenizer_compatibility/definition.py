"""What decides the ids of a text, taken from a fast backend's JSON, without what cannot matter.

Two tokenizers whose `Definition`s are equal give every text the same ids. The converse is not
promised: rules that differ here may still never show, and `equivalence` proves some of them harmless.
Each simplification below holds for every text, and says why.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Rule = dict[str, Any]
Merge = tuple[str, str]

BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
# The pattern that a ByteLevel pre-tokeniser splits by when it is not told to leave that to another.
_BYTE_LEVEL_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_FORMS = {"NFC": (False, "C"), "NFD": (False, "D"), "NFKC": (True, "C"), "NFKD": (True, "D")}
_IDEMPOTENT = frozenset(
    {"Lowercase", "StripAccents", "Strip", "Digits", "Whitespace", "WhitespaceSplit", "BertPreTokenizer"}
)
_DROP_BLANKS = frozenset({"Whitespace", "WhitespaceSplit", "BertPreTokenizer"})
_KEEP_BLANKS_APART = frozenset({"Lowercase", "NFC", "NFD", "BertNormalizer", "StripAccents"})


def _byte_alphabet() -> dict[str, int]:
    """Character -> the byte it stands for in byte-level vocabularies: printable ones themselves, others from U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()
_TO_BYTES = {ord(character): byte for character, byte in BYTE_ALPHABET.items()}


@dataclass(frozen=True)
class Spelling:
    """How a vocabulary writes bytes: what must be known to say what a token string stands for."""

    byte_level: bool
    byte_tokens: bool
    space: str | None
    continuation: str | None

    def bytes_of(self, token: str) -> bytes:
        """The bytes an ordinary token stands for; an added token stands for its own text."""
        if self.byte_level and all(character in BYTE_ALPHABET for character in token):
            return token.translate(_TO_BYTES).encode("latin-1")
        if self.byte_tokens and len(token) == 6 and token in BYTE_TOKENS:
            return bytes([int(token[3:5], 16)])
        if self.continuation:
            token = token.removeprefix(self.continuation)
        return (token.replace(self.space, " ") if self.space else token).encode("utf-8", "surrogatepass")


class Definition:
    """The parts of a backend's JSON that decide ids, each in one canonical form."""

    def __init__(self, state: Mapping[str, Any], split_special_tokens: bool = False) -> None:
        self._state = state
        self.split_special_tokens = split_special_tokens
        self.model_state: Rule = dict(state["model"])
        self.kind: str = self.model_state["type"]

    @cached_property
    def normalizer(self) -> list[Rule]:
        steps: list[Rule] = []
        for rule in flat(self._state["normalizer"], "normalizers"):
            step = _normalizer_step(rule)
            if step is None or (steps and step == steps[-1] and step["type"] in _IDEMPOTENT):
                continue
            if steps and {step["type"], steps[-1]["type"]} <= _FORMS.keys():
                # One form after another is the last one's composition, and compatibility if either had it.
                (before, _), (after, shape) = _FORMS[steps.pop()["type"]], _FORMS[step["type"]]
                step = {"type": f"NF{'K' if before or after else ''}{shape}"}
            steps.append(step)
        return steps

    @cached_property
    def pre_tokenizer(self) -> list[Rule]:
        steps: list[Rule] = []
        for rule in flat(self._state["pre_tokenizer"], "pretokenizers"):
            for step in _pre_tokenizer_steps(rule):
                if not (steps and step == steps[-1] and step["type"] in _IDEMPOTENT):
                    steps.append(step)
        return steps

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """The model's own, without added tokens it does not have itself."""
        given = self.model_state["vocab"]
        if isinstance(given, list):  # Unigram: [token, score] in the order of ids
            return {token: i for i, (token, _) in enumerate(given)}
        return dict(given)

    @cached_property
    def scores(self) -> dict[str, float]:
        """Of a Unigram model; {} for others."""
        given = self.model_state["vocab"]
        return {token: float(score) for token, score in given} if isinstance(given, list) else {}

    @cached_property
    def merges(self) -> list[Merge]:
        """BPE merges in the order of ranks; files write them as pairs or, earlier, as one string with a blank."""
        written = self.model_state.get("merges") or []
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in written)
        return [(left, right) for left, right in pairs]

    @cached_property
    def options(self) -> Rule:
        """Type and options of the model, without vocabulary, and without those that have no effect."""
        options = {key: value or None for key, value in self.model_state.items() if key not in ("vocab", "merges")}
        if self.kind == "Unigram":
            options["unk_id"] = self.model_state["unk_id"]
        if self.kind in ("BPE", "Unigram") and self.vocabulary.keys().isdisjoint(BYTE_TOKENS):
            options["byte_fallback"] = None  # there is no byte to fall back on
        if self.kind == "BPE":
            if self._never_unknown:
                options["unk_token"] = options["byte_fallback"] = None
            elif options["byte_fallback"] and self.vocabulary.keys() >= set(BYTE_TOKENS):
                options["unk_token"] = None
            if not options["unk_token"]:
                options["fuse_unk"] = None
        return options

    @property
    def draws(self) -> bool:
        """Whether merges are left out at random, so that a text gets other ids each time."""
        return bool(self.options.get("dropout"))

    @property
    def has_affixes(self) -> bool:
        return bool(self.model_state.get("continuing_subword_prefix") or self.model_state.get("end_of_word_suffix"))

    @property
    def _never_unknown(self) -> bool:
        """Whether the model is only ever given bytes, and has a token for each."""
        return (
            bool(self.pre_tokenizer)
            and self.pre_tokenizer[-1]["type"] == "ByteLevel"
            and not self.has_affixes
            and self.vocabulary.keys() >= BYTE_ALPHABET.keys()
        )

    @cached_property
    def spelling(self) -> Spelling:
        spaces = [s["replacement"] for s in self.pre_tokenizer if s["type"] == "Metaspace"] + [
            s["content"] for s in self.normalizer if s["type"] == "Replace" and s["pattern"] == {"String": " "}
        ]
        return Spelling(
            byte_level=any(step["type"] == "ByteLevel" for step in self.pre_tokenizer),
            byte_tokens=bool(self.options.get("byte_fallback")),
            space=spaces[0] if spaces else None,
            continuation=self.model_state.get("continuing_subword_prefix") if self.kind == "WordPiece" else None,
        )

    @property
    def literals(self) -> list[str]:
        """Texts that the rules themselves mention."""
        said = [
            text
            for step in (*self.normalizer, *self.pre_tokenizer)
            for text in (step.get("pattern", {}).get("String"), step.get("content"), step.get("prepend"))
        ]
        return [text for text in said if text]

    # added tokens ----------------------------------------------------------------------------

    @property
    def listed(self) -> list[Rule]:
        """Added tokens as the backend lists them."""
        return list(self._state["added_tokens"])

    @cached_property
    def idle_flags(self) -> frozenset[str]:
        """Flags of added tokens that have no effect here.

        `special` has one only where special tokens are not to be found in texts. `normalized` has none
        where nothing is normalised and no two contents can overlap, so that it does not matter which are
        looked for first. Stripping has none where blanks are dropped anyway.
        """
        idle = set() if self.split_special_tokens else {"special"}
        contents = [token["content"] for token in self.listed]
        bare = not any(token[flag] for token in self.listed for flag in ("lstrip", "rstrip", "single_word"))
        if bare and not self.normalizer and not _overlap(contents):
            idle.add("normalized")
        if self._drops_blanks and not any(character.isspace() for text in contents for character in text):
            idle |= {"lstrip", "rstrip"}
        return frozenset(idle)

    @property
    def _drops_blanks(self) -> bool:
        return (
            bool(self.pre_tokenizer)
            and self.pre_tokenizer[0]["type"] in _DROP_BLANKS
            and all(step["type"] in _KEEP_BLANKS_APART for step in self.normalizer)
        )

    @cached_property
    def hidden(self) -> frozenset[str]:
        """Added tokens whose text never reaches the model.

        Either it is always found before, and no rule can write it anew; or it has a capital, and all
        that the model is given is in small letters. What the model writes anew is told by its affixes.
        """
        found: set[str] = set()
        listed = [token for token in self.listed if not self._affixed(token["content"])]
        last = self.normalizer[-1] if self.normalizer else {"type": None}
        if last["type"] == "Lowercase" or (last["type"] == "BertNormalizer" and last["lowercase"]):
            found |= {token["content"] for token in listed if re.search("[A-Z]", token["content"])}
        written = [str(step.get("content") or step.get("prepend") or "") for step in self.normalizer]
        kinds = {step["type"] for step in self.normalizer}
        given_up = any(token["single_word"] for token in self.listed)  # with what lies within it
        if self.split_special_tokens or given_up or not kinds <= {"Prepend", "Replace"} or not all(written):
            return frozenset(found)
        written += [step["replacement"] for step in self.pre_tokenizer if step["type"] == "Metaspace"]
        return frozenset(found).union(
            token["content"]
            for token in listed
            if not (token["normalized"] and "Prepend" in kinds)  # it is looked for with what is put before it
            and all("!" <= character <= "~" for character in token["content"])
            and set("".join(written)).isdisjoint(token["content"])
        )

    def _affixed(self, token: str) -> bool:
        """Whether the model may make this token of a text that reads otherwise."""
        prefix, suffix = (self.model_state.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix"))
        return bool((prefix and token.startswith(prefix)) or (suffix and token.endswith(suffix)))

    def reachable(self, ignoring_merges: bool) -> Set[str]:
        """Tokens of the vocabulary that the model can answer with."""
        tokens = self.vocabulary.keys() - self.hidden
        if self.kind != "BPE" or ignoring_merges or self.has_affixes:
            return tokens
        made = {left + right for left, right in self.merges}
        others = {self.options["unk_token"], *(BYTE_TOKENS if self.options["byte_fallback"] else ())}
        return {token for token in self.vocabulary if len(token) == 1 or token in made or token in others}


def flat(rule: Rule | None, nested: str) -> list[Rule]:
    """The steps of a rule that may be none, one, or sequences within sequences."""
    if rule is None:
        return []
    if rule["type"] == "Sequence":
        return [step for inner in rule[nested] for step in flat(inner, nested)]
    return [rule]


def _normalizer_step(rule: Rule) -> Rule | None:
    """One step in canonical form; None when it changes no text."""
    if rule["type"] == "BertNormalizer":
        strips = rule["lowercase"] if rule["strip_accents"] is None else rule["strip_accents"]
        rule = {**rule, "strip_accents": strips}
        return rule if any(value is True for value in rule.values()) else None
    if rule["type"] == "Strip" and not (rule["strip_left"] or rule["strip_right"]):
        return None
    if rule["type"] == "Prepend" and not rule["prepend"]:
        return None
    if rule["type"] == "Replace":
        rule = {**rule, "pattern": _pattern(rule["pattern"])}
        return None if rule["pattern"] == {"String": rule["content"]} else rule
    return rule


def _pre_tokenizer_steps(rule: Rule) -> list[Rule]:
    if rule["type"] == "ByteLevel":
        rule = {key: value for key, value in rule.items() if key != "trim_offsets"}  # offsets are no ids
        if rule["use_regex"] and not rule["add_prefix_space"]:
            pattern = {"Regex": _BYTE_LEVEL_PATTERN}
            split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
            return [split, {**rule, "use_regex": False}]
    if rule["type"] == "Split":
        rule = {**rule, "pattern": _pattern(rule["pattern"])}
    return [rule]


def _pattern(pattern: Rule) -> Rule:
    """A regular expression without any operator is the string it says."""
    said = pattern.get("Regex")
    return {"String": said} if said and re.fullmatch(r"[\w <>▁]+", said) else pattern


def _overlap(contents: list[str]) -> bool:
    """Whether a piece of text can belong to two of them at once."""
    starts = {text[:n] for text in contents for n in range(1, len(text))}
    ends = {text[n:] for text in contents for n in range(1, len(text))}
    whole = set(contents)
    inside = any(
        text[a:b] in whole
        for text in contents
        for a in range(len(text))
        for b in range(a + 1, len(text) + 1)
        if b - a < len(text)
    )
    return inside or not starts.isdisjoint(ends)
