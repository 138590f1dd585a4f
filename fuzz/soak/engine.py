"""The soak's child: one whole engine that searches its own index without pause until its standard input ends.

With ``--defaults`` it is the engine as a user gets it, with the local model: it is asked three questions every two seconds,
until it reads a line. Prints one JSON line: searches made and failed, and after the last change whether the index is what the tree says.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import time
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field

import trio

from derived import described, indexed
from everos_engine import load, open_engine
from everos_engine.engine import Engine
from everos_engine.errors import Transient
from everos_engine.search import Mode
from everos_engine.settings import Settings
from everos_engine.stores import reports
from everos_engine.system import memory
from everos_engine.testing import FakeEmbedder
from fuzz.realistic import Memory

SEARCHERS, SHOWN = 3, 5
PAUSE_SECONDS = 0.05
DEFAULT_BEAT_SECONDS = 2.0
SETTLE_SECONDS = 60.0
MODES: tuple[Mode, ...] = ("fts", "vector", "hybrid")
WORDS = [f"word{number}" for number in range(400)]


class Forgetful(list[tuple[str, ...]]):
    """The fake's list of calls would be the one thing here that grows."""

    def append(self, _call: tuple[str, ...]) -> None:
        return


@dataclass(slots=True)
class Tally:
    """What the searchers did; the time of each search is kept for the defaults only."""

    searches: int = 0
    milliseconds: array[float] = field(default_factory=lambda: array("d"))
    errors: list[str] = field(default_factory=list)


async def serve(settings: Settings) -> dict[str, object]:
    """Run until told to stop; what is to be judged."""
    embedder = FakeEmbedder()
    embedder.calls = Forgetful()
    async with open_engine(settings, embedder=embedder) as engine:
        tally = Tally()
        async with trio.open_nursery() as nursery:
            for seed in range(SEARCHERS):
                nursery.start_soon(search, engine, tally, random.Random(seed))
            print("serving", flush=True)
            await trio.to_thread.run_sync(sys.stdin.read)
            nursery.cancel_scope.cancel()
        return await account(settings, engine, tally)


async def serve_defaults(settings: Settings) -> dict[str, object]:
    """Index everything, then answer questions until a line is read; rest until the input ends."""
    words = Memory(settings.root, random.Random(1))
    async with open_engine(settings) as engine:
        tally = Tally()
        await engine.settle()
        gc.freeze()  # as `everos-engine run` does
        async with trio.open_nursery() as nursery:
            for seed, mode in enumerate(MODES):
                nursery.start_soon(ask, engine, tally, words, mode, seed * DEFAULT_BEAT_SECONDS / len(MODES))
            print("serving", flush=True)
            await trio.to_thread.run_sync(sys.stdin.readline)
            nursery.cancel_scope.cancel()
        await trio.to_thread.run_sync(sys.stdin.read)
        return await account(settings, engine, tally)


async def ask(engine: Engine, tally: Tally, words: Memory, mode: Mode, first_seconds: float) -> None:
    """Ask once a beat, on the clock."""
    await trio.sleep(first_seconds)
    due = trio.current_time()
    while True:
        began = time.perf_counter()
        try:
            await engine.search(words.question(), mode=mode, limit=10)
        except Exception as error:  # an error is a finding, and the next question is asked all the same
            tally.errors.append(repr(error)[:300])
        tally.milliseconds.append(1000 * (time.perf_counter() - began))
        tally.searches += 1
        due += DEFAULT_BEAT_SECONDS
        await trio.sleep_until(due)


async def account(settings: Settings, engine: Engine, tally: Tally) -> dict[str, object]:
    """What is to be judged, once all is in step."""
    with trio.move_on_after(SETTLE_SECONDS):
        await engine.settle()
    status = await engine.status()
    failed = await engine.context.database.aread(reports.failed)
    rows: dict[tuple[str, str], str] = {}
    entries: dict[tuple[str, str], str] = {}
    try:
        rows, entries = await indexed(engine), described(settings)
    except (Transient, AssertionError) as error:  # a leak took every descriptor: the engine still tells what is pending
        tally.errors.append(repr(error)[:300])
    return {
        "searches": tally.searches,
        "search_errors": tally.errors[:SHOWN],
        "failed": [f"{outcome.md_path}: {outcome.error}" for outcome in failed],
        "pending": status.counts.pending + status.counts.processing,
        "rows": len(rows),
        "lost": sorted(map(str, entries.keys() - rows.keys()))[:SHOWN],
        "left_over": sorted(map(str, rows.keys() - entries.keys()))[:SHOWN],
        "stale": sorted(str(key) for key in rows.keys() & entries.keys() if rows[key] != entries[key])[:SHOWN],
        "changes": status.counts.lsn_max,
        "fds": engine.context.fds,
        "notes": [note.code for note in engine.context.conditions.now.values()],
        "latency": quantiles(tally.milliseconds),
    }


def quantiles(milliseconds: array[float]) -> dict[str, float]:
    """The median, the 99th percentile and the longest."""
    known = sorted(milliseconds) or [0.0]
    return {
        "p50": round(known[len(known) // 2], 1),
        "p99": round(known[int(0.99 * len(known))], 1),
        "longest": round(known[-1], 1),
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


def main(arguments: list[str]) -> None:
    memory.restart_tuned(os.environ)  # as `everos-engine run` does
    flags: Mapping[str, object] = json.loads(arguments[-1])
    how = serve_defaults if "--defaults" in arguments else serve
    print(json.dumps(trio.run(how, load(flags, environment={}))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
