"""The soak's child: one whole engine that searches its own index without pause until its standard input ends.

Prints one JSON line: searches made and failed, and after the last change whether the index is what the tree says.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

import trio

from everos_engine import load, open_engine
from everos_engine.engine import Engine
from everos_engine.errors import Transient
from everos_engine.loops import guard
from everos_engine.search import Mode
from everos_engine.settings import Settings
from everos_engine.stores import census
from everos_engine.system import files, memory
from everos_engine.testing import FakeEmbedder
from everos_engine.text import kinds

SEARCHERS, SHOWN = 3, 5
PAUSE_SECONDS = 0.05
SETTLE_SECONDS = 60.0
BYTES_REST_SECONDS = 5.0
"""Between two rotations for the Session's bytes; a minute in a daemon, less here so that a short run sees many."""
MODES: tuple[Mode, ...] = ("fts", "vector", "hybrid")
WORDS = [f"word{number}" for number in range(400)]


class Forgetful(list[tuple[str, ...]]):
    """The fake's list of calls would be the one thing here that grows."""

    def append(self, _call: tuple[str, ...]) -> None:
        return


@dataclass(slots=True)
class Tally:
    """What the searchers did."""

    searches: int = 0
    errors: list[str] = field(default_factory=list)


async def serve(settings: Settings) -> dict[str, object]:
    """Run until told to stop; what is to be judged."""
    tally = Tally()
    guard.BYTES_REST_SECONDS = BYTES_REST_SECONDS
    embedder = FakeEmbedder()
    embedder.calls = Forgetful()
    async with open_engine(settings, embedder=embedder) as engine:
        async with trio.open_nursery() as nursery:
            for seed in range(SEARCHERS):
                nursery.start_soon(search, engine, tally, random.Random(seed))
            print("serving", flush=True)
            await trio.to_thread.run_sync(sys.stdin.read)
            nursery.cancel_scope.cancel()
        with trio.move_on_after(SETTLE_SECONDS):
            await engine.settle()
        status = await engine.status()
        failed = await engine.desk.database.aread(census.failed)
        indexed: dict[tuple[str, str], str] = {}
        described: dict[tuple[str, str], str] = {}
        try:
            indexed, described = await rows_of(engine), tree_of(settings)
        except Transient as error:  # a leak took every descriptor: the engine still tells what is pending
            tally.errors.append(repr(error)[:300])
        return {
            "searches": tally.searches,
            "search_errors": tally.errors[:SHOWN],
            "failed": [f"{outcome.md_path}: {outcome.error}" for outcome in failed],
            "pending": status.counts.pending + status.counts.processing,
            "rows": len(indexed),
            "lost": sorted(map(str, described.keys() - indexed.keys()))[:SHOWN],
            "left_over": sorted(map(str, indexed.keys() - described.keys()))[:SHOWN],
            "stale": sorted(str(key) for key in indexed.keys() & described.keys() if indexed[key] != described[key])[
                :SHOWN
            ],
            "changes": status.counts.lsn_max,
            "fds": engine.desk.fds,
        }


async def search(engine: Engine, tally: Tally, chance: random.Random) -> None:
    """Ask, wait a moment, ask again; an error is noted, the next question is asked all the same."""
    while True:
        words = " ".join(chance.choices(WORDS, k=chance.randint(1, 3)))
        try:
            await engine.search(words, mode=chance.choice(MODES), limit=5)
        except Exception as error:
            tally.errors.append(repr(error)[:300])
        tally.searches += 1
        await trio.sleep(PAUSE_SECONDS)


async def rows_of(engine: Engine) -> dict[tuple[str, str], str]:
    """Key -> content hash of every row there is."""
    found = {}
    for kind in engine.desk.index.open_kinds():
        for key, content_hash in (await engine.desk.index.keys(kind)).items():
            found[key] = content_hash.hex()
    return found


def tree_of(settings: Settings) -> dict[tuple[str, str], str]:
    """Key -> content hash of every entry in the files, derived without queue, ledger or index."""
    found = {}
    swept = files.walk(settings.root, lambda key: kinds.recognise(key, note_globs=settings.note.globs))
    for key, (place, _) in swept.found.items():
        reading = files.read(settings.root, place, max_file_bytes=settings.max_file_bytes)
        for entry in kinds.parse(place, reading.sources).entries:
            found[key, entry.entry_id] = entry.content_hash.hex()
    return found


def main(arguments: list[str]) -> None:
    memory.begin_again(os.environ)  # as `everos-engine run` does
    flags: Mapping[str, object] = json.loads(arguments[-1])
    print(json.dumps(trio.run(serve, load(flags, environment={}))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
