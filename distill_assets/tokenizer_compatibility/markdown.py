"""The tokenizer report as Markdown: the verdict, what was compared, and the evidence side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from distill_assets.tokenizer_compatibility.report import Probe, TokenizerReport


def as_markdown(report: TokenizerReport) -> str:
    """For people: the asset's page shows it."""
    teacher, student = report.teacher.name, report.student.name
    parts = [
        f"**{report.verdict}**" + ("" if report.usable else ": the pair cannot be used"),
        "\n".join(f"- {_cell(reason)}" for reason in report.reasons),
        _table(
            ("compared", "result", "found"),
            (
                (line.what, f"**{line.result}**" if line.result == "blocks" else line.result, line.found)
                for line in report.compared
            ),
        ),
    ]
    if first := report.first_difference:
        parts.append("The first id that differs:")
        sides = (first.teacher, first.teacher_bytes), (first.student, first.student_bytes)
        told = (("none", "") if token is None else (_code(token), hexed) for token, hexed in sides)
        row = (first.id, *(text for pair in told for text in pair))
        parts.append(_table(("id", teacher, "bytes", student, "bytes"), [row]))
    if report.probe:
        parts.append(f"A text that gets other ids: {_code(repr(report.probe.text))}")
        parts.append(_table((teacher, "id", student, "id"), _marked(report.probe)))
    return "\n\n".join(parts)


def side_by_side(probe: Probe) -> list[tuple[str, str, str, str]]:
    """Both segmentations, a token a line: teacher's token and id, student's token and id; "" where one has ended."""
    n = max(len(probe.teacher_ids), len(probe.student_ids))
    sides = [(probe.teacher_tokens, probe.teacher_ids), (probe.student_tokens, probe.student_ids)]
    columns = [[*map(str, values), *[""] * (n - len(values))] for tokens, ids in sides for values in (tokens, ids)]
    return [(a, b, c, d) for a, b, c, d in zip(*columns, strict=True)]


def _marked(probe: Probe) -> Iterable[tuple[str, str, str, str]]:
    return ((a and _code(a), b, c and _code(c), d) for a, b, c, d in side_by_side(probe))


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _code(text: str) -> str:
    return f"`` {text} ``" if "`" not in text else text


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", "\\n").replace("\r", "\\r")
