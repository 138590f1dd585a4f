"""Compare what a file says with what the index holds, and plan what must be written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from everos_engine.text.entries import Document, Entry


@dataclass(frozen=True, slots=True)
class Plan:
    """Hold the rows to write and the ids to delete."""

    upserts: tuple[Entry, ...]
    deletes: tuple[str, ...]
    unchanged: int


def plan(document: Document, known: Mapping[str, bytes]) -> Plan:
    """Return the smallest plan that makes the index hold ``document``.

    ``known`` is entry id -> content hash, or ``b""`` if the hash is unknown. A bad entry keeps its row.
    """
    upserts = tuple(entry for entry in document.entries if known.get(entry.entry_id) != entry.content_hash)
    said = {entry.entry_id for entry in document.entries} | {problem.entry_id for problem in document.problems}
    deletes = tuple(entry_id for entry_id in known if entry_id not in said)
    return Plan(upserts, deletes, len(document.entries) - len(upserts))
