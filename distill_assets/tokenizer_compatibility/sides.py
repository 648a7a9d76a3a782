"""Two loaded tokenizers side by side: what several comparisons need to know of them, found once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from distill_assets.foundation.errors import ModelError
from distill_assets.foundation.inserted_ids import token_ids
from distill_assets.tokenizer_compatibility.definition import Definition, Merge, Spelling
from distill_assets.tokenizer_compatibility.equivalence import Comparison, Open
from distill_assets.tokenizer_compatibility.fingerprint import backend_state
from distill_assets.tokenizer_compatibility.merge_order import telling_texts
from distill_assets.tokenizer_compatibility.probes import PROBES, each_character, in_context, shortest, side_by_side
from distill_assets.tokenizer_compatibility.report import NO_IDS, Probe, TokenDifference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TRIED = 500  # differing ids, and merges of each kind, whose text is tried as a probe
_AT_ONCE = 20_000  # of the tokens that are tried as texts of their own
_ILLUSTRATING = 100_000  # of those, where no text could make the verdict better
_DECODED = 300  # texts that are decoded again
_PLAIN = Spelling(byte_level=False, byte_tokens=False, space=None, continuation=None)


@dataclass(frozen=True)
class TokenizerSide:
    """One side of a comparison. `head_width`: rows of the model's output head, `tied` whether it is the
    input embedding too; None where that is not known.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    head_width: int | None
    tied: bool | None = None

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Token -> id."""
        return self.tokenizer.get_vocab()

    @cached_property
    def tokens(self) -> dict[int, str]:
        """Id -> token, of every id that has one; the added one where two share it, as when ids are decoded."""
        return {i: token for token, i in self.vocabulary.items()} | self.added

    @cached_property
    def n_real(self) -> int:
        return max(self.tokens) + 1

    @cached_property
    def state(self) -> dict[str, Any]:
        return backend_state(self.tokenizer)

    @cached_property
    def definition(self) -> Definition | None:
        """The rules; None for a tokenizer that has them, or some of them, in code of its class."""
        from transformers import PreTrainedTokenizerFast

        kind = type(self.tokenizer)
        own = [name for name in ("__call__", "_encode_plus") if getattr(kind, name) != _inherited(name)]
        if not isinstance(self.tokenizer, PreTrainedTokenizerFast) or own:
            return None
        return Definition(self.state, bool(self.tokenizer.split_special_tokens))

    @cached_property
    def added(self) -> dict[int, str]:
        """Id -> text of added tokens."""
        return {i: token.content for i, token in self.tokenizer.added_tokens_decoder.items()}

    @property
    def spelling(self) -> Spelling:
        """How its vocabulary writes bytes; for rules in code not known, and taken to be as text."""
        return self.definition.spelling if self.definition else _PLAIN

    def bytes_of(self, i: int) -> bytes:
        """What an id stands for in a text."""
        return self.added[i].encode() if i in self.added else self.spelling.bytes_of(self.tokens[i])

    def named(self, ids: Sequence[int]) -> tuple[str, ...]:
        """The tokens of what `encode` gave."""
        return tuple("(cannot be encoded)" if i in NO_IDS else self.tokens[i] for i in ids)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without inserted ones; `NO_IDS` of one that it fails on, as where no token stands for
        what is unknown.
        """
        try:
            return token_ids(self.tokenizer, texts)
        except ModelError:
            return [[*NO_IDS]] if len(texts) == 1 else [ids for text in texts for ids in self.encode([text])]


def _inherited(name: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return getattr(PreTrainedTokenizerFast, name)


@dataclass(frozen=True)
class Pair:
    """Two sides, and what several comparisons need to know of both."""

    teacher: TokenizerSide
    student: TokenizerSide
    extra_probes: Sequence[str] = ()

    # ids -------------------------------------------------------------------------------------

    @cached_property
    def conflicts(self) -> tuple[int, ...]:
        """Ids whose tokens are not the same, or do not stand for the same bytes, ascending; and those of one side whose
        token the other has under another id.
        """
        teacher, student = self.teacher, self.student
        alike = self.rules is None or teacher.spelling == student.spelling
        differing = {
            i
            for i in teacher.tokens.keys() & student.tokens.keys()
            if teacher.tokens[i] != student.tokens[i] or not (alike or teacher.bytes_of(i) == student.bytes_of(i))
        }
        return tuple(sorted(differing.union(*self._moved)))

    @cached_property
    def _moved(self) -> list[tuple[int, int]]:
        """The two ids of each token that is not where the other side has it."""
        teacher, student = self.teacher.vocabulary, self.student.vocabulary
        if teacher == student:
            return []
        return [(i, student[token]) for token, i in teacher.items() if student.get(token, i) != i]

    @cached_property
    def missing(self) -> tuple[int, ...]:
        """Ids the student lacks, ascending."""
        return tuple(sorted(self.teacher.tokens.keys() - self.student.tokens.keys()))

    @cached_property
    def extra(self) -> tuple[int, ...]:
        """Ids the teacher lacks, ascending."""
        return tuple(sorted(self.student.tokens.keys() - self.teacher.tokens.keys()))

    @cached_property
    def first_difference(self) -> TokenDifference | None:
        if not self.conflicts:
            return None
        i = self.conflicts[0]
        sides = self.teacher, self.student
        teacher, student = (side.tokens.get(i) for side in sides)
        teacher_bytes, student_bytes = (side.bytes_of(i).hex() if i in side.tokens else None for side in sides)
        return TokenDifference(i, teacher, student, teacher_bytes, student_bytes)

    # rules -----------------------------------------------------------------------------------

    @cached_property
    def rules(self) -> Comparison | None:
        """The two definitions; None where a side has none to compare."""
        teacher, student = self.teacher.definition, self.student.definition
        if teacher is None or student is None:
            return None
        return Comparison(teacher, student, self.teacher.tokens.keys() & self.student.tokens.keys())

    @cached_property
    def open_parts(self) -> tuple[Open, ...]:
        """Rules that differ and are not shown to be the same in effect."""
        return self.rules.open_parts() if self.rules else ()

    @property
    def draw(self) -> list[str]:
        """The sides that give a text other ids each time."""
        sides = {"teacher": self.teacher, "student": self.student}
        return [name for name, side in sides.items() if side.definition and side.definition.draws]

    # texts -----------------------------------------------------------------------------------

    @cached_property
    def probe(self) -> Probe | None:
        """A short text that gets different ids, of all that were tried; None when there is none, or chance decides."""
        if self.draw:
            return None
        differing = [text for text, teacher, student in self.encoded if self._disagree(teacher, student)]
        if not differing:
            return None
        text = min((shortest(text, self._differs) for text in sorted(differing, key=len)[:5]), key=len)
        [teacher], [student] = self.teacher.encode([text]), self.student.encode([text])
        return Probe(text, tuple(teacher), self.teacher.named(teacher), tuple(student), self.student.named(student))

    @cached_property
    def encoded(self) -> list[tuple[str, list[int], list[int]]]:
        """(text, teacher's ids, student's ids) of all that was tried.

        Where rules are open, or in code, and the texts at hand show no difference, many more are tried, until
        some show one.
        """
        encoded = self._encode(self._texts_at_hand())
        if self._shows_a_difference(encoded):
            return encoded
        if self.open_parts or (self.rules is None and not self._same_code):
            for texts in self._many_texts():
                more = self._encode(texts)
                encoded += more
                if self._shows_a_difference(more):
                    break
        return encoded

    @cached_property
    def decoded(self) -> tuple[list[int], str, str] | None:
        """Ids that the two sides turn into other texts, of those that texts get on both; None when there are none."""
        differing = {*self.conflicts, *NO_IDS}
        for _, ids, other in self.encoded[:_DECODED]:
            if ids == other and differing.isdisjoint(ids):
                teacher, student = (str(side.tokenizer.decode(ids)) for side in (self.teacher, self.student))
                if teacher != student:
                    return ids, teacher, student
        return None

    def _shows_a_difference(self, encoded: Sequence[tuple[str, list[int], list[int]]]) -> bool:
        return any(self._disagree(teacher, student) for _, teacher, student in encoded)

    @property
    def _same_code(self) -> bool:
        """One class with one vocabulary and the same options."""
        teacher, student = self.teacher, self.student
        return (
            type(teacher.tokenizer) is type(student.tokenizer)
            and teacher.tokens == student.tokens
            and teacher.tokenizer.init_kwargs == student.tokenizer.init_kwargs
        )

    def _encode(self, texts: list[str]) -> list[tuple[str, list[int], list[int]]]:
        return list(zip(texts, self.teacher.encode(texts), self.student.encode(texts), strict=True))

    def _texts_at_hand(self) -> list[str]:
        """The corpus, added tokens of either side in context, and what the differences themselves suggest."""
        added = sorted({*self.teacher.added.values(), *self.student.added.values()})
        suspects = [self.teacher.bytes_of(i) for i in self.conflicts[:_TRIED] if i in self.teacher.tokens]
        suspects += [self.teacher.spelling.bytes_of(token) for token in self._told_by_models()]
        plain = [text for token in suspects if (text := token.decode("utf-8", "ignore"))]
        known = [d for d in (self.teacher.definition, self.student.definition) if d and self.open_parts]
        literals = [text for definition in known for text in definition.literals]
        in_words = [text for token in plain for text in (token, f"a{token}", f"a {token}")]
        return list(dict.fromkeys([*PROBES, *self.extra_probes, *in_context([*added, *literals]), *in_words]))

    def _told_by_models(self) -> list[str]:
        """Tokens that the models' differences have to do with, if these are open."""
        if self.rules is None or not any(part.part == "merges" for part in self.open_parts):
            return []
        alone = self.rules.teacher.vocabulary.keys() ^ self.rules.student.vocabulary.keys()
        teacher, student = (self._merges(side) for side in (self.teacher, self.student))
        told = [] if teacher == student else telling_texts(teacher, student, _TRIED)
        return [*told, *sorted(alone)[:_TRIED]]

    def _merges(self, side: TokenizerSide) -> list[Merge]:
        return self.rules.merges(side.definition) if self.rules and side.definition else []

    def _many_texts(self) -> Iterator[list[str]]:
        """Every character, tokens beside each other, and tokens, some thousands at a time: every one where texts
        decide, and where they only illustrate what blocks anyway, enough of a large vocabulary.
        """
        yield list(each_character())
        step = 1 if self.rules is None else 1 + len(self.teacher.tokens) // _ILLUSTRATING
        ids = sorted(self.teacher.tokens)[::step]
        tokens = [self.teacher.bytes_of(i).decode("utf-8", "ignore") for i in ids]
        yield side_by_side(tokens)
        for start in range(0, len(tokens), _AT_ONCE):
            yield tokens[start : start + _AT_ONCE]

    def _differs(self, text: str) -> bool:
        [teacher], [student] = self.teacher.encode([text]), self.student.encode([text])
        return self._disagree(teacher, student)

    def _disagree(self, teacher: Sequence[int], student: Sequence[int]) -> bool:
        """Different ids, and not merely because one side uses an id that the other lacks."""
        return teacher != student and self._unshared.isdisjoint(teacher) and self._unshared.isdisjoint(student)

    @cached_property
    def _unshared(self) -> frozenset[int]:
        return (frozenset(self.missing) | frozenset(self.extra)) - frozenset(self.conflicts)
