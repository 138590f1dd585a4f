"""A disk for SQLite's files that has no room, or fails, for as long as a test says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import apsw

BASE = apsw.vfs_names()[0]


class _File(apsw.VFSFile):
    def __init__(self, disk: TrappedDisk, name: apsw.URIFilename | str | None, flags: list[int]) -> None:
        super().__init__(BASE, name, flags)
        file = name.filename() if isinstance(name, apsw.URIFilename) else str(name)
        self.disk = disk if disk.only in file else None

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802 - SQLite's name
        if self.disk is not None:
            self.disk.strike()
        super().xWrite(data, offset)


class TrappedDisk(apsw.VFS):
    """SQLite's own file system; every write raises ``error`` while it is set. ``strikes`` counts those.

    ``only`` is a part of the names of the files that are concerned.
    """

    def __init__(self, only: str) -> None:
        super().__init__("test-trapped", BASE, makedefault=True)
        self.only = only
        self.error: type[Exception] | None = None
        self.strikes = 0

    def xOpen(self, name: apsw.URIFilename | str | None, flags: list[int]) -> apsw.VFSFile:  # noqa: N802 - SQLite's name
        return _File(self, name, flags)

    def strike(self) -> None:
        if self.error is not None:
            self.strikes += 1
            raise self.error


@contextmanager
def trapped_disk(only: str = "") -> Iterator[TrappedDisk]:
    """Databases that are opened in the block are on the trapped disk."""
    disk = TrappedDisk(only)
    try:
        yield disk
    finally:
        disk.unregister()
