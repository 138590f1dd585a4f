"""The engine over a real embedding service on loopback."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import trio

from derived import counted
from embedding_server import Service, always, reserved_port, serving
from everos_engine.engine import open_engine
from everos_engine.settings import Settings
from everos_engine.stores import reports
from everos_engine.testing import FakeEmbedder
from test_outage import HANGING, down, quick
from writer import FACTS, fact, facts, put


def over(service: Service, root: Path, **more: object) -> Settings:
    return over_port(int(service.server_address[1]), root, **more)


def over_port(port: int, root: Path, **more: object) -> Settings:
    http = {"embedder.kind": "http", "embedder.model": "m", "embedder.dimension": 0}
    return quick(root, **(http | {"embedder.url": f"http://127.0.0.1:{port}/v1"} | more))


async def test_a_tree_is_indexed_in_few_calls_and_the_poisoned_and_the_hanging_file_fail_alone(root: Path) -> None:
    with serving() as service:
        settings = over(service, root, worker_max_retry=1, **HANGING)
        for number in range(300):
            put(root, f"n{number}.md", f"# A\notter {number}\n# B\nstork {number}")
        put(root, "bad.md", "# A\nPOISON\n# B\nfine")
        put(root, "hang.md", "# A\nHANG\n# B\nwell")
        async with open_engine(settings, watching=False) as engine:
            counts = (await engine.settle()).counts
            assert (counts.done, counts.failed_permanent, counts.failed_retryable) == (300, 1, 1)
            assert {hit.md_path for hit in await engine.search("fine well", mode="fts")} == {"bad.md", "hang.md"}
            (bad, hang) = await engine.context.database.aread(lambda tx: reports.outcomes(tx, ["bad.md", "hang.md"]))
            assert "HTTP 400" in str(bad.error)
            assert "line 1" in str(bad.error)
            assert "did not answer within 3 s" in str(hang.error)
        assert max(len(request["input"]) for request in service.requests) == 64


async def test_a_service_that_dies_and_comes_back_leaves_nothing_to_do_by_hand(root: Path) -> None:
    put(root, "before.md", "stork")
    with reserved_port() as port:
        settings = over_port(port, root, worker_max_retry=0)
        async with open_engine(settings, watching=False) as engine, trio.open_nursery() as nursery:
            with serving(port):
                await engine.settle()
            for number in range(40):
                put(root, f"while_down{number}.md", f"heron {number}")
            nursery.start_soon(engine.settle)
            await down(engine)
            with serving(port):
                await engine.settle()
                counts = (await engine.status()).counts
            assert (counts.done, counts.failed_retryable, counts.failed_permanent) == (41, 0, 0)
            assert ((await engine.context.vectors.model()).name, engine.context.vectors.epoch) == ("http:m#1", 1)


async def test_an_engine_starts_without_its_service_and_indexes_once_it_is_there(root: Path) -> None:
    put(root, "a.md", "heron")
    with reserved_port() as port:
        settings = over_port(port, root)
        async with open_engine(settings, watching=False) as engine, trio.open_nursery() as nursery:
            nursery.start_soon(engine.settle)
            await down(engine)
            assert await engine.search("heron") == []
            with serving(port):
                await engine.settle()
            assert len(await engine.search("heron", mode="fts")) == 1


async def test_a_key_that_is_refused_waits_for_a_good_one_and_fails_nothing(root: Path) -> None:
    with serving() as service:
        settings = over(service, root, worker_max_retry=0, **{"embedder.api_key": "sk-secret"})
        put(root, "a.md", "heron")
        service.misbehave = always(401, {"error": "unknown key sk-secret"})
        async with open_engine(settings, watching=False) as engine, trio.open_nursery() as nursery:
            nursery.start_soon(engine.settle)
            await down(engine)
            await counted(engine, lambda counts: counts.delayed > 0)
            (outcome,) = await engine.context.database.aread(lambda tx: reports.outcomes(tx, ["a.md"]))
            assert "embedder.api_key" in str(outcome.error)
            assert "sk-secret" not in str(outcome.error)
            service.misbehave = None
            await engine.settle()
            assert (await engine.status()).counts.done == 1


async def test_another_model_behind_the_same_name_is_told_by_its_vectors(root: Path) -> None:
    put(root, FACTS, facts(fact(1, "heron"), fact(2, "otter")))
    with serving() as service:
        settings = over(service, root)
        async with open_engine(settings, watching=False) as engine:
            await engine.settle()
        service.model = FakeEmbedder(model="another", dimension=24)
        async with open_engine(settings, watching=False) as engine:
            await engine.settle()
            rows = await engine.context.index.rows("atomic_fact")
            found = sorted(np.asarray(row["vector"], dtype=np.float32).tolist() for row in rows)
            wanted = sorted(service.model.vector(text).tolist() for text in ("heron", "otter"))
            assert np.allclose(found, wanted, atol=1e-6)


async def test_a_file_of_ten_thousand_entries_goes_in_calls_of_64_and_one_too_large_is_not_read(root: Path) -> None:
    settings = quick(root)
    fake = FakeEmbedder()
    put(root, FACTS, facts(*(fact(number, f"fact {number}") for number in range(10_000))))
    big = put(root, "big.md", "")
    with big.open("wb") as file:
        file.truncate(50 << 20)
    async with open_engine(settings, embedder=fake, watching=False) as engine:
        status = await engine.settle()
        assert status.rows["atomic_fact"] == 10_000
        (outcome,) = await engine.context.database.aread(lambda tx: reports.outcomes(tx, ["big.md"]))
        assert (outcome.status, outcome.retryable) == ("failed", False)
        assert "52428800 bytes, more than max_file_bytes=16777216" in str(outcome.error)
        assert engine.context.progress.commits["atomic_fact"] == 1
        calls = len(fake.calls)
        assert max(len(call) for call in fake.calls) == 64
        assert fake.peak <= 8
        put(root, FACTS, facts(*(fact(number, f"fact {number}") for number in range(9_999)), fact(1, "one")))
        put(root, FACTS, facts(*(fact(number, f"fact {number}") for number in range(9_999)), fact(99_999, "one")))
        await engine.settle()
        assert len(fake.calls) == calls + 1
