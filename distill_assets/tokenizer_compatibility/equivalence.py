"""Whether two definitions give every text the same ids, as far as ids that both sides have go.

Each part is the same, or proven to be the same in effect, or open. Open does not mean that a text
exists which shows the difference, only that nothing here shows that none does.
"""

from __future__ import annotations

import json
from collections.abc import Set
from dataclasses import dataclass

from tokenizers import Tokenizer

from distill_assets.tokenizer_compatibility.definition import Definition, Merge
from distill_assets.tokenizer_compatibility.merge_order import same_effect


@dataclass(frozen=True)
class Open:
    """A part of the definitions whose difference may show in a text. `part` is the difference's name."""

    part: str
    what: str


class Comparison:
    """Two definitions and the ids both have, `shared`.

    A text in which one side uses an id that the other lacks is no matter of rules but of the `subset`.
    So of the vocabularies only what makes shared ids is compared; that nothing else can change where
    shared ids are used is shown for each kind of model at its place.
    """

    def __init__(self, teacher: Definition, student: Definition, shared: Set[int]) -> None:
        self.teacher, self.student, self.shared = teacher, student, shared

    def open_parts(self) -> tuple[Open, ...]:
        """What is not shown to be the same in effect, in the order of the pipeline."""
        found = []
        teacher, student = self.teacher, self.student
        if self._added(teacher) != self._added(student) or teacher.split_special_tokens != student.split_special_tokens:
            found.append(Open("added_tokens", "added tokens or their flags"))
        if teacher.normalizer != student.normalizer:
            found.append(Open("normalizer", "normalizers"))
        if teacher.pre_tokenizer != student.pre_tokenizer:
            found.append(Open("pre_tokenizer", "pre-tokenizers"))
        if what := self._open_model():
            found.append(Open("merges", " and ".join(what)))
        return tuple(found)

    def _added(self, side: Definition) -> dict[str, dict[str, object]]:
        """Those both sides have. Another hides nothing but itself, unless it may be found and then given up."""
        idle = self.teacher.idle_flags & self.student.idle_flags
        return {
            token["content"]: {key: value for key, value in token.items() if key not in idle}
            for token in side.listed
            if token["id"] in self.shared or token["single_word"]
        }

    def _open_model(self) -> list[str]:
        teacher, student = self.teacher, self.student
        if teacher.model_state == student.model_state:
            return []
        ours, theirs = dict(teacher.options), dict(student.options)
        ignoring = ours.get("ignore_merges"), theirs.get("ignore_merges")
        if ignoring[0] != ignoring[1] and all(
            _merges_make_every_token(side)
            for side, ignores in zip((teacher, student), ignoring, strict=True)
            if ignores
        ):
            ours["ignore_merges"] = theirs["ignore_merges"] = None
        found = [f"{name} of the model" for name in sorted(ours | theirs) if ours.get(name) != theirs.get(name)]
        ignores = bool(ours.get("ignore_merges") or theirs.get("ignore_merges"))
        tokens = [self._vocabulary(side, ignores) for side in (teacher, student)]
        if tokens[0] != tokens[1]:
            found.append("vocabularies")
        ours_merged, theirs_merged = self.merges(teacher), self.merges(student)
        affixes = teacher.has_affixes or student.has_affixes  # then what a merge makes is not its two parts joined
        if not (ours_merged == theirs_merged if affixes else same_effect(ours_merged, theirs_merged)):
            found.append("merges")
        if self._scores(teacher) != self._scores(student):
            found.append("scores")
        # A longest piece that one side lacks, and that the other cannot go on from, makes a whole word unknown.
        if teacher.kind == "WordPiece" and not all(self._goes_on(side) for side in (teacher, student)):
            found.append("pieces of words")
        return found

    def _vocabulary(self, side: Definition, ignores_merges: bool) -> dict[str, int]:
        reachable = side.reachable(ignores_merges)
        return {token: i for token, i in side.vocabulary.items() if i in self.shared and token in reachable}

    def merges(self, side: Definition) -> list[Merge]:
        """Those that make shared ids.

        A token is never taken apart again: a text without unshared ids is one in which no other merge was
        applied. (A merge of an unshared part that makes a shared id is not among the other side's: it differs.)
        """
        if side.has_affixes:
            return side.merges
        return [merge for merge in side.merges if side.vocabulary["".join(merge)] in self.shared]

    def _goes_on(self, side: Definition) -> bool:
        return self.shared >= set(side.vocabulary.values()) or _has_every_character(side, self.shared)

    def _scores(self, side: Definition) -> tuple[dict[str, float], float]:
        """Scores of shared pieces, and the least of all, by which the unknown is scored where it has a choice.

        The best of all ways is the best of the shared ones too if it is one of them.
        """
        if not side.scores:
            return {}, 0.0
        ids, hidden = side.vocabulary, side.hidden
        scores = {
            token: score for token, score in side.scores.items() if ids[token] in self.shared and token not in hidden
        }
        least = 0.0 if _has_every_character(side, self.shared) else min(side.scores.values())
        return scores, least


def _merges_make_every_token(side: Definition) -> bool:
    """Whether each token that can be a piece of text comes out of its own characters by merges alone.

    Then looking a piece up before merging it finds what merging it would have made.
    """
    state = {**side.model_state, "ignore_merges": False}
    bare = {"version": "1.0", "added_tokens": [], "model": state}
    rest = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    model = Tokenizer.from_str(json.dumps({**bare, **rest})).model
    return all(
        [piece.id for piece in model.tokenize(token)] == [i]
        for token, i in side.vocabulary.items()
        if token and token not in side.hidden
    )


def _has_every_character(side: Definition, shared: Set[int]) -> bool:
    """Whether each character of each piece is a shared piece, inside words and at their start where it occurs.

    Then which characters are unknown does not depend on the pieces around them.
    """
    prefix = side.options.get("continuing_subword_prefix") or ""
    pieces = {token for token, i in side.vocabulary.items() if i in shared}
    for token in side.vocabulary.keys() - side.hidden:
        inside = token.removeprefix(prefix)
        singles = [prefix + character for character in inside]
        if inside == token:
            singles[:1] = inside[:1]
        if not pieces.issuperset(singles):
            return False
    return True
