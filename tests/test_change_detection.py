"""Every way a file changes without looking changed is found by the next sweep."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from derived import counted, described, indexed
from everos_engine.cli.explain import as_text
from everos_engine.diagnose.explain import explain
from everos_engine.diagnose.status import snapshot
from everos_engine.diagnose.wording import Style
from everos_engine.engine import Engine, open_engine, open_queue
from everos_engine.errors import OutsideRoot, Transient
from everos_engine.loops.requests import enqueue
from everos_engine.search import Filter
from everos_engine.settings import Settings, load
from everos_engine.stores import meta, queue
from everos_engine.system import files
from everos_engine.testing import FakeEmbedder
from everos_engine.text import kinds
from patience import HANG_SECONDS
from writer import FACTS, fact, facts, put


def quiet(root: Path, **flags: object) -> Settings:
    """Nothing but what the test asks for finds changes: no events, no sweep on a beat."""
    chosen = {"watch.mode": "off", "scan_interval_seconds": 3600, "note.globs": ["**/*.md"], "settle_milliseconds": 20}
    return load({"memory.root": str(root), **chosen, **flags}, environment={}, user_file=root / "none")


def with_times_of(path: Path, change: Callable[[], object]) -> None:
    before = path.stat()
    change()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


async def test_an_edit_of_the_same_size_with_its_mtime_restored_is_found(root: Path) -> None:
    path = put(root, FACTS, facts(fact(1, "abc")))
    settings = quiet(root)
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        with_times_of(path, lambda: path.write_text(facts(fact(1, "xyz"))))
        await engine.settle()
        assert await indexed(engine) == described(settings)
        assert len(await engine.search("xyz")) == 1


async def test_a_copy_that_keeps_times_over_a_file_is_found(root: Path, tmp_path: Path) -> None:
    path = put(root, FACTS, facts(fact(1, "abc")))
    settings = quiet(root)
    other = tmp_path / "other.md"
    other.write_text(facts(fact(1, "xyz")))
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        subprocess.run(["cp", "-p", other, path], check=True)
        await engine.settle()
        assert await indexed(engine) == described(settings)
        assert len(await engine.search("xyz")) == 1


async def test_branches_checked_out_and_back_cost_no_second_embedding(root: Path) -> None:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *words], cwd=root, check=True, capture_output=True)

    for number in range(12):
        put(root, f"notes/{number}.md", f"# A\nmain {number}")
    (root / ".gitignore").write_text(".index\n")
    git("init", "-q", "-b", "main")
    git("add", "-A")
    git("commit", "-qm", "main")
    git("checkout", "-qb", "side")
    for number in range(0, 12, 2):
        put(root, f"notes/{number}.md", f"# A\nside {number}")
    (root / "notes" / "1.md").unlink()
    git("commit", "-qam", "side")
    settings, fake = quiet(root), FakeEmbedder()
    async with open_engine(settings, embedder=fake) as engine:
        await engine.settle()
        git("checkout", "-q", "main")
        await engine.settle()
        assert await indexed(engine) == described(settings)
        calls = len(fake.calls)
        for branch in ("side", "main", "side"):
            git("checkout", "-q", branch)
            await engine.settle()
            assert await indexed(engine) == described(settings)
        assert len(fake.calls) == calls


async def test_a_mirror_that_keeps_times_is_found(root: Path, tmp_path: Path) -> None:
    """What `rsync -t` does: a temporary file with the source's mtime takes the target's place."""
    path = put(root, FACTS, facts(fact(1, "abc")))
    old = time.time_ns() - 10**15
    settings = quiet(root)
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        source = tmp_path / "source.md"
        source.write_text(facts(fact(1, "from afar")))
        os.utime(source, ns=(old, old))
        if shutil.which("rsync"):
            subprocess.run(["rsync", "-t", source, path], check=True)
        else:
            temporary = path.with_name(".temporary")
            shutil.copy2(source, temporary)
            temporary.replace(path)
        await engine.settle()
        assert len(await engine.search("afar")) == 1


async def test_edits_while_the_engine_is_down_are_found_at_the_start(root: Path) -> None:
    path = put(root, FACTS, facts(fact(1, "abc")))
    going = put(root, "users/u1/.atomic_facts/going.md", facts(fact(9, "going")))
    settings = quiet(root)
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
    with_times_of(path, lambda: path.write_text(facts(fact(1, "xyz"))))
    going.unlink()
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        assert await indexed(engine) == described(settings)


async def test_writes_within_one_tick_of_the_clock_are_all_found(root: Path) -> None:
    """Content of one size, written as fast as it goes: many observations fall into the tick of a later write."""
    chance = random.Random(7)
    settings = quiet(root, settle_milliseconds=0)
    paths = [put(root, f"users/u1/.atomic_facts/{number}.md", facts(fact(1, "0000"))) for number in range(5)]
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        for _ in range(20):
            for _ in range(500):
                chance.choice(paths).write_text(facts(fact(1, f"{chance.randrange(10):04}")))
            await engine.settle()
            assert await indexed(engine) == described(settings)


async def test_a_touched_file_costs_no_embedding_and_no_commit(root: Path) -> None:
    path = put(root, FACTS, facts(fact(1, "abc")))
    settings, fake = quiet(root), FakeEmbedder()
    async with open_engine(settings, embedder=fake) as engine:
        await engine.settle()
        commits, calls = dict(engine.context.progress.commits), len(fake.calls)
        path.touch()
        await engine.settle()
        assert (engine.context.progress.commits, len(fake.calls)) == (commits, calls)


async def test_an_audit_finds_what_no_fingerprint_tells(root: Path) -> None:
    path = put(root, FACTS, facts(fact(1, "abc")))
    settings = quiet(root)
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        path.write_text(facts(fact(1, "xyz")))
        stat = path.stat()

        def forge(tx: queue.Transaction) -> None:
            """A file system that kept every number: as if the edit had left no trace."""
            numbers = (stat.st_mtime_ns, stat.st_size, stat.st_ino, stat.st_ctime_ns)
            list(
                tx.execute(
                    "UPDATE md_change_state SET racy = 0, mtime_ns = ?, size = ?, ino = ?, ctime_ns = ?", numbers
                )
            )

        await engine.context.database.awrite(forge)
        await engine.settle()
        assert await engine.search("xyz") == []
        assert await engine.audit() == [FACTS]
        assert len(await engine.search("xyz")) == 1
        assert await engine.audit() == []


async def test_the_rolling_audit_reads_the_whole_tree_by_itself(root: Path) -> None:
    put(root, FACTS, facts(fact(1, "abc")))
    settings = quiet(root, audit_interval_hours=1e-9)
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        with trio.fail_after(HANG_SECONDS):
            while await engine.context.database.aread(lambda tx: meta.get(tx, "last_audit")) is None:
                await trio.sleep(0.2)


@pytest.mark.parametrize("way", ["made", "moved in"])
async def test_files_of_a_new_directory_are_indexed_by_events_alone(way: str, root: Path, tmp_path: Path) -> None:
    flags = {"memory.root": str(root), "scan_interval_seconds": 3600, "note.globs": ["**/*.md"]}
    settings = load(flags, environment={}, user_file=root / "none")
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        await watching(engine)
        base = root if way == "made" else tmp_path / "outside"
        for number in range(500):
            put(base, f"new/deep/d{number % 7}/{number}.md", f"# A\nword {number}")
        if way == "moved in":
            (base / "new").rename(root / "new")
        await counted(engine, lambda counts: counts.done == 500)
        assert await indexed(engine) == described(settings)


async def test_a_file_that_looks_torn_is_given_time_to_settle(root: Path) -> None:
    path = put(root, FACTS, facts(*(fact(number, f"t{number}") for number in range(6))))
    settings = quiet(root, settle_milliseconds=60_000)
    async with open_engine(settings, embedder=FakeEmbedder()) as engine, trio.open_nursery() as nursery:
        await engine.settle()
        whole = path.read_text()
        path.write_text(whole[: len(whole) // 4])  # as a writer leaves it in the midst of its work
        nursery.start_soon(engine.sync, [FACTS])
        while (await engine.status()).counts.delayed == 0:
            await trio.sleep(0.01)
        assert len(await indexed(engine)) == 6
        path.write_text(whole)
        await engine.sync([FACTS])  # asks for it now, whatever time it has left
        assert await indexed(engine) == described(settings)
        assert (await engine.status()).counts.failed_permanent == 0


async def test_an_empty_reference_may_be_in_the_midst_of_being_written(root: Path) -> None:
    skill = "agents/a1/skills/bake/"
    put(root, f"{skill}SKILL.md", "---\nname: bake\n---\nKnead.\n")
    reference = put(root, f"{skill}references/oven.md", "220 degrees")
    settings = quiet(root, settle_milliseconds=60_000)
    async with open_engine(settings, embedder=FakeEmbedder()) as engine, trio.open_nursery() as nursery:
        await engine.settle()
        before = await indexed(engine)
        reference.write_text("")  # as writing in place begins
        nursery.start_soon(engine.sync, [f"{skill}SKILL.md"])
        while (await engine.status()).counts.delayed == 0:
            await trio.sleep(0.01)
        assert await indexed(engine) == before
        reference.write_text("200 degrees")
        await engine.sync([f"{skill}SKILL.md"])
        assert await indexed(engine) == described(settings) != before


async def test_a_file_that_comes_back_with_its_old_times_is_indexed_again(root: Path, tmp_path: Path) -> None:
    path = put(root, FACTS, facts(fact(1, "heron")))
    settings = quiet(root)
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        before = path.stat()
        path.rename(tmp_path / "aside.md")
        await engine.settle()
        assert await indexed(engine) == {}
        (tmp_path / "aside.md").rename(path)
        assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
        await engine.settle()
        assert await indexed(engine) == described(settings)


async def test_a_file_that_vanishes_after_it_was_queued_leaves_no_rows(root: Path) -> None:
    path = put(root, FACTS, facts(fact(1, "heron")))
    other = put(root, "users/u1/.atomic_facts/other.md", facts(fact(2, "otter")))
    settings = quiet(root)
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
    path.write_text(facts(fact(1, "edited")))
    database = open_queue(settings)
    await enqueue(settings, database, [str(path), str(other)])  # as another process does, with no engine to serve it
    database.close()
    path.unlink()
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.reach(await engine.context.database.aread(queue.newest))
        assert await indexed(engine) == described(settings)
        assert len(await engine.search("otter")) == 1
        assert await engine.search("heron") == []


def test_a_file_rewritten_while_it_is_read_is_never_torn(tmp_path: Path) -> None:
    path, stop = put(tmp_path, "n.md", "a" * 200_000), threading.Event()
    place = kinds.Place("n.md", "note", "default", "default", "", "")

    def rewrite() -> None:
        while not stop.is_set():
            for letter in "ab":
                with path.open("r+b", buffering=0) as file:
                    for _ in range(20):
                        file.write(letter.encode() * 10_000)

    writer = threading.Thread(target=rewrite)
    writer.start()
    whole = refused = 0
    try:
        while whole + refused < 300:
            try:
                content = files.read(tmp_path, place, max_file_bytes=1 << 20).sources["n.md"]
            except Transient:
                refused += 1
                continue
            whole += 1
            assert len(set(content)) <= 2
            assert content.rstrip(b"b").strip(b"a") == b"" or content.rstrip(b"a").strip(b"b") == b""
    finally:
        stop.set()
        writer.join()


async def watching(engine: Engine) -> None:
    with trio.fail_after(HANG_SECONDS):
        while not engine.context.progress.watching:
            await trio.sleep(0.01)


@pytest.mark.parametrize("mode", ["off", "events"])
async def test_what_lies_behind_a_link_to_a_directory_is_not_indexed(mode: str, root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    settings = quiet(root, **{"watch.mode": mode})
    put(root, "real/a.md", "# A\nthe heron")
    put(root, "agents/a1/skills/bake/SKILL.md", "---\nname: bake\ndescription: how\n---\nbread\n")
    put(outside, "x.md", "# X\nthe otter")
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        (root / "linked").symlink_to(outside)
        (root / "alias").symlink_to(root / "real")
        (root / "agents/a1/skills/bake/references").symlink_to(outside)
        put(outside, "y.md", "# Y\nthe beaver")
        put(root, "alias/a.md", "# A\nthe heron and the crane")
        for asked in ("linked/x.md", str(root / "alias" / "a.md")):
            with pytest.raises(OutsideRoot, match="links to directories are not followed"):
                await engine.sync([asked])
        await engine.sync([str(root / "agents/a1/skills/bake/SKILL.md")])
        if mode == "events":
            put(root, "last.md", "# L\nlast")
            await counted(engine, lambda counts: counts.done == 3)
        await engine.settle()
        assert await indexed(engine) == described(settings)
        assert {key for key, _ in await indexed(engine)} - {"last.md"} == {
            "real/a.md",
            "agents/a1/skills/bake/SKILL.md",
        }
        assert not await engine.search("otter")
        assert len(await engine.search("crane")) == 1


async def test_an_edit_by_a_link_to_a_directory_is_seen_by_events(root: Path) -> None:
    settings = quiet(root, **{"watch.mode": "events"})
    put(root, "real/a.md", "# A\nthe heron")
    (root / "alias").symlink_to(root / "real")
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        with trio.fail_after(HANG_SECONDS):
            while not engine.context.progress.watching:
                await trio.sleep(0.01)
        await engine.settle()
        put(root, "real/b.md", "# B\nthe otter")
        await counted(engine, lambda counts: counts.done == 2)


async def test_renaming_an_owners_folder_moves_its_rows_and_warns(root: Path) -> None:
    settings, embedder = quiet(root, brake_ratio=1), FakeEmbedder()
    put(root, FACTS, facts(fact(1, "the heron"), fact(2, "the otter")))
    put(root, "users/u1/user.md", "---\nuser_id: u1\nsummary: likes herons\n---\nbody\n")
    async with open_engine(settings, embedder=embedder) as engine:
        await engine.settle()
        before = len([text for call in embedder.calls for text in call])
        (root / "users/u1").rename(root / "users/u2")
        status = await engine.settle()
        assert (status.counts.failed_permanent, status.counts.failed_retryable, sum(status.rows.values())) == (0, 0, 3)
        assert await indexed(engine) == described(settings)
        assert {path.split("/")[1] for path, _ in await indexed(engine)} == {"u2"}
        assert len([text for call in embedder.calls for text in call]) == before
        assert [hit.md_path for hit in await engine.search("otter", only=Filter(owner="u1"))] == [
            FACTS.replace("u1", "u2")
        ]
        found = snapshot(settings).moment
        assert found is not None
        assert found.warnings is not None
        assert found.warnings[0] == 2
        assert "is not the folder's owner, 'u2'" in as_text(explain(settings, FACTS.replace("u1", "u2")), Style())
        put(root, FACTS.replace("u1", "u2"), facts(fact(1, "the heron", owner="u2"), owner="u2"))
        (root / "users/u2/user.md").unlink()
        await engine.settle()
        found = snapshot(settings).moment
        assert found is not None
        assert found.warnings is None
