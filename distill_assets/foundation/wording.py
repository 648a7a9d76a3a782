"""Numbers of things in words."""


def counted(n: int, unit: str) -> str:
    """`1 step`, `2 steps`, `1,000 steps`, whether `unit` is given as one or as many."""
    return f"{n:,} {unit.removesuffix('s') if n == 1 else plural(unit)}"


def plural(unit: str) -> str:
    return unit.removesuffix("s") + "s"
