"""Hold resident memory against its documented ceiling, as a part of the descriptor guard's look."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import trio

from everos_engine.errors import Transient
from everos_engine.stores import ledger
from everos_engine.system import ceiling

if TYPE_CHECKING:
    from everos_engine.loops.context import Context

MIN_SHARE = 0.25
"""The share of its width that the worker always keeps. Work that stops does not free memory."""
COUNT_SECONDS = 10.0
OVER_SECONDS = 30.0
"""How long memory must be over its ceiling, after trims and a rotation, before that is reported."""
FIRST_REST_SECONDS, MAX_REST_SECONDS = 10.0, 600.0
"""A rotation for memory is repeated after a rest that doubles while memory stays over its soft part."""
OVER = "memory_over_ceiling"
OVER_REMEDY = (
    "see `everos-engine fds` for the parts; a file with very many entries may be in work, then wait; else lower "
    "lancedb.session_most_bytes or worker_batch_max, or restart the engine and report what `everos-engine bundle` writes"
)


@dataclass(slots=True, eq=False)
class Resident:
    """What is known of resident memory from one look of the guard to the next."""

    context: Context
    rows: int = 0
    dimension: int = 0
    _over_since: float | None = None
    _rest_seconds: float = FIRST_REST_SECONDS
    _rotate_after: float = float("-inf")

    @property
    def bounds(self) -> ceiling.MemoryCeiling:
        """Return the ceiling for the current settings and number of rows."""
        context = self.context
        return ceiling.memory_ceiling(
            context.settings, base_bytes=context.base.rss_bytes, rows=self.rows, dimension=self.dimension
        )

    async def keep_counting(self) -> None:
        """Count the rows after changes were applied, at most once in ``COUNT_SECONDS``. Never returns."""
        while True:
            seen = self.context.applied.value
            await self.count_rows()
            await trio.sleep(COUNT_SECONDS)
            await self.context.applied.wait_value(lambda now, seen=seen: now != seen)

    async def count_rows(self) -> None:
        """Count the rows in the ledger. If the database is busy, try again at the next time."""
        index = self.context.index
        with suppress(Transient):
            self.rows = sum((await self.context.database.aread(ledger.rows_per_kind)).values())
        self.dimension = max((index.dimension_of(kind) for kind in index.open_kinds()), default=0)

    def is_over(self, rss_bytes: int) -> bool:
        """Return whether memory is over the soft part of its ceiling."""
        return rss_bytes > self.bounds.soft_bytes

    def wants_rotation(self, rss_bytes: int, now: float) -> bool:
        """Return whether the Session should be dropped to free memory.

        Call it once for each look. A yes begins a rest.
        """
        if not self.is_over(rss_bytes):
            self._rest_seconds = FIRST_REST_SECONDS
            return False
        if now < self._rotate_after or not self.context.index.session_bytes():
            return False
        self._rotate_after = now + self._rest_seconds
        self._rest_seconds = min(2 * self._rest_seconds, MAX_REST_SECONDS)
        return True

    def share(self, rss_bytes: int) -> float:
        """Return the share of its width that the worker may use.

        It is 1 up to the soft part and falls to ``MIN_SHARE`` at the ceiling.
        """
        bounds = self.bounds
        over = (rss_bytes - bounds.soft_bytes) / max(1, bounds.ceiling_bytes - bounds.soft_bytes)
        return min(1.0, max(MIN_SHARE, 1.0 - (1.0 - MIN_SHARE) * over))

    async def report(self, rss_bytes: int, now: float) -> None:
        """Report memory that stays over its ceiling, and clear the report once it is below."""
        bounds = self.bounds
        if rss_bytes <= bounds.ceiling_bytes:
            self._over_since = None
            if not self.is_over(rss_bytes):
                await self.context.conditions.over(OVER)
            return
        self._over_since = now if self._over_since is None else self._over_since
        if now - self._over_since >= OVER_SECONDS:
            most = bounds.ceiling_bytes >> 20
            message = f"more than {most} MiB are resident, the ceiling for these settings and {self.rows} rows: new work is slowed"
            await self.context.conditions.say(OVER, message, OVER_REMEDY)

    def as_data(self, rss_bytes: int) -> dict[str, object]:
        """Return what `fds` and `status` show."""
        bounds = self.bounds
        return {
            "rss_bytes": rss_bytes,
            "soft_bytes": bounds.soft_bytes,
            "ceiling_bytes": bounds.ceiling_bytes,
            "parts": asdict(bounds),
            "rows": self.rows,
        }
