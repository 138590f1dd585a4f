"""Prove the law of the descriptor mode on a temporary table, so that no library upgrade changes it unnoticed.

``reopen`` pins no index descriptor. ``pinned`` pins at most 4n-1 for a column after n optimizes.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import trio
from loguru import logger

from everos_engine.settings import DescriptorMode, LanceDBSettings
from everos_engine.stores.index import Bridge, Index, open_index
from everos_engine.stores.lance import LIBRARY, Model, Row
from everos_engine.system import descriptors

PREFIX = "self-test-"
KIND = "throwaway"
CYCLES = 3
ROWS, WORDS, VOCABULARY = 20, 100, 20_000
"""Many different words. LanceDB holds a small index whole, and keeps a descriptor only for a larger one."""
LOOKS, MAX_LOOKS, LOOK_SECONDS = 20, 300, 0.01
"""The result is the smallest of several samples, because Lance may still be closing a reader on another thread. On a
busy machine that can take seconds, so the law counts as broken only after MAX_LOOKS."""


@dataclass(frozen=True, slots=True)
class SelfTest:
    """The result of a self-test: ``pinned`` index descriptors, of which ``bound`` are allowed."""

    mode: DescriptorMode
    holds: bool
    pinned: int
    bound: int
    library: str
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class _Throwaway:
    name: str = KIND
    columns: Mapping[str, str] = ()  # type: ignore[assignment]  # always given
    fts_columns: tuple[str, ...] = ("text",)


async def self_test(bridge: Bridge, settings: LanceDBSettings, *, directory: Path, claimed: DescriptorMode) -> SelfTest:
    """Write, optimize and query a temporary table below ``directory`` with ``settings``, and compare with ``claimed``.

    Raises Transient if the surroundings prevent it. Nothing is known then.
    """
    began = time.process_time()
    for stale in directory.glob(PREFIX + "*"):
        await trio.to_thread.run_sync(lambda path=stale: shutil.rmtree(path, ignore_errors=True))  # type: ignore[misc]  # a default binds the value of this turn
    place = Path(tempfile.mkdtemp(prefix=PREFIX, dir=directory))
    kind = _Throwaway(columns={"text": "string"})
    bound = 0 if claimed == "reopen" else 4 * CYCLES - 1
    index = open_index(bridge, settings, kinds={KIND: kind}, directory=place / "lancedb", cap_bytes=16 << 20)
    try:
        await _exercise(index)
        pinned = await pinned_below(place, bound=bound)
    finally:
        index.close()
        shutil.rmtree(place, ignore_errors=True)
    spent = round(time.process_time() - began, 3)
    law = SelfTest(claimed, pinned <= bound, pinned, bound, LIBRARY, spent)
    logger.info(
        "descriptor_law mode={} holds={} pinned={} bound={} library={!r}", claimed, law.holds, pinned, bound, LIBRARY
    )
    return law


async def _exercise(index: Index) -> None:
    chance = random.Random(0)  # noqa: S311 - text to fill an index
    await index.create(KIND, Model("none", 0))
    for cycle in range(CYCLES):
        texts = [" ".join(f"w{chance.randrange(VOCABULARY)}" for _ in range(WORDS)) for _ in range(ROWS)]
        rows = [Row(f"{cycle}.md", f"e{nth}", b"", {"text": f"all {text}"}, None) for nth, text in enumerate(texts)]
        await index.commit(KIND, rows, [])
        await index.optimize(KIND)
        await index.search_text(KIND, "all", where="", limit=5)


async def pinned_below(place: Path, *, bound: int) -> int:
    """Return how many index descriptors of files below ``place`` stay open. At most ``bound`` are expected."""
    least = 1 << 30
    for look in range(MAX_LOOKS):
        found = descriptors.classify(descriptors.limits()[0], lancedb=place, engine=place / "none")
        least = min(least, found["lance_index"] + found["deleted"])
        if not least or (look >= LOOKS and least <= bound):
            break
        await trio.sleep(LOOK_SECONDS)
    return least
