"""A damaged engine.db: commands say so in one line, and whoever may, makes it again from markdown without embedding a text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import apsw
import pytest
import trio

from derived import described, indexed
from everos_engine.cli.main import main
from everos_engine.embed.protocol import PROBE_SENTENCE
from everos_engine.engine import open_engine
from everos_engine.loops import worker
from everos_engine.settings import Settings, load
from everos_engine.stores import database as door
from everos_engine.testing import FakeEmbedder
from patience import HANG_SECONDS
from test_embeddings import HOWS, damage
from trapped_disk import trapped_disk
from writer import fact, facts, put

DAMAGES = [how for how in HOWS if how not in {"emptied", "removed"}]
REPLACED = ("a directory", "a pipe")
"""A running engine keeps the file that it opened, as with one that was removed."""


def quiet(root: Path) -> Settings:
    chosen = {"memory.root": str(root), "watch.mode": "off", "scan_interval_seconds": 3600, "settle_milliseconds": 20}
    more = {"worker_retry_backoff_seconds": 0.01, "worker_poll_interval_seconds": 0.05}
    return load({**chosen, **more}, environment={}, user_file=root / "none")


async def in_step(settings: Settings, fake: FakeEmbedder) -> None:
    for number in range(60):
        put(settings.root, f"users/u1/.atomic_facts/{number}.md", facts(fact(number, f"word{number}")))
    async with open_engine(settings, embedder=fake, watching=False) as engine:
        await engine.settle()
    fake.calls.clear()


def texts_of(fake: FakeEmbedder) -> set[str]:
    return {text for call in fake.calls for text in call} - {PROBE_SENTENCE}


@pytest.mark.parametrize("how", HOWS)
async def test_a_start_sets_it_aside_and_embeds_nothing_again(how: str, root: Path) -> None:
    settings, fake = quiet(root), FakeEmbedder()
    path = settings.engine_directory / "engine.db"
    await in_step(settings, fake)
    damage(path, how)
    with trio.fail_after(HANG_SECONDS):
        async with open_engine(settings, embedder=fake) as engine:
            await engine.settle()
            assert await indexed(engine) == described(settings)
            assert ("database_recreated" in engine.context.conditions.now) == (how in DAMAGES)
    assert texts_of(fake) == set()
    assert Path(f"{path}.damaged").exists() == (how in DAMAGES)


@pytest.mark.parametrize("how", [how for how in DAMAGES if how not in REPLACED])
async def test_damage_under_a_running_engine_opens_the_stores_again(how: str, root: Path) -> None:
    settings, fake = quiet(root), FakeEmbedder()
    path = settings.engine_directory / "engine.db"
    await in_step(settings, fake)
    with trio.fail_after(HANG_SECONDS):
        async with open_engine(settings, embedder=fake) as engine:
            await engine.settle()
            first = engine.context
            first.database.checkpoint()
            first.database.read(lambda tx: door.drain(tx.execute("PRAGMA shrink_memory")))
            damage(path, how)
            put(root, "users/u1/.atomic_facts/new.md", facts(fact(1, "after")))
            while engine.context is first or "database_recreated" not in engine.context.conditions.now:
                with trio.move_on_after(0.1):
                    await engine.settle()
                await trio.lowlevel.checkpoint()
            await engine.settle()
            assert await indexed(engine) == described(settings)
    assert texts_of(fake) == {"after"}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize(
    "words", [["status"], ["fix"], ["explain", "users/u1/.atomic_facts/1.md"], ["doctor", "queue"]]
)
async def test_a_command_that_only_reads_says_it_in_plain_lines(
    words: list[str], how: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = quiet(root)
    await in_step(settings, FakeEmbedder())
    damage(settings.engine_directory / "engine.db", how)
    status = await trio.to_thread.run_sync(main, ["--root", str(root), *words])
    told = capsys.readouterr()
    assert status in {1, 2}, told
    assert "damaged" in told.out + told.err
    assert "sync" in told.out + told.err
    assert "Traceback" not in told.out + told.err


@contextmanager
def full(monkeypatch: pytest.MonkeyPatch, only: str) -> Iterator[None]:
    monkeypatch.setattr(door, "BUSY_RETRIES", 1)
    with trapped_disk(only) as disk:
        disk.error = apsw.FullError
        yield


@pytest.mark.parametrize("words", [["sync"], ["status"], ["fix", "--apply"], ["doctor", "queue"], ["search", "word1"]])
@pytest.mark.parametrize("known", [False, True])
async def test_a_full_disk_is_named_in_one_line_and_never_called_damage(
    words: list[str], root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, known: bool
) -> None:
    settings = quiet(root)
    if known:
        await in_step(settings, FakeEmbedder())
    put(root, "users/u1/.atomic_facts/new.md", facts(fact(1, "new")))
    with full(monkeypatch, "engine.db"):
        status = await trio.to_thread.run_sync(main, ["--root", str(root), *words])
    told = capsys.readouterr()
    assert "Traceback" not in told.out + told.err
    assert "damaged" not in told.out + told.err
    if words[0] in {"sync", "fix"}:
        assert status == 2, told
        assert "make room" in told.err


async def test_a_start_on_a_full_disk_waits_for_room(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, fake = quiet(root), FakeEmbedder()
    monkeypatch.setattr(worker, "MAX_DELAY_SECONDS", 0.2)
    await in_step(settings, fake)
    put(root, "users/u1/.atomic_facts/new.md", facts(fact(1, "after")))
    with trio.fail_after(HANG_SECONDS), trapped_disk("engine.db") as disk:
        disk.error = apsw.FullError
        async with trio.open_nursery() as nursery:

            async def lift() -> None:
                while disk.strikes < 3:
                    await trio.sleep(0.01)
                disk.error = None

            nursery.start_soon(lift)
            async with open_engine(settings, embedder=fake) as engine:
                await engine.settle()
                assert await indexed(engine) == described(settings)
    assert texts_of(fake) == {"after"}
