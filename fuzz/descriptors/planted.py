"""Three leaks, planted by subclassing the Index: the stress must find each of them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from everos_engine.stores.index import Index

if TYPE_CHECKING:
    import lancedb

    from everos_engine.stores.session_pool import PooledSession

KEPT: list[Any] = []
"""What KeepsSessions never lets go of."""


class KeepsSessions(Index):
    """A Session is kept alive after its rotation."""

    def rotate(self) -> int:
        current = self._sessions.current
        KEPT.append((current.session, current.connection, list(current.tables.values())))
        return super().rotate()


class NeverRotates(Index):
    """The rotation is asked for, and does nothing."""

    def rotate(self) -> int:
        return self._sessions.current.number


class PinsWhatItClaimsToReopen(Index):
    """The plain path stands where the mode ``reopen`` promises its URI."""

    async def _connect(self, session: PooledSession) -> lancedb.AsyncConnection:
        claimed = self.settings
        self.settings = dataclasses.replace(claimed, descriptor_mode="pinned")
        try:
            return await super()._connect(session)
        finally:
            self.settings = claimed


LEAKS: dict[str, type[Index]] = {
    "session-kept": KeepsSessions,
    "rotation-disabled": NeverRotates,
    "plain-path-for-reopen": PinsWhatItClaimsToReopen,
}
