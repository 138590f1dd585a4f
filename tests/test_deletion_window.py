"""Deletions within a minute count together, whoever records them: the engine, events, commands, the worker."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
from hypothesis import settings as budget
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from derived import described, indexed
from everos_engine.cli.main import main
from everos_engine.engine import open_engine, open_queue
from everos_engine.loops import deletion_guard, reconcile, requests
from everos_engine.loops.deletion_guard import DeletionGuard, is_too_much, to_hold
from everos_engine.loops.reconcile import reconcile_tree
from everos_engine.loops.requests import enqueue
from everos_engine.settings import Settings, load
from everos_engine.stores import held, queue
from everos_engine.stores.held import Passed
from everos_engine.testing import FakeEmbedder
from patience import HANG_SECONDS
from test_deletion_guard import held as held_by
from test_deletion_guard import plant, quiet
from writer import fact, facts, put

if TYPE_CHECKING:
    from everos_engine.stores.database import Transaction


@pytest.fixture
def long_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a test is within the window, on a slow machine too."""
    monkeypatch.setattr(deletion_guard, "WINDOW_SECONDS", HANG_SECONDS)


def remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink()


@pytest.mark.parametrize(
    ("passed", "count", "known", "too_much"),
    [
        ([], 0, 100, False),
        ([], 30, 100, False),
        ([], 31, 100, True),
        ([], 20, 20, False),
        ([], 21, 30, True),
        ([(20, 100)], 10, 80, False),
        ([(20, 100)], 11, 80, True),
        ([(10, 100), (10, 90), (10, 80)], 1, 70, True),
        ([(20, 100)], 11, 1080, True),  # files that came meanwhile enlarge nothing
        ([(1, 10_000)], 80, 99, True),  # those that the settings no longer match do not count as known
        ([(20, 20)], 0, 0, False),
    ],
)
def test_the_share_counts_the_files_known_when_the_window_began(
    root: Path, passed: list[tuple[int, int]], count: int, known: int, *, too_much: bool
) -> None:
    window = [Passed(0, *one) for one in passed]
    assert is_too_much(quiet(root), window, count, known=known) is too_much


@pytest.mark.usefixtures("long_window")
def test_four_syncs_within_a_minute_share_one_window(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(root, "everos-engine.toml", '[embedder]\nkind = "none"\n')
    paths = plant(root, 100)
    assert main(["--root", str(root), "sync"]) == 0
    for first in range(0, 80, 20):
        remove(paths[first : first + 20])
        assert main(["--root", str(root), "sync"]) == 0
    assert "80 rows, 0 failed, 60 deletions held" in capsys.readouterr().out
    assert main(["--root", str(root), "release"]) == 0
    assert "60 released" in capsys.readouterr().out


@pytest.mark.usefixtures("long_window")
async def test_commands_beside_the_engine_share_its_window(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = plant(root, 100)
    async with open_engine(quiet(root), embedder=FakeEmbedder()) as engine:
        await engine.settle()
        remove(paths[:20])
        await engine.settle()
        remove(paths[20:40])
        assert await trio.to_thread.run_sync(main, ["--root", str(root), "sync"]) == 0
        assert await held_by(engine) == {"mass_delete": 20}
        remove(paths[40:60])
        named = [str(path) for path in paths[40:60]]
        assert await trio.to_thread.run_sync(main, ["--root", str(root), "sync", *named]) == 1
        assert "its deletion is held because so many files vanished" in capsys.readouterr().out
        assert await held_by(engine) == {"mass_delete": 40}
        assert {one.held for one in await engine.sync(named)} == {"mass_delete"}
        assert len(await indexed(engine)) == 80


@pytest.mark.usefixtures("long_window")
async def test_a_deletion_right_after_a_release_is_let_through(root: Path) -> None:
    paths = plant(root, 100)
    settings = quiet(root)
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        remove(paths[:30])
        await engine.settle()
        remove(paths[30:60])
        await engine.settle()
        assert await held_by(engine) == {"mass_delete": 30}
        assert len(await engine.release()) == 30
        paths[60].unlink()
        await engine.settle()
        assert await held_by(engine) == {}
        assert await indexed(engine) == described(settings)


async def test_files_that_the_settings_no_longer_match_are_not_vanished(root: Path) -> None:
    for number in range(50):
        put(root, f"notes/{number}.md", f"# word{number}\ntext")
        put(root, f"drafts/{number}.md", f"# draft{number}\ntext")
    both, one = (notes(root, *globs) for globs in (("notes/*.md", "drafts/*.md"), ("notes/*.md",)))
    fake = FakeEmbedder()
    async with open_engine(both, embedder=fake) as engine:
        assert (await engine.settle()).rows == {"note": 100}
    async with open_engine(one, embedder=fake) as engine:
        status = await engine.settle()
        assert (status.rows, status.held) == ({"note": 50}, [])
        (root / "notes" / "0.md").unlink()
        assert (await engine.settle()).rows == {"note": 49}
    async with open_engine(both, embedder=fake) as engine:
        assert (await engine.settle()).rows == {"note": 99}
    drafts = [text for call in fake.calls for text in call if text.startswith("draft")]
    assert len(drafts) == 50, "their vectors are cached"


def notes(root: Path, *globs: str) -> Settings:
    flags = {"memory.root": str(root), "note.globs": list(globs), "watch.mode": "off", "settle_milliseconds": 0}
    return load(flags, environment={}, user_file=root / "none")


async def test_files_that_vanish_between_being_queued_and_being_read_are_held_too(root: Path) -> None:
    paths = plant(root, 60)
    settings, fake = quiet(root), FakeEmbedder()
    async with open_engine(settings, embedder=fake) as engine:
        await engine.settle()
        before = await indexed(engine)
    for number, path in enumerate(paths):
        path.write_text(facts(fact(number, f"edited{number} and longer")))
    database = open_queue(settings)
    await reconcile_tree(settings, database, source="scan", deletion_guard=DeletionGuard(settings))
    database.close()
    contents = [path.read_bytes() for path in paths]
    (root / "users" / "u1" / ".atomic_facts").rename(root / "aside")
    async with open_engine(settings, embedder=fake, watching=False) as engine:
        await engine.reach(await engine.context.database.aread(queue.newest))
        assert await held_by(engine) == {"mass_delete": 60}
        assert await indexed(engine) == before
        (root / "aside").rename(root / "users" / "u1" / ".atomic_facts")
        assert [path.read_bytes() for path in paths] == contents
        await engine.settle()
        assert await held_by(engine) == {}
        assert await indexed(engine) == described(settings), "what was edited before it went is indexed when it is back"


class Deletions(RuleBasedStateMachine):
    """Two processes record deletions, in any order and split, on a virtual clock.

    The law: what they let through within a window stays within the bound, and nothing is held that fits into it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory(prefix="everos-deletions-")
        self.conditions = Path(self.directory.name) / "notes"
        self.conditions.mkdir()
        self.settings = notes(Path(self.directory.name), "notes/*.md")
        self.databases = [open_queue(self.settings) for _ in range(2)]
        self.patch = pytest.MonkeyPatch()
        for module in (reconcile, requests):
            self.patch.setattr(module, "now_milliseconds", lambda: self.now)
        self.now, self.made = 1_000_000, 0
        self.born: dict[str, int] = {}
        self.passed: list[Passed] = []

    def teardown(self) -> None:
        self.patch.undo()
        for database in self.databases:
            database.close()
        self.directory.cleanup()

    @initialize(count=st.integers(0, 120))
    def plant(self, count: int) -> None:
        self.appear(count)

    @rule(count=st.integers(1, 30))
    def appear(self, count: int) -> None:
        for _ in range(count):
            self.made += 1
            (self.conditions / f"{self.made}.md").write_text("x" * self.made)
            self.born[f"notes/{self.made}.md"] = self.now
        self.sweep(0)

    @rule(at=st.integers(0, 1), way=st.sampled_from(["sweep", "named", "events"]), share=st.floats(0, 0.4))
    def delete(self, at: int, way: str, share: float) -> None:
        there = self.there()
        chosen = there[: int(share * len(there)) + 1]
        known = self.known()
        for key in chosen:
            (self.conditions.parent / key).unlink()
        {"sweep": self.sweep, "named": lambda at: self.named(at, chosen), "events": lambda at: self.events(at, chosen)}[
            way
        ](at)
        window = [one for one in self.passed if self.now - one.at_milliseconds <= deletion_guard.WINDOW_SECONDS * 1000]
        began = window[0].at_milliseconds if window else self.now
        count = sum(self.born[key] <= began for key in chosen)
        total = count + sum(one.files for one in window)
        at_first = window[0].known if window else len(known)
        fits = not count or total <= max(self.settings.brake_least, self.settings.brake_ratio * at_first)
        gone = known - self.known()
        assert gone == (set(chosen) if fits else set()), (total, at_first)
        if fits and count:
            self.passed.append(Passed(self.now, count, len(known)))

    @rule(at=st.integers(0, 1))
    @precondition(lambda self: self.there())
    def rename(self, at: int) -> None:
        key = self.there()[0]
        self.made += 1
        new = f"notes/renamed{self.made}.md"
        (self.conditions.parent / key).rename(self.conditions.parent / new)
        self.sweep(at)
        assert key not in self.known()
        assert new in self.known()
        self.born[new] = 0  # a rename makes no file younger

    @rule(seconds=st.integers(0, 45))
    def wait(self, seconds: int) -> None:
        self.now += seconds * 1000

    @rule(at=st.integers(0, 1))
    def release(self, at: int) -> None:
        self.databases[at].write(lambda tx: held.release(tx, now_milliseconds=self.now))
        self.passed.clear()

    def there(self) -> list[str]:
        return sorted(f"notes/{path.name}" for path in self.conditions.iterdir())

    def known(self) -> set[str]:
        return {str(path) for (path,) in self.databases[0].read(lambda tx: list(tx.execute(KNOWN)))}

    def sweep(self, at: int) -> None:
        trio.run(
            lambda: reconcile_tree(
                self.settings, self.databases[at], source="sync", deletion_guard=DeletionGuard(self.settings)
            )
        )

    def named(self, at: int, keys: list[str]) -> None:
        trio.run(lambda: enqueue(self.settings, self.databases[at], keys))

    def events(self, at: int, keys: list[str]) -> None:
        """As the watcher does: many, or too many, are left to a sweep."""

        def record(tx: Transaction) -> bool:
            if len(keys) > deletion_guard.FEW or to_hold(tx, self.settings, keys, now_milliseconds=self.now):
                return False
            gone = [queue.Observation(key, "note", None) for key in keys]
            return bool(queue.record(tx, gone, source="watch", now_milliseconds=self.now))

        if not self.databases[at].write(record):
            self.sweep(at)


KNOWN = "SELECT md_path FROM md_change_state WHERE mtime_ns IS NOT NULL"
TestDeletions = Deletions.TestCase
TestDeletions.settings = budget(max_examples=12, stateful_step_count=20)
