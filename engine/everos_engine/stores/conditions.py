"""Conditions that need a person: logged once when they begin, and shown in ``status`` until they are over."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from everos_engine.errors import Damaged, Transient
from everos_engine.stores import meta
from everos_engine.stores.database import Database, Transaction

META = "notes"


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition by its code, what it means here, and what to do about it."""

    code: str
    message: str
    remedy: str


@dataclass(slots=True)
class Conditions:
    """The conditions that last now. They are kept in the queue's database, so that ``status`` needs no running engine.

    Memory comes first, because the engine acts and answers by it. A write that SQLite refuses is made up for by the
    next ``say``, ``over`` or ``keep``.
    """

    database: Database
    now: dict[str, Condition] = field(default_factory=dict)
    _kept: str | None = None

    async def begin(self) -> None:
        """Forget the conditions of an earlier engine. Those that still last are found and reported again."""
        self._kept = None
        await self.keep()

    async def say(self, code: str, message: str, remedy: str) -> None:
        """Begin or renew a condition. It is logged when it is new, and when its text changed."""
        note = Condition(code, message, remedy)
        if self.now.get(code) != note:
            if code not in self.now:
                from loguru import logger

                logger.warning("{} message={!r} remedy={!r}", code, message, remedy)
            self.now[code] = note
            await self.keep()

    async def over(self, *codes: str) -> None:
        """End conditions, if they last."""
        ended = [code for code in codes if self.now.pop(code, None)]
        from loguru import logger

        for code in ended:
            logger.info("{}_over", code)
        if ended:
            await self.keep()

    async def keep(self) -> None:
        """Write the conditions to SQLite if it holds others. Raises only Damaged. Any other trouble is ignored."""
        text = json.dumps([asdict(note) for note in self.now.values()])
        if text == self._kept:
            return
        self._kept = None
        try:
            await self.database.awrite(lambda tx: meta.put(tx, META, text))
        except Damaged:
            raise
        except Transient:
            return
        self._kept = text


def kept(tx: Transaction) -> list[Condition]:
    """Return the conditions that lasted when an engine last wrote them."""
    return [Condition(**note) for note in json.loads(meta.get(tx, META) or "[]")]
