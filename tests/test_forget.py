"""What was forgotten is gone: no byte of it is in any file below the index, at any version of any table."""

from __future__ import annotations

import os
import secrets
import sqlite3
from pathlib import Path

import lancedb
import pytest
import trio

from everos_engine.cli.main import main
from everos_engine.engine import open_engine
from everos_engine.errors import BadQuestion
from everos_engine.loops import erase
from everos_engine.settings import Settings, load
from everos_engine.stores import embeddings
from everos_engine.stores.lance import uri_of
from everos_engine.testing import FakeEmbedder
from patience import HANG_SECONDS
from writer import fact, facts, put

FACTS = "users/u1/.atomic_facts/facts.md"


def marker() -> str:
    """A word that no compression makes shorter, and no stemmer changes."""
    return f"zq{secrets.token_hex(14)}9"


async def found_in(settings: Settings, text: str) -> set[str]:
    """Every file below the index with these bytes, and every version of a table with a row that holds the text.

    Lance compresses text: so each version that can still be opened is read too.
    """
    needle, found = text.encode(), set()
    for path in (settings.root / ".index").rglob("*"):
        if path.is_file() and needle in path.read_bytes().lower():
            found.add(path.name)
    connection = lancedb.connect(uri_of(settings.lancedb_directory, "reopen"))
    for name in sorted(path.stem for path in settings.lancedb_directory.glob("*.lance")):
        table = connection.open_table(name)
        for version in table.list_versions():
            table.checkout(version["version"])
            if any(text in str(row).lower() for row in table.to_arrow().to_pylist()):
                found.add(f"{name} version {version['version']}")
    return found


@pytest.fixture
def lasting(root: Path) -> Settings:
    flags = {"memory.root": str(root), "note.globs": ["**/*.md"], "settle_milliseconds": 20, "brake_ratio": 1}
    flags["lancedb.erase_after_hours"] = 12
    return load(flags, environment={}, user_file=root / "none.toml")


def plant(root: Path, secret: str) -> None:
    """A secret in every place that text gets to: a row, an older version of it, a name, an id, an error, a vector."""
    put(root, FACTS, facts(*(fact(number, f"word{number}") for number in range(40)), fact(41, f"the {secret} is here")))
    put(root, f"notes/{secret}.md", f"# a {secret}\n\nand {secret} again\n")
    put(root, "users/u1/.atomic_facts/bad.md", f"---\n{secret}: [\n---\n")


def unplant(root: Path, secret: str) -> None:
    put(root, FACTS, facts(*(fact(number, f"word{number}") for number in range(40))))
    (root / f"notes/{secret}.md").unlink()
    (root / "users/u1/.atomic_facts/bad.md").unlink()


async def test_a_deleted_text_stays_and_forgetting_it_leaves_no_byte(root: Path, lasting: Settings) -> None:
    secret, fake = marker(), FakeEmbedder()
    plant(root, secret)
    async with open_engine(lasting, embedder=fake) as engine:
        await engine.settle()
        vector = (await engine.context.vectors.cached([f"the {secret} is here"])).popitem()[1].tobytes()
        with pytest.raises(BadQuestion, match="still in the memory"):
            await engine.forget(text=secret)
        unplant(root, secret)
        await engine.settle()
        assert await found_in(lasting, secret), "the control: a deletion alone leaves it"
        calls = len(fake.calls)
        await engine.forget(text=secret)
        assert await found_in(lasting, secret) == set()
        assert vector not in cached_vectors(lasting)
        assert len(fake.calls) == calls
        assert len(await engine.search("word7")) == 1
        put(root, FACTS, facts(*(fact(number, f"word{number}") for number in range(41))))
        await engine.settle()
        assert len(await engine.search("word40")) == 1
    assert await found_in(lasting, secret) == set()
    async with open_engine(lasting, embedder=fake) as engine:
        assert sum((await engine.settle()).rows.values()) == 41


def cached_vectors(settings: Settings) -> bytes:
    return b"".join(path.read_bytes() for path in settings.engine_directory.glob("embeddings.db*"))


async def test_a_path_is_forgotten_once_its_file_is_gone_or_with_it(root: Path, lasting: Settings) -> None:
    secret = marker()
    plant(root, secret)
    path = f"notes/{secret}.md"
    async with open_engine(lasting, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        with pytest.raises(BadQuestion, match="still in the memory"):
            await engine.forget([path])
        put(root, FACTS, facts(fact(1, "word1")))
        (root / "users/u1/.atomic_facts/bad.md").unlink()
        await engine.forget([path], delete=True)
        assert not (root / path).exists()
        assert await found_in(lasting, secret) == set()


async def test_copies_that_were_set_aside_are_forgotten_too(root: Path, lasting: Settings) -> None:
    secret = marker()
    plant(root, secret)
    async with open_engine(lasting, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        unplant(root, secret)
        aside = lasting.lancedb_directory / "set-aside" / "note.lance"
        aside.mkdir(parents=True)
        (aside / "data").write_text(secret)
        (lasting.engine_directory / "engine.db.damaged").write_text(secret)
        await engine.forget(text=secret)
        assert await found_in(lasting, secret) == set()


async def test_a_plain_deletion_is_erased_within_the_stated_time(root: Path, lasting: Settings) -> None:
    secret = marker()
    plant(root, secret)
    async with open_engine(lasting, embedder=FakeEmbedder()) as engine:
        context = engine.context
        await engine.settle()
        await erase.erase_due(context)  # notes when the time began
        unplant(root, secret)
        await engine.settle()
        await erase.erase_due(context)
        assert await found_in(lasting, secret), "the time is not over"
        rewind(lasting, hours=13)
        await erase.erase_due(context)
        kinds = context.index.open_kinds()
        for kind in kinds:
            await context.index.erase(kind, keep_seconds=0)  # what the next time does, once the versions are old enough
        rows = await found_in(lasting, secret)
        assert not [name for name in rows if "version" in name or name.endswith((".lance", ".txn", ".manifest"))]


def rewind(settings: Settings, *, hours: float) -> None:
    """Let it be later: what was noted was noted so many hours ago."""
    with sqlite3.connect(settings.engine_directory / "engine.db") as database:
        for name, value in database.execute("SELECT name, value FROM meta WHERE name LIKE 'erased_%'").fetchall():
            at, since = value.strip("[]").split(",")
            database.execute(
                "UPDATE meta SET value = ? WHERE name = ?", (f"[{at}, {int(since) - hours * 3_600_000:.0f}]", name)
            )
    database.close()


def test_only_vectors_that_no_row_uses_are_dropped(lasting: Settings, tmp_path: Path) -> None:
    from everos_engine.stores.database import Database

    day = embeddings.USED_GRAIN_MILLISECONDS
    database = Database(tmp_path / "embeddings.db", schema=embeddings.SCHEMA)
    rows = [(1, embeddings.text_hash(text), b"x", used) for text, used in (("live", 0), ("old", 0), ("new", 10 * day))]

    def insert(tx: object) -> None:
        list(tx.executemany("INSERT INTO embedding VALUES (?, ?, ?, ?)", rows))  # type: ignore[attr-defined]

    database.write(insert)
    live = [embeddings.text_hash("live")]
    assert database.write(lambda tx: embeddings.keep_only(tx, live, unused_since_milliseconds=5 * day)) == 1
    assert database.write(lambda tx: embeddings.keep_only(tx, live, unused_since_milliseconds=None)) == 1
    assert database.read(lambda tx: list(tx.execute("SELECT text_hash FROM embedding"))) == [(live[0],)]
    database.close()


@pytest.mark.parametrize("running", [False, True])
async def test_the_command_forgets_alone_and_while_an_engine_runs(
    running: bool,  # noqa: FBT001 - what the test is run for
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    secret = marker()
    plant(root, secret)
    monkeypatch.setenv("EVEROS_EMBEDDER__KIND", "none")
    monkeypatch.setenv("EVEROS_BRAKE_RATIO", "1")
    monkeypatch.setenv("EVEROS_NOTE__GLOBS", "**/*.md")
    monkeypatch.setenv("XDG_CONFIG_HOME", os.fspath(root / "none"))
    settings = load({"memory.root": str(root)})

    async def command(*words: str) -> int:
        with trio.fail_after(HANG_SECONDS):
            return await trio.to_thread.run_sync(main, ["--root", str(root), *words])

    async with open_engine(settings, watching=running) as engine:
        await engine.settle()
        if running:
            unplant(root, secret)
            assert await command("forget", f"notes/{secret}.md") == 0
            assert "forgotten" in capsys.readouterr().out
            assert await found_in(settings, secret) == set()
    if not running:
        assert await command("forget", f"notes/{secret}.md") == 2
        unplant(root, secret)
        assert await command("forget", f"notes/{secret}.md") == 0
        assert await found_in(settings, secret) == set()
    assert await command("forget") == 2
