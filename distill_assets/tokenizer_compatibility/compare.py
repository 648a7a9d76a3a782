"""Two tokenizers and heads -> a verdict. The room's door: what other rooms need is named in `__all__`."""

from __future__ import annotations

from collections.abc import Sequence

from distill_assets.foundation.errors import SettingsError
from distill_assets.tokenizer_compatibility.differences import COMPARISONS, HEAD_COMPARISONS
from distill_assets.tokenizer_compatibility.report import (
    UNACCEPTABLE,
    Difference,
    SideSummary,
    TokenizerReport,
    Verdict,
    require_compatible,
)
from distill_assets.tokenizer_compatibility.sides import Pair, TokenizerSide

__all__ = ["TokenizerReport", "TokenizerSide", "compare_tokenizers", "inherited_report", "require_compatible"]


def compare_tokenizers(
    teacher: TokenizerSide,
    student: TokenizerSide,
    accept: Sequence[str] = (),
    extra_probes: Sequence[str] = (),
) -> TokenizerReport:
    """Compare as loaded: every id, the rules, what the probe corpus becomes, heads.

    `incompatible`: an id means different tokens, a text gets different ids, or a head is narrower
    than its tokenizer. `subset`: one side has ids the other lacks, all others agree. `padded`: only
    the heads' widths differ. `identical`: nothing of these. `extra_probes` are texts of the user's
    own data. Raises SettingsError for a name in `accept` that no difference has.
    """
    acceptable = [name for name in COMPARISONS if name not in UNACCEPTABLE]
    for name in accept:
        if name not in acceptable:
            raise SettingsError(
                f"tokenizer.accept: {name} is no difference that can be accepted; known are {', '.join(acceptable)}"
            )
    pair = Pair(teacher, student, extra_probes)
    found = [compare(pair) for compare in COMPARISONS.values()]
    differences = tuple(difference for difference in found if difference is not None)
    return TokenizerReport(
        verdict=_verdict(differences),
        reasons=_reasons(differences, pair, f"all {len(teacher.tokens)} ids and {len(pair.texts)} texts agree"),
        differences=differences,
        first_difference=pair.first_difference,
        probe=pair.probe,
        missing_ids=pair.missing,
        accepted=tuple(d.name for d in differences if d.blocking and d.name in accept),
        teacher=_summary(teacher),
        student=_summary(student),
    )


def inherited_report(teacher: TokenizerSide, student_head_width: int) -> TokenizerReport:
    """The report of a student that has the teacher's tokenizer by construction: only heads are compared."""
    student = TokenizerSide("made from the teacher or a config", teacher.tokenizer, student_head_width)
    pair = Pair(teacher, student)
    found = [COMPARISONS[name](pair) for name in HEAD_COMPARISONS]
    differences = tuple(difference for difference in found if difference is not None)
    return TokenizerReport(
        verdict=_verdict(differences),
        reasons=_reasons(differences, pair, "the student has the teacher's tokenizer"),
        differences=differences,
        first_difference=None,
        probe=None,
        missing_ids=(),
        accepted=(),
        teacher=_summary(teacher),
        student=_summary(student),
    )


def _verdict(differences: Sequence[Difference]) -> Verdict:
    names = {difference.name for difference in differences}
    if any(difference.blocking for difference in differences):
        return "incompatible"
    if names & {"missing_ids", "extra_ids"}:
        return "subset"
    return "padded" if "head_padding" in names else "identical"


def _reasons(differences: Sequence[Difference], pair: Pair, agreement: str) -> tuple[str, ...]:
    """Sentences behind the verdict; what is merely told stands in the differences."""
    decisive = {"missing_ids", "extra_ids", "head_padding"}
    reasons = [d.detail for d in differences if d.blocking] or [d.detail for d in differences if d.name in decisive]
    for side, name in ((pair.teacher, "teacher"), (pair.student, "student")):
        if side.head_width is None:
            reasons.append(f"the {name}'s head width is not known and was not compared")
    return tuple(reasons) if any(d.blocking or d.name in decisive for d in differences) else (agreement, *reasons)


def _summary(side: TokenizerSide) -> SideSummary:
    return SideSummary(side.name, side.n_real, side.head_width)
