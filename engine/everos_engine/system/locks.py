"""Locks between processes.

There is one engine lock for each root, and one file per owner of claims that shows whether the owner is alive.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from loguru import logger

from everos_engine.errors import AlreadyRunning
from everos_engine.system.private import directory_mode, file_mode

LOOK_SECONDS = 0.05
NAMELESS_SECONDS = 2.0
"""How long to wait for a lock whose holder has not written its pid. The holder has just taken it, or only checks who
holds it."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Describe who holds an engine's lock.

    ``pid`` is 0 if it cannot be read. ``ends_by_itself`` is True for a command, and False for an engine.
    """

    pid: int
    ends_by_itself: bool = False


class EngineLock:
    """Hold the lock of a root, which only one engine has. The kernel releases it when the process dies.

    ``ends_by_itself`` shows other processes that the holder is a command, so that they may wait for it.
    """

    def __init__(self, path: Path, *, ends_by_itself: bool = False) -> None:
        self._path = path
        self._ends_by_itself = ends_by_itself
        self._handle = -1

    def __enter__(self) -> Self:
        """Take the lock. Raises AlreadyRunning, with the holder's pid."""
        self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, file_mode(self._path.parent))
        if not _try(self._handle):
            holder = _holder_in(self._handle)
            os.close(self._handle)
            raise self._refusal(holder)
        facts = {"pid": os.getpid(), "started": time.time(), "ends_by_itself": self._ends_by_itself}
        with suppress(OSError):  # on a full disk the lock is held, but others cannot name its holder
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, json.dumps(facts).encode(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock."""
        with suppress(OSError):
            os.ftruncate(self._handle, 0)
        os.close(self._handle)

    async def take(self, *, wait_seconds: float) -> None:
        """Take the lock. Raises AlreadyRunning if an engine holds it.

        If a command holds it, wait at most ``wait_seconds``, and log that. A process that only checks who holds it has
        it for a moment, without a pid. Wait for that too.
        """
        import trio

        began, logged = trio.current_time(), False
        while True:
            try:
                self.__enter__()
            except AlreadyRunning as error:
                waited = trio.current_time() - began
                if waited >= (wait_seconds if error.ends_by_itself else 0 if error.pid else NAMELESS_SECONDS):
                    raise
                if error.ends_by_itself and not logged:
                    logged = True
                    logger.warning("lock_waiting pid={} at_most_seconds={:g}", error.pid, wait_seconds)
            else:
                return
            await trio.sleep(LOOK_SECONDS)

    def _refusal(self, holder: Holder) -> AlreadyRunning:
        root = self._path.parent.parent.parent
        if holder.ends_by_itself:
            message = (
                f"another command (pid {holder.pid}) still works on {root}: run this one again when it is done, "
                f"or stop that one with `kill {holder.pid}`"
            )
        else:
            message = (
                f"another engine (pid {holder.pid or 'unknown'}) already serves {root}: "
                "stop it first, or use `everos-engine sync`"
            )
        return AlreadyRunning(message, pid=holder.pid or None, ends_by_itself=holder.ends_by_itself)


class OwnerLock:
    """Hold the lock that shows that an owner of claims is alive."""

    def __init__(self, directory: Path, owner: str) -> None:
        self._path = directory / f"{owner}.lock"
        self._handle = -1

    def __enter__(self) -> Self:
        """Create and take it."""
        self._path.parent.mkdir(mode=directory_mode(self._path.parent.parent), exist_ok=True)
        self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, file_mode(self._path.parent))
        fcntl.flock(self._handle, fcntl.LOCK_EX)
        return self

    def __exit__(self, *_: object) -> None:
        """Remove it, then release it."""
        with suppress(FileNotFoundError):
            self._path.unlink()
        os.close(self._handle)


def running_pid(path: Path) -> int | None:
    """Return the pid of the engine that holds the lock file, or None.

    It is 0 if the lock is held and the pid cannot be read.
    """
    found = holder(path)
    return None if found is None else found.pid


def holder(path: Path) -> Holder | None:
    """Return who holds the lock file, or None."""
    try:
        handle = _open(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return (
            None if _try(handle, fcntl.LOCK_SH) else _holder_in(handle)
        )  # shared, so that two processes which check do not see each other
    finally:
        os.close(handle)


def _open(path: Path) -> int:
    """Open the file for writing, which locks on network mounts need.

    If that is refused, open it for reading.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in {errno.EACCES, errno.EROFS}:
            raise
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def dead_owners(directory: Path, owners: Iterable[str]) -> set[str]:
    """Return the owners whose lock is gone or can be taken. Their files are removed."""
    dead = set()
    for owner in owners:
        path = directory / f"{owner}.lock"
        try:
            handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            dead.add(owner)
            continue
        try:
            if _try(handle):
                dead.add(owner)
                with suppress(FileNotFoundError):
                    path.unlink()
        finally:
            os.close(handle)
    return dead


def is_dead(directory: Path, owner: str) -> bool:
    """Return whether an owner's lock is gone or can be taken.

    Unlike ``dead_owners`` it leaves everything as it is.
    """
    try:
        handle = os.open(directory / f"{owner}.lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except PermissionError:
        return False
    try:
        return _try(handle)
    finally:
        os.close(handle)


def _try(handle: int, how: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder_in(handle: int) -> Holder:
    with suppress(ValueError, KeyError, TypeError):
        facts = json.loads(os.pread(handle, 4096, 0))
        return Holder(int(facts["pid"]), bool(facts.get("ends_by_itself")))
    return Holder(0)
