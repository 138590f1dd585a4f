from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing
from loguru import logger
from numpy.typing import NDArray

from derived import counted, described, indexed
from everos_engine.engine import Engine, open_engine, open_reader
from everos_engine.errors import AlreadyRunning, BadQuestion, OutsideRoot
from everos_engine.search import Filter
from everos_engine.settings import MemorySettings, Settings, load
from everos_engine.stores import reports
from everos_engine.testing import FakeEmbedder
from patience import HANG_SECONDS
from writer import FACTS, fact, facts, put

EXAMPLE = Path(__file__).parents[1] / "examples" / "memory"


async def failures(engine: Engine) -> dict[str, str]:
    listed = await engine.context.database.aread(reports.failed)
    return {outcome.md_path: str(outcome.error) for outcome in listed}


async def test_an_edit_an_append_and_a_delete_are_searchable_after_settle(settings: Settings, root: Path) -> None:
    path = put(root, FACTS, facts(fact(1, "the heron eats fish"), fact(2, "the otter sleeps")))
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        (hit,) = await engine.search("heron")
        assert (hit.entry_id, hit.line) == ("af_20250227_00000001", 5)
        path.write_text(facts(fact(2, "the otter swims"), fact(3, "a third")))
        await engine.settle()
        assert await engine.search("heron") == []
        assert [hit.entry_id for hit in await engine.search("swims")] == ["af_20250227_00000002"]
        path.unlink()
        status = await engine.settle()
        assert await indexed(engine) == {}
        assert (status.counts.done, status.counts.pending) == (0, 0)


async def test_a_copy_has_rows_of_its_own_and_a_rename_asks_for_no_vectors(settings: Settings, root: Path) -> None:
    original = put(root, FACTS, facts(fact(1, "one"), fact(2, "two")))
    fake = FakeEmbedder()
    async with open_engine(settings, embedder=fake) as engine:
        await engine.settle()
        calls = len(fake.calls)
        copy = original.with_name("copy.md")
        shutil.copy(original, copy)
        await engine.settle()
        assert len(await indexed(engine)) == 4
        copy.unlink()
        await engine.settle()
        assert await indexed(engine) == described(settings)
        (root / "users" / "u1").rename(root / "users" / "u1x")
        (root / "users" / "u1x").rename(root / "users" / "u1")
        original.rename(original.with_name("renamed.md"))
        await engine.settle()
        assert await indexed(engine) == described(settings)
        assert len(fake.calls) == calls


async def test_a_bad_entry_stays_local_and_keeps_its_last_good_row(settings: Settings, root: Path) -> None:
    path = put(root, FACTS, facts(fact(1, "first"), fact(2, "second")))
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        path.write_text(facts(fact(1, "first", timestamp="yesterday"), fact(2, "second edited")))
        await engine.settle()
        message = (await failures(engine))[FACTS]
        assert "line 10" in message
        assert "af_20250227_00000001" in message
        assert len(await engine.search("first")) == 1
        assert len(await engine.search("edited")) == 1
        path.write_text(facts(fact(1, "healed"), fact(2, "second edited")))
        await engine.settle()
        assert await failures(engine) == {}
        assert await indexed(engine) == described(settings)


BAD = {
    "malformed yaml": b"---\na: [1\n---\nx",
    "no frontmatter": b"just text",
    "unterminated frontmatter": b"---\na: 1\n",
    "unterminated entry": b"---\na: 1\n---\n<!-- entry:e1 -->\n",
    "nested entry": b"---\na: 1\n---\n<!-- entry:e1 -->\n<!-- entry:e2 -->\n<!-- /entry:e2 -->\n<!-- /entry:e1 -->\n",
    "deep yaml": b"---\na: " + b"[" * 30_000 + b"\n---\n",
    "alias bomb": b"---\na: &a [1]\nb: [*a, *a]\n---\n",
    "bad utf-8": b"---\na: 1\n---\n\xff\xfe",
    "nul": b"---\na: 1\n---\n\x00",
    "duplicate key": b"---\na: 1\na: 2\n---\n",
}


@pytest.mark.parametrize("name", BAD)
async def test_damage_is_named_with_its_line_and_an_edit_heals_it(name: str, settings: Settings, root: Path) -> None:
    path = put(root, FACTS, facts(fact(1, "good")))
    neighbour = put(root, "users/u1/.atomic_facts/other.md", facts(fact(7, "neighbour")))
    async with open_engine(settings, embedder=FakeEmbedder(), watching=False) as engine:
        await engine.settle()
        path.write_bytes(BAD[name])
        neighbour.write_text(facts(fact(7, "neighbour edited")))
        status = await engine.settle()
        assert (await failures(engine))[FACTS].startswith("line ")
        assert status.counts.failed_permanent == 1
        assert len(await engine.search("good")) == 1
        assert len(await engine.search("edited")) == 1
        path.write_text(facts(fact(1, "well again")))
        await engine.settle()
        assert await failures(engine) == {}


async def test_odd_names_are_indexed_and_odd_things_are_no_files(settings: Settings, root: Path) -> None:
    names = ["it's.md", 'q".md', "sp ace.md", "%41#?.md", "new\nline.md", "🦦.md", "e\u0301.md", "$(x).md"]
    for number, name in enumerate(names):
        put(root, f"notes/{name}", f"# H\nword{number}")
    (root / "notes" / "dir.md").mkdir()
    (root / "notes" / "loop").symlink_to(root)
    (root / "notes" / "self.md").symlink_to("self.md")
    raw = bytes(root) + b"/notes/caf\xe9.md"
    Path(raw.decode("utf-8", "surrogateescape")).write_text("# H\nlatin")
    async with open_engine(settings, embedder=FakeEmbedder(), watching=False) as engine:
        status = await engine.settle()
        assert status.counts.done == len(names) + 1
        assert (await engine.search("latin"))[0].md_path == "notes/caf\\xe9.md"
        assert (await engine.search("\udcff latin", only=Filter(owner="")))[0].md_path == "notes/caf\\xe9.md"
        for number, name in enumerate(names):
            assert (await engine.search(f"word{number}"))[0].md_path == f"notes/{name}"


async def test_a_hanging_text_does_not_hold_up_its_neighbours(root: Path) -> None:
    flags = {"memory.root": str(root), "note.globs": ["**/*.md"], "embedder.hedge_seconds": 0.05}
    flags |= {"embedder.deadline_seconds": HANG_SECONDS}
    settings = load(flags, environment={}, user_file=root / "none")
    put(root, "a.md", "HANG on")
    for number in range(20):
        put(root, f"n{number}.md", f"neighbour{number}")
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        counts = await counted(engine, lambda counts: counts.done == 20)
        assert counts.pending + counts.processing == 1


async def test_a_refused_text_fails_alone_and_a_flaky_one_ends_retryable(settings: Settings, root: Path) -> None:
    put(root, "a.md", "# A\nPOISON\n# B\nfine")
    put(root, "b.md", "# A\nFLAKY")
    async with open_engine(settings, embedder=FakeEmbedder(), watching=False) as engine:
        status = await engine.settle()
        assert (status.counts.failed_permanent, status.counts.failed_retryable) == (1, 1)
        assert len(await engine.search("fine")) == 1
        assert [outcome.status for outcome in await engine.fix()] == ["failed"]


async def test_another_model_never_shares_a_table(settings: Settings, root: Path) -> None:
    put(root, FACTS, facts(fact(1, "one")))
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
    async with open_engine(settings, embedder=FakeEmbedder(model="other", dimension=8)) as engine:
        put(root, FACTS, facts(fact(1, "one"), fact(2, "two")))
        await engine.settle()
        rows = await engine.context.index.rows("atomic_fact")
        assert [len(row["vector"]) for row in rows] == [8, 8]  # type: ignore[arg-type]


class GatedEmbedder(FakeEmbedder):
    """Answers once its gate is open, and tells that it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.gate = trio.Event(), trio.Event()
        self.hedged = False

    async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        if any("gated" in text for text in texts):
            self.asked.set()
            await self.gate.wait()
        return await super().embed(texts)


async def test_a_file_edited_while_claimed_is_indexed_again(settings: Settings, root: Path) -> None:
    put(root, FACTS, facts(fact(1, "gated")))
    embedder = GatedEmbedder()
    async with open_engine(settings, embedder=embedder, watching=False) as engine, trio.open_nursery() as nursery:
        nursery.start_soon(engine.settle)
        await embedder.asked.wait()
        put(root, FACTS, facts(fact(1, "edited meanwhile")))
        nursery.start_soon(engine.settle)
        while (await engine.status()).counts.lsn_max < 2:
            await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked(0.05)  # the claim loop has looked, and found nothing ready
        embedder.gate.set()
        with trio.fail_after(HANG_SECONDS):
            await engine.settle()
        assert await indexed(engine) == described(settings)


async def test_a_removed_index_heals_without_new_embeddings(settings: Settings, root: Path) -> None:
    put(root, FACTS, facts(fact(1, "one")))
    fake = FakeEmbedder()
    async with open_engine(settings, embedder=fake) as engine:
        await engine.settle()
    shutil.rmtree(settings.lancedb_directory)
    calls = len(fake.calls)
    async with open_engine(settings, embedder=fake) as engine:
        await engine.settle()
        assert await indexed(engine) == described(settings)
    assert len(fake.calls) == calls + 1  # the probe of the new start


async def test_a_table_whose_maker_died_before_its_first_manifest_is_made_again(settings: Settings, root: Path) -> None:
    put(root, FACTS, facts(fact(1, "one")))
    (settings.lancedb_directory / "atomic_fact.lance" / "_transactions").mkdir(parents=True)
    async with open_reader(settings) as reader:
        assert await reader.search("one") == []
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        assert await indexed(engine) == described(settings)


async def test_one_engine_per_root_and_paths_outside_are_refused(settings: Settings, root: Path) -> None:
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        with pytest.raises(AlreadyRunning, match="pid"):
            async with open_engine(settings, embedder=FakeEmbedder()):
                pass
        (root / "users").mkdir()
        for path, reason in (
            ("/etc/passwd.md", "outside the memory root"),
            (str(root), "is a directory"),
            ("users", "is a directory"),
            ("users/u1/.episode/day.md", "nearest layout is users/<owner>/episodes/<name>.md"),
            ("elsewhere.txt", "note.globs"),
            ("users/u1\0/user.md", "no path that a file can have"),
            ("\ud800.md", "no path that a file can have"),
        ):
            with pytest.raises(OutsideRoot, match=reason):
                await engine.sync([path])


async def test_a_question_that_cannot_be_asked_is_refused_with_the_reason(settings: Settings) -> None:
    asked: list[tuple[dict[str, Any], str]] = [
        ({"limit": 0}, "at least 1"),
        ({"mode": "exact"}, "fts, vector, hybrid"),
        ({"only": Filter(kind="essay")}, "episode, atomic_fact"),
    ]
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        for words, reason in asked:
            with pytest.raises(BadQuestion, match=reason):
                await engine.search("one", **words)


async def test_a_skill_is_indexed_again_when_a_reference_changes(settings: Settings, root: Path) -> None:
    skill = "agents/a1/skills/s1/SKILL.md"
    put(root, skill, "---\nname: s1\ndescription: d\n---\nbody")
    reference = put(root, "agents/a1/skills/s1/references/r.md", "alpaca")
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        assert (await engine.search("alpaca"))[0].md_path == skill
        reference.write_text("vicuna")
        await engine.settle()
        assert await engine.search("alpaca") == []
        assert len(await engine.search("vicuna")) == 1
        reference.unlink()
        await engine.settle()
        assert await engine.search("vicuna") == []


@pytest.mark.parametrize("seed", range(3))
async def test_after_random_operations_the_index_is_what_the_tree_says(
    seed: int, settings: Settings, root: Path
) -> None:
    chance = random.Random(seed)
    keys = [f"users/u1/.atomic_facts/{number}.md" for number in range(8)]
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        for step in range(120):
            path = root / chance.choice(keys)
            match chance.choice(["write", "write", "append", "delete", "rename", "copy"]):
                case "write":
                    put(
                        root,
                        str(path.relative_to(root)),
                        facts(*(fact(n, f"s{step}") for n in range(chance.randint(0, 4)))),
                    )
                case "append" if path.exists():
                    with path.open("a") as file:
                        file.write(fact(100 + step, f"appended {step}"))
                case "delete":
                    path.unlink(missing_ok=True)
                case "rename" if path.exists():
                    path.rename(root / chance.choice(keys))
                case "copy" if path.exists():
                    target = root / chance.choice(keys)
                    if target != path:
                        shutil.copy2(path, target)
                case _:
                    pass
            if step % 10 == 9:
                await engine.settle()
                assert await indexed(engine) == described(settings)


async def test_the_example_memory_is_indexed_whole(root: Path) -> None:
    shutil.copytree(EXAMPLE, root, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".index"))
    settings = load({"memory.root": str(root)}, environment={}, user_file=root / "none")
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        status = await engine.settle()
        assert {kind: count for kind, count in status.rows.items() if count} == {
            "episode": 1,
            "atomic_fact": 1,
            "user_profile": 1,
            "agent_skill": 1,
        }
        assert status.counts.failed_permanent + status.counts.failed_retryable == 0
        for kind, minute in ("episode", 15), ("atomic_fact", 20):
            (row,) = await engine.context.index.rows(kind)
            assert (row["owner_id"], row["session_id"], row["parent_id"]) == ("ada", "kitchen_1", "mc_1")
            assert row["timestamp"] == datetime(2025, 3, 1, 8, minute, tzinfo=UTC)


async def test_a_root_that_is_made_is_logged(settings: Settings, tmp_path: Path) -> None:
    lines: list[str] = []
    sink = logger.add(lambda line: lines.append(str(line)), level="WARNING")
    missing = tmp_path / "not" / "mounted"
    try:
        async with open_engine(replace(settings, memory=MemorySettings(root=missing)), embedder=FakeEmbedder()):
            pass
        async with open_engine(replace(settings, memory=MemorySettings(root=missing)), embedder=FakeEmbedder()):
            pass
    finally:
        logger.remove(sink)
    assert [line.split("root_made")[1].strip() for line in lines if "root_made" in line] == [f"root={missing}"]
