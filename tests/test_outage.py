"""The engine under an embedder in trouble: nothing is lost, nobody waits for another's trouble, nothing mixes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import trio
from numpy.typing import NDArray

from derived import counted
from everos_engine.diagnose import status
from everos_engine.engine import Engine, open_engine, open_queue
from everos_engine.errors import BadText, Transient, Unavailable
from everos_engine.loops.context import now_milliseconds
from everos_engine.loops.requests import enqueue
from everos_engine.settings import Settings, load
from everos_engine.stores import meta, queue, reports
from everos_engine.testing import FakeEmbedder
from patience import HANG_SECONDS
from writer import FACTS, fact, facts, put

DOWN = Unavailable("HTTP 503")
HANGING = {"embedder.hedge_seconds": 0.5, "embedder.deadline_seconds": 3}
"""Bounds for tests in which a text hangs."""


def quick(root: Path, **more: object) -> Settings:
    """Settings whose pauses are short, and whose sweeps come only when they are asked for.

    The bounds of a call are long: what is not meant to hang is never taken for hanging, however busy the machine is.
    """
    flags: dict[str, object] = {
        "memory.root": str(root),
        "note.globs": ["**/*.md"],
        "scan_interval_seconds": 3600,
        "worker_retry_backoff_seconds": 0.01,
        "embedder.outage_probe_seconds": 0.02,
        "embedder.outage_probe_max_seconds": 0.05,
        "embedder.hedge_seconds": HANG_SECONDS,
        "embedder.deadline_seconds": HANG_SECONDS,
    }
    return load(flags | more, environment={}, user_file=root / "none")


async def down(engine: Engine) -> None:
    assert engine.context.vectors.breaker is not None
    await engine.context.vectors.breaker.down.wait_value(lambda reason: reason is not None)


@pytest.mark.parametrize("reason", queue.OUTSIDE)
async def test_an_engine_that_starts_waits_for_nothing_that_only_the_last_one_knew_of(
    root: Path, reason: queue.WaitsFor
) -> None:
    """The next one has another embedder, a root that is back, or room on its disk, and no event tells so."""
    settings = load({"memory.root": str(root), "embedder.kind": "none"}, environment={}, user_file=root / "none")
    put(root, FACTS, facts(fact(1, "heron")))
    database = open_queue(settings)
    try:
        await enqueue(settings, database, [FACTS])
        (claim,) = database.write(lambda tx: queue.claim(tx, "dead", limit=1, now_milliseconds=1))
        due = now_milliseconds() + queue.LONGEST_WAIT_MILLISECONDS
        postponed = partial(queue.postpone, held=claim, error="down", not_before=due, now_milliseconds=1)
        database.write(partial(postponed, waits_for=reason))
        database.write(lambda tx: meta.note_outage(tx, "down", now_milliseconds=1))
    finally:
        database.close()
    async with open_engine(settings, watching=False) as engine:
        with trio.fail_after(HANG_SECONDS):
            assert (await engine.settle()).counts.done == 1
        assert await engine.context.database.aread(meta.outage) is None


async def test_changes_outlive_an_outage_without_losing_an_attempt(root: Path) -> None:
    settings = quick(root, worker_max_retry=0)
    fake = FakeEmbedder()
    put(root, "before.md", "heron")
    async with open_engine(settings, embedder=fake, watching=False) as engine:
        await engine.settle()
        fake.outage = DOWN
        for number in range(30):
            put(root, f"n{number}.md", f"otter{number}")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.settle)
            await down(engine)
            calls = len(fake.calls)
            for _ in range(3):  # three probes later
                seen = len(fake.calls)
                while len(fake.calls) == seen:
                    await trio.sleep(0.005)
            assert all(len(texts) == 1 for texts in fake.calls[calls + 8 :])
            assert (await engine.status()).counts.failed_retryable == 0
            (hit,) = await engine.search("heron", mode="fts")
            assert hit.md_path == "before.md"
            fake.outage = None
        counts = (await engine.status()).counts
        assert (counts.done, counts.failed_retryable, counts.failed_permanent) == (31, 0, 0)
        model = await engine.context.vectors.model()
        assert (model.name, engine.context.vectors.epoch) == ("fake#1", 1)


async def test_a_service_that_is_down_at_the_start_is_waited_for_and_status_says_why(root: Path) -> None:
    settings = quick(root)
    fake = FakeEmbedder()
    fake.outage = DOWN
    put(root, "a.md", "heron")
    async with open_engine(settings, embedder=fake) as engine, trio.open_nursery() as nursery:
        nursery.start_soon(engine.settle)
        await down(engine)
        await counted(engine, lambda counts: counts.delayed > 0)
        shown = status.snapshot(settings)
        assert "HTTP 503" in status.as_text(shown)
        assert "HTTP 503" in json.dumps(status.as_json(shown)["embedder"])
        (outcome,) = await engine.context.database.aread(lambda tx: reports.outcomes(tx, ["a.md"]))
        assert (outcome.status, outcome.retry_count) == ("pending", 0)
        assert str(outcome.error).startswith("waiting for the embedder: HTTP 503")
        fake.outage = None
    assert "HTTP 503" not in status.as_text(status.snapshot(settings))


async def test_settle_ends_when_an_outage_outlasts_its_patience_and_the_changes_wait_on(root: Path) -> None:
    settings = quick(root, **{"embedder.outage_patience_seconds": 0.1, "worker_poll_interval_seconds": 0.05})
    fake = FakeEmbedder()
    fake.outage = DOWN
    put(root, "a.md", "heron")
    async with open_engine(settings, embedder=fake) as engine:
        with pytest.raises(Unavailable, match="HTTP 503"):
            await engine.settle()
        counts = (await engine.status()).counts
        assert (counts.pending + counts.processing, counts.failed_retryable) == (1, 0)  # it may not be handed back yet
    fake.outage = None
    async with open_engine(settings, embedder=fake) as engine:
        await engine.settle()
        assert len(await engine.search("heron")) == 1


async def test_deletions_and_known_texts_do_not_wait_for_the_service(root: Path) -> None:
    settings = quick(root)
    fake = FakeEmbedder()
    path = put(root, FACTS, facts(fact(1, "heron"), fact(2, "otter")))
    async with open_engine(settings, embedder=fake) as engine:
        await engine.settle()
        fake.outage = DOWN
        with trio.fail_after(HANG_SECONDS):
            path.write_text(facts(fact(2, "otter")))
            put(root, "users/u1/.atomic_facts/copy.md", facts(fact(3, "otter")))
            await engine.settle()
        assert await engine.search("heron") == []
        assert len(await engine.search("otter")) == 2


async def test_a_text_that_fails_leaves_the_other_entries_of_its_file_searchable(root: Path) -> None:
    settings = quick(root)
    path = put(root, FACTS, facts(fact(1, "heron"), fact(2, "FLAKY"), fact(3, "otter")))
    async with open_engine(settings, embedder=FakeEmbedder(), watching=False) as engine:
        counts = (await engine.settle()).counts
        assert (counts.failed_retryable, counts.done) == (1, 0)
        assert len(await engine.search("heron")) == len(await engine.search("otter")) == 1
        (failed,) = await engine.sync()
        where = 1 + path.read_text().splitlines().index("<!-- entry:af_20250227_00000002 -->")
        assert str(failed.error).startswith(f"line {where}: entry 'af_20250227_00000002': ")


async def test_a_text_that_hangs_fails_alone_and_again_only_alone(root: Path) -> None:
    settings = quick(root, worker_max_retry=1, **HANGING)
    fake = FakeEmbedder()
    put(root, "hang.md", "HANG")
    for number in range(20):
        put(root, f"n{number}.md", f"otter{number}")
    async with open_engine(settings, embedder=fake, watching=False) as engine:
        counts = (await engine.settle()).counts
        assert (counts.done, counts.failed_retryable) == (20, 1)
        together = [texts for texts in fake.calls if "HANG" in texts and len(texts) > 1]
        assert len(together) <= 2


class Swapped(FakeEmbedder):
    """A service behind one name, whose model somebody replaces."""

    def __init__(self) -> None:
        super().__init__(model="service")
        self.dimension = 0  # as a service whose width nobody set
        self.real = FakeEmbedder(model="one")

    async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        if self.outage is not None:
            raise self.outage
        return await self.real.embed(texts)


@pytest.mark.parametrize("dimension", [16, 24])
async def test_a_model_replaced_behind_its_name_in_an_outage_never_mixes(root: Path, dimension: int) -> None:
    settings = quick(root)
    service = Swapped()
    put(root, FACTS, facts(fact(1, "heron"), fact(2, "otter")))
    put(root, "a.md", "note")
    async with open_engine(settings, embedder=service) as engine:
        await engine.settle()
        service.outage = DOWN
        put(root, FACTS, facts(fact(1, "heron"), fact(2, "otter"), fact(3, "stork")))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.settle)
            await down(engine)
            service.real, service.outage = FakeEmbedder(model="two", dimension=dimension), None
        await engine.settle()
        for kind, texts in (("atomic_fact", ["heron", "otter", "stork"]), ("note", ["note"])):
            rows = await engine.context.index.rows(kind)
            found = sorted(np.asarray(row["vector"], dtype=np.float32).tolist() for row in rows)
            wanted = sorted(service.real.vector(text).tolist() for text in texts)
            assert len(found) == len(wanted)
            assert np.allclose(found, wanted)


async def test_a_model_replaced_while_the_engine_was_away_is_embedded_again(root: Path) -> None:
    settings = quick(root)
    service = Swapped()
    put(root, "a.md", "note")
    async with open_engine(settings, embedder=service) as engine:
        await engine.settle()
    service.real = FakeEmbedder(model="two")
    async with open_engine(settings, embedder=service) as engine:
        await engine.settle()
        (row,) = await engine.context.index.rows("note")
        assert np.allclose(np.asarray(row["vector"]), service.real.vector("note"))
    assert math.isclose(float(np.linalg.norm(service.real.vector("note"))), 1, rel_tol=1e-6)


async def test_a_search_without_a_mode_falls_back_to_words_while_the_service_is_down(root: Path) -> None:
    http = {"embedder.kind": "http", "embedder.url": "http://127.0.0.1:9", "embedder.model": "m"}
    settings = quick(root, **http)
    fake = FakeEmbedder()
    put(root, "a.md", "heron")
    async with open_engine(settings, embedder=fake) as engine:
        await engine.settle()
        fake.outage = DOWN
        assert len(await engine.search("heron")) == 1
        assert len(await engine.search("heron", mode="hybrid")) == 1
        with pytest.raises(Transient):
            await engine.search("stork", mode="vector")


@pytest.mark.parametrize(
    "trouble",
    [BadText("HTTP 400"), Transient("HTTP 500"), ConnectionResetError("reset"), ValueError("a bug")],
    ids=repr,
)
async def test_a_hybrid_search_falls_back_to_words_if_the_query_is_refused(root: Path, trouble: Exception) -> None:
    class Refusing(FakeEmbedder):
        async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
            if any(text == "heron asked" for text in texts):
                raise trouble
            return await super().embed(texts)

    put(root, "a.md", "heron")
    async with open_engine(quick(root), embedder=Refusing()) as engine:
        await engine.settle()
        assert len(await engine.search("heron asked", mode="hybrid")) == 1
        with pytest.raises((Transient, BadText)):
            await engine.search("heron asked", mode="vector")
        assert len(await engine.search("heron", mode="vector")) == 1


async def test_a_hybrid_search_falls_back_to_words_if_the_query_gets_no_answer(root: Path) -> None:
    put(root, "a.md", "heron")
    async with open_engine(quick(root, **HANGING), embedder=FakeEmbedder()) as engine:
        await engine.settle()
        with trio.fail_after(HANG_SECONDS):
            assert len(await engine.search("heron HANG", mode="hybrid")) == 1
            with pytest.raises(Transient, match="did not answer"):
                await engine.search("heron HANG", mode="vector")


@pytest.mark.parametrize("trouble", [ConnectionResetError("reset"), ValueError("a bug"), MemoryError()], ids=repr)
async def test_an_embedder_that_raises_a_plain_exception_ends_nothing(root: Path, trouble: Exception) -> None:
    class Failing(FakeEmbedder):
        broken = True

        async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
            found = await super().embed(texts)
            if self.broken:
                raise trouble
            return found

    put(root, "a.md", "heron")
    failing = Failing()
    with trio.fail_after(HANG_SECONDS):
        async with open_engine(quick(root), embedder=failing) as engine:
            await down(engine)
            assert await engine.search("heron", mode="hybrid") == []
            assert (await engine.status()).counts.failed_retryable == 0
            failing.broken = False
            await engine.settle()
            assert len(await engine.search("heron", mode="hybrid")) == 1
            assert engine.health.reopenings == 0
