"""Split markdown into lines, code fences, entries, and sections."""

from __future__ import annotations

import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass

from everos_engine.errors import BadFile, quoted

MAX_ID_CHARACTERS = 200
MAX_ENTRIES = 20_000
"""The most entries of one file. A row takes many times the few bytes that an entry needs."""
_FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})")
_INLINE = re.compile(r"\*\*([A-Za-z_][A-Za-z0-9_]*)\*\*:[ \t]*(.*)\Z")
_HEADING = re.compile(r" {0,3}(#{1,6})(?=[ \t]|\Z)")
_SECTION_LEVEL = 3
_LINE_END = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True, slots=True)
class Block:
    """Hold the text between the markers of an entry. ``line`` is the 1-based line of the opening marker."""

    entry_id: str
    line: int
    lines: list[str]


@dataclass(frozen=True, slots=True)
class Fields:
    """Hold the inline values and the sections of an entry, each with the line and column of its start."""

    inline: dict[str, tuple[str, int, int]]
    sections: dict[str, tuple[str, int, int]]


def decode(data: bytes) -> list[str]:
    """Return the lines of a file, without their ends (LF, CRLF or CR) and without a BOM.

    Raises BadFile for bad UTF-8 and NUL.
    """
    data = data.removeprefix(BOM_UTF8)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line, column = _place(error.object[: error.start])  # `error.object` has no BOM
        raise BadFile(
            f"byte 0x{error.object[error.start]:02x} is not UTF-8",
            remedy="save the file as UTF-8",
            line=line,
            column=column,
        ) from None
    at = text.find("\0")
    if at >= 0:
        line, column = _place(text[:at].encode())
        raise BadFile(
            "there is a NUL byte", remedy="remove the NUL byte, or restore the file", line=line, column=column
        )
    return _LINE_END.split(text)


def outside_fences(lines: list[str], first_line: int) -> Iterator[tuple[int, str, int]]:
    """Yield (line number, line, line number of its code fence or 0) for each line.

    Fences follow CommonMark's rules.
    """
    fence, opened = "", 0
    for number, line in enumerate(lines, start=first_line):
        match = _FENCE.match(line)
        if not fence:
            if match:
                fence, opened = match[1], number
                yield number, line, number
            else:
                yield number, line, 0
        else:
            yield number, line, opened
            closing = line.strip(" \t")
            if len(line) - len(line.lstrip(" ")) <= 3 and len(closing) >= len(fence) and set(closing) == {fence[0]}:
                fence = ""


def blocks(lines: list[str], first_line: int) -> list[Block]:
    """Return the entries of a daily log.

    Text outside markers belongs to no entry. Raises BadFile for damaged markers.
    """
    found: list[Block] = []
    current: Block | None = None
    fence_inside = 0
    for number, line, fence in outside_fences(lines, first_line):
        marker = None if fence else _marker(line)
        if marker is None:
            if current is not None:
                current.lines.append(line)
                fence_inside = fence
            continue
        closing, entry_id = marker
        if not closing:
            if current is not None:
                raise BadFile(
                    f"entry {quoted(entry_id)} opens inside entry {quoted(current.entry_id)} of line {current.line}",
                    remedy=f"close it with `<!-- /entry:{current.entry_id} -->` first",
                    line=number,
                )
            if not entry_id or len(entry_id) > MAX_ID_CHARACTERS or not entry_id.isprintable():
                raise BadFile(
                    "the entry marker has no usable id",
                    remedy=f"give it 1 to {MAX_ID_CHARACTERS} printable characters",
                    line=number,
                )
            current = Block(entry_id, number, [])
        elif current is None or current.entry_id != entry_id:
            inside = (
                "no entry is open"
                if current is None
                else f"entry {quoted(current.entry_id)} of line {current.line} is open"
            )
            raise BadFile(
                f"a marker closes entry {quoted(entry_id)} but {inside}",
                remedy="make the opening and closing markers match",
                line=number,
            )
        else:
            if len(found) >= MAX_ENTRIES:
                raise BadFile(
                    f"there are more than {MAX_ENTRIES} entries in one file", remedy="split the file", line=current.line
                )
            found.append(current)
            current = None
    if current is not None:
        hint = f" (the code fence of line {fence_inside} is never closed)" if fence_inside else ""
        raise BadFile(
            f"entry {quoted(current.entry_id)} is never closed{hint}",
            remedy="close the code fence" if fence_inside else f"add `<!-- /entry:{current.entry_id} -->`",
            line=current.line,
        )
    return found


def _marker(line: str) -> tuple[bool, str] | None:
    """Return (whether it closes, entry id) of an entry marker that stands alone on a line, or None.

    The time is linear in the length of the line, which a regular expression would not guarantee.
    """
    text = line.strip(" \t")
    if not (text.startswith("<!--") and text.endswith("-->") and len(text) >= 7):
        return None
    inner = text[4:-3].strip(" \t")
    closing = inner.startswith("/")
    inner = inner[1:] if closing else inner
    return (closing, inner[len("entry:") :].strip()) if inner.startswith("entry:") else None


def _heading(line: str) -> tuple[int, str] | None:
    """Return (level, title) of an ATX heading without its closing sequence."""
    match = _HEADING.match(line)
    if match is None:
        return None
    title = line[match.end() :].strip(" \t")
    bare = title.rstrip("#")
    return len(match[1]), bare.rstrip(" \t") if not bare or bare[-1] in " \t" else title


def fields(block: Block) -> Fields:
    """Return the inline values and the sections of one entry.

    Inline values are ``**key**: value`` lines before the first section. A section starts with ``### Name``.
    """
    inline: dict[str, tuple[str, int, int]] = {}
    sections: dict[str, tuple[str, int, int]] = {}
    name, start, gathered = "", 0, list[str]()

    def close() -> None:
        if name and name not in sections:
            sections[name] = ("\n".join(gathered).strip("\n").rstrip(), start, 1)

    for number, line, fence in outside_fences(block.lines, block.line + 1):
        heading = None if fence or not line.startswith("###") else _heading(line)
        if heading and heading[0] == _SECTION_LEVEL and heading[1]:
            close()
            name, start, gathered = heading[1], number, []
        elif name:
            gathered.append(line)
        elif not fence:
            match = _INLINE.match(line)
            if match and match[1] not in inline:
                inline[match[1]] = (match[2].strip(), number, match.start(2) + 1)
    close()
    return Fields(inline, sections)


def headings(lines: list[str], first_line: int) -> Iterator[tuple[int, int, str, str]]:
    """Yield (line number, level, title, line) of each line outside fences.

    Level is 0 for a line that is not an ATX heading.
    """
    for number, line, fence in outside_fences(lines, first_line):
        heading = None if fence else _heading(line)
        yield (number, *heading, line) if heading else (number, 0, "", line)


def _place(before: bytes) -> tuple[int, int]:
    lines = _LINE_END.split(before.decode("utf-8", "replace"))
    return len(lines), len(lines[-1]) + 1
