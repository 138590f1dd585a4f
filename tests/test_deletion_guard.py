"""An accident is never taken for deletions: each holds them, says why, and ends by itself or with `release`."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from derived import described, indexed
from everos_engine.cli.main import main
from everos_engine.diagnose.doctor import examine
from everos_engine.engine import Engine, open_engine
from everos_engine.errors import Fatal, Transient
from everos_engine.loops import deletion_guard
from everos_engine.loops.compactor import _optimize
from everos_engine.loops.deletion_guard import without_moved
from everos_engine.loops.recovery import expect_root
from everos_engine.settings import Settings, load
from everos_engine.stores.full_scan import Vanished
from everos_engine.stores.held import Reason
from everos_engine.testing import FakeEmbedder
from patience import HANG_SECONDS
from writer import fact, facts, put


def quiet(root: Path) -> Settings:
    chosen = {"memory.root": str(root), "watch.mode": "off", "scan_interval_seconds": 3600, "settle_milliseconds": 20}
    return load(chosen, environment={}, user_file=root / "none")


def plant(root: Path, count: int, user: str = "u1") -> list[Path]:
    return [
        put(
            root,
            f"users/{user}/.atomic_facts/{number}.md",
            facts(fact(number, f"word{number}", owner=user), owner=user),
        )
        for number in range(count)
    ]


async def held(engine: Engine) -> dict[Reason, int]:
    return {one.reason: one.count for one in (await engine.status()).held}


async def test_five_files_removed_pass_at_once(root: Path) -> None:
    paths = plant(root, 40)
    async with open_engine(quiet(root), embedder=FakeEmbedder()) as engine:
        await engine.settle()
        for path in paths[:5]:
            path.unlink()
        await engine.settle()
        assert len(await indexed(engine)) == 35
        assert await held(engine) == {}


async def test_a_mass_delete_is_held_over_a_restart_and_applied_by_release(root: Path) -> None:
    paths = plant(root, 100)
    settings = quiet(root)
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        for path in paths[:60]:
            path.unlink()
        put(root, "users/u1/.atomic_facts/new.md", facts(fact(500, "added meanwhile")))
        await engine.settle()
        assert await held(engine) == {"mass_delete": 60}
        assert len(await indexed(engine)) == 101
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        assert await held(engine) == {"mass_delete": 60}
        paths[60].unlink()
        await engine.settle()
        assert await held(engine) == {"mass_delete": 60}
        assert len(await indexed(engine)) == 100
        assert len(await engine.release()) == 60
        assert await indexed(engine) == described(settings)
        assert await held(engine) == {}


def test_sync_says_that_deletions_are_held(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(root, "everos-engine.toml", '[embedder]\nkind = "none"\n')
    paths = plant(root, 30)
    assert main(["--root", str(root), "sync"]) == 0
    assert capsys.readouterr().out == "in step: 30 files, 30 rows, 0 failed\n"
    for path in paths[:25]:
        path.unlink()
    assert main(["--root", str(root), "sync"]) == 0
    assert "30 rows, 0 failed, 25 deletions held: `everos-engine --root " in capsys.readouterr().out
    assert main(["--root", str(root), "status"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert (
        "because so many files vanished within a minute that it may be an accident; bring the files back, or run"
        in told
    )


async def test_held_deletions_are_let_go_of_when_the_files_come_back(root: Path) -> None:
    plant(root, 50)
    settings, fake = quiet(root), FakeEmbedder()
    async with open_engine(settings, embedder=fake) as engine:
        await engine.settle()
        (root / "users" / "u1").rename(root / "aside")
        await engine.settle()
        assert await held(engine) == {"mass_delete": 50}
        (root / "aside").rename(root / "users" / "u1")
        calls = len(fake.calls)
        await engine.settle()
        assert await held(engine) == {}
        assert await indexed(engine) == described(settings)
        assert len(fake.calls) == calls


async def test_a_renamed_directory_is_no_mass_delete(root: Path) -> None:
    plant(root, 50)
    settings = quiet(root)
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        (root / "app1" / "project1").mkdir(parents=True)
        (root / "users").rename(root / "app1" / "project1" / "users")
        await engine.settle()
        assert await held(engine) == {}
        assert len(await indexed(engine)) == 50
        assert await indexed(engine) == described(settings)


async def test_a_renamed_directory_is_no_mass_delete_where_events_told_of_the_new_names_first(root: Path) -> None:
    plant(root, 50)
    for number in range(30):
        skill = f"agents/a1/skills/s{number}"
        put(root, f"{skill}/SKILL.md", f"---\nname: s{number}\n---\nbody {'x' * number}")
        put(root, f"{skill}/references/r.md", "text")
    fake = FakeEmbedder()
    async with open_engine(quiet(root), embedder=fake) as engine:
        await engine.settle()
        (root / "app1" / "project1").mkdir(parents=True)
        for folder in ("users", "agents"):
            (root / folder).rename(root / "app1" / "project1" / folder)
        calls = len(fake.calls)
        await engine.sync([str(path) for path in sorted((root / "app1").rglob("*.md"))])
        await engine.settle()
        assert await held(engine) == {}
        assert await indexed(engine) == described(settings=engine.settings)
        assert len(fake.calls) == calls
        next((root / "app1").rglob("1.md")).unlink()
        await engine.settle()
        assert await held(engine) == {}, "one deletion soon after is not the last of many"


async def test_a_tree_removed_bit_by_bit_is_held_all_the_same(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        deletion_guard, "WINDOW_SECONDS", HANG_SECONDS
    )  # all of it is within the window, on a slow machine too
    paths = plant(root, 60)
    async with open_engine(quiet(root), embedder=FakeEmbedder()) as engine:
        await engine.settle()
        for path in paths:
            path.unlink()
            if int(path.stem) % 4 == 3:
                await engine.settle()
        assert len(await indexed(engine)) >= 60 - 20
        assert sum((await held(engine)).values()) == len(await indexed(engine))


def empty(root: Path) -> None:
    shutil.move(root / "users", root.parent / "elsewhere")


def replace(root: Path) -> None:
    root.rename(root.parent / "elsewhere")
    root.mkdir()


def rename(root: Path) -> None:
    root.rename(root.parent / "elsewhere")


def unmark(root: Path) -> None:
    (root / ".index" / "engine" / "marker").unlink()
    shutil.rmtree(root / "users" / "u1")


ACCIDENTS = {"root_empty": empty, "root_replaced": replace, "root_missing": rename, "marker_missing": unmark}


@pytest.mark.parametrize("reason", ACCIDENTS)
async def test_an_accident_to_the_root_holds_everything(reason: Reason, root: Path) -> None:
    plant(root, 30)
    plant(root, 5, user="u2")
    async with open_engine(quiet(root), embedder=FakeEmbedder()) as engine:
        await engine.settle()
        ACCIDENTS[reason](root)
        if reason == "root_missing":
            with pytest.raises(Transient, match="gone"):
                await engine.settle()
        else:
            await engine.settle()
        assert await held(engine) == {reason: 30 if reason == "marker_missing" else 35}
        counts = (await engine.status()).counts
        assert (counts.done, counts.pending) == (35, 0)
        assert sum((await engine.status()).rows.values()) == 35
        if reason == "root_missing":
            (root.parent / "elsewhere").rename(root)
            await engine.settle()
            assert await held(engine) == {}


async def test_nothing_makes_a_root_that_was_moved_away_anew(root: Path) -> None:
    plant(root, 3)
    async with open_engine(quiet(root), embedder=FakeEmbedder(), watching=False) as engine:
        await engine.settle()
        rename(root)
        engine.context.index.rotate()  # the next Session connects
        assert await engine.search("word1") == []
        with pytest.raises(Transient, match="the memory root is not there"):
            await expect_root(engine.context)
        assert not await _optimize(engine.context, "atomic_fact", alone=True)
        assert not root.exists()
        (root.parent / "elsewhere").rename(root)
        assert len(await engine.search("word1")) == 1


async def test_asking_for_a_file_that_went_with_the_marker_is_refused_with_the_reason(root: Path) -> None:
    first, *_ = plant(root, 3)
    async with open_engine(quiet(root), embedder=FakeEmbedder()) as engine:
        await engine.settle()
        (root / ".index" / "engine" / "marker").unlink()
        first.unlink()
        with trio.fail_after(HANG_SECONDS), pytest.raises(Transient, match=r"not deleted: .* marker .*release"):
            await engine.sync([str(first)])
        assert len(await indexed(engine)) == 3
        await engine.release()
        await engine.settle()
        assert len(await indexed(engine)) == 2


@pytest.mark.parametrize("reason", ["root_empty", "marker_missing"])
async def test_a_sync_beside_the_engine_brakes_like_the_engine(reason: Reason, root: Path) -> None:
    plant(root, 3)
    async with open_engine(quiet(root), embedder=FakeEmbedder()) as engine:
        await engine.settle()
        if reason == "marker_missing":
            put(root, "everos-engine.toml", "")
        ACCIDENTS[reason](root)
        with trio.fail_after(60):
            assert await trio.to_thread.run_sync(main, ["--root", str(root), "sync"]) == 0
        assert await held(engine) == {reason: 3}
        assert len(await indexed(engine)) == 3
        assert len(await engine.release()) == 3
        assert await indexed(engine) == {}


async def test_what_is_held_keeps_the_time_it_is_held_since(root: Path) -> None:
    plant(root, 3)
    async with open_engine(quiet(root), embedder=FakeEmbedder()) as engine:
        await engine.settle()
        empty(root)
        first = await engine.settle()
        assert [one.reason for one in first.held] == ["root_empty"]
        assert (await engine.settle()).held == first.held


async def test_the_index_folder_removed_under_the_engine_ends_it_with_the_reason(root: Path) -> None:
    plant(root, 3)
    async with open_engine(quiet(root), embedder=FakeEmbedder()) as engine:
        await engine.settle()
        shutil.rmtree(root / ".index")
        with pytest.raises(Fatal, match="start it again"):
            await engine.settle()


async def test_a_table_removed_under_the_engine_is_made_again(root: Path) -> None:
    plant(root, 3)
    settings, fake = quiet(root), FakeEmbedder()
    async with open_engine(settings, embedder=fake) as engine:
        await engine.settle()
        calls, commits = len(fake.calls), engine.context.progress.commits["atomic_fact"]
        shutil.rmtree(settings.lancedb_directory)
        engine.context.look_again()
        with trio.fail_after(HANG_SECONDS):
            while engine.context.progress.commits["atomic_fact"] <= commits:
                await engine.context.applied.wait_transition()
        await engine.settle()
        assert await indexed(engine) == described(settings)
        assert len(fake.calls) == calls


async def test_a_directory_that_answers_with_an_io_error_keeps_its_rows(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(root, 4)
    other = plant(root, 3, user="u2")
    real = os.scandir

    def broken(path: str) -> object:
        if str(path).endswith("u1/.atomic_facts"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return real(path)

    settings = quiet(root)
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        with monkeypatch.context() as patched:
            patched.setattr(os, "scandir", broken)
            other[0].write_text(facts(fact(0, "edited elsewhere", owner="u2"), owner="u2"))
            await engine.settle()
            told = {one.name: one for one in await trio.to_thread.run_sync(examine, settings, ["root", "held"])}
        assert await held(engine) == {"unreadable": 4}
        assert len(await indexed(engine)) == 7
        assert len(await engine.search("edited")) == 1
        assert "Input/output error" in told["root"].cause
        assert "dmesg" in told["root"].remedy
        assert "chmod" not in told["root"].remedy + told["held"].remedy
        await engine.settle()
        assert await held(engine) == {}


UNREADABLE = """
import os, subprocess, sys, trio
from pathlib import Path
from everos_engine.engine import open_engine
from everos_engine.settings import load
from everos_engine.diagnose.wording import commands_in
from everos_engine.testing import FakeEmbedder
root = Path({root!r})
flags = {{"memory.root": str(root), "watch.mode": {mode!r}, "scan_interval_seconds": 3600}}
settings = load(flags, environment={{}}, user_file=root / "none")
async def main():
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        os.chmod(root / "users" / "u1", 0)
        status = await engine.settle()
        print([(one.reason, one.count) for one in status.held], sum(status.rows.values()))
        engine.context.look_again()
        while "unreadable_directory" not in engine.context.conditions.now:
            await trio.sleep(0.05)
        if {releasing}:
            print({{outcome.status for outcome in await engine.release()}}, await engine.search("word1"))
            status = await engine.settle()
            print(status.held, sum(status.rows.values()))
        (command,) = commands_in(engine.context.conditions.now["unreadable_directory"].remedy)
        subprocess.run(["bash", "-c", command], check=True, cwd="/")
        status = await engine.settle()
        print(status.held, sum(status.rows.values()))
trio.run(main)
"""
WITHOUT_OVERRIDE = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
"""As root every directory can be read; without this capability, root is like any other user."""


@pytest.mark.skipif(os.getuid() == 0 and not shutil.which("setpriv"), reason="root reads everything")
@pytest.mark.parametrize("mode", ["off", "events"])
def test_a_directory_without_permission_keeps_its_rows(mode: str, root: Path) -> None:
    plant(root, 6)
    assert without_permission(root, mode, releasing=False) == ["[('unreadable', 6)] 6", "[] 6"]


@pytest.mark.skipif(os.getuid() == 0 and not shutil.which("setpriv"), reason="root reads everything")
def test_a_directory_without_permission_that_is_released_leaves_the_index_until_it_can_be_read(root: Path) -> None:
    plant(root, 6)
    assert without_permission(root, "off", releasing=True) == [
        "[('unreadable', 6)] 6",
        "{None} []",
        "[] 0",
        "[] 6",
    ]


def without_permission(root: Path, mode: str, *, releasing: bool) -> list[str]:
    """What an engine says while a directory may not be read: held and rows, before and after."""
    code = UNREADABLE.format(root=str(root), mode=mode, releasing=releasing)
    command = [*(WITHOUT_OVERRIDE if os.getuid() == 0 else []), sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def mounted(root: Path) -> Iterator[Path]:
    """A file system mounted at users/u1 of the root."""
    point = root / "users" / "u1"
    point.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "none", point], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("may not mount")
    yield point
    subprocess.run(["umount", "-l", point], capture_output=True, check=False)


async def test_an_unmounted_part_of_the_tree_keeps_its_rows(root: Path, mounted: Path) -> None:
    plant(root, 3)
    plant(root, 2, user="u2")
    settings = quiet(root)
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        subprocess.run(["umount", "-l", mounted], check=True)
        await engine.settle()
        assert await held(engine) == {"unmounted": 3}
        assert len(await indexed(engine)) == 5
        assert len(await engine.release()) == 3
        assert await indexed(engine) == described(settings)


async def test_a_mount_that_was_let_go_of_is_not_expected_any_more(root: Path, mounted: Path) -> None:
    plant(root, 3)
    settings = quiet(root)
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        subprocess.run(["umount", "-l", mounted], check=True)
        put(root, "users/u2/.atomic_facts/0.md", facts(fact(0, "elsewhere", owner="u2"), owner="u2"))
        await engine.settle()
        assert len(await engine.release()) == 3
        (path,) = plant(root, 1)  # from now on the files lie in the directory itself
        await engine.settle()
        path.unlink()
        await engine.settle()
        assert await held(engine) == {}
        assert await indexed(engine) == described(settings)


async def test_an_unmounted_root_keeps_every_row(tmp_path: Path) -> None:
    root = tmp_path / "disk"
    root.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", root], capture_output=True, check=False).returncode:
        pytest.skip("may not mount")
    try:
        plant(root, 12)
        async with open_engine(quiet(root), embedder=FakeEmbedder()) as engine:
            await engine.settle()
            subprocess.run(["umount", "-l", root], check=True)
            await engine.settle()
            assert await held(engine) == {"root_replaced": 12}
            status = await engine.status()
            assert (status.counts.done, status.rows) == (12, {"atomic_fact": 12})
            plant(root, 1, user="u9")  # somebody writes below the mount point
            engine.context.look_again()
            with trio.fail_after(HANG_SECONDS):
                while (await engine.status()).counts.delayed == 0:
                    await trio.sleep(0.05)
            status = await engine.status()
            assert (await held(engine), status.rows) == ({"root_replaced": 12}, {"atomic_fact": 12})
            assert status.counts.failed_retryable == 0
    finally:
        subprocess.run(["umount", "-l", root], capture_output=True, check=False)


def test_a_moved_file_is_matched_once() -> None:
    one, two = (Vanished(name, "note", 5, 7, elsewhere=False) for name in "ab")
    assert without_moved([one, two], [(5, 7)]) == ([two], [one])
