"""An index made by version 0.1.0 opens under today's engine, and no text is embedded again."""

from __future__ import annotations

import tarfile
from pathlib import Path

import apsw
import pytest

from derived import described, indexed
from everos_engine.embed.protocol import PROBE_SENTENCE
from everos_engine.engine import open_engine, open_queue
from everos_engine.errors import Fatal
from everos_engine.settings import Settings, load
from everos_engine.testing import FakeEmbedder

KEPT = ("md_change_state", "ledger", "counter", "incarnation")
MADE_BY_0_1_0 = Path(__file__).parent / "data" / "root-0.1.0.tar.gz"


@pytest.fixture
def old(tmp_path: Path) -> Settings:
    """The root as version 0.1.0 left it: five files in step, and one with broken frontmatter."""
    with tarfile.open(MADE_BY_0_1_0) as archive:
        archive.extractall(tmp_path, filter="data")
    flags = {"memory.root": str(tmp_path / "root"), "note.globs": ["notes/*.md"]}
    return load(flags, environment={}, user_file=tmp_path / "none.toml")


def version_of(settings: Settings) -> int:
    database = apsw.Connection(str(settings.engine_directory / "engine.db"))
    ((found,),) = database.execute("PRAGMA user_version")
    database.close()
    return int(found)


async def test_an_index_of_version_0_1_0_is_upgraded_with_no_text_embedded_again(old: Settings) -> None:
    assert version_of(old) == 2
    embedder = FakeEmbedder()
    async with open_engine(old, embedder=embedder, watching=False) as engine:
        status = await engine.settle()
        assert status.counts.failed_permanent == 1
        assert status.rows == {"agent_skill": 1, "atomic_fact": 1, "episode": 1, "note": 2, "user_profile": 1}
        (old.root / "notes" / "broken.md").unlink()  # it has no rows, and cannot be described
        assert await indexed(engine) == described(old)
    assert version_of(old) == 3
    assert {text for call in embedder.calls for text in call} <= {PROBE_SENTENCE}


async def test_an_upgrade_keeps_what_the_queue_and_the_ledger_knew(old: Settings) -> None:
    made_by_old = apsw.Connection(str(old.engine_directory / "engine.db"))
    before = {table: list(made_by_old.execute(f"SELECT * FROM {table} ORDER BY 1, 2")) for table in KEPT}
    made_by_old.close()
    assert all(before.values())
    database = open_queue(old)
    try:
        for table in KEPT:
            sql = f"SELECT * FROM {table} ORDER BY 1, 2"
            after = database.read(lambda tx, sql=sql: list(tx.execute(sql)))
            assert [row[: len(kept)] for row, kept in zip(after, before[table], strict=True)] == before[table]
    finally:
        database.close()


def test_a_database_of_a_newer_engine_is_refused_and_named(old: Settings) -> None:
    database = apsw.Connection(str(old.engine_directory / "engine.db"))
    database.execute("PRAGMA user_version = 4000")
    database.close()
    with pytest.raises(Fatal, match=r"engine\.db has version 4000.*newer everos-engine"):
        open_queue(old, may_replace=True)
    assert version_of(old) == 4000


def test_a_database_older_than_every_upgrade_is_made_again(old: Settings) -> None:
    database = apsw.Connection(str(old.engine_directory / "engine.db"))
    database.execute("PRAGMA user_version = 1")
    database.close()
    opened = open_queue(old)
    try:
        assert opened.read(lambda tx: list(tx.execute("SELECT count(*) FROM md_change_state"))) == [(0,)]
    finally:
        opened.close()
    assert version_of(old) == 3
