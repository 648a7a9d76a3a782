"""Two loaded tokenizers side by side: what several comparisons need to know of them, found once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from distill_assets.tokenizer_compatibility.fingerprint import backend_state
from distill_assets.tokenizer_compatibility.probes import PROBES, in_context, shortest
from distill_assets.tokenizer_compatibility.report import Probe, TokenDifference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TRIED = 500  # differing ids and merges whose text is tried as a probe


@dataclass(frozen=True)
class TokenizerSide:
    """One side of a comparison. `head_width`: rows of the model's output head, None when not known."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    head_width: int | None

    @cached_property
    def tokens(self) -> dict[int, str]:
        """Id -> token, of every id that has one."""
        return {i: token for token, i in self.tokenizer.get_vocab().items()}

    @cached_property
    def n_real(self) -> int:
        return max(self.tokens) + 1

    @cached_property
    def state(self) -> dict[str, Any]:
        return backend_state(self.tokenizer)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without inserted ones."""
        encoded: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return encoded


@dataclass(frozen=True)
class Pair:
    """Two sides, and what several comparisons need to know of both."""

    teacher: TokenizerSide
    student: TokenizerSide
    extra_probes: Sequence[str] = ()

    @cached_property
    def conflicts(self) -> tuple[int, ...]:
        """Ids with a token on both sides that is not the same one, ascending."""
        student = self.student.tokens
        return tuple(sorted(i for i, token in self.teacher.tokens.items() if student.get(i, token) != token))

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
        first = self.conflicts[0]
        return TokenDifference(first, self.teacher.tokens[first], self.student.tokens[first])

    @cached_property
    def probe(self) -> Probe | None:
        """A short text that gets different ids, of all that were tried; None when there is none."""
        encoded = zip(self.texts, self.teacher.encode(self.texts), self.student.encode(self.texts), strict=True)
        differing = [text for text, teacher, student in encoded if self._disagree(teacher, student)]
        if not differing:
            return None
        text = shortest(min(differing, key=len), self._differs)
        [teacher], [student] = self.teacher.encode([text]), self.student.encode([text])
        return Probe(
            text,
            tuple(teacher),
            tuple(self.teacher.tokens[i] for i in teacher),
            tuple(student),
            tuple(self.student.tokens[i] for i in student),
        )

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """The corpus, added tokens of either side in context, and the texts of differing ids and merges."""
        added = {
            token.content
            for side in (self.teacher, self.student)
            for token in side.tokenizer.added_tokens_decoder.values()
        }
        suspects = [self.teacher.tokens[i] for i in self.conflicts[:_TRIED]]
        suspects += [left + right for left, right in self.differing_merges[:_TRIED]]
        plain = [str(self.teacher.tokenizer.convert_tokens_to_string([token])) for token in suspects]
        return tuple(dict.fromkeys([*PROBES, *self.extra_probes, *in_context(sorted(added)), *plain]))

    @cached_property
    def differing_merges(self) -> list[list[str]]:
        """BPE merges at whose rank the two lists disagree, of both sides, in the order of ranks."""
        teacher, student = (side.state.get("model", {}).get("merges") or [] for side in (self.teacher, self.student))
        if teacher == student:
            return []
        shared = min(len(teacher), len(student))
        differing = [merge for two in zip(teacher, student, strict=False) if two[0] != two[1] for merge in two]
        return [*differing, *teacher[shared:], *student[shared:]]

    def _differs(self, text: str) -> bool:
        [teacher], [student] = self.teacher.encode([text]), self.student.encode([text])
        return self._disagree(teacher, student)

    def _disagree(self, teacher: Sequence[int], student: Sequence[int]) -> bool:
        """Different ids, and not merely because one side uses an id that the other lacks."""
        return teacher != student and self._unshared.isdisjoint(teacher) and self._unshared.isdisjoint(student)

    @cached_property
    def _unshared(self) -> frozenset[int]:
        return frozenset(self.missing) | frozenset(self.extra)
