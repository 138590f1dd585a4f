"""What the index holds, and what the tree says it should."""

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
    """Key -> content hash of every row; no key twice."""
    found = {}
    for kind in engine.context.index.open_kinds():
        rows = await engine.context.index.rows(kind)
        keys = [(str(row["md_path"]), str(row["entry_id"])) for row in rows]
        assert len(set(keys)) == len(keys)
        found.update(dict(zip(keys, (str(row["content_hash"]) for row in rows), strict=True)))
    return found


def described(settings: Settings) -> dict[tuple[str, str], str]:
    """What the tree says, derived without the engine's queue, ledger or index."""
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
