"""Recognise the versions of a table on disk: which one is the newest, and whether it holds the rows that we left.

Each commit to a LanceDB table writes one manifest, a file that is never changed again. Its content names the
transaction that made it by a random UUID, so the digest of its content is the identity of a version. Two tables that
went different ways from one backup have versions of the same numbers, and never of the same digests.

The order of a commit is: SQLite records the touched keys as unknown, LanceDB commits, SQLite records the new version
with its digest. A crash between the last two leaves a newer version that we do not recognise, although it is ours. It
is then treated like a foreign one: all keys and content hashes are compared with the ledger, and the unknown ones are
written again. The comparison reads three columns once, and embeds nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_NEWEST = (1 << 64) - 1
_TRANSACTION = re.compile(rb"\d+-[0-9a-f-]{36}\.txn")
_SAME_ROWS = frozenset({103, 104, 107})
"""Operations that change no row, by their field numbers in Lance's protobuf: CreateIndex, Rewrite, ReserveFragments."""
_LENGTH_DELIMITED = 2


class Version(NamedTuple):
    """A version of a table: its number, and the digest of its manifest, empty if it was not recorded."""

    number: int
    digest: bytes


def newest(table: Path) -> Version | None:
    """Return the newest version of the table in this folder, or None if it has none."""
    try:
        names = os.listdir(table / "_versions")
    except (FileNotFoundError, NotADirectoryError):
        return None
    numbers = [number for number in map(_number, names) if number is not None]
    return read(table, max(numbers)) if numbers else None


def read(table: Path, number: int) -> Version | None:
    """Return the version of this number, or None if its manifest is not there."""
    content = _manifest(table, number)
    return None if content is None else _version(number, content)


def follow(table: Path, left: Version, *, own: int = 0) -> Version | None:
    """Return the newest version on disk with the same rows as ``left``.

    ``own`` may change them, since it is our commit.

    Compactions and index builds change no row, from any program. Returns None if ``left`` is not on disk as we left it,
    or if another version after it may have changed rows.
    """
    content = _manifest(table, left.number)
    if content is None or _version(left.number, content) != left:
        return None
    return advance(table, left, own=own)


def advance(table: Path, left: Version, *, own: int = 0) -> Version | None:
    """Do as `follow` does, for a ``left`` that was recognised before, and whose manifest may be pruned by now."""
    at = left
    while (content := _manifest(table, at.number + 1)) is not None:
        number = at.number + 1
        if number != own and _operation(table, content) not in _SAME_ROWS:
            return None
        at = _version(number, content)
    return at if at.number >= own else None


def stamps(table: Path) -> dict[str, int]:
    """Return a stamp of each file that the table's rows and indexes are in. It changes if the file does."""
    found = {}
    for part in ("data", "_deletions", "_indices"):
        for directory, _, names in os.walk(table / part):
            for name in names:
                path = os.path.join(directory, name)
                with suppress(FileNotFoundError):
                    seen = os.stat(path)
                    found[path] = hash((seen.st_size, seen.st_mtime_ns, seen.st_ino))
    at = newest(table)
    if at is not None:
        found[f"{at.number}"] = hash(at.digest)
    return found


def _version(number: int, content: bytes) -> Version:
    return Version(number, hashlib.blake2b(content, digest_size=16).digest())


def _manifest(table: Path, number: int) -> bytes | None:
    for name in (f"{_NEWEST - number:020}.manifest", f"{number}.manifest"):
        try:
            return (table / "_versions" / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            continue
    return None


def _number(name: str) -> int | None:
    """Return the number of the version whose manifest has this name, or None for another file."""
    stem, _, suffix = name.partition(".")
    if suffix != "manifest" or not stem.isdecimal():
        return None
    number = int(stem)
    return _NEWEST - number if len(stem) == len(str(_NEWEST)) else number


def _operation(table: Path, manifest: bytes) -> int:
    """Return the field number of the operation that made a version, or 0 if it cannot be read.

    A transaction's file holds `read_version` (1), `uuid` (2) and the operation, in this order.
    """
    found = _TRANSACTION.search(manifest)
    if found is None:
        return 0
    try:
        content = (table / "_transactions" / found[0].decode("ascii")).read_bytes()
        return _third_field(content)
    except (OSError, IndexError):
        return 0


def _third_field(content: bytes) -> int:
    at = 0
    while at < len(content):
        tag, at = _varint(content, at)
        field, wire = tag >> 3, tag & 7
        if field > 2:
            return field
        value, at = _varint(content, at)
        if wire == _LENGTH_DELIMITED:
            at += value
    return 0


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
