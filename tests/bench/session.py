"""What the caches of a Session are worth: a search with a Session that edits have filled, against one with a new Session."""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import trio
from harness import BOOK, REPOSITORY, Figure

from everos_engine.engine import Engine, open_engine
from everos_engine.settings import Settings, load
from everos_engine.stores.index import Index, open_index
from everos_engine.testing import FakeEmbedder

sys.path.append(str(REPOSITORY))
from fuzz.realistic import Memory

MIB = 1 << 20
SIZES_MIB = (8, 32)
"""Bytes in the Session at which it is held against a new one."""
PAIRS, MAX_EDITS, SEARCH_EVERY = 150, 2000, 5
STRETCHES = ((0, 10), (10, 150))
"""Searches since the new Session began."""
ROTATIONS = 30
KINDS = ("episode", "atomic_fact")


def memory_of_1600_rows(place: Path) -> tuple[Memory, Settings]:
    """A planted memory, and settings under which nothing rotates or edits it but the benchmark."""
    memory = Memory(place.resolve(), random.Random(1))
    memory.plant()
    flags = {
        "memory.root": str(memory.root),
        "watch.mode": "off",
        "scan_interval_seconds": 3600,
        "lancedb.session_most_bytes": 1 << 40,
    }
    return memory, load(flags, environment={}, user_file=place / "none")


def embedder() -> FakeEmbedder:
    """Vectors of the local model's width at no cost: a search costs what the index costs."""
    return FakeEmbedder(dimension=512)


@BOOK.bench
def filled_session_against_a_new_one() -> Sequence[Figure]:
    """Both search the same tables for the same words, in pairs, in a random order; the filled one is as a daemon's is."""

    async def measure(place: Path) -> tuple[dict[int, list[tuple[float, float]]], float]:
        memory, settings = memory_of_1600_rows(place)
        chance, found, edits = random.Random(2), dict[int, list[tuple[float, float]]](), 0
        async with open_engine(settings, embedder=embedder(), watching=False) as engine:
            await engine.settle()
            index = engine.context.index
            first = index.session_bytes()
            for size in SIZES_MIB:
                while index.session_bytes() < size * MIB and edits < MAX_EDITS:
                    memory.edit()
                    await engine.settle()
                    await engine.compact()  # what is due, as a daemon does; not while pairs are timed
                    edits += 1
                    if not edits % SEARCH_EVERY:
                        await engine.search(memory.question(), mode="hybrid")
                found[size] = await pairs(engine, settings, memory, chance)
            return found, (index.session_bytes() - first) / edits / 1024

    with tempfile.TemporaryDirectory(prefix="everos-bench-") as name:
        found, each = trio.run(measure, Path(name))
    figures = [Figure("what an edit of a memory of 1,600 rows adds to the Session's caches", "KiB", [each])]
    for size, both in found.items():
        for start, end in STRETCHES:
            filled, new = zip(*both[start:end], strict=True)
            when = f"search {start + 1} to {end} of a new Session against one of {size} MiB, in pairs"
            figures += [
                Figure(f"{when}: median", "x", [at(new, 0.5) / at(filled, 0.5)], 1.1 if start else None),
                Figure(f"{when}: 99th percentile", "x", [at(new, 0.99) / at(filled, 0.99)]),
            ]
        figures += [
            Figure(f"search with a Session of {size} MiB", "ms", [one for one, _ in both]),
            Figure("the same with the new one", "ms", [other for _, other in both]),
        ]
    return figures


async def pairs(engine: Engine, settings: Settings, memory: Memory, chance: random.Random) -> list[tuple[float, float]]:
    """Milliseconds of a search by words and one by vector, with the engine's Session and with a new one."""
    old = engine.context.index
    new = open_index(old.bridge, settings.lancedb, kinds=old.kinds, directory=old.directory, cap_bytes=old.cap_bytes)
    model, found = await engine.context.vectors.model(), list[tuple[float, float]]()
    try:
        for number in range(PAIRS):
            words, kind = memory.question(), KINDS[number % len(KINDS)]
            vector = embedder().vector(words)
            times = {}
            for index in chance.sample((old, new), k=2):
                began = time.perf_counter()
                await ask(index, kind, words, vector, model.name)
                times[id(index)] = 1000 * (time.perf_counter() - began)
            found.append((times[id(old)], times[id(new)]))
    finally:
        new.close()
    return found


async def ask(index: Index, kind: str, words: str, vector: object, model: str) -> None:
    """One search by words and one by vector, as a hybrid search makes them."""
    await index.search_text(kind, words, where="", limit=10)
    await index.search_vector(kind, vector, model=model, where="", limit=10)  # type: ignore[arg-type]


@BOOK.bench
def rotation_of_the_session() -> Sequence[Figure]:
    """The first search after a rotation, against the next one."""

    async def measure(place: Path) -> tuple[list[float], list[float]]:
        first, second = list[float](), list[float]()
        memory, settings = memory_of_1600_rows(place)
        async with open_engine(settings, embedder=embedder(), watching=False) as engine:
            await engine.settle()
            await engine.compact()
            for _ in range(ROTATIONS):
                engine.context.index.rotate()
                words = memory.question()
                for times in (first, second):
                    began = time.perf_counter()
                    await engine.search(words, mode="hybrid")
                    times.append(1000 * (time.perf_counter() - began))
        return first, second

    with tempfile.TemporaryDirectory(prefix="everos-bench-") as name:
        first, second = trio.run(measure, Path(name))
    return [
        Figure("first search after a rotation of the Session", "ms", first),
        Figure("the same search again", "ms", second),
    ]


def at(values: Sequence[float], share: float) -> float:
    """A quantile."""
    return sorted(values)[int(share * (len(values) - 1))]
