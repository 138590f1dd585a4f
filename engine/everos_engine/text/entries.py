"""What markdown becomes: places, entries, problems, documents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

FORMAT_VERSION = 1


class Place(NamedTuple):
    """What a path says. ``md_path`` is the change's key: for a skill's reference, that of its SKILL.md."""

    md_path: str
    kind: str
    app_id: str
    project_id: str
    owner_type: str
    owner_id: str


@dataclass(frozen=True, slots=True)
class Problem:
    """One bad entry: its file is listed as failed, its neighbours are indexed. ``line`` is 1-based."""

    entry_id: str
    message: str
    remedy: str
    line: int
    column: int | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One row to be: ``values`` has every column of the kind; an empty ``embed_text`` means no vector."""

    entry_id: str
    line: int
    values: Mapping[str, object]
    embed_text: str
    content_hash: bytes


@dataclass(frozen=True, slots=True)
class Document:
    """All that one file holds. ``warnings`` name what is indexed all the same; an empty entry id means the whole file."""

    entries: tuple[Entry, ...]
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...] = ()


def entry(entry_id: str, *, line: int, values: Mapping[str, object], embed_text: str) -> Entry:
    """An Entry with its content hash: equal hashes exactly where the rows would be equal; the line is not covered."""
    facts = json.dumps([FORMAT_VERSION, sorted(values.items()), embed_text], default=_tagged, ensure_ascii=True)
    return Entry(entry_id, line, values, embed_text, hashlib.blake2b(facts.encode(), digest_size=16).digest())


def _tagged(value: object) -> object:
    if isinstance(value, datetime):
        return {"t": value.isoformat()}
    raise TypeError(type(value))
