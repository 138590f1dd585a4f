"""Turn a file's frontmatter and lines into typed entries, with a parser for each kind."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import NamedTuple

from everos_engine.errors import quoted
from everos_engine.text.entries import Document, Entry, Place, Problem, entry
from everos_engine.text.frontmatter import Frontmatter
from everos_engine.text.kinds.tables import INLINE, KINDS, Field, Kind
from everos_engine.text.markdown import MAX_ENTRIES, Block, blocks, fields, headings
from everos_engine.text.terms import terms

_INT64 = 1 << 63
_MAX_OWNER_CHARACTERS = 255
"""The maximum length of the name of a folder. It is repeated in every row."""
_NULL = {"null", "None", "~"}
_WHOLE = re.compile(r"[-+]?[0-9]{1,19}")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_MAX_NUMBER_CHARACTERS = 400
"""The greatest float has 309 digits before its point."""
_ITEM = re.compile(
    r"""[ \t]*(?:"(?P<double>[^"\\]*(?:\\.[^"\\]*)*)"|'(?P<single>[^'\\]*(?:\\.[^'\\]*)*)'"""
    r"""|(?P<plain>(?!["'])[^,]*))[ \t]*(?:,|\Z)"""
)
_ESCAPE = re.compile(r"\\(.)")
_MAX_MILLISECOND = 253_402_300_799_999
"""The last millisecond of the year 9999, the last that a datetime can hold."""
_MAX_LINES = 5
_SHORT_CHARACTERS = 120


class _Heading(NamedTuple):
    level: int
    name: str
    short: str
    slug: str


class _BadValue(Exception):
    def __init__(self, message: str, place: tuple[int, int]) -> None:
        super().__init__(message)
        self.line, self.column = place


def daily(place: Place, front: Frontmatter, _references: Mapping[str, str]) -> Document:
    """Return the entries between markers.

    A repeated id is a problem of that id, and none of its entries is indexed.
    """
    found = blocks(front.body, front.first_line)
    warnings: list[Problem] = []
    folder, place = place.owner_id, _owned(place, front, warnings)
    lines: dict[str, list[int]] = {}
    for block in found:
        lines.setdefault(block.entry_id, []).append(block.line)
    entries: list[Entry] = []
    problems: list[Problem] = []
    for block in found:
        at = lines[block.entry_id]
        if len(at) > 1:
            if block.line == at[0]:
                more = f" and {len(at) - _MAX_LINES} more" if len(at) > _MAX_LINES else ""
                message = f"the id is used by the entries of lines {' and '.join(map(str, at[:_MAX_LINES]))}{more}"
                problems.append(Problem(block.entry_id, message, "give each entry an id of its own", block.line))
            continue
        try:
            entries.append(_daily_entry(place, block, warnings, folder=folder))
        except _BadValue as error:
            problems.append(Problem(block.entry_id, str(error), "correct the entry and save", error.line, error.column))
    return Document(tuple(entries), tuple(problems), tuple(warnings))


def _daily_entry(place: Place, block: Block, warnings: list[Problem], *, folder: str) -> Entry:
    kind = KINDS[place.kind]
    said = fields(block)
    owner, *at = said.inline.get("owner_id", ("", block.line, 1))
    is_named = bool(owner.strip()) and owner not in _NULL
    if is_named and len(owner) <= _MAX_OWNER_CHARACTERS:
        place = place._replace(owner_id=owner)
    values = _common(place, block.entry_id)
    for field in (*INLINE, *kind.inline):
        values[field.column] = _typed(field, said.inline.get(field.source), (block.line, 1))
    for field in kind.own:
        values[field.column] = _typed(field, said.sections.get(field.source), (block.line, 1), section=True)
    if is_named and owner != folder:
        warnings.append(_mismatch(place, "owner_id", owner, folder=folder, entry_id=block.entry_id, at=(at[0], at[1])))
    return _entry(place, block.entry_id, block.line, values)


def skill(place: Place, front: Frontmatter, references: Mapping[str, str]) -> Document:
    """Return one row per skill directory, named after it."""
    entry_id = place.md_path.split("/")[-2]
    warnings: list[Problem] = []
    place = _owned(place, front, warnings)
    values = _common(place, entry_id)
    try:
        _from_front(place, front, values)
    except _BadValue as error:
        return _one_problem(entry_id, error)
    values["content"] = "\n".join(front.body).strip("\n")
    values["references"] = "\n\n".join(f"{name}\n{text.strip()}" for name, text in references.items()) or None
    values["timestamp"] = values["updated_at"] or values["created_at"]
    return Document((_entry(place, entry_id, 1, values),), (), tuple(warnings))


def profile(place: Place, front: Frontmatter, _references: Mapping[str, str]) -> Document:
    """Return one row, ``profile``, from the frontmatter. The body is kept as content."""
    entry_id = "profile"
    warnings: list[Problem] = []
    place = _owned(place, front, warnings)
    values = _common(place, entry_id)
    try:
        _from_front(place, front, values)
        values["profile_timestamp"] = values["timestamp"] = _milliseconds(front)
    except _BadValue as error:
        return _one_problem(entry_id, error)
    for name in ("explicit_info", "implicit_traits"):
        found = front.values.get(name)
        values[name] = None if found is None else json.dumps(found, ensure_ascii=False, sort_keys=True)
    values["content"] = "\n".join(front.body).strip("\n")
    return Document((_entry(place, entry_id, 1, values),), (), tuple(warnings))


def note(place: Place, front: Frontmatter, _references: Mapping[str, str]) -> Document:
    """Return one row per heading section, named by its heading path.

    Text before the first heading is ``intro``. A row has its own heading in full and the ones above it in short, so
    that a long heading is not repeated with each heading below. After MAX_ENTRIES rows, further headings become text of
    the last row.
    """
    title = front.values.get("title")
    if not isinstance(title, str):
        title = place.md_path.rsplit("/", 1)[-1].removesuffix(".md")
    title = _short(title)  # it is repeated in every row
    used: dict[str, int] = {}
    entries: list[Entry] = []
    path: list[_Heading] = []
    start, gathered = front.first_line, list[str]()

    def close() -> None:
        content = "\n".join(gathered).strip()
        if not content and not path:
            return
        slug = "/".join(heading.slug for heading in path) or "intro"
        entry_id = slug
        while entry_id in used:
            used[slug] += 1
            entry_id = f"{slug}-{used[slug]}"
        used[entry_id] = 1
        values = _common(place, entry_id)
        values |= {"title": title, "content": content}
        values["heading"] = (
            " › ".join([*(above.short for above in path[:-1]), *(last.name for last in path[-1:])]) or None
        )
        entries.append(_entry(place, entry_id, start, values))

    for number, level, name, line in headings(front.body, front.first_line):
        if not level or len(entries) + 1 >= MAX_ENTRIES:
            gathered.append(line)
            continue
        close()
        path = [*(above for above in path if above.level < level), _Heading(level, name, _short(name), _slug(name))]
        start, gathered = number, []
    close()
    return Document(tuple(entries), ())


PARSERS: Mapping[str, Callable[[Place, Frontmatter, Mapping[str, str]], Document]] = {
    "episode": daily,
    "atomic_fact": daily,
    "foresight": daily,
    "agent_case": daily,
    "agent_skill": skill,
    "user_profile": profile,
    "note": note,
}


def _entry(place: Place, entry_id: str, line: int, values: dict[str, object]) -> Entry:
    kind = KINDS[place.kind]
    full = {name: values.get(name) for name in kind.columns}
    full["terms"] = terms(str(full[column]) for column in kind.text_columns if full[column])
    return entry(entry_id, line=line, values=full, embed_text=embed_text(kind, full))


def embed_text(kind: Kind, values: Mapping[str, object]) -> str:
    """Return the text of an entry, or of its row, that is embedded. It is empty if there is none."""
    text = "\n".join(str(values[column]) for column in kind.embed_columns if values[column])
    return text if text.strip() else ""


def _common(place: Place, entry_id: str) -> dict[str, object]:
    return {
        "id": f"{place.owner_id}_{entry_id}" if place.owner_id else entry_id,
        "app_id": place.app_id,
        "project_id": place.project_id,
        "owner_type": place.owner_type,
        "owner_id": place.owner_id,
    }


def _one_problem(entry_id: str, error: _BadValue) -> Document:
    return Document((), (Problem(entry_id, str(error), "correct the frontmatter and save", error.line, error.column),))


def _owned(place: Place, front: Frontmatter, warnings: list[Problem]) -> Place:
    """Return the place with the owner that the frontmatter names, or else with that of the folder."""
    name = f"{place.owner_type}_id"
    said, at = front.values.get(name), front.places.get(name, (1, 1))
    if said is None or (isinstance(said, str) and not said.strip()):
        return place
    if isinstance(said, bool) or not isinstance(said, (str, int)):
        shown = json.dumps(said, ensure_ascii=False, default=str)[:80]
        message = f"{name} must be text, not {shown}: the owner is the folder's, {place.owner_id!r}"
        warnings.append(Problem("", message, f"write `{name}: {place.owner_id}`", *at))
        return place
    folder, owner = place.owner_id, str(said)
    if len(owner) <= _MAX_OWNER_CHARACTERS:
        place = place._replace(owner_id=owner)
    if owner != folder:
        warnings.append(_mismatch(place, name, owner, folder=folder, entry_id="", at=at))
    return place


def _mismatch(place: Place, field: str, owner: str, *, folder: str, entry_id: str, at: tuple[int, int]) -> Problem:
    return Problem(
        entry_id,
        f"{field} {quoted(owner)} is not the folder's owner, {quoted(folder)}: "
        f"it is indexed under {quoted(place.owner_id)}",
        f"if the folder was renamed, write {quoted(folder)} here. "
        "If the file is in the wrong folder, move it to the owner's",
        *at,
    )


def _from_front(place: Place, front: Frontmatter, values: dict[str, object]) -> None:
    for field in KINDS[place.kind].own:
        found = front.values.get(field.source)
        values[field.column] = _from_yaml(field, found, front.places.get(field.source, (1, 1)))


def _from_yaml(field: Field, value: object, place: tuple[int, int]) -> object:
    if value is None:
        return _typed(field, None, place)
    if field.type == "strings":
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return value
        raise _BadValue(f"{field.source} must be a list of strings", place)
    if isinstance(value, (dict, list, bool)) or (field.type == "string" and not isinstance(value, str)):
        raise _BadValue(f"{field.source} must be a {field.type}, not {quoted(value)}", place)
    return _typed(field, (str(value), *place), place)


def _milliseconds(front: Frontmatter) -> datetime | None:
    value = front.values.get("profile_timestamp_ms")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_MILLISECOND:
        raise _BadValue(
            f"profile_timestamp_ms must be milliseconds since 1970, not {quoted(value)}",
            front.places.get("profile_timestamp_ms", (1, 1)),
        )
    return datetime.fromtimestamp(value // 1000, UTC).replace(microsecond=value % 1000 * 1000)


def _typed(
    field: Field, found: tuple[str, int, int] | None, entry_place: tuple[int, int], *, section: bool = False
) -> object:
    """Return the value of a field, or None if it is absent or null and may be."""
    text, *place = found or ("", *entry_place)
    if not text.strip() or (text in _NULL and not section):
        if field.required:
            raise _BadValue(
                f"`### {field.source}` is missing or empty" if section else f"{field.source} is missing or empty",
                (place[0], place[1]),
            )
        return None
    try:
        return _CONVERT[field.type](text)
    except (ValueError, OverflowError):
        raise _BadValue(
            f"{field.source} must be {_WANTED[field.type]}, not {quoted(text)}", (place[0], place[1])
        ) from None


def _timestamp(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def _float(text: str) -> float:
    if len(text) > _MAX_NUMBER_CHARACTERS or not _NUMBER.fullmatch(text):
        raise ValueError(text)
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _int(text: str) -> int:
    if not _WHOLE.fullmatch(text) or not -_INT64 <= int(text) < _INT64:
        raise ValueError(text)
    return int(text)


def _strings(text: str) -> list[str]:
    """Return the items of ``[a, "b, c", 'd']``, without their quotes. Empty ones are dropped."""
    if not (text.startswith("[") and text.endswith("]")):
        raise ValueError(text)
    items: list[str] = []
    at, end = 1, len(text) - 1
    while at < end:
        match = _ITEM.match(text, at, end)
        if match is None:
            raise ValueError(text)
        items.append(_ESCAPE.sub(r"\1", match["double"] or match["single"] or "") or (match["plain"] or "").strip())
        at = match.end()
    return [item for item in items if item]


_CONVERT: Mapping[str, Callable[[str], object]] = {
    "string": str,
    "int": _int,
    "float": _float,
    "timestamp": _timestamp,
    "strings": _strings,
}
_WANTED = {
    "string": "text",
    "int": "a whole number of at most 64 bits",
    "float": "a finite number",
    "timestamp": "an ISO 8601 time",
    "strings": "a list such as [a, b]",
}


def _short(text: str) -> str:
    return text if len(text) <= _SHORT_CHARACTERS else f"{text[: _SHORT_CHARACTERS - 1]}…"


def _slug(text: str) -> str:
    return re.sub(r"[^\w]+", "-", text.casefold()).strip("-")[:80] or "section"
