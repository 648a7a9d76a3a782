"""Two tokenizers and heads -> a verdict. The room's door: what other rooms need is named in `__all__`."""

from __future__ import annotations

from collections.abc import Sequence

from distill_assets.foundation.errors import SettingsError
from distill_assets.tokenizer_compatibility.differences import COMPARED, COMPARISONS, HEAD_COMPARISONS
from distill_assets.tokenizer_compatibility.report import (
    UNACCEPTABLE,
    Compared,
    Difference,
    Result,
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

    `incompatible`: an id means different tokens, a text gets different ids or the rules do not rule
    that out, or a head is narrower than its tokenizer. `subset`: one side has ids the other lacks, all
    others agree. `padded`: only the heads' widths differ. `identical`: nothing of these. `extra_probes`
    are texts of the user's own data. Raises SettingsError for a name in `accept` that no difference has.
    """
    acceptable = [name for name in COMPARISONS if name not in UNACCEPTABLE]
    for name in accept:
        if name not in acceptable:
            raise SettingsError(
                f"tokenizer.accept: {name} is no difference that can be accepted; known are {', '.join(acceptable)}"
            )
    pair = Pair(teacher, student, extra_probes)
    agreement = f"all {len(teacher.tokens)} ids and {len(pair.encoded)} texts agree"
    return _report(pair, list(COMPARISONS), agreement, accept)


def inherited_report(teacher: TokenizerSide, student_head_width: int) -> TokenizerReport:
    """The report of a student that has the teacher's tokenizer by construction: only heads are compared."""
    student = TokenizerSide("made from the teacher or a config", teacher.tokenizer, student_head_width)
    return _report(Pair(teacher, student), HEAD_COMPARISONS, "the student has the teacher's tokenizer")


def _report(pair: Pair, names: Sequence[str], agreement: str, accept: Sequence[str] = ()) -> TokenizerReport:
    found = {name: COMPARISONS[name](pair) for name in names}
    differences = tuple(difference for difference in found.values() if difference is not None)
    ids = "token_ids" in found
    return TokenizerReport(
        verdict=_verdict(differences),
        reasons=_reasons(differences, pair, agreement),
        compared=tuple(_compared(pair, name, difference, accept) for name, difference in found.items()),
        differences=differences,
        first_difference=pair.first_difference if ids else None,
        probe=pair.probe if ids else None,
        missing_ids=pair.missing if ids else (),
        accepted=tuple(d.name for d in differences if d.blocking and d.name in accept),
        teacher=_summary(pair.teacher),
        student=_summary(pair.student),
    )


def _compared(pair: Pair, name: str, difference: Difference | None, accept: Sequence[str]) -> Compared:
    what = COMPARED[COMPARISONS[name]]
    if difference:
        result: Result = ("accepted" if name in accept else "blocks") if difference.blocking else "noted"
        return Compared(name, what, result, difference.detail)
    if unknown := _unknown(pair, name):
        return Compared(name, what, "not known", unknown)
    return Compared(name, what, "same", _agreed(pair, name))


def _unknown(pair: Pair, name: str) -> str:
    sides = {"teacher": pair.teacher, "student": pair.student}
    if name in ("teacher_head", "student_head", "head_padding"):
        concerned = [side for side in sides if name in (f"{side}_head", "head_padding")]
        lacking = [side for side in concerned if sides[side].head_width is None]
        return f"no config.json says how wide the {' and the '.join(lacking)}'s head is" if lacking else ""
    if name == "tied_heads" and None in (pair.teacher.tied, pair.student.tied):
        return "not said by both configurations"
    if name in ("merges", "normalizer", "pre_tokenizer", "added_tokens") and pair.rules is None:
        return "in code"
    return ""


def _agreed(pair: Pair, name: str) -> str:
    """What there was to agree on, where that is a number."""
    if name == "token_ids":
        return f"{len(pair.teacher.tokens.keys() & pair.student.tokens.keys()):,} ids"
    if name == "segmentation":
        return f"{len(pair.encoded):,} texts"
    if name in ("teacher_head", "student_head"):
        side = pair.teacher if name == "teacher_head" else pair.student
        return f"{side.head_width:,} rows for {side.n_real:,} ids"
    return ""


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
    return SideSummary(side.name, side.n_real, side.head_width, side.tied)
