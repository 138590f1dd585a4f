"""An engine in a process of its own at a low descriptor limit, told by lines on its input what to do.

`hoard` takes every descriptor away until `release`, `search COUNT` searches, `end` ends.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

import trio

from derived import described, indexed
from everos_engine.engine import Engine, open_engine
from everos_engine.settings import load
from everos_engine.testing import FakeEmbedder
from test_engine import failures

QUESTIONS = ["heron", "otter", "the", "user", "meeting", "memory", "project", "plan", "coffee", "test", "python"]


class Hoarder(threading.Thread):
    """Opens files until there is no descriptor left, and again whatever is let go, until told; then closes all."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.full, self.release = threading.Event(), threading.Event()

    def run(self) -> None:
        held = []
        while not self.release.is_set():
            try:
                held.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                self.full.set()
                time.sleep(0.002)
        for handle in held:
            os.close(handle)


class Peak(threading.Thread):
    """The most descriptors seen, looked at every half a millisecond."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.count = 0

    def run(self) -> None:
        while True:
            self.count = max(self.count, os.stat("/proc/self/fd").st_size)
            time.sleep(0.0005)


def say(word: str, **more: object) -> None:
    print(json.dumps({"word": word, **more}), flush=True)


async def hoard(engine: Engine) -> None:
    """Search all the while; a search may wait for a descriptor, but none fails."""
    hoarder = Hoarder()
    hoarder.start()
    await trio.to_thread.run_sync(hoarder.full.wait)
    say("full")
    answered, began, cpu = 0, time.monotonic(), time.process_time()

    async def wait_for_release() -> None:
        line = await trio.to_thread.run_sync(sys.stdin.readline)
        assert line == "release\n"
        hoarder.release.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_for_release)
        while not hoarder.release.is_set():
            await engine.search("heron", limit=3)
            answered += 1
            await trio.sleep(0.05)
    say("released", answered=answered, cpu_share=(time.process_time() - cpu) / (time.monotonic() - began))


async def search(engine: Engine, count: int) -> None:
    """So many searches, one after another for the first half, and all at once for the second."""
    chance, hits = random.Random(0), 0

    async def one() -> None:
        nonlocal hits
        mode: Any = chance.choice(["fts", "vector", "hybrid"])
        hits += len(await engine.search(chance.choice(QUESTIONS), mode=mode, limit=5))

    for _ in range(count // 2):
        await one()
    async with trio.open_nursery() as nursery:
        for _ in range(count - count // 2):
            nursery.start_soon(one)
    say("searched", hits=hits)


async def main(flags: dict[str, object]) -> None:
    settings = load(flags, environment={}, user_file=Path("none"))
    peak = Peak()
    peak.start()
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        say("ready")
        while (line := await trio.to_thread.run_sync(sys.stdin.readline)) and line != "end\n":
            word, *numbers = line.split()
            await (hoard(engine) if word == "hoard" else search(engine, int(numbers[0])))
        status = await engine.settle()
        say(
            "end",
            failures=await failures(engine),
            pending=status.counts.pending,
            rows=sum(status.rows.values()),
            agrees=await indexed(engine) == described(settings),
            exhaustions=engine.context.exhaustion.value,
            rotations=engine.context.index.rotations,
            peak=peak.count,
        )


resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[1])))
trio.run(main, json.loads(sys.argv[2]))
