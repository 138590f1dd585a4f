"""How soon an edit is searchable, and what disturbs it."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from harness import BOOK, Figure, p95

from everos_engine.engine import Engine, open_engine
from everos_engine.settings import load
from everos_engine.testing import FakeEmbedder

FILES = 200
LONG_SECONDS = 60


@asynccontextmanager
async def running(fake: FakeEmbedder) -> AsyncIterator[tuple[Engine, Path]]:
    """An engine over a settled root of notes, as `run` would have it."""
    with tempfile.TemporaryDirectory(prefix="everos-bench-") as name:
        root = Path(name)
        for number in range(FILES):
            write(root, number, "first")
        flags = {"memory.root": name, "note.globs": ["*.md"]}
        async with open_engine(load(flags, environment={}, user_file=root / "none"), embedder=fake) as engine:
            await engine.settle()
            yield engine, root


def write(root: Path, number: int, word: str) -> None:
    sections = "".join(
        f"# Section {at}\nOrdinary text {at} of file {number} about herons and tides.\n\n" for at in range(4)
    )
    (root / f"{number}.md").write_text(f"{sections}# Changing\n{word}\n")


async def searchable(engine: Engine, root: Path, number: int, word: str) -> float:
    """Milliseconds from before the save until a search finds it."""
    began = time.perf_counter()
    write(root, number, word)
    with trio.fail_after(LONG_SECONDS):
        while True:
            seen = engine.context.applied.value
            if await engine.search(word, mode="fts", limit=1):
                return 1000 * (time.perf_counter() - began)
            await engine.context.applied.wait_value(lambda now, seen=seen: now != seen)


async def edits(engine: Engine, root: Path, count: int, *, start: int = 0) -> list[float]:
    chance, found = random.Random(start), []
    for number in range(start, start + count):
        found.append(await searchable(engine, root, number % FILES, f"w{number}x{start}"))
        await trio.sleep(0.02 + chance.random() * 0.06)  # edits do not come in step with the watcher's beat
    return found


@BOOK.bench
def edit_to_searchable() -> Sequence[Figure]:
    """Save to hit, through the watcher."""

    async def measure() -> list[float]:
        async with running(FakeEmbedder()) as (engine, root):
            await edits(engine, root, 10, start=1000)
            return await edits(engine, root, 200)

    found = trio.run(measure)
    return [
        Figure("edit to searchable", "ms", found, 150),
        Figure("edit to searchable, 95th percentile", "ms", [p95(found)]),
    ]


@BOOK.bench
def burst_of_100_edits() -> Sequence[Figure]:
    """Calls and commits that a hundred saves at once cost."""

    async def measure() -> tuple[list[int], list[int], list[float]]:
        calls, commits, waited = [], [], []
        fake = FakeEmbedder()
        async with running(fake) as (engine, root):
            for acquire in range(5):
                await trio.sleep(1)  # the burst before has settled in every sense
                before = (len(fake.calls), engine.context.progress.commits.get("note", 0), time.perf_counter())
                for number in range(100):
                    write(root, number, f"burst{acquire}n{number}")
                await engine.settle()
                calls.append(len(fake.calls) - before[0])
                commits.append(engine.context.progress.commits["note"] - before[1])
                waited.append(1000 * (time.perf_counter() - before[2]))
        return calls, commits, waited

    calls, commits, waited = trio.run(measure)
    return [
        Figure("burst of 100 edits: embedding calls", "calls", calls, 10),
        Figure("burst of 100 edits: commits to the table", "commits", commits, 5),
        Figure("burst of 100 edits: until all are searchable", "ms", waited),
    ]


@BOOK.bench
def neighbours_of_trouble() -> Sequence[Figure]:
    """Edits beside a file that cannot be parsed, a text that is refused and a call that hangs, against the same files in health."""

    async def measure() -> tuple[list[float], list[float]]:
        alone, beside = [], []
        async with running(FakeEmbedder()) as (engine, root):
            await edits(engine, root, 10, start=1000)
            for acquire in range(4):
                for number in range(25):
                    (root / "poisoned.md").write_text(f"# A\nhealthy {acquire} {number}\n")
                    (root / "malformed.md").write_text(f"---\na: [{acquire}, {number}]\n---\n# A\ntext\n")
                    alone += await edits(engine, root, 1, start=2000 + 100 * acquire + number)
                (root / "hanging.md").write_text(f"# A\nHANG {acquire}\n")
                for number in range(25):
                    (root / "poisoned.md").write_text(f"# A\nPOISON {acquire} {number}\n")
                    (root / "malformed.md").write_text(f"---\na: [{acquire} {number}\n---\n")
                    beside += await edits(engine, root, 1, start=5000 + 100 * acquire + number)
                (root / "hanging.md").write_text("# A\nat peace\n")
                (root / "poisoned.md").write_text("# A\nat peace\n")
                await trio.sleep(0.5)
        return alone, beside

    alone, beside = trio.run(measure)
    alone_median, beside_median = sorted(alone)[len(alone) // 2], sorted(beside)[len(beside) // 2]
    return [
        Figure("edit beside a poisoned, a malformed and a hanging file", "ms", beside),
        Figure("the same edits with those files in health, in turns in one run", "ms", alone),
        Figure("ratio of the two medians", "x", [beside_median / alone_median], 1.2),
    ]
