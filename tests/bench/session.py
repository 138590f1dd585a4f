"""What a budget of the Session is worth: the time of searches while a memory is edited, budget against budget."""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import trio
from harness import BOOK, REPOSITORY, Figure

from everos_engine.engine import Engine, open_engine
from everos_engine.loops import guard
from everos_engine.search import Mode
from everos_engine.settings import load
from everos_engine.testing import FakeEmbedder

sys.path.append(str(REPOSITORY / "fuzz"))
from realistic import Memory  # noqa: E402 - the memory that the soak of the defaults uses

MIB = 1 << 20
BUDGETS_MIB = (2, 8, 32, 256)
AGAINST = 256
STEPS = 400
MODES: tuple[Mode, ...] = ("fts", "vector", "hybrid")
ROTATIONS = 30


class OneCall(FakeEmbedder):
    """Vectors of the local model's width, at no cost: a search with it costs what the index costs."""

    def __init__(self) -> None:
        super().__init__(dimension=512)


@BOOK.bench
def budgets_of_the_session() -> Sequence[Figure]:
    """Engines with the same memory of 1,600 rows in one process, edited alike, asked the same, in a random order each time."""

    async def measure(place: Path) -> tuple[dict[int, list[float]], dict[int, int], float]:
        found: dict[int, list[float]] = {budget: [] for budget in BUDGETS_MIB}
        guard.BYTES_REST_SECONDS = 0.0  # an hour of edits is squeezed into minutes
        async with AsyncExitStack() as stack:
            engines: dict[int, Engine] = {}
            memories: dict[int, Memory] = {}
            for budget in BUDGETS_MIB:
                memories[budget] = Memory((place / str(budget)).resolve(), random.Random(1))
                memories[budget].plant()
                flags = {
                    "memory.root": str(memories[budget].root), "watch.mode": "off", "scan_interval_seconds": 3600,
                    "lancedb.session_most_bytes": budget * MIB,
                }  # fmt: skip
                settings = load(flags, environment={}, user_file=place / "none")
                engines[budget] = await stack.enter_async_context(open_engine(settings, embedder=OneCall()))
                await engines[budget].settle()
            chance, before = random.Random(2), engines[AGAINST].desk.index.session_bytes()
            for _ in range(STEPS):
                for budget in BUDGETS_MIB:
                    memories[budget].edit()
                    await engines[budget].settle()
                for mode in MODES:
                    words = memories[AGAINST].question()
                    for budget in chance.sample(BUDGETS_MIB, k=len(BUDGETS_MIB)):
                        began = time.perf_counter()
                        await engines[budget].search(words, mode=mode)
                        found[budget].append(1000 * (time.perf_counter() - began))
            rotations = {budget: engine.desk.index.rotations for budget, engine in engines.items()}
            grown = engines[AGAINST].desk.index.session_bytes() - before
            return found, rotations, grown / STEPS / 1024

    with tempfile.TemporaryDirectory(prefix="everos-bench-") as name:
        found, rotations, grown = trio.run(measure, Path(name))
    figures = [Figure("bytes that an edit with three searches adds to a Session of 256 MiB", "KiB", [grown])]
    for budget in BUDGETS_MIB:
        note = f"{rotations[budget]} rotations in {STEPS} edits"
        figures.append(
            Figure(f"search with a Session of at most {budget} MiB, 1,600 rows", "ms", found[budget], note=note)
        )
    for budget in BUDGETS_MIB[:-1]:
        middle = at(found[budget], 0.5) / at(found[AGAINST], 0.5)
        late = at(found[budget], 0.99) / at(found[AGAINST], 0.99)
        figures += [
            Figure(f"median of a search, {budget} against {AGAINST} MiB", "x", [middle], 1.1 if budget >= 32 else None),
            Figure(f"99th percentile of a search, {budget} against {AGAINST} MiB", "x", [late]),
        ]
    return figures


@BOOK.bench
def rotation_of_the_session() -> Sequence[Figure]:
    """The first search after a rotation, against the next one."""

    async def measure(root: Path) -> tuple[list[float], list[float]]:
        first, second = [], []
        memory = Memory(root.resolve(), random.Random(1))
        memory.plant()
        settings = load({"memory.root": str(memory.root), "watch.mode": "off"}, environment={}, user_file=root / "none")
        async with open_engine(settings, embedder=OneCall()) as engine:
            await engine.settle()
            for _ in range(ROTATIONS):
                engine.desk.index.rotate()
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
