"""The verdict on two tokenizers, with its evidence, as values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

from distill_assets.foundation.errors import IncompatibleTokenizers

Verdict = Literal["identical", "padded", "subset", "incompatible"]
Result = Literal["same", "blocks", "accepted", "noted", "not known"]

# A head without a row for an id computes nothing for it; no settings can take that on.
UNACCEPTABLE = ("teacher_head", "student_head")


@dataclass(frozen=True)
class Difference:
    """One kind of difference. `detail` is a sentence, `evidence` JSON values that show it."""

    name: str
    blocking: bool
    detail: str
    evidence: dict[str, Any]


# What a text that a tokenizer fails on becomes.
NO_IDS = (-1,)


@dataclass(frozen=True)
class TokenDifference:
    """An id, the token it is on each side, and the bytes that stands for in a text, hexadecimal; None where the
    side has no token for it, but the other's under another id.
    """

    id: int
    teacher: str | None
    student: str | None
    teacher_bytes: str | None
    student_bytes: str | None


@dataclass(frozen=True)
class Probe:
    """A text that the two sides encode differently: ids and tokens of each."""

    text: str
    teacher_ids: tuple[int, ...]
    teacher_tokens: tuple[str, ...]
    student_ids: tuple[int, ...]
    student_tokens: tuple[str, ...]


@dataclass(frozen=True)
class SideSummary:
    """`n_real`: one more than the largest id with a token. `head_width`, `tied` None: not known."""

    name: str
    n_real: int
    head_width: int | None
    tied: bool | None


@dataclass(frozen=True)
class Compared:
    """One thing that was looked at: what, how it came out, and what was found."""

    name: str
    what: str
    result: Result
    found: str


@dataclass(frozen=True)
class TokenizerReport:
    """What was found. `missing_ids` (ascending) have a token in the teacher and none in the student.
    `compared` is everything that was looked at, what agrees included.

    The verdict states facts; `usable` also counts what the user took on: `accepted` names the
    blocking differences found here that settings accept.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    compared: tuple[Compared, ...]
    differences: tuple[Difference, ...]
    first_difference: TokenDifference | None
    probe: Probe | None
    missing_ids: tuple[int, ...]
    accepted: tuple[str, ...]
    teacher: SideSummary
    student: SideSummary

    @property
    def unaccepted(self) -> tuple[Difference, ...]:
        """Differences that stand in the way."""
        return tuple(d for d in self.differences if d.blocking and d.name not in self.accepted)

    @property
    def usable(self) -> bool:
        return not self.unaccepted

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values; missing ids as a count and inclusive ranges."""
        return {
            "verdict": self.verdict,
            "usable": self.usable,
            "reasons": list(self.reasons),
            "compared": [asdict(line) for line in self.compared],
            "differences": [asdict(difference) for difference in self.differences],
            "first_difference": asdict(self.first_difference) if self.first_difference else None,
            "probe": _lists(asdict(self.probe)) if self.probe else None,
            "missing_ids": {"count": len(self.missing_ids), "ranges": ranges(self.missing_ids)},
            "accepted": list(self.accepted),
            "teacher": asdict(self.teacher),
            "student": asdict(self.student),
        }


def require_compatible(report: TokenizerReport) -> None:
    """Raise IncompatibleTokenizers, with the evidence, unless the pair can be used."""
    if report.usable:
        return
    blocking = report.unaccepted
    advice = "use a pair of one tokenizer family"
    names = [difference.name for difference in blocking]
    if not any(name in UNACCEPTABLE for name in names):
        advice += f", or take it on knowingly with tokenizer: {{accept: [{', '.join(names)}]}}"
    raise IncompatibleTokenizers(
        f"teacher {report.teacher.name} and student {report.student.name} are incompatible: "
        f"{'; '.join(difference.detail for difference in blocking)}; {advice}"
    )


def cut(value: object, length: int = 80) -> str:
    """A value as Python writes it, at most `length` characters."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def ranges(ids: tuple[int, ...]) -> list[list[int]]:
    """Ascending ids as inclusive [first, last] ranges."""
    if not ids:
        return []
    breaks = [i for i, (a, b) in enumerate(pairwise(ids), start=1) if b != a + 1]
    return [[ids[a], ids[b - 1]] for a, b in pairwise([0, *breaks, len(ids)])]


def _lists(values: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
