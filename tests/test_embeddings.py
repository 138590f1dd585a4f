"""The embedding cache is a help and never a need: damaged, full, locked or removed, it stops nothing and voids no table."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import apsw
import numpy as np
import pytest
import trio

from derived import described, indexed
from everos_engine.embed.circuit_breaker import CircuitBreaker
from everos_engine.embed.protocol import PROBE_SENTENCE
from everos_engine.engine import open_engine
from everos_engine.loops import vectors as module
from everos_engine.loops.vectors import Vectors
from everos_engine.settings import EmbedderSettings, Settings, load
from everos_engine.stores import database as door
from everos_engine.stores import embeddings
from everos_engine.stores.embeddings import Cache
from everos_engine.testing import FakeEmbedder
from patience import HANG_SECONDS
from trapped_disk import trapped_disk
from writer import fact, facts, put

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from everos_engine.stores.database import Transaction

HOWS = ["zeroed", "garbage", "truncated", "emptied", "inner pages", "removed", "a directory", "a pipe"]
DAY = 86_400_000


class Renamed(FakeEmbedder):
    """A service behind one name, whose model somebody may replace."""

    def __init__(self, real: str) -> None:
        super().__init__(model="service")
        self.real = FakeEmbedder(model=real)

    def vector(self, text: str) -> NDArray[np.float32]:
        return self.real.vector(text)


def quiet(root: Path) -> Settings:
    chosen = {"memory.root": str(root), "watch.mode": "off", "scan_interval_seconds": 3600, "settle_milliseconds": 20}
    return load({**chosen, "worker_retry_backoff_seconds": 0.01}, environment={}, user_file=root / "none")


def write(root: Path, word: str, files: int = 40) -> None:
    for number in range(files):
        put(root, f"users/u1/.atomic_facts/{number}.md", facts(fact(number, f"{word}{number}")))


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "removed":
        path.unlink()
        return
    if how in {"a directory", "a pipe"}:
        path.unlink()
        path.mkdir() if how == "a directory" else os.mkfifo(path)
        return
    if how == "zeroed":
        content[:] = bytes(len(content))
    elif how == "garbage":
        content[:] = b"not a database at all" * 100
    elif how == "truncated":
        del content[len(content) // 2 :]
    elif how == "emptied":
        content.clear()
    elif how == "inner pages":
        content[4096:] = b"\xa5" * (len(content) - 4096)
    path.write_bytes(content)


def texts_of(fake: FakeEmbedder) -> set[str]:
    return {text for call in fake.calls for text in call} - {PROBE_SENTENCE}


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("how", HOWS)
async def test_a_damaged_cache_costs_no_more_than_what_was_in_it(how: str, root: Path, *, running: bool) -> None:
    settings, fake = quiet(root), FakeEmbedder()
    cache = settings.engine_directory / "embeddings.db"
    write(root, "word")
    put(root, "users/u1/.atomic_facts/new.md", facts(fact(1, "before")))
    with trio.fail_after(HANG_SECONDS):
        async with open_engine(settings, embedder=fake, watching=False) as engine:
            await engine.settle()
            if running:
                damage(cache, how)
                fake.calls.clear()
                put(root, "users/u1/.atomic_facts/new.md", facts(fact(1, "after")))
                await engine.settle()
                assert await indexed(engine) == described(settings)
                assert texts_of(fake) == {"after"}
        if not running:
            damage(cache, how)
            fake.calls.clear()
            put(root, "users/u1/.atomic_facts/new.md", facts(fact(1, "after")))
        async with open_engine(settings, embedder=fake, watching=False) as engine:
            await engine.settle()
            assert await indexed(engine) == described(settings)
        assert texts_of(fake) == {"after"}, "the tables are sound, so their texts need no vectors"
    made_again = Cache(cache)
    assert await made_again.use(lambda _tx: True, otherwise=False)
    made_again.close()


@pytest.mark.parametrize("error", [apsw.FullError, apsw.IOError, apsw.BusyError, apsw.CantOpenError])
async def test_a_cache_that_cannot_be_written_is_left_out_and_comes_back(
    error: type[Exception], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "BUSY_RETRIES", 1)
    settings, fake = quiet(root), FakeEmbedder()
    write(root, "word", files=5)
    with trapped_disk("embeddings.db") as disk, trio.fail_after(HANG_SECONDS):
        disk.error = error
        async with open_engine(settings, embedder=fake, watching=False) as engine:
            await engine.settle()
            assert disk.strikes
            assert await indexed(engine) == described(settings)
            assert await engine.search("word3")
            disk.error = None
            monkeypatch.setattr(embeddings, "REST_SECONDS", 0.0)
            engine.context.vectors.cache._rests_until = 0.001
            write(root, "other", files=5)
            await engine.settle()
        found = Cache(settings.engine_directory / "embeddings.db")
        known = await found.use(
            lambda tx: set(embeddings.get(tx, 1, ["word1", "other1"], now_milliseconds=1)), otherwise=None
        )
        found.close()
        assert known == {"other1"}


async def test_a_lost_cache_never_gives_a_table_s_model_to_another_model(root: Path) -> None:
    settings, service = quiet(root), Renamed("one")
    write(root, "word", files=3)
    for real, remove, wanted in [("one", False, 3), ("two", False, 3), ("two", True, 0), ("one", True, 3)]:
        service.real = FakeEmbedder(model=real)
        service.calls.clear()
        if remove:
            (settings.engine_directory / "embeddings.db").unlink()
        async with open_engine(settings, embedder=service, watching=False) as engine:
            await engine.settle()
            rows = await engine.context.index.rows("atomic_fact")
            found = sorted(np.asarray(row["vector"], dtype=np.float32).tolist() for row in rows)
        assert np.allclose(found, sorted(service.real.vector(f"word{number}").tolist() for number in range(3)))
        assert len(texts_of(service)) == wanted, (real, remove)


@pytest.mark.parametrize(
    "jumps", [(0, 0), (DAY, 0), (-DAY, 0), (0, DAY), (0, -DAY), (3 * DAY, -5 * DAY), (-9 * DAY, 20 * DAY)]
)
async def test_what_a_replaced_model_may_have_made_is_distrusted_however_the_clock_was_set(
    jumps: Sequence[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [50 * DAY + 5]
    monkeypatch.setattr(module, "now_milliseconds", lambda: now[0])
    service = Renamed("one")
    gate = CircuitBreaker(service, EmbedderSettings())
    vectors = Vectors(Cache(tmp_path / "embeddings.db"), gate)
    await vectors.model()
    texts = []
    for number, jump in enumerate(jumps):
        texts.append(f"text {number}")
        await vectors.keep(vectors.epoch, {texts[-1]: service.real.vector(texts[-1])})
        now[0] += jump
    service.real = FakeEmbedder(model="two")
    gate.probe_vector, gate.epoch, gate.unsure_seconds = service.vector(PROBE_SENTENCE), gate.epoch + 1, 600.0
    await vectors.model()
    service.real = FakeEmbedder(model="one")
    gate.probe_vector, gate.epoch, gate.unsure_seconds = service.vector(PROBE_SENTENCE), gate.epoch + 1, 0.0
    assert await vectors.cached(texts) == {}
    vectors.cache.close()


async def test_a_use_in_the_future_does_not_keep_a_vector_from_being_dropped(tmp_path: Path) -> None:
    cache, vector = Cache(tmp_path / "embeddings.db"), np.ones(4, dtype=np.float32)

    def put_at(text: str, day: int) -> Callable[[Transaction], None]:
        return lambda tx: embeddings.put(tx, 1, {text: vector}, now_milliseconds=day * DAY)

    room = 3 * (16 + embeddings.ROW_OVERHEAD_BYTES)
    await cache.use(put_at("ahead", 900), otherwise=None)
    await cache.use(lambda tx: embeddings.prune(tx, max_bytes=room, now_milliseconds=10 * DAY), otherwise=0)
    for text in ("one", "two", "three"):
        await cache.use(put_at(text, 11), otherwise=None)
    await cache.use(lambda tx: embeddings.prune(tx, max_bytes=room, now_milliseconds=11 * DAY), otherwise=0)
    kept = await cache.use(lambda tx: {row[0] for row in tx.execute("SELECT text_hash FROM embedding")}, otherwise=None)
    assert kept is not None
    assert embeddings.text_hash("ahead") not in kept
    cache.close()
