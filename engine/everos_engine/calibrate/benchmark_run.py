"""One benchmark run of ``fds calibrate``, in a separate process, so that no other code opens descriptors in it."""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import trio

from everos_engine.errors import Exhausted
from everos_engine.loops.fd_self_test import pinned_below
from everos_engine.settings import DescriptorMode, LanceDBSettings
from everos_engine.stores.index import Index, open_index
from everos_engine.stores.lance import Model, Row
from everos_engine.system import descriptors
from everos_engine.system.asyncio_thread import open_asyncio_thread
from everos_engine.text.kinds import KINDS

KIND = "episode"
LOOK_SECONDS = 0.005
FIRST_TEXT = 2000
"""Words a query is drawn from: the first of the sample, since people ask for what is there."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to try. ``words`` are running text, ``lengths`` the words of each FTS column of sample entries."""

    mode: DescriptorMode
    cap_bytes: int
    cycles: int
    rows: int
    queries: int
    dimension: int
    words: Sequence[str]
    lengths: Sequence[Sequence[int]]


@dataclass(slots=True)
class BenchmarkRun:
    """What was seen: descriptors before, at most, and pinned by indexes, for each cycle, and milliseconds per query.

    ``query_cpu_milliseconds`` is the mean over all threads. On a busy machine it is steadier than the clock.
    """

    base: int = 0
    peak: int = 0
    pinned: int = 0
    cycles: int = 0
    per_cycle: list[int] = field(default_factory=list)
    session_bytes: int = 0
    rss_bytes: int = 0
    cpu_seconds: float = 0.0
    query_milliseconds: list[float] = field(default_factory=list)
    query_cpu_milliseconds: float = 0.0
    exhausted: bool = False


async def run(plan: Plan, directory: Path) -> BenchmarkRun:
    """Add and optimize ``plan.cycles`` times, with a query after each. Then time ``plan.queries`` queries."""
    trial, chance = BenchmarkRun(), random.Random(0)  # noqa: S311 - text to fill an index
    settings = LanceDBSettings(descriptor_mode=plan.mode, read_deadline_seconds=5.0)
    async with open_asyncio_thread() as bridge, trio.open_nursery() as nursery:
        kinds = {KIND: KINDS[KIND]}
        index = open_index(bridge, settings, kinds=kinds, directory=directory, cap_bytes=plan.cap_bytes)
        index.on_exhausted = lambda: setattr(trial, "exhausted", True)
        try:
            await index.create(KIND, Model("calibration", plan.dimension))
            count, _ = descriptors.counter()
            trial.base = count()
            nursery.start_soon(_look, trial, count)
            await _cycles(index, plan, trial, chance, directory)
            spent = time.process_time()
            for _ in range(plan.queries):
                began = time.perf_counter()
                await _query(index, plan, chance)
                trial.query_milliseconds.append(round(1000 * (time.perf_counter() - began), 3))
            trial.query_cpu_milliseconds = round(1000 * (time.process_time() - spent) / max(1, plan.queries), 3)
            trial.session_bytes = index.session_bytes()
            trial.peak = max(trial.peak, count())
        except Exhausted:
            trial.exhausted = True
        finally:
            index.close()
            nursery.cancel_scope.cancel()
    memory = descriptors.memory()
    trial.rss_bytes = 0 if memory is None else memory.rss_bytes
    trial.cpu_seconds = round(time.process_time(), 2)
    return trial


async def _cycles(index: Index, plan: Plan, trial: BenchmarkRun, chance: random.Random, directory: Path) -> None:
    for cycle in range(plan.cycles):
        await index.commit(KIND, [_row(plan, chance, cycle * plan.rows + nth) for nth in range(plan.rows)], [])
        await index.optimize(KIND)
        await _query(index, plan, chance)
        if plan.mode == "reopen":  # none stays, but a thread of Lance may still be closing what was read
            trial.per_cycle.append(await pinned_below(directory, bound=0))
        else:
            classes = descriptors.classify(descriptors.limits()[0], lancedb=directory, engine=directory / "none")
            trial.per_cycle.append(classes["lance_index"] + classes["deleted"])
        trial.pinned = max(trial.pinned, trial.per_cycle[-1])
        trial.cycles = cycle + 1


async def _look(trial: BenchmarkRun, count: Callable[[], int]) -> None:
    while True:
        trial.peak = max(trial.peak, count())
        await trio.sleep(LOOK_SECONDS)


async def _query(index: Index, plan: Plan, chance: random.Random) -> None:
    text = " ".join(chance.choices(plan.words[:FIRST_TEXT], k=chance.randint(1, 3)))
    await index.search_text(KIND, text, where="", limit=10)


def _row(plan: Plan, chance: random.Random, number: int) -> Row:
    lengths = chance.choice(plan.lengths)
    columns = KINDS[KIND].fts_columns
    values = {
        column: " ".join(chance.choices(plan.words, k=max(1, length)))
        for column, length in zip(columns, lengths, strict=True)
    }
    vector = (
        np.random.default_rng(number).standard_normal(plan.dimension).astype(np.float32) if plan.dimension else None
    )
    return Row(f"{number // 50}.md", f"e{number}", number.to_bytes(8, "big"), values, vector)


def main() -> int:
    """Read a Plan as JSON from standard input, and write the BenchmarkRun as JSON to standard output."""
    facts: Mapping[str, object] = json.load(sys.stdin)
    with tempfile.TemporaryDirectory(prefix="everos-calibrate-") as directory:
        trial = trio.run(run, Plan(**facts), Path(directory).resolve() / "lancedb")  # type: ignore[arg-type]  # our own trial's JSON
    json.dump(asdict(trial), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
