"""Tests of tables at rest: what an hour of edits left on disk goes once old versions may go, and then nobody is woken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import trio

from everos_engine.engine import Engine, open_engine
from everos_engine.loops import compactor
from everos_engine.settings import Settings
from everos_engine.system import descriptors
from everos_engine.testing import FakeEmbedder
from patience import HANG_SECONDS
from writer import fact, facts, put

EDITS, FACTS, KEEP_SECONDS = 60, 30, 1.0
TIMES_FRESH = 2
DAY = "users/u1/.atomic_facts/atomic_fact-2025-02-27.md"


@pytest.fixture
def short(settings: Settings) -> Settings:
    return replace(settings, lancedb=replace(settings.lancedb, keep_versions_seconds=KEEP_SECONDS))


def write(root: Path, edit: int) -> None:
    """All but one fact stay the same from one edit to the next."""
    texts = [f"heron {number} waits for tide {edit if number == edit % FACTS else 0}" for number in range(FACTS)]
    put(root, DAY, facts(*(fact(number + 1, text) for number, text in enumerate(texts))))


async def fresh_size(settings: Settings, elsewhere: Path) -> int:
    """Bytes of an index of the last edit alone."""
    elsewhere.mkdir()
    write(elsewhere, EDITS - 1)
    other = replace(settings, memory=replace(settings.memory, root=elsewhere))
    async with open_engine(other, embedder=FakeEmbedder(), watching=False) as engine:
        await engine.settle()
    return size(other)


def size(settings: Settings) -> int:
    found = descriptors.tree_size(settings.lancedb_directory)
    assert found is not None
    return found[2]


async def at_rest(engine: Engine) -> None:
    """Return once maintenance plans to sleep until something is written."""
    with trio.fail_after(HANG_SECONDS):
        while (beat := engine.context.beats.get("maintain")) is None or beat.within_seconds < compactor.LONG_SECONDS:
            await trio.sleep(0.05)


async def test_at_rest_the_index_comes_within_twice_a_fresh_one_and_the_engine_sleeps(
    short: Settings, root: Path, tmp_path: Path
) -> None:
    async with open_engine(short, embedder=FakeEmbedder()) as engine:
        for edit in range(EDITS):
            write(root, edit)
            await engine.settle()
        await at_rest(engine)
        left = size(short)
        assert len(await engine.search("heron", limit=FACTS)) == FACTS
    assert left <= TIMES_FRESH * await fresh_size(short, tmp_path / "fresh")


async def test_versions_that_an_earlier_engine_left_are_pruned_by_the_next_one(
    short: Settings, root: Path, tmp_path: Path
) -> None:
    async with open_engine(short, embedder=FakeEmbedder(), watching=False) as engine:
        for edit in range(EDITS):
            write(root, edit)
            await engine.settle()
    before = size(short)
    async with open_engine(short, embedder=FakeEmbedder()) as engine:
        await at_rest(engine)
    fresh = await fresh_size(short, tmp_path / "fresh")
    assert size(short) <= TIMES_FRESH * fresh < before


async def test_few_versions_take_as_many_passes_as_many(short: Settings, root: Path) -> None:
    async with open_engine(short, embedder=FakeEmbedder(), watching=False) as engine:
        for edit in range(3):
            write(root, edit)
            await engine.settle()
        rest, folder = compactor.Rest(engine.context), short.lancedb_directory / "atomic_fact.lance" / "_versions"
        with trio.fail_after(HANG_SECONDS):
            while rest.seconds() < float("inf"):
                await trio.sleep(max(0.0, rest.seconds()))
                await rest.compact()
        assert len(list(folder.iterdir())) <= compactor.MIN_VERSIONS


async def test_a_table_that_no_pass_makes_smaller_wakes_nobody_again(short: Settings, root: Path) -> None:
    write(root, 0)
    async with open_engine(short, embedder=FakeEmbedder(), watching=False) as engine:
        await engine.settle()
        rest = compactor.Rest(engine.context)
        folder = short.lancedb_directory / "atomic_fact.lance" / "_versions"
        for number in range(5):
            (folder / f"left-{number}").touch()  # nobody's: no optimize removes them
        with trio.fail_after(HANG_SECONDS):
            while rest.seconds() < float("inf"):
                await trio.sleep(max(0.0, rest.seconds()))
                await rest.compact()
        assert len(list(folder.iterdir())) > compactor.MIN_VERSIONS
        assert rest.seconds() == float("inf")
        rest.wake()
        assert rest.seconds() <= KEEP_SECONDS
