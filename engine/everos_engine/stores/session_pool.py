"""Generations of the index's Session: a new one takes over at once, the old one goes with its last reader."""

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
    """A Session, its connection and the tables opened on it; whoever uses one counts as its reader."""

    number: int
    session: Any = None
    connection: AsyncConnection | None = None
    tables: dict[str, AsyncTable] = field(default_factory=dict)
    readers: int = 0
    retired: bool = False
    opening: trio.Lock = field(default_factory=trio.Lock)

    def close(self) -> None:
        """Let go of the tables, the connection and the Session; its caches go, and what they pinned."""
        for table in self.tables.values():
            table.close()
        self.tables.clear()
        if self.connection is not None:
            self.connection.close()
        self.connection = self.session = None


class SessionPool:
    """The current generation, and those that still have readers. For tasks of one Trio run only."""

    def __init__(self) -> None:
        self.current = PooledSession(0)
        self._retired: set[PooledSession] = set()

    @property
    def open(self) -> int:
        """How many generations hold their Session: 1, and one for each that waits for its last reader."""
        return 1 + len(self._retired)

    @contextmanager
    def using(self) -> Iterator[PooledSession]:
        """The current generation, kept open for the length of the block."""
        session = self.current
        session.readers += 1
        try:
            yield session
        finally:
            session.readers -= 1
            self._let_go(session)

    def rotate(self) -> int:
        """Begin a new generation; its number. The old one closes now, or when its last reader is done."""
        old, self.current = self.current, PooledSession(self.current.number + 1)
        old.retired = True
        self._retired.add(old)
        self._let_go(old)
        return self.current.number

    def close(self) -> None:
        """Close all of them, whoever reads."""
        for session in (self.current, *self._retired):
            session.close()
        self._retired.clear()

    def _let_go(self, session: PooledSession) -> None:
        if session.retired and not session.readers:
            session.close()
            self._retired.discard(session)
