"""Count the descriptors of this process without opening one, classify them, limit them, and keep a spare one."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from everos_engine.errors import FULL

OWN = "/proc/self/fd"
CLASSES = ("lance_index", "lance_data", "deleted", "sqlite", "sockets", "pipes", "watch", "other")
_SQLITE_ENDS = (".db", ".db-wal", ".db-shm", ".db-journal")
MAX_LIMIT = 1 << 20
"""An unlimited hard limit counts as this. macOS refuses more."""
VERIFY_TRIES = 5
MAX_GAP = 1024
"""The search ends after so many numbers without a descriptor, since some may have been closed after the count."""


def limits() -> tuple[int, int]:
    """Return RLIMIT_NOFILE as (soft, hard). Unlimited counts as ``MAX_LIMIT``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _finite(soft), _finite(hard)


def raise_soft_limit() -> tuple[int, int]:
    """Raise the soft limit to the hard one. Returns (before, after). If the system refuses, it stays."""
    before, hard = limits()
    if hard > before:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return before, limits()[0]


def none_left(*, wanted: int = 1) -> bool:
    """Return whether ``wanted`` more descriptors cannot be opened.

    Then the process or the system is at its limit.
    """
    opened: list[int] = []
    try:
        for _ in range(wanted):
            opened.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))  # noqa: PERF401 - each must be closed
    except OSError as error:
        if error.errno not in FULL:
            raise
        return True
    finally:
        for handle in opened:
            os.close(handle)
    return False


def counter() -> tuple[Callable[[], int], str]:
    """Return a function that counts descriptors, and its name: ``stat``, ``listing``, or ``psutil``.

    ``stat`` needs no descriptor and takes 4 us, but older kernels answer 0. It is used if it agrees with a listing.
    """
    for _ in range(VERIFY_TRIES):  # another thread may open one between the two counts
        try:
            if _by_stat() == _by_listing():
                return _by_stat, "stat"
        except OSError as error:
            if error.errno in FULL and _by_stat() >= limits()[0]:
                return _by_stat, "stat"  # none is left for a listing, and the stat agrees
            break
    try:
        _by_listing()
    except OSError:
        import psutil

        process = psutil.Process()
        count = process.num_fds if hasattr(process, "num_fds") else process.num_handles
        return lambda: int(count()), "psutil"
    return _at_limit_too(_by_listing), "listing"


def classify(count: int, *, lancedb: Path, engine: Path) -> dict[str, int]:
    """Return how many of ``count`` descriptors are of each class of ``CLASSES``.

    Opens none if the system has /proc. ``lance_index`` and ``lance_data`` are below ``lancedb``, ``sqlite`` below
    ``engine``. ``deleted`` are LanceDB's too, unlinked.
    """
    found = dict.fromkeys(CLASSES, 0)
    below, ours = os.fspath(lancedb) + os.sep, os.fspath(engine) + os.sep
    for target in _targets(count):
        found[_class_of(target, below, ours)] += 1
    return found


@dataclass(slots=True)
class Reserve:
    """A spare descriptor, so that a process at its limit can still answer and act."""

    _handle: int = field(default=-1)

    @property
    def held(self) -> bool:
        """Return whether it is open and can be borrowed."""
        return self._handle >= 0

    def take(self) -> bool:
        """Open it if it is closed. Returns whether it is open now."""
        if self._handle < 0:
            try:
                self._handle = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                if error.errno not in FULL:
                    raise
        return self.held

    def release(self) -> None:
        """Close it."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)

    @contextmanager
    def borrow(self) -> Iterator[bool]:
        """Free one descriptor in this block, unless another task takes it first.

        It is opened again after the block, or later if that fails.
        """
        had = self.held
        self.release()
        try:
            yield had
        finally:
            self.take()


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident bytes and threads of this process."""

    rss_bytes: int
    threads: int


def memory() -> Memory | None:
    """Return resident bytes and threads.

    None if the system does not report them, or has no descriptor left to do so.
    """
    try:
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rsplit(b")", 1)[1].split()
    except OSError:
        return None
    return Memory(int(fields[21]) * resource.getpagesize(), int(fields[17]))


def tree_size(directory: Path) -> tuple[int, int, int] | None:
    """Return (files, directories, bytes) below a directory, or None if it cannot be walked now."""
    files = directories = size = 0
    stack = [os.fspath(directory)]
    while stack:
        try:
            with os.scandir(stack.pop()) as found:
                for item in found:
                    if item.is_dir(follow_symlinks=False):
                        directories += 1
                        stack.append(item.path)
                    else:
                        files += 1
                        size += item.stat(follow_symlinks=False).st_size
        except FileNotFoundError:
            continue
        except OSError:
            return None
    return files, directories, size


def _by_stat() -> int:
    return os.stat(OWN).st_size


def _by_listing() -> int:
    return len(os.listdir(OWN if sys.platform == "linux" else "/dev/fd")) - 1  # without the descriptor of the listing


def _at_limit_too(count: Callable[[], int]) -> Callable[[], int]:
    """Return the count of a listing. It needs a descriptor, so if none is left, all are in use."""

    def counted() -> int:
        try:
            return count()
        except OSError as error:
            if error.errno not in FULL:
                raise
            return limits()[0]

    return counted


def _targets(count: int) -> Iterator[str]:
    """Yield the target of each open descriptor, in the order of the numbers.

    The system always uses the lowest free number first.
    """
    if sys.platform != "linux":
        return
    left, gap = count, 0
    for number in range(limits()[0]):
        if left <= 0 or gap > MAX_GAP:
            return
        try:
            target = os.readlink(f"{OWN}/{number}")
        except OSError:
            gap += 1
            continue
        left, gap = left - 1, 0
        yield target


def _class_of(target: str, lancedb: str, engine: str) -> str:
    if target.startswith("/"):
        if target.startswith(lancedb):
            if target.endswith(" (deleted)"):
                return "deleted"
            return "lance_index" if "/_indices/" in target else "lance_data"
        return "sqlite" if target.startswith(engine) and target.endswith(_SQLITE_ENDS) else "other"
    return {"socket": "sockets", "pipe": "pipes"}.get(
        target.split(":", 1)[0], "watch" if target == "anon_inode:inotify" else "other"
    )


def _finite(limit: int) -> int:
    return MAX_LIMIT if limit == resource.RLIM_INFINITY else min(limit, 1 << 30)
