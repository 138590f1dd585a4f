"""Nobody else can read the index, and it is never written through a link."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from everos_engine.diagnose.doctor import examine
from everos_engine.engine import open_engine
from everos_engine.errors import Fatal
from everos_engine.settings import Settings
from everos_engine.testing import FakeEmbedder
from patience import HANG_SECONDS
from writer import fact, facts, put

FACTS = "users/u1/.atomic_facts/facts.md"


def open_to_others(index: Path) -> list[str]:
    """Everything at and below the index that anybody but its owner may use."""
    return [
        f"{stat.filemode(path.lstat().st_mode)} {path.name}"
        for path in (index, *index.rglob("*"))
        if path.lstat().st_mode & 0o077
    ]


def sync(root: Path, **environment: str) -> None:
    program = f"import os; os.umask(0o022); os.execv({sys.executable!r}, {[sys.executable, '-m', 'everos_engine', '--root', str(root), 'sync']!r})"
    env = os.environ | {"EVEROS_EMBEDDER__KIND": "none"} | environment
    subprocess.run([sys.executable, "-c", program], check=True, env=env, timeout=HANG_SECONDS, capture_output=True)


def test_everything_that_a_command_creates_is_for_its_owner(root: Path) -> None:
    put(root, FACTS, facts(fact(1, "heron")))
    sync(root)
    assert open_to_others(root / ".index") == []


async def test_everything_below_an_embedded_engines_index_is_behind_a_closed_door(
    root: Path, settings: Settings
) -> None:
    put(root, FACTS, facts(fact(1, "heron")))
    before = os.umask(0o022)
    try:
        async with open_engine(settings, embedder=FakeEmbedder()) as engine:
            await engine.settle()
            assert (root / ".index").stat().st_mode & 0o777 == 0o700
            assert open_to_others(settings.engine_directory) == []
            assert settings.control_socket.is_socket()
    finally:
        os.umask(before)


def test_an_index_that_was_open_to_others_is_closed_by_the_next_start(root: Path, settings: Settings) -> None:
    put(root, FACTS, facts(fact(1, "heron")))
    sync(root)
    for path in (root / ".index").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (root / ".index").chmod(0o755)
    (found,) = examine(settings, ["private"], offline=True)
    assert (found.verdict, "chmod go-rwx" in found.remedy) == ("warn", True)
    sync(root)
    assert open_to_others(root / ".index") == []
    assert examine(settings, ["private"], offline=True)[0].verdict == "ok"


def test_the_remedy_of_doctor_closes_it(root: Path, settings: Settings) -> None:
    put(root, FACTS, facts(fact(1, "heron")))
    sync(root)
    (root / ".index").chmod(0o755)
    (found,) = examine(settings, ["private"], offline=True)
    subprocess.run(["bash", "-c", found.as_json()["commands"][0]], check=True, timeout=HANG_SECONDS)  # type: ignore[index]
    assert examine(settings, ["private"], offline=True)[0].verdict == "ok"


def test_a_group_may_be_given_permission_to_read(root: Path) -> None:
    put(root, FACTS, facts(fact(1, "heron")))
    sync(root, EVEROS_MEMORY__INDEX_ACCESS="group")
    index = root / ".index"
    assert index.stat().st_mode & 0o777 == 0o750
    modes = {path.lstat().st_mode & 0o777 for path in index.rglob("*")}
    assert modes == {0o750, 0o640}


@pytest.mark.parametrize("name", ["engine/engine.lock", "engine/engine.db", "engine", "lancedb/note.lance/data"])
async def test_an_index_with_a_link_in_it_is_not_written(name: str, root: Path, settings: Settings) -> None:
    put(root, FACTS, facts(fact(1, "heron")))
    target = root.parent / "precious"
    if name.endswith((".lock", ".db")):
        target.write_text("precious")
    else:
        target.mkdir()
    link = root / ".index" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(target)
    with pytest.raises(Fatal, match="never written through links"):
        async with open_engine(settings, embedder=FakeEmbedder()):
            pass
    assert target.read_text() == "precious" if target.is_file() else not any(target.iterdir())


async def test_the_index_may_be_on_another_disk_but_not_in_any_folder(root: Path, settings: Settings) -> None:
    put(root, FACTS, facts(fact(1, "heron")))
    elsewhere = root.parent / "elsewhere"
    elsewhere.mkdir()
    (root / ".index").symlink_to(elsewhere)
    for _ in range(2):
        async with open_engine(settings, embedder=FakeEmbedder()) as engine:
            await engine.settle()
            assert len(await engine.search("heron")) == 1
    other = root.parent / "other"
    other.mkdir()
    (other / "letter.txt").write_text("precious")
    (root / ".index").unlink()
    (root / ".index").symlink_to(other)
    with pytest.raises(Fatal, match="neither empty nor an index"):
        async with open_engine(settings, embedder=FakeEmbedder()):
            pass
    assert [path.name for path in other.iterdir()] == ["letter.txt"]
