"""Numbers in lines for people: "1 shard", "15,248 sequences", "1 is missing", "2 are missing"."""

from __future__ import annotations

VERBS = {"is": "are", "has": "have", "was": "were", "does": "do"}
SINGULAR = {many: one for one, many in VERBS.items()}


def counted(number: int, what: str) -> str:
    """A number with the things that it counts: "1 document", "1,234 documents".

    what: one of them, a noun that may have words before it.
    """
    return f"{number:,} {plural(number, what)}"


def plural(number: float, what: str) -> str:
    """`what` as it stands behind a number: "document" behind 1, else "documents"; "is" or "are"."""
    if number == 1:
        return what
    if what in VERBS:
        return VERBS[what]
    if what.endswith("y") and what[-2:-1] not in tuple("aeiou"):
        return f"{what[:-1]}ies"
    return f"{what}es" if what.endswith("ch") else f"{what}s"
