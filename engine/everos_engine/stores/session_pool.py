"""A pool of the index's Sessions. A new one takes over immediately, the old one closes with its last reader."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import trio

if TYPE_CHECKING:
    from lancedb import AsyncConnection, AsyncTable


@dataclass(slots=True, eq=False)
class PooledSession:
    """A Session, its connection and the tables opened on it. Each task that uses one counts as its reader."""

    number: int
    session: Any = None
    connection: AsyncConnection | None = None
    tables: dict[str, AsyncTable] = field(default_factory=dict)
    readers: int = 0
    retired: bool = False
    opening: trio.Lock = field(default_factory=trio.Lock)

    def close(self) -> None:
        """Let go of the tables, the connection and the Session. Its caches and what they pinned are freed."""
        for table in self.tables.values():
            table.close()
        self.tables.clear()
        if self.connection is not None:
            self.connection.close()
        self.connection = self.session = None


class SessionPool:
    """The current Session, and those that still have readers. For tasks of one Trio run only."""

    def __init__(self) -> None:
        self.current = PooledSession(0)
        self._retired: set[PooledSession] = set()

    @property
    def open(self) -> int:
        """Return how many Sessions are open: 1, plus one for each that waits for its last reader."""
        return 1 + len(self._retired)

    @contextmanager
    def using(self) -> Iterator[PooledSession]:
        """Yield the current Session, kept open for the length of the block."""
        session = self.current
        session.readers += 1
        try:
            yield session
        finally:
            session.readers -= 1
            self._let_go(session)

    def rotate(self) -> int:
        """Open a new Session. Returns its number. The old one closes now, or when its last reader is done."""
        old, self.current = self.current, PooledSession(self.current.number + 1)
        old.retired = True
        self._retired.add(old)
        self._let_go(old)
        return self.current.number

    def close(self) -> None:
        """Close all of them, also those that are being read."""
        for session in (self.current, *self._retired):
            session.close()
        self._retired.clear()

    def _let_go(self, session: PooledSession) -> None:
        if session.retired and not session.readers:
            session.close()
            self._retired.discard(session)
