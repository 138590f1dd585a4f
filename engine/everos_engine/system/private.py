"""Keep the index folder private, because it holds the text of private files. Check its permissions and its content."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from everos_engine.errors import Fatal
from everos_engine.settings import Settings

OWNER, GROUP = 0o700, 0o750
LINK_REMEDY = (
    "the index is never written through links, since a link in a copied memory root could point to any file: "
    "remove the link, then start again"
)


def mode_of(settings: Settings) -> int:
    """Return the widest mode that a directory of the index may have. A file never needs to be executed."""
    return GROUP if settings.memory.index_access == "group" else OWNER


def make(settings: Settings, *, whole: bool = False) -> None:
    """Make the engine's folder, and remove other users' permissions. Raises Fatal for a link in it.

    Everything is below ``.index``, so its mode alone protects what LanceDB writes later. With ``whole``, check all that
    is below it, for links and for files that an earlier version or a copy left open to others. What belongs to another
    user does not change.
    """
    index = settings.engine_directory.parent
    mode = mode_of(settings)
    _check_own_link(index)
    for directory in (index, settings.engine_directory):
        with suppress(FileExistsError):
            os.mkdir(directory, mode)
    places = [index, settings.engine_directory, settings.lancedb_directory]
    found = _below(index) if whole else (entry for place in places for entry in _in(place))
    _restrict(os.fspath(index), mode)
    for entry in found:
        if entry.is_symlink():
            raise Fatal(f"{entry.path} is a link to {os.readlink(entry.path)!r}: {LINK_REMEDY}")
        if whole or entry.is_dir(follow_symlinks=False):
            _restrict(entry.path, mode if entry.is_dir(follow_symlinks=False) else mode & 0o666)


def too_open(settings: Settings) -> str | None:
    """Return the first path of the index that more people may read than the settings say, or None."""
    index = settings.engine_directory.parent
    allowed = mode_of(settings)
    with suppress(FileNotFoundError, NotADirectoryError):
        if not stat.S_IMODE(os.stat(index).st_mode) & 0o077 & ~allowed:
            return None  # this mode keeps other users out of all that is below
        return os.fspath(index)
    return None


def file_mode(directory: Path) -> int:
    """Return the mode of a new file in a directory of the index.

    Its group may read the file if it may read the directory.
    """
    return 0o600 | os.stat(directory).st_mode & 0o040


def directory_mode(parent: Path) -> int:
    """Return the mode of a new directory in a directory of the index."""
    return 0o700 | os.stat(parent).st_mode & 0o050


def _restrict(path: str, allowed: int) -> None:
    try:
        found = os.lstat(path)
        if stat.S_ISLNK(found.st_mode) or stat.S_ISSOCK(found.st_mode):
            return
        mode = stat.S_IMODE(found.st_mode)
        wanted = mode & ~0o077 | allowed & 0o077
        if wanted != mode:
            os.chmod(path, wanted)
    except (FileNotFoundError, PermissionError):
        return  # it was removed, or belongs to another user, which `doctor` reports


def _check_own_link(index: Path) -> None:
    """Check that ``.index``, if it is a link, points to a folder which is empty or an index. Raises Fatal."""
    if not index.is_symlink():
        return
    names = {entry.name for entry in _in(index)}
    if not index.is_dir() or (names and "engine" not in names):
        raise Fatal(f"{index} is a link to {os.readlink(index)!r}, which is neither empty nor an index: {LINK_REMEDY}")


def _below(directory: Path) -> Iterator[os.DirEntry[str]]:
    stack = [os.fspath(directory)]
    while stack:
        for entry in _in(stack.pop()):
            yield entry
            if entry.is_dir(follow_symlinks=False):
                stack.append(entry.path)


def _in(directory: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(os.fspath(directory)) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []
