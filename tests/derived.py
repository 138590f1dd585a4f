"""Read what the index holds, and derive what it should hold from the files alone. Tests and fuzz suites use it."""

from __future__ import annotations

from collections.abc import Callable

import trio

from everos_engine.engine import Engine
from everos_engine.settings import Settings
from everos_engine.stores.reports import Counts
from everos_engine.system import files
from everos_engine.text import kinds
from patience import HANG_SECONDS


async def indexed(engine: Engine) -> dict[tuple[str, str], str]:
    """Return key -> content hash of every row. Raises AssertionError if two rows have one key."""
    found = {}
    for kind in engine.context.index.open_kinds():
        rows, twice = await engine.context.index.keys(kind)
        assert not twice, twice
        found |= {key: content_hash.hex() for key, content_hash in rows.items()}
    return found


def described(settings: Settings) -> dict[tuple[str, str], str]:
    """Return key -> content hash of every entry in the files, without the engine's queue, ledger or index."""
    found = {}
    swept = files.walk(settings.root, lambda key: kinds.recognise(key, note_globs=settings.note.globs))
    for key, (place, _) in swept.found.items():
        reading = files.read(settings.root, place, max_file_bytes=settings.max_file_bytes)
        for entry in kinds.parse(place, reading.sources).entries:
            found[key, entry.entry_id] = entry.content_hash.hex()
    return found


async def counted(engine: Engine, wanted: Callable[[Counts], bool]) -> Counts:
    """The queue's counts once they are as wanted. A mark that is made while they are read is not waited for again."""
    with trio.fail_after(HANG_SECONDS):
        while True:
            seen = engine.context.applied.value
            counts = (await engine.status()).counts
            if wanted(counts):
                return counts
            await engine.context.applied.wait_value(lambda now, seen=seen: now != seen)
