"""Locks between processes: one engine a root, and one file per owner of claims that tells whether it lives."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from everos_engine.errors import AlreadyRunning
from everos_engine.system.private import directory_mode, file_mode

if TYPE_CHECKING:
    from pathlib import Path


class EngineLock:
    """Held by the one engine of a root; the kernel lets go of it when the process dies."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle = -1

    def __enter__(self) -> Self:
        """Take it. Raises AlreadyRunning, naming the holder's pid."""
        self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, file_mode(self._path.parent))
        if not _try(self._handle):
            pid = _pid_in(self._handle)
            os.close(self._handle)
            root = self._path.parent.parent.parent
            message = f"another engine (pid {pid or 'unknown'}) already serves {root}: stop it first, or use `everos-engine sync`"
            raise AlreadyRunning(message, pid=pid)
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, json.dumps({"pid": os.getpid(), "started": time.time()}).encode(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        """Let go."""
        os.ftruncate(self._handle, 0)
        os.close(self._handle)


class OwnerLock:
    """Held for as long as an owner of claims lives."""

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
        """Remove it, then let go."""
        with suppress(FileNotFoundError):
            self._path.unlink()
        os.close(self._handle)


def running_pid(path: Path) -> int | None:
    """The pid of the engine that holds the lock file, 0 if it cannot be read; None where nobody holds it."""
    try:
        handle = _opened(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        if _try(handle):
            return None
        return _pid_in(handle) or 0
    finally:
        os.close(handle)


def _opened(path: Path) -> int:
    """For writing, which locks on network mounts need; else for reading, which is enough to ask on others."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in {errno.EACCES, errno.EROFS}:
            raise
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def dead_owners(directory: Path, owners: Iterable[str]) -> set[str]:
    """Those whose lock is gone or can be taken; their files are removed."""
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
    """Whether an owner's lock is gone or can be taken; unlike ``dead_owners`` it leaves everything as it is."""
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


def _try(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _pid_in(handle: int) -> int | None:
    with suppress(ValueError, KeyError, TypeError):
        return int(json.loads(os.pread(handle, 4096, 0))["pid"])
    return None
