"""Find which known name a mistyped one was meant to be."""

from __future__ import annotations

from collections.abc import Iterable

MAX_EDITS = 2
CHARACTERS_PER_EDIT = 4
"""A name of 4 characters may differ in one. ``PORT`` is not a slip for ``ROOT``."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that ``name`` is a slip for, or None.

    A slip is one or two edits, or a name of two words or more that only lacks its end, such as the unit.
    """
    found = [(_edits(name, candidate), candidate) for candidate in known]
    edits, best = min(found, default=(MAX_EDITS + 1, ""))
    if edits <= min(MAX_EDITS, len(name) // CHARACTERS_PER_EDIT):
        return best
    longer = [candidate for _, candidate in found if "_" in name and candidate.startswith(f"{name}_")]
    return min(longer, default=None)


def _edits(one: str, other: str) -> int:
    """Return the edit distance, or more than MAX_EDITS if the lengths alone say so."""
    if abs(len(one) - len(other)) > MAX_EDITS:
        return MAX_EDITS + 1
    row = list(range(len(other) + 1))
    for at, letter in enumerate(one, 1):
        before, row[0] = row[0], at
        for nth, its in enumerate(other, 1):
            before, row[nth] = row[nth], min(row[nth] + 1, row[nth - 1] + 1, before + (letter != its))
    return row[-1]
