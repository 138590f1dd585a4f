from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import unicodedata
from pathlib import Path

import hypothesis
import pytest
import trio
from hypothesis import example, given
from hypothesis import strategies as st

from everos_engine.cli.explain import as_text
from everos_engine.diagnose.explain import Explanation, as_json, explain
from everos_engine.diagnose.wording import Style, commands_in
from everos_engine.engine import open_engine, open_queue
from everos_engine.keys import key_of
from everos_engine.loops.reconcile import probe_path
from everos_engine.settings import Settings, load
from everos_engine.stores import queue
from everos_engine.system import files
from everos_engine.testing import FakeEmbedder
from everos_engine.text import kinds
from writer import FACTS, fact, facts, put

GOOD = facts(fact(1, "the heron eats fish"), fact(2, "the otter sleeps"))


@pytest.fixture
def plain(root: Path) -> Settings:
    """Without notes, so that every rule of the layout shows."""
    flags = {"memory.root": str(root), "embedder.kind": "none"}
    return load(flags, environment={}, user_file=root / "none.toml")


def told(settings: Settings, path: str | Path) -> tuple[str, str]:
    found = explain(settings, str(path))
    assert as_text(found, Style()).startswith("\x1b") is False
    assert json.loads(json.dumps(as_json(found)))["version"] == 1
    return found.diagnosis.verdict, found.diagnosis.code


def followed(found: Explanation) -> None:
    """Do literally what the remedy says, in a shell, where it names commands of the system."""
    commands = commands_in(found.diagnosis.remedy)
    assert commands, found.diagnosis
    for command in commands:
        subprocess.run(["bash", "-c", command], check=True, timeout=30)


async def test_a_file_is_followed_from_unseen_to_searchable(settings: Settings, root: Path) -> None:
    path = put(root, FACTS, GOOD)
    assert told(settings, FACTS) == ("waiting", "not_seen")
    assert "no engine is running" in explain(settings, FACTS).diagnosis.cause
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        assert told(settings, path) == ("searchable", "ok")
        assert as_json(explain(settings, path.as_posix()))["rows"] == {"ledger": 2, "index": None}
    counted = await trio.to_thread.run_sync(lambda: explain(settings, FACTS, rows=True))
    assert counted.index_rows == 2
    path.write_text(facts(fact(2, "the otter swims"), fact(3, "a third")))
    found = as_json(explain(settings, FACTS))
    entries = found["entries"]
    assert isinstance(entries, dict)
    assert [entry["id"] for entry in entries["new"]] == ["af_20250227_00000003"]
    assert [entry["id"] for entry in entries["changed"]] == ["af_20250227_00000002"]
    assert entries["gone"] == ["af_20250227_00000001"]
    assert found["code"] == "not_seen"
    path.unlink()
    assert told(settings, FACTS) == ("waiting", "deletion_not_seen")


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("users/u1/episode/x.md", "no_layout"),
        ("users/u1/User.md", "wrong_case"),
        ("users/u1/episodes/x.txt", "not_markdown"),
        ("users/u1/episodes/X.MD", "wrong_case"),
        ("users/u1/episodes/.x.md", "hidden_name"),
        ("users/u1/episodes/~x.md", "hidden_name"),
        ("users/u1/episodes/deep/x.md", "no_layout"),
        ("users/it's `odd`/episode/\n x é.md", "no_layout"),
    ],
)
def test_a_misplaced_file_gets_a_place_by_following_the_remedy(
    plain: Settings, root: Path, name: str, code: str
) -> None:
    path = put(root, name, GOOD)
    assert told(plain, path) == ("excluded", code)
    followed(explain(plain, str(path)))
    assert not path.exists()
    (moved,) = (found for found in root.rglob("*") if found.is_file())
    assert told(plain, moved)[1] in {"not_seen", "damaged"}
    assert moved.read_text() == GOOD


def test_plain_markdown_is_indexed_after_following_the_remedy(plain: Settings, root: Path) -> None:
    path = put(root, "my notes/plan.md", "# Plan\n\ntext\n")
    assert told(plain, path) == ("excluded", "no_glob")
    followed(explain(plain, str(path)))
    again = load({"memory.root": str(root)}, environment={}, user_file=root / "none.toml")
    assert told(again, path) == ("waiting", "not_seen")
    other = put(root, "other/plan.md", "# Plan\n")
    assert told(again, other) == ("excluded", "no_glob")


def test_links_and_odd_files_are_named_for_what_they_are(settings: Settings, root: Path, tmp_path: Path) -> None:
    loop = root / "users" / "u1" / "episodes" / "loop.md"
    loop.parent.mkdir(parents=True)
    loop.symlink_to(loop)
    assert told(settings, loop) == ("excluded", "link_loop")
    followed(explain(settings, str(loop)))
    assert not loop.is_symlink()
    broken = loop.with_name("broken.md")
    broken.symlink_to(tmp_path / "nowhere")
    assert told(settings, broken) == ("excluded", "broken_link")
    os.mkfifo(loop.with_name("pipe.md"))
    assert told(settings, loop.with_name("pipe.md")) == ("excluded", "not_a_file")
    loop.with_name("dir.md").mkdir()
    assert told(settings, loop.with_name("dir.md")) == ("excluded", "directory")
    put(tmp_path, "elsewhere/episodes/x.md", GOOD)
    (root / "users" / "linked").symlink_to(tmp_path / "elsewhere")
    behind = root / "users" / "linked" / "episodes" / "x.md"
    assert told(settings, behind) == ("excluded", "behind_link")
    followed(explain(settings, str(behind)))
    assert told(settings, behind)[1] != "behind_link"
    assert told(settings, root) == ("excluded", "directory")
    assert told(settings, root / ".index" / "engine" / "x.md") == ("excluded", "index_directory")
    assert told(settings, "users/u1/skills/nothing.md") == ("missing", "no_file")


def test_a_file_outside_is_copied_in_by_following_the_remedy(settings: Settings, root: Path, tmp_path: Path) -> None:
    outside = put(tmp_path, f"elsewhere/{FACTS}", GOOD)
    assert told(settings, outside) == ("excluded", "outside_root")
    followed(explain(settings, str(outside)))
    assert told(settings, root / FACTS) == ("waiting", "not_seen")


def test_a_reference_is_explained_as_a_part_of_its_skill(settings: Settings, root: Path) -> None:
    reference = put(root, "agents/a/skills/bake/references/flour.md", "rye\n")
    assert told(settings, reference) == ("excluded", "reference_without_skill")
    put(root, "agents/a/skills/bake/SKILL.md", "---\nname: bake\n---\nBake.\n")
    found = as_json(explain(settings, str(reference)))
    assert (found["key"], found["code"]) == ("agents/a/skills/bake/SKILL.md", "not_seen")


async def test_a_bad_entry_and_a_damaged_file_are_told_apart(settings: Settings, root: Path) -> None:
    path = put(root, FACTS, GOOD.replace("**timestamp**: 2025-02-27T09:25:00+00:00", "**timestamp**: soon", 1))
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        found = explain(settings, FACTS)
        assert (found.diagnosis.verdict, found.diagnosis.code) == ("partly", "bad_entries")
        assert "line 10" in found.diagnosis.cause
        path.write_text("---\nbad: [\n---\n" + GOOD)
        await engine.settle()
        found = explain(settings, FACTS)
        assert (found.diagnosis.verdict, found.diagnosis.code) == ("failed", "damaged")
        assert "still searchable: 1 last good row" in found.diagnosis.cause
        assert "line" in found.diagnosis.cause
        assert found.diagnosis.remedy.endswith(", and save")
        path.write_bytes(b"\xff\xfe")
        assert explain(settings, FACTS).diagnosis.remedy == "save the file as UTF-8"


async def test_explain_never_writes_and_imports_nothing_heavy(settings: Settings, root: Path) -> None:
    path = put(root, FACTS, facts(*(fact(number, f"fact {number}") for number in range(200))))
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()

    def state() -> dict[str, tuple[int, int]]:
        every = (found for found in root.rglob("*") if not found.name.endswith(("-wal", "-shm")))
        return {str(found): (found.stat().st_mtime_ns, found.stat().st_size) for found in every if found.is_file()}

    before = state()
    code = (
        "import sys; from everos_engine.cli.main import main; code = main(sys.argv[1:]);"
        "print(sorted({'lancedb', 'pyarrow', 'numpy', 'httpx'} & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "--root", str(root), "explain", str(path)]
    done = await trio.run_process(command, capture_stdout=True, capture_stderr=True)
    assert done.stderr.decode().strip() == "[]"
    assert "searchable" in done.stdout.decode()
    assert state() == before


def test_every_file_of_a_kind_has_an_explanation(settings: Settings, root: Path) -> None:
    for number, key in enumerate(["users/u/user.md", "agents/a/.cases/c.md", FACTS, "free.md"]):
        put(root, key, f"text {number}")
        place = kinds.recognise(key, note_globs=settings.note.globs)
        assert place is not None
        assert as_json(explain(settings, key))["kind"] == place.kind


async def test_a_file_that_was_saved_again_at_once_has_time_to_settle(settings: Settings, root: Path) -> None:
    path = put(root, FACTS, GOOD)
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
    path.write_text(GOOD + "\n")
    database = open_queue(settings)
    now = time.time_ns() // 1_000_000
    observations = [probe_path(settings, FACTS)]
    database.write(
        lambda tx: queue.record(tx, observations, source="watch", now_milliseconds=now, settle_milliseconds=60_000)
    )
    database.close()
    found = explain(settings, FACTS)
    assert (found.diagnosis.verdict, found.diagnosis.code) == ("waiting", "settling")
    assert "may still be being written" in found.diagnosis.cause


def test_a_root_that_is_gone_is_said_to_be_gone(settings: Settings, root: Path) -> None:
    put(root, FACTS, GOOD)
    root.rename(root.with_name("elsewhere"))
    assert told(settings, root / FACTS) == ("unknown", "root_missing")


@pytest.mark.parametrize("name", ["é.md", "it's.md", "a\nb.md", os.fsdecode(b"\xff.md"), "`x`.md", "%23#?.md"])
def test_odd_names_are_explained_and_their_commands_are_for_them(plain: Settings, root: Path, name: str) -> None:
    path = put(root, f"users/u1/episode/{name}", GOOD)
    found = explain(plain, str(path))
    text = as_text(found, Style())
    assert all(ord(letter) >= 32 or letter == "\n" for letter in text)
    text.encode()
    followed(found)
    assert (root / "users/u1/episodes" / name).read_text() == GOOD


UNCHECKED = [hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow]
PARTS = st.sampled_from(
    [
        "users",
        "u1",
        "episodes",
        ".atomic_facts",
        "x.md",
        "user.md",
        "..",
        ".",
        "",
        "~x.md",
        ".index",
        "SKILL.md",
        "/",
        "é",
    ]
) | st.text(min_size=1, max_size=300)


@given(parts=st.lists(PARTS, min_size=1, max_size=7), absolute=st.booleans())
@example(parts=["a\0b.md"], absolute=False)
@example(parts=["users", "u1", "episodes", "x" * 300 + ".md"], absolute=True)
@hypothesis.settings(max_examples=300, suppress_health_check=UNCHECKED)
def test_whatever_is_asked_there_is_an_answer(plain: Settings, root: Path, parts: list[str], *, absolute: bool) -> None:
    asked = os.path.join(root, *parts) if absolute else os.path.join(*parts)
    found = explain(plain, asked)
    assert found.diagnosis.verdict in {"excluded", "missing", "waiting", "unknown"}
    assert json.loads(json.dumps(as_json(found)))["cause"]
    as_text(found, Style()).encode()
    assert list(root.iterdir()) == []


FILES = st.dictionaries(
    st.sampled_from([f"users/u1/.atomic_facts/{letter}.md" for letter in "abcd"]),
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["good", "bad", "empty"])), max_size=4),
    min_size=1,
)


@given(before=FILES, after=FILES)
@hypothesis.settings(max_examples=15, suppress_health_check=UNCHECKED)
async def test_the_verdict_agrees_with_the_index(settings: Settings, root: Path, before: dict, after: dict) -> None:
    """Searchable is what the index holds as the file says, and nothing else, after any edits.

    Without file events: one that comes after the engine settled queues a file of that same moment again, to be read
    once more, and if the engine stops before that, the file waits. That is the truth too, but not this law's.
    """
    shutil.rmtree(root)
    root.mkdir()
    async with open_engine(settings, embedder=FakeEmbedder(), watching=False) as engine:
        for tree in (before, after):
            for key, entries in tree.items():
                put(root, key, facts(*(written(number, sort) for number, sort in entries)))
            await engine.settle()
        rows = (
            await engine.context.index.rows("atomic_fact") if "atomic_fact" in engine.context.index.open_kinds() else []
        )
        indexed = {(row["md_path"], row["entry_id"]): row["content_hash"] for row in rows}
    for key in before | after:
        place = kinds.recognise(key)
        assert place is not None
        document = kinds.parse(place, {key: (root / key).read_bytes()})
        said = {(key, entry.entry_id): entry.content_hash.hex() for entry in document.entries}
        held = {at: indexed[at] for at in indexed if at[0] == key}
        verdict = explain(settings, key).diagnosis.verdict
        assert (verdict == "searchable") == (bool(said) and not document.problems and said == held)
        assert (verdict == "excluded") == (not said and not document.problems)
        assert (verdict in {"partly", "failed"}) == bool(document.problems)


def written(number: int, sort: str) -> str:
    entry = fact(number, f"fact {number}")
    if sort == "bad":
        return entry.replace("2025-02-27T", "soon")
    return "" if sort == "empty" else entry


@pytest.mark.parametrize("content", [b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", b"\x89PNG\r\n\x1a\n\0\0", b"PK\x03\x04\x14\0"])
def test_what_is_no_text_is_not_to_be_renamed(content: bytes, settings: Settings, root: Path) -> None:
    path = put(root, "users/u1/episodes/scan.pdf", "")
    path.write_bytes(content)
    found = explain(settings, str(path)).diagnosis
    assert found.code == "not_markdown"
    assert not commands_in(found.remedy)
    assert "other formats are not read" in found.remedy


def test_a_remedy_moves_nothing_over_another_file(settings: Settings, root: Path) -> None:
    put(root, "notes/a.md", "# A\ntext")
    path = put(root, "notes/a.txt", "# A\nanother")
    assert not commands_in(explain(settings, str(path)).diagnosis.remedy)


@given(st.text(alphabet="aé\u00fcö\u1e9b\ud55c\uac00", min_size=1, max_size=6), st.permutations(["NFC", "NFD"]))
def test_a_name_in_the_other_unicode_form_is_found(name: str, forms: list[str]) -> None:
    stored, asked = (unicodedata.normalize(form, name) for form in forms)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(os.path.realpath(directory))
        path = put(root, f"{stored}/{stored}.md", "# A\ntext")
        settings = load(
            {"memory.root": str(root), "note.globs": ["**/*.md"]}, environment={}, user_file=root / "none.toml"
        )
        asked_path = f"{asked}/{asked}.md"
        assert files.locate(root, asked_path) == str(path)
        assert key_of(settings, asked_path) == f"{stored}/{stored}.md"
        assert explain(settings, asked_path).evidence.key == f"{stored}/{stored}.md"
