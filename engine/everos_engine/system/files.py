"""The tree on disk: keys, fingerprints, one sweep, and reading one change so that it is never torn."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

from everos_engine.errors import BadFile, Transient

if TYPE_CHECKING:
    from pathlib import Path

INDEX_DIRECTORY = ".index"
MAIN, REFERENCES = "SKILL.md", "references"
READ_TRIES = 3
RACY_NS = 50_000_000
COARSE_RACY_NS = 2_000_000_000
"""File systems that keep whole seconds (FAT: two) need a wider margin; most others tick every 1 to 10 ms."""
_ESCAPED = re.compile(r"\\x(5c|[89a-f][0-9a-f])")
_LOOKS_ESCAPED = re.compile(r"\\(?=x(?:5c|[89a-f][0-9a-f]))")
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}
_OURS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
"""What says nothing of the directory, but of this process or machine."""


class Fingerprint(NamedTuple):
    """What changes whenever a file does."""

    mtime_ns: int
    size: int
    ino: int
    ctime_ns: int


class PlaceLike(Protocol):
    """A recognised path."""

    @property
    def md_path(self) -> str:
        """The change's key."""

    @property
    def kind(self) -> str:
        """Its kind."""


P = TypeVar("P", bound=PlaceLike)


class Vanished(Exception):  # noqa: N818 - no error: the file is simply gone
    """There is no such file (any more)."""


class SweepAborted(Transient):
    """Part of the tree could not be read: what was not seen must not look deleted."""


@dataclass(frozen=True, slots=True)
class Walk(Generic[P]):
    """What a sweep saw: key -> (place, fingerprint), the blind directories by key with the reason, and how many there are."""

    found: Mapping[str, tuple[P, Fingerprint]]
    blind: Mapping[str, str]
    directories: int


@dataclass(frozen=True, slots=True)
class Reading:
    """The bytes of a change by key. ``racy``: a later write of the same size could leave the same fingerprint."""

    sources: Mapping[str, bytes]
    fingerprint: Fingerprint
    racy: bool

    @property
    def digest(self) -> bytes:
        """16 bytes that stand for the content of all its files."""
        digest = hashlib.blake2b(digest_size=16)
        for key, content in sorted(self.sources.items()):
            digest.update(f"{len(key.encode('utf-8', 'surrogatepass'))}:{len(content)}:".encode())
            digest.update(key.encode("utf-8", "surrogatepass"))
            digest.update(content)
        return digest.digest()


def key_of(root: Path, path: str) -> str | None:
    r"""The key of an absolute path: relative to ``root``, with ``/``; None outside.

    Bytes of a name that are not UTF-8 are escaped as ``\xNN``, and a backslash that looks like such an escape as
    ``\x5c``: two files never share a key.
    """
    base = os.fspath(root)
    full = os.path.normpath(path)
    if not full.startswith(base.rstrip(os.sep) + os.sep):
        full = os.path.join(os.path.realpath(os.path.dirname(full)), os.path.basename(full))
        if not full.startswith(base.rstrip(os.sep) + os.sep):
            return None
    return _escape(full[len(base.rstrip(os.sep)) + 1 :])


def path_of(root: Path, key: str) -> str:
    """The path a key names: the inverse of ``key_of``."""
    return os.path.join(root, _ESCAPED.sub(_unescaped, key) if "\\x" in key else key)


def locate(root: Path, asked: str) -> str:
    """The absolute path a person means: from the root, or from the working directory where only that has such a file.

    Where neither is there, as after a deletion, it is the one from the root, unless only the other's directory is there
    and within the root. No path holds a NUL byte: one in ``asked`` is escaped, and no such file is found.
    """
    asked = asked.replace("\0", "\\x00")
    if os.path.isabs(asked):
        return os.path.normpath(asked)
    here, below = os.path.abspath(asked), os.path.normpath(os.path.join(root, asked))
    if os.path.lexists(below) or not (os.path.lexists(here) or _was_here(root, here, below)):
        escaped = path_of(root, os.path.relpath(below, root))
        return os.path.normpath(escaped) if os.path.lexists(escaped) else below
    return here


def _was_here(root: Path, here: str, below: str) -> bool:
    """Whether of two paths that are not there only ``here`` has a directory, within the root."""
    if key_of(root, here) is None:
        return False
    return os.path.isdir(os.path.dirname(here)) and not os.path.isdir(os.path.dirname(below))


def _unescaped(match: re.Match[str]) -> str:
    byte = int(match[1], 16)
    return chr(byte) if byte < 0x80 else chr(0xDC00 + byte)  # noqa: PLR2004 - where surrogateescape begins


def walk(root: Path, recognise: Callable[[str], P | None], *, below: str | None = None) -> Walk[P]:
    """One sweep of the tree, or of one directory ``below`` it.

    Links to directories are not followed, links to files are. A directory below the root that cannot be read is
    *blind*: nothing is known of what it holds. Raises SweepAborted where the root cannot be read, or nothing can.
    """
    found: dict[str, tuple[P, Fingerprint]] = {}
    folded: dict[str, dict[str, Fingerprint]] = {}
    places: dict[str, P] = {}
    blind: dict[str, str] = {}
    top = os.fspath(root).rstrip(os.sep)
    base, directories = len(top) + 1, 0
    stack = [below or os.fspath(root)]
    while stack:
        directory = stack.pop()
        directories += 1
        try:
            with os.scandir(directory) as items:
                for item in items:
                    if item.is_dir(follow_symlinks=False):
                        if item.name != INDEX_DIRECTORY or len(directory) >= base:
                            stack.append(item.path)
                        continue
                    if not item.name.endswith(".md"):
                        continue
                    key = _escape(item.path[base:])
                    place = recognise(key)
                    print_ = None if place is None else _stat(item.path)
                    if place is None or print_ is None:
                        continue
                    if place.md_path is key and item.name != MAIN:
                        found[key] = (place, print_)
                    else:
                        folded.setdefault(place.md_path, {})[key] = print_
                        places.setdefault(place.md_path, place)
        except OSError as error:
            if directory in (top, os.fspath(root)) or error.errno in _OURS:
                message = f"the sweep stopped at {directory!r}: {error.strerror}; nothing was recorded, the next sweep tries again"
                raise SweepAborted(message) from error
            if error.errno not in _GONE:
                blind[_escape(directory[base:])] = error.strerror or str(error)
    for key, members in folded.items():
        if below is not None or key in members:
            found[key] = (places[key], _fold(members))
    return Walk(found, blind, directories)


def directories_below(directory: str) -> int:
    """How many directories there are at and below one; those that cannot be read count without what they hold."""
    return sum(1 for _ in os.walk(directory))


def fingerprint(root: Path, place: PlaceLike) -> Fingerprint | None:
    """What the disk says of one change now; None where its file is gone. Raises Transient where it cannot be asked."""
    try:
        members = {key: print_ for key, print_ in _members(root, place) if print_ is not None}
    except OSError as error:
        if error.errno in _GONE:
            return None
        message = f"cannot look at {place.md_path!r}: {error.strerror}"
        raise Transient(message) from error
    return _fold(members) if place.md_path in members else None


def read(root: Path, place: PlaceLike, *, max_file_bytes: int) -> Reading:
    """The bytes of one change as they were at one moment.

    Raises Vanished; BadFile where only a human can help (too large, no permission); Transient for the world's troubles.
    """
    for _ in range(READ_TRIES):
        observed_ns = time.time_ns()
        before = fingerprint(root, place)
        if before is None:
            raise Vanished(place.md_path)
        if before.size > max_file_bytes:
            message = f"the file has {before.size} bytes, more than max_file_bytes={max_file_bytes}"
            raise BadFile(message, remedy="split it, or raise max_file_bytes")
        try:
            sources = {key: _bytes(path_of(root, key), max_file_bytes) for key, _ in _members(root, place)}
        except OSError as error:
            _sort(place, error)
            continue
        if fingerprint(root, place) == before and place.md_path in sources:
            return Reading(sources, before, racy=_racy(before, observed_ns))
    message = f"{place.md_path!r} kept changing while it was read"
    raise Transient(message)


def is_out_of_reach(error: Transient) -> bool:
    """Whether a look failed because of what lies on the way to the file: no permission, a failing disk."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno not in _GONE | _OURS


def _sort(place: PlaceLike, error: OSError) -> None:
    """Return where another look is worth it; raise what the error means else."""
    if error.errno in _GONE:
        return
    if error.errno in {errno.EACCES, errno.EPERM}:
        message = f"the file cannot be read: {error.strerror}"
        raise BadFile(message, remedy="give the engine's user permission (`chmod u+r`), then save it") from error
    if error.errno == errno.EISDIR:
        raise Vanished(place.md_path) from error
    message = f"reading {place.md_path!r} failed: {error.strerror}"
    raise Transient(message) from error


def _members(root: Path, place: PlaceLike) -> Iterator[tuple[str, Fingerprint | None]]:
    """The files of one change by key: the one named, and a skill's references."""
    yield place.md_path, _stat(path_of(root, place.md_path))
    if not place.md_path.endswith("/" + MAIN):
        return
    folder = f"{place.md_path[: -len(MAIN)]}{REFERENCES}"
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
    """The fingerprint of a regular file, through links; None for anything else."""
    try:
        found = os.stat(path)
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise
    if not stat.S_ISREG(found.st_mode):
        return None
    return Fingerprint(found.st_mtime_ns, found.st_size, found.st_ino & 0x7FFF_FFFF_FFFF_FFFF, found.st_ctime_ns)


def _fold(members: Mapping[str, Fingerprint]) -> Fingerprint:
    """One fingerprint for all files of a change: any edit, addition or removal moves it."""
    if len(members) == 1:
        return next(iter(members.values()))
    digest = hashlib.blake2b(
        repr(sorted((key, tuple(print_)) for key, print_ in members.items())).encode(), digest_size=8
    )
    return Fingerprint(
        max(print_.mtime_ns for print_ in members.values()),
        sum(print_.size for print_ in members.values()),
        int.from_bytes(digest.digest(), "big") >> 1,
        max(print_.ctime_ns for print_ in members.values()),
    )


def _racy(found: Fingerprint, observed_ns: int) -> bool:
    """Git's rule: a file whose last change is not clearly older than the look at it is not trusted by fingerprint."""
    margin = COARSE_RACY_NS if found.mtime_ns % 1_000_000_000 == 0 and found.ctime_ns % 1_000_000_000 == 0 else RACY_NS
    return max(found.mtime_ns, found.ctime_ns) + margin > observed_ns


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
