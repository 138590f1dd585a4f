"""Read the tree on disk: keys, fingerprints, one full scan, and consistent reads of a change."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

from everos_engine.errors import BadFile, Transient
from everos_engine.settings.paths import INDEX_DIRECTORY

MAIN, REFERENCES = "SKILL.md", "references"
SKILL = "agent_skill"
"""The kind whose changes have references. A note may also be named SKILL.md."""
READ_TRIES = 3
RACY_NS = 50_000_000
COARSE_RACY_NS = 2_000_000_000
"""File systems that keep whole seconds (FAT: two) need a wider margin. Most others tick every 1 to 10 ms."""
_ESCAPED = re.compile(r"\\x(5c|[89a-f][0-9a-f])")
_LOOKS_ESCAPED = re.compile(r"\\(?=x(?:5c|[89a-f][0-9a-f]))")
FUTURE_NS = 86_400_000_000_000
"""A time more than a day in the future does not come from another clock. A program set it, and the next write resets
it."""
_INT64_MAX = (1 << 63) - 1
"""The largest whole number that SQLite keeps."""
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}
_OURS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
"""Errors that come from this process or machine, not from the directory."""


class Fingerprint(NamedTuple):
    """Hold what changes with every change of a file."""

    mtime_ns: int
    size: int
    ino: int
    ctime_ns: int


class PlaceLike(Protocol):
    """Describe a recognised path."""

    @property
    def md_path(self) -> str:
        """Return the change's key."""

    @property
    def kind(self) -> str:
        """Return its kind."""


P = TypeVar("P", bound=PlaceLike)


class Vanished(Exception):
    """The file does not exist, or was removed."""


class ScanAborted(Transient):
    """Part of the tree could not be read. What was not seen must not look deleted."""


@dataclass(frozen=True, slots=True)
class Walk(Generic[P]):
    """Hold what a full scan saw.

    ``found`` is key -> (place, fingerprint), and ``blind`` is key -> reason. Blind are directories that cannot be read,
    and files whose state cannot be read, such as a link into a forbidden directory.
    """

    found: Mapping[str, tuple[P, Fingerprint]]
    blind: Mapping[str, str]
    directories: int


@dataclass(frozen=True, slots=True)
class Reading:
    """Hold the bytes of a change by key. It is ``racy`` if a later write could leave the same fingerprint."""

    sources: Mapping[str, bytes]
    fingerprint: Fingerprint
    racy: bool

    @property
    def digest(self) -> bytes:
        """Return a hash of 16 bytes of the content of all its files."""
        digest = hashlib.blake2b(digest_size=16)
        for key, content in sorted(self.sources.items()):
            digest.update(f"{len(key.encode('utf-8', 'surrogatepass'))}:{len(content)}:".encode())
            digest.update(key.encode("utf-8", "surrogatepass"))
            digest.update(content)
        return digest.digest()


def key_of(root: Path, path: str) -> str | None:
    r"""Return the key of an absolute path: relative to ``root``, with ``/``. None for a path outside.

    Bytes of a name that are not UTF-8 are escaped as ``\xNN``, and a backslash that looks like such an escape as
    ``\x5c``, so that two files never share a key.
    """
    base = os.fspath(root)
    full = os.path.normpath(path)
    if not full.startswith(base.rstrip(os.sep) + os.sep):
        full = os.path.join(os.path.realpath(os.path.dirname(full)), os.path.basename(full))
        if not full.startswith(base.rstrip(os.sep) + os.sep):
            return None
    return _escape(full[len(base.rstrip(os.sep)) + 1 :])


def path_of(root: Path, key: str) -> str:
    """Return the path that a key names. This is the inverse of ``key_of``."""
    if not key.isascii():
        key = os.fsdecode(key.encode("utf-8", "surrogateescape"))  # the locale may have another encoding
    return os.path.join(root, _ESCAPED.sub(_unescaped, key) if "\\x" in key else key)


def locate(root: Path, asked: str) -> str:
    """Return the absolute path that a person means.

    ``asked`` is looked up from the root, or from the working directory if only that has such a file. If neither file
    exists, as after a deletion, the path from the root is returned, unless only the other one's directory exists and is
    within the root. A name may have another Unicode form than the file's (é as one character or as two). A NUL byte in
    ``asked`` is escaped, and no such file is found.
    """
    meant = _meant(root, asked.replace("\0", "\\x00"))
    return meant if os.path.lexists(meant) else in_other_form(meant) or meant


def in_other_form(path: str) -> str | None:
    """Return the path of the one file whose name is the same text in another Unicode form, or None."""
    if path.isascii():
        return None
    parent, name = os.path.split(path)
    found = parent if os.path.isdir(parent) else in_other_form(parent)
    if found is None or not name:
        return None
    if os.path.lexists(os.path.join(found, name)):
        return os.path.join(found, name)
    wanted = unicodedata.normalize("NFC", name)
    with suppress(OSError):
        alike = [one for one in os.listdir(found) if unicodedata.normalize("NFC", one) == wanted]
        return os.path.join(found, alike[0]) if len(alike) == 1 else None
    return None


def _meant(root: Path, asked: str) -> str:
    if os.path.isabs(asked):
        return os.path.normpath(asked)
    here, below = os.path.abspath(asked), os.path.normpath(os.path.join(root, asked))
    if os.path.lexists(below) or not (os.path.lexists(here) or _was_here(root, here, below)):
        escaped = path_of(root, os.path.relpath(below, root))
        return os.path.normpath(escaped) if os.path.lexists(escaped) else below
    return here


def linked_directory(root: Path, path: str) -> str | None:
    """Return the first directory between the root and a path below it that is a link, or None.

    Links to directories are not followed. What is behind one is not part of the tree.
    """
    at = os.fspath(root).rstrip(os.sep)
    for part in os.path.dirname(path)[len(at) + 1 :].split(os.sep):
        at = f"{at}{os.sep}{part}"
        if part and os.path.islink(at):
            return at
    return None


def without_links(root: Path, path: str) -> str:
    """Return a path below the root with its links to directories resolved.

    An event may name a file by such a link.
    """
    if linked_directory(root, path) is None:
        return path
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def _was_here(root: Path, here: str, below: str) -> bool:
    """Return whether only ``here``, of two missing paths, is in an existing directory within the root."""
    if key_of(root, here) is None:
        return False
    return os.path.isdir(os.path.dirname(here)) and not os.path.isdir(os.path.dirname(below))


def _unescaped(match: re.Match[str]) -> str:
    byte = int(match[1], 16)
    return chr(byte) if byte < 0x80 else chr(0xDC00 + byte)


def walk(root: Path, recognise: Callable[[str], P | None], *, below: str | None = None) -> Walk[P]:
    """Look at the tree once, or at one directory ``below`` the root.

    Links to directories are not followed. Links to files are. A directory below the root that cannot be read is
    *blind*: nothing is known about its content. A file is blind if only its name can be read.
    Raises ScanAborted if the root cannot be read, or nothing can.
    """
    walker = Walker(root, recognise, below=below)
    stack = [below or os.fspath(root)]
    while stack:
        stack += walker.add(walker.visit(stack.pop()))
    return walker.walk()


@dataclass(frozen=True, slots=True)
class Visit(Generic[P]):
    """Hold the content of one directory.

    ``files`` are (key, place, fingerprint), and ``blind`` are (key, place, reason).
    """

    directory: str
    directories: Sequence[str]
    files: Sequence[tuple[str, P, Fingerprint]]
    blind: Sequence[tuple[str, P, str]]
    error: OSError | None


class Walker(Generic[P]):
    """Walk the tree in steps. ``visit`` may run in any thread. ``add`` and ``lose`` record its results."""

    def __init__(self, root: Path, recognise: Callable[[str], P | None], *, below: str | None = None) -> None:
        self._recognise, self._below = recognise, below
        self._top = os.fspath(root).rstrip(os.sep)
        self._tops = {self._top, os.fspath(root)}
        self._base = len(self._top) + 1
        self._found: dict[str, tuple[P, Fingerprint]] = {}
        self._folded: dict[str, dict[str, Fingerprint]] = {}
        self._places: dict[str, P] = {}
        self._blind: dict[str, str] = {}
        self._directories = 0

    def visit(self, directory: str) -> Visit[P]:
        """Look at one directory. This keeps no state."""
        directories: list[str] = []
        found: list[tuple[str, P, Fingerprint]] = []
        blind: list[tuple[str, P, str]] = []
        try:
            with os.scandir(directory) as items:
                for item in items:
                    if item.is_dir(follow_symlinks=False):
                        if item.name != INDEX_DIRECTORY or len(directory) >= self._base:
                            directories.append(item.path)
                        continue
                    if not item.name.endswith(".md"):
                        continue
                    key = _escape(item.path[self._base :])
                    place = self._recognise(key)
                    if place is None:
                        continue
                    try:
                        print_ = _stat(item.path)
                    except OSError as error:
                        if error.errno in _OURS:
                            raise
                        blind.append((key, place, error.strerror or str(error)))
                        continue
                    if print_ is not None:
                        found.append((key, place, print_))
        except OSError as error:
            return Visit(directory, directories, found, blind, error)
        return Visit(directory, directories, found, blind, None)

    def add(self, seen: Visit[P]) -> Sequence[str]:
        """Record what a visit saw, and return the directories to visit next. Raises ScanAborted."""
        self._directories += 1
        error = seen.error
        if error is not None:
            if seen.directory in self._tops or error.errno in _OURS:
                raise self._aborted(seen.directory, error.strerror or str(error)) from error
            if error.errno not in _GONE:
                self.lose(seen.directory, error.strerror or str(error))
        for key, place, print_ in seen.files:
            if place.md_path is key and not key.endswith("/" + MAIN):
                self._found[key] = (place, print_)
            else:
                self._folded.setdefault(place.md_path, {})[key] = print_
                self._places.setdefault(place.md_path, place)
        for _, place, reason in seen.blind:
            self._blind[place.md_path] = reason
        return seen.directories

    def lose(self, directory: str, reason: str) -> None:
        """Record a directory whose content cannot be read. Raises ScanAborted if it is the root."""
        if directory in self._tops:
            raise self._aborted(directory, reason)
        self._blind[_escape(directory[self._base :])] = reason

    def walk(self) -> Walk[P]:
        """Return what was seen. A change of several files is blind if one of them is."""
        for key, members in self._folded.items():
            if key not in self._blind and (self._below is not None or key in members):
                self._found[key] = (self._places[key], _fold(members))
        return Walk(self._found, self._blind, self._directories)

    def _aborted(self, directory: str, reason: str) -> ScanAborted:
        return ScanAborted(
            f"the full scan stopped at {directory!r}: {reason}. "
            "Nothing was recorded, and the next full scan tries again"
        )


def may_write(directory: Path) -> bool:
    """Return whether this process may make files in a directory that exists or can be made."""
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    return os.access(directory, os.W_OK | os.X_OK)


def is_readonly(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is on a file system that is mounted read-only."""
    try:
        return bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    except OSError:
        return False


def directories_below(directory: str) -> int:
    """Return how many directories there are at and below one.

    What is below an unreadable one does not count.
    """
    return sum(1 for _ in os.walk(directory))


def directories_in(directory: str) -> list[tuple[str, tuple[int, int]]]:
    """Return the directories in one, and links to directories, with (device, inode).

    An unreadable one has none.
    """
    found = []
    with suppress(OSError), os.scandir(directory) as items:
        for item in items:
            with suppress(OSError):
                if item.is_dir():
                    seen = item.stat()
                    found.append((item.path, (seen.st_dev, seen.st_ino)))
    return found


def fingerprint(root: Path, place: PlaceLike) -> Fingerprint | None:
    """Return the fingerprint of one change now, or None if its file is gone.

    Raises Transient if it cannot be read.
    """
    try:
        members = {key: print_ for key, print_ in _members(root, place) if print_ is not None}
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise Transient(f"cannot look at {place.md_path!r}: {error.strerror}") from error
    return _fold(members) if place.md_path in members else None


def read(root: Path, place: PlaceLike, *, max_file_bytes: int) -> Reading:
    """Return the bytes of one change as they were at one moment.

    Raises Vanished, BadFile if only a person can help (too large, no permission), and Transient for other troubles.
    """
    for _ in range(READ_TRIES):
        observed_ns = time.time_ns()
        before = fingerprint(root, place)
        if before is None:
            raise Vanished(place.md_path)
        if before.size > max_file_bytes:
            raise BadFile(
                f"the file has {before.size} bytes, more than max_file_bytes={max_file_bytes}",
                remedy="split it, or raise max_file_bytes",
                setting="max_file_bytes",
            )
        try:
            sources = {key: _bytes(path_of(root, key), max_file_bytes) for key, _ in _members(root, place)}
        except OSError as error:
            _sort(place, error)
            continue
        if fingerprint(root, place) == before and place.md_path in sources:
            return Reading(sources, before, racy=is_racy(before, observed_ns))
    raise Transient(f"{place.md_path!r} kept changing while it was read")


def is_out_of_reach(error: Transient) -> bool:
    """Return whether a look failed because of a missing permission, a failing disk or the like."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno not in _GONE | _OURS


def _sort(place: PlaceLike, error: OSError) -> None:
    """Return if another attempt makes sense. Otherwise raise what the error means."""
    if error.errno in _GONE:
        return
    if error.errno in {errno.EACCES, errno.EPERM}:
        raise BadFile(
            f"the file cannot be read: {error.strerror}",
            remedy="give the engine's user permission (`chmod u+r`), then save it",
        ) from error
    if error.errno == errno.EISDIR:
        raise Vanished(place.md_path) from error
    raise Transient(f"reading {place.md_path!r} failed: {error.strerror}") from error


def _members(root: Path, place: PlaceLike) -> Iterator[tuple[str, Fingerprint | None]]:
    """Yield the files of one change by key: the file itself, and the references of a skill.

    Files behind a link to a directory do not count.
    """
    path = path_of(root, place.md_path)
    linked = linked_directory(root, path) is not None
    yield place.md_path, None if linked else _stat(path)
    if linked or place.kind != SKILL:
        return
    folder = f"{place.md_path[: -len(MAIN)]}{REFERENCES}"
    if os.path.islink(path_of(root, folder)):
        return
    try:
        names = sorted(os.listdir(path_of(root, folder)))
    except OSError as error:
        if error.errno in _GONE:
            return
        raise
    for name in names:
        if name.endswith(".md") and name[0] not in ".~#":
            key = f"{folder}/{_escape(name)}"
            print_ = _stat(path_of(root, key))
            if print_ is not None:
                yield key, print_


def _stat(path: str) -> Fingerprint | None:
    """Return the fingerprint of a regular file, through links, or None for anything else."""
    try:
        found = os.stat(path)
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise
    if not stat.S_ISREG(found.st_mode):
        return None
    return fingerprint_of(found)


def fingerprint_of(found: os.stat_result) -> Fingerprint:
    """Return times, size and inode of a stat, limited to 64 bits with a sign as SQLite needs them."""
    mtime_ns, size, ctime_ns = map(_clamped, (found.st_mtime_ns, found.st_size, found.st_ctime_ns))
    return Fingerprint(mtime_ns, size, found.st_ino & _INT64_MAX, ctime_ns)


def _clamped(value: int) -> int:
    return max(~_INT64_MAX, min(value, _INT64_MAX))


def _fold(members: Mapping[str, Fingerprint]) -> Fingerprint:
    """Return one fingerprint for all files of a change. Any edit, addition or removal changes it."""
    if len(members) == 1:
        return next(iter(members.values()))
    digest = hashlib.blake2b(
        repr(sorted((key, tuple(print_)) for key, print_ in members.items())).encode(), digest_size=8
    )
    return Fingerprint(
        max(print_.mtime_ns for print_ in members.values()),
        _clamped(sum(print_.size for print_ in members.values())),
        int.from_bytes(digest.digest(), "big") >> 1,
        max(print_.ctime_ns for print_ in members.values()),
    )


def is_racy(found: Fingerprint, observed_ns: int) -> bool:
    """Return whether a later write could leave the same fingerprint.

    This is git's rule: the last change is not clearly older than the observation. A time far in the future does not
    count, because the next write sets it back to the present.
    """
    margin = COARSE_RACY_NS if found.mtime_ns % 1_000_000_000 == 0 and found.ctime_ns % 1_000_000_000 == 0 else RACY_NS
    near = [moment for moment in (found.mtime_ns, found.ctime_ns) if moment <= observed_ns + FUTURE_NS]
    return any(moment + margin > observed_ns for moment in near)


def _bytes(path: str, limit: int) -> bytes:
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        return file.read(limit + 1)


def _escape(name: str) -> str:
    if "\\x" in name:
        name = _LOOKS_ESCAPED.sub(r"\\x5c", name)
    if name.isascii():
        return name
    return os.fsencode(name).decode("utf-8", "backslashreplace")
