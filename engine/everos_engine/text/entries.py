"""Define what markdown becomes: places, entries, problems, documents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

FORMAT_VERSION = 1


class Place(NamedTuple):
    """Describe a path.

    ``md_path`` is the key of the change. For a reference of a skill it is that of its SKILL.md.
    """

    md_path: str
    kind: str
    app_id: str
    project_id: str
    owner_type: str
    owner_id: str


@dataclass(frozen=True, slots=True)
class Problem:
    """Describe a bad entry.

    Its file is listed as failed, and its neighbours are indexed. ``line`` is 1-based.
    """

    entry_id: str
    message: str
    remedy: str
    line: int
    column: int | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """Hold one row to write.

    ``values`` has every column of the kind. An empty ``embed_text`` means no vector.
    """

    entry_id: str
    line: int
    values: Mapping[str, object]
    embed_text: str
    content_hash: bytes


@dataclass(frozen=True, slots=True)
class Document:
    """Hold the content of one file.

    What a warning names is indexed nevertheless. An empty entry id means the whole file.
    """

    entries: tuple[Entry, ...]
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...] = ()


def entry(entry_id: str, *, line: int, values: Mapping[str, object], embed_text: str) -> Entry:
    """Return an Entry with its content hash.

    Two hashes are equal exactly if the two rows are equal. The line number is not part of the hash.
    """
    facts = json.dumps([FORMAT_VERSION, sorted(values.items()), embed_text], default=_tagged, ensure_ascii=True)
    return Entry(entry_id, line, values, embed_text, hashlib.blake2b(facts.encode(), digest_size=16).digest())


def _tagged(value: object) -> object:
    if isinstance(value, datetime):
        return {"t": value.isoformat()}
    raise TypeError(type(value))
