"""A damaged index is derived data: it is made again by itself, from markdown and cached vectors."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from derived import described, indexed
from everos_engine.engine import open_engine
from everos_engine.settings import Settings, load
from everos_engine.testing import FakeEmbedder
from patience import HANG_SECONDS
from writer import fact, facts, put


def newest_manifest(table: Path) -> Path:
    return max(table.glob("_versions/*.manifest"), key=lambda path: path.stat().st_mtime_ns)


def tear_manifest(table: Path) -> None:
    """What a power loss leaves."""
    newest_manifest(table).write_bytes(newest_manifest(table).read_bytes()[:40])


def empty_manifest(table: Path) -> None:
    newest_manifest(table).write_bytes(b"")


def zero_manifest(table: Path) -> None:
    """What some file systems leave: a file of the right size without its content. It names nobody."""
    newest_manifest(table).write_bytes(bytes(newest_manifest(table).stat().st_size))


def remove_data(table: Path) -> None:
    for path in (table / "data").iterdir():
        path.unlink()


def garble_data(table: Path) -> None:
    for path in (table / "data").iterdir():
        path.write_bytes(random.Random(0).randbytes(100))


def remove_indexes(table: Path) -> None:
    shutil.rmtree(table / "_indices")


def remove_manifests(table: Path) -> None:
    shutil.rmtree(table / "_versions")


def replace_by_a_file(table: Path) -> None:
    shutil.rmtree(table)
    table.write_text("")


DAMAGES = [
    tear_manifest,
    empty_manifest,
    zero_manifest,
    remove_data,
    garble_data,
    remove_indexes,
    remove_manifests,
    replace_by_a_file,
    shutil.rmtree,
]


def quiet(root: Path) -> Settings:
    chosen = {"memory.root": str(root), "watch.mode": "off", "scan_interval_seconds": 3600, "settle_milliseconds": 20}
    return load({**chosen, "worker_retry_backoff_seconds": 0.01}, environment={}, user_file=root / "none")


@pytest.mark.parametrize("damage", DAMAGES)
async def test_damage_done_while_the_engine_was_down_is_healed_at_the_start(
    damage: Callable[[Path], None], root: Path
) -> None:
    for number in range(5):
        put(root, f"users/u1/.atomic_facts/{number}.md", facts(fact(number, f"word{number}")))
    settings, fake = quiet(root), FakeEmbedder()
    async with open_engine(settings, embedder=fake) as engine:
        await engine.settle()
    texts = sum(len(call) for call in fake.calls)
    damage(settings.lancedb_directory / "atomic_fact.lance")
    async with open_engine(settings, embedder=fake) as engine:
        with trio.fail_after(HANG_SECONDS):
            await engine.settle()
        assert await indexed(engine) == described(settings)
        assert len(await engine.search("word3")) == 1
    assert sum(len(call) for call in fake.calls) == texts + 1  # the probe of the new start


async def test_damage_done_under_the_running_engine_is_healed_by_the_next_edit(root: Path) -> None:
    for number in range(5):
        put(root, f"users/u1/.atomic_facts/{number}.md", facts(fact(number, f"word{number}")))
    settings = quiet(root)
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        remove_data(settings.lancedb_directory / "atomic_fact.lance")
        engine.context.index.rotate()
        put(root, "users/u1/.atomic_facts/0.md", facts(fact(0, "edited")))
        with trio.fail_after(HANG_SECONDS):
            await engine.settle()
        assert await indexed(engine) == described(settings)
        assert len(await engine.search("word3")) == 1
        assert (await engine.status()).counts.failed_retryable == 0


@pytest.mark.parametrize("damage", DAMAGES)
async def test_damage_done_under_the_running_engine_is_healed_by_the_search_that_meets_it(
    damage: Callable[[Path], None], root: Path
) -> None:
    for number in range(5):
        put(root, f"users/u1/.atomic_facts/{number}.md", facts(fact(number, f"word{number}")))
    settings = quiet(root)
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        damage(settings.lancedb_directory / "atomic_fact.lance")
        engine.context.index.rotate()
        await engine.search("word3")
        with trio.fail_after(HANG_SECONDS):
            await engine.settle()
        assert len(await engine.search("word3")) == 1
        assert await indexed(engine) == described(settings)
        assert (await engine.status()).counts.failed_retryable == 0
